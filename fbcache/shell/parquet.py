"""Tables to parquet files, by pyarrow.

Guarantee: columns are converted some rows at a time, so that memory does not grow with the table; only a
pandas DataFrame is taken as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final, TypeAlias

import numpy as np

from fbcache.shell.ending import Refused
from fbcache.shell.target import Sink

Array: TypeAlias = np.ndarray[Any, Any]

TAKES: Final = (
    "a table: a dict of one-dimensional arrays of one length, a structured or a two-dimensional array, or a "
    "pandas DataFrame"
)

#: Bytes of a group of rows, as they are in memory, and the most rows that one has: what readers expect.
_GROUP_BYTES: Final = 64 << 20
_GROUP_ROWS: Final = 1 << 20


def check() -> None:
    """Raise :class:`Refused` if pyarrow is not installed."""
    try:
        import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        needs = f"a .parquet file needs {error.name}, which is not installed"
        raise Refused(f"{needs}: pip install 'fbcache[parquet]'; or export to .npy or .pkl") from None


def fits(value: Any) -> bool:
    """Whether the value is a table."""
    return _is_data_frame(value) or _columns(value) is not None


def write(value: Any, sink: Sink) -> None:
    """Write a table.

    Raises
    ------
    Refused
        A column is of a type that there is not in parquet.
    """
    arrow, files = import_module("pyarrow"), import_module("pyarrow.parquet")
    if _is_data_frame(value):
        try:
            table = arrow.Table.from_pandas(value)
        except (arrow.ArrowException, TypeError, ValueError) as error:
            raise Refused(f"the DataFrame does not fit a .parquet file ({error}); .pkl would do") from error
        files.write_table(table, sink)
        return
    columns = _columns(value) or {}
    schema = arrow.schema([(name, _type_of(arrow, name, column)) for name, column in columns.items()])
    with files.ParquetWriter(sink, schema) as writer:
        for rows in _groups(columns):
            parts = [_converted(arrow, name, column[rows]) for name, column in columns.items()]
            writer.write_table(arrow.Table.from_arrays(parts, schema=schema))


def _is_data_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")  # loaded with the value, if it is one
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _columns(value: Any) -> dict[str, Array] | None:
    """The columns of a table, as views; None if the value is none."""
    if isinstance(value, dict):
        return value if _are_columns(value) else None
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        return None
    if value.dtype.names is not None:
        return {name: value[name] for name in value.dtype.names} if value.ndim == 1 else None
    return {str(index): value[:, index] for index in range(value.shape[1])} if value.ndim == 2 else None


def _are_columns(value: dict[Any, Any]) -> bool:
    arrays = all(isinstance(name, str) and isinstance(part, np.ndarray) for name, part in value.items())
    return bool(value) and arrays and {part.shape for part in value.values()} == {(len(_first(value)),)}


def _first(value: dict[Any, Any]) -> Array:
    first: Array = next(iter(value.values()))
    return first.reshape(-1)


def _groups(columns: dict[str, Array]) -> Iterator[slice]:
    rows = len(next(iter(columns.values()), ()))
    width = sum(column.dtype.itemsize for column in columns.values())
    step = max(1, min(_GROUP_ROWS, _GROUP_BYTES // max(width, 1)))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _type_of(arrow: Any, name: str, column: Array) -> Any:
    # What objects are shows when all have been looked at.
    return _converted(arrow, name, column if column.dtype.hasobject else column[:0]).type


def _converted(arrow: Any, name: str, column: Array) -> Any:
    if column.dtype.kind == "T":
        column = column.astype(object)
    elif not column.dtype.isnative:
        column = column.astype(column.dtype.newbyteorder("="))
    try:
        return arrow.array(column)
    except (arrow.ArrowException, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise Refused(
            f"its column {name!r} of {column.dtype} does not fit a .parquet file ({reason}); .pkl would do"
        ) from error
