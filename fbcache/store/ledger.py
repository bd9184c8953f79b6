"""How much of the disk a store's blobs take, and how much they may.

Guarantee: the bytes of blobs that are there and of writes under way never exceed
``max_disk``, nor reach into ``min_free``, however many threads write at once: each write
reserves its bytes before it begins.

``_lock`` guards every field. It is never held during a system call: the free bytes of the
file system are asked for before and passed in.
"""

from __future__ import annotations

import threading
from uuid import UUID

from fbcache.store.protocol import StoreLimits


class Ledger:
    """The books of one store; see the module."""

    __slots__ = ("_closed", "_limits", "_lock", "_reserved", "_shards", "_sizes", "_stored")

    def __init__(self, limits: StoreLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._sizes: dict[UUID, int] = {}
        self._stored = 0
        self._reserved = 0
        self._shards: set[str] = set()
        self._closed = False

    @property
    def used(self) -> int:
        """Bytes of blobs, those being written included."""
        with self._lock:
            return self._stored + self._reserved

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        with self._lock:
            return self._closed

    def room(self, on_disk: int) -> int:
        """Bytes that a write may take, when the file system has ``on_disk`` free."""
        with self._lock:
            return self._room(on_disk)

    def reserve(self, nbytes: int, on_disk: int, *, spare: int = 0) -> int | None:
        """Set ``nbytes`` aside for a write, if ``spare`` more would be left after it.

        Returns
        -------
        int or None
            None when they are reserved: :meth:`commit` or :meth:`release` must follow. Otherwise
            the bytes that there were, and nothing is reserved.
        """
        with self._lock:
            room = max(self._room(on_disk) - spare, 0)
            if nbytes > room:
                return room
            self._reserved += nbytes
            return None

    def release(self, nbytes: int) -> None:
        """Give the reservation of a failed write back."""
        with self._lock:
            self._reserved -= nbytes

    def commit(self, key: UUID, nbytes: int) -> bool:
        """Turn a reservation into a blob; False, with the reservation kept, if the store was closed."""
        with self._lock:
            if self._closed:
                return False
            self._reserved -= nbytes
            self._stored += nbytes - self._sizes.get(key, 0)
            self._sizes[key] = nbytes
            return True

    def grow(self, nbytes: int) -> bool:
        """Turn a reservation into bytes that no key stands for; False, and kept, if the store was closed."""
        with self._lock:
            if self._closed:
                return False
            self._reserved -= nbytes
            self._stored += nbytes
            return True

    def shrink(self, nbytes: int) -> None:
        """Count ``nbytes`` that :meth:`grow` counted no longer."""
        with self._lock:
            self._stored -= nbytes

    def forget(self, key: UUID) -> None:
        """Count the blob of ``key`` no longer, if it was."""
        with self._lock:
            self._stored -= self._sizes.pop(key, 0)

    def add_shard(self, shard: str) -> None:
        """Note a directory that the store made."""
        with self._lock:
            self._shards.add(shard)

    def close(self) -> tuple[list[UUID], list[str]]:
        """Accept no more blobs; return those there are, and the directories made for them."""
        with self._lock:
            self._closed = True
            return list(self._sizes), list(self._shards)

    def describe(self) -> str:
        """The limits, for a message."""
        most = self._limits.max_disk
        bound = "no max_disk" if most is None else f"max_disk={most:,}"
        return f"{bound}, min_free={self._limits.min_free:,}"

    def _room(self, on_disk: int) -> int:
        # A write under way may have part of its bytes in ``on_disk`` already; counting them twice
        # refuses a write too early at worst, and only when the disk is as good as full.
        room = on_disk - self._reserved - self._limits.min_free
        if self._limits.max_disk is not None:
            room = min(room, self._limits.max_disk - self._stored - self._reserved)
        return max(room, 0)
