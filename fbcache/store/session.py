"""Spill sessions: a private directory for each pool, leased for as long as it is open.

``<base>/session-<32 hex digits>/`` holds ``owner.json`` (whose it is), ``lease.lock`` (locked
through filelock while the session is open) and the blobs of a
:class:`~fbcache.store.files.FileStore`. What dead processes leave is taken away by
:mod:`fbcache.store.reaper`, whenever a session is opened.

Guarantees:

- A session being made cannot be reaped: its owner's file, without which no reaper touches it,
  appears last, whole, and with the lock held.
- A failed :meth:`Session.open` leaves no session behind.
- A forked child neither unlocks nor removes anything of its parent's.

A :class:`Session` has no lock of its own: one thread closes it.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import platformdirs

from fbcache.errors import StorageError
from fbcache.store.disk import DISK, Disk
from fbcache.store.mounts import warn_if_unsuitable
from fbcache.store.owner import Owner
from fbcache.store.reaper import LEASE, NEW_OWNER, OWNER, reap, remove_session
from fbcache.store.transfer import write_all

_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Session:
    """A directory of this process's own, leased until :meth:`close`.

    Made by :meth:`open`.
    """

    __slots__ = ("_disk", "_lease", "_path", "_pid")

    def __init__(self, path: str, lease: int, disk: Disk) -> None:
        self._path = path
        self._lease: int | None = lease
        self._disk = disk
        self._pid = os.getpid()

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str] | None = None, *, disk: Disk = DISK, warn: bool = True
    ) -> Session:
        """Reap dead sessions under ``directory``, and make one of this process's own.

        Parameters
        ----------
        directory : path, optional
            Where sessions are made; made itself if it is missing. Default: ``spill`` in the user's
            cache directory for fbcache.
        disk : Disk
            The system calls.
        warn : bool
            Whether to warn of a directory that is unsuitable for spilling.

        Raises
        ------
        StorageError
            The directory cannot be made or written to. Nothing of the session is left.

        Warns
        -----
        FBCacheWarning
            Once in a process: the directory lies in memory or across a network.
        """
        base = _base(directory)
        with _explained(base):
            disk.makedirs(base)
        if warn:
            warn_if_unsuitable(base)
        reap(base, disk=disk)
        with _explained(base):
            return _make(base, disk)

    @property
    def path(self) -> str:
        """The session's directory."""
        return self._path

    def close(self) -> None:
        """Remove what fbcache put into the session's directory, and the directory if it is empty then.

        May be called twice; does nothing in a forked child.

        Raises
        ------
        StorageError
            A file could not be removed. The lease is given up all the same, and the session is
            reaped by another once this process has ended.
        """
        if self._lease is None:
            return
        lease, self._lease = self._lease, None
        if os.getpid() != self._pid:
            self._disk.close(lease)
            return
        try:
            remove_session(self._path, self._disk)
        except OSError as error:
            raise StorageError(
                f"cannot remove the spill session {self._path}: {error.strerror or error}."
                " Remove it by hand, or leave it to the next pool.",
                path=self._path,
                errno=error.errno,
            ) from error
        finally:
            self._disk.close(lease)

    def abandon_in_child(self) -> None:
        """Let go of the parent's session; to be called in a forked child, by ``os.register_at_fork``.

        The child's copy of the descriptor is closed, so that the lease ends with the parent and not
        with the last of its children. It is not unlocked, for the lock is the parent's too.
        """
        if self._lease is not None:
            lease, self._lease = self._lease, None
            self._disk.close(lease)


def _base(directory: str | os.PathLike[str] | None) -> str:
    if directory is None:
        return os.path.join(platformdirs.user_cache_dir("fbcache"), "spill")
    return os.path.abspath(os.path.expanduser(os.fspath(directory)))


@contextmanager
def _explained(base: str) -> Iterator[None]:
    """Turn an ``OSError`` into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot spill to {base}: {error.strerror or error} ({error.filename or base})."
            " Give a directory that you may write to: directory='/path'.",
            path=base,
            errno=error.errno,
        ) from error


# ------------------------------------------------------------------ making


def _make(base: str, disk: Disk) -> Session:
    """Make a session, or leave nothing: the directory, the lock, and the owner last."""
    path = os.path.join(base, f"session-{uuid.uuid4().hex}")
    disk.mkdir(path)
    try:
        lease = _lease(path, disk)
        try:
            _write_owner(path, disk)
        except BaseException:
            disk.close(lease)
            raise
    except BaseException:
        _unmake(path, disk)
        raise
    return Session(path, lease, disk)


def _lease(path: str, disk: Disk) -> int:
    """Return the locked descriptor that is the lease."""
    fd = disk.open(f"{path}/{LEASE}", _NEW_FILE)
    try:
        # Nobody looks for a lock where there is no owner's file, so that it must be free.
        if not disk.lock(fd):
            raise OSError(errno.EBUSY, "the lock of a new session is taken", path)
    except BaseException:
        disk.close(fd)
        raise
    return fd


def _write_owner(path: str, disk: Disk) -> None:
    fd = disk.open(f"{path}/{NEW_OWNER}", _NEW_FILE)
    try:
        write_all(disk, fd, [Owner.current().to_bytes()])
    finally:
        disk.close(fd)
    disk.rename(f"{path}/{NEW_OWNER}", f"{path}/{OWNER}")


def _unmake(path: str, disk: Disk) -> None:
    """Take back what :func:`_make` made before it failed, which is what the caller hears of."""
    try:
        remove_session(path, disk)
    except OSError:
        pass
