"""What compressing blobs costs and saves: writing values of several sorts out, and loading them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fbcache import FBPool
from fbcache.codec import Compressed, MsgpackCodec

Benchmark = Any
NBYTES = 32 << 20
ROUNDS = 5

CODECS: dict[str, Callable[[], Any]] = {
    "fbcache, raw": MsgpackCodec,
    "zstd": Compressed,
    "lz4": lambda: Compressed("lz4"),
}


def smooth() -> Any:
    return np.cumsum(np.random.default_rng(0).normal(size=NBYTES // 8))


def measured() -> Any:
    """As from an instrument: two digits behind the point."""
    wave = np.sin(np.arange(NBYTES // 4) / 500) * 100
    return np.round(wave + np.random.default_rng(0).normal(size=NBYTES // 4), 2).astype(np.float32)


def integers() -> Any:
    return np.random.default_rng(0).integers(0, 1000, NBYTES // 8)


def times() -> Any:
    return np.sort(np.random.default_rng(0).integers(0, 1 << 40, NBYTES // 8))


def texts() -> Any:
    return [f"customer {number * 7919 % 10007} ordered {number % 13} of them" for number in range(500_000)]


def noise() -> Any:
    return np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8)


VALUES = {make.__name__: make for make in (smooth, measured, integers, times, texts, noise)}


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("who", CODECS)
class TestCompression:
    @pytest.mark.benchmark(group="compression, writing")
    def test_writing(self, who: str, what: str, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        pool = pools(1 << 30, codec=CODECS[who]())
        value = VALUES[what]()

        def setup() -> None:
            pool.put("x", value, nbytes=NBYTES)

        benchmark.pedantic(pool.evict, setup=setup, rounds=ROUNDS, warmup_rounds=1)
        benchmark.extra_info["MiB on disk"] = pool.stats().disk_bytes / (1 << 20)

    @pytest.mark.benchmark(group="compression, loading")
    def test_loading(self, who: str, what: str, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
        pool = pools(1 << 30, codec=CODECS[who]())
        pool.put("x", VALUES[what](), nbytes=NBYTES)

        def load() -> None:
            with pool.get("x"):
                pass

        benchmark.pedantic(load, setup=lambda: pool.evict() and None, rounds=ROUNDS, warmup_rounds=1)
