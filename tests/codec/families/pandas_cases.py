"""Values of pandas that are awkward, and what counts as the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import UTC, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
from pandas.api.extensions import ExtensionArray
from pandas.tseries import offsets

from tests.codec.roundtrip import same

VERSION = tuple(int(part) for part in pd.__version__.split(".")[:2])


def same_pandas(left: Any, right: Any) -> bool:
    """Equal in all that pandas shows, and in blocks and their order of memory."""
    if type(left) is not type(right):
        return False
    if isinstance(left, pd.DataFrame):
        blocks = [
            [(tuple(b.mgr_locs), b.values) for b in sorted(f._mgr.blocks, key=lambda b: tuple(b.mgr_locs))]
            for f in (left, right)
        ]
        return (
            _same_axes(left, right)
            and len(blocks[0]) == len(blocks[1])
            and all(
                places == others and same_values(values, other_values)
                for (places, values), (others, other_values) in zip(*blocks, strict=True)
            )
        )
    if isinstance(left, pd.Series):
        return (
            _same_axes(left, right)
            and same_label(left.name, right.name)
            and same_values(left._values, right._values)
        )
    if isinstance(left, pd.Index):
        return same_index(left, right)
    if isinstance(left, (ExtensionArray, np.ndarray)):
        return same_values(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(map(same_pandas, left.values(), right.values()))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_pandas, left, right))
    return same_label(left, right)


def _same_axes(left: Any, right: Any) -> bool:
    flags = left.flags.allows_duplicate_labels == right.flags.allows_duplicate_labels
    return flags and all(map(same_index, left.axes, right.axes)) and same_pandas(left.attrs, right.attrs)


def same_index(left: Any, right: Any) -> bool:
    if type(left) is not type(right) or len(left) != len(right) or left.dtype != right.dtype:
        return False
    if getattr(left, "freq", None) != getattr(right, "freq", None):
        return False
    if not same_pandas(list(left.names), list(right.names)):
        return False
    if isinstance(left, pd.RangeIndex):
        return (left.start, left.stop, left.step) == (right.start, right.stop, right.step)
    if isinstance(left, pd.MultiIndex):
        return (
            left.sortorder == right.sortorder
            and all(map(same_index, left.levels, right.levels))
            and all(map(same_values, left.codes, right.codes))
        )
    return same_values(left._data, right._data)


def same_values(left: Any, right: Any) -> bool:
    if type(left) is not type(right) or left.dtype != right.dtype or left.shape != right.shape:
        return False
    if isinstance(left, np.ndarray):
        orders = [(a.flags.c_contiguous, a.flags.f_contiguous) for a in (left, right)]
        if all(map(any, orders)) and orders[0] != orders[1]:  # what has gaps is copied together
            return False
        if left.dtype.hasobject:
            return all(map(same_pandas, left.ravel().tolist(), right.ravel().tolist()))
        return left.tobytes() == right.tobytes()
    if getattr(left.dtype, "na_value", None) is not getattr(right.dtype, "na_value", None):
        return False
    if getattr(left.dtype, "storage", None) != getattr(right.dtype, "storage", None):
        return False
    if isinstance(left, pd.Categorical):
        return same_values(left._ndarray, right._ndarray) and same_index(left.categories, right.categories)
    if isinstance(left, pd.arrays.SparseArray) and type(left.sp_index) is not type(right.sp_index):
        return False
    if hasattr(left, "freq") and left.freq != right.freq:
        return False
    return all(map(same_label, np.asarray(left, object).ravel(), np.asarray(right, object).ravel()))


def same_label(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if left is right or left is pd.NaT:
        return left is right
    if isinstance(left, pd.Timestamp):
        zones = str(left.tzinfo) == str(right.tzinfo) and type(left.tzinfo) is type(right.tzinfo)
        return zones and left == right and (left.unit, left.fold) == (right.unit, right.fold)
    if isinstance(left, pd.Timedelta):
        return left == right and left.unit == right.unit
    if isinstance(left, offsets.BaseOffset):
        return left == right and left.kwds.keys() == right.kwds.keys()
    if isinstance(left, (pd.DataFrame, pd.Series, pd.Index, ExtensionArray, np.ndarray)):
        return same_pandas(left, right)
    return same(left, right)


# ---------------------------------------------------------------------------------------- table

Make = Callable[[], Any]
CASES: dict[str, Make] = {}


def case(make: Make) -> Make:
    CASES[make.__name__] = make
    return make


@case
def every_dtype() -> Any:
    days = pd.date_range("2020-01-31", periods=3, freq="D")
    return pd.DataFrame(
        {
            "f": [1.5, float("nan"), -0.0],
            "g": [1.0, 2.0, 3.0],
            "half": np.array([1, 2, 3], "f2"),
            "small": np.array([1, 2, 3], "i1"),
            "big": np.array([1, 2, 3], ">i4").astype("u8"),
            "flag": [True, False, True],
            "complex": [1j, 2, 3],
            "object": np.array(["x", None, [1, {"k": (2,)}]], object),
            "texts": ["a", None, "ü"],
            "string": pd.array(["x", pd.NA, ""], dtype=pd.StringDtype("python")),
            "int": pd.array([1, None, 3], dtype="Int16"),
            "float": pd.array([1.5, None, 3], dtype="Float32"),
            "bool": pd.array([True, None, False], dtype="boolean"),
            "category": pd.Categorical(["b", "a", None], categories=["b", "a", "unused"], ordered=True),
            "days": days,
            "seconds": days.as_unit("s"),
            "zone": days.tz_localize(ZoneInfo("Europe/Paris")),
            "zone2": days.tz_localize(ZoneInfo("Europe/Paris")),
            "utc": days.tz_localize("UTC").as_unit("us"),
            "offset": days.tz_localize(timezone(timedelta(hours=2))),
            "span": pd.to_timedelta([1, None, 3], unit="h"),
            "period": pd.PeriodIndex(["2020-01", None, "2020-03"], freq="M"),
            "interval": pd.arrays.IntervalArray.from_breaks([0, 1, 2, 3], closed="both"),
            "intervals of times": pd.IntervalIndex.from_breaks(pd.date_range("2020", periods=4)),
            "sparse": pd.arrays.SparseArray([0, 0, 7]),
            "blocks": pd.arrays.SparseArray([1.0, np.nan, 2.0], kind="block"),
        }
    )


@case
def arrow_dtypes() -> Any:
    pa = __import__("pytest").importorskip("pyarrow")
    return pd.DataFrame(
        {
            "numbers": pd.array([1, None, 3], dtype=pd.ArrowDtype(pa.int32())),
            "texts": pd.array(["a", None, "c"], dtype=pd.ArrowDtype(pa.string())),
            "string": pd.array(["a", None, "c"], dtype=pd.StringDtype("pyarrow")),
            "lists": pd.array([[1], None, []], dtype=pd.ArrowDtype(pa.list_(pa.int8()))),
            "times": pd.array([1, None, 3], dtype=pd.ArrowDtype(pa.timestamp("us", "UTC"))),
        }
    )


@case
def empty_frames() -> Any:
    return [
        pd.DataFrame(),
        pd.DataFrame(columns=["a", "b"]),
        pd.DataFrame(index=range(5)),
        pd.DataFrame(np.zeros((0, 3))),
        pd.DataFrame(np.zeros((3, 0))),
        pd.DataFrame({"a": pd.array([], dtype="Int64"), "c": pd.Categorical([]), "t": pd.DatetimeIndex([])}),
        pd.DataFrame(index=pd.RangeIndex(10**12)),
        pd.Series([], dtype=float),
        pd.Series([], dtype=object, name="nothing"),
        pd.Index([]),
        pd.MultiIndex.from_arrays([[], []]),
    ]


@case
def columns_of_all_sorts() -> Any:
    frame = pd.DataFrame(np.arange(12.0).reshape(2, 6))
    frame.columns = pd.Index(["a", "a", 1, None, ("t", 2), 1.5], dtype=object, tupleize_cols=False)
    duplicated = pd.DataFrame([[1, 2.5, 3, "x"]], columns=["a", "a", "a", "a"])
    two_levels = pd.DataFrame(
        np.eye(4), columns=pd.MultiIndex.from_product([["p", "q"], [1, 2]], names=["u", ("v", 1)])
    )
    numbered = pd.DataFrame(np.eye(2), columns=[10, 20])
    return [frame, duplicated, two_levels, numbered, numbered.T, pd.DataFrame(np.eye(3))[[2, 0]]]


@case
def orders_of_memory() -> Any:
    base = np.arange(24.0).reshape(4, 6)
    frames = [
        pd.DataFrame(base, copy=True),
        pd.DataFrame(np.asfortranarray(base), copy=False),
        pd.DataFrame(base, copy=False),
        pd.DataFrame(base[:, ::-1].copy(), copy=False),
    ]
    scattered = pd.DataFrame({"a": [1.0, 2], "i": [1, 2], "b": [3.0, 4], "j": [3, 4], "c": [5.0, 6]})
    fragmented = pd.DataFrame({"a": [1.0, 2]})
    for name in "bcd":
        fragmented[name] = [1.0, 2.0]
    return [*frames, scattered, fragmented]


@case
def attrs_and_flags() -> Any:
    frame = pd.DataFrame({"a": [1, 2]}, index=["x", "y"]).set_flags(allows_duplicate_labels=False)
    frame.attrs = {"unit": "m", "calibration": np.arange(3), "nested": {"k": [1, (2,)]}}
    series = pd.Series([1, 2], name=("a", 1)).set_flags(allows_duplicate_labels=False)
    series.attrs["source"] = "here"
    return [frame, series]


@case
def series_of_all_sorts() -> Any:
    return [
        pd.Series([1, 2, 3], index=list("abc"), name="n"),
        pd.Series(["a", None, 1.5, {"k": 1}, b"b", pd.Timestamp("2020"), pd.NaT, pd.NA], dtype=object),
        pd.Series(pd.Categorical([3, 1, 3])),
        pd.Series(pd.Categorical([pd.Timestamp("2020"), None])),
        pd.Series(pd.date_range("2020", periods=3, tz="UTC"), name=3),
        pd.Series(np.array(["ab", "c"], "S2")),
        pd.Series([pd.DataFrame({"a": [1]}), pd.Series([2])], dtype=object),
        pd.Series([1 << 70, -(1 << 65)], dtype=object),
    ]


@case
def indexes() -> Any:
    unsorted = pd.MultiIndex.from_tuples([("b", 2), ("a", 1), (None, 2)], names=["x", None])
    lexsorted = pd.MultiIndex.from_product([["a", "b"], [1, 2]]).sortlevel()[0]
    days = pd.date_range("2020-01-01", periods=5, freq="D")
    paris = pd.date_range("2020-10-24", periods=5, freq="D", tz=ZoneInfo("Europe/Paris"))
    return [
        pd.Index([3, 1, 2], name="n"),
        pd.Index([1.5, np.nan], name=("tuple", 1)),
        pd.Index(["a", "b"], dtype=object, name=frozenset({1})),
        pd.Index([True, False]),
        pd.Index([("a", 1), "b", None], tupleize_cols=False),
        pd.Index(np.array([1, 2], "u1")),
        pd.Index(pd.array([1, None], dtype="Int64")),
        pd.Index(["a", None], dtype=pd.StringDtype("python")),
        pd.Index([1j]),
        pd.RangeIndex(5, 100, 7, name="r"),
        pd.RangeIndex(10, 0, -3),
        unsorted,
        lexsorted,
        unsorted.set_levels([pd.CategoricalIndex(["a", "b"]), pd.Index([1, 2])]),
        pd.MultiIndex.from_arrays([days, days.tz_localize("UTC"), pd.interval_range(0, 5)]),
        pd.MultiIndex([["a", "b"]], [[0, 1]], sortorder=1),
        days,
        days[::-1],
        days.tz_localize(UTC),
        paris,
        days.as_unit("s")._with_freq(None),
        pd.DatetimeIndex(["2020-01-01", None]),
        pd.date_range("2020", periods=4, freq=offsets.CustomBusinessDay(holidays=["2020-01-02"])),
        pd.date_range("2020", periods=4, freq="QE-FEB"),
        pd.timedelta_range("1h", periods=4, freq="90min", name="td"),
        pd.TimedeltaIndex([timedelta(1), None]),
        pd.period_range("2020", periods=4, freq="Q-NOV", name="p"),
        pd.PeriodIndex(["2020-01-01 10:00", None], freq="2h"),
        pd.CategoricalIndex(["b", "a", "b"], categories=["b", "a"], ordered=True, name="c"),
        pd.interval_range(pd.Timestamp("2020"), periods=3, closed="neither"),
        pd.IntervalIndex.from_tuples([(0.0, 1.0), np.nan, (0.5, 2.0)]),
    ]


@case
def arrays_alone() -> Any:
    frame = every_dtype()
    return [frame[name].array for name in frame if not isinstance(frame[name].dtype, np.dtype)] + [
        pd.date_range("2020", periods=3, freq="D")._data,
        pd.arrays.NumpyExtensionArray(np.arange(3)),
        pd.arrays.NumpyExtensionArray(np.array(["x", None], object)),
        pd.arrays.SparseArray([]),
        pd.arrays.SparseArray(["a", None], fill_value=None, dtype=object),
        pd.Categorical.from_codes([], categories=range(1000)),
        pd.Categorical.from_codes([-1, 0, 299], categories=range(300)),
        pd.array([], dtype="string"),
    ]


@case
def scalars() -> Any:
    ambiguous = pd.Timestamp("2020-10-25 00:30", tz="UTC").tz_convert(ZoneInfo("Europe/Paris"))
    return [
        pd.Timestamp("2020-01-01 10:00:00.123456789"),
        pd.Timestamp("2020-01-01").as_unit("s"),
        pd.Timestamp("0001-01-01").as_unit("s"),
        pd.Timestamp.min,
        pd.Timestamp.max,
        pd.Timestamp("2020-01-01").replace(fold=1),
        ambiguous,
        ambiguous + timedelta(hours=1),
        pd.Timestamp("2020", tz="UTC"),
        pd.Timestamp("2020", tz=timezone(timedelta(hours=-3, minutes=30))),
        pd.Timedelta("1d 3ns"),
        pd.Timedelta(5, "s").as_unit("ms"),
        pd.Timedelta.max,
        pd.Period("2020-03", "M"),
        pd.Period("2020-01-01 10:05", "5min"),
        pd.Interval(0, 1.5, closed="left"),
        pd.Interval(pd.Timestamp("2020"), pd.Timestamp("2021")),
        pd.NaT,
        pd.NA,
        {"k": [pd.NaT, pd.NaT, pd.NA], "at": {pd.Timestamp("2020"): 1, pd.NaT: 2}},
    ]


@case
def frequencies() -> Any:
    return [
        offsets.MonthEnd(3),
        offsets.Hour(-2),
        offsets.Day(normalize=False),
        offsets.Week(weekday=2),
        offsets.QuarterEnd(startingMonth=2),
        offsets.BusinessHour(start=["09:00", "13:00"], end=["12:00", "17:30"]),
        offsets.BusinessDay(2, offset=timedelta(hours=1), normalize=True),
        offsets.CustomBusinessDay(2, holidays=["2020-01-01"], weekmask="Mon Tue"),
        offsets.DateOffset(months=3, day=2),
        offsets.FY5253Quarter(qtr_with_extra_week=2, startingMonth=3, weekday=1),
        offsets.Easter(),
    ]


@case
def shared_parts() -> Any:
    index = pd.date_range("2020", periods=100, freq="h")
    frame = pd.DataFrame({"a": np.arange(100.0), "b": np.arange(100.0)}, index=index)
    return {"frame": frame, "again": frame, "index": index, "series": pd.Series(range(100), index=index)}


@case
def zones_of_pytz() -> Any:
    pytz = __import__("pytest").importorskip("pytz")
    days = pd.date_range("2020-10-24", periods=3)
    zones = [pytz.timezone("Europe/Paris"), pytz.utc, pytz.FixedOffset(90)]
    return [days.tz_localize(zone) for zone in zones] + [days.tz_localize(zone)[0] for zone in zones]


def made(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CASES[name]()
