"""Polars frames and series come back with names, dtypes, chunks and flags, over memory that is not copied."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", "21")
pl = pytest.importorskip("polars", "1.32")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from polars.exceptions import PanicException  # noqa: E402
from polars.testing.parametric import dataframes  # noqa: E402

from fbcache.codec import Frames  # noqa: E402
from fbcache.codec.families import polars_frames  # noqa: E402
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError  # noqa: E402
from fbcache.sizeof import sizeof  # noqa: E402
from tests.codec.families.damage import damaged  # noqa: E402
from tests.codec.families.polars_cases import VERSION, frames, same, series  # noqa: E402
from tests.codec.roundtrip import CODEC, through  # noqa: E402

OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)
VALUES = {**series(), **frames()}
DTYPES = [
    *(pl.Int8, pl.Int64, pl.UInt16, pl.Float32, pl.Boolean, pl.String, pl.Binary, pl.Date, pl.Time, pl.Null),
    *(pl.Datetime("us", "UTC"), pl.Duration("ns"), pl.Categorical, pl.Decimal(20, 3), pl.List, pl.Struct),
]


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_dtype_come_back(name: str, writable: bool) -> None:
    value = VALUES[name]
    assert same(through(value, writable=writable), value)
    assert same(through(value, writable=writable, allow_pickle=True), value)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_frame_comes_back(data: Any) -> None:
    frame = data.draw(dataframes(max_cols=4, max_size=8, allowed_dtypes=DTYPES))
    for part in (frame, frame[len(frame) // 3 :]):
        if VERSION >= (1, 43):
            assert same(through(part), part)
        else:  # which tells Arrow wrong lengths of structs: such go by pickle, which joins chunks
            assert through(part, allow_pickle=True).equals(part)


_BULK = 4096  # bytes: bitmaps may be made anew


def addresses(series: Any) -> set[int]:
    """Where the bulk of a series is; polars shares it with Arrow."""
    arrays = [pa.table(chunk.to_frame()).column(0).chunk(0) for chunk in series.get_chunks()]
    return {part.address for array in arrays for part in array.buffers() if part and part.size >= _BULK}


@pytest.mark.parametrize("kind", ["Int64", "String", "List", "Struct", "Decimal", "Datetime", "Array"])
def test_memory_is_copied_neither_out_nor_in(kind: str) -> None:
    whole = pl.concat([VALUES[kind]] * 3000, rechunk=True)
    value = pl.concat([whole, whole.reverse()], rechunk=False)
    framed = CODEC.encode(value, allow_pickle=False)
    bulk = [np.frombuffer(part, np.uint8) for part in framed.buffers if len(part) >= _BULK]
    gone = {part.__array_interface__["data"][0] for part in bulk}
    assert gone and gone == addresses(value)
    assert addresses(CODEC.decode(framed, writable=False, allow_pickle=False)) == gone


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_columns_of_nulls_that_share_their_zeros_come_back(start: int) -> None:
    """Polars has one stretch of zeros for all; slices of small numbers begin at odd places of it."""
    dtypes = {"small": pl.UInt16, "a": pl.Int64, "b": pl.Time, "c": pl.Float64, "flags": pl.Boolean}
    frame = pl.DataFrame([pl.Series(name, [None] * 600).cast(dtype) for name, dtype in dtypes.items()])
    numbers = [pa.table(frame.select(name)).column(0).chunk(0).buffers()[1] for name in ("small", "a", "b")]
    if VERSION < (1, 43):
        pytest.skip("this polars has several stretches of zeros")
    assert len({buffer.address for buffer in numbers}) == 1  # else this tests nothing
    for part in (frame[start:], frame[start : start + 3]):
        for allow_pickle in (False, True):
            assert same(through(part, allow_pickle=allow_pickle), part)


def test_a_small_slice_does_not_take_its_frame_along() -> None:
    frame = VALUES["texts"].with_columns(n=pl.int_range(pl.len()), o=pl.col("s").str.to_uppercase())
    part = frame[500:510]
    assert same(through(part), part)
    assert CODEC.encode(part, allow_pickle=False).nbytes < 5000


def test_what_arrow_cannot_carry_goes_by_pickle_or_says_so() -> None:
    large = pl.Series("x", [1 << 100, None], dtype=pl.Int128)
    nested = pl.DataFrame({"a": [[1 << 100]]}, schema={"a": pl.List(pl.Int128)})
    nul = pl.Series("x", [{"a\0b": 1}])
    for value in (large, nested, nul):
        with pytest.raises(PickleRefusedError):
            through(value)
        assert same(through(value, allow_pickle=True), value)
    objects = pl.Series("x", [object()], dtype=pl.Object)
    with pytest.raises(UnsupportedTypeError, match="Object"):
        through(objects, allow_pickle=True)


def test_a_query_is_refused_with_advice() -> None:
    with pytest.raises(UnsupportedTypeError, match=r"value\['q'\].*\.collect\(\)"):
        through({"q": VALUES["numbers"].lazy()}, allow_pickle=True)


def test_sizes() -> None:
    for value in (VALUES["numbers"], VALUES["texts"], VALUES["numbers"]["x"]):
        assert sizeof(value) == 64 + value.estimated_size()


# ------------------------------------------------------------------ data from other hands


def decoded(tree: bytes, buffers: list[bytes]) -> Any:
    return CODEC.decode(Frames("msgpack", tree, buffers), writable=False, allow_pickle=False)


def test_random_damage_gives_our_errors_or_a_value_that_can_be_used() -> None:
    rng = random.Random(2)
    encoded = [CODEC.encode(value, allow_pickle=False) for name, value in VALUES.items() if name != "numbers"]
    used = 0
    for _ in range(800):
        tree, buffers = damaged(rng, rng.choice(encoded))
        try:
            value = decoded(tree, buffers)
        except OURS:
            continue
        if not isinstance(value, (pl.DataFrame, pl.Series)):  # a tag was damaged
            continue
        frame = value if isinstance(value, pl.DataFrame) else value.to_frame()
        if frame.height < 100_000 and frame.width:
            frame.equals(frame)
            frame.hash_rows()
            used += 1
    assert used > 50


def edited(value: Any, edit: Any) -> Any:
    framed = CODEC.encode(value, allow_pickle=False)
    tree = msgpack.unpackb(framed.tree, strict_map_key=False)
    edit(tree[2])
    return decoded(msgpack.packb(tree), [bytes(part) for part in framed.buffers])


def test_texts_under_nulls_are_validated_too() -> None:
    value = pl.Series("x", ["a" * 20, None, "b" * 20])

    def astray(state: Any) -> None:
        views = state[2][0][0][2][1]
        memory = np.frombuffer(views[3], "i4").copy()
        memory[4:8] = 20, 0, 0, 1 << 30
        views[3] = memory.tobytes()

    with pytest.raises(CorruptBlobError):
        edited(value, astray)


def test_contents_are_validated() -> None:
    def last(*numbers: int) -> Any:
        def edit(state: Any) -> None:
            part = state[2][0][0][2][1]
            part[3] = part[3][: -8 * len(numbers)] + np.array(numbers, "i8").tobytes()

        return edit

    with pytest.raises(CorruptBlobError):
        edited(pl.Series("x", [[1, 2], [3]]), last(1 << 40, 3))
    with pytest.raises(CorruptBlobError):
        edited(pl.Series("x", ["a"] * 8, dtype=pl.Enum(["a"])), last(-1))


def test_a_flag_that_is_not_true_is_dropped() -> None:
    def claim(order: int) -> Any:
        def edit(state: Any) -> None:
            state[3][0] = order

        return edit

    value = pl.Series("x", [1, 3, 2, None])
    for order in (1, -1):
        back = edited(value, claim(order))
        assert same(back, value) and back.flags == value.flags
    nothing = pl.Series("x", [{}] * 5, dtype=pl.Struct([]))  # rows without end could be looked through
    assert not edited(nothing, claim(1)).flags["SORTED_ASC"]
    ascending = pl.Series("x", [1, 2, None])
    assert edited(ascending, claim(1)).flags["SORTED_ASC"]


def test_a_frame_whose_height_is_another_is_refused() -> None:
    def grow(state: Any) -> None:
        state[0] += 1

    with pytest.raises(CorruptBlobError):
        edited(VALUES["wide"], grow)


def test_a_panic_of_polars_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    framed = CODEC.encode(VALUES["wide"], allow_pickle=False)

    def panic(*args: Any, **kwargs: Any) -> Any:
        raise PanicException("no")

    monkeypatch.setattr(polars_frames.pl, "from_arrow", panic)
    with pytest.raises(CorruptBlobError, match="panics"):
        decoded(framed.tree, [bytes(part) for part in framed.buffers])
    with pytest.raises(PickleRefusedError):
        through(VALUES["wide"])


def test_without_pyarrow_it_goes_by_pickle_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    framed = CODEC.encode(VALUES["wide"], allow_pickle=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PickleRefusedError):
        through(VALUES["wide"])
    with pytest.raises(UnsupportedTypeError, match=r"fbcache\[polars\]"):
        decoded(framed.tree, [bytes(part) for part in framed.buffers])


# ------------------------------------------------------------------ in a pool

_SCRIPT = """
import sys
from fbcache import FBPool
from tests.codec.families.polars_cases import frames, same, series

values = {**series(), **frames()}
with FBPool.from_checkpoint(sys.argv[1], directory=sys.argv[2], min_free=0) as pool:
    for name, value in values.items():
        with pool.get(name) as back:
            assert same(back, value), name
"""


def test_values_are_spilled_saved_and_opened_in_a_process_that_refuses_pickle(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool("64MB")
    for name, value in VALUES.items():
        pool.put(name, value)
    pool.evict()
    for name, value in VALUES.items():
        with pool.get(name) as back:
            assert back is not value and same(back, value), name
    pool.save(tmp_path / "saved")
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "saved"), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


@pytest.mark.files
@pytest.mark.parametrize("name", ["numbers", "texts"])
def test_a_reloaded_frame_is_a_view_of_its_file(name: str, make_pool: Any, tmp_path: Path) -> None:
    pool = make_pool("64MB")
    pool.put("f", VALUES[name])
    pool.evict()
    with pool.get("f") as back:
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        spans = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith(str(tmp_path))]
        found = [place for column in back for place in addresses(column)]
        assert found and all(any(int(a, 16) <= at < int(b, 16) for a, b in spans) for at in found)
    del back


def test_what_is_changed_in_place_is_changed_nowhere_else(make_pool: Any) -> None:
    frame = pl.DataFrame({"a": range(50_000)})
    pool = make_pool("64MB")
    pool.put("f", frame)
    frame.insert_column(0, pl.Series("late", range(50_000)))
    frame["a"][0] = 77
    with pool.get("f") as kept:
        assert kept.columns == ["a"] and kept["a"][0] == 0
    for _ in range(2):  # in memory, and as a view of its file
        with pool.get_mut("f") as mine:
            mine.insert_column(0, pl.Series(f"column {mine.width}", range(50_000)))
            mine[0, "a"] = mine[0, "a"] + 1
        assert kept.columns == ["a"] and kept["a"][0] == 0
        pool.evict()
    with pool.get("f") as back:
        assert back.columns == ["column 2", "column 1", "a"] and back["a"].head(2).to_list() == [2, 1]
    pool.put("s", {"part": back["a"]})
    with pool.get_mut("s") as parts:
        parts["part"][1] = 99
    assert back["a"].head(2).to_list() == [2, 1]
    del back, mine, parts
