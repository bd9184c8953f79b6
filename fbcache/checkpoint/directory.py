"""One tracked directory, as this process has it: the keys, their files, and the manifests that need them.

Guarantees
----------
- All who use one real path in a process share one :class:`Directory`, and so one lock and one key set.
- What the writer finds on opening is made durable before anything is removed, so that opening
  twice finds the same; then leftovers are swept.
- A file is removed only when no manifest, pin, reader, loan or save under way needs it. One that was spared
  for a save or a reader is looked at again whenever others are removed.
- A content is present as long as it has a file of its own, or a manifest has it in a pack that is there.

Locks
-----
A save has the directory's turn, and the process a tenancy (:mod:`.tenancy`); a key's files are changed under
the right to the key. ``_lock``, of :mod:`.blobset`, guards what is known of manifests too. The order is turn,
tenancy, a key's right, ``_lock``.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from uuid import UUID

from fbcache.checkpoint.blobset import BlobSet, Fetch
from fbcache.checkpoint.loans import Loans, reader_directories
from fbcache.checkpoint.manifest import Blob, Manifest, places_in
from fbcache.checkpoint.places import Places
from fbcache.checkpoint.rights import Right, Rights
from fbcache.checkpoint.scanning import Swept, sweep, versions_in
from fbcache.checkpoint.tenancy import Tenancies
from fbcache.checkpoint.versions import Versions
from fbcache.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DeadlockError,
    DirectoryInUseError,
    FBCacheError,
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
        self.tenancies = Tenancies(disk, self.places, self._make, self._enter)
        self._turns: Rights[None] = Rights()
        self._saver: weakref.ref[object] | None = None
        self._spared: set[UUID] = set()  # to be removed once no save or reader needs them
        self._manifests: dict[int, Manifest] = {}
        self._unreadable: set[int] = set()
        self._referenced: Counter[UUID] = Counter()

    # ------------------------------------------------------------------------------ turns

    @property
    def idle(self) -> bool:
        """Whether nobody in this process writes to it or reads from it."""
        return not self.tenancies.any and self.loans.session_path is None

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
        if self._turns.owner(None) == me:
            raise DeadlockError(f"a save to {self.root} is under way in this very thread; end that first")
        right = Right(me)
        try:
            if not self._turns.acquire(None, right, wait=wait):
                raise DirectoryInUseError(
                    f"another save to {self.root} is under way in this process; wait=True waits for it",
                    path=self.root,
                    pid=os.getpid(),
                )
            yield
        finally:
            right.over = True
            self._turns.release(None, right)

    def abandon_in_child(self) -> None:
        """Let go of what is the parent's, in a forked child."""
        self.tenancies.abandon_in_child()
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

    def _enter(self, alone: bool) -> None:
        """Begin to write; ``alone`` if nobody else has written since this process did."""
        if not alone:
            self._scan()

    def _scan(self) -> None:
        """Learn what there is, after making it durable; sweep what a crash has left."""
        self._sync_skeleton()
        reap(self.places.readers, disk=self.disk)
        self._read_manifests()
        needed = self._needed()
        contents, swept = sweep(self.disk, self.places, needed, self._changing)
        swept.kept = tuple(self.places.manifest(version) for version in sorted(self._unreadable))
        apart, packed = places_in(self._manifests, contents.blobs)
        packs = self._packs_among(contents.blobs, apart.keys() | contents.pins)
        known = {key: blob for key, blob in apart.items() if key in contents.blobs}
        with self._lock:
            self.swept = swept
            self._present = dict.fromkeys(contents.blobs) | known
            self._packed, self._packs = packed, packs
            self._durable = contents.blobs & self._referenced.keys()
            self._pins = contents.pins
            self._new_pins = set(contents.pins)
            self._renew.clear()

    def _packs_among(self, files: set[UUID], contents: Collection[UUID]) -> set[UUID]:
        """Return which of ``files`` are packs.

        Those are read of which no manifest tells, or which are among ``contents`` too.
        """
        needed = {pack.key for manifest in self._manifests.values() for pack in manifest.packs}
        disputed = needed.intersection(contents)
        unknown = (files - self._referenced.keys()).difference(contents) | files & disputed
        return files & needed - disputed | {key for key in unknown if self.is_pack(key)}

    def sweep_again(self) -> Swept:
        """Remove what nothing refers to; for the writer, in its turn. What opening has swept counts too."""
        first, self.swept = self.swept, Swept()
        try:
            self._sync_skeleton()
            self.versions.in_doubt.clear()
            reap(self.places.readers, disk=self.disk)
            self._read_manifests()
            # Blobs are removed under the right to each, for others may persist meanwhile.
            contents, swept = sweep(self.disk, self.places, None, self._changing)
        except OSError as error:
            raise storage_error("sweep", self.root, error, self.disk) from error
        apart, packed = places_in(self._manifests, contents.blobs)
        with self._lock:
            known = self._present.keys() - self._packs
        packs = self._packs_among(contents.blobs, apart.keys() | contents.pins | known)
        with self._lock:
            self._packed = packed
            self._packs |= packs
            for key in [k for k in self._present if k not in contents.blobs and k not in self._changing]:
                del self._present[key]
                self._durable.discard(key)
                self._packs.discard(key)
            for key in contents.blobs:
                self._present.setdefault(key, None)
            left = contents.blobs - self._referenced.keys() - self._pins
        sizes = {key: self._size(key) for key in left}
        self._remove(left)
        gone = [sizes[key] for key in left if key not in self._present]
        return Swept(
            first.blobs + len(gone),
            first.files + swept.files,
            first.nbytes + sum(gone),
            tuple(self.places.manifest(version) for version in sorted(self._unreadable)),
        )

    def _size(self, key: UUID) -> int:
        try:
            return self.disk.lstat(self.places.blob(key)).st_size
        except OSError:
            return 0

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
            self.tenancies.last_version = max(self.tenancies.last_version, version)
            try:
                manifest = self.versions.read(version)
            except CorruptCheckpointError:
                unreadable.add(version)
                continue
            manifests[version] = manifest
            referenced.update(manifest.files)
        with self._lock:
            self._manifests, self._unreadable, self._referenced = manifests, unreadable, referenced

    def _needed(self) -> set[UUID] | None:
        """Return the files that manifests, readers and loans need; None where that cannot be known."""
        read = None if self._unreadable else self._keys_of_readers()
        return None if read is None else self._referenced.keys() | read

    def _keys_of_readers(self) -> set[UUID] | None:
        """Return the files that other living readers' manifests need, and the loans of this process.

        None where a manifest cannot be read: then anything may be needed.
        """
        keys = self.loans.keys()
        own = self.loans.session_path
        for session in reader_directories(self.disk, self.places):
            if session == own:
                continue
            for version in versions_in(self.disk, session):
                try:
                    keys.update(self.versions.read(version, session).files)
                except CheckpointNotFoundError:  # the reader has gone meanwhile
                    pass
                except CorruptCheckpointError:
                    return None
        return keys

    # -------------------------------------------------------------------------- removing

    def persist(self, key: UUID, fetch: Fetch, check: Callable[[Blob], None]) -> None:
        """Have the blob of ``key`` here in a file of its own, and pinned; unless ``check`` raises.

        Raises
        ------
        CorruptBlobError, StorageError
            As for :meth:`bring_in`.
        """
        right = Right()
        self._refuse_pack(key)
        try:
            self._changing.acquire(key, right)
            check(self._bring_in(key, fetch))
            self._pin(key)
        except BaseException:
            right.over = True
            self._take_back({key})
            raise
        finally:
            right.over = True
            self._changing.release(key, right)

    def delete(self, key: UUID) -> bool:
        """Take the pin of ``key`` away, and its blob where nothing else needs it; whether the blob went.

        What is in a pack stays there.

        Raises
        ------
        KeyError
            It is not present.
        StorageError
            A file could not be removed.
        """
        if not self.has(key):
            raise KeyError(f"{self.root} has no blob of the key {key}")
        with self._changing.exclusively(key):
            if key in self._pins:
                self._unlink(self.places.pin(key))
                with self._lock:
                    self._pins.discard(key)
                    self._new_pins.discard(key)
        self._remove({key})
        return not self.has(key)

    def begin_saving(self, saver: object) -> None:
        """Remove no blob until :meth:`end_saving`, or for as long as ``saver`` lives."""
        with self._lock:  # what is removed by then the save does not find
            self._saver = weakref.ref(saver)

    def end_saving(self, brought_in: Collection[UUID]) -> None:
        """Remove blobs again; of what was brought in, what nothing needs goes at once."""
        self._saver = None
        self._take_back(brought_in)

    def _take_back(self, keys: Collection[UUID]) -> None:
        try:
            self._remove(keys)
        except (OSError, FBCacheError):  # the next sweep comes by
            pass

    def _remove(self, keys: Collection[UUID]) -> int:
        """Remove the blobs of those ``keys`` that nothing needs; return how many went.

        So are those that were spared before, for a save or a reader that has ended since.
        """
        with self._lock:
            keys = {*keys, *self._spared}
            self._spared = set(keys)  # until they are gone or known to be needed
        if not keys or self._unreadable or (self._saver is not None and self._saver() is not None):
            return 0
        try:
            read = self._keys_of_readers()
        except OSError as error:
            raise storage_error("read", self.places.readers, error, self.disk) from error
        if read is None:
            return 0
        removed = 0
        for key in keys - read:
            with self._changing.exclusively(key):
                removed += self._remove_one(key)
        return removed

    def _remove_one(self, key: UUID) -> bool:
        """Remove the blob of ``key``, whose right the caller has, unless it is needed."""
        with self._lock:
            saver = None if self._saver is None else self._saver()
            if saver is not None:  # begun since readers were asked: it may have found the blob
                return False
            self._spared.discard(key)
            if key in self._pins or key in self._referenced or key not in self._present:
                return False
            blob, is_pack = self._present.pop(key), key in self._packs
            self._packs.discard(key)
            self._durable.discard(key)
            self._renew.discard(key)
        try:
            self._unlink(self.places.blob(key))
        except StorageError:
            with self._lock:
                self._present[key] = blob
                if is_pack:
                    self._packs.add(key)
                self._spared.add(key)
            raise
        return True

    # -------------------------------------------------------------------------- versions

    def next_version(self) -> int:
        """Return the number of the next checkpoint; none is given twice."""
        there = self.versions.numbers()  # also what was put there by hand
        self.tenancies.last_version = max([self.tenancies.last_version, *there[-1:]]) + 1
        return self.tenancies.last_version

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
        self.tenancies.check()
        version = manifest.head.version
        files, (apart, packed) = manifest.files, places_in({version: manifest}, ())
        with self._lock:  # first, so that no interrupt leaves a manifest whose blobs look unneeded
            self._manifests[version] = manifest
            self._referenced.update(files)
            self._present.update(apart)
            self._packed.update(packed)
        try:
            self.versions.publish(manifest)
        except BaseException:
            # A manifest that a power loss may bring back keeps its blobs.
            if version not in self.versions.in_doubt and not self.disk.exists(self.places.manifest(version)):
                self._forget_manifests([version])
            raise
        self._remove(self._settled())

    def withdraw(self, versions: Collection[int]) -> int:
        """Take checkpoints away, durably, and then the blobs that nothing needs any more; return how many.

        Raises
        ------
        StorageError
            The manifests, or blobs, could not be removed.
        """
        if versions:
            self.versions.withdraw(sorted(versions))  # which puts them in doubt until it is through
        return self._remove(self._settled() if versions else ())

    def _settled(self) -> set[UUID]:
        """Count those no longer that are durably gone by now; return the keys set free."""
        settled, self.versions.in_doubt = self.versions.in_doubt, set()
        return self._forget_manifests(settled)

    def _forget_manifests(self, versions: Collection[int]) -> set[UUID]:
        """Count manifests no longer; return the files that no other refers to."""
        unreferenced: set[UUID] = set()
        repacked = False
        with self._lock:
            self._unreadable.difference_update(versions)
            for version in versions:
                manifest = self._manifests.pop(version, None)
                if manifest is not None:
                    self._referenced.subtract(manifest.files)
                    unreferenced.update(key for key in manifest.files if self._referenced[key] <= 0)
                    repacked = repacked or bool(manifest.packs)
            self._spared |= unreferenced  # until somebody has removed them
            for key in unreferenced:
                del self._referenced[key]
            if repacked:
                self._packed = places_in(self._manifests, self._present)[1]
        return unreferenced
