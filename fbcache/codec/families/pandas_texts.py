"""Pandas' arrays of texts, those over Arrow's memory, and sparse ones.

Guarantees: Arrow's memory goes out and comes back as :mod:`~fbcache.codec.families.arrow` has it, without a
copy. Texts that are Python objects go item by item.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from pandas.arrays import (  # type: ignore[import-untyped]
    ArrowExtensionArray,
    ArrowStringArray,
    SparseArray,
    StringArray,
)
from pandas.core.arrays import string_, string_arrow  # type: ignore[import-untyped]

from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.families.pandas_arrays import decode_array, encode_array
from fbcache.codec.memory import Array
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

_NAN: Final = "nan"
_NA: Final = "NA"
_WRAPPER_BYTES: Final = 200


# --------------------------------------------------------------------------------------- texts


def _missing(dtype: Any) -> str:
    """Which of the two missing values a dtype of texts has."""
    return _NA if dtype.na_value is pd.NA else _NAN


def _text_dtype(storage: str, missing: Node) -> Any:
    if missing not in (_NA, _NAN):
        raise ValueError(f"texts are missing as {missing!r}")
    try:
        return pd.StringDtype(storage, na_value=pd.NA if missing == _NA else np.nan)
    except TypeError:  # before pandas 2.3
        if missing == _NA:
            return pd.StringDtype(storage)
        if storage == "pyarrow":
            return pd.StringDtype("pyarrow_numpy")
        raise


def _encode_texts(encoder: Encoder, array: Any) -> Node:
    values = array._ndarray
    if values.ndim != 1:
        return NotImplemented
    absent = pd.isna(values)
    if absent.any():
        values = values.copy()
        values[absent] = None
    items = values.tolist()
    encoder.keep(items)
    return [_missing(array.dtype), encoder.items(items)]


def _decode_texts(decoder: Decoder, node: Node, depth: int) -> Any:
    missing, nodes = node
    dtype = _text_dtype("python", missing)
    items = decoder.items(nodes, depth)
    values = np.empty(len(items), object)
    values[:] = [dtype.na_value if item is None else item for item in items]
    if not all(type(item) is str for item in items if item is not None):
        raise TypeError("a text is none")
    made = dtype.construct_array_type()._from_sequence(values, dtype=dtype, copy=False)
    made._ndarray.setflags(write=decoder.writable)
    return made


def _text_parts(array: Any) -> list[Any]:
    return [array._ndarray]


def _rebuild_texts(array: Any, parts: list[Any]) -> Any:
    return array._from_backing_data(parts[0])


# --------------------------------------------------------------------------------------- Arrow


def _encode_arrow(encoder: Encoder, array: Any) -> Node:
    return [encoder.part(".arrow", array.__arrow_array__())]


def _decode_arrow(decoder: Decoder, node: Node, depth: int) -> Any:
    (chunked,) = node
    return _guarded(decoder, ArrowExtensionArray(decoder.value(chunked, depth + 1)))


def _encode_arrow_texts(encoder: Encoder, array: Any) -> Node:
    return [_missing(array.dtype), encoder.part(".arrow", array.__arrow_array__())]


def _decode_arrow_texts(decoder: Decoder, node: Node, depth: int) -> Any:
    missing, chunked = node
    dtype = _text_dtype("pyarrow", missing)
    return _guarded(decoder, _arrow_texts(decoder.value(chunked, depth + 1), dtype))


def _arrow_texts(chunked: Any, dtype: Any) -> Any:
    cls = dtype.construct_array_type()
    try:
        return cls(chunked, dtype=dtype)
    except TypeError:  # before pandas 2.3
        return cls(chunked)


def _guarded(decoder: Decoder, array: Any) -> Any:
    """Arrow's memory is never written, but the array may be given another one: not when read-only."""
    if not decoder.writable and hasattr(array, "_readonly"):
        array._readonly = True
    return array


def _arrow_size(array: Any) -> Size:
    return _WRAPPER_BYTES, [array.__arrow_array__()]


def _arrow_parts(array: Any) -> list[Any]:
    return [array.__arrow_array__()]


def _rebuild_arrow(array: Any, parts: list[Any]) -> Any:
    return type(array)(*parts)


def _rebuild_arrow_texts(array: Any, parts: list[Any]) -> Any:
    return _arrow_texts(parts[0], array.dtype)


# -------------------------------------------------------------------------------------- sparse

_LONGEST: Final = (1 << 31) - 1  # places are 32-bit numbers


def _encode_sparse(encoder: Encoder, array: Any) -> Node:
    index = array.sp_index
    values = encode_array(encoder, ".sp_values", array.sp_values)
    fill_value = encoder.part(".fill_value", array.fill_value)
    places = [encode_array(encoder, ".sp_index", part) for part in _places(index)]
    return [values, fill_value, index.length, places]


def _decode_sparse(decoder: Decoder, node: Node, depth: int) -> Any:
    values_node, fill_node, length, places_nodes = node
    values = decode_array(decoder, values_node, depth)
    fill_value = decoder.value(fill_node, depth + 1)
    places = [decode_array(decoder, part, depth, "i") for part in expect(places_nodes, list)]
    if not decoder.allow_pickle:
        _check_places(expect(length, int), places, len(values))
    return _sparse(values, length, places, pd.SparseDtype(values.dtype, fill_value))


def _sparse(values: Array, length: int, places: list[Array], dtype: Any) -> Any:
    cls = _BY_ONE if len(places) == 1 else _BY_STRETCHES
    return SparseArray._simple_new(values, cls(length, *places), dtype)


def _check_places(length: int, places: list[Array], count: int) -> None:
    if len(places) not in (1, 2) or any(part.dtype != np.int32 for part in places):
        raise ValueError("places are no 32-bit numbers")
    starts = places[0].astype(np.int64)
    lengths = np.ones_like(starts) if len(places) == 1 else places[1].astype(np.int64)
    if len(starts) != len(lengths) or lengths.sum() != count or not 0 <= length <= _LONGEST:
        raise ValueError("there are more places than values, or fewer")
    ends = starts + lengths
    if count and (starts[0] < 0 or lengths.min() < 1 or (starts[1:] < ends[:-1]).any() or ends[-1] > length):
        raise ValueError("places are out of order or bounds")


def _places(index: Any) -> list[Array]:
    """Where the values of a sparse array are: one by one, or starts and lengths of stretches."""
    return [index.indices] if type(index) is _BY_ONE else [index.blocs, index.blengths]


def _sparse_parts(array: Any) -> list[Any]:
    return [array.sp_values, *_places(array.sp_index)]


def _rebuild_sparse(array: Any, parts: list[Any]) -> Any:
    values, *places = parts
    return _sparse(values, array.sp_index.length, places, array.dtype)


_BY_ONE: Final = type(SparseArray([0, 1]).sp_index)
_BY_STRETCHES: Final = type(SparseArray([0, 1], kind="block").sp_index)


_TEXTS: Final = {StringArray, getattr(string_, "StringArrayNumpySemantics", StringArray)}
_ARROW_TEXTS: Final = {
    ArrowStringArray,
    getattr(string_arrow, "ArrowStringArrayNumpySemantics", ArrowStringArray),
}


KINDS = (
    *(
        Kind(
            cls,
            "pandas.StringArray",
            _encode_texts,
            _decode_texts,
            parts=_text_parts,
            rebuild=_rebuild_texts,
            travels="msgpack",
        )
        for cls in _TEXTS
    ),
    *(
        Kind(
            cls,
            "pandas.ArrowStringArray",
            _encode_arrow_texts,
            _decode_arrow_texts,
            _arrow_size,
            _arrow_parts,
            _rebuild_arrow_texts,
            travels="Arrow",
        )
        for cls in _ARROW_TEXTS
    ),
    Kind(
        ArrowExtensionArray,
        "pandas.ArrowExtensionArray",
        _encode_arrow,
        _decode_arrow,
        _arrow_size,
        _arrow_parts,
        _rebuild_arrow,
        travels="Arrow",
    ),
    Kind(
        SparseArray,
        "pandas.SparseArray",
        _encode_sparse,
        _decode_sparse,
        parts=_sparse_parts,
        rebuild=_rebuild_sparse,
    ),
)
