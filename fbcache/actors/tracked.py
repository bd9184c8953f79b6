"""``TrackedStorage``: states that hold handles on a pool's entries, whose values are never copied.

``DIR/<name>/snapshot`` holds the state and the keys of its handles; ``DIR/<name>/blobs`` is a
:class:`~fbcache.TrackedDirectory` with the values. Each actor has one of its own, so that taking
back what a snapshot no longer needs never takes it from anybody else.

Guarantees
----------
- A snapshot sees every handle's content of one instant, that of the call: a writer that comes later copies
  first. Nothing of the values is copied or written at the call.
- What has not changed since the last snapshot is not written again; what the pool has spilled is linked.
- Order: the values are brought in and made durable, then the snapshot that names them, and only then are
  the former one's values removed. Whatever stops it, the former snapshot or the new one can be loaded
  whole.
- What a crash leaves behind is removed when the state is loaded, or saved, next.

All that is done with one actor's directory is done by its claim, its load and then its saver, one after
the other. ``_lock`` guards the table of open directories.
"""

from __future__ import annotations

import logging
import os
import threading
from contextvars import ContextVar
from typing import Any, Final
from uuid import UUID

from fbcache.actors.directory import DirectoryStorage, HeldId
from fbcache.actors.errors import ActorExistsError, CorruptSnapshotError, NotPersistentError, explained
from fbcache.actors.naming import check_id
from fbcache.actors.snapshot import decode, encode, not_taken
from fbcache.actors.storage import Tenancy, read
from fbcache.captures import Capture
from fbcache.checkpoint import persisting
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.registry import directory_at
from fbcache.checkpoint.tracked import TrackedDirectory, directory_of
from fbcache.codec import register
from fbcache.errors import CorruptBlobError, DirectoryInUseError, FBCacheError, UnsupportedTypeError
from fbcache.handle import Fb
from fbcache.pool import FBPool
from fbcache.store.disk import DISK, Disk

logger: Final = logging.getLogger(__name__)

#: The handles of the state that this thread encodes or decodes, each for its position in the snapshot.
_handles: ContextVar[list[Fb] | None] = ContextVar("fbcache_actors_handles", default=None)


def _position_of(fb: Fb) -> int:
    handles = _handles.get()
    if handles is None:
        raise TypeError("a handle is saved through a TrackedStorage only")
    entry = fb._owned
    for position, other in enumerate(handles):
        if other._owned is entry:  # handles that share an entry come back as one
            return position
    handles.append(fb)
    return len(handles) - 1


def _at_position(position: int) -> Fb:
    handles = _handles.get()
    if handles is None:
        raise TypeError("a handle is loaded through a TrackedStorage only")
    return handles[position]


register(Fb, _position_of, _at_position, name="fbcache.Fb")


class TrackedStorage:
    """Snapshots in files, and the values of the handles in them beside, shared with a pool.

    Keep what is large in the pool, and the handles (``pool.insert``) in the state.

    Parameters
    ----------
    path : path
        The directory; see :class:`DirectoryStorage`.
    pool : FBPool
        Whose handles are saved and loaded. It must be open for as long as the actors are saved.
    disk : Disk
        The system calls; for tests.

    Raises
    ------
    StorageError
        The directory cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], pool: FBPool, *, disk: Disk = DISK) -> None:
        self._files = DirectoryStorage(path, disk=disk)
        self._disk = disk
        self.pool = pool
        self._lock = threading.Lock()
        self._open: dict[str, TrackedDirectory] = {}

    def __repr__(self) -> str:
        return f"TrackedStorage({self._files.path!r})"

    @property
    def place(self) -> tuple[str, str]:
        """What storages of one directory have in common."""
        return self._files.place

    def try_read(self, actor_id: str) -> bytes:
        """Return the snapshot with its keys, as :meth:`DirectoryStorage.try_read`."""
        return self._files.try_read(actor_id)

    def try_write(self, actor_id: str, data: bytes) -> None:
        """Replace the snapshot with its keys, as :meth:`DirectoryStorage.try_write`."""
        self._files.try_write(actor_id, data)

    def claim(self, actor_id: str) -> Tenancy:
        """Become the one live actor of this id, and open its directory.

        Raises
        ------
        ActorExistsError
            There is one; or somebody else has its ``blobs`` open for writing.
        StorageError
            A lock cannot be had, or the directory not be read.
        """
        tenancy = self._files.claim(actor_id)
        try:
            directory = directory_at(f"{self._files.directory_of(actor_id)}/blobs", self._disk)
            tracked = TrackedDirectory._over(directory)
        except BaseException as error:
            tenancy.release()
            if isinstance(error, DirectoryInUseError):
                host, pid = error.host, error.pid
                raise ActorExistsError(str(error), actor_id=actor_id, host=host, pid=pid) from error
            raise
        with self._lock:
            self._open[actor_id] = tracked
        return _Tenancy(self, actor_id, tenancy)

    def take(self, actor_id: str, state: Any) -> TakenHandles:
        """Return ``state`` with the content that its handles have now.

        Raises
        ------
        PersistenceError
            The state cannot be encoded, or holds a handle of another pool.
        DeadlockError
            The caller holds a handle's entry for writing.
        PoolClosedError
            The pool was closed.
        """
        check_id(actor_id)
        handles: list[Fb] = []
        token = _handles.set(handles)
        try:
            data = encode(actor_id, state)
        finally:
            _handles.reset(token)
        if any(fb.pool is not self.pool for fb in handles):
            foreign = UnsupportedTypeError("its state has a handle of another pool than the storage's")
            raise explained("save", actor_id, foreign)
        return TakenHandles(self, actor_id, data, handles)

    def load(self, actor_id: str) -> Any:
        """Return the state that was written last, with handles of the storage's pool.

        Nothing of the values is read: they are mapped when they are used, and checked then.

        Raises
        ------
        SnapshotNotFoundError
            There is none.
        CorruptSnapshotError
            The snapshot is damaged, or one of its values is damaged or missing.
        PersistenceError
            It could not be read or taken.
        """
        where = repr(self)
        parts = decode(actor_id, read(self, actor_id), where)
        keys, data = _parts(parts, actor_id, where)
        tracked = self.tracked(actor_id)
        token = _handles.set(self._register(tracked, keys, actor_id, where))
        try:
            state = decode(actor_id, data, where)
        finally:
            _handles.reset(token)
        remove_others(tracked, keys)
        return state

    def _register(self, tracked: TrackedDirectory, keys: list[UUID], actor_id: str, where: str) -> list[Fb]:
        try:
            return [self.pool.register(tracked, key) for key in keys]
        except CorruptBlobError as error:
            raise CorruptSnapshotError(error.reason, actor_id=actor_id, where=error.path) from error
        except FBCacheError as error:
            raise explained("read the values of", actor_id, error) from error
        except KeyError as error:
            reason = f"a value is missing in {tracked.path} ({error})"
            raise CorruptSnapshotError(reason, actor_id=actor_id, where=where) from error

    def tracked(self, actor_id: str) -> TrackedDirectory:
        """Return the open directory of an id.

        Raises
        ------
        NotPersistentError
            The id is not claimed.
        """
        with self._lock:
            tracked = self._open.get(actor_id)
        if tracked is None:
            raise NotPersistentError(f"nobody has claimed the id {actor_id!r}; spawn an actor with it")
        return tracked

    def close(self, actor_id: str) -> None:
        """Close the directory of an id that is no longer claimed."""
        with self._lock:
            tracked = self._open.pop(actor_id, None)
        if tracked is not None:
            tracked.close()


class _Tenancy:
    """A claim of the id, and the actor's directory with it."""

    __slots__ = ("_actor_id", "_files", "_storage")

    def __init__(self, storage: TrackedStorage, actor_id: str, files: HeldId) -> None:
        self._storage = storage
        self._actor_id = actor_id
        self._files = files

    def release(self) -> None:
        try:
            self._storage.close(self._actor_id)
        finally:
            self._files.release()

    def abandon_in_child(self) -> None:
        self._files.abandon_in_child()  # of tracked directories the checkpoint's registry knows


class TakenHandles:
    """A state, and its handles' content of one instant, captured but not brought in yet."""

    def __init__(self, storage: TrackedStorage, actor_id: str, data: bytes, handles: list[Fb]) -> None:
        self._storage = storage
        self._actor_id = actor_id
        self._data = data
        self._engine = storage.pool._engine
        self._entries = [fb._owned for fb in handles]
        self._captures: list[Capture] = []
        residency = self._engine.residency
        try:
            residency.run(residency.capture, self._entries, self._captures)
        except BaseException:
            self.discard()
            raise

    def write(self) -> None:
        """Bring the values in, then name them, then remove the former ones."""
        tracked = self._storage.tracked(self._actor_id)
        keys = self._bring_into(directory_of(tracked, write=True))
        tracked.sync()
        parts = [[key.bytes for key in keys], self._data]
        self._storage.try_write(self._actor_id, encode(self._actor_id, parts))
        remove_others(tracked, keys)

    def discard(self) -> None:
        """Give the captures up."""
        persisting.release(self._engine, self._captures)

    def _bring_into(self, directory: Directory) -> list[UUID]:
        keys = []
        for entry, capture in zip(self._entries, self._captures, strict=True):
            capture.wait()
            capture.raise_error()
            with directory.tenancies.writing():
                keys.append(persisting.pin_captured(self._engine, directory, entry, capture, False))
        return keys


def remove_others(tracked: TrackedDirectory, keys: list[UUID]) -> None:
    """Remove what the present snapshot does not name. What cannot be is tried again after the next one."""
    try:
        for key in set(tracked.keys()).difference(keys):
            tracked.delete(key)
    except (OSError, KeyError):
        logger.warning("values of a former snapshot stay in %s", tracked.path, exc_info=True)


def _parts(parts: Any, actor_id: str, where: str) -> tuple[list[UUID], bytes]:
    """The keys and the state of a snapshot."""
    if type(parts) is list and len(parts) == 2 and type(parts[0]) is list and type(parts[1]) is bytes:
        keys = [UUID(bytes=key) for key in parts[0] if type(key) is bytes and len(key) == 16]
        if len(keys) == len(parts[0]):
            return keys, parts[1]
    raise not_taken(actor_id, where, "it was not made by a TrackedStorage; read it with a DirectoryStorage")
