"""Writing, loading and deleting: what is on disk when, who waits for whom, and how failures surface."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import (
    DiskFullError,
    FBCacheWarning,
    FBPool,
    Frames,
    MsgpackCodec,
    State,
    StorageError,
    UnsupportedTypeError,
)
from fbcache.store import mapping
from tests.conftest import MakePool, Running, Sleepers
from tests.faults import FaultyDisk, oserror

SMALL = 10_000
LARGE = 300_000  # is mapped
BUDGET = 8 * LARGE

Spawn = Callable[..., Running]
MakeFaultyPool = Callable[..., tuple[FBPool, FaultyDisk]]
BlobFiles = Callable[[FBPool], list[Path]]


def content(number: int, nbytes: int = SMALL) -> np.ndarray[Any, Any]:
    return np.full(nbytes, number % 251, np.uint8)


def snapshot(files: list[Path]) -> dict[str, bytes]:
    """What visible blobs hold."""
    return {file.name: file.read_bytes() for file in files if not file.name.startswith(".")}


@pytest.fixture
def narrow(make_faulty_pool: MakeFaultyPool) -> tuple[FBPool, FaultyDisk]:
    """A pool with one I/O thread, so that one gate holds up all background work."""
    return make_faulty_pool(BUDGET, io_threads=1)


# --------------------------------------------------- invariant 1: in memory, or whole on disk


@pytest.mark.parametrize("call", ["mkdir", "open", "writev", "close", "rename"])
@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_invariant_1_a_value_is_in_memory_until_its_blob_is_whole(
    narrow: tuple[FBPool, FaultyDisk], spawn: Spawn, call: str, nbytes: int
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1, nbytes))
    gate = disk.gate(call)
    evicting = spawn(pool.evict)
    gate.wait_reached()
    assert fb.state is State.WRITING
    pool.validate()
    with pool.get("x") as value:
        assert (value == 1).all()
    assert disk.count("preadv") == disk.count("mmap") == 0
    gate.open()
    evicting.result()
    assert fb.state is State.SPILLED
    assert (pool["x"] == 1).all()


@pytest.mark.parametrize("call", ["open", "fstat", "preadv", "close"])
def test_invariant_1_the_blob_is_there_until_its_value_is_in_memory(
    narrow: tuple[FBPool, FaultyDisk], spawn: Spawn, blob_files: BlobFiles, call: str
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1))
    pool.evict()
    gate = disk.gate(call)
    loading = spawn(pool.pop, "x")
    gate.wait_reached()
    assert fb.state is State.LOADING
    assert len(blob_files(pool)) == 1
    pool.validate()
    gate.open()
    assert (loading.result() == 1).all()
    fb.drop()
    pool.drain()
    assert blob_files(pool) == []


# -------------------------------------------------------- invariant 2: blobs never change


@pytest.mark.files
@pytest.mark.parametrize("mmap", [True, False])
def test_invariant_2_no_visible_blob_ever_changes(
    make_pool: MakePool, blob_files: BlobFiles, mmap: bool
) -> None:
    pool = make_pool(BUDGET, mmap=mmap)
    sizes = [SMALL, LARGE]
    seen: dict[str, bytes] = {}
    for lap in range(6):
        for number in range(6):
            if lap == 0:
                pool.put(number, content(number, sizes[number % 2]))
            else:
                with pool.get_mut(number, rollback=lap == 3) as value:
                    value += 1
            if lap % 2:
                pool.evict([number])
            pool.drain()
            for name, blob in snapshot(blob_files(pool)).items():
                assert seen.setdefault(name, blob) == blob
    assert all((pool[number] == number + 5).all() for number in range(6))
    assert len(seen) > 6


def test_invariant_2_a_mutation_leaves_what_was_read_before_as_it_was(make_pool: MakePool) -> None:
    """A mapped value outlives its blob."""
    pool = make_pool(BUDGET)
    pool.put("x", content(1, LARGE))
    pool.evict()
    former = pool["x"]
    with pool.get_mut("x") as value:
        value += 1
    pool.evict()
    pool.drain()
    assert (former == 1).all()
    assert (pool["x"] == 2).all()


# ------------------------------------------------- invariant 8: clean eviction writes nothing


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
@pytest.mark.parametrize("mmap", [True, False])
def test_invariant_8_evicting_a_clean_value_again_writes_nothing(
    make_faulty_pool: MakeFaultyPool, nbytes: int, mmap: bool
) -> None:
    pool, disk = make_faulty_pool(BUDGET, mmap=mmap)
    pool.put("x", content(1, nbytes))
    for _ in range(5):
        assert pool.evict() > 0
        with pool.get("x") as value:
            assert (value == 1).all()
        del value
    assert disk.count("writev") == disk.count("rename") == 1
    assert pool.stats().spills == 1
    assert pool.stats().clean_evictions == 4
    assert pool.stats().loads == 5


def test_invariant_8_a_value_written_now_is_evicted_without_another_write(
    narrow: tuple[FBPool, FaultyDisk],
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1))
    fb.write_now()
    assert fb.state is State.CLEAN
    fb.write_now()
    pool.evict()
    assert disk.count("writev") == 1


def test_a_rollback_to_a_blob_writes_nothing(narrow: tuple[FBPool, FaultyDisk]) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1))
    pool.evict()
    key = fb.key
    with pytest.raises(ZeroDivisionError):
        with pool.get_mut("x", rollback=True) as value:
            value += 1
            raise ZeroDivisionError
    assert fb.key == key
    assert (pool["x"] == 1).all()
    pool.evict()
    assert disk.count("writev") == 1


def test_one_blob_serves_two_entries_and_goes_with_the_last(
    narrow: tuple[FBPool, FaultyDisk], blob_files: BlobFiles
) -> None:
    pool, disk = narrow
    fb = pool.insert(content(1))
    fb.write_now()
    other = fb.clone()
    with pytest.raises(ZeroDivisionError):
        with other.make_mut(rollback=True):
            raise ZeroDivisionError
    assert disk.count("writev") == 1
    pool.evict()
    fb.drop()
    pool.drain()
    assert len(blob_files(pool)) == 1
    with other.load() as value:
        assert (value == 1).all()
    other.drop()
    pool.drain()
    assert blob_files(pool) == []


# --------------------------------------------------- invariant 9: failed writes


FAULTS = [
    pytest.param("mkdir", errno.EACCES, 1, id="mkdir-EACCES"),
    pytest.param("open", errno.EROFS, 1, id="open-EROFS"),
    pytest.param("open", errno.EMFILE, 2, id="open-again-EMFILE"),
    pytest.param("writev", errno.ENOSPC, 1, id="writev-ENOSPC"),
    pytest.param("writev", errno.EIO, 1, id="writev-EIO"),
    pytest.param("writev", errno.EDQUOT, 2, id="writev-again-EDQUOT"),
    pytest.param("close", errno.EIO, 1, id="close-EIO"),
    pytest.param("rename", errno.EIO, 1, id="rename-EIO"),
    pytest.param("free_bytes", errno.ESTALE, 1, id="statvfs-ESTALE"),
]


@pytest.mark.parametrize(("call", "code", "nth"), FAULTS)
def test_invariant_9_a_failed_write_leaves_no_file_keeps_the_value_and_surfaces_once(
    narrow: tuple[FBPool, FaultyDisk], blob_files: BlobFiles, call: str, code: int, nth: int
) -> None:
    pool, disk = narrow
    if call == "writev":
        disk.short("writev", 1_000)  # so that there is a second call
    fb = pool.put("x", content(1))
    disk.fail(call, error=oserror(code), nth=nth)
    with pytest.raises(StorageError) as caught:
        pool.evict()
    assert caught.value.path
    assert isinstance(caught.value, DiskFullError) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert blob_files(pool) == []
    assert pool.stats().disk_bytes == 0
    assert pool.stats().errors == 1
    assert fb.state is State.RESIDENT
    pool.validate()
    loads = disk.count("preadv")
    assert (pool["x"] == 1).all()
    assert disk.count("preadv") == loads
    pool.drain()
    assert pool.evict() > 0, "it cannot be tried again"
    assert (pool["x"] == 1).all()
    assert pool.stats().errors == 1


def test_invariant_9_a_disk_that_is_full_says_how_much_is_missing(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET, max_disk=2 * SMALL)
    pool.put("x", content(1, LARGE))
    with pytest.raises(DiskFullError, match="max_disk=20,000") as caught:
        pool.evict()
    assert caught.value.needed >= LARGE
    assert caught.value.free == 2 * SMALL
    assert Path(caught.value.path).is_dir()


def fail_always(disk: FaultyDisk) -> None:
    disk.fail("writev", error=oserror(errno.ENOSPC), times=None)


def test_invariant_9_a_failed_write_surfaces_on_the_put_that_waits_for_it(
    make_faulty_pool: MakeFaultyPool,
) -> None:
    pool, disk = make_faulty_pool(8 * SMALL, io_threads=1)
    gate = disk.gate("writev")
    for number in range(8):
        pool.put(number, content(number), nbytes=SMALL)
    gate.wait_reached()
    disk.fail("writev", error=oserror(errno.ENOSPC))
    gate.open()
    # The write ahead succeeds: it is past the gate. The next one, which this put needs, fails.
    pool.drain()
    with pytest.raises(DiskFullError):
        pool.put("large", content(9, 5 * SMALL), nbytes=5 * SMALL)
    assert "large" not in pool
    pool.drain()
    pool.validate()
    assert all((pool[number] == number).all() for number in range(8))
    pool.put("large", content(9, 5 * SMALL), nbytes=5 * SMALL)
    assert (pool["large"] == 9).all()


def test_invariant_9_each_put_hears_of_its_own_failure(make_faulty_pool: MakeFaultyPool) -> None:
    pool, disk = make_faulty_pool(8 * SMALL, io_threads=1)
    fail_always(disk)
    for number in range(8):
        try:
            pool.put(number, content(number), nbytes=SMALL)
        except DiskFullError:
            break
    else:
        number = 8
    stored = len(pool)
    for attempt in range(5):
        with pytest.raises(DiskFullError):
            pool.put(("more", attempt), content(1, 3 * SMALL), nbytes=3 * SMALL)
        pool.validate()
        assert pool.stats().resident_bytes <= 8 * SMALL
    assert len(pool) == stored
    assert all((pool[number] == number).all() for number in range(stored))
    with suppress(DiskFullError):  # of the writes that no put waited for, the one under way included
        pool.drain()
    disk.clear()
    pool.put("more", content(1, 3 * SMALL), nbytes=3 * SMALL)
    pool.drain()


def test_invariant_9_a_failed_write_ahead_surfaces_on_drain(make_faulty_pool: MakeFaultyPool) -> None:
    pool, disk = make_faulty_pool(8 * SMALL, io_threads=1)
    fail_always(disk)
    for number in range(8):
        pool.put(number, content(number), nbytes=SMALL)
    with pytest.raises(DiskFullError):
        pool.drain()
    pool.drain()
    assert len(pool) == 8
    disk.clear()


def test_invariant_9_a_failed_write_surfaces_on_write_now(narrow: tuple[FBPool, FaultyDisk]) -> None:
    pool, disk = narrow
    fb = pool.insert(content(1))
    fail_always(disk)
    with pytest.raises(DiskFullError):
        fb.write_now()
    future = fb.spawn_write_now()
    assert isinstance(future.exception(), DiskFullError)
    disk.clear()
    pool.drain()
    fb.write_now()
    assert fb.spawn_write_now().result() is None
    assert fb.state is State.CLEAN


def test_invariant_9_a_failed_write_that_nobody_heard_of_is_a_warning_at_close(
    make_faulty_pool: MakeFaultyPool,
) -> None:
    pool, disk = make_faulty_pool(8 * SMALL, io_threads=1)
    fail_always(disk)
    gate = disk.gate("unlink")  # of the temporary file: the write has failed
    for number in range(8):
        pool.put(number, content(number), nbytes=SMALL)
    gate.wait_reached()
    with pytest.warns(FBCacheWarning, match="DiskFullError"):
        closing = threading.Thread(target=gate.open)
        pool._engine.workers.submit(lambda: None)
        closing.start()
        _let_the_write_end(pool)
        pool.close()
        closing.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.close()


def _let_the_write_end(pool: FBPool) -> None:
    """What ``drain`` does, without raising."""
    residency = pool._engine.residency
    while (waiter := residency.run(residency.idle)) is not None:
        waiter.run()


@pytest.mark.parametrize("nbytes", [4 * SMALL, 20 * SMALL], ids=["waits", "oversize"])
def test_a_failed_put_keeps_its_value_alive_no_longer_than_its_error(
    make_faulty_pool: MakeFaultyPool, nbytes: int
) -> None:
    """No cycle through the traceback: memory is scarce when this happens."""
    pool, disk = make_faulty_pool(8 * SMALL, io_threads=1)
    for number in range(6):
        pool.put(number, content(number))
    fail_always(disk)
    gc.collect()
    gc.disable()
    try:
        value = content(1, nbytes)
        alive = weakref.ref(value)
        with suppress(DiskFullError):
            pool.put("x", value)
            pytest.fail("it was stored")
        with suppress(DiskFullError):
            pool.evict()
        with suppress(DiskFullError):
            pool.drain()
        _let_the_workers_forget(pool)
        del value
        assert alive() is None
    finally:
        gc.enable()
    disk.clear()


def _let_the_workers_forget(pool: FBPool) -> None:
    """Wait for a job that comes after all others: then no worker's frame has a value any more."""
    done = threading.Event()
    pool._engine.workers.submit(done.set)
    assert done.wait(30)


def test_invariant_9_two_values_that_cannot_be_written_both_surface(
    make_pool: MakePool,
) -> None:
    pool = make_pool(8 * SMALL, io_threads=1)
    pool.put("first", [lambda: 1, bytes(SMALL)])
    pool.put("second", [lambda: 2, bytes(SMALL)])
    for number in range(20):
        pool.put(number, content(number), nbytes=SMALL)
    heard = []
    for _ in range(3):
        try:
            pool.drain()
        except UnsupportedTypeError as error:
            heard += [error, *getattr(error, "__notes__", ())]
    assert len(heard) == 2
    assert pool.stats().errors == 2


def test_invariant_9_one_value_that_cannot_be_written_holds_up_no_other(
    narrow: tuple[FBPool, FaultyDisk],
) -> None:
    pool, _ = narrow
    fbs = {name: pool.put(name, value) for name, value in [("a", 1), ("bad", lambda: 0), ("c", content(3))]}
    with pytest.raises(UnsupportedTypeError, match="value"):
        pool.evict()
    assert fbs["a"].state is fbs["c"].state is State.SPILLED
    assert fbs["bad"].state is State.RESIDENT
    pool.drain()
    pool.validate()


def test_invariant_9_two_failures_of_one_evict_are_both_told(narrow: tuple[FBPool, FaultyDisk]) -> None:
    pool, disk = narrow
    pool.put("a", content(1))
    pool.put("bad", lambda: 0)
    disk.fail("writev", error=oserror(errno.EIO))
    with pytest.raises((StorageError, UnsupportedTypeError)) as caught:
        pool.evict()
    assert len(caught.value.__notes__) == 1
    pool.drain()


def test_invariant_9_an_unsupported_value_stays_usable_and_is_spilled_when_it_is_replaced(
    make_pool: MakePool,
) -> None:
    pool = make_pool(8 * SMALL, io_threads=1)
    fb = pool.put("x", {"part": [1, lambda: 42]})
    for number in range(50):
        pool.put(number, content(number), nbytes=SMALL)
        with pool.get("x") as value:
            assert value["part"][1]() == 42
    with pytest.raises(UnsupportedTypeError, match=r"value\['part'\]\[1\]") as caught:
        pool.drain() if fb.state is State.RESIDENT else None
        pool.evict(["x"])
    assert caught.value.path == "value['part'][1]"
    pool.drain()
    for number in range(50, 100):
        pool.put(number, content(number), nbytes=SMALL)
    pool.drain()
    with pool.get_mut("x") as value:
        value["part"][1] = 7
    assert pool.evict(["x"]) > 0
    assert pool["x"] == {"part": [1, 7]}


class Raising(MsgpackCodec):
    """Fails on what it is told to, in the way it is told."""

    name = "raising"

    def __init__(self) -> None:
        self.failure: Callable[[], Any] | None = None

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        if self.failure is not None:
            return self.failure()  # type: ignore[no-any-return]
        frames = super().encode(value, allow_pickle=allow_pickle)
        return Frames(self.name, frames.tree, frames.buffers, frames.pickled)

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        frames = Frames("msgpack", frames.tree, frames.buffers, frames.pickled)
        return super().decode(frames, writable=writable, allow_pickle=allow_pickle)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (lambda: 1 / 0, StorageError),
        (lambda: b"no frames", TypeError),
        (lambda: None, TypeError),
        (lambda: [][1], StorageError),
    ],
    ids=["raises", "bytes", "None", "IndexError"],
)
def test_invariant_9_a_codec_that_fails_leaves_no_file_and_keeps_the_value(
    make_pool: MakePool, blob_files: BlobFiles, failure: Callable[[], Any], error: type[Exception]
) -> None:
    codec = Raising()
    pool = make_pool(BUDGET, codec=codec)
    pool.put("x", content(1))
    codec.failure = failure
    with pytest.raises(error, match="raising"):
        pool.evict()
    assert blob_files(pool) == []
    assert (pool["x"] == 1).all()
    pool.drain()
    codec.failure = None
    assert pool.evict() == 0, "what cannot be encoded counts as pinned"
    assert pool.evict(["x"]) > 0, "it cannot be tried again"
    assert (pool["x"] == 1).all()


def test_the_pool_goes_on_by_itself_when_space_is_freed(make_pool: MakePool) -> None:
    pool = make_pool(8 * SMALL, max_disk=20 * SMALL, io_threads=1)
    stored = 0
    with pytest.raises(DiskFullError):
        for stored in range(100):
            pool.put(stored, content(stored), nbytes=SMALL)
    assert 10 < stored < 30
    with pytest.raises(DiskFullError):
        pool.put("more", content(1), nbytes=SMALL)
    for number in range(8):
        del pool[number]
    try:
        pool.drain()
    except DiskFullError:
        pool.drain()
    for number in range(8):
        pool.put(number, content(number), nbytes=SMALL)
    assert all((pool[number] == number).all() for number in range(stored))
    assert pool.stats().disk_bytes <= 20 * SMALL
    with suppress(DiskFullError):  # of a write ahead: the disk is nearly full again
        pool.drain()


def test_writing_ahead_begins_again_once_a_write_has_succeeded(make_faulty_pool: MakeFaultyPool) -> None:
    pool, disk = make_faulty_pool(16 * SMALL, io_threads=1)
    disk.fail("writev", error=oserror(errno.ENOSPC))
    for number in range(16):
        pool.put(number, content(number), nbytes=SMALL)
    with pytest.raises(DiskFullError):
        pool.drain()
    assert pool.evict([0]) == SMALL  # there is room again
    stalls = pool.stats().stalls
    for number in range(16, 30):
        pool.put(number, content(number), nbytes=SMALL)
        pool.drain()
    assert pool.stats().stalls == stalls, "a put had to wait for what should have been written before"


def test_min_free_is_kept_free(make_pool: MakePool, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    pool = make_pool(BUDGET, min_free=free + (1 << 40))
    pool.put("x", content(1))
    with pytest.raises(DiskFullError, match="min_free") as caught:
        pool.evict()
    assert caught.value.free == 0
    assert (pool["x"] == 1).all()


# ---------------------------------------------- invariant 10: readers do not wait for writes


@pytest.mark.parametrize("call", ["open", "writev", "rename"])
def test_invariant_10_readers_go_on_while_a_value_is_written(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, call: str
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1))
    gate = disk.gate(call)
    written = fb.spawn_write_now()
    gate.wait_reached()
    with pool.get("x") as one, pool.get("x") as two, fb.load() as three:
        assert one is two is three
        pool.validate()
    guard = pool.try_get("x")
    assert guard is not None
    with guard as value:
        assert (value == 1).all()
    assert (pool["x"] == 1).all()
    assert sleepers.none
    assert pool.try_get_mut("x") is None
    gate.open()
    written.result()


def test_invariant_10_a_writer_waits_for_the_write_and_the_blob_is_of_the_former_content(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn, blob_files: BlobFiles
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1))
    key = fb.key
    gate = disk.gate("writev")
    written = fb.spawn_write_now()
    gate.wait_reached()
    entered, leave = threading.Event(), threading.Event()

    def change() -> None:
        with pool.get_mut("x") as value:
            entered.set()
            value += 1
            leave.wait()

    changing = spawn(change)
    sleepers.next()
    assert not entered.is_set()
    gate.open()
    written.result()
    assert entered.wait(30)
    leave.set()
    changing.result()
    pool.evict()
    pool.drain()
    assert [file.name for file in blob_files(pool)] == [fb.key.hex] != [key.hex]
    assert (pool["x"] == 2).all()


def test_a_write_asked_for_during_a_mutation_is_done_while_a_reader_stays(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    """The lock goes from the writer straight to a reader: no moment in which nobody holds it."""
    pool, _ = narrow
    fb = pool.put("x", content(1))
    entered, leave = threading.Event(), threading.Event()

    def read() -> None:
        with pool.get("x"):
            entered.set()
            leave.wait(30)

    with pool.get_mut("x") as value:
        value += 1
        written = fb.spawn_write_now()
        reading = spawn(read)
        sleepers.next()
    assert entered.wait(30)
    try:
        assert written.result(30) is None
        assert not reading.done
    finally:
        leave.set()
    assert fb.state is State.CLEAN
    reading.result()
    pool.validate()


# ------------------------------------------------- invariant 11: loads are single-flight


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
@pytest.mark.parametrize("mutates", [False, True])
def test_invariant_11_many_threads_read_one_spilled_entry_once(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn, nbytes: int, mutates: bool
) -> None:
    pool, disk = narrow
    pool.put("x", content(1, nbytes))
    pool.evict()
    gate = disk.gate("open")
    before = disk.count("open")

    def read() -> bool:
        with pool.get("x") as value:
            return bool((value == (2 if mutates else 1)).all())

    def change() -> None:
        with pool.get_mut("x") as value:
            value += 1

    first = spawn(change if mutates else read)
    gate.wait_reached()
    others = []
    for _ in range(12):
        others.append(spawn(read))
        sleepers.next()
    pool.validate()
    assert not any(other.done for other in others)
    gate.open()
    first.result()
    assert all(other.result() for other in others)
    assert disk.count("open") == before + 1
    assert pool.stats().loads == 1
    assert pool.stats().misses == (1 if mutates else 13)


def test_invariant_11_after_a_load_has_failed_the_next_one_tries(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1))
    pool.evict()
    gate = disk.gate("open")
    disk.fail("preadv", error=oserror(errno.EIO))

    def read() -> bool:
        with pool.get("x") as value:
            return bool((value == 1).all())

    first = spawn(read)
    gate.wait_reached()
    others = []
    for _ in range(4):
        others.append(spawn(read))
        sleepers.next()
    gate.open()
    assert isinstance(first.error(), StorageError)
    assert all(other.result() for other in others)
    assert pool.stats().loads == 1
    assert fb.state is State.CLEAN
    pool.validate()


@pytest.mark.parametrize(("call", "nbytes"), [("open", SMALL), ("fstat", SMALL), ("preadv", SMALL)])
@pytest.mark.parametrize("how", ["get", "get_mut", "pool[]", "pop", "make_mut"])
def test_a_failed_load_leaves_the_entry_as_it_was(
    narrow: tuple[FBPool, FaultyDisk], call: str, nbytes: int, how: str
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1, nbytes))
    pool.evict()
    key = fb.key
    disk.fail(call, error=oserror(errno.EIO))
    attempts: dict[str, Callable[[], Any]] = {
        "get": lambda: pool.get("x").__enter__(),
        "get_mut": lambda: pool.get_mut("x").__enter__(),
        "pool[]": lambda: pool["x"],
        "pop": lambda: pool.pop("x"),
        "make_mut": lambda: fb.make_mut().__enter__(),
    }
    with pytest.raises(StorageError):
        attempts[how]()
    pool.validate()
    assert pool.stats().pinned_bytes == 0
    pool.drain()
    assert fb.state is State.SPILLED
    if how != "make_mut":
        assert fb.key == key
    with pool.get("x") as value, fb.load() as same:
        assert (value == 1).all()
        assert (same == 1).all()


# -------------------------------------------------------------------- maps and descriptors


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_without_mmap_nothing_is_mapped(make_faulty_pool: MakeFaultyPool, nbytes: int) -> None:
    pool, disk = make_faulty_pool(BUDGET, mmap=False)
    pool.put("x", content(1, nbytes))
    pool.evict()
    with pool.get("x") as value:
        assert (value == 1).all()
        assert not value.flags.writeable
    with pool.get_mut("x") as value:
        value += 1
    assert (pool["x"] == 2).all()
    assert disk.count("mmap") == 0


def test_past_the_bound_on_maps_values_are_read(
    make_faulty_pool: MakeFaultyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, disk = make_faulty_pool(30 * LARGE)
    for number in range(20):
        pool.put(number, content(number, LARGE))
    pool.evict()
    gc.collect()
    live = len(mapping.LIVE_MAPS)
    monkeypatch.setattr(mapping.LIVE_MAPS, "bound", live + 5)
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        assert (pool[number] == number).all()
    assert len(mapping.LIVE_MAPS) == live + 5
    assert disk.count("mmap") == 5
    assert len(os.listdir("/proc/self/fd")) == descriptors
    pool.evict()
    gc.collect()
    assert len(mapping.LIVE_MAPS) == live, "an evicted value is still mapped"
    assert (pool[3] == 3).all()
    assert disk.count("mmap") == 6


# ------------------------------------------------------------------------------- deletion


@pytest.mark.files
@pytest.mark.parametrize("how", ["delete", "pop", "replace", "mutate", "drop", "forget"])
def test_a_blob_that_nobody_needs_is_deleted(make_pool: MakePool, blob_files: BlobFiles, how: str) -> None:
    pool = make_pool(BUDGET)
    fb = pool.insert(content(1)) if how in ("drop", "forget") else pool.put("x", content(1))
    pool.evict()
    assert len(blob_files(pool)) == 1
    if how == "delete":
        fb.drop()
        del pool["x"]
    elif how == "pop":
        fb.drop()
        assert (pool.pop("x") == 1).all()
    elif how == "replace":
        fb.drop()
        pool["x"] = 2
    elif how == "mutate":
        with pool.get_mut("x") as value:
            value += 1
    elif how == "drop":
        fb.drop()
    else:
        del fb
        gc.collect()
    pool.drain()
    assert blob_files(pool) == []
    assert pool.stats().disk_bytes == 0


def test_a_value_dropped_while_it_is_written_leaves_no_blob(
    narrow: tuple[FBPool, FaultyDisk], blob_files: BlobFiles
) -> None:
    pool, disk = narrow
    fb = pool.put("x", content(1))
    gate = disk.gate("rename")
    written = fb.spawn_write_now()
    gate.wait_reached()
    fb.drop()
    del pool["x"]
    pool.validate()
    assert pool.stats().entries == 0
    assert pool.stats().resident_bytes > 0, "the value takes memory until its write ends"
    gate.open()
    pool.drain()
    written.result()
    assert pool.stats().resident_bytes == pool.stats().disk_bytes == 0
    assert blob_files(pool) == []


def test_a_failed_deletion_surfaces_once(narrow: tuple[FBPool, FaultyDisk]) -> None:
    pool, disk = narrow
    pool.put("x", content(1))
    pool.evict()
    disk.fail("unlink", error=oserror(errno.EACCES))
    del pool["x"]
    with pytest.raises(StorageError):
        pool.drain()
    pool.drain()
    pool["x"] = 1
    assert pool["x"] == 1


# ------------------------------------------------------------- the directory goes away


@pytest.mark.files
def test_a_directory_that_vanished_loses_nothing_in_memory(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    pool.put("spilled", content(1))
    pool.evict()
    pool.put("x", content(2))
    session = Path(pool._engine.store.path)
    aside = session.with_name("aside")
    session.rename(aside)
    with pytest.raises(StorageError, match="cannot write") as caught:
        pool.evict()
    assert caught.value.path == str(session)
    with pytest.raises(StorageError, match="cannot read"):
        pool["spilled"]
    assert (pool["x"] == 2).all()
    with pool.get_mut("x") as value:
        value += 1
    pool.validate()
    pool.drain()
    aside.rename(session)
    assert (pool["spilled"] == 1).all()
    assert pool.evict() > 0
    assert (pool["x"] == 3).all()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_directory_that_turned_read_only_loses_nothing_in_memory(
    narrow: tuple[FBPool, FaultyDisk], code: int
) -> None:
    pool, disk = narrow
    pool.put("spilled", content(1))
    pool.evict()
    pool.put("x", content(2))
    for call in ("mkdir", "writev", "rename", "unlink"):
        disk.fail(call, error=oserror(code), times=None)
    with pytest.raises(StorageError):
        pool.evict()
    assert (pool["spilled"] == 1).all()
    assert (pool["x"] == 2).all()
    pool.validate()
    disk.clear()
    assert pool.evict() > 0
    assert (pool["x"] == 2).all()
