"""The default store: small blobs packed together, large ones in files of their own.

Guarantee: both halves keep to one set of limits, and what one of them promises stays true.

Where the line is
-----------------
A packed blob is copied when it is read and when a checkpoint takes it; one in a file can be mapped and
linked. A file's cost is that of its name: making, opening and removing it. Below the size from which files
are mapped, packing is faster at every size that was measured, two to eleven times (benchmarks/RESULTS.rst).
So ``SMALL`` is a little less than that.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from fbcache.codec.frames import Frames
from fbcache.errors import DiskFullError
from fbcache.store.disk import DISK, Disk
from fbcache.store.files import FileStore
from fbcache.store.packed import PackedStore
from fbcache.store.protocol import StoreLimits

#: Payload in bytes up to which a blob is packed.
SMALL: Final = 120 << 10

_NO_LIMITS = StoreLimits()


class AutoStore(FileStore):
    """A :class:`FileStore` for what goes by key, and a :class:`PackedStore` beside it by slot.

    Parameters
    ----------
    directory : str
        Where the files go. It must exist, be private to this user, and serve no other store.
    limits : StoreLimits
        Checked before each write, of either kind.
    mmap : bool
        Whether large blobs are read by mapping them.
    small : int
        Payload in bytes up to which a blob is packed; none is at -1.
    disk : Disk
        The system calls.
    """

    def __init__(
        self,
        directory: str,
        *,
        limits: StoreLimits = _NO_LIMITS,
        mmap: bool = True,
        small: int = SMALL,
        disk: Disk = DISK,
    ) -> None:
        super().__init__(directory, limits=limits, mmap=mmap, disk=disk)
        self.small = small
        self._packed = PackedStore(directory, limits=limits, disk=disk, ledger=self._ledger)
        self.append = self._packed.append
        self.at = self._packed.at
        self.free = self._packed.free
        self.path_of = self._packed.path_of

    def write(self, key: UUID, frames: Frames) -> int:
        """Store ``frames`` in a file; see :meth:`FileStore.write`. Dead packed space is reclaimed for it.

        Raises
        ------
        DiskFullError, StorageError
            Nothing is stored under ``key``.
        """
        while True:
            try:
                return super().write(key, frames)
            except DiskFullError:
                if not self._packed.make_room():
                    raise

    def close(self) -> None:
        """Remove the blobs of both kinds; see :meth:`FileStore.close`.

        Raises
        ------
        StorageError
            A file could not be removed. All others are; the store is closed.
        """
        try:
            super().close()
        finally:
            self._packed.close()
