"""What the pool asks of a place for blobs.

Guarantee of every store: a blob is visible under its key whole or not at all, and never
changes once visible (invariants 1 and 2); a failed write leaves nothing behind
(invariant 9). All methods may be called from any thread, for different keys at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from fbcache.codec.frames import Frames


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Checked before each write.

    Attributes
    ----------
    max_disk : int or None
        Most bytes that the store may hold; None for no bound.
    min_free : int
        Bytes of the file system that the store leaves free.
    """

    max_disk: int | None = None
    min_free: int = 0


class BlobStore(Protocol):
    """Blobs by key."""

    def write(self, key: UUID, frames: Frames) -> int:
        """Store ``frames`` under ``key`` and return the bytes taken on disk.

        Raises
        ------
        DiskFullError
            A limit or the disk itself is in the way.
        StorageError
            Any other failure of the storage.

        After either, nothing is stored under ``key``, no file is left, and a later write of
        the same key works.
        """
        ...

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        """Return the frames stored under ``key``.

        Parameters
        ----------
        writable : bool
            Whether the buffers must be fresh, writeable memory; otherwise they are read-only and
            may be views of the page cache.
        verify : bool
            Whether each buffer is compared with its checksum. The header, key and length
            are always checked.

        Raises
        ------
        CorruptBlobError
            The blob is missing, damaged, or another key's.
        StorageError
            It could not be read.
        """
        ...

    def delete(self, key: UUID) -> None:
        """Remove the blob. One that is gone already is no error.

        Raises
        ------
        StorageError
            It is there and could not be removed.
        """
        ...

    def locate(self, key: UUID) -> str:
        """Return where the blob of ``key`` is, or would be, for messages."""
        ...

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk now, blobs being written included."""
        ...

    @property
    def bytes_free(self) -> int:
        """Bytes that a write may still take before a limit is met."""
        ...

    @property
    def path(self) -> str:
        """Where the blobs are, for messages."""
        ...

    def close(self) -> None:
        """Remove what this store made, and release its directory. May be called twice."""
        ...
