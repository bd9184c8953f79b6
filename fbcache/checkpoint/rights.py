"""Exclusive rights that nobody can take along: who holds one is referred to weakly.

Guarantees
----------
- At most one :class:`Right` for a key is held at a time.
- One that an interrupt kept from being released ends with its object, or when its holder has said that it
  is over. Whoever waits looks up twice a second.

``_lock`` guards every field, and nothing else is done under it.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Generic, TypeVar, cast

from fbcache.waiting import LOOK_UP, Waiter

K = TypeVar("K", bound=Hashable)


class Right:
    """What a holder holds.

    Attributes
    ----------
    owner : int
        The thread's identifier.
    over : bool
        Whether its holder is through with it: a store, which no interrupt comes between.
    """

    __slots__ = ("__weakref__", "over", "owner")

    def __init__(self, owner: int = 0) -> None:
        self.owner = owner
        self.over = False


class Rights(Generic[K]):
    """Rights by key."""

    __slots__ = ("_held", "_lock", "_waiters")

    def __init__(self) -> None:
        self._lock = Lock()
        self._held: dict[K, weakref.ref[Right]] = {}
        self._waiters: set[Waiter] = set()

    def __contains__(self, key: object) -> bool:
        """Whether somebody holds the right for ``key``."""
        return self._holder(cast(K, key)) is not None

    def _holder(self, key: K) -> Right | None:
        held = self._held.get(key)
        holder = None if held is None else held()
        return None if holder is None or holder.over else holder

    def owner(self, key: K) -> int | None:
        """Return the owner of the right for ``key``, if it is held."""
        holder = self._holder(key)
        return None if holder is None else holder.owner

    def acquire(self, key: K, right: Right, *, wait: bool = True) -> bool:
        """Have ``right`` hold ``key``, once nobody else does; False if that would be waiting."""
        reference = weakref.ref(right)
        while True:
            waiter = Waiter()
            with self._lock:
                if key not in self:
                    self._held[key] = reference
                    return True
                if not wait:
                    return False
                self._waiters.add(waiter)
            try:
                waiter.sleep(LOOK_UP)
            finally:
                self._waiters.discard(waiter)

    def release(self, key: K, right: Right) -> None:
        """Let ``key`` go, if ``right`` holds it."""
        with self._lock:
            held = self._held.get(key)
            if held is None or held() is not right:
                return
            del self._held[key]
            waiters = list(self._waiters)
        for waiter in waiters:
            waiter.wake()

    @contextmanager
    def exclusively(self, key: K) -> Iterator[None]:
        """Hold ``key`` for the length of the block."""
        right = Right()
        try:
            self.acquire(key, right)
            yield
        finally:
            right.over = True
            self.release(key, right)
