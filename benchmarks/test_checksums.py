"""Why blobs carry xxh3: candidates for the checksum of 8 MiB."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash

DATA = np.random.default_rng(0).bytes(8 << 20)

CANDIDATES: dict[str, Callable[[bytes], Any]] = {
    "xxh3_64": xxhash.xxh3_64_intdigest,
    "zlib.crc32": zlib.crc32,
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}


@pytest.mark.benchmark(group="checksum of 8 MiB")
@pytest.mark.parametrize("name", CANDIDATES)
def test_checksum(name: str, benchmark: Any) -> None:
    benchmark(CANDIDATES[name], DATA)
    benchmark.extra_info["GB/s"] = len(DATA) / benchmark.stats.stats.median / 1e9
