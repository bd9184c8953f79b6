"""What tests of packed blobs share: small frames, a disk with a quota, and books that can be held at."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from random import Random

from fbcache.codec.frames import Frames
from fbcache.store.ledger import Ledger
from fbcache.store.protocol import StoreLimits
from fbcache.store.records import HEAD_SIZE
from tests.faults import PATIENCE, FaultyDisk, Gate, oserror


def blob(nbytes: int, seed: int = 0) -> Frames:
    """Frames that take ``HEAD_SIZE + nbytes`` on disk."""
    return Frames("msgpack", Random(seed).randbytes(nbytes), ())


def whole(seed: int = 0, *sizes: int, pickled: str | None = None) -> Frames:
    """Frames that are more than a tree."""
    rng = Random(seed)
    return Frames("test", rng.randbytes(20), [rng.randbytes(size) for size in sizes or (10, 0, 50)], pickled)


def record(nbytes: int) -> int:
    """Bytes that the record of ``blob(nbytes)`` takes."""
    return HEAD_SIZE + nbytes


class PackingDisk(FaultyDisk):
    """A faulty disk whose ``pwrite`` can be cut short, and that can have an end.

    Attributes
    ----------
    most : int or None
        Bytes that one ``pwrite`` takes, at most.
    quota : int or None
        Bytes that the files below ``directory`` may take.
    """

    def __init__(self, directory: str | Path | None = None, quota: int | None = None) -> None:
        super().__init__()
        self.directory = directory
        self.quota = quota
        self.most: int | None = None

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self.quota is not None and self.taken() + len(data) > self.quota:
            raise oserror(errno.ENOSPC)
        return super().pwrite(fd, data if self.most is None else data[: self.most], offset)

    def free_bytes(self, path: str) -> int:
        if self.quota is None:
            return super().free_bytes(path)
        return max(self.quota - self.taken(), 0)

    def taken(self) -> int:
        """Bytes on the disk below ``directory``."""
        assert self.directory is not None
        found = 0
        for file in Path(self.directory).rglob("*.segment"):
            try:
                found += file.stat().st_blocks * 512
            except FileNotFoundError:  # removed meanwhile
                pass
        return found


class GatedLedger(Ledger):
    """Books in which a write can be held right after it was counted: past its last system call."""

    __slots__ = ("gates",)

    def __init__(self, limits: StoreLimits | None = None) -> None:
        super().__init__(limits or StoreLimits())
        self.gates: list[Gate] = []

    def gate(self) -> Gate:
        """Hold the next write there."""
        gate = Gate()
        self.gates.append(gate)
        return gate

    def grow(self, nbytes: int) -> bool:
        grown = super().grow(nbytes)
        if self.gates:
            self.gates.pop(0).pass_through()
        return grown


def descriptors(directory: str | Path) -> int:
    """How many of this process's descriptors are open in ``directory``."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{fd}").startswith(str(directory))
        except OSError:
            pass
    return found


def at_once(*acts: object) -> list[BaseException | None]:
    """Run them in threads that start together; return what each raised."""
    raised: list[BaseException | None] = [None] * len(acts)
    start = threading.Barrier(len(acts))

    def run(number: int) -> None:
        start.wait(PATIENCE)
        try:
            acts[number]()  # type: ignore[operator]
        except BaseException as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    return raised
