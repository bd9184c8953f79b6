"""One tracked directory, as this process has it: the writer's tenure, the keys, and their files.

Guarantees
----------
- All who use one real path in a process share one :class:`Directory`, and so one lock and one key set.
- What the writer finds on opening is made durable before anything is removed, so that opening
  twice finds the same; then leftovers are swept.
- ``present`` has exactly the keys whose blobs are whole under their names; ``durable`` those of them that
  survive a power loss. A blob whose fsync failed is never synced again: it is copied into a new
  file first, with its checksums verified.
- A blob is removed only when no manifest, pin, reader, loan or save under way needs it.

Locks
-----
``_tenure`` is held while the directory is opened, closed and scanned, and ``_turn`` for a whole save: they
are what excludes, as the lock file is, and files are touched under them. ``_lock`` guards the sets and
counters, and is never held during I/O. The order is ``_turn``, ``_tenure``, ``_lock``. A key whose files are
being changed is in ``_changing``, and others who want to change it wait for that; whoever has one key waits
for no other.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

from fbcache.checkpoint.loans import Loans, reader_directories
from fbcache.checkpoint.lock import Tenure, WriterLock
from fbcache.checkpoint.manifest import Blob, Manifest
from fbcache.checkpoint.places import Places
from fbcache.checkpoint.scanning import Swept, sweep, versions_in
from fbcache.checkpoint.versions import Versions
from fbcache.codec.frames import Frames
from fbcache.codec.layout import pack
from fbcache.errors import (
    CheckpointNotFoundError,
    CorruptBlobError,
    CorruptCheckpointError,
    DeadlockError,
    DirectoryInUseError,
    FBCacheError,
    FBCacheWarning,
    StorageError,
)
from fbcache.store.blobfile import BlobFile
from fbcache.store.disk import Disk
from fbcache.store.reaper import reap
from fbcache.store.syncing import FanOut, NotDurableError, make_durable, one_by_one
from fbcache.store.transfer import write_all
from fbcache.store.transplant import copy_checked, transplant
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_PIN = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

#: Keys whose file failed to become durable: a link to it would carry the failure over.
_DOUBTFUL: set[UUID] = set()


class Directory:
    """A tracked directory; see the module. Made by :func:`fbcache.checkpoint.registry.directory_at`."""

    def __init__(self, root: str, disk: Disk) -> None:
        self.places = Places(root)
        self.disk = disk
        self.versions = Versions(disk, self.places)
        self.loans = Loans(disk, self.places)
        self.swept = Swept()
        self.lost: deque[None] = deque()  # appended to by finalizers of objects that were not closed
        self._turn = threading.Lock()
        self._turn_owner = 0
        self._tenure = threading.Lock()
        self._writers = 0
        self._writer: WriterLock | None = None
        self._stamp = ""
        self._last_version = 0
        self._lock = threading.Condition(threading.Lock())
        self._changing: set[UUID] = set()
        self._claimed: Counter[UUID] = Counter()
        self._present: dict[UUID, Blob | None] = {}
        self._pins: set[UUID] = set()
        self._new_pins: set[UUID] = set()  # not durable yet
        self._durable: set[UUID] = set()
        self._renew: set[UUID] = set()  # in place, but of doubtful durability
        self._manifests: dict[int, Manifest] = {}
        self._unreadable: set[int] = set()
        self._referenced: Counter[UUID] = Counter()

    @property
    def root(self) -> str:
        """The directory's real path."""
        return self.places.root

    # ---------------------------------------------------------------------------- tenure

    @property
    def idle(self) -> bool:
        """Whether nobody in this process writes to it or reads from it."""
        return self._writers == 0 and self.loans.session_path is None and not self._turn.locked()

    def open_writer(self, tenure: Tenure, *, wait: bool = False) -> None:
        """Become the writer, or one more of this process.

        Raises
        ------
        DirectoryInUseError
            Another process is.
        StorageError
            The directory cannot be made, locked or read; nothing has changed.
        """
        with self._tenure:
            self._count_lost()
            if self._writers and self._writer is not None:
                if tenure is Tenure.OBJECT:
                    self._writer.stay()
                self._writers += 1
                return
            self._make()
            writer = WriterLock.acquire(self.places.lock, self.root, tenure, wait=wait, disk=self.disk)
            try:
                former = writer.former
                if former is not None:
                    self._last_version = max(self._last_version, former.last_version)
                if former is None or former.stamp != self._stamp:
                    self._scan()
            except BaseException as error:
                self._stamp = ""
                writer.release(self._last_version)
                if isinstance(error, OSError) and not isinstance(error, StorageError):
                    raise storage_error("open", self.root, error, self.disk) from error
                raise
            # Straight line.
            self._writer = writer
            self._stamp = writer.stamp
            self._writers = 1

    def close_writer(self) -> None:
        """Be the writer no more; with the last one of this process others may write."""
        with self._tenure:
            self._writers -= 1
            self._count_lost()

    def _count_lost(self) -> None:
        while self.lost:
            self.lost.popleft()
            self._writers -= 1
        if self._writers == 0 and self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.release(self._last_version)
            except StorageError as error:  # the lock is free all the same
                warnings.warn(str(error), FBCacheWarning, stacklevel=4)

    @contextmanager
    def writing(self, *, wait: bool = False) -> Iterator[None]:
        """Be the writer for the length of the block."""
        self.open_writer(Tenure.CALL, wait=wait)
        try:
            yield
        finally:
            self.close_writer()

    @contextmanager
    def turn(self, *, wait: bool = True) -> Iterator[None]:
        """Have the block to oneself among the saves of this process.

        Raises
        ------
        DirectoryInUseError
            Another save is under way, and ``wait`` is false.
        DeadlockError
            It is this thread's own.
        """
        me = threading.get_ident()
        if self._turn_owner == me:
            raise DeadlockError(f"a save to {self.root} is under way in this very thread; end that first")
        if not self._turn.acquire(blocking=wait):
            raise DirectoryInUseError(
                f"another save to {self.root} is under way in this process; wait=True waits for it",
                path=self.root,
                pid=os.getpid(),
            )
        try:
            self._turn_owner = me
            yield
        finally:
            self._turn_owner = 0
            self._turn.release()

    def abandon_in_child(self) -> None:
        """Let go of what is the parent's, in a forked child."""
        if self._writer is not None:
            self._writer.abandon_in_child()
        self.loans.abandon_in_child()

    def _make(self) -> None:
        try:
            self.disk.makedirs(self.places.checkpoints)
        except FileExistsError:
            error: OSError = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            raise storage_error("use", self.root, error, self.disk) from None
        except OSError as error:
            raise storage_error("make", self.root, error, self.disk) from error

    # -------------------------------------------------------------------------- scanning

    def _scan(self) -> None:
        """Learn what there is, after making it durable; sweep what a crash has left."""
        self._sync_skeleton()
        reap(self.places.readers, disk=self.disk)
        self._read_manifests()
        needed = None if self._unreadable else self._referenced.keys() | self._keys_of_readers()
        contents, swept = sweep(self.disk, self.places, needed, _Claimed(self._claimed))
        swept.kept = tuple(self.places.manifest(version) for version in sorted(self._unreadable))
        known = {
            key: blob
            for manifest in self._manifests.values()
            for key, blob in zip(manifest.keys, manifest.blobs, strict=True)
            if key in contents.blobs
        }
        with self._lock:
            self.swept = swept
            self._present = dict.fromkeys(contents.blobs) | known
            self._durable = set(known)
            self._pins = contents.pins
            self._new_pins = set(contents.pins)
            self._renew.clear()

    def sweep_again(self) -> Swept:
        """Remove what nothing refers to; for the writer, in its turn. What opening has swept counts too."""
        first, self.swept = self.swept, Swept()
        reap(self.places.readers, disk=self.disk)
        try:
            needed = None if self._unreadable else self._referenced.keys() | self._keys_of_readers()
            contents, swept = sweep(self.disk, self.places, needed, _Claimed(self._claimed))
        except OSError as error:
            raise storage_error("sweep", self.root, error, self.disk) from error
        with self._lock:
            for key in [k for k in self._present if k not in contents.blobs and k not in self._claimed]:
                del self._present[key]
                self._durable.discard(key)
        kept = tuple(self.places.manifest(version) for version in sorted(self._unreadable))
        return Swept(
            first.blobs + swept.blobs, first.files + swept.files, first.nbytes + swept.nbytes, kept
        )

    def _sync_skeleton(self) -> None:
        """Make the names of the directories durable, and what manifests there are."""
        above = os.path.dirname(self.root)
        try:
            self._sync_directory(above)
        except PermissionError:  # not ours to read; then it was there before us
            pass
        for path in (self.root, self.places.own, self.places.checkpoints):
            self._sync_directory(path)

    def _sync_directory(self, path: str) -> None:
        fd = self.disk.open(path, _DIRECTORY)
        try:
            self.disk.fsync(fd)
        finally:
            self.disk.close(fd)

    def _read_manifests(self) -> None:
        manifests: dict[int, Manifest] = {}
        unreadable: set[int] = set()
        referenced: Counter[UUID] = Counter()
        for version in self.versions.numbers():
            self._last_version = max(self._last_version, version)
            try:
                manifest = self.versions.read(version)
            except CorruptCheckpointError:
                unreadable.add(version)
                continue
            manifests[version] = manifest
            referenced.update(manifest.keys)
        with self._lock:
            self._manifests, self._unreadable, self._referenced = manifests, unreadable, referenced

    def _keys_of_readers(self) -> set[UUID]:
        """Return the keys that other living readers' manifests name, and the loans of this process."""
        keys = self.loans.keys()
        own = self.loans.session_path
        for session in reader_directories(self.disk, self.places):
            if session == own:
                continue
            for version in versions_in(self.disk, session):
                try:
                    keys.update(self.versions.read(version, session).keys)
                except CheckpointNotFoundError:  # the reader has gone meanwhile
                    pass
        return keys

    # ------------------------------------------------------------------------------ keys

    def keys(self) -> list[UUID]:
        """Return the keys present."""
        with self._lock:
            return list(self._present)

    def has(self, key: UUID) -> bool:
        """Whether the blob of ``key`` is present: a dictionary look-up."""
        return key in self._present

    def claim(self, keys: Iterable[UUID], claimed: list[UUID]) -> list[Blob | None]:
        """Keep the blobs of ``keys`` from being removed, and return what is known of each.

        ``claimed`` is extended by those that :meth:`disclaim` must be called for.
        """
        with self._lock:
            known = []
            for key in keys:
                self._claimed[key] += 1
                claimed.append(key)
                known.append(self._present.get(key))
            return known

    def disclaim(self, keys: Iterable[UUID]) -> None:
        """End what :meth:`claim` began. What nobody needs then is removed."""
        with self._lock:
            left = set()
            for key in keys:
                self._claimed[key] -= 1
                if self._claimed[key] <= 0:
                    del self._claimed[key]
                    if key in self._present and key not in self._pins and key not in self._referenced:
                        left.add(key)
        try:
            self._remove(left)
        except (OSError, FBCacheError):  # the next sweep comes by
            pass

    def bring_in(self, key: UUID, source: str) -> Blob:
        """Have the blob file ``source`` here too, under ``key``; nothing where it is present.

        Returns
        -------
        Blob
            What its header says; ``nbytes`` is 0, for a file does not know it.

        Raises
        ------
        CorruptBlobError
            The source is damaged, or gone.
        StorageError
            It could not be linked or copied; nothing is left.
        """
        with self._change(key):
            known = self._present.get(key)
            if known is not None:
                return known
            if key not in self._present:
                self._transplant(key, source)
            blob = self._describe(key)
            with self._lock:
                self._present[key] = blob
            return blob

    def write_in(self, key: UUID, frames: Frames) -> Blob:
        """Write ``frames``, which come from no file, as the blob of ``key``; else as :meth:`bring_in`."""
        with self._change(key):
            known = self._present.get(key)
            if known is not None:
                return known
            if key not in self._present:
                self._in_shard(key, lambda: self._write(key, frames))
            blob = self._describe(key)
            with self._lock:
                self._present[key] = blob
            return blob

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

    def _transplant(self, key: UUID, source: str) -> None:
        target, temporary = self.places.blob(key), self.places.temporary(key)
        if key in _DOUBTFUL:
            self._in_shard(key, lambda: copy_checked(self.disk, source, target, temporary, key))
        else:
            self._in_shard(key, lambda: transplant(self.disk, source, target, temporary))

    def _in_shard(self, key: UUID, make: object) -> None:
        """Call ``make``, with the shard made first if it is missing."""
        assert callable(make)
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
        """Return what the header of the blob here says."""
        path = self.places.blob(key)
        try:
            fd = self.disk.open(path, _READ)
            try:
                header = BlobFile(self.disk, fd, key, path).header()
            finally:
                self.disk.close(fd)
        except OSError as error:
            raise storage_error("read", path, error, self.disk) from error
        return Blob(0, header.nbytes, header.codec, header.pickled, header.digest)

    def pin(self, key: UUID) -> None:
        """Keep the blob of ``key``, which is claimed, until :meth:`delete` is called for it."""
        if key in self._pins:
            return
        with self._change(key):
            try:
                self.disk.close(self.disk.open(self.places.pin(key), _PIN))
            except OSError as error:
                raise storage_error("pin", self.places.blob(key), error, self.disk) from error
            with self._lock:
                self._pins.add(key)
                self._new_pins.add(key)

    def delete(self, key: UUID) -> bool:
        """Take the pin of ``key`` away, and its blob where nothing else needs it; whether the blob went.

        Raises
        ------
        KeyError
            It is not present.
        StorageError
            A file could not be removed.
        """
        if key not in self._present:
            raise KeyError(f"{self.root} has no blob of the key {key}")
        with self._change(key):
            if key in self._pins:
                self._unlink(self.places.pin(key))
                with self._lock:
                    self._pins.discard(key)
                    self._new_pins.discard(key)
        return self._remove({key}) == 1

    def _remove(self, keys: Collection[UUID]) -> int:
        """Remove the blobs of those ``keys`` that nothing needs; return how many went."""
        if not keys or self._unreadable:
            return 0
        read = self._keys_of_readers()
        removed = 0
        for key in keys:
            with self._change(key):
                with self._lock:
                    needed = key in self._pins or key in self._referenced or key in self._claimed
                    if needed or key in read or key not in self._present:
                        continue
                    blob = self._present.pop(key)
                    self._durable.discard(key)
                    self._renew.discard(key)
                try:
                    self._unlink(self.places.blob(key))
                except StorageError:
                    with self._lock:
                        self._present[key] = blob
                    raise
                removed += 1
        return removed

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

    @contextmanager
    def _change(self, key: UUID) -> Iterator[None]:
        """Be the only one to change the files of ``key``."""
        with self._lock:
            while key in self._changing:
                self._lock.wait()
            self._changing.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._changing.discard(key)
                self._lock.notify_all()

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
        """Make the blobs of ``keys``, all present, durable under their names.

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
        with self._change(key):
            try:
                copy_checked(self.disk, path, path, self.places.temporary(key), key)
            except OSError as error:
                raise storage_error("copy", path, error, self.disk) from error
            with self._lock:
                self._renew.discard(key)

    # -------------------------------------------------------------------------- versions

    def next_version(self) -> int:
        """Return the number of the next checkpoint; none is given twice."""
        self._last_version += 1
        return self._last_version

    def manifests(self) -> dict[int, Manifest]:
        """Return what is known of each version, by number, oldest first."""
        with self._lock:
            return dict(sorted(self._manifests.items()))

    def publish(self, manifest: Manifest) -> None:
        """Commit a checkpoint whose blobs are durable.

        Raises
        ------
        StorageError
            It could not be done, and the checkpoint is not there.
        """
        self._check_tenure()
        self.versions.publish(manifest)
        with self._lock:
            self._manifests[manifest.head.version] = manifest
            self._referenced.update(manifest.keys)
            for key, blob in zip(manifest.keys, manifest.blobs, strict=True):
                self._present[key] = blob

    def _check_tenure(self) -> None:
        """Make sure that nobody else can be writing, as they can when the lock's file was removed."""
        try:
            held = self._writer is not None and self._writer.still_there()
        except OSError as error:
            raise storage_error("look at", self.places.lock, error, self.disk) from error
        if not held:
            raise StorageError(
                f"the lock of {self.root} was removed while it was held, so that another process may be "
                "writing; nothing was committed. Close the directory and open it anew.",
                path=self.places.lock,
            )

    def withdraw(self, versions: Collection[int]) -> int:
        """Take checkpoints away, durably, and then the blobs that nothing needs any more; return how many.

        Raises
        ------
        StorageError
            The manifests, or blobs, could not be removed.
        """
        if not versions:
            return 0
        self.versions.withdraw(sorted(versions))
        doubtful: set[UUID] = set()
        with self._lock:
            self._unreadable.difference_update(versions)
            for version in versions:
                manifest = self._manifests.pop(version, None)
                if manifest is not None:
                    self._referenced.subtract(manifest.keys)
                    doubtful.update(key for key in manifest.keys if self._referenced[key] <= 0)
            for key in doubtful:
                del self._referenced[key]
        return self._remove(doubtful)


class _Claimed:
    """The claimed keys as they are at each look: a claim comes before the first file."""

    __slots__ = ("_counter",)

    def __init__(self, counter: Counter[UUID]) -> None:
        self._counter = counter

    def __contains__(self, key: object) -> bool:
        return key in self._counter
