"""Samples for docs/types.rst, as :mod:`tests.type_samples`, of the libraries that have kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from tests import type_samples
from tests.type_samples import COUNT, FIRST, Sample, Section, Write, numbers, set_first

# ------------------------------------------------------------------------------- pandas, Arrow, polars

_CELL: dict[str, Write] = {
    "cells": lambda frame: frame.iloc.__setitem__((0, 0), frame.iloc[1, 0]),
    "columns": lambda frame: frame.insert(0, "new", 1),
}
_ITEM: dict[str, Write] = {"elements": lambda series: series.iloc.__setitem__(0, series.iloc[1])}


def _pandas() -> list[Sample]:
    pd = import_module("pandas")
    return [*_pandas_frames(pd), *_pandas_indexes(pd), *_pandas_arrays(pd), *_pandas_scalars(pd)]


def _pandas_frames(pd: Any) -> list[Sample]:
    objects = np.array([None, 1, "x"] * 1000, object)
    texts = [f"text number {n}" for n in range(60_000)]
    return [
        Sample("``DataFrame`` of numbers", lambda: [pd.DataFrame({1: numbers(), 2: 2.0})], _CELL),
        Sample("``DataFrame`` of texts", lambda: [pd.DataFrame({1: texts}, dtype="str")], _CELL),
        Sample("``DataFrame`` of objects", lambda: [pd.DataFrame({1: objects})], _CELL),
        Sample("``Series`` of numbers", lambda: [pd.Series(numbers())], _ITEM),
    ]


def _pandas_indexes(pd: Any) -> list[Sample]:
    hours = np.arange(COUNT)
    periods = pd.PeriodIndex.from_ordinals(hours, freq="h")
    breaks = np.arange(COUNT // 2 + 1)
    renamed = {**FIRST, "names": lambda index: setattr(index, "names", ["new"] * index.nlevels)}
    indexes: dict[str, Callable[[], Any]] = {
        "Index": lambda: pd.Index(numbers()),
        "RangeIndex": lambda: pd.RangeIndex(COUNT),
        "MultiIndex": lambda: pd.MultiIndex.from_product([range(1000), range(1000)]),
        "DatetimeIndex": lambda: pd.DatetimeIndex(hours.astype("M8[s]")),
        "TimedeltaIndex": lambda: pd.TimedeltaIndex(hours.astype("m8[s]")),
        "PeriodIndex": lambda: periods.copy(),
        "CategoricalIndex": lambda: pd.CategoricalIndex(pd.Categorical.from_codes(hours % 9, range(9))),
        "IntervalIndex": lambda: pd.IntervalIndex.from_breaks(breaks),
    }
    return [
        Sample(f"``{name}``", lambda make=make: [make()], renamed)
        for name, make in indexes.items()
    ]


def _pandas_arrays(pd: Any) -> list[Sample]:
    days = np.arange(COUNT)
    known = days % 2 == 0
    texts = np.array([f"text number {n}" for n in range(60_000)], object)
    sparse = np.where(known, 0.0, 1.0)
    arrays: dict[str, Callable[[], list[Any]]] = {
        "DatetimeArray": lambda: [pd.array(days.astype("M8[s]"))],
        "TimedeltaArray": lambda: [pd.array(days.astype("m8[s]"))],
        "PeriodArray": lambda: [pd.PeriodIndex.from_ordinals(days, freq="h").array],
        "Categorical": lambda: [pd.Categorical.from_codes(days % 300, range(300))],
        "IntervalArray": lambda: [pd.arrays.IntervalArray.from_breaks(np.arange(COUNT // 2 + 1))],
        "IntegerArray": lambda: [pd.arrays.IntegerArray(days.copy(), known)],
        "FloatingArray": lambda: [pd.arrays.FloatingArray(numbers(), known)],
        "BooleanArray": lambda: [pd.arrays.BooleanArray(np.tile(known, 8), np.tile(known, 8))],
        "StringArray": lambda: [pd.array(texts, pd.StringDtype("python"))],
        "ArrowStringArray": lambda: [pd.array(texts, pd.StringDtype("pyarrow"))],
        "ArrowExtensionArray": lambda: [pd.Series(numbers(), dtype="float64[pyarrow]").array],
        "SparseArray": lambda: [pd.arrays.SparseArray(sparse, fill_value=0.0)],
        "NumpyExtensionArray": lambda: [pd.arrays.NumpyExtensionArray(numbers())],
    }
    return [Sample(f"``{name}``", make, FIRST) for name, make in arrays.items()]


def _pandas_scalars(pd: Any) -> list[Sample]:
    from fbcache.codec.families.pandas_scalars import KINDS

    offsets = [kind.cls for kind in KINDS if kind.name.startswith("pandas.offsets.")]
    instants = [pd.Timestamp("2020"), pd.Timedelta(1), pd.Period("2020"), pd.Interval(0, 1), pd.NaT, pd.NA]
    special = {name: {"startingMonth": 1, "weekday": 1} for name in ("FY5253", "FY5253Quarter")}
    return [
        Sample("``Timestamp``, ``Timedelta``, ``Period``, ``Interval``, ``NaT``, ``NA``", lambda: instants),
        Sample("offsets", lambda: [cls(**special.get(cls.__name__, {})) for cls in offsets]),
    ]


def _pyarrow() -> list[Sample]:
    pa = import_module("pyarrow")
    texts = [f"text number {n}" for n in range(60_000)]
    small = [pa.int8(), pa.field("x", pa.int8()), pa.schema([("x", pa.int8())])]
    return [
        Sample("``Table``", lambda: [pa.table({"x": numbers()})]),
        Sample("``RecordBatch``", lambda: [pa.record_batch({"x": numbers()})]),
        Sample("``Array``", lambda: [pa.array(numbers()), pa.array(texts), pa.array([[1.0] * COUNT])]),
        Sample("``ChunkedArray``", lambda: [pa.chunked_array([numbers(), [1.0]])]),
        Sample("``Buffer``", lambda: [pa.py_buffer(numbers())]),
        Sample("``Scalar``", lambda: [pa.scalar(1), pa.scalar("x"), pa.scalar([1, 2])]),
        Sample("``DataType``, ``Field``, ``Schema``", lambda: small),
    ]


def _polars() -> list[Sample]:
    pl = import_module("polars")
    texts = [f"text number {n}" for n in range(60_000)]
    cells = {
        "cells": lambda frame: frame.__setitem__((0, 0), frame[1, 0]),
        "columns": lambda frame: frame.insert_column(0, pl.Series("new", [1] * len(frame))),
    }
    return [
        Sample("``DataFrame``", lambda: [pl.DataFrame({"x": numbers()})], cells),
        Sample("``Series`` of numbers", lambda: [pl.Series(numbers())], FIRST),
        Sample("``Series`` of texts", lambda: [pl.Series(texts)], FIRST),
        Sample("``LazyFrame``", lambda: [pl.LazyFrame({"x": [1]})]),
    ]


# --------------------------------------------------------------------------------------- science


def _scipy() -> list[Sample]:
    sparse = import_module("scipy.sparse")
    rng = np.random.default_rng(0)
    dense = (rng.random((500, 500)) < 0.5) * rng.random((500, 500))
    small = dense[:30, :30]

    def sample(form: str, source: Any) -> Sample:
        classes = [getattr(sparse, f"{form}_{suffix}") for suffix in ("array", "matrix")]
        write = {"elements": lambda value: value.__setitem__((0, 0), 1.0)}
        if form in ("bsr", "coo", "dia"):  # which take no item
            write = {"elements": lambda value: set_first(value.data.reshape(-1))}
        return Sample(f"``{form}``", lambda: [cls(source) for cls in classes], write)

    return [
        *(sample(form, dense) for form in ("bsr", "coo", "csc", "csr", "dia")),
        *(sample(form, small) for form in ("dok", "lil")),
    ]


def _xarray() -> list[Sample]:
    xr = import_module("xarray")
    writes = {
        "elements": lambda value: value.__setitem__(0, 5.0),
        "attrs": lambda value: value.attrs.update(new=1),
    }
    inside = {
        "elements": lambda value: value["t"].__setitem__(0, 5.0),
        "variables": lambda value: value.__setitem__("new", value["t"]),
    }
    index = {"attrs": writes["attrs"]}
    return [
        Sample("``Variable``", lambda: [xr.Variable("x", numbers())], writes),
        Sample("``IndexVariable``", lambda: [xr.IndexVariable("x", numbers())], index),
        Sample("``DataArray``", lambda: [xr.DataArray(numbers(), dims="x")], writes),
        Sample("``Dataset``", lambda: [xr.Dataset({"t": ("x", numbers())})], inside),
        Sample(
            "``DataTree``",
            lambda: [xr.DataTree.from_dict({"/": xr.Dataset({"t": ("x", numbers())})})],
            inside,
        ),
    ]


def _torch() -> list[Sample]:
    torch = import_module("torch")

    def fill(tensor: Any) -> None:
        with torch.no_grad():
            tensor.fill_(5.0)

    writes = {"elements": fill}
    return [
        Sample("``Tensor``", lambda: [torch.arange(float(COUNT), dtype=torch.float64)], writes),
        Sample("``nn.Parameter``", lambda: [torch.nn.Parameter(torch.zeros(2 * COUNT))], writes),
        Sample(
            "``state_dict()`` of a module",
            lambda: [torch.nn.Linear(512, 512).state_dict()],
            {"tensors": lambda state: fill(state["weight"])},
        ),
        Sample("``nn.Module``", lambda: [torch.nn.Linear(512, 512)], {"tensors": lambda m: fill(m.weight)}),
        Sample("``Size``, ``dtype``, ``device``", lambda: [torch.Size([1]), torch.int8, torch.device("cpu")]),
    ]


def _pillow() -> list[Sample]:
    image_module = import_module("PIL.Image")
    rational = import_module("PIL.TiffImagePlugin").IFDRational
    text = import_module("PIL.PngImagePlugin").iTXt
    pixels = np.random.default_rng(0).bytes(1 << 20)

    def images(*modes: str) -> list[Any]:
        made = [image_module.new(mode, (1024, 1024) if mode == "1" else (512, 512)) for mode in modes]
        for image in made:
            image.frombytes(pixels[: len(image.tobytes())])
        return made

    def set_pixel(image: Any) -> None:
        row = [image.getpixel((x, 0)) for x in range(99)]
        image.load()[0, 0] = next(pixel for pixel in row if pixel != row[0])

    writes = {
        "pixels": set_pixel,
        "image": lambda image: image.paste(image.crop((5, 5, 99, 99)), (0, 0)),
    }
    over = "``Image`` of mode L, P, RGBA, RGBX, CMYK, I;16"
    other = "``Image`` of mode 1, RGB, LA, PA, HSV, LAB, YCbCr, I, F"
    return [
        Sample(over, lambda: images("L", "P", "RGBA", "RGBX", "CMYK", "I;16"), writes),
        Sample(other, lambda: images("1", "RGB", "LA", "PA", "HSV", "LAB", "YCbCr", "I", "F"), writes),
        Sample("``IFDRational``, ``iTXt``", lambda: [rational(1, 2), text("x", "de", "t")]),
    ]


def _sklearn() -> list[Sample]:
    tree = import_module("sklearn.tree")
    linear = import_module("sklearn.linear_model")
    points = np.random.default_rng(0).random((10_000, 4))
    target = points[:, 0] > 0.5
    parts: list[Any] = []
    for name, module in (("KDTree", "_kd_tree"), ("BallTree", "_ball_tree")):
        found = import_module(f"sklearn.neighbors.{module}")
        parts += [getattr(found, name)(points), getattr(found, f"{name}32")(points.astype("f4"))]
    model = linear.LogisticRegression().fit(points, target)
    model.coef_ = numbers()
    grown = tree.DecisionTreeClassifier().fit(points, np.arange(10_000) % 7)
    attribute = {"attributes": lambda value: setattr(value, "new", 1)}
    node = {"nodes": lambda value: value.threshold.__setitem__(0, 5.0)}
    point = {"points": lambda value: np.asarray(value.data).__setitem__((0, 0), 5.0)}
    return [
        Sample("estimator made of arrays", lambda: [copy.copy(model)], attribute),
        Sample("estimator made of trees", lambda: [copy.copy(grown)], attribute),
        Sample("``Tree`` of an estimator", lambda: [copy.deepcopy(grown.tree_)], node),
        Sample("``KDTree``, ``BallTree``", lambda: copy.deepcopy(parts), point),
    ]


SECTIONS = (
    *type_samples.SECTIONS,
    Section("pandas", "pandas", (3,), _pandas),
    Section("pyarrow", "pyarrow", (19,), _pyarrow),
    Section("polars", "polars", (1,), _polars),
    Section("scipy.sparse", "scipy", (1, 13), _scipy),
    Section("xarray", "xarray", (2024, 10), _xarray),
    Section("torch", "torch", (2,), _torch),
    Section("Pillow", "PIL", (11,), _pillow),
    Section("scikit-learn", "sklearn", (1, 4), _sklearn),
)
