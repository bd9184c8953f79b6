"""Every blob of a tracked directory held against its checksums, with all cores.

Guarantees
----------
- Nothing is changed and no code from the files runs; one damaged blob keeps no other from being checked.
- Memory does not grow with the blobs: large ones are mapped, and checked where they lie.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from uuid import UUID

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.progress import Meter, Progress
from fbcache.checkpoint.scanning import look_through
from fbcache.errors import CheckpointNotFoundError, CorruptBlobError, CorruptCheckpointError
from fbcache.store.blobfile import BlobFile
from fbcache.store.disk import Disk
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

#: Checks handed out ahead of those that are running, for each core.
_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not what was written.

    Attributes
    ----------
    path : str
        The file.
    reason : str
        What did not match.
    key : UUID or None
        Whose blob it is; None for a manifest.
    names : tuple
        What checkpoints call it: pairs of version and name.
    """

    path: str
    reason: str
    key: UUID | None = None
    names: tuple[tuple[int, Hashable], ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :meth:`TrackedDirectory.verify` has found.

    Attributes
    ----------
    checked : int
        How many blobs were checked, damaged ones included.
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


def verify(directory: Directory, ignored: frozenset[str], progress: Progress) -> VerifyReport:
    """Check all of ``directory``; see :meth:`TrackedDirectory.verify`."""
    disk, places = directory.disk, directory.places
    try:
        contents = look_through(disk, places)
    except OSError as error:
        raise storage_error("read", directory.root, error, disk) from error
    users, digests, damaged = _named(directory)
    keys = sorted(contents.blobs | users.keys())
    sizes = {key: _size(disk, places.blob(key)) for key in keys}
    gone: set[UUID] = set()
    with Meter(progress, f"verify {directory.root}") as meter:
        meter.begin(sum(sizes.values()))
        for key, damage in _check_all(directory, keys, digests):
            meter.advance(sizes[key])
            if damage is None:
                continue
            if key not in users and not disk.exists(places.blob(key)):
                gone.add(key)  # deleted meanwhile
                continue
            damaged.append(Damage(damage.path, damage.reason, key, tuple(users.get(key, ()))))
        meter.end()
    foreign = [path for path in contents.foreign if not _is_ignored(path, ignored)]
    return VerifyReport(len(keys) - len(gone), sum(sizes.values()), tuple(damaged), tuple(sorted(foreign)))


def _named(
    directory: Directory,
) -> tuple[dict[UUID, list[tuple[int, Hashable]]], dict[UUID, int], list[Damage]]:
    """Who names each blob, the digest that it should have, and the manifests that cannot be read."""
    users: dict[UUID, list[tuple[int, Hashable]]] = {}
    digests: dict[UUID, int] = {}
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
            users.setdefault(key, []).append((version, name))
            digests[key] = blob.digest
    return users, digests, damaged


def _check_all(
    directory: Directory, keys: Iterable[UUID], digests: dict[UUID, int]
) -> Iterator[tuple[UUID, CorruptBlobError | None]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = iter(keys)
    running: dict[Future[CorruptBlobError | None], UUID] = {}
    with ThreadPoolExecutor(cores, thread_name_prefix="verify") as executor:
        try:
            while True:
                for key in islice(waiting, cores * _AHEAD - len(running)):
                    running[executor.submit(_check, directory, key, digests.get(key))] = key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def _check(directory: Directory, key: UUID, digest: int | None) -> CorruptBlobError | None:
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
