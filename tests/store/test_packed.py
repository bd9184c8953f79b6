"""The packed store: the kit for stores, and what is its own."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4

import pytest

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError, DiskFullError, StorageError
from fbcache.store import mapping
from fbcache.store.ledger import Ledger
from fbcache.store.packed import PackedStore, _segment_for
from fbcache.store.protocol import BlobStore, FileBacked, Packing, StoreLimits
from fbcache.store.segment import SEGMENT
from fbcache.testing import StoreTests
from tests.blobs import files_below, same
from tests.faults import FaultyDisk, oserror
from tests.interrupts import Interrupter
from tests.packing import PackingDisk, at_once, blob, descriptors, record, whole


class TestPackedStore(StoreTests):
    options: dict[str, Any] = {}  # noqa: RUF012

    def make_store(self, directory: Path, limits: StoreLimits) -> PackedStore:
        self.disk = FaultyDisk()
        return PackedStore(str(directory), limits=limits, disk=self.disk, **self.options)

    @contextmanager
    def failing(self, store: BlobStore) -> Iterator[None]:
        self.disk.fail("pwrite", error=oserror(errno.EIO), times=None)
        yield
        self.disk.clear()

    def damage(self, store: BlobStore, directory: Path, needle: bytes) -> None:
        """A record has no key, and is found by its slot: that is what stands first in its segment."""
        if any(needle in file.read_bytes() for file in directory.iterdir()):
            super().damage(store, directory, needle)
            return
        for file in directory.iterdir():
            raw = bytearray(file.read_bytes())
            raw[0] ^= 1
            with open(file, "r+b") as opened:
                opened.write(raw)


class TestPackedStoreOfTinySegments(TestPackedStore):
    options = {"segment": 3000}  # noqa: RUF012


class TestPackedStoreWithoutMaps(TestPackedStore):
    options = {"segment": 50_000}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def unmapped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)


@pytest.fixture
def disk(tmp_path: Path) -> PackingDisk:
    return PackingDisk(tmp_path)


@pytest.fixture
def store(tmp_path: Path, disk: PackingDisk) -> Iterator[PackedStore]:
    directory = tmp_path / "store"
    directory.mkdir()
    store = PackedStore(str(directory), disk=disk, segment=1000)
    yield store
    disk.clear()
    store.close()
    assert files_below(directory) == [] and descriptors(directory) == 0


def write(store: PackedStore, nbytes: int, seed: int = 0) -> UUID:
    store.write(key := uuid4(), blob(nbytes, seed))
    return key


def read(store: PackedStore, key: UUID) -> Frames:
    return store.read(key, writable=False, verify=False)


def test_it_packs_everything_and_has_no_files_to_lend(store: PackedStore) -> None:
    assert isinstance(store, Packing) and not isinstance(store, FileBacked)
    for seed in range(20):
        write(store, 20, seed)
    assert len(files_below(Path(store.path))) == 1
    assert store.disk_bytes == 20 * record(20)


def test_keys_and_slots_are_apart(store: PackedStore) -> None:
    key = write(store, 10, 1)
    slots, sizes = store.append([blob(20, 2), whole(3)])
    assert same(read(store, key), blob(10, 1))
    assert same(store.at(slots[1], writable=True), whole(3))
    store.free(slots, sizes)
    assert same(read(store, key), blob(10, 1))
    assert store.disk_bytes >= record(10)
    with pytest.raises(CorruptBlobError):
        store.at(slots[0], writable=False)


def test_a_key_that_is_written_again_is_the_new_blob(store: PackedStore) -> None:
    key = write(store, 10, 1)
    store.write(key, blob(30, 2))
    assert same(read(store, key), blob(30, 2))
    store.delete(key)
    assert store.disk_bytes == 0 and files_below(Path(store.path)) == []


def test_a_key_whose_second_write_fails_keeps_the_first_blob(store: PackedStore, disk: PackingDisk) -> None:
    key = write(store, 10, 1)
    disk.fail("pwrite", error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        store.write(key, blob(30, 2))
    assert same(read(store, key), blob(10, 1))
    assert store.disk_bytes == record(10)


def test_errors_name_key_and_segment(store: PackedStore) -> None:
    key = write(store, 100, 1)
    path = Path(store.locate(key))
    assert path.suffix == ".segment" and path.parent == Path(store.path)
    raw = bytearray(path.read_bytes())
    raw[50] ^= 1
    with open(path, "r+b") as file:
        file.write(raw)
    with pytest.raises(CorruptBlobError) as caught:
        read(store, key)
    assert (caught.value.key, caught.value.path) == (key, str(path))
    store.delete(key)
    assert store.locate(key) == store.path
    with pytest.raises(CorruptBlobError) as caught:
        read(store, key)
    assert (caught.value.key, caught.value.path) == (key, store.path)


def test_a_blob_that_is_deleted_while_it_is_read_is_never_another(
    store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot may have been given to another blob in between."""
    key = write(store, 10, 1)
    real = store._segments.read

    def delete_first(*args: Any, **kwargs: Any) -> Frames:
        store.delete(key)
        write(store, 10, 2)
        return real(*args, **kwargs)

    monkeypatch.setattr(store._segments, "read", delete_first)
    with pytest.raises(CorruptBlobError):
        read(store, key)


def test_a_blob_that_is_written_again_while_it_is_read_is_the_new_one(
    store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = write(store, 10, 1)
    real = store._segments.read

    def write_first(*args: Any, **kwargs: Any) -> Frames:
        monkeypatch.setattr(store._segments, "read", real)
        store.write(key, blob(20, 2))
        return real(*args, **kwargs)

    monkeypatch.setattr(store._segments, "read", write_first)
    assert same(read(store, key), blob(20, 2))


def test_a_segment_is_a_sixteenth_of_the_limit_at_most() -> None:
    assert _segment_for(StoreLimits()) == SEGMENT
    assert _segment_for(StoreLimits(max_disk=1 << 40)) == SEGMENT
    assert _segment_for(StoreLimits(max_disk=1 << 20)) == 1 << 16
    assert _segment_for(StoreLimits(max_disk=3)) == 1


def test_two_stores_that_share_a_ledger_share_its_limit(tmp_path: Path) -> None:
    ledger = Ledger(StoreLimits(max_disk=10_000))
    for name in "ab":
        (tmp_path / name).mkdir()
    one, two = (PackedStore(str(tmp_path / name), ledger=ledger, segment=500) for name in "ab")
    one.write(uuid4(), blob(6000))
    with pytest.raises(DiskFullError) as caught:
        two.write(uuid4(), blob(5000))
    assert caught.value.needed == record(5000) and caught.value.free is not None
    two.write(uuid4(), blob(2000))
    assert one.disk_bytes == two.disk_bytes == record(6000) + record(2000)
    one.close()
    two.close()
    assert files_below(tmp_path) == [] and ledger.used == 0


def test_a_value_too_large_for_a_record_is_an_error_of_the_storage(
    store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbcache.store.records._LONGEST", 100)
    with pytest.raises(StorageError):
        store.write(uuid4(), blob(101))
    assert store.disk_bytes == 0


def close_orphan(directory: Path, where: str) -> None:
    """An interrupt between the decision to close a descriptor and the call loses its number."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(f"{directory}/"):
                assert where.startswith(("Segments._close_spent", "Disk.close")), where
                os.close(int(name))


def test_an_interrupt_anywhere_in_a_write_keeps_nothing_open(tmp_path: Path) -> None:
    """The caller's own thread writes, where a checkpoint is restored."""
    nth = 1
    while True:
        directory = tmp_path / str(nth)
        directory.mkdir()
        store = PackedStore(str(directory), segment=200)
        keys = [write(store, 50, seed) for seed in range(5)]
        with contextlib.suppress(KeyboardInterrupt), Interrupter(nth) as interrupter:
            write(store, 60, 9)
            store.delete(keys[0])
            store.delete(keys[1])
        for seed, key in list(enumerate(keys))[2:]:
            assert same(read(store, key), blob(50, seed)), interrupter.where
        keys.append(write(store, 70, 11))
        assert same(read(store, keys[-1]), blob(70, 11))
        store.close()
        assert files_below(directory) == [], interrupter.where
        close_orphan(directory, interrupter.where)
        if not interrupter.fired:
            break
        nth += 1
    assert nth > 50


def test_threads_that_close_and_write_leave_nothing(tmp_path: Path) -> None:
    for turn in range(10):
        directory = tmp_path / str(turn)
        directory.mkdir()
        store = PackedStore(str(directory), segment=700)

        def work(seed: int, store: PackedStore = store) -> None:
            rng = Random(seed)
            for _ in range(40):
                key = write(store, rng.randrange(300), seed)
                if rng.random() < 0.7:
                    store.delete(key)

        *outcomes, closed = at_once(lambda: work(1), lambda: work(2), lambda: work(3), store.close)
        assert closed is None
        assert all(isinstance(error, (StorageError, type(None))) for error in outcomes), outcomes
        assert files_below(directory) == [] and descriptors(directory) == 0
        assert store.disk_bytes == 0
