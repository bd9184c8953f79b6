"""What instances of registered classes are made of, looked at without running any code of theirs.

Guarantees: fields are read where an instance keeps them, in its ``__dict__`` and its slots, past properties,
``__getattr__`` and ``__getattribute__``; an instance made anew gets what a decoded one gets, past
``__init__``, ``__new__``, ``__setattr__`` and validators. A class with a field that is a descriptor of its
own has no anatomy, for only the descriptor knows where the field is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final, TypeAlias

#: Returns what stands for a part in an instance made anew: another object, or the part itself.
Swap: TypeAlias = Callable[[Any], Any]

#: Where classes of attrs that cache their hash keep it. They expect ``__init__`` to have set it to None.
ATTRS_HASH: Final = "_attrs_cached_hash"

_UNSET: Final = object()
_DESCRIPTOR: Final = ("__get__", "__set__", "__delete__")

#: Past ``__getattr__`` and ``__getattribute__`` of the class.
_get: Final = object.__getattribute__


class Anatomy:
    """How instances of one class are looked into, and made anew with other parts."""

    __slots__ = ()

    def parts(self, value: Any) -> Collection[Any]:
        """Return what an instance holds: the very objects."""
        raise NotImplementedError

    def blank(self, value: Any) -> Any:
        """Return a new instance to be given its parts later; None where it takes them to make one."""
        return None

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        """Give ``blank`` the parts of ``value``, each swapped, or make an instance of them; return it."""
        raise NotImplementedError


class Positions(Anatomy):
    """Of tuples with names for their items."""

    __slots__ = ("_cls",)

    def __init__(self, cls: type[tuple[Any, ...]]) -> None:
        self._cls = cls

    def parts(self, value: Any) -> Collection[Any]:
        """Return the items."""
        return list(tuple.__iter__(value))

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        """Make a tuple of the swapped items."""
        return tuple.__new__(self._cls, [swap(part) for part in tuple.__iter__(value)])


class Fields(Anatomy):
    """Of dataclasses and classes of attrs.

    Parameters
    ----------
    names : list of str
        Fields that are read like attributes: the class has nothing by the name that would run for it.
    hidden : list of str
        Fields behind something of the class's, a method say, which answers where an instance has none.
    defaulted : list of str
        Those of ``names`` for which the class has a value, which answers where an instance has none.
    namespace : descriptor or None
        Gives an instance's ``__dict__``, where these two kinds are. To ask for it makes the instance larger.
    """

    __slots__ = ("_apart", "_caches_hash", "_cls", "_hidden", "_names", "_namespace", "_plain")

    def __init__(
        self,
        cls: type,
        names: list[str],
        hidden: list[str],
        defaulted: list[str],
        namespace: GetSetDescriptorType | None,
        caches_hash: bool,
    ) -> None:
        self._cls = cls
        self._names = names
        self._hidden = hidden
        self._apart = [*hidden, *defaulted]
        self._plain = [name for name in names if name not in defaulted]
        self._namespace = namespace
        self._caches_hash = caches_hash

    def parts(self, value: Any) -> Collection[Any]:
        """Return the values of the fields that are set."""
        if not self._hidden:
            try:
                return [_get(value, name) for name in self._names]
            except AttributeError:  # one is not set
                pass
        return [*self._set(value).values()]

    def blank(self, value: Any) -> Any:
        """Return an instance without fields."""
        fresh: Any = object.__new__(self._cls)
        if self._caches_hash:
            object.__setattr__(fresh, ATTRS_HASH, None)
        return fresh

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        """Set the fields."""
        for name, part in self._set(value).items():
            object.__setattr__(blank, name, swap(part))
        return blank

    def _set(self, value: Any) -> dict[str, Any]:
        """The fields that are set."""
        found = {} if self._namespace is None else _named(self._namespace, value, self._apart)
        for name in self._plain:
            try:
                found[name] = _get(value, name)
            except AttributeError:
                pass
        return found


class ModelParts(Anatomy):
    """Of models of pydantic: fields, extra fields, private attributes.

    Parameters
    ----------
    namespace : descriptor
        Gives an instance's ``__dict__``, where its fields are.
    dicts : list of descriptors
        Slots of what else has names.
    others : list of descriptors
        Slots of sets of names.
    """

    __slots__ = ("_cls", "_dicts", "_namespace", "_others")

    def __init__(
        self,
        cls: Any,
        namespace: GetSetDescriptorType,
        dicts: list[MemberDescriptorType],
        others: list[MemberDescriptorType],
    ) -> None:
        self._cls = cls
        self._namespace = namespace
        self._dicts = dicts
        self._others = others

    def parts(self, value: Any) -> Collection[Any]:
        """Return the values of all that has a name."""
        found = [*_named(self._namespace, value, self._cls.model_fields).values()]
        for slot in self._dicts:
            named = _in_slot(slot, value)
            if type(named) is dict:
                found += named.values()
        return found

    def blank(self, value: Any) -> Any:
        """Return a model without any of it."""
        return object.__new__(self._cls)

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        """Set all of it."""
        found = _named(self._namespace, value, self._cls.model_fields)
        self._namespace.__get__(blank).update({name: swap(part) for name, part in found.items()})
        for slot in (*self._dicts, *self._others):
            named = _in_slot(slot, value)
            if type(named) is dict:
                slot.__set__(blank, {name: swap(part) for name, part in named.items()})
            elif named is not _UNSET:
                slot.__set__(blank, set(named) if type(named) is set else named)
        return blank


def of_fields(cls: type, names: Iterable[str], *, caches_hash: bool) -> Fields | None:
    """Return the anatomy of a class with these fields; None if it keeps one of them in its own way."""
    named: list[str] = []
    hidden: list[str] = []
    defaulted: list[str] = []
    for name in names:
        kind = type(_static(cls, name))
        if kind is MemberDescriptorType or not any(hasattr(kind, method) for method in _DESCRIPTOR):
            named.append(name)
            if kind is not MemberDescriptorType and any(name in vars(base) for base in cls.__mro__):
                defaulted.append(name)
        elif hasattr(kind, "__set__") or hasattr(kind, "__delete__"):
            return None
        else:
            hidden.append(name)
    namespace = _namespace_of(cls)
    if namespace is None and _static(cls, "__dict__") is not None:
        return None
    return Fields(cls, named, hidden, defaulted, namespace, caches_hash)


def of_model(cls: type, dicts: Iterable[str], others: Iterable[str]) -> ModelParts | None:
    """Return the anatomy of a model, which keeps what it has besides fields in slots of these names."""
    namespace = _namespace_of(cls)
    if namespace is None:
        return None
    return ModelParts(cls, namespace, _slots_of(cls, dicts), _slots_of(cls, others))


def _slots_of(cls: type, names: Iterable[str]) -> list[MemberDescriptorType]:
    found = [_static(cls, name) for name in names]
    return [slot for slot in found if type(slot) is MemberDescriptorType]


def _namespace_of(cls: type) -> GetSetDescriptorType | None:
    found = _static(cls, "__dict__")
    return found if type(found) is GetSetDescriptorType else None


def _static(cls: type, name: str) -> Any:
    """What a class has by that name, itself or from its bases, as it is; None for nothing."""
    for base in cls.__mro__:
        if base is not object and name in vars(base):
            return vars(base)[name]
    return None


def _named(namespace: GetSetDescriptorType, value: Any, names: Iterable[str]) -> dict[str, Any]:
    """The attributes of these names that are set in an instance's ``__dict__``."""
    attributes = namespace.__get__(value)
    found = [(name, dict.get(attributes, name, _UNSET)) for name in names]
    return {name: part for name, part in found if part is not _UNSET}


def _in_slot(slot: MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _UNSET
