"""Small values of every family whose library is here, and ways to use what was made of damaged ones."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np

from tests import type_samples
from tests.codec.test_hostile import sample

FEW = 100_000  # elements, or bytes, that are gone through; of what is larger nothing is

Values = dict[str, Any]


def values() -> dict[str, Values]:
    """By family, and by a name within it."""
    found: dict[str, Values] = {"core": _core()}
    for family, (library, make) in _FAMILIES.items():
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(library)
            found[family] = make()
    return found


def _core() -> Values:
    numbers = np.arange(600.0)
    fields = np.zeros(40, [("a", "<f8"), ("b", "<i4", (2,)), ("c", "S3")])
    registered = [
        type_samples.Colour.RED,
        type_samples.Pair(numbers, 1),
        type_samples.Record([numbers, {"a": 1}]),
        type_samples.OwnThing((numbers[::2], None)),
    ]
    return {
        "everything": sample(),
        "registered": registered,
        "fields": fields,
        "ordered": OrderedDict([((1, 2), numbers), ("b", [None])]),
        "shared": [numbers, numbers[5:90], numbers[::-3], numbers.reshape(20, 30).T],
    }


def _table_of(module: str, *functions: str) -> Callable[[], Values]:
    def make() -> Values:
        tables = import_module(f"tests.codec.families.{module}")
        made: Values = {}
        for function in functions:
            made.update(getattr(tables, function)())
        return {name: value for name, value in made.items() if _is_small(value)}

    return make


def _is_small(value: Any) -> bool:
    from tests.codec.roundtrip import CODEC

    return CODEC.encode(value, allow_pickle=True).nbytes < 64_000


def _pandas() -> Values:
    cases = import_module("tests.codec.families.pandas_cases")
    skipped = {"zones_of_pytz", "arrow_dtypes"}  # which skip the test where a library is missing
    found: Values = {}
    for name in cases.CASES.keys() - skipped:
        made = cases.made(name)
        found[name] = made
        if isinstance(made, list):
            found.update((f"{name} {index}", part) for index, part in enumerate(made))
    return found


def _torch() -> Values:
    torch = import_module("torch")
    state = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30)).state_dict()
    base = torch.arange(600.0)
    learned = torch.nn.Parameter(torch.ones(9, 9))
    learned.grad = torch.zeros(9, 9)
    channels_last = torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)
    types = [getattr(torch, name) for name in ("bool", "uint8", "bfloat16", "int64", "complex64")]
    return {
        "state": state,
        "shared": [base, base[5:90], base.reshape(20, 30).T, base[::7], base.numpy()],
        "expanded": [torch.ones(3).expand(5, 3), channels_last],
        "learned": [learned, torch.tensor([1 + 2j]).conj(), torch.tensor(3.5)],
        "types": [torch.ones(300).to(dtype) for dtype in types],
        "names": [torch.Size([1, 2]), torch.int8, torch.device("cpu")],
    }


def _ml_dtypes() -> Values:
    ml_dtypes = import_module("ml_dtypes")
    names = ("bfloat16", "float8_e4m3fn", "int4")
    return {name: [np.ones(300, getattr(ml_dtypes, name)), getattr(ml_dtypes, name)(1)] for name in names}


_FAMILIES: dict[str, tuple[str, Callable[[], Values]]] = {
    "pandas": ("pandas", _pandas),
    "pyarrow": ("pyarrow", _table_of("arrow_cases", "arrays", "tables")),
    "polars": ("polars", _table_of("polars_cases", "series", "frames")),
    "scipy": ("scipy", _table_of("sparse_cases", "cases")),
    "xarray": ("xarray", _table_of("xarray_cases", "cases")),
    "torch": ("torch", _torch),
    "Pillow": ("PIL", _table_of("image_cases", "cases")),
    "ml_dtypes": ("ml_dtypes", _ml_dtypes),
}

# ---------------------------------------------------------------------------------------- using


def use(value: Any, *, depth: int = 0) -> None:
    """Go over a bounded part of a value with the compiled code of its library.

    What a library raises is its own affair; that the process lives on is the codec's.
    """
    for work in _works(value):
        try:
            work()
        except Exception:
            pass
        except BaseException as error:
            if type(error).__module__ != "pyo3_runtime":  # a panic of Rust
                raise
    if depth < 4:
        for part in _parts(value):
            use(part, depth=depth + 1)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from list(value.values())[:20]
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from list(value)[:20]
    elif type(value) is np.ndarray and value.dtype == object and value.size < FEW:
        yield from value.ravel().tolist()[:20]
    elif isinstance(value, (type_samples.Record, type_samples.OwnThing)):
        yield from vars(value).values()  # it may have lost a field


def _works(value: Any) -> Iterator[Callable[[], Any]]:
    library = type(value).__module__.partition(".")[0]
    size = _size(value)
    if size is None or size < FEW:
        yield lambda: repr(value)
        yield lambda: value == value
        yield lambda: sum(1 for _, _ in zip(value, range(50), strict=False))
    if size is not None and size < FEW:
        yield from _USES.get(library, _uses_of_nothing)(value)


def _size(value: Any) -> int | None:
    """How many elements there are; None where nothing says so."""
    known: list[int] = []
    for name in ("size", "nbytes"):
        with suppress(Exception):
            known.append(int(getattr(value, name)))
    with suppress(Exception):
        known.append(len(value))
    with suppress(Exception):
        known.append(value.numel())
    with suppress(Exception):
        known.append(value.width * value.height)
    with suppress(Exception):
        known.append(max(value.shape) + value.nnz)
    return max(known) if known else None


def _uses_of_nothing(value: Any) -> Iterator[Callable[[], Any]]:
    yield from ()


def _uses_of_array(value: Any) -> Iterator[Callable[[], Any]]:
    yield lambda: value.sum()
    yield lambda: value.copy()
    yield lambda: value.tolist()
    yield lambda: value.astype(str)
    if getattr(value, "flags", None) is not None and value.flags.writeable:
        yield lambda: value.__setitem__(..., value)


def _uses_of_pandas(value: Any) -> Iterator[Callable[[], Any]]:
    yield lambda: value.reset_index().isna().sum().sum()
    yield lambda: value.iloc[::-1].equals(value)
    yield lambda: value.sort_values()
    yield lambda: value.unique()
    yield lambda: value.astype(object)
    yield lambda: value.take([0, -1])
    yield lambda: value.isna()
    yield lambda: value.sum()


def _uses_of_arrow(value: Any) -> Iterator[Callable[[], Any]]:
    yield lambda: value.to_pylist()
    yield lambda: value.equals(value)
    yield lambda: value.take([len(value) - 1, 0])
    yield lambda: value.slice(1).to_pandas()
    yield lambda: value.cast("string")
    yield lambda: value.to_string()


def _uses_of_polars(value: Any) -> Iterator[Callable[[], Any]]:
    yield lambda: value.equals(value)
    yield lambda: value.sum()
    yield lambda: value.to_list()
    yield lambda: value.rows()
    yield lambda: value.n_unique()
    yield lambda: value.sort()
    yield lambda: value.gather_every(2)
    yield lambda: value.rechunk()


def _uses_of_sparse(value: Any) -> Iterator[Callable[[], Any]]:
    if value.ndim == 2 and max(value.shape) < 1000:
        yield lambda: value @ np.ones(value.shape[1])
        yield lambda: value.tocsr() + value.tocsr()
        yield lambda: value.tocsc()
        yield lambda: value.toarray()
        yield lambda: value[0]
        yield lambda: value[[0, -1]]
        yield lambda: value.sum()


def _uses_of_xarray(value: Any) -> Iterator[Callable[[], Any]]:
    yield lambda: value.equals(value)
    yield lambda: value.sum()
    yield lambda: value.isel(dict.fromkeys(value.dims, -1))
    yield lambda: value.to_dataframe()
    yield lambda: value.copy(deep=True)


def _uses_of_torch(value: Any) -> Iterator[Callable[[], Any]]:
    torch = import_module("torch")
    yield lambda: value.detach().sum()
    yield lambda: torch.equal(value, value.clone())
    yield lambda: value.tolist()
    yield lambda: value.detach().copy_(value.detach().clone())
    yield lambda: value.grad.sum()


def _uses_of_pillow(value: Any) -> Iterator[Callable[[], Any]]:
    if 0 not in value.size:
        yield lambda: value.copy().resize((3, 3))
        yield lambda: value.tobytes()
        yield lambda: value.getpixel((value.width - 1, value.height - 1))
        yield lambda: value.histogram()
        yield lambda: value.convert("RGB")
        yield lambda: value.load().__setitem__((0, 0), value.getpixel((0, 0)))


_USES: dict[str, Callable[[Any], Iterator[Callable[[], Any]]]] = {
    "numpy": _uses_of_array,
    "pandas": _uses_of_pandas,
    "pyarrow": _uses_of_arrow,
    "polars": _uses_of_polars,
    "scipy": _uses_of_sparse,
    "xarray": _uses_of_xarray,
    "torch": _uses_of_torch,
    "PIL": _uses_of_pillow,
}
