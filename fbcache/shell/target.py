"""The file that an export goes to.

Guarantees
----------
- It has its name only when it is whole and on disk. What ends the writing early leaves nothing, and what
  was there before as it was.
- Unless it may be overwritten, it takes no name that something has, even if that came meanwhile
  (on file systems without hard links, but for the last instant).
- Nothing is written into a tracked directory, whatever links lead there.
"""

from __future__ import annotations

import errno
import os
import pickle
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fbcache.errors import StorageError
from fbcache.shell.ending import Refused
from fbcache.store.disk import DISK, Disk
from fbcache.store.transfer import write_all
from fbcache.store.trouble import storage_error

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EACCES})


class Sink:
    """The file as writers of formats see it; takes memory as it is, in pieces of any size."""

    closed = False

    def __init__(self, disk: Disk, fd: int) -> None:
        self._disk = disk
        self._fd = fd
        self.nbytes = 0

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        raw = pickle.PickleBuffer(data).raw()
        write_all(self._disk, self._fd, [raw])
        self.nbytes += raw.nbytes
        return raw.nbytes

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> None:
        """Do nothing: the file is closed by who opened it."""


def check_target(path: str, root: str, *, force: bool) -> None:
    """Check that a file may be made at ``path``, which is not in the tracked directory ``root``.

    Raises
    ------
    Refused
        It may not.
    """
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise Refused(f"{path}: the directory that it should go to is not there")
    if _is_within(parent, root):
        raise Refused(f"{path} lies in the tracked directory itself; give a place outside {root}")
    if os.path.isdir(path) and not os.path.islink(path):
        raise Refused(f"{path} is a directory; give the name of a file")
    if os.path.lexists(path) and not force:
        raise Refused(_taken(path))


def _is_within(parent: str, root: str) -> bool:
    place = os.path.realpath(parent)
    while not os.path.samefile(place, root):
        if place == os.path.dirname(place):
            return False
        place = os.path.dirname(place)
    return True


def _taken(path: str) -> str:
    return f"{path} is there already; give another name, or overwrite it by --force"


@contextmanager
def new_file(path: str, *, force: bool, disk: Disk = DISK) -> Iterator[Sink]:
    """Make the file at ``path`` out of what the block writes.

    Raises
    ------
    Refused
        Something has its name by now.
    StorageError
        It could not be written.
    """
    parent = os.path.dirname(os.path.abspath(path))
    temporary = f"{parent}/.fbcache-export-{secrets.token_hex(8)}.tmp"
    try:
        fd = disk.open(temporary, _NEW, 0o666)
        try:
            try:
                yield Sink(disk, fd)
                disk.fsync(fd)
            finally:
                disk.close(fd)
            if force:
                disk.rename(temporary, path)
            else:
                _give_free_name(disk, temporary, path)
        finally:
            _remove(disk, temporary)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("write", path, error, disk) from error


def _give_free_name(disk: Disk, temporary: str, path: str) -> None:
    try:
        disk.link(temporary, path)
    except FileExistsError:
        raise Refused(_taken(path)) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise Refused(_taken(path)) from None
        disk.rename(temporary, path)


def _remove(disk: Disk, temporary: str) -> None:
    try:
        disk.unlink(temporary)
    except OSError:  # it has its name by now, or what is reported is the failure before
        pass
