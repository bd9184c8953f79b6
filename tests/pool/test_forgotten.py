"""What a program forgets, or is not allowed to end: guards, tasks, values that die on the pool's threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fbcache import FBPool, PoolClosedError
from tests.conftest import MakePool, Running

ITEM = 8192


def array(value: float) -> np.ndarray[Any, Any]:
    return np.full(ITEM // 8, value)


@pytest.mark.parametrize("method", ["get", "get_mut"])
def test_a_guard_that_was_entered_and_forgotten_locks_nobody_out(
    method: str, pool: FBPool, spawn: Callable[..., Running]
) -> None:
    pool.put("x", array(1))
    guard = getattr(pool, method)("x")
    guard.__enter__()
    del guard

    def change() -> None:
        with pool.get_mut("x") as x:
            x += 1

    spawn(change).result()
    change()
    assert pool["x"][0] == 3
    pool.validate()
    assert pool.stats().pinned_bytes == 0


def test_a_guard_in_use_is_never_taken_for_a_forgotten_one(pool: FBPool) -> None:
    pool.put("x", array(1))
    with pool.get("x"), pool.get("x"):
        pool.validate()
        assert pool.stats().pinned_bytes == ITEM
    with pool.get_mut("x"):
        pool.validate()
        assert pool.stats().pinned_bytes == ITEM
    assert pool.stats().pinned_bytes == 0


def test_a_task_whose_loop_ended_inside_a_guard_keeps_no_lock(pool: FBPool) -> None:
    pool.put("x", array(1))

    async def hold(entered: asyncio.Event) -> None:
        async with pool.get_mut("x"):
            entered.set()
            await asyncio.Event().wait()

    async def start() -> Any:
        entered = asyncio.Event()
        task = asyncio.get_running_loop().create_task(hold(entered))
        await entered.wait()
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(start())
    task._log_destroy_pending = False
    loop.close()
    del loop, task
    gc.collect()
    with pool.get_mut("x") as x:
        x += 1
    assert pool["x"][0] == 2


@pytest.mark.parametrize("call", ["put", "evict"])
def test_a_value_that_dies_on_a_worker_and_calls_the_pool_does_not_make_it_wait_for_itself(
    call: str, make_pool: MakePool
) -> None:
    """Invariant 6."""
    pool = make_pool(4 * ITEM, io_threads=1)
    acts: dict[str, Callable[[], Any]] = {
        "put": lambda: pool.put("from a finalizer", array(2)),
        "evict": pool.evict,
    }

    class Caller:
        def __del__(self) -> None:
            with contextlib.suppress(PoolClosedError):
                acts[call]()

        def __reduce__(self) -> Any:
            return (int, (0,))

    pool.put("kept", array(1))
    for number in range(12):
        pool.put(number, Caller(), nbytes=ITEM)
    pool.drain()
    assert pool["kept"][0] == 1


@pytest.mark.parametrize("kind", [np.matrix, np.recarray])
def test_arrays_that_go_through_pickle_come_back_read_only(kind: type, pool: FBPool) -> None:
    """Invariant 15."""
    value = np.ones((2, 2)).view(kind) if kind is np.matrix else np.rec.array([(1, 2.0)], names="a,b")
    pool.put("x", {"array": value})
    pool.evict()
    with pool.get("x") as x:
        assert not x["array"].flags.writeable
    with pool.get_mut("x") as x:
        assert x["array"].flags.writeable
