"""Blobs as rows of a diskcache: bytes under 16 bytes of a key, and nothing else.

Guarantees
----------
- Nothing is ever pickled or unpickled: what is not bytes is refused on its way in, and on its way
  out, whoever put it into the database (CVE-2025-69872).
- Changes that come at once share a transaction. One that fails with others is tried again alone, so that each
  has an outcome of its own.
- A connection that has failed is closed, and with it what it had begun.
- Free pages beyond a quarter are given back to the file system, a few at a time, while nobody waits.
- A forked child touches no connection of its parent's.

diskcache keeps a connection for each thread, which no other thread can close. Here there are as many as calls
at once, whatever their threads, and all are closed at the end. This takes the place of ``Cache._con``, of
diskcache 5.6; with a version that does without it nothing is opened.

``_lock`` guards ``_idle`` and ``_is_closed``; it is not held while sqlite works.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import diskcache  # type: ignore[import-untyped]
from diskcache.core import DBNAME, MODE_RAW  # type: ignore[import-untyped]

from fbcache.store.grouping import Group

#: Seconds that a transaction waits for another; there is never more than one, so that it has gone wrong.
_TIMEOUT: Final = 10.0

#: Pages that are given back at a time: about 2 ms.
_ROUND: Final = 128

#: Free pages that are kept to be used again, besides a quarter of all.
_KEPT: Final = 256

#: For each connection. Nothing outlives the session, so nothing is synced; the kernel's cache is enough, and
#: a cache of sqlite's own would be memory that nobody has counted.
_PRAGMAS: Final = {"synchronous": 0, "cache_size": -512, "mmap_size": 0}

_SETTINGS: Final = {
    "eviction_policy": "none",
    "cull_limit": 0,
    "size_limit": 2**62,
    "statistics": 0,
    "tag_index": 0,
    "disk_min_file_size": 2**62,
    "sqlite_auto_vacuum": 2,  # incremental
    "sqlite_journal_mode": "wal",  # readers and the writer do not wait for each other
    **{f"sqlite_{name}": value for name, value in _PRAGMAS.items()},
}


class BytesDisk(diskcache.Disk):  # type: ignore[misc]
    """What diskcache keeps: bytes, in the database itself."""

    def put(self, key: Any) -> tuple[bytes, bool]:
        """Take a key."""
        return _bytes(key), True

    def get(self, key: Any, raw: Any) -> bytes:
        """Give a key."""
        return _bytes(key)

    def store(self, value: Any, read: Any, key: Any = None) -> tuple[int, int, None, bytes]:
        """Take a value."""
        return 0, MODE_RAW, None, _bytes(value)

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> bytes:
        """Give a value."""
        if mode != MODE_RAW or filename is not None:
            raise ValueError("the row is not one of fbcache's")
        return _bytes(value)


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise ValueError(f"a {type(value).__name__} is where bytes should be")
    return value


class _Change:
    """A value to be stored, or removed where it is None."""

    __slots__ = ("error", "is_done", "key", "value")

    def __init__(self, key: bytes, value: bytes | None) -> None:
        self.key = key
        self.value = value
        self.is_done = False
        self.error: Exception | None = None


class _Cache(diskcache.Cache):  # type: ignore[misc]
    """A cache that works on the connection which :meth:`Rows._connected` has set for the thread."""

    def __init__(self, directory: str) -> None:
        try:
            super().__init__(directory, timeout=_TIMEOUT, disk=BytesDisk, **_SETTINGS)
        except BaseException:
            self.close()
            raise

    @property
    def _con(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "con", None)
        if connection is None:
            connection = self._local.con = self.connect()
        return connection

    def connect(self) -> sqlite3.Connection:
        """Open one more connection."""
        connection = sqlite3.connect(
            os.path.join(self._directory, DBNAME),
            timeout=_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,  # one thread at a time uses it
        )
        for name, value in _PRAGMAS.items():
            connection.execute(f"PRAGMA {name} = {value}").fetchall()
        return connection

    def use(self, connection: sqlite3.Connection | None) -> None:
        """Have this thread's calls go to a connection."""
        self._local.con = connection


class Rows:
    """The rows in a directory that exists, is private and empty.

    Raises
    ------
    sqlite3.Error, OSError
        The database cannot be made.
    """

    def __init__(self, directory: str) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_closed = False
        self._idle: list[sqlite3.Connection] = []
        self._group: Group[_Change] = Group(self._serve)
        self._cache = _Cache(directory)
        first = getattr(self._cache._local, "con", None)
        self._cache.close()
        if first is None or "_con" not in vars(diskcache.Cache):
            raise RuntimeError(f"diskcache {diskcache.__version__} is not known here")

    def get(self, key: bytes) -> bytes | None:
        """Return what is stored; None if nothing is.

        Raises
        ------
        sqlite3.Error, OSError
            It could not be read.
        ValueError
            It is not bytes.
        """
        try:
            with self._connected():
                value: bytes | None = self._cache.get(key)
                return value
        except diskcache.Timeout as error:
            raise _origin(error) from error

    def change(self, changes: Sequence[tuple[bytes, bytes | None]]) -> list[Exception | None]:
        """Store values by key, and remove those of keys that come with None.

        Returns
        -------
        list of Exception or None
            For each what went wrong, if something did: it is as before then. One transaction makes them all
            if nothing does.

        Raises
        ------
        BaseException
            This thread was interrupted: some may be made.
        """
        mine = [_Change(key, value) for key, value in changes]
        while pending := [change for change in mine if not change.is_done]:
            self._group.run(pending)  # again for what another thread's interrupt has left undone
        return [change.error for change in mine]

    def close(self) -> None:
        """Close all connections; those in use when they are not any more. May be called twice."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # ------------------------------------------------------------------ changes

    def _serve(self, changes: list[_Change]) -> None:
        if len(changes) == 1 or not self._made(changes):
            for change in changes:
                self._made([change])
        if any(change.value is None for change in changes):
            self._reclaim()

    def _made(self, changes: list[_Change]) -> bool:
        """Make changes in one transaction; note what came of them, unless they are several and fail."""
        try:
            with self._connected(), self._cache.transact():
                for change in changes:
                    self._apply(change)
        except (sqlite3.Error, diskcache.Timeout, OSError, MemoryError) as error:
            if len(changes) > 1:
                return False
            changes[0].error = _origin(error)
        for change in changes:
            change.is_done = True
        return True

    def _apply(self, change: _Change) -> None:
        if change.value is None:
            self._cache.delete(change.key)
        else:
            self._cache.set(change.key, change.value)

    def _reclaim(self) -> None:
        """Give free pages back to the file system: some at least, and more as long as nobody waits."""
        try:
            with self._connected() as connection:
                while _has_too_many_free(connection):
                    connection.executescript(f"PRAGMA incremental_vacuum({_ROUND})")
                    if self._group.is_waited_for:
                        return
        except (sqlite3.Error, OSError):  # the pages stay free, to be used again
            pass

    # ------------------------------------------------------------------ connections

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Have the cache work, for this thread, on a connection that is its own meanwhile."""
        connection = self._take()
        try:
            self._cache.use(connection)
            yield connection
        except BaseException:
            self._cache.use(None)
            connection.close()
            raise
        self._cache.use(None)
        self._give(connection)

    def _take(self) -> sqlite3.Connection:
        if os.getpid() != self._pid:
            raise OSError(errno.EBADF, "it belongs to the parent process")
        with self._lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "it is closed")
            if self._idle:
                return self._idle.pop()
        connection: sqlite3.Connection = self._cache.connect()
        return connection

    def _give(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()


def _has_too_many_free(connection: sqlite3.Connection) -> bool:
    free, pages = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count")
    )
    return bool(free > _KEPT + pages // 4)


def _origin(error: Exception) -> Exception:
    """What sqlite said first: diskcache raises its own error after it, or fails in rolling back."""
    found: Exception = error
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, sqlite3.Error):
            found = below
        below = below.__context__
    return found
