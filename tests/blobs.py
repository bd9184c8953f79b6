"""Blobs for tests: made, compared, and found on disk."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from fbcache.codec.frames import Frames
from fbcache.store.blobfile import MAP_LEAST
from fbcache.store.files import FileStore

SMALL = 1000
LARGE = 3 * MAP_LEAST

#: One way to read for each there is: small or large, mapped or read, writeable or read-only.
WAYS = [
    pytest.param(
        size, may_map, writable, id=f"{name}-{'map' if may_map else 'read'}-{'mut' if writable else 'ro'}"
    )
    for name, size in (("small", SMALL), ("large", LARGE))
    for may_map in (True, False)
    for writable in (True, False)
]


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def frames_of(*sizes: int, tree: bytes = b"the tree", pickled: str | None = None) -> Frames:
    return Frames("test", tree, [random_bytes(size, seed) for seed, size in enumerate(sizes)], pickled)


def same(one: Frames, other: Frames) -> bool:
    return (one.codec, one.tree, one.pickled) == (other.codec, other.tree, other.pickled) and [
        bytes(buffer) for buffer in one.buffers
    ] == [bytes(buffer) for buffer in other.buffers]


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def blob_path(store: FileStore, key: UUID) -> Path:
    return Path(store.path, key.hex[:2], key.hex)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
