"""Guards: lazy, exclusive or shared, never a hang, and one content for each key."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import pytest

from fbcache import DeadlockError, PoolClosedError, StaleKeyError, State, freezing, writeguard


def array(fill, nbytes=8_000):
    return np.full(nbytes // 8, fill, np.float64)


def spill(pool, *names):
    """Evict and forget, so that the next access has to load."""
    pool.evict(names or None)
    gc.collect()


# ------------------------------------------------------------------ lazy


def test_a_guard_that_is_not_entered_pins_loads_and_locks_nothing(pool):
    fb = pool.put("a", array(1))
    spill(pool)
    forgotten = [pool.get("a"), pool.get_mut("a"), fb.load(), fb.load_mut(), fb.make_mut()]
    stats = pool.stats()
    assert (stats.pinned_bytes, stats.loads, stats.hits, stats.misses) == (0, 0, 0, 0)
    assert fb.state is State.SPILLED
    with pool.get_mut("a"):
        pass
    del forgotten


@pytest.mark.parametrize("state", ["RESIDENT", "CLEAN", "SPILLED"])
def test_no_repr_loads_pins_or_counts(pool, state):
    fb = pool.put("a", array(1))
    if state == "CLEAN":
        fb.write_now()
    if state == "SPILLED":
        spill(pool)
    guards = [pool.get("a"), pool.get_mut("a"), fb.load(), fb.load_mut(), fb.make_mut()]
    before = pool.stats()
    for thing in (pool, fb, *guards, fb.clone()):
        assert "\n" not in repr(thing)
        assert "1." not in repr(thing).replace("1.0", ""), "no content in a repr"
    for thing in (fb, *guards):
        assert "'a'" in repr(thing) and state in repr(thing) and "8,000 bytes" in repr(thing)
    assert pool.stats() == before and fb.state.name == state


def test_the_repr_of_a_held_guard_says_so_and_needs_no_lock(pool):
    pool["a"] = array(1)
    for held in (pool.get("a"), pool.get_mut("a")):
        assert "not entered" in repr(held)
        with held:
            assert "not entered" not in repr(held) and "held" in repr(held)
            repr(pool)
    leash = pool.try_get("a")
    assert "'a'" in repr(leash)


def test_the_value_of_a_guard_that_is_not_entered_is_an_error(pool):
    pool["a"] = 1
    for held in (pool.get("a"), pool.get_mut("a")):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="not entered"):
                held.value
            with held as value:
                assert held.value == value == 1
    with pytest.raises(RuntimeError, match="not entered"):
        pool.get_mut("a").value = 2
    assert pool["a"] == 1


# ------------------------------------------------------------------ read-only (invariant 15)


@pytest.mark.parametrize("place", ["memory", "map", "read"])
@pytest.mark.parametrize("nbytes", [8, 8_000, 400_000])
def test_invariant_15_an_array_that_is_read_cannot_be_written_to(make_pool, place, nbytes):
    pool = make_pool("2MB", mmap=place == "map")
    pool["a"] = array(1, nbytes)
    if place != "memory":
        spill(pool)
    for change in (
        lambda x: x.__setitem__(0, 5),
        lambda x: x.__iadd__(1),
        lambda x: x.sort(),
        lambda x: np.add(x, 1, out=x),
        lambda x: x[:1].__setitem__(0, 5),
    ):
        with pytest.raises(ValueError, match=r"read-only.*get_mut\('a'\)"), pool.get("a") as x:
            change(x)
    assert (pool["a"] == 1).all()
    assert not pool["a"].flags.writeable
    pool.validate()


def test_invariant_15_arrays_inside_containers_cannot_be_written_to(pool):
    pool["a"] = {"x": [array(1), (array(2),)]}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"get_mut\('a'\)"), pool.get("a") as value:
            value["x"][0][0] = 5
        with pytest.raises(ValueError, match="read-only"):
            pool["a"]["x"][1][0][0] = 5
        spill(pool)


def test_invariant_15_a_value_is_read_only_again_once_its_write_guard_was_left(pool):
    pool["a"] = [array(1)]
    with pool.get_mut("a") as value:
        value[0][0] = 2
        value.append(array(3))
    assert not pool["a"][0].flags.writeable and not pool["a"][1].flags.writeable
    with pool.get_mut("a") as value:
        pass
    with pytest.raises(ValueError, match="read-only"):
        value[0][0] = 4


def test_the_error_for_an_entry_without_a_name_says_what_would_do(pool):
    fb = pool.insert(array(1))
    with pytest.raises(ValueError, match=r"read-only.*load_mut"), fb.load() as value:
        value[0] = 5


@pytest.mark.parametrize("error", [ValueError("other"), KeyError("k"), KeyboardInterrupt(), StopIteration()])
def test_the_blocks_own_errors_come_through_unchanged(pool, error):
    pool["a"] = array(1)
    args = error.args
    for held in (pool.get("a"), pool.get_mut("a"), pool.get_mut("a", rollback=True)):
        with pytest.raises(type(error)) as caught, held:
            raise error
        assert caught.value is error and error.args == args
    pool.validate()


def test_pool_name_is_read_only_and_pins_nothing(pool):
    pool["a"] = array(1)
    for _ in range(2):
        value = pool["a"]
        assert pool.stats().pinned_bytes == 0
        with pytest.raises(ValueError, match="read-only"):
            value[0] = 5
        assert pool.evict(["a"]) == 8_000
        assert value[0] == 1, "what a variable holds stays valid"
        del value


# ------------------------------------------------------------------ write guards (invariant 4)


def test_invariant_4_the_key_changes_when_a_write_guard_is_taken(pool):
    fb = pool.put("a", array(1))
    before = fb.key
    with pool.get_mut("a"):
        inside = fb.key
        assert inside != before
        with pytest.raises(StaleKeyError):
            pool.get(before)
    assert fb.key == inside
    assert pool[inside][0] == 1


def test_invariant_4_the_key_stays_without_a_write_guard(pool):
    fb = pool.put("a", array(1))
    key = fb.key
    with pool.get("a"), pool.get("a"):
        pass
    pool.get_mut("a")
    spill(pool)
    pool["a"]
    fb.write_now()
    pool.try_get("a")
    fb.clone().drop()
    assert fb.key == key


def test_changes_in_place_stay_wherever_the_value_was_and_goes(pool):
    pool["a"] = array(0)
    expected = 0
    for place in ("memory", "clean", "spilled", "reloaded", "memory"):
        if place == "clean":
            pool.get("a")._entry  # no handle is needed
            pool.evict()
            pool["a"]
        if place == "spilled":
            spill(pool)
        if place == "reloaded":
            spill(pool)
            with pool.get("a") as value:
                assert value[0] == expected
        with pool.get_mut("a") as value:
            assert value.flags.writeable
            value += 1
        expected += 1
        assert (pool["a"] == expected).all()
        pool.validate()
    spill(pool)
    assert (pool["a"] == expected).all()


@pytest.mark.parametrize("new", [5, "text", None, (1, 2), [1], array(7, 80)], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("old", [3, "old", None, (), array(1)], ids=lambda v: type(v).__name__)
def test_guard_value_rebinds_any_value_to_any_other(pool, old, new):
    pool.put("a", old, copy=True)
    held = pool.get_mut("a")
    with held:
        held.value = new
        assert held.value is new
    for _ in range(2):
        value = pool["a"]
        assert type(value) is type(new) and np.array_equal(value, new)
        spill(pool)
    pool.validate()


def test_augmented_assignment_to_guard_value_works_for_immutable_values(pool):
    pool["a"] = 1
    with (held := pool.get_mut("a")):
        held.value += 1
        held.value += 1
    assert pool["a"] == 3


def test_a_rebound_array_belongs_to_the_pool_like_one_that_was_put(pool):
    pool["a"] = 0
    mine = array(1)
    with (held := pool.get_mut("a")):
        held.value = mine
    assert not mine.flags.writeable


def test_the_size_is_measured_again_when_a_write_guard_is_left(pool):
    fb = pool.put("a", [array(1)])
    before = fb.nbytes
    with pool.get_mut("a") as value:
        value.append(array(2))
    assert before + 8_000 <= fb.nbytes <= before + 8_500
    assert pool.stats().resident_bytes == fb.nbytes and pool.stats().pinned_bytes == 0
    with (held := pool.get_mut("a")):
        held.value = 1
    assert fb.nbytes < 100 and pool.stats().resident_bytes == fb.nbytes


def test_a_size_that_the_caller_gave_is_kept(pool):
    fb = pool.put("a", [array(1)], nbytes=123)
    with pool.get_mut("a") as value:
        value.append(array(2))
    assert fb.nbytes == 123
    spill(pool)
    pool["a"]
    assert fb.nbytes == 123


def test_an_exception_keeps_what_the_block_did_as_in_a_dict(pool):
    fb = pool.put("a", [1])
    key = fb.key
    with pytest.raises(ZeroDivisionError), pool.get_mut("a") as value:
        value.append(2)
        1 / 0
    assert pool["a"] == [1, 2] and fb.key != key
    held = pool.get_mut("a")
    with pytest.raises(ZeroDivisionError), held:
        held.value = "new"
        1 / 0
    assert pool["a"] == "new"


# ------------------------------------------------------------------ rollback


def change_in_place(held):
    held.value[0][:] = 9
    held.value.append(array(9))


def rebind(held):
    held.value = "changed"


@pytest.mark.parametrize("place", ["memory", "clean", "reloaded", "spilled"])
@pytest.mark.parametrize("change", [change_in_place, rebind])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_rollback_brings_content_key_and_size_back(pool, monkeypatch, place, change, error):
    fb = pool.put("a", [array(1)])
    key = fb.key
    if place == "clean":
        fb.write_now()
    if place in ("reloaded", "spilled"):
        spill(pool)
    if place == "reloaded":
        pool["a"]
    nbytes = fb.nbytes
    if place != "memory":
        monkeypatch.setattr(writeguard, "deep_copy", None)  # free where there is a blob
    held = pool.get_mut("a", rollback=True)
    for _ in range(2):
        with pytest.raises(error), held:
            inside = fb.key
            assert inside != key
            change(held)
            raise error
        assert fb.key == key and fb.nbytes == nbytes
        assert len(pool[key]) == 1 and (pool["a"][0] == 1).all()
        assert not pool["a"][0].flags.writeable
        with pytest.raises(StaleKeyError):
            pool.get(inside)
        pool.validate()
    spill(pool)
    assert (pool["a"][0] == 1).all()


@pytest.mark.parametrize("spilled", [False, True])
def test_rollback_keeps_the_changes_of_a_block_that_succeeds(pool, spilled, blob_files):
    fb = pool.put("a", [array(1)])
    key = fb.key
    if spilled:
        spill(pool)
    with pool.get_mut("a", rollback=True) as value:
        value[0][:] = 2
    pool.drain()
    assert fb.key != key and (pool["a"][0] == 2).all()
    assert blob_files(pool) == [], "the former blob is of no use"
    with pytest.raises(StaleKeyError):
        pool.get(key)


def test_a_value_that_cannot_be_copied_for_rollback_is_left_as_it_was(pool):
    fb = pool.put("a", [threading.Lock()])
    with pytest.raises(TypeError):
        pool.get_mut("a", rollback=True).__enter__()
    assert fb.state is State.RESIDENT and len(pool["a"]) == 1
    pool.validate()
    with pool.get_mut("a") as value:
        value.clear()
    assert pool["a"] == []


def test_rollback_of_an_entry_whose_name_was_taken_meanwhile_harms_nothing(pool):
    fb = pool.put("a", [1])
    with pytest.raises(ValueError), pool.get_mut("a", rollback=True) as value:
        value.append(2)
        pool["a"] = "new"
        raise ValueError
    assert pool["a"] == "new"
    with fb.load() as value:
        assert value == [1]


# ------------------------------------------------------------------ never a hang


@pytest.mark.parametrize("first", ["get", "get_mut", "try_get", "try_get_mut"])
@pytest.mark.parametrize("second", ["get", "get_mut", "try_get", "try_get_mut"])
def test_a_thread_that_would_wait_for_itself_is_a_deadlockerror_at_once(pool, first, second):
    pool["a"] = [1]

    def enter(call):
        made = getattr(pool, call)("a")
        return made.__enter__()

    with getattr(pool, first)("a"):
        if "mut" in first or "mut" in second:
            with pytest.raises(DeadlockError, match="'a'"):
                enter(second)
            pool.validate()
        else:
            with getattr(pool, second)("a") as value:
                assert value == [1]
    # The outer guard was left in order, and nothing of the inner one stayed.
    with pool.get_mut("a") as value:
        assert value == [1]


@pytest.mark.parametrize("first", ["get", "get_mut"])
@pytest.mark.parametrize("second", ["get", "get_mut", "try_get", "try_get_mut"])
@pytest.mark.parametrize("plain", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_a_task_that_would_wait_for_itself_is_a_deadlockerror_at_once(pool, first, second, plain):
    pool["a"] = [1]

    async def enter(made, plainly):
        return made.__enter__() if plainly else await made.__aenter__()

    async def leave(made, plainly):
        return made.__exit__(None, None, None) if plainly else await made.__aexit__(None, None, None)

    async def main():
        outer = getattr(pool, first)("a")
        await enter(outer, plain[0])
        try:
            if "mut" in first or "mut" in second:
                with pytest.raises(DeadlockError, match="'a'"):
                    await enter(getattr(pool, second)("a"), plain[1])
            else:
                inner = getattr(pool, second)("a")
                assert await enter(inner, plain[1]) == [1]
                await leave(inner, plain[1])
        finally:
            await leave(outer, plain[0])

    asyncio.run(main())
    pool.validate()
    with pool.get_mut("a"):
        pass


@pytest.mark.parametrize(("held", "wanted"), [("get", "get_mut"), ("get_mut", "get"), ("get_mut", "get_mut")])
def test_a_plain_with_that_would_block_the_loop_it_waits_for_is_a_deadlockerror_at_once(pool, held, wanted):
    pool["a"] = [1]

    async def holder(entered, leave):
        async with getattr(pool, held)("a"):
            entered.set()
            await leave.wait()

    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holder(entered, leave))
        await entered.wait()
        with pytest.raises(DeadlockError, match="async with"):
            getattr(pool, wanted)("a").__enter__()
        pool.validate()
        leave.set()
        await task

    asyncio.run(main())
    assert pool["a"] == [1]


def test_a_plain_with_behind_a_waiting_task_of_its_own_loop_is_a_deadlockerror_at_once(pool, spawn, sleepers):
    pool["a"] = [1]
    leave = threading.Event()
    entered = threading.Event()

    def thread():
        with pool.get("a"):
            entered.set()
            leave.wait()

    async def writer():
        async with pool.get_mut("a"):
            pass

    async def main():
        task = asyncio.create_task(writer())
        await sleepers.anext()
        with pytest.raises(DeadlockError, match="async with"):
            pool.get("a").__enter__()
        leave.set()
        await task

    running = spawn(thread)
    entered.wait()
    asyncio.run(main())
    running.result()


def test_a_plain_with_on_a_loop_waits_for_a_thread_without_complaint(pool, spawn, sleepers):
    pool["a"] = [1]
    entered = threading.Event()

    def thread():
        with pool.get_mut("a") as value:
            entered.set()
            sleepers.next()  # the loop waits now
            value.append(2)

    async def main():
        with pool.get("a") as value:
            return list(value)

    running = spawn(thread)
    entered.wait()
    assert asyncio.run(main()) == [1, 2]
    running.result()


def test_a_deadlock_on_one_entry_does_not_concern_another(pool):
    pool["a"], pool["b"] = [1], [2]
    with pool.get_mut("a") as a, pool.get_mut("b") as b:
        a += b
    with pool.get("a") as a, pool.get_mut("b") as b:
        b += a
    assert pool["a"] == [1, 2] and pool["b"] == [2, 1, 2]


# ------------------------------------------------------------------ fairness


def test_a_read_inside_a_read_does_not_wait_for_a_waiting_writer(pool, spawn, sleepers):
    pool["a"] = [1]

    def write():
        with pool.get_mut("a") as value:
            value.append(2)

    with pool.get("a"):
        writer = spawn(write)
        sleepers.next()
        with pool.get("a") as value, pool.try_get("a"):
            assert value == [1] and pool["a"] == [1]
        assert not writer.done
    writer.result()
    assert pool["a"] == [1, 2]


def test_a_stream_of_readers_does_not_starve_a_writer(pool, spawn, sleepers):
    pool["a"] = []
    seen = []

    def write():
        with pool.get_mut("a") as value:
            value.append("written")

    def read():
        with pool.get("a") as value:
            seen.append(list(value))

    with pool.get("a"):
        writer = spawn(write)
        sleepers.next()
        readers = [spawn(read) for _ in range(3)]
        for _ in readers:
            sleepers.next()  # each stands in line behind the writer
        assert pool.try_get("a") is not None, "the owner that reads already may read again"
        assert spawn(pool.try_get, "a").result() is None, "others may not overtake"
    for running in (writer, *readers):
        running.result()
    assert seen == [["written"]] * 3


def test_readers_in_line_are_let_in_together(pool, spawn, sleepers):
    pool["a"] = 1
    meeting = threading.Barrier(3, timeout=20)

    def read():
        with pool.get("a"):
            meeting.wait()

    with pool.get_mut("a"):
        readers = [spawn(read) for _ in range(3)]
        for _ in readers:
            sleepers.next()
    for running in readers:
        running.result()
    assert pool.stats().pinned_bytes == 0
    pool.validate()


def test_a_writer_is_alone_and_readers_see_no_half_of_a_change(pool, spawn, sleepers):
    pool["a"] = array(0)

    def write():
        with pool.get_mut("a") as value:
            value += 1

    with pool.get("a") as value:
        writer = spawn(write)
        sleepers.next()
        assert (value == 0).all()
    writer.result()

    def read():
        with pool.get("a") as value:
            return value.copy()

    with pool.get_mut("a") as value:
        value[: len(value) // 2] = 5
        reader = spawn(read)
        sleepers.next()
        value[:] = 6
    assert (reader.result() == 6).all()


@pytest.mark.parametrize("waiting_writer", [False, True])
def test_invariant_10_a_reader_never_waits_for_an_eviction_write(
    make_faulty_pool, spawn, sleepers, waiting_writer
):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    gate = disk.gate("writev")
    written = fb.spawn_write_now()
    gate.wait_reached()
    assert fb.state is State.WRITING

    def write():
        with pool.get_mut("a") as value:
            value += 1

    def read():
        with pool.get("a") as value:
            return float(value[0])

    writer = spawn(write) if waiting_writer else None
    if writer:
        sleepers.next()
    with pool.get("a") as value:
        assert value[0] == 1
    assert spawn(read).result() == 1
    assert pool.stats().writing_bytes == 8_000
    gate.open()
    written.result()
    if writer:
        writer.result()
        assert pool["a"][0] == 2


def test_invariant_10_readers_behind_a_writer_that_waits_for_a_write_are_let_in(
    make_faulty_pool, spawn, sleepers
):
    """They came while another reader was there; when it leaves, only the write is in the writer's way."""
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))

    def write():
        with pool.get_mut("a") as value:
            value += 1

    def read():
        with pool.get("a") as value:
            return float(value[0])

    with pool.get("a"):
        writer = spawn(write)
        sleepers.next()
        reader = spawn(read)
        sleepers.next()
        gate = disk.gate("writev")
        written = fb.spawn_write_now()
        gate.wait_reached()
    assert reader.result() == 1
    pool.validate()
    gate.open()
    written.result()
    writer.result()
    assert pool["a"][0] == 2


def test_a_writer_waits_until_an_eviction_write_has_ended(make_faulty_pool, spawn, sleepers):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    gate = disk.gate("writev")
    written = fb.spawn_write_now()
    gate.wait_reached()

    def write():
        with pool.get_mut("a") as value:
            assert gate.go.is_set()
            value += 1

    writer = spawn(write)
    sleepers.next()
    gate.open()
    writer.result()
    written.result()
    assert pool["a"][0] == 2


def test_a_deleted_value_goes_with_its_last_reader_though_it_was_being_written(make_faulty_pool, spawn):
    """Two readers enter while the value is being written; its name goes before they leave."""
    pool, disk = make_faulty_pool("100KB")
    pool["a"] = array(1, 50_000)
    late = pool.get("a")
    gate = disk.gate("writev")
    pool["b"] = array(2, 45_000)  # "a" is written ahead of need
    gate.wait_reached()
    with pool.get("a"):
        del pool["a"]
        with late:
            pass
    gate.open()
    pool.drain()
    assert pool.stats().entries == 1 and pool.stats().resident_bytes == 45_000
    pool.validate()


# ------------------------------------------------------------------ entered again, and twice


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_guard_can_be_entered_again_after_it_was_left(pool, call):
    pool["a"] = [0]
    held = getattr(pool, call)("a")
    for number in range(4):
        if number == 2:
            spill(pool)
        with held as value:
            assert value == [number if call == "get_mut" else 0]
            if call == "get_mut":
                value[0] += 1
    assert pool.stats().pinned_bytes == 0


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_guard_entered_twice_at_once_is_an_error_and_the_first_entry_stands(pool, call):
    pool["a"] = [0]
    held = getattr(pool, call)("a")
    with held as value:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="entered already"):
                held.__enter__()
        pool.validate()
        assert held.value == value == [0]
        assert pool.evict() == 0, "it is still pinned"
    assert pool.stats().pinned_bytes == 0
    with held:
        pass


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_guard_that_waits_in_one_thread_cannot_be_entered_in_another(pool, spawn, sleepers, call):
    pool["a"] = [0]
    shared = getattr(pool, call)("a")

    def enter():
        with shared as value:
            return list(value)

    with pool.get_mut("a") as value:
        first = spawn(enter)
        sleepers.next()
        error = spawn(enter).error()
        assert isinstance(error, RuntimeError) and "entered already" in str(error)
        value.append(1)
    assert first.result() == [0, 1]
    pool.validate()
    with pool.get_mut("a"):
        pass


def test_leaving_a_guard_that_was_never_entered_harms_nothing(pool):
    pool["a"] = array(1)
    for held in (pool.get("a"), pool.get_mut("a"), pool.get_mut("a", rollback=True)):
        held.__exit__(None, None, None)
        held.__exit__(ValueError, ValueError(), None)
    pool.validate()
    assert (pool["a"] == 1).all() and pool.stats().pinned_bytes == 0


# ------------------------------------------------------------------ try_get, try_get_mut


def test_try_get_gives_a_held_guard_that_pins(pool):
    pool["a"] = array(1)
    held = pool.try_get("a")
    assert pool.stats().pinned_bytes == 8_000 and held.value[0] == 1
    with held as value:
        assert value[0] == 1
    assert pool.stats().pinned_bytes == 0
    with held as value:  # again, as any guard
        assert pool.stats().pinned_bytes == 8_000
    assert pool.stats().pinned_bytes == 0


def test_try_get_mut_gives_a_held_guard_that_writes(pool):
    fb = pool.put("a", 1)
    key = fb.key
    held = pool.try_get_mut("a")
    assert fb.key != key
    with held as value:
        held.value = value + 1
    assert pool["a"] == 2
    with fb.try_load_mut() as value:
        assert value == 2
    with fb.try_load() as value:
        assert value == 2


@pytest.mark.parametrize("call", ["try_get", "try_get_mut"])
def test_a_held_guard_that_is_forgotten_lets_go(pool, spawn, call):
    fb = pool.put("a", [1])
    key = fb.key
    held = getattr(pool, call)("a")
    assert pool.stats().pinned_bytes == fb.nbytes
    del held
    gc.collect()
    pool.drain()
    assert pool.stats().pinned_bytes == 0 and pool["a"] == [1]
    assert (fb.key == key) == (call == "try_get")
    with pool.get_mut("a"):
        pass


def test_a_forgotten_guard_lets_in_who_waits_for_it(pool, spawn, sleepers):
    pool["a"] = [1]
    held = pool.try_get("a")

    def write():
        with pool.get_mut("a") as value:
            value.append(2)

    writer = spawn(write)
    sleepers.next()
    del held
    gc.collect()
    writer.result()
    assert pool["a"] == [1, 2]


def test_try_get_of_a_spilled_value_is_none_and_loads_nothing(pool):
    fb = pool.put("a", array(1))
    spill(pool)
    assert pool.try_get("a") is None and pool.try_get_mut("a") is None
    assert fb.try_load() is None and fb.try_load_mut() is None
    assert fb.state is State.SPILLED and pool.stats().loads == 0 and pool.stats().pinned_bytes == 0
    pool.validate()


def test_try_get_of_a_value_that_is_being_written_gives_it_and_try_get_mut_does_not(make_faulty_pool):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    gate = disk.gate("writev")
    written = fb.spawn_write_now()
    gate.wait_reached()
    assert pool.try_get_mut("a") is None
    with pool.try_get("a") as value:
        assert value[0] == 1
    gate.open()
    written.result()
    with pool.try_get_mut("a") as value:
        value[0] = 2


def test_try_get_of_a_value_that_is_held_elsewhere_does_not_wait(pool, spawn):
    fb = pool.put("a", [1])
    with pool.get_mut("a"):
        for call in (fb.try_load, fb.try_load_mut):
            assert spawn(call).result() is None
    with pool.get("a"):
        assert spawn(fb.try_load_mut).result() is None

        def read():
            with fb.try_load() as value:
                return list(value)

        assert spawn(read).result() == [1]
    pool.validate()


def test_try_get_mut_of_a_mapped_value_gives_memory_that_can_be_written(pool):
    pool["a"] = array(1, 200_000)
    spill(pool)
    pool["a"]
    held = pool.try_get_mut("a")
    with held as value:
        value += 1
    assert (pool["a"] == 2).all()
    pool.validate()


# ------------------------------------------------------------------ put takes over


def test_put_freezes_the_callers_array_and_get_mut_changes_it_under_one_key(pool):
    mine = array(1)
    pool["a"] = mine
    with pytest.raises(ValueError):
        mine[0] = 5
    assert np.shares_memory(pool["a"], mine), "no copy"


def test_put_freezes_arrays_in_containers_and_leaves_the_containers(pool):
    mine = array(1)
    container = {"x": [mine, (array(2),)]}
    pool["a"] = container
    assert not mine.flags.writeable and container["x"][0] is mine


def test_put_copies_a_view_that_others_could_write(pool):
    mine = array(1)
    pool["a"] = mine[:10]
    pool["b"] = [mine[::2]]
    mine[:] = 5
    assert mine.flags.writeable
    assert (pool["a"] == 1).all() and (pool["b"][0] == 1).all()
    buffer = bytearray(80)
    pool["c"] = np.frombuffer(buffer, np.float64)
    buffer[:8] = b"12345678"
    assert (pool["c"] == 0).all()


def test_put_with_copy_leaves_the_callers_value_as_it_is(pool):
    mine = [array(1)]
    pool.put("a", mine, copy=True)
    fb = pool.insert(mine, copy=True)
    mine[0][:] = 5
    mine.append(1)
    assert len(pool["a"]) == 1 and (pool["a"][0] == 1).all()
    with fb.load() as value:
        assert (value[0] == 1).all()


def test_an_array_put_under_two_names_is_two_values(pool):
    mine = array(1)
    pool["a"] = mine
    pool["b"] = mine
    pool["c"] = pool["a"]
    spill(pool, "c")
    pool["d"] = pool["c"]
    pool["e"] = [pool["a"], pool["d"]]
    for number, name in enumerate("abcd"):
        with pool.get_mut(name) as value:
            value[:] = number + 10
    for number, name in enumerate("abcd"):
        assert (pool[name] == number + 10).all()
    assert (pool["e"][0] == 1).all() and (pool["e"][1] == 1).all()
    pool.validate()


def test_a_write_guard_that_rebinds_to_anothers_value_shares_nothing_with_it(pool):
    pool["a"], pool["b"] = array(1), array(2)
    with (held := pool.get_mut("b")):
        held.value = pool["a"]
    with pool.get_mut("b") as value:
        value[:] = 3
    assert (pool["a"] == 1).all() and (pool["b"] == 3).all()


def test_a_view_kept_from_a_write_guard_cannot_write_after_it(pool):
    pool["a"] = array(1)
    with pool.get_mut("a") as value:
        pass
    with pytest.raises(ValueError):
        value[0] = 5
    assert (pool["a"] == 1).all()


# ------------------------------------------------------------------ lingering values


def test_a_value_that_a_variable_still_holds_is_used_again_and_counted(pool):
    pool["a"] = array(1)
    mine = pool["a"]
    pool.evict()
    stats = pool.stats()
    assert stats.lingering_bytes == 8_000 and stats.resident_bytes == 0
    with pool.get("a") as value:
        assert np.shares_memory(value, mine) and not value.flags.writeable
    stats = pool.stats()
    assert stats.loads == 0 and stats.lingering_bytes == 0 and stats.resident_bytes == 8_000
    pool.validate()
    pool.evict()
    assert pool.stats().spills == 1, "its blob is still there (invariant 8)"
    del mine, value
    gc.collect()
    assert pool.stats().lingering_bytes == 0
    assert pool["a"][0] == 1 and pool.stats().loads == 1


def test_a_lingering_value_is_not_used_for_changed_content(pool):
    pool["a"] = array(1)
    mine = pool["a"]
    pool.evict()
    with pool.get_mut("a") as value:
        value[:] = 2
    assert (mine == 1).all(), "what was read before stays as it was"
    assert (pool["a"] == 2).all()
    spill(pool)
    assert (pool["a"] == 2).all() and not np.shares_memory(pool["a"], mine)
    assert pool.stats().lingering_bytes in (0, 8_000)


def test_a_lingering_value_that_was_made_writeable_is_loaded_instead(pool):
    mine = array(1)
    pool["a"] = mine
    pool.evict()
    mine.setflags(write=True)
    mine[:] = 9
    assert (pool["a"] == 1).all()


def test_a_lingering_value_of_a_deleted_name_is_not_counted(pool):
    pool["a"] = array(1)
    mine = pool["a"]
    pool.evict()
    del pool["a"]
    assert pool.stats().lingering_bytes == 0 and mine[0] == 1


# ------------------------------------------------------------------ counts


def test_hits_and_misses_count_each_access_once(pool):
    pool["a"] = array(1)
    with pool.get("a"), pool.get("a"):
        pool["a"]
    with pool.get_mut("a"):
        pass
    assert (pool.stats().hits, pool.stats().misses) == (4, 0)
    spill(pool)
    with pool.get("a"):
        pass
    assert (pool.stats().hits, pool.stats().misses, pool.stats().loads) == (4, 1, 1)
    spill(pool)
    with pool.get_mut("a"):
        pass
    assert (pool.stats().hits, pool.stats().misses, pool.stats().loads) == (4, 2, 2)
    spill(pool)
    pool["a"]
    assert (pool.stats().hits, pool.stats().misses, pool.stats().loads) == (4, 3, 3)


def test_a_pinned_value_is_not_evicted_and_counts_once_however_often_it_is_pinned(pool):
    fb = pool.put("a", array(1))
    with pool.get("a"), pool.get("a"), fb.load():
        assert pool.stats().pinned_bytes == 8_000
        assert pool.evict() == 0 and pool.evict(["a"]) == 0
        assert fb.state in (State.RESIDENT, State.CLEAN)
    assert pool.evict() == 8_000
    pool.validate()


def test_a_guard_held_over_the_end_of_its_pool_keeps_its_value_and_says_that_the_pool_is_gone(make_pool):
    pool = make_pool()
    pool["a"], pool["b"] = array(1), array(2)
    reading, writing = pool.get("a"), pool.get_mut("b")
    with reading as a, writing as b:
        pool.close()
        assert (a == 1).all() and (b == 2).all()
        b[0] = 5
        with pytest.raises(PoolClosedError):
            reading.value
    for held in (reading, writing):
        with pytest.raises(PoolClosedError):
            held.__enter__()


def test_freezing_leaves_no_reference_to_a_value_that_was_deleted(pool):
    pool["a"] = array(1)
    ghost = freezing.Ghost.of(pool["a"])
    assert ghost is not None and ghost.alive
    del pool["a"]
    gc.collect()
    assert not ghost.alive
