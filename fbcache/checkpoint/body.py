"""The body of a manifest: names with their keys and blobs, by columns.

Guarantee: :func:`unpack_body` takes any bytes at all, and what it returns fits them exactly. A count
that lies allocates nothing.

========== ======== =======================================================================
offset     bytes    content, of N names; all integers are little-endian
========== ======== =======================================================================
0          16 N     keys
16 N       8 N      sizes of the values
24 N       8 N      lengths of the files, or of the records in packs
32 N       8 N      digests
40 N       2 N      codecs, as places in their table
42 N       4 N      notes on pickle, as places in their table; 0 for none, so that they count
                    from 1
46 N                texts, see below
========== ======== =======================================================================

Texts are msgpack values one after the other, nothing nested in them: how many codecs, how many notes, the
codecs (str), the notes (str), and the names (str, or bin for the tree of a name that is no text).

In format 2, which has P packs, at least one, of which each holds something, and no two contents the same
bytes, there stands before the texts:

============== ======== ===================================================================
offset         bytes    content
============== ======== ===================================================================
46 N           4 N      packs, as places in their table, which count from 1; 0 for a file of
                        its own
50 N           8 N      offsets of the records in the packs' files; 0 for a file of its own
58 N           4        P
58 N + 4       32 P     keys of the packs (16 bytes), lengths and digests of their files (8 each)
58 N + 4 + 32 P         texts
============== ======== ===================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, overload
from uuid import UUID

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from fbcache.checkpoint import naming
from fbcache.codec.frames import Buffer

T = TypeVar("T")
_Column: TypeAlias = NDArray[Any]

#: The most that any number but a digest can be, as an offset or a length.
MOST: Final = (1 << 63) - 1

_COLUMNS: Final = ("<u8", "<u8", "<u8", "<u2", "<u4")  # all but the keys
_PLACES: Final = ("<u4", "<u8")  # further ones of format 2
_PACK: Final = struct.Struct("<16sQQ")
_COUNT: Final = struct.Struct("<I")
_AT_ONCE: Final = 4096  # rows of which numbers are made together, where all are gone through
_MOST_CODECS: Final = (1 << 16) - 1


@dataclass(frozen=True, slots=True)
class Pack:
    """A file of many small blobs, as records one after the other; see :mod:`.packs`.

    Attributes
    ----------
    key : UUID
        The file's own.
    nbytes : int
        Length of the file.
    digest : int
        The checksum of its header, as for a blob's file.
    """

    key: UUID
    nbytes: int
    digest: int


@dataclass(frozen=True, slots=True)
class Blob:
    """What a manifest tells of one name's blob.

    Attributes
    ----------
    nbytes : int
        The value's size in memory, as the pool counts it.
    disk_bytes : int
        Length of the blob's file, or of its record in a pack.
    codec, pickled
        As in :class:`~fbcache.codec.frames.Frames`.
    digest : int
        The checksum of the blob's header (8 bytes at offset 16 of its file), which covers those
        of all its buffers; or that of its record.
    pack : Pack or None
        The pack it is in; None where it has a file of its own.
    offset : int
        Of its record in the pack's file; 0 where it has a file of its own.
    """

    nbytes: int
    disk_bytes: int
    codec: str
    pickled: str | None
    digest: int
    pack: Pack | None = None
    offset: int = 0


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


def files_of(keys: Sequence[UUID], blobs: Sequence[Blob]) -> frozenset[UUID]:
    """Return the keys of the files that these blobs are in."""
    if isinstance(blobs, _Blobs):
        return frozenset(chain((keys[row] for row in blobs.apart()), (pack.key for pack in blobs.packs)))
    rows = zip(keys, blobs, strict=True)
    return frozenset(key if blob.pack is None else blob.pack.key for key, blob in rows)


def packs_of(blobs: Sequence[Blob]) -> frozenset[Pack]:
    """Return the packs that some of these blobs are in."""
    if isinstance(blobs, _Blobs):
        return frozenset(blobs.packs)
    return frozenset(blob.pack for blob in blobs if blob.pack is not None)


# ---------------------------------------------------------------------------------- writing


def pack_body(body: Body, totals: Totals) -> tuple[int, list[bytes]]:
    """Return the format of a body, and its pieces.

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
    packs = _places(chain((None,), (blob.pack for blob in blobs)))
    if len(codecs) > _MOST_CODECS:
        raise ValueError(f"there are {len(codecs)} codecs, where {_MOST_CODECS} may be")
    numbers: tuple[Iterable[int], ...] = (
        (blob.nbytes for blob in blobs),
        (blob.disk_bytes for blob in blobs),
        (blob.digest for blob in blobs),
        (codecs[blob.codec] for blob in blobs),
        (notes[blob.pickled] for blob in blobs),
        (packs[blob.pack] for blob in blobs),
        (blob.offset for blob in blobs),
    )
    kinds = _COLUMNS + _PLACES
    columns = [np.fromiter(*pair, len(blobs)) for pair in zip(numbers, kinds, strict=True)]
    _check_sums(columns, totals)
    table = [pack for pack in packs if pack is not None]
    content_keys = b"".join(key.bytes for key in keys)
    _check_places(columns, table, content_keys)
    texts = chain((len(codecs), len(notes) - 1), codecs, islice(notes, 1, None), naming.encode_all(names))
    return 2 if table else 1, [
        content_keys,
        *(column.tobytes() for column in columns[: len(_COLUMNS) + (len(_PLACES) if table else 0)]),
        _pack_table(table) if table else b"",
        b"".join(map(msgpack.Packer().pack, texts)),
    ]


def _pack_table(packs: Sequence[Pack]) -> bytes:
    rows = (_PACK.pack(pack.key.bytes, pack.nbytes, pack.digest) for pack in packs)
    return b"".join((_COUNT.pack(len(packs)), *rows))


def _places(texts: Iterable[T]) -> dict[T, int]:
    """Give each text a place in a table, in the order in which they first occur."""
    return {text: place for place, text in enumerate(dict.fromkeys(texts))}


# ---------------------------------------------------------------------------------- reading


def unpack_body(packed: memoryview, totals: Totals, written: int) -> Body:
    """Read a body of the format ``written``. Keys and blobs are made when asked for, of ``packed`` itself.

    Raises
    ------
    ValueError, msgpack.UnpackException
        It is not what was written.
    """
    count = totals.names
    kinds = _COLUMNS if written == 1 else _COLUMNS + _PLACES
    if count * (16 + sum(np.dtype(kind).itemsize for kind in kinds)) > packed.nbytes:
        raise ValueError(f"it is too short for {count} names")
    columns, start = [], 16 * count
    for kind in kinds:
        columns.append(np.ndarray((count,), kind, packed, start))
        start += columns[-1].nbytes
    _check_sums(columns, totals)
    packs: list[Pack] = []
    if written > 1:
        packs, start = _read_table(packed, start, count)
        _check_places(columns, packs, packed[: 16 * count])
    codecs, notes, names = _read_texts(packed[start:], count)
    _check_below(columns[3], len(codecs), "codecs")
    _check_below(columns[4], len(notes), "notes on pickle")
    keys = _Rows(count, partial(_key, packed))
    return Body(names, keys, _Blobs(count, columns, codecs, notes, packs))


def _read_table(packed: memoryview, start: int, count: int) -> tuple[list[Pack], int]:
    """The packs, and where their table ends."""
    if packed.nbytes - start < _COUNT.size:
        raise ValueError("it ends before its packs")
    (length,) = _COUNT.unpack_from(packed, start)
    start += _COUNT.size
    if not 0 < length <= count or length * _PACK.size > packed.nbytes - start:
        raise ValueError(f"it has a table of {length} packs for {count} names")
    end = start + length * _PACK.size
    rows = _PACK.iter_unpack(packed[start:end])
    return [Pack(UUID(bytes=key), nbytes, digest) for key, nbytes, digest in rows], end


def _check_places(columns: Sequence[_Column], packs: Sequence[Pack], keys: Buffer) -> None:
    """Hold the columns of places in packs against the packs, and against the ``keys`` of the contents."""
    if len(columns) == len(_COLUMNS):
        return
    lies_in, offsets = columns[len(_COLUMNS) :]
    lengths = [pack.nbytes for pack in packs]
    _check_below(lies_in, len(lengths) + 1, "packs")
    _check_below(offsets, MOST + 1, "offsets")
    if any(length > MOST for length in lengths):
        raise ValueError("a pack is longer than a file can be")
    if len({pack.key for pack in packs}) != len(packs):
        raise ValueError("two of its packs have one key")
    if np.unique(lies_in[lies_in > 0]).size != len(lengths):
        raise ValueError("one of its packs holds nothing")
    if (offsets[lies_in == 0] != 0).any():
        raise ValueError("a blob with a file of its own has an offset")
    # Neither is 2**63, so that their sum stays within 64 bits.
    ends = np.array([MOST, *lengths], np.uint64)[lies_in]
    if (offsets + columns[1] > ends).any():
        raise ValueError("a record is to end beyond its pack")
    _check_apart(lies_in, offsets, columns[1], np.ndarray((offsets.size,), "S16", keys))


def _check_apart(lies_in: _Column, offsets: _Column, lengths: _Column, contents: _Column) -> None:
    """Check that no two records overlap: what is restored takes no more room than what is there."""
    rows = np.flatnonzero(lies_in)
    rows = rows[np.lexsort((offsets[rows], lies_in[rows]))]
    before, after = rows[:-1], rows[1:]
    overlap = (lies_in[before] == lies_in[after]) & (offsets[before] + lengths[before] > offsets[after])
    one = (contents[before] == contents[after]) & (offsets[before] == offsets[after])  # of several names
    one &= lengths[before] == lengths[after]
    if (overlap & ~one).any():
        raise ValueError("two records in a pack overlap")


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


class _Blobs(_Rows[Blob]):
    """The columns of blobs; each blob is made when it is asked for."""

    __slots__ = ("_codecs", "_columns", "_notes", "packs")

    def __init__(
        self,
        count: int,
        columns: list[_Column],
        codecs: list[str],
        notes: list[str | None],
        packs: list[Pack],
    ) -> None:
        super().__init__(count, self._blob)
        self._columns = columns
        self._codecs = codecs
        self._notes = notes
        self.packs = packs

    def apart(self) -> Iterable[int]:
        """Return the rows of blobs that have files of their own."""
        if not self.packs:
            return range(len(self))
        rows: list[int] = np.flatnonzero(self._columns[5] == 0).tolist()
        return rows

    def __iter__(self) -> Iterator[Blob]:
        codecs, notes, packs = self._codecs, self._notes, (None, *self.packs)
        for at in range(0, len(self), _AT_ONCE):
            part = [column[at : at + _AT_ONCE].tolist() for column in self._columns]
            places = part[5:] or (repeat(0), repeat(0))
            for nbytes, disk_bytes, digest, codec, note, pack, offset in zip(*part[:5], *places):  # noqa: B905
                yield Blob(nbytes, disk_bytes, codecs[codec], notes[note], digest, packs[pack], offset)

    def _blob(self, row: int) -> Blob:
        nbytes, disk_bytes, digest, codec, note, *place = (column.item(row) for column in self._columns)
        codec, note = self._codecs[codec], self._notes[note]
        if not place or not place[0]:
            return Blob(nbytes, disk_bytes, codec, note, digest)
        return Blob(nbytes, disk_bytes, codec, note, digest, self.packs[place[0] - 1], place[1])
