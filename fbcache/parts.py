"""What values are made of: a walk through a value, and a value made anew with some parts replaced.

Guarantees: containers are never modified, and only those on the way to a replaced part are made anew. What
occurs twice still does afterwards, and a value that contains itself is no trouble. Of the program's
code nothing runs but the hashes of keys.

What is looked into are ``dict``, ``list``, ``tuple``, ``OrderedDict`` and ``defaultdict``, exactly; named
tuples, and instances of classes registered by their fields (:mod:`fbcache.codec.anatomy`); values of
other libraries that have parts (:class:`~fbcache.codec.families.kinds.Kind`).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator
from typing import Any, Final

import numpy as np

from fbcache.codec.anatomy import Anatomy, Swap
from fbcache.codec.families.kinds import Kind, kind_of
from fbcache.codec.memory import Array
from fbcache.codec.registry import anatomy_of

#: What has no parts, and is met most.
ATOMS: Final = frozenset({type(None), bool, int, float, complex, str, bytes})


def arrays(value: Any, closed: Container[int] = frozenset()) -> Iterator[Array]:
    """Yield the arrays in a value, as :func:`walk` does."""
    # Not isinstance, which asks an object for its __class__.
    return (part for part in walk(value, closed) if issubclass(type(part), np.ndarray))


def walk(value: Any, closed: Container[int] = frozenset()) -> Iterator[Any]:
    """Yield a value and all that its containers hold, each once, atoms left out.

    What is in ``closed`` by its id, when it was yielded, is not looked into.
    """
    seen = {id(value)}
    pending = [value]
    anatomies = _Anatomies()
    while pending:
        item = pending.pop()
        yield item
        for part in () if id(item) in closed else _parts(item, anatomies):
            if type(part) not in ATOMS and id(part) not in seen:
                seen.add(id(part))
                pending.append(part)


def replace(value: Any, replaced: dict[int, Any]) -> Any:
    """Return the value with some of its parts, by id, replaced by others."""
    if not replaced:
        return value
    return _Remaking(replaced, _leading_to(value, replaced)).whole(value)


class _Remaking:
    """One value on its way: what stands for parts already, and what is to be made anew, by id.

    Containers that can be blank first are so before anything is made of others: any cycle has one. The rest
    are made from within, however deep they are.
    """

    __slots__ = ("_anatomies", "_made", "_stale")

    def __init__(self, made: dict[int, Any], stale: dict[int, Any]) -> None:
        self._anatomies = _Anatomies()
        self._made = dict(made)
        self._stale = stale

    def whole(self, value: Any) -> Any:
        blanks = []
        for mark, container in self._stale.items():
            fresh = None if mark in self._made else self._anatomy(container).blank(container)
            if fresh is not None:
                self._made[mark] = fresh
                blanks.append((container, fresh))
        for container in self._stale.values():
            self._make(container)
        for container, fresh in blanks:
            self._anatomy(container).remake(container, self._swap, fresh)
        return self._swap(value)

    def _make(self, container: Any) -> None:
        made, stale = self._made, self._stale
        pending = [container]
        while pending:
            item = pending[-1]
            if id(item) in made:
                pending.pop()
                continue
            anatomy = self._anatomy(item)
            within = [part for part in anatomy.parts(item) if id(part) in stale and id(part) not in made]
            if within:
                pending += within
            else:
                made[id(item)] = anatomy.remake(item, self._swap, None)

    def _swap(self, part: Any) -> Any:
        return self._made.get(id(part), part)

    def _anatomy(self, container: Any) -> Anatomy:
        anatomy = self._anatomies[type(container)]
        assert anatomy is not None, "it was looked into"
        return anatomy


def _parts(item: Any, anatomies: _Anatomies) -> Iterable[Any]:
    """What a container holds, unless that is atoms alone."""
    kind = type(item)
    if kind is dict:
        parts: Collection[Any] = item.values()
    elif kind is list or kind is tuple:
        parts = item
    elif kind is np.ndarray:
        return ()
    else:
        anatomy = anatomies[kind]
        if anatomy is None:
            return ()
        parts = anatomy.parts(item)
    return () if ATOMS.issuperset(map(type, parts)) else parts


def _leading_to(value: Any, ids: Iterable[int]) -> dict[int, Any]:
    """The containers that hold one of the parts, directly or not, by id."""
    holders: dict[int, list[Any]] = {}
    anatomies = _Anatomies()
    for container in walk(value):
        for part in _parts(container, anatomies):
            holders.setdefault(id(part), []).append(container)
    leading: dict[int, Any] = {}
    pending = list(ids)
    while pending:
        for holder in holders.get(pending.pop(), ()):
            if id(holder) not in leading:
                leading[id(holder)] = holder
                pending.append(id(holder))
    return leading


# ---------------------------------------------------------------------------------- anatomies


class _Lists(Anatomy):
    __slots__ = ()

    def parts(self, value: Any) -> Collection[Any]:
        items: list[Any] = value
        return items

    def blank(self, value: Any) -> Any:
        return []

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        blank.extend([swap(part) for part in value])
        return blank


class _Tuples(_Lists):
    __slots__ = ()

    def blank(self, value: Any) -> Any:
        return None

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        return tuple([swap(part) for part in value])


class _Dicts(Anatomy):
    __slots__ = ()

    def parts(self, value: Any) -> Collection[Any]:
        values: Collection[Any] = value.values()
        return values

    def blank(self, value: Any) -> Any:
        return {}

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        blank.update({key: swap(part) for key, part in value.items()})
        return blank


class _DefaultDicts(_Dicts):
    __slots__ = ()

    def blank(self, value: Any) -> Any:
        return defaultdict(value.default_factory)


class _OrderedDicts(_Dicts):
    """The values, and those of the attributes, which travel too."""

    __slots__ = ()

    def parts(self, value: Any) -> Collection[Any]:
        return [*value.values(), *vars(value).values()]

    def blank(self, value: Any) -> Any:
        return OrderedDict()

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        vars(blank).update({name: swap(part) for name, part in vars(value).items()})
        return super().remake(value, swap, blank)


class _OfKind(Anatomy):
    """Of a value of another library."""

    __slots__ = ("_kind",)

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def parts(self, value: Any) -> Collection[Any]:
        return () if self._kind.parts is None else self._kind.parts(value)

    def remake(self, value: Any, swap: Swap, blank: Any) -> Any:
        assert self._kind.rebuild is not None
        return self._kind.rebuild(value, [swap(part) for part in self.parts(value)])


_BUILT_IN: Final[dict[type, Anatomy]] = {
    list: _Lists(),
    tuple: _Tuples(),
    dict: _Dicts(),
    defaultdict: _DefaultDicts(),
    OrderedDict: _OrderedDicts(),
}


class _Anatomies(dict[type, Anatomy | None]):
    """The anatomies of the classes that one walk has met; None for those that are not looked into."""

    __slots__ = ()

    def __missing__(self, cls: type) -> Anatomy | None:
        anatomy = _BUILT_IN.get(cls)
        if anatomy is None:
            kind = kind_of(cls)
            anatomy = anatomy_of(cls) if kind is None else _OfKind(kind)
        self[cls] = anatomy
        return anatomy
