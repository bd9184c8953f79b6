"""Numpy arrays and scalars.

Guarantees: a dense array's memory goes out as it is and comes in as a view; arrays that overlap
in memory still do when they come back, and that memory is written once; what is no plain memory
(objects, strings of any length) goes item by item.

The order of elements is kept where the array fills its memory (C, Fortran), and so are strides
where its elements reach over no more memory than they take (reversed, transposed, broadcast). Any
other array is copied together, in C order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from fbcache.codec import tags
from fbcache.codec.dtypes import PLAIN, describe, parse
from fbcache.codec.memory import Array, alias, bounds, raw
from fbcache.codec.pickling import encode_pickled
from fbcache.codec.tags import INLINE_ARRAY, Node, expect
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder
    from fbcache.codec.frames import Buffer

#: Arrays that are encoded, with the nodes that still wait for the place of their memory.
Placement: TypeAlias = list[tuple[Array, list[Node]]]


def _encode_array(encoder: Encoder, array: Array) -> Node:
    dtype = array.dtype
    described = describe(dtype)
    if described is None:
        return _encode_items(encoder, array)
    node = [tags.ARRAY, described, array.shape, None, False]
    encoder.placement.append((array, node))
    return node


def _encode_items(encoder: Encoder, array: Array) -> Node:
    dtype = array.dtype
    if dtype.type is np.object_ and dtype.metadata is None:
        fortran = not array.flags.c_contiguous and array.flags.f_contiguous
        items = list(array.ravel(order="F" if fortran else "C"))
        return [tags.OBJECTS, array.shape, encoder.items(items), fortran]
    if dtype.kind == "T":
        missing = [encoder.node(dtype.na_object)] if hasattr(dtype, "na_object") else []
        return [tags.STRINGS, array.shape, encoder.items(array.ravel().tolist()), dtype.coerce, missing]
    return encode_pickled(encoder, array)


def _encode_masked(encoder: Encoder, array: np.ma.MaskedArray[Any, Any]) -> Node:
    if type(array.data) is not np.ndarray:
        return encode_pickled(encoder, array)
    mask = None if array.mask is np.ma.nomask else array.mask
    fill_value = array._fill_value  # type: ignore[attr-defined]
    if fill_value is None and encoder.bare:
        fill_value = _default_fill_value(array.dtype)
    parts = array.data, mask, fill_value
    for part in parts:
        encoder.keep(part)
    return [tags.MASKED, encoder.items(parts), array.hardmask]


def _default_fill_value(dtype: np.dtype[Any]) -> Array:
    """What a masked array sets for itself when it is first asked."""
    array: Any = np.ma.MaskedArray(np.empty(0, dtype))
    _ = array.fill_value
    fill_value: Array = array._fill_value
    return fill_value


def _encode_scalar(encoder: Encoder, value: np.generic) -> Node:
    return [tags.SCALAR, describe(value.dtype), value.tobytes()]


def _encode_void(encoder: Encoder, value: np.void) -> Node:
    described = describe(value.dtype)
    if described is None:
        return encode_pickled(encoder, value)
    return [tags.VOID, described, value.tobytes()]


def _encode_str_scalar(encoder: Encoder, value: np.str_) -> Node:
    return [tags.STR_SCALAR, value.encode(errors="surrogatepass")]


def _encode_bytes_scalar(encoder: Encoder, value: np.bytes_) -> Node:
    return [tags.BYTES_SCALAR, bytes(value)]


_Encode: TypeAlias = Callable[["Encoder", Any], Node]
_Decode: TypeAlias = Callable[["Decoder", list[Node], int], Any]

LEAVES: Final[dict[type, _Encode]] = {
    **dict.fromkeys(PLAIN, _encode_scalar),
    np.str_: _encode_str_scalar,
    np.bytes_: _encode_bytes_scalar,
}

NUMBERED: Final[dict[type, _Encode]] = {
    np.ndarray: _encode_array,
    np.ma.MaskedArray: _encode_masked,
    np.void: _encode_void,
    np.record: _encode_void,
}


# ------------------------------------------------------------------------- placing of memory


def place(placement: Placement, buffers: list[Buffer]) -> None:
    """Give each array's memory its place, and complete the nodes: the last step of encoding."""
    if len(placement) == 1:
        _place_alone(*placement[0], buffers)
        return
    for group, start, end in _overlapping(placement):
        if len(group) == 1:
            _place_alone(*group[0], buffers)
        else:
            _place_together(group, start, end, buffers)


def _place_alone(array: Array, node: list[Node], buffers: list[Buffer]) -> None:
    fortran = not array.flags.c_contiguous and array.flags.f_contiguous
    if not fortran and not array.flags.c_contiguous:
        start, end = bounds(array)
        if end - start <= array.nbytes:
            _place_together([(array, node)], start, end, buffers)
            return
        array = np.ascontiguousarray(array)
    if array.nbytes < INLINE_ARRAY:
        node[3:] = [array.tobytes("F" if fortran else "C"), fortran]
        return
    buffers.append(raw(array))
    node[3:] = [len(buffers) - 1, fortran]


def _place_together(group: Placement, start: int, end: int, buffers: list[Buffer]) -> None:
    """Write the memory that the arrays span once, and each array as a view of it.

    Every byte from ``start`` to ``end`` is within the bounds of one of them, and so is memory.
    """
    memory = alias(start, end - start, [array for array, _ in group])
    if len(group) == 1 and end - start < INLINE_ARRAY:
        source: Node = bytes(memory)
    else:
        buffers.append(memory)
        source = len(buffers) - 1
    for array, node in group:
        offset = array.__array_interface__["data"][0] - start
        node[:] = [tags.VIEW, *node[1:3], source, offset, array.strides]


def _overlapping(placement: Placement) -> Iterator[tuple[Placement, int, int]]:
    """Group the arrays whose memory overlaps; yield each group with its bounds."""
    spans = sorted(((*bounds(array), array, node) for array, node in placement), key=lambda span: span[:2])
    group: Placement = []
    first = last = 0
    for start, end, array, node in spans:
        if group and start >= last:
            yield group, first, last
            group = []
        if not group:
            first, last = start, start
        group.append((array, node))
        last = max(last, end)
    if group:
        yield group, first, last


# --------------------------------------------------------------------------------- decoding


def _decode_array(decoder: Decoder, node: list[Node], depth: int) -> Array:
    _, described, shape, source, fortran = node
    memory = _memory(decoder, source)
    order: Any = "F" if expect(fortran, bool) else "C"
    array: Array = np.ndarray(_shape(shape), parse(described), memory, order=order)
    if array.nbytes != memory.nbytes:
        raise ValueError("an array's shape does not match its memory")
    return array


def _shape(node: Node) -> tuple[int, ...]:
    shape = tuple(expect(node, list))
    if shape and (set(map(type, shape)) != {int} or min(shape) < 0):  # numpy takes -1 for "the rest"
        raise ValueError(f"an array's shape is {shape}")
    return shape


def _memory(decoder: Decoder, source: Node) -> Array:
    if type(source) is not bytes:
        return decoder.memory(source)
    memory = np.frombuffer(source, np.uint8)
    return memory.copy() if decoder.writable else memory


def _decode_view(decoder: Decoder, node: list[Node], depth: int) -> Array:
    _, described, lengths, source, offset, steps = node
    memory, dtype = _memory(decoder, source), parse(described)
    shape, strides = _shape(lengths), tuple(expect(steps, list))
    _check_reach(shape, strides, expect(offset, int), dtype.itemsize, memory.nbytes)
    return np.ndarray(shape, dtype, memory, offset, strides)


def _check_reach(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, itemsize: int, nbytes: int
) -> None:
    """See that all elements are within the memory; numpy looks too, but its sums overflow."""
    if len(strides) != len(shape) or not set(map(type, strides)) <= {int}:
        raise ValueError(f"an array's strides are {strides}, of shape {shape}")
    if 0 in shape:
        return
    reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    first = offset + sum(r for r in reach if r < 0)
    if first < 0 or offset + sum(r for r in reach if r > 0) + itemsize > nbytes:
        raise ValueError("an array's strides lead out of its memory")


def _decode_objects(decoder: Decoder, node: list[Node], depth: int) -> Array:
    _, shape, items, fortran = node
    values = decoder.items(items, depth)
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # a slice's assignment would look into the values
        array[index] = value
    return _shaped(decoder, array, shape, "F" if expect(fortran, bool) else "C")


def _decode_strings(decoder: Decoder, node: list[Node], depth: int) -> Array:
    _, shape, items, coerce, missing = node
    options: dict[str, Any] = {"coerce": expect(coerce, bool)}
    if missing:
        options["na_object"] = decoder.value(missing[0], depth + 1)
    if not hasattr(np.dtypes, "StringDType"):
        raise UnsupportedTypeError("the value holds texts of any length, for which numpy must be 2 or newer")
    dtype = np.dtypes.StringDType(**options)
    array = np.empty(len(expect(items, list)), dtype)
    for index, value in enumerate(decoder.items(items, depth)):
        array[index] = value
    return _shaped(decoder, array, shape, "C")


def _shaped(decoder: Decoder, array: Array, shape: Node, order: Any) -> Array:
    """A view of an array of that shape; neither can be written through it unless the value is to be."""
    array.setflags(write=decoder.writable)
    return array.reshape(_shape(shape), order=order)


def _decode_masked(decoder: Decoder, node: list[Node], depth: int) -> np.ma.MaskedArray[Any, Any]:
    _, parts, hard = node
    data, mask, fill_value = decoder.items(parts, depth)
    for part in (data, *(part for part in (mask, fill_value) if part is not None)):
        expect(part, np.ndarray)
    if mask is not None and mask.shape != data.shape:  # numpy.ma has an error of its own for that
        raise ValueError("a mask does not match its data")
    array: np.ma.MaskedArray[Any, Any] = np.ma.MaskedArray(
        data, np.ma.nomask if mask is None else mask, hard_mask=expect(hard, bool)
    )
    array._fill_value = fill_value  # type: ignore[attr-defined]
    return array


def _decode_scalar(decoder: Decoder, node: list[Node], depth: int) -> Any:
    _, described, raw_bytes = node
    memory = _memory(decoder, expect(raw_bytes, bytes))
    dtype = parse(described)
    if dtype.itemsize != memory.nbytes:
        raise ValueError("a scalar does not match its memory")
    return np.ndarray((), dtype, memory)[()]


def _decode_str_scalar(decoder: Decoder, node: list[Node], depth: int) -> np.str_:
    return np.str_(expect(node[1], bytes).decode(errors="surrogatepass"))


def _decode_bytes_scalar(decoder: Decoder, node: list[Node], depth: int) -> np.bytes_:
    return np.bytes_(expect(node[1], bytes))


LEAF_DECODERS: Final[dict[int, _Decode]] = {
    tags.STR_SCALAR: _decode_str_scalar,
    tags.BYTES_SCALAR: _decode_bytes_scalar,
    tags.SCALAR: _decode_scalar,
}

NUMBERED_DECODERS: Final[dict[int, _Decode]] = {
    tags.ARRAY: _decode_array,
    tags.VIEW: _decode_view,
    tags.OBJECTS: _decode_objects,
    tags.STRINGS: _decode_strings,
    tags.MASKED: _decode_masked,
    tags.VOID: _decode_scalar,
}
