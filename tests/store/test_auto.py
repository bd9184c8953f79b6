"""The default store: both halves in one directory, under one set of limits."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from fbcache.errors import DiskFullError, StorageError
from fbcache.store.auto import SMALL, AutoStore
from fbcache.store.disk import DISK
from fbcache.store.protocol import BlobStore, FileBacked, Packing, StoreLimits
from fbcache.store.reaper import reap, remove_session
from fbcache.testing import StoreTests
from tests.blobs import files_below, frames_of, same
from tests.faults import FaultyDisk, oserror
from tests.packing import GatedLedger, PackingDisk, blob, descriptors, record
from tests.sessions import dead_owner, make_session


class TestAutoStore(StoreTests):
    def make_store(self, directory: Path, limits: StoreLimits) -> AutoStore:
        self.disk = FaultyDisk()
        return AutoStore(str(directory), limits=limits, disk=self.disk)

    @contextmanager
    def failing(self, store: BlobStore) -> Iterator[None]:
        self.disk.fail("writev", error=oserror(errno.EIO), times=None)
        yield
        self.disk.clear()


@pytest.fixture
def disk() -> PackingDisk:
    return PackingDisk()


@pytest.fixture
def store(tmp_path: Path, disk: PackingDisk) -> Iterator[AutoStore]:
    directory = tmp_path / "store"
    directory.mkdir()
    store = AutoStore(str(directory), disk=disk, limits=StoreLimits(max_disk=100_000))
    yield store
    disk.clear()
    store.close()
    assert files_below(directory) == [] and list(directory.iterdir()) == []
    assert descriptors(directory) == 0


def packed(store: AutoStore, nbytes: int, seed: int = 0) -> tuple[int, int]:
    (slot,), (taken,) = store.append([blob(nbytes, seed)])
    return slot, taken


def filed(store: AutoStore, nbytes: int) -> UUID:
    store.write(key := uuid4(), frames_of(nbytes))
    return key


def test_it_packs_by_slot_and_lends_files_by_key(store: AutoStore) -> None:
    assert isinstance(store, Packing) and isinstance(store, FileBacked) and store.small == SMALL
    slot, taken = packed(store, 100, 1)
    key = filed(store, 500)
    assert same(store.at(slot, writable=False), blob(100, 1))
    assert same(store.read(key, writable=False, verify=True), frames_of(500))
    assert Path(store.path_of(slot)).suffix == ".segment"
    assert Path(store.file_of(key)).name == key.hex
    store.free([slot], [taken])
    store.delete(key)
    assert store.disk_bytes == 0


def test_a_limit_is_one_for_both(store: AutoStore) -> None:
    key = filed(store, 60_000)
    taken = store.disk_bytes
    slots = [packed(store, 3000, seed) for seed in range(8)]
    assert store.disk_bytes == taken + 8 * record(3000)
    assert store.disk_bytes + store.bytes_free == 100_000
    with pytest.raises(DiskFullError):
        filed(store, 20_000)
    with pytest.raises(DiskFullError):
        store.append([blob(20_000)])
    store.delete(key)
    filed(store, 60_000)
    store.free([slot for slot, _ in slots], [taken for _, taken in slots])


def test_dead_packed_space_is_room_for_files(store: AutoStore) -> None:
    """What the packed half could reclaim is not refused to the other half."""
    slots = [packed(store, 5900, seed) for seed in range(14)]
    store.free(*zip(*slots[1::2], strict=True))
    key = filed(store, 30_000)
    for seed, (slot, _) in list(enumerate(slots))[::2]:
        assert same(store.at(slot, writable=False), blob(5900, seed))
    with pytest.raises(DiskFullError):
        filed(store, 100_000 - 30_000 - 7 * record(5900))
    assert same(store.read(key, writable=False, verify=True), frames_of(30_000))


def test_files_may_fill_the_room_that_compaction_needs_and_nothing_is_lost(store: AutoStore) -> None:
    slots = [packed(store, 1000, seed) for seed in range(40)]
    while store.bytes_free > 1000:
        filed(store, max(store.bytes_free - 5000, 1))
    for slot, taken in slots[::2]:
        store.free([slot], [taken])
    for seed, (slot, _) in enumerate(slots):
        if seed % 2:
            assert same(store.at(slot, writable=False), blob(1000, seed))
    for slot, taken in slots[1::2]:
        store.free([slot], [taken])
    assert not list(Path(store.path).glob("*.segment"))


def test_closing_leaves_nothing_of_either_although_a_file_stays(store: AutoStore, disk: PackingDisk) -> None:
    packed(store, 100)
    key = filed(store, 100)
    disk.fail("unlink", error=oserror(errno.EACCES))
    with pytest.raises(StorageError, match="remove"):
        store.close()
    left = files_below(Path(store.path))
    assert left == [f"{key.hex[:2]}/{key.hex}"]
    Path(store.path, left[0]).unlink()
    Path(store.path, left[0]).parent.rmdir()


def test_closing_during_a_packed_write_leaves_nothing(tmp_path: Path, spawn: Any) -> None:
    disk = PackingDisk()
    store = AutoStore(str(tmp_path), disk=disk)
    packed(store, 50)
    gate = disk.gate("pwrite")
    outcome: list[Any] = []

    def write() -> None:
        try:
            packed(store, 100)
        except StorageError as error:
            outcome.append(str(error))

    running = spawn(write)
    gate.wait_reached()
    store.close()
    gate.open()
    running.result()
    assert "closed" in outcome[0]
    assert files_below(tmp_path) == [] and descriptors(tmp_path) == 0


def test_a_closed_one_refuses_both(store: AutoStore) -> None:
    slot, taken = packed(store, 10)
    store.close()
    store.close()
    with pytest.raises(StorageError, match="closed"):
        packed(store, 10)
    with pytest.raises(StorageError, match="closed"):
        filed(store, 10)
    store.free([slot], [taken])
    assert store.disk_bytes == 0


def test_nothing_is_small_at_minus_one(tmp_path: Path) -> None:
    store = AutoStore(str(tmp_path), small=-1)
    assert frames_of().nbytes > store.small
    store.close()
    assert GatedLedger().used == 0


def test_the_segments_of_a_dead_session_are_reaped_and_foreign_files_stay(tmp_path: Path) -> None:
    session = make_session(tmp_path, dead_owner())
    store = AutoStore(str(session))
    packed(store, 100)
    for name in ("1.segment.bak", "x.segment", "01234567890.segment", "notes.txt"):
        (session / name).write_bytes(b"mine")
    names = {path.name for path in session.glob("*.segment")}
    assert names == {"0.segment", "x.segment", "01234567890.segment"}
    reap(str(tmp_path))
    assert files_below(session) == ["01234567890.segment", "1.segment.bak", "notes.txt", "x.segment"]
    store.close()
    for path in session.iterdir():
        path.unlink()
    (session / "7.segment").write_bytes(b"ours")
    remove_session(str(session), DISK)
    assert not session.exists()
