"""The main job, to try a pool on: a matrix product, out of core, checked against numpy.

``command``
    what ``fbcache demo`` takes from the command line, and its exit codes
``report``
    the progress bar and the table; all that needs rich
``job``
    a plan made of sizes or of files, and its run: fill, multiply, check, save
``product``
    the product itself, tile by tile over a pool: the part to read as an example
``check``
    whether the product is right, by other means than the pool's
``inputs``, ``output``
    arrays of the user's own, and the file that the product goes to
``matrices``
    where tiles come from
``watch``
    the highest use of memory, as the pool and as the system count it

Only ``command`` and ``report`` need more than the library itself.
"""
