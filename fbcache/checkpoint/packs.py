"""Packs: small blobs of checkpoints as records in one file, instead of a file each.

A pack is an ordinary blob file (:mod:`fbcache.codec.layout`) of the codec ``fbcache.pack``, with an empty
tree and one buffer: records one after the other (:mod:`fbcache.store.records`), each with the upper half of
its key as its slot. Where a record is says the manifest, and what its checksum is.

Guarantees
----------
- A record is held against what its manifest says: key, length and checksum. One that is damaged keeps no
  other from being read.
- What a manifest says of lengths allocates no more than the file holds.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeAlias
from uuid import UUID

from fbcache.checkpoint.manifest import Blob, Pack
from fbcache.checkpoint.places import Places
from fbcache.codec.frames import Buffer, Frames
from fbcache.codec.layout import PAGE
from fbcache.codec.layout import pack as plan
from fbcache.errors import CorruptBlobError
from fbcache.store.disk import Disk
from fbcache.store.records import HEAD_SIZE, length_of, parse, skim, whole_length_of
from fbcache.store.transfer import read_all
from fbcache.store.trouble import storage_error

#: The codec in a pack's header. No codec of values has it: a pack is no value.
CODEC: Final = "fbcache.pack"

#: Bytes of records in a pack: 100,000 values of 300 bytes.
MOST_RECORDS: Final = 32 << 20

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_RUN: Final = 1 << 20  # bytes that one read brings at the most, unless one record is longer
_GAP: Final = 16 << 10  # bytes between two records that are read along, which costs less than a call
_SUM: Final = struct.Struct("<Q")
_SUM_AT: Final = HEAD_SIZE - _SUM.size  # where in a record its checksum is

_Row: TypeAlias = "tuple[UUID, Blob]"


def frames_of(records: Buffer) -> Frames:
    """Return what a pack of these records is as a blob."""
    return Frames(CODEC, b"", [records])


def room_in(pack: Pack) -> int:
    """Return how many bytes of records a pack has, dead ones included."""
    start = PAGE if pack.nbytes >= 2 * PAGE else _START  # as the layout aligns its one buffer
    return max(pack.nbytes - start, 0)


def slot_of(key: UUID) -> int:
    """Return the slot that the record of ``key`` bears in a pack."""
    return key.int >> 64


#: Where in a pack's file its records begin, if they are shorter than a page.
_START: Final = plan(UUID(int=0), frames_of(b"x")).nbytes - 1


# ---------------------------------------------------------------------------------- reading


def read_records(
    disk: Disk, places: Places, pack: Pack, rows: Sequence[tuple[UUID, Blob]]
) -> Iterator[Frames | CorruptBlobError]:
    """Read records of one pack, verified; what is damaged or gone comes as the error, in its row's place.

    Parameters
    ----------
    pack : Pack
        The pack that all of ``rows`` are in.
    rows : sequence of (UUID, Blob)
        Keys, and their blobs out of a manifest. In the order of their offsets neighbours are read
        together, some 1 MiB at a time; any other order works.

    Yields
    ------
    Frames or CorruptBlobError
        One for each row, in order. Frames are copies, with read-only buffers. The error names the row's key
        and the pack's file; that the whole pack is gone, or no file, is an error for each row.

    Raises
    ------
    StorageError
        The disk failed while the file was opened or read.
    """
    path = places.blob(pack.key)
    for row, piece in zip(rows, _pieces(disk, path, rows), strict=True):
        try:
            yield piece if isinstance(piece, CorruptBlobError) else _parse(*row, *piece, path)
        except CorruptBlobError as error:
            yield error


def copy_records(
    disk: Disk, places: Places, pack: Pack, rows: Sequence[tuple[UUID, Blob]]
) -> Iterator[memoryview | CorruptBlobError]:
    """Do what :func:`read_records` does, with the records themselves in place of their frames."""
    path = places.blob(pack.key)
    for (key, blob), piece in zip(rows, _pieces(disk, path, rows), strict=True):
        if isinstance(piece, CorruptBlobError):
            yield piece
            continue
        memory, start = piece
        end = start + blob.disk_bytes
        try:
            _check(key, blob, memory, start, path)
            if whole_length_of(memory, start, end, slot_of(key)) != blob.disk_bytes:
                raise CorruptBlobError("its record does not match the record's checksum", key=key, path=path)
        except CorruptBlobError as error:
            yield error
        else:
            yield memory[start:end]


_Piece: TypeAlias = "tuple[memoryview, int] | CorruptBlobError"  # memory and where in it the record begins


def _pieces(disk: Disk, path: str, rows: Sequence[_Row]) -> Iterator[_Piece]:
    """The memory that each record is in, unchecked but for its length."""
    if not rows:
        return
    with _reporting(disk, path):
        try:
            fd = disk.open(path, _READ)
        except FileNotFoundError:
            yield from (CorruptBlobError("the pack's file is gone", key=key, path=path) for key, _ in rows)
            return
        try:
            if not stat.S_ISREG(disk.fstat(fd).st_mode):
                yield from (CorruptBlobError("its pack is no file", key=key, path=path) for key, _ in rows)
                return
            for run in _runs(rows):
                yield from _read_run(disk, fd, path, run)
        finally:
            disk.close(fd)


@contextmanager
def _reporting(disk: Disk, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error("read", path, error, disk) from error


def _runs(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Rows one after the other whose records lie together."""
    run: list[_Row] = []
    start = end = 0
    for row in rows:
        blob = row[1]
        to = blob.offset + blob.disk_bytes
        if run and (not end <= blob.offset <= end + _GAP or to - start > _RUN):
            yield run
            run = []
        if not run:
            start = blob.offset
        run.append(row)
        end = to
    if run:
        yield run


def _read_run(disk: Disk, fd: int, path: str, run: Sequence[_Row]) -> Iterator[_Piece]:
    first, last = run[0][1].offset, run[-1][1].offset + run[-1][1].disk_bytes
    size = disk.fstat(fd).st_size
    memory = memoryview(bytearray(max(min(last, size) - first, 0)))  # a manifest may say anything
    length = read_all(disk, fd, [memory], first)
    for key, blob in run:
        start = blob.offset - first
        if start + max(blob.disk_bytes, HEAD_SIZE) > length:
            yield CorruptBlobError("its pack ends before its record does", key=key, path=path)
        else:
            yield memory, start


def _parse(key: UUID, blob: Blob, memory: memoryview, start: int, path: str) -> Frames:
    _check(key, blob, memory, start, path)
    end = start + blob.disk_bytes
    try:
        skim(memory, start, end)
        return parse(memory, start, end, slot_of(key), writable=False)
    except CorruptBlobError as error:
        raise CorruptBlobError(error.reason, key=key, path=path) from error


def _check(key: UUID, blob: Blob, memory: memoryview, start: int, path: str) -> None:
    """Hold a record's length and checksum against the manifest's."""
    if length_of(memory, start)[1] != blob.disk_bytes:
        raise CorruptBlobError("its record has another length than the checkpoint says", key=key, path=path)
    if digest_of(memory, start) != blob.digest:
        raise CorruptBlobError("its record is another one than the checkpoint names", key=key, path=path)


def digest_of(record: memoryview | bytes, start: int = 0) -> int:
    """Return the checksum that a record bears."""
    digest: int = _SUM.unpack_from(record, start + _SUM_AT)[0]
    return digest
