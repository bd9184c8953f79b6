"""What an ``OSError`` becomes: an error of fbcache's that names the file and the next step."""

from __future__ import annotations

import errno
import os

from fbcache.errors import DiskFullError, StorageError
from fbcache.store.disk import Disk

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def storage_error(doing: str, path: str, error: OSError, disk: Disk, *, needed: int = 0) -> StorageError:
    """Return the error to raise when ``doing`` something with ``path`` came to ``error``."""
    what = f"cannot {doing} {path}: {error.strerror or error}"
    if error.errno in FULL:
        free = _free_bytes(disk, path)
        message = f"{what} ({free:,} bytes are free). Free some space, then do it again; nothing was lost."
        return DiskFullError(message, path=path, needed=needed, free=free)
    if error.errno in _FORBIDDEN:
        todo = "See that you may write there, and that the file system is not mounted read-only"
    elif error.errno == errno.ENOTDIR:
        todo = "It, or something above it, is a file; give a directory"
    elif error.errno == errno.ENOENT:
        todo = "See that the directory is there"
    else:
        todo = "See that the disk and the directory are well, then do it again"
    return StorageError(f"{what}. {todo}.", path=path, errno=error.errno)


def _free_bytes(disk: Disk, path: str) -> int:
    while path not in ("", "/"):
        try:
            return disk.free_bytes(path)
        except OSError:  # not there; what it would lie on is
            path = os.path.dirname(path)
    return 0
