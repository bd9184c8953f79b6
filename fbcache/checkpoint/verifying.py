"""Every blob of a tracked directory held against its checksums, with all cores.

Guarantees
----------
- Nothing is changed and no code from the files runs; one damaged blob keeps no other from being checked.
- A pack is checked as any blob's file, and each record that a checkpoint has in it by itself: what is told is
  which contents are damaged.
- Memory does not grow with the blobs: large files are mapped, and checked where they lie.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeAlias
from uuid import UUID

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob, Pack
from fbcache.checkpoint.packs import copy_records
from fbcache.checkpoint.progress import Meter, Progress
from fbcache.checkpoint.scanning import look_through
from fbcache.errors import CheckpointNotFoundError, CorruptBlobError, CorruptCheckpointError, StorageError
from fbcache.store.blobfile import BlobFile
from fbcache.store.disk import Disk
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

#: Checks handed out ahead of those that are running, for each core.
_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Damage:
    """One blob, or one manifest, that is not what was written.

    Attributes
    ----------
    path : str
        The file that it is in.
    reason : str
        What did not match.
    key : UUID or None
        Whose blob it is; None for a manifest.
    names : tuple
        What checkpoints call it: pairs of version and name.
    pack : UUID or None
        The key of the pack's file, where the blob is packed. Where that is ``key`` too, the pack is damaged
        in a place that no checkpoint needs.
    """

    path: str
    reason: str
    key: UUID | None = None
    names: tuple[tuple[int, Hashable], ...] = ()
    pack: UUID | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :meth:`TrackedDirectory.verify` has found.

    Attributes
    ----------
    checked : int
        How many blobs' files were checked, damaged ones included. A pack counts as one.
    nbytes : int
        Their length.
    damaged : tuple of Damage
        Blobs and manifests that are damaged, gone, or not those that a checkpoint names.
    foreign : tuple of str
        Paths in the directory that are not fbcache's, but for those ``ignored``.
    """

    checked: int
    nbytes: int
    damaged: tuple[Damage, ...]
    foreign: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


_Names: TypeAlias = "list[tuple[int, Hashable]]"
_Found: TypeAlias = "list[tuple[CorruptBlobError, _Names]]"


@dataclass(slots=True)
class _File:
    """What checkpoints have in one file."""

    names: _Names = field(default_factory=list)  # of the blob whose own it is
    digest: int | None = None
    records: dict[Pack, dict[tuple[UUID, Blob], _Names]] = field(default_factory=dict)

    def is_named(self, directory: Directory) -> bool:
        """Whether a checkpoint that needs it is still there."""
        users = [self.names, *(names for rows in self.records.values() for names in rows.values())]
        versions = {version for names in users for version, _ in names}
        return any(directory.versions.has(version) for version in versions)


def verify(directory: Directory, ignored: frozenset[str], progress: Progress) -> VerifyReport:
    """Check all of ``directory``; see :meth:`TrackedDirectory.verify`."""
    disk, places = directory.disk, directory.places
    try:
        contents = look_through(disk, places)
    except OSError as error:
        raise storage_error("read", directory.root, error, disk) from error
    files, damaged = _named(directory)
    for key in contents.blobs:
        files.setdefault(key, _File())
    sizes = {key: _size(disk, places.blob(key)) for key in sorted(files)}
    gone: set[UUID] = set()
    with Meter(progress, f"verify {directory.root}") as meter:
        meter.begin(sum(sizes.values()))
        for key, found in _check_all(directory, sizes, files):
            meter.advance(sizes[key])
            if found and not disk.exists(places.blob(key)) and not files[key].is_named(directory):
                gone.add(key)  # deleted meanwhile
                continue
            pack = key if files[key].records else None
            damaged += [Damage(e.path, e.reason, e.key, tuple(names), pack) for e, names in found]
        meter.end()
    foreign = [path for path in contents.foreign if not _is_ignored(path, ignored)]
    return VerifyReport(len(sizes) - len(gone), sum(sizes.values()), tuple(damaged), tuple(sorted(foreign)))


def _named(directory: Directory) -> tuple[dict[UUID, _File], list[Damage]]:
    """What checkpoints have in each file, and the manifests that cannot be read."""
    files: dict[UUID, _File] = {}
    damaged: list[Damage] = []
    for version in directory.versions.numbers():
        try:
            manifest = directory.versions.read(version)
        except CheckpointNotFoundError:
            continue
        except CorruptCheckpointError as error:
            damaged.append(Damage(error.path, error.reason))
            continue
        for name, key, blob in zip(manifest.names, manifest.keys, manifest.blobs, strict=True):
            if blob.pack is None:
                file = files.setdefault(key, _File())
                file.digest = blob.digest
                file.names.append((version, name))
            else:
                records = files.setdefault(blob.pack.key, _File()).records.setdefault(blob.pack, {})
                records.setdefault((key, blob), []).append((version, name))
    return files, damaged


def _check_all(
    directory: Directory, keys: Iterable[UUID], files: dict[UUID, _File]
) -> Iterator[tuple[UUID, _Found]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = iter(keys)
    running: dict[Future[_Found], UUID] = {}
    with ThreadPoolExecutor(cores, thread_name_prefix="verify") as executor:
        try:
            while True:
                for key in islice(waiting, cores * _AHEAD - len(running)):
                    running[executor.submit(_check, directory, key, files[key])] = key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def _check(directory: Directory, key: UUID, file: _File) -> _Found:
    """What is wrong with the file of ``key``, and with the records in it."""
    found: _Found = []
    if file.names or not file.records:
        error = _check_file(directory, key, file.digest)
        if error is not None:
            found.append((error, file.names))
    for pack, records in file.records.items():
        error = _check_file(directory, key, pack.digest)
        bad = _check_records(directory, pack, records)
        found += bad
        if error is not None and not bad:
            reason = f"{error.reason}; every value in it that a checkpoint has is whole"
            found.append((CorruptBlobError(reason, key=key, path=error.path), []))
    return found


def _check_records(directory: Directory, pack: Pack, records: dict[tuple[UUID, Blob], _Names]) -> _Found:
    rows = sorted(records, key=lambda row: row[1].offset)
    path = directory.places.blob(pack.key)
    try:
        pieces = copy_records(directory.disk, directory.places, pack, rows)
        return [
            (piece, records[row])
            for row, piece in zip(rows, pieces, strict=True)
            if isinstance(piece, CorruptBlobError)
        ]
    except StorageError as error:
        damage = partial(CorruptBlobError, f"it cannot be read: {error}", path=path)
        return [(damage(key=key), names) for (key, _), names in records.items()]


def _check_file(directory: Directory, key: UUID, digest: int | None) -> CorruptBlobError | None:
    disk, path = directory.disk, directory.places.blob(key)
    try:
        fd = disk.open(path, _READ)
        try:
            BlobFile(disk, fd, key, path, digest).read(may_map=True, writable=False, verify=True)
        finally:
            disk.close(fd)
    except CorruptBlobError as error:
        return error
    except FileNotFoundError:
        return CorruptBlobError("the file is gone", key=key, path=path)
    except OSError as error:
        return CorruptBlobError(f"it cannot be read: {error.strerror or error}", key=key, path=path)
    return None


def _size(disk: Disk, path: str) -> int:
    try:
        return disk.lstat(path).st_size
    except OSError:
        return 0


def _is_ignored(path: str, ignored: frozenset[str]) -> bool:
    return path in ignored or path.partition("/")[0] in ignored
