"""FBPool(debug=True): a change without a write guard does not go unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import Fb, FBCacheWarning, FBPool, MutatedError, State, WriteGuard
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


# -------------------------------------------------------------------------------- write guards


def enter(guard: WriteGuard) -> Any:
    with guard as value:
        return value


def enter_async(guard: WriteGuard) -> Any:
    async def run() -> Any:
        async with guard as value:
            return value

    return asyncio.run(run())


WAYS: dict[str, Callable[[FBPool, Fb], Any]] = {
    "get_mut": lambda pool, fb: enter(pool.get_mut("x")),
    "rollback": lambda pool, fb: enter(pool.get_mut("x", rollback=True)),
    "load_mut": lambda pool, fb: enter(fb.load_mut()),
    "make_mut": lambda pool, fb: enter(fb.make_mut()),  # shared with the name: it copies
    "async": lambda pool, fb: enter_async(pool.get_mut("x")),
    "async rollback": lambda pool, fb: enter_async(pool.get_mut("x", rollback=True)),
    "try_get_mut": lambda pool, fb: pool.try_get_mut("x"),
    "try_load_mut": lambda pool, fb: fb.try_load_mut(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_write_guard_does_not_take_a_readers_change_for_its_own(pool: FBPool, way: str) -> None:
    mine = {"a": 1}
    fb = pool.put("x", mine)
    key = fb.key
    mine["a"] = 2
    told = r"'x', a dict, was changed outside of any guard.*was not entered.*`pool\['x'\] = value` replaces"
    with pytest.raises(MutatedError, match=told) as caught:
        WAYS[way](pool, fb)
    assert caught.value.name == "x"
    pool.validate()
    assert fb.key == key and fb.state is State.RESIDENT and pool.stats().pinned_bytes == 0
    assert pool["x"] == {"a": 2}
    with pool.get("x") as value:  # told once
        assert value == {"a": 2}
    with pool.get_mut("x") as value:
        value["b"] = 3
    assert pool["x"] == {"a": 2, "b": 3} and fb.key != key


@pytest.mark.parametrize("way", WAYS)
def test_a_write_guard_enters_what_nobody_has_changed(pool: FBPool, way: str) -> None:
    fb = pool.put("x", {"a": np.arange(3)})
    for _ in range(2):
        WAYS[way](pool, fb)
        pool.validate()
    assert pool["x"]["a"].tolist() == [0, 1, 2]


def test_a_write_guard_of_a_view_of_its_file_tells_of_the_change_before_it_reads_anew(pool: FBPool) -> None:
    pool["x"] = [np.zeros(50_000), 1]
    pool.evict()
    with pool.get("x"):
        pass
    pool["x"].append(2)
    with pytest.raises(MutatedError):
        enter(pool.get_mut("x"))
    assert len(pool["x"]) == 3
    with pool.get_mut("x") as value:
        assert len(value) == 2


def test_a_guard_that_found_a_change_can_be_entered_again(pool: FBPool) -> None:
    mine = [1]
    pool["x"] = mine
    guard = pool.get_mut("x")
    for length in (2, 3):
        mine.append(length)
        with pytest.raises(MutatedError):
            guard.__enter__()
        assert not guard.held
        with guard as value:
            assert len(value) == length
        with pool.get("x"):
            pass


def test_what_was_changed_can_be_replaced(pool: FBPool) -> None:
    mine = [1]
    pool["x"] = mine
    mine.append(2)
    with pytest.raises(MutatedError):
        enter(pool.get_mut("x"))
    pool["x"] = [5]
    with pool.get_mut("x") as value:
        assert value == [5]


# ------------------------------------------------------------------------------------- writing


def change(pool: FBPool) -> Fb:
    mine = [1]
    fb = pool.put("x", mine)
    mine.append(2)
    return fb


WRITES: dict[str, Callable[[FBPool, Fb, Path], Any]] = {
    "evict": lambda pool, fb, path: pool.evict(),
    "evict by name": lambda pool, fb, path: pool.evict(["x"]),
    "write_now": lambda pool, fb, path: fb.write_now(),
    "spawn_write_now": lambda pool, fb, path: fb.spawn_write_now().result(30),
    "persist": lambda pool, fb, path: pool.persist("x", path),
    "save": lambda pool, fb, path: pool.save(path),
}


@pytest.mark.parametrize("way", WRITES)
def test_what_was_changed_is_not_written(pool: FBPool, tmp_path: Path, way: str) -> None:
    fb = change(pool)
    with pytest.raises(MutatedError, match=r"'x', a list, was changed.*was not written.*replaces") as caught:
        WRITES[way](pool, fb, tmp_path / "tracked")
    assert caught.value.name == "x"
    pool.validate()
    pool.drain()  # it was said already
    assert fb.state is State.RESIDENT and pool.stats().disk_bytes == 0
    with pytest.raises(MutatedError, match="was not entered"):
        enter(pool.get_mut("x"))
    WRITES[way](pool, fb, tmp_path / "tracked")
    pool.evict()
    with pool.get("x") as value:
        assert value == [1, 2]


def test_what_was_changed_is_written_by_itself_again_once_a_guard_has_told(pool: FBPool) -> None:
    fb = change(pool)
    with pytest.raises(MutatedError):
        pool.evict()
    assert pool.evict() == 0
    with pytest.raises(MutatedError), pool.get("x"):
        pass
    assert pool.evict() > 0 and fb.state is State.SPILLED


def test_the_others_are_written(pool: FBPool) -> None:
    change(pool)
    for number in range(5):
        pool[number] = [number]
    with pytest.raises(MutatedError):
        pool.evict()
    assert pool.stats().spilled_bytes and all(pool[number] == [number] for number in range(5))
    with pytest.raises(MutatedError):
        pool.pop("x")
    assert pool.pop("x") == [1, 2]


def test_a_change_that_only_the_background_has_met_surfaces_once(make_pool: MakePool) -> None:
    pool = make_pool("10kB", debug=True)
    change(pool)
    for number in range(4):
        pool[number] = b"x" * 3000
    with pytest.raises(MutatedError, match="'x'"):
        for number in range(4, 100):
            pool.drain()
            pool[number] = b"x" * 3000
    pool.drain()
    pool.validate()


def test_a_change_that_nobody_was_told_of_is_a_warning_at_the_end() -> None:
    with pytest.warns(FBCacheWarning, match="MutatedError"), FBPool("10kB", debug=True) as pool:
        change(pool)
        for number in range(20):
            pool[number] = b"x" * 3000


def test_the_reader_who_changes_it_while_it_is_to_be_written_is_told_too(pool: FBPool) -> None:
    fb = pool.put("x", [1])
    with pytest.raises(MutatedError, match="within a read guard"), pool.get("x") as value:
        value.append(2)
        with pytest.raises(MutatedError, match="was not written"):
            fb.write_now()
    fb.write_now()
