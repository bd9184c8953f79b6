"""Values of xarray: exactly back, over their memory, and never computed unasked."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("xarray", "2024.10")  # the first with trees

import xarray as xr

from fbcache import FBPool
from fbcache.codec import Frames, MsgpackCodec
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.sizeof import sizeof
from tests.codec.families.damage import damaged
from tests.codec.families.xarray_cases import cases, plain, same, tree
from tests.codec.roundtrip import through

CODEC = MsgpackCodec()
CASES = cases()
OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)

NAMES = st.sampled_from(["a", "b", "long name", 3, ("t", 1), None])
ATTRIBUTES = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2)


@st.composite
def data_arrays(draw: st.DrawFn) -> xr.DataArray:
    dtype = draw(st.sampled_from(["f8", "i2", "?", "c8", "U3", "M8[ns]", "m8[ns]"]))
    values = draw(hnp.arrays(np.dtype(dtype), hnp.array_shapes(max_dims=3, max_side=4)))
    dims = draw(st.permutations(["x", "y", "z"]))[: values.ndim]
    array = xr.DataArray(values, dims=dims, name=draw(NAMES), attrs=draw(ATTRIBUTES))
    for dim in draw(st.sets(st.sampled_from(dims))):
        labels = draw(st.lists(st.integers(0, 99), min_size=array.sizes[dim], max_size=array.sizes[dim]))
        array = array.assign_coords({dim: (dim, labels, draw(ATTRIBUTES))})
    return array


@given(data_arrays(), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_array_comes_back(array: xr.DataArray, writable: bool, trusted: bool) -> None:
    assert same(through(array, writable=writable, allow_pickle=trusted), array)
    dataset = array.to_dataset(name="held")
    assert same(through(dataset, writable=writable, allow_pickle=trusted), dataset)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("writable", [False, True])
def test_every_case_comes_back_exactly_without_pickle(name: str, writable: bool) -> None:
    back = through(CASES[name], writable=writable)
    assert same(back, CASES[name])
    if isinstance(back, (xr.Dataset, xr.DataArray)):
        xr.testing._assert_internal_invariants(back, check_default_indexes=False)


def test_indexes_find_labels_again() -> None:
    back = through(plain())
    assert back["t"].sel(x=2.0, y="c") == 6.0
    pairs = through(plain().stack(k=("x", "y")))
    assert pairs["t"].sel(x=2.0, y="c") == 6.0


@pytest.mark.parametrize("writable", [False, True])
def test_arrays_come_back_as_views(writable: bool) -> None:
    back = through(CASES["large"], writable=writable)
    assert not back["a"].values.flags.owndata and back["a"].values.flags.writeable == writable
    index = back.xindexes["x"].index
    assert not index.to_numpy().flags.owndata and back["x"].variable._data.array is index


def test_what_two_values_share_is_shared_again() -> None:
    values = np.arange(600.0)
    one = xr.DataArray(values, dims="x")
    back = through([one, xr.Variable("x", values[100:]), values, one], writable=True)
    back[2][100] = -7
    assert back[0][100] == back[1][0] == -7 and back[3] is back[0]


def test_encoding_leaves_the_value_alone() -> None:
    value = plain()
    index = value.xindexes["x"].index
    through(value)
    assert value.identical(plain()) and value.xindexes["x"].index is index


def test_what_is_not_of_pandas_takes_pickle() -> None:
    class Mine(xr.Dataset):
        __slots__ = ()

    with pytest.raises(PickleRefusedError, match="Mine"):
        through(Mine({"a": ("x", [1, 2])}))
    with_compressor = plain()
    with_compressor["t"].encoding["compressor"] = pytest
    with pytest.raises(PickleRefusedError, match=r"value\['t'\].*module|encoding.*compressor"):
        through(with_compressor)
    assert same(through(with_compressor.drop_encoding()), with_compressor.drop_encoding())


def test_a_branch_of_a_tree_takes_pickle() -> None:
    branch = tree()["b"]
    with pytest.raises(PickleRefusedError, match="DataTree"):
        through(branch)


# ---------------------------------------------------------------------------------- lazy values


def lazy() -> dict[str, Any]:
    chunked = plain().chunk({"x": 1})
    return {
        "dataset": chunked,
        "array": chunked["t"],
        "variable": chunked["t"].variable,
        "tree": xr.DataTree.from_dict({"/": chunked}),
    }


@pytest.mark.parametrize("name", ["dataset", "array", "variable", "tree"])
def test_what_dask_has_not_computed_is_refused_or_computed_as_asked(name: str) -> None:
    pytest.importorskip("dask")
    value = lazy()[name]
    with pytest.raises(UnsupportedTypeError, match=r"not in memory yet: call .load\(\)"):
        CODEC.encode(value, allow_pickle=True)
    frames = MsgpackCodec(compute_lazy=True).encode(value, allow_pickle=False)
    back = CODEC.decode(frames, writable=False, allow_pickle=False)
    expected = value.map_over_datasets(xr.Dataset.compute) if name == "tree" else value.compute()
    assert same(back, expected)


def test_what_is_still_in_a_file_is_refused_until_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    plain()[["t", "alone"]].drop_encoding().to_netcdf(tmp_path / "x.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "x.nc", engine="scipy") as opened:
        with pytest.raises(UnsupportedTypeError, match="'t' is not in memory"):
            through(opened)
        opened.load()
        assert opened.encoding["source"].endswith("x.nc")
        assert same(through(opened), opened)


def test_a_lazy_dataset_in_a_pool_stays_as_it_is_and_eviction_says_what_to_do(make_pool: Any) -> None:
    pytest.importorskip("dask")
    pool = make_pool("1MB")
    pool.put("lazy", lazy()["dataset"])
    with pytest.raises(UnsupportedTypeError, match="compute_lazy"):
        pool.evict()
    with pool.get("lazy") as kept:
        assert kept["t"].chunks is not None
    computing = make_pool("1MB", codec=MsgpackCodec(compute_lazy=True))
    computing.put("lazy", lazy()["dataset"])
    computing.evict()
    with computing.get("lazy") as back:
        assert back["t"].chunks is None and back.identical(plain())


# ------------------------------------------------------------------------------------ in a pool

_SCRIPT = """
import sys
from fbcache import FBPool
from tests.codec.families.xarray_cases import cases, same

with FBPool.from_checkpoint(sys.argv[1], directory=sys.argv[2], min_free=0) as pool:
    for name, value in cases().items():
        with pool.get(name) as back:
            assert same(back, value), name
"""


def test_values_are_spilled_saved_and_opened_in_a_process_that_refuses_pickle(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool("64MB")
    for name, value in cases().items():
        pool.put(name, value)
    for name, value in CASES.items():
        with pool.get(name) as kept:
            assert same(kept, value), name
    pool.evict()
    for name, value in CASES.items():
        with pool.get(name) as back:
            assert same(back, value), name
    pool.save(tmp_path / "saved")
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "saved"), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: v["t"], lambda v: v["t"].variable, lambda v: [v]])
def test_put_freezes_arrays_and_a_write_guard_thaws_them(wrap: Any, pool: FBPool) -> None:
    dataset = xr.Dataset({"t": ("x", np.arange(100.0))})
    pool.put("v", wrap(dataset))
    with pytest.raises(ValueError, match="read-only"):
        dataset["t"][0] = 1
    with pool.get_mut("v") as value:
        inner = value[0] if isinstance(value, list) else value
        (inner["t"] if isinstance(inner, xr.Dataset) else inner)[0] = 77
    pool.evict()
    with pool.get("v") as value:
        inner = value[0] if isinstance(value, list) else value
        inner = inner["t"] if isinstance(inner, xr.Dataset) else inner
        assert inner[0] == 77 and not inner.values.flags.writeable


def over(name: str, memory: Any) -> Any:
    """A case over memory of someone else's."""
    value = cases()[name]
    if isinstance(value, xr.Dataset):
        return value.assign(more=("more", memory[:10], {"a": 1}, {"b": 2}))
    if isinstance(value, xr.DataArray):
        value.variable.data = memory[:12].reshape(3, 4)
    elif isinstance(value, xr.Variable):
        value.data = memory[:12].reshape(3, 4)
    else:
        value.dataset = value.to_dataset().assign(more=("more", memory[:10]))
    return value


@pytest.mark.parametrize("name", ["plain", "stacked", "extension", "plain: t", "variable t", "tree"])
def test_a_value_over_memory_outside_is_copied_and_the_callers_is_left_alone(name: str, pool: FBPool) -> None:
    outside = np.zeros(1000)
    value, expected = over(name, outside), over(name, np.zeros(1000))
    pool.put("v", value)
    outside[:] = 1
    with pool.get("v") as kept:
        assert kept is not value and same(kept, expected)
    pool.evict()
    with pool.get_mut("v") as back:
        assert same(back, expected)
    with pool.get("v") as kept:
        assert same(kept, expected)


def test_a_reloaded_dataset_is_a_view_of_its_file(make_pool: Any) -> None:
    pool = make_pool("4MB")
    pool.put("v", cases()["large"])
    pool.evict()
    with pool.get("v") as back:
        values = back["a"].values
        assert not values.flags.owndata and not values.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            values.setflags(write=True)
    del back, values


@pytest.mark.parametrize("name", ["large", "large: a", "plain"])
def test_a_value_counts_what_its_arrays_take(name: str) -> None:
    value = CASES[name]
    truth = value.nbytes
    assert truth <= sizeof(value) <= truth * 1.2 + 10_000


def test_a_lazy_value_counts_next_to_nothing() -> None:
    pytest.importorskip("dask")
    array = xr.DataArray(np.zeros(10_000), dims="x").chunk({"x": 1000})
    assert sizeof(array) < 1000


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.filterwarnings("ignore")
def test_damage_gives_our_errors_or_a_value() -> None:
    rng = random.Random(3)
    for value in CASES.values():
        frames = CODEC.encode(value, allow_pickle=False)
        for _ in range(10):
            tree, buffers = damaged(rng, frames)
            spoilt = Frames("msgpack", tree, buffers)
            try:
                CODEC.decode(spoilt, writable=rng.random() < 0.5, allow_pickle=False)
            except OURS:
                pass
