"""The one seam between fbcache's stores and the disk.

Guarantee: every system call by which a store touches the file system is a method of
:class:`Disk`, one line each and nothing besides, so that a test can fail, shorten or hold up
the n-th of them. A method raises what the call raises, an ``OSError``; naming the blob, the
path and the next step is left to the caller.

A :class:`Disk` has no state, and may be used from any thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

import filelock

from fbcache.codec.frames import Buffer
from fbcache.store.mapping import map_file

#: ``FICLONE`` of linux/fs.h; MIPS, PowerPC and SPARC number it otherwise, and answer ENOTTY to this.
_FICLONE = 0x40049409

_libc = ctypes.CDLL(None, use_errno=True)
_libc_syncfs = getattr(_libc, "syncfs", None)

_libc_sync_file_range = getattr(_libc, "sync_file_range", None)
if _libc_sync_file_range is not None:
    _libc_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

#: ``SYNC_FILE_RANGE_WRITE`` of linux/fs.h.
_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """System calls, as they are. ``dir_fd`` makes a path relative to an open directory."""

    __slots__ = ()

    def open(self, path: str, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        """Open ``path`` and return its descriptor, which no executed program inherits."""
        return os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close ``fd``. It is closed even if this raises."""
        os.close(fd)

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        """Write ``buffers`` at the file's position; return how many bytes were taken."""
        return os.writev(fd, buffers)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill ``buffers`` from ``offset``; return how many bytes came."""
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write ``data`` at ``offset``; return how many bytes were taken."""
        return os.pwrite(fd, data, offset)

    def clone(self, source: int, target: int) -> None:
        """Make the empty file ``target`` share the blocks of ``source``, where the file system can."""
        fcntl.ioctl(target, _FICLONE, source)

    def copy_range(self, source: int, target: int, nbytes: int, offset: int) -> int:
        """Copy up to ``nbytes`` at ``offset`` within the kernel; return how many were copied."""
        return os.copy_file_range(source, target, nbytes, offset, offset)

    def fsync(self, fd: int) -> None:
        """Make the content of ``fd``, a file or a directory, durable."""
        os.fsync(fd)

    def start_writing(self, fd: int) -> None:
        """Have the kernel begin to write what it holds of ``fd``; a hint, which fails in silence."""
        if _libc_sync_file_range is not None:
            _libc_sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)

    def syncfs(self, fd: int) -> None:
        """Make all of the file system of ``fd`` durable; ENOSYS where there is no such call."""
        if _libc_syncfs is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if _libc_syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def fstat(self, fd: int) -> os.stat_result:
        """Return what ``fd`` is, its size and its owner."""
        return os.fstat(fd)

    def mmap(self, fd: int, nbytes: int) -> mmap.mmap:
        """Map the first ``nbytes`` of ``fd`` read-only; see :mod:`fbcache.store.mapping`."""
        return map_file(fd, nbytes)

    def lock(self, fd: int) -> bool:
        """Take the lock on ``fd``'s file unless another holds it; closing ``fd`` gives it back."""
        return filelock.lock_descriptor(fd, blocking=False)

    def rename(self, source: str, target: str) -> None:
        """Give ``source`` the name ``target``, atomically."""
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Give the file ``source`` the further name ``target``; a link is not followed."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        """Remove a file's name."""
        os.unlink(path, dir_fd=dir_fd)

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        """Make one directory."""
        os.mkdir(path, mode)

    def makedirs(self, path: str, mode: int = 0o700) -> None:
        """Make a directory and the missing ones above it, unless it is there."""
        os.makedirs(path, mode, exist_ok=True)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        """Remove an empty directory."""
        os.rmdir(path, dir_fd=dir_fd)

    def listdir(self, path: str | int) -> list[str]:
        """Return the names in a directory, given by its path or its descriptor."""
        return os.listdir(path)

    def lstat(self, path: str, *, dir_fd: int | None = None) -> os.stat_result:
        """Return what is at ``path``; a link is not followed."""
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)

    def exists(self, path: str) -> bool:
        """Whether there is something at ``path``."""
        return os.path.exists(path)

    def free_bytes(self, path: str) -> int:
        """Return the bytes that this user may still write to the file system of ``path``."""
        return (room := os.statvfs(path)).f_bavail * room.f_frsize


#: The disk as it is.
DISK = Disk()
