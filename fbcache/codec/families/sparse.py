"""Sparse arrays and matrices of scipy, in all formats.

Guarantees
----------
- Types of the data and of the indices, shapes, flags and ``maxprint`` come back as they were, and the arrays
  as views; arrays that two values share are shared again. The constructors, which copy, prune, and choose
  another type of index, are not asked.
- Indices are held against the shape when they go out, and when they come from elsewhere, for scipy's compiled
  code looks at no bound. Then those beyond the last pointer, which mean nothing, are left out, and so are
  claims of an order that were not verified: scipy finds out for itself.
- No index shares memory with the data, or with another index that is written to in its turn: where one does,
  the value travels with a copy.

In the pool the arrays are read-only. Some of scipy's operations sort or sum in place what is not in its
canonical order yet, and then say that an array is read-only: ``sum_duplicates()`` before ``put`` spares one
that. ``dok`` is a dict and ``lil`` are lists: that nobody writes to those is the caller's promise.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from fbcache.codec.dtypes import describe, parse
from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.families.sparse_checks import (
    COMPRESSED,
    check,
    check_elements,
    check_within,
    extremes,
    once,
    pruned,
    separated,
    verified,
)
from fbcache.codec.memory import Array
from fbcache.codec.tags import Node, expect
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

_HEAD: Final = 64  # bytes of an object with a dict of its own

#: Attributes that every instance of a format has, and those that it may have. One that has others was
#: made by a scipy that we do not know, or was given them by its user.
_NEEDS: Final = {
    **dict.fromkeys(COMPRESSED, frozenset({"_shape", "data", "indices", "indptr"})),
    "coo": frozenset({"_shape", "data", "coords", "has_canonical_format"}),
    "dia": frozenset({"_shape", "data", "offsets"}),
    "dok": frozenset({"_shape", "dtype", "_dict"}),
    "lil": frozenset({"_shape", "dtype", "rows", "data"}),
}
_MAY_HAVE: Final = {
    **dict.fromkeys(_NEEDS, frozenset({"maxprint"})),
    **dict.fromkeys(COMPRESSED, frozenset({"maxprint", "_has_canonical_format", "_has_sorted_indices"})),
}


def _is_known(matrix: Any) -> bool:
    needs: frozenset[str] = _NEEDS[matrix.format]
    return needs <= frozenset(vars(matrix)) <= needs | _MAY_HAVE[matrix.format]


def _blank(cls: type, shape: tuple[int, ...]) -> Any:
    """An instance of that shape, of which the rest is to be set: its constructor would allocate for it."""
    matrix = cls((1,) * len(shape))
    matrix._shape = shape
    if matrix.shape != shape:
        raise UnsupportedTypeError(f"this scipy keeps the shape of a {cls.__name__} in a place unknown to us")
    return matrix


def _shape(node: Node) -> tuple[int, ...]:
    shape = tuple(expect(node, list))
    if not shape or set(map(type, shape)) != {int} or min(shape) < 0:
        raise ValueError(f"a sparse array's shape is {shape}")
    return shape


def _set_maxprint(matrix: Any, node: Node) -> None:
    if node is not None:
        matrix.maxprint = expect(node, int)


# --------------------------------------------------------------------- formats made of arrays


def _encode_arrays(encoder: Encoder, matrix: Any) -> Node:
    maxprint = getattr(matrix, "maxprint", None)
    if not _is_known(matrix) or type(maxprint) not in (int, type(None)):
        return NotImplemented
    arrays = _arrays(matrix)
    if not all(type(array) is np.ndarray for array in arrays):
        return NotImplemented
    try:
        check(matrix.format, matrix.shape, arrays)
        arrays = separated(matrix.format, arrays)
        check_elements(encoder.notes, matrix.format, matrix.shape, pruned(matrix.format, arrays))
    except (ValueError, ArithmeticError):  # a checkpoint of it could not be opened
        return NotImplemented
    head = [[int(n) for n in matrix.shape], maxprint, [] if encoder.bare else _claims(matrix)]
    return [*head, encoder.part(".data", arrays[0]), [encoder.part(".indices", a) for a in arrays[1:]]]


def _decode_arrays(cls: type) -> Any:
    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        shape_node, maxprint, claims, data, indices = node
        shape = _shape(shape_node)
        matrix = _blank(cls, shape)
        arrays = [decoder.value(data, depth)]
        arrays += [decoder.value(array, depth) for array in expect(indices, list)]
        for array in arrays:
            expect(array, np.ndarray)
        check(matrix.format, shape, arrays)
        if not decoder.allow_pickle:
            arrays = pruned(matrix.format, arrays)
            check_elements(decoder.notes, matrix.format, shape, arrays)
            claims = verified(decoder.notes, matrix.format, claims, arrays)
        _set_arrays(matrix, arrays)
        _set_maxprint(matrix, maxprint)
        _set_claims(matrix, claims)
        return matrix

    return decode


def _arrays(matrix: Any) -> list[Array]:
    """The arrays that a matrix holds: the data, then its indices."""
    if matrix.format == "coo":
        return [matrix.data, *matrix.coords]
    if matrix.format == "dia":
        return [matrix.data, matrix.offsets]
    return [matrix.data, matrix.indices, matrix.indptr]


def _set_arrays(matrix: Any, arrays: list[Array]) -> None:
    if matrix.format == "coo":
        matrix.data, *coords = arrays
        matrix.coords = tuple(coords)
    elif matrix.format == "dia":
        matrix.data, matrix.offsets = arrays
    else:
        matrix.data, matrix.indices, matrix.indptr = arrays


def _with_arrays(matrix: Any, arrays: list[Array]) -> Any:
    fresh = copy.copy(matrix)
    _set_arrays(fresh, arrays)
    return fresh


def _claims(matrix: Any) -> list[bool | None]:
    """What a matrix claims of its order, and has not yet to find out: asking it would make it do so."""
    if matrix.format == "coo":
        return [bool(matrix.has_canonical_format)]
    if matrix.format == "dia":
        return []
    return [vars(matrix).get("_has_canonical_format"), vars(matrix).get("_has_sorted_indices")]


def _set_claims(matrix: Any, claims: list[bool | None]) -> None:
    names = ("has_canonical_format", "has_sorted_indices")  # setting the first sets the second
    for name, claim in zip(names, claims, strict=False):
        if claim is not None:
            setattr(matrix, name, expect(claim, bool))


# ------------------------------------------------------------------- formats made of objects


def _encode_dok(encoder: Encoder, matrix: Any) -> Node:
    if type(vars(matrix).get("_dict")) is not dict:
        return NotImplemented
    return _encode_objects(encoder, matrix, "_dict")


def _decode_dok(cls: type) -> Any:
    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        matrix, (items,) = _decode_objects(cls, decoder, node, depth)
        matrix._dict = expect(items, dict)
        return matrix

    return decode


def _encode_lil(encoder: Encoder, matrix: Any) -> Node:
    try:
        _check_rows(matrix.shape, matrix.rows, matrix.data)
        check_within(once(encoder.notes, _extremes_of_rows, matrix.rows), 0, matrix.shape[1])
    except (TypeError, ValueError, OverflowError):
        return NotImplemented
    return _encode_objects(encoder, matrix, "rows", "data")


def _decode_lil(cls: type) -> Any:
    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        matrix, (rows, data) = _decode_objects(cls, decoder, node, depth)
        _check_rows(matrix.shape, rows, data)
        if not decoder.allow_pickle:
            check_within(once(decoder.notes, _extremes_of_rows, rows), 0, matrix.shape[1])
        for array in (rows, data):
            if not array.flags.writeable:  # scipy cannot so much as read from such
                array.base.setflags(write=True)
                array.setflags(write=True)
        matrix.rows, matrix.data = rows, data
        return matrix

    return decode


def _encode_objects(encoder: Encoder, matrix: Any, *names: str) -> Node:
    maxprint, dtype = getattr(matrix, "maxprint", None), describe(matrix.dtype)
    if not _is_known(matrix) or dtype is None or type(maxprint) not in (int, type(None)):
        return NotImplemented
    parts = [encoder.part(f".{name}", getattr(matrix, name)) for name in names]
    return [[int(n) for n in matrix.shape], maxprint, dtype, parts]


def _decode_objects(cls: type, decoder: Decoder, node: Node, depth: int) -> tuple[Any, list[Any]]:
    shape, maxprint, dtype, parts = node
    matrix = _blank(cls, _shape(shape))
    matrix.dtype = parse(dtype)
    _set_maxprint(matrix, maxprint)
    return matrix, [decoder.value(part, depth) for part in expect(parts, list)]


def _extremes_of_rows(rows: Array) -> tuple[int, int] | None:
    each_once = {id(places): places for places in rows}.values()
    return extremes(np.fromiter(chain.from_iterable(each_once), np.int64))


def _check_rows(shape: tuple[int, ...], rows: Any, data: Any) -> None:
    """Raise for rows that do not go with their data: scipy would look beyond the end of a list."""
    for array in (rows, data):
        if expect(array, np.ndarray).dtype != object or array.shape != shape[:1]:
            raise ValueError("the rows of a lil are no objects, or not as many as it has")
    for places, values in zip(rows, data, strict=True):
        if len(expect(places, list)) != len(expect(values, list)):
            raise ValueError("a row of a lil has more places than values, or fewer")


def _size_of_dok(matrix: Any) -> Size:
    return _HEAD, [matrix._dict]


def _size_of_lil(matrix: Any) -> Size:
    return _HEAD, [matrix.rows, matrix.data]


# -------------------------------------------------------------------------------------- kinds


def _kind(cls: type) -> Kind:
    form, name = cls.__name__.partition("_")[0], f"scipy.sparse.{cls.__name__}"
    if form == "dok":
        return Kind(cls, name, _encode_dok, _decode_dok(cls), size=_size_of_dok, travels="msgpack")
    if form == "lil":
        return Kind(cls, name, _encode_lil, _decode_lil(cls), size=_size_of_lil, travels="msgpack")
    return Kind(cls, name, _encode_arrays, _decode_arrays(cls), parts=_arrays, rebuild=_with_arrays)


KINDS: tuple[Kind, ...] = tuple(
    _kind(getattr(sparse, f"{form}_{suffix}")) for form in _NEEDS for suffix in ("array", "matrix")
)
