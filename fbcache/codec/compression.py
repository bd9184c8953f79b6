"""The ways to compress one piece of memory, and the libraries that do it.

Guarantees: a piece comes back whole, or :class:`Damaged` is raised; expanding takes no more memory than the
piece is said to be long. Both happen without the interpreter's lock. Libraries are imported when a method
is made.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, Protocol

from fbcache.codec.memory import Array
from fbcache.errors import MissingLibraryError


class Damaged(ValueError):  # noqa: N818
    """What was to be expanded is no piece of that method and length."""


class Method(Protocol):
    """A way to compress.

    Attributes
    ----------
    name : str
        What blobs call it; also the name of fbcache's extra.
    most : int
        No byte of its output stands for more than so many.
    """

    name: str
    most: int

    def compress(self, piece: Array) -> bytes:
        """Return the piece compressed."""
        ...

    def sample(self, piece: Array) -> int:
        """Return, fast, how long about the piece will be when it is compressed."""
        ...

    def expand(self, data: Any, nbytes: int) -> bytes:
        """Return the piece of ``nbytes`` bytes again, or raise :class:`Damaged`."""
        ...


class Zstd:
    """Zstandard, by the library zstandard. Of its levels, 1 is about as fast as a disk."""

    name = "zstd"
    most = 1 << 15  # a block of 128 KiB that repeats one byte takes four

    __slots__ = ("_level", "_zstd")

    def __init__(self, level: int | None) -> None:
        self._zstd = _library("zstandard", self.name)
        self._level = _check_level(level, 1, -50, self._zstd.MAX_COMPRESSION_LEVEL)

    def compress(self, piece: Array) -> bytes:
        """Return the piece compressed; its frame tells its length."""
        data = self._zstd.ZstdCompressor(level=self._level).compress(piece.data)
        return bytes(memoryview(data))  # the library's own object keeps the room that it might have needed

    def sample(self, piece: Array) -> int:
        """Return how long the piece is when it is compressed at a fast level."""
        return len(self._zstd.ZstdCompressor(level=min(self._level, 1)).compress(piece.data))

    def expand(self, data: Any, nbytes: int) -> bytes:
        """Return the piece again."""
        try:
            # The library makes room for what the frame says, so that has to be true first.
            if self._zstd.frame_content_size(data) != nbytes:
                raise Damaged("a compressed piece is of another length")
            piece: bytes = self._zstd.ZstdDecompressor().decompress(data)
        except self._zstd.ZstdError as error:
            raise Damaged(f"a piece cannot be expanded: {error}") from error
        return piece


class Lz4:
    """LZ4, by the library lz4: blocks without a header."""

    name = "lz4"
    most = 255

    __slots__ = ("_block", "_options")

    def __init__(self, level: int | None) -> None:
        self._block = _library("lz4.block", self.name)
        self._options: dict[str, Any] = {"store_size": False}
        if level is not None:
            self._options |= {
                "mode": "high_compression",
                "compression": _check_level(level, 9, 1, 12),
            }

    def compress(self, piece: Array) -> bytes:
        """Return the piece compressed."""
        data: bytes = self._block.compress(piece.data, **self._options)
        return data

    def sample(self, piece: Array) -> int:
        """Return how long the piece is when it is compressed at the fast level."""
        return len(self._block.compress(piece.data, store_size=False))

    def expand(self, data: Any, nbytes: int) -> bytes:
        """Return the piece again."""
        try:
            piece: bytes = self._block.decompress(data, uncompressed_size=nbytes)
        except (self._block.LZ4BlockError, ValueError, OverflowError) as error:
            raise Damaged(f"a piece cannot be expanded: {error}") from error
        if len(piece) != nbytes:
            raise Damaged("a compressed piece is of another length")
        return piece


#: By the name in blobs. Each takes a level.
METHODS: Final[dict[str, Callable[[int | None], Method]]] = {"zstd": Zstd, "lz4": Lz4}


def _library(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        reason = f"compression by {extra} takes a library that cannot be imported ({error})"
        raise MissingLibraryError(f"{reason}: pip install 'fbcache[{extra}]'") from error


def _check_level(level: int | None, default: int, least: int, most: int) -> int:
    if level is None:
        return default
    if type(level) is not int or not least <= level <= most:
        raise ValueError(f"a level is an integer from {least} to {most}, not {level!r}")
    return level
