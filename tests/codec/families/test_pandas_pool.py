"""Frames in a pool: no copies that need not be, readers cannot change them, and callers keep theirs."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pd = pytest.importorskip("pandas", minversion="2.1")

from fbcache import FBPool  # noqa: E402
from fbcache.freezing import take_over  # noqa: E402
from fbcache.sizeof import sizeof  # noqa: E402
from tests.codec.families.pandas_cases import CASES, VERSION, made, same_pandas  # noqa: E402

ROOT = Path(__file__).parents[3]
MODES = ["copy-on-write"] if VERSION >= (3, 0) else ["copy-on-write", "plain"]


@pytest.fixture(params=MODES)
def lazy(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether pandas copies on write; both ways where it knows both."""
    wanted = request.param == "copy-on-write"
    if VERSION >= (3, 0):
        yield True
        return
    with pd.option_context("mode.copy_on_write", wanted):
        yield wanted


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Any]:
    with FBPool("1GB", directory=tmp_path / "spill", min_free=0) as pool:
        yield pool


def frame(rows: int = 20_000) -> Any:
    texts = [f"text {i % 7}" for i in range(rows)]
    index = pd.date_range("2020", periods=rows, freq="min")
    made = pd.DataFrame(
        {
            "a": np.arange(float(rows)),
            "b": np.arange(float(rows)) + 1,
            "n": np.arange(rows),
            "s": pd.Series(texts, index, dtype=object),
            "t": pd.Series(texts).array,
            "c": pd.Categorical(["x", "y"] * (rows // 2)),
            "i": pd.array([1, None] * (rows // 2), dtype="Int64"),
        },
        index=index,
    )
    made.attrs["unit"] = ["m"]
    return made


def memory(value: Any) -> Any:
    """The array of a frame's first block, or of a series."""
    return value._mgr.blocks[0].values


def address(value: Any) -> int:
    start: int = memory(value).__array_interface__["data"][0]
    return start


WRITES = {
    "iloc": lambda f: f.iloc.__setitem__((0, 0), 77.0),
    "loc": lambda f: f.loc.__setitem__((f.index[0], "a"), 77.0),
    "at": lambda f: f.at.__setitem__((f.index[0], "n"), 77),
    "a slice": lambda f: f.iloc.__setitem__((slice(2, 5), 1), 77.0),
    "an array": lambda f: f["a"].values.__setitem__(0, 77.0),
    "to_numpy": lambda f: f["n"].to_numpy().__setitem__(0, 77),
    "an object": lambda f: f.loc.__setitem__((f.index[0], "s"), "other"),
    "a text": lambda f: f.loc.__setitem__((f.index[0], "t"), "other"),
    "a category": lambda f: f.loc.__setitem__((f.index[0], "c"), "y"),
    "a nullable": lambda f: f.loc.__setitem__((f.index[0], "i"), 9),
    "a missing one": lambda f: f.loc.__setitem__((f.index[0], "i"), pd.NA),
    "an extension array": lambda f: f["i"].array.__setitem__(0, 9),
    "the index": lambda f: f.index.values.__setitem__(0, f.index.values[1]),
}


# ------------------------------------------------------------------------------------ read-only


@pytest.mark.parametrize("how", ["put", "reloaded", "changed", "reloaded to change"])
@pytest.mark.parametrize("write", WRITES)
def test_a_reader_cannot_write_into_a_frame(pool, lazy, how, write):
    pool.put("f", frame(100))
    if how.startswith("reloaded"):
        pool.evict()
    if how.endswith("change") or how == "changed":
        with pool.get_mut("f") as f:
            f.iloc[5, 0] = 5.0
    with pool.get("f") as f:
        expected = f.copy(deep=True)
        with pytest.raises(ValueError, match="read-only"):
            WRITES[write](f)
        assert same_pandas(f, expected)


def test_the_flag_of_a_blocks_memory_cannot_be_set(pool, lazy):
    pool.put("f", frame(100))
    with pool.get("f") as f:
        if lazy:
            with pytest.raises(ValueError, match="WRITEABLE"):
                memory(f).setflags(write=True)


def test_what_a_reader_makes_of_a_frame_can_be_written(pool, lazy):
    pool.put("f", frame(100))
    with pool.get("f") as f:
        copied, shifted, column = f.copy(), f[["a", "b"]] + 1, f["a"].copy()
    copied.iloc[0, 0] = shifted.iloc[0, 0] = column.iloc[0] = 77.0
    with pool.get("f") as f:
        assert same_pandas(f, frame(100))


# -------------------------------------------------------------------------- the caller's and ours


def test_a_frame_is_taken_without_a_copy_where_pandas_can_and_stays_the_callers(pool, lazy):
    mine = frame()
    pool.put("f", mine)
    with pool.get("f") as f:
        assert f is not mine and np.shares_memory(memory(f), memory(mine)) is lazy
    for name, write in WRITES.items():
        if name not in ("an array", "to_numpy", "an extension array", "the index"):
            write(mine)
    mine["new"] = 1
    mine.attrs["unit"].append("changed")
    mine.index.name = mine.columns.name = "changed"
    with pool.get("f") as f:
        assert same_pandas(f, frame())


def test_a_series_and_an_index_too(pool, lazy):
    series, index = pd.Series(np.arange(1000.0), name="s"), pd.Index(np.arange(1000))
    pool.put("v", {"s": series, "i": index, "again": series})
    series.iloc[0] = 77.0
    index.name = "changed"
    with pool.get("v") as v:
        assert v["s"].iloc[0] == 0.0 and v["i"].name is None and v["again"] is v["s"]
        with pytest.raises(ValueError, match="read-only"):
            v["s"].iloc[0] = 5.0
        with pytest.raises(ValueError, match="read-only"):
            v["i"]._data[0] = 5


def test_a_frame_outlives_the_callers(pool, lazy):
    mine = frame()
    pool.put("f", mine)
    mine.iloc[:, 0] = 0.0
    del mine
    np.full((40, 20_000), 5.0)  # may get the memory, if that was let go
    with pool.get("f") as f:
        assert same_pandas(f, frame())


def test_arrays_of_pandas_are_frozen_like_those_of_numpy(pool, lazy):
    array = pd.array([1, None, 3])
    category = pd.Categorical(["a", "b", "a"])
    pool.put("v", [array, category])
    for part in (array, category):
        with pytest.raises(ValueError, match="read-only"):
            part[0] = part[2]
    with pool.get_mut("v") as v:
        v[0][0] = 7
        v[1][0] = "b"
    with pool.get("v") as v:
        assert v[0].tolist() == [7, pd.NA, 3] and list(v[1]) == ["b", "b", "a"]


def test_a_frame_beside_its_column_is_equal_and_independent(pool, lazy):
    mine = frame()
    pool.put("v", {"f": mine, "a": mine["a"].to_numpy()})
    for _ in range(2):
        with pool.get("v") as v:
            assert v["f"]["a"].to_numpy().tolist() == v["a"].tolist()
        pool.evict()
    with pool.get_mut("v") as v:
        v["f"].iloc[0, 0] = 77.0
        assert v["a"][0] == 0.0 and v["f"].iloc[0, 0] == 77.0


# -------------------------------------------------------------------------------- spill and reload


def test_a_reloaded_frame_is_a_view_of_its_file(pool, lazy):
    pool.put("f", frame())
    assert pool.evict() > 0
    with pool.get("f") as f:
        assert same_pandas(f, frame())
        for block in f._mgr.blocks:
            if isinstance(block.values, np.ndarray) and not block.values.dtype.hasobject:
                assert not block.values.flags.owndata and not block.values.flags.writeable
        assert not f.index._data._ndarray.flags.owndata


def test_reading_a_file_back_copies_nothing(pool, lazy):
    mine = pd.DataFrame(np.zeros((200_000, 10)))
    pool.put("f", mine)
    pool.evict()
    tracemalloc.start()
    with pool.get("f") as f:
        assert f.shape == mine.shape
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("spilled", [False, True])
def test_what_is_written_is_there_afterwards_and_in_the_file(pool, lazy, spilled):
    pool.put("f", frame())
    expected = frame()
    for step in range(3):
        if spilled:
            pool.evict()
        for f in (expected, None):
            if f is None:
                with pool.get_mut("f") as f:
                    write(f, step)
            else:
                write(f, step)
        with pool.get("f") as f:
            assert same_pandas(f, expected)
    pool.evict()
    with pool.get("f") as f:
        assert same_pandas(f, expected)


def write(f: Any, step: int) -> None:
    f.iloc[step, 0] = 77.0
    f.loc[f.index[step], "s"] = "written"
    f.loc[f.index[step], "t"] = "written"
    f.loc[f.index[step], "c"] = "y"
    f.loc[f.index[step], "i"] = 1000
    f[f"new {step}"] = np.arange(len(f))


@pytest.mark.parametrize("spilled", [False, True])
def test_writing_copies_nothing_where_nobody_else_has_the_memory(pool, lazy, spilled):
    mine = pd.DataFrame(np.zeros((200_000, 10)))
    pool.put("f", mine)
    del mine
    if spilled:
        pool.evict()
    places = set()
    for step in range(3):
        with pool.get_mut("f") as f:
            f.iloc[step, 0] = 1.0
            places.add(address(f))
        del f
    assert len(places) == 1
    with pool.get("f") as f:
        assert address(f) in places and f.iloc[:3, 0].tolist() == [1.0, 1.0, 1.0]


def test_what_a_reader_kept_does_not_change(pool, lazy):
    if not lazy:
        pytest.skip("without copy-on-write, as with arrays: what was read is good for as long as the guard")
    for spilled in (False, True):
        pool.put("f", frame())
        if spilled:
            pool.evict()
        with pool.get("f") as f:
            column, whole = f["a"], f
        with pool.get_mut("f") as f:
            f.iloc[0, 0] = 77.0
        assert column.iloc[0] == 0.0 and whole.iloc[0, 0] == 0.0
        with pool.get("f") as f:
            assert f.iloc[0, 0] == 77.0


def test_a_value_bound_anew_is_taken_over(pool, lazy):
    pool.put("f", frame(100))
    other = frame(50)
    with pool.get_mut("f") as f:
        f["x"] = 1
    guard = pool.get_mut("f")
    with guard:
        guard.value = other
    other.iloc[0, 0] = 77.0
    with pool.get("f") as f:
        assert same_pandas(f, frame(50))


def test_a_pools_frame_put_again_is_another_entry(pool, lazy):
    pool.put("f", frame())
    with pool.get("f") as f:
        pool.put("g", f)
    with pool.get_mut("f") as f:
        f.iloc[0, 0] = 77.0
    with pool.get("g") as g:
        assert same_pandas(g, frame())
    with pool.get_mut("g") as g:
        g.iloc[1, 0] = 78.0
    with pool.get("f") as f:
        assert f.iloc[:2, 0].tolist() == [77.0, 1.0]


def test_a_roll_back_brings_the_frame_back(pool, lazy):
    pool.put("f", frame(100))
    with pytest.raises(RuntimeError, match="stop"), pool.get("f"):
        raise RuntimeError("stop")
    fb = pool.put("h", frame(100))
    with pytest.raises(RuntimeError, match="stop"), fb.load_mut(rollback=True) as f:
        f.iloc[0, 0] = 77.0
        raise RuntimeError("stop")
    with pool.get("h") as f:
        assert same_pandas(f, frame(100))


@pytest.mark.parametrize("name", CASES)
def test_every_case_lives_in_a_pool(pool, lazy, name):
    value = made(name)
    pool.put("v", value)
    for _ in range(2):
        with pool.get("v") as v:
            assert same_pandas(v, made(name))
        with pool.get_mut("v") as v:
            assert same_pandas(v, made(name))
        with pool.get("v") as v:
            assert same_pandas(v, made(name))
        pool.evict()
    assert pool.stats().errors == 0
    assert same_pandas(value, made(name))


# ------------------------------------------------------------------------------------- checkpoints

SCRIPT = """
import sys, warnings
from fbcache import FBPool
with FBPool.from_checkpoint(sys.argv[1], memory="1GB", directory=sys.argv[2], min_free=0) as pool:
    assert "pandas" not in sys.modules
    from tests.codec.families.pandas_cases import made, same_pandas
    for name in sorted(pool):
        with pool.get(name) as value:
            assert same_pandas(value, made(name)), name
        with pool.get_mut(name) as value:
            assert same_pandas(value, made(name)), name
    print(len(pool))
"""


def test_a_checkpoint_opens_in_a_fresh_process_without_pickle(pool, tmp_path):
    for name in CASES:
        try:
            pool.put(name, made(name))
        except pytest.skip.Exception:
            continue
    pool.save(tmp_path / "saved")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), str(tmp_path / "other")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(pool)


# ------------------------------------------------------------------------------------------- sizes


def _texts() -> Any:
    return pd.DataFrame({"s": pd.Series([f"text number {i}" for i in range(50_000)], dtype=object)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: pd.DataFrame(np.random.default_rng(1).random((50_000, 4))),
        lambda: pd.DataFrame({"a": np.arange(50_000), "b": np.arange(50_000.0)}),
        lambda: pd.Series(np.arange(50_000), index=pd.date_range("2020", periods=50_000, freq="s")),
        lambda: pd.DataFrame({"c": pd.Categorical(["x", "y"] * 25_000), "i": pd.array([1, None] * 25_000)}),
        lambda: pd.DataFrame({"t": pd.Series([f"text number {i}" for i in range(50_000)])}),
        lambda: pd.Series(np.arange(50_000.0), index=pd.MultiIndex.from_product([range(50), range(1000)])),
        lambda: pd.Index(np.arange(50_000)),
        lambda: pd.arrays.SparseArray([0, 1] * 50_000),
        _texts,
    ],
)
def test_sizes_are_those_of_memory(make):
    make()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    value = make()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    shown = value.memory_usage(deep=True) if hasattr(value, "memory_usage") else value.nbytes
    shown = int(np.sum(shown))
    assert abs(sizeof(value) - shown) < 0.2 * shown
    if taken > shown / 2:  # Arrow's memory is not Python's
        assert abs(sizeof(value) - taken) < 0.2 * taken


def test_the_size_of_a_frame_that_was_reloaded_or_changed_stays(pool, lazy):
    fb = pool.put("f", frame())
    size = fb.nbytes
    for _ in range(2):
        with pool.get_mut("f") as f:
            f.iloc[0, 0] = 1.0
        assert abs(fb.nbytes - size) < size / 5
        pool.evict()


def test_the_work_of_measuring_a_huge_column_of_objects_is_bounded():
    many = pd.DataFrame({"s": pd.Series([f"x{i}" for i in range(200_000)], dtype=object)})
    tracemalloc.start()
    size = sizeof(many)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert abs(size - int(many.memory_usage(deep=True).sum())) < size / 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: pd.DataFrame({"a": [1.0, 2], "b": [1, 2]}),
        lambda: pd.Series([1, 2, 3]),
        lambda: pd.date_range("2020", periods=3),
        lambda: pd.MultiIndex.from_product([[1, 2], [3, 4]]),
    ],
)
def test_small_values_are_not_taken_for_nothing(make):
    take_over(make())
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = [take_over(make()) for _ in range(200)]
    taken = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    tracemalloc.stop()
    assert taken / 2 < sizeof(kept[0]) < taken * 4  # less is taken where pandas does not copy on write
