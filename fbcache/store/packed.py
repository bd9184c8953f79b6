"""Small blobs packed together in a few files.

Guarantees, beyond those of :mod:`fbcache.store.protocol` and :mod:`fbcache.store.segments`:

- A read copies: what it returns keeps no file mapped.
- Only files that this store wrote are removed (invariant 13).
- Nothing is synced: these files end with their session.

``_lock`` guards ``_places``; it is never held during a system call.
"""

from __future__ import annotations

import sys
from threading import Lock
from uuid import UUID

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError
from fbcache.store.disk import DISK, Disk
from fbcache.store.ledger import Ledger
from fbcache.store.protocol import StoreLimits
from fbcache.store.room import Room
from fbcache.store.segment import SEGMENT
from fbcache.store.segments import Segments

_NO_LIMITS = StoreLimits()


class PackedStore:
    """Blobs appended to segments, by key or by slot.

    Parameters
    ----------
    directory : str
        Where the segments go. It must exist, be private to this user, and serve no other packed store.
    limits : StoreLimits
        Checked before each write. Dead space counts until it is reclaimed, which is done when there is no
        room otherwise.
    disk : Disk
        The system calls.
    ledger : Ledger, optional
        That of another store which shares the limits.
    segment : int, optional
        Bytes of a segment. Default: 32 MiB, or a sixteenth of ``max_disk`` if that is less.
    """

    #: Everything is packed, whatever its size.
    small = sys.maxsize

    def __init__(
        self,
        directory: str,
        *,
        limits: StoreLimits = _NO_LIMITS,
        disk: Disk = DISK,
        ledger: Ledger | None = None,
        segment: int | None = None,
    ) -> None:
        self._directory = directory
        self._ledger = Ledger(limits) if ledger is None else ledger
        self._room = Room(directory, self._ledger, disk)
        nbytes = _segment_for(limits) if segment is None else segment
        self._segments = Segments(directory, self._room, disk, nbytes=nbytes)
        self._lock = Lock()
        self._places: dict[UUID, tuple[int, int]] = {}
        self.append = self._segments.append
        self.free = self._segments.free
        self.path_of = self._segments.path_of
        self.make_room = self._segments.make_room

    def write(self, key: UUID, frames: Frames) -> int:
        """Store ``frames`` under ``key`` and return the bytes taken on disk.

        Raises
        ------
        DiskFullError
            ``max_disk`` or ``min_free`` forbids it, or the disk is full.
        StorageError
            Any other failure of the storage, or the store is closed.

        After either nothing is stored under ``key``, its room is given back, and a later write works.
        """
        (slot,), (nbytes,) = self._segments.append([frames])
        with self._lock:
            former = self._places.get(key)
            self._places[key] = slot, nbytes
        if former is not None:
            self._segments.free([former[0]], [former[1]])
        return nbytes

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        """Return the frames stored under ``key``, always verified.

        Raises
        ------
        CorruptBlobError
            The blob is missing or damaged.
        StorageError
            It could not be read.
        """
        while (place := self._places.get(key)) is not None:
            failure: CorruptBlobError | None = None
            try:
                frames = self._segments.read(place[0], writable=writable)
            except CorruptBlobError as error:
                failure = error
            if self._places.get(key) is not place:  # the slot may have been another blob's by then
                continue
            if failure is not None:
                raise CorruptBlobError(failure.reason, key=key, path=failure.path) from failure
            return frames
        raise CorruptBlobError("its record is gone", key=key, path=self._directory)

    def at(self, slot: int, *, writable: bool) -> Frames:
        """Return the frames of a slot; see :class:`~.protocol.Packing`."""
        return self._segments.read(slot, writable=writable)

    def delete(self, key: UUID) -> None:
        """Remove the blob. One that is gone already is no error.

        Raises
        ------
        StorageError
            A segment that nothing is needed of any more could not be removed.
        """
        with self._lock:
            place = self._places.pop(key, None)
        if place is not None:
            self._segments.free([place[0]], [place[1]])

    def locate(self, key: UUID) -> str:
        """Return the segment that the blob of ``key`` is in, or the directory."""
        place = self._places.get(key)
        return self._directory if place is None else self._segments.path_of(place[0])

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk now, dead ones included."""
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
        """Remove the segments. May be called twice; a write that is under way fails.

        Raises
        ------
        StorageError
            A file could not be removed. All others are; the store is closed.
        """
        self._ledger.close()
        with self._lock:
            self._places.clear()
        self._segments.close()


def _segment_for(limits: StoreLimits) -> int:
    return SEGMENT if limits.max_disk is None else max(min(SEGMENT, limits.max_disk // 16), 1)
