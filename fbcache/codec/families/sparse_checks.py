"""What the arrays of a sparse array must be like.

Guarantees: arrays that pass :func:`check` and :func:`check_elements` lead no compiled code of scipy out of
their bounds, not even when the data are written to; and finding that out takes time that the length of the
arrays' memory bounds, however many arrays share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from fbcache.codec.memory import Array, address
from fbcache.codec.tags import Node, expect

T = TypeVar("T")

#: Those of an encoder or a decoder: what was found already.
Notes: TypeAlias = dict[Any, Any]

COMPRESSED: Final = ("bsr", "csc", "csr")
_INDEX_TYPES: Final = frozenset({np.dtype(np.int32), np.dtype(np.int64)})

#: How often the same memory is looked through: index arrays may overlap, but hardly so many times.
_LOOKS: Final = 64
_FEW_BYTES: Final = 1 << 20  # are looked through however often


def check(form: str, shape: tuple[int, ...], arrays: list[Array]) -> None:
    """Look whether data and indices go together, at no more of them than their ends.

    Raises
    ------
    ValueError, ArithmeticError
        They do not.
    """
    data, *indices = arrays
    demand(all(i.ndim == 1 and i.dtype in _INDEX_TYPES and i.dtype.isnative for i in indices), "types")
    if form == "coo":
        demand(data.ndim == 1 and len(indices) == len(shape), "dimensions")
        demand(all(len(axis) == len(data) for axis in indices), "lengths")
    elif form == "dia":
        (offsets,) = indices
        demand(data.ndim == 2 and len(shape) == 2 and len(offsets) == len(data), "diagonals")
    else:
        minor, pointer = indices
        major, _ = _bounds(form, shape, data)
        demand(data.ndim == (3 if form == "bsr" else 1) and len(minor) == len(data), "lengths")
        demand(len(pointer) == major + 1 and pointer[0] == 0 and 0 <= pointer[-1] <= len(minor), "pointers")


def check_elements(notes: Notes, form: str, shape: tuple[int, ...], arrays: list[Array]) -> None:
    """Look through indices that :func:`check` has passed.

    Raises
    ------
    ValueError
        One is out of bounds, or could get there by writing to other arrays of these.
    """
    data, *indices = arrays
    demand(all(a is b for a, b in zip(separated(form, arrays), arrays, strict=True)), "overlapping indices")
    if form == "coo":
        for axis, bound in zip(indices, shape, strict=True):
            check_within(once(notes, extremes, axis), 0, bound)
    elif form == "dia":
        (offsets,) = indices
        limits, reach = np.iinfo(offsets.dtype), max(*shape, data.shape[1])
        least, bound = int(limits.min) + reach, int(limits.max) - reach  # sums with offsets are taken
        check_within(once(notes, extremes, offsets), least, bound)
    else:
        minor, pointer = indices
        demand(once(notes, _ascends, pointer), "pointers")
        check_within(once(notes, extremes, minor), 0, _bounds(form, shape, data)[1])


def verified(notes: Notes, form: str, claims: Node, arrays: list[Array]) -> list[bool]:
    """Return the claims that hold. scipy verifies those of compressed formats when it first needs them."""
    if form != "coo":
        return []
    (claim,) = claims
    coords = arrays[1:]
    return [expect(claim, bool) and any(once(notes, _ascend, *axes) for axes in (coords, coords[::-1]))]


def pruned(form: str, arrays: list[Array]) -> list[Array]:
    """Return views of the arrays without what lies beyond the last pointer: there may be anything there."""
    if form not in COMPRESSED:
        return arrays
    data, minor, pointer = arrays
    used = int(pointer[-1])
    return arrays if used == len(minor) else [data[:used], minor[:used], pointer]


def separated(form: str, arrays: list[Array]) -> list[Array]:
    """Return the arrays, with copies of those whose elements could change when others are written to.

    Coordinates of a ``coo`` may be one array: nothing in scipy writes to them in place.
    """
    data, *indices = arrays
    indices = [axis if _has_own_elements(axis) else axis.copy() for axis in indices]
    if form in COMPRESSED and np.may_share_memory(indices[0], indices[1]):
        indices[0] = indices[0].copy()
    if any(np.may_share_memory(data, axis) for axis in indices):
        data = data.copy(order="K")
    return [data, *indices]


def check_within(extremes: tuple[int, int] | None, least: int, bound: int) -> None:
    """Raise ValueError unless the extremes, if there are any, are at least the one and below the other."""
    if extremes is not None and not (least <= extremes[0] and extremes[1] < bound):
        raise ValueError(f"a sparse array's indices are not within {least} and {bound}")


def demand(holds: bool, what: str) -> None:
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(f"a sparse array's {what} do not go together")


def _bounds(form: str, shape: tuple[int, ...], data: Array) -> tuple[int, int]:
    """How many rows (columns, blocks) there are, and what indices in them must stay below."""
    rows, columns = shape if len(shape) != 1 else (1, *shape)
    if form == "csr":
        return rows, columns
    if form == "csc":
        return columns, rows
    _, height, width = data.shape
    demand(rows % height == 0 and columns % width == 0, "blocks")
    return rows // height, columns // width


def _has_own_elements(axis: Array) -> bool:
    return axis.size < 2 or abs(axis.strides[0]) >= axis.itemsize


# ------------------------------------------------------------------------------ looking through


def once(notes: Notes, look: Callable[..., T], *arrays: Array) -> T:
    """Return what is found in arrays; the same memory is looked at but once, as many may share it."""
    places = [(address(array), array.shape, array.strides, array.dtype.str) for array in arrays]
    key = look, *places
    noted = notes.get(key)
    if noted is None:
        for array in arrays:
            _count(notes, array)
        noted = notes[key] = arrays, look(*arrays)  # kept alive: the places are their own
    found: T = noted[1]
    return found


def _count(notes: Notes, array: Array) -> None:
    """Note that an array is looked through: a small tree of many views of one memory could take any time."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    _, looked = notes.get((_count, id(owner)), (owner, 0))
    if looked > _LOOKS * owner.nbytes + _FEW_BYTES:
        raise ValueError("sparse arrays look through the same memory again and again")
    notes[_count, id(owner)] = owner, looked + array.nbytes


def extremes(array: Array) -> tuple[int, int] | None:
    """Return the least and the greatest element; None if there is none."""
    return (int(array.min()), int(array.max())) if array.size else None


def _ascends(pointer: Array) -> bool:
    return bool((pointer[1:] >= pointer[:-1]).all())


def _ascend(*coords: Array) -> bool:
    """Whether the coordinates ascend strictly, the first of them counting most."""
    if len(coords[0]) < 2:
        return True
    ascends = np.zeros(len(coords[0]) - 1, bool)
    ties = np.ones_like(ascends)
    for axis in coords:
        ascends |= ties & (axis[1:] > axis[:-1])
        ties &= axis[1:] == axis[:-1]
    return bool(ascends.all())
