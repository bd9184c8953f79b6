"""Sagas in one SQLite file that outlives the process.

Guarantees
----------
- What a call has recorded survives a crash of the process and a loss of power: the journal is a WAL, synced
  at every commit (``synchronous=FULL``), and each call is one transaction. One that raises has recorded all
  of it or nothing.
- One object at a time writes to a file: a lock beside it (``FILE-lock``, flock) is freed by the kernel
  when its holder dies. So nobody recovers sagas that somebody else is running. Any number may read.
- A damaged row spoils its saga only, which is a :class:`CorruptSagaError` when it is loaded.

``_lock`` guards the connection, which all threads share; nothing of the caller's runs under it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from types import TracebackType
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

from filelock import FileLock, Timeout

from fbcache.saga.dag import SagaDag
from fbcache.saga.encoding import decode
from fbcache.saga.errors import (
    CorruptSagaError,
    SagaExistsError,
    SagaStoreError,
    SagaStoreInUseError,
    UnknownSagaError,
)
from fbcache.saga.log import SagaEventKind, SagaNodeEvent
from fbcache.saga.store import SagaCachedState, SagaCreateParams, SagaRecord

#: "FBSG": tells our files from other SQLite files.
_APPLICATION: Final = 0x46425347

#: The version of the tables.
_VERSION: Final = 1

#: Seconds to wait for a lock of SQLite's own: readers take those only while they open or close the file.
_PATIENCE: Final = 10.0

_TABLES: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE saga (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    dag BLOB NOT NULL,
    state TEXT NOT NULL
);
CREATE TABLE event (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    saga INTEGER NOT NULL REFERENCES saga (seq),
    node TEXT NOT NULL,
    kind INTEGER NOT NULL,
    payload BLOB,
    UNIQUE (saga, node, kind)
);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class SqliteSagaStore:
    """A store in a file; see this module for its guarantees. A context manager; otherwise ``close`` it.

    Parameters
    ----------
    path : path
        The file; made if it is missing, unless ``readonly``.
    readonly : bool
        Read only: no lock is taken.

    Raises
    ------
    SagaStoreInUseError
        Somebody has it open for writing.
    SagaStoreError
        It cannot be opened, or is no store of sagas. Nothing was changed but the lock beside it.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False) -> None:
        self._path = os.path.abspath(os.fspath(path))
        self._readonly = readonly
        self._pid = os.getpid()
        self._lock = Lock()
        self._connection: sqlite3.Connection | None = None
        self._turn = None if readonly else self._take_turn()
        try:
            with self._translated("opened"):
                self._connection = self._connect()
                self._prepare(self._connection)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        state = "closed" if self._connection is None else "read-only" if self._readonly else "open"
        return f"<SqliteSagaStore {self._path!r}, {state}>"

    @property
    def path(self) -> str:
        """The file."""
        return self._path

    @property
    def recovers(self) -> bool:
        """True: what was recorded can be read again."""
        return True

    # ------------------------------------------------------------------------- recording

    def saga_create(self, params: SagaCreateParams) -> None:
        """Record a new saga, durably.

        Raises
        ------
        SagaExistsError
            The id is there already. Nothing was recorded.
        SagaStoreError
            It may have been recorded or not.
        """
        row = (str(params.id), params.name, params.dag.to_bytes(), str(params.state))
        with self._use("written to") as connection:
            insert = "INSERT INTO saga (id, name, dag, state) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
            if not connection.execute(insert, row).rowcount:
                message = f"saga {params.id} is in {self._path} already; resume it, or take a new id"
                raise SagaExistsError(message)

    def record_event(self, event: SagaNodeEvent) -> None:
        """Record an event, durably; once, if it is there already.

        Raises
        ------
        UnknownSagaError
            The saga was not created here. Nothing was recorded.
        SagaStoreError
            It may have been recorded or not; or an event of that node and kind is there with other content.
        """
        with self._use("written to") as connection:
            number = self._number(connection, event.saga_id)
            row = (event.payload, number, event.node, int(event.kind))
            columns = "(payload, saga, node, kind)"
            insert = f"INSERT INTO event {columns} VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
            same = "SELECT payload IS ? FROM event WHERE saga = ? AND node = ? AND kind = ?"
            if connection.execute(insert, row).rowcount or connection.execute(same, row).fetchone()[0]:
                return
            raise SagaStoreError(
                f"{self._path} has another {event.kind.name} of node {event.node!r} of saga {event.saga_id}; "
                "resume the saga by its id alone, so that it goes on from what is there",
                path=self._path,
            )

    def saga_update(self, saga_id: UUID, state: SagaCachedState) -> None:
        """Record that the saga is in another state, durably.

        Raises
        ------
        UnknownSagaError
            The saga was not created here. Nothing was recorded.
        SagaStoreError
            It may have been recorded or not.
        """
        with self._use("written to") as connection:
            number = self._number(connection, saga_id)
            connection.execute("UPDATE saga SET state = ? WHERE seq = ?", (str(state), number))

    # --------------------------------------------------------------------------- reading

    def saga_list(self, *, unfinished: bool = False) -> list[UUID]:
        """Return the ids of all sagas, or of those not done, oldest first.

        Raises
        ------
        SagaStoreError
            The file cannot be read.
        CorruptSagaError
            An id in it is none.
        """
        select = "SELECT id FROM saga WHERE state != 'done' OR NOT ? ORDER BY seq"
        with self._use("read") as connection:
            rows = connection.execute(select, (unfinished,)).fetchall()
        try:
            return [UUID(text) for (text,) in rows]
        except (ValueError, AttributeError) as error:
            raise CorruptSagaError(f"{self._path} has a saga whose id is damaged: {error}") from error

    def saga_load(self, saga_id: UUID) -> SagaRecord:
        """Return what there is of a saga, its events in the order in which they were recorded.

        Raises
        ------
        UnknownSagaError
            It is not here.
        CorruptSagaError
            Part of it cannot be read.
        SagaStoreError
            The file cannot be read.
        """
        with self._use("read") as connection:
            number = self._number(connection, saga_id)
            saga = "SELECT name, dag, state FROM saga WHERE seq = ?"
            name, packed, state = connection.execute(saga, (number,)).fetchone()
            events = "SELECT node, kind, payload FROM event WHERE saga = ? ORDER BY seq"
            rows = connection.execute(events, (number,)).fetchall()
        try:
            dag = SagaDag.from_bytes(packed)
            params = SagaCreateParams(saga_id, name, dag, SagaCachedState(state))
            return SagaRecord(params, tuple(_event(saga_id, *row) for row in rows))
        except (ValueError, TypeError) as error:  # a CorruptSagaError of from_bytes too
            raise CorruptSagaError(f"saga {saga_id} in {self._path} is damaged: {error}") from error

    # ------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Close the file, and let others write to it. May be called again."""
        if os.getpid() != self._pid:
            return  # the connection and the lock are the parent's
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            if self._turn is not None:
                self._turn.release()

    def __enter__(self) -> SqliteSagaStore:
        """Return the store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    # ------------------------------------------------------------------------- mechanism

    def _take_turn(self) -> Any:
        folder = os.path.dirname(self._path)
        if not os.path.isdir(folder):  # it would be made for the lock
            raise SagaStoreError(f"{folder} is no directory; make it, or name another file", path=self._path)
        turn = FileLock(f"{self._path}-lock", timeout=0, thread_local=False)
        try:
            turn.acquire()
        except Timeout:
            raise SagaStoreInUseError(
                f"{self._path} is open for writing elsewhere; close it there, or open it with readonly=True"
            ) from None
        except OSError as error:
            raise SagaStoreError(
                f"{self._path}-lock cannot be locked: {error}", path=self._path, errno=error.errno
            ) from error
        return turn

    def _connect(self) -> sqlite3.Connection:
        mode = "ro" if self._readonly else "rwc"
        return sqlite3.connect(
            f"file:{quote(self._path)}?mode={mode}",
            uri=True,
            timeout=_PATIENCE,
            isolation_level=None,
            check_same_thread=False,
        )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not (is_empty and not self._readonly):
            self._check_kind(connection)
        if self._readonly:
            return
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if is_empty:
            connection.executescript(_TABLES)

    def _check_kind(self, connection: sqlite3.Connection) -> None:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application != _APPLICATION:
            raise SagaStoreError(f"{self._path} is no store of sagas; name another file", path=self._path)
        if version != _VERSION:
            raise SagaStoreError(
                f"{self._path} is of version {version}; this fbcache reads {_VERSION}. Take a newer one",
                path=self._path,
            )

    @contextmanager
    def _use(self, act: str) -> Iterator[sqlite3.Connection]:
        """Have the connection to oneself, and one transaction."""
        if os.getpid() != self._pid:
            raise SagaStoreError(f"{self!r} is the parent process's; open one in this one", path=self._path)
        with self._lock, self._translated(act):
            connection = self._connection
            if connection is None:
                raise SagaStoreError(f"{self!r} is closed; open it anew", path=self._path)
            connection.execute("BEGIN" if act == "read" else "BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _number(self, connection: sqlite3.Connection, saga_id: UUID) -> int:
        row = connection.execute("SELECT seq FROM saga WHERE id = ?", (str(saga_id),)).fetchone()
        if row is None:
            raise UnknownSagaError(f"saga {saga_id} is not in {self._path}; create it first")
        number: int = row[0]
        return number

    @contextmanager
    def _translated(self, act: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise SagaStoreError(f"{self._path} cannot be {act}: {error}", path=self._path) from error


def _event(saga_id: UUID, node: str, kind: int, payload: bytes | None) -> SagaNodeEvent:
    if payload is not None:
        decode(payload)  # so that damage shows now, and not as the failure of an action
    return SagaNodeEvent(saga_id, node, SagaEventKind(kind), payload)
