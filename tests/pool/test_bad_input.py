"""The table of bad input: each mistake gets a typed error that says what would do, and costs nothing."""

from __future__ import annotations

from uuid import uuid4

import cachetools
import numpy as np
import pytest

from fbcache import FBPool, PickleRefusedError, StorageError, UnsupportedTypeError
from fbcache.codec import Frames, MsgpackCodec

# ------------------------------------------------------------------ names


@pytest.mark.parametrize("name", [[1], {}, {1}, np.zeros(2), ("a", [])], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("call", ["get", "get_mut", "try_get", "try_get_mut", "pop", "delete", "__getitem__"])
def test_an_unhashable_name_is_a_typeerror_that_says_what_would_do(pool, call, name):
    with pytest.raises(TypeError, match="hashable"):
        getattr(pool, call)(name)


@pytest.mark.parametrize("name", [[1], {}, np.zeros(2)], ids=lambda n: type(n).__name__)
def test_putting_under_an_unhashable_name_stores_and_freezes_nothing(pool, name):
    value = np.zeros(3)
    with pytest.raises(TypeError, match="hashable"):
        pool.put(name, value)
    with pytest.raises(TypeError, match="hashable"):
        pool[name] = value
    assert value.flags.writeable and pool.stats().entries == 0


def test_a_uuid_is_no_name_and_the_error_says_why(pool):
    value = np.zeros(3)
    with pytest.raises(TypeError, match="UUID is a key"):
        pool.put(uuid4(), value)
    assert value.flags.writeable and pool.stats().entries == 0


def test_an_unknown_default_is_no_way_around_an_unhashable_name(pool):
    with pytest.raises(TypeError):
        pool.pop([], None)


@pytest.mark.parametrize("names", [["a", "b"], ("b", "a")])
def test_evicting_an_unknown_name_evicts_nothing(pool, names):
    fb = pool.put("a", np.zeros(3))
    with pytest.raises(KeyError, match="'b'"):
        pool.evict(names)
    assert fb.state.name == "RESIDENT"


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    "memory", [-1, 0, "-1GB", "0", "lots", "", "12 parsecs", "101%", 2**63, float("nan"), float("inf")]
)
def test_a_budget_that_is_no_size_is_a_valueerror_that_says_what_would_do(tmp_path, memory):
    with pytest.raises(ValueError, match="2GB"):
        FBPool(memory, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [[], True, b"2GB", 1j, {}])
def test_a_budget_of_another_type_is_a_typeerror_that_says_what_would_do(tmp_path, memory):
    with pytest.raises(TypeError, match="2GB"):
        FBPool(memory, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "error"), [(-1, ValueError), ("much", ValueError), ([], TypeError), (0, ValueError)]
)
def test_a_resize_to_no_size_leaves_the_budget(pool, memory, error):
    with pytest.raises(error):
        pool.resize(memory)
    assert pool.memory == 1_000_000


@pytest.mark.parametrize(
    ("nbytes", "error"), [(-1, ValueError), (1.5, TypeError), ("1KB", TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("call", ["put", "insert"])
def test_a_size_of_a_value_that_is_none_stores_and_freezes_nothing(pool, call, nbytes, error):
    pool["a"] = "former"
    value = np.zeros(3)
    with pytest.raises(error, match="nbytes"):
        if call == "put":
            pool.put("a", value, nbytes=nbytes)
        else:
            pool.insert(value, nbytes=nbytes)
    assert value.flags.writeable and pool["a"] == "former" and pool.stats().entries == 1


def test_numpy_integers_are_sizes(pool):
    assert pool.put("a", 1, nbytes=np.int64(500)).nbytes == 500
    pool.resize(np.int64(600_000))
    assert pool.memory == 600_000


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"policy": "ttl"}, ValueError, "'lru', 'lfu', 'fifo' or 'rr'"),
        ({"policy": cachetools.TTLCache}, ValueError, "time"),
        ({"policy": cachetools.TLRUCache}, ValueError, "time"),
        ({"policy": dict}, TypeError, "policy"),
        ({"policy": 3}, TypeError, "policy"),
        ({"policy": None}, TypeError, "policy"),
        ({"verify": "sometimes"}, ValueError, "'first', 'always' or 'never'"),
        ({"verify": None}, ValueError, "'first', 'always' or 'never'"),
        ({"io_threads": 0}, ValueError, "at least 1"),
        ({"io_threads": -1}, ValueError, "at least 1"),
        ({"io_threads": 1.5}, (TypeError, ValueError), "at least 1"),
        ({"io_threads": True}, (TypeError, ValueError), "at least 1"),
        ({"put_timeout": -1}, ValueError, "seconds"),
        ({"put_timeout": float("nan")}, ValueError, "seconds"),
        ({"put_timeout": "soon"}, (TypeError, ValueError), "seconds"),
        ({"max_disk": -1}, ValueError, "max_disk"),
        ({"max_disk": "big"}, ValueError, "max_disk"),
        ({"min_free": -1}, ValueError, "min_free"),
        ({"min_free": []}, TypeError, "min_free"),
        ({"directory": 3}, TypeError, "PathLike"),
    ],
    ids=str,
)
def test_a_bad_option_is_an_error_that_says_what_would_do_and_leaves_nothing(tmp_path, options, error, says):
    base = tmp_path / "spill"
    with pytest.raises(error, match=says):
        FBPool("1MB", **{"directory": base, **options})
    assert not base.exists() or list(base.iterdir()) == []


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "rr", cachetools.LRUCache, cachetools.LFUCache])
def test_the_policies_that_are_offered_work(make_pool, policy):
    pool = make_pool("20KB", policy=policy)
    for number in range(10):
        pool[number] = np.full(500, number)
    for number in range(10):
        assert pool[number][0] == number
    pool.validate()


def test_a_directory_that_cannot_be_made_is_a_storageerror(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="directory="):
        FBPool("1MB", directory=tmp_path / "file" / "spill")


# ------------------------------------------------------------------ values that cannot be encoded


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("no")


def test_what_cannot_be_encoded_stays_and_says_so_once_and_others_go_on(pool):
    pool["bad"] = {"x": [Unpicklable()]}
    pool["good"] = np.zeros(1000)
    with pytest.raises(UnsupportedTypeError, match=r"value\['x'\]\[0\]") as caught:
        pool.evict()
    assert caught.value.path == "value['x'][0]"
    assert isinstance(pool["bad"]["x"][0], Unpicklable)
    pool.drain()  # it has surfaced
    pool.validate()
    pool.evict()
    pool["good"]
    assert pool.stats().loads == 1 and pool.stats().errors == 1


def test_what_cannot_be_encoded_surfaces_in_drain_when_nobody_waited_for_it(make_pool):
    pool = make_pool("100KB")
    pool.put("bad", Unpicklable(), nbytes=40_000)
    for number in range(20):
        pool[number] = np.full(2_000, number)
    with pytest.raises(UnsupportedTypeError):
        pool.drain()
    pool.drain()
    assert isinstance(pool["bad"], Unpicklable)
    assert [pool[number][0] for number in range(20)] == list(range(20))
    pool.validate()


def test_a_value_larger_than_the_budget_that_cannot_be_encoded_is_refused_and_not_stored(pool):
    pool["a"] = "former"
    with pytest.raises(UnsupportedTypeError):
        pool.put("a", Unpicklable(), nbytes=2_000_000)
    assert pool["a"] == "former" and pool.stats().entries == 1


def test_a_value_that_could_not_be_encoded_is_tried_again_once_it_was_changed(pool):
    pool["a"] = [Unpicklable()]
    with pytest.raises(UnsupportedTypeError):
        pool.evict()
    with pool.get_mut("a") as value:
        value[0] = "better"
    pool.evict()
    assert pool.stats().resident_bytes == 0 and pool["a"] == ["better"]


def test_a_value_that_contains_itself_stays_in_memory(pool):
    cycle = []
    cycle.append(cycle)
    pool["cycle"] = cycle
    with pytest.raises(UnsupportedTypeError):
        pool.evict()
    assert pool["cycle"][0] is pool["cycle"]


# ------------------------------------------------------------------ codecs


class NoFrames:
    name = "no-frames"

    def encode(self, value, *, allow_pickle):
        return b"bytes"

    def decode(self, frames, *, writable, allow_pickle):
        raise AssertionError("nothing was ever encoded")


class Raising(NoFrames):
    name = "raising"

    def encode(self, value, *, allow_pickle):
        raise ZeroDivisionError("in the codec")


def test_a_codec_whose_output_is_no_frames_is_a_typeerror_and_the_value_stays(make_pool):
    pool = make_pool(codec=NoFrames())
    pool["a"] = 1
    with pytest.raises(TypeError, match=r"no-frames.*bytes.*Frames"):
        pool.evict()
    assert pool["a"] == 1
    pool.validate()


def test_a_codec_that_raises_is_a_storageerror_that_names_it_and_the_value_stays(make_pool):
    pool = make_pool(codec=Raising())
    pool["a"] = 1
    with pytest.raises(StorageError, match=r"raising.*in the codec") as caught:
        pool.evict()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert pool["a"] == 1


class Decoding(MsgpackCodec):
    """Encodes well, and then does not decode."""

    def decode(self, frames, *, writable, allow_pickle):
        assert isinstance(frames, Frames)
        raise ZeroDivisionError("in the codec")


def test_a_codec_that_fails_to_decode_leaves_the_entry_spilled(make_pool):
    pool = make_pool(codec=Decoding())
    fb = pool.put("a", np.zeros(100))
    pool.evict()
    for guard in (pool.get("a"), pool.get_mut("a")):
        with pytest.raises(ZeroDivisionError):
            guard.__enter__()
        assert fb.state.name == "SPILLED"
    pool.validate()


# ------------------------------------------------------------------ what cannot be pickled


def test_pools_handles_and_guards_refuse_to_be_pickled_and_a_pool_with_one_in_it_stays_whole(pool):
    import pickle

    fb = pool.put("a", 1)
    for thing in (pool, fb, pool.get("a"), pool.get_mut("a")):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing)
    pool["handle"] = [fb]
    with pytest.raises((UnsupportedTypeError, PickleRefusedError)):
        pool.evict(["handle"])
    assert pool["handle"][0] is fb
