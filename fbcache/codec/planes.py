"""Bytes of numbers, sorted: all first bytes, then all second ones, and so on.

The bytes that numbers share stand together then, which is what compressors look for. numpy does it at the
speed of a copy, and without the interpreter's lock.
"""

from __future__ import annotations

import numpy as np

from fbcache.codec.memory import Array


def split(data: Array, width: int) -> Array:
    """Return the bytes of numbers of ``width`` bytes sorted; what is left over at the end stays there."""
    if width == 1:
        return data
    out = np.empty(data.nbytes, np.uint8)
    rows, planes = _rows(data, width), _planes(out, width)
    for place in range(width):
        planes[place] = rows[:, place]
    out[rows.size :] = data[rows.size :]
    return out


def join(data: Array, width: int, out: Array) -> None:
    """Write what :func:`split` was given to ``out``, which is as long as ``data``."""
    if width == 1:
        out[:] = data
        return
    rows, planes = _rows(out, width), _planes(data, width)
    for place in range(width):
        rows[:, place] = planes[place]
    out[rows.size :] = data[rows.size :]


def _rows(memory: Array, width: int) -> Array:
    return memory[: memory.nbytes // width * width].reshape(-1, width)


def _planes(memory: Array, width: int) -> Array:
    return memory[: memory.nbytes // width * width].reshape(width, -1)
