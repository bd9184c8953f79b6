"""Records of many small blobs, appended to a few files.

Guarantees
----------
- What has been written is never written again: a segment only grows, and is removed as a whole when
  nothing in it is needed (invariant 2). A record is found only after it was written whole.
- A failed write leaves nothing that is found, and no bytes that count as used for longer than until
  their segment is compacted (invariant 9).
- Compaction stops nobody: it copies what is still needed of a segment that is mostly dead to the end of
  the newest one, and moves each slot at one instant. Who reads meanwhile keeps the old map. What is damaged
  stays where it is, and keeps its segment until it is freed.
- A file is removed, and its descriptor closed, by the last who uses it: never under a writer, and once.
- No lock is held during a system call.

Where a record is
-----------------
A slot, a small number that is used again, leads to the record's segment and offset through a table of
eight bytes a slot; so compaction can move the record without telling anybody. ``_lock`` guards the
table, the free slots, and every field of every segment.

Space
-----
A sealed segment is compacted when less than half of its bytes are needed, so that segments take at most
twice what is needed and one segment. Room for one more segment is kept for compaction, or for all there is
where that is less. After log-structured storage: Rosenblum and Ousterhout, 1992.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

import numpy as np

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError, StorageError
from fbcache.store.disk import Disk
from fbcache.store.mapping import try_map
from fbcache.store.records import HEAD_SIZE, body_of, head_of, length_of, parse, whole_length_of
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
        Open for as long as it is written to; -1 afterwards.
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
    users : int
        Who is writing to it, compacting it or removing it now.
    damaged : bool
        Whether a record could not be moved, so that it stays until nothing of it is needed.
    stuck : bool
        Whether its file could not be removed, which is tried again at the end.
    """

    __slots__ = (
        "counted",
        "damaged",
        "end",
        "fd",
        "live",
        "memory",
        "number",
        "path",
        "room",
        "stuck",
        "users",
    )

    def __init__(self, number: int, path: str, room: int) -> None:
        self.number = number
        self.path = path
        self.fd = -1
        self.memory: memoryview | None = None
        self.room = room
        self.end = self.counted = self.live = self.users = 0
        self.damaged = self.stuck = False


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
        self._active: _Segment | None = None  # the one that is appended to
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
            One is larger than a record can be; none of them is there.
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
                table[slot] = _NOWHERE
            raise
        return place - start

    def _take_slots(self, count: int) -> list[int]:
        with self._lock:
            free, table = self._free, self._table
            taken = free[max(len(free) - count, 0) :]
            del free[len(free) - len(taken) :]
            fresh = count - len(taken)
            taken += range(len(table), len(table) + fresh)
            table.extend([_NOWHERE] * fresh)
            return taken

    def _write(self, data: bytes, reserve: Callable[[int], None], publish: Callable[[int], int]) -> None:
        """Write ``data`` somewhere. ``publish`` hears where, under the lock, and says how much is needed."""
        nbytes = len(data)
        reserve(nbytes)
        grown = False
        allotted: list[tuple[_Segment, int]] = []
        try:
            try:
                self._allot(nbytes, allotted)
                segment, start = allotted[0]
                self._write_at(segment.fd, data, start)
                grown = self._room.ledger.grow(nbytes)
                with self._lock:
                    if self._closed or not grown:
                        raise self._room.closed_error()
                    needed = publish(segment.number << _OFFSET_BITS | start)
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

    def _allot(self, nbytes: int, allotted: list[tuple[_Segment, int]]) -> None:
        """Give out ``nbytes`` at the end of the active segment, or of a new one: segment and offset."""
        made: list[_Segment] = []
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

    def _succeed(self, segment: _Segment) -> None:
        former = self._active
        if former is not None:
            self._seal(former)
        self._active = segment
        self._segments[segment.number] = segment

    def _seal(self, active: _Segment) -> None:
        """Append to it no more. Under the lock; close what is spent afterwards."""
        self._active = None
        if not active.users:
            self._retire(active)

    def _make(self, room: int, made: list[_Segment]) -> None:
        with self._lock:
            number = self._made
            self._made += 1
        segment = _Segment(number, f"{self._directory}/{number}.segment", room)
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

    def _abandon(self, segment: _Segment, start: int, nbytes: int) -> None:
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

    def _retire_after(self, segment: _Segment) -> None:
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
        self._forget(slots, sizes)
        while (victim := self._take_due()) is not None:
            if not self._compact(victim) and not victim.damaged:
                return

    def _forget(self, slots: Sequence[int], sizes: Sequence[int]) -> None:
        with self._lock:
            for slot, nbytes in zip(slots, sizes, strict=True):
                place = self._table[slot]
                self._table[slot] = _NOWHERE
                segment = self._segments.get(place >> _OFFSET_BITS)
                if segment is not None:
                    segment.live -= nbytes
            self._free += slots

    def _take_due(self) -> _Segment | None:
        """Take a segment to be compacted, if one is mostly dead: that of which least is needed."""
        with self._lock:
            active = self._active
            if active is not None and self._is_worth_sealing(active):
                self._seal(active)
            due = [s for s in self._segments.values() if self._is_idle(s) and 2 * s.live < s.end]
            victim = min(due, key=lambda s: s.live, default=None)
            if victim is not None:
                victim.users += 1
        self._close_spent()
        return victim

    def _is_worth_sealing(self, active: _Segment) -> bool:
        """Whether the active segment is mostly dead, and not small or all that is left and dead."""
        if 2 * active.live >= active.end:
            return False
        return active.end > self._nbytes // 4 or not (
            active.live or active.users or len(self._segments) > 1
        )

    def _is_idle(self, segment: _Segment) -> bool:
        """Whether the segment can be compacted, or removed where nothing of it is needed."""
        is_used = segment is self._active or segment.users or segment.stuck
        return not (is_used or (segment.damaged and segment.live))

    def make_room(self) -> bool:
        """Compact the segment with most to gain, where there is no room; whether one was removed.

        Raises
        ------
        StorageError
            It could not be removed.
        """
        free = self._room.bytes_free
        with self._lock:
            active = self._active
            if active is not None and not active.users and active.live < active.end:
                self._seal(active)
            idle = [s for s in self._segments.values() if self._is_idle(s)]
            ready = [s for s in idle if s.live < s.end and s.live <= free]
        self._close_spent()
        ready.sort(key=lambda s: s.live - s.end)
        return any(self._take(segment) and self._compact(segment) for segment in ready)

    def _take(self, segment: _Segment) -> bool:
        with self._lock:
            is_free = self._is_idle(segment) and segment.number in self._segments
            segment.users += is_free
        return is_free

    def _compact(self, victim: _Segment) -> bool:
        """Move what is needed of a segment elsewhere, and remove it; whether that was done."""
        try:
            self._move_all(victim)
        except OSError:  # it stays as it is, and is tried again
            pass
        finally:
            with self._lock:
                is_needless = self._closed or not victim.live
                victim.users -= not is_needless
            if is_needless:
                self._remove(victim)
        return is_needless

    def _move_all(self, victim: _Segment) -> None:
        memory = victim.memory
        if memory is None:
            memory = self._read_whole(victim)
        pieces: list[memoryview] = []
        moved: list[tuple[int, int, int]] = []  # slot, former place, length
        size = 0
        for place, slot in self._places_in(victim):
            offset = place & _OFFSET
            nbytes = whole_length_of(memory, offset, min(victim.end, len(memory)), slot)
            if not nbytes:  # it tells its reader
                victim.damaged = True
                continue
            pieces.append(memory[offset : offset + nbytes])
            moved.append((slot, place, nbytes))
            size += nbytes
            if size >= _CHUNK:
                self._move(victim, pieces, moved)
                pieces, moved, size = [], [], 0
        if pieces:
            self._move(victim, pieces, moved)

    def _places_in(self, segment: _Segment) -> list[tuple[int, int]]:
        """Where the records are that are needed of a segment, in their order, with their slots."""
        with self._lock:
            places = np.array(self._table, np.uint64)
        slots = np.flatnonzero(places >> np.uint64(_OFFSET_BITS) == segment.number)
        return sorted(zip(places[slots].tolist(), slots.tolist(), strict=True))

    def _read_whole(self, segment: _Segment) -> memoryview:
        fd = self._disk.open(segment.path, _READ)
        try:
            memory = memoryview(bytearray(segment.end))
            return memory[: read_all(self._disk, fd, [memory], 0)]
        finally:
            self._disk.close(fd)

    def _move(
        self, victim: _Segment, pieces: list[memoryview], moved: list[tuple[int, int, int]]
    ) -> None:
        # Where there is no room, making some by compaction would go round in a circle.
        publish = lambda place: self._repoint(victim, moved, place)  # noqa: E731
        self._write(b"".join(pieces), self._room.reserve, publish)

    def _repoint(self, victim: _Segment, moved: list[tuple[int, int, int]], place: int) -> int:
        """Have slots lead from their former place to that from ``place`` on. Under the lock."""
        table, needed = self._table, 0
        changed: list[tuple[int, int]] = []
        try:
            for slot, former, nbytes in moved:
                if table[slot] == former:
                    changed.append((slot, former))
                    table[slot] = place
                    needed += nbytes
                place += nbytes
        except BaseException:  # an interrupt
            for slot, former in changed:
                table[slot] = former
            raise
        victim.live -= needed
        return needed

    # ------------------------------------------------------------------------- the end

    def _retire(self, segment: _Segment) -> None:
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

    def _remove(self, segment: _Segment) -> None:
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

    def _claim(self, empty: _Segment) -> None:
        """Become the only user of a segment that has none, and is to be removed. Under the lock."""
        empty.users = 1
        self._segments[empty.number] = empty
        if empty is self._active:
            self._active = None
        self._retire(empty)

    def _discard(self, empty: _Segment) -> None:
        """Remove a segment that was claimed; what fails is tried again at the end."""
        self._close_spent()
        try:
            self._remove(empty)
        except StorageError:
            pass

    def close(self) -> None:
        """Remove all files. What is being written fails; a second call removes what the first could not.

        Raises
        ------
        StorageError
            One could not be removed; the others are.
        """
        with self._lock:
            self._closed = True
            self._active = None
            idle = [segment for segment in self._segments.values() if not segment.users]
            used = [segment for segment in self._segments.values() if segment.users]
            for segment in idle:
                self._claim(segment)
        self._close_spent()
        failure: StorageError | None = None
        for segment in idle:
            try:
                self._remove(segment)
            except StorageError as error:
                failure = failure or error
        for segment in used:  # the last user closes it; one who was interrupted would not remove it
            try:
                self._disk.unlink(segment.path)
            except OSError:
                pass
        if failure is not None:
            raise failure
