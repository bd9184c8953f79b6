"""Arrow values of every kind, and what counts as the same; the fresh process of the tests imports it too."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

_LISTS = [[1, 2], None, [], [3, 4, 5]] * 4


class Money(pa.ExtensionType):
    """An extension type of a program's own."""

    def __init__(self) -> None:
        super().__init__(pa.decimal128(12, 2), "tests.money")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Money:
        return cls()


def money() -> Any:
    """A column of the program's own type, which has to be registered to travel."""
    return pa.ExtensionArray.from_storage(Money(), pa.array([Decimal("1.50"), None], pa.decimal128(12, 2)))


def _plain() -> dict[str, Any]:
    names = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    found = {name: pa.array([1, None, 3] * 5, getattr(pa, name)()) for name in (*names, "float32", "float64")}
    for name in ("string", "large_string", "string_view"):
        found[name] = pa.array(["a" * 20, None, "", "bé", "c" * 300] * 3, getattr(pa, name)())
    for name in ("binary", "large_binary", "binary_view"):
        found[name] = pa.array([b"a" * 20, None, b"", b"\xff", b"c" * 300] * 3, getattr(pa, name)())
    for bits in (32, 64, 128, 256):
        type_ = getattr(pa, f"decimal{bits}")(7, 2)
        found[f"decimal{bits}"] = pa.array([Decimal("1.50"), None, Decimal("-2.25")], type_)
    return {
        **found,
        "null": pa.nulls(5),
        "bool": pa.array([True, None, False] * 7),
        "bool without nulls": pa.array([True, False] * 50),
        "float16": pa.array(np.array([1, 2], "f2")),
        "fixed": pa.array([b"abc", None, b"def"], pa.binary(3)),
        "fixed of nothing": pa.array([b"", None, b""], pa.binary(0)),
        "date32": pa.array([1, None, 3], pa.date32()),
        "date64": pa.array([86_400_000, None], pa.date64()),
        "time32": pa.array([1, None], pa.time32("s")),
        "time64": pa.array([1, None], pa.time64("ns")),
        "naive": pa.array([1, None], pa.timestamp("ns")),
        "zoned": pa.array([1, None], pa.timestamp("us", "Europe/Paris")),
        "duration": pa.array([1, None], pa.duration("ms")),
        "interval": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
        "NaN": pa.array([np.nan, None, -0.0, np.inf]),
    }


def _nested() -> dict[str, Any]:
    makers = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
    records = [{"a": 1, "b": "x"}, None, {"a": None, "b": "yy"}] * 4
    deep = [[["a"], None, ["b", "ccc"]], None, [], [[]]] * 4
    child = pa.field("element", pa.int8(), nullable=False, metadata={"unit": "m"})
    codes = pa.array([0, 1, 0, 1, 0], pa.int8())
    words = pa.array(list("abcde"))
    return {
        **{make.__name__: pa.array(_LISTS, make(pa.int32())) for make in makers},
        "list of named": pa.array([[1], None, [2, 3]], pa.list_(child)),
        "fixed list": pa.array([[1, 2], None, [3, 4]] * 4, pa.list_(pa.int8(), 2)),
        "struct": pa.array(records, pa.struct([("a", pa.int8()), ("b", pa.string())])),
        "struct of nothing": pa.array([{}, None, {}], pa.struct([])),
        "map": pa.array([[("a", 1), ("b", None)], None, []] * 4, pa.map_(pa.string(), pa.int32())),
        "deep": pa.array(deep, pa.list_(pa.large_list(pa.string()))),
        "views deep": pa.array(deep, pa.list_(pa.list_view(pa.string_view()))),
        "sparse union": pa.UnionArray.from_sparse(codes, [pa.array([1, 2, 3, 4, 5]), words], ["i", "s"]),
        "dense union": pa.UnionArray.from_dense(
            pa.array([5, 9, 5, 9, 5], pa.int8()),
            pa.array([0, 0, 1, 1, 2], pa.int32()),
            [pa.array([1, 2, 3]), words[:2]],
            ["i", "s"],
            [5, 9],
        ),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([2, 5, 9], pa.int32()), ["x", None, "y"]),
    }


def _dictionaries() -> dict[str, Any]:
    words = pa.array(["a", "b", None, "a"] * 4).dictionary_encode()
    codes = pa.array([0, 1, None, 0], pa.int8())
    return {
        "dictionary": words,
        "ordered": pa.DictionaryArray.from_arrays(codes, pa.array(["u", "v"]), ordered=True),
        "list of dictionary": pa.ListArray.from_arrays([0, 2, 4], words),
        "dictionary of lists": pa.DictionaryArray.from_arrays(codes, pa.array([[1], [2, 3]])),
    }


def _extensions() -> dict[str, Any]:
    tensor = pa.fixed_shape_tensor(pa.int32(), [2, 3], dim_names=["x", "y"], permutation=[1, 0])
    ids = pa.array([uuid.UUID(int=1).bytes, None], pa.uuid())
    flags = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8()))
    cells = pa.array([list(range(6)), None], pa.list_(pa.int32(), 6))
    opaque = pa.opaque(pa.binary(), "kind", "vendor")
    return {
        "uuid": ids,
        "json": pa.array(["{}", None], pa.json_(pa.large_string())),
        "bool8": flags,
        "tensor": pa.ExtensionArray.from_storage(tensor, cells),
        "opaque": pa.ExtensionArray.from_storage(opaque, pa.array([b"1", None])),
        "list of uuid": pa.ListArray.from_arrays([0, 1, 2], ids),
        "struct of extensions": pa.StructArray.from_arrays([ids, flags[:2]], ["u", "b"]),
    }


def arrays() -> dict[str, Any]:
    """An array of each layout and class that this version of pyarrow has."""
    return {**_plain(), **_nested(), **_dictionaries(), **_extensions()}


def tables() -> dict[str, Any]:
    """Tables and other values made of arrays, metadata and all."""
    field = pa.field("n", pa.int64(), nullable=False, metadata={"unit": "m", b"\xff": b"\0"})
    schema = pa.schema([field, pa.field("n", pa.string())], metadata={"k": "v", "pandas": "{}" * 3000})
    rows = pa.table([pa.array([1, 2]), pa.array(["x", None])], schema=schema)
    all_of_them = list(arrays().values())
    return {
        "named twice, with metadata": rows,
        "batch": rows.to_batches()[0],
        "wide": pa.table({str(i): array[:2] for i, array in enumerate(all_of_them)}),
        "chunked": pa.table({"c": pa.chunked_array([[1], [], [2, 3]]), "d": pa.chunked_array([[1, 2], [3]])}),
        "empty": schema.empty_table(),
        "no chunks": pa.chunked_array([], pa.string()),
        "nothing": pa.table({}),
        "rows without columns": rows.select([]),
        "batch without columns": rows.to_batches()[0].select([]),
        "schema": schema,
        "field": field,
        "buffer": pa.py_buffer(b"x" * 1000),
        "no buffer": pa.py_buffer(b""),
        "numbers": pa.table({"x": np.arange(50_000.0), "y": np.arange(50_000)}),
        "texts": pa.table({"s": [f"text number {i}" for i in range(20_000)]}),
    }


def same(left: Any, right: Any) -> bool:
    """Equal, with the types of all parts, and NaN equal to itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (pa.Schema, pa.Field)):
        return bool(left.equals(right, check_metadata=True))
    if isinstance(left, (pa.Buffer, pa.DataType)):
        return bool(left == right)
    if isinstance(left, (pa.Table, pa.RecordBatch)):
        if not same(left.schema, right.schema) or left.num_rows != right.num_rows:
            return False
        return all(map(same, left.columns, right.columns))
    left.validate(full=True)
    if not same(pa.field("", left.type), pa.field("", right.type)):
        return False
    if isinstance(left, pa.Scalar):
        return str(left) == str(right)
    if isinstance(left, pa.ChunkedArray):
        return left.num_chunks == right.num_chunks and all(map(same, left.chunks, right.chunks))
    if left.null_count != right.null_count or len(left) != len(right):
        return False
    return bool(left.equals(right)) or repr(left.to_pylist()) == repr(right.to_pylist())
