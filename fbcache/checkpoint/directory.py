"""One tracked directory, as this process has it: the writer's tenure, the keys, and their files.

Guarantees
----------
- All who use one real path in a process share one :class:`Directory`, and so one lock and one key set.
- What the writer finds on opening is made durable before anything is removed, so that opening
  twice finds the same; then leftovers are swept.
- A blob is removed only when no manifest, pin, reader, loan or save under way needs it.

Locks
-----
``_tenure`` is held while the directory is opened, closed and scanned, and ``_turn`` for a whole save: they
are what excludes, as the lock file is, and files are touched under them. ``_lock``, of :mod:`.blobset`,
guards what is known of manifests too. The order is ``_turn``, ``_tenure``, a key's turn, ``_lock``.
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

from fbcache.checkpoint.blobset import BlobSet
from fbcache.checkpoint.loans import Loans, reader_directories
from fbcache.checkpoint.lock import Tenure, WriterLock
from fbcache.checkpoint.manifest import Manifest
from fbcache.checkpoint.places import Places
from fbcache.checkpoint.scanning import Swept, sweep, versions_in
from fbcache.checkpoint.versions import Versions
from fbcache.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DeadlockError,
    DirectoryInUseError,
    FBCacheError,
    FBCacheWarning,
    StorageError,
)
from fbcache.store.disk import Disk
from fbcache.store.reaper import reap
from fbcache.store.syncing import NotDurableError, make_durable
from fbcache.store.trouble import storage_error


class Directory(BlobSet):
    """A tracked directory; see the module. Made by :func:`fbcache.checkpoint.registry.directory_at`."""

    def __init__(self, root: str, disk: Disk) -> None:
        super().__init__(disk, Places(root))
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
        self._manifests: dict[int, Manifest] = {}
        self._unreadable: set[int] = set()
        self._referenced: Counter[UUID] = Counter()

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
            for path in (self.root, self.places.own, self.places.checkpoints):
                self.disk.makedirs(path)
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
        needed = self._needed()
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
            needed = self._needed()
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
        if not self.versions.numbers():  # else it was done before the first one was published
            for path in self._above():
                try:
                    make_durable(self.disk, path, (), [path])
                except NotDurableError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM):
                        raise
                    # Not ours to read; then it was there before us.
        ours = [self.root, self.places.own, self.places.checkpoints]
        make_durable(self.disk, self.root, (), ours)

    def _above(self) -> Iterator[str]:
        """The directories above the root on its file system, which may have been made with it."""
        device = self.disk.lstat(self.root).st_dev
        path = os.path.dirname(self.root)
        while self.disk.lstat(path).st_dev == device:
            yield path
            if path == "/":
                return
            path = os.path.dirname(path)

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

    def _needed(self) -> set[UUID] | None:
        """Return the keys that manifests, readers and loans need; None where that cannot be known."""
        read = None if self._unreadable else self._keys_of_readers()
        return None if read is None else self._referenced.keys() | read

    def _keys_of_readers(self) -> set[UUID] | None:
        """Return the keys that other living readers' manifests name, and the loans of this process.

        None where a manifest cannot be read: then anything may be needed.
        """
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
                except CorruptCheckpointError:
                    return None
        return keys

    # -------------------------------------------------------------------------- removing

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

    def disclaim(self, keys: Iterable[UUID]) -> None:
        """End what :meth:`claim` began. What nobody needs then is removed."""
        left = {key for key in self._end_claims(keys) if key not in self._referenced}
        try:
            self._remove(left)
        except (OSError, FBCacheError):  # the next sweep comes by
            pass

    def _remove(self, keys: Collection[UUID]) -> int:
        """Remove the blobs of those ``keys`` that nothing needs; return how many went."""
        if not keys or self._unreadable:
            return 0
        read = self._keys_of_readers()
        if read is None:
            return 0
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

    # -------------------------------------------------------------------------- versions

    def next_version(self) -> int:
        """Return the number of the next checkpoint; none is given twice."""
        self._last_version += 1
        return self._last_version

    def manifests(self) -> dict[int, Manifest]:
        """Return what is known of each version, by number, oldest first."""
        with self._lock:
            there = {v: m for v, m in self._manifests.items() if v not in self.versions.in_doubt}
        return dict(sorted(there.items()))

    def publish(self, manifest: Manifest) -> None:
        """Commit a checkpoint whose blobs are durable.

        Raises
        ------
        StorageError
            It could not be done, and the checkpoint is not there.
        """
        self._check_tenure()
        version = manifest.head.version
        with self._lock:  # first, so that no interrupt leaves a manifest whose blobs look unneeded
            self._manifests[version] = manifest
            self._referenced.update(manifest.keys)
            for key, blob in zip(manifest.keys, manifest.blobs, strict=True):
                self._present[key] = blob
        try:
            self.versions.publish(manifest)
        except BaseException:
            # A manifest that a power loss may bring back keeps its blobs.
            if version not in self.versions.in_doubt and not self.disk.exists(self.places.manifest(version)):
                self._forget_manifests([version])
            raise
        self._remove(self._settled())

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
        return self._remove(self._settled() | self._forget_manifests(versions))

    def _settled(self) -> set[UUID]:
        """Count those no longer of which it is durable by now that they are gone; return the keys set free."""
        settled, self.versions.in_doubt = self.versions.in_doubt, set()
        return self._forget_manifests(settled)

    def _forget_manifests(self, versions: Collection[int]) -> set[UUID]:
        """Count manifests no longer; return the keys that no other refers to."""
        unreferenced: set[UUID] = set()
        with self._lock:
            self._unreadable.difference_update(versions)
            for version in versions:
                manifest = self._manifests.pop(version, None)
                if manifest is not None:
                    self._referenced.subtract(manifest.keys)
                    unreferenced.update(key for key in manifest.keys if self._referenced[key] <= 0)
            for key in unreferenced:
                del self._referenced[key]
        return unreferenced


class _Claimed:
    """The claimed keys as they are at each look: a claim comes before the first file."""

    __slots__ = ("_counter",)

    def __init__(self, counter: Counter[UUID]) -> None:
        self._counter = counter

    def __contains__(self, key: object) -> bool:
        return key in self._counter
