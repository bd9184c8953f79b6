"""The stores that a pool is given by name, in a directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fbcache.store.auto import AutoStore
from fbcache.store.diskcached import DiskcacheStore
from fbcache.store.files import FileStore
from fbcache.store.packed import PackedStore
from fbcache.store.protocol import BlobStore, StoreLimits


def _packed(directory: str, *, limits: StoreLimits, mmap: bool) -> BlobStore:
    return PackedStore(directory, limits=limits)


#: Each takes a directory, ``limits`` and ``mmap``.
STORES: Final[dict[str, Callable[..., Any]]] = {
    "auto": AutoStore,
    "files": FileStore,
    "packed": _packed,
    "diskcache": DiskcacheStore,
}
