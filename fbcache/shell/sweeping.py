"""``fbcache gc``: what nothing refers to is removed, or, with ``--dry-run``, counted."""

from __future__ import annotations

import os
import sys
from collections.abc import Container
from uuid import UUID

import click

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.loans import reader_directories
from fbcache.checkpoint.lock import FREE, read_record
from fbcache.checkpoint.places import Shard, is_new_manifest
from fbcache.checkpoint.scanning import Swept, shards, versions_in
from fbcache.checkpoint.tracked import TrackedDirectory
from fbcache.demo.report import size
from fbcache.errors import CheckpointNotFoundError, CorruptCheckpointError, DirectoryInUseError, StorageError
from fbcache.shell import screen
from fbcache.shell.ending import Exit, ending
from fbcache.shell.opening import check, directory_argument, reading
from fbcache.store.disk import Disk
from fbcache.store.owner import Owner
from fbcache.store.reaper import OWNER
from fbcache.store.transfer import read_all
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


@click.command()
@directory_argument
@click.option("--dry-run", is_flag=True, help="Count what would go; remove nothing.")
@ending()
def gc(directory: str, as_json: bool, dry_run: bool) -> None:
    """Remove from DIR what nothing refers to any more.

    That is blobs that no checkpoint, living reader or persist() needs, and what a crash has left of fbcache's
    own. Checkpoints stay, and so do files of others. Where a checkpoint cannot be read no
    blob goes, for what it needs is not known.

    Exit codes: 0, 1 a checkpoint is damaged, 2 there is no such directory, 3 it could not be written, or
    another process writes to it.
    """
    root = check(directory)
    try:
        swept = _would_go(directory) if dry_run else _sweep(root)
    except DirectoryInUseError as error:
        raise _in_use(root, error) from error
    if as_json:
        screen.tell_json(
            {
                "directory": root,
                "dry_run": dry_run,
                "blobs": swept.blobs,
                "nbytes": swept.nbytes,
                "files": swept.files,
                "unreadable": list(swept.kept),
            }
        )
    else:
        _tell(root, swept, dry_run)
    sys.exit(Exit.DAMAGED if swept.kept else Exit.DONE)


def _sweep(root: str) -> Swept:
    with TrackedDirectory(root) as tracked:
        return tracked.gc()


def _in_use(root: str, error: DirectoryInUseError) -> DirectoryInUseError:
    who = "another process" if error.pid is None else f"process {error.pid} on {error.host or 'another host'}"
    message = f"{who} has {root} open for writing; run gc when it is done (the other commands work now)"
    return DirectoryInUseError(message, path=root, host=error.host, pid=error.pid)


def _tell(root: str, swept: Swept, dry_run: bool) -> None:
    does = "would remove" if dry_run else "removed"
    parts = []
    if swept.blobs:
        parts.append(f"{swept.blobs:,} blob{'s' * (swept.blobs != 1)} ({size(swept.nbytes)})")
    if swept.files:
        parts.append(f"{swept.files:,} other leftover{'s' * (swept.files != 1)}")
    screen.tell(f"{does} {' and '.join(parts)}" if parts else f"nothing to remove in {root}")
    for path in swept.kept:
        screen.tell(f"no blob goes as long as this checkpoint cannot be read: {path}", style="red")
    if swept.kept:
        screen.tell("fbcache ls tells why; TrackedDirectory.forget(version) gives it up")


# ------------------------------------------------------------------------------- dry run


def _would_go(path: str) -> Swept:
    """Count what a sweep at this moment would remove; as long as nobody writes, that is exact."""
    with reading(path) as (_, directory):
        _check_unused(directory)
        try:
            swept = _counted(directory)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise storage_error("look through", directory.root, error, directory.disk) from error
        _check_unused(directory)  # somebody's new files are no leftovers
        return swept


def _check_unused(directory: Directory) -> None:
    record = read_record(directory.places.lock, directory.disk)
    if record is not None and record.tenure != FREE and not record.has_ended():
        raise DirectoryInUseError("in use", path=directory.root, host=record.host, pid=record.pid)


def _counted(directory: Directory) -> Swept:
    disk, places, swept = directory.disk, directory.places, Swept()
    needed, unreadable = _needed(directory)
    swept.kept = tuple(unreadable)
    for fd, shard in shards(disk, places):
        swept.files += len(shard.temporary) + len(set(shard.pins) - set(shard.blobs))
        if not unreadable:
            _count_blobs(disk, fd, shard, needed, swept)
    swept.files += sum(map(is_new_manifest, disk.listdir(places.checkpoints)))
    return swept


def _count_blobs(disk: Disk, fd: int, shard: Shard, needed: Container[UUID], swept: Swept) -> None:
    pinned = set(shard.pins)
    for key in shard.blobs:
        if key not in needed and key not in pinned:
            swept.blobs += 1
            swept.nbytes += disk.lstat(key.hex, dir_fd=fd).st_size


def _needed(directory: Directory) -> tuple[set[UUID], list[str]]:
    """The files that checkpoints and living readers need, and the checkpoints that cannot be read."""
    versions, needed, unreadable = directory.versions, set[UUID](), []
    for version in versions.numbers():
        try:
            needed.update(versions.read(version).files)
        except CheckpointNotFoundError:
            pass
        except CorruptCheckpointError as error:
            unreadable.append(error.path)
    for session in reader_directories(directory.disk, directory.places):
        if _has_ended(session, directory.disk):
            continue
        for version in versions_in(directory.disk, session):
            try:
                needed.update(versions.read(version, session).files)
            except CheckpointNotFoundError:  # the reader has gone meanwhile
                pass
    return needed, unreadable


def _has_ended(session: str, disk: Disk) -> bool:
    """Whether a sweep would remove the session first, by the rules of :mod:`fbcache.store.reaper`."""
    try:
        fd = disk.open(f"{session}/{OWNER}", _READ)
        try:
            raw = bytearray(disk.fstat(fd).st_size)
            length = read_all(disk, fd, [memoryview(raw)], 0)
        finally:
            disk.close(fd)
        owner = Owner.from_bytes(bytes(raw[:length]))
        return owner is not None and owner.is_dead() and disk.lstat(session).st_uid == os.geteuid()
    except OSError:
        return False
