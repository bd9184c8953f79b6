"""What goes through the codec comes back: values, their types, and what they share."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID, uuid1
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fbcache.codec import register
from fbcache.codec.tags import MAX_DEPTH
from fbcache.errors import UnsupportedTypeError
from tests.codec.roundtrip import CODEC, same, texts_of_any_length, through

zones = st.sampled_from(
    [None, UTC, timezone(timedelta(hours=-3, microseconds=5)), timezone(timedelta(1) / 2, "x")]
)
zones |= st.sampled_from([ZoneInfo("Europe/Berlin"), ZoneInfo("UTC")])
texts = st.text(st.characters(), max_size=8)  # surrogates included
hashable_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.complex_numbers()
    | texts
    | st.binary(max_size=8)
    | st.decimals().filter(lambda number: not number.is_snan())  # cannot be hashed
    | st.fractions()
    | st.uuids()
    | st.dates()
    | st.times(timezones=zones)
    | st.datetimes(timezones=zones)
    | st.timedeltas()
    | st.builds(range, st.integers(), st.integers(), st.integers(1, 2**70))
    | st.just(...)
    | zones
)
hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
leaves = (
    hashables
    | st.binary(max_size=8).map(bytearray)
    | st.builds(slice, st.integers(), st.none(), st.integers())
)
dtypes = (
    npst.scalar_dtypes()
    | npst.array_dtypes(allow_subarrays=True)
    | npst.nested_dtypes(max_itemsize=200)
    | st.sampled_from([np.dtype(c) for c in "qQgGeSUV"])
    | st.sampled_from([np.dtype("S5"), np.dtype(">U3"), np.dtype("V7"), np.dtype("M8"), np.dtype("<m8[25s]")])
)


def random_array(dtype: np.dtype[Any], shape: tuple[int, ...], order: str, seed: int) -> Any:
    raw = np.random.default_rng(seed).bytes(dtype.itemsize * math.prod(shape))
    if dtype.kind in "UTO" or dtype.names or not raw:
        return np.zeros(shape, dtype, order=order)
    return np.ndarray(shape, dtype, bytearray(raw), order=order).copy(order="A")


arrays = st.builds(
    random_array,
    dtypes,
    npst.array_shapes(min_dims=0, min_side=0, max_side=6),
    st.sampled_from("CF"),
    st.integers(0, 99),
)
values = st.recursive(
    leaves | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(hashables, max_size=4)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=15,
)


@settings(max_examples=300)
@given(values, st.booleans())
def test_values_come_back_as_they_were(value, writable):
    assert same(through(value, writable=writable), value)


@given(st.integers(-(2**65), 2**65))
def test_integers_around_64_bits(number):
    assert same(through([number, {"n": number}]), [number, {"n": number}])


@pytest.mark.parametrize("edge", [-(2**63) - 1, -(2**63), 2**63, 2**64 - 1, 2**64, 10**400, -(10**400)])
def test_integers_at_the_edge(edge):
    assert through({"a": edge}) == {"a": edge}


def test_one_bad_text_in_a_flat_dict():
    value = {"a": "\ud800", "\udfff": 1, "b": "fine"}
    assert same(through(value), value)


def test_keys_of_all_kinds_keep_their_order():
    value = {
        (1, (2, b"x")): 1,
        None: 2,
        frozenset({1}): 3,
        1.5: 4,
        b"b" * 5000: 5,
        "z": 6,
        "a": 7,
        date(2020, 1, 1): 8,
    }
    assert same(through(value), value)


def test_fold_and_zone_names_survive():
    value = datetime(2020, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)
    back = through([value, time(1, fold=1)])
    assert back[0].fold == back[1].fold == 1 and back[0].utcoffset() == value.utcoffset()
    assert back[0].tzinfo is value.tzinfo
    assert through(UTC) is UTC
    assert through(timezone(timedelta(hours=1), "CET")).tzname(None) == "CET"


def test_uuids_keep_what_they_know_of_their_safety():
    value = uuid1()
    assert through(value).is_safe is value.is_safe


def test_signalling_and_negative_zero_decimals():
    assert [str(d) for d in through([Decimal("sNaN12"), Decimal("-0E+3")])] == ["sNaN12", "-0E+3"]


def test_large_bytes_leave_the_tree():
    frames = CODEC.encode([b"x" * 100_000, bytearray(100_000)], allow_pickle=False)
    assert len(frames.tree) < 100 and [memoryview(b).nbytes for b in frames.buffers] == [100_000] * 2
    assert same(through([b"x" * 100_000, bytearray(100_000)]), [b"x" * 100_000, bytearray(100_000)])


# ------------------------------------------------------------------------- sharing and cycles


@register
class Colour(enum.Enum):
    RED = 1


@register
@dataclass
class Pair:
    x: Any
    y: Any


def test_what_occurs_twice_is_one_object_again():
    parts = [
        [1],
        {"a": 1},
        (1, [2]),
        {1},
        bytearray(b"x"),
        b"x" * 5000,
        np.arange(3),
        np.arange(300),
        slice(1),
    ]
    back = through({"first": parts, "again": list(parts), "nested": [{"deep": p} for p in parts]})
    for first, again, nested in zip(back["first"], back["again"], back["nested"], strict=True):
        assert first is again is nested["deep"]


def test_numbers_of_shared_parts_agree_whatever_stands_between():
    shared = [1, 2]
    between = [
        datetime.now(UTC),
        datetime(2020, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")),
        {(1, (2, 3)): [4], frozenset({(5,)}): {6}},
        np.array([1, "x", [2]], object),
        np.ma.array([1, 2], mask=[0, 1]),
        texts_of_any_length(["a"], na_object=None),
        np.zeros(2, [("a", "f4")])[0],
        Pair(1, [2]),
        Colour.RED,
        b"x" * 5000,
        range(1 << 70),
        print,
    ]
    for part in between:
        back = through([part, shared, part, shared], allow_pickle=True)
        assert back[1] == [1, 2] and back[1] is back[3]


@pytest.mark.parametrize("kind", ["list", "dict", "tuple", "object array", "dataclass"])
def test_a_value_that_contains_itself_is_refused_by_path(kind):
    inner: list[Any] = []
    outer: Any = {"list": inner, "dict": {"k": inner}, "tuple": (inner,), "dataclass": Pair(1, inner)}.get(
        kind
    )
    if outer is None:
        outer = np.empty(1, object)
        outer[0] = inner
    inner.append(outer)
    with pytest.raises(UnsupportedTypeError, match="contains itself") as caught:
        CODEC.encode({"a": outer}, allow_pickle=True)
    assert caught.value.path.startswith("value['a']")


def test_depth_is_bounded_on_both_sides_alike():
    def nested(depth: int) -> Any:
        value: Any = [datetime(2020, 1, 1, tzinfo=UTC)]
        for number in range(depth - 1):
            value = ([value, 1], (value, 1), {(1,): value}, {"k": value})[number % 4]
        return value

    assert through(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
    with pytest.raises(UnsupportedTypeError, match="nested more than") as caught:
        CODEC.encode(nested(MAX_DEPTH + 1), allow_pickle=True)
    assert caught.value.path.count("[") == MAX_DEPTH


def test_ids_are_all_kept_apart():
    value = [UUID(int=n) for n in range(3)] + [Fraction(n, 7) for n in range(3)]
    assert same(through(value), value)
