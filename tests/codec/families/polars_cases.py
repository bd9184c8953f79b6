"""Polars values of every dtype, and what counts as the same; the tests' fresh process imports it too."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import polars as pl

VERSION = tuple(int(part) for part in pl.__version__.split(".")[:2])


def series() -> dict[str, Any]:
    """A series of each dtype that travels."""
    day = dt.datetime(2020, 1, 1)
    listed = pl.Struct({"a": pl.List(pl.Enum("x"))})
    integers = [f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)]
    return {
        **{name: pl.Series("x", [1, None, 3], dtype=getattr(pl, name)) for name in integers},
        "Float32": pl.Series("x", [1.5, None, float("nan")], dtype=pl.Float32),
        "Float64": pl.Series("x", [1.5, None, float("inf")]),
        "Boolean": pl.Series("x", [True, None, False] * 7),
        "String": pl.Series("x", ["a" * 20, None, "bé", ""]),
        "Binary": pl.Series("x", [b"\xff" * 20, None, b""]),
        "Categorical": pl.Series("x", ["a", "b", None, "a"], dtype=pl.Categorical),
        "Enum": pl.Series("x", ["a", "b", None, "a"], dtype=pl.Enum(["b", "never", "a"])),
        "Decimal": pl.Series("x", [Decimal("1.50"), None], dtype=pl.Decimal(10, 2)),
        "Date": pl.Series("x", [day.date(), None]),
        "Time": pl.Series("x", [dt.time(1, 2, 3), None]),
        "Duration": pl.Series("x", [dt.timedelta(1), None], dtype=pl.Duration("ms")),
        "Datetime": pl.Series("x", [day, None], dtype=pl.Datetime("ns")),
        "zoned": pl.Series("x", [day, None], dtype=pl.Datetime("ms", "Europe/Paris")),
        "Null": pl.Series("x", [None, None]),
        "List": pl.Series("x", [[1, 2], None, []]),
        "Array": pl.Series("x", [[1, 2], None], dtype=pl.Array(pl.Int8, 2)),
        "Array of Array": pl.Series("x", [[[1, 2]], None], dtype=pl.Array(pl.Int8, (1, 2))),
        "Struct": pl.Series("x", [{"a": 1, "b": "x"}, None]),
        "Struct of nothing": pl.Series("x", [{}, {}], dtype=pl.Struct([])),
        "List of Categorical": pl.Series("x", [["a"], ["b"]], dtype=pl.List(pl.Categorical)),
        "List of Enum": pl.Series("x", [["a"], None], dtype=pl.List(pl.Enum(["a", "z"]))),
        "Struct of List of Enum": pl.Series("x", [{"a": ["x"]}], dtype=listed),
        "empty": pl.Series("x", [], dtype=pl.String),
        "empty Categorical": pl.Series("x", [], dtype=pl.Categorical),
        "empty Struct": pl.Series("x", [], dtype=pl.Struct({"a": pl.Int8})),
        "ascending": pl.Series("x", [3, None, 1]).sort(),
        "descending": pl.Series("x", [3.0, None, float("nan")]).sort(descending=True, nulls_last=True),
        "slice": pl.Series("x", [f"text {i}" * 5 for i in range(300)])[150:160],
        "chunks": pl.concat([pl.Series("x", ["a" * 20]), pl.Series("x", ["b"])], rechunk=False),
        "chunks of Struct": pl.concat([pl.Series("x", [{"a": 1}])] * 3, rechunk=False),
        "name": pl.Series("é ", [1]),
        "no name": pl.Series([1]),
        "NUL in the name": pl.Series("a\0b", [1]),
    }


def frames() -> dict[str, Any]:
    """Frames: wide, empty, without columns, large."""
    columns = [column.rename(name) for name, column in series().items() if len(column) == 3]
    return {
        "wide": pl.DataFrame(columns),
        "empty frame": pl.DataFrame(schema={"a": pl.Int8, "b": pl.Categorical}),
        "nothing": pl.DataFrame(),
        **({"rows without columns": pl.DataFrame(height=5)} if VERSION >= (1, 40) else {}),
        "chunked frame": pl.concat([pl.DataFrame({"a": [1], "b": ["x"]})] * 3, rechunk=False),
        "numbers": pl.DataFrame({"x": range(50_000), "y": [i / 3 for i in range(50_000)]}),
        "texts": pl.DataFrame({"s": [f"text number {i}" for i in range(20_000)]}),
    }


def same(back: Any, value: Any) -> bool:
    """Equal, with names, dtypes, chunks, and what is known of the order."""
    if type(back) is not type(value):
        return False
    if isinstance(back, pl.DataFrame):
        if back.shape != value.shape or back.schema != value.schema:
            return False
        return all(map(same, back.get_columns(), value.get_columns()))
    if any(value.flags[flag] and not back.flags[flag] for flag in ("SORTED_ASC", "SORTED_DESC")):
        return False  # polars may find out more when it joins chunks
    if back.n_chunks() != value.n_chunks():
        return False
    return bool(back.equals(value, check_dtypes=True, check_names=True, null_equal=True))
