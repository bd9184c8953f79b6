"""What the tests of a codec have to be told, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import numpy as np

from fbcache.codec.frames import Codec, Frames
from fbcache.errors import UnsupportedTypeError
from fbcache.testing.material import same_values


class CodecKit(ABC):
    """What a kit for codecs has to be told; see :class:`~fbcache.testing.CodecTests`."""

    @abstractmethod
    def make_codec(self) -> Codec:
        """Return the codec."""

    @abstractmethod
    def values(self) -> list[Any]:
        """Return values that the codec carries without pickle, made anew and the same at each call."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether a value that came back is what went in.

        Default: of the same types all the way down and equal, as plain Python values and numpy arrays are.
        """
        return same_values(one, other)

    def raw_arrays(self) -> list[np.ndarray[Any, Any]]:
        """Return arrays whose memory the codec must not copy, neither way. Default: none."""
        return []

    def pickled_values(self) -> list[Any]:
        """Return values that take pickle, if anything can carry them."""
        return [partial(int, base=2), [1, {"a": partial(len)}]]


def moved(frames: Frames, *, writable: bool = False) -> Frames:
    """The same frames in memory of their own, as a store gives them."""
    buffers = [np.array(memoryview(buffer).cast("B")).data for buffer in frames.buffers]
    views = buffers if writable else [buffer.toreadonly() for buffer in buffers]
    return Frames(frames.codec, frames.tree, views, frames.pickled)


def encoded(codec: Codec, values: list[Any]) -> list[tuple[Any, Frames]]:
    """Each value that the codec can encode with pickle allowed, and its frames."""
    found = []
    for value in values:
        try:
            found.append((value, codec.encode(value, allow_pickle=True)))
        except UnsupportedTypeError:  # a codec need not know pickle
            pass
    return found
