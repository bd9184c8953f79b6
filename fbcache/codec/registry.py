"""Types that users and their packages add: how they are encoded, and by which name they are found again.

Guarantee: a name stands for one class. Lookups take no lock; registering takes one. What was registered
here goes before what an installed package registers when it is first needed (:mod:`entry_points`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fbcache.codec import entry_points, tags
from fbcache.codec.anatomy import Anatomy, Positions
from fbcache.codec.registered import Restore, State, Way, by_callables, is_plain_named_tuple, way_of
from fbcache.codec.tags import Node
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.encoder import Encoder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registration:
    """A class, the name that trees have for it, how its state is written and read, and what it is made of."""

    cls: type
    name: str
    state: State
    restore: Restore
    anatomy: Anatomy | None

    def encode(self, encoder: Encoder, value: Any) -> Node:
        """Encode an instance of the class."""
        return [tags.OBJECT, self.name, self.state(encoder, value)]


_lock = Lock()
_fixed: set[type] = set()
_by_type: dict[type, Registration] = {}
_by_name: dict[str, Registration] = {}


def by_type(cls: type) -> Registration | None:
    """Return how instances of exactly this class are encoded, if it was registered.

    A package that says how classes of its library are stored is loaded now, if it was not before.
    """
    found = _by_type.get(cls)
    if found is None and entry_points.load(_library(cls.__module__)):
        found = _by_type.get(cls)
    return found


def anatomy_of(cls: type) -> Anatomy | None:
    """Return how instances of exactly this class are looked into, if that is known without its help.

    It is of what was registered without callables, and of named tuples with nothing besides their items.
    """
    if cls in _fixed:
        return None
    found = by_type(cls)
    if found is not None:
        return found.anatomy
    return Positions(cls) if issubclass(cls, tuple) and is_plain_named_tuple(cls) else None


def by_name(name: str) -> Registration:
    """Return what was registered by that name.

    An installed package for the library that the name starts with is loaded, if it was not before.

    Raises
    ------
    UnsupportedTypeError
        Nothing was.
    """
    found = _by_name.get(name)
    if found is None and entry_points.load(_library(name)):
        found = _by_name.get(name)
    if found is None:
        reason = f"the value holds a {name[:200]!r}, which is not registered; import the module that does so"
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
        Takes an instance and returns its state: any value that can be encoded. Not needed for enums (the
        member's name is stored; of a flag its value), named tuples, dataclasses and classes of attrs
        (their fields and nothing else), and models of pydantic (fields, which of them were set, extra
        fields, private attributes).
    decode : callable, optional
        Takes that state and returns the instance. Without it nothing of the class's is called, neither
        ``__init__`` nor a validator: fields are set as they were. One that is a descriptor is read
        and set through it.
    name : str, optional
        What the class is called in files; its module and qualified name by default. Files keep
        it, so give one if the class may move. An installed package's has to start with the name of
        the library that its entry point serves.

    Returns
    -------
    type
        ``cls``; without it, a decorator.

    Raises
    ------
    TypeError
        ``cls`` is no class, its encoding is fixed, or it is none of those, or besides that something
        with content of its own (an exception, a dict), and one of the callables is missing.
    ValueError
        The name stands for another class. (A class defined anew in the same place, as a
        notebook's cell does when it is run again, takes the former one's name over.)

    Notes
    -----
    Arrays in fields and items are made read-only when an instance is put into a pool, and no code of the
    class is run for it; with callables, or a field that is a descriptor of the class's own, they are so
    only once they were read back.

    How much memory instances take is asked of :func:`fbcache.sizeof.register`. A package can register the
    classes of a library when they are first needed: see :mod:`fbcache.codec.entry_points`.

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
    _add(Registration(cls, title, *_way(cls, encode, decode)))
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


def _library(name: Any) -> str:
    """The top-level module; of a strange class, whose module is no text, none."""
    return name.partition(".")[0] if isinstance(name, str) else ""


def _way(cls: type, encode: Any, decode: Any) -> Way:
    if encode is not None and decode is not None:
        return by_callables(cls, encode, decode)
    if encode is not None or decode is not None:
        raise TypeError("encode and decode go together: give both or none")
    return way_of(cls)


def _is_same(old: type, new: type) -> bool:
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
