"""The vocabulary of a tree: what :mod:`encoder` writes and :mod:`decoder` reads.

A tree is one msgpack value. Atoms stand for themselves, and so does a dict whose keys are all
atoms (a msgpack map). A msgpack array is always a node ``[tag, ...]`` of one of the kinds below.
Containers, arrays, registered objects and pickled parts are numbered from 0 in the order in
which they are complete, so that ``REF`` can name one that came before.

Tags are part of the file format: a number is never given a second meaning.

============ ================================================== =========================
tag          rest of the node                                   numbered
============ ================================================== =========================
LIST, TUPLE  items                                              yes
SET          items                                              yes
FROZENSET    items                                              yes
DICT         key, value, key, value...                          yes, as is a map
REF          number
BYTES        buffer                                             yes
BYTEARRAY    bytes or buffer                                    yes
OBJECT       registered name, state                             yes
PICKLE       bytes or buffer, first buffer, number of buffers   yes
FAMILY       name of a kind, state                              yes
ORDERED      key, value..., [dict of attributes]                yes
ARRAY        dtype, shape, bytes or buffer, Fortran             yes
VIEW         dtype, shape, bytes or buffer, offset, strides     yes
OBJECTS      shape, items, Fortran                              yes
STRINGS      shape, items, coerce, [missing value]              yes
MASKED       [data, mask, fill value], hard                     yes
VOID         dtype, bytes                                       yes
INT          bytes (signed, little-endian)
TEXT         bytes (UTF-8, with lone surrogates)
others       see :mod:`scalars` and :mod:`arrays`
============ ================================================== =========================
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

#: A value as msgpack takes and gives it.
Node: TypeAlias = Any

LIST: Final = 0
TUPLE: Final = 1
DICT: Final = 2
SET: Final = 3
FROZENSET: Final = 4
REF: Final = 5
BYTES: Final = 6
BYTEARRAY: Final = 7
OBJECT: Final = 8
PICKLE: Final = 9
FAMILY: Final = 10
ORDERED: Final = 11

INT: Final = 16
TEXT: Final = 17
COMPLEX: Final = 18
ELLIPSIS: Final = 19
RANGE: Final = 20
SLICE: Final = 21
DECIMAL: Final = 22
FRACTION: Final = 23
UUID: Final = 24
DATE: Final = 25
TIME: Final = 26
DATETIME: Final = 27
TIMEDELTA: Final = 28
TIMEZONE: Final = 29
ZONEINFO: Final = 30

ARRAY: Final = 48
VIEW: Final = 49
OBJECTS: Final = 50
STRINGS: Final = 51
MASKED: Final = 52
SCALAR: Final = 53
STR_SCALAR: Final = 54
BYTES_SCALAR: Final = 55
VOID: Final = 56

#: Types that stand for themselves in a tree, as far as msgpack can hold the value.
ATOMS: Final = frozenset({type(None), bool, int, float, str})

#: The atoms of which msgpack holds every value; the rest are an integer or a text that it may refuse.
SAFE_ATOMS: Final = frozenset({type(None), bool, float})

#: Bytes and arrays from this many bytes up leave the tree for a buffer of their own. Below it a
#: copy costs less than the buffer's span, checksum, alignment and view.
INLINE_BYTES: Final = 4096
INLINE_ARRAY: Final = 256

#: Most levels of nesting. Each takes three Python frames, of 1000 that there are by default, and up
#: to two msgpack levels, of 511 that its older versions have.
MAX_DEPTH: Final = 200


def expect(value: Any, kind: type[Any]) -> Any:
    """Return ``value``, which must be exactly a ``kind``.

    Raises
    ------
    TypeError
        It is not.
    """
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return value
