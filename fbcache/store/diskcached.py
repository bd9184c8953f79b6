"""Small blobs as rows of a diskcache (SQLite), large ones as files.

Guarantees, beyond those of :mod:`fbcache.store.protocol`:

- What is stored and read are bytes, never pickles: see :mod:`fbcache.store.rows`.
- Small blobs that are written at once, by several threads or by one, share a transaction; one that fails does
  so alone.
- No connection and no descriptor outlives the store. A forked child leaves those of its parent alone.
- Only files that this store made are removed (invariant 13): its rows are in ``<directory>/diskcache``,
  a directory of its own, for this user alone.
- Nothing is synced: these blobs end with their session.

A key is written once, or again after it was deleted. SQLite makes system calls of its own, which do not go
through :class:`~fbcache.store.disk.Disk`.

Locks: those of the ledger, of the group of writers (:mod:`fbcache.store.grouping`) and of the rows. None is
held during I/O.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID

import numpy as np

from fbcache.codec.frames import Frames
from fbcache.codec.layout import pack, unpack_header, verify_buffer, verify_padding
from fbcache.errors import CorruptBlobError, MissingLibraryError, StorageError
from fbcache.store.disk import DISK, Disk
from fbcache.store.files import FileStore
from fbcache.store.ledger import Ledger
from fbcache.store.protocol import StoreLimits
from fbcache.store.room import Room

if TYPE_CHECKING:
    from fbcache.store.rows import Rows

#: The directory of the rows, and what SQLite calls its files there.
NAME: Final = "diskcache"
DATABASE_FILES: Final = ("cache.db", "cache.db-wal", "cache.db-shm", "cache.db-journal")

#: Payload in bytes from which on a blob is a file: reading a row copies it, and a file can be mapped.
LARGE: Final = 64 << 10

_NO_LIMITS = StoreLimits()

#: Of the database; and what is left of one for rows, of which each takes some more than its blob.
_PAGE: Final = 4096
_PAGE_ROOM: Final = 4080
_ROW: Final = 72

#: What a row takes in the indices.
_INDEXED: Final = 64

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class DiskcacheStore:
    """Rows of a diskcache below one directory, and a file for each large blob.

    Parameters
    ----------
    directory : str
        Where the blobs go. It must exist, be private to this user, and serve no other store.
    limits : StoreLimits
        Checked before each write. A row counts what it takes of SQLite's pages; its journal of some 4 MiB,
        and free pages that will be used again, are not counted.
    mmap : bool
        Whether large blobs are read by mapping them.
    large : int
        Payload in bytes from which on a blob is a file.
    disk : Disk
        The system calls, but for SQLite's.

    Raises
    ------
    StorageError
        diskcache is not installed, the directory is another store's, or the database cannot be made. Nothing
        is left.
    """

    def __init__(
        self,
        directory: str,
        *,
        limits: StoreLimits = _NO_LIMITS,
        mmap: bool = True,
        large: int = LARGE,
        disk: Disk = DISK,
    ) -> None:
        self._directory = directory
        self._database = f"{directory}/{NAME}"
        self._large = large
        self._disk = disk
        self._pid = os.getpid()
        self._ledger = Ledger(limits)
        self._room = Room(directory, self._ledger, disk)
        self._files = FileStore(directory, ledger=self._ledger, mmap=mmap, disk=disk)
        self._small: set[UUID] = set()
        self._rows: Rows = self._open()

    # ------------------------------------------------------------------ blobs

    def write(self, key: UUID, frames: Frames) -> int:
        """Store ``frames`` under ``key`` and return the bytes taken on disk.

        Raises
        ------
        DiskFullError
            ``max_disk`` or ``min_free`` forbids it, and nothing was begun; or the disk is full.
        StorageError
            Any other failure of the storage, or the store is closed.

        After either nothing is stored under ``key``, its room is given back, and a later write works.
        """
        if frames.nbytes >= self._large:
            return self._files.write(key, frames)
        (result,) = self._write_rows([(key, frames)])
        if isinstance(result, StorageError):
            raise result
        return result

    def write_many(self, items: Sequence[tuple[UUID, Frames]]) -> list[int | StorageError]:
        """Do :meth:`write` for each, and return what it would have returned, or raised.

        The small ones share a transaction.
        """
        small = [item for item in items if item[1].nbytes < self._large]
        rows = iter(self._write_rows(small) if small else ())
        return [
            next(rows) if frames.nbytes < self._large else self._write_file(key, frames)
            for key, frames in items
        ]

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        """Return the frames stored under ``key``.

        Parameters
        ----------
        writable : bool
            Whether the buffers must be fresh, writeable memory; otherwise they are read-only, and those of a
            large blob are views of the page cache.
        verify : bool
            Whether each buffer is compared with its checksum. The header, key and length
            are always checked.

        Raises
        ------
        CorruptBlobError
            The blob is missing, damaged, or another key's; or the database is damaged.
        StorageError
            It could not be read.
        """
        if key not in self._small:
            return self._files.read(key, writable=writable, verify=verify)
        path = self.locate(key)
        try:
            raw = self._rows.get(key.bytes)
        except ValueError as error:
            raise CorruptBlobError(str(error), key=key, path=path) from error
        except (sqlite3.Error, OSError) as error:
            if _code(error) in _DAMAGED:
                raise CorruptBlobError(f"the database is: {error}", key=key, path=path) from error
            raise self._error("read from", error) from error
        if raw is None:
            raise CorruptBlobError("its row is gone", key=key, path=path)
        return _unpack(raw, key, path, writable=writable, verify=verify)

    def delete(self, key: UUID) -> None:
        """Remove the blob. One that is gone already is no error.

        Raises
        ------
        StorageError
            It is there and could not be removed; it still counts, and may be deleted again.
        """
        if key not in self._small:
            self._files.delete(key)
            return
        (error,) = self._rows.change([(key.bytes, None)])
        if error is not None and not self._ledger.closed:  # what a closed store had is gone
            raise self._error("remove a row of", error) from error
        self._small.discard(key)
        self._ledger.forget(key)

    def locate(self, key: UUID) -> str:
        """Return the directory of the rows, or the file, that has the blob of ``key`` or would have."""
        return self._database if key in self._small else self._files.locate(key)

    # ------------------------------------------------------------------ the store

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk now, blobs being written included."""
        return self._ledger.used

    @property
    def bytes_free(self) -> int:
        """Bytes that a write may still take before a limit or the disk's end is met."""
        return self._room.bytes_free

    @property
    def path(self) -> str:
        """The directory."""
        return self._directory

    def close(self) -> None:
        """Remove what this store wrote, and its directories unless others' files are there.

        May be called twice. A write that is under way fails. In a forked child nothing is done.

        Raises
        ------
        StorageError
            A file could not be removed. All others are; the store is closed.
        """
        if os.getpid() != self._pid:
            return
        self._ledger.close()
        self._rows.close()
        try:
            if self._database:
                self._remove_database()
                self._database = ""
        except OSError as error:
            raise self._error("remove", error) from error
        finally:
            self._small.clear()
            self._files.close()

    # ------------------------------------------------------------------ rows

    def _write_rows(self, items: Sequence[tuple[UUID, Frames]]) -> list[int | StorageError]:
        rows = [_row(key, frames) for key, frames in items]
        refusals = [self._refusal(row) for row in rows]
        taken = [row for row, refusal in zip(rows, refusals, strict=True) if refusal is None]
        stored = iter(self._store(taken) if taken else ())
        return [next(stored) if refusal is None else refusal for refusal in refusals]

    def _refusal(self, row: _Row) -> StorageError | None:
        """Set the row's bytes aside; return why they may not be written, if so."""
        try:
            self._room.reserve(row.nbytes)
        except StorageError as error:
            return error
        return None

    def _store(self, rows: list[_Row]) -> list[int | StorageError]:
        try:
            errors = self._rows.change([(row.key.bytes, row.value) for row in rows])
        except BaseException:
            for row in rows:
                self._ledger.release(row.nbytes)
            self._rows.change([(row.key.bytes, None) for row in rows])
            raise
        return [self._settled(row, error) for row, error in zip(rows, errors, strict=True)]

    def _settled(self, row: _Row, error: Exception | None) -> int | StorageError:
        if error is None and self._ledger.commit(row.key, row.nbytes):
            self._small.add(row.key)
            return row.nbytes
        self._ledger.release(row.nbytes)
        return self._room.closed_error() if error is None else self._error("write to", error, row.nbytes)

    def _write_file(self, key: UUID, frames: Frames) -> int | StorageError:
        try:
            return self._files.write(key, frames)
        except StorageError as error:
            return error

    def _error(self, doing: str, error: Exception, needed: int | None = None) -> StorageError:
        if self._ledger.closed:
            return self._room.closed_error()
        code = getattr(error, "errno", None)
        if needed is not None and (_code(error) == sqlite3.SQLITE_FULL or code in _FULL):
            return self._room.full_error(needed, self.bytes_free)
        return StorageError(
            f"cannot {doing} {self._database}: {error}. See that the disk and the directory are well.",
            path=self._database,
            needed=needed,
            free=None if needed is None else self.bytes_free,
            errno=code,
        )

    # ------------------------------------------------------------------ the database

    def _open(self) -> Rows:
        try:
            from fbcache.store.rows import Rows
        except ImportError as error:
            needs = "DiskcacheStore needs diskcache, which cannot be imported"
            raise MissingLibraryError(f"{needs} ({error}): pip install 'fbcache[diskcache]'") from error
        if os.path.expandvars(os.path.expanduser(self._database)) != self._database:
            reason = f"{self._directory} is no path for diskcache, which expands ~ and $: choose another"
            raise StorageError(reason, path=self._directory)
        try:
            self._disk.mkdir(self._database)
        except OSError as error:
            raise self._room.error("make", self._database, error) from error
        try:
            return Rows(self._database)
        except BaseException as error:
            self._remove_database()
            if isinstance(error, (sqlite3.Error, OSError, RuntimeError)):
                raise self._error("open", error) from error
            raise

    def _remove_database(self) -> None:
        """Remove the files of the database, and their directory unless there are others."""
        for name in DATABASE_FILES:
            try:
                self._disk.unlink(f"{self._database}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                pass
        try:
            self._disk.rmdir(self._database)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


@dataclass(frozen=True, slots=True)
class _Row:
    """A small blob on its way into the database, where it takes so many bytes."""

    key: UUID
    value: bytes
    nbytes: int


def _row(key: UUID, frames: Frames) -> _Row:
    value = b"".join(pack(key, frames).pieces)
    return _Row(key, value, _taken(len(value)))


def _taken(nbytes: int) -> int:
    """Bytes of the database that a row of a blob takes: pages are not shared beyond their halves."""
    size = nbytes + _ROW
    if size <= _PAGE_ROOM:
        size = _PAGE // (_PAGE_ROOM // size)
    return size + _INDEXED


def _code(error: Exception) -> int:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF  # the rest says more of it


def _unpack(raw: bytes, key: UUID, path: str, *, writable: bool, verify: bool) -> Frames:
    view = memoryview(raw)
    header = unpack_header(view, key=key, file_size=len(view), path=path)
    buffers = [_copy(view[span.offset : span.offset + span.length]) for span in header.spans]
    if verify:
        for buffer, span in zip(buffers, header.spans, strict=True):
            verify_buffer(buffer, span, key, path)
        for offset, length in header.gaps:
            verify_padding(view[offset : offset + length], key, path)
    if not writable:
        buffers = [buffer.toreadonly() for buffer in buffers]
    return Frames(header.codec, header.tree, buffers, header.pickled)


def _copy(buffer: memoryview) -> memoryview:
    """The buffer alone: else each would keep the whole row in memory, uncounted."""
    fresh = np.empty(len(buffer), np.uint8).data
    fresh[:] = buffer
    return fresh
