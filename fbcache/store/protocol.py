"""What the pool asks of a place for blobs.

Guarantee of every store: a blob is visible under its key whole or not at all, and never
changes once visible (invariants 1 and 2); a failed write leaves nothing behind
(invariant 9). All methods may be called from any thread, for different keys at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from uuid import UUID

from fbcache.codec.frames import Frames
from fbcache.errors import StorageError


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


class Loan(Protocol):
    """A blob that stays in a place of somebody else's, who keeps it there until it is given back.

    Attributes
    ----------
    digest : int or None
        The checksum of its header, if it is known from elsewhere.
    nbytes : int
        Length of its file.
    """

    digest: int | None
    nbytes: int

    @property
    def path(self) -> str:
        """The file."""
        ...

    def release(self) -> None:
        """Give it back. Does not raise; a second call does nothing."""
        ...


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


@runtime_checkable
class FileBacked(Protocol):
    """A store whose blobs are files of their own, so that they can be linked instead of copied."""

    def file_of(self, key: UUID) -> str:
        """Return the file that is exactly the blob of ``key``, which was written by key or borrowed."""
        ...

    def borrow(self, key: UUID, loan: Loan) -> None:
        """Have ``key`` lead to the file of ``loan``, which :meth:`BlobStore.delete` gives back."""
        ...


@runtime_checkable
class Batching(Protocol):
    """A store that takes many blobs at once for less than one by one."""

    def write_many(self, items: Sequence[tuple[UUID, Frames]]) -> list[int | StorageError]:
        """Do :meth:`BlobStore.write` for each, and return what it would have returned, or raised."""
        ...


@runtime_checkable
class Packing(Protocol):
    """A store that packs small blobs together, and finds them by slots of its own instead of keys.

    A slot is a small number. It stays the blob's until it is freed, wherever the blob is moved meanwhile.

    Attributes
    ----------
    small : int
        Payload in bytes up to which frames are to be packed.
    """

    small: int

    def append(self, many: Sequence[Frames]) -> tuple[list[int], list[int]]:
        """Store each of ``many``; return their slots, and the bytes that each takes on disk.

        Raises
        ------
        StorageError
            As :meth:`BlobStore.write`; none of them is stored. ``errno.EMSGSIZE`` says that one is too
            large to be stored ever.
        """
        ...

    def at(self, slot: int, *, writable: bool) -> Frames:
        """Do what :meth:`BlobStore.read` does, always verified."""
        ...

    def free(self, slots: Sequence[int], sizes: Sequence[int]) -> None:
        """Remove blobs, which take these sizes, and reclaim their space without stopping anybody.

        Raises
        ------
        StorageError
            A file could not be removed. The slots are free all the same.
        """
        ...

    def path_of(self, slot: int) -> str:
        """Return the file that the blob is in, for messages."""
        ...
