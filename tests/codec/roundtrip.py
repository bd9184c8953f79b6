"""One way through the codec and back, and what counts as the same."""

from __future__ import annotations

import struct
from decimal import Decimal
from typing import Any

import numpy as np

from fbcache.codec import Frames, MsgpackCodec

CODEC = MsgpackCodec()
HAS_STRINGS = hasattr(np.dtypes, "StringDType")  # since numpy 2


def texts_of_any_length(items: list[str], **options: Any) -> Any:
    """An array of numpy's texts of any length; of objects where there are none."""
    return np.array(items, np.dtypes.StringDType(**options) if HAS_STRINGS else object)


def through(value: Any, *, writable: bool = False, allow_pickle: bool = False) -> Any:
    """Encode, take the buffers to memory of their own as a store does, and decode."""
    frames = CODEC.encode(value, allow_pickle=allow_pickle)
    kept = [memoryview(np.array(memoryview(buffer))) for buffer in frames.buffers]
    buffers = kept if writable else [buffer.toreadonly() for buffer in kept]
    frames = Frames(frames.codec, frames.tree, buffers, frames.pickled)
    return CODEC.decode(frames, writable=writable, allow_pickle=allow_pickle)


def same(left: Any, right: Any) -> bool:
    """Equal, of one type all the way down, and NaN equal to itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return same_array(left, right)
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (set, frozenset)):
        return len(left) == len(right) and all(any(same(a, b) for b in right) for a in left)
    if isinstance(left, (Decimal, complex, np.generic)):
        return repr(left) == repr(right) and getattr(left, "dtype", None) == getattr(right, "dtype", None)
    return bool(left == right)


def same_array(left: Any, right: Any) -> bool:
    if (left.dtype, left.dtype.char, left.shape) != (right.dtype, right.dtype.char, right.shape):
        return False
    if left.dtype.hasobject:
        return same(left.ravel().tolist(), right.ravel().tolist())
    return left.tobytes() == right.tobytes()
