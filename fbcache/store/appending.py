"""Appending records to segments, and reading them: the half that makes no room.

Guarantees
----------
- A record is found only after it was written whole, and a failed write leaves nothing that is found.
- A file is removed, and its descriptor closed, by the last who uses it: never under a writer, and once.
- No lock is held during a system call.

``_lock`` guards the table, the free slots, and every field here and of every segment. See
:mod:`~fbcache.store.segments` for the whole.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError, StorageError
from fbcache.store.disk import Disk
from fbcache.store.mapping import try_map
from fbcache.store.records import HEAD_SIZE, body_of, head_of, length_of, parse
from fbcache.store.room import Room
from fbcache.store.segment import NOWHERE, OFFSET, OFFSET_BITS, READ, SEGMENT, Segment
from fbcache.store.transfer import read_all

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL


class Appending:
    """Records by slot: written and read; see the module.

    Parameters
    ----------
    directory : str
        Where the files go. It must exist and be private to this user.
    room : Room
        Of that directory; its ledger counts every byte written, needed or not.
    disk : Disk
        The system calls.
    nbytes : int
        Of a segment.
    """

    def __init__(self, directory: str, room: Room, disk: Disk, *, nbytes: int = SEGMENT) -> None:
        self._directory = directory
        self._room = room
        self._disk = disk
        self._nbytes = nbytes
        self._lock = Lock()
        self._table = array("Q")
        self._free: list[int] = []
        self._segments: dict[int, Segment] = {}
        self._active: Segment | None = None  # the one that is appended to
        self._spent: list[int] = []  # descriptors that are to be closed
        self._made = 0
        self._counted = 0
        self._closed = False

    # ------------------------------------------------------------------------- writing

    def append(self, many: Sequence[Frames]) -> tuple[list[int], list[int]]:
        """Write each of ``many`` as a record, all in one call; return their slots and their lengths.

        Raises
        ------
        DiskFullError, StorageError
            They were not written; none of them is there.
        StorageError
            One is larger than a record can be (``errno.EMSGSIZE``); none of them is there.
        """
        bodies = self._bodies_of(many)
        sizes = [HEAD_SIZE + len(body) for body, _ in bodies]
        slots = self._take_slots(len(bodies))
        try:
            pieces = [
                piece
                for slot, (body, length) in zip(slots, bodies, strict=True)
                for piece in (head_of(slot, body, length), body)
            ]
            self._write(b"".join(pieces), self._reserve, lambda place: self._place(slots, sizes, place))
        except BaseException:
            self._forget(slots, sizes)
            raise
        return slots, sizes

    def _bodies_of(self, many: Sequence[Frames]) -> list[tuple[bytes, int]]:
        try:
            return [body_of(frames) for frames in many]
        except ValueError as error:
            raise StorageError(
                f"cannot pack a value in {self._directory}: {error}. A store of files can take it.",
                path=self._directory,
                errno=errno.EMSGSIZE,
            ) from error

    def _place(self, slots: list[int], sizes: list[int], place: int) -> int:
        """Have slots lead to records from ``place`` on; return the bytes that they take. Under the lock."""
        table, start = self._table, place
        try:
            for slot, nbytes in zip(slots, sizes, strict=True):
                table[slot] = place
                place += nbytes
        except BaseException:  # an interrupt
            for slot in slots:
                table[slot] = NOWHERE
            raise
        return place - start

    def _take_slots(self, count: int) -> list[int]:
        with self._lock:
            free, table = self._free, self._table
            taken = free[max(len(free) - count, 0) :]
            del free[len(free) - len(taken) :]
            fresh = count - len(taken)
            taken += range(len(table), len(table) + fresh)
            table.extend([NOWHERE] * fresh)
            return taken

    def _write(self, data: bytes, reserve: Callable[[int], None], publish: Callable[[int], int]) -> None:
        """Write ``data`` somewhere. ``publish`` hears where, under the lock, and says how much is needed."""
        nbytes = len(data)
        reserve(nbytes)
        grown = False
        allotted: list[tuple[Segment, int]] = []
        try:
            try:
                self._allot(nbytes, allotted)
                segment, start = allotted[0]
                self._write_at(segment.fd, data, start)
                grown = self._room.ledger.grow(nbytes)
                with self._lock:
                    if self._closed or not grown:
                        raise self._room.closed_error()
                    needed = publish(segment.number << OFFSET_BITS | start)
                    self._retire_after(segment)
                    # Straight line (fbcache.entry): whoever is interrupted is a user still, or is done.
                    segment.users -= 1
                    segment.live += needed
                    segment.counted += nbytes
                    self._counted += nbytes
                    allotted.clear()
            except BaseException:
                if allotted:
                    self._abandon(*allotted[0], nbytes)
                    if grown:
                        self._room.ledger.shrink(nbytes)
                raise
        except StorageError:
            raise
        except OSError as error:
            raise self._room.write_error(error, nbytes) from error
        finally:
            if not grown:
                self._room.ledger.release(nbytes)
            self._close_spent()

    def _reserve(self, nbytes: int) -> None:
        while True:
            try:
                # What compaction may have to copy is left over.
                self._room.reserve(nbytes, spare=min(self._nbytes, self._counted))
                return
            except StorageError:
                if not self.make_room():
                    raise

    def _allot(self, nbytes: int, allotted: list[tuple[Segment, int]]) -> None:
        """Give out ``nbytes`` at the end of the active segment, or of a new one: segment and offset."""
        made: list[Segment] = []
        try:
            while True:
                with self._lock:
                    if self._closed:
                        raise self._room.closed_error()
                    segment = self._active
                    if (segment is None or segment.end + nbytes > segment.room) and made:
                        segment = made[0]
                        self._succeed(segment)
                        made.clear()
                    if segment is not None and segment.end + nbytes <= segment.room:
                        place = segment, segment.end
                        # Straight line.
                        segment.end += nbytes
                        segment.users += 1
                        allotted.append(place)
                        return
                self._make(max(self._nbytes, nbytes), made)
        finally:
            for each in made:  # another thread's was first, or it could not be made
                with self._lock:
                    self._claim(each)
                self._discard(each)

    def _succeed(self, segment: Segment) -> None:
        former = self._active
        if former is not None:
            self._seal(former)
        self._active = segment
        self._segments[segment.number] = segment

    def _seal(self, active: Segment) -> None:
        """Append to it no more. Under the lock; close what is spent afterwards."""
        self._active = None
        if not active.users:
            self._retire(active)

    def _make(self, room: int, made: list[Segment]) -> None:
        with self._lock:
            number = self._made
            self._made += 1
        segment = Segment(number, f"{self._directory}/{number}.segment", room)
        made.append(segment)
        segment.fd = self._disk.open(segment.path, _CREATE)
        self._write_at(segment.fd, b"\0", room - 1)  # a hole: the map may reach as far as the file does
        segment.memory = try_map(self._disk, segment.fd, room)

    def _write_at(self, fd: int, data: bytes, offset: int) -> None:
        while data:
            moved = self._disk.pwrite(fd, data, offset)
            if moved == len(data):
                return
            if moved == 0:
                raise OSError(errno.EIO, "the disk takes no more bytes")
            data = data[moved:]
            offset += moved

    def _abandon(self, segment: Segment, start: int, nbytes: int) -> None:
        """Give bytes back that hold no record, if nobody has been given those after them."""
        with self._lock:
            if segment.end == start + nbytes:
                segment.end = start
            self._retire_after(segment)
            segment.users -= 1
            is_needless = not segment.users and (self._closed or not segment.end)
            if is_needless:
                self._claim(segment)
        if is_needless:
            self._discard(segment)

    def _retire_after(self, segment: Segment) -> None:
        """Have the descriptor closed if a writer who is about to leave is the last one. Under the lock."""
        if segment.users == 1 and segment is not self._active:
            self._retire(segment)

    # ------------------------------------------------------------------------- reading

    def read(self, slot: int, *, writable: bool) -> Frames:
        """Return the frames of the record of ``slot``.

        Raises
        ------
        CorruptBlobError
            There is none, or it is damaged.
        StorageError
            It could not be read.
        """
        table, segments = self._table, self._segments
        while True:
            place = table[slot]
            segment = segments.get(place >> OFFSET_BITS)
            if segment is not None:
                try:
                    return self._read_from(segment, place & OFFSET, slot, writable)
                except FileNotFoundError as error:
                    if table[slot] == place:
                        raise CorruptBlobError("the file is gone", path=segment.path) from error
            elif table[slot] == place:
                raise CorruptBlobError("its record is gone", path=self._directory)
            # It was moved between the two look-ups.

    def _read_from(self, segment: Segment, offset: int, slot: int, writable: bool) -> Frames:
        memory = segment.memory
        try:
            if memory is not None:
                return parse(memory, offset, segment.room, slot, writable=writable)
            record = self._read_unmapped(segment, offset)
            return parse(record, 0, len(record), slot, writable=writable)
        except CorruptBlobError as error:
            raise CorruptBlobError(error.reason, path=segment.path) from error

    def _read_unmapped(self, segment: Segment, offset: int) -> memoryview:
        """Read one record, by a descriptor that nobody else closes."""
        try:
            fd = self._disk.open(segment.path, READ)
            try:
                _, nbytes = length_of(self._read_at(fd, offset, HEAD_SIZE), 0)
                return self._read_at(fd, offset, max(min(nbytes, segment.end - offset), 0))
            finally:
                self._disk.close(fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._room.error("read", segment.path, error) from error

    def _read_at(self, fd: int, offset: int, nbytes: int) -> memoryview:
        memory = memoryview(bytearray(nbytes))
        if read_all(self._disk, fd, [memory], offset) < nbytes:
            raise CorruptBlobError("the segment ends early")
        return memory

    def path_of(self, slot: int) -> str:
        """Return the file that the record of ``slot`` is in, for messages."""
        segment = self._segments.get(self._table[slot] >> OFFSET_BITS) if slot < len(self._table) else None
        return self._directory if segment is None else segment.path

    def _forget(self, slots: Sequence[int], sizes: Sequence[int]) -> None:
        with self._lock:
            for slot, nbytes in zip(slots, sizes, strict=True):
                place = self._table[slot]
                self._table[slot] = NOWHERE
                segment = self._segments.get(place >> OFFSET_BITS)
                if segment is not None:
                    segment.live -= nbytes
            self._free += slots

    def make_room(self) -> bool:
        """Make some room where there is none; whether there is more now."""
        raise NotImplementedError

    # ------------------------------------------------------------------------- the end

    def _retire(self, segment: Segment) -> None:
        """Have the descriptor closed. Under the lock; close what is spent afterwards."""
        if segment.fd >= 0:
            self._spent.append(segment.fd)
            segment.fd = -1

    def _close_spent(self) -> None:
        while self._spent:
            try:
                fd = self._spent.pop()
            except IndexError:  # another thread was faster
                return
            try:
                self._disk.close(fd)
            except OSError:  # closed it is; what the disk has lost its reader will see
                pass

    def _remove(self, segment: Segment) -> None:
        """Remove the file of a segment that only the caller uses; readers of its map go on."""
        try:
            self._disk.unlink(segment.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            with self._lock:
                segment.users -= 1
                segment.stuck = True
            raise self._room.error("remove", segment.path, error) from error
        with self._lock:
            self._segments.pop(segment.number, None)
            self._counted -= segment.counted
        self._room.ledger.shrink(segment.counted)

    def _claim(self, empty: Segment) -> None:
        """Become the only user of a segment that has none, and is to be removed. Under the lock."""
        empty.users = 1
        self._segments[empty.number] = empty
        if empty is self._active:
            self._active = None
        self._retire(empty)

    def _discard(self, empty: Segment) -> None:
        """Remove a segment that was claimed; what fails is tried again at the end."""
        self._close_spent()
        try:
            self._remove(empty)
        except StorageError:
            pass
