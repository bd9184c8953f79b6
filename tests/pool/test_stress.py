"""Sixteen threads on a pool whose working set is twenty times its budget; every value read is verified.

Values describe themselves: name, version and a stream of bytes derived from both. A reader needs
no other knowledge to tell a torn or foreign value from a good one.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fbcache import DiskFullError, FBPool, StorageError
from tests.conftest import MakePool
from tests.faults import FaultyDisk

THREADS = 16
NAMES = 200
WORDS = 1_000  # of 8 bytes; with the head
LARGE_WORDS = 20_000  # these are mapped
HEAD = 3

#: Together the values take twenty times this.
BUDGET = (NAMES * 9 // 10 * WORDS + NAMES // 10 * LARGE_WORDS) * 8 // 20


def words(name: int) -> int:
    return LARGE_WORDS if name % 10 == 0 else WORDS


def write(value: np.ndarray[Any, Any], name: int, version: int) -> None:
    """Make ``value`` describe itself, not at once, so that a torn one shows."""
    seed = name * 1_000_003 + version
    value[0] = name
    value[HEAD:] = np.arange(seed, seed + len(value) - HEAD)
    value[1] = version
    value[2] = value[HEAD:].sum()


def make(name: int, version: int) -> np.ndarray[Any, Any]:
    value = np.empty(words(name), np.int64)
    write(value, name, version)
    return value


def verify(value: np.ndarray[Any, Any], name: int) -> int:
    """Return the version of a value, which must be whole."""
    version = int(value[1])
    assert value[0] == name
    assert len(value) == words(name)
    assert value[HEAD] == name * 1_000_003 + version
    assert value[2] == value[HEAD:].sum()
    return version


@pytest.fixture
def switches_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Crowd:
    """What the threads do, and what they have seen."""

    def __init__(self, pool: FBPool, operations: int, *, trouble: tuple[type[Exception], ...] = ()) -> None:
        self.pool = pool
        self.operations = operations
        self.trouble = trouble
        self.failed = threading.Event()
        self.reads = [0] * THREADS
        self.mutations = [0] * THREADS
        self.kept = [deque[Any](maxlen=5) for _ in range(THREADS)]

    def run(self) -> None:
        for name in range(NAMES):
            self.attempt(self.pool.put, name, make(name, 0))
        start = threading.Barrier(THREADS)

        def work(number: int) -> None:
            start.wait()
            try:
                self.asynchronous(number) if number == 0 else self.threaded(number)
            except BaseException:
                self.failed.set()
                raise

        with ThreadPoolExecutor(THREADS) as executor:
            for future in [executor.submit(work, number) for number in range(THREADS)]:
                future.result()

    def attempt(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except self.trouble:
            return None

    def threaded(self, number: int) -> None:
        rng = random.Random(number)
        acts = [
            self.read,
            self.mutate,
            self.replace,
            self.delete,
            self.churn,
            self.look,
            self.keep,
            self.push,
        ]
        weights = [40, 20, 10, 4, 8, 10, 6, 2]
        for _ in range(self.operations):
            if self.failed.is_set():
                return
            act = rng.choices(acts, weights)[0]
            try:
                act(number, rng.randrange(NAMES), rng)
            except (KeyError, *self.trouble):
                pass  # deleted by another, or changing it would outrun the failing disk

    def read(self, number: int, name: int, rng: random.Random) -> None:
        with self.pool.get(name) as value:
            first = verify(value, name)
            assert verify(value, name) == first, "it changed under a read guard"
            self.reads[number] += 1

    def look(self, number: int, name: int, rng: random.Random) -> None:
        guard = self.pool.try_get(name)
        if guard is not None:
            with guard as value:
                verify(value, name)
                self.reads[number] += 1

    def keep(self, number: int, name: int, rng: random.Random) -> None:
        """A value that is not pinned and outlives its eviction."""
        self.kept[number].append(self.pool[name])

    def mutate(self, number: int, name: int, rng: random.Random) -> None:
        fails = rng.random() < 0.2
        try:
            with self.pool.get_mut(name, rollback=fails) as value:
                version = verify(value, name)
                write(value, name, version + 1)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        self.mutations[number] += 1

    def replace(self, number: int, name: int, rng: random.Random) -> None:
        self.attempt(self.pool.put, name, make(name, rng.randrange(1 << 20)))

    def delete(self, number: int, name: int, rng: random.Random) -> None:
        if rng.random() < 0.5:
            verify(self.pool.pop(name), name)
        else:
            del self.pool[name]
        self.attempt(self.pool.put, name, make(name, 0))

    def churn(self, number: int, name: int, rng: random.Random) -> None:
        """Handles, shared and parted, dropped and forgotten."""
        fb = self.attempt(self.pool.insert, make(name, 5))
        if fb is None:
            return
        other = fb.clone()
        if rng.random() < 0.5:
            self.attempt(fb.write_now)
        with fb.make_mut() as value:
            write(value, name, 6)
        with other.load() as value:
            assert verify(value, name) == 5
        other.drop()
        with fb.load() as value:
            assert verify(value, name) == 6
        if rng.random() < 0.5:
            fb.drop()

    def push(self, number: int, name: int, rng: random.Random) -> None:
        self.attempt(self.pool.evict, None if rng.random() < 0.1 else [name])
        self.pool.stats()
        self.pool.validate()

    def asynchronous(self, number: int) -> None:
        asyncio.run(self.tasks(number))

    async def tasks(self, number: int) -> None:
        async with asyncio.TaskGroup() as group:
            for task in range(4):
                group.create_task(self.task(number, random.Random(1_000 + task)))

    async def task(self, number: int, rng: random.Random) -> None:
        for _ in range(self.operations // 4):
            if self.failed.is_set():
                return
            name = rng.randrange(NAMES)
            try:
                if rng.random() < 0.7:
                    async with self.pool.get(name) as value:
                        version = verify(value, name)
                        await asyncio.sleep(0)
                        assert verify(value, name) == version
                        self.reads[number] += 1
                elif rng.random() < 0.8:
                    async with self.pool.get_mut(name) as value:
                        version = verify(value, name)
                        await asyncio.sleep(0)
                        write(value, name, version + 1)
                    self.mutations[number] += 1
                else:
                    await self.cancelled(name)
            except (KeyError, *self.trouble):
                pass

    async def cancelled(self, name: int) -> None:
        async def enter() -> None:
            async with self.pool.get(name) as value:
                verify(value, name)

        task = asyncio.create_task(enter())
        await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass


def settle(pool: FBPool, crowd: Crowd) -> None:
    """Whatever happened, the pool is whole and its figures add up."""
    for values in crowd.kept:
        values.clear()
    gc.collect()  # handles in the frames of errors
    pool.drain()
    pool.validate()
    stats = pool.stats()
    assert stats.pinned_bytes == 0, "a guard was left behind"
    assert stats.entries == stats.named == len(pool), "an entry was left behind"
    assert stats.resident_bytes <= stats.budget
    assert stats.hits + stats.misses >= sum(crowd.reads) + sum(crowd.mutations)
    assert stats.loads <= stats.misses
    assert stats.clean_evictions <= stats.evictions
    assert stats.writing_bytes == 0
    for name in pool:
        with pool.get(name) as value:
            verify(value, name)
    pool.evict()
    pool.drain()
    stats = pool.stats()
    assert stats.resident_bytes == 0
    assert stats.spilled_bytes >= sum(8 * words(name) for name in pool)
    assert stats.disk_bytes == sum(token.nbytes for token in _tokens(pool)), "a blob was left behind"
    pool.validate()


def _tokens(pool: FBPool) -> set[Any]:
    return {entry.token for entry in pool._engine.residency.entries}


def operations(soak: bool) -> int:
    return 20_000 if soak else 300


@pytest.mark.files
@pytest.mark.parametrize("policy", ["lru", "lfu", "rr"])
def test_a_crowd_sees_only_whole_values(make_pool: MakePool, soak: bool, policy: str) -> None:
    pool = make_pool(BUDGET, policy=policy)
    crowd = Crowd(pool, operations(soak))
    crowd.run()
    assert pool.stats().errors == 0
    settle(pool, crowd)


@pytest.mark.files
@pytest.mark.usefixtures("switches_often")
@pytest.mark.parametrize("options", [{"io_threads": 1}, {"mmap": False, "verify": "always"}], ids=str)
def test_a_crowd_that_switches_often_sees_only_whole_values(
    make_pool: MakePool, soak: bool, options: dict[str, Any]
) -> None:
    pool = make_pool(BUDGET, **options)
    crowd = Crowd(pool, operations(soak))
    crowd.run()
    assert pool.stats().errors == 0
    settle(pool, crowd)


class Moody(threading.Thread):
    """Takes the disk away and gives it back, as the crowd goes on."""

    def __init__(self, disk: FaultyDisk) -> None:
        super().__init__()
        self.ended = threading.Event()
        self._disk = disk

    def run(self) -> None:
        rng = random.Random(0)
        while not self.ended.is_set():
            # Paced by the disk's own log: no clock.
            before = self._disk.count("writev")
            self._disk.fail(
                rng.choice(["writev", "rename"]), error=OSError(28, "full"), nth=3, times=rng.choice([1, 5])
            )
            while self._disk.count("writev") < before + 20 and not self.ended.wait(0.001):
                pass
        self._disk.clear()


def test_a_crowd_on_a_failing_disk_loses_no_value(
    make_faulty_pool: Callable[..., tuple[FBPool, FaultyDisk]], soak: bool
) -> None:
    pool, disk = make_faulty_pool(BUDGET)
    crowd = Crowd(pool, operations(soak), trouble=(DiskFullError,))
    moody = Moody(disk)
    moody.start()
    try:
        crowd.run()
    finally:
        moody.ended.set()
        moody.join()
    assert pool.stats().errors > 0
    try:
        pool.drain()
    except StorageError:
        pass
    pool.evict()
    settle(pool, crowd)
