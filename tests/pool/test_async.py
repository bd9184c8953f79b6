"""The same guards under asyncio: the loop is never blocked, and a cancelled wait leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import pytest

from fbcache import State
from fbcache.waiting import Waiter


def array(fill, nbytes=8_000):
    return np.full(nbytes // 8, fill, np.float64)


def spill(pool):
    pool.evict()
    gc.collect()


def assert_free(pool, name):
    """Nobody holds or waits for the entry, and it can be taken for writing."""
    entry = pool._engine.names[name]
    assert entry.readers is None and entry.writer is None and entry.waiters is None
    assert pool.stats().pinned_bytes == 0
    pool.validate()
    with pool.get_mut(name):
        pass


def reached(gate):
    return asyncio.to_thread(gate.wait_reached)


async def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def add(pool, name, number):
    async with pool.get_mut(name) as value:
        value += number


async def read(pool, name):
    async with pool.get(name) as value:
        return float(value[0])


# ------------------------------------------------------------------ hits and misses


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_hit_never_gives_control_to_the_loop(pool, call):
    pool["a"] = array(1)

    async def main():
        other = asyncio.create_task(asyncio.sleep(0))
        async with getattr(pool, call)("a") as value:
            assert value[0] == 1
            assert not other.done()
            other.cancel()

    asyncio.run(main())
    assert_free(pool, "a")


def test_a_miss_is_loaded_and_pinned(pool):
    pool["a"] = array(1)
    spill(pool)

    async def main():
        async with pool.get("a") as value:
            assert value[0] == 1 and not value.flags.writeable
            assert pool.stats().pinned_bytes == 8_000
        pool.evict()
        async with pool.get_mut("a") as value:
            value += 1
        return await read(pool, "a")

    assert asyncio.run(main()) == 2
    assert_free(pool, "a")


def test_a_load_does_not_block_the_loop(make_faulty_pool):
    pool, disk = make_faulty_pool()
    pool["a"], pool["b"] = array(1), array(2)
    pool.evict(["a"])
    gc.collect()
    gate = disk.gate("preadv")

    async def main():
        loading = asyncio.create_task(read(pool, "a"))
        await reached(gate)
        for number in range(10):  # hits, and writes, go on meanwhile
            assert await read(pool, "b") == 2 + number
            await add(pool, "b", 1)
        assert not loading.done()
        gate.open()
        assert await loading == 1

    asyncio.run(main())


def test_a_wait_for_a_writer_does_not_block_the_loop(pool, spawn):
    pool["a"], pool["b"] = array(1), array(2)
    held, leave = threading.Event(), threading.Event()

    def hold():
        with pool.get_mut("a") as value:
            held.set()
            leave.wait()
            value += 1

    async def main():
        waiting = asyncio.create_task(read(pool, "a"))
        assert await read(pool, "b") == 2
        await asyncio.sleep(0)
        assert not waiting.done()
        leave.set()
        assert await waiting == 2

    holding = spawn(hold)
    held.wait()
    asyncio.run(main())
    holding.result()


def test_the_tasks_that_want_one_spilled_value_load_it_once(pool):
    pool["a"] = array(1)
    spill(pool)

    async def main():
        return await asyncio.gather(*(read(pool, "a") for _ in range(20)))

    assert asyncio.run(main()) == [1.0] * 20
    assert pool.stats().loads == 1
    assert_free(pool, "a")


def test_many_tasks_over_more_than_fits_read_what_was_written(make_pool):
    pool = make_pool("40KB")

    async def work(number):
        await asyncio.to_thread(pool.put, number, array(number))
        for step in range(3):
            await add(pool, number, 1)
            assert await read(pool, number) == number + step + 1

    async def main():
        async with asyncio.TaskGroup() as group:
            for number in range(30):
                group.create_task(work(number))

    asyncio.run(main())
    for number in range(30):
        assert pool[number][0] == number + 3
    assert pool.stats().loads > 0
    pool.validate()


def test_tasks_exclude_each_other(pool):
    pool["a"] = array(0)

    async def work():
        for _ in range(20):
            async with pool.get_mut("a") as value:
                before = value[0]
                await asyncio.sleep(0)
                value[:] = before + 1

    async def main():
        await asyncio.gather(*(work() for _ in range(5)))

    asyncio.run(main())
    assert pool["a"][0] == 100
    assert_free(pool, "a")


def test_an_exception_in_the_block_keeps_or_rolls_back_as_with_threads(pool):
    pool["a"] = array(1)

    async def main(rollback):
        async with pool.get_mut("a", rollback=rollback) as value:
            value += 1
            raise ZeroDivisionError

    for rollback, expected in ((True, 1), (False, 2)):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(main(rollback))
        assert pool["a"][0] == expected
    assert_free(pool, "a")


def test_the_error_about_a_read_only_array_names_get_mut(pool):
    pool["a"] = array(1)

    async def main():
        async with pool.get("a") as value:
            value[0] = 2

    with pytest.raises(ValueError, match=r"read-only.*get_mut\('a'\)"):
        asyncio.run(main())


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_guard_entered_twice_at_once_by_tasks_is_an_error_and_the_first_stands(pool, sleepers, call):
    pool["a"] = [1]

    async def enter(guard):
        async with guard as value:
            return list(value)

    async def main():
        guard = getattr(pool, call)("a")
        async with pool.get_mut("a") as value:
            first = asyncio.create_task(enter(guard))
            await sleepers.anext()
            with pytest.raises(RuntimeError, match="entered already"):
                await enter(guard)
            value.append(2)
        assert await first == [1, 2]
        assert await enter(guard) == [1, 2]

    asyncio.run(main())
    assert_free(pool, "a")


# ------------------------------------------------------------------ cancelled waits


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_wait_for_a_writer_that_is_cancelled_leaves_the_line(pool, sleepers, call):
    pool["a"] = [1]

    async def enter():
        async with getattr(pool, call)("a"):
            raise AssertionError("it was cancelled")

    async def main():
        async with pool.get_mut("a") as value:
            task = asyncio.create_task(enter())
            await sleepers.anext()
            await cancel(task)
            pool.validate()
            value.append(2)

    asyncio.run(main())
    assert_free(pool, "a")
    assert pool["a"] == [1, 2]


def test_a_writer_that_is_cancelled_lets_in_the_readers_behind_it(pool, sleepers):
    pool["a"] = array(1)

    async def main():
        async with pool.get("a"):
            writer = asyncio.create_task(add(pool, "a", 1))
            await sleepers.anext()
            reader = asyncio.create_task(read(pool, "a"))
            await sleepers.anext()
            await cancel(writer)
            assert await reader == 1

    asyncio.run(main())
    assert_free(pool, "a")


def test_invariant_10_a_writer_that_is_cancelled_during_a_write_lets_readers_in(make_faulty_pool, sleepers):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    gate = disk.gate("writev")
    written = fb.spawn_write_now()
    gate.wait_reached()

    async def main():
        writer = asyncio.create_task(add(pool, "a", 1))
        await sleepers.anext()
        reader = asyncio.create_task(read(pool, "a"))
        assert await reader == 1
        await cancel(writer)
        assert await read(pool, "a") == 1
        pool.validate()

    asyncio.run(main())
    gate.open()
    written.result()
    assert_free(pool, "a")


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_cancelled_load_holds_no_lock_and_loses_no_value(make_faulty_pool, call):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    spill(pool)
    gate = disk.gate("preadv")

    async def enter():
        async with getattr(pool, call)("a"):
            raise AssertionError("it was cancelled")

    async def main():
        task = asyncio.create_task(enter())
        await reached(gate)
        await cancel(task)
        pool.validate()
        assert fb.state is State.LOADING
        gate.open()

    asyncio.run(main())
    pool.drain()
    assert fb.state is State.CLEAN and pool.stats().loads == 1 and pool.stats().pinned_bytes == 0
    pool.validate()
    assert pool["a"][0] == 1 and pool.stats().loads == 1, "the value that was loaded is there"
    assert_free(pool, "a")


def test_a_load_that_is_cancelled_before_it_began_is_taken_back(make_faulty_pool, sleepers):
    pool, disk = make_faulty_pool(io_threads=1)
    fb = pool.put("a", array(1))
    spill(pool)
    other = pool.put("b", array(2))
    gate = disk.gate("writev")
    written = other.spawn_write_now()
    gate.wait_reached()  # the only thread is busy

    async def main():
        first = asyncio.create_task(read(pool, "a"))
        while fb.state is not State.LOADING:
            await asyncio.sleep(0)
        second = asyncio.create_task(read(pool, "a"))
        await sleepers.anext()  # waits for the load of the first
        await cancel(first)
        pool.validate()
        gate.open()
        assert await second == 1

    asyncio.run(main())
    written.result()
    pool.drain()
    assert pool.stats().loads == 1
    assert_free(pool, "a")


def test_one_of_two_that_wait_for_a_load_is_cancelled_and_the_other_gets_it(make_faulty_pool, sleepers):
    pool, disk = make_faulty_pool()
    pool["a"] = array(1)
    spill(pool)
    gate = disk.gate("preadv")

    async def main():
        first = asyncio.create_task(read(pool, "a"))
        await reached(gate)
        second = asyncio.create_task(read(pool, "a"))
        await sleepers.anext()
        third = asyncio.create_task(read(pool, "a"))
        await sleepers.anext()
        await cancel(first)
        await cancel(second)
        gate.open()
        assert await third == 1

    asyncio.run(main())
    assert pool.stats().loads == 1
    assert_free(pool, "a")


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_a_wait_cancelled_in_the_moment_it_was_granted_gives_the_lock_back(pool, sleepers, call):
    pool["a"] = array(1)

    async def enter():
        async with getattr(pool, call)("a"):
            raise AssertionError("it was cancelled")

    async def main():
        async with pool.get_mut("a"):
            task = asyncio.create_task(enter())
            waiter = await sleepers.anext()
            behind = asyncio.create_task(add(pool, "a", 1))
            await sleepers.anext()
        # Left: the lock is the task's now, which has not run since.
        assert waiter.done and not task.done()
        await cancel(task)
        await behind

    asyncio.run(main())
    assert pool["a"][0] == 2
    assert_free(pool, "a")


def test_a_wait_cancelled_in_the_moment_its_load_was_done_loses_no_value(pool, monkeypatch):
    """The load is done and the loop knows of it, but the task has not run yet."""
    fb = pool.put("a", array(1))
    spill(pool)

    async def main():
        task = asyncio.create_task(read(pool, "a"))
        while fb.state is not State.CLEAN:
            await asyncio.sleep(0)
        if not task.done():  # most times
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass

    asyncio.run(main())
    pool.drain()
    assert pool.stats().loads == 1
    assert_free(pool, "a")
    assert pool["a"][0] == 1


def test_a_timeout_is_a_cancelled_wait(pool):
    pool["a"] = array(1)

    async def main():
        async with pool.get_mut("a"):

            async def other():
                async with asyncio.timeout(0):
                    await add(pool, "a", 1)

            with pytest.raises(TimeoutError):
                await asyncio.create_task(other())

    asyncio.run(main())
    assert_free(pool, "a")


@pytest.mark.parametrize(("phase", "place"), [("wait", "memory"), ("wait", "spilled"), ("copy", "memory")])
def test_a_cancelled_make_mut_leaves_the_entry_shared_or_separated_and_nothing_held(
    pool, sleepers, phase, place
):
    reached_copy, go = threading.Event(), threading.Event()

    class Slow:
        def __deepcopy__(self, memo):
            reached_copy.set()
            assert go.wait(30)
            return self

    fb = pool.put("a", [Slow()] if phase == "copy" else [1])
    if place == "spilled":
        spill(pool)

    async def separate():
        async with fb.make_mut():
            raise AssertionError("it was cancelled")

    async def main():
        if phase == "copy":
            task = asyncio.create_task(separate())
            await asyncio.to_thread(reached_copy.wait)
            await cancel(task)
            go.set()
        else:
            async with pool.get_mut("a"):
                task = asyncio.create_task(separate())
                await sleepers.anext()
                await cancel(task)

    asyncio.run(main())
    pool.drain()
    assert_free(pool, "a")
    pool.validate()
    with fb.load_mut():
        pass


def test_a_task_whose_loop_was_closed_while_it_waited_holds_nothing(pool, sleepers):
    """The waker finds the loop closed; the lock comes free when the task is collected."""
    pool["a"] = array(1)

    async def main(task_made):
        task_made.append(asyncio.ensure_future(add(pool, "a", 1)))
        await sleepers.anext()

    tasks = []
    with pool.get("a"):
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending"
        loop.run_until_complete(main(tasks))
        loop.close()
    tasks.clear()
    del loop
    gc.collect()
    assert_free(pool, "a")
    assert pool["a"][0] == 1


# ------------------------------------------------------------------ loops and threads


def test_loops_one_after_another_use_one_pool(pool):
    pool["a"] = array(0)
    guard = pool.get_mut("a")

    async def main():
        async with guard as value:
            value += 1
        pool.evict()
        await asyncio.gather(add(pool, "a", 1), add(pool, "a", 1))

    for _ in range(3):
        asyncio.run(main())
    assert pool["a"][0] == 9
    assert_free(pool, "a")


def test_loops_side_by_side_in_threads_and_plain_threads_exclude_each_other(pool, spawn):
    pool["a"] = array(0)

    def plain():
        for number in range(30):
            with pool.get_mut("a") as value:
                value += 1
            if number % 10 == 0:
                pool.evict()

    async def task():
        for _ in range(10):
            async with pool.get_mut("a") as value:
                before = value[0]
                await asyncio.sleep(0)
                value[:] = before + 1

    async def main():
        await asyncio.gather(*(task() for _ in range(3)))

    running = [spawn(plain) for _ in range(2)] + [spawn(asyncio.run, main()) for _ in range(3)]
    for each in running:
        each.result()
    assert pool["a"][0] == 2 * 30 + 3 * 30
    assert_free(pool, "a")


def test_a_task_of_one_loop_waits_for_a_task_of_another(pool, spawn, sleepers):
    pool["a"] = array(1)
    held = threading.Event()

    async def hold():
        async with pool.get_mut("a") as value:
            held.set()
            await asyncio.to_thread(sleepers.next)
            value += 1

    holding = spawn(asyncio.run, hold())
    held.wait()
    assert asyncio.run(read(pool, "a")) == 2
    holding.result()


def test_plain_with_works_on_a_loop_as_long_as_it_need_not_wait_for_it(pool):
    pool["a"], pool["b"] = array(1), array(2)
    spill(pool)

    async def main():
        with pool.get("a") as value:  # a load blocks the loop, and ends
            assert value[0] == 1
            async with pool.get("a") as again:
                assert again[0] == 1
        async with pool.get("b"):
            with pool.get_mut("a") as value:
                value += 1
        return pool["a"][0]

    assert asyncio.run(main()) == 2
    assert_free(pool, "a")


def test_a_guard_entered_in_a_task_can_be_left_by_plain_exit_and_the_other_way_round(pool):
    pool["a"] = array(1)

    async def main():
        guard = pool.get_mut("a")
        await guard.__aenter__()
        guard.__exit__(None, None, None)
        guard.__enter__()
        await guard.__aexit__(None, None, None)

    asyncio.run(main())
    assert_free(pool, "a")


def test_code_on_a_loop_outside_any_task_counts_as_its_thread(pool):
    pool["a"] = array(1)
    seen = []

    def callback():
        with pool.get("a") as value:
            seen.append(float(value[0]))

    async def main():
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert seen == [1]


@pytest.mark.parametrize(
    "sleep", [Waiter.run, lambda waiter: asyncio.run(waiter.arun())], ids=["thread", "task"]
)
def test_a_wake_before_the_sleep_is_not_lost(sleep):
    """The waker may be faster than the sleeper, who must find the wake, and the error with it."""
    waiter = Waiter()
    waiter.wake()
    sleep(waiter)
    waiter = Waiter()
    waiter.wake(ZeroDivisionError())
    waiter.wake()  # only the first counts
    with pytest.raises(ZeroDivisionError):
        sleep(waiter)
