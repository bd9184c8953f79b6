"""The layout of a blob: one file, made of frames.

Guarantees: :func:`pack` copies no buffer; :func:`unpack_header` takes any bytes at all and either
returns a header that fits the file exactly or raises :class:`CorruptBlobError`, and allocates no
more than the header's own length on the way.

All integers are little-endian.

========== ======== =======================================================================
offset     bytes    content
========== ======== =======================================================================
0          6        magic, ``89 46 42 43 0d 0a`` (``\\x89FBC\\r\\n``)
6          2        version of the layout, 1
8          8        length of the header, H
16         8        xxh3_64 of bytes 0 to 16 followed by the header
24         H        header: a msgpack array of key (16 bytes), codec (str), tree (bytes),
                    pickled (str or nil), spans (bytes: for each buffer its offset, length and
                    xxh3_64, 8 bytes each)
24 + H              zeros up to the first buffer
offset 0   length 0 buffer 0, then zeros up to the next buffer, and so on
========== ======== =======================================================================

A buffer starts at the next multiple of 64 after what stands before it, or of 4096 if it is at
least a page long. The file ends with its last buffer (or with the header if there is none), so
its exact length follows from the header. Spans have a fixed width, so that the header's length
is known before the offsets are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import msgpack  # type: ignore[import-untyped]
from xxhash import xxh3_64, xxh3_64_intdigest

from fbcache.codec.frames import Buffer, Frames
from fbcache.errors import CorruptBlobError

MAGIC: Final = b"\x89FBC\r\n"  # not text, and damaged by any transfer that takes it for text
VERSION: Final = 1
ALIGNMENT: Final = 64  # a cache line, and the widest vector register
PAGE: Final = 4096  # the smallest page of any machine in use; fixed, for files travel

_PREFIX: Final = struct.Struct("<6sHQQ")
_SPAN: Final = struct.Struct("<QQQ")
_SUMMED: Final = 16  # bytes of the prefix that the header's checksum covers
_FIELDS: Final = 5

PREFIX_SIZE: Final = _PREFIX.size


@dataclass(frozen=True, slots=True)
class Span:
    """Where one buffer lies in the file, in bytes, and its xxh3_64."""

    offset: int
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A blob ready to be written.

    Attributes
    ----------
    pieces : list of memoryview
        What to write, in order; the buffers are the frames' own memory.
    nbytes : int
        Length of the whole file.
    """

    pieces: list[memoryview]
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """What a blob's header says, after it was checked against the file.

    Attributes
    ----------
    key : UUID
        The blob's own key.
    codec, tree, pickled
        As in :class:`~fbcache.codec.frames.Frames`.
    spans : list of Span
        The buffers, in order.
    start : int
        Length of prefix and header.
    nbytes : int
        Length of the whole file.
    digest : int
        The header's checksum, which covers those of the buffers: it tells this blob from all others.
    """

    key: UUID
    codec: str
    tree: bytes
    pickled: str | None
    spans: list[Span]
    start: int
    nbytes: int
    digest: int

    @property
    def gaps(self) -> Iterator[tuple[int, int]]:
        """Offset and length of each run of padding."""
        end = self.start
        for span in self.spans:
            if span.offset > end:
                yield end, span.offset - end
            end = span.offset + span.length


# ---------------------------------------------------------------------------------- writing


def pack(key: UUID, frames: Frames) -> Plan:
    """Lay ``frames`` out as the blob of ``key``.

    Raises
    ------
    TypeError
        A buffer of the frames is not contiguous memory.
    """
    buffers = [_as_bytes(buffer) for buffer in frames.buffers]
    head_size = PREFIX_SIZE + len(_pack_header(key, frames, bytes(_SPAN.size * len(buffers))))
    spans = _lay_out(buffers, head_size)
    header = _pack_header(key, frames, b"".join(_SPAN.pack(s.offset, s.length, s.checksum) for s in spans))
    head = _prefix(header) + header
    return Plan(_pieces(head, buffers, spans), _end(head_size, spans))


def _as_bytes(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if view.ndim == 1 and view.format == "B" and view.contiguous:
        return view
    try:
        return view.cast("B")
    except TypeError as error:
        raise TypeError(f"a codec's buffers must be C-contiguous: {error}") from error


def _pack_header(key: UUID, frames: Frames, spans: bytes) -> bytes:
    packed: bytes = msgpack.packb((key.bytes, frames.codec, bytes(frames.tree), frames.pickled, spans))
    return packed


def _prefix(header: bytes) -> bytes:
    summed = _PREFIX.pack(MAGIC, VERSION, len(header), 0)[:_SUMMED]
    return summed + _checksum(summed, header).to_bytes(8, "little")


def _checksum(summed: Buffer, header: Buffer) -> int:
    state = xxh3_64(summed)
    state.update(header)
    return state.intdigest()


def _lay_out(buffers: list[memoryview], end: int) -> list[Span]:
    spans = []
    for buffer in buffers:
        offset = _aligned(end, buffer.nbytes)
        spans.append(Span(offset, buffer.nbytes, xxh3_64_intdigest(buffer)))
        end = offset + buffer.nbytes
    return spans


def _aligned(end: int, length: int) -> int:
    unit = PAGE if length >= PAGE else ALIGNMENT
    return -(-end // unit) * unit


def _end(start: int, spans: list[Span]) -> int:
    return spans[-1].offset + spans[-1].length if spans else start


def _pieces(head: bytes, buffers: list[memoryview], spans: list[Span]) -> list[memoryview]:
    pieces = [memoryview(head)]
    zeros = memoryview(bytes(PAGE))
    end = len(head)
    for buffer, span in zip(buffers, spans, strict=True):
        if span.offset > end:
            pieces.append(zeros[: span.offset - end])
        if span.length:
            pieces.append(buffer)
        end = span.offset + span.length
    return pieces


# ---------------------------------------------------------------------------------- reading


def read_prefix(raw: Buffer, *, key: UUID | None = None, path: str = "") -> int:
    """Return how many bytes at the start of the file are prefix and header.

    The number is unchecked: hold it against the file's length before allocating that much.

    Parameters
    ----------
    raw : Buffer
        At least the first ``PREFIX_SIZE`` bytes of the file, where it has as many.

    Raises
    ------
    CorruptBlobError
        This is no blob, or one of a version not known here.
    """
    return _check_prefix(raw, key, path)[0]


def _check_prefix(raw: Buffer, key: UUID | None, path: str) -> tuple[int, int]:
    """Length of prefix and header, and the header's checksum."""
    if memoryview(raw).nbytes < PREFIX_SIZE:
        raise CorruptBlobError("too short to be a blob", key=key, path=path)
    magic, version, length, checksum = _PREFIX.unpack_from(raw)
    if magic != MAGIC:
        raise CorruptBlobError("it does not start as a blob does", key=key, path=path)
    if version != VERSION:
        reason = f"layout version {version}, where this fbcache reads version {VERSION}"
        raise CorruptBlobError(reason, key=key, path=path)
    return PREFIX_SIZE + length, checksum


def unpack_header(raw: Buffer, *, key: UUID, file_size: int, path: str) -> BlobHeader:
    """Read a blob's header and hold it against its key and its file.

    Parameters
    ----------
    raw : Buffer
        The start of the file, prefix and header at least; may be the whole of it.
    key : UUID
        The key under which the file was found.
    file_size : int
        Length of the file in bytes.
    path : str
        The file, for messages.

    Raises
    ------
    CorruptBlobError
        Anything does not match: magic, version, lengths, checksum, fields, key, spans.
    """
    view = memoryview(raw).cast("B")
    start, checksum = _check_prefix(view, key, path)
    if start > min(file_size, view.nbytes):
        reason = f"its header should take {start} bytes, of which there are {min(file_size, view.nbytes)}"
        raise CorruptBlobError(reason, key=key, path=path)
    header = view[PREFIX_SIZE:start]
    if _checksum(view[:_SUMMED], header) != checksum:
        raise CorruptBlobError("its header does not match the header's checksum", key=key, path=path)
    try:
        return _checked(header, start, key, file_size, checksum)
    except ValueError as error:
        raise CorruptBlobError(str(error), key=key, path=path) from error


def _checked(header: memoryview, start: int, key: UUID, file_size: int, digest: int) -> BlobHeader:
    own_key, codec, tree, pickled, spans = _unpack_fields(header)
    if own_key != key.bytes:
        raise ValueError(f"it holds another key, {UUID(bytes=own_key)}")
    placed = _unpack_spans(spans, start)
    nbytes = _end(start, placed)
    if nbytes != file_size:
        raise ValueError(f"it has {file_size} bytes, where its header says {nbytes}")
    return BlobHeader(key, codec, tree, pickled, placed, start, nbytes, digest)


def _unpack_fields(header: memoryview) -> tuple[bytes, str, bytes, str | None, bytes]:
    # A right header has one array and no map: with these limits a lie allocates next to nothing.
    fields = msgpack.unpackb(header, max_array_len=_FIELDS, max_map_len=0, max_ext_len=0)
    if type(fields) is not list or len(fields) != _FIELDS:
        raise ValueError("its header is not the five fields that it should be")
    key, codec, tree, pickled, spans = fields
    if type(key) is not bytes or len(key) != 16:
        raise ValueError("its header's key is no key")
    if type(codec) is not str or type(tree) is not bytes or type(spans) is not bytes:
        raise ValueError("its header's fields have other types than they should")
    if pickled is not None and type(pickled) is not str:
        raise ValueError("its header's note on pickle is no text")
    return key, codec, tree, pickled, spans


def _unpack_spans(packed: bytes, end: int) -> list[Span]:
    if len(packed) % _SPAN.size:
        raise ValueError("its header's list of buffers ends within a buffer")
    spans = []
    for number, (offset, length, checksum) in enumerate(_SPAN.iter_unpack(packed)):
        # The one right offset, rather than any that would do: no overlap, no gap, no disorder.
        if offset != _aligned(end, length):
            raise ValueError(f"buffer {number} is not where it should be in the file")
        spans.append(Span(offset, length, checksum))
        end = offset + length
    return spans


def verify_buffer(buffer: Buffer, span: Span, key: UUID | None = None, path: str = "") -> None:
    """Hold a buffer against its checksum.

    Raises
    ------
    CorruptBlobError
        It is not what was written.
    """
    view = memoryview(buffer)
    if view.nbytes != span.length or xxh3_64_intdigest(view) != span.checksum:
        reason = f"the buffer at offset {span.offset} does not match its checksum"
        raise CorruptBlobError(reason, key=key, path=path)


def verify_padding(padding: Buffer, key: UUID | None = None, path: str = "") -> None:
    """Hold the bytes of one of :attr:`BlobHeader.gaps` against the zeros that were written.

    Raises
    ------
    CorruptBlobError
        They are not all zero.
    """
    if any(padding):
        raise CorruptBlobError("the padding between its buffers is not zero", key=key, path=path)
