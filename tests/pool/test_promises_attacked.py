"""What libraries note in a value, tasks cancelled amid a copy, callbacks that raise, deep values."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pytest

from fbcache import Fb, FBPool, MutatedError, TrackedDirectory, register
from fbcache.entry import Entry
from fbcache.freezing import take_over
from fbcache.waiting import Hold
from tests.conftest import PATIENCE, MakePool


@pytest.fixture
def watched(make_pool: MakePool) -> FBPool:
    return make_pool("1MB", debug=True)


# ------------------------------------------------------------- debug: readers who change nothing

DTYPES: list[Any] = ["i1", "u8", "f2", "f8", "c16", "?", "S3", "U2", "M8[D]", "m8[s]", "O", ">i4", "i4,f8"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masked_array_may_be_asked_for_its_fill_value(watched: FBPool, dtype: Any) -> None:
    watched["x"] = {"part": np.ma.masked_array(np.zeros(3, dtype))}
    assert len(watched._engine.residency.noted) == 1
    for _ in range(2):
        with watched.get("x") as value:
            repr(value["part"].fill_value)
        with watched.get_mut("x"):
            pass
        watched.evict()


def test_a_masked_array_may_not_be_given_another_fill_value(watched: FBPool) -> None:
    watched["x"] = np.ma.masked_array(np.zeros(3))
    with pytest.raises(MutatedError), watched.get("x") as value:
        value.fill_value = 7


def test_a_sparse_matrix_may_find_out_about_its_order(watched: FBPool) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    unsorted = (np.array([1.0, 2, 3]), np.array([2, 0, 1]), np.array([0, 2, 3, 3]))
    watched["x"] = sparse.csr_array(unsorted, shape=(3, 3))
    with watched.get("x") as value:
        assert not value.has_sorted_indices and not value.has_canonical_format
    with watched.get_mut("x"):
        pass


class NeverAlike:
    def __reduce__(self) -> Any:
        return NeverAlike._made, (random.random(),)

    @staticmethod
    def _made(_: float) -> NeverAlike:
        return NeverAlike()


def test_what_is_pickled_otherwise_each_time_is_let_be(watched: FBPool) -> None:
    fb = watched.put("x", [NeverAlike()])
    with watched.get("x"):
        pass
    with watched.get_mut("x"):
        pass
    with watched.get("x"):
        pass
    fb.write_now()
    assert watched.evict() > 0


def test_a_pool_closed_within_a_readers_block_is_no_error_of_the_block(watched: FBPool) -> None:
    watched["x"] = [1]
    with watched.get("x") as value:
        watched.close()
    assert value == [1]


# ------------------------------------------------------------------- tasks cancelled amid a copy


class SlowToCopy:
    """What takes its time to be copied, and none to be pickled."""

    def __init__(self, content: int) -> None:
        self.content = content

    def __deepcopy__(self, memo: Any) -> Self:
        content = self.content
        if Slow.gate is not None:
            Slow.gate.pass_through()
        return type(self)(content)


class Slow(SlowToCopy):
    """What takes its time to be copied, and to be pickled."""

    gate: Gate | None = None

    def __getstate__(self) -> Any:
        state = dict(self.__dict__)
        if Slow.gate is not None:
            Slow.gate.pass_through()
        return state


class Gate:
    """Closed once: for the first who comes."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self._visits = itertools.count()

    def pass_through(self) -> None:
        if next(self._visits) == 0:
            self.reached.set()
            assert self.opened.wait(PATIENCE)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr(Slow, "gate", made)
    return made


def cancel_at(gate: Gate, guard: Any) -> None:
    """Enter a guard in a task that is cancelled when it has come to the gate."""

    async def enter() -> None:
        async with guard:
            raise AssertionError("entered")

    async def run() -> None:
        task = asyncio.create_task(enter())
        while not gate.reached.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def let_end(pool: FBPool, gate: Gate) -> None:
    """Have the cancelled task's job come to its end, on the only thread."""
    ended = threading.Event()
    gate.opened.set()
    pool._engine.workers.submit(ended.set)
    assert ended.wait(PATIENCE)


def test_a_cancelled_copy_is_not_what_a_later_rollback_brings_back(make_pool: MakePool, gate: Gate) -> None:
    pool = make_pool("1MB", io_threads=1)
    pool["x"] = Slow(1)
    guard = pool.get_mut("x", rollback=True)
    cancel_at(gate, guard)
    with pool.get_mut("x") as value:
        value.content = 2
    let_end(pool, gate)
    with pytest.raises(ZeroDivisionError), guard as value:
        value.content = 1 // 0
    assert pool["x"].content == 2


def test_a_cancelled_make_mut_does_not_move_the_handle_later(make_pool: MakePool, gate: Gate) -> None:
    pool = make_pool("1MB", io_threads=1)
    fb = pool.put("x", Slow(1))
    cancel_at(gate, fb.make_mut())
    with pool.get_mut("x") as value:
        value.content = 2
    let_end(pool, gate)
    assert fb.name == "x"
    with fb.load() as value:
        assert value.content == 2
    pool.validate()


def test_a_cancelled_copy_for_a_save_is_not_what_a_later_save_gets(
    make_pool: MakePool, tmp_path: Path, gate: Gate
) -> None:
    pool = make_pool("1MB", io_threads=1)
    fb = pool.put("x", SlowToCopy(1))
    busy = threading.Event()
    pool._engine.workers.submit(lambda: bool(busy.wait(PATIENCE)) and None)
    first = fb.spawn_persist(tmp_path / "tracked", allow_pickle=True)

    async def enter() -> None:
        async with pool.get_mut("x"):
            raise AssertionError("entered")

    async def run() -> None:
        task = asyncio.create_task(enter())
        await asyncio.sleep(0)
        busy.set()
        while not gate.reached.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    with pool.get_mut("x") as value:
        value.content = 2
    second = fb.spawn_persist(tmp_path / "tracked", allow_pickle=True)
    let_end(pool, gate)
    keys = first.result(PATIENCE), second.result(PATIENCE)
    with TrackedDirectory(tmp_path / "tracked") as tracked:
        for number, key in enumerate(keys, 1):
            with pool.register(tracked, key, allow_pickle=True).load() as found:
                assert found.content == number


def test_a_cancelled_look_notes_nothing(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool("1MB", io_threads=1, debug=True)
    pool["x"] = Slow(1)
    made = Gate()
    monkeypatch.setattr(Slow, "gate", made)
    cancel_at(made, pool.get_mut("x"))
    with pool.get_mut("x") as value:
        value.content = 2
    let_end(pool, made)
    with pool.get("x") as value:
        assert value.content == 2


# ------------------------------------------------------------------------- callbacks and threads


def spawn_write(pool: FBPool, fb: Fb, path: Path) -> Future[Any]:
    return fb.spawn_write_now()


def spawn_persist(pool: FBPool, fb: Fb, path: Path) -> Future[Any]:
    return fb.spawn_persist(path)


@pytest.mark.parametrize("spawned", [spawn_write, spawn_persist])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_ends_no_thread_of_the_pool(
    make_pool: MakePool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spawned: Callable[[FBPool, Fb, Path], Future[Any]],
    error: type[BaseException],
) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))
    pool = make_pool("1MB", io_threads=1)
    reached = threading.Event()

    def raise_it(_: Future[Any]) -> None:
        assert reached.wait(PATIENCE)
        raise error

    future = spawned(pool, pool.put("x", np.zeros(100)), tmp_path / "tracked")
    future.add_done_callback(raise_it)
    reached.set()
    future.result(PATIENCE)
    pool["y"] = [2]
    assert pool.evict() > 0
    pool.drain()
    assert pool["y"] == [2]


# -------------------------------------------------------------------------- who waits for itself


def owned(by: int) -> Hold:
    hold = Hold()
    hold.owner = by
    return hold


def test_a_reader_may_wait_beside_another_of_its_own_thread() -> None:
    entry = Entry([1], 8)
    writer, first, second = owned(1), owned(2), owned(2)
    assert entry.acquire_exclusive(writer, None) is None
    waits = [entry.acquire_shared(hold, None) for hold in (first, second)]
    entry.leave(writer)
    entry.hand_over()
    assert all(waiter is not None and waiter.done for waiter in waits) and first.held and second.held


def test_to_try_does_not_wait_and_so_not_for_itself_either() -> None:
    entry = Entry([1], 8)
    writer, waiting = owned(1), owned(2)
    assert entry.acquire_exclusive(writer, None) is None
    assert entry.acquire_exclusive(waiting, None) is not None
    assert not entry.try_shared(owned(2))
    assert not entry.try_exclusive(owned(2))


# ------------------------------------------------------------------------------ deep and many


class Pair(NamedTuple):
    head: Any
    tail: Any


@register
@dataclass(frozen=True)
class Cell:
    head: Any
    tail: Any


@pytest.mark.parametrize("make", [lambda head, tail: (head, tail), Pair, Cell], ids=["tuple", "Pair", "Cell"])
def test_a_view_at_the_end_of_a_long_chain_is_copied(make: Callable[[Any, Any], Any]) -> None:
    memory = np.arange(10.0)
    mine: Any = memory[:3]
    for number in range(5_000):
        mine = make(number, mine)
    kept = take_over(mine)
    assert type(kept) is type(mine)
    while not isinstance(kept, np.ndarray):
        kept = kept[1] if isinstance(kept, tuple) else kept.tail
        mine = mine[1] if isinstance(mine, tuple) else mine.tail
    assert not kept.flags.writeable and not np.shares_memory(kept, memory) and mine.flags.writeable


def test_to_look_into_instances_does_not_make_them_larger() -> None:
    cell = Cell(1, [2])
    size = referents(cell)
    take_over([cell])
    assert referents(cell) == size


def referents(value: Any) -> list[type]:
    return [type(part) for part in gc.get_referents(value)]


@register
@dataclass
class Hidden:
    """A field behind a method of the same name; another behind a function."""

    a: Any
    key: Any = len

    def use(self) -> None:
        """Change nothing."""


def test_a_field_with_a_function_for_its_default_is_read_where_it_is_kept(pool: FBPool) -> None:
    memory = np.arange(10.0)
    mine = Hidden([1], memory[:4])
    unset = Hidden(memory[:2])
    del unset.__dict__["a"]
    fb = pool.put("x", [mine, unset])
    with fb.load() as (first, second):
        assert type(first) is Hidden and not first.key.flags.writeable and first.a is mine.a
        assert second is unset and second.key is len
    assert mine.key.flags.writeable and memory.flags.writeable


# ---------------------------------------------------------------------- names that change hands


def read(pool: FBPool, path: Path) -> Any:
    with pool.get("x") as value:
        return value


def change(pool: FBPool, path: Path) -> Any:
    with pool.get_mut("x") as value:
        return value


def persist(pool: FBPool, path: Path) -> Any:
    with TrackedDirectory(path) as tracked:
        key = pool.persist("x", tracked)
        with pool.register(tracked, key).load() as value:
            return value


@pytest.mark.parametrize("use", [read, change, persist])
def test_a_name_that_gets_another_entry_just_now_is_there_all_the_time(
    pool: FBPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[FBPool, Path], Any]
) -> None:
    pool["x"] = ["former"]
    look_up, left = FBPool._look_up, iter([True])

    def replaced_meanwhile(self: FBPool, name: Any) -> Entry:
        entry = look_up(self, name)
        if next(left, False):
            self["x"] = ["new"]
        return entry

    monkeypatch.setattr(FBPool, "_look_up", replaced_meanwhile)
    assert use(pool, tmp_path / "tracked") == ["new"]
