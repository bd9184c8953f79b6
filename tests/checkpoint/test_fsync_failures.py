"""Every system call of a save fails in turn: it raises and the former checkpoint stands, or it has saved.

Invariants 9 and 12. The n-th fsync, link, rename, write and so on of a save fails, for every n that there is.
Either the save raises a typed error, and the former checkpoint loads exactly; or only clean-up failed,
and it returns and the new one does. Nothing is synced again after a sync of it failed, no descriptor stays
open, and the next save is whole.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fbcache import FBCacheError, FBCacheWarning, FBPool, FileStore, StorageError, TrackedDirectory
from fbcache.checkpoint.directory import Directory
from fbcache.errors import DiskFullError
from fbcache.store import syncing
from tests.checkpoint.opened import Value, exact, fresh, in_memory, leftovers, look
from tests.faults import CALLS, FaultyDisk, oserror

#: ``exists`` and ``free_bytes`` never fail: they answer, or what asks has failed already.
FAILING = [call for call in CALLS if call not in ("exists", "free_bytes")]

#: Calls that take room on the disk.
WRITING = ["open", "writev", "pwrite", "link", "rename", "makedirs", "clone", "copy_range", "fsync", "syncfs"]

CASES = [(call, errno.EIO) for call in FAILING] + [(call, errno.ENOSPC) for call in WRITING]

#: What each way of saving does at least.
USED = {
    "first": {"open", "writev", "pwrite", "preadv", "link", "rename", "makedirs", "fsync", "lock", "fstat"},
    "second": {"open", "close", "writev", "link", "rename", "makedirs", "fsync", "unlink", "listdir"},
    "across": {"clone", "copy_range", "writev", "rename", "fsync"},
    "syncfs": {"syncfs", "fsync", "open"},
}

Identity = tuple[int, int]


class JealousDisk(FaultyDisk):
    """Sees to it that no file is synced again after a sync of it failed.

    What failed stays open here, so that no other file gets its number.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.settled: set[Identity] = set()
        self.doubtful: dict[Identity, int] = {}
        self.again: list[str] = []
        self._guard = threading.Lock()

    def fsync(self, fd: int) -> None:
        status = os.fstat(fd)
        with self._guard:
            if (status.st_dev, status.st_ino) in self.doubtful:
                self.again.append(os.readlink(f"/proc/self/fd/{fd}"))
        try:
            super().fsync(fd)
        except OSError:
            if stat.S_ISREG(status.st_mode):  # a directory has to be tried again
                self._doubt(os.dup(fd))
            raise

    def syncfs(self, fd: int) -> None:
        try:
            super().syncfs(fd)
        except OSError:
            for path in blobs(self.root):
                if identity(path) not in self.settled:
                    self._doubt(os.open(path, os.O_RDONLY))
            raise

    def _doubt(self, fd: int) -> None:
        status = os.fstat(fd)
        with self._guard:
            former = self.doubtful.get((status.st_dev, status.st_ino))
            self.doubtful[status.st_dev, status.st_ino] = fd
        if former is not None:
            os.close(former)

    def close_all(self) -> None:
        while self.doubtful:
            os.close(self.doubtful.popitem()[1])


def identity(path: Path) -> Identity:
    return (status := path.stat()).st_dev, status.st_ino


def blobs(root: Path) -> list[Path]:
    return [path for path in root.glob("??/*") if len(path.name) == 32]


class Saving:
    """A pool, a directory and a disk that fails; one save after another."""

    def __init__(self, base: Path, way: str) -> None:
        self.path = base / "tracked"
        self.disk = JealousDisk(self.path)
        (base / "spill").mkdir(parents=True)
        self.pool = FBPool("1MB", store=FileStore(str(base / "spill"), disk=self.disk), io_threads=2)
        self.directory: Directory = fresh(self.path, self.disk)
        for name, number in zip("abcd", range(4), strict=True):
            self.pool[name] = np.arange(500 if name == "a" else 20) + number
        if way != "first":
            self.save()
            self.pool["d"] = np.ones(3)
            for name in "ab":
                with self.pool.get_mut(name) as array:
                    array += 10
            self.pool.drain()
        if way == "across":
            self.disk.fail("link", error=oserror(errno.EXDEV), times=None)

    def save(self) -> None:
        """Open, save and close, as ``pool.save(path)`` does."""
        with TrackedDirectory._over(self.directory) as tracked:
            self.pool.save(tracked)

    def saves_or_raises(self) -> BaseException | None:
        """Save; return what it raises, which may only be what says where and why."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FBCacheWarning)
            try:
                self.save()
            except FBCacheError as error:
                assert isinstance(error, StorageError) and error.path and str(error.path) in str(error)
                return error
            finally:
                self.end_writes()
        return None

    def end_writes(self) -> None:
        """Let those end that went on beside the one that failed."""
        try:
            self.pool.drain()
        except StorageError:
            pass

    def found(self) -> list[dict[str, Value]]:
        """The values of each version, as a process that reads sees them."""
        if not self.path.exists():
            return []
        return [version.values for version in look(self.path, readonly=True).versions.values()]

    def values(self) -> dict[str, Value]:
        return {name: exact(self.pool[name]) for name in "abcd"}

    def close(self) -> None:
        self.disk.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FBCacheWarning)  # of writes and deletions that failed
            self.pool.close()


@pytest.fixture
def below() -> Iterator[Path]:
    with in_memory() as path:
        yield path


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(("call", "code"), CASES, ids=lambda case: errno.errorcode.get(case, case))
@pytest.mark.parametrize("way", USED)
def test_a_save_whose_nth_call_fails_raises_and_the_former_stands_or_it_has_saved(
    below, monkeypatch, way, call, code, lasting
):
    if way == "syncfs":
        monkeypatch.setattr(syncing, "SYNCFS_FROM", 1)
        monkeypatch.setattr(syncing, "_syncfs_tells", lambda root: True)
    if way == "across" and call == "link":
        return
    for nth in itertools.count(1):
        saving = Saving(below / str(nth), way)
        try:
            made = fails_at(saving, call, code, nth, lasting)
        except Exception as error:
            error.add_note(f"where {call} {nth} failed; the calls were {saving.disk.log}")
            raise
        finally:
            saving.disk.close_all()
            saving.close()
        if not made:
            assert nth > 1 or call not in USED[way], f"there was no {call}"
            break


def fails_at(saving: Saving, call: str, code: int, nth: int, lasting: bool) -> bool:
    """Save while the ``nth`` call fails, and check what comes of it; False if there was no such call."""
    disk = saving.disk
    former, values = saving.found(), saving.values()
    disk.settled = set(map(identity, blobs(saving.path)))
    count = disk.count(call)
    descriptors = len(os.listdir("/proc/self/fd"))

    disk.fail(call, error=oserror(code), nth=nth, times=None if lasting else 1)
    error = saving.saves_or_raises()
    disk.clear()
    made = disk.count(call) >= count + nth

    found = saving.found()
    if error is None:
        assert found[-1] == values and (found[:-1] in ([], former))
    else:
        assert made, error
        assert found == former
        assert isinstance(error, DiskFullError) == (code == errno.ENOSPC), error
    assert len(os.listdir("/proc/self/fd")) == descriptors + len(disk.doubtful)
    check_next_save(saving)
    return made


def check_next_save(saving: Saving) -> None:
    saving.pool["e"] = np.arange(9)
    expected = {**saving.values(), "e": exact(np.arange(9))}
    saving.save()
    assert saving.found() == [expected]
    assert not [path for path in blobs(saving.path) if identity(path) in saving.disk.doubtful]
    opened = look(saving.path, readonly=False)
    assert [version.values for version in opened.versions.values()] == [expected]
    assert not leftovers(saving.path, opened)
    assert not saving.disk.again
