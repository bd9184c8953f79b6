"""How the pool makes pandas' values its own: by copy-on-write where pandas has it, else by a copy.

Guarantees
----------
- With copy-on-write nothing is copied but references to objects. The pool's value consists of read-only
  views, which keep a shallow copy of the caller's alive. For that copy's sake pandas copies what the caller
  writes to; so the views never change, and the caller's value stays writeable.
- Nothing can make such a view writeable. Arrays over Arrow refuse to be changed where pandas lets them.
- What is written to in the pool (:func:`lend`) is once more a shallow copy. It is copied on writing only
  where someone else, the caller or a reader, still holds the same memory.

That memory is written by pandas alone, and not by way of an array of numpy's from elsewhere, is the caller's
promise. What an index holds never changes, as pandas has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from pandas.api.extensions import ExtensionArray  # type: ignore[import-untyped]

from fbcache.codec.families.kinds import kind_of
from fbcache.codec.memory import Array, sealed, sealed_for

_Change: TypeAlias = Callable[[Array], Array]

_ALWAYS: Final = int(pd.__version__.partition(".")[0]) >= 3


def copies_on_write() -> bool:
    """Whether pandas copies shared memory when it is written, as version 3 always does."""
    return _ALWAYS or pd.get_option("mode.copy_on_write") is True


def own(value: Any) -> Any:
    """Return an independent copy of a frame, a series or an index, to be read only."""
    if not copies_on_write():
        return _remade(value, _copy)
    kept = value.view() if isinstance(value, pd.Index) else value.copy(deep=False)

    def view(array: Array) -> Array:
        return _copy(array) if array.dtype.hasobject else sealed(array, kept)

    return _remade(value, view, readonly=True)


def lend(value: Any) -> Any:
    """Return a lazy copy of the pool's own frame or series that may be written; None if pandas has none."""
    if not copies_on_write():
        return None
    source = _source(value)
    if all(map(_is_writeable, _arrays(source))):
        return source.copy(deep=False)
    return _remade(source, _copy)


def lend_index(index: Any) -> Any:
    """Return the index itself, which nobody writes to; None if pandas does not copy on write."""
    return index if copies_on_write() else None


def _source(value: Any) -> Any:
    """What a value of :func:`own`'s is a copy of; of any other itself."""
    for part in _arrays(value):
        for array in _numpy_arrays(part):
            kept = sealed_for(array)
            if type(kept) is type(value):
                return kept
    return value


def _arrays(value: Any) -> list[Any]:
    """The arrays of a frame or series, without its index."""
    known = kind_of(type(value))
    assert known is not None and known.parts is not None
    return [part for part in known.parts(value) if not isinstance(part, pd.Index)]


def _numpy_arrays(part: Any) -> list[Array]:
    if isinstance(part, np.ndarray):
        return [part]
    known = kind_of(type(part))
    if known is None or known.parts is None:
        return []
    return [array for inner in known.parts(part) for array in _numpy_arrays(inner)]


def _is_writeable(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return array.flags.writeable
    return not getattr(array, "_readonly", False) and all(a.flags.writeable for a in _numpy_arrays(array))


def _copy(array: Array) -> Array:
    return array.copy(order="K")


def _remade(value: Any, change: _Change, *, readonly: bool = False) -> Any:
    """Return a value of the same structure over other arrays."""
    return _Remaking(change, readonly).of(value)


class _Remaking:
    """One value on its way to being made of other arrays; what it holds twice it holds twice again."""

    def __init__(self, change: _Change, readonly: bool) -> None:
        self._change = change
        self._readonly = readonly
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if id(value) not in self._made:
            self._made[id(value)] = self._make(value)
        return self._made[id(value)]

    def _make(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self._change(value)
        known = kind_of(type(value))
        if known is None or known.parts is None or known.rebuild is None:
            # An array that pandas does not know, or what never changes: an index, memory of Arrow's.
            return value.copy() if isinstance(value, ExtensionArray) else value
        made = known.rebuild(value, [self.of(part) for part in known.parts(value)])
        if self._readonly and isinstance(made, ExtensionArray) and hasattr(made, "_readonly"):
            made._readonly = True
        return made
