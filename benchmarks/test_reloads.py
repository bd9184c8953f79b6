"""Reading a value back that was evicted, from the page cache: the first touch, and the sum of all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import zict_buffer
from fbcache import FBPool

Benchmark = Any
SIZES = {"64 KiB": 64 << 10, "8 MiB": 8 << 20, "256 MiB": 256 << 20}
ROUNDS = {"64 KiB": 200, "8 MiB": 100, "256 MiB": 10}


def touch(array: Any) -> float:
    return float(array[0])


def add_up(array: Any) -> float:
    return float(array.sum())


USES = {"first touch": touch, "sum": add_up}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="reload")
class TestReload:
    def test_fbcache(self, size: str, use: str, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        pool = pools(1 << 30)
        pool.put("x", np.ones(SIZES[size] // 8))
        act = USES[use]

        def run() -> float:
            with pool.get("x") as x:
                return act(x)

        def setup() -> None:
            pool.evict()

        benchmark.pedantic(run, setup=setup, rounds=ROUNDS[size], warmup_rounds=1)

    def test_zict_buffer(self, size: str, use: str, benchmark: Benchmark, tmp_path: Path) -> None:
        buffer: Any = zict_buffer(tmp_path, 1 << 30)
        buffer["x"] = np.ones(SIZES[size] // 8)
        act = USES[use]

        def setup() -> None:
            buffer.fast.evict()

        benchmark.pedantic(lambda: act(buffer["x"]), setup=setup, rounds=ROUNDS[size], warmup_rounds=1)

    def test_numpy_load_mapped(self, size: str, use: str, benchmark: Benchmark, tmp_path: Path) -> None:
        path = tmp_path / "x.npy"
        np.save(path, np.ones(SIZES[size] // 8))
        act = USES[use]
        benchmark.pedantic(
            lambda: act(np.load(path, mmap_mode="r")), rounds=ROUNDS[size], warmup_rounds=1
        )

    def test_in_memory(self, size: str, use: str, benchmark: Benchmark) -> None:
        array = np.ones(SIZES[size] // 8)
        act = USES[use]
        benchmark.pedantic(lambda: act(array), rounds=ROUNDS[size], warmup_rounds=1)
