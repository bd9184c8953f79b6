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

from collections.abc import Sequence
from typing import Final

import numpy as np

from fbcache.errors import StorageError
from fbcache.store.appending import Appending
from fbcache.store.records import whole_length_of
from fbcache.store.segment import OFFSET, OFFSET_BITS, READ, Segment
from fbcache.store.transfer import read_all

_CHUNK: Final = 1 << 20  # bytes that compaction copies at a time


class Segments(Appending):
    """Records by slot, and their space made use of again; see the module."""

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

    def _take_due(self) -> Segment | None:
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

    def _is_worth_sealing(self, active: Segment) -> bool:
        """Whether the active segment is mostly dead, and not small or all that is left and dead."""
        if 2 * active.live >= active.end:
            return False
        return active.end > self._nbytes // 4 or not (
            active.live or active.users or len(self._segments) > 1
        )

    def _is_idle(self, segment: Segment) -> bool:
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

    def _take(self, segment: Segment) -> bool:
        with self._lock:
            is_free = self._is_idle(segment) and segment.number in self._segments
            segment.users += is_free
        return is_free

    def _compact(self, victim: Segment) -> bool:
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

    def _move_all(self, victim: Segment) -> None:
        memory = victim.memory
        if memory is None:
            memory = self._read_whole(victim)
        pieces: list[memoryview] = []
        moved: list[tuple[int, int, int]] = []  # slot, former place, length
        size = 0
        for place, slot in self._places_in(victim):
            offset = place & OFFSET
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

    def _places_in(self, segment: Segment) -> list[tuple[int, int]]:
        """Where the records are that are needed of a segment, in their order, with their slots."""
        with self._lock:
            places = np.array(self._table, np.uint64)
        slots = np.flatnonzero(places >> np.uint64(OFFSET_BITS) == segment.number)
        return sorted(zip(places[slots].tolist(), slots.tolist(), strict=True))

    def _read_whole(self, segment: Segment) -> memoryview:
        fd = self._disk.open(segment.path, READ)
        try:
            memory = memoryview(bytearray(segment.end))
            return memory[: read_all(self._disk, fd, [memory], 0)]
        finally:
            self._disk.close(fd)

    def _move(
        self, victim: Segment, pieces: list[memoryview], moved: list[tuple[int, int, int]]
    ) -> None:
        # Where there is no room, making some by compaction would go round in a circle.
        publish = lambda place: self._repoint(victim, moved, place)  # noqa: E731
        self._write(b"".join(pieces), self._room.reserve, publish)

    def _repoint(self, victim: Segment, moved: list[tuple[int, int, int]], place: int) -> int:
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
