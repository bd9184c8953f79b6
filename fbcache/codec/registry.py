"""Types that users add: how they are encoded, and by which name they are found again.

Guarantee: a name stands for one class. Lookups take no lock; registering takes one.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fbcache.codec import tags
from fbcache.codec.tags import Node
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registration:
    """A class, the name that trees have for it, and how its state is written and read."""

    cls: type
    name: str
    state: Callable[[Encoder, Any], Node]
    restore: Callable[[Decoder, Node, int], Any]

    def encode(self, encoder: Encoder, value: Any) -> Node:
        """Encode an instance of the class."""
        return [tags.OBJECT, self.name, self.state(encoder, value)]


_lock = Lock()
_fixed: set[type] = set()
_by_type: dict[type, Registration] = {}
_by_name: dict[str, Registration] = {}


def by_type(cls: type) -> Registration | None:
    """Return how instances of exactly this class are encoded, if it was registered."""
    return _by_type.get(cls)


def by_name(name: str) -> Registration:
    """Return what was registered by that name.

    Raises
    ------
    UnsupportedTypeError
        Nothing was.
    """
    found = _by_name.get(name)
    if found is None:
        reason = f"the value holds a {name!r}, which is not registered; import the module that does so"
        raise UnsupportedTypeError(f"{reason}, or call fbcache.codec.register")
    return found


@overload
def register(
    cls: type[T], encode: None = None, decode: None = None, *, name: str | None = None
) -> type[T]: ...
@overload
def register(
    cls: type[T], encode: Callable[[T], Any], decode: Callable[[Any], T], *, name: str | None = None
) -> type[T]: ...
@overload
def register(*, name: str) -> Callable[[type[T]], type[T]]: ...
def register(
    cls: type[Any] | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
    *,
    name: str | None = None,
) -> Any:
    """Let values of a class be stored without pickle. Also a decorator.

    Parameters
    ----------
    cls : type
        The class itself; its subclasses are registered on their own.
    encode : callable, optional
        Takes an instance and returns its state: any value that can be encoded. Enums and
        dataclasses need none: of an enum the member's name is stored (of a flag its value), of a
        dataclass its fields and nothing else.
    decode : callable, optional
        Takes that state and returns the instance. A dataclass is restored without calling
        ``__init__`` or ``__post_init__``: its fields are set as they were.
    name : str, optional
        What the class is called in files; its module and qualified name by default. Files keep
        it, so give one if the class may move.

    Returns
    -------
    type
        ``cls``; without it, a decorator.

    Raises
    ------
    TypeError
        ``cls`` is no class, its encoding is fixed, or it is neither enum nor dataclass and one of
        the callables is missing.
    ValueError
        The name stands for another class. (A class defined anew in the same place, as a
        notebook's cell does when it is run again, takes the former one's name over.)

    Examples
    --------
    >>> @register
    ... @dataclass
    ... class Point:
    ...     x: float
    ...     y: float
    """
    if cls is None:
        return lambda decorated: register(decorated, name=name)
    if not isinstance(cls, type):
        raise TypeError(f"register takes a class, not {cls!r}")
    title = f"{cls.__module__}.{cls.__qualname__}" if name is None else name
    _add(Registration(cls, title, *_ways(cls, encode, decode)))
    return cls


def fix(classes: Iterable[type]) -> None:
    """Note classes whose encoding is built in; they cannot be registered."""
    _fixed.update(classes)


def _add(new: Registration) -> None:
    if new.cls in _fixed:
        raise TypeError(f"the encoding of {new.cls.__qualname__} is fixed")
    with _lock:
        old = _by_name.get(new.name)
        if old is not None and not _is_same(old.cls, new.cls):
            raise ValueError(f"the name {new.name!r} stands for {old.cls!r}; give {new.cls!r} another one")
        if old is not None:
            _by_type.pop(old.cls, None)
        _by_name[new.name] = new
        _by_type[new.cls] = new


def _is_same(old: type, new: type) -> bool:
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


_State = Callable[["Encoder", Any], Node]
_Restore = Callable[["Decoder", Node, int], Any]


def _ways(cls: type, encode: Any, decode: Any) -> tuple[_State, _Restore]:
    if encode is not None and decode is not None:
        return _by_callables(cls, encode, decode)
    if encode is not None or decode is not None:
        raise TypeError("encode and decode go together: give both or none")
    if issubclass(cls, enum.Enum):
        return _by_member(cls)
    if dataclasses.is_dataclass(cls):
        return _by_fields(cls)
    raise TypeError(f"{cls.__qualname__} is neither an enum nor a dataclass: give encode and decode")


def _by_callables(
    cls: type, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> tuple[_State, _Restore]:
    def state(encoder: Encoder, value: Any) -> Node:
        try:
            made = encode(value)
        except Exception as error:
            raise encoder.unsupported(f"the encoder of {cls.__qualname__} raised {error!r}") from error
        encoder.keep(made)
        encoder.step(".encode()")
        return encoder.node(made)

    def restore(decoder: Decoder, node: Node, depth: int) -> Any:
        made = decoder.value(node, depth + 1)
        try:
            return decode(made)
        except Exception as error:
            raise UnsupportedTypeError(f"the decoder of {cls.__qualname__} raised {error!r}") from error

    return state, restore


def _by_member(cls: type[enum.Enum]) -> tuple[_State, _Restore]:
    is_flag = issubclass(cls, enum.Flag)  # whose members have a combination of names, or none

    def state(encoder: Encoder, value: enum.Enum) -> Node:
        return encoder.node(value.value if is_flag else value.name)

    def restore(decoder: Decoder, node: Node, depth: int) -> enum.Enum:
        member = decoder.value(node, depth + 1)
        try:
            return cls(member) if is_flag else cls[member]
        except (KeyError, ValueError, TypeError) as error:
            raise UnsupportedTypeError(f"{cls.__qualname__} has no member {member!r} any more") from error

    return state, restore


def _by_fields(cls: type) -> tuple[_State, _Restore]:
    names = [field.name for field in dataclasses.fields(cls)]

    def state(encoder: Encoder, value: Any) -> Node:
        nodes = {}
        for name in names:
            encoder.step(f".{name}")
            try:
                part = getattr(value, name)
            except AttributeError as error:
                raise encoder.unsupported("the field is not set") from error
            encoder.keep(part)  # a descriptor may have made it just now
            nodes[name] = encoder.node(part)
        return nodes

    def restore(decoder: Decoder, node: Node, depth: int) -> Any:
        if type(node) is not dict or node.keys() != set(names):
            reason = f"{cls.__qualname__} has other fields now than when the value was stored"
            raise UnsupportedTypeError(f"{reason}; register it with encode and decode to read both")
        value: Any = object.__new__(cls)
        for name, part in node.items():
            object.__setattr__(value, name, decoder.value(part, depth + 1))
        return value

    return state, restore
