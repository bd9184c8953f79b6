"""The ways in which instances of a registered class are taken apart and made again.

Guarantees: what is stored is what the class declares (fields, a member's name, private attributes of a
model), as it is at that moment; it is set again as it was, without ``__init__``, ``__new__``,
``__post_init__``, converters and validators of the class. All parts are there before the instance
is. Other attributes of an instance are not stored: cached properties, say.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable, Iterable
from inspect import getattr_static
from types import BuiltinFunctionType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fbcache.codec.anatomy import ATTRS_HASH, Anatomy, Positions, of_fields, of_model
from fbcache.codec.tags import Node, expect
from fbcache.errors import FBCacheError, UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

State: TypeAlias = Callable[["Encoder", Any], Node]
Restore: TypeAlias = Callable[["Decoder", Node, int], Any]
Way: TypeAlias = tuple[State, Restore, Anatomy | None]

#: Stands for a field that is not set; no value has an empty list for a node.
_UNSET: Final[Node] = []

_FIELDS_SET: Final = "__pydantic_fields_set__"
_EXTRA: Final = "__pydantic_extra__"
_PRIVATE: Final = "__pydantic_private__"

#: Where a model keeps what is no field's value, as the documentation of ``BaseModel`` says.
_MODEL_STATE: Final = (_EXTRA, _PRIVATE, _FIELDS_SET)


def way_of(cls: type) -> Way:
    """Return how instances of a class travel that says itself what it is made of.

    Raises
    ------
    TypeError
        It does not, or there is more to an instance than that.
    """
    if issubclass(cls, enum.Enum):
        return _by_member(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _by_position(cls)
    if _is_model(cls):
        _check_base(cls, object)
        return _by_model(cls)
    if "__attrs_attrs__" in dir(cls):
        _check_base(cls, object)
        return _by_fields(cls, [field.name for field in cls.__attrs_attrs__])  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(cls):
        _check_base(cls, object)
        return _by_fields(cls, [field.name for field in dataclasses.fields(cls)])
    kinds = "an enum, a named tuple, a dataclass, a class of attrs or a model of pydantic"
    raise TypeError(f"{cls.__qualname__} is not {kinds}: give encode and decode")


def is_plain_named_tuple(cls: type[tuple[Any, ...]]) -> bool:
    """Whether instances are tuples with names for their items, and nothing besides."""
    if cls.__dictoffset__ or type(getattr_static(cls, "_fields", None)) is not tuple:
        return False
    return _base_with_content(cls) is tuple


def _check_base(cls: type, wanted: type) -> None:
    """See that instances have no content but what ``wanted`` and Python classes give them."""
    base = _base_with_content(cls)
    if base is not wanted:
        raise TypeError(f"{cls.__qualname__} is a {base.__qualname__} besides: give encode and decode")


def _base_with_content(cls: type) -> type:
    base = cls
    while not isinstance(vars(base).get("__new__"), BuiltinFunctionType):
        assert base.__base__ is not None, "object has a __new__"
        base = base.__base__
    return base


# ------------------------------------------------------------------ callables


def by_callables(cls: type, encode: Callable[[Any], Any], decode: Callable[[Any], Any]) -> Way:
    """Return how instances travel that two callables of the user's take apart and make."""

    def state(encoder: Encoder, value: Any) -> Node:
        try:
            made = encode(value)
        except (FBCacheError, MemoryError):
            raise
        except Exception as error:
            raise encoder.unsupported(f"the encoder of {cls.__qualname__} raised {error!r}") from error
        return encoder.part(".encode()", made)

    def restore(decoder: Decoder, node: Node, depth: int) -> Any:
        made = decoder.value(node, depth + 1)
        try:
            return decode(made)
        except (FBCacheError, MemoryError):
            raise
        except Exception as error:
            raise UnsupportedTypeError(f"the decoder of {cls.__qualname__} raised {error!r}") from error

    return state, restore, None


# ------------------------------------------------------------------ enums


def _by_member(cls: type[enum.Enum]) -> Way:
    is_flag = issubclass(cls, enum.Flag)  # whose members have a combination of names, or none

    def state(encoder: Encoder, value: enum.Enum) -> Node:
        return encoder.node(value.value if is_flag else value.name)

    def restore(decoder: Decoder, node: Node, depth: int) -> enum.Enum:
        member = decoder.value(node, depth + 1)
        try:
            return cls(member) if is_flag else cls[member]
        except Exception as error:  # an enum may have a _missing_ of its own
            raise UnsupportedTypeError(f"{cls.__qualname__} has no member {member!r} any more") from error

    return state, restore, None


# ------------------------------------------------------------------ fields


def _by_fields(cls: type, names: list[str]) -> Way:
    caches_hash = ATTRS_HASH in getattr(getattr(cls.__hash__, "__code__", None), "co_names", ())

    def state(encoder: Encoder, value: Any) -> Node:
        return _encode_fields(encoder, names, lambda name: getattr(value, name))

    def restore(decoder: Decoder, node: Node, depth: int) -> Any:
        parts = _decode_fields(decoder, node, names, cls, depth)
        value: Any = object.__new__(cls)
        for name, part in parts.items():
            _set(value, name, part)
        if caches_hash:
            object.__setattr__(value, ATTRS_HASH, None)
        return value

    return state, restore, of_fields(cls, names, caches_hash=caches_hash)


def _by_position(cls: type[tuple[Any, ...]]) -> Way:
    _check_base(cls, tuple)
    names: list[str] = list(cls._fields)  # type: ignore[attr-defined]

    def state(encoder: Encoder, value: tuple[Any, ...]) -> Node:
        if len(value) != len(names):
            raise encoder.unsupported(f"it has {len(value)} items, where {cls.__qualname__} has {len(names)}")
        parts = dict(zip(names, value, strict=True))
        return _encode_fields(encoder, names, parts.__getitem__)

    def restore(decoder: Decoder, node: Node, depth: int) -> Any:
        parts = _decode_fields(decoder, node, names, cls, depth)
        return tuple.__new__(cls, [parts[name] for name in names])

    return state, restore, Positions(cls)


def _encode_fields(encoder: Encoder, names: Iterable[str], get: Callable[[str], Any]) -> dict[str, Node]:
    nodes = {}
    for name in names:
        try:
            part = get(name)
        except (AttributeError, KeyError):
            nodes[name] = _UNSET
        else:
            nodes[name] = encoder.part(f".{name}", part)  # kept: a descriptor may have made it just now
    return nodes


def _decode_fields(
    decoder: Decoder, node: Node, names: Iterable[str], cls: type, depth: int
) -> dict[str, Any]:
    """Decode the fields that are set, of a node that has exactly these names."""
    if type(node) is not dict or node.keys() != set(names):
        reason = f"{cls.__qualname__} has other fields now than when the value was stored"
        raise UnsupportedTypeError(f"{reason}; register it with encode and decode to read both")
    return {name: decoder.value(part, depth + 1) for name, part in node.items() if part != _UNSET}


def _set(value: Any, name: str, part: Any) -> None:
    """Set an attribute past what the class does against that."""
    try:
        object.__setattr__(value, name, part)
    except Exception as error:  # a descriptor's own code
        what = f"{type(value).__qualname__}.{name}"
        raise UnsupportedTypeError(f"{what} cannot be set as it was stored: {error!r}") from error


# ------------------------------------------------------------------ models of pydantic


def _is_model(cls: type) -> bool:
    pydantic = sys.modules.get("pydantic")
    base = getattr(pydantic, "BaseModel", None)
    return base is not None and issubclass(cls, base) and all(hasattr(base, name) for name in _MODEL_STATE)


def _by_model(cls: Any) -> Way:
    # A root model has no extra fields and no private attributes, and no slots for them.
    slots = [name for name in _MODEL_STATE if type(getattr_static(cls, name)) is MemberDescriptorType]

    def state(encoder: Encoder, value: Any) -> Node:
        fields = _encode_fields(encoder, cls.model_fields, value.__dict__.__getitem__)
        others = [_encode_names(encoder, getattr(value, name, None)) for name in (_EXTRA, _PRIVATE)]
        return [fields, *others, sorted(value.model_fields_set)]

    def restore(decoder: Decoder, node: Node, depth: int) -> Any:
        fields, extra, private, were_set = expect(node, list)
        parts = _decode_fields(decoder, fields, cls.model_fields, cls, depth)
        values = {
            _EXTRA: _decode_names(decoder, extra, depth),
            _PRIVATE: _decode_names(decoder, private, depth),
            _FIELDS_SET: {expect(name, str) for name in expect(were_set, list)},
        }
        _check_model(cls, values)
        model = object.__new__(cls)
        object.__setattr__(model, "__dict__", parts)
        for name in slots:
            object.__setattr__(model, name, values[name])
        return model

    return state, restore, of_model(cls, (_EXTRA, _PRIVATE), (_FIELDS_SET,))


def _encode_names(encoder: Encoder, values: dict[str, Any] | None) -> Node:
    if values is None:
        return None
    undefined = sys.modules["pydantic_core"].PydanticUndefined  # of a private attribute: it is not set
    return {name: encoder.part(f".{name}", value) for name, value in values.items() if value is not undefined}


def _decode_names(decoder: Decoder, node: Node, depth: int) -> dict[str, Any] | None:
    if node is None:
        return None
    return {expect(name, str): decoder.value(part, depth + 1) for name, part in expect(node, dict).items()}


def _check_model(cls: Any, values: dict[str, Any]) -> None:
    """See that the class has room for what an instance had, and give it what every instance has."""
    private = set(values[_PRIVATE] or ())
    if not private <= set(cls.__private_attributes__):
        raise UnsupportedTypeError(f"{cls.__qualname__} has other private attributes than when it was stored")
    if cls.__private_attributes__ and values[_PRIVATE] is None:
        values[_PRIVATE] = {}
    if values[_EXTRA] is not None and cls.model_config.get("extra") != "allow":
        raise UnsupportedTypeError(f"{cls.__qualname__} allows no extra fields any more")
