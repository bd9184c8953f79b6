"""Values of xarray, and what counts as the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr


def plain() -> xr.Dataset:
    """One with something of everything, made anew each time."""
    temperature = np.arange(12.0).reshape(3, 4)
    data = {
        "t": (("x", "y"), temperature, {"unit": "K"}, {"dtype": np.dtype("i2"), "_FillValue": np.int16(-1)}),
        "alone": ((), 3.0),
        "objects": ("x", np.array([1, "a", None], object), {}, {"dtype": str}),
        "when": ("x", np.array([1, 2, 3], "m8[s]"), {}, {"dtype": np.float32, "chunksizes": (3,)}),
    }
    coords = {
        "x": ("x", [1.0, 2.0, 3.0], {"axis": "X"}, {"zlib": True, "dtype": np.dtype(object)}),
        "y": list("abcd"),
        "time": ("x", pd.date_range("2020", periods=3)),
        "run": np.datetime64(5, "ns"),
    }
    dataset = xr.Dataset(data, coords=coords, attrs={"title": "all", "version": np.int64(2)})
    dataset.encoding = {"unlimited_dims": {"x"}, "source": "there.nc"}
    return dataset


def indexes() -> dict[str, Any]:
    """Pandas indexes that a coordinate may have."""
    return {
        "range": pd.RangeIndex(3, 9, 2),
        "float32": np.arange(3, dtype="f4"),
        "int8": np.arange(3, dtype="i1"),
        "texts": np.array(list("abc")),
        "objects": pd.Index(np.array([1, "a", None], object)),
        "dates": pd.date_range("2020", periods=3, freq="D"),
        "zone": pd.date_range("2020", periods=3, tz="UTC"),
        "durations": pd.timedelta_range("1h", periods=3),
        "periods": pd.period_range("2020", periods=3, freq="M"),
        "categories": pd.CategoricalIndex(list("aba")),
        "intervals": pd.interval_range(0, 3),
    }


def datasets() -> dict[str, xr.Dataset]:
    base = plain()
    pairs = pd.MultiIndex.from_product([list("ab"), [1, 2]], names=["letter", "number"])
    big = np.arange(40_000.0).reshape(200, 200)
    found = {
        "plain": base,
        "empty": xr.Dataset(),
        "deep copy": base.copy(deep=True),
        "slice": base.isel(x=slice(0, 2)),
        "stacked": base.stack(k=("x", "y")),
        "stacked, index reset": base.stack(k=("x", "y")).reset_index("k"),
        "index dropped": base.drop_indexes("x"),
        "index renamed": base.rename(x="q"),
        "second index": base.set_xindex("time"),
        "dimension swapped": base.swap_dims(x="time"),
        "no coordinates": xr.Dataset({"a": ("x", [1, 2])}),
        "named by a tuple": xr.Dataset({("a", 1): (("x", 2), [[1, 2]])}),
        "pairs": xr.Dataset(coords=xr.Coordinates.from_pandas_multiindex(pairs, "k")),
        "extension": base.assign_coords(c=("x", pd.Categorical(list("aba")))),
        "coordinates first": xr.Dataset(coords={"y": [1, 2]}).assign(a=(("x", "y"), np.ones((3, 2)))),
        "another index first": base.set_index(x="when"),
        "large": xr.Dataset({"a": (("x", "y"), big)}, {"x": np.arange(200.0)}),
    }
    found |= {f"index of {name}": xr.Dataset(coords={"r": index}) for name, index in indexes().items()}
    return found


def cases() -> dict[str, Any]:
    found: dict[str, Any] = dict(datasets())
    for title in ("plain", "stacked", "extension", "large", "second index", "another index first"):
        found |= {f"{title}: {name}": found[title][name] for name in found[title].variables}
    found |= {f"variable {name}": variable for name, variable in plain().variables.items()}
    found["no name"] = xr.DataArray(np.arange(5.0))
    found["no dimension"] = xr.DataArray(5.0, name="five")
    found["fortran"] = xr.DataArray(np.asfortranarray(np.arange(600.0).reshape(20, 30)), dims=("a", "b"))
    found["named by a tuple too"] = xr.DataArray([1, 2], dims=("a",), name=("b", 1))
    if hasattr(xr, "DataTree"):
        found["tree"] = tree()
    return found


def tree() -> Any:
    inner = xr.Dataset({"g": ("x", [1.0, 2.0, 3.0])}, attrs={"inner": True})
    nodes = {"/": plain(), "/b": plain()[["alone"]], "/b/leaf": xr.Dataset(), "/a": inner}
    return xr.DataTree.from_dict(nodes, name="root")


def looks(value: Any) -> list[Any]:
    """What ``identical`` does not look at: types, dtypes, orders, encodings, indexes."""
    if isinstance(value, xr.Variable):
        return [variable_looks(value)]
    if not isinstance(value, (xr.Dataset, xr.DataArray)):
        parts = [(node.path, node.to_dataset(inherit=False)) for node in value.subtree]
        return [(path, looks(part)) for path, part in parts]
    variables = value.variables if isinstance(value, xr.Dataset) else value.coords.variables
    groups = [
        (index.index.names, type(index), type(index.index), repr(index.index.dtype), list(names))
        for index, names in value.xindexes.group_by_index()
    ]
    named = [(name, variable_looks(variable)) for name, variable in variables.items()]
    own = [] if isinstance(value, xr.Dataset) else [value.name, variable_looks(value.variable)]
    return [*own, named, groups, value.encoding, list(value.dims)]


def variable_looks(variable: xr.Variable) -> Any:
    held = type(getattr(variable._data, "array", None))
    encoding = {key: (type(part), repr(part)) for key, part in variable.encoding.items()}
    return type(variable), type(variable._data), held, repr(variable.dtype), variable.attrs, encoding


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left.identical(right) and looks(left) == looks(right)
