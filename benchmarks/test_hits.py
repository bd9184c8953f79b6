"""A value that is in memory: 1 KiB arrays, 1,000 of them, all resident, read in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cachebox
import cachetools
import numpy as np
import pytest

from benchmarks.conftest import fill, zict_buffer
from fbcache import FBPool

ITEMS = {f"key-{i}": np.zeros(128) for i in range(1000)}
Benchmark = Any


def items() -> dict[str, Any]:
    return {key: value.copy() for key, value in ITEMS.items()}


def read_all(benchmark: Benchmark, cache: Any) -> None:
    """Time one subscript of each item, whatever the cache."""

    def read() -> None:
        for key in ITEMS:
            cache[key]

    benchmark(read)


@pytest.mark.benchmark(group="guarded hit, 1,000 of them")
class TestGuardedHit:
    def test_fbcache_with_get(self, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        pool = pools(1 << 30)
        for key, value in items().items():
            pool.put(key, value)

        def read() -> None:
            get = pool.get
            for key in ITEMS:
                with get(key):
                    pass

        benchmark(read)

    def test_cachetools_and_a_lock(self, benchmark: Benchmark) -> None:
        cache: cachetools.LRUCache[str, Any] = cachetools.LRUCache(2000)
        fill(cache, items())
        lock = threading.Lock()

        def read() -> None:
            for key in ITEMS:
                with lock:
                    cache[key]

        benchmark(read)

    def test_zict_buffer(self, benchmark: Benchmark, tmp_path: Path) -> None:
        buffer = zict_buffer(tmp_path, 1 << 30)
        fill(buffer, items())
        read_all(benchmark, buffer)


@pytest.mark.benchmark(group="plain hit, 1,000 of them")
class TestPlainHit:
    def test_fbcache_subscript(self, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        pool = pools(1 << 30)
        for key, value in items().items():
            pool.put(key, value)
        read_all(benchmark, pool)

    def test_cachebox(self, benchmark: Benchmark) -> None:
        cache: Any = cachebox.LRUCache(2000)
        fill(cache, items())
        read_all(benchmark, cache)

    def test_zict_buffer(self, benchmark: Benchmark, tmp_path: Path) -> None:
        buffer = zict_buffer(tmp_path, 1 << 30)
        fill(buffer, items())
        read_all(benchmark, buffer)

    def test_dict(self, benchmark: Benchmark) -> None:
        cache = items()
        read_all(benchmark, cache)
