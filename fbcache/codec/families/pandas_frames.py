"""Pandas' frames and series.

Guarantees: each block of a frame goes out as the one array that it is, and the frame comes back with the
same blocks over views of the buffers: nothing is consolidated or split. A column of a third party's array is
pickled by itself, where that is allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from pandas.api.extensions import ExtensionArray  # type: ignore[import-untyped]

from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.families.pandas_arrays import checked, decode_array, encode_array
from fbcache.codec.families.pandas_indexes import encode_name
from fbcache.codec.families.pandas_own import lend, own
from fbcache.codec.memory import Array
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

#: A block's values, and the places of its columns.
_Block: TypeAlias = tuple[Any, Array]

# Objects of Python's, as measured, what keeps the caller's memory alive included.
_FRAME_BYTES: Final = 3000
_BLOCK_BYTES: Final = 1200


# -------------------------------------------------------------------------------------- blocks


def _blocks(frame: Any) -> list[_Block] | None:
    """The blocks of a frame; None if this pandas keeps them in another way."""
    found = getattr(getattr(frame, "_mgr", None), "blocks", None)
    if found is None:
        return None
    return [(block.values, block.mgr_locs.as_array) for block in found]


def _frame(blocks: list[_Block], index: Any, columns: Any) -> Any:
    try:
        from pandas.api.internals import create_dataframe_from_blocks  # type: ignore[import-untyped]
    except ImportError:
        return _frame_of_pandas_2(blocks, index, columns)
    return create_dataframe_from_blocks(blocks, index, columns)


def _frame_of_pandas_2(blocks: list[_Block], index: Any, columns: Any) -> Any:
    from pandas.core.internals import BlockManager, make_block  # type: ignore[import-untyped]

    made = tuple(make_block(values, places, ndim=2) for values, places in blocks)
    manager = BlockManager(made, [columns, index])
    return pd.DataFrame._from_mgr(manager, manager.axes)


def _check_blocks(blocks: list[_Block], rows: int, columns: int) -> None:
    if sum(len(places) for _, places in blocks) != columns:
        raise ValueError("a frame has more columns in its blocks than names, or fewer")
    taken = np.zeros(columns, bool)
    for values, places in blocks:
        if values.shape[-1] != rows or len(places) != (values.shape[0] if values.ndim == 2 else 1):
            raise ValueError("a block does not fit its frame")
        if len(places) and not 0 <= places.min() <= places.max() < columns:
            raise ValueError("a block's column has no place in its frame")
        taken[places] = True
    if not taken.all():
        raise ValueError("two blocks have one column")


def _encode_places(encoder: Encoder, values: Any, places: Array) -> Node:
    """Encode as a start and a step where that will do, and the block's memory vouches for the number."""
    if len(places) and np.size(values):
        step = int(places[1] - places[0]) if len(places) > 1 else 1
        if step > 0 and np.array_equal(places, np.arange(places[0], places[-1] + 1, step)):
            return [int(places[0]), step]
    return [encode_array(encoder, ".places", places)]


def _decode_places(decoder: Decoder, node: Node, depth: int, values: Any) -> Array:
    if len(expect(node, list)) == 1:
        return decode_array(decoder, node[0], depth, "i")
    start, step = (expect(part, int) for part in node)
    count = values.shape[0] if values.ndim == 2 else 1
    if not values.shape[-1] or step < 1:
        raise ValueError("the places of a block's columns are not told")
    return np.arange(start, start + count * step, step)


def _encode_values(encoder: Encoder, shown: str, values: Any) -> Node:
    if isinstance(values, np.ndarray):
        return encode_array(encoder, shown, values)
    return encoder.part(shown, values)


def _decode_values(decoder: Decoder, node: Node, depth: int, ndim: int) -> Any:
    values = decoder.value(node, depth + 1)
    if isinstance(values, ExtensionArray) and values.ndim in (1, ndim):
        return values
    return checked(decoder, values, "", ndim)


# -------------------------------------------------------------------------------------- frames


def _encode_frame(encoder: Encoder, frame: Any) -> Node:
    blocks = _blocks(frame)
    if blocks is None:
        return NotImplemented
    index = encoder.part(".index", frame.index)
    columns = encoder.part(".columns", frame.columns)
    nodes = []
    for values, places in blocks:
        shown = _shown(frame, places)
        nodes.append([_encode_values(encoder, shown, values), _encode_places(encoder, values, places)])
    return [index, columns, nodes, *_encode_rest(encoder, frame)]


def _shown(frame: Any, places: Array) -> str:
    """A block in a path: by the name of its first column."""
    return f"[{frame.columns[places[0]]!r}]" if len(places) else ".values"


def _decode_frame(decoder: Decoder, node: Node, depth: int) -> Any:
    index_node, columns_node, nodes, attrs, unique = node
    index, columns = _decode_axis(decoder, index_node, depth), _decode_axis(decoder, columns_node, depth)
    blocks = []
    for values_node, places in expect(nodes, list):
        values = _decode_values(decoder, values_node, depth, 2)
        blocks.append((values, _decode_places(decoder, places, depth, values)))
    _check_blocks(blocks, len(index), len(columns))
    frame = _frame(blocks, index, columns)
    _decode_rest(decoder, frame, attrs, unique, depth)
    return frame


def _decode_axis(decoder: Decoder, node: Node, depth: int) -> Any:
    axis = decoder.value(node, depth + 1)
    if not isinstance(axis, pd.Index):
        raise TypeError(f"an axis is a {type(axis).__name__}")
    return axis


def _encode_rest(encoder: Encoder, value: Any) -> list[Node]:
    attrs = encoder.part(".attrs", value.attrs) if value.attrs else None
    return [attrs, not value.flags.allows_duplicate_labels]


def _decode_rest(decoder: Decoder, value: Any, attrs: Node, unique: Node, depth: int) -> None:
    if attrs is not None:
        value.attrs = expect(decoder.value(attrs, depth + 1), dict)
    if expect(unique, bool):
        value.flags.allows_duplicate_labels = False


def _frame_parts(frame: Any) -> list[Any]:
    return [frame.index, frame.columns, *(values for values, _ in _blocks(frame) or ())]


def _rebuild_frame(frame: Any, parts: list[Any]) -> Any:
    blocks = _blocks(frame)
    if blocks is None:
        return frame.copy(deep=True)
    index, columns, *arrays = parts
    placed = [(values, places) for values, (_, places) in zip(arrays, blocks, strict=True)]
    return _frame(placed, index, columns).__finalize__(frame)


def _frame_size(frame: Any) -> Size:
    parts = _frame_parts(frame)
    return _FRAME_BYTES + _BLOCK_BYTES * (len(parts) - 2), parts


# -------------------------------------------------------------------------------------- series


def _encode_series(encoder: Encoder, series: Any) -> Node:
    index = encoder.part(".index", series.index)
    values = _encode_values(encoder, ".values", series._values)
    return [index, values, encode_name(encoder, series.name), *_encode_rest(encoder, series)]


def _decode_series(decoder: Decoder, node: Node, depth: int) -> Any:
    index_node, values_node, name, attrs, unique = node
    index = _decode_axis(decoder, index_node, depth)
    values = _decode_values(decoder, values_node, depth, 1)
    if len(values) != len(index):
        raise ValueError("a series has more values than labels, or fewer")
    series = _series(values, index, decoder.hashed(name, depth))
    _decode_rest(decoder, series, attrs, unique, depth)
    return series


def _series(values: Any, index: Any, name: Any) -> Any:
    series = pd.Series(values, index=index, name=name, dtype=values.dtype, copy=False)
    if series.dtype != values.dtype:
        raise ValueError(f"there is no series of {values.dtype}")
    return series


def _series_parts(series: Any) -> list[Any]:
    return [series.index, series._values]


def _rebuild_series(series: Any, parts: list[Any]) -> Any:
    index, values = parts
    return _series(values, index, series.name).__finalize__(series)


def _series_size(series: Any) -> Size:
    return _FRAME_BYTES + _BLOCK_BYTES, _series_parts(series)


KINDS = (
    Kind(
        pd.DataFrame,
        "pandas.DataFrame",
        _encode_frame,
        _decode_frame,
        _frame_size,
        _frame_parts,
        _rebuild_frame,
        own,
        lend,
    ),
    Kind(
        pd.Series,
        "pandas.Series",
        _encode_series,
        _decode_series,
        _series_size,
        _series_parts,
        _rebuild_series,
        own,
        lend,
    ),
)
