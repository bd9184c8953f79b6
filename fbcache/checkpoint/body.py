"""The body of a manifest: names with their keys and blobs, by columns.

Guarantee: :func:`unpack_body` takes any bytes at all, and what it returns fits them exactly. A count
that lies allocates nothing.

========== ======== =======================================================================
offset     bytes    content, of N names; all integers are little-endian
========== ======== =======================================================================
0          16 N     keys
16 N       8 N      sizes of the values
24 N       8 N      lengths of the files
32 N       8 N      digests
40 N       2 N      codecs, as places in their table
42 N       4 N      notes on pickle, as places in their table; 0 for none, so that they count
                    from 1
46 N                msgpack values one after the other, nothing nested in them: how many codecs,
                    how many notes, the codecs (str), the notes (str), and the names (str, or
                    bin for the tree of a name that is no text)
========== ======== =======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, overload
from uuid import UUID

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from fbcache.checkpoint import naming

T = TypeVar("T")
_Column: TypeAlias = NDArray[Any]

#: The most that any number but a digest can be, as an offset or a length.
MOST: Final = (1 << 63) - 1

_COLUMNS: Final = ("<u8", "<u8", "<u8", "<u2", "<u4")  # all but the keys
_ROW: Final = 16 + sum(np.dtype(column).itemsize for column in _COLUMNS)
_MOST_CODECS: Final = (1 << 16) - 1


@dataclass(frozen=True, slots=True)
class Blob:
    """What a manifest tells of one name's blob.

    Attributes
    ----------
    nbytes : int
        The value's size in memory, as the pool counts it.
    disk_bytes : int
        Length of the blob's file.
    codec, pickled
        As in :class:`~fbcache.codec.frames.Frames`.
    digest : int
        The checksum of the blob's header (8 bytes at offset 16 of its file), which covers those
        of all its buffers.
    """

    nbytes: int
    disk_bytes: int
    codec: str
    pickled: str | None
    digest: int


class Body(NamedTuple):
    """Names, and in the same order their keys and blobs."""

    names: Sequence[Hashable]
    keys: Sequence[UUID]
    blobs: Sequence[Blob]


class Totals(NamedTuple):
    """What a head says of its body: names, and sums over them."""

    names: int
    nbytes: int
    disk_bytes: int


# ---------------------------------------------------------------------------------- writing


def pack_body(body: Body, totals: Totals) -> list[bytes]:
    """Return the pieces of a body.

    Raises
    ------
    UnsupportedTypeError, PickleRefusedError
        A name cannot be kept.
    ValueError, OverflowError
        Lengths and totals do not fit each other, two names are one, or a number is out of bounds.
    """
    names, keys, blobs = body.names, body.keys, list(body.blobs)
    if not totals.names == len(names) == len(keys) == len(blobs):
        raise ValueError(f"there are {len(names)} names, {len(keys)} keys and {len(blobs)} blobs")
    codecs = _places(blob.codec for blob in blobs)
    notes = _places(chain((None,), (blob.pickled for blob in blobs)))
    if len(codecs) > _MOST_CODECS:
        raise ValueError(f"there are {len(codecs)} codecs, where {_MOST_CODECS} may be")
    numbers: tuple[Iterable[int], ...] = (
        (blob.nbytes for blob in blobs),
        (blob.disk_bytes for blob in blobs),
        (blob.digest for blob in blobs),
        (codecs[blob.codec] for blob in blobs),
        (notes[blob.pickled] for blob in blobs),
    )
    columns = [np.fromiter(*pair, len(blobs)) for pair in zip(numbers, _COLUMNS, strict=True)]
    _check_sums(columns, totals)
    texts = chain((len(codecs), len(notes) - 1), codecs, islice(notes, 1, None), naming.encode_all(names))
    return [
        b"".join(key.bytes for key in keys),
        *(column.tobytes() for column in columns),
        b"".join(map(msgpack.Packer().pack, texts)),
    ]


def _places(texts: Iterable[T]) -> dict[T, int]:
    """Give each text a place in a table, in the order in which they first occur."""
    return {text: place for place, text in enumerate(dict.fromkeys(texts))}


# ---------------------------------------------------------------------------------- reading


def unpack_body(packed: memoryview, totals: Totals) -> Body:
    """Read a body. Keys and blobs are made when they are asked for, of ``packed`` itself.

    Raises
    ------
    ValueError, msgpack.UnpackException
        It is not what was written.
    """
    count = totals.names
    if count * _ROW > packed.nbytes:
        raise ValueError(f"it is too short for {count} names")
    columns, start = [], 16 * count
    for column in _COLUMNS:
        columns.append(np.ndarray((count,), column, packed, start))
        start += columns[-1].nbytes
    _check_sums(columns, totals)
    codecs, notes, names = _read_texts(packed[start:], count)
    _check_below(columns[3], len(codecs), "codecs")
    _check_below(columns[4], len(notes), "notes on pickle")
    return Body(
        names, _Rows(count, partial(_key, packed)), _Rows(count, partial(_blob, columns, codecs, notes))
    )


def _check_sums(columns: Sequence[_Column], totals: Totals) -> None:
    for column, total, what in (
        (columns[0], totals.nbytes, "values"),
        (columns[1], totals.disk_bytes, "files"),
    ):
        _check_below(column, MOST + 1, f"bytes of {what}")
        # By halves, of which the sum of four billion stays within 64 bits.
        found = (int((column >> 32).sum()) << 32) + int((column & 0xFFFFFFFF).sum())
        if found != total:
            raise ValueError(f"its {what} take {found} bytes, where its head says {total}")


def _check_below(column: _Column, bound: int, what: str) -> None:
    if column.size and int(column.max()) >= bound:
        raise ValueError(f"a number in its column of {what} is {column.max()}, and has to be below {bound}")


def _read_texts(packed: memoryview, count: int) -> tuple[list[str], list[str | None], list[Hashable]]:
    # Nothing is nested in a right body, so with these limits a lie allocates next to nothing.
    unpacker = msgpack.Unpacker(
        max_buffer_size=max(packed.nbytes, 1), max_array_len=0, max_map_len=0, max_ext_len=0
    )
    unpacker.feed(packed)
    lengths = _take(unpacker, 2, {int})
    if lengths[0] > _MOST_CODECS or not all(0 <= length <= count for length in lengths):
        raise ValueError(f"it has tables of {lengths} texts for {count} names")
    codecs, notes = (_take(unpacker, length, {str}) for length in lengths)
    names = _take(unpacker, count, {str, bytes})
    if unpacker.tell() != packed.nbytes:
        raise ValueError("its body has bytes left over")
    del unpacker  # its buffer is as long as the texts
    for index, name in enumerate(names):
        if type(name) is bytes:
            names[index] = naming.decode(name)
    naming.check_distinct(names)
    return codecs, [None, *notes], names


def _take(unpacker: Any, count: int, kinds: set[type]) -> list[Any]:
    items = list(islice(unpacker, count))
    if len(items) != count:
        raise ValueError("its body ends within its texts")
    if not kinds.issuperset(map(type, items)):
        raise ValueError("there is something else where its body's texts should be")
    return items


def _key(body: memoryview, row: int) -> UUID:
    return UUID(bytes=bytes(body[16 * row : 16 * row + 16]))


def _blob(columns: list[_Column], codecs: list[str], notes: list[str | None], row: int) -> Blob:
    nbytes, disk_bytes, digest, codec, note = (column.item(row) for column in columns)
    return Blob(nbytes, disk_bytes, codecs[codec], notes[note], digest)


class _Rows(Sequence[T]):
    """A column, of which each item is made when it is asked for."""

    __slots__ = ("_count", "_row")

    def __init__(self, count: int, row: Callable[[int], T]) -> None:
        self._count = count
        self._row = row

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        rows = range(self._count)[index]
        return [self._row(row) for row in rows] if isinstance(rows, range) else self._row(rows)

    def __iter__(self) -> Iterator[T]:
        return map(self._row, range(self._count))
