"""What the benchmarks share: warm memory, and the peers, set up as their documentation says."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zict

from fbcache import FBPool

GIB = 1 << 30


def touch_memory() -> None:
    """Touch memory: what lay free for a while is slower to get on virtual machines."""
    blocks = [np.ones(GIB // 8, np.uint8) for _ in range(40)]
    del blocks


@pytest.fixture(autouse=True)
def warm_memory() -> None:
    """Touch memory before each benchmark."""
    touch_memory()


def dump(value: Any) -> list[Any]:
    """Pickle protocol 5, with the arrays out of band: what SpillBuffer's users get, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    lengths = pickle.dumps([len(head), *(b.raw().nbytes for b in buffers)])
    return [len(lengths).to_bytes(8, "little"), lengths, head, *(b.raw() for b in buffers)]


def undump(data: Any) -> Any:
    """The inverse of :func:`dump`, over one buffer."""
    view = memoryview(data)
    end = 8 + int.from_bytes(view[:8], "little")
    parts = []
    for length in pickle.loads(view[8:end]):
        parts.append(view[end : end + length])
        end += length
    return pickle.loads(parts[0], buffers=parts[1:])


def zict_buffer(directory: Path, nbytes: int) -> MutableMapping[Any, Any]:
    """zict.Buffer: memory in front, files behind; the files memory-mapped on the way back."""
    slow: Any = zict.Func(dump, undump, zict.File(directory, memmap=True))
    return zict.Buffer({}, slow, n=nbytes, weight=lambda key, value: value.nbytes)


@pytest.fixture
def pools(tmp_path: Path) -> Iterator[Callable[..., FBPool]]:
    """``pools(memory)``: a pool, closed at the end."""
    made: list[FBPool] = []

    def make(memory: int, **options: Any) -> FBPool:
        pool = FBPool(memory, directory=tmp_path / "fbcache", min_free=0, **options)
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.close()


def fill(cache: MutableMapping[Any, Any], items: Mapping[Any, Any]) -> None:
    """Put all ``items``."""
    for key, value in items.items():
        cache[key] = value
