"""Polars: data frames and series, through Arrow, whose memory polars shares both ways.

Guarantees: names, dtypes, chunks, the height of a frame without columns, and the flags that say "sorted" come
back. Buffers are neither copied on the way out nor on the way in, but for the codes of Categorical and Enum
(once each). A dtype that Arrow cannot carry exactly (Int128, UInt128, Object) goes by pickle, if it can. From
other hands the data are validated in full, and a flag is kept only if it is true; of several chunks polars
may find out that they are sorted though it was not known before. A panic of polars is an error of ours. A
LazyFrame is refused: it is a query, and what it refers to may be gone later.

Buffers are never written to: polars copies what others have, too. A frame can be given other columns in
place, though, so the pool keeps a clone, and lends another; the clones share all buffers.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import polars as pl
from polars.exceptions import PanicException

from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.tags import Node, expect
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

_HEADER: Final = 64  # bytes of a frame or a series, beside its buffers
_NUL: Final = "\\x00"  # in a field's name
_ASCENDING: Final = "SORTED_ASC"
_DESCENDING: Final = "SORTED_DESC"


def _encode_frame(encoder: Encoder, frame: pl.DataFrame) -> Node:
    state = _encode_columns(encoder, frame.get_columns())
    return NotImplemented if state is NotImplemented else [frame.height, state]


def _encode_series(encoder: Encoder, series: pl.Series) -> Node:
    return _encode_columns(encoder, [series])


def _encode_columns(encoder: Encoder, columns: list[pl.Series]) -> Node:
    if find_spec("pyarrow") is None or any(_aborts(column.dtype) for column in columns):
        return NotImplemented
    import pyarrow as pa  # type: ignore[import-untyped]

    from fbcache.codec.families import arrow_schemas
    from fbcache.codec.families.arrow_arrays import ArrayWriter

    # By number, for Arrow takes not every name; and each chunk alone: together they would come out in a copy.
    named = [column.alias(str(number)) for number, column in enumerate(columns)]
    try:
        empty = pl.DataFrame([column.clear() for column in named])
        if pl.DataFrame(pl.from_arrow(pa.table(empty))).schema != empty.schema:
            return NotImplemented
        tables = [[pa.table(chunk.to_frame()) for chunk in column.get_chunks()] for column in named]
        for table in (table for chunks in tables for table in chunks):
            table.validate()  # polars before 1.43 hands over slices of structs in pieces too short
    except (pa.ArrowException, pl.exceptions.PolarsError, PanicException):
        return NotImplemented
    schema = arrow_schemas.dump(pa.schema([first.schema.field(0) for first, *_ in tables]))
    if schema is None:
        return NotImplemented
    node, write = arrow_schemas.encode(encoder, schema), ArrayWriter(encoder).node
    nodes = [[write(part) for table in chunks for part in table.column(0).chunks] for chunks in tables]
    return [node, [column.name for column in columns], nodes, [_order(column) for column in columns]]


def _aborts(dtype: pl.DataType) -> bool:
    """Whether polars ends the process when it gives this to Arrow; before 1.40 it does so for objects."""
    words = repr(dtype)
    return _NUL in words or "Object" in words


def _order(series: pl.Series) -> int:
    """1 for a series that is flagged as ascending, -1 as descending, else 0."""
    flags = series.flags
    return int(flags[_ASCENDING]) - int(flags[_DESCENDING])


def _decode_frame(decoder: Decoder, node: Node, depth: int) -> pl.DataFrame:
    height, state = expect(node, list)
    columns = _decode_columns(decoder, state, depth)
    if not columns:
        return pl.DataFrame(height=expect(height, int)) if height else pl.DataFrame()
    frame = pl.DataFrame(columns)
    if frame.height != height:
        raise ValueError("its columns have another height")
    return frame


def _decode_series(decoder: Decoder, node: Node, depth: int) -> pl.Series:
    (series,) = _decode_columns(decoder, node, depth)
    return series


def _decode_columns(decoder: Decoder, node: Node, depth: int) -> list[pl.Series]:
    if find_spec("pyarrow") is None:
        reason = "the value holds polars data, which travel by pyarrow, and that is not here"
        raise UnsupportedTypeError(f"{reason}: pip install 'fbcache[polars]'")
    import pyarrow as pa

    from fbcache.codec.families import arrow_schemas
    from fbcache.codec.families.arrow_arrays import ArrayReader

    schema_node, names, columns, orders = expect(node, list)
    schema = arrow_schemas.decode(decoder, schema_node, depth)
    # Polars looks at texts also where a bitmap says that there is none.
    read = ArrayReader(decoder, depth, under_nulls=not decoder.allow_pickle).array
    found = []
    for field, name, chunks, order in zip(schema, names, expect(columns, list), orders, strict=True):
        alone = pa.schema([field])
        arrays = [read(chunk, field.type) for chunk in expect(chunks, list)]
        tables = [pa.Table.from_arrays([array], schema=alone) for array in arrays] or [alone.empty_table()]
        if not decoder.allow_pickle:
            for table in tables:
                table.validate(full=True)
        series = _series(tables, expect(order, int), trusted=decoder.allow_pickle)
        found.append(series.alias(expect(name, str)))
    return found


def _series(chunks: list[Any], order: int, *, trusted: bool) -> pl.Series:
    try:
        parts = [pl.DataFrame(pl.from_arrow(chunk, rechunk=False)).to_series() for chunk in chunks]
        series = pl.concat(parts, rechunk=False) if len(parts) > 1 else parts[0]
        if order and (trusted or _is_sorted(series, descending=order < 0)):
            series = series.set_sorted(descending=order < 0)
    except PanicException as error:  # which is no Exception
        raise ValueError(f"polars panics: {error}") from error
    return series


def _is_sorted(series: pl.Series, *, descending: bool) -> bool:
    if series.dtype.is_nested() or series.dtype == pl.Null:  # rows may take no memory, and so be without end
        return False
    return any(series.is_sorted(descending=descending, nulls_last=last) for last in (False, True))


def _refuse(encoder: Encoder, query: pl.LazyFrame) -> Node:
    raise encoder.unsupported("a polars.LazyFrame is a query and holds no data; call .collect() on it")


def _refused(decoder: Decoder, node: Node, depth: int) -> Any:
    raise UnsupportedTypeError("the value holds a polars.LazyFrame, which no fbcache writes")


def _size(value: Any) -> Size:
    return _HEADER + int(value.estimated_size())


def _clone(value: Any) -> Any:
    return value.clone()


KINDS: tuple[Kind, ...] = (
    Kind(
        pl.DataFrame,
        "polars.DataFrame",
        _encode_frame,
        _decode_frame,
        _size,
        own=_clone,
        lend=_clone,
        travels="Arrow",
    ),
    Kind(
        pl.Series,
        "polars.Series",
        _encode_series,
        _decode_series,
        _size,
        own=_clone,
        lend=_clone,
        travels="Arrow",
    ),
    Kind(pl.LazyFrame, "polars.LazyFrame", _refuse, _refused),
)
