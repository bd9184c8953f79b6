"""What kind of file system a directory lies on.

Guarantee: the answer comes from the mount table; nothing is read from or written to the
file system in question.
"""

from __future__ import annotations

import os
import warnings

import psutil

from fbcache.errors import FBCacheWarning

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})

_NETWORK = frozenset(
    (
        *("9p", "afs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"),
        *("fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
    )
)

#: Whether this process was warned already.
_warned = False


def file_system_of(path: str) -> str:
    """Return the type of the file system at the absolute ``path``, as the mount table names it; or ''."""
    path = os.path.realpath(path)
    best, kind = "", ""
    for mount in psutil.disk_partitions(all=True):
        # A later mount at the same point hides the earlier one.
        if _is_below(path, mount.mountpoint) and len(mount.mountpoint) >= len(best):
            best, kind = mount.mountpoint, mount.fstype
    return kind


def warn_if_unsuitable(path: str) -> None:
    """Warn, once in the life of this process, when spilling to ``path`` defeats its purpose.

    Warns
    -----
    FBCacheWarning
        ``path`` lies in memory or across a network.
    """
    global _warned
    if _warned:
        return
    kind = file_system_of(path)
    if kind in _IN_MEMORY:
        reason = f"which is kept in memory ({kind}), so that spilling to it frees none"
    elif kind in _NETWORK:
        reason = f"which lies across a network ({kind}), so that spilling to it is slow and can hang"
    else:
        return
    _warned = True
    warnings.warn(
        f"the spill directory is in {path}, {reason}. Give a directory on a local disk: directory='/path'.",
        FBCacheWarning,
        stacklevel=4,  # the caller of the pool that opens the session
    )


def _is_below(path: str, mountpoint: str) -> bool:
    return (path + "/").startswith(mountpoint.rstrip("/") + "/")
