"""Memory that is mapped read-only, and can be opened to writes that nobody else sees.

Some libraries have no read-only values: a write to one is a plain store, and on pages that are mapped
``PROT_READ`` that kills the process. For these, and for nothing else, the pages are made writeable.

Guarantees: in a map of :class:`Pages` a write changes a copy of the page that it meets, never the
file. Where the kernel does not agree, or the memory is somebody else's, :func:`opened` gives None, and its
caller copies. Python's own objects over the map stay read-only. No lock is taken: opening twice does no harm.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

from fbcache.codec.memory import Array, address, alias

_mprotect = getattr(ctypes.CDLL(None), "mprotect", None)
if _mprotect is not None:
    _mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Pages(mmap.mmap):
    """Pages that are mapped ``MAP_PRIVATE`` and ``PROT_READ``; who makes one sees to both."""

    __slots__ = ()

    def open(self) -> bool:
        """Let the pages be written to by address; False if the kernel refuses."""
        if _mprotect is None:
            return False
        start = address(np.frombuffer(self, np.uint8))
        refused: int = _mprotect(start, len(self), mmap.PROT_READ | mmap.PROT_WRITE)
        return not refused


def opened(memory: Array) -> memoryview | None:
    """Return the memory of an array of bytes, to be written to, if it lies in :class:`Pages`; else None.

    The array itself stays read-only.
    """
    base = memory.base
    pages: Any = base.obj if isinstance(base, memoryview) else base
    if type(pages) is not Pages or not pages.open():
        return None
    return alias(address(memory), memory.nbytes, memory, readonly=False)
