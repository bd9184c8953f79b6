"""A small blob as one record: frames with a short head, in one piece.

Guarantees: :func:`parse` takes any bytes at all and gives the frames that :func:`join` was given, or raises
CorruptBlobError; it copies what it hands out, so that no frames keep a segment mapped.

====== ===== =====================================================================
offset bytes content
====== ===== =====================================================================
0      8     slot: the number under which the record is found
8      4     length of the body
12     4     length of the tree, or ``0xFFFFFFFF`` where the body is more than a tree
16     8     xxh3_64 of the body, seeded with the slot and both lengths
24           the body: a tree of the codec ``msgpack``; or the msgpack array of codec, tree,
             pickled, and a list of the buffers
====== ===== =====================================================================

Integers are little-endian. The head is a fifth of that of a file's layout (:mod:`fbcache.codec.layout`),
which is what a record saves besides the file itself.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Final

import msgpack  # type: ignore[import-untyped]
import numpy as np
from xxhash import xxh3_64_intdigest

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError

_HEAD: Final = struct.Struct("<QIIQ")
HEAD_SIZE: Final = _HEAD.size

_PLAIN: Final = "msgpack"
_WHOLE: Final = 0xFFFFFFFF  # in place of the tree's length
_LONGEST: Final = _WHOLE - 1

_pack_head = _HEAD.pack
_unpack_head = _HEAD.unpack_from


def body_of(frames: Frames) -> tuple[bytes, int]:
    """Return a record's body and its length of the tree.

    Raises
    ------
    ValueError
        The frames are larger than a record can be.
    """
    tree = frames.tree
    if not frames.buffers and frames.pickled is None and frames.codec == _PLAIN:
        body, length = tree, len(tree)
    else:
        buffers = [bytes(buffer) for buffer in frames.buffers]
        body, length = msgpack.packb((frames.codec, bytes(tree), frames.pickled, buffers)), _WHOLE
    if len(body) > _LONGEST:
        raise ValueError(f"{len(body):,} bytes are more than a record can hold")
    return body, length


def head_of(slot: int, body: bytes, length: int) -> bytes:
    """Return the head of the record of ``body``."""
    nbytes = len(body)
    return _pack_head(slot, nbytes, length, xxh3_64_intdigest(body, _seed(slot, nbytes, length)))


def length_of(memory: memoryview, offset: int) -> tuple[int, int]:
    """Return slot and length of the record at ``offset``, unchecked.

    Raises
    ------
    struct.error
        There is not even a head.
    """
    slot, nbytes, _, _ = _unpack_head(memory, offset)
    return slot, HEAD_SIZE + nbytes


def whole_length_of(memory: memoryview, offset: int, end: int, slot: int) -> int:
    """Return the length of the record of ``slot``, or 0 where :func:`parse` would find it damaged."""
    start = offset + HEAD_SIZE
    if start > end:
        return 0
    found, nbytes, length, checksum = _unpack_head(memory, offset)
    if found != slot or start + nbytes > end:
        return 0
    body = memory[start : start + nbytes]
    return HEAD_SIZE + nbytes if xxh3_64_intdigest(body, _seed(slot, nbytes, length)) == checksum else 0


def parse(memory: memoryview, offset: int, end: int, slot: int, *, writable: bool) -> Frames:
    """Return the frames of the record of ``slot`` at ``offset``.

    Parameters
    ----------
    end : int
        Where what has been written to the segment ends.
    writable : bool
        Whether the buffers are to be writeable.

    Raises
    ------
    CorruptBlobError
        There is no such record, or it is damaged.
    """
    start = offset + HEAD_SIZE
    if start > end:
        raise CorruptBlobError("its record is beyond the end of the segment")
    found, nbytes, length, checksum = _unpack_head(memory, offset)
    if found != slot or start + nbytes > end:
        raise CorruptBlobError("another record, or none, is in its place")
    body = bytes(memory[start : start + nbytes])
    if xxh3_64_intdigest(body, found ^ nbytes << 20 ^ length << 40) != checksum:  # `_seed`, written out
        raise CorruptBlobError("its record does not match the record's checksum")
    if length == nbytes:
        return Frames(_PLAIN, body, ())
    if length != _WHOLE:  # a seed has 64 bits, which leave out the highest of the length
        raise CorruptBlobError("its record does not match the record's checksum")
    try:
        return _whole(body, writable)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptBlobError(f"its record holds no frames: {error}") from error


def skim(memory: memoryview, offset: int, end: int) -> None:
    """Hold what the body of the record at ``offset`` says of lists against the body.

    To be called before :func:`parse` for a record that others may have made: msgpack allocates what a list's
    header says before it looks for items.

    Raises
    ------
    CorruptBlobError
        It has other lists than :func:`body_of` makes.
    """
    if _unpack_head(memory, offset)[2] != _WHOLE:
        return
    body = memory[offset + HEAD_SIZE : end]
    unpacker = msgpack.Unpacker(
        max_buffer_size=max(len(body), 1), max_array_len=0, max_map_len=0, max_ext_len=0
    )
    unpacker.feed(body)
    try:
        fields = unpacker.read_array_header()
        for _ in range(3):
            unpacker.unpack()
        count = unpacker.read_array_header()
        if fields != 4 or sum(1 for _ in islice(unpacker, count)) != count:
            raise ValueError("its lists have other lengths")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptBlobError(f"its record holds no frames: {error}") from error


def _seed(slot: int, nbytes: int, length: int) -> int:
    return slot ^ nbytes << 20 ^ length << 40


def _whole(body: bytes, writable: bool) -> Frames:
    codec, tree, pickled, buffers = msgpack.unpackb(body)
    if type(codec) is not str or type(tree) is not bytes or type(pickled) not in (str, type(None)):
        raise TypeError("a field of another type")
    if type(buffers) is not list or not all(type(buffer) is bytes for buffer in buffers):
        raise TypeError("a buffer of another type")
    return Frames(codec, tree, [_fresh(buffer) for buffer in buffers] if writable else buffers, pickled)


def _fresh(buffer: bytes) -> memoryview:
    memory = np.empty(len(buffer), np.uint8)
    memory[:] = np.frombuffer(buffer, np.uint8)
    return memory.data
