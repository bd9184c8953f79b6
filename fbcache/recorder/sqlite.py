"""``SqliteStorage``: records in a file, written by a thread of its own.

Guarantees
----------
- No call of SQLite's runs on an event loop, or on the thread that finalizes an unclosed storage: one worker
  thread makes them all, in the order of asking.
- What ``save`` has returned from is in the file; see :mod:`book` for what that survives. A cancelled save
  is still carried out whole, or not at all.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from threading import Lock
from types import TracebackType
from typing import Generic, TypeVar

from fbcache.errors import StorageError
from fbcache.recorder.book import Book
from fbcache.recorder.query import Facets, Query, facets_of
from fbcache.waiting import Answer, Work
from fbcache.workers import Workers

R = TypeVar("R")


class SqliteStorage(Generic[R]):
    """Keeps records in a SQLite file; a context manager.

    Parameters
    ----------
    path : path
        The file; made if it is missing. Several processes may write to it.
    readonly : bool
        Only load. The file must be there.
    durable : bool
        Whether a bulk survives a power failure, at the cost of an fsync, or only the end of the process.
    facets : callable, optional
        Returns the :class:`~fbcache.recorder.Facets` of a record, by which it is found. Called on
        the storage's thread.

    Raises
    ------
    ForeignFileError
        The file is something else, or of a newer fbcache.
    CorruptRecordsError
        It is damaged.
    StorageError
        It cannot be opened.

    Notes
    -----
    Records are what the codec takes without pickle: plain Python and numpy values, and instances of
    classes that are registered with :func:`fbcache.register`. Others are refused, and surface from the
    recorder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        durable: bool = True,
        facets: Callable[[R], Facets] = facets_of,
    ) -> None:
        self.path = os.fspath(path)
        self._readonly = readonly
        self._facets = facets
        self._book = Book(self.path, readonly=readonly, durable=durable)
        self._closing = Lock()
        self._closed = False
        self._workers = Workers(1, name="fbcache-records")
        self._finalizer = weakref.finalize(self, _dropped, self._workers, self._book)
        self._finalizer.atexit = False  # the log in the file is found by the next one who opens it

    def __repr__(self) -> str:
        return f"<SqliteStorage: {self.path}{', closed' if self._closed else ''}>"

    async def save(self, bulk: Sequence[R], /) -> None:
        """Write all records of ``bulk`` in one transaction.

        Raises
        ------
        RecordsRefusedError
            Some cannot be encoded without pickle.
        DiskFullError, StorageError, CorruptRecordsError
            The file cannot be written, or the storage is closed or read-only.

        After an error nothing of the bulk is in the file.
        """
        self._check(writes=True)
        await Work(lambda: self._book.write(bulk, self._facets), self._workers).arun()

    async def load(self, query: Query | None = None, /) -> list[R]:
        """Return the records that match, in the order of saving; None for all.

        Raises
        ------
        CorruptRecordsError, StorageError
            The file, or a record in it, cannot be read; or the storage is closed.
        UnsupportedTypeError
            The class of a record is not registered.
        TypeError
            ``query`` is no Query.
        """
        if query is not None and not isinstance(query, Query):
            raise TypeError(f"a query of a SqliteStorage is a Query or None, not {query!r}")
        self._check(writes=False)
        found: list[R] = []
        await Work(lambda: found.extend(self._book.read(query)), self._workers).arun()
        return found

    def close(self) -> None:
        """Close the file after what was asked for before. Blocks for that; may be called again."""
        with self._closing:
            if self._closed:
                return
            self._finalizer.detach()
            self._closed = True
            closed = Answer()
            self._workers.submit(lambda: _close(self._book, closed))
            self._workers.stop()
            closed.wait()
            self._workers.join()

    def _check(self, *, writes: bool) -> None:
        if self._closed:
            raise StorageError(f"the storage in {self.path} was closed", path=self.path)
        if writes and self._readonly:
            raise StorageError(f"{self.path} was opened for reading only", path=self.path)

    def __enter__(self) -> SqliteStorage[R]:
        """Return the storage."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def _close(book: Book, closed: Answer) -> None:
    try:
        book.close()
    finally:
        closed.wake()


def _dropped(workers: Workers, book: Book) -> None:
    """Close from a finalizer: the worker does it (a submit takes no lock)."""
    workers.submit(book.close)
    workers.submit(workers.stop)
