"""How much memory a value takes.

Guarantees: memory that several parts share counts once, and a view counts the whole memory that
it keeps alive; the work is bounded whatever the value; no value makes :func:`measure` raise.

Large containers are measured by an evenly spaced sample, the same one each time. A walk has an
allowance of objects to visit, which each container divides among its items.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import islice, pairwise
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final, NamedTuple

import numpy as np

from fbcache.codec.families.kinds import Size, kind_of

_ALLOWANCE: Final = 20_000  # objects visited: some 20 ms
_SAMPLE: Final = 1_000  # most items of one container that are visited
_FEW: Final = 64  # entries of a dict of atoms that is measured without a walk
_ATTRIBUTES: Final = 100  # of a container of so few items, atoms are all counted
_GOLDEN: Final = 0.6180339887498949
_DEFAULT: Final = 64  # bytes of an object that does not say
_ATOMS: Final = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})
_SHARED: Final = (  # belong to the program, whoever refers to them
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    CodeType,
)

_registry: dict[type, Callable[[Any], Size]] = {}


class Measure(NamedTuple):
    """The memory of a value.

    Attributes
    ----------
    nbytes : int
        Bytes that the value takes or keeps alive. A bare array counts its elements alone.
    exact : bool
        Whether every part was looked at; false where a sample stands for the rest.
    """

    nbytes: int
    exact: bool


def register(cls: type, size: Callable[[Any], Size]) -> None:
    """Say how instances of a class, and of its subclasses, are measured.

    Parameters
    ----------
    size : callable
        Takes the instance and returns its bytes, or a pair: the bytes of its own, and the parts
        that are to be measured in their turn. What it raises is taken for "cannot say".

    Raises
    ------
    TypeError
        ``cls`` is no class.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register takes a class, not {cls!r}")
    _registry[cls] = size


def sizeof(value: Any) -> int:
    """Return the bytes of memory that a value takes; see :func:`measure`."""
    kind = type(value)
    if kind is np.ndarray:
        if value.base is None and not value.dtype.hasobject:
            nbytes: int = value.nbytes
            return nbytes
    elif kind in _ATOMS:
        return sys.getsizeof(value)
    return _Walk().measure(value).nbytes


def measure(value: Any) -> Measure:
    """Measure the memory that a value takes.

    Returns
    -------
    Measure
        Its bytes, and whether they are exact. Raises nothing: an object that breaks when it is
        looked at counts what ``sys.getsizeof`` says.
    """
    kind = type(value)
    if kind is np.ndarray:
        if value.base is None and not value.dtype.hasobject:
            return Measure(value.nbytes, True)
    elif kind in _ATOMS:
        return Measure(sys.getsizeof(value), True)
    elif kind is dict and len(value) <= _FEW:
        parts = [*value, *value.values()]
        if _ATOMS.issuperset(map(type, parts)) and len(set(map(id, parts))) == len(parts):
            return Measure(sys.getsizeof(value) + sum(map(sys.getsizeof, parts)), True)
    return _Walk().measure(value)


class _Walk:
    """One measurement: a total, and what it is still to visit.

    Each object that is pending comes with its weight, the number of objects that it stands for,
    and its allowance.
    """

    __slots__ = ("_exact", "_memory", "_nbytes", "_pending", "_seen")

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # by id; kept alive, so that no id is used again
        self._memory: set[tuple[int, int]] = set()
        self._pending: list[tuple[Any, float, int]] = []
        self._nbytes = 0.0
        self._exact = True

    def measure(self, value: Any) -> Measure:
        self._seen[id(value)] = value
        self._pending.append((value, 1.0, _ALLOWANCE))
        while self._pending:
            self._visit(*self._pending.pop())
        nbytes = int(self._nbytes)
        return Measure(nbytes - _header(value) if type(value) is np.ndarray else nbytes, self._exact)

    def _visit(self, value: Any, weight: float, allowance: int) -> None:
        try:
            own, groups = self._take_apart(value)
            self._nbytes += own * weight
            for group in groups:
                self._push(group, weight, allowance // len(groups))
        except Exception:  # whatever a strange object's attributes raise
            self._nbytes += _shallow(value) * weight
            self._exact = False

    def _push(self, group: Collection[Any], weight: float, allowance: int) -> None:
        if len(group) <= _ATTRIBUTES:  # attributes, mostly: those that are atoms take nothing from the others
            self._add({id(part): part for part in group if type(part) in _ATOMS}, weight, 0)
            group = [part for part in group if type(part) not in _ATOMS]
        count = len(group)
        taken = min(count, _SAMPLE, max(allowance, 1))
        sample = group if taken == count else _spread(group, count, taken)
        found = dict(zip(map(id, sample), sample, strict=True))
        if taken < count:
            self._exact = False
            # A sample that repeats itself has met all that there is: it stands for no more.
            weight *= count / taken if 2 * len(found) > taken else 1
        self._add(found, weight, allowance)

    def _add(self, found: dict[int, Any], weight: float, allowance: int) -> None:
        for known in found.keys() & self._seen.keys():
            del found[known]
        self._seen.update(found)
        if _ATOMS.issuperset(map(type, found.values())):
            self._nbytes += weight * sum(map(sys.getsizeof, found.values()))
        else:
            share = allowance // len(found)
            self._pending += [(part, weight, share) for part in found.values()]

    def _take_apart(self, value: Any) -> tuple[int, Sequence[Collection[Any]]]:
        """The bytes of a value's own, and its parts, in groups."""
        kind = type(value)
        if kind in _ATOMS:
            return sys.getsizeof(value), ()
        for cls in kind.__mro__:
            if cls in _registry:
                return _as_told(_registry[cls](value))
        if isinstance(value, np.ndarray):
            return self._array(value)
        known = kind_of(kind)
        if known is not None and known.size is not None:
            return _as_told(known.size(value))
        if known is not None and known.parts is not None:
            return _DEFAULT, (known.parts(value),)
        if isinstance(value, dict):
            return sys.getsizeof(value), (dict.keys(value), dict.values(value), *_attributes(value))
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            return sys.getsizeof(value), (value, *_attributes(value))
        if isinstance(value, _SHARED):
            return sys.getsizeof(value), ()
        if hasattr(kind, "nbytes"):
            return _positive(value.nbytes), ()
        return _shallow(value), _attributes(value)

    def _array(self, array: np.ndarray[Any, Any]) -> tuple[int, Sequence[Collection[Any]]]:
        own, memory = _header(array), _memory(array)
        if memory not in self._memory:
            self._memory.add(memory)
            own += memory[1]
        if array.dtype.kind in "OT":
            self._exact = self._exact and array.dtype.kind == "O"  # a text's memory cannot be asked for
            return own, (array.ravel(), *_attributes(array))
        return own, _attributes(array)


def _spread(group: Collection[Any], count: int, taken: int) -> list[Any]:
    """One item out of each of ``taken`` stretches of equal length.

    Which one changes from stretch to stretch, by the golden ratio: every n-th would see a fraction
    only of what comes in a rhythm.
    """
    step = count / taken
    places = [int(step * (index + index * _GOLDEN % 1)) for index in range(taken)]
    if isinstance(group, (list, tuple)):
        return [group[place] for place in places]
    items = iter(group)
    gaps = [place - before - 1 for before, place in pairwise([-1, *places])]
    return [next(islice(items, gap, None)) for gap in gaps]


def _header(array: np.ndarray[Any, Any]) -> int:
    return sys.getsizeof(array) - (array.nbytes if array.flags.owndata else 0)


def _memory(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Start and length of the memory that an array keeps alive."""
    base = array.base
    while isinstance(base, np.ndarray):
        array, base = base, base.base
    if base is not None:
        try:
            array = np.frombuffer(base, np.uint8)
        except (TypeError, ValueError, BufferError):
            pass  # memory of a library's own: the array is all that is known of it
    return array.__array_interface__["data"][0], array.nbytes


def _attributes(value: Any) -> Sequence[Collection[Any]]:
    parts = []
    for cls in type(value).__mro__:
        if "__slots__" in cls.__dict__:
            parts += _slots(value, cls)
    namespace = getattr(value, "__dict__", None)
    if type(namespace) is dict:
        parts.append(namespace)
    return (parts,) if parts else ()


def _slots(value: Any, cls: type) -> list[Any]:
    parts = []
    for member in cls.__dict__.values():
        if type(member) is MemberDescriptorType:
            try:
                parts.append(member.__get__(value, cls))
            except AttributeError:
                pass  # not set
    return parts


def _as_told(size: Size) -> tuple[int, Sequence[Collection[Any]]]:
    if isinstance(size, tuple):
        own, parts = size
        return _positive(own), (list(parts),)
    return _positive(size), ()


def _positive(size: Any) -> int:
    nbytes: int = operator.index(size)
    if nbytes < 0:
        raise ValueError(f"a size of {nbytes} bytes")
    return nbytes


def _shallow(value: Any) -> int:
    try:
        return sys.getsizeof(value)
    except Exception:  # a __sizeof__ of its own
        return _DEFAULT
