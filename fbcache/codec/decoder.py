"""From a tree and its buffers to the value.

Guarantee: a tree is taken for hostile. Any one gives a value or an error, in memory that its own
length bounds and at a bounded depth, and runs no code but registered decoders and, where the
caller allowed it, pickle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from fbcache.codec import arrays, registry, scalars, tags
from fbcache.codec.families.kinds import decode_kind
from fbcache.codec.frames import Buffer
from fbcache.codec.memory import Array, root
from fbcache.codec.pickling import decode_pickled
from fbcache.codec.tags import ATOMS, MAX_DEPTH, Node, expect

_DEEPEST: Final = MAX_DEPTH + 2  # at the bottom there may be a time, and in it its zone
_PARSED: Final = ATOMS | {bytes}


class Decoder:
    """One value on its way out of a tree.

    Attributes
    ----------
    writable : bool
        Whether arrays come out writeable.
    allow_pickle : bool
        Whether pickled parts are loaded.
    notes : dict
        What kinds have to find again while this value is decoded.
    """

    __slots__ = (
        "_buffers",
        "_complete",
        "_copied",
        "_roots",
        "_sharing",
        "allow_pickle",
        "notes",
        "writable",
    )

    def __init__(self, buffers: Sequence[Buffer], writable: bool, allow_pickle: bool) -> None:
        self.writable = writable
        self.allow_pickle = allow_pickle
        self.notes: dict[Any, Any] = {}
        self._buffers = buffers
        self._roots: dict[int, Array] = {}
        self._complete: list[Any] = []
        self._copied: set[int] = set()
        self._sharing = True

    def value(self, node: Node, depth: int) -> Any:
        """Decode one node.

        Raises
        ------
        FBCacheError, ValueError, TypeError, ArithmeticError, LookupError, OSError
            It describes no value; :class:`MsgpackCodec` makes one error of them.
        """
        kind = type(node)
        if kind in _PARSED:
            return node
        if depth > _DEEPEST:
            raise ValueError("it is nested too deep")
        if kind is dict:
            value = self._mapping(node, depth)
        else:
            tag = expect(expect(node, list)[0], int)
            decode = NUMBERED.get(tag)
            if decode is None:
                return LEAVES[tag](self, node, depth)
            value = decode(self, node, depth)
        if self._sharing:
            self._complete.append(value)
        return value

    def items(self, nodes: Node, depth: int) -> list[Any]:
        """Decode the items of a container; may return the very list of their nodes."""
        if _PARSED.issuperset(map(type, expect(nodes, list))):
            items: list[Any] = nodes
            return items
        depth += 1
        value = self.value
        return [node if type(node) in _PARSED else value(node, depth) for node in nodes]

    def hashed(self, node: Node, depth: int) -> Any:
        """Decode a key or a member of a set, in which nothing may be shared."""
        sharing, self._sharing = self._sharing, False
        value = self.value(node, depth + 1)
        self._sharing = sharing
        return value

    def attributes(self, node: Node, depth: int) -> dict[str, Any]:
        """Decode what goes into an instance's ``__dict__``."""
        attributes: dict[str, Any] = expect(self.value(node, depth + 1), dict)
        for name in attributes:
            expect(name, str)
        return attributes

    def complete(self, number: int) -> Any:
        """Return the part of that number."""
        if not self._sharing or number < 0:
            raise ValueError("a reference stands where none may")
        return self._complete[number]

    def buffer(self, number: Node) -> memoryview:
        """Return a buffer, writeable exactly if the value is to be."""
        if expect(number, int) < 0:
            raise ValueError("a buffer's number is negative")
        view = memoryview(self._buffers[number]).cast("B")
        if not self.writable:
            return view.toreadonly()
        return memoryview(bytearray(view)) if view.readonly else view

    def bulk(self, number: Node) -> memoryview:
        """Return a buffer that is to be copied out: each once, or a small tree would take any memory."""
        if number in self._copied:
            raise ValueError("a buffer is the content of two values")
        self._copied.add(expect(number, int))
        return self.buffer(number)

    def memory(self, number: Node) -> Array:
        """Return a buffer as an array of bytes, the same one each time."""
        memory = self._roots.get(expect(number, int))
        if memory is None:
            memory = self._roots[number] = root(self.buffer(number))
        return memory

    def _mapping(self, node: dict[Any, Node], depth: int) -> dict[Any, Any]:
        if not _PARSED.issuperset(map(type, node)):
            raise TypeError("a map has a key which is no atom")
        if not _PARSED.issuperset(map(type, node.values())):
            for key, part in node.items():
                if type(part) not in _PARSED:
                    node[key] = self.value(part, depth + 1)
        return node


def _decode_list(decoder: Decoder, node: list[Node], depth: int) -> list[Any]:
    _, nodes = node
    return decoder.items(nodes, depth)


def _decode_tuple(decoder: Decoder, node: list[Node], depth: int) -> tuple[Any, ...]:
    _, nodes = node
    return tuple(decoder.items(nodes, depth))


def _decode_dict(decoder: Decoder, node: list[Node], depth: int) -> dict[Any, Any]:
    _, nodes = node
    return dict(_pairs(decoder, nodes, depth))


def _pairs(decoder: Decoder, nodes: Node, depth: int) -> Iterator[tuple[Any, Any]]:
    for key, value in zip(expect(nodes, list)[::2], nodes[1::2], strict=True):
        yield decoder.hashed(key, depth), decoder.value(value, depth + 1)


def _decode_ordered(decoder: Decoder, node: list[Node], depth: int) -> OrderedDict[Any, Any]:
    _, nodes, attributes = node
    ordered = OrderedDict(_pairs(decoder, nodes, depth))
    if attributes:
        vars(ordered).update(decoder.attributes(attributes[0], depth))
    return ordered


def _decode_set(decoder: Decoder, node: list[Node], depth: int) -> set[Any]:
    _, nodes = node
    return {decoder.hashed(member, depth) for member in expect(nodes, list)}


def _decode_frozenset(decoder: Decoder, node: list[Node], depth: int) -> frozenset[Any]:
    return frozenset(_decode_set(decoder, node, depth))


def _decode_reference(decoder: Decoder, node: list[Node], depth: int) -> Any:
    _, number = node
    return decoder.complete(expect(number, int))


def _decode_bytes(decoder: Decoder, node: list[Node], depth: int) -> bytes:
    _, number = node
    return bytes(decoder.bulk(number))


def _decode_bytearray(decoder: Decoder, node: list[Node], depth: int) -> bytearray:
    _, source = node
    return bytearray(source if type(source) is bytes else decoder.bulk(source))


def _decode_object(decoder: Decoder, node: list[Node], depth: int) -> Any:
    _, name, state = node
    return registry.by_name(expect(name, str)).restore(decoder, state, depth)


_Decode: TypeAlias = Callable[[Decoder, list[Node], int], Any]

LEAVES: Final[dict[int, _Decode]] = {
    tags.REF: _decode_reference,
    **scalars.LEAF_DECODERS,
    **arrays.LEAF_DECODERS,
}

NUMBERED: Final[dict[int, _Decode]] = {
    tags.LIST: _decode_list,
    tags.TUPLE: _decode_tuple,
    tags.DICT: _decode_dict,
    tags.ORDERED: _decode_ordered,
    tags.SET: _decode_set,
    tags.FROZENSET: _decode_frozenset,
    tags.BYTES: _decode_bytes,
    tags.BYTEARRAY: _decode_bytearray,
    tags.OBJECT: _decode_object,
    tags.PICKLE: decode_pickled,
    tags.FAMILY: decode_kind,
    **scalars.NUMBERED_DECODERS,
    **arrays.NUMBERED_DECODERS,
}
