"""The layouts of Arrow's types: which buffers and children an array has, and which part of them is its own.

Guarantees: what is taken of an array begins at its own first element (only run-end-encoded arrays count their
runs from before), and no more than half of it belongs to others. It is the array's memory but for bitmaps
that begin within a byte, offsets that begin too far from zero, and texts of which views use less than half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from fbcache.codec.memory import Array

#: An array's own buffers, as bytes, and its children.
Parts: TypeAlias = tuple[list[Array | None], list[pa.Array]]

_EMPTY: Final = np.empty(0, np.uint8)


def _id(name: str) -> int:
    number: int = getattr(pa.lib, f"Type_{name}", -1)  # older versions lack some
    return number


MAP: Final = _id("MAP")
RUNS: Final = _id("RUN_END_ENCODED")
VIEWS: Final = frozenset({_id("STRING_VIEW"), _id("BINARY_VIEW")})
TEXTS: Final = VIEWS | {_id(f"{large}{name}") for large in ("", "LARGE_") for name in ("STRING", "BINARY")}
WITHOUT_BITMAP: Final = frozenset({_id("NA"), RUNS, _id("SPARSE_UNION"), _id("DENSE_UNION")})

#: Bytes of what each buffer is an array of; it has to be aligned to as many.
_UNITS: Final = {
    _id("NA"): (1,),
    _id("BOOL"): (1, 1),
    _id("FIXED_SIZE_BINARY"): (1, 1),
    _id("STRING"): (1, 4, 1),
    _id("BINARY"): (1, 4, 1),
    _id("LARGE_STRING"): (1, 8, 1),
    _id("LARGE_BINARY"): (1, 8, 1),
    _id("STRING_VIEW"): (1, 8),
    _id("BINARY_VIEW"): (1, 8),
    _id("LIST"): (1, 4),
    MAP: (1, 4),
    _id("LARGE_LIST"): (1, 8),
    _id("LIST_VIEW"): (1, 4, 4),
    _id("LARGE_LIST_VIEW"): (1, 8, 8),
    _id("FIXED_SIZE_LIST"): (1,),
    _id("STRUCT"): (1,),
    _id("SPARSE_UNION"): (1, 1),
    _id("DENSE_UNION"): (1, 1, 4),
    RUNS: (1,),
}


def units(type_: pa.DataType) -> tuple[int, ...]:
    """Bytes of what each of an array's buffers is made of; those that views refer to are left out."""
    return _UNITS.get(type_.id) or (1, min(type_.bit_width // 8, 8))


def take(array: pa.Array) -> Parts:
    """Take apart an array of any type but an extension's; a dictionary is left aside."""
    return _TAKE.get(array.type.id, _fixed)(array)


def _bytes(buffer: pa.Buffer | None) -> Array:
    return np.frombuffer(buffer, np.uint8) if buffer is not None and buffer.size else _EMPTY


def _numbers(buffer: pa.Buffer | None, unit: int, start: int, count: int) -> Array:
    dtype = np.int32 if unit == 4 else np.int64
    return _bytes(buffer)[start * unit : (start + count) * unit].view(dtype)


def _bits(buffer: pa.Buffer, start: int, count: int) -> Array:
    """``count`` bits, from the first bit of a byte on."""
    first, shift = divmod(start, 8)
    window = _bytes(buffer)[first : first + (shift + count + 7) // 8]
    if not shift:
        return window
    bits = window >> shift
    bits[:-1] |= window[1:] << (8 - shift)
    return bits[: (count + 7) // 8]


def _validity(array: pa.Array) -> Array | None:
    bitmap = array.buffers()[0]
    if bitmap is None or array.null_count == 0:
        return None
    return _bits(bitmap, array.offset, len(array))


def _null(array: pa.Array) -> Parts:
    return [None], []


def _boolean(array: pa.Array) -> Parts:
    values = array.buffers()[1]
    return [_validity(array), _EMPTY if values is None else _bits(values, array.offset, len(array))], []


def _fixed(array: pa.Array) -> Parts:
    width, start = array.type.bit_width // 8, array.offset
    values = _bytes(array.buffers()[1])[start * width : (start + len(array)) * width]
    return [_validity(array), values], []


def _text(array: pa.Array) -> Parts:
    _, offsets_buffer, data_buffer = array.buffers()
    unit = _UNITS[array.type.id][1]
    offsets = _offsets(offsets_buffer, unit, array)
    first, last = int(offsets[0]), int(offsets[-1])
    if first > offsets.nbytes:  # else what is not the array's own is less than its offsets
        offsets = offsets - first
    else:
        first = 0
    return [_validity(array), offsets.view(np.uint8), _bytes(data_buffer)[first:last]], []


def _offsets(buffer: pa.Buffer | None, unit: int, array: pa.Array) -> Array:
    offsets = _numbers(buffer, unit, array.offset, len(array) + 1)
    return offsets if len(offsets) else np.zeros(1, offsets.dtype)  # an empty array may have none


def _views(array: pa.Array) -> Parts:
    _, views_buffer, *data = array.buffers()
    start = array.offset * _VIEW
    views = _bytes(views_buffer)[start : start + len(array) * _VIEW]
    sizes = views.view(np.int32)[:: _VIEW // 4]
    used = int(sizes.sum(dtype=np.int64, where=sizes > _INLINE))
    if 2 * used < sum(buffer.size for buffer in data) and used <= _MOST:
        large = pa.large_binary() if array.type.id == _id("BINARY_VIEW") else pa.large_string()
        compact = array.cast(large).cast(array.type)
        _, views_buffer, *data = compact.buffers()
        views = _bytes(views_buffer)[: len(array) * _VIEW]
    return [_validity(array), views, *map(_bytes, data)], []


_VIEW: Final = 16  # bytes of a view
_INLINE: Final = 12  # bytes of the longest text that is within its view
_MOST: Final = 2**31 - 1  # bytes that views can refer to in one buffer


def _list(array: pa.Array) -> Parts:
    offsets = _offsets(array.buffers()[1], _UNITS[array.type.id][1], array)
    first, last = int(offsets[0]), int(offsets[-1])
    if first:
        offsets = offsets - first
    return [_validity(array), offsets.view(np.uint8)], [array.values.slice(first, last - first)]


def _list_view(array: pa.Array) -> Parts:
    _, offsets_buffer, sizes_buffer = array.buffers()[:3]
    unit = _UNITS[array.type.id][1]
    offsets = _numbers(offsets_buffer, unit, array.offset, len(array))
    sizes = _numbers(sizes_buffer, unit, array.offset, len(array))
    values, used = array.values, sizes > 0
    first = int(offsets.min(where=used, initial=len(values)))
    last = int((offsets + sizes).max(where=used, initial=0))
    if first >= last:
        first = last = 0
    if (first, last) != (0, len(values)):
        values = values.slice(first, last - first)
        offsets = np.where(used, offsets - first, 0).astype(offsets.dtype)
    return [_validity(array), offsets.view(np.uint8), sizes.view(np.uint8)], [values]


def _fixed_list(array: pa.Array) -> Parts:
    width = array.type.list_size
    return [_validity(array)], [array.values.slice(array.offset * width, len(array) * width)]


def _struct(array: pa.Array) -> Parts:
    return [_validity(array)], [array.field(index) for index in range(array.type.num_fields)]


def _sparse(array: pa.Array) -> Parts:
    codes = _bytes(array.buffers()[1])[array.offset : array.offset + len(array)]
    return [None, codes], [array.field(index) for index in range(array.type.num_fields)]


def _dense(array: pa.Array) -> Parts:
    children = [array.field(index) for index in range(array.type.num_fields)]
    if sum(map(len, children)) > len(array):
        array = _compact(array)
        children = [array.field(index) for index in range(array.type.num_fields)]
    _, codes, offsets = array.buffers()[:3]
    start, count = array.offset, len(array)
    window = _numbers(offsets, 4, start, count)
    return [None, _bytes(codes)[start : start + count], window.view(np.uint8)], children


def _compact(array: pa.Array) -> pa.Array:
    """A copy without what a slice leaves out."""
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([array], names=[""])
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch().column(0)


def _runs(array: pa.Array) -> Parts:
    start, count = array.find_physical_offset(), array.find_physical_length()
    return [None], [array.run_ends.slice(start, count), array.values.slice(start, count)]


#: By the number of a type; all others are of fixed width.
_TAKE: Final[dict[int, Callable[[pa.Array], Parts]]] = {
    _id("NA"): _null,
    _id("BOOL"): _boolean,
    **{_id(f"{large}{name}"): _text for large in ("", "LARGE_") for name in ("STRING", "BINARY")},
    **{_id(f"{name}_VIEW"): _views for name in ("STRING", "BINARY")},
    **{_id(name): _list for name in ("LIST", "LARGE_LIST", "MAP")},
    **{_id(f"{large}LIST_VIEW"): _list_view for large in ("", "LARGE_")},
    _id("FIXED_SIZE_LIST"): _fixed_list,
    _id("STRUCT"): _struct,
    _id("SPARSE_UNION"): _sparse,
    _id("DENSE_UNION"): _dense,
    RUNS: _runs,
}
