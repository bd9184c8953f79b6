"""``DirectoryStorage``: a snapshot in a file of its own, which power loss leaves old or new.

``DIR/<name>/snapshot`` is an actor's snapshot, sealed (:func:`fbcache.actors.snapshot.seal`);
``DIR/<name>/lock`` is locked while the actor lives; ``<name>`` is made of its id
(:mod:`fbcache.actors.naming`), so that no id is ever taken for a path.

Guarantees
----------
- A write goes to a new file, which is fsynced and then renamed over the former one; then the names are
  fsynced. Whatever stops it, a crash, a full disk or a loss of power, the former snapshot or the new one is
  there, whole. A failed fsync is not repeated: the next write makes another file.
- A write that raised has left no file behind but the snapshot. What a crash leaves is removed when the id
  is claimed next. No other file is touched.
- A live actor holds the lock of its id: the kernel frees it however the process dies. Lock files
  stay, for two could hold two files as one lock otherwise; they may be removed while no actor lives.

Calls on different ids may run at once. ``_named`` changes by single operations of a set, and needs no
lock.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Final
from uuid import uuid4

import numpy as np

from fbcache.actors.errors import ActorExistsError, CorruptSnapshotError, not_found
from fbcache.actors.naming import check_id, name_of
from fbcache.actors.snapshot import seal, unseal
from fbcache.checkpoint.lock import Tenure, WriterLock
from fbcache.codec import Buffer
from fbcache.errors import DirectoryInUseError, StorageError
from fbcache.store.disk import DISK, Disk
from fbcache.store.syncing import make_durable
from fbcache.store.transfer import read_all, write_all
from fbcache.store.trouble import storage_error

_SNAPSHOT: Final = "snapshot"
_LOCK: Final = "lock"
_UNFINISHED: Final = re.compile(r"snapshot\.[0-9a-f]{32}\.tmp")

#: A link is not followed, and a pipe in a file's place must not hold us up.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class HeldId:
    """The lock of an id, held by this process."""

    __slots__ = ("_lock",)

    def __init__(self, lock: WriterLock) -> None:
        self._lock = lock

    def release(self) -> None:
        """Let others claim the id. May be called again.

        Raises
        ------
        StorageError
            The lock's record names this process still; the lock is free all the same.
        """
        self._lock.release(0)

    def abandon_in_child(self) -> None:
        """Close a forked child's copy; the parent's lock stays."""
        self._lock.abandon_in_child()


class DirectoryStorage:
    """Snapshots as files below a directory.

    Several processes may use one directory, each for actors of its own: an id that lives in one of them
    cannot be claimed in another.

    Parameters
    ----------
    path : path
        The directory; made, readable by its owner only, if it is missing.
    disk : Disk
        The system calls; for tests.

    Raises
    ------
    StorageError
        It is a file, or cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, disk: Disk = DISK) -> None:
        self._root = os.path.realpath(os.path.expanduser(os.fspath(path)))
        self._disk = disk
        self._named: set[str] = set()  # directories whose names this object has made durable
        try:
            self._make_root()
        except OSError as error:
            raise self._explained("make", self._root, error) from error

    def __repr__(self) -> str:
        return f"DirectoryStorage({self._root!r})"

    @property
    def path(self) -> str:
        """The directory's real path."""
        return self._root

    @property
    def place(self) -> tuple[str, str]:
        """What storages of one directory have in common."""
        return "directory", self._root

    def directory_of(self, actor_id: str) -> str:
        """Return the path of what belongs to this actor; it need not be there."""
        check_id(actor_id)
        return f"{self._root}/{name_of(actor_id)}"

    # ------------------------------------------------------------------ bytes

    def try_read(self, actor_id: str) -> bytes:
        """Return what was written last.

        Raises
        ------
        SnapshotNotFoundError
            There is no file.
        CorruptSnapshotError
            It is not what was written. It is left as it is.
        StorageError
            It could not be read.
        """
        path = f"{self.directory_of(actor_id)}/{_SNAPSHOT}"
        try:
            raw = self._read(path)
        except FileNotFoundError:
            raise not_found(actor_id, self._root) from None
        except OSError as error:
            raise self._explained("read", path, error) from error
        if raw is None:
            raise CorruptSnapshotError("it is no regular file", actor_id=actor_id, where=path)
        return unseal(actor_id, raw, path)

    def try_write(self, actor_id: str, data: bytes) -> None:
        """Replace the snapshot; it is durable when this returns.

        Raises
        ------
        StorageError, DiskFullError
            The former snapshot stands; or, if only its name could not be made durable, the new one does.
        """
        directory = self.directory_of(actor_id)
        plan = seal(actor_id, data)
        try:
            if not self._disk.exists(directory):
                self._named.discard(directory)
                self._disk.makedirs(directory)
            self._replace(directory, plan.pieces)
            names = [directory] if directory in self._named else [directory, self._root]
            make_durable(self._disk, self._root, (), names)
            self._named.add(directory)
        except OSError as error:
            raise self._explained("write a snapshot to", directory, error, plan.nbytes) from error

    def _read(self, path: str) -> Buffer | None:
        """The file's bytes; None if it is no regular file."""
        fd = self._disk.open(path, _READ)
        try:
            status = self._disk.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return None
            raw = np.empty(status.st_size, np.uint8).data
            return raw[: read_all(self._disk, fd, [raw], 0)]
        finally:
            self._disk.close(fd)

    def _replace(self, directory: str, pieces: list[memoryview]) -> None:
        new = f"{directory}/{_SNAPSHOT}.{uuid4().hex}.tmp"
        try:
            fd = self._disk.open(new, _NEW)
            try:
                write_all(self._disk, fd, pieces)
                self._disk.fsync(fd)
            finally:
                self._disk.close(fd)
            self._disk.rename(new, f"{directory}/{_SNAPSHOT}")
        except BaseException:
            self._remove(new)
            raise

    def _remove(self, path: str) -> None:
        try:
            self._disk.unlink(path)
        except OSError:  # gone, or left to the next claim
            pass

    # ------------------------------------------------------------------ ids

    def claim(self, actor_id: str) -> HeldId:
        """Become the one live actor of this id, in all processes; remove what a crash has left of it.

        Raises
        ------
        ActorExistsError
            There is one; the message names its host and process where they are known.
        StorageError
            The id's lock cannot be had.
        """
        directory = self.directory_of(actor_id)
        try:
            self._disk.makedirs(directory)
            lock = WriterLock.acquire(
                f"{directory}/{_LOCK}", directory, Tenure.OBJECT, wait=False, disk=self._disk
            )
        except DirectoryInUseError as error:
            raise _taken(actor_id, self._root, error) from error
        except StorageError:
            raise
        except OSError as error:
            raise self._explained("make", directory, error) from error
        try:
            for name in filter(_UNFINISHED.fullmatch, self._disk.listdir(directory)):
                self._remove(f"{directory}/{name}")
        except OSError:  # nobody needs those files gone
            pass
        return HeldId(lock)

    # ------------------------------------------------------------------ the directory

    def _make_root(self) -> None:
        """Make the directory, and its name durable."""
        missing = [self._root]
        while not self._disk.exists(parent := os.path.dirname(missing[-1])):
            missing.append(parent)
        try:
            self._disk.makedirs(self._root)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        make_durable(self._disk, self._root, (), [os.path.dirname(path) for path in missing])

    def _explained(self, doing: str, path: str, error: OSError, needed: int = 0) -> StorageError:
        return storage_error(doing, path, error, self._disk, needed=needed)


def _taken(actor_id: str, root: str, error: DirectoryInUseError) -> ActorExistsError:
    if error.pid is None:
        who = "in another process"
    else:
        who = f"in process {error.pid} on {error.host or 'an unnamed host'}"
    return ActorExistsError(
        f"an actor with the id {actor_id!r} is alive {who}, with its state in {root}. Stop it there first.",
        actor_id=actor_id,
        host=error.host,
        pid=error.pid,
    )
