"""Putting more than fits: the time of one put, the rate of all, and what it takes in memory.

Each round makes the data too, as a program would. "put" ends with the last put, "put and flush"
when everything that does not fit is on disk. Peers write in the call, so for them the two are one.
"""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.conftest import zict_buffer
from fbcache import FBPool

Benchmark = Any
ROUNDS = 3

SHAPES = {
    "256 x 8 MiB into 512 MiB": (256, 8 << 20, 512 << 20),
    "4,096 x 64 KiB into 64 MiB": (4096, 64 << 10, 64 << 20),
}


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Sample the process's memory; the call gives the most it grew by, in bytes."""
    process = psutil.Process()
    start = most = process.memory_info().rss
    stop = threading.Event()

    def sample() -> None:
        nonlocal most
        while not stop.wait(0.005):
            # Mapped files are the page cache's; what is the process's own is counted.
            info = process.memory_info()
            most = max(most, info.rss - info.shared)

    thread = threading.Thread(target=sample)
    start -= process.memory_info().shared
    thread.start()
    yield lambda: most - start
    stop.set()
    thread.join()


def put_all(put: Callable[[str, Any], Any], count: int, nbytes: int) -> list[float]:
    times = []
    for i in range(count):
        value = np.full(nbytes // 8, float(i))
        start = time.perf_counter()
        put(f"value-{i}", value)
        times.append(time.perf_counter() - start)
        del value
    return times


def report(benchmark: Benchmark, times: list[float], total: int, peak: int, budget: int) -> None:
    cuts = statistics.quantiles(times, n=100)
    benchmark.extra_info.update(
        {
            "GB/s": total / benchmark.stats.stats.median / 1e9,
            "one put, p50 us": cuts[49] * 1e6,
            "one put, p99 us": cuts[98] * 1e6,
            "peak over budget, MiB": (peak - budget) / (1 << 20),
        }
    )


@pytest.mark.parametrize("shape", SHAPES)
class TestPut:
    @pytest.mark.benchmark(group="put")
    def test_fbcache(self, shape: str, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        self._run(shape, benchmark, pools, flush=False)

    @pytest.mark.benchmark(group="put and flush")
    def test_fbcache_flushed(self, shape: str, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        self._run(shape, benchmark, pools, flush=True)

    def _run(self, shape: str, benchmark: Benchmark, pools: Callable[..., FBPool], *, flush: bool) -> None:
        count, nbytes, budget = SHAPES[shape]
        times: list[float] = []
        live: list[FBPool] = []

        def setup() -> None:
            while live:
                live.pop().close()
            live.append(pools(budget))

        def run() -> None:
            times[:] = put_all(live[0].put, count, nbytes)
            if flush:
                live[0].drain()

        with peak_memory() as peak:
            benchmark.pedantic(run, setup=setup, rounds=ROUNDS)
            most = peak()
        stats = live[0].stats()
        benchmark.extra_info["stalls"] = stats.stalls
        report(benchmark, times, count * nbytes, most, budget)

    @pytest.mark.benchmark(group="put and flush")
    def test_zict_buffer(self, shape: str, benchmark: Benchmark, tmp_path: Path) -> None:
        count, nbytes, budget = SHAPES[shape]
        times: list[float] = []
        live: list[MutableMapping[Any, Any]] = []

        def setup() -> None:
            if live:
                live.pop()
                shutil.rmtree(tmp_path / "zict")
            live.append(zict_buffer(tmp_path / "zict", budget))

        def run() -> None:
            times[:] = put_all(live[0].__setitem__, count, nbytes)

        with peak_memory() as peak:
            benchmark.pedantic(run, setup=setup, rounds=ROUNDS)
            most = peak()
        report(benchmark, times, count * nbytes, most, budget)

    @pytest.mark.benchmark(group="put and flush")
    def test_numpy_save(self, shape: str, benchmark: Benchmark, tmp_path: Path) -> None:
        """Every array saved with ``np.save``: the plain way, keeping nothing in memory."""
        count, nbytes, _ = SHAPES[shape]
        directory = tmp_path / "npy"
        times: list[float] = []

        def setup() -> None:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()

        def run() -> None:
            times[:] = put_all(lambda name, value: np.save(directory / f"{name}.npy", value), count, nbytes)

        benchmark.pedantic(run, setup=setup, rounds=ROUNDS)
        report(benchmark, times, count * nbytes, 0, 0)


@pytest.mark.benchmark(group="evict 64 x 8 MiB")
class TestEvict:
    def test_fbcache(self, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        live: list[FBPool] = []

        def setup() -> None:
            while live:
                live.pop().close()
            live.append(pools(2 << 30))
            put_all(live[0].put, 64, 8 << 20)

        benchmark.pedantic(lambda: live[0].evict(), setup=setup, rounds=5)
        benchmark.extra_info["GB/s"] = (64 * 8 << 20) / benchmark.stats.stats.median / 1e9

    def test_zict_buffer(self, benchmark: Benchmark, tmp_path: Path) -> None:
        live: list[Any] = []

        def setup() -> None:
            if live:
                live.pop()
                shutil.rmtree(tmp_path / "zict")
            live.append(zict_buffer(tmp_path / "zict", 2 << 30))
            put_all(live[0].__setitem__, 64, 8 << 20)

        def run() -> None:
            while live[0].fast:
                live[0].fast.evict()

        benchmark.pedantic(run, setup=setup, rounds=5)
        benchmark.extra_info["GB/s"] = (64 * 8 << 20) / benchmark.stats.stats.median / 1e9
