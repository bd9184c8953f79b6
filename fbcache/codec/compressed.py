"""A codec around another one, that compresses the buffers which gain by it.

Guarantees
----------
- Values come back as the inner codec brings them back. What is compressed is expanded into fresh memory at
  every load; what is not stays raw, and is mapped.
- A buffer is compressed only if a sample of it says that this saves something, and it does. What cannot be
  compressed costs a sample, and no copy.
- Besides its output, encoding takes memory for one piece of a buffer, whatever the buffer's size.
- Frames are taken for hostile: what is expanded is never longer than the frames say, and they cannot say
  more than the method can make of as many bytes: 255 times as much with lz4, and 32,768 times with zstd.
  Memory is touched only as bytes come, so a lie about the length takes none.

Frames
------
The tree is a msgpack array: the inner codec's name; the method's; the length of a piece; the inner tree,
or nil if that is the first of the buffers; and for each buffer 9 bytes: its length, and the width of the
numbers that its bytes were sorted by (:mod:`~fbcache.codec.planes`), 0 if it is raw. A compressed buffer is
as many buffers of the frames as it has pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import numpy as np

from fbcache.codec import planes
from fbcache.codec.compression import METHODS, Damaged, Method
from fbcache.codec.frames import Buffer, Codec, Frames
from fbcache.codec.memory import Array
from fbcache.codec.msgpack_codec import MsgpackCodec
from fbcache.codec.tags import expect
from fbcache.errors import CorruptBlobError, MissingLibraryError, UnsupportedTypeError

_NAME: Final = "compressed"

#: Buffers and trees of less than a page stay as they are: blobs are kept in whole pages anyway.
_LEAST: Final = 4096

#: Compressed one by one. A megabyte is in the processor's cache when it is sorted and then compressed, and
#: more in one piece is hardly smaller.
_PIECE: Final = 1 << 20

#: So many chunks of so many bytes stand for a buffer.
_CHUNKS: Final = 4
_CHUNK: Final = 16 * 1024

#: Of how many bytes a buffer's numbers may be, for all that is known here.
_WIDTHS: Final = (1, 2, 4, 8)

#: Sorted bytes are compressed up to three times as fast, so a sample may be larger by that for it.
_ABOUT: Final = 1.03

_SPEC: Final = struct.Struct("<QB")
_DAMAGE: Final = (ValueError, TypeError, LookupError, struct.error, msgpack.UnpackException)


class Expanding:
    """Reads what :class:`Compressed` has written, by whatever method.

    Parameters
    ----------
    inner : Codec, optional
        What made the frames that were compressed. Default: :class:`~fbcache.codec.MsgpackCodec`.
    """

    name = _NAME

    def __init__(self, inner: Codec | None = None) -> None:
        self._inner: Codec = MsgpackCodec() if inner is None else inner

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        """Put the value together again.

        Raises
        ------
        CorruptBlobError
            The frames do not describe a value, or are not of the inner codec. No code from them has run.
        PickleRefusedError
            They hold a pickle and ``allow_pickle`` is false.
        UnsupportedTypeError
            The method's library is not here; or as by the inner codec.
        MemoryError
            There is no room for what they hold.
        """
        if frames.codec != _NAME:
            raise CorruptBlobError(f"it was made by another codec, {frames.codec!r}")
        try:
            expanded = self._expand(frames)
        except _DAMAGE as error:
            if isinstance(error, UnsupportedTypeError):
                raise
            raise CorruptBlobError(f"it cannot be expanded: {error!r}") from error
        return self._inner.decode(expanded, writable=writable, allow_pickle=allow_pickle)

    def _expand(self, frames: Frames) -> Frames:
        parts = msgpack.unpackb(frames.tree, max_array_len=5, max_map_len=0, max_ext_len=0)
        inner, name, piece, tree, specs = expect(parts, list)
        if expect(inner, str) != self._inner.name:
            raise CorruptBlobError(f"what was compressed is of another codec, {inner[:80]!r}")
        if expect(piece, int) < 1:
            raise ValueError(f"pieces of {piece} bytes")
        buffers = list(_expanded(frames, _method(expect(name, str)), piece, expect(specs, bytes)))
        if tree is None:
            tree = bytes(buffers.pop(0))
        return Frames(inner, expect(tree, bytes), buffers, frames.pickled)


class Compressed(Expanding):
    """A codec that compresses; any pool reads its blobs, if the method's library is installed.

    Blobs take less room on disk, and less time on a slow one. But what was compressed has to be expanded when
    it is loaded, which takes 0.4 to 1 ms a megabyte, where a raw buffer is mapped and takes none. It is then
    in the pool's own memory, not in the page cache that processes share. What does not become smaller
    (noise, photographs) stays raw, and is mapped.

    Parameters
    ----------
    method : str
        ``"zstd"``, or ``"lz4"``, which is faster and saves less.
    level : int, optional
        How hard to try: for zstd up to 22, by default 1; for lz4 1 to 12, by default none of them, but its
        fast way. Reading is not slower for it.
    min_ratio : float
        Buffers are compressed if that makes them so many times smaller.
    inner : Codec, optional
        What makes frames of values. Default: :class:`~fbcache.codec.MsgpackCodec`. Only with that can every
        pool read the blobs without being told.

    Raises
    ------
    MissingLibraryError
        The method's library is not installed; the message names fbcache's extra.
    ValueError
        There is no such method or level, or ``min_ratio`` is below 1.

    Examples
    --------
    >>> pool = FBPool("2GB", codec=Compressed("zstd"))  # doctest: +SKIP
    """

    def __init__(
        self,
        method: str = "zstd",
        *,
        level: int | None = None,
        min_ratio: float = 1.1,
        inner: Codec | None = None,
    ) -> None:
        super().__init__(inner)
        if method not in METHODS:
            raise ValueError(f"the methods are {', '.join(map(repr, METHODS))}, not {method!r}")
        if not min_ratio >= 1:
            raise ValueError(f"min_ratio is 1 or more, not {min_ratio!r}")
        self._method = METHODS[method](level)
        self._min_ratio = min_ratio

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        """Take ``value`` apart by the inner codec, and compress what gains by it.

        Raises
        ------
        UnsupportedTypeError, PickleRefusedError
            As by the inner codec.
        """
        frames = self._inner.encode(value, allow_pickle=allow_pickle)
        tree: bytes | None = frames.tree
        sources = [memoryview(buffer) for buffer in frames.buffers]
        buffers: list[Buffer] = []
        specs: list[bytes] = []
        if len(frames.tree) >= _LEAST and self._shrink(memoryview(frames.tree), buffers, specs):
            tree = None
        for source in sources:
            if source.nbytes < _LEAST or not self._shrink(source, buffers, specs):
                buffers.append(source)
                specs.append(_SPEC.pack(source.nbytes, 0))
        head = [frames.codec, self._method.name, _PIECE, tree, b"".join(specs)]
        return Frames(_NAME, msgpack.packb(head), buffers, frames.pickled)

    def _shrink(self, source: memoryview, buffers: list[Buffer], specs: list[bytes]) -> bool:
        """Compress a buffer onto the end of the lists, if that is worth it."""
        data = np.frombuffer(source, np.uint8)
        width, saving = self._promise(data)
        if not saving:
            return False
        room = data.nbytes / self._min_ratio
        pieces = []
        for piece in _pieces(data, _PIECE):
            pieces.append(self._method.compress(planes.split(piece, width)))
            room -= len(pieces[-1])
            if room < 0:
                return False
        buffers += pieces
        specs.append(_SPEC.pack(data.nbytes, width))
        return True

    def _promise(self, data: Array) -> tuple[int, bool]:
        """The width of numbers with which a sample becomes smallest, and whether that is small enough."""
        sample = data
        if data.nbytes > _CHUNKS * _CHUNK:
            step = (data.nbytes - _CHUNK) // (_CHUNKS - 1) // _CHUNK * _CHUNK  # a whole number of any width
            sample = np.concatenate([data[place * step :][:_CHUNK] for place in range(_CHUNKS)])
        sizes = {width: self._method.sample(planes.split(sample, width)) for width in _WIDTHS}
        least = min(sizes.values())
        width = max(width for width in _WIDTHS if sizes[width] <= _ABOUT * least)
        return width, sizes[width] * self._min_ratio <= sample.nbytes


def _pieces(data: Array, length: int) -> Iterator[Array]:
    return (data[start : start + length] for start in range(0, data.nbytes, length))


def _method(name: str) -> Method:
    if name not in METHODS:
        raise UnsupportedTypeError(f"it is compressed by {name[:40]!r}, of which this fbcache knows nothing")
    try:
        return METHODS[name](None)
    except MissingLibraryError as error:
        raise UnsupportedTypeError(f"it cannot be expanded: {error}") from error


def _expanded(frames: Frames, method: Method, piece: int, specs: bytes) -> Iterator[Buffer]:
    """Yield the buffers that the frames stand for."""
    sources = iter(frames.buffers)
    for nbytes, width in _SPEC.iter_unpack(specs):
        if width == 0:
            buffer = next(sources, None)
            if buffer is None or memoryview(buffer).nbytes != nbytes:
                raise ValueError("a raw buffer is missing, or of another length")
            yield buffer
        elif width not in _WIDTHS or not nbytes:
            raise ValueError(f"a buffer of {nbytes} bytes was sorted by {width}")
        else:
            yield _grown(sources, method, piece, nbytes, width)
    if next(sources, None) is not None:
        raise ValueError("there are more buffers than it tells of")


def _grown(sources: Iterator[Buffer], method: Method, piece: int, nbytes: int, width: int) -> memoryview:
    """Expand a buffer into fresh memory."""
    parts: list[Buffer] = []
    left = nbytes
    while left > 0:
        part = next(sources, None)
        if part is None or min(piece, left) > method.most * memoryview(part).nbytes:
            raise Damaged("a compressed buffer is longer than what it consists of can tell")
        parts.append(part)
        left -= piece
    out = np.empty(nbytes, np.uint8)
    for part, place in zip(parts, _pieces(out, piece), strict=True):
        expanded = np.frombuffer(method.expand(part, place.nbytes), np.uint8)
        planes.join(expanded, width, place)
    return out.data
