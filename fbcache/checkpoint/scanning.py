"""Looking a tracked directory through, and sweeping what a crash has left.

Guarantees
----------
- Only what fbcache itself makes is removed (invariant 13): temporary files, pins without a blob, and
  blobs that nothing refers to. A shard that is a symbolic link is foreign, and not entered.
- Where a manifest cannot be read no blob is removed: what it needs is not known.
- A removal that fails is passed over; the next sweep tries again.

Called by the writer of the directory only, or without removing anything.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from fbcache.checkpoint.places import OWN, Places, Shard, is_new_manifest, is_shard, version_of
from fbcache.store.disk import Disk

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(slots=True)
class Swept:
    """What a sweep has removed.

    Attributes
    ----------
    blobs, files : int
        Blobs, and other files of ours, that were removed.
    nbytes : int
        Length of those blobs.
    kept : tuple of str
        Manifests that could not be read, for whose sake no blob was removed.
    """

    blobs: int = 0
    files: int = 0
    nbytes: int = 0
    kept: tuple[str, ...] = ()


@dataclass(slots=True)
class Contents:
    """What a tracked directory holds.

    Attributes
    ----------
    blobs, pins : set of UUID
        The keys of blobs' files, packs among them, and those that ``persist`` has asked for.
    foreign : list of str
        Paths, relative to the directory, that are not ours.
    """

    blobs: set[UUID] = field(default_factory=set)
    pins: set[UUID] = field(default_factory=set)
    foreign: list[str] = field(default_factory=list)


def shards(disk: Disk, places: Places, foreign: list[str] | None = None) -> Iterator[tuple[int, Shard]]:
    """Go through the shards: an open descriptor of each, and what is in it."""
    for name in sorted(disk.listdir(places.root)):
        if not is_shard(name):
            if foreign is not None:
                foreign.append(name)
            continue
        try:
            fd = disk.open(f"{places.root}/{name}", _DIRECTORY)
        except OSError:  # a file, a link, or one that is gone
            if foreign is not None:
                foreign.append(name)
            continue
        try:
            shard = Shard.of(name, disk.listdir(fd))
            if foreign is not None:
                foreign.extend(f"{name}/{other}" for other in shard.foreign)
            yield fd, shard
        finally:
            disk.close(fd)


def look_through(disk: Disk, places: Places) -> Contents:
    """Return what is there; nothing is changed."""
    contents = Contents()
    for _, shard in shards(disk, places, contents.foreign):
        contents.blobs.update(shard.blobs)
        contents.pins.update(shard.pins)
    if OWN in contents.foreign:
        contents.foreign.remove(OWN)
        contents.foreign.extend(_foreign_in_own(disk, places))
    return contents


def _foreign_in_own(disk: Disk, places: Places) -> Iterator[str]:
    """Go through what lies beside the lock, the manifests and the readers' sessions, and is not ours."""
    for directory, is_ours in (
        (places.own, {places.lock, places.checkpoints, places.readers}.__contains__),
        (places.checkpoints, lambda path: _is_manifest(os.path.basename(path))),
        (places.readers, lambda path: os.path.basename(path).startswith("session-")),
    ):
        try:
            names = disk.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in sorted(names):
            if not is_ours(f"{directory}/{name}"):
                yield os.path.relpath(f"{directory}/{name}", places.root)


def _is_manifest(name: str) -> bool:
    return version_of(name) is not None or is_new_manifest(name)


def sweep(
    disk: Disk, places: Places, needed: Container[UUID] | None, claimed: Container[UUID]
) -> tuple[Contents, Swept]:
    """Remove leftovers, and return what is there then.

    Parameters
    ----------
    needed : container of UUID or None
        Keys of files that checkpoints or readers need; None where that is not known, so that every one
        stays.
    claimed : container of UUID
        Keys that are being brought in at this moment, of which nothing is removed.
    """
    contents, swept = Contents(), Swept()
    for fd, shard in shards(disk, places, contents.foreign):
        present = set(shard.blobs)
        for key in shard.temporary:
            if key not in claimed:
                swept.files += _remove(disk, fd, f".{key.hex}.tmp")
        for key in shard.pins:
            if key in present or key in claimed:
                contents.pins.add(key)
            else:
                swept.files += _remove(disk, fd, f"{key.hex}.pin")
        for key in present:
            if needed is None or key in needed or key in contents.pins or key in claimed:
                contents.blobs.add(key)
            else:
                _remove_blob(disk, fd, key, swept)
    _sweep_manifests(disk, places, swept)
    return contents, swept


def _remove_blob(disk: Disk, fd: int, key: UUID, swept: Swept) -> None:
    try:
        nbytes = disk.lstat(key.hex, dir_fd=fd).st_size
    except OSError:
        nbytes = 0
    if _remove(disk, fd, key.hex):
        swept.blobs += 1
        swept.nbytes += nbytes


def _remove(disk: Disk, directory: int, name: str) -> bool:
    try:
        disk.unlink(name, dir_fd=directory)
    except OSError:
        return False
    return True


def _sweep_manifests(disk: Disk, places: Places, swept: Swept) -> None:
    for name in disk.listdir(places.checkpoints):
        if is_new_manifest(name):
            try:
                disk.unlink(f"{places.checkpoints}/{name}")
            except OSError:
                continue
            swept.files += 1


def versions_in(disk: Disk, directory: str) -> list[int]:
    """Return the versions whose manifests are in ``directory``, oldest first; none where it is missing."""
    try:
        names = disk.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (version_of(name) for name in names)
    return sorted(version for version in found if version is not None)
