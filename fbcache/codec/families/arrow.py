"""Arrow: tables, batches, arrays of every class, scalars, schemas, fields, types, buffers.

Guarantees: values come back equal with their types, names, nullability, chunks and all metadata, over
read-only memory; they cannot be changed, so the pool keeps them as they are. (An array that was made over a
numpy array shares its memory: that nobody writes to that is the caller's promise.) From other hands they are
validated in full. What :func:`arrow_schemas.dump` cannot write goes by pickle, and so do instances of a
program's own extension classes, but not columns made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from fbcache.codec.families import arrow_schemas
from fbcache.codec.families.arrow_arrays import ArrayReader, ArrayWriter
from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

T = TypeVar("T")


def _validated(decoder: Decoder, value: T) -> T:
    if not decoder.allow_pickle:
        value.validate(full=True)  # type: ignore[attr-defined]
    return value


# ---------------------------------------------------------------------------------- tables


def _encode_table(encoder: Encoder, table: pa.Table) -> Node:
    schema = arrow_schemas.dump(table.schema)
    if schema is None:
        return NotImplemented
    node, write = arrow_schemas.encode(encoder, schema), ArrayWriter(encoder).node
    return [node, table.num_rows, [[write(chunk) for chunk in column.chunks] for column in table.columns]]


def _decode_table(decoder: Decoder, node: Node, depth: int) -> pa.Table:
    schema, rows, columns = _opened(decoder, node, depth)
    if not columns:
        return _without_columns(pa.Table, schema, rows)
    read = ArrayReader(decoder, depth).array
    arrays = [
        pa.chunked_array([read(chunk, field.type) for chunk in expect(chunks, list)], field.type)
        for field, chunks in zip(schema, columns, strict=True)
    ]
    return _validated(decoder, _of_rows(pa.Table.from_arrays(arrays, schema=schema), rows))


def _encode_batch(encoder: Encoder, batch: pa.RecordBatch) -> Node:
    schema = arrow_schemas.dump(batch.schema)
    if schema is None:
        return NotImplemented
    node, write = arrow_schemas.encode(encoder, schema), ArrayWriter(encoder).node
    return [node, batch.num_rows, [write(column) for column in batch.columns]]


def _decode_batch(decoder: Decoder, node: Node, depth: int) -> pa.RecordBatch:
    schema, rows, columns = _opened(decoder, node, depth)
    if not columns:
        return _without_columns(pa.RecordBatch, schema, rows)
    read = ArrayReader(decoder, depth).array
    arrays = [read(column, field.type) for field, column in zip(schema, columns, strict=True)]
    return _validated(decoder, _of_rows(pa.RecordBatch.from_arrays(arrays, schema=schema), rows))


def _opened(decoder: Decoder, node: Node, depth: int) -> tuple[pa.Schema, int, list[Node]]:
    schema_node, rows, columns = expect(node, list)
    schema = arrow_schemas.decode(decoder, schema_node, depth)
    if expect(rows, int) < 0 or len(expect(columns, list)) != len(schema):
        raise ValueError("its columns do not match its schema")
    return schema, rows, columns


def _without_columns(cls: Any, schema: pa.Schema, rows: int) -> Any:
    """Make what has rows all the same: no constructor does, and ``pa.nulls`` takes its time."""
    nulls = pa.Array.from_buffers(pa.null(), rows, [None])
    filled = cls.from_arrays([nulls], schema=pa.schema([("", pa.null())], schema.metadata))
    return filled.select([])


def _of_rows(table: T, rows: int) -> T:
    if table.num_rows != rows:  # type: ignore[attr-defined]
        raise ValueError("its columns have another length")
    return table


# ---------------------------------------------------------------------------------- arrays


def _encode_chunked(encoder: Encoder, chunked: pa.ChunkedArray) -> Node:
    schema = arrow_schemas.dump(arrow_schemas.of_type(chunked.type))
    if schema is None:
        return NotImplemented
    node, write = arrow_schemas.encode(encoder, schema), ArrayWriter(encoder).node
    return [node, [write(chunk) for chunk in chunked.chunks]]


def _decode_chunked(decoder: Decoder, node: Node, depth: int) -> pa.ChunkedArray:
    schema, chunks = expect(node, list)
    type_, read = _type(decoder, schema, depth), ArrayReader(decoder, depth).array
    arrays = [read(chunk, type_) for chunk in expect(chunks, list)]
    return _validated(decoder, pa.chunked_array(arrays, type_))


def _encode_array(encoder: Encoder, array: pa.Array) -> Node:
    schema = arrow_schemas.dump(arrow_schemas.of_type(array.type))
    if schema is None:
        return NotImplemented
    return [arrow_schemas.encode(encoder, schema), ArrayWriter(encoder).node(array)]


def _decode_array(decoder: Decoder, node: Node, depth: int) -> pa.Array:
    schema, array = expect(node, list)
    type_ = _type(decoder, schema, depth)
    return _validated(decoder, ArrayReader(decoder, depth).array(array, type_))


def _encode_scalar(encoder: Encoder, scalar: pa.Scalar) -> Node:
    try:
        return _encode_array(encoder, pa.repeat(scalar, 1))
    except pa.ArrowNotImplementedError:  # of an older version
        return NotImplemented


def _decode_scalar(decoder: Decoder, node: Node, depth: int) -> pa.Scalar:
    array = _decode_array(decoder, node, depth)
    if len(array) != 1:
        raise ValueError("a scalar is an array of one")
    return array[0]


def _type(decoder: Decoder, node: Node, depth: int) -> pa.DataType:
    (field,) = arrow_schemas.decode(decoder, node, depth)
    return field.type


# ------------------------------------------------------------- schemas, types and buffers


def _encode_schema(encoder: Encoder, schema: pa.Schema) -> Node:
    dumped = arrow_schemas.dump(schema)
    return NotImplemented if dumped is None else arrow_schemas.encode(encoder, dumped)


def _encode_field(encoder: Encoder, field: pa.Field) -> Node:
    return _encode_schema(encoder, pa.schema([field]))


def _decode_field(decoder: Decoder, node: Node, depth: int) -> pa.Field:
    (field,) = arrow_schemas.decode(decoder, node, depth)
    return field


def _encode_type(encoder: Encoder, type_: pa.DataType) -> Node:
    return _encode_schema(encoder, arrow_schemas.of_type(type_))


def _encode_buffer(encoder: Encoder, buffer: pa.Buffer) -> Node:
    memory = np.frombuffer(buffer, np.uint8) if buffer.size else np.empty(0, np.uint8)
    return encoder.part(".buffer", memory)


def _decode_buffer(decoder: Decoder, node: Node, depth: int) -> pa.Buffer:
    memory = expect(decoder.value(node, depth), np.ndarray).view()
    memory.setflags(write=False)
    return pa.py_buffer(memory)


# ----------------------------------------------------------------------------------- sizes

_HEADER = 64  # bytes of an object that has no way to say


def _array_size(value: Any) -> Size:
    return _HEADER + int(value.get_total_buffer_size())


def _scalar_size(scalar: pa.Scalar) -> Size:
    return _array_size(pa.repeat(scalar, 1))


def _schema_size(schema: pa.Schema) -> Size:
    return _HEADER + int(schema.serialize().size)


def _field_size(field: pa.Field) -> Size:
    return _schema_size(pa.schema([field]))


def _type_size(type_: pa.DataType) -> Size:
    return _schema_size(arrow_schemas.of_type(type_))


def _buffer_size(buffer: pa.Buffer) -> Size:
    return _HEADER + int(buffer.size)


def _classes(base: type) -> set[type]:
    """A class of pyarrow's and those made of it: which there are depends on the version."""
    return {cls for cls in vars(pa.lib).values() if isinstance(cls, type) and issubclass(cls, base)}


def _kinds(
    base: type, encode: Callable[..., Node], decode: Callable[..., Any], size: Callable[[Any], Size]
) -> list[Kind]:
    name = f"pyarrow.{base.__name__}"  # one for all: the schema tells which class it is
    return [Kind(cls, name, encode, decode, size, travels="Arrow") for cls in _classes(base)]


KINDS: tuple[Kind, ...] = (
    *_kinds(pa.Table, _encode_table, _decode_table, _array_size),
    *_kinds(pa.RecordBatch, _encode_batch, _decode_batch, _array_size),
    *_kinds(pa.ChunkedArray, _encode_chunked, _decode_chunked, _array_size),
    *_kinds(pa.Array, _encode_array, _decode_array, _array_size),
    *_kinds(pa.Scalar, _encode_scalar, _decode_scalar, _scalar_size),
    *_kinds(pa.DataType, _encode_type, _type, _type_size),
    *_kinds(pa.Schema, _encode_schema, arrow_schemas.decode, _schema_size),
    *_kinds(pa.Field, _encode_field, _decode_field, _field_size),
    Kind(pa.Buffer, "pyarrow.Buffer", _encode_buffer, _decode_buffer, _buffer_size),
)
