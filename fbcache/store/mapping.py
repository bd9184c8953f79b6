"""Read-only maps of whole files that keep no descriptor.

Guarantees:

- A map is read-only: the pages are mapped ``PROT_READ``, and numpy refuses to make an array over
  them writeable. A codec may open them to writes by native code (:mod:`fbcache.codec.pages`); those
  change this process's own copies of the pages that they meet, for the map is private. What was
  never opened costs the same as a shared map, and counts towards no limit on memory.
- No descriptor stays open behind a map (CPython 3.13 on any POSIX system, older ones on
  Linux), so ``RLIMIT_NOFILE`` does not bound how many there are.
- The process never holds more than ``LIVE_MAPS.bound`` of them; past it, or when the kernel
  refuses, :func:`try_map` gives None and its caller reads instead.
- Unmapping takes no Python code: the last view dropped deallocates the ``mmap`` object, and
  that calls ``munmap``. The only finalizer is a weak reference's callback that appends to a
  deque (invariant 7).

No lock is taken here, so that neither a finalizer nor a fork can meet one that is held. What
is shared is one dict and one deque, whose single operations are atomic; threads that map at
the same instant may overshoot the bound by one each, which its slack is for.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import sys
import weakref
from collections import deque
from typing import Protocol

import numpy as np

from fbcache.codec.pages import Pages

#: Left to everything else that maps memory: libraries, thread stacks, allocators.
_SLACK = 1024

#: The kernel's default, for where /proc does not tell.
_MAX_MAP_COUNT = 65530

#: What the kernel says when it has no map, or no descriptor, or no such operation to give.
_REFUSALS = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV})

if sys.version_info >= (3, 13):
    KEEPS_DESCRIPTOR = False

    def map_file(fd: int, nbytes: int) -> Pages:
        """Map the first ``nbytes`` of ``fd`` read-only; ``fd`` may be closed at once."""
        return Pages(fd, nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ, trackfd=False)

elif sys.platform == "linux" and sys.implementation.name == "cpython" and sys.maxsize > 2**32:
    KEEPS_DESCRIPTOR = False

    #: Not in the mmap module. The same numbers on every 64-bit Linux that CPython supports, but
    #: where ``MAP_NORESERVE`` has another one this one means nothing.
    _MAP_FIXED = 0x10
    _MAP_NORESERVE = 0x4000
    _HUGE = 2 << 20
    _MAP_FAILED = ctypes.c_void_p(-1).value

    _libc_mmap = ctypes.CDLL(None, use_errno=True).mmap
    _libc_mmap.restype = ctypes.c_void_p
    _libc_mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )

    def map_file(fd: int, nbytes: int) -> Pages:
        """Map the first ``nbytes`` of ``fd`` read-only; ``fd`` may be closed at once.

        The map may be longer than the file; what follows are zeros.

        ``mmap.mmap(fd, ...)`` duplicates the descriptor and keeps it. So the object is made over
        anonymous pages that nobody can write, and the file's pages are put in their place: its
        owner's ``munmap`` does not care what lies there.
        """
        # A whole number of huge pages is placed at the edge of one, and then so is the file: the
        # kernel fills in larger pieces at each fault, and reading all of 256 MiB takes half the time.
        room = nbytes if nbytes < _HUGE else -(-nbytes // _HUGE) * _HUGE
        place = Pages(-1, room, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        address = np.frombuffer(place, np.uint8).__array_interface__["data"][0]
        # Pages that are opened to writes are hardly ever written to, so no room is set aside for that.
        flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        placed = _libc_mmap(address, nbytes, mmap.PROT_READ, flags, fd, 0)
        # On failure the anonymous pages are still there: Linux checks the file and the number of
        # maps before it takes the old ones away. Deallocating ``place`` unmaps them.
        if placed == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return place

else:
    KEEPS_DESCRIPTOR = True

    def map_file(fd: int, nbytes: int) -> Pages:
        """Map the first ``nbytes`` of ``fd`` read-only, holding a duplicate of ``fd``."""
        return Pages(fd, nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ)


class Maps(Protocol):
    """The one system call that :func:`try_map` makes; see :class:`fbcache.store.disk.Disk`."""

    def mmap(self, fd: int, nbytes: int) -> mmap.mmap:
        """Map the first ``nbytes`` of ``fd`` read-only."""
        ...


def default_bound() -> int:
    """Half of the maps that the kernel allows this process, and of its descriptors if maps keep them."""
    bound = _max_map_count() // 2 - _SLACK
    if KEEPS_DESCRIPTOR:
        bound = min(bound, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    return max(bound, 0)


def _max_map_count() -> int:
    try:
        with open("/proc/sys/vm/max_map_count") as file:
            return int(file.read())
    except (OSError, ValueError):
        return _MAX_MAP_COUNT


class LiveMaps:
    """Counts the maps that are still mapped.

    Attributes
    ----------
    bound : int
        Most maps at once.
    """

    __slots__ = ("_dead", "_live", "bound")

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._live: dict[int, weakref.ref[mmap.mmap]] = {}
        self._dead: deque[weakref.ref[mmap.mmap]] = deque()

    def __len__(self) -> int:
        """How many are mapped now."""
        while self._dead:
            try:
                gone = self._dead.popleft()
            except IndexError:  # another thread took the last one
                break
            self._live.pop(id(gone), None)
        return len(self._live)

    def add(self, mapped: mmap.mmap) -> None:
        """Count ``mapped`` until it is deallocated."""
        watch = weakref.ref(mapped, self._dead.append)
        self._live[id(watch)] = watch


#: Every map of this process.
LIVE_MAPS = LiveMaps(default_bound())


def try_map(disk: Maps, fd: int, nbytes: int) -> memoryview | None:
    """Map the first ``nbytes`` of ``fd`` read-only, if there is a map to be had.

    Returns
    -------
    memoryview or None
        The file, read-only; the map lives as long as a view of it does. None past the bound on
        live maps, or when the kernel has no map (or, where maps keep one, no descriptor) to give.

    Raises
    ------
    OSError
        Any other failure. Nothing is mapped, and ``fd`` is as it was.
    """
    if len(LIVE_MAPS) >= LIVE_MAPS.bound:
        return None
    try:
        mapped = disk.mmap(fd, nbytes)
    except OSError as error:
        if error.errno in _REFUSALS:
            return None
        raise
    LIVE_MAPS.add(mapped)
    return memoryview(mapped)[:nbytes]
