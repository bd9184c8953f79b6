"""Who may write to a value's arrays: the pool takes values over, freezes and thaws them.

Guarantees: the caller's containers are never modified; where an array has to be replaced by a
copy, the containers on the way to it are made anew, and nothing else. What occurs twice in a value
still does afterwards, and a value that contains itself is no trouble. No lock is taken.

What is looked into, :mod:`fbcache.parts` says; arrays elsewhere are the caller's promise.

An array's *owner* is the array at the end of its chain of bases. Whether a view's owner may be
taken as it is rests on CPython's reference counts: one to which nothing but the value's own views
refers is in nobody else's hands. A count that is too high, for whatever reason, costs a copy and
no more. An owner that is frozen already may belong to another entry: it is copied too.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Collection, Container, Iterable
from typing import Any, Final, Self, TypeAlias

import numpy as np

from fbcache.codec.families.kinds import Kind, kind_of
from fbcache.codec.memory import Array, address, is_dense, is_sealed, raw
from fbcache.parts import ATOMS, arrays, replace, walk

#: Arrays that own a value's memory, by id; kept alive, so that an id stays theirs.
Owners: TypeAlias = dict[int, Array]

_ATOMS: Final = ATOMS  # methods of a name that is imported are called more slowly


def take_over(value: Any, *, owned: Container[int] = frozenset()) -> Any:
    """Make a value the pool's own: nobody may write to its arrays any more.

    Arrays that own their memory are frozen, for the caller too; so are views whose owner is in
    the value as well, or in nobody else's hands and no more than twice as large. Other arrays are
    copied. Of what can make an independent copy of itself (a pandas frame) that is kept.

    Parameters
    ----------
    value : object
        The value. Its containers stay as they are.
    owned : container of int
        Ids of owners that are the pool's already, from :func:`thaw`: frozen and never copied.

    Returns
    -------
    object
        The value to keep: the same object, unless some array in it had to be copied. A bare array
        comes back as a view that can never be made writeable.
    """
    kind = type(value)
    if kind in _ATOMS or (kind is dict and _ATOMS.issuperset(map(type, value.values()))):
        return value
    if kind is np.ndarray:
        flags = value.flags
        if flags.owndata and flags.writeable:
            flags.writeable = False
            return value.view()
    if kind is np.ndarray:
        found = [value]
    else:
        copies, found = _copies(value, owned)
        if copies:
            value = replace(value, copies)
            found = list(arrays(value))
    replaced: dict[int, Any] = {}
    for group in _groups(found):
        if group.is_free(owned):
            group.freeze()
        else:
            replaced.update((id(array), _frozen_copy(array)) for array in group.arrays)
    kept = replace(value, replaced)
    return kept.view() if type(kept) is np.ndarray and kept.base is None else kept


def seal(value: Any) -> Any:
    """Make the arrays of a value that nobody else has read-only, without copying any.

    For values that come out of a pickle: what a codec makes of raw buffers is read-only already.
    """
    for array in arrays(value):
        _owner(array).setflags(write=False)
        _freeze(array)
    return value


def thaw(value: Any) -> tuple[Any, Owners]:
    """Make the arrays of a value that was taken over writeable again.

    A bare array comes back as a new view, so that views handed out before stay read-only. Arrays
    in containers are thawed in place. Those whose memory cannot be written are replaced by
    copies, in containers made anew; so is what lends itself (a pandas frame under copy-on-write), by
    copies that cost nothing until they are written.

    Returns
    -------
    value : object
        The value to write to.
    owners : dict
        Owners of its memory by id, for :func:`take_over` afterwards. They are kept alive, so that
        no other array can come by an id of theirs.
    """
    owners: Owners = {}
    kind = type(value)
    if kind in _ATOMS or (kind is dict and _ATOMS.issuperset(map(type, value.values()))):
        return value, owners
    if kind is np.ndarray:
        fresh = value.view()
        return (fresh if _thaw(fresh, owners) else _owned_copy(value, owners)), owners
    lent = _lent(value)
    value = replace(value, {id(part): copied for part, copied in lent if copied is not part})
    closed = {id(copied) for _, copied in lent}
    stuck = [array for array in arrays(value, closed) if not _thaw(array, owners)]
    return replace(value, {id(array): _owned_copy(array, owners) for array in stuck}), owners


def deep_copy(value: Any) -> Any:
    """Return an independent copy of a value, of the same types, with writeable arrays.

    Raises
    ------
    Exception
        Whatever ``copy.deepcopy`` raises for what cannot be copied.
    """
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.copy(order="K")
    return copy.deepcopy(value)


# ----------------------------------------------------------------------- owners and freezing


class _Group:
    """The arrays of a value that have one owner."""

    __slots__ = ("_owner", "arrays")

    def __init__(self, array: Array) -> None:
        self._owner = _owner(array)
        self.arrays = [array]

    def is_free(self, owned: Container[int]) -> bool:
        """Whether the owner may be frozen as it is, for all of the arrays."""
        if id(self._owner) in owned or is_sealed(self._owner):
            return True
        if not _is_writeable_owner(self._owner):
            return False
        if not all(_has_own_mask(array, owned) for array in self.arrays):
            return False
        return self._is_inside() or self._is_private()

    def freeze(self) -> None:
        """Make the owner and all of the arrays read-only."""
        self._owner.setflags(write=False)
        for array in self.arrays:
            _freeze(array)

    def references(self) -> int:
        """How many references there are to the owner, this object's included."""
        return sys.getrefcount(self._owner)

    def _is_inside(self) -> bool:
        return any(array is self._owner for array in self.arrays)

    def _is_private(self) -> bool:
        """Whether nothing else refers to the owner, and keeping all of it wastes no more than half."""
        return (
            self.references() == _OWN_REFERENCES + len(self.arrays)
            and all(array.base is self._owner for array in self.arrays)
            and 2 * sum(array.nbytes for array in self.arrays) >= self._owner.nbytes
        )


def _groups(found: Iterable[Array]) -> Collection[_Group]:
    groups: dict[int, _Group] = {}
    for array in found:
        mark = id(_owner(array))
        if mark in groups:
            groups[mark].arrays.append(array)
        else:
            groups[mark] = _Group(array)
    return groups.values()


def _owner(array: Array) -> Array:
    base = array.base
    while isinstance(base, np.ndarray):
        array, base = base, base.base
    return array


#: References to an owner that come from looking at it; how many differs between interpreters.
_OWN_REFERENCES: Final = _Group(np.empty(2)[:1]).references() - 1


def _is_writeable_owner(array: Array) -> bool:
    flags = array.flags  # holds a reference to the array, and so must be gone when they are counted
    return flags.owndata and flags.writeable


def _mask(array: Array) -> Array | None:
    """The mask of a masked array, if it has one."""
    mask = array._mask if isinstance(array, np.ma.MaskedArray) else None  # type: ignore[attr-defined]
    return mask if isinstance(mask, np.ndarray) else None


def _has_own_mask(array: Array, owned: Container[int]) -> bool:
    mask = _mask(array)
    return mask is None or mask.flags.owndata or id(_owner(mask)) in owned


def _freeze(array: Array) -> None:
    array.setflags(write=False)
    mask = _mask(array)
    if mask is not None:
        _owner(mask).setflags(write=False)
        mask.setflags(write=False)


def _frozen_copy(array: Array) -> Array:
    fresh = array.copy(order="K")
    _owner(fresh).setflags(write=False)
    _freeze(fresh)
    return fresh


def _owned_copy(array: Array, owners: Owners) -> Array:
    fresh = array.copy(order="K")
    _thaw(fresh, owners)
    return fresh


def _thaw(array: Array, owners: Owners) -> bool:
    """Make an array writeable, and note its owners; False if its memory cannot be written."""
    mask = _mask(array)
    try:
        for part in (array,) if mask is None else (array, mask):
            owner = _owner(part)
            owner.setflags(write=True)
            part.setflags(write=True)
            owners[id(owner)] = owner
    except ValueError:
        return False
    return True


# -------------------------------------------------------------------- what copies and lends itself


class _Kinds(dict[type, Kind | None]):
    """The kinds of the classes that one walk has met."""

    __slots__ = ()

    def __missing__(self, cls: type) -> Kind | None:
        kind = self[cls] = kind_of(cls)
        return kind


def _copies(value: Any, owned: Container[int]) -> tuple[dict[int, Any], list[Array]]:
    """Independent copies of the parts that make such of themselves, by id, and the arrays elsewhere."""
    copies: dict[int, Any] = {}
    found: list[Array] = []
    kinds = _Kinds()
    for part in walk(value, copies):
        if issubclass(type(part), np.ndarray):
            found.append(part)
            continue
        known = kinds[type(part)]
        if known is None or known.own is None:
            continue
        held = list(arrays(part))
        if not held or not all(id(_owner(array)) in owned for array in held):
            copies[id(part)] = known.own(part)
    return copies, found


def _lent(value: Any) -> list[tuple[Any, Any]]:
    """The parts that lend themselves to be written, each with what is to be written instead."""
    lent = []
    closed: set[int] = set()
    kinds = _Kinds()
    for part in walk(value, closed):
        known = kinds[type(part)]
        copied = None if known is None or known.lend is None else known.lend(part)
        if copied is not None:
            lent.append((part, copied))
            closed.add(id(part))
    return lent


# ----------------------------------------------------------------------------------- ghosts


class Ghost:
    """A frozen array's memory, found again for as long as something else keeps it alive.

    It holds no memory itself: whoever holds the array, or any view or slice of it, does.
    """

    __slots__ = ("_dtype", "_memory", "_offset", "_shape", "_strides")

    def __init__(self, array: Array, owner: Array) -> None:
        self._memory = weakref.ref(owner)
        self._dtype = array.dtype
        self._shape = array.shape
        self._strides = array.strides
        self._offset = address(array) - address(owner)

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """Return the ghost of a value; None for what is not a frozen array of plain bytes."""
        if type(value) is not np.ndarray or value.flags.writeable:
            return None
        if value.dtype.hasobject or not value.nbytes:
            return None
        owner = _owner(value)
        if type(owner) is not np.ndarray or owner.flags.writeable or not is_dense(owner):
            return None
        return cls(value, owner)

    @property
    def alive(self) -> bool:
        """Whether something still keeps the memory."""
        return self._memory() is not None

    def recall(self) -> Array | None:
        """Return the array over its memory again; None if that is gone, or was made writeable."""
        owner = self._memory()
        if owner is None or owner.flags.writeable:
            return None
        return np.ndarray(self._shape, self._dtype, raw(owner), self._offset, self._strides)
