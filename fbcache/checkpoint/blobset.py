"""The blobs of a tracked directory, as this process's writer knows them: present, pinned, durable.

Guarantees
----------
- ``_present`` has exactly the keys whose blobs are whole under their names, packs among them; ``_durable``
  those of them that survive a power loss. ``_packs`` are those that are packs, ``_packed`` the contents that
  a checkpoint has in one. What is in a pack that is not in ``_packs`` is not present.
- A blob whose fsync failed is never synced again: it is copied into a new file first, with its
  checksums verified.
- The files of one key are changed by one at a time.

``_lock`` guards the sets and counters, and is never held during I/O. Who changes the files of a key holds the
right to it in ``_changing``, and waits for no other while he does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias
from uuid import UUID

from fbcache.checkpoint.manifest import Blob, Pack
from fbcache.checkpoint.packs import CODEC, frames_of
from fbcache.checkpoint.places import Places
from fbcache.checkpoint.rights import Rights
from fbcache.codec.frames import Buffer, Frames
from fbcache.codec.layout import BlobHeader, pack
from fbcache.errors import CorruptBlobError, StorageError
from fbcache.store.blobfile import BlobFile
from fbcache.store.disk import Disk
from fbcache.store.syncing import FanOut, NotDurableError, make_durable, one_by_one
from fbcache.store.transfer import write_all
from fbcache.store.transplant import copy_checked, transplant
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_PIN = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

#: Keys whose file failed to become durable: a link to it would carry the failure over.
_DOUBTFUL: set[UUID] = set()

#: Makes the file of a blob that is not present.
Fetch: TypeAlias = "Callable[[BlobSet], None]"


class BlobSet:
    """Blobs by key, and their files in ``places``."""

    def __init__(self, disk: Disk, places: Places) -> None:
        self.places = places
        self.disk = disk
        self._lock = threading.Lock()
        self._changing: Rights[UUID] = Rights()
        self._present: dict[UUID, Blob | None] = {}
        self._packs: set[UUID] = set()
        self._packed: dict[UUID, Blob] = {}
        self._pins: set[UUID] = set()
        self._new_pins: set[UUID] = set()  # not durable yet
        self._durable: set[UUID] = set()
        self._renew: set[UUID] = set()  # in place, but of doubtful durability

    @property
    def root(self) -> str:
        """The directory's real path."""
        return self.places.root

    # ------------------------------------------------------------------------------ keys

    def keys(self) -> list[UUID]:
        """Return the keys of the contents present, packed ones included."""
        with self._lock:
            packs = self._packs
            keys = dict.fromkeys(key for key in self._present if key not in packs)
            keys.update((key, None) for key, blob in self._packed.items() if _is_in(blob, packs))
            return list(keys)

    def has(self, key: UUID) -> bool:
        """Whether the content of ``key`` is present: a dictionary look-up."""
        if key in self._present and key not in self._packs:
            return True
        return _is_in(self._packed.get(key), self._packs)

    def known(self, key: UUID) -> Blob | None:
        """Return what is known of the content of ``key``: a dictionary look-up. ``nbytes`` may be 0."""
        blob = self._present.get(key)
        if blob is None or key in self._packs:
            blob = self._packed.get(key)
            return blob if _is_in(blob, self._packs) else None
        return blob

    def bring_in(self, key: UUID, fetch: Fetch) -> Blob:
        """Have the blob of ``key`` here in a file of its own; nothing is done where it is.

        Parameters
        ----------
        fetch : callable
            Makes its file, by :meth:`link` or :meth:`write`.

        Returns
        -------
        Blob
            What its header says; ``nbytes`` is 0, for a file does not know it.

        Raises
        ------
        CorruptBlobError
            The source is damaged, or gone; or the file here is a pack.
        StorageError
            It could not be linked or copied; nothing is left.
        """
        self._refuse_pack(key)
        with self._changing.exclusively(key):
            return self._bring_in(key, fetch)

    def _refuse_pack(self, key: UUID) -> None:
        if key in self._packs:  # as only a forged checkpoint can have it
            raise CorruptBlobError("it is a pack, and no value", key=key, path=self.places.blob(key))

    def _bring_in(self, key: UUID, fetch: Fetch) -> Blob:
        known = self._present.get(key)
        if known is not None:
            return known
        fetched = key not in self._present
        try:
            if fetched:
                fetch(self)
            blob = self._describe(key)
        except BaseException:
            if fetched:
                self._discard(self.places.blob(key))
            raise
        with self._lock:
            self._present[key] = blob
        return blob

    def bring_in_pack(self, key: UUID, records: Buffer) -> Pack:
        """Have a pack of these records here. Its key is the caller's, made for it.

        Raises
        ------
        StorageError
            It could not be written; nothing is left.
        """
        with self._lock:
            self._packs.add(key)
        try:
            with self._changing.exclusively(key):
                blob = self._bring_in(key, lambda blobs: blobs.write(key, frames_of(records)))
        except BaseException:
            with self._lock:
                if key not in self._present:
                    self._packs.discard(key)
            raise
        return Pack(key, blob.disk_bytes, blob.digest)

    def link(self, key: UUID, source: str) -> None:
        """Give the blob file ``source`` a place here; for ``fetch``."""
        target, temporary = self.places.blob(key), self.places.temporary(key)
        if key in _DOUBTFUL:
            self._in_shard(key, lambda: copy_checked(self.disk, source, target, temporary, key))
        else:
            self._in_shard(key, lambda: transplant(self.disk, source, target, temporary))

    def write(self, key: UUID, frames: Frames) -> None:
        """Write a blob that comes from no file; for ``fetch``."""
        self._in_shard(key, lambda: self._write(key, frames))

    def _write(self, key: UUID, frames: Frames) -> None:
        temporary = self.places.temporary(key)
        fd = self.disk.open(temporary, _NEW)
        try:
            try:
                write_all(self.disk, fd, pack(key, frames).pieces)
            finally:
                self.disk.close(fd)
            self.disk.rename(temporary, self.places.blob(key))
        except BaseException:
            self._discard(temporary)
            raise

    def _in_shard(self, key: UUID, make: Callable[[], object]) -> None:
        """Call ``make``, with the shard made first if it is missing."""
        try:
            try:
                make()
            except FileNotFoundError:
                self.disk.makedirs(self.places.shard(key))
                make()
        except FileNotFoundError as error:
            path = str(error.filename or "")
            raise CorruptBlobError("the file is gone", key=key, path=path) from error
        except OSError as error:
            raise storage_error("write", self.places.blob(key), error, self.disk) from error

    def _describe(self, key: UUID) -> Blob:
        """Return what the header of the blob here says, which the disk may begin to write."""
        path = self.places.blob(key)
        header = read_header(self.disk, key, path, path, start_writing=True)
        return Blob(0, header.nbytes, header.codec, header.pickled, header.digest)

    def is_pack(self, key: UUID) -> bool:
        """Whether the file of ``key`` is a pack, as its header says; not so if it cannot be read."""
        path = self.places.blob(key)
        try:
            return read_header(self.disk, key, path, path).codec == CODEC
        except (CorruptBlobError, StorageError):
            return False

    def _pin(self, key: UUID) -> None:
        """Keep the blob of ``key``, whose right the caller has, until it is deleted."""
        if key in self._pins:
            return
        try:
            self.disk.close(self.disk.open(self.places.pin(key), _PIN))
        except BaseException as error:
            self._discard(self.places.pin(key))
            if isinstance(error, OSError):
                raise storage_error("pin", self.places.blob(key), error, self.disk) from error
            raise
        with self._lock:
            self._pins.add(key)
            self._new_pins.add(key)

    def _unlink(self, path: str) -> None:
        try:
            self.disk.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error("remove", path, error, self.disk) from error

    def _discard(self, path: str) -> None:
        try:
            self.disk.unlink(path)
        except OSError:
            pass

    # ------------------------------------------------------------------------ durability

    def sync(self, fan_out: FanOut = one_by_one) -> None:
        """Make all blobs and pins that are present now durable."""
        with self._lock:
            keys = [key for key in self._present if key not in self._durable]
            pins = list(self._new_pins)
        self.make_durable(keys, fan_out, pins)

    def make_durable(
        self, keys: Iterable[UUID], fan_out: FanOut = one_by_one, pins: Collection[UUID] = ()
    ) -> None:
        """Make the files of ``keys``, all present, durable under their names.

        Raises
        ------
        StorageError
            It could not be done. What failed is copied before it is tried again.
        """
        with self._lock:
            pending = [key for key in keys if key not in self._durable]
            renewed = [key for key in pending if key in self._renew]
        if not pending and not pins:
            return
        for key in renewed:
            self._copy_anew(key)
        files = {self.places.blob(key): key for key in pending}
        shards = {self.places.shard(key) for key in (*pending, *pins)}
        try:
            make_durable(self.disk, self.root, files, [*shards, self.root], fan_out=fan_out)
        except NotDurableError as error:
            self._doubt(files[path] for path in error.files if path in files)
            raise storage_error("make durable", error.filename, error.cause, self.disk) from error
        except BaseException:  # a failure may have gone under with it
            self._doubt(pending)
            raise
        with self._lock:
            self._durable.update(key for key in pending if key in self._present)
            self._new_pins.difference_update(pins)

    def _doubt(self, keys: Iterable[UUID]) -> None:
        with self._lock:
            keys = list(keys)
            _DOUBTFUL.update(keys)
            self._renew.update(keys)

    def _copy_anew(self, key: UUID) -> None:
        """Put a new file in the place of a blob whose fsync failed."""
        path = self.places.blob(key)
        with self._changing.exclusively(key):
            try:
                copy_checked(self.disk, path, path, self.places.temporary(key), key)
            except OSError as error:
                raise storage_error("copy", path, error, self.disk) from error
            with self._lock:
                self._renew.discard(key)


def read_header(disk: Disk, key: UUID, file: str, path: str, *, start_writing: bool = False) -> BlobHeader:
    """Return the header of the blob of ``key`` in ``file``; errors name ``path``.

    Parameters
    ----------
    start_writing : bool
        Have the disk begin to write the file, as long as it is open anyway.

    Raises
    ------
    CorruptBlobError
        It is damaged.
    StorageError
        It could not be read.
    """
    try:
        fd = disk.open(file, _READ)
        try:
            header = BlobFile(disk, fd, key, path).header()
            if start_writing:
                disk.start_writing(fd)
        finally:
            disk.close(fd)
    except OSError as error:
        raise storage_error("read", path, error, disk) from error
    return header


def _is_in(blob: Blob | None, packs: set[UUID]) -> bool:
    return blob is not None and blob.pack is not None and blob.pack.key in packs
