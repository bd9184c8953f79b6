"""Where snapshots go: the protocols, and a storage in memory.

Guarantee, asked of every storage: a write that returns is what the next read gives; one that raises
leaves the former snapshot or the new one, whole. Calls are plain and may block; different
actors' come from different threads at once, one actor's one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, Protocol, runtime_checkable

from fbcache.actors.errors import PersistenceError, SnapshotNotFoundError, explained, not_found
from fbcache.actors.naming import check_id
from fbcache.actors.snapshot import decode, encode


class PersistentStorage(Protocol):
    """Bytes by the ids of actors."""

    def try_read(self, actor_id: str) -> bytes:
        """Return what was written last.

        Raises
        ------
        SnapshotNotFoundError
            Nothing was. Any other error means that it is not known.
        """
        ...

    def try_write(self, actor_id: str, data: bytes) -> None:
        """Replace what is stored by ``data``, at once and whole; return when it is as durable as it gets.

        Raises
        ------
        Exception
            Any error: the former data stands, or the new one does.
        """
        ...


class Tenancy(Protocol):
    """The right to be the one live actor of an id."""

    def release(self) -> None:
        """Let others be it. May be called again."""
        ...

    def abandon_in_child(self) -> None:
        """Let go of the parent's right, in a forked child; the parent keeps it."""
        ...


@runtime_checkable
class Exclusive(Protocol):
    """A storage that keeps apart actors of one id in more places than one process."""

    def claim(self, actor_id: str) -> Tenancy:
        """Become the one.

        Raises
        ------
        ActorExistsError
            There is one.
        """
        ...


@runtime_checkable
class Placed(Protocol):
    """A storage of which there may be several objects for one place."""

    @property
    def place(self) -> Hashable:
        """What is equal for storages of one place."""
        ...


class Taken(Protocol):
    """A snapshot as it was at the call, on its way to a storage."""

    def write(self) -> None:
        """Make it the stored one. After an error it may be tried again."""
        ...

    def discard(self) -> None:
        """Give up what it holds, written or not. Raises nothing; may be called again."""
        ...


@runtime_checkable
class StateStorage(Protocol):
    """A storage that takes states and not bytes."""

    def take(self, actor_id: str, state: Any) -> Taken:
        """Return ``state`` as it is now, to be written later."""
        ...

    def load(self, actor_id: str) -> Any:
        """Return the state that was written last."""
        ...


class _TakenBytes:
    """A snapshot that is one stretch of bytes."""

    __slots__ = ("_actor_id", "_data", "_storage")

    def __init__(self, storage: PersistentStorage, actor_id: str, data: bytes) -> None:
        self._storage = storage
        self._actor_id = actor_id
        self._data = data

    def write(self) -> None:
        self._storage.try_write(self._actor_id, self._data)

    def discard(self) -> None:
        self._data = b""


def take(storage: PersistentStorage, actor_id: str, state: Any) -> Taken:
    """Return ``state`` as it is now, to be written to ``storage`` later.

    Raises
    ------
    PersistenceError
        Of the kind ``SERIALIZE``.
    """
    if isinstance(storage, StateStorage):
        return storage.take(actor_id, state)
    return _TakenBytes(storage, actor_id, encode(actor_id, state))


def load(storage: PersistentStorage, actor_id: str) -> Any:
    """Return the state that ``storage`` has.

    Raises
    ------
    SnapshotNotFoundError
        There is none.
    PersistenceError
        It could not be read (``IO``) or taken (``DESERIALIZE``; ``CorruptSnapshotError`` if it is damaged).
    """
    if isinstance(storage, StateStorage):
        return storage.load(actor_id)
    return decode(actor_id, read(storage, actor_id), str(storage))


def read(storage: PersistentStorage, actor_id: str) -> bytes:
    """Return the bytes that ``storage`` has; errors are those of :func:`load`."""
    try:
        return storage.try_read(actor_id)
    except (SnapshotNotFoundError, PersistenceError):
        raise
    except Exception as error:  # a plain KeyError too: it may be a storage's bug, and not an absence
        raise explained("read the snapshot of", actor_id, error) from error


class MemoryStorage:
    """Snapshots in a dictionary, for tests and for actors that outlive a crash but not the process.

    ``_lock`` guards the dictionary.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshots: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"<MemoryStorage, {len(self._snapshots)} snapshots>"

    def try_read(self, actor_id: str) -> bytes:
        """Return what was written last.

        Raises
        ------
        SnapshotNotFoundError
            Nothing was.
        """
        check_id(actor_id)
        with self._lock:
            data = self._snapshots.get(actor_id)
        if data is None:
            raise not_found(actor_id, "memory")
        return data

    def try_write(self, actor_id: str, data: bytes) -> None:
        """Replace what is stored by ``data``."""
        check_id(actor_id)
        with self._lock:
            self._snapshots[actor_id] = bytes(data)
