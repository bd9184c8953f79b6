"""Checkpoints of small values, which no file of the pool's holds alone, and of large ones beside them."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from fbcache import CorruptBlobError, DiskFullError, FBPool, State, StorageError, TrackedDirectory
from fbcache.errors import PoolClosedError
from fbcache.store.auto import AutoStore
from fbcache.store.packed import PackedStore
from tests.checkpoint.cuts import cut_of, entry_of, nothing_is_left
from tests.checkpoint.opened import in_memory
from tests.checkpoint.scene import Make, Scene
from tests.checkpoint.test_power_loss import check_images, seeded_keys
from tests.conftest import GatedDisk, MakePool, Running, _Pools
from tests.directories import blobs_in, versions_on
from tests.faults import PATIENCE, FaultyDisk, oserror
from tests.packing import descriptors

Spawn = Callable[..., Running]
STORES = ["auto", "packed", "files"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "tracked"


@pytest.fixture(params=["auto", "packed"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_gated(_pools: _Pools, tmp_path: Path, kind: str) -> Callable[..., tuple[FBPool, GatedDisk]]:
    """A pool that packs, with one I/O thread, and its disk."""

    def make(memory: Any = "4MB", **options: Any) -> tuple[FBPool, GatedDisk]:
        disk = GatedDisk()
        (directory := tmp_path / "gated").mkdir()
        store = (AutoStore if kind == "auto" else PackedStore)(str(directory), disk=disk)
        return _pools.make(memory, {"io_threads": 1, **options, "store": store}, disk), disk

    return make


def small(number: int) -> dict[str, Any]:
    return {"n": number, "rest": [number] * (number % 7)}


def large(number: int) -> np.ndarray[Any, Any]:
    return np.full(20_000, number)


def fill(pool: FBPool, count: int = 30, by: int = 0) -> None:
    """Small values and large ones, by names that say which."""
    for number in range(count):
        pool["small", number] = small(number + by)
    for number in range(3):
        pool["large", number] = large(number + by)


def check(pool: FBPool, count: int = 30, by: int = 0) -> None:
    assert len(pool) == count + 3
    for what, number in pool:
        found = pool[what, number]
        if what == "small":
            assert found == small(number + by)
        else:
            assert (found == number + by).all()


def restored(target: Path, **options: Any) -> FBPool:
    return FBPool.from_checkpoint(target, memory="4MB", min_free=0, **options)


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("into", STORES)
@pytest.mark.parametrize("source", STORES)
@pytest.mark.parametrize("evicted", [False, True])
def test_what_one_store_saves_another_restores(
    make_pool: MakePool, target: Path, tmp_path: Path, source: str, into: str, evicted: bool
) -> None:
    pool = make_pool("4MB", store=source)
    fill(pool)
    if evicted:
        pool.evict()
    pool.save(target)
    pool.close()
    with restored(target, store=into, directory=tmp_path / "other") as other:
        check(other)
        other.evict()
        check(other)
        other.validate()
        for number in range(30):
            with other.get_mut(("small", number)) as value:
                value["n"] = 1000
        assert other["small", 3]["n"] == 1000
        other.drain()
    assert not list((tmp_path / "other").rglob("*.segment"))
    assert descriptors(tmp_path / "other") == 0
    with restored(target) as third:
        check(third)


def test_another_process_restores_both_kinds(make_pool: MakePool, target: Path, tmp_path: Path) -> None:
    pool = make_pool("4MB")
    fill(pool)
    pool.save(target)
    script = f"""
import sys
from fbcache import FBPool
for store in {STORES}:
    options = dict(memory="1MB", min_free=0, store=store, directory=sys.argv[2])
    with FBPool.from_checkpoint(sys.argv[1], **options) as p:
        assert all(p["small", n] == {{"n": n, "rest": [n] * (n % 7)}} for n in range(30))
        assert all((p["large", n] == n).all() and len(p["large", n]) == 20_000 for n in range(3))
"""
    arguments = [sys.executable, "-c", script, str(target), str(tmp_path / "child")]
    subprocess.run(arguments, check=True, timeout=60)


def test_saving_twice_writes_nothing_new_and_keeps_keys(make_pool: MakePool, target: Path, kind: str) -> None:
    pool = make_pool("4MB", store=kind)
    handles = {name: pool.put(name, small(name)) for name in range(20)}
    key = handles[3].key
    first = pool.save(target)
    assert first.blobs_written == 20
    keys = {name: fb.key for name, fb in handles.items()}
    assert keys[3] == key and set(keys.values()) == set(TrackedDirectory(target).keys())
    assert len(blobs_in(target)) == 1, "they are in a pack"
    spills = pool.stats().spills
    second = pool.save(target)
    assert (second.blobs_written, second.bytes_written) == (0, 0)
    pool.evict()
    assert pool.save(target).blobs_written == 0
    assert pool.stats().spills == spills
    assert {name: fb.key for name, fb in handles.items()} == keys
    with pool.get_mut(5) as value:
        value["n"] = 77
    assert pool.save(target).blobs_written == 1
    assert handles[5].key != keys[5] and handles[5].key.hex in blobs_in(target)
    with pool.get(keys[6]) as value:
        assert value == small(6)
    handles.clear()
    nothing_is_left(pool)


def test_keys_are_those_of_the_checkpoint_after_a_restore(
    make_pool: MakePool, target: Path, kind: str
) -> None:
    pool = make_pool("4MB", store=kind)
    handles = [pool.put(name, small(name)) for name in range(5)]
    pool.save(target)
    keys = [fb.key for fb in handles]
    other = make_pool("4MB", store=kind)
    other.restore(target)
    for name, key in enumerate(keys):
        assert entry_of(other, name).token.key == key and other[name] == small(name)
    assert other.save(target).blobs_written == 0
    for name, key in enumerate(keys):
        with other.get_mut(name) as value:
            value["n"] += 1
        assert entry_of(other, name).key != key


def test_persisting_and_registering_small_values(make_pool: MakePool, target: Path, kind: str) -> None:
    pool = make_pool("4MB", store=kind)
    fb = pool.put("a", small(1))
    pool.evict()
    with TrackedDirectory(target) as tracked:
        key = fb.persist(tracked)
        assert key == fb.key == pool.persist("a", tracked)
        same = pool.register(tracked, key, "b")
        other = make_pool("4MB", store=kind)
        there = other.register(tracked, key, "c")
        assert fb.key == same.key == there.key == key
        assert pool["b"] == other["c"] == small(1)
        with pool.get_mut("b") as value:
            value["n"] = 9
        assert pool["a"] == small(1) == other["c"]
        assert fb.spawn_persist(tracked).result(PATIENCE) == key
        pool.delete("a")
        fb.drop()
        pool.drain()
        again = pool.register(tracked, key)
        with again.load() as value:
            assert value == small(1)
        assert tracked.delete(key)
        pool.evict()
        with again.load() as value:
            assert value == small(1)
        for each in (same, again, there):
            each.drop()
    nothing_is_left(pool)
    nothing_is_left(other)


def test_registering_what_is_being_deleted_waits_for_its_end(
    make_gated: Callable[..., tuple[FBPool, GatedDisk]], target: Path, spawn: Spawn
) -> None:
    pool, disk = make_gated()
    fb = pool.put("a", small(1))
    with TrackedDirectory(target) as tracked:
        key = fb.persist(tracked)
        gate = disk.gate("unlink")
        pool.delete("a")
        fb.drop()
        gate.wait_reached()
        registering = spawn(pool.register, tracked, key, "b")
        gate.open()
        registering.result()
        assert pool["b"] == small(1)
        pool.evict()
        assert pool["b"] == small(1)
    pool.validate()


# ------------------------------------------------------------------ one cut


def test_a_save_is_one_cut_while_writers_go_on(make_pool: MakePool, target: Path, kind: str) -> None:
    """Of two values that are put one after the other, no version has the second of a later turn."""
    pool = make_pool("1MB", store=kind)
    count = 8
    for number in range(count):
        pool["small", number] = small(0)
        pool["large", number] = large(0)
    ended = threading.Event()

    def write(seed: int) -> None:
        rng = Random(seed)
        for turn in itertools.count(1):
            if ended.is_set():
                return
            for number in range(seed, count, 2):
                if rng.random() < 0.5:
                    pool["small", number] = small(turn)
                else:
                    with pool.get_mut(("small", number)) as value:
                        value.update(small(turn))
                pool["large", number] = large(turn)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(6):
            pool.save(target, keep=None)
    finally:
        ended.set()
        for writer in writers:
            writer.join(PATIENCE)
    pool.validate()
    assert len(versions_on(target)) == 6
    for version in versions_on(target):
        with restored(target, version=version) as other:
            for number in range(count):
                found, value = other["small", number], other["large", number]
                assert (value == value[0]).all() and found == small(found["n"])
                assert found["n"] - value[0] in (0, 1), f"version {version} is of two moments"


def test_a_save_sees_what_was_there_at_its_cut(
    make_gated: Callable[..., tuple[FBPool, GatedDisk]], target: Path, spawn: Spawn
) -> None:
    """Although it is changed, replaced and deleted while its blob is on its way."""
    pool, disk = make_gated()
    fill(pool)
    keys = {name: pool.put(name, pool[name]).key for name in [("small", 4), ("small", 5)]}
    gate = disk.gate("pwrite")
    with cut_of(pool) as passed:
        saving = spawn(pool.save, target)
        passed()
    gate.wait_reached()
    changing = spawn(_change, pool, ("small", 4))
    pool["small", 5] = small(500)
    del pool["small", 6]
    gate.open()
    saving.result()
    changing.result()
    assert pool["small", 4]["n"] == 99 and pool["small", 5] == small(500) and ("small", 6) not in pool
    with restored(target) as other:
        check(other)
        assert entry_of(other, ("small", 5)).key == keys["small", 5]
    pool.drain()
    pool.validate()


def _change(pool: FBPool, name: Any) -> None:
    with pool.get_mut(name) as value:
        value["n"] = 99


def test_a_save_goes_on_while_its_values_are_moved(
    make_gated: Callable[..., tuple[FBPool, GatedDisk]], target: Path, spawn: Spawn, kind: str
) -> None:
    pool, disk = make_gated()
    segments = pool._engine.store._packed._segments if kind == "auto" else pool._engine.store._segments
    segments._nbytes = 4000
    for number in range(400):
        pool[number] = small(number)
    pool.evict()
    for number in range(400):
        if number % 4:
            del pool[number]
    gate = disk.gate("pwrite")
    moving = spawn(segments.make_room)
    gate.wait_reached()
    saving = spawn(pool.save, target)
    gate.open()
    saving.result()
    moving.result()
    pool.drain()
    with restored(target) as other:
        assert {name: other[name] for name in other} == {n: small(n) for n in range(0, 400, 4)}
    assert {name: pool[name] for name in pool} == {n: small(n) for n in range(0, 400, 4)}


def test_saves_deletions_and_compaction_at_once(make_pool: MakePool, target: Path, kind: str) -> None:
    pool = make_pool("200KB", store=kind, io_threads=2)
    engine_store = pool._engine.store
    segments = engine_store._packed._segments if kind == "auto" else engine_store._segments
    segments._nbytes = 5000
    for number in range(300):
        pool[number] = small(number)
    ended = threading.Event()

    def churn() -> None:
        for step in itertools.count(1):
            if ended.is_set():
                return
            pool["churn", step % 100] = [step] * 30
            if step % 50 == 0:
                pool.evict()
            if step % 70 == 0:
                for name in [name for name in pool if isinstance(name, tuple)][:60]:
                    pool.pop(name, None)

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        for _ in range(8):
            pool.save(target, range(300))
            pool.evict(range(0, 300, 3))
    finally:
        ended.set()
        churner.join(PATIENCE)
    pool.drain()
    pool.validate()
    with restored(target) as other:
        assert all(other[number] == small(number) for number in range(300))


# ------------------------------------------------------------------ failures


def test_a_save_of_what_cannot_be_written_commits_nothing(
    make_gated: Callable[..., tuple[FBPool, GatedDisk]], target: Path
) -> None:
    pool, disk = make_gated()
    fill(pool)
    pool.save(target)
    for number in range(10):
        pool["small", number] = small(number + 50)
    disk.fail("pwrite", error=oserror(28), times=None)
    with pytest.raises(DiskFullError):
        pool.save(target)
    disk.clear()
    assert versions_on(target) == [1]
    with restored(target) as other:
        check(other)
    pool.save(target)
    with restored(target) as other:
        assert other["small", 3] == small(53)
    with contextlib.suppress(DiskFullError):  # of those that the save did not wait for any more
        pool.drain()


def test_a_save_into_a_directory_that_cannot_be_written_leaves_the_pool_as_it_was(
    make_pool: MakePool, target: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from fbcache.checkpoint import tracked as tracked_module
    from fbcache.checkpoint.registry import directory_at

    disk = FaultyDisk()
    monkeypatch.setattr(tracked_module, "directory_at", lambda path: directory_at(path, disk))
    pool = make_pool("4MB", store=kind)
    for number in range(10):
        pool[number] = small(number)
    pool.evict()
    for call in ("writev", "rename", "fsync"):
        disk.fail(call, error=oserror(5), nth=3)
        with pytest.raises(StorageError):
            pool.save(target)
        disk.clear()
        pool.validate()
    assert {name: pool[name] for name in pool} == {n: small(n) for n in range(10)}
    assert pool.save(target).blobs_written == 10
    with restored(target) as other:
        assert {name: other[name] for name in other} == {n: small(n) for n in range(10)}


def test_a_damaged_record_is_not_saved(make_pool: MakePool, target: Path, kind: str) -> None:
    pool = make_pool("4MB", store=kind)
    for number in range(10):
        pool[number] = {"n": number, "text": f"text of {number}"}
    pool.evict()
    (path,) = Path(pool._engine.store.path).glob("*.segment")
    place = path.read_bytes().index(b"text of 7")
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"T")
    with pytest.raises(CorruptBlobError):
        pool.save(target)
    pool.save(target, [n for n in range(10) if n != 7])
    with restored(target) as other:
        assert len(other) == 9


@pytest.mark.parametrize("into", STORES)
def test_a_damaged_blob_of_a_checkpoint_shows_when_it_is_loaded_and_keeps_no_other(
    make_pool: MakePool, target: Path, into: str
) -> None:
    pool = make_pool("4MB")
    handles = {name: pool.put(name, small(name)) for name in range(5)}
    pool.save(target)
    key = handles[2].key
    (path,) = target.glob(f"??/{key.hex}")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    other = make_pool("4MB", store=into)
    other.restore(target)
    with pytest.raises(CorruptBlobError):
        other[2]
    assert all(other[name] == small(name) for name in (0, 1, 3, 4))


@pytest.mark.parametrize("into", STORES)
def test_a_restore_without_room_changes_nothing(make_pool: MakePool, target: Path, into: str) -> None:
    pool = make_pool("4MB")
    for number in range(50):
        pool[number] = {"text": str(number) * 1000}
    pool.save(target)
    other = make_pool("4MB", store=into, max_disk=20_000)
    other["mine"] = 1
    try:
        other.restore(target)
    except DiskFullError:
        assert list(other) == ["mine"]
        other.drain()
        assert other.stats().disk_bytes == 0, "what was copied for it stays"
        assert other.stats().entries == 1
    else:
        assert into != "packed"
        assert other[3] == {"text": "3" * 1000}
    other.validate()


def test_closing_the_pool_during_a_save_ends_it(
    make_gated: Callable[..., tuple[FBPool, GatedDisk]], target: Path, spawn: Spawn
) -> None:
    pool, disk = make_gated()
    fill(pool)
    gate = disk.gate("pwrite")
    with cut_of(pool) as passed:
        saving = spawn(pool.save, target)
        passed()
    gate.wait_reached()
    closing_it = spawn(pool.close)
    gate.open()
    closing_it.result()
    assert isinstance(saving.error(), (PoolClosedError, type(None)))
    assert versions_on(target) in ([], [1])


# ------------------------------------------------------------------ power loss


class SmallScene(Scene):
    """A scene whose pools pack what is small."""

    store: Any = AutoStore

    def pool(self, **numbers: int) -> FBPool:
        store = self.store(str(self.base / f"spill-{len(self.pools)}"), disk=self.disk)
        pool = FBPool("1MB", store=store, io_threads=1, verify="always")
        self.pools.append(pool)
        self.put(pool, **numbers)
        return pool

    def put(self, pool: FBPool, **numbers: int) -> None:
        for name, number in numbers.items():
            size = 16_000 if name.startswith("big") else 30
            self.handles.append(pool.put(name, np.arange(size) * 1000 + number))


def saved_changed_and_saved(scene: Scene) -> Iterator[Scene]:
    pool = scene.pool(a=1, b=2, c=3, big=4)
    scene.save(pool)
    pool.evict()
    for names in (["a"], ["b", "big"], [], ["a", "b", "c"]):
        scene.mutate(pool, *names)
        scene.save(pool, keep=2)
    a, _ = scene.persist(pool, "a", "big")
    scene.sync(pool, "a", "big")
    scene.delete(a)
    scene.mutate(pool, "a")
    scene.save(pool)
    yield scene


def failing_in_between(scene: Scene) -> Iterator[Scene]:
    pool = scene.pool(a=1, b=2, big=3)
    scene.save(pool)
    for call, nth in (("writev", 1), ("rename", 2), ("fsync", 1), ("fsync", 4)):
        scene.put(pool, c=nth, d=5)
        scene.mutate(pool, "a", "big")
        scene.faulty.fail(call, error=oserror(5), nth=nth)
        with pytest.raises(StorageError):
            scene.save(pool)
        scene.faulty.clear()
        scene.save(pool)
    yield scene


@pytest.mark.parametrize("store", [AutoStore, PackedStore])
@pytest.mark.parametrize("play", [saved_changed_and_saved, failing_in_between])
def test_after_power_loss_the_last_save_of_both_kinds_is_there_or_the_one_in_flight(
    play: Callable[[Scene], Iterator[Scene]], store: Any, tmp_path: Path, soak: bool
) -> None:
    with (
        in_memory() as memory,
        tempfile.TemporaryDirectory(dir=memory) as below,
        seeded_keys(1),
        closing(Make(Path(below), 1)) as make,
        FBPool("1MB", directory=tmp_path / "spill", io_threads=1, min_free=0, verify="always") as pool,
    ):
        scene = SmallScene(make.new_base(), FaultyDisk())
        make._made.append(scene)
        scene.store = store
        for played in play(scene):
            played.close()
        (place := Path(below) / "image").mkdir()
        check_images(scene.disk.log, 5000 if soak else 30, 1, place, scene.where, pool)


def test_a_value_that_was_saved_is_evicted_without_another_write(
    make_gated: Callable[..., tuple[FBPool, GatedDisk]], target: Path
) -> None:
    pool, disk = make_gated()
    fill(pool)
    pool.save(target)
    written = disk.count("pwrite"), disk.count("writev")
    pool.evict()
    assert (disk.count("pwrite"), disk.count("writev")) == written
    assert all(entry_of(pool, name).state is State.SPILLED for name in pool)
    check(pool)
