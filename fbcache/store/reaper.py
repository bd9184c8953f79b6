"""Taking sessions away: those of dead processes, and one's own.

A pool's spill session holds blobs, and segments or rows of small ones. A reader's session below a tracked
directory holds further names of blobs, and of manifests, which it keeps from being the last ones to go.

Guarantees:

- A session is reaped only when its owner is known to be dead *and* its lock is free. One of another user
  is left alone, and one without an owner's file is if it is empty and young: its owner may be making it.
  One that holds blobs or manifests had an owner, whose file a power loss has taken or torn: there the
  lock alone tells.
- Only names that fbcache gives are removed (invariant 13), and no symbolic link is followed: from
  the session's directory down everything is done relative to open directories, so that
  nobody who may write to the base can turn it elsewhere.
- Several processes may reap one base at once, and open sessions in it meanwhile: the lock lets
  one of them in, and what is gone already is no error.

Blobs and manifests go first and the owner's file after them, so that a reaper that dies is followed
by another.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fbcache.store.disk import DISK, Disk
from fbcache.store.diskcached import DATABASE_FILES, NAME
from fbcache.store.owner import Owner
from fbcache.store.transfer import read_all

OWNER = "owner.json"
NEW_OWNER = ".owner.json.tmp"
LEASE = "lease.lock"

#: More than an owner's file ever holds.
_OWNER_MOST = 4096

#: Seconds after which a session without an owner's file was given up by its maker.
_STILLBORN = 3600.0

_SESSION_NAME = re.compile(r"session-[0-9a-f]{32}")
_SHARD_NAME = re.compile(r"[0-9a-f]{2}")
_KEY = re.compile(r"[0-9a-f]{32}")
_MANIFEST_NAME = re.compile(r"[0-9]{10}\.manifest")
_SEGMENT_NAME = re.compile(r"[0-9]{1,10}\.segment")

#: Files of ours that lie in the session itself.
_LOOSE = (_MANIFEST_NAME, _SEGMENT_NAME)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK

#: It is gone, or something of another kind has its name: nothing of ours is there.
_NOT_OURS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST})


def reap(base: str, *, disk: Disk = DISK) -> list[str]:
    """Remove the sessions below ``base`` whose owners are dead.

    What cannot be looked at or removed is left for another time; nothing is raised.

    Returns
    -------
    list of str
        The paths of the sessions that were reaped.
    """
    try:
        names = [name for name in disk.listdir(base) if _SESSION_NAME.fullmatch(name)]
    except OSError:
        return []
    return [path for name in names if _reap_session(path := f"{base}/{name}", disk)]


def remove_session(path: str, disk: Disk) -> None:
    """Remove what fbcache put into the session at ``path``, and then the directory if it is empty.

    To be called by who holds the session's lock.

    Raises
    ------
    OSError
        Something of ours could not be removed. The owner's file and the lock are still there
        unless all blobs and manifests are gone.
    """
    try:
        directory = disk.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    try:
        _empty_session(directory, disk)
    finally:
        disk.close(directory)
    with _if_there():
        disk.rmdir(path)


def _reap_session(path: str, disk: Disk) -> bool:
    try:
        directory = disk.open(path, _DIRECTORY)
        try:
            if not _reap_open(directory, disk):
                return False
        finally:
            disk.close(directory)
        disk.rmdir(path)
    except OSError:  # gone meanwhile, holding others' files, or not to be touched by this user
        return False
    return True


def _reap_open(directory: int, disk: Disk) -> bool:
    """Empty the session if it may be; False if it is not to be touched."""
    if disk.fstat(directory).st_uid != os.geteuid():
        return False
    # First the owner, then the lock: probing it must not get in the way of one who is making a session.
    raw = _read_owner(directory, disk)
    if _is_torn(raw):
        if not _is_filled(directory, disk) and not _is_old(directory, disk):
            return False
    else:
        owner = Owner.from_bytes(raw)
        if owner is None or not owner.is_dead():
            return False
    try:
        lease = disk.open(LEASE, os.O_RDWR | _FILE, dir_fd=directory)
    except FileNotFoundError:
        _empty_session(directory, disk)  # a power loss has taken the lock's file; its owner is dead
        return True
    try:
        if not disk.lock(lease):
            return False
        _empty_session(directory, disk)
    finally:
        disk.close(lease)
    return True


def _read_owner(directory: int, disk: Disk) -> bytes:
    """The owner's file as it is; nothing, where there is none."""
    try:
        fd = disk.open(OWNER, os.O_RDONLY | _FILE, dir_fd=directory)
    except FileNotFoundError:
        return b""
    try:
        raw = bytearray(_OWNER_MOST)
        length = read_all(disk, fd, [memoryview(raw)], 0)
    finally:
        disk.close(fd)
    return bytes(raw[:length])


def _is_torn(raw: bytes) -> bool:
    """Whether this is no owner's file of any version, but what a power loss leaves of one."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return True
    return False


def _is_old(directory: int, disk: Disk) -> bool:
    """Whether whoever was making this session, which takes milliseconds, must have died over it."""
    return time.time() - disk.fstat(directory).st_mtime > _STILLBORN


def _is_filled(directory: int, disk: Disk) -> bool:
    """Whether there is what its owner puts there only after the owner's file."""
    names = disk.listdir(directory)
    return any(_SHARD_NAME.fullmatch(name) or name == NAME or _is_loose(name) for name in names)


# ------------------------------------------------------------------ removing


def _empty_session(directory: int, disk: Disk) -> None:
    for name in disk.listdir(directory):
        if _SHARD_NAME.fullmatch(name):
            with _if_there():
                _remove_shard(directory, name, disk)
        elif name == NAME:
            with _if_there():
                _remove_rows(directory, disk)
        elif _is_loose(name):
            with _if_there():
                disk.unlink(name, dir_fd=directory)
    for name in (NEW_OWNER, OWNER, LEASE):
        with _if_there():
            disk.unlink(name, dir_fd=directory)


def _remove_shard(directory: int, name: str, disk: Disk) -> None:
    shard = disk.open(name, _DIRECTORY, dir_fd=directory)
    try:
        for blob in disk.listdir(shard):
            if _is_blob(blob, name):
                with _if_there():
                    disk.unlink(blob, dir_fd=shard)
    finally:
        disk.close(shard)
    disk.rmdir(name, dir_fd=directory)


def _remove_rows(directory: int, disk: Disk) -> None:
    rows = disk.open(NAME, _DIRECTORY, dir_fd=directory)
    try:
        for name in DATABASE_FILES:
            with _if_there():
                disk.unlink(name, dir_fd=rows)
    finally:
        disk.close(rows)
    disk.rmdir(NAME, dir_fd=directory)


def _is_loose(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in _LOOSE)


def _is_blob(name: str, shard: str) -> bool:
    """Whether ``name`` is a blob's, or a half-written blob's, that belongs into ``shard``."""
    key = name[1:-4] if name.startswith(".") and name.endswith(".tmp") else name
    return _KEY.fullmatch(key) is not None and key.startswith(shard)


@contextmanager
def _if_there() -> Iterator[None]:
    """Let pass what is gone, or of another kind than fbcache makes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
