"""Records of many small blobs, appended to a few files.

Guarantees
----------
- What has been written is never written again: a segment only grows, and is removed as a whole when
  nothing in it is needed (invariant 2). A record is found only after it was written whole.
- A failed write leaves nothing that is found, and no bytes that count as used for longer than until
  their segment is compacted (invariant 9).
- Compaction stops nobody: it copies what is still needed of a segment that is mostly dead to the end of
  the newest one, and moves each slot at one instant. Who reads meanwhile keeps the old map.
- No lock is held during a system call.

Where a record is
-----------------
A slot, a small number that is used again, leads to the record's segment and offset through a table of
eight bytes a slot; so compaction can move the record without telling anybody. ``_lock`` guards the
table, the free slots, and every field of every segment.

Space
-----
A sealed segment is compacted when less than half of its bytes are needed, so that segments take at most
twice what is needed and one segment. Room for one more segment is kept for compaction. After log-structured storage: Rosenblum and Ousterhout, 1992.
"""

from __future__ import annotations

import os
import struct
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
from fbcache.store.transfer import read_all

#: Bytes of a segment. Ten files hold a million values of 300 bytes; compacting one that is half dead
#: takes some 40 ms of an I/O thread.
SEGMENT: Final = 32 << 20

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_NOWHERE: Final = (1 << 64) - 1
_OFFSET_BITS: Final = 40
_OFFSET: Final = (1 << _OFFSET_BITS) - 1
_CHUNK: Final = 1 << 20  # bytes that compaction copies at a time


class _Segment:
    """One file.

    Attributes
    ----------
    fd : int
        Open for as long as it may be appended to, and then for reading where it could not be mapped.
    memory : memoryview or None
        All of the file, mapped, beyond its end too.
    room : int
        Bytes that it was made for.
    end : int
        Bytes given out to writers.
    counted : int
        Bytes that were written, which the ledger counts.
    live : int
        Bytes of records that a slot leads to.
    holes : dict
        Stretches, by where they begin, of writes that failed and that others follow.
    writers : int
        Who is writing to it now; the file is not closed meanwhile.
    sealed : bool
        Whether it is appended to no more.
    moving : bool
        Whether it is being compacted, or cannot be.
    """

    __slots__ = (
        "counted",
        "end",
        "fd",
        "holes",
        "live",
        "memory",
        "moving",
        "number",
        "path",
        "room",
        "sealed",
        "writers",
    )

    def __init__(self, number: int, path: str, fd: int, memory: memoryview | None, room: int) -> None:
        self.number = number
        self.path = path
        self.fd = fd
        self.memory = memory
        self.room = room
        self.end = self.counted = self.live = self.writers = 0
        self.holes: dict[int, int] = {}
        self.sealed = self.moving = False


class Segments:
    """Records by slot; see the module.

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
        self._segments: dict[int, _Segment] = {}
        self._active: _Segment | None = None
        self._made = 0
        self._closed = False

    # ------------------------------------------------------------------------- writing

    def append(self, many: Sequence[Frames]) -> tuple[list[int], list[int]]:
        """Write each of ``many`` as a record, all in one call; return their slots and their lengths.

        Raises
        ------
        DiskFullError, StorageError
            They were not written; none of them is there.
        ValueError
            One is larger than a record can be; none of them is there.
        """
        bodies = [body_of(frames) for frames in many]
        slots = self._take_slots(len(bodies))
        try:
            pieces = [
                piece
                for slot, (body, length) in zip(slots, bodies, strict=True)
                for piece in (head_of(slot, body, length), body)
            ]
            segment, start = self._write(b"".join(pieces), self._reserve)
        except BaseException:
            with self._lock:
                self._free += slots
            raise
        sizes = [HEAD_SIZE + len(body) for body, _ in bodies]
        place = segment.number << _OFFSET_BITS | start
        table = self._table
        with self._lock:
            for slot, nbytes in zip(slots, sizes, strict=True):
                table[slot] = place
                place += nbytes
            segment.live += sum(sizes)
            segment.writers -= 1
        return slots, sizes

    def _take_slots(self, count: int) -> list[int]:
        with self._lock:
            free, table = self._free, self._table
            taken = free[-count:]
            del free[len(free) - len(taken) :]
            fresh = count - len(taken)
            taken += range(len(table), len(table) + fresh)
            table.extend([_NOWHERE] * fresh)
            return taken

    def _write(self, data: bytes, reserve: Callable[[int], None]) -> tuple[_Segment, int]:
        """Write ``data`` somewhere; the caller counts itself out of the segment's writers."""
        nbytes = len(data)
        reserve(nbytes)
        grown = False
        try:
            segment, start = self._allot(nbytes)
            try:
                self._write_at(segment.fd, data, start)
                grown = self._room.ledger.grow(nbytes)
                if not grown:
                    raise self._room.closed_error()
            except BaseException:
                self._abandon(segment, start, nbytes)
                raise
        except StorageError:
            raise
        except OSError as error:
            raise self._room.write_error(error, nbytes) from error
        finally:
            if not grown:
                self._room.ledger.release(nbytes)
        with self._lock:
            segment.counted += nbytes
        return segment, start

    def _reserve(self, nbytes: int) -> None:
        while True:
            try:
                self._room.reserve(nbytes, spare=self._nbytes)  # which compaction can do with
                return
            except StorageError:
                if not self._compact_any():
                    raise

    def _allot(self, nbytes: int) -> tuple[_Segment, int]:
        """Give out ``nbytes`` at the end of the active segment, or of a new one."""
        made: _Segment | None = None
        while True:
            with self._lock:
                segment = self._active
                if segment is None or segment.end + nbytes > segment.room:
                    segment, made = made, None
                    if segment is not None:
                        self._succeed(segment)
                if segment is not None:
                    start = segment.end
                    segment.end += nbytes
                    segment.writers += 1
                    break
            made = self._make(max(self._nbytes, nbytes))
        if made is not None:  # another thread's was first
            self._remove(made)
        return segment, start

    def _succeed(self, segment: _Segment) -> None:
        former = self._active
        if former is not None:
            former.sealed = True
        self._active = segment
        self._segments[segment.number] = segment

    def _make(self, room: int) -> _Segment:
        with self._lock:
            if self._closed:
                raise self._room.closed_error()
            number = self._made
            self._made += 1
        path = f"{self._directory}/{number}.segment"
        fd = self._disk.open(path, _CREATE)
        try:
            self._write_at(fd, b"\0", room - 1)  # a hole: the map may reach as far as the file does
            return _Segment(number, path, fd, try_map(self._disk, fd, room), room)
        except BaseException:
            self._disk.close(fd)
            self._disk.unlink(path)
            raise

    def _write_at(self, fd: int, data: bytes, offset: int) -> None:
        while data:
            moved = self._disk.pwrite(fd, data, offset)
            if moved == len(data):
                return
            data = data[moved:]
            offset += moved

    def _abandon(self, segment: _Segment, start: int, nbytes: int) -> None:
        """Give bytes back that hold no record, if nobody has been given those after them."""
        with self._lock:
            segment.writers -= 1
            if segment.end == start + nbytes:
                segment.end = start
            else:
                segment.holes[start] = nbytes
            left = self._closed and not segment.writers
        if left:
            self._remove(segment)

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
            segment = segments.get(place >> _OFFSET_BITS)
            if segment is not None:
                try:
                    return self._read_from(segment, place & _OFFSET, slot, writable)
                except FileNotFoundError as error:
                    if table[slot] == place:
                        raise CorruptBlobError("the file is gone", path=segment.path) from error
            elif table[slot] == place:
                raise CorruptBlobError("its record is gone", path=self._directory)
            # It was moved between the two look-ups.

    def _read_from(self, segment: _Segment, offset: int, slot: int, writable: bool) -> Frames:
        memory = segment.memory
        try:
            if memory is not None:
                return parse(memory, offset, segment.room, slot, writable=writable)
            record = self._read_unmapped(segment, offset)
            return parse(record, 0, len(record), slot, writable=writable)
        except CorruptBlobError as error:
            raise CorruptBlobError(error.reason, path=segment.path) from error

    def _read_unmapped(self, segment: _Segment, offset: int) -> memoryview:
        """Read one record, by a descriptor that nobody else closes."""
        try:
            fd = self._disk.open(segment.path, _READ)
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
        segment = self._segments.get(self._table[slot] >> _OFFSET_BITS) if slot < len(self._table) else None
        return self._directory if segment is None else segment.path

    # ---------------------------------------------------------------- freeing and compaction

    def free(self, slots: Sequence[int], sizes: Sequence[int]) -> None:
        """Give slots up, whose records took these sizes; compact what is mostly dead by then.

        Raises
        ------
        StorageError
            A segment that nothing is needed of could not be removed. The slots are free all the same.
        """
        with self._lock:
            for slot, nbytes in zip(slots, sizes, strict=True):
                place = self._table[slot]
                self._table[slot] = _NOWHERE
                segment = self._segments.get(place >> _OFFSET_BITS)
                if segment is not None:
                    segment.live -= nbytes
            self._free += slots
            victim = self._mostly_dead()
        while victim is not None:
            if not self._compact(victim):
                return
            with self._lock:
                victim = self._mostly_dead()

    def _mostly_dead(self) -> _Segment | None:
        """Take a segment to be compacted, if there is one that is due. Under the lock."""
        active = self._active
        if active is not None and self._is_worth_sealing(active):
            active.sealed = True
            self._active = None
        for segment in self._segments.values():
            is_idle = segment.sealed and not segment.writers and not segment.moving
            if is_idle and 2 * segment.live < segment.end:
                segment.moving = True
                return segment
        return None

    def _is_worth_sealing(self, active: _Segment) -> bool:
        """Whether the active segment is mostly dead and not small, or all that is left and dead."""
        if active.live:
            return active.end > self._nbytes // 4 and 2 * active.live < active.end
        return active.end > 0 and not active.writers and len(self._segments) == 1

    def _compact_any(self) -> bool:
        """Compact the segment with most to gain, where there is no room; whether there was one."""
        with self._lock:
            active = self._active
            if active is not None and active.live < active.end:
                active.sealed = True
                self._active = None
            ready = [s for s in self._segments.values() if s.sealed and not s.writers and not s.moving]
            victim = max(ready, key=lambda s: s.end - s.live, default=None)
            if victim is None or victim.live == victim.end:
                return False
            victim.moving = True
        return self._compact(victim)

    def _compact(self, victim: _Segment) -> bool:
        """Move what is needed of a segment elsewhere, and remove it; whether that was done."""
        try:
            self._move_all(victim)
        except (CorruptBlobError, OSError):  # it stays as it is; what is damaged tells its reader
            if victim.live:
                return False
        with self._lock:
            if victim.live:
                return False
            self._segments.pop(victim.number, None)
        self._room.ledger.shrink(victim.counted)
        self._remove(victim)
        return True

    def _move_all(self, victim: _Segment) -> None:
        offset = 0
        memory = victim.memory
        if memory is None:
            memory = self._read_at(victim.fd, 0, victim.end)
        while victim.live and offset < victim.end:
            offset = self._move_some(victim, memory, offset)

    def _move_some(self, victim: _Segment, memory: memoryview, offset: int) -> int:
        """Move the records that are needed of the next stretch; return where it ends."""
        table, base = self._table, victim.number << _OFFSET_BITS
        pieces: list[memoryview] = []
        moved: list[tuple[int, int, int]] = []  # slot, former place, length
        size = 0
        while offset < victim.end and size < _CHUNK:
            if offset in victim.holes:
                offset += victim.holes[offset]
                continue
            try:
                slot, nbytes = length_of(memory, offset)
            except struct.error as error:
                raise CorruptBlobError("the segment ends early", path=victim.path) from error
            if slot < len(table) and table[slot] == base | offset:
                if offset + nbytes > victim.end:
                    raise CorruptBlobError("a record is longer than its segment", path=victim.path)
                pieces.append(memory[offset : offset + nbytes])
                moved.append((slot, base | offset, nbytes))
                size += nbytes
            offset += nbytes
        if pieces:
            self._move(victim, pieces, moved)
        return offset

    def _move(
        self, victim: _Segment, pieces: list[memoryview], moved: list[tuple[int, int, int]]
    ) -> None:
        # Where there is no room, making some by compaction would go round in a circle.
        segment, start = self._write(b"".join(pieces), self._room.reserve)
        place = segment.number << _OFFSET_BITS | start
        with self._lock:
            for slot, former, nbytes in moved:
                if self._table[slot] == former:
                    self._table[slot] = place
                    segment.live += nbytes
                    victim.live -= nbytes
                place += nbytes
            segment.writers -= 1

    # ------------------------------------------------------------------------- the end

    def _remove(self, segment: _Segment) -> None:
        """Remove a segment's file; readers of its map go on."""
        try:
            self._disk.close(segment.fd)
            self._disk.unlink(segment.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._room.error("remove", segment.path, error) from error

    def close(self) -> None:
        """Remove all files. What is being written fails; a second call does nothing.

        Raises
        ------
        StorageError
            One could not be removed; the others are.
        """
        with self._lock:
            self._closed = True
            segments = list(self._segments.values())
            self._segments.clear()
            self._active = None
            idle = [segment for segment in segments if not segment.writers]
        failure: StorageError | None = None
        for segment in idle:  # of the others, the last writer does it
            try:
                self._remove(segment)
            except StorageError as error:
                failure = failure or error
        if failure is not None:
            raise failure
