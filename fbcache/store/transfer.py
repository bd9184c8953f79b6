"""Whole transfers between a file and many pieces of memory, with no joined copy.

Guarantee: a transfer that the kernel cuts short goes on where it stopped, and no call gets more
pieces than the kernel takes. (What a signal interrupts, Python itself repeats.)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from fbcache.codec.frames import Buffer
from fbcache.store.disk import Disk

#: Most pieces in one call; 1024 on Linux.
IOV_MAX = os.sysconf("SC_IOV_MAX")


def write_all(disk: Disk, fd: int, pieces: Sequence[Buffer]) -> None:
    """Write ``pieces`` one after the other at the file's position.

    Raises
    ------
    OSError
        The disk did not take them all; some may have been written.
    """
    for batch in _batches(pieces):
        rest = batch
        while rest:
            moved = disk.writev(fd, rest)
            if moved == 0:
                raise OSError(errno.EIO, "the disk takes no more bytes")
            rest = _after(rest, moved)


def read_all(disk: Disk, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
    """Fill ``pieces`` one after the other from ``offset``.

    Returns
    -------
    int
        How many bytes came: fewer than the pieces hold only where the file ends.

    Raises
    ------
    OSError
        The disk did not give them; some pieces may have been filled.
    """
    start = offset
    for batch in _batches(pieces):
        rest = batch
        while rest:
            moved = disk.preadv(fd, rest, offset)
            if moved == 0:
                return offset - start
            offset += moved
            rest = _after(rest, moved)
    return offset - start


def _batches(pieces: Sequence[Buffer]) -> Iterator[list[memoryview]]:
    """As many pieces at a time as one call takes, leaving out empty ones: moving nothing means the end."""
    full = [memoryview(piece) for piece in pieces if len(piece)]
    for first in range(0, len(full), IOV_MAX):
        yield full[first : first + IOV_MAX]


def _after(pieces: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of ``pieces`` after their first ``moved`` bytes."""
    for index, piece in enumerate(pieces):
        if moved < len(piece):
            return [piece[moved:], *pieces[index + 1 :]]
        moved -= len(piece)
    return []
