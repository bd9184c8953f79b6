"""``pool.restore``, ``register`` and ``from_checkpoint``: what comes back, how, and what it leaves alone."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgpack
import numpy as np
import pytest

from fbcache import (
    CheckpointNotFoundError,
    CorruptBlobError,
    FBPool,
    NameTakenError,
    PickleRefusedError,
    PoolClosedError,
    TrackedDirectory,
)
from fbcache.checkpoint import saver as saver_module
from fbcache.checkpoint.registry import directory_at
from fbcache.codec import Frames, tags
from fbcache.codec.layout import pack
from tests.directories import blob_of, blobs_in, flip, large, map_of, replaced, sessions_in, versions_on

HIT: list[object] = []


def go_off():
    HIT.append("bang")


class Bomb:
    """Tells when its pickle is loaded."""

    def __reduce__(self):
        return go_off, ()


@pytest.fixture(autouse=True)
def _nothing_went_off():
    HIT.clear()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


@pytest.fixture
def saved(target: Path, make_pool) -> Callable[..., dict]:
    """``saved(values, **how)``: a checkpoint by a pool that is no more; the keys by name."""

    def save(values: dict[Any, Any], **how: Any) -> dict[Any, Any]:
        with make_pool("50MB") as pool:
            for name, value in values.items():
                pool[name] = value
            pool.save(target, **how)
        with TrackedDirectory(target, readonly=True) as tracked:
            manifest = tracked._directory.versions.read(versions_on(target)[-1])
        return dict(zip(manifest.names, manifest.keys, strict=True))

    return save


# ------------------------------------------------------------------ which checkpoint


@pytest.fixture
def clock(monkeypatch):
    """A clock that the saver goes by."""

    class Clock:
        now = 1_700_000_000.0

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(saver_module, "time", clock)
    return clock


def test_before_takes_aware_and_naive_times_and_seconds_and_includes_its_own_moment(
    pool, target, saved, clock, monkeypatch
):
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        for number in (1, 2, 3):
            clock.now = 1_700_000_000.0 + 100 * number
            saved({"x": number}, keep=None)
        at_two = datetime.fromtimestamp(1_700_000_200, UTC)
        kolkata = timezone(timedelta(hours=5, minutes=30))
        naive = at_two.astimezone(kolkata).replace(tzinfo=None)
        for moment in (at_two, at_two.astimezone(kolkata), naive, 1_700_000_200, 1_700_000_299.5):
            assert pool.restore(target, before=moment, replace=True).version == 2
            assert pool["x"] == 2
        second = timedelta(seconds=1)
        for moment in (at_two - second, naive - second, 1_700_000_199.999):
            assert pool.restore(target, before=moment, replace=True).version == 1
        assert pool.restore(target, before=float("inf"), replace=True).version == 3
        for moment in (0, -1e30, datetime(1980, 1, 1), datetime(1, 1, 1, tzinfo=UTC)):
            with pytest.raises(CheckpointNotFoundError, match="or earlier"):
                pool.restore(target, before=moment, replace=True)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("now", [1_700_000_000.123456789, 1_700_000_000.9999996, 1_712_345_678.0000007])
def test_a_checkpoints_own_time_finds_it_although_it_is_rounded(pool, target, saved, clock, now):
    clock.now = now
    saved({"x": 1})
    with TrackedDirectory(target, readonly=True) as tracked:
        (checkpoint,) = tracked.checkpoints()
    assert pool.restore(target, before=checkpoint.created).version == 1
    assert pool.restore(target, before=checkpoint.created.timestamp(), replace=True).version == 1
    with pytest.raises(CheckpointNotFoundError):
        pool.restore(target, before=checkpoint.created - timedelta(microseconds=1), replace=True)


def test_the_newest_version_counts_even_if_the_clock_went_back(pool, target, saved, clock):
    saved({"x": 1}, keep=None)
    clock.now -= 3600
    saved({"x": 2}, keep=None)
    assert pool.restore(target).version == 2
    assert pool.restore(target, before=1_700_000_000, replace=True).version == 2


def test_version_tag_and_names_choose(pool, target, saved):
    saved({"x": 1, "y": 1}, tag="first")
    saved({"x": 2, "y": 2}, keep=None)
    checkpoint = pool.restore(target, ["y", "y"], tag="first")
    assert checkpoint.names == ("x", "y") and pool.keys() == ["y"] and pool["y"] == 1
    assert pool.restore(target, version=np.int64(1), names=["x"]).version == 1
    assert pool.restore(target, [], version=2).version == 2
    assert {name: pool[name] for name in pool} == {"x": 1, "y": 1}


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"version": 2}, "no version 2; its newest versions are 1"),
        ({"version": 0}, "no version 0"),
        ({"version": -1}, "no version -1"),
        ({"tag": "best"}, "none tagged 'best'"),
        ({"before": 5}, "none from 5 or earlier"),
    ],
    ids=str,
)
def test_an_unknown_checkpoint_says_what_there_is_and_changes_nothing(pool, target, saved, choice, says):
    saved({"x": 1}, tag="worst")
    with pytest.raises(CheckpointNotFoundError, match=says) as caught:
        pool.restore(target, **choice)
    assert str(target) in str(caught.value) and isinstance(caught.value, KeyError)
    assert len(pool) == 0 and sessions_in(target) == []


def test_where_there_is_no_checkpoint_nothing_is_made(pool, target):
    with pytest.raises(CheckpointNotFoundError, match="none at all"):
        pool.restore(target)
    assert not target.exists()
    target.mkdir()
    with pytest.raises(CheckpointNotFoundError, match="none at all"):
        pool.restore(target)
    assert list(target.iterdir()) == []


def test_an_unknown_name_brings_none_of_the_others(pool, target, saved):
    saved({"x": 1, "y": 2})
    with pytest.raises(KeyError, match=r"no entry named 'z'"):
        pool.restore(target, ["x", "z"])
    assert len(pool) == 0 and sessions_in(target) == []
    pool.validate()


# ------------------------------------------------------------------ into the pool


def test_taken_names_change_nothing_unless_replace(pool, target, saved):
    saved({"x": [1], "y": [1]})
    pool["y"] = "mine"
    with pytest.raises(NameTakenError, match=r"'y'.*replace=True"):
        pool.restore(target)
    assert pool.keys() == ["y"] and pool["y"] == "mine" and sessions_in(target) == []
    pool.restore(target, ["x"])
    pool.delete("x")
    with pool.get("y") as held:
        pool.restore(target, replace=True)
        assert held == "mine"
    assert pool["x"] == [1] and pool["y"] == [1]
    pool.validate()


def test_replacing_leaves_handles_with_the_former_content(pool, target, saved):
    saved({"x": [1]})
    fb = pool.put("x", "mine")
    pool.restore(target, replace=True)
    with fb.load() as value:
        assert value == "mine"
    with pool.get("x") as value:
        assert value == [1]
    fb.drop()
    pool.validate()


def test_nothing_is_loaded_before_it_is_touched_and_then_only_that(pool, target, saved):
    saved({number: np.full(100, number) for number in range(20)})
    pool.restore(target)
    assert pool.stats().loads == 0 and pool.stats().resident_bytes == 0
    assert pool[7][0] == 7 and pool.stats().loads == 1


def test_restored_entries_can_be_changed_and_the_checkpoint_stays(pool, target, saved, make_pool):
    saved({"x": np.zeros(100)})
    before = {path: path.read_bytes() for path in target.glob("??/*")}
    pool.restore(target)
    with pool.get_mut("x") as x:
        x[:] = 1
    assert pool["x"].sum() == 100
    pool.evict()
    other = make_pool()
    other.restore(target)
    assert other["x"].sum() == 0
    assert {path: path.read_bytes() for path in target.glob("??/*")} == before


def test_dropping_and_evicting_restored_entries_touches_no_file_of_the_directory(pool, target, saved):
    """Invariant 13: the pool's own deletions are of its own files."""
    saved({"x": large(1), "y": 2})
    before = blobs_in(target)
    pool.restore(target)
    pool["x"], pool["y"]
    pool.evict()
    pool.delete("x")
    del pool["y"]
    pool.drain()
    assert blobs_in(target) == before and sessions_in(target) == []


def test_two_restores_of_one_checkpoint_share_its_blobs_and_are_separate_entries(pool, target, saved):
    saved({"x": np.zeros(100)})
    pool.restore(target)
    (key,) = blobs_in(target)
    fb = pool.register(target, UUID(key))
    pool.restore(target, replace=True)
    with pool.get_mut("x") as x:
        x[0] = 5
    with fb.load() as x:
        assert x[0] == 0
    fb.drop()
    assert pool["x"][0] == 5
    pool.validate()


def test_a_closed_pool_restores_nothing(make_pool, target, saved):
    saved({"x": 1})
    pool = make_pool()
    pool.close()
    with pytest.raises(PoolClosedError):
        pool.restore(target)
    assert sessions_in(target) == []


def test_without_mmap_and_in_a_pool_without_room_values_come_back_too(make_pool, target, saved):
    saved({number: large(number) for number in range(4)})
    pool = make_pool("300KB", mmap=False)
    pool.restore(target)
    for number in range(4):
        assert (pool[number] == large(number)).all()


# ------------------------------------------------------------------ views


def test_restored_arrays_are_read_only_views_of_the_page_cache(make_pool, target, saved):
    keys = saved({"x": large(1), "nested": {"w": [large(2), "small"]}})
    pool = make_pool("50MB")
    pool.restore(target)
    for array, name in ((pool["x"], "x"), (pool["nested"]["w"][0], "nested")):
        assert not array.flags.writeable and not array.flags.owndata
        with pytest.raises(ValueError):
            array[0] = 1
        with pytest.raises(ValueError):
            array.flags.writeable = True
        permissions, inode, path = map_of(array)
        assert permissions.startswith("r--") and Path(path).name == keys[name].hex
        assert int(inode) == blob_of(target, keys[name]).stat().st_ino


def test_small_arrays_are_read_only_too(pool, target, saved):
    saved({"x": np.zeros(1000), "inline": np.zeros(3)})
    pool.restore(target)
    assert not pool["x"].flags.writeable and not pool["inline"].flags.writeable


def test_a_view_stays_valid_after_its_pool_and_its_file_are_gone(make_pool, target, saved):
    saved({"x": large(1)})
    pool = make_pool("50MB")
    pool.restore(target)
    array = pool["x"]
    pool.close()
    saved({"x": 1})
    assert (array == large(1)).all()


# ------------------------------------------------------------------ verification


@pytest.mark.parametrize("value", [large(1), np.arange(1000.0)], ids=["large", "small"])
@pytest.mark.parametrize("writable", [False, True])
def test_a_flipped_byte_is_found_at_the_first_load_and_not_with_never(
    make_pool, target, saved, value, writable
):
    key = saved({"x": value, "y": [1]})["x"]
    flip(blob_of(target, key), -5)
    for verify in ("first", "always"):
        pool = make_pool("50MB", verify=verify)
        pool.restore(target)
        for _ in range(2):
            guard = pool.get_mut("x") if writable else pool.get("x")
            with pytest.raises(CorruptBlobError, match="checksum") as caught:
                guard.__enter__()
            assert caught.value.key == key and caught.value.path == str(blob_of(target, key))
        assert pool["y"] == [1]  # one damaged blob keeps no other from loading
        pool.validate()
    pool = make_pool("50MB", verify="never")
    pool.restore(target)
    assert (pool["x"] != value).sum() == 1


@pytest.mark.parametrize(("verify", "found"), [("first", False), ("always", True), ("never", False)])
def test_the_second_load_is_verified_only_with_always(make_pool, target, saved, verify, found):
    key = saved({"x": large(1)})["x"]
    pool = make_pool("50MB", verify=verify)
    pool.restore(target)
    assert (pool["x"] == large(1)).all()
    gc.collect()
    pool.evict()
    flip(blob_of(target, key), -5)
    if found:
        with pytest.raises(CorruptBlobError):
            pool["x"]
    else:
        assert (pool["x"] != large(1)).sum() == 1


def test_a_pools_own_files_are_verified_once_they_are_restored_from(make_pool, target):
    """Restored entries are not trusted, even where the same process wrote them."""
    pool, other = make_pool("50MB"), make_pool("50MB")
    key = pool.put("x", large(1)).persist(target)
    pool.save(target)
    pool.close()
    flip(blob_of(target, key), -5)
    other.restore(target)
    with pytest.raises(CorruptBlobError):
        other["x"]


# ------------------------------------------------------------------ pickle (invariant 14)


def test_pickled_entries_are_refused_by_name_and_type_and_no_code_runs(pool, target, saved):
    saved({"ok": 1, "model": [{"b": Bomb()}]}, allow_pickle=True)
    with pytest.raises(PickleRefusedError, match=r"'model'.*Bomb.*allow_pickle=True") as caught:
        pool.restore(target)
    assert caught.value.path == "value[0]['b']"
    assert len(pool) == 0 and sessions_in(target) == [] and HIT == []
    pool.restore(target, ["ok"])
    assert pool["ok"] == 1
    pool.restore(target, ["model"], allow_pickle=True)
    pool["model"]
    assert HIT == ["bang"]


def test_from_checkpoint_refuses_pickle_and_closes_its_pool(target, saved, tmp_path):
    saved({"model": Bomb()}, allow_pickle=True)
    options = {"directory": tmp_path / "own", "min_free": 0}
    with pytest.raises(PickleRefusedError):
        FBPool.from_checkpoint(target, **options)
    assert list((tmp_path / "own").iterdir()) == [] and HIT == []
    with FBPool.from_checkpoint(target, allow_pickle=True, **options) as pool:
        pool["model"]
    assert HIT == ["bang"]


def test_registering_a_pickled_blob_is_refused_unless_allowed(pool, make_pool, target):
    key = pool.put("model", Bomb()).persist(target, allow_pickle=True)
    other = make_pool()
    for call in (lambda: other.register(target, key, "m"), lambda: other.register_all(target)):
        with pytest.raises(PickleRefusedError, match="Bomb"):
            call()
    assert len(other) == 0 and sessions_in(target) == [] and HIT == []
    fb = other.register(target, key, allow_pickle=True)
    with fb.load():
        assert HIT == ["bang"]
    fb.drop()


def hostile(key, tree: Any, buffers=()) -> bytes:
    """A blob whose checksums are right, and whose header says that nothing was pickled."""
    return b"".join(pack(key, Frames("msgpack", msgpack.packb(tree), buffers, None)).pieces)


@pytest.mark.parametrize("how", ["inline", "buffer", "nested"])
def test_a_pickle_that_the_header_denies_is_refused_at_load_and_not_run(pool, make_pool, target, how):
    stream = pickle.dumps(Bomb())
    node = [tags.PICKLE, stream, 0, 0] if how != "buffer" else [tags.PICKLE, 0, 0, 0]
    tree = [tags.LIST, [1, {"x": node}]] if how == "nested" else node
    key = pool.put("x", 1).persist(target)
    pool.close()
    replaced(blob_of(target, key), hostile(key, tree, [stream] if how == "buffer" else []))
    for writable in (False, True):
        other = make_pool()
        fb = other.register(target, key, "x")
        with pytest.raises(PickleRefusedError), fb.load_mut() if writable else fb.load():
            pass
        fb.drop()
    assert HIT == []


def test_another_blob_under_the_same_key_is_not_what_the_checkpoint_names(make_pool, target, saved):
    """Invariant 14: nobody slips other content in, with a pickle or without."""
    key = saved({"x": [1], "y": 2})["x"]
    replaced(blob_of(target, key), hostile(key, [tags.LIST, [2]]))
    for verify in ("first", "never"):
        pool = make_pool(verify=verify)
        pool.restore(target)
        with pytest.raises(CorruptBlobError, match="another blob than the checkpoint names"):
            pool["x"]
        assert pool["y"] == 2


# ------------------------------------------------------------------ from_checkpoint


def test_from_checkpoint_is_a_pool_with_all_of_it(target, saved, tmp_path):
    saved({"x": 1}, tag="old")
    saved({"x": 2, "y": 2}, keep=None)
    options = {"directory": tmp_path / "own", "min_free": 0}
    with FBPool.from_checkpoint(target, memory="3MB", **options) as pool:
        assert pool.memory == 3_000_000 and {name: pool[name] for name in pool} == {"x": 2, "y": 2}
    with FBPool.from_checkpoint(str(target), tag="old", **options) as pool:
        assert pool["x"] == 1
    with TrackedDirectory(target) as tracked, FBPool.from_checkpoint(tracked, version=1, **options) as pool:
        assert pool.keys() == ["x"]


@pytest.mark.parametrize(
    "choice", [{"version": 9}, {"tag": "no"}, {"before": 0}, {"tag": "a", "version": 1}], ids=str
)
def test_from_checkpoint_leaves_no_pool_after_an_error(target, saved, tmp_path, choice):
    saved({"x": 1})
    with pytest.raises((CheckpointNotFoundError, ValueError)):
        FBPool.from_checkpoint(target, directory=tmp_path / "own", min_free=0, **choice)
    assert list((tmp_path / "own").iterdir()) == []


# ------------------------------------------------------------------ register


def test_register_gives_an_entry_without_loading_it(pool, make_pool, target):
    key = pool.put("x", large(1)).persist(target)
    pool.close()
    other = make_pool("50MB")
    fb = other.register(target, key)
    assert fb.key == key and fb.name is None and other.stats().loads == 0 and len(other) == 0
    with fb.load() as value:
        assert (value == large(1)).all() and map_of(value) is not None
    fb.drop()
    assert other.stats().entries == 0
    named = other.register(target, key, "x")
    named.drop()
    assert (other["x"] == large(1)).all()
    with pytest.raises(NameTakenError):
        other.register(target, key, "x")
    other.register(target, key, "x", replace=True).drop()
    other.validate()


def test_a_registered_value_may_be_read_in_one_line(pool, make_pool, target):
    """A guard keeps the handle that it came from."""
    key = pool.put("x", np.arange(3)).persist(target)
    with make_pool().register(target, key).load() as value:
        assert value.sum() == 3


def test_registering_a_key_that_is_absent_changes_nothing(pool, target, make_pool):
    key = pool.put("x", 1).persist(target)
    other = make_pool()
    with pytest.raises(KeyError, match="has no blob of the key"):
        other.register(target, uuid4(), "y")
    for not_a_key in ("x", key.hex, None, 3):
        with pytest.raises(TypeError, match="UUID"):
            other.register(target, not_a_key)
    assert other.stats().entries == 0 and sessions_in(target) == []


def test_register_all_brings_every_key_and_each_only_once(pool, make_pool, target):
    keys = {pool.put(n, [n]).persist(target): n for n in range(10)}
    pool.save(target)
    other = make_pool()
    handles = other.register_all(target)
    assert {fb.key for fb in handles} == set(keys)
    for fb in handles:
        with fb.load() as value:
            assert value == [keys[fb.key]]
        fb.drop()
    other.drain()
    assert other.stats().entries == 0 and sessions_in(target) == []


def test_a_key_registered_twice_and_while_its_last_owner_leaves_is_whole(make_pool, target):
    """The race of a new owner with the deletion that the last one has left behind."""
    pool = make_pool(io_threads=1)
    key = pool.put("x", [1]).persist(target)
    pool.delete("x")
    for _ in range(200):
        first, second = pool.register(target, key), pool.register(target, key)
        first.drop()
        with second.load() as value:
            assert value == [1]
        second.drop()
    pool.drain()
    pool.validate()
    assert sessions_in(target) == []


# ------------------------------------------------------------------ who comes between


def test_a_version_removed_between_choosing_and_holding_it_is_chosen_anew(pool, target, saved, monkeypatch):
    """Invariant 12: what is restored is whole, whichever version it is."""
    saved({"x": 1})
    directory = directory_at(target)
    real = type(directory.loans).hold_version
    calls = []

    def late(loans, version):
        calls.append(version)
        if len(calls) == 1:
            saved({"x": 2})
        return real(loans, version)

    monkeypatch.setattr(type(directory.loans), "hold_version", late)
    assert pool.restore(target).version == 2 and calls == [1, 2]
    assert pool["x"] == 2


def test_a_version_removed_in_this_process_before_its_blobs_are_counted_as_lent_is_chosen_anew(
    pool, target, saved, monkeypatch
):
    """A writer of the same process asks for loans, not for links: it must not come before the loans."""
    saved({"x": 1})
    directory = directory_at(target)
    real = type(directory.versions).read
    calls = []

    def late(versions, version, link=None):
        manifest = real(versions, version, link)
        if link is not None and not calls:
            calls.append(version)
            saved({"x": 2})
        return manifest

    monkeypatch.setattr(type(directory.versions), "read", late)
    assert pool.restore(target).version == 2 and calls == [1]
    assert pool["x"] == 2
    pool.delete("x")
    pool.drain()
    assert sessions_in(target) == []


def test_a_version_that_was_asked_for_and_is_removed_meanwhile_is_not_found(pool, target, saved, monkeypatch):
    saved({"x": 1})
    directory = directory_at(target)
    real = type(directory.loans).borrow_all

    def late(loans, version, keys):
        saved({"x": 2})
        real(loans, version, keys)

    monkeypatch.setattr(type(directory.loans), "borrow_all", late)
    with pytest.raises(CheckpointNotFoundError, match="no version 1"):
        pool.restore(target, version=1)
    assert len(pool) == 0 and sessions_in(target) == []
