"""Who is evicted first."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import cachetools
import numpy as np
import pytest

from fbcache import FBPool, State, StorageError
from fbcache.lru import Node, TwoSegmentLRU, make_policy
from tests.conftest import MakePool
from tests.faults import FaultyDisk, oserror

SIZE = 1_000
BUDGET = 100 * SIZE  # with a headroom of twelve values
COUNT = 80


def content(number: int, nbytes: int = SIZE) -> np.ndarray[Any, Any]:
    return np.full(nbytes, number % 251, np.uint8)


def fill(pool: FBPool, count: int = COUNT) -> None:
    for number in range(count):
        pool.put(number, content(number), nbytes=SIZE)


def use(pool: FBPool, *names: Any) -> None:
    for name in names:
        with pool.get(name):
            pass


def in_memory(pool: FBPool) -> set[Any]:
    return {e.name for e in pool._engine.residency.entries if e.state not in (State.SPILLED, State.LOADING)}


def evicted(pool: FBPool, count: int) -> list[Any]:
    """The next ones to leave, in order; they do."""
    order = []
    for _ in range(count):
        before = in_memory(pool)
        assert pool.evict(nbytes=1) == SIZE
        order += before - in_memory(pool)
        pool.validate()
    return order


# ----------------------------------------------------------------------- two segments


def nodes(*sizes: int) -> list[Node]:
    return [Node(size) for size in sizes]


def test_a_hit_in_the_front_half_moves_nothing(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool)
    before = list(pool._engine.residency.policy)
    use(pool, *range(COUNT - 50, COUNT))  # half of the budget, newest first
    assert list(pool._engine.residency.policy) == before
    assert evicted(pool, 4) == [0, 1, 2, 3]


def test_a_hit_in_the_back_half_moves_to_the_front(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool)
    use(pool, 2, 0)
    assert evicted(pool, 4) == [1, 3, 4, 5]
    order = [entry.name for entry in pool._engine.residency.policy]
    assert order[-2:] == [2, 0]


@pytest.mark.parametrize("access", ["get", "get_mut", "pool[]", "try_get", "try_get_mut", "key", "handle"])
def test_every_kind_of_access_counts_as_use(make_pool: MakePool, access: str) -> None:
    pool = make_pool(BUDGET)
    fb = pool.put("x", content(1), nbytes=SIZE)
    fill(pool)
    if access == "pool[]":
        pool["x"]
    else:
        guard = {
            "get": lambda: pool.get("x"),
            "get_mut": lambda: pool.get_mut("x"),
            "try_get": lambda: pool.try_get("x"),
            "try_get_mut": lambda: pool.try_get_mut("x"),
            "key": lambda: pool.get(fb.key),
            "handle": fb.load,
        }[access]()
        with guard:
            pass
    assert evicted(pool, 3) == [0, 1, 2]


def test_what_does_not_touch_the_value_does_not_count_as_use(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fb = pool.put("x", content(1), nbytes=SIZE)
    fill(pool)
    assert "x" in pool
    repr(fb)
    repr(pool.get("x"))
    assert fb.key
    assert fb.nbytes == SIZE
    fb.write_now()
    pool.stats()
    assert evicted(pool, 1) == ["x"]


class Late:
    """A lock that is taken only after something else has happened."""

    def __init__(self, pool: FBPool, first: Callable[[], None]) -> None:
        self._residency = pool._engine.residency
        self._lock = self._residency.lock
        self._first = first
        self._residency.lock = self

    def __enter__(self) -> Any:
        self._residency.lock = self._lock
        self._first()
        return self._lock.__enter__()

    def __exit__(self, *exception: Any) -> Any:
        return self._lock.__exit__(*exception)


def test_two_hits_at_once_on_a_value_of_the_back_half_move_it_once(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool)
    Late(pool, lambda: use(pool, 0))
    assert (pool[0] == 0).all()
    pool.validate()
    assert evicted(pool, 3) == [1, 2, 3]
    assert pool.evict() == (COUNT - 3) * SIZE


def assert_evicted(pool: FBPool, name: Any) -> None:
    assert pool.evict([name]) == SIZE


def test_a_hit_as_the_value_leaves_does_no_harm(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool)
    Late(pool, lambda: assert_evicted(pool, 0))
    assert (pool[0] == 0).all()
    pool.validate()
    assert pool.evict() == (COUNT - 1) * SIZE


def test_a_value_whose_write_failed_is_the_next_to_leave_again(
    make_faulty_pool: Callable[..., tuple[FBPool, FaultyDisk]],
) -> None:
    pool, disk = make_faulty_pool(BUDGET)
    fill(pool)
    disk.fail("writev", error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        pool.evict(nbytes=1)
    assert evicted(pool, 3) == [0, 1, 2]


def test_new_and_loaded_values_enter_at_the_front(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    fill(pool)
    assert evicted(pool, 3) == [0, 1, 2]
    use(pool, 1)
    pool.put("new", content(1), nbytes=SIZE)
    order = [entry.name for entry in pool._engine.residency.policy]
    assert order[-2:] == [1, "new"]


def test_the_segments_split_by_bytes_and_not_by_count() -> None:
    policy: TwoSegmentLRU[Node] = TwoSegmentLRU(100)
    large, *small = nodes(45, *[1] * 10)
    for node in (large, *small):
        policy.add(node)
    assert list(policy.back) == [large]
    assert policy.front.nbytes == 10
    policy.touch(large)
    assert next(iter(policy.front)) is large
    assert policy.back.nbytes == 5
    assert policy.front.nbytes == 50
    policy.resize(20)
    assert list(policy.front) == [large], "at least one is in front"
    assert policy.back.count == 10


def test_chance_and_a_list_agree_on_the_two_segments() -> None:
    """The back half's hits move; the rest is a queue."""
    rng = random.Random(0)
    policy: TwoSegmentLRU[Node] = TwoSegmentLRU(1_000)
    model: list[Node] = []  # front to back
    fronts: list[Node] = []
    for _ in range(5_000):
        act = rng.random()
        if act < 0.4 or not model:
            node = Node(rng.randrange(200))
            policy.add(node)
            model.insert(0, node)
        elif act < 0.8:
            node = rng.choice(model)
            if node.order is not policy.front:
                policy.touch(node)
                model.remove(node)
                model.insert(0, node)
        elif act < 0.9:
            node = rng.choice(model)
            assert node.order is not None
            node.order.remove(node)
            model.remove(node)
        else:
            assert policy.victim() is model.pop()
        fronts, backs = list(policy.front), list(policy.back)
        assert fronts + backs == model
        assert policy.front.nbytes == sum(node.nbytes for node in fronts)
        assert policy.back.nbytes == sum(node.nbytes for node in backs)
        assert policy.front.nbytes <= 500 or len(fronts) == 1
    assert len(model) > 10


# ---------------------------------------------------------------------- cachetools' orders


@pytest.mark.parametrize("policy", ["lfu", cachetools.LFUCache], ids=str)
def test_lfu_evicts_what_was_used_least(make_pool: MakePool, policy: Any) -> None:
    pool = make_pool(BUDGET, policy=policy)
    fill(pool, 6)
    use(pool, *[0] * 5, *[1] * 4, *[2] * 3, *[5] * 2, 3)
    assert evicted(pool, 6) == [4, 3, 5, 2, 1, 0]


@pytest.mark.parametrize("policy", ["fifo", cachetools.FIFOCache], ids=str)
def test_fifo_evicts_in_the_order_of_coming(make_pool: MakePool, policy: Any) -> None:
    pool = make_pool(BUDGET, policy=policy)
    fill(pool, 6)
    use(pool, 0, 0, 1, 2)
    assert evicted(pool, 6) == [0, 1, 2, 3, 4, 5]


def test_cachetools_lru_evicts_what_was_used_longest_ago(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET, policy=cachetools.LRUCache)
    fill(pool, 6)
    use(pool, 1, 0, 5, 1)
    assert evicted(pool, 6) == [2, 3, 4, 0, 5, 1]


@pytest.mark.parametrize("policy", ["rr", cachetools.RRCache], ids=str)
def test_rr_evicts_each_in_its_turn_by_chance(make_pool: MakePool, policy: Any) -> None:
    pool = make_pool(BUDGET, policy=policy)
    fill(pool, 50)
    assert sorted(evicted(pool, 50)) == list(range(50))


def test_a_subclass_with_an_order_of_its_own_is_obeyed(make_pool: MakePool) -> None:
    class LastInFirstOut(cachetools.Cache):  # type: ignore[type-arg]
        def popitem(self) -> Any:
            key = list(self)[-1]
            return key, self.pop(key)

    pool = make_pool(BUDGET, policy=LastInFirstOut)
    fill(pool, 6)
    assert evicted(pool, 6) == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "rr", cachetools.LRUCache], ids=str)
def test_under_pressure_the_policy_chooses_pinned_are_skipped_and_nothing_is_lost(
    make_pool: MakePool, policy: Any
) -> None:
    pool = make_pool(BUDGET, policy=policy, io_threads=1)
    fill(pool, 20)
    guards = [pool.get(number) for number in (0, 7, 13)]
    for guard in guards:
        guard.__enter__()
    pool.get_mut(3)
    writing = pool.get_mut(4)
    writing.__enter__()
    for number in range(20, 400):
        pool.put(number, content(number), nbytes=SIZE)
        pool.validate()
    assert {0, 7, 13, 4} <= in_memory(pool)
    pool.evict()
    assert in_memory(pool) == {0, 7, 13, 4}
    for guard in guards:
        guard.__exit__(None, None, None)
    writing.__exit__(None, None, None)
    pool.evict()
    assert in_memory(pool) == set()
    assert all((pool[number] == number % 251).all() for number in range(400))
    pool.validate()


def test_under_pressure_fifo_keeps_the_newest(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET, policy="fifo", io_threads=1)
    for number in range(300):
        pool.put(number, content(number), nbytes=SIZE)
        use(pool, number)
        with pool.get(number // 2):
            pass
    pool.drain()
    assert 299 in in_memory(pool)


def test_under_pressure_lfu_keeps_what_is_used_most(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET, policy="lfu", io_threads=1)
    fill(pool, 10)
    for _ in range(20):
        use(pool, 3, 5)
    for number in range(100, 400):
        pool.put(number, content(number), nbytes=SIZE)
    assert {3, 5} <= in_memory(pool)


def test_a_hit_on_a_value_that_is_to_leave_brings_it_back(make_pool: MakePool) -> None:
    """Also one that is clean already, ahead of need."""
    pool = make_pool(BUDGET, io_threads=1)
    fill(pool, 95)
    pool.drain()
    assert pool.stats().spills > 0
    use(pool, 0)
    for number in range(95, 105):
        pool.put(number, content(number), nbytes=SIZE)
    assert 0 in in_memory(pool)
    assert 1 not in in_memory(pool)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("policy", [cachetools.TTLCache, cachetools.TLRUCache])
def test_a_policy_that_expires_by_time_is_refused_with_the_reason(
    make_pool: MakePool, policy: Any, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="never drops"):
        make_pool(BUDGET, policy=policy)
    with pytest.raises(ValueError, match="expires"):
        make_policy(type("Mine", (policy,), {}), BUDGET)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [], "a pool that was refused has left its session"


@pytest.mark.parametrize("policy", ["LRU", "mru", "", "ttl"])
def test_an_unknown_policy_is_refused_with_those_that_there_are(make_pool: MakePool, policy: str) -> None:
    with pytest.raises(ValueError, match="'lfu'"):
        make_pool(BUDGET, policy=policy)


@pytest.mark.parametrize("policy", [None, 3, dict, cachetools.LRUCache(10), Counter])
def test_what_is_no_policy_is_refused(make_pool: MakePool, policy: Any) -> None:
    with pytest.raises(TypeError, match="policy"):
        make_pool(BUDGET, policy=policy)
