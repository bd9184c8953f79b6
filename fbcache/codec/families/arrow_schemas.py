"""Arrow schemas as Arrow's own IPC messages: types, names, nullability, metadata.

Guarantees: a schema that is written reads back equal, names of nested fields and all metadata included, or
is not written at all (``dump`` returns None). One read from a blob runs no code but that of extension types
which the program itself has registered; one that names an extension type which is registered no more, or
not here, is refused, and never comes back as its storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa  # type: ignore[import-untyped]

from fbcache.codec.tags import Node, expect
from fbcache.errors import UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

#: An extension type that is a pickle, which pyarrow loads if it was told to (``set_auto_load``).
_PICKLED: Final = b"arrow.py_extension_type"

#: Whether arrays of any number of buffers can be put together: views need it.
_HAS_VIEWS: Final = hasattr(pa.DataType, "has_variadic_buffers")
_VIEWS: Final = frozenset(getattr(pa.lib, f"Type_{name}_VIEW", -1) for name in ("STRING", "BINARY"))


def dump(schema: pa.Schema) -> list[Any] | None:
    """Return what :func:`encode` writes of a schema; None for one that would not read back equal.

    Such are extension types that are not registered, dictionaries of dictionaries or of extension types, and
    types nested deeper than Arrow's reader goes.
    """
    try:
        message = schema.serialize()
        if not pa.ipc.read_schema(message).equals(schema, check_metadata=True):
            return None
    except MemoryError:
        raise
    except Exception:  # of Arrow's, or whatever a program's own extension type raises
        return None
    types = list(_all_types(schema))
    if not _HAS_VIEWS and any(type_.id in _VIEWS for type_ in types):
        return None
    return [message.to_pybytes(), sorted(_extensions(types))]


def encode(encoder: Encoder, dumped: list[Any]) -> Node:
    """Write what :func:`dump` returned."""
    message, extensions = dumped
    return [encoder.part(".schema", message), extensions]


def decode(decoder: Decoder, node: Node, depth: int) -> pa.Schema:
    """Read a schema.

    Raises
    ------
    UnsupportedTypeError
        It names an extension type that is not registered here.
    """
    part, extensions = expect(node, list)
    message = expect(decoder.value(part, depth), bytes)
    if not decoder.allow_pickle and _PICKLED in message:
        raise UnsupportedTypeError("the value holds an Arrow extension type that is a pickle")
    schema = pa.ipc.read_schema(pa.py_buffer(message))
    missing = set(expect(extensions, list)) - _extensions(_all_types(schema))
    if missing:
        names = ", ".join(sorted(repr(expect(name, str)[:80]) for name in missing))
        reason = f"the value holds the Arrow extension type {names}, which is not registered here"
        raise UnsupportedTypeError(f"{reason}: pyarrow.register_extension_type does that")
    return schema


def of_type(type_: pa.DataType) -> pa.Schema:
    """Return the schema that stands for a bare type."""
    return pa.schema([pa.field("", type_)])


def _all_types(schema: pa.Schema) -> Iterator[pa.DataType]:
    for field in schema:
        yield from _types(field.type)


def _types(type_: pa.DataType) -> Iterator[pa.DataType]:
    """A type and all that it is made of."""
    yield type_
    if isinstance(type_, pa.BaseExtensionType):
        yield from _types(type_.storage_type)
    elif isinstance(type_, pa.DictionaryType):
        yield from _types(type_.value_type)
    for index in range(type_.num_fields):
        yield from _types(type_.field(index).type)


def _extensions(types: Iterable[pa.DataType]) -> set[str]:
    return {type_.extension_name for type_ in types if isinstance(type_, pa.BaseExtensionType)}
