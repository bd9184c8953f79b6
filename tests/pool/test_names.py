"""Names and keys: the pool as a dict, what a `put` on a taken name does, and which keys still open."""

from __future__ import annotations

import contextlib
import enum
import errno
import random
from dataclasses import dataclass
from uuid import uuid4

import numpy as np
import pytest

from fbcache import PutTimeoutError, StaleKeyError, State, StorageError, keys
from tests.faults import oserror


def array(fill, nbytes=8_000):
    return np.full(nbytes // 8, fill, np.float64)


# ------------------------------------------------------------------ as a dict


def test_what_is_put_comes_back(pool):
    pool.put("a", array(1))
    pool["b"] = [1, "two", None]
    with pool.get("a") as value:
        assert np.array_equal(value, array(1))
    assert pool["b"] == [1, "two", None]


@pytest.mark.parametrize("value", [None, False, 0, "", (), 1.5, b"bytes", {"k": [1, (2,)]}])
def test_values_that_are_false_or_none_are_values(pool, value):
    pool["a"] = value
    assert pool["a"] == value and type(pool["a"]) is type(value)
    pool.evict(["a"])
    assert pool["a"] == value and type(pool["a"]) is type(value)
    with pool.get_mut("a") as inside:
        assert inside == value
    assert pool.pop("a") == value


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Tile:
    row: int
    column: int


@pytest.mark.parametrize(
    "name",
    ["a", "", 3, -1, 2.5, None, True, b"x", ("tile", 3, 4), frozenset({1}), Colour.RED, Tile(1, 2), str],
    ids=repr,
)
def test_any_hashable_is_a_name(pool, name):
    pool[name] = array(1)
    assert name in pool and pool.keys() == [name] and len(pool) == 1
    pool.evict([name])
    with pool.get_mut(name) as value:
        value += 1
    assert pool[name][0] == 2
    pool.validate()
    del pool[name]
    assert name not in pool


def test_nan_is_a_name_though_it_does_not_equal_itself(pool):
    nan = float("nan")
    pool[nan] = 1
    assert pool[nan] == 1
    pool.validate()


def test_names_that_are_equal_are_one_name(pool):
    pool[1] = "int"
    pool[1.0] = "float"
    pool[True] = "bool"
    assert len(pool) == 1 and pool[1] == "bool"
    pool.validate()


def test_in_finds_names_and_current_keys_and_nothing_else(pool):
    fb = pool.put("a", 1)
    assert "a" in pool and fb.key in pool
    assert "b" not in pool and uuid4() not in pool and None not in pool
    with pytest.raises(TypeError):
        pool.__contains__([])


def test_len_and_iteration_count_named_entries_only(pool):
    pool["a"] = 1
    fb = pool.insert(2)
    assert len(pool) == 1 and list(pool) == ["a"] and pool.keys() == ["a"]
    assert pool.stats().entries == 2 and pool.stats().named == 1
    fb.drop()


def test_names_come_in_the_order_of_their_first_put(pool):
    for name in "cab":
        pool[name] = name
    pool["a"] = "again"
    assert pool.keys() == ["c", "a", "b"]


def test_iteration_survives_changes_made_meanwhile(pool):
    for number in range(10):
        pool[number] = number
    for number in pool:
        del pool[number]
        pool[number + 100] = number
    assert len(pool) == 10 and min(pool) == 100


def test_delete_takes_the_name_and_the_value(pool):
    pool["a"] = array(1)
    pool["b"] = array(2)
    pool.delete("a")
    del pool["b"]
    assert pool.stats().entries == 0 and pool.stats().resident_bytes == 0
    with pytest.raises(KeyError):
        del pool["a"]


@pytest.mark.files
def test_delete_takes_the_file_too(pool, blob_files):
    pool["a"] = array(1)
    pool.evict()
    assert len(blob_files(pool)) == 1
    del pool["a"]
    pool.drain()
    assert blob_files(pool) == [] and pool.stats().disk_bytes == 0


def test_delete_leaves_the_value_to_its_handles(pool):
    fb = pool.put("a", array(1))
    del pool["a"]
    assert fb.name is None
    with fb.load() as value:
        assert value[0] == 1
    pool.validate()


def test_pop_removes_and_returns_a_value_that_stays_valid(pool):
    pool["a"] = array(1)
    value = pool.pop("a")
    assert "a" not in pool and pool.stats().entries == 0
    assert np.array_equal(value, array(1)) and not value.flags.writeable


def test_pop_loads_what_was_spilled_and_removes_its_file(pool, blob_files):
    pool["a"] = array(1)
    pool.evict()
    value = pool.pop("a")
    pool.drain()
    assert blob_files(pool) == []
    assert np.array_equal(value, array(1)), "the value outlives its file"


def test_pop_gives_its_default_and_raises_without_one(pool):
    assert pool.pop("a", None) is None
    assert pool.pop("a", 3) == 3
    with pytest.raises(KeyError, match="'a'"):
        pool.pop("a")


def test_pop_leaves_the_value_to_its_handles(pool):
    fb = pool.put("a", array(1))
    pool.pop("a")
    assert fb.name is None and fb.state is State.RESIDENT
    pool.validate()


def test_a_pop_that_cannot_load_keeps_the_name(make_faulty_pool):
    pool, disk = make_faulty_pool()
    pool["a"] = array(1)
    pool.evict()
    disk.fail("open", error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        pool.pop("a")
    assert "a" in pool
    pool.validate()
    assert pool.pop("a")[0] == 1


def test_a_random_walk_agrees_with_a_dict_under_a_small_budget(make_pool, soak):
    pool = make_pool("40KB")
    model = {}
    random_ = random.Random(7)
    for step in range(5_000 if soak else 800):
        name = random_.randrange(12)
        match random_.randrange(6):
            case 0 | 1:
                pool[name] = array(step)
                model[name] = step
            case 2:
                assert pool.pop(name, None) is None or model.pop(name) is not None
            case 3 if name in model:
                with pool.get_mut(name) as value:
                    value += 1
                model[name] += 1
            case _:
                assert (name in pool) == (name in model)
                if name in model:
                    assert (pool[name] == model[name]).all()
        assert pool.keys() == list(model)
    pool.validate()


# ------------------------------------------------------------------ put on a taken name


def test_put_on_a_taken_name_makes_a_new_entry_and_drops_the_former(pool, blob_files):
    first = pool.put("a", array(1))
    key = first.key
    first.drop()
    pool.evict()
    second = pool.put("a", array(2))
    pool.drain()
    assert second.key != key and pool["a"][0] == 2
    assert pool.stats().entries == 1 and blob_files(pool) == []
    with pytest.raises(KeyError):
        pool.get(key)


def test_handles_of_the_former_entry_keep_it(pool):
    first = pool.put("a", array(1))
    key = first.key
    second = pool.put("a", array(2))
    assert (first.name, second.name) == (None, "a")
    with first.load() as value:
        assert value[0] == 1
    assert pool.get(key).__enter__()[0] == 1
    assert pool["a"][0] == 2


def test_entered_guards_of_the_former_entry_keep_it_and_put_waits_for_none(pool):
    pool["a"] = array(1)
    with pool.get("a") as value:
        pool["a"] = array(2)  # would be a deadlock if it waited
        assert value[0] == 1 and pool["a"][0] == 2
        assert pool.stats().entries == 2
    assert pool.stats().entries == 1
    with pool.get_mut("a") as value:
        pool["a"] = array(3)
        value[0] = 5
    assert pool["a"][0] == 3 and pool.stats().entries == 1
    pool.validate()


def test_a_guard_not_yet_entered_follows_the_name(pool):
    pool["a"] = array(1)
    guard = pool.get("a")
    pool["a"] = array(2)
    with guard as value:
        assert value[0] == 2


def test_a_guard_whose_entry_was_deleted_is_a_keyerror_at_entry(pool):
    pool["a"] = array(1)
    guards = [pool.get("a"), pool.get_mut("a")]
    del pool["a"]
    for guard in guards:
        with pytest.raises(KeyError, match="'a'"):
            guard.__enter__()
    pool.validate()


def test_a_put_that_cannot_be_written_leaves_the_former_value(make_faulty_pool):
    pool, disk = make_faulty_pool("100KB")
    pool["a"] = array(1)
    pool["b"] = array(2, 80_000)
    disk.fail("writev", error=oserror(errno.ENOSPC), times=None)
    with pytest.raises(StorageError):
        pool["a"] = array(3, 90_000)
    with pytest.raises(StorageError):
        pool["a"] = array(3, 900_000)
    disk.clear()
    with contextlib.suppress(StorageError):  # of the other value that was to make room
        pool.drain()
    assert pool["a"][0] == 1 and pool.stats().entries == 2
    pool.validate()
    pool["a"] = array(4, 90_000)
    assert pool["a"][0] == 4


def test_a_put_that_times_out_leaves_the_former_value(make_faulty_pool):
    pool, disk = make_faulty_pool("100KB", put_timeout=0.01, io_threads=1)
    pool["a"] = array(1)
    pool["b"] = array(2, 85_000)
    gate = disk.gate("writev")
    with pytest.raises(PutTimeoutError):
        pool["a"] = array(3, 90_000)
    with pytest.raises(PutTimeoutError):
        pool["a"] = array(3, 900_000)
    assert pool["a"][0] == 1
    gate.open()
    pool.drain()
    assert pool["a"][0] == 1 and pool.stats().entries == 2
    pool.validate()


# ------------------------------------------------------------------ keys


def test_a_current_key_opens_its_entry(pool):
    fb = pool.put("a", array(1))
    with pool.get(fb.key) as value:
        assert value[0] == 1
    with pool.get_mut(fb.key) as value:
        value[0] = 2
    assert pool[fb.key][0] == 2
    assert pool.try_get(fb.key).value[0] == 2
    unnamed = pool.insert(array(3))
    assert pool[unnamed.key][0] == 3


def test_a_key_stays_while_the_value_moves_between_memory_and_disk(pool):
    fb = pool.put("a", array(1))
    key = fb.key
    pool.evict()
    assert fb.key == key and pool[key][0] == 1 and fb.key == key


def test_a_replaced_key_is_stale_and_an_unknown_one_is_a_plain_keyerror(pool):
    fb = pool.put("a", array(1))
    key = fb.key
    with pool.get_mut("a"):
        pass
    for call in (pool.get, pool.get_mut, pool.try_get, pool.try_get_mut, pool.__getitem__):
        with pytest.raises(StaleKeyError, match=str(key)):
            call(key)
    assert key not in pool
    with pytest.raises(KeyError) as caught:
        pool.get(uuid4())
    assert type(caught.value) is KeyError


@pytest.mark.patches
def test_the_memory_of_replaced_keys_is_bounded(pool, monkeypatch):
    monkeypatch.setattr(keys, "REMEMBERED", 3)
    fb = pool.put("a", 0)
    stale = []
    for number in range(5):
        stale.append(fb.key)
        with pool.get_mut("a") as _:
            fb.pool.memory
        assert pool["a"] == 0, number
    for key in stale[:2]:
        with pytest.raises(KeyError) as caught:
            pool.get(key)
        assert type(caught.value) is KeyError
    for key in stale[2:]:
        with pytest.raises(StaleKeyError):
            pool.get(key)


def test_the_key_of_a_dropped_entry_is_a_plain_keyerror(pool):
    fb = pool.put("a", 0)
    key = fb.key
    del pool["a"]
    fb.drop()
    with pytest.raises(KeyError) as caught:
        pool.get(key)
    assert type(caught.value) is KeyError


def test_keys_are_not_names_to_delete(pool):
    fb = pool.put("a", 0)
    with pytest.raises(KeyError):
        pool.delete(fb.key)
    with pytest.raises(KeyError):
        pool.pop(fb.key)
    assert pool.pop(fb.key, 5) == 5
    assert pool["a"] == 0


# ------------------------------------------------------------------ unknown names


@pytest.mark.parametrize(
    "call", ["get", "get_mut", "try_get", "try_get_mut", "pop", "delete", "__getitem__", "evict"]
)
def test_an_unknown_name_is_a_keyerror_at_the_call_and_names_the_nearest(pool, call):
    pool["training"] = 1
    pool["test"] = 2
    name = ["trainig"] if call == "evict" else "trainig"
    with pytest.raises(KeyError, match=r"'trainig'.*did you mean 'training'"):
        getattr(pool, call)(name)


def test_nothing_is_guessed_where_nothing_is_near(pool):
    pool["training"] = pool[("tile", 1)] = 1
    for name in ("zzz", ("tile", 2), 5):
        with pytest.raises(KeyError) as caught:
            pool.get(name)
        assert repr(name) in str(caught.value) and "did you mean" not in str(caught.value)


def test_a_subclass_of_str_and_names_that_are_no_text_do_not_break_the_guess(pool):
    pool[("a", 1)] = pool[3] = pool["alpha"] = 1
    with pytest.raises(KeyError, match="'alpha'"):
        pool.get("alpa")
