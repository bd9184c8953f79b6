"""The budget (invariant 3): how much is in memory, who is written when, and who waits for room.

Sizes are exact here: every value is put with ``nbytes=``, so that the blob's header does not correct it.
"""

from __future__ import annotations

import errno
import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from fbcache import (
    DiskFullError,
    FBPool,
    PutTimeoutError,
    State,
    StorageError,
    UnsupportedTypeError,
)
from tests.conftest import MakePool, Running, Sleepers
from tests.faults import PATIENCE, FaultyDisk, oserror

SIZE = 10_000
BUDGET = 80 * SIZE
HEADROOM = BUDGET // 8  # ten values
FREELY = (BUDGET - HEADROOM) // SIZE  # how many values fit before anything is written

Spawn = Callable[..., Running]
MakeFaultyPool = Callable[..., tuple[FBPool, FaultyDisk]]


def content(number: int, nbytes: int = SIZE) -> np.ndarray[Any, Any]:
    return np.full(nbytes, number % 251, np.uint8)


def fill(pool: FBPool, count: int, *, first: int = 0) -> None:
    for number in range(first, first + count):
        pool.put(number, content(number), nbytes=SIZE)


def in_memory(pool: FBPool) -> set[int]:
    return {e.name for e in pool._engine.residency.entries if e.state not in (State.SPILLED, State.LOADING)}


def check(pool: FBPool, *, besides: int = 0) -> None:
    """Recount, and hold memory against its bound."""
    pool.validate()
    stats = pool.stats()
    assert stats.resident_bytes <= stats.budget + stats.pinned_bytes + besides
    assert stats.pinned_bytes <= stats.resident_bytes
    assert stats.writing_bytes <= stats.resident_bytes


@pytest.fixture
def narrow(make_faulty_pool: MakeFaultyPool) -> tuple[FBPool, FaultyDisk]:
    """A pool with one I/O thread, so that one gate holds up all writing."""
    return make_faulty_pool(BUDGET, io_threads=1)


# ------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("nbytes", [1, 37, 1_000, SIZE, BUDGET // 3, BUDGET - 1, BUDGET])
def test_invariant_3_puts_of_one_size_stay_within_the_budget(make_pool: MakePool, nbytes: int) -> None:
    pool = make_pool(BUDGET)
    for number in range(min(3 * BUDGET // nbytes + 3, 500)):
        pool.put(number, content(number, nbytes), nbytes=nbytes)
        check(pool)


def test_invariant_3_puts_of_mixed_sizes_stay_within_the_budget(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    sizes = np.random.default_rng(3).integers(0, BUDGET // 2, 300)
    for number, nbytes in enumerate(sizes):
        pool.put(number % 90, content(number, int(nbytes)))
        check(pool)
    for number in pool:
        with pool.get(number) as value:
            check(pool)
            assert len(value) == sizes[number + 90 * ((299 - number) // 90)]


def test_invariant_3_producers_and_readers_at_once_stay_within_the_budget(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    threads, rounds = 6, 60
    running = threading.Semaphore(0)
    ended = threading.Event()
    excess: list[int] = []

    def work(thread: int) -> None:
        try:
            for number in range(rounds):
                pool.put((thread, number), content(number), nbytes=SIZE)
                with pool.get((thread, number // 2)) as value:
                    assert value[0] == (number // 2) % 251
        finally:
            running.release()

    def sample() -> None:
        while not ended.is_set():
            stats = pool.stats()
            excess.append(stats.resident_bytes - stats.budget - stats.pinned_bytes)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    sampler = threading.Thread(target=sample)
    for thread in (sampler, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    ended.set()
    sampler.join()
    assert max(excess) <= threads * SIZE
    check(pool)


def test_invariant_3_loads_of_a_spilled_set_stay_within_the_budget(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 300)
    for number in range(300):
        with pool.get(number) as value:
            assert (value == number % 251).all()
            check(pool)
        assert (pool[number] == number % 251).all()
        check(pool)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("nbytes", [SIZE, 200_000])
def test_invariant_3_get_mut_over_a_spilled_set_stays_within_the_budget(
    make_pool: MakePool, mmap: bool, nbytes: int
) -> None:
    pool = make_pool(8 * nbytes, mmap=mmap)
    for number in range(40):
        pool.put(number, content(number, nbytes), nbytes=nbytes)
    for _ in range(3):
        for number in range(40):
            with pool.get_mut(number) as value:
                value += 1
                check(pool)
            check(pool, besides=nbytes)  # what this thread has loaded
    for number in range(40):
        assert (pool[number] == number + 3).all()


def test_invariant_3_values_that_grow_under_write_guards_wait_for_the_disk(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    for number in range(40):
        pool.put(number, content(number, 100))
    gate = disk.gate("open")

    def grow() -> None:
        for number in reversed(range(40)):  # the last first: none of them is being written
            guard = pool.get_mut(number)
            with guard:
                guard.value = content(number, 3 * SIZE)
            check(pool, besides=3 * SIZE)

    growing = spawn(grow)
    assert sleepers.next() in pool._engine.residency.room, "it waits for a lock instead of for room"
    check(pool, besides=3 * SIZE)
    assert not growing.done
    gate.open()
    growing.result()
    pool.drain()
    check(pool)
    assert all((pool[number] == number).all() and len(pool[number]) == 3 * SIZE for number in range(40))


def test_invariant_3_reads_stay_within_the_budget_while_nothing_can_be_written(
    narrow: tuple[FBPool, FaultyDisk],
) -> None:
    pool, disk = narrow
    fill(pool, 300)
    pool.drain()
    disk.fail("writev", error=oserror(errno.ENOSPC), times=None)
    with pool.get_mut(0) as value:
        value += 1
    with pytest.raises(DiskFullError):
        pool.evict()
    for number in range(300):
        with pool.get(number) as value:
            assert (value == (number + (number == 0)) % 251).all()
        check(pool)
    disk.clear()
    with suppress(DiskFullError):  # of a write ahead that was under way
        pool.drain()


# --------------------------------------------------------------------------- write-ahead


def test_invariant_3_nothing_is_written_below_the_headroom(narrow: tuple[FBPool, FaultyDisk]) -> None:
    pool, disk = narrow
    fill(pool, FREELY)
    pool.drain()
    assert disk.count("writev") == 0
    assert pool.stats().disk_bytes == 0


def test_invariant_3_the_tail_is_written_ahead_within_the_headroom(narrow: tuple[FBPool, FaultyDisk]) -> None:
    pool, disk = narrow
    handles = [pool.put(number, content(number), nbytes=SIZE) for number in range(FREELY + 1)]
    pool.drain()
    assert disk.count("writev") == 1
    assert handles[0].state is State.CLEAN, "the first put is the next to leave, and is kept until then"
    assert all(fb.state is State.RESIDENT for fb in handles[1:])
    fill(pool, 3, first=FREELY + 1)
    pool.drain()
    assert disk.count("writev") == 4
    assert pool.stats().evictions == 0


def test_invariant_3_a_value_read_before_its_write_is_not_written(
    narrow: tuple[FBPool, FaultyDisk],
) -> None:
    """What is queued and touched goes back to the front; another takes its place."""
    pool, disk = narrow
    gate = disk.gate("open")
    fill(pool, FREELY + 2)  # the first is at the gate, the second in line
    gate.wait_reached()
    with pool.get(1) as value:
        assert (value == 1).all()
    gate.open()
    pool.drain()
    assert pool.put(1, content(1), nbytes=SIZE).state is State.RESIDENT
    check(pool)


def test_invariant_3_put_does_not_wait_while_clean_room_is_there(narrow: tuple[FBPool, FaultyDisk]) -> None:
    pool, disk = narrow
    fill(pool, 2 * BUDGET // SIZE)
    pool.drain()
    stalls = pool.stats().stalls
    gate = disk.gate("open")
    fill(pool, HEADROOM // SIZE, first=1000)
    assert pool.stats().stalls == stalls
    check(pool)
    gate.open()
    pool.drain()


# --------------------------------------------------------------------------------- waiting


def test_invariant_3_put_waits_for_the_disk_when_no_room_is_left(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    gate = disk.gate("open")
    fill(pool, BUDGET // SIZE)
    gate.wait_reached()
    assert pool.stats().stalls == 0
    late = spawn(lambda: pool.put("late", content(7), nbytes=SIZE))
    sleepers.next()
    assert not late.done
    assert "late" not in pool
    assert pool.stats().stalls == 1
    check(pool)
    gate.open()
    assert late.result().state is not State.DROPPED
    assert (pool["late"] == 7).all()
    assert pool.stats().stalls == 1
    assert pool.stats().stall_seconds > 0
    pool.drain()
    check(pool)


def test_a_put_that_times_out_stores_nothing_and_the_former_value_stands(
    make_faulty_pool: MakeFaultyPool,
) -> None:
    pool, disk = make_faulty_pool(BUDGET, io_threads=1, put_timeout=0)
    gate = disk.gate("open")
    fill(pool, BUDGET // SIZE)
    gate.wait_reached()
    entries = pool.stats().entries
    with pytest.raises(PutTimeoutError, match="10,000 bytes"):
        pool.put(3, content(99), nbytes=SIZE)
    with pytest.raises(PutTimeoutError):
        pool.insert(content(99), nbytes=SIZE)
    with pytest.raises(TimeoutError):
        pool["new"] = content(99)
    assert (pool[3] == 3).all()
    assert "new" not in pool
    assert pool.stats().entries == entries
    assert pool.stats().stalls == 3
    check(pool)
    gate.open()
    pool.drain()
    pool.put(3, content(99), nbytes=SIZE)
    assert (pool[3] == 99).all()
    check(pool)


def test_a_put_that_timed_out_takes_no_room_from_the_next(
    make_faulty_pool: MakeFaultyPool, sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = make_faulty_pool(BUDGET, io_threads=1, put_timeout=0.05)
    gate = disk.gate("open")
    fill(pool, BUDGET // SIZE)
    gate.wait_reached()
    for number in range(3):
        late = spawn(lambda number=number: pool.put(("late", number), content(1), nbytes=SIZE))
        sleepers.next()
        with pytest.raises(PutTimeoutError):
            late.result()
    gate.open()
    pool.drain()
    assert len(pool) == BUDGET // SIZE
    fill(pool, 5, first=500)
    check(pool)


def test_producers_are_let_in_in_order(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    count = 4
    gates = [disk.gate("rename", nth=nth) for nth in range(1, count + 1)]
    fill(pool, BUDGET // SIZE)
    gates[0].wait_reached()
    late = []
    for number in range(count):
        late.append(spawn(lambda number=number: pool.put(("late", number), content(1), nbytes=SIZE)))
        sleepers.next()
    for number, gate in enumerate(gates):
        assert [call.done for call in late[number:]] == [False] * (count - number)
        check(pool)
        gate.open()
        late[number].result()
        assert [name for name in pool if isinstance(name, tuple)] == [("late", n) for n in range(number + 1)]
        if number + 1 < count:
            gates[number + 1].wait_reached()
    pool.drain()
    check(pool)


def test_a_small_put_does_not_overtake_a_large_one_that_waits(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    gate = disk.gate("open")
    fill(pool, BUDGET // SIZE - 1)
    gate.wait_reached()
    large = spawn(lambda: pool.put("large", content(1, 30 * SIZE), nbytes=30 * SIZE))
    sleepers.next()
    small = spawn(lambda: pool.put("small", content(2, SIZE), nbytes=SIZE))
    sleepers.next()
    assert not large.done
    assert not small.done, "it would have fitted, and the large one might starve"
    gate.open()
    large.result()
    small.result()
    check(pool)


def test_readers_go_on_while_a_put_waits(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    gate = disk.gate("rename")
    fill(pool, BUDGET // SIZE)
    gate.wait_reached()
    late = spawn(lambda: pool.put("late", content(1), nbytes=SIZE))
    sleepers.next()
    for number in range(BUDGET // SIZE):
        with pool.get(number) as value:
            assert (value == number).all()
    gate.open()
    late.result()


# ------------------------------------------------------------------------------- oversize


def test_a_value_larger_than_the_budget_is_accepted_and_spilled_at_once(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 5)
    fb = pool.put("large", content(7, 3 * BUDGET))
    assert fb.state is State.SPILLED
    check(pool)
    assert in_memory(pool) == set(range(5)), "it has driven out what was there"
    for _ in range(2):
        with pool.get("large") as value:
            assert len(value) == 3 * BUDGET
            assert (value == 7).all()
            check(pool)
        del value
        assert fb.state is State.SPILLED
        check(pool)
    pool.drain()
    check(pool)


def test_a_change_to_a_value_larger_than_the_budget_is_spilled_too(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fb = pool.insert(content(7, 3 * BUDGET))
    with fb.load_mut() as value:
        value[:] = 8
        check(pool)
    del value
    pool.drain()
    assert fb.state is State.SPILLED
    check(pool)
    with fb.load() as value:
        assert (value == 8).all()


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_large_value_that_cannot_be_written_is_not_stored(
    narrow: tuple[FBPool, FaultyDisk], name: str
) -> None:
    pool, disk = narrow
    pool.put("old", content(1), nbytes=SIZE)
    disk.fail("writev", error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        pool.put(name, content(7, 2 * BUDGET))
    assert pool.keys() == ["old"]
    assert (pool["old"] == 1).all()
    assert pool.stats().entries == 1
    check(pool)
    pool.drain()  # the error was raised already
    pool.put(name, content(7, 2 * BUDGET))
    assert (pool[name] == 7).all()


def test_a_large_value_that_cannot_be_encoded_is_not_stored(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    with pytest.raises(UnsupportedTypeError):
        pool.put("large", [lambda: 0, content(0, 2 * BUDGET)])
    assert "large" not in pool
    assert pool.stats().entries == 0
    pool.drain()
    check(pool)


def test_a_large_value_that_times_out_leaves_nothing_behind(make_faulty_pool: MakeFaultyPool) -> None:
    pool, disk = make_faulty_pool(BUDGET, io_threads=1, put_timeout=0)
    gate = disk.gate("open")
    with pytest.raises(PutTimeoutError):
        pool.put("large", content(7, 2 * BUDGET))
    assert "large" not in pool
    gate.open()
    pool.drain()
    assert pool.stats().entries == 0
    assert pool.stats().disk_bytes == 0, "the blob of a value that was given up"
    assert pool.stats().resident_bytes == 0
    check(pool)


# ---------------------------------------------------------------------------------- pins


def test_pinned_values_are_never_evicted(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 20)
    guards = [pool.get(number) for number in range(10)]
    values = [guard.__enter__() for guard in guards]
    fill(pool, 200, first=1000)
    assert pool.evict() > 0
    assert pool.evict(range(10)) == 0
    assert in_memory(pool) == set(range(10))
    for number, guard in enumerate(guards):
        assert guard.value is values[number]
        assert (values[number] == number).all()
        guard.__exit__(None, None, None)
    check(pool)
    assert pool.evict() == 10 * SIZE


def test_invariant_3_put_goes_on_when_guards_pin_more_than_the_budget(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET, put_timeout=PATIENCE)
    fill(pool, 200)
    guards = [pool.get(number) for number in range(200)]
    for guard in guards:
        guard.__enter__()
        check(pool)
    assert pool.stats().pinned_bytes == 200 * SIZE
    assert pool.stats().resident_bytes == 200 * SIZE
    fill(pool, 50, first=1000)
    check(pool, besides=SIZE)
    for guard in guards:
        guard.__exit__(None, None, None)
        check(pool, besides=SIZE)
    pool.drain()
    check(pool)
    assert pool.stats().pinned_bytes == 0
    assert all((pool[number] == number % 251).all() for number in range(200))


def test_a_value_counts_as_pinned_once_and_until_its_last_guard(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 1)
    with pool.get(0):
        with pool.get(0):
            assert pool.stats().pinned_bytes == SIZE
        assert pool.stats().pinned_bytes == SIZE
    assert pool.stats().pinned_bytes == 0
    with pool.get_mut(0):
        assert pool.stats().pinned_bytes == SIZE
    assert pool.stats().pinned_bytes == 0
    held = pool.try_get(0)
    assert pool.stats().pinned_bytes == SIZE
    del held
    gc.collect()
    pool.drain()
    check(pool)
    assert pool.stats().pinned_bytes == 0, "a held guard that was forgotten"


# --------------------------------------------------------------------------------- resize


def test_a_smaller_budget_is_come_down_to_in_the_background(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET, io_threads=1)
    fill(pool, BUDGET // SIZE)
    pool.resize(20 * SIZE)
    assert pool.memory == 20 * SIZE
    pool.drain()
    check(pool)
    assert in_memory(pool) <= set(range(60, 80))
    assert all((pool[number] == number).all() for number in range(BUDGET // SIZE))


def test_a_larger_budget_lets_in_who_waits(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    gate = disk.gate("open")
    fill(pool, BUDGET // SIZE)
    gate.wait_reached()
    late = spawn(lambda: pool.put("late", content(1), nbytes=SIZE))
    sleepers.next()
    pool.resize("1MB")
    late.result()  # the disk is held up still
    assert pool.memory == 1_000_000
    check(pool)
    gate.open()
    pool.drain()


def test_hits_on_values_that_are_to_leave_do_not_keep_the_pool_over_its_budget(
    narrow: tuple[FBPool, FaultyDisk],
) -> None:
    """What a hit takes back from the line is replaced by others."""
    pool, _ = narrow
    fill(pool, FREELY)
    go_on = threading.Event()
    pool._engine.workers.submit(go_on.wait)  # type: ignore[arg-type]
    pool.resize(20 * SIZE)  # the rest is in line now, and nothing is being written
    for number in range(FREELY):
        assert (pool[number] == number).all()
    go_on.set()
    pool.drain()
    check(pool)


@pytest.mark.parametrize("memory", [0, -1, "much", 1 << 70, True, [3]])
def test_an_absurd_budget_is_refused_and_the_former_stands(make_pool: MakePool, memory: Any) -> None:
    pool = make_pool(BUDGET)
    with pytest.raises((TypeError, ValueError)):
        pool.resize(memory)
    assert pool.memory == BUDGET
    with pytest.raises((TypeError, ValueError)):
        make_pool(memory)


# ---------------------------------------------------------------------------------- evict


def test_evict_without_names_leaves_nothing_in_memory(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 50)
    assert pool.evict() == 50 * SIZE
    assert pool.stats().resident_bytes == 0
    assert pool.stats().spilled_bytes == 50 * SIZE
    assert pool.evict() == 0
    check(pool)


def test_evict_takes_what_it_was_told_and_nothing_else(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 50)
    assert pool.evict([3, 4, 3]) == 2 * SIZE
    assert in_memory(pool) == set(range(50)) - {3, 4}
    assert pool.evict([3]) == 0
    assert pool.evict([]) == 0
    check(pool)


def test_evict_of_an_unknown_name_does_nothing(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 5)
    with pytest.raises(KeyError, match="nobody"):
        pool.evict([1, "nobody"])
    assert in_memory(pool) == set(range(5))


@pytest.mark.parametrize(("nbytes", "freed"), [(0, 0), (1, 1), (SIZE, 1), (SIZE + 1, 2), (7 * SIZE, 7)])
def test_evict_stops_after_its_bytes(make_pool: MakePool, nbytes: int, freed: int) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 50)
    assert pool.evict(nbytes=nbytes) == freed * SIZE
    assert in_memory(pool) == set(range(freed, 50)), "least recently used go first"
    check(pool)


def test_evict_waits_for_what_is_being_written_already(
    narrow: tuple[FBPool, FaultyDisk], spawn: Spawn
) -> None:
    pool, disk = narrow
    gate = disk.gate("open")
    fill(pool, FREELY + 1)
    gate.wait_reached()
    evicted = spawn(pool.evict)
    gate.open()
    assert evicted.result() == (FREELY + 1) * SIZE
    assert pool.stats().resident_bytes == 0
    check(pool)


def test_evict_of_a_large_value_being_written_leaves_it_on_disk(
    make_faulty_pool: MakeFaultyPool, spawn: Spawn
) -> None:
    pool, disk = make_faulty_pool(BUDGET, io_threads=1)
    fb = pool.put("large", content(1, 2 * BUDGET), nbytes=2 * BUDGET)
    with fb.load_mut() as value:
        value += 1
        gate = disk.gate("open")
    gate.wait_reached()
    evicted = spawn(lambda: pool.evict(["large"]))
    gate.open()
    evicted.result()
    assert fb.state is State.SPILLED
    check(pool)


# ---------------------------------------------------------------------------------- drain


def test_drain_waits_for_writes(narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn) -> None:
    pool, disk = narrow
    gate = disk.gate("open")
    fill(pool, FREELY + 3)
    gate.wait_reached()
    drained = spawn(pool.drain)
    sleepers.next()
    assert not drained.done
    gate.open()
    drained.result()
    assert pool.stats().writing_bytes == 0
    assert disk.count("rename") == 3


def test_drain_waits_for_deletions(
    narrow: tuple[FBPool, FaultyDisk], sleepers: Sleepers, spawn: Spawn
) -> None:
    pool, disk = narrow
    fill(pool, 5)
    pool.evict()
    gate = disk.gate("unlink")
    for number in range(5):
        del pool[number]
    gate.wait_reached()
    drained = spawn(pool.drain)
    sleepers.next()
    assert not drained.done
    gate.open()
    drained.result()
    assert pool.stats().disk_bytes == 0


# ---------------------------------------------------------------------------------- sizes


def test_a_given_size_is_believed(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fb = pool.put("x", content(1, 50 * SIZE), nbytes=5)
    assert fb.nbytes == pool.stats().resident_bytes == 5
    fb.write_now()
    assert fb.nbytes == 5, "the blob's size has replaced what the caller said"
    with fb.load_mut() as value:
        value += 1
    assert fb.nbytes == 5
    check(pool)


@pytest.mark.parametrize(
    ("nbytes", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_what_is_no_size_is_refused(make_pool: MakePool, nbytes: Any, error: type[Exception]) -> None:
    pool = make_pool(BUDGET)
    pool.put("x", 1)
    with pytest.raises(error, match="nbytes"):
        pool.put("x", 2, nbytes=nbytes)
    assert pool["x"] == 1
    assert pool.stats().entries == 1


def understated(nbytes: int) -> list[bytes]:
    """A list whose bulk is one item that a sample misses."""
    return [*[b"x"] * 5, bytes(nbytes), *[b"x"] * 9_000]


def test_the_serialized_size_corrects_the_estimate_at_the_first_spill(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fb = pool.put("x", understated(20 * SIZE))
    estimate = fb.nbytes
    assert estimate < 20 * SIZE
    fb.write_now()
    assert 20 * SIZE < fb.nbytes < 23 * SIZE
    assert pool.stats().resident_bytes == fb.nbytes
    check(pool)
    pool.evict()
    assert pool["x"] == understated(20 * SIZE)
    check(pool)


def test_a_value_found_larger_than_the_budget_when_written_leaves_memory(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fb = pool.put("x", understated(3 * BUDGET))
    assert fb.nbytes < BUDGET
    fb.write_now()
    assert fb.nbytes > 3 * BUDGET
    pool.drain()
    check(pool)
    assert fb.state is State.SPILLED


# ---------------------------------------------------------------------------------- stats


@pytest.mark.files
def test_the_figures_say_what_was_done(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool, 10)
    unnamed = pool.insert(content(0), nbytes=SIZE)
    stats = pool.stats()
    assert (stats.entries, stats.named, stats.budget) == (11, 10, BUDGET)
    assert stats.resident_bytes == 11 * SIZE
    assert stats.hits == stats.misses == stats.loads == stats.spills == stats.evictions == 0
    with pool.get(0), pool.get(1), pool.get_mut(2):
        assert pool.stats().pinned_bytes == 3 * SIZE
    assert pool[3][0] == 3
    assert pool.stats().hits == 4
    assert pool.evict() == 11 * SIZE
    stats = pool.stats()
    assert (stats.spills, stats.evictions, stats.clean_evictions) == (11, 11, 0)
    assert stats.disk_bytes == stats.bytes_written >= 11 * SIZE
    assert (stats.resident_bytes, stats.spilled_bytes) == (0, 11 * SIZE)
    with pool.get(0):
        pass
    with pool.get(0):
        pass
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.loads) == (5, 1, 1)
    assert stats.bytes_read == stats.bytes_written // 11
    assert pool.evict() == SIZE
    stats = pool.stats()
    assert (stats.spills, stats.evictions, stats.clean_evictions) == (11, 12, 1)
    assert stats.stalls == stats.stall_seconds == stats.errors == 0
    unnamed.drop()
    del pool[0]
    pool.drain()
    stats = pool.stats()
    assert (stats.entries, stats.named) == (9, 9)
    assert stats.disk_bytes == 9 * (stats.bytes_written // 11)
    check(pool)


def test_evicted_values_that_variables_hold_linger_and_are_reused(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    pool.put("x", content(1), nbytes=SIZE)
    pool.put("y", content(2), nbytes=SIZE)
    kept = pool["x"]
    pool.evict()
    assert pool.stats().lingering_bytes == SIZE
    loads = pool.stats().loads
    with pool.get("x") as value:
        assert np.shares_memory(value, kept)
    assert pool.stats().loads == loads
    check(pool)
    pool.evict()
    del kept, value
    gc.collect()
    assert pool.stats().lingering_bytes == 0
    assert (pool["x"] == 1).all()
    assert pool.stats().loads == loads + 1
    check(pool)
