"""A blob's file given a second place: by hard link, else reflink, else copy_file_range, else a plain copy.

Guarantees:

- The new name shows a whole blob or is not there: a link is atomic, and a copy is made under a
  temporary name and renamed.
- Whatever ends a copy early, its temporary file is removed and no descriptor is left.
- The former file is not changed, apart from its count of links.
- A copy takes a bounded piece of memory, however large the blob. Only a checked copy holds the
  blob's header whole.
- Nothing is synced; see :mod:`fbcache.store.syncing`.

An ``OSError`` goes on to the caller as it came, who knows what it was for: a source or a shard
that is missing, a full disk. Nothing is shared between calls, but two at a time may not have
the same ``temporary``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from xxhash import xxh3_64

from fbcache.codec.layout import (
    PREFIX_SIZE,
    BlobHeader,
    Span,
    read_prefix,
    unpack_header,
    verify_padding,
)
from fbcache.errors import CorruptBlobError
from fbcache.store.disk import Disk
from fbcache.store.transfer import read_all, write_all

_T = TypeVar("_T")

#: A link is not followed, and a pipe in the blob's place must not hold the reader up.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

#: Bytes of a plain copy at a time. From 64 KiB to 16 MiB, all sizes take the same time.
_PIECE: Final = 1024 * 1024

#: Bytes that one call lets the kernel copy, which an interrupt has to wait for: well below a second.
_RANGE: Final = 64 * 1024 * 1024

#: The file system, the kernel or a sandbox has no such call, or none between these two files. Where
#: permission is missing for good (EPERM, EACCES), creating the copy's file fails and says so.
_NOT_HERE: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM, errno.EACCES})

#: EPERM is also what a file system without links answers, and ``fs.protected_hardlinks``.
_NO_LINK: Final = _NOT_HERE | {errno.EMLINK}

#: What FICLONE and copy_file_range answer where they do not work. EBADF is in the manual for
#: file systems without reflinks. ENOSPC, EDQUOT, EIO and ENOMEM are final: a plain copy needs no less.
_NO_HELP: Final = _NOT_HERE | {errno.EINVAL, errno.ENOTTY, errno.EBADF}


class Way(StrEnum):
    """How a file came to its second place."""

    LINK = "link"  #: a further name of the same file
    CLONE = "clone"  #: a file of its own that shares the blocks
    RANGE = "range"  #: copied within the kernel, or by a server
    COPY = "copy"  #: copied through memory


def transplant(disk: Disk, source: str, target: str, temporary: str) -> Way:
    """Make ``target`` the same blob file as ``source``.

    A target that is there already is success, as :attr:`Way.LINK`: a blob under its key never
    changes, so whoever made it made it of the same bytes.

    Parameters
    ----------
    temporary : str
        A name in the target's directory for a copy that is not whole yet. What a crash left
        there is removed.

    Raises
    ------
    OSError
        The source cannot be read, is no regular file, or changed its length meanwhile (EIO); or
        the target cannot be made. The target is not there, unless it was before, and neither is
        the temporary file.
    """
    try:
        disk.link(source, target)
    except FileExistsError:
        return Way.LINK
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return _through(disk, source, target, temporary, partial(_fill, disk))
    return Way.LINK


def copy_checked(disk: Disk, source: str, target: str, temporary: str, key: UUID) -> None:
    """Make ``target`` a new file with the bytes of ``source``, all of them held against checksums.

    For a file whose fsync failed: what memory and disk hold of it may differ by now, and no
    link or reflink may carry that over. What is written is the memory that was checked.

    Parameters
    ----------
    temporary : str
        As in :func:`transplant`.
    key : UUID
        Whose blob it should be.

    Raises
    ------
    CorruptBlobError
        The source is no regular file, damaged, or another key's.
    OSError
        It could not be read, or the copy not written.

    After either, the target is as before and the temporary file is gone.
    """

    def fill(read_fd: int, write_fd: int) -> None:
        _Checked(disk, read_fd, key, source).copy(write_fd)

    _through(disk, source, target, temporary, fill)


# ---------------------------------------------------------------------------------- the new file


def _through(disk: Disk, source: str, target: str, temporary: str, fill: Callable[[int, int], _T]) -> _T:
    """Let ``fill`` copy from the open source into a new file, then give it the target's name."""
    read_fd = disk.open(source, _READ)
    try:
        try:
            filled = _write_new(disk, temporary, partial(fill, read_fd))
        finally:
            disk.close(read_fd)
        disk.rename(temporary, target)
    except BaseException:
        _discard(disk, temporary)
        raise
    return filled


def _write_new(disk: Disk, temporary: str, fill: Callable[[int], _T]) -> _T:
    """Let ``fill`` write a new file, and close it."""
    try:
        fd = disk.open(temporary, _CREATE)
    except FileExistsError:  # left by a copy of this key that died; never a visible file
        disk.unlink(temporary)
        fd = disk.open(temporary, _CREATE)
    try:
        return fill(fd)
    finally:
        disk.close(fd)


def _discard(disk: Disk, temporary: str) -> None:
    """Remove the temporary file after a failure, which is what the caller hears of, not this."""
    try:
        disk.unlink(temporary)
    except OSError:
        pass


# ---------------------------------------------------------------------------------- copies


def _fill(disk: Disk, source: int, target: int) -> Way:
    """Copy ``source`` into the new file ``target`` in the first way that works here."""
    status = disk.fstat(source)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a blob's place is taken by what is no regular file")
    size = status.st_size
    if _clone(disk, source, target):
        way = Way.CLONE
    elif _copy_range(disk, source, target, size):
        way = Way.RANGE
    else:
        _copy(disk, source, target, size)
        way = Way.COPY
    if not disk.fstat(target).st_size == size == disk.fstat(source).st_size:
        raise OSError(errno.EIO, "the file's length changed while it was copied")
    return way


def _clone(disk: Disk, source: int, target: int) -> bool:
    try:
        disk.clone(source, target)
    except OSError as error:
        if error.errno not in _NO_HELP:
            raise
        return False
    return True


def _copy_range(disk: Disk, source: int, target: int, size: int) -> bool:
    """Copy ``size`` bytes within the kernel; say False where it does not do that to the end.

    Some file systems answer 0 too early, or a failure after a good start.
    """
    done = 0
    while done < size:
        try:
            moved = disk.copy_range(source, target, min(size - done, _RANGE), done)
        except OSError as error:
            if error.errno not in _NO_HELP:
                raise
            return False
        if moved == 0:
            return False
        done += moved
    return True


def _copy(disk: Disk, source: int, target: int, size: int) -> None:
    """Copy up to ``size`` bytes through memory.

    It begins at the start, for copy_range has not moved the target's position; and a call that
    gave up halfway is not trusted with its first half.
    """
    memory = memoryview(bytearray(min(size, _PIECE)))
    for offset, length in _pieces(0, size):
        came = read_all(disk, source, [memory[:length]], offset)
        write_all(disk, target, [memory[:came]])
        if came < length:
            return


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each piece of a stretch of the file."""
    end = offset + length
    for start in range(offset, end, _PIECE):
        yield start, min(_PIECE, end - start)


class _Checked:
    """A blob's open file, copied piece by piece, each held against its checksum on the way.

    A buffer's checksum is known to match only at its end, when most of it is written: the copy
    is given its name after that.
    """

    def __init__(self, disk: Disk, fd: int, key: UUID, path: str) -> None:
        self._disk = disk
        self._fd = fd
        self._key = key
        self._path = path
        self._memory = memoryview(bytearray(_PIECE))

    def copy(self, target: int) -> None:
        """Copy it whole to the position of ``target``."""
        raw, header = self._read_header()
        write_all(self._disk, target, [raw])
        end = header.start
        for span in header.spans:
            self._copy_padding(target, end, span.offset - end)
            self._copy_buffer(target, span)
            end = span.offset + span.length

    def _read_header(self) -> tuple[memoryview, BlobHeader]:
        status = self._disk.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._corrupt("it is no regular file")
        size = status.st_size
        raw = self._read(self._memory[: min(size, PREFIX_SIZE)], 0)
        length = read_prefix(raw, key=self._key, path=self._path)
        if length <= size:  # a longer one is a lie, for unpack_header to tell
            raw = self._read(memoryview(bytearray(length)), 0)
        return raw, unpack_header(raw, key=self._key, file_size=size, path=self._path)

    def _copy_padding(self, target: int, offset: int, length: int) -> None:
        padding = self._read(self._memory[:length], offset)  # always shorter than a page
        verify_padding(padding, self._key, self._path)
        write_all(self._disk, target, [padding])

    def _copy_buffer(self, target: int, span: Span) -> None:
        checksum = xxh3_64()
        for offset, length in _pieces(span.offset, span.length):
            piece = self._read(self._memory[:length], offset)
            checksum.update(piece)
            write_all(self._disk, target, [piece])
        if checksum.intdigest() != span.checksum:
            raise self._corrupt(f"the buffer at offset {span.offset} does not match its checksum")

    def _read(self, memory: memoryview, offset: int) -> memoryview:
        if read_all(self._disk, self._fd, [memory], offset) < len(memory):
            raise self._corrupt("the file ends early")
        return memory

    def _corrupt(self, reason: str) -> CorruptBlobError:
        return CorruptBlobError(reason, key=self._key, path=self._path)
