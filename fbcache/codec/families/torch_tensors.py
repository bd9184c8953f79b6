"""torch: tensors and parameters in main memory; and sizes, dtypes, devices.

Guarantees
----------
- A tensor's memory travels as an array's does (:mod:`~fbcache.codec.arrays`): raw, with its strides where
  its elements reach over no more memory than they take, and written once where tensors overlap each other, or
  arrays. Tensors of one storage are of one storage again, unless more than half of the memory from the
  first to the last of them belongs to none; what lies before and behind them is not written.
- What autograd knows of a leaf comes along: ``requires_grad``, ``grad``. What is no leaf is refused.
- Attributes that were set on a tensor come along. Hooks cannot: such a tensor is refused.
- A conjugated view stays one. A negated view comes back as a tensor with memory of its own.

A tensor cannot be read-only. One that is read back is over memory of this process's own: the file's pages, of
which a write changes a copy (:mod:`~fbcache.codec.pages`), or else a copy of all. That nobody writes to it is
the promise of who reads, as for a dict; nobody can resize its storage.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.memory import Array, address, alias, bounds
from fbcache.codec.pages import opened
from fbcache.codec.tags import Node, expect
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

#: Of quantized types the elements alone say too little; of what is missing here torch itself knows little.
_NAMES: Final = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "float4_e2m1fn_x2",
)
_DTYPES: Final = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
_DTYPE_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_ALL_DTYPES: Final = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

#: How numpy sees an element: as plain bytes, so many.
_BITS: Final[dict[int, np.dtype[Any]]] = {
    size: np.dtype(code) for size, code in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))
}

#: What the tensors of a layout are made of, for their size.
_SPARSE: Final = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}

_OBJECT: Final = 300  # bytes that Python and torch take for a tensor beside its memory, roughly


# --------------------------------------------------------------------------------- encoding


def _encode(encoder: Encoder, value: torch.Tensor) -> Node:
    obstacle = _obstacle(value)
    if obstacle is not None:
        raise encoder.unsupported(obstacle)
    plain = value.detach()
    if plain.is_neg():
        plain = plain.resolve_neg()
    array = _as_array(encoder, plain)
    if array.size:
        _keep_together(encoder, plain.untyped_storage().data_ptr(), array)
    attributes = vars(value)
    return [
        _DTYPE_NAMES[value.dtype],
        encoder.part(".data", array),
        _free_strides(plain),
        plain.is_conj(),
        value.requires_grad,
        [] if value.grad is None else [encoder.part(".grad", value.grad)],
        [encoder.part(".__dict__", attributes)] if attributes else [],
    ]


def _obstacle(value: torch.Tensor) -> str | None:
    """Why a tensor has no plain memory to be written, or is more than that, and what to do."""
    if value.is_nested:
        return "it is a nested tensor; store a list of what its unbind() gives"
    if value.layout is not torch.strided:
        return f"it is a tensor of layout {value.layout}; store its to_dense(), or what it is made of"
    if value.device.type == "meta":
        return "it is a tensor without data, on the device 'meta'"
    if value.device.type != "cpu":
        return f"it is a tensor on the device '{value.device}'; store its cpu()"
    if value.dtype not in _DTYPE_NAMES:
        return f"it is a tensor of {value.dtype}; store its dequantize(), or convert it"
    if not value.is_leaf:
        return "it is a tensor that remembers how it was computed; store its detach()"
    if getattr(value, "_backward_hooks", None) or getattr(value, "_post_accumulate_grad_hooks", None):
        return "it is a tensor with hooks, which are code; remove them, or store its detach()"
    return None


def _as_array(encoder: Encoder, plain: torch.Tensor) -> Array:
    """A tensor's memory as an array of its shape and strides.

    ``plain.numpy()`` would keep torch from ever resizing the user's storage, and knows not all dtypes.
    """
    shape, bits = tuple(plain.shape), _BITS[plain.dtype.itemsize]
    try:
        if plain.numel() == 0:
            return np.empty(shape, bits)
        strides = [stride * bits.itemsize for stride in plain.stride()]
        nbytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + bits.itemsize
        offset = plain.storage_offset() * bits.itemsize
        if plain.untyped_storage().nbytes() < offset + nbytes:
            raise ValueError("its storage was freed, or made smaller")
        return np.ndarray(shape, bits, alias(plain.data_ptr(), nbytes, plain), 0, strides)
    except (ValueError, RuntimeError) as error:  # within torch.func, tensors do not tell of their memory
        raise encoder.unsupported(f"it is a tensor of which numpy cannot have a view: {error}") from error


def _free_strides(plain: torch.Tensor) -> list[Any]:
    """The strides, as the one item of a list, if shape and memory do not tell them all.

    Those of dimensions with one element or none are nowhere else; a memory format is told by them.
    """
    expected, step = [], 1
    for count in reversed(plain.shape):
        expected.append(step)
        step *= max(count, 1)
    strides = list(plain.stride())
    return [] if min(plain.shape, default=2) > 1 or strides == expected[::-1] else [strides]


class _Reach:
    """What the tensors of one storage reach over, as disjoint stretches of addresses."""

    __slots__ = ("_ends", "_starts", "covered", "together")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.covered = 0
        self.together = (0, 0)  # the stretch that is written in one piece

    def add(self, start: int, end: int) -> tuple[int, int]:
        """Add a stretch; return that from the first address to the last."""
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
            self.covered -= sum(self._ends[first:last]) - sum(self._starts[first:last])
        self._starts[first:last], self._ends[first:last] = [start], [end]
        self.covered += end - start
        return self._starts[0], self._ends[-1]


def _keep_together(encoder: Encoder, storage: int, array: Array) -> None:
    """Have what lies between the tensors of one storage placed with them, unless that is too much.

    An array without a node stands for it: whatever overlaps with it is placed in one piece.
    """
    notes = encoder.notes.setdefault(_encode, {})
    is_first = storage not in notes
    reach: _Reach = notes.setdefault(storage, _Reach())
    start, end = reach.add(*bounds(array))
    if is_first:
        reach.together = start, end
    elif (start, end) != reach.together and end - start <= 2 * reach.covered:
        reach.together = start, end
        encoder.placement.append((np.frombuffer(alias(start, end - start, array), np.uint8), []))


# --------------------------------------------------------------------------------- decoding


def _decode(decoder: Decoder, node: Node, depth: int) -> torch.Tensor:
    _, _, _, _, requires_grad, _, _ = node
    tensor = _decode_data(decoder, node, depth)
    return _complete(decoder, tensor.requires_grad_(expect(requires_grad, bool)), node, depth)


def _decode_parameter(decoder: Decoder, node: Node, depth: int) -> torch.Tensor:
    _, _, _, _, requires_grad, _, _ = node
    tensor = _decode_data(decoder, node, depth)
    parameter = torch.nn.Parameter(tensor, requires_grad=expect(requires_grad, bool))
    return _complete(decoder, parameter, node, depth)


def _complete(decoder: Decoder, tensor: torch.Tensor, node: Node, depth: int) -> torch.Tensor:
    _, _, _, _, _, grad, attributes = node
    for part in expect(grad, list):
        tensor.grad = decoder.value(part, depth)
    for part in expect(attributes, list):
        vars(tensor).update(decoder.attributes(part, depth))
    return tensor


def _decode_data(decoder: Decoder, node: Node, depth: int) -> torch.Tensor:
    name, data, strides, conjugated, _, _, _ = node
    dtype = _DTYPES.get(expect(name, str))
    if dtype is None:
        raise UnsupportedTypeError(f"the value holds a tensor of {name[:40]!r}, unknown to this torch")
    array = expect(decoder.value(data, depth), np.ndarray)
    if array.dtype != _BITS[dtype.itemsize]:
        raise ValueError(f"a tensor of {name} is made of {array.dtype}")
    # A caller in inference mode would get a tensor that is good for inference only, for everybody.
    with torch.inference_mode(False):
        tensor = _over(decoder, array, dtype, _strides(array, strides))
        return tensor.conj() if expect(conjugated, bool) else tensor


def _strides(array: Array, given: Node) -> list[int]:
    """The strides, in elements: those given, where one element or none makes them meaningless."""
    strides = []
    for stride in array.strides:
        count, rest = divmod(stride, array.itemsize)
        if rest or count < 0:
            raise ValueError(f"an array's strides are {array.strides}: none of a tensor")
        strides.append(count)
    for free in expect(given, list):
        pairs = zip(array.shape, strides, free, strict=True)
        strides = [theirs if array.size and count > 1 else expect(own, int) for count, theirs, own in pairs]
        if min(strides, default=0) < 0:
            raise ValueError(f"a tensor's strides are {strides}")
    return strides


def _over(decoder: Decoder, array: Array, dtype: torch.dtype, strides: list[int]) -> torch.Tensor:
    """A tensor over the memory of an array."""
    if array.size == 0:
        return torch.empty_strided(array.shape, strides, dtype=dtype, device="cpu")
    memory = array if array.base is None else array.base
    if type(memory) is not np.ndarray or memory.dtype != np.uint8 or not memory.flags.c_contiguous:
        raise ValueError("an array for a tensor has no plain memory")
    (start, end), (first, last) = bounds(array), bounds(memory)
    offset, rest = divmod(address(array) - first, array.itemsize)
    if start < first or last < end or rest or first % array.itemsize:
        raise ValueError("an array for a tensor lies askew in its memory")
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    return tensor.set_(_storage(decoder, memory), offset, array.shape, strides)


def _storage(decoder: Decoder, memory: Array) -> torch.UntypedStorage:
    """The storage over a piece of memory, the same one each time."""
    notes = decoder.notes.setdefault(_decode, {})
    found = notes.get(id(memory))
    if found is None:
        source = memory if memory.flags.writeable else opened(memory)
        if source is None:
            source = memory.copy()
        found = notes[id(memory)] = memory, torch.frombuffer(source, dtype=torch.uint8).untyped_storage()
    storage: torch.UntypedStorage = found[1]
    return storage


# ------------------------------------------------------------------------------------ sizes


def _size(value: torch.Tensor) -> Size:
    parts: list[Any] = [vars(value)] if vars(value) else []
    if value.layout in _SPARSE:
        return _OBJECT, parts + [getattr(value, name)() for name in _SPARSE[value.layout]]
    if value.is_leaf and value.grad is not None:
        parts.append(value.grad)
    storage = value.untyped_storage()
    if value.device.type == "cpu" and storage.nbytes():
        parts.append(np.frombuffer(alias(storage.data_ptr(), storage.nbytes(), storage), np.uint8))
    return _OBJECT, parts


# ------------------------------------------------------------------------------ other kinds


def _encode_size(encoder: Encoder, value: torch.Size) -> Node:
    return list(value)


def _decode_size(decoder: Decoder, node: Node, depth: int) -> torch.Size:
    return torch.Size([expect(part, int) for part in expect(node, list)])


def _encode_text(encoder: Encoder, value: Any) -> Node:
    return str(value)


def _decode_dtype(decoder: Decoder, node: Node, depth: int) -> torch.dtype:
    dtype = _ALL_DTYPES.get(expect(node, str))
    if dtype is None:
        raise UnsupportedTypeError(f"the value holds a dtype {node[:40]!r}, unknown to this torch")
    return dtype


def _decode_device(decoder: Decoder, node: Node, depth: int) -> torch.device:
    return torch.device(expect(node, str))


KINDS: Final = (
    Kind(torch.Tensor, "torch.Tensor", _encode, _decode, _size),
    Kind(torch.nn.Parameter, "torch.nn.Parameter", _encode, _decode_parameter, _size),
    Kind(torch.Size, "torch.Size", _encode_size, _decode_size, travels="msgpack"),
    Kind(torch.dtype, "torch.dtype", _encode_text, _decode_dtype, travels="msgpack"),
    Kind(torch.device, "torch.device", _encode_text, _decode_device, travels="msgpack"),
)
