"""FBPool(debug=True): a change without a write guard does not go unnoticed."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from fbcache import FBPool, MutatedError
from tests.conftest import MakePool


@pytest.fixture
def pool(make_pool: MakePool) -> FBPool:
    return make_pool("1MB", debug=True)


class Thing:
    def __init__(self, x: Any) -> None:
        self.x = x


def test_a_reader_that_changes_a_dict_is_told_by_name_at_the_end_of_its_block(pool: FBPool) -> None:
    pool["config"] = {"a": [1, 2]}
    told = r"'config', a dict, .*within a read guard.*get_mut\('config'\)"
    with pytest.raises(MutatedError, match=told) as caught:
        with pool.get("config") as value:
            value["a"].append(3)
    assert caught.value.name == "config"
    pool.validate()
    assert pool.stats().pinned_bytes == 0


def test_a_change_is_told_once(pool: FBPool) -> None:
    pool["x"] = [1]
    with pytest.raises(MutatedError), pool.get("x") as value:
        value.append(2)
    with pool.get("x") as value:
        assert value == [1, 2]


def test_who_put_a_value_and_changes_it_afterwards_is_told_by_the_next_guard(pool: FBPool) -> None:
    mine = {"a": 1}
    fb = pool.put("x", mine)
    mine["a"] = 2
    guard = pool.get("x")
    with pytest.raises(MutatedError, match="outside of any guard"):
        guard.__enter__()
    assert not guard.held
    with fb.load() as value:
        assert value == {"a": 2}


def test_a_reader_of_a_handle_and_try_get_are_watched_too(pool: FBPool) -> None:
    fb = pool.insert([1])
    with pytest.raises(MutatedError, match="an unnamed entry") as caught, fb.load() as value:
        value.append(2)
    assert caught.value.name is None
    held = fb.try_load()
    assert held is not None
    with pytest.raises(MutatedError), held as value:
        value.append(3)


def test_changes_through_a_write_guard_are_none_of_its_business(pool: FBPool) -> None:
    pool["x"] = {"a": 1}
    with pool.get_mut("x") as value:
        value["a"] = 2
    with pool.get("x") as value:
        assert value == {"a": 2}


def test_a_value_that_was_evicted_and_came_back_is_the_same(pool: FBPool) -> None:
    pool["x"] = {"a": np.arange(100.0).reshape(10, 10)[:, ::2], "b": [1, "two"]}
    for _ in range(2):
        pool.evict()
        with pool.get("x") as value:
            assert value["b"] == [1, "two"]
    with pytest.raises(MutatedError), pool.get("x") as value:
        value["b"] = 3


def test_objects_are_watched_by_their_pickle_and_what_has_none_is_let_be(pool: FBPool) -> None:
    pool["thing"] = Thing([1])
    with pytest.raises(MutatedError, match="a Thing"), pool.get("thing") as thing:
        thing.x.append(2)
    pool["odd"] = [lambda: None]
    with pool.get("odd") as odd:
        odd.append(1)


def test_the_error_of_the_block_comes_first_and_the_change_is_a_note(pool: FBPool) -> None:
    pool["x"] = [1]
    with pytest.raises(ZeroDivisionError) as caught, pool.get("x") as value:
        value.append(2)
        _ = 1 / 0
    assert any("was changed within" in note for note in caught.value.__notes__)


def test_tasks_are_watched_as_threads_are(pool: FBPool) -> None:
    pool["x"] = [1]

    async def change() -> None:
        async with pool.get("x") as value:
            value.append(2)

    with pytest.raises(MutatedError):
        asyncio.run(change())


def test_a_pool_without_debug_notes_nothing(make_pool: MakePool) -> None:
    pool = make_pool("1MB")
    pool["x"] = [1]
    with pool.get("x") as value:
        value.append(2)
    assert not pool._engine.residency.noted


def test_nothing_is_noted_of_what_is_gone_or_evicted(pool: FBPool) -> None:
    pool["x"] = [1]
    pool["y"] = [2]
    assert len(pool._engine.residency.noted) == 2
    del pool["x"]
    pool.evict()
    assert not pool._engine.residency.noted
