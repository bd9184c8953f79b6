"""The races named in the design, each forced by gates at the system calls.

Every test says which two things meet. With the other thread held at a gate there is exactly
one order in which they can go on; nothing here depends on time.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fbcache import DeadlockError, DiskFullError, FBPool, PoolClosedError, ReadGuard, State, WriteGuard
from tests.conftest import MakePool, Running, Sleepers

ITEM = 8192
Spawn = Callable[..., Running]
MakeFaulty = Callable[..., Any]


def array(value: float) -> np.ndarray[Any, Any]:
    return np.full(ITEM // 8, value)


def change(pool: FBPool, name: str, by: float) -> None:
    with pool.get_mut(name) as x:
        x += by


def state(pool: FBPool, name: str) -> State:
    return pool._engine.names[name].state


# ----------------------------------------------------------------------------- evict against get


def test_evict_against_get_a_reader_goes_on_while_its_value_is_written(
    make_faulty_pool: MakeFaulty, spawn: Spawn
) -> None:
    """Invariant 10."""
    pool, disk = make_faulty_pool()
    pool.put("x", array(1))
    gate = disk.gate("writev")
    evicting = spawn(pool.evict)
    gate.wait_reached()
    with pool.get("x") as x:
        assert state(pool, "x") is State.WRITING
        assert x[0] == 1
        gate.open()
        assert evicting.result() == 0, "a pinned value was dropped"
        assert x[0] == 1
        pool.validate()
    assert state(pool, "x") is State.CLEAN


def test_evict_against_get_a_value_read_after_it_was_chosen_stays(
    make_faulty_pool: MakeFaulty, spawn: Spawn
) -> None:
    pool, disk = make_faulty_pool(4 * ITEM, io_threads=1)
    gate = disk.gate("rename")
    for name in "abcd":
        pool.put(name, array(ord(name)))
    gate.wait_reached()  # "a" is being written ahead of need
    assert pool["a"][0] == ord("a")
    gate.open()
    pool.drain()
    pool.put("e", array(0))
    assert pool._engine.names["a"].value[0] == ord("a"), "the value that was just used left first"
    pool.validate()


# ------------------------------------------------------------------------- evict against get_mut


def test_evict_against_get_mut_the_writer_waits_for_the_write_and_the_blob_is_whole(
    make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers
) -> None:
    """Invariants 2 and 4: what is written is the content of one key."""
    pool, disk = make_faulty_pool()
    fb = pool.put("x", array(1))
    key = fb.key
    gate = disk.gate("writev")
    writing = spawn(fb.write_now)
    gate.wait_reached()
    assert pool.try_get_mut("x") is None
    changing = spawn(change, pool, "x", 1)
    sleepers.next()
    assert not changing.done
    gate.open()
    writing.result()
    changing.result()
    assert fb.key != key
    assert pool["x"][0] == 2
    pool.validate()
    pool.evict()
    assert pool["x"][0] == 2, "the blob of the former content was loaded"


def test_get_mut_against_evict_a_queued_value_in_a_writers_hands_is_not_written(
    make_faulty_pool: MakeFaulty, spawn: Spawn
) -> None:
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("first", array(1))
    pool.put("x", array(2))
    gate = disk.gate("writev")
    evicting = spawn(pool.evict, ["first", "x"])
    gate.wait_reached()
    with pool.get_mut("first" if state(pool, "x") is State.WRITING else "x") as x:
        x += 10
        gate.open()
        pool._engine.workers.submit(lambda: None)
    evicting.result()
    pool.validate()
    assert sorted([pool["first"][0], pool["x"][0]]) in ([1, 12], [2, 11])


# ------------------------------------------------------------------------------------- two loads


def test_two_loads_of_one_entry_read_its_file_once(
    make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers
) -> None:
    """Invariant 11."""
    pool, disk = make_faulty_pool()
    pool.put("x", array(3))
    pool.evict()
    gate = disk.gate("open")
    readers = [spawn(lambda: pool["x"][0]) for _ in range(8)]
    gate.wait_reached()
    for _ in range(7):
        sleepers.next()
    gate.open()
    assert [r.result() for r in readers] == [3] * 8
    assert pool.stats().loads == 1
    assert pool.stats().misses == 8


def test_two_loads_when_the_first_fails_the_second_tries_itself(
    make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool, disk = make_faulty_pool()
    pool.put("x", array(3))
    pool.evict()
    gate = disk.gate("open", after=True)
    disk.fail("fstat", error=OSError(5, "input/output error"))
    first = spawn(lambda: pool["x"][0])
    gate.wait_reached()
    second = spawn(lambda: pool["x"][0])
    sleepers.next()
    gate.open()
    assert isinstance(first.error(), OSError)
    assert second.result() == 3


# ------------------------------------------------------------------------------ drop during write


def test_drop_during_write_leaves_no_file_and_frees_the_memory(
    make_faulty_pool: MakeFaulty, spawn: Spawn, blob_files: Callable[[FBPool], list[Any]]
) -> None:
    pool, disk = make_faulty_pool()
    fb = pool.insert(array(1))
    gate = disk.gate("rename")
    fb.spawn_write_now()
    gate.wait_reached()
    fb.drop()
    pool.validate()
    assert pool.stats().resident_bytes == ITEM, "a value being written takes memory"
    gate.open()
    pool.drain()
    pool.validate()
    assert pool.stats().resident_bytes == 0
    assert blob_files(pool) == []
    assert pool.stats().disk_bytes == 0


def test_drop_during_a_failing_write_surfaces_nothing(make_faulty_pool: MakeFaulty) -> None:
    pool, disk = make_faulty_pool()
    fb = pool.insert(array(1))
    gate = disk.gate("open")
    disk.fail("writev", error=OSError(28, "no space"))
    fb.spawn_write_now()
    gate.wait_reached()
    fb.drop()
    gate.open()
    pool.drain()
    assert pool.stats().resident_bytes == 0


# ------------------------------------------------------------------------------- drop during load


def test_drop_during_load_the_reader_still_gets_the_value(make_faulty_pool: MakeFaulty, spawn: Spawn) -> None:
    pool, disk = make_faulty_pool()
    pool.put("x", array(4)).drop()
    pool.evict()
    gate = disk.gate("open")
    reading = spawn(lambda: pool["x"][0])
    gate.wait_reached()
    pool.delete("x")
    pool.validate()
    gate.open()
    assert reading.result() == 4, "the blob was deleted before the load that needs it"
    pool.drain()
    assert pool.stats().entries == 0
    assert pool.stats().disk_bytes == 0


# ----------------------------------------------------------------------------- replace during write


def test_replace_during_write_keeps_the_new_value(make_faulty_pool: MakeFaulty, spawn: Spawn) -> None:
    pool, disk = make_faulty_pool()
    pool.put("x", array(1))
    gate = disk.gate("writev")
    evicting = spawn(pool.evict)
    gate.wait_reached()
    pool.put("x", array(2))
    pool.validate()
    gate.open()
    evicting.result()
    pool.evict()
    assert pool["x"][0] == 2
    pool.drain()
    assert pool.stats().entries == 1


# --------------------------------------------------------------------------------------- and close


def test_close_during_write_waits_for_it_and_leaves_nothing(
    make_faulty_pool: MakeFaulty, spawn: Spawn, blob_files: Callable[[FBPool], list[Any]]
) -> None:
    pool, disk = make_faulty_pool()
    fb = pool.put("x", array(1))
    gate = disk.gate("writev")
    writing = fb.spawn_write_now()
    gate.wait_reached()
    closing = spawn(pool.close)
    assert isinstance(writing.exception(30), PoolClosedError)
    assert not closing.done
    gate.open()
    closing.result()
    assert blob_files(pool) == []


def test_close_during_load_is_a_closed_pool_to_the_reader(make_faulty_pool: MakeFaulty, spawn: Spawn) -> None:
    pool, disk = make_faulty_pool()
    pool.put("x", array(1))
    pool.evict()
    gate = disk.gate("open")
    reading = spawn(lambda: pool["x"])
    gate.wait_reached()
    pool.close()
    gate.open()
    assert isinstance(reading.error(), PoolClosedError)


def test_close_during_a_put_that_waits_is_a_closed_pool_to_it(
    make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool, disk = make_faulty_pool(2 * ITEM)
    pool.put("a", array(1))
    gate = disk.gate("writev")
    pool.put("b", array(1))
    putting = spawn(pool.put, "c", array(1))
    sleepers.next()
    closing = spawn(pool.close)
    assert isinstance(putting.error(), PoolClosedError)
    gate.open()
    closing.result()


@pytest.mark.parametrize("method", ["get", "get_mut"])
def test_close_during_a_wait_for_a_guard_is_a_closed_pool_to_it(
    method: str, pool: FBPool, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool.put("x", array(1))

    def enter() -> None:
        with getattr(pool, method)("x"):
            pass

    with pool.get_mut("x") as x:
        waiting = spawn(enter)
        sleepers.next()
        pool.close()
        assert isinstance(waiting.error(), PoolClosedError)
        x += 1  # what is held stays valid


# ---------------------------------------------------------------------------- names and their guards


def test_replace_between_get_and_with_gives_a_reader_a_value_and_no_key_error(pool: FBPool) -> None:
    pool.put("x", array(1))
    guard = pool.get("x")
    pool.put("x", array(2))
    with guard as x:
        assert x[0] == 2


def test_replace_while_a_guard_is_held_leaves_it_its_value(pool: FBPool) -> None:
    pool.put("x", array(1))
    with pool.get("x") as x, pool.get_mut(pool.put("y", array(5)).key):
        pool.put("x", array(2))
        assert x[0] == 1
        assert pool["x"][0] == 2
        pool.validate()
    pool.validate()
    assert pool.stats().entries == 2


def test_delete_while_a_writer_waits_lets_it_have_the_entry(
    pool: FBPool, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool.put("x", array(1))
    done = threading.Event()

    def write() -> None:
        with pool.get_mut("x") as x:
            x += 1
            done.set()

    with pool.get("x"):
        writing = spawn(write)
        sleepers.next()
        pool.delete("x")
        pool.validate()
    writing.result()
    assert done.is_set()
    pool.validate()
    assert pool.stats().entries == 0


def test_a_reader_that_reads_already_gets_in_before_a_waiting_writer(
    pool: FBPool, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool.put("x", array(1))
    with pool.get("x"):
        writing = spawn(change, pool, "x", 1)
        sleepers.next()
        with pool.get("x") as x:
            assert x[0] == 1
        with pytest.raises(DeadlockError), pool.get_mut("x"):
            pass
    writing.result()
    assert pool["x"][0] == 2


def test_memory_freed_by_a_leaving_guard_lets_a_waiting_put_in(
    make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool, disk = make_faulty_pool(2 * ITEM)
    pool.put("a", array(1))
    pool.evict()
    gate = disk.gate("writev")
    guard = pool.get("a")
    with guard:
        pool.put("b", array(2))  # "b" is dirty, and being written
        gate.wait_reached()
        putting = spawn(pool.put, "c", array(3))
        sleepers.next()
    # "a" is clean and no longer pinned: it makes room at once, while the disk still stands.
    putting.result()
    gate.open()
    pool.drain()


def test_pools_close_while_handles_are_dropped_by_many_threads(make_pool: MakePool, spawn: Spawn) -> None:
    pool = make_pool(16 * ITEM)
    start = threading.Barrier(5)

    def churn(thread: int) -> None:
        start.wait(30)
        try:
            for i in range(200):
                pool.insert((thread, i))
                pool.put((thread, i % 3), array(i))
        except PoolClosedError:
            pass

    threads = [spawn(churn, n) for n in range(4)]
    start.wait(30)
    pool.close()
    for thread in threads:
        thread.result()


@pytest.mark.patches
def test_a_finalizer_that_the_collector_runs_amid_a_decision_may_call_the_pool(
    pool: FBPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.put("x", array(1))
    seen: list[float] = []

    class Caller:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            with pool.get("x") as x:
                seen.append(x[0])
            pool.put("from a finalizer", array(3))

    residency = pool._engine.residency
    make_room = residency._make_room

    def collect_first(nbytes: int, *, force: bool) -> None:
        monkeypatch.undo()
        gc.collect()
        make_room(nbytes, force=force)

    monkeypatch.setattr(residency, "_make_room", collect_first)
    Caller()
    pool.put("y", array(2))
    assert seen == [1]
    assert pool["y"][0] == 2
    assert pool["from a finalizer"][0] == 3
    pool.validate()


def test_changing_spilled_values_while_the_disk_is_full_is_bounded_and_says_so(
    make_faulty_pool: MakeFaulty,
) -> None:
    """Invariants 3 and 9: a write guard that would outrun a failing disk raises, and loses nothing."""
    pool, disk = make_faulty_pool(4 * ITEM, io_threads=1)
    for name in range(20):
        pool.put(name, array(name))
    pool.evict()
    disk.fail("writev", error=OSError(errno.ENOSPC, "no space"), times=None)
    changed = []
    for name in range(20):
        try:
            change(pool, name, 100)
        except DiskFullError:
            pass
        else:
            changed.append(name)
        pool.validate()
        assert pool.stats().resident_bytes <= 5 * ITEM, "the budget, and the value last changed"
    assert 4 <= len(changed) < 20
    disk.clear()
    for name in range(20):
        assert pool[name][0] == (name + 100 if name in changed else name)
    with contextlib.suppress(DiskFullError):
        pool.drain()
    change(pool, 19, 0)


# ------------------------------------------------------------- a write asked for amid a mutation


@pytest.mark.parametrize("next_in_line", [None, "load", "load_mut"])
def test_a_write_asked_for_amid_a_mutation_that_is_rolled_back_is_answered(
    pool: FBPool, spawn: Spawn, sleepers: Sleepers, next_in_line: str | None
) -> None:
    """The former content is back with its blob: there is nothing to be written, and somebody waits."""
    fb = pool.insert(array(1))
    fb.write_now()
    others: list[Running] = []
    with contextlib.suppress(ZeroDivisionError), fb.load_mut(rollback=True) as value:
        value[:] = 0
        asked = fb.spawn_write_now()
        if next_in_line is not None:
            others.append(spawn(look, getattr(fb, next_in_line)()))
            sleepers.next()
        raise ZeroDivisionError
    asked.result(timeout=30)
    assert [other.result() for other in others] == [1] * len(others)
    with fb.load() as found:
        assert found[-1] == 1
    pool.validate()


def look(guard: ReadGuard | WriteGuard) -> float:
    with guard as value:
        return float(value[-1])


def test_evict_passes_over_a_value_that_a_writer_has_taken_since_it_was_chosen(pool: FBPool) -> None:
    """Waiting for that writer could take for ever; pinned values are passed over."""
    pool.put("x", array(1))
    residency = pool._engine.residency
    [entry] = residency.run(residency.evictable, None)
    with pool.get_mut("x"):
        assert pool._evict([entry], None) == 0
    pool.validate()
