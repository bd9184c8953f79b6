"""The files that a value can be exported to: what fits into each, and how it is written.

Guarantee: an array's memory is written from where it lies; no format copies all of it, but pickle where the
array has a mask or does not fill its memory.
"""

from __future__ import annotations

import copyreg
import pickle
import warnings
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from fbcache.codec.memory import alias, bounds
from fbcache.shell import parquet
from fbcache.shell.describing import described
from fbcache.shell.ending import Refused
from fbcache.shell.target import Sink

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of file.

    Attributes
    ----------
    suffix : str
        What its names end with.
    takes : str
        What fits into it, for messages.
    fits : callable
        Whether a value does.
    write : callable
        Writes one that does; raises :class:`Refused` where a part of it turns out not to fit.
    check : callable
        Raises :class:`Refused` if what it needs is not installed.
    """

    suffix: str
    takes: str
    fits: Callable[[Any], bool]
    write: Callable[[Any, Sink], None]
    check: Callable[[], None] = lambda: None


# ---------------------------------------------------------------------------------- .npy


def _fits_npy(value: Any) -> bool:
    if not isinstance(value, (np.ndarray, np.generic)) or isinstance(value, np.ma.MaskedArray):
        return False
    return not value.dtype.hasobject


def _write_npy(value: Any, sink: Sink) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that old versions of numpy cannot read long headers
        # A sink is no file of Python's, so that numpy writes pieces of some MB.
        np.lib.format.write_array(sink, np.asanyarray(value), allow_pickle=False)


# ---------------------------------------------------------------------------------- .pkl


def _write_pickle(value: Any, sink: Sink) -> None:
    pickler = pickle.Pickler(sink, 5)
    pickler.dispatch_table = _reducers
    try:
        pickler.dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{described(value)} cannot be pickled: {error}") from error


def _reduce_array(array: Array) -> Any:
    """Reduce an array as numpy does, but so that it can be written to when it comes back.

    A value out of a checkpoint is read-only, and numpy would pickle it as one that is so for ever.
    """
    if array.nbytes == 0:
        return array.copy("K").__reduce_ex__(5)
    reduced = array.__reduce_ex__(5)
    if len(reduced) != 2 or not isinstance(reduced[1][0], pickle.PickleBuffer):
        return reduced
    memory = alias(bounds(array)[0], array.nbytes, array, readonly=False)
    return reduced[0], (pickle.PickleBuffer(memory), *reduced[1][1:])


_reducers: Final[ChainMap[type, Callable[[Any], Any]]] = ChainMap(
    {np.ndarray: _reduce_array}, copyreg.dispatch_table
)

# ------------------------------------------------------------------------------- choosing

FORMATS: Final = (
    Format(".npy", "an array without objects or a mask", _fits_npy, _write_npy),
    Format(".parquet", parquet.TAKES, parquet.fits, parquet.write, parquet.check),
    Format(".pkl", "any value", lambda _: True, _write_pickle),
)


def format_of(path: str) -> Format:
    """Return the format that a file's name asks for.

    Raises
    ------
    Refused
        It asks for none of these, or for one of which something is not installed.
    """
    for each in FORMATS:
        if path.lower().endswith(each.suffix):
            each.check()
            return each
    raise Refused(f"{path}: a value is exported to .npy, .parquet or .pkl; give a name that ends so")


def check_fits(value: Any, name: str, wanted: Format) -> None:
    """Raise :class:`Refused` unless the value fits into the format, saying which others would do."""
    if not wanted.fits(value):
        others = " or ".join(each.suffix for each in FORMATS if each.fits(value))
        takes = f"a {wanted.suffix} file holds {wanted.takes}"
        raise Refused(f"{name} is {described(value)}, and {takes}; {others} would do")
