"""Arrow arrays as their own buffers, and back.

Guarantees
----------
- A buffer goes out as the memory that it is and comes in as a view; of a slice only its own part goes out
  (:mod:`arrow_layouts`).
- Arrays that share memory, dictionaries above all, still do.
- What is read from a hostile tree is checked before Arrow takes it for an array; its contents are checked by
  ``validate(full=True)``, which is up to the caller.

A node is ``[length, offset, buffers, children, dictionary]``. The offset is zero but for run-end-encoded
arrays, whose runs count from before a slice. Of a dictionary that came before in the same value stands the
number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from fbcache.codec import tags
from fbcache.codec.families import arrow_layouts
from fbcache.codec.families.arrow_layouts import MAP, RUNS, TEXTS, VIEWS, WITHOUT_BITMAP
from fbcache.codec.memory import Array, address
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder


#: Bytes of the largest number, to which all are aligned: those of 16 bytes and more are made of such.
_ALIGNED: Final = 8
#: Copies of one buffer: for what is aligned to 2, to 4 and to 8 bytes. It bounds what a hostile tree takes.
_MOST_COPIES: Final = 3


class ArrayWriter:
    """Writes the arrays of one value; remembers their dictionaries."""

    __slots__ = ("_dictionaries", "_encoder")

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._dictionaries: dict[Any, int] = {}

    def node(self, array: pa.Array) -> Node:
        """Encode one array."""
        if isinstance(array, pa.ExtensionArray):
            return self.node(array.storage)
        type_ = array.type
        buffers, children = arrow_layouts.take(array)
        units = arrow_layouts.units(type_)
        return [
            len(array),
            array.offset if type_.id == RUNS else 0,
            [self._buffer(part, units[i] if i < len(units) else 1) for i, part in enumerate(buffers)],
            [self.node(child) for child in children],
            self._dictionary(array.dictionary) if isinstance(array, pa.DictionaryArray) else None,
        ]

    def _buffer(self, part: Array | None, unit: int) -> Node:
        if part is None:
            return None
        return self._encoder.part(".buffers()", part if address(part) % unit == 0 else part.copy())

    def _dictionary(self, dictionary: pa.Array) -> Node:
        if dictionary.type.num_fields:  # its buffers alone would not tell it from another
            return self.node(dictionary)
        memory = tuple([None if part is None else (part.address, part.size) for part in dictionary.buffers()])
        key = dictionary.type, len(dictionary), dictionary.offset, memory
        number = self._dictionaries.get(key)
        if number is not None:
            return number
        node = self.node(dictionary)
        self._dictionaries[key] = len(self._dictionaries)
        return node


class ArrayReader:
    """Reads the arrays of one value, in the order in which they were written."""

    __slots__ = ("_decoder", "_depth", "_dictionaries", "_under_nulls")

    def __init__(self, decoder: Decoder, depth: int, *, under_nulls: bool = False) -> None:
        """``under_nulls`` has texts validated where they are null too, as ``validate`` does not."""
        self._decoder = decoder
        self._depth = depth
        self._under_nulls = under_nulls
        self._dictionaries: list[pa.Array] = []

    def array(self, node: Node, type_: pa.DataType) -> pa.Array:
        """Decode one array of a type; its offsets, indices and texts are as they may be.

        Raises
        ------
        ValueError, TypeError, pyarrow.ArrowException
            It is none, or its buffers are too short.
        """
        if isinstance(type_, pa.BaseExtensionType):
            return type_.wrap_array(self.array(node, type_.storage_type))
        length, offset, nodes, children, dictionary = expect(node, list)
        if min(expect(length, int), expect(offset, int)) < 0:
            raise ValueError("an array's length is negative")
        if offset and type_.id != RUNS:
            raise ValueError("an array has an offset")
        buffers = self._buffers(nodes, type_)
        parts = self._children(children, type_)
        if isinstance(type_, pa.DictionaryType):
            values = self._dictionary(dictionary, type_.value_type)
            return pa.DictionaryArray.from_buffers(type_, length, buffers, values)
        if type_.id == MAP:
            _check_entries(parts[0])
        if self._under_nulls and type_.id in TEXTS:
            pa.Array.from_buffers(type_, length, [None, *buffers[1:]]).validate(full=True)
        return pa.Array.from_buffers(type_, length, buffers, -1, offset, parts)

    def _buffers(self, nodes: Node, type_: pa.DataType) -> list[pa.Buffer | None]:
        units = arrow_layouts.units(type_)
        count = len(expect(nodes, list))
        if count < len(units) or (count > len(units) and type_.id not in VIEWS):
            raise ValueError(f"an array of type {type_} has {count} buffers")
        if None in nodes[1:] or (type_.id in WITHOUT_BITMAP and nodes[0] is not None):
            raise ValueError(f"an array of type {type_} has other buffers")  # over which Arrow would crash
        return [self._buffer(part, units[i] if i < len(units) else 1) for i, part in enumerate(nodes)]

    def _buffer(self, node: Node, unit: int) -> pa.Buffer | None:
        if node is None:
            return None
        part = expect(self._decoder.value(node, self._depth), np.ndarray)
        if part.dtype != np.uint8 or part.ndim != 1 or not part.flags.c_contiguous:
            raise ValueError("a buffer is no plain array of bytes")
        if address(part) % unit:
            part = self._aligned(node, part.size, unit)
        view = part.view()
        view.setflags(write=False)
        return pa.py_buffer(view)

    def _aligned(self, node: Node, size: int, unit: int) -> Array:
        """Find the memory in a copy of its buffer that lies as the memory once did.

        What arrays share goes out from where the first of them begins, and that may be anywhere: polars has
        one stretch of zeros for all columns of nulls, and their slices begin at odd places of it. Where it
        was, all of it was aligned, so one copy does for all that is in the buffer; there are more only where
        the first to come could have lain in several ways.
        """
        if expect(node, list)[0] != tags.VIEW:
            raise ValueError("a buffer is not aligned")
        number, offset = node[3:5]
        copies: list[Array] = self._decoder.notes.setdefault((__name__, number), [])
        for copy in copies:
            if (address(copy) + offset) % unit == 0:
                return copy[offset : offset + size]
        if len(copies) == _MOST_COPIES:
            raise ValueError("what is in a buffer was never aligned")
        memory = self._decoder.memory(number)
        room = np.empty(memory.size + _ALIGNED, np.uint8)
        start = -(address(room) + offset) % _ALIGNED
        copy = room[start : start + memory.size]
        copy[:] = memory
        copies.append(copy)
        return copy[offset : offset + size]

    def _children(self, nodes: Node, type_: pa.DataType) -> list[pa.Array]:
        if len(expect(nodes, list)) != type_.num_fields:
            raise ValueError(f"an array of type {type_} has {len(nodes)} children")
        return [self.array(child, type_.field(index).type) for index, child in enumerate(nodes)]

    def _dictionary(self, node: Node, type_: pa.DataType) -> pa.Array:
        if type(node) is not int:
            values = self.array(node, type_)
            if not type_.num_fields:
                self._dictionaries.append(values)
            return values
        if not 0 <= node < len(self._dictionaries) or self._dictionaries[node].type != type_:
            raise ValueError("an array's dictionary is none")
        return self._dictionaries[node]


def _check_entries(entries: pa.Array) -> None:
    """Arrow aborts the process over a map with such nulls, before it can be validated."""
    if entries.null_count or entries.field(0).null_count:
        raise ValueError("a map has a null for an entry or a key")
