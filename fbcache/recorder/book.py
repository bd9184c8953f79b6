"""A file of records: SQLite, called plainly, from one thread at a time.

Guarantees
----------
- ``write`` is one transaction, and ``read`` one statement: what another process reads is whole bulks.
- What ``write`` has returned from survives the death of the process. With ``durable`` (``synchronous=FULL``:
  an fsync of the write-ahead log for each bulk) it survives the machine's too; without
  (``synchronous=NORMAL``) the last bulks may go with the machine, never the file's integrity.
- A file that is not one of records is not changed. Where the directory offers no write-ahead log (some
  network file systems), SQLite's rollback journal serves instead, with the same guarantees.
- A record is a blob as :mod:`fbcache.codec.layout` has it, checksums included, and never pickled: reading
  a file runs no code from it.

The file: ``application_id`` ``FBCR``, ``user_version`` 1, and one table, ``records``: ``seq`` (the order of
saving), ``time``, ``kind``, ``key`` and ``name`` (the record's facets; a record without a time gets
that of its bulk), ``record`` (the blob).
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

from fbcache.codec import Frames, MsgpackCodec
from fbcache.codec.layout import pack, unpack_header, verify_buffer
from fbcache.errors import CorruptBlobError, DiskFullError, FBCacheError, StorageError
from fbcache.recorder.errors import CorruptRecordsError, ForeignFileError, RecordsRefusedError
from fbcache.recorder.query import Facets, Query

APPLICATION: Final = int.from_bytes(b"FBCR", "big")
VERSION: Final = 1

#: The key in the header of each record's blob, which is found by its row instead.
_NO_KEY: Final = UUID(int=0)

#: Seconds to wait for another process that writes to the file.
_BUSY: Final = 5.0

#: An index for each way to look; partial ones, for many records have no key.
_SCHEMA: Final = (
    "CREATE TABLE records (seq INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT, key TEXT, name TEXT, "
    "record BLOB NOT NULL)",
    "CREATE INDEX by_time ON records (time)",
    "CREATE INDEX by_kind ON records (kind, time) WHERE kind IS NOT NULL",
    "CREATE INDEX by_key ON records (key, time) WHERE key IS NOT NULL",
    "CREATE INDEX by_name ON records (name, time) WHERE name IS NOT NULL",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)

_INSERT: Final = "INSERT INTO records (time, kind, key, name, record) VALUES (?, ?, ?, ?, ?)"

Row = tuple[float, str | None, str | None, str | None, bytes]


class Book:
    """A file of records, open.

    Parameters
    ----------
    path : str
        The file; made if it is missing, except with ``readonly``.
    readonly : bool
        Write no record, and make no file. What a process that died has left in the log may be folded in.
    durable : bool
        Whether a bulk that is written survives a power failure.

    Raises
    ------
    ForeignFileError, CorruptRecordsError, StorageError
        The file is something else, damaged, or cannot be opened.
    """

    def __init__(self, path: str, *, readonly: bool, durable: bool) -> None:
        self.path = path
        self._codec = MsgpackCodec()
        with self._translated():
            self._connection = _connect(path, readonly)
        try:
            with self._translated():
                self._set_up(readonly, durable)
        except BaseException:
            self._connection.close()
            raise

    def _set_up(self, readonly: bool, durable: bool) -> None:
        if not readonly and self._is_blank():
            self._create()
        self._check()
        if not readonly:
            self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")

    def _is_blank(self) -> bool:
        return self._number("application_id") == 0 and self._number("schema_version") == 0

    def _create(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        with self._transaction():
            if self._is_blank():  # else another process was faster
                for statement in _SCHEMA:
                    self._connection.execute(statement)

    def _check(self) -> None:
        application, version = self._number("application_id"), self._number("user_version")
        if application != APPLICATION:
            raise ForeignFileError("it is another program's SQLite file, or an empty one", path=self.path)
        if version != VERSION:
            reason = f"its version is {version}, where this fbcache knows {VERSION}"
            raise ForeignFileError(reason, path=self.path)

    def _number(self, pragma: str) -> int:
        return int(self._connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    def close(self) -> None:
        """Close the file; the last one to do so folds the write-ahead log in."""
        self._connection.close()

    # ------------------------------------------------------------------------- writing

    def write(self, bulk: Sequence[Any], facets: Callable[[Any], Facets]) -> None:
        """Write all records of ``bulk`` in one transaction.

        Raises
        ------
        RecordsRefusedError
            Some cannot be encoded, or have no proper facets.
        DiskFullError, StorageError, CorruptRecordsError
            The file cannot be written.

        After an error nothing of the bulk is in the file.
        """
        rows = self._rows(bulk, facets)
        with self._translated(sum(len(row[-1]) for row in rows)):
            self._connection.execute("BEGIN IMMEDIATE")
            with self._transaction():
                self._connection.executemany(_INSERT, rows)

    def _rows(self, bulk: Sequence[Any], facets: Callable[[Any], Facets]) -> list[Row]:
        now = time.time()
        rows: list[Row] = []
        refused: dict[int, Exception] = {}
        for position, record in enumerate(bulk):
            try:
                found = facets(record)
                when = now if found.time is None else found.time
                rows.append((when, found.kind, found.key, found.name, self._encoded(record)))
            except Exception as error:  # the record's own code is called here
                refused[position] = error
        if refused:
            raise RecordsRefusedError(refused)
        return rows

    def _encoded(self, record: Any) -> bytes:
        return b"".join(pack(_NO_KEY, self._codec.encode(record, allow_pickle=False)).pieces)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite has rolled some back by itself
                self._connection.execute("ROLLBACK")
            raise

    # ------------------------------------------------------------------------- reading

    def read(self, query: Query | None) -> list[Any]:
        """Return the records that match, in the order of their saving.

        Raises
        ------
        CorruptRecordsError, UnsupportedTypeError, StorageError
            The file, or a record in it, cannot be read; or the class of one is not registered.
        """
        statement, values = _select(Query() if query is None else query)
        with self._translated():
            rows = self._connection.execute(statement, values).fetchall()
        return [self._decoded(seq, blob) for seq, blob in rows]

    def _decoded(self, seq: int, blob: Any) -> Any:
        if type(blob) is not bytes:
            raise CorruptRecordsError(f"record {seq} is no blob", path=self.path)
        try:
            header = unpack_header(blob, key=_NO_KEY, file_size=len(blob), path=self.path)
            buffers = []
            for span in header.spans:
                buffers.append(memoryview(blob)[span.offset : span.offset + span.length])
                verify_buffer(buffers[-1], span)
            frames = Frames(header.codec, header.tree, buffers, header.pickled)
            return self._codec.decode(frames, writable=False, allow_pickle=False)
        except CorruptBlobError as error:
            raise CorruptRecordsError(f"record {seq}: {error.reason}", path=self.path) from error

    # -------------------------------------------------------------------------- errors

    @contextmanager
    def _translated(self, needed: int = 0) -> Iterator[None]:
        """Raise what SQLite says as what it means here."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._meaning(error, needed) from error

    def _meaning(self, error: sqlite3.Error, needed: int) -> FBCacheError:
        code = getattr(error, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        if primary == sqlite3.SQLITE_NOTADB:
            return ForeignFileError("it is no SQLite file, or its beginning is damaged", path=self.path)
        if primary == sqlite3.SQLITE_CORRUPT:
            return CorruptRecordsError(str(error), path=self.path)
        if primary == sqlite3.SQLITE_FULL:
            free = _free(self.path)
            return DiskFullError(
                f"no room for records of {needed:,} bytes in {self.path}: {free:,} bytes are free; "
                "free some, and they are written then",
                path=self.path,
                needed=needed,
                free=free,
            )
        return StorageError(f"{self.path}: {error}", path=self.path)


def _connect(path: str, readonly: bool) -> sqlite3.Connection:
    options: dict[str, Any] = {"timeout": _BUSY, "isolation_level": None, "check_same_thread": False}
    connection: sqlite3.Connection
    if not readonly:
        connection = sqlite3.connect(path, **options)
        return connection
    place = f"file:{quote(os.path.abspath(path))}"
    # Not mode=ro, which leaves files of the log behind that only a writer may remove.
    connection = sqlite3.connect(f"{place}?mode=rw", uri=True, **options)
    try:
        connection.execute("PRAGMA query_only = 1")
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        if not os.path.exists(path) or os.path.exists(f"{path}-wal"):
            raise
        # Where nothing may be written, SQLite cannot make the log's index; without a log it needs none.
        connection = sqlite3.connect(f"{place}?mode=ro&immutable=1", uri=True, **options)
    return connection


def _select(query: Query) -> tuple[str, list[Any]]:
    conditions: list[str] = []
    values: list[Any] = []
    for column, wanted in (("kind", query.kind), ("key", query.key), ("name", query.name)):
        if wanted is not None:
            conditions.append(f"{column} IN ({', '.join('?' * len(wanted))})")
            values += sorted(wanted)
    for comparison, moment in ((">=", query.since), ("<=", query.until)):
        if moment is not None:
            conditions.append(f"time {comparison} ?")
            values.append(moment)
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    if query.limit is None:
        return f"SELECT seq, record FROM records{where} ORDER BY seq", values
    newest = f"SELECT seq, record FROM records{where} ORDER BY seq DESC LIMIT ?"
    return f"SELECT seq, record FROM ({newest}) ORDER BY seq", [*values, query.limit]


def _free(path: str) -> int:
    try:
        place = os.statvfs(os.path.dirname(os.path.abspath(path)))
    except OSError:
        return 0
    return place.f_bavail * place.f_frsize
