"""Small values, which are written together and packed: what holds for one of them holds for each.

Every test runs with the default store and with the one that packs everything.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from fbcache import (
    CorruptBlobError,
    DiskFullError,
    FBCacheWarning,
    FBPool,
    ForkedPoolError,
    StaleKeyError,
    State,
    StorageError,
    UnsupportedTypeError,
)
from fbcache.codec import MsgpackCodec
from fbcache.entry import Entry
from fbcache.store.auto import SMALL, AutoStore
from fbcache.store.packed import PackedStore
from fbcache.store.protocol import StoreLimits
from tests.conftest import GatedDisk, MakePool, Running, Sleepers, _Pools
from tests.faults import oserror
from tests.packing import descriptors

Spawn = Callable[..., Running]
Make = Callable[..., tuple[FBPool, GatedDisk]]


@pytest.fixture(params=["auto", "packed"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(_pools: _Pools, tmp_path: Path, kind: str) -> Make:
    """``make(memory="1MB", *, segment=None, max_disk=None, **options)``: a pool that packs, and its disk."""

    def make_one(
        memory: Any = "1MB", *, segment: int | None = None, max_disk: int | None = None, **options: Any
    ) -> tuple[FBPool, GatedDisk]:
        disk = GatedDisk()
        directory = tmp_path / f"packed-{len(_pools._disks)}"
        directory.mkdir()
        limits = StoreLimits(max_disk=max_disk)
        store: Any
        if kind == "auto":
            store = AutoStore(str(directory), limits=limits, disk=disk)
            if segment is not None:
                store._packed._segments._nbytes = segment
        else:
            store = PackedStore(str(directory), limits=limits, disk=disk, segment=segment)
        return _pools.make(memory, {**options, "store": store}, disk), disk

    return make_one


def entry_of(pool: FBPool, name: Any) -> Entry:
    return pool._engine.names[name]


def slot_of(pool: FBPool, name: Any) -> int:
    token = entry_of(pool, name).token
    assert token is not None
    return token.slot


def value(number: int, size: int = 3) -> dict[str, Any]:
    return {"number": number, "text": f"{number} " * size, "list": [number] * size}


def fill(pool: FBPool, count: int, size: int = 3) -> None:
    for number in range(count):
        pool[number] = value(number, size)


def check(pool: FBPool, count: int, size: int = 3) -> None:
    for number in range(count):
        with pool.get(number) as found:
            assert found == value(number, size)
    pool.validate()


# ------------------------------------------------------------------ together


def test_small_values_are_written_together_and_come_back(make: Make) -> None:
    pool, disk = make(io_threads=1)
    fill(pool, 500)
    before = disk.count("pwrite")
    pool.evict()
    assert disk.count("pwrite") - before < 50
    assert all(slot_of(pool, number) >= 0 for number in range(500))
    assert pool.stats().spills == 500 and pool.stats().resident_bytes == 0
    check(pool, 500)
    assert pool.stats().loads == 500


def test_evicting_a_small_clean_value_writes_nothing(make: Make) -> None:
    """Invariant 8."""
    pool, disk = make()
    fill(pool, 100)
    pool.evict()
    check(pool, 100)
    written = disk.count("pwrite")
    pool.evict()
    assert disk.count("pwrite") == written
    check(pool, 100)
    stats = pool.stats()
    assert stats.clean_evictions == 100 and stats.spills == 100


def test_one_spilled_value_is_loaded_once_for_all(make: Make, spawn: Spawn, sleepers: Sleepers) -> None:
    """Invariant 11, where a load takes no system call that could be held: it is held in the codec."""

    class Gated(MsgpackCodec):
        reached, go = threading.Event(), threading.Event()

        def decode(self, *args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.go.wait(30)
            return super().decode(*args, **kwargs)

    pool, _ = make(codec=Gated())
    fill(pool, 1)
    pool.evict()

    def read() -> Any:
        with pool.get(0) as found:
            return found

    first = spawn(read)
    assert Gated.reached.wait(30)
    others = [spawn(read) for _ in range(3)]
    for _ in others:
        sleepers.next()
    Gated.go.set()
    assert all(each.result() is first.result() for each in others)
    assert pool.stats().loads == 1


def test_space_of_small_values_comes_back(make: Make) -> None:
    pool, _ = make(segment=2000, io_threads=1)
    for turn in range(10):
        fill(pool, 200)
        pool.evict()
        pool.drain()
        live = sum(entry.token.nbytes for entry in pool._engine.residency.entries if entry.token is not None)
        assert pool.stats().disk_bytes <= 2 * live + 2 * 70_000, turn
    for number in range(200):
        pool.delete(number)
    pool.drain()
    assert pool.stats().disk_bytes == 0
    assert not list(Path(pool._engine.store.path).glob("*.segment"))


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_batch_that_fails_keeps_every_value_and_says_so_once(make: Make, code: int) -> None:
    """Invariants 1 and 9."""
    pool, disk = make()
    fill(pool, 300)
    disk.fail("pwrite", error=oserror(code), times=None)
    with pytest.raises(DiskFullError if code == errno.ENOSPC else StorageError):
        pool.evict()
    pool.drain()
    check(pool, 300)
    assert pool.stats().disk_bytes == 0
    assert pool.stats().resident_bytes > 0
    disk.clear()
    pool.evict()
    assert pool.stats().resident_bytes == 0
    check(pool, 300)


def test_one_failed_write_of_a_batch_is_made_up_for_one_by_one(make: Make) -> None:
    pool, disk = make(io_threads=1)
    fill(pool, 50)
    disk.fail("pwrite", error=oserror(errno.ENOSPC), nth=2)  # the first makes the segment
    pool.evict()
    check(pool, 50)
    assert pool.stats().errors == 0


def test_a_value_that_nobody_can_encode_spoils_no_other(make: Make) -> None:
    pool, _ = make(io_threads=1)
    fill(pool, 20)
    pool["bad"] = {"lock": threading.Lock()}
    fill(pool, 40)
    with pytest.raises(UnsupportedTypeError, match="lock"):
        pool.evict()
    assert [name for name in pool if entry_of(pool, name).state is not State.SPILLED] == ["bad"]
    pool.drain()
    check(pool, 40)
    with pool.get_mut("bad") as found:
        found["lock"] = 1
    pool.evict()
    assert pool["bad"] == {"lock": 1}


def test_a_full_store_makes_room_by_deleting(make: Make) -> None:
    pool, _ = make(max_disk=60_000, segment=4000)
    refused = 0
    for number in range(2000):
        try:
            pool[number] = value(number)
            pool.evict([number])
        except DiskFullError:
            refused += 1
            for old in list(pool)[: len(pool) // 3]:
                pool.delete(old)
            pool.drain()
        assert pool.stats().disk_bytes <= 60_000
    assert 0 < refused < 1000
    for name in list(pool):
        assert pool[name] == value(name)


def test_a_failed_removal_surfaces_once_and_the_slots_are_free(make: Make) -> None:
    pool, disk = make(io_threads=1)
    fill(pool, 50)
    pool.evict()
    disk.fail("unlink", error=oserror(errno.EACCES))
    for number in range(50):
        pool.delete(number)
    with pytest.raises(StorageError, match="remove"):
        pool.drain()
    pool.drain()
    fill(pool, 50)
    pool.evict()
    check(pool, 50)


def test_a_damaged_record_names_its_key_and_file(make: Make) -> None:
    pool, _ = make()
    fill(pool, 10)
    pool.evict()
    (path,) = Path(pool._engine.store.path).glob("*.segment")
    raw = path.read_bytes()
    place = raw.index(b"7 7 7")
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"8")
    with pytest.raises(CorruptBlobError) as caught, pool.get(7):
        pass
    assert caught.value.path == str(path)
    for number in {*range(10)} - {7}:
        assert pool[number] == value(number)
    pool[7] = value(7)
    pool.evict()
    check(pool, 10)


# ------------------------------------------------------------------ large after all


class Long:
    """Small to look at, and not when it is pickled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __sizeof__(self) -> int:
        return 50

    def __reduce__(self) -> Any:
        return _long, (self.number, b"x" * (2 * SMALL))


def _long(number: int, padding: bytes) -> Long:
    assert len(padding) == 2 * SMALL
    return Long(number)


def test_what_is_large_after_all_goes_to_a_file_of_its_own(make: Make, kind: str) -> None:
    pool, _ = make("10MB", io_threads=1)
    fill(pool, 10)
    pool["long"] = Long(5)
    fill(pool, 20)
    pool.put("exact", value(1), nbytes=64)
    pool.evict()
    assert (slot_of(pool, "long") < 0) is (kind == "auto")
    assert all(slot_of(pool, number) >= 0 for number in [*range(20), "exact"])
    check(pool, 20)
    assert pool["long"].number == 5
    key = pool.put("long", Long(6)).key
    pool.evict()
    with pool.get(key) as found:
        assert found.number == 6
    pool.delete("long")
    pool.drain()


def test_a_large_write_that_fails_fails_alone(make: Make, kind: str) -> None:
    if kind == "packed":
        pytest.skip("it has no files")
    pool, disk = make("10MB", io_threads=1)
    fill(pool, 10)
    pool["long"] = Long(5)
    fill(pool, 20)
    disk.fail("rename", error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        pool.evict()
    assert entry_of(pool, "long").state is State.RESIDENT
    check(pool, 20)
    pool.evict()
    assert pool["long"].number == 5


# ------------------------------------------------------------------ keys


def test_a_key_stays_over_eviction_and_reload(make: Make) -> None:
    pool, _ = make()
    before = pool.put("before", value(1))
    key = before.key
    after = pool.put("after", value(2))
    pool.evict()
    assert before.key == key
    late = after.key
    for _ in range(3):
        for each, number in ((key, 1), (late, 2)):
            with pool.get(each) as found:
                assert found == value(number)
        pool.evict()
        assert (before.key, after.key) == (key, late)
    assert len({key, late}) == 2 and isinstance(late, UUID)
    pool.validate()


def test_a_key_changes_with_the_content_and_the_former_is_stale(make: Make) -> None:
    """Invariant 4."""
    pool, _ = make()
    fb = pool.put("x", value(1))
    pool.evict()
    key = fb.key
    with pool.get_mut("x") as found:
        found["number"] = 5
        assert fb.key != key
    assert fb.key != key
    with pytest.raises(StaleKeyError):
        pool.get(key)
    pool.evict()
    with pool.get(fb.key) as found:
        assert found["number"] == 5


@pytest.mark.parametrize("when", ["never", "before", "after"])
def test_rollback_brings_key_and_content_back(make: Make, when: str) -> None:
    pool, _ = make()
    fb = pool.put("x", value(1))
    key = fb.key if when == "before" else None
    pool.evict()
    key = fb.key if when == "after" else key
    with contextlib.suppress(ZeroDivisionError), pool.get_mut("x", rollback=True) as found:
        found["number"] = 5
        inner = fb.key
        raise ZeroDivisionError
    assert key in (None, fb.key) and inner != fb.key
    with pool.get(fb.key) as found:
        assert found == value(1)
    with pytest.raises(StaleKeyError):
        pool.get(inner)
    pool.evict()
    check_rest = pool.stats()
    assert check_rest.spills == 1


def test_a_key_that_is_asked_for_during_the_write_is_the_key_afterwards(make: Make, spawn: Spawn) -> None:
    pool, disk = make(io_threads=1)
    fb, other = pool.put("x", value(1)), pool.put("y", value(2))
    gate = disk.gate("pwrite")
    evicting = spawn(pool.evict)
    gate.wait_reached()
    assert fb.state is State.WRITING
    key = fb.key
    gate.open()
    evicting.result()
    assert fb.key == key and fb.state is State.SPILLED
    for each, number in ((key, 1), (other.key, 2)):
        with pool.get(each) as found:
            assert found == value(number)


def test_a_handle_that_parts_takes_content_and_leaves_the_key(make: Make) -> None:
    pool, disk = make()
    fb = pool.put("x", value(1))
    pool.evict()
    written = disk.count("pwrite")
    twin = fb.clone()
    with twin.make_mut() as found:
        found["number"] = 7
    key = fb.key
    assert disk.count("pwrite") == written
    with pool.get(key) as found:
        assert found == value(1)
    assert twin.key != key
    pool.evict()
    with twin.load() as found, pool.get("x") as original:
        assert (found["number"], original["number"]) == (7, 1)
    twin.drop()
    pool.delete("x")
    fb.drop()
    pool.drain()
    assert pool.stats().disk_bytes == 0


def test_two_entries_of_one_blob_have_one_key_until_one_changes(make: Make) -> None:
    pool, _ = make()
    fb = pool.put("x", value(1))
    pool.evict()
    twin = fb.clone()
    guard = twin.make_mut(rollback=True)
    with contextlib.suppress(ZeroDivisionError), guard:
        raise ZeroDivisionError
    key = fb.key
    assert twin.key == key
    with pool.get_mut("x") as found:
        found["number"] = 2
    with pool.get(key) as found:  # it is the twin's still
        assert found == value(1)
    assert fb.key != key


# ------------------------------------------------------------------ while a write is under way


def test_readers_do_not_wait_for_a_batch_and_writers_do(make: Make, spawn: Spawn, sleepers: Sleepers) -> None:
    """Invariant 10."""
    pool, disk = make(io_threads=1)
    fill(pool, 20)
    gate = disk.gate("pwrite")
    evicting = spawn(pool.evict)
    gate.wait_reached()
    check(pool, 20)
    assert pool.try_get_mut(3) is None

    def change() -> None:
        with pool.get_mut(3) as found:
            found["number"] = 77

    changing = spawn(change)
    sleepers.next()
    gate.open()
    changing.result()
    evicting.result()
    assert pool[3]["number"] == 77
    pool.evict()
    assert pool[3]["number"] == 77


def test_what_is_deleted_during_the_write_leaves_nothing(make: Make, spawn: Spawn) -> None:
    pool, disk = make(io_threads=1)
    fill(pool, 20)
    gate = disk.gate("pwrite")
    evicting = spawn(pool.evict)
    gate.wait_reached()
    for number in range(20):
        del pool[number]
    gate.open()
    evicting.result()
    pool.drain()
    pool.validate()
    assert pool.stats().disk_bytes == 0 and pool.stats().entries == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_closing_during_writes_leaves_nothing(make: Make, spawn: Spawn, threads: int) -> None:
    pool, disk = make(io_threads=threads)
    fill(pool, 20)
    gate = disk.gate("pwrite")
    futures = [pool.put(number, value(number)).spawn_write_now() for number in range(20)]
    gate.wait_reached()
    closing = spawn(pool.close)
    gate.open()
    closing.result()
    for future in futures:
        assert future.exception(30) is None or isinstance(future.exception(), Exception)
    assert not list(Path(pool._engine.store.path).iterdir())


def test_a_forgotten_pool_leaves_nothing(make_pool: MakePool, tmp_path: Path, kind: str) -> None:
    pool = FBPool("1MB", directory=tmp_path / "mine", store=kind, min_free=0)
    fill(pool, 100)
    pool.evict()
    assert list((tmp_path / "mine").rglob("*.segment"))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("fbcache")]
    del pool
    gc.collect()
    for thread in threads:
        thread.join(30)
    assert not list((tmp_path / "mine").rglob("*.segment"))
    assert not list((tmp_path / "mine").glob("session-*"))
    assert descriptors(tmp_path) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_takes_nothing_away(make: Make) -> None:
    pool, _ = make()
    fill(pool, 50)
    pool.evict()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                pool[3]
            except ForkedPoolError:
                code = 0
            pool.close()
            del pool
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    check(pool, 50)


class Mortal:
    pools: list[FBPool] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return Mortal, ()

    def __del__(self) -> None:
        for pool in self.pools:
            pool["from a finalizer"] = value(1)


def test_a_value_that_dies_in_a_finalizer_may_put_another(make: Make) -> None:
    """A worker's batch holds no value when its write has ended."""
    pool, _ = make(io_threads=1)

    Mortal.pools.append(pool)
    for number in range(10):
        pool[number] = Mortal()
    pool.evict()
    gc.collect()
    pool.drain()
    for number in range(10):
        pool.delete(number)
    pool.drain()
    assert pool["from a finalizer"] == value(1)
    Mortal.pools.clear()


def test_what_no_record_can_hold_is_said_once_and_stays_in_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbcache.store.records._LONGEST", 1000)
    pool, _ = make(5_000)
    pool["large"] = b"x" * 2000
    for number in range(20):
        pool[number] = b"y" * 900
    with pytest.raises(StorageError, match="more than a record can hold"):
        pool.drain()
    pool.evict()
    pool.drain()
    assert pool.stats().errors == 1, "it was tried again"
    assert pool["large"] == b"x" * 2000 and entry_of(pool, "large").state is State.RESIDENT
    pool.validate()


# ------------------------------------------------------------------ crowds


def same(found: Any, number: int, version: int) -> bool:
    if isinstance(found, np.ndarray):
        return bool((found[2:] == number * 1000 + version).all() and found[0] == number)
    if isinstance(found, bytes):
        return found == make_small(number, version)
    return bool(found == make_small(number, version))


def make_small(number: int, version: int) -> Any:
    size = (number * 7 + version) % 40
    if number % 3 == 0:
        array = np.full(size + 2, number * 1000 + version)
        array[:2] = number, version
        return array
    if number % 3 == 1:
        return f"{number} {version} ".encode() * (size + 1)
    return {"number": number, "version": version, "rest": [version] * size}


def version_of(found: Any) -> int:
    if isinstance(found, np.ndarray):
        return int(found[1])
    return int(found.split()[1]) if isinstance(found, bytes) else int(found["version"])


def whole(found: Any, number: int) -> int:
    version = version_of(found)
    assert same(found, number, version), f"{number} is torn: {found!r}"
    return version


def crowd(pool: FBPool, threads: int, operations: int, trouble: tuple[type[Exception], ...] = ()) -> None:
    names = 150
    for number in range(names):
        with contextlib.suppress(*trouble):
            pool[number] = make_small(number, 0)
    failed = threading.Event()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(operations):
            if failed.is_set():
                return
            try:
                act(rng, rng.randrange(names))
            except (KeyError, *trouble):
                pass
            except BaseException:
                failed.set()
                raise

    def act(rng: random.Random, number: int) -> None:
        what = rng.random()
        if what < 0.4:
            with pool.get(number) as found:
                version = whole(found, number)
                assert whole(found, number) == version
        elif what < 0.6:
            with pool.get_mut(number) as found:
                whole(found, number)
                guard_value = make_small(number, rng.randrange(999))
                if isinstance(found, dict):
                    found.clear()
                    found.update(guard_value)
                elif isinstance(found, np.ndarray) and len(found) == len(guard_value):
                    found[:] = guard_value
        elif what < 0.65:
            with contextlib.suppress(ZeroDivisionError), pool.get_mut(number, rollback=True) as found:
                if isinstance(found, np.ndarray):
                    found += 1
                raise ZeroDivisionError
        elif what < 0.8:
            pool[number] = make_small(number, rng.randrange(999))
        elif what < 0.84:
            whole(pool.pop(number), number)
            pool[number] = make_small(number, 3)
        elif what < 0.88:
            del pool[number]
            pool[number] = make_small(number, 4)
        elif what < 0.92:
            fb = pool.insert(make_small(number, 5))
            key = fb.key
            if rng.random() < 0.5:
                fb.write_now()
            with pool.get(key) as found:
                whole(found, number)
            with fb.make_mut():
                pass
            with pytest.raises((StaleKeyError, KeyError)):
                pool.get(key)
        elif what < 0.96:
            pool.evict([number] if rng.random() < 0.8 else None)
        elif what < 0.98:
            pool.resize(rng.choice([3_000, 10_000, 60_000]))
        else:
            pool.validate()

    with ThreadPoolExecutor(threads) as executor:
        for future in [executor.submit(work, seed) for seed in range(threads)]:
            future.result()


def settle(pool: FBPool) -> None:
    pool.resize("1MB")
    gc.collect()
    pool.drain()
    pool.validate()
    stats = pool.stats()
    assert stats.entries == stats.named == len(pool) and stats.pinned_bytes == 0 and stats.writing_bytes == 0
    for name in pool:
        whole(pool[name], name)
    pool.evict()
    for name in pool:
        whole(pool[name], name)
    tokens = {entry.token for entry in pool._engine.residency.entries}
    live = sum(token.nbytes for token in tokens if token is not None)
    disk = pool.stats().disk_bytes
    assert live <= disk <= 2 * live + 20_000 + 2 * 70_000
    slots = [token.slot for token in tokens if token is not None]
    assert len(set(slots)) == len(slots), "two blobs are in one slot"
    for name in list(pool):
        pool.delete(name)
    pool.drain()
    pool.validate()
    assert pool.stats().disk_bytes == 0, "a blob was left behind"


@pytest.mark.parametrize("policy", ["lru", "rr"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_crowd_sees_only_whole_small_values(make: Make, soak: bool, threads: int, policy: str) -> None:
    pool, _ = make(10_000, segment=5000, io_threads=threads, policy=policy)
    crowd(pool, 8, 10_000 if soak else 400)
    assert pool.stats().errors == 0
    settle(pool)


def test_a_crowd_that_switches_often_sees_only_whole_small_values(make: Make, soak: bool) -> None:
    pool, _ = make(10_000, segment=5000, io_threads=2, verify="always")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        crowd(pool, 8, 5_000 if soak else 200)
    finally:
        sys.setswitchinterval(before)
    settle(pool)


def test_a_crowd_on_a_failing_disk_loses_no_small_value(make: Make, soak: bool) -> None:
    pool, disk = make(10_000, segment=5000, io_threads=2)
    ended = threading.Event()

    def spoil() -> None:
        rng = random.Random(0)
        while not ended.is_set():
            before = disk.count("pwrite")
            disk.fail("pwrite", error=oserror(errno.ENOSPC), nth=rng.choice([2, 5]), times=rng.choice([1, 4]))
            while disk.count("pwrite") < before + 12 and not ended.wait(0.001):
                pass
        disk.clear()

    spoiler = threading.Thread(target=spoil)
    spoiler.start()
    try:
        crowd(pool, 8, 5_000 if soak else 300, trouble=(DiskFullError,))
    finally:
        ended.set()
        spoiler.join()
    with contextlib.suppress(StorageError):
        pool.drain()
    settle(pool)


def test_a_crowd_in_a_small_store_loses_no_small_value(make: Make, soak: bool) -> None:
    """Full all the time: compaction is what goes on."""
    pool, _ = make(10_000, max_disk=30_000, segment=2000, io_threads=2)
    crowd(pool, 6, 5_000 if soak else 300, trouble=(DiskFullError,))
    assert pool.stats().disk_bytes <= 30_000
    with contextlib.suppress(StorageError):
        pool.drain()
    pool.resize("1MB")
    for name in pool:
        whole(pool[name], name)
    pool.validate()
    for name in list(pool):
        pool.delete(name)
    with contextlib.suppress(StorageError):
        pool.drain()
    assert pool.stats().disk_bytes == 0


def test_an_error_that_nobody_has_raised_is_a_warning_at_the_end(make: Make) -> None:
    pool, disk = make(4_000, io_threads=1)
    disk.fail("pwrite", error=oserror(errno.EIO), times=None)
    with contextlib.suppress(StorageError):
        fill(pool, 60)
    disk.clear()
    with contextlib.suppress(FBCacheWarning):
        pool.close()
    assert not list(Path(pool._engine.store.path).glob("*.segment"))
