"""Pandas' indexes.

Guarantees: the memory of numbers and times goes out as it is, and the index comes back over views of the
buffers. Labels that are objects go item by item, as keys do: nothing in them is shared, for pandas hashes
them. Of a RangeIndex go its bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.families.pandas_arrays import checked, decode_array, encode_array, set_freq
from fbcache.codec.families.pandas_own import lend_index, own
from fbcache.codec.families.pandas_scalars import decode_offset
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from collections.abc import Callable

    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder


_INDEX_BYTES: Final = 1500  # of objects of Python's, as measured
_RANGE_BYTES: Final = 700


def encode_name(encoder: Encoder, name: Any) -> Node:
    """Encode the name of an index or a series: any hashable."""
    encoder.step(".name")
    encoder.keep(name)
    return encoder.hashed(name)


# -------------------------------------------------------------------------------- plain indexes


def _encode_index(encoder: Encoder, index: Any) -> Node:
    values = index._data
    is_labels = type(values) is np.ndarray and values.dtype.hasobject
    if is_labels:
        encoder.step(".labels")
        encoder.keep(values)
        content = encoder.hashed(values)
    elif isinstance(values, np.ndarray):
        content = encode_array(encoder, ".values", values)
    else:
        content = encoder.part(".array", values)
    return [is_labels, content, encode_name(encoder, index.name)]


def _decode_index(decoder: Decoder, node: Node, depth: int) -> Any:
    is_labels, content, name = node
    if expect(is_labels, bool):
        values = expect(decoder.hashed(content, depth), np.ndarray)
        if values.ndim != 1 or not values.dtype.hasobject:
            raise ValueError("labels are no objects")
    else:
        values = decoder.value(content, depth + 1)
        if isinstance(values, np.ndarray):
            checked(decoder, values, "biufc")
    return _index(values, decoder.hashed(name, depth))


def _index(values: Any, name: Any) -> Any:
    index = pd.Index(values, dtype=values.dtype, copy=False, name=name, tupleize_cols=False)
    if type(index) is not pd.Index or index.dtype != values.dtype:
        raise ValueError(f"there is no plain index of {values.dtype}")
    return index


def _rebuild_index(index: Any, parts: list[Any]) -> Any:
    return _index(parts[0], index.name)


def _data(index: Any) -> list[Any]:
    return [index._data]


def _size(index: Any) -> Size:
    return _INDEX_BYTES, [index._data]


# --------------------------------------------------------------------- indexes over other arrays


def _encode_over(encoder: Encoder, index: Any) -> Node:
    values = encoder.part(".array", index._data)
    freq = encoder.part(".freq", index.freq) if isinstance(index, _WITH_FREQ) else None
    return [values, freq, encode_name(encoder, index.name)]


def _over_decoder(cls: Any) -> Callable[[Decoder, Node, int], Any]:
    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        values_node, freq_node, name = node
        values = decoder.value(values_node, depth + 1)
        freq = None if freq_node is None else decode_offset(decoder, freq_node, depth)
        index = _over(cls, values, decoder.hashed(name, depth))
        if freq is not None and issubclass(cls, _WITH_FREQ):
            set_freq(decoder, index if hasattr(index, "_freq") else index._data, freq)
        return index

    return decode


def _over(cls: Any, values: Any, name: Any) -> Any:
    if not isinstance(values, pd.api.extensions.ExtensionArray):
        raise TypeError(f"an index stands over a {type(values).__name__}")
    index = cls(values, name=name, copy=False)
    if type(index._data) is not type(values) or index.dtype != values.dtype:
        raise ValueError(f"there is no {cls.__name__} over {values.dtype}")
    return index


def _rebuild_over(index: Any, parts: list[Any]) -> Any:
    made = _over(type(index), parts[0], index.name)
    if isinstance(index, _WITH_FREQ) and hasattr(made, "_freq"):  # else it is the array's
        made._freq = index.freq
    return made


_WITH_FREQ = (pd.DatetimeIndex, pd.TimedeltaIndex)


# ---------------------------------------------------------------------------- ranges and levels


def _encode_range(encoder: Encoder, index: Any) -> Node:
    return [index.start, index.stop, index.step, encode_name(encoder, index.name)]


def _decode_range(decoder: Decoder, node: Node, depth: int) -> Any:
    *bounds, name = node
    start, stop, step = (expect(bound, int) for bound in bounds)
    return pd.RangeIndex(start, stop, step, name=decoder.hashed(name, depth))


def _range_size(index: Any) -> Size:
    return _RANGE_BYTES


def _range_parts(index: Any) -> list[Any]:
    return []


def _rebuild_range(index: Any, parts: list[Any]) -> Any:
    return index.view()


def _encode_levels(encoder: Encoder, index: Any) -> Node:
    levels = [encoder.part(".levels", level) for level in index.levels]
    codes = [encode_array(encoder, ".codes", part) for part in index.codes]
    return [levels, codes, index.sortorder, [encode_name(encoder, name) for name in index.names]]


def _decode_levels(decoder: Decoder, node: Node, depth: int) -> Any:
    levels_nodes, codes_nodes, order, names = node
    levels = [decoder.value(part, depth + 1) for part in expect(levels_nodes, list)]
    codes = [decode_array(decoder, part, depth, "i") for part in expect(codes_nodes, list)]
    if not decoder.allow_pickle:
        _check_levels(levels, codes)
    index = _multi(levels, codes, [decoder.hashed(name, depth) for name in expect(names, list)])
    if order is not None:
        _set_order(index, expect(order, int), trusted=decoder.allow_pickle)
    return index


def _check_levels(levels: list[Any], codes: list[Any]) -> None:
    for level, part in zip(levels, codes, strict=True):
        if not isinstance(level, pd.Index) or isinstance(level, pd.MultiIndex):
            raise TypeError(f"a level is a {type(level).__name__}")
        if len(part) != len(codes[0]) or (len(part) and not -1 <= part.min() <= part.max() < len(level)):
            raise ValueError("a code stands for nothing in its level")
        if not level.is_unique:
            raise ValueError("a level says something twice")


def _set_order(index: Any, order: int, *, trusted: bool) -> None:
    if not trusted and not 0 <= order <= getattr(index, "_lexsort_depth", -1):
        raise ValueError("a sort order is not that of the codes")
    index.sortorder = order


def _multi(levels: list[Any], codes: list[Any], names: list[Any]) -> Any:
    return pd.MultiIndex(levels, codes, names=names, copy=False, verify_integrity=False)


def _multi_parts(index: Any) -> list[Any]:
    return [*index.levels, *index.codes]


def _multi_size(index: Any) -> Size:
    return _INDEX_BYTES * (1 + index.nlevels), _multi_parts(index)


def _rebuild_multi(index: Any, parts: list[Any]) -> Any:
    made = _multi(parts[: index.nlevels], parts[index.nlevels :], list(index.names))
    made.sortorder = index.sortorder
    return made


KINDS = (
    Kind(
        pd.Index,
        "pandas.Index",
        _encode_index,
        _decode_index,
        _size,
        parts=_data,
        rebuild=_rebuild_index,
        own=own,
        lend=lend_index,
    ),
    Kind(
        pd.RangeIndex,
        "pandas.RangeIndex",
        _encode_range,
        _decode_range,
        _range_size,
        parts=_range_parts,
        rebuild=_rebuild_range,
        own=own,
        lend=lend_index,
        travels="msgpack",
    ),
    Kind(
        pd.MultiIndex,
        "pandas.MultiIndex",
        _encode_levels,
        _decode_levels,
        _multi_size,
        parts=_multi_parts,
        rebuild=_rebuild_multi,
        own=own,
        lend=lend_index,
    ),
    *(
        Kind(
            cls,
            f"pandas.{cls.__name__}",
            _encode_over,
            _over_decoder(cls),
            _size,
            parts=_data,
            rebuild=_rebuild_over,
            own=own,
            lend=lend_index,
        )
        for cls in (*_WITH_FREQ, pd.PeriodIndex, pd.CategoricalIndex, pd.IntervalIndex)
    ),
)
