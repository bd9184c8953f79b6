"""The memory behind arrays, as bytes, without copies.

Guarantee: an array made from a read-only buffer is read-only for good: its base is a read-only
view, so that numpy refuses to set its ``writeable`` flag, even where the memory below could be
written.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class _Alias:
    """A stretch of memory, told to numpy; keeps alive what the memory belongs to."""

    __slots__ = ("__array_interface__", "owners")

    def __init__(self, start: int, nbytes: int, owners: Any, readonly: bool) -> None:
        self.owners = owners
        self.__array_interface__ = {
            "version": 3,
            "data": (start, readonly),
            "shape": (nbytes,),
            "typestr": "|u1",
        }


def alias(start: int, nbytes: int, owners: Any, *, readonly: bool = True) -> memoryview:
    """Return the memory from address ``start`` on as bytes.

    Parameters
    ----------
    owners : object
        What keeps that memory allocated.
    readonly : bool
        Whether the view refuses to be written through.
    """
    return np.asarray(_Alias(start, nbytes, owners, readonly)).data


def address(array: Array) -> int:
    """Return where the array's first element is."""
    start: int = array.__array_interface__["data"][0]
    return start


def is_dense(array: Array) -> bool:
    """Whether the elements fill the array's memory in C or Fortran order."""
    flags = array.flags
    return flags.c_contiguous or flags.f_contiguous


def bounds(array: Array) -> tuple[int, int]:
    """Return the addresses of the first byte of the array's elements and of that after their last."""
    start = address(array)
    if array.size == 0:
        return start, start
    if is_dense(array):
        return start, start + array.nbytes
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    first = start + sum(r for r in reach if r < 0)
    return first, start + sum(r for r in reach if r > 0) + array.itemsize


def raw(array: Array) -> memoryview:
    """Return the bytes of a dense array of at least one byte, in the order of its memory."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
    return flat.view(np.uint8).data


def root(buffer: memoryview) -> Array:
    """Return the buffer as an array of bytes, from which others can be made.

    The result is writeable exactly if the buffer is.
    """
    if buffer.readonly:
        return np.frombuffer(buffer, np.uint8)
    # This constructor makes the array that the buffer is a view of, where it is one, the base;
    # so the memory has an owner whose flag can be switched.
    return np.ndarray((buffer.nbytes,), np.uint8, buffer)
