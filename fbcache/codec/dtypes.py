"""Numpy dtypes as nodes of a tree.

Guarantee: :func:`parse` gives only dtypes whose elements are plain bytes, never one that holds
references, and :func:`describe` names only those. A node is one of

- ``"<f8"``: numpy's own text, but ``"<q"`` and ``"<Q"`` for the second type of 8-byte integers;
- ``"ml:bfloat16"``: a type of the library ml_dtypes, in little-endian order;
- ``[base, shape]``: a subarray;
- ``[names, formats, offsets, titles, itemsize, aligned, record]``: fields.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from importlib import import_module
from typing import Any, Final, TypeAlias

import numpy as np

from fbcache.codec.tags import Node, expect
from fbcache.errors import UnsupportedTypeError

DType: TypeAlias = np.dtype[Any]

#: Types of the scalars that are plain bytes and have no fields.
PLAIN: Final = frozenset(np.dtype(code).type for code in np.typecodes["All"]) - {np.object_, np.void}

_SIMPLE: Final = PLAIN | {np.void}
_PATTERN: Final = re.compile(r"[<>|](?:[biufcSUV]\d{1,10}|[mM]8(?:\[\w{1,24}\])?|[qQ])")
_MAX_DEPTH: Final = 32  # of fields within fields

#: What ml_dtypes has: floats, and integers of less than a byte, which take one.
ML_TYPES: Final = frozenset(
    (
        *("bfloat16", "bcomplex32", "complex32"),
        *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e8m0fnu"),
        *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
        *("float8_e5m2", "float8_e5m2fnuz"),
        *("int1", "int2", "int4", "uint1", "uint2", "uint4"),
    )
)
_ML: Final = "ml:"


def describe(dtype: DType) -> Node:
    """Return the node of a dtype, or None for one that raw memory does not suffice for."""
    if dtype.names is None and dtype.type in _SIMPLE and dtype.metadata is None and dtype.subdtype is None:
        text = dtype.str
        return text[0] + dtype.char if dtype.char in "qQ" else text
    try:
        return _describe(dtype, 0)
    except ValueError:
        return None


def _describe(dtype: DType, depth: int) -> Node:
    if depth > _MAX_DEPTH or dtype.metadata is not None:
        raise ValueError(dtype)
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_describe(base, depth + 1), shape]
    if dtype.names is not None:
        return _describe_fields(dtype, depth)
    node = describe(dtype) if dtype.type in _SIMPLE else _describe_ml(dtype)
    if node is None:
        raise ValueError(dtype)
    return node


def _describe_ml(dtype: DType) -> Node:
    """The node of a dtype of ml_dtypes; None for others, and for an order of bytes that is not read here."""
    name = dtype.type.__name__
    if dtype.type.__module__ != "ml_dtypes" or name not in ML_TYPES or not dtype.isnative:
        return None
    return _ML + name if sys.byteorder == "little" else None


def _describe_fields(dtype: DType, depth: int) -> Node:
    names, fields = dtype.names, dtype.fields
    if names is None or fields is None or dtype.type not in (np.void, np.record):
        raise ValueError(dtype)
    parts = [(*fields[name], None)[:3] for name in names]
    titles = [part[2] for part in parts]
    if not all(title is None or type(title) is str for title in titles):
        raise ValueError(dtype)
    formats = [_describe(part[0], depth + 1) for part in parts]
    offsets = [part[1] for part in parts]
    is_record = dtype.type is np.record
    return [list(names), formats, offsets, titles, dtype.itemsize, dtype.isalignedstruct, is_record]


def parse(node: Node) -> DType:
    """Return the dtype of a node.

    Raises
    ------
    ValueError, TypeError
        It describes none, or one that is not plain bytes.
    UnsupportedTypeError
        Its library is not here.
    """
    return _parse(node, 0)


def _parse(node: Node, depth: int) -> DType:
    if type(node) is str:
        return _parse_simple(node)
    if type(node) is not list or depth > _MAX_DEPTH:
        raise ValueError("a dtype is neither text nor fields")
    if len(node) == 2:
        base, shape = node
        return np.dtype((_parse(base, depth + 1), tuple(shape)))
    return _parse_fields(node, depth)


@lru_cache(256)
def _parse_simple(text: str) -> DType:
    if text.startswith(_ML):
        return _parse_ml(text.removeprefix(_ML))
    if not _PATTERN.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no dtype of plain bytes")
    return np.dtype(text)


def _parse_ml(name: str) -> DType:
    if name not in ML_TYPES or sys.byteorder != "little":
        raise UnsupportedTypeError(f"the value holds an array of {name[:40]!r}, which cannot be read here")
    try:
        dtype: DType = np.dtype(getattr(import_module("ml_dtypes"), name))
    except (ImportError, AttributeError) as error:
        reason = f"the value holds an array of {name}, for which ml_dtypes is missing or too old ({error})"
        raise UnsupportedTypeError(f"{reason}: pip install 'fbcache[ml_dtypes]'") from error
    return dtype


def _parse_fields(node: list[Node], depth: int) -> DType:
    names, formats, offsets, titles, itemsize, aligned, record = node
    parts = [_parse(part, depth + 1) for part in formats]
    for part, offset in zip(parts, offsets, strict=True):  # numpy looks too, but its sum overflows
        if expect(offset, int) < 0 or offset + part.itemsize > expect(itemsize, int):
            raise ValueError("a field lies outside of its element")
    fields: Any = {
        "names": names,
        "formats": parts,
        "offsets": offsets,
        "titles": titles,
        "itemsize": itemsize,
    }
    dtype = np.dtype(fields, align=expect(aligned, bool))
    return np.dtype((np.record, dtype)) if expect(record, bool) else dtype
