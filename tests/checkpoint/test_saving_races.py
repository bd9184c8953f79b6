"""A save is a consistent cut, whatever others do meanwhile: each race forced by gates at the pool's own disk.

Every test brings the save to its cut, lets something happen, lets the disk go on, and opens the checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import (
    DeadlockError,
    DiskFullError,
    FBPool,
    PickleRefusedError,
    PoolClosedError,
    State,
    StorageError,
    UnsupportedTypeError,
)
from tests.checkpoint.cuts import (
    ITEM,
    HeldOpen,
    MakeFaulty,
    Spawn,
    array,
    change,
    contents,
    cut_of,
    entry_of,
    nothing_is_left,
    state,
)
from tests.conftest import MakePool, Sleepers
from tests.faults import oserror


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "dir"


class Scene:
    """A pool with one I/O thread, which stands at the disk; ``x`` is about to be saved."""

    def __init__(self, pool: FBPool, disk: Any, target: Path, spawn: Spawn) -> None:
        self.pool = pool
        self.disk = disk
        self.target = target
        self.spawn = spawn
        self._opened: list[Any] = []

    def hold(self, call: str) -> Any:
        gate = self.disk.gate(call)
        self._opened.append(gate)
        return gate

    def save(self) -> Any:
        """Begin a save and come back when it has made its cut."""
        with cut_of(self.pool) as passed:
            saving = self.spawn(self.pool.save, self.target)
            passed()
        return saving

    def let_go(self) -> None:
        for gate in self._opened:
            gate.open()

    def stand(self) -> None:
        """Keep the I/O thread busy with another value, so that nothing is written before `let_go`."""
        gate = self.hold("writev")
        self.pool.put("busy", array(-1)).spawn_write_now()
        gate.wait_reached()


@pytest.fixture
def scene(make_faulty_pool: MakeFaulty, target: Path, spawn: Spawn) -> Scene:
    pool, disk = make_faulty_pool(io_threads=1)
    return Scene(pool, disk, target, spawn)


# ----------------------------------------------------------------------------- each state at the cut


def resident(scene: Scene) -> None:
    scene.stand()
    scene.pool.put("x", array(1))


def queued(scene: Scene) -> None:
    scene.stand()
    scene.pool.put("x", array(1)).spawn_write_now()
    assert entry_of(scene.pool, "x").order is scene.pool._engine.residency.queued


def being_written(scene: Scene) -> None:
    gate = scene.hold("writev")
    scene.pool.put("x", array(1)).spawn_write_now()
    gate.wait_reached()
    assert state(scene.pool, "x") is State.WRITING


def clean(scene: Scene) -> None:
    scene.pool.put("x", array(1)).write_now()
    assert state(scene.pool, "x") is State.CLEAN


def spilled(scene: Scene) -> None:
    scene.pool.put("x", array(1))
    scene.pool.evict(["x"])
    assert state(scene.pool, "x") is State.SPILLED


def being_loaded(scene: Scene) -> None:
    spilled(scene)
    gate = scene.hold("open")
    scene.spawn(lambda: scene.pool["x"][0])
    gate.wait_reached()
    assert state(scene.pool, "x") is State.LOADING


STATES = [resident, queued, being_written, clean, spilled, being_loaded]


def in_place(pool: FBPool) -> None:
    change(pool, "x", 10)


def rebound(pool: FBPool) -> None:
    guard = pool.get_mut("x")
    with guard:
        guard.value = array(11)


def with_rollback(pool: FBPool) -> None:
    with pool.get_mut("x", rollback=True) as x:
        x += 10


def rolled_back(pool: FBPool) -> None:
    with pytest.raises(ZeroDivisionError), pool.get_mut("x", rollback=True) as x:
        x += 10
        raise ZeroDivisionError


def put_over(pool: FBPool) -> None:
    pool.put("x", array(11))


def deleted(pool: FBPool) -> None:
    pool.delete("x")


def popped(pool: FBPool) -> None:
    pool.pop("x")


def evicted(pool: FBPool) -> None:
    pool.evict(["x"])


ACTS = [in_place, rebound, with_rollback, rolled_back, put_over, deleted, popped, evicted]
AFTER = {rolled_back: 1, evicted: 1, deleted: None, popped: None}


@pytest.mark.parametrize("act", ACTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("begin", STATES, ids=lambda f: f.__name__)
def test_a_save_has_the_value_as_of_its_cut_whatever_is_done_after_it(
    begin: Callable[[Scene], None], act: Callable[[FBPool], None], scene: Scene
) -> None:
    begin(scene)
    pool = scene.pool
    saving = scene.save()
    # What is being written or loaded is waited for by those who need it; the disk goes on beside them.
    acting = scene.spawn(act, pool)
    if begin is resident and act not in (evicted, popped):
        acting.result()  # with the disk standing: no writer waits for a save
    scene.let_go()
    acting.result()
    assert saving.result().names[-1] == "x"
    pool.validate()
    assert contents(scene.target)["x"] == 1
    after = AFTER.get(act, 11)
    assert ("x" in pool) is (after is not None)
    assert after is None or pool["x"][0] == after
    nothing_is_left(pool)


@pytest.mark.parametrize("entering", ["try_get_mut", "load_mut", "make_mut", "by another handle"])
def test_no_way_to_change_a_value_waits_for_a_save(entering: str, scene: Scene) -> None:
    resident(scene)
    pool = scene.pool
    fb = pool.put("x", array(1))
    twin = fb.clone()
    saving = scene.save()
    guard: Any = {
        "try_get_mut": lambda: pool.try_get_mut("x"),
        "load_mut": fb.load_mut,
        "make_mut": fb.make_mut,
        "by another handle": twin.load_mut,
    }[entering]()
    assert guard is not None
    with guard as x:
        x += 1
    pool.validate()
    assert not saving.done
    with fb.load() as x:
        assert x[0] == 2
    assert pool["x"][0] == (1 if entering == "make_mut" else 2)
    scene.let_go()
    saving.result()
    assert contents(scene.target)["x"] == 1
    del x, guard
    fb.drop()
    twin.drop()
    nothing_is_left(pool)


def test_an_unshared_handles_make_mut_during_a_save_changes_the_handles_value_only_after_the_cut(
    scene: Scene,
) -> None:
    """The save counts as an owner meanwhile."""
    scene.stand()
    fb = scene.pool.insert(array(1))
    future = fb.spawn_persist(scene.target)
    with fb.make_mut() as x:
        x += 1
    scene.let_go()
    former = scene.pool.register(scene.target, future.result(30))
    with former.load() as y:
        assert y[0] == 1
    with fb.load() as y:
        assert y[0] == 2
    del x, y
    fb.drop()
    former.drop()
    nothing_is_left(scene.pool)


def test_dropping_the_last_handle_during_a_persist_loses_nothing(scene: Scene) -> None:
    scene.stand()
    fb = scene.pool.insert(array(1))
    future = fb.spawn_persist(scene.target)
    fb.drop()
    scene.pool.validate()
    scene.let_go()
    again = scene.pool.register(scene.target, future.result(30))
    with again.load() as x:
        assert x[0] == 1
    again.drop()
    nothing_is_left(scene.pool)


def test_entries_are_saved_as_of_one_instant_not_each_as_of_its_turn(scene: Scene) -> None:
    """A transfer between two accounts, after the cut: the save has the former sum, not one half of it."""
    scene.stand()
    pool = scene.pool
    for name in "abcd":
        pool.put(name, array(100))
    saving = scene.save()
    for one, other in ("ab", "cd", "da", "bc"):
        change(pool, one, -7)
        change(pool, other, 7)
    change(pool, "a", 1)
    scene.let_go()
    saving.result()
    found = contents(scene.target)
    assert {found[name] for name in "abcd"} == {100}


def test_a_value_larger_than_the_budget_is_saved_as_of_the_cut(
    make_faulty_pool: MakeFaulty, target: Path, spawn: Spawn
) -> None:
    pool, disk = make_faulty_pool(2 * ITEM, io_threads=1)
    pool.put("x", np.full(ITEM, 1.0))
    with pool.get_mut("x") as x:
        x += 1
        del x
    scene = Scene(pool, disk, target, spawn)
    gate = scene.hold("open")  # of the value's own write, or of the busy one's
    saving = scene.save()
    acting = spawn(change, pool, "x", 10)
    gate.wait_reached()
    scene.let_go()
    acting.result()
    saving.result()
    assert contents(target)["x"] == 2
    assert pool["x"][0] == 12
    nothing_is_left(pool)


# ------------------------------------------------------------------------------ changes under way


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("fails", [False, True], ids=["settles", "rolls back"])
def test_a_change_under_way_at_the_cut_is_waited_for(fails: bool, on_disk: bool, scene: Scene) -> None:
    pool = scene.pool
    pool.put("x", array(1))
    pool.put("y", array(5))
    if on_disk:
        pool.evict()
    writer = HeldOpen(scene.spawn, pool.get_mut("x", rollback=True), lambda x: x.__iadd__(1))
    saving = scene.save()
    change(pool, "y", 1)  # of others the save has what was there when it began
    assert not saving.done
    writer.leave(fails=fails)
    saving.result()
    assert contents(scene.target) == {"x": 1 if fails else 2, "y": 5}
    nothing_is_left(pool)


def test_a_task_may_go_on_changing_while_a_save_in_a_thread_waits_for_it(scene: Scene) -> None:
    pool = scene.pool
    pool.put("x", array(1))
    pool.put("y", array(1))

    async def main() -> None:
        async with pool.get_mut("x") as x:
            with cut_of(pool) as passed:
                saving = asyncio.create_task(asyncio.to_thread(pool.save, scene.target))
                await asyncio.to_thread(passed)
            async with pool.get_mut("y") as y:
                y += 10
            x += 1
        await saving

    asyncio.run(main())
    assert contents(scene.target) == {"x": 2, "y": 1}
    nothing_is_left(pool)


def test_a_cancelled_task_that_was_in_line_for_what_is_saved_hinders_nobody(scene: Scene) -> None:
    scene.stand()
    pool = scene.pool
    pool.put("x", array(1))

    async def write() -> None:
        async with pool.get_mut("x") as x:
            x += 1

    async def main() -> None:
        reader = HeldOpen(scene.spawn, pool.get("x"))
        task = asyncio.create_task(write())
        await asyncio.sleep(0)
        saving = await asyncio.to_thread(scene.save)
        task.cancel()
        await asyncio.wait([task])
        reader.leave()
        scene.let_go()
        await asyncio.to_thread(saving.result)

    asyncio.run(main())
    pool.validate()
    assert contents(scene.target)["x"] == 1
    nothing_is_left(pool)


@pytest.mark.parametrize("call", ["save", "persist"])
def test_a_save_within_ones_own_change_is_a_deadlock_and_not_a_hang(
    call: str, pool: FBPool, target: Path
) -> None:
    pool.put("w", array(1))
    pool.put("x", array(1))
    act: Callable[[], object] = {
        "save": lambda: pool.save(target),
        "persist": lambda: pool.persist("x", target),
    }[call]
    with pool.get_mut("x"), pytest.raises(DeadlockError, match="'x'"):
        act()

    async def itself() -> None:
        async with pool.get_mut("x"):
            with pytest.raises(DeadlockError, match="'x'"):
                act()

    async def another() -> None:
        go = asyncio.Event()

        async def hold() -> None:
            async with pool.get_mut("x"):
                await go.wait()

        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        with pytest.raises(DeadlockError, match="to_thread"):
            act()
        go.set()
        await task

    asyncio.run(itself())
    asyncio.run(another())
    act()
    nothing_is_left(pool)


# ------------------------------------------------------------------------------------ failures


def test_a_write_that_fails_is_the_saves_error_and_all_else_stands(scene: Scene) -> None:
    """Invariant 9: it names the entry, and surfaces once."""
    pool = scene.pool
    for name in "abc":
        pool.put(name, array(ord(name)))
    pool.save(scene.target)
    change(pool, "b", 1)
    scene.disk.fail("writev", error=oserror(errno.ENOSPC))
    with pytest.raises(DiskFullError) as caught:
        pool.save(scene.target)
    assert any("'b'" in note for note in caught.value.__notes__)
    pool.validate()
    pool.drain()
    assert contents(scene.target) == {name: ord(name) for name in "abc"}, "the former checkpoint"
    assert pool["b"][0] == ord("b") + 1
    assert pool.save(scene.target).blobs_written == 1
    assert contents(scene.target)["b"] == ord("b") + 1
    nothing_is_left(pool)


def test_many_writes_that_fail_leave_no_capture_behind(scene: Scene) -> None:
    pool = scene.pool
    for name in range(20):
        pool.put(name, array(name))
    scene.disk.fail("writev", error=oserror(errno.EIO), nth=3, times=None)
    with pytest.raises(OSError):
        pool.save(scene.target)
    with contextlib.suppress(StorageError):
        pool.drain()  # one that was being written when the save gave up is nobody's but drain's
    pool.validate()
    assert not (scene.target / ".fbcache" / "checkpoints").exists() or not list(
        (scene.target / ".fbcache" / "checkpoints").iterdir()
    )
    with contextlib.suppress(OSError):
        pool.drain()  # what the first save had begun fails too
    scene.disk.clear()
    pool.save(scene.target)
    assert contents(scene.target) == {name: name for name in range(20)}
    nothing_is_left(pool)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_value_that_cannot_be_saved_is_named_and_keeps_no_other_from_the_next_save(
    pickled: bool, pool: FBPool, target: Path
) -> None:
    pool.put("a", array(1))
    pool.put("odd", np.ma.masked_array if pickled else threading.Lock())
    with pytest.raises(PickleRefusedError if pickled else UnsupportedTypeError) as caught:
        pool.save(target)
    assert "odd" in str(caught.value) + str(getattr(caught.value, "__notes__", ""))
    pool.validate()
    pool.drain()
    pool.delete("odd")
    pool.save(target)
    assert contents(target) == {"a": 1}
    nothing_is_left(pool)


def test_closing_the_pool_during_a_save_ends_it_as_a_closed_pool(scene: Scene) -> None:
    scene.stand()
    scene.pool.put("x", array(1))
    saving = scene.save()
    closing = scene.spawn(scene.pool.close)
    assert isinstance(saving.error(), PoolClosedError)
    scene.let_go()
    closing.result()
    with FBPool("1MB", min_free=0) as other:
        other.put("y", array(2))
        other.save(scene.target)
    assert contents(scene.target) == {"y": 2}


def test_a_save_in_its_own_blobs_is_not_held_up_by_one_whose_value_is_changed(
    scene: Scene, sleepers: Sleepers
) -> None:
    """Two saves of one value to two directories, a change between them: each has its own moment."""
    scene.stand()
    pool = scene.pool
    pool.put("x", array(1))
    first = scene.save()
    change(pool, "x", 1)
    with cut_of(pool) as passed:
        second = scene.spawn(pool.save, scene.target.with_name("other"))
        passed()
    change(pool, "x", 1)
    pool.validate()
    scene.let_go()
    first.result()
    second.result()
    assert contents(scene.target)["x"] == 1
    assert contents(scene.target.with_name("other"))["x"] == 2
    assert pool["x"][0] == 3
    nothing_is_left(pool)


# --------------------------------------------------------------------------- beside other work


def test_saving_makes_no_value_the_first_to_be_evicted(make_pool: MakePool, target: Path) -> None:
    """Saved values are clean: but what was used last stays when room is needed."""
    pool = make_pool(8 * ITEM, io_threads=1)
    for name in range(6):
        pool.put(name, array(name))
    pool.drain()
    order = list(pool._engine.residency.policy)
    pool.save(target)
    pool.drain()
    assert list(pool._engine.residency.policy) == order
    pool.put("new", array(0))
    pool.put("more", array(0))
    pool.put("most", array(0))
    pool.drain()
    assert entry_of(pool, 5).state in (State.RESIDENT, State.CLEAN), "the value used last has left"


def test_a_put_that_waits_for_room_gets_in_before_a_save_has_written_everything(
    make_faulty_pool: MakeFaulty, target: Path, spawn: Spawn, sleepers: Sleepers
) -> None:
    """Invariant 6, and neither starves: with one I/O thread the next write but one is for the put."""
    pool, disk = make_faulty_pool(12 * ITEM, io_threads=1)
    for name in range(10):
        pool.put(name, array(name))
    pool.drain()
    dirty = [name for name in range(10) if state(pool, name) is State.RESIDENT]
    assert len(dirty) >= 6
    gates = [disk.gate("writev", nth=nth) for nth in range(1, 16)]
    with cut_of(pool) as passed:
        saving = spawn(pool.save, target)
        passed()
    gates[0].wait_reached()
    guards = [pool.get(name) for name in range(10) if state(pool, name) is State.CLEAN]
    for guard in guards:
        guard.__enter__()  # so that room is made by writing alone
    putting = spawn(pool.put, "new", np.ones(4 * ITEM // 8))
    sleepers.next()
    for gate in gates[:12]:
        if putting.done:
            break
        gate.wait_reached() if not gate.reached.is_set() else None
        gate.open()
    putting.result()
    for guard in guards:
        guard.__exit__(None, None, None)
    for gate in gates:
        gate.open()
    saving.result()
    pool.validate()
    assert contents(target) == {name: name for name in range(10)}


def test_a_save_ends_while_puts_keep_the_writer_busy(make_pool: MakePool, target: Path, spawn: Spawn) -> None:
    pool = make_pool(8 * ITEM, io_threads=1)
    stop = threading.Event()
    for name in range(4):
        pool.put(name, array(name))

    def churn() -> int:
        rounds = 0
        while not stop.is_set():
            pool.put(("other", rounds % 16), array(rounds))
            rounds += 1
        return rounds

    churning = spawn(churn)
    for _ in range(5):
        for name in range(4):
            change(pool, name, 10)
        pool.save(target, range(4))
    stop.set()
    assert churning.result() > 0
    assert contents(target) == {name: name + 50 for name in range(4)}
    nothing_is_left(pool)


def test_many_writers_and_savers_at_once_leave_checkpoints_of_whole_values(
    make_pool: MakePool, target: Path, spawn: Spawn, soak: bool
) -> None:
    """Each value is all of one moment, and no later than the next save's."""
    pool = make_pool(6 * ITEM, io_threads=2)
    names = [f"n{i}" for i in range(8)]
    for name in names:
        pool.put(name, array(0))
    stop = threading.Event()

    def write(which: int) -> None:
        rounds = 0
        while not stop.is_set():
            name = names[(which + rounds) % len(names)]
            rounds += 1
            if rounds % 5 == 0:
                with pytest.raises(ZeroDivisionError), pool.get_mut(name, rollback=True) as x:
                    x += 0.5
                    raise ZeroDivisionError
            else:
                change(pool, name, 1)

    writers = [spawn(write, n) for n in range(3)]
    seen = dict.fromkeys(names, 0.0)
    try:
        for _ in range(200 if soak else 12):
            pool.save(target)
            found = contents(target)
            assert found.keys() == seen.keys()
            for name in names:
                assert found[name] == int(found[name]), "a change that was rolled back was saved"
                assert found[name] >= seen[name], "an earlier content than the former checkpoint's"
            seen = found
    finally:
        stop.set()
    for writer in writers:
        writer.result()
    pool.validate()
    nothing_is_left(pool)
