"""Blobs as files: ``<directory>/<first two hex digits>/<32 hex digits>``.

Guarantees, beyond those of :mod:`fbcache.store.protocol`:

- A blob is written from its buffers' own memory under a temporary name and renamed into place,
  so that its own name only ever shows it whole. Nothing here opens a visible file for
  writing (invariant 2).
- Whatever ends a write early, the temporary file is removed and its room is given back
  (invariant 9).
- No descriptor outlives a call.
- Only files that this store wrote are removed (invariant 13).
- Nothing is synced: these files end with their session.

All methods may be called from any thread. No lock is held during a system call; the only one
is in :class:`~fbcache.store.ledger.Ledger`.
"""

from __future__ import annotations

import errno
import os
from uuid import UUID

from fbcache.codec.frames import Frames
from fbcache.codec.layout import pack
from fbcache.errors import CorruptBlobError, StorageError
from fbcache.store.blobfile import BlobFile
from fbcache.store.disk import DISK, Disk
from fbcache.store.ledger import Ledger
from fbcache.store.protocol import Loan, StoreLimits
from fbcache.store.room import Room
from fbcache.store.transfer import write_all

_NO_LIMITS = StoreLimits()

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL

#: A link is not followed, and a pipe in the blob's place must not hold the reader up.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

#: What stands in a blob's place, by the error that opening it gives.
_NOT_A_BLOB = {
    errno.ENOENT: "the file is gone",
    errno.ENOTDIR: "the file is gone",
    errno.ELOOP: "a symbolic link is in its place",
    errno.ENXIO: "a socket is in its place",
}


class FileStore:
    """A file for each blob, below one directory.

    Parameters
    ----------
    directory : str
        Where the blobs go. It must exist, be private to this user, and serve no other store.
    limits : StoreLimits
        Checked before each write.
    mmap : bool
        Whether large blobs are read by mapping them. If not, or while there are too many maps,
        they are read into fresh memory.
    disk : Disk
        The system calls.
    ledger : Ledger, optional
        That of another store which shares the limits; ``limits`` is then of no account.
    """

    def __init__(
        self,
        directory: str,
        *,
        limits: StoreLimits = _NO_LIMITS,
        mmap: bool = True,
        disk: Disk = DISK,
        ledger: Ledger | None = None,
    ) -> None:
        self._directory = directory
        self._mmap = mmap
        self._disk = disk
        self._ledger = Ledger(limits) if ledger is None else ledger
        self._room = Room(directory, self._ledger, disk)
        self._loans: dict[UUID, Loan] = {}

    # ------------------------------------------------------------------ blobs

    def write(self, key: UUID, frames: Frames) -> int:
        """Store ``frames`` under ``key`` and return the bytes taken on disk.

        Raises
        ------
        DiskFullError
            ``max_disk`` or ``min_free`` forbids it, and nothing was begun; or the disk is full.
        StorageError
            Any other failure of the storage, or the store is closed.

        After either, no file is left of this write, its room is given back, and a later write of
        the same key works.
        """
        plan = pack(key, frames)
        self._room.reserve(plan.nbytes)
        kept = False
        try:
            self._write_file(key.hex, plan.pieces)
            kept = self._ledger.commit(key, plan.nbytes)
        except OSError as error:
            raise self._room.write_error(error, plan.nbytes) from error
        finally:
            if not kept:
                self._ledger.release(plan.nbytes)
        if not kept:
            self._discard(self._path_of(key.hex))
            self._remove_shard(key.hex[:2])
            raise self._room.closed_error()
        return plan.nbytes

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        """Return the frames stored under ``key``.

        Parameters
        ----------
        writable : bool
            Whether the buffers must be fresh, writeable memory; otherwise they are read-only, and
            those of a large blob are views of the page cache.
        verify : bool
            Whether each buffer is compared with its checksum. The header, key and length
            are always checked.

        Raises
        ------
        CorruptBlobError
            The blob is missing, damaged, another key's, or something else is in its place.
        StorageError
            It could not be read.

        Nothing is changed by either, and no descriptor or map is left.
        """
        loan = self._loans.get(key)
        path = self.file_of(key)
        try:
            fd = self._disk.open(path, _READ)
        except OSError as error:
            directory = os.path.dirname(os.path.dirname(path))
            if error.errno in _NOT_A_BLOB and self._disk.exists(directory):
                raise CorruptBlobError(_NOT_A_BLOB[error.errno], key=key, path=path) from error
            raise self._room.error("read", path, error) from error
        try:
            file = BlobFile(self._disk, fd, key, path, None if loan is None else loan.digest)
            return file.read(may_map=self._mmap and not writable, writable=writable, verify=verify)
        except OSError as error:
            raise self._room.error("read", path, error) from error
        finally:
            self._disk.close(fd)

    def delete(self, key: UUID) -> None:
        """Remove the blob. One that is gone already is no error.

        Raises
        ------
        StorageError
            It is there and could not be removed; it still counts, and may be deleted again.
        """
        loan = self._loans.pop(key, None)
        if loan is not None:
            loan.release()
            return
        path = self._path_of(key.hex)
        try:
            self._disk.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise self._room.error("remove", path, error) from error
        self._ledger.forget(key)

    def locate(self, key: UUID) -> str:
        """Return the path of the blob of ``key``, whether it is there or not."""
        return self.file_of(key)

    def file_of(self, key: UUID) -> str:
        """Return the file that is exactly the blob of ``key``; see :class:`~.protocol.FileBacked`."""
        loan = self._loans.get(key)
        return self._path_of(key.hex) if loan is None else loan.path

    def borrow(self, key: UUID, loan: Loan) -> None:
        """Have ``key`` lead to the file of ``loan``, until it is deleted or the store is closed."""
        self._loans[key] = loan

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
        """Remove the blobs that this store wrote, and their directories unless others' files are there.

        May be called twice. A write that is under way takes its file away itself and fails.

        Raises
        ------
        StorageError
            A file could not be removed. All others are; the store is closed.
        """
        while self._loans:
            self._loans.popitem()[1].release()
        keys, shards = self._ledger.close()
        failure: StorageError | None = None
        for key in keys:
            try:
                self.delete(key)
            except StorageError as error:
                failure = failure or error
        for shard in shards:
            self._remove_shard(shard)
        if failure is not None:
            raise failure

    # ------------------------------------------------------------------ files

    def _path_of(self, name: str) -> str:
        return f"{self._directory}/{name[:2]}/{name}"

    def _write_file(self, name: str, pieces: list[memoryview]) -> None:
        """Make the file ``name`` of ``pieces``, or leave none."""
        shard = name[:2]
        temporary = f"{self._directory}/{shard}/.{name}.tmp"
        fd = self._create(shard, temporary)
        try:
            try:
                write_all(self._disk, fd, pieces)
            finally:
                self._disk.close(fd)
            self._disk.rename(temporary, self._path_of(name))
        except BaseException:
            self._discard(temporary)
            raise

    def _create(self, shard: str, temporary: str) -> int:
        """Open ``temporary`` as a new file, once more if what is in the way can be mended."""
        try:
            return self._disk.open(temporary, _WRITE)
        except FileNotFoundError:
            self._make_shard(shard)
        except FileExistsError:  # left by a write of this key that died; never a visible file
            self._disk.unlink(temporary)
        return self._disk.open(temporary, _WRITE)

    def _make_shard(self, shard: str) -> None:
        try:
            self._disk.mkdir(f"{self._directory}/{shard}")
        except FileExistsError:  # another thread was first
            return
        self._ledger.add_shard(shard)

    def _remove_shard(self, shard: str) -> None:
        try:
            self._disk.rmdir(f"{self._directory}/{shard}")
        except OSError:  # not empty, gone, or not ours to remove: it holds nothing of ours
            pass

    def _discard(self, path: str) -> None:
        """Remove ``path`` after a failure, which is what the caller hears of, not this."""
        try:
            self._disk.unlink(path)
        except OSError:
            pass
