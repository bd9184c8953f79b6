"""From a value to a tree and its buffers: the walk, and the containers.

Guarantees: types are told apart exactly, so no subclass is taken for its base; an object met
twice is written once; a value that contains itself is refused, and so is one nested too deep.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from reprlib import Repr
from typing import Any, Final, TypeAlias

from fbcache.codec import arrays, registry, scalars, tags
from fbcache.codec.arrays import Placement
from fbcache.codec.families.kinds import encode_other
from fbcache.codec.frames import Buffer
from fbcache.codec.tags import INLINE_BYTES, MAX_DEPTH, Node
from fbcache.errors import UnsupportedTypeError

_OPEN: Final = -1  # stands for the number of a container that is not complete yet

_repr = Repr()
_repr.maxstring = _repr.maxother = 60  # a path is for reading


class _Step(str):
    """A step of a path which is no index or key, as it is shown: ``.x``."""

    __slots__ = ()


_HERE: Final = _Step("")
_KEYS: Final = _Step(".keys()")
_MEMBER: Final = _Step("{...}")


class Encoder:
    """One value on its way into a tree.

    Attributes
    ----------
    allow_pickle : bool
        Whether a part without an encoder may be pickled.
    buffers : list of Buffer
        The buffers so far.
    bare : bool
        Whether what libraries note in a value as it is read is left out: for comparison only.
    compute_lazy : bool
        Whether a part that is not in memory yet may be computed.
    notes : dict
        What kinds have to find again while this value is encoded.
    placement : Placement
        Arrays whose memory has no place yet: that is decided when all of them are known.
    path : list
        Indices, keys and steps down to the part at hand; a container sets the last one.
    pickled : str or None
        Path and type of the first part that took pickle.
    """

    __slots__ = (
        "_atoms",
        "_complete",
        "_kept",
        "_keys",
        "_numbers",
        "_sharing",
        "allow_pickle",
        "bare",
        "buffers",
        "compute_lazy",
        "notes",
        "path",
        "pickled",
        "placement",
    )

    def __init__(
        self, allow_pickle: bool, atoms: frozenset[type], compute_lazy: bool = False, bare: bool = False
    ) -> None:
        self.allow_pickle = allow_pickle
        self.bare = bare
        self.compute_lazy = compute_lazy
        self.buffers: list[Buffer] = []
        self.notes: dict[Any, Any] = {}
        self.placement: Placement = []
        self.path: list[Any] = []
        self.pickled: str | None = None
        self._atoms = atoms
        self._keys = atoms | {bytes}
        self._numbers: dict[int, int] = {}  # by id; what has one stays alive: it is in the value or kept
        self._complete = 0
        self._sharing = True
        self._kept: list[Any] = []

    def node(self, value: Any) -> Node:
        """Encode one part of the value.

        Raises
        ------
        UnsupportedTypeError, PickleRefusedError
            As :meth:`MsgpackCodec.encode`.
        """
        kind = type(value)
        if kind in self._atoms or (kind is bytes and len(value) < INLINE_BYTES):
            return value
        leaf = LEAVES.get(kind)
        if leaf is not None:
            return leaf(self, value)
        if self._sharing:
            number = self._numbers.get(id(value))
            if number is not None:
                return self._reference(number)
            self._numbers[id(value)] = _OPEN
        path = self.path
        if len(path) >= MAX_DEPTH:
            raise self.unsupported(f"it is nested more than {MAX_DEPTH} levels deep")
        path.append(_HERE)
        build = NUMBERED.get(kind)
        node = build(self, value) if build is not None else _encode_other(self, value)
        path.pop()
        if self._sharing:
            self._numbers[id(value)] = self._complete
            self._complete += 1
        return node

    def items(self, values: Collection[Any]) -> Node:
        """Encode the items of a sequence; the path names them by index."""
        if self._atoms.issuperset(map(type, values)):
            return values
        atoms, path, node = self._atoms, self.path, self.node
        nodes = []
        for index, value in enumerate(values):
            if type(value) in atoms:
                nodes.append(value)
            else:
                path[-1] = index
                nodes.append(node(value))
        return nodes

    def mapping(self, values: dict[Any, Any]) -> Node:
        """Encode a dict whose keys are all atoms, as a map."""
        atoms, path, node = self._atoms, self.path, self.node
        nodes = {}
        for key, value in values.items():
            if type(value) in atoms:
                nodes[key] = value
            else:
                path[-1] = key
                nodes[key] = node(value)
        return nodes

    def pairs(self, values: dict[Any, Any]) -> Node:
        """Encode a dict with any keys, as key, value, key, value..."""
        path = self.path
        nodes = []
        for key, value in values.items():
            path[-1] = _KEYS
            nodes.append(self.hashed(key))
            path[-1] = key
            nodes.append(self.node(value))
        return nodes

    def has_plain_keys(self, values: dict[Any, Any]) -> bool:
        """Whether a dict's keys are all atoms."""
        return self._keys.issuperset(map(type, values))

    def is_flat(self, values: Collection[Any]) -> bool:
        """Whether all the values are atoms."""
        return self._atoms.issuperset(map(type, values))

    def hashed(self, value: Any) -> Node:
        """Encode a key or a member of a set.

        Nothing in it is shared: of a few nested tuples that name each other twice, the hash takes
        time without bound, so the decoder refuses references there.
        """
        sharing, self._sharing = self._sharing, False
        node = value if type(value) in self._keys else self.node(value)
        self._sharing = sharing
        return node

    def members(self, values: Collection[Any]) -> Node:
        """Encode the members of a set."""
        if self._keys.issuperset(map(type, values)):
            return list(values)
        self.path[-1] = _MEMBER
        return [self.hashed(value) for value in values]

    def step(self, shown: str) -> None:
        """Name the part that comes next by a step that is no index or key."""
        self.path[-1] = _Step(shown)

    def part(self, shown: str, value: Any) -> Node:
        """Encode a part that may have been made just now, by a step that is no index or key."""
        self.path[-1] = _Step(shown)
        self._kept.append(value)
        return self.node(value)

    def keep(self, value: Any) -> None:
        """Keep a temporary alive, so that its id stays its own."""
        self._kept.append(value)

    def unsupported(self, reason: str) -> UnsupportedTypeError:
        """Return the error that names the part at hand."""
        where = self.where()
        return UnsupportedTypeError(f"{where} cannot be encoded: {reason}", where)

    def where(self) -> str:
        """Return the path to the part at hand: ``value['a'][3].x``."""
        return "value" + "".join(s if type(s) is _Step else f"[{_repr.repr(s)}]" for s in self.path)

    def _reference(self, number: int) -> Node:
        if number == _OPEN:
            raise self.unsupported("it contains itself")
        return [tags.REF, number]


def _encode_list(encoder: Encoder, value: list[Any]) -> Node:
    return [tags.LIST, encoder.items(value)]


def _encode_tuple(encoder: Encoder, value: tuple[Any, ...]) -> Node:
    return [tags.TUPLE, encoder.items(value)]


def _encode_dict(encoder: Encoder, value: dict[Any, Any]) -> Node:
    if not encoder.has_plain_keys(value):
        return [tags.DICT, encoder.pairs(value)]
    return value if encoder.is_flat(value.values()) else encoder.mapping(value)


def _encode_ordered(encoder: Encoder, value: OrderedDict[Any, Any]) -> Node:
    pairs = encoder.pairs(value)
    attributes = vars(value)  # torch keeps the versions of a state_dict's modules in one
    return [tags.ORDERED, pairs, [encoder.part(".__dict__", attributes)] if attributes else []]


def _encode_set(encoder: Encoder, value: set[Any]) -> Node:
    return [tags.SET, encoder.members(value)]


def _encode_frozenset(encoder: Encoder, value: frozenset[Any]) -> Node:
    return [tags.FROZENSET, encoder.members(value)]


def _encode_bytes(encoder: Encoder, value: bytes) -> Node:
    encoder.buffers.append(value)
    return [tags.BYTES, len(encoder.buffers) - 1]


def _encode_bytearray(encoder: Encoder, value: bytearray) -> Node:
    if len(value) < INLINE_BYTES:
        return [tags.BYTEARRAY, bytes(value)]
    encoder.buffers.append(value)
    return [tags.BYTEARRAY, len(encoder.buffers) - 1]


def _encode_other(encoder: Encoder, value: Any) -> Node:
    registered = registry.by_type(type(value))
    return registered.encode(encoder, value) if registered is not None else encode_other(encoder, value)


_Encode: TypeAlias = Callable[[Encoder, Any], Node]

#: What has no parts and is written anew each time.
LEAVES: Final[dict[type, _Encode]] = {**scalars.LEAVES, **arrays.LEAVES}

#: What may have parts, or is big: written once, and then referred to by its number.
NUMBERED: Final[dict[type, _Encode]] = {
    list: _encode_list,
    tuple: _encode_tuple,
    dict: _encode_dict,
    OrderedDict: _encode_ordered,
    set: _encode_set,
    frozenset: _encode_frozenset,
    bytes: _encode_bytes,
    bytearray: _encode_bytearray,
    **scalars.NUMBERED,
    **arrays.NUMBERED,
}

registry.fix((*tags.ATOMS, *LEAVES, *NUMBERED))
