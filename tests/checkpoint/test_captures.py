"""Captures: what a save holds of an entry, given back whatever becomes of the save and of the entry."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from fbcache import DeadlockError, DiskFullError, FBPool, PoolClosedError, State, UnsupportedTypeError
from fbcache.captures import Capture
from fbcache.sizeof import measure
from tests.checkpoint.cuts import (
    ITEM,
    HeldOpen,
    MakeFaulty,
    Spawn,
    array,
    change,
    entry_of,
    nothing_is_left,
    state,
)
from tests.conftest import MakePool, Sleepers
from tests.faults import oserror


def capture(pool: FBPool, *names: Any) -> list[Capture]:
    captures: list[Capture] = []
    residency = pool._engine.residency
    residency.run(residency.capture, [entry_of(pool, name) for name in names], captures)
    return captures


def release(pool: FBPool, captures: list[Capture]) -> None:
    while captures:
        pool._engine.residency.run(pool._engine.residency.release_capture, captures.pop())


def content(pool: FBPool, captured: Capture) -> Any:
    """The first item of the array in the captured blob, read past the pool."""
    captured.wait()
    captured.raise_error()
    assert captured.token is not None
    frames = pool._engine.store.read(captured.token.key, writable=False, verify=True)
    return pool._engine.spiller._codec.decode(frames, writable=False, allow_pickle=False).flat[0]


@contextmanager
def busy(pool: FBPool, disk: Any) -> Iterator[Any]:
    """The pool's one I/O thread stands at the disk, so that nothing else is written."""
    gate = disk.gate("writev")
    writing = pool.put("busy", array(-1)).spawn_write_now()
    gate.wait_reached()
    try:
        yield gate
    finally:
        gate.open()
        writing.result(30)


# -------------------------------------------------------------------- what is captured is given back


@pytest.mark.files
def test_a_capture_of_what_is_on_disk_needs_no_wait_and_keeps_the_blob(pool: FBPool) -> None:
    pool.put("x", array(1))
    pool.evict()
    (captured,) = captures = capture(pool, "x")
    assert captured.done
    pool.delete("x")
    pool.drain()
    assert content(pool, captured) == 1
    release(pool, captures)
    nothing_is_left(pool)


def test_releasing_twice_gives_up_one_share(pool: FBPool) -> None:
    pool.put("x", array(1))
    pool.evict()
    (captured,) = capture(pool, "x")
    residency = pool._engine.residency
    for _ in range(2):
        residency.run(residency.release_capture, captured)
    assert entry_of(pool, "x").token.shares == 1
    assert pool["x"][0] == 1


def test_a_deleted_entry_lives_until_its_captures_have_its_blob(make_faulty_pool: MakeFaulty) -> None:
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    with busy(pool, disk):
        captures = capture(pool, "x")
        pool.delete("x")
        pool.validate()
        assert pool.stats().entries == 2
    assert content(pool, captures[0]) == 1
    pool.drain()
    assert pool.stats().entries == 1
    release(pool, captures)
    nothing_is_left(pool)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_captures_that_give_up_before_the_write_leave_the_others_theirs(
    order: tuple[int, ...], make_faulty_pool: MakeFaulty
) -> None:
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    with busy(pool, disk):
        captures = [capture(pool, "x") for _ in range(3)]
        for which in order[:2]:
            release(pool, captures[which])
            pool.validate()
    assert content(pool, captures[order[2]][0]) == 1
    release(pool, captures[order[2]])
    nothing_is_left(pool)


def test_a_write_is_not_made_for_captures_that_have_given_up(make_faulty_pool: MakeFaulty) -> None:
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    with busy(pool, disk):
        release(pool, capture(pool, "x"))
    pool.drain()
    assert state(pool, "x") is State.RESIDENT
    nothing_is_left(pool)


@pytest.mark.parametrize("written", [False, True])
def test_a_capture_that_is_forgotten_is_given_back_by_its_finalizer(
    written: bool, make_faulty_pool: MakeFaulty
) -> None:
    """Invariant 7: what an interrupt of a save's own cleaning up leaves behind."""
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    if written:
        pool.evict()
        captures = capture(pool, "x")
        del captures
    else:
        with busy(pool, disk):
            captures = capture(pool, "x")
            del captures
    gc.collect()
    nothing_is_left(pool)


def test_close_ends_the_wait_of_captures_and_releasing_them_later_does_no_harm(
    make_faulty_pool: MakeFaulty, spawn: Spawn
) -> None:
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    pool.put("y", array(1))
    gate = disk.gate("writev")
    captures = capture(pool, "x", "y")
    gate.wait_reached()
    closing = spawn(pool.close)
    for captured in captures:
        captured.wait()
        with pytest.raises(PoolClosedError):
            captured.raise_error()
    gate.open()
    closing.result()
    release(pool, captures)


# -------------------------------------------------------------------- writers that come meanwhile


def test_a_writer_that_comes_before_the_write_copies_and_does_not_wait(make_faulty_pool: MakeFaulty) -> None:
    """The disk stands: a writer that waited for it would never come back."""
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    with busy(pool, disk):
        captures = capture(pool, "x")
        change(pool, "x", 1)
        change(pool, "x", 1)
        pool.validate()
        assert not captures[0].done
    assert content(pool, captures[0]) == 1
    assert pool["x"][0] == 3
    release(pool, captures)
    nothing_is_left(pool)


def test_captures_of_two_moments_get_the_content_of_each(make_faulty_pool: MakeFaulty) -> None:
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    with busy(pool, disk):
        captures = []
        for _ in range(3):
            captures += capture(pool, "x")
            captures += capture(pool, "x")
            change(pool, "x", 1)
            pool.validate()
    assert [content(pool, captured) for captured in captures] == [1, 1, 2, 2, 3, 3]
    assert pool["x"][0] == 4
    release(pool, captures)
    nothing_is_left(pool)


def test_the_copy_for_a_save_dies_with_its_last_capture(make_faulty_pool: MakeFaulty) -> None:
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    with busy(pool, disk):
        captures = capture(pool, "x")
        change(pool, "x", 1)
        assert pool.stats().entries == 3
        release(pool, captures)
        assert pool.stats().entries == 2
        pool.validate()
    nothing_is_left(pool)


@pytest.mark.parametrize("how", ["rolls back", "gives up"])
def test_a_copy_for_a_save_shares_no_file_with_the_content_that_comes_back(
    how: str, make_faulty_pool: MakeFaulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 1: with one key, releasing the save's blob would delete the only file of the value."""
    pool, disk = make_faulty_pool(io_threads=1)
    fb = pool.put("x", array(1))
    key = fb.key
    with busy(pool, disk):
        captures = capture(pool, "x")
        if how == "rolls back":
            with suppress(ZeroDivisionError), pool.get_mut("x", rollback=True) as x:
                x += 1
                raise ZeroDivisionError
        else:
            residency = pool._engine.residency
            with monkeypatch.context() as patch:
                patch.setattr(residency, "load_waits", lambda *_, **__: 1 / 0)  # after the copy
                with suppress(ZeroDivisionError):
                    change(pool, "x", 1)
        assert fb.key == key
    x = None
    assert content(pool, captures[0]) == 1
    pool.evict()
    assert state(pool, "x") is State.SPILLED
    release(pool, captures)
    pool.drain()
    assert pool["x"][0] == 1, "the blob of the value was deleted with the save's"
    assert fb.key == key
    fb.drop()
    nothing_is_left(pool)


@pytest.mark.files
def test_a_capture_of_what_is_changed_has_the_size_it_came_to(pool: FBPool, spawn: Spawn) -> None:
    """Invariant 3: the budget of a pool that restores it counts with that."""
    pool.put("x", array(1))
    guard = pool.get_mut("x")

    def grow(_: Any) -> None:
        guard.value = np.ones(3 * ITEM // 8)

    writer = HeldOpen(spawn, guard, grow)
    captures = capture(pool, "x")
    writer.leave()
    content(pool, captures[0])
    assert captures[0].nbytes == measure(np.ones(3 * ITEM // 8)).nbytes
    release(pool, captures)


@pytest.mark.files
@pytest.mark.parametrize("fails", [False, True], ids=["settles", "rolls back"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("deleted", [False, True], ids=["named", "deleted"])
def test_a_change_under_way_is_waited_for_with_its_outcome(
    fails: bool, on_disk: bool, deleted: bool, pool: FBPool, spawn: Spawn
) -> None:
    """SETTLE and RESTORE both lead to the blob; an entry that only captures own goes when they have it."""
    pool.put("x", array(1))
    if on_disk:
        pool.evict()
    writer = HeldOpen(spawn, pool.get_mut("x", rollback=True), lambda x: x.__iadd__(1))
    captures = capture(pool, "x")
    assert not captures[0].done
    if deleted:
        pool.delete("x")
    writer.leave(fails=fails)
    assert content(pool, captures[0]) == (1 if fails else 2)
    pool.drain()
    pool.validate()
    assert pool.stats().entries == (0 if deleted else 1)
    release(pool, captures)
    nothing_is_left(pool)


@pytest.mark.files
def test_a_change_under_way_and_the_next_writer_in_line_are_told_apart(
    pool: FBPool, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool.put("x", array(1))
    writer = HeldOpen(spawn, pool.get_mut("x"), lambda x: x.__iadd__(1))
    captures = capture(pool, "x")
    next_one = spawn(change, pool, "x", 1)
    sleepers.next()
    writer.leave()
    next_one.result()
    assert content(pool, captures[0]) == 2, "the save has the content of the second change"
    assert pool["x"][0] == 3
    release(pool, captures)
    nothing_is_left(pool)


@pytest.mark.files
def test_a_value_that_is_read_after_its_change_is_written_while_it_is_read(
    pool: FBPool, spawn: Spawn, sleepers: Sleepers
) -> None:
    """Invariant 10 the other way round: the write does not wait for the readers."""
    pool.put("x", array(1))
    writer = HeldOpen(spawn, pool.get_mut("x"), lambda x: x.__iadd__(1))
    captures = capture(pool, "x")
    stay, read = threading.Event(), threading.Event()

    def look() -> None:
        with pool.get("x"):
            read.set()
            assert stay.wait(30)

    reader = spawn(look)
    sleepers.next()
    writer.leave()
    assert read.wait(30)
    assert content(pool, captures[0]) == 2
    pool.validate()
    stay.set()
    reader.result()
    release(pool, captures)


# --------------------------------------------------------------------------- deadlocks


def test_capturing_what_the_caller_changes_is_a_deadlock_and_captures_nothing(pool: FBPool) -> None:
    pool.put("a", array(1))
    pool.put("x", array(1))
    captures: list[Capture] = []
    residency = pool._engine.residency
    with pool.get_mut("x"):
        with pytest.raises(DeadlockError, match="'x'"):
            residency.run(residency.capture, [entry_of(pool, "a"), entry_of(pool, "x")], captures)
        release(pool, captures)
        pool.validate()
    nothing_is_left(pool)


def test_what_a_task_of_this_loop_is_in_line_to_change_is_a_deadlock_too(
    make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers
) -> None:
    """It would be let in before the write, and could not go on while its loop is blocked by the save."""
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))

    async def change_it() -> None:
        async with pool.get_mut("x") as x:
            x += 1

    async def main() -> None:
        reader = HeldOpen(spawn, pool.get("x"))
        task = asyncio.create_task(change_it())
        await sleepers.anext()
        with pytest.raises(DeadlockError, match="to_thread"):
            capture(pool, "x")
        reader.leave()
        await task

    with busy(pool, disk):
        asyncio.run(main())
    assert pool["x"][0] == 2
    nothing_is_left(pool)


def test_a_task_of_this_loop_that_is_only_loading_to_write_does_not_hinder_a_save(
    make_faulty_pool: MakeFaulty,
) -> None:
    """The blob is there: nothing has to be waited for."""
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    pool.evict()
    gate = disk.gate("open")

    async def change_it() -> None:
        async with pool.get_mut("x") as x:
            x += 1

    async def main() -> None:
        task = asyncio.create_task(change_it())
        while not gate.reached.is_set():
            await asyncio.sleep(0)
        captures = capture(pool, "x")
        assert captures[0].done
        gate.open()
        await task
        assert content(pool, captures[0]) == 1
        release(pool, captures)

    asyncio.run(main())
    nothing_is_left(pool)


@pytest.mark.files
def test_a_write_guard_that_nobody_has_any_more_is_no_deadlock(pool: FBPool) -> None:
    """An interrupt at the entry of ``__exit__`` leaves one; the same cell's next save has to work."""
    pool.put("x", array(1))
    pool.get_mut("x").__enter__()
    captures = capture(pool, "x")
    assert content(pool, captures[0]) == 1
    release(pool, captures)
    nothing_is_left(pool)


# ----------------------------------------------------------------------------- failures


def test_a_failed_write_is_heard_by_every_capture_and_by_nobody_else(make_faulty_pool: MakeFaulty) -> None:
    """Invariant 9."""
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    disk.fail("writev", error=oserror(28))
    with busy_reading(pool, disk):
        captures = capture(pool, "x") + capture(pool, "x")
    for captured in captures:
        captured.wait()
        with pytest.raises(DiskFullError):
            captured.raise_error()
    pool.drain()
    pool.validate()
    release(pool, captures)
    assert pool["x"][0] == 1
    captures = capture(pool, "x")
    assert content(pool, captures[0]) == 1
    release(pool, captures)
    nothing_is_left(pool)


@contextmanager
def busy_reading(pool: FBPool, disk: Any) -> Iterator[None]:
    """The one I/O thread does something that is no write."""
    go = threading.Event()
    pool._engine.workers.submit(lambda: go.wait(30) and None)
    try:
        yield
    finally:
        go.set()


def test_what_cannot_be_encoded_is_told_once_and_not_again_by_an_eviction(make_pool: MakePool) -> None:
    """Invariant 9."""
    pool = make_pool(4 * ITEM, io_threads=1)
    pool.put("lock", threading.Lock(), nbytes=100)
    captures = capture(pool, "lock")
    captures[0].wait()
    with pytest.raises(UnsupportedTypeError):
        captures[0].raise_error()
    release(pool, captures)
    for name in range(8):
        pool.put(name, array(name))
    pool.drain()
    pool.validate()
    assert pool["lock"].acquire(blocking=False)
    nothing_is_left(pool)


# ------------------------------------------------------------------------ order and fairness


def test_captured_values_keep_their_place_in_the_order_of_eviction(pool: FBPool) -> None:
    for name in "abcdef":
        pool.put(name, array(0))
    policy = pool._engine.residency.policy
    before = list(policy)
    captures = capture(pool, "f", "c", "a")
    for captured in captures:
        captured.wait()
    pool.drain()
    assert list(policy) == before
    assert not pool._engine.residency.clean.count, "saved values are the first to go"
    release(pool, captures)


def test_values_for_a_save_and_those_that_must_leave_take_turns(
    make_faulty_pool: MakeFaulty,
) -> None:
    """Whoever waits, for room or for a save, waits for as many of the others as of its own."""
    pool, disk = make_faulty_pool("1MB", io_threads=1)
    for name in range(8):
        pool.put(name, array(name))
    order: list[Any] = []
    residency = pool._engine.residency
    real = residency.next_to_write

    def next_to_write() -> Any:
        entry = real()
        if entry is not None:
            order.append(entry.name)
        return entry

    residency.next_to_write = next_to_write  # type: ignore[method-assign]
    with busy(pool, disk):
        order.clear()
        captures = capture(pool, 0, 1, 2, 3)
        for name in (4, 5, 6, 7):
            residency.run(residency._queue, entry_of(pool, name))
    for captured in captures:
        captured.wait()
    pool.drain()
    assert [name < 4 for name in order] in ([True, False] * 4, [False, True] * 4)
    release(pool, captures)


def test_reading_a_captured_value_again_and_again_asks_for_one_write(make_faulty_pool: MakeFaulty) -> None:
    """Over the budget every reader's exit looks at the entry anew; that must not pile up jobs."""
    pool, disk = make_faulty_pool("1MB", io_threads=1)
    pool.put("x", array(1))
    with busy(pool, disk):
        captures = capture(pool, "x")
        pool.resize(ITEM)
        for _ in range(50):
            with pool.get("x"):
                pass
        assert len(pool._engine.residency.wanted) == 1
    assert content(pool, captures[0]) == 1
    release(pool, captures)


def test_an_interrupt_of_a_decision_forgets_no_capture(make_faulty_pool: MakeFaulty) -> None:
    """A torn decision is mended: what was to be written is asked for again."""
    pool, disk = make_faulty_pool(io_threads=1)
    pool.put("x", array(1))
    residency = pool._engine.residency
    with busy(pool, disk):
        captures = capture(pool, "x")
        residency.wanted.clear()
        residency.torn = True
    assert content(pool, captures[0]) == 1
    release(pool, captures)
    nothing_is_left(pool)
