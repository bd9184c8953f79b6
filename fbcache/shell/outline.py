"""What a value is made of, told from its tree alone.

Guarantees
----------
- Nothing is decoded: no code of a class or of a pickle runs, and no buffer is read.
- Any bytes at all give an outline or a ``ValueError``. A count that lies allocates nothing; of a value of
  many parts the first few are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from fbcache.checkpoint import naming
from fbcache.codec import tags
from fbcache.codec.dtypes import parse

#: Parts that are told of each container, and how deep.
_MOST_PARTS: Final = 20
_DEEPEST: Final = 4

_CONTAINERS: Final = {
    tags.LIST: "list",
    tags.TUPLE: "tuple",
    tags.SET: "set",
    tags.FROZENSET: "frozenset",
    tags.DICT: "dict",
}
_OTHERS: Final = {
    number: name.lower() for name, number in vars(tags).items() if name.isupper() and type(number) is int
}


@dataclass(frozen=True, slots=True)
class Part:
    """A value, or a part of one.

    Attributes
    ----------
    kind : str
        ``array``, ``masked array``, ``dict``, ``list``, ``object``, ``pickle``, ``int`` and so on.
    label : str
        How it is reached from what it is part of: ``['a']``, ``[0]``, ``.x``.
    dtype, shape
        Of an array, with ``order``: ``C``, ``F``, or ``strided``.
    count : int or None
        How many parts it has, or bytes or characters.
    note : str
        What else there is to say.
    parts : list of Part
        The first of its parts.
    """

    kind: str
    label: str = ""
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    order: str | None = None
    count: int | None = None
    note: str = ""
    parts: list[Part] = field(default_factory=list)

    @property
    def text(self) -> str:
        """It in a few words, but for its parts."""
        if self.kind in ("array", "masked array"):
            order = {"F": ", in Fortran order", "strided": ", a view"}.get(self.order or "", "")
            return f"{self.kind} of {self.dtype}, shape {self.shape}{order}"
        unit = {"str": "characters", "bytes": "bytes", "bytearray": "bytes"}.get(self.kind, "parts")
        count = "" if self.count is None else f" of {self.count:,} {unit[:-1] if self.count == 1 else unit}"
        return f"{self.kind}{count}{self.note and ' ' + self.note}"

    def fields(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def outline(tree: bytes) -> Part:
    """Return what the value is whose tree this is.

    Raises
    ------
    ValueError
        It is no tree.
    """
    try:
        return _Reader(tree).part("", 0)
    except (ValueError, TypeError, LookupError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(f"its tree cannot be read: {error!r}") from error


class _Reader:
    """Goes through a tree from its start to its end."""

    def __init__(self, tree: bytes) -> None:
        self._tree = tree
        self._unpacker = self._walked()

    def _walked(self) -> Any:
        """Find counts that lie before anything is built."""
        limits = {"max_buffer_size": max(len(self._tree), 1)}
        walker = msgpack.Unpacker(**limits)
        walker.feed(self._tree)
        walker.skip()
        if walker.tell() != len(self._tree):
            raise ValueError("bytes are left over")
        unpacker = msgpack.Unpacker(strict_map_key=False, **limits)
        unpacker.feed(self._tree)
        return unpacker

    def part(self, label: str, depth: int) -> Part:
        """Read one node."""
        first = self._tree[self._unpacker.tell()]
        if first >> 4 == 0x8 or first in (0xDE, 0xDF):
            count = self._unpacker.read_map_header()
            return self._keyed("dict", label, count, depth)
        if not (first >> 4 == 0x9 or first in (0xDC, 0xDD)):
            return _atom(self._unpacker.unpack(), label)
        rest = self._unpacker.read_array_header() - 1
        tag = self._unpacker.unpack()
        if tag in _CONTAINERS and rest == 1:
            return self._container(tag, label, depth)
        read = _NODES.get(tag)
        if read is not None:
            return read(self, label, rest, depth)
        self._skip(rest)
        return Part(_OTHERS.get(tag, f"node of an unknown kind {tag!r}"), label)

    def _container(self, tag: int, label: str, depth: int) -> Part:
        count = self._unpacker.read_array_header()
        if tag == tags.DICT:
            return self._keyed("dict", label, count // 2, depth)
        return self._indexed(_CONTAINERS[tag], label, count, depth)

    def _indexed(self, kind: str, label: str, count: int, depth: int) -> Part:
        told = self._told(count, depth)
        parts = [self.part(f"[{index}]", depth + 1) for index in range(told)]
        self._skip(count - told)
        return Part(kind, label, count=count, parts=parts)

    def _keyed(self, kind: str, label: str, count: int, depth: int, shape: str = "[{}]") -> Part:
        told = self._told(count, depth)
        parts = []
        for _ in range(told):
            key = naming.shown(self._key())
            parts.append(self.part(shape.format(key), depth + 1))
        self._skip(2 * (count - told))
        return Part(kind, label, count=count, parts=parts)

    def _key(self) -> Any:
        key = self._unpacker.unpack()
        return key if not isinstance(key, list) else _Key(key)

    def _told(self, count: int, depth: int) -> int:
        return 0 if depth >= _DEEPEST else min(count, _MOST_PARTS)

    def _skip(self, count: int) -> None:
        for _ in range(count):
            self._unpacker.skip()

    def _rest(self, count: int) -> Iterator[Any]:
        for _ in range(count):
            yield self._unpacker.unpack()

    # ------------------------------------------------------------------------ nodes

    def array(self, label: str, rest: int, depth: int) -> Part:
        dtype, shape, _, fortran = self._rest(rest)
        return Part("array", label, str(parse(dtype)), tuple(shape), "F" if fortran else "C")

    def view(self, label: str, rest: int, depth: int) -> Part:
        dtype, shape, _, _, _ = self._rest(rest)
        return Part("array", label, str(parse(dtype)), tuple(shape), "strided")

    def objects(self, label: str, rest: int, depth: int) -> Part:
        shape = tuple(self._unpacker.unpack())
        self._skip(rest - 1)
        return Part("array", label, "object", shape, "C")

    def strings(self, label: str, rest: int, depth: int) -> Part:
        shape = tuple(self._unpacker.unpack())
        self._skip(rest - 1)
        return Part("array", label, "StringDType", shape, "C")

    def masked(self, label: str, rest: int, depth: int) -> Part:
        count = self._unpacker.read_array_header()
        data = self.part("", depth + 1)
        self._skip(count - 1 + rest - 1)
        return Part("masked array", label, data.dtype, data.shape, data.order)

    def scalar(self, label: str, rest: int, depth: int) -> Part:
        dtype = parse(self._unpacker.unpack())
        self._skip(rest - 1)
        return Part(f"numpy scalar {dtype}", label)

    def instance(self, label: str, rest: int, depth: int) -> Part:
        note = f"of the registered class {self._unpacker.unpack()}"
        state = self.part("", depth)
        self._skip(rest - 2)
        return Part("object", label, note=note, parts=state.parts if state.kind == "dict" else [])

    def pickled(self, label: str, rest: int, depth: int) -> Part:
        self._skip(rest)
        return Part("pickle", label, note="which only its code can open")

    def buffer(self, label: str, rest: int, depth: int) -> Part:
        self._skip(rest)
        return Part("bytes", label)

    def reference(self, label: str, rest: int, depth: int) -> Part:
        self._skip(rest)
        return Part("the same object as a part before", label)


class _Key:
    """A key that is no atom, of which its kind alone is told."""

    def __init__(self, node: list[Any]) -> None:
        self._kind = _OTHERS.get(node[0] if node and type(node[0]) is int else -1, "key")

    def __repr__(self) -> str:
        return f"<{self._kind}>"


def _atom(value: Any, label: str) -> Part:
    count = len(value) if isinstance(value, (str, bytes)) else None
    return Part("None" if value is None else type(value).__name__, label, count=count)


_NODES: Final[dict[int, Callable[[_Reader, str, int, int], Part]]] = {
    tags.ARRAY: _Reader.array,
    tags.VIEW: _Reader.view,
    tags.OBJECTS: _Reader.objects,
    tags.STRINGS: _Reader.strings,
    tags.MASKED: _Reader.masked,
    tags.SCALAR: _Reader.scalar,
    tags.VOID: _Reader.scalar,
    tags.OBJECT: _Reader.instance,
    tags.PICKLE: _Reader.pickled,
    tags.BYTES: _Reader.buffer,
    tags.REF: _Reader.reference,
}
