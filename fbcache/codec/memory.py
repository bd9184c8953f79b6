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

    __slots__ = ("__array_interface__", "owners", "sealed")

    def __init__(
        self, start: int, nbytes: int, owners: Any, readonly: bool, *, sealed: bool = False
    ) -> None:
        self.owners = owners
        self.sealed = sealed
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


def sealed(array: Array, owners: Any) -> Array:
    """Return a view of an array of plain bytes that is read-only for good and keeps ``owners`` alive.

    That nobody writes to the memory by another way is what ``owners`` has to see to.
    """
    start, end = bounds(array)
    if start == end:
        empty = array.copy()
        empty.setflags(write=False)
        return empty
    memory = np.asarray(_Alias(start, end - start, owners, True, sealed=True))
    return np.ndarray(array.shape, array.dtype, memory.data, address(array) - start, array.strides)


def is_sealed(array: Array) -> bool:
    """Whether the array is one of :func:`sealed`'s, or a view of one."""
    return sealed_for(array) is not None


def sealed_for(array: Array) -> Any:
    """Return what an array of :func:`sealed`'s, or a view of one, keeps alive; None for any other."""
    base: Any = array
    while True:
        if isinstance(base, np.ndarray):
            base = base.base
        elif isinstance(base, memoryview):
            base = base.obj
        else:
            return base.owners if type(base) is _Alias and base.sealed else None


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
