"""Damaged trees and buffers of pandas' values give an error of ours, or a value that can be used."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

pd = pytest.importorskip("pandas", minversion="2.1")

from fbcache.codec import Frames, tags  # noqa: E402
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError  # noqa: E402
from tests.codec.families.pandas_cases import CASES, made  # noqa: E402
from tests.codec.roundtrip import CODEC  # noqa: E402

OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)
ROOT = Path(__file__).parents[3]
SKIPPED = {"zones_of_pytz"}
LEAVES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    300,
    1 << 31,
    1 << 40,
    (1 << 63) - 1,
    1.5,
    "",
    "x",
    "<i8",
    "<M8[ns]",
    b"",
    b"\xff" * 8,
]


def samples() -> list[Any]:
    big = pd.DataFrame({"a": np.arange(300.0), "b": pd.Categorical(list("xyz") * 100), "i": np.arange(300)})
    big.index = pd.MultiIndex.from_product([range(30), pd.date_range("2020", periods=10)])
    return [big, *(made(name) for name in CASES if name not in SKIPPED)]


def use(value: Any) -> None:
    """Touch what pandas reads without looking; whatever it raises, the process has to survive."""
    if isinstance(value, (list, tuple)):
        for part in value:
            use(part)
        return
    try:
        repr(value)
        if len(value) < 10_000:
            if isinstance(value, pd.DataFrame):
                value.reset_index().isna().sum().sum(), value.iloc[::-1].equals(value)
            elif isinstance(value, pd.Series):
                value.sort_values(), value.unique(), value.astype(object)
            else:
                value.take([0, -1]), value.astype(object), value.isna()
    except Exception:
        pass


def survives(tree: bytes, buffers: list[bytes]) -> bool:
    for writable in (False, True):
        try:
            value = CODEC.decode(Frames("msgpack", tree, buffers), writable=writable, allow_pickle=False)
        except OURS:
            continue
        use(value)
    return True


def flipped(rng: random.Random, tree: bytes) -> bytes:
    damaged = bytearray(tree)
    for _ in range(rng.choice((1, 1, 2, 5))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def edited(rng: random.Random, tree: bytes) -> bytes:
    """A node somewhere is replaced by a leaf, or by another node of the tree."""
    root = msgpack.unpackb(tree, strict_map_key=False)
    places: list[tuple[Any, Any]] = []
    pending = [root]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (list, dict)):
                pending.append(node[key])
    node, key = rng.choice(places)
    other, other_key = rng.choice(places)
    node[key] = rng.choice([*LEAVES, other[other_key]]) if rng.random() < 0.8 else rng.randrange(-3, 400)
    try:
        return msgpack.packb(root)
    except (ValueError, RecursionError):  # a node came into itself
        return tree


def torment(seed: int, count: int) -> None:
    """Runs in a process of its own, which may die."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a range may be long, and be made an array
    rng = random.Random(seed)
    taken = [CODEC.encode(value, allow_pickle=False) for value in samples()]
    for frames in taken:
        buffers = [bytes(memoryview(buffer)) for buffer in frames.buffers]
        for _ in range(count):
            survives(flipped(rng, frames.tree), buffers)
            survives(edited(rng, frames.tree), buffers)
            if buffers:
                place = rng.randrange(len(buffers))
                changed = list(buffers)
                noise = rng.randbytes(len(changed[place]))
                changed[place] = rng.choice([noise, changed[place][:-1], b"", rng.choice(buffers)])
                survives(frames.tree, changed)
        for length in range(0, len(frames.tree), 97):
            survives(frames.tree[:length], buffers)
    sys.stdout.write("survived")


def test_damage_gives_our_errors_or_a_value_that_can_be_used():
    script = "from tests.codec.families.test_pandas_hostile import torment; torment(1, 60)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.endswith("survived"), done.stderr[-3000:]


# ------------------------------------------------------------------------------- by hand


def refused(value: Any, change: Any) -> None:
    """Edit the tree of a value; it must be refused, quickly and in little memory."""
    frames = CODEC.encode(value, allow_pickle=False)
    tree = msgpack.unpackb(frames.tree, strict_map_key=False)
    change(tree)
    damaged = Frames("msgpack", msgpack.packb(tree), frames.buffers)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlobError):
            CODEC.decode(damaged, writable=False, allow_pickle=False)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def node_of(tree: Any, name: str) -> Any:
    """The state of the first node of a kind."""
    pending = [tree]
    while pending:
        node = pending.pop(0)
        if type(node) is list:
            if node[:1] == [tags.FAMILY] and len(node) > 1 and node[1] == name:
                return node[2]
            pending += node
        elif type(node) is dict:
            pending += node.values()
    raise LookupError(name)


def put(name: str, *place: int, value: Any) -> Any:
    def change(tree: Any) -> None:
        node = node_of(tree, name)
        for index in place[:-1]:
            node = node[index]
        node[place[-1]] = value

    return change


def array(*items: int, dtype: str = "<i8") -> list[Any]:
    return [tags.ARRAY, dtype, [len(items)], np.array(items, dtype).tobytes(), False]


RANGE = [tags.FAMILY, "pandas.RangeIndex", [0, 10**12, 1, None]]
FRAME = pd.DataFrame({"a": [1.0, 2], "b": [3.0, 4], "c": [1, 2]})
LEVELS = pd.MultiIndex.from_product([[10, 20], [1, 2]])
SPARSE = pd.arrays.SparseArray([0, 0, 7, 8])
BLOCKS = pd.arrays.SparseArray([0, 0, 7, 8], kind="block")
EXPONENTIAL: Any = [tags.TUPLE, ["x"]]
for _ in range(60):
    EXPONENTIAL = [tags.TUPLE, [EXPONENTIAL, [tags.REF, 0]]]

CHANGES = {
    "a code of no category": (pd.Categorical(["a", "b"]), put("pandas.Categorical", 0, value=array(0, 2))),
    "a code below -1": (pd.Categorical(["a", "b"]), put("pandas.Categorical", 0, value=array(0, -2))),
    "categories twice": (pd.Categorical([1, 2]), put("pandas.Index", 1, value=array(1, 1))),
    "categories that are none": (
        pd.Categorical([1, 2]),
        put("pandas.Categorical", 1, value=[tags.LIST, [1]]),
    ),
    "a level's code": (LEVELS, put("pandas.MultiIndex", 1, 0, value=array(0, 0, 1, 2))),
    "a level's code below": (LEVELS, put("pandas.MultiIndex", 1, 0, value=array(0, 0, 1, -9))),
    "codes of two lengths": (LEVELS, put("pandas.MultiIndex", 1, 0, value=array(0, 0, 1))),
    "a level that repeats": (LEVELS, put("pandas.Index", 1, value=array(5, 5))),
    "a sort order": (LEVELS[[0, 2, 1, 3]], put("pandas.MultiIndex", 2, value=2)),
    "an index too long": (FRAME, put("pandas.DataFrame", 0, value=RANGE)),
    "too many columns": (FRAME, put("pandas.DataFrame", 1, value=RANGE)),
    "a place taken twice": (FRAME, put("pandas.DataFrame", 2, 0, 1, value=[1, 1])),
    "a place out of bounds": (FRAME, put("pandas.DataFrame", 2, 0, 1, value=[3, 1])),
    "a place below": (FRAME, put("pandas.DataFrame", 2, 0, 1, value=[-1, 1])),
    "an axis that is none": (FRAME, put("pandas.DataFrame", 0, value=[tags.LIST, [1, 2]])),
    "a huge empty block": (
        pd.DataFrame(np.zeros((0, 3)), columns=[1, 2, 3]),
        lambda tree: (
            put("pandas.DataFrame", 2, value=[[[tags.ARRAY, "<f8", [10**12, 0], b"", False], [0, 1]]])(tree),
            put("pandas.DataFrame", 1, value=RANGE)(tree),
        ),
    ),
    "memory that repeats": (
        pd.Series(np.arange(100.0)),
        put("pandas.Series", 1, value=[tags.VIEW, "<f8", [10**12], 0, 0, [0]]),
    ),
    "a mask too short": (pd.array([1, None]), put("pandas.IntegerArray", 1, value=array(1, dtype="|b1"))),
    "texts that are numbers": (
        pd.array(["a"], dtype=pd.StringDtype("python")),
        put("pandas.StringArray", 1, value=[1]),
    ),
    "places out of order": (SPARSE, put("pandas.SparseArray", 3, 0, value=array(3, 1, dtype="<i4"))),
    "places out of bounds": (SPARSE, put("pandas.SparseArray", 3, 0, value=array(2, 9, dtype="<i4"))),
    "places below": (SPARSE, put("pandas.SparseArray", 3, 0, value=array(-2, 1, dtype="<i4"))),
    "a length below": (SPARSE, put("pandas.SparseArray", 2, value=-1)),
    "a length beyond": (SPARSE, put("pandas.SparseArray", 2, value=1 << 33)),
    "a stretch below": (BLOCKS, put("pandas.SparseArray", 3, 0, value=array(-2, dtype="<i4"))),
    "a stretch too long": (BLOCKS, put("pandas.SparseArray", 3, 1, value=array((1 << 31) - 1, dtype="<i4"))),
    "a frequency that is not": (
        pd.date_range("2020", periods=3),
        put("pandas.DatetimeIndex", 1, value=[tags.FAMILY, "pandas.offsets.Hour", [7, False, {}]]),
    ),
    "an offset's calendar": (pd.offsets.Hour(1), put("pandas.offsets.Hour", 2, value={"calendar": 1})),
    "bounds in disorder": (
        pd.arrays.IntervalArray.from_breaks([0, 1, 2]),
        put("pandas.IntervalArray", 0, value=array(9, 9)),
    ),
    "a unit": (pd.Timestamp("2020"), put("pandas.Timestamp", 1, value="Y")),
    "not a time": (pd.Timestamp("2020"), put("pandas.Timestamp", 0, value=-(1 << 63))),
    "a name without hash": (pd.Series([1]), put("pandas.Series", 2, value=[tags.LIST, [1]])),
    "a name that takes for ever": (pd.Series([1]), put("pandas.Series", 2, value=EXPONENTIAL)),
    "a zone": (pd.Timestamp("2020", tz="UTC"), put("pandas.Timestamp", 2, value=["", 5])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_pandas_would_believe_is_refused(name):
    refused(*CHANGES[name])


def test_labels_that_share_parts_are_refused_before_they_are_hashed():
    labels = [tags.OBJECTS, [1], [EXPONENTIAL], False]
    refused(pd.Index(["a"], dtype=object), put("pandas.Index", 1, value=labels))
