"""Values of pandas come back as they were: dtypes, blocks, names, attributes, and what they share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pd = pytest.importorskip("pandas", minversion="2.1")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as npst  # noqa: E402
from hypothesis.extra import pandas as pdst  # noqa: E402

from fbcache.errors import PickleRefusedError  # noqa: E402
from tests.codec.families.pandas_cases import CASES, made, same_pandas  # noqa: E402
from tests.codec.roundtrip import CODEC, through  # noqa: E402


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_awkward_values_come_back_as_they_were(name, writable, trusted):
    value = made(name)
    assert CODEC.encode(value, allow_pickle=True).pickled is None
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        back = through(part, writable=writable, allow_pickle=trusted)
        assert same_pandas(part, back), (part, back)
    assert same_pandas(value, through(value, writable=writable, allow_pickle=trusted))


def test_the_comparison_notices_differences():
    for name in ("indexes", "series_of_all_sorts", "empty_frames", "scalars", "frequencies"):
        for part, other in pairwise(made(name)):
            assert same_pandas(part, part) and not same_pandas(part, other)
    frame = made("every_dtype")
    for column in frame.columns[1:]:
        assert not same_pandas(frame, frame.drop(columns=[column]))
    one, two = pd.DataFrame({"a": [1.0], "b": [2.0]}), pd.DataFrame({"a": [1.0]})
    two["b"] = [2.0]
    assert not same_pandas(one, two) and one.equals(two)


# ------------------------------------------------------------------------------------ hypothesis

numbers = st.sampled_from(["f8", "f4", "i8", "i1", "u2", "?", "c16", "M8[ns]", "m8[ns]", "M8[s]"])
labels = st.text(max_size=3) | st.integers(-5, 5) | st.tuples(st.text(max_size=2), st.integers(0, 3))
objects = st.none() | st.text(max_size=4) | st.integers() | st.floats() | st.lists(st.integers(), max_size=2)


@st.composite
def frames(draw: Any) -> Any:
    rows = draw(st.integers(0, 5))
    names = draw(st.lists(labels, max_size=5))
    columns = [draw(column(rows)) for _ in names]
    frame = pd.concat([pd.Series(part) for part in columns], axis=1) if columns else pd.DataFrame()
    frame.columns = pd.Index(names, dtype=object, tupleize_cols=False, name=draw(st.none() | labels))
    return frame.set_axis(draw(axis(len(frame))), axis=0)


def column(rows: int) -> Any:
    plain = numbers.flatmap(lambda dtype: npst.arrays(dtype, rows)).map(pd.Series)
    mixed = st.lists(objects, min_size=rows, max_size=rows).map(lambda items: pd.Series(items, dtype=object))
    codes = st.lists(st.integers(-1, 2), min_size=rows, max_size=rows)
    categories = codes.map(lambda c: pd.Series(pd.Categorical.from_codes(c, categories=["x", "y", "z"])))
    nullable = st.lists(st.none() | st.integers(-9, 9), min_size=rows, max_size=rows)
    integers = nullable.map(lambda items: pd.Series(pd.array(items, dtype="Int32")))
    texts = st.lists(st.none() | st.text(max_size=3), min_size=rows, max_size=rows)
    strings = texts.map(lambda items: pd.Series(pd.array(items, dtype=pd.StringDtype("python"))))
    return plain | mixed | categories | integers | strings


def axis(rows: int) -> Any:
    sized = {"min_size": rows, "max_size": rows}
    plain = st.lists(labels, **sized).map(lambda items: pd.Index(items, dtype=object, tupleize_cols=False))
    days = st.sampled_from(["D", "ME", "7min"]).map(lambda f: pd.date_range("2020", periods=rows, freq=f))
    pairs = st.lists(st.tuples(st.integers(0, 2), st.text(max_size=1)), **sized)
    levels = pairs.filter(bool).map(lambda items: pd.MultiIndex.from_tuples(items, names=["p", None]))
    return st.just(pd.RangeIndex(rows)) | plain | days | (levels if rows else plain)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames(), st.booleans(), st.booleans())
def test_any_frame_comes_back(frame, writable, trusted):
    assert same_pandas(frame, through(frame, writable=writable, allow_pickle=trusted))


@settings(max_examples=100, deadline=None)
@given(
    numbers.filter(lambda d: d != "M8[s]").flatmap(lambda dtype: pdst.series(dtype=np.dtype(dtype))), labels
)
def test_any_series_and_its_index_come_back(series, name):
    series.name = name
    assert same_pandas(series, through(series))
    if series.dtype != complex:
        assert same_pandas(pd.Index(series), through(pd.Index(series)))


# --------------------------------------------------------------------------------------- sharing


def test_one_object_twice_is_one_object_again():
    back = through(made("shared_parts"))
    assert back["frame"] is back["again"] and back["index"] is back["frame"].index is back["series"].index


def test_a_frame_and_an_array_over_one_memory_share_it_again():
    array = np.arange(1000.0).reshape(100, 10)
    value = {"frame": pd.DataFrame(array, copy=False), "array": array}
    back = through(value)
    assert np.shares_memory(back["frame"].to_numpy(), back["array"])
    assert len(CODEC.encode(value, allow_pickle=False).buffers) == 1


def test_a_block_goes_out_and_comes_in_without_a_copy():
    frame = pd.DataFrame(np.arange(100_000.0).reshape(10_000, 10))
    index = pd.Index(np.arange(10_000)[::-1].copy(), copy=False)
    frame.index = index
    frames = CODEC.encode(frame, allow_pickle=False)
    taken = [np.frombuffer(buffer, np.uint8) for buffer in frames.buffers]
    for array in (frame._mgr.blocks[0].values, index._data):
        assert any(np.shares_memory(array, buffer) for buffer in taken)
    back = CODEC.decode(frames, writable=False, allow_pickle=False)
    for array in (back._mgr.blocks[0].values, back.index._data):
        assert any(np.shares_memory(array, buffer) for buffer in taken) and not array.flags.owndata


@pytest.mark.parametrize(
    "dtype", ["datetime64[ns, UTC]", "category", "Int64", "period[D]", "Sparse[float64]", "m8[ns]"]
)
def test_arrays_of_pandas_are_views_too(dtype):
    series = pd.Series(np.arange(5000), dtype="i8")
    if dtype == "period[D]":
        series = pd.Series(pd.period_range("2020", periods=5000))
    elif dtype.startswith("Sparse"):
        series = pd.Series(pd.arrays.SparseArray(np.arange(5000.0)))
    else:
        series = series.astype(dtype)
    frames = CODEC.encode(series, allow_pickle=False)
    assert sum(memoryview(buffer).nbytes for buffer in frames.buffers) >= 5000
    for trusted in (False, True):
        back = CODEC.decode(frames, writable=False, allow_pickle=trusted)
        own = getattr(back._values, "_ndarray", None)
        own = own if own is not None else getattr(back._values, "_data", None)
        own = own if own is not None else back._values.sp_values
        assert not own.flags.owndata and not own.flags.writeable
        assert any(np.shares_memory(own, np.frombuffer(buffer, np.uint8)) for buffer in frames.buffers)


def test_a_repeated_row_takes_its_full_memory_and_comes_back():
    frame = pd.DataFrame(np.broadcast_to(np.arange(50.0), (40, 50)), copy=False)
    back = through(frame)
    assert back.equals(frame)


# --------------------------------------------------------------------------------------- strangers


class MyFrame(pd.DataFrame):
    pass


def test_subclasses_go_by_pickle():
    with pytest.raises(PickleRefusedError, match="MyFrame"):
        CODEC.encode(MyFrame({"a": [1]}), allow_pickle=False)
    assert type(through(MyFrame({"a": [1]}), allow_pickle=True)) is MyFrame


class Strange(pd.arrays.IntegerArray):
    pass


def test_a_column_of_a_strange_array_is_pickled_by_itself():
    odd = Strange(np.arange(1000), np.zeros(1000, bool))
    frame = pd.DataFrame({"a": np.arange(1000.0), "odd": pd.Series(odd)})
    with pytest.raises(PickleRefusedError, match="odd"):
        CODEC.encode(frame, allow_pickle=False)
    back = through(frame, allow_pickle=True)
    assert back.equals(frame) and type(back["odd"].array) is Strange
    assert not back["a"].to_numpy().flags.owndata


def test_pandas_texts_by_default():
    series = pd.Series(["a", None, "c"])
    assert same_pandas(series, through(series))
