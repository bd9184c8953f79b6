"""The fallback: what takes pickle, what it keeps, and how its refusals are told."""

from __future__ import annotations

import enum
from collections import Counter, namedtuple
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Any

import numpy as np
import pytest

from fbcache.codec import register
from fbcache.errors import PickleRefusedError, UnsupportedTypeError
from tests.codec.roundtrip import CODEC, same, through


@register
@dataclass
class Record:
    x: Any
    y: Any


class Small(enum.IntEnum):
    ONE = 1


class Text(str):
    pass


class Zone(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1)

    def dst(self, moment: datetime | None) -> None:
        return None

    def tzname(self, moment: datetime | None) -> str:
        return "Z"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Zone)

    def __hash__(self) -> int:
        return 1


class Holder:
    def __init__(self, **content: Any) -> None:
        self.__dict__.update(content)


Pair = namedtuple("Pair", "a b")
SUBCLASSES = [Small.ONE, Counter(a=1), Pair(1, 2), Text("x"), np.rec.array([(1,)]), np.ma.masked]


@pytest.mark.parametrize("value", SUBCLASSES, ids=lambda value: type(value).__name__)
def test_a_subclass_is_never_taken_for_its_base(value):
    with pytest.raises(PickleRefusedError) as caught:
        CODEC.encode({"a": [1, value]}, allow_pickle=False)
    assert caught.value.path == "value['a'][1]" and type(value).__qualname__ in str(caught.value)
    back = through({"a": [1, value]}, allow_pickle=True)["a"][1]
    assert type(back) is type(value) and str(back) == str(value)


def test_the_first_pickled_part_is_noted_and_only_parts_are_pickled():
    frames = CODEC.encode({"x": np.arange(1000), "f": [1, Small.ONE], "g": Text()}, allow_pickle=True)
    assert frames.pickled == f"value['f'][1]: {__name__}.Small"
    assert CODEC.encode({"x": 1}, allow_pickle=True).pickled is None
    with pytest.raises(PickleRefusedError, match="Small") as caught:
        CODEC.decode(frames, writable=False, allow_pickle=False)
    assert caught.value.path == "value['f'][1]"


def test_a_time_zone_of_the_users_own_and_one_from_a_file():
    value = {"t": datetime(2020, 1, 1, tzinfo=Zone())}
    assert through(value, allow_pickle=True) == value
    with pytest.raises(PickleRefusedError, match="Zone"):
        CODEC.encode(value, allow_pickle=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_arrays_in_a_pickled_part_go_out_of_band_whatever_they_are(frozen):
    content = {
        "plain": np.arange(1000.0),
        "times": np.arange(1000).astype("M8[s]"),
        "fortran": np.asfortranarray(np.ones((30, 40))),
        "strided": np.arange(3000)[::3],
        "fields": np.zeros(100, [("a", "f4"), ("b", "M8[D]")]),
    }
    for array in content.values():
        array.flags.writeable = not frozen
    frames = CODEC.encode(Holder(**content), allow_pickle=True)
    assert len(frames.tree) < 1000 and len(frames.buffers) == len(content)
    for writable in (False, True):
        back = vars(through(Holder(**content), writable=writable, allow_pickle=True))
        assert same(back, content)
        assert all(array.flags.writeable is writable for array in back.values())
    assert not frozen or not content["plain"].flags.writeable


def test_a_pickled_part_of_any_size_and_with_odd_arrays():
    content = {"text": "x" * 100_000, "objects": np.array([1, "a"], object), "empty": np.zeros((0, 3))}
    assert same(vars(through(Holder(**content), allow_pickle=True)), content)


def test_a_part_that_pickle_refuses_is_named_with_the_cause():
    with pytest.raises(UnsupportedTypeError, match="pickle fails") as caught:
        CODEC.encode({"a": [0, Record(1, lambda: None)]}, allow_pickle=True)
    assert caught.value.path == "value['a'][1].y" and caught.value.__cause__ is not None


def test_a_pickle_whose_class_is_gone_says_so(monkeypatch):
    frames = CODEC.encode(Holder(a=1), allow_pickle=True)
    monkeypatch.delitem(globals(), "Holder")
    with pytest.raises(UnsupportedTypeError, match="cannot be imported"):
        CODEC.decode(frames, writable=False, allow_pickle=True)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (lambda bad: [0, (1, {"k": bad})], "value[1][1]['k']"),
        (lambda bad: {bad: 1}, "value.keys()"),
        (lambda bad: {2, bad}, "value{...}"),
        (lambda bad: Record(1, [bad]), "value.y[0]"),
        (lambda bad: np.array([1, bad], object), "value[1]"),
        (lambda bad: {"long" * 100: bad}, None),
    ],
)
def test_paths(value, path):
    with pytest.raises(PickleRefusedError) as caught:
        CODEC.encode(value(Small.ONE), allow_pickle=False)
    assert caught.value.path == path or (path is None and len(caught.value.path) < 100)
