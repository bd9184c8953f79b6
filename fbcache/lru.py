"""Orders of eviction: intrusive lists, the two-segment LRU, and cachetools' policies.

Guarantee: an entry is in at most one order; each order knows its bytes. All of it is guarded
by the pool's lock. The list operations are straight lines of stores (:mod:`fbcache.entry` says why),
so that an interrupt finds a list whole.

The two-segment LRU spares most hits any work: entries in the front half of the budget are
left where they are, only those in the back half are moved. It is the arrangement of MySQL
InnoDB's buffer pool, with the split by bytes and new entries at the front.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import cachetools


class Order(Protocol):
    """What a node's ``order`` refers to."""

    nbytes: int

    def remove(self, entry: Any) -> None:
        """Take ``entry`` out."""
        ...


class Node:
    """What can stand in an order: an entry.

    Attributes
    ----------
    nbytes : int
        Its size in memory, in bytes; not changed while it is in an order.
    order : Order or None
        The order it is in, if any.
    before, after
        Its neighbours there.
    """

    __slots__ = ("after", "before", "nbytes", "order")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.order: Order | None = None
        self.before: Any = None
        self.after: Any = None


Entry = TypeVar("Entry", bound=Node)


class Chain(Generic[Entry]):
    """A doubly linked list through the entries themselves, with a count of bytes.

    The chain is its own sentinel: ``after`` is its first entry, ``before`` its last.
    """

    __slots__ = ("after", "before", "count", "nbytes")

    def __init__(self) -> None:
        self.after: Any = self
        self.before: Any = self
        self.nbytes = 0
        self.count = 0

    def push_first(self, entry: Entry) -> None:
        """Put an entry that is in no order at the front. Straight line."""
        second = self.after
        entry.before = self
        entry.after = second
        second.before = entry
        self.after = entry
        entry.order = self
        self.nbytes += entry.nbytes
        self.count += 1

    def push_last(self, entry: Entry) -> None:
        """Put an entry that is in no order at the end. Straight line."""
        last = self.before
        entry.after = self
        entry.before = last
        last.after = entry
        self.before = entry
        entry.order = self
        self.nbytes += entry.nbytes
        self.count += 1

    def remove(self, entry: Entry) -> None:
        """Take an entry of this chain out. Straight line."""
        before, after = entry.before, entry.after
        before.after = after
        after.before = before
        entry.order = None
        entry.before = entry.after = None
        self.nbytes -= entry.nbytes
        self.count -= 1

    @property
    def first(self) -> Entry | None:
        """The entry at the front."""
        entry: Entry | None = self.after if self.count else None
        return entry

    @property
    def last(self) -> Entry | None:
        """The entry at the end."""
        entry: Entry | None = self.before if self.count else None
        return entry

    def __iter__(self) -> Iterator[Entry]:
        entry = self.after
        while entry is not self:
            yield entry
            entry = entry.after


class Policy(Protocol[Entry]):
    """Who leaves first, among the entries that may leave."""

    #: The segment in which a hit moves nothing.
    front: Chain[Entry]

    def add(self, entry: Entry) -> None:
        """Take in an entry that was just used."""
        ...

    def touch(self, entry: Entry) -> None:
        """Note a hit on an entry of this policy that is not in ``front``."""
        ...

    def restore(self, entry: Entry) -> None:
        """Take back an entry that was to leave and could not."""
        ...

    def victim(self) -> Entry | None:
        """Take out and return the entry to leave next; None when there is none."""
        ...

    def last(self) -> Entry | None:
        """Return the entry to leave next and leave it in; None where that cannot be told."""
        ...

    def owns(self, entry: Entry) -> bool:
        """Whether ``entry`` is in this policy."""
        ...

    def resize(self, budget: int) -> None:
        """Follow a new budget, in bytes."""
        ...

    @property
    def chains(self) -> tuple[Chain[Entry], ...]:
        """The lists that its entries are in, if they are in lists."""
        ...

    def __iter__(self) -> Iterator[Entry]:
        """Go through the entries."""
        ...


class TwoSegmentLRU(Generic[Entry]):
    """Least recently used, in two segments split at half the budget."""

    __slots__ = ("_half", "back", "front")

    def __init__(self, budget: int) -> None:
        self.front: Chain[Entry] = Chain()
        self.back: Chain[Entry] = Chain()
        self._half = budget // 2

    def add(self, entry: Entry) -> None:
        """Put ``entry`` at the front."""
        self.front.push_first(entry)
        self._balance()

    def touch(self, entry: Entry) -> None:
        """Move an entry of the back half to the front."""
        self.back.remove(entry)
        self.add(entry)

    def restore(self, entry: Entry) -> None:
        """Put ``entry`` at the very end."""
        self.back.push_last(entry)

    def victim(self) -> Entry | None:
        """Take out the last entry of the back half, else of the front half."""
        chain = self.back if self.back.count else self.front
        entry = chain.last
        if entry is not None:
            chain.remove(entry)
        return entry

    def last(self) -> Entry | None:
        """Return the last entry of the back half, else of the front half."""
        return self.back.last or self.front.last

    def owns(self, entry: Entry) -> bool:
        """Whether ``entry`` is in either half."""
        return entry.order is self.front or entry.order is self.back

    def resize(self, budget: int) -> None:
        """Split at half of ``budget`` bytes."""
        self._half = budget // 2
        self._balance()

    @property
    def chains(self) -> tuple[Chain[Entry], ...]:
        """Both segments."""
        return self.front, self.back

    def __iter__(self) -> Iterator[Entry]:
        for chain in (self.back, self.front):
            yield from reversed(list(chain))

    def _balance(self) -> None:
        front, back = self.front, self.back
        while front.nbytes > self._half and front.count > 1:
            entry = front.before
            front.remove(entry)
            back.push_first(entry)


class CachetoolsPolicy(Generic[Entry]):
    """A policy of cachetools', asked only for its order.

    Its cache is never full, so it evicts nothing by itself. An interrupt may tear its
    bookkeeping, which is Python code of its own: then it is made anew from ``_members``.
    """

    __slots__ = ("_cache", "_class", "_members", "_torn", "front", "nbytes")

    def __init__(self, kind: type[cachetools.Cache[Any, Any]]) -> None:
        self._class = kind
        self._cache = kind(float("inf"))
        self._members: dict[Entry, None] = {}
        self._torn = False
        self.front: Chain[Entry] = Chain()  # stays empty: every hit counts
        self.nbytes = 0

    def add(self, entry: Entry) -> None:
        """Take ``entry`` in as new."""
        cache = self._begin()
        self._members[entry] = None
        entry.order = self
        self.nbytes += entry.nbytes
        cache[entry] = None
        self._torn = False

    def touch(self, entry: Entry) -> None:
        """Count a use of ``entry``."""
        cache = self._begin()
        cache[entry]
        self._torn = False

    def restore(self, entry: Entry) -> None:
        """Take ``entry`` in as new: these policies have no end to put it at."""
        self.add(entry)

    def remove(self, entry: Entry) -> None:
        """Take ``entry`` out."""
        cache = self._begin()
        del cache[entry]
        self._left(entry)

    def victim(self) -> Entry | None:
        """Take out what the policy would evict next."""
        cache = self._begin()
        if not self._members:
            self._torn = False
            return None
        entry: Entry = cache.popitem()[0]
        self._left(entry)
        return entry

    def last(self) -> Entry | None:
        """Return None: cachetools tells its victim only in evicting it."""
        return None

    def owns(self, entry: Entry) -> bool:
        """Whether ``entry`` is here."""
        return entry.order is self

    def resize(self, budget: int) -> None:
        """Nothing depends on the budget here."""

    @property
    def chains(self) -> tuple[Chain[Entry], ...]:
        """None."""
        return ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._members))

    def _begin(self) -> cachetools.Cache[Any, Any]:
        if self._torn:
            self._cache = self._class(float("inf"))
            for member in self._members:
                self._cache[member] = None
        self._torn = True
        return self._cache

    def _left(self, entry: Entry) -> None:
        del self._members[entry]
        entry.order = None
        self.nbytes -= entry.nbytes
        self._torn = False


_BY_TIME = (
    "policy {} expires values by time, and a pool never drops one; choose 'lru', 'lfu', 'fifo' or 'rr'"
)

_BY_NAME: dict[str, type[cachetools.Cache[Any, Any]]] = {
    "lfu": cachetools.LFUCache,
    "fifo": cachetools.FIFOCache,
    "rr": cachetools.RRCache,
}


def make_policy(spec: str | type[cachetools.Cache[Any, Any]], budget: int) -> Policy[Any]:
    """Return the policy that ``spec`` asks for.

    Parameters
    ----------
    spec : str or class
        ``"lru"`` (two segments), ``"lfu"``, ``"fifo"``, ``"rr"``, or one of cachetools'
        ``LRUCache``, ``LFUCache``, ``FIFOCache``, ``RRCache`` or a subclass.
    budget : int
        In bytes.

    Raises
    ------
    ValueError
        The name is unknown, or the policy drops values after a time.
    TypeError
        It is no cache class.
    """
    if spec == "lru":
        return TwoSegmentLRU(budget)
    if isinstance(spec, str):
        if spec in ("ttl", "tlru"):
            raise ValueError(_BY_TIME.format(spec))
        kind = _BY_NAME.get(spec)
        if kind is None:
            raise ValueError(f"policy {spec!r} is unknown; choose 'lru', 'lfu', 'fifo' or 'rr'")
        return CachetoolsPolicy(kind)
    if not (isinstance(spec, type) and issubclass(spec, cachetools.Cache)):
        raise TypeError(f"policy must be a name or a cachetools class, not {spec!r}")
    if issubclass(spec, (cachetools.TTLCache, cachetools.TLRUCache)):
        raise ValueError(_BY_TIME.format(spec.__name__))
    return CachetoolsPolicy(spec)
