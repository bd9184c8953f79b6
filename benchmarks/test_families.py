"""Values of many libraries, out to files and back: fbcache against pickle, joblib and Arrow's own files.

"out" is from a value in memory to its files, which nobody fsyncs; for fbcache it is ``evict``. "first touch"
is until one number of it has been read again, "all of it" until all have: summed, or made into what can be.
All write to one directory, and what they read back comes from the page cache. Pickle with buffers out of band
is written by ``writev`` and read from a memory map; joblib maps where it can; Arrow's files are neither
compressed nor copied. "GB/s" counts the bytes that the value takes in memory.
"""

from __future__ import annotations

import mmap
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute
import pytest
import scipy.sparse
import xarray as xr
from PIL import Image

from benchmarks.conftest import dump, touch_memory, undump
from fbcache import FBPool
from fbcache.sizeof import sizeof

Benchmark = Any
Value = Any

ROUNDS = 3
MILLION = 1_000_000
_AT_ONCE = os.sysconf("SC_IOV_MAX")

# ------------------------------------------------------------------ the values


def numbers(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape)


def columns() -> dict[str, Any]:
    """Two of numbers, two of texts."""
    texts = [f"customer {i * 7919 % MILLION:>9}" for i in range(MILLION)]
    return {"a": numbers(MILLION), "b": numbers(MILLION), "s": texts, "t": texts[::-1]}


def csr() -> Any:
    rows, per_row, apart = 100_000, 60, 160
    indices = np.random.default_rng(0).integers(0, apart, (rows, per_row), np.int32)
    indices += np.arange(0, apart * per_row, apart, dtype=np.int32)
    starts = np.arange(0, indices.size + 1, per_row, dtype=np.int32)
    matrix = scipy.sparse.csr_array((numbers(indices.size), indices.ravel(), starts), (rows, apart * per_row))
    matrix.sum_duplicates()  # there are none; else scipy would do so when it is read, in place
    return matrix


def dataset() -> Any:
    dims = {"day": pd.date_range("2000", periods=1000), "place": np.arange(1000)}
    return xr.Dataset({f"field {i}": (tuple(dims), numbers(1000, 1000)) for i in range(8)}, dims)


def tensor() -> Any:
    return pytest.importorskip("torch").tensor(numbers(8, MILLION))


def image() -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (4000, 5000, 4), np.uint8))


def small_arrays() -> Any:
    return {f"sample {i}": row.copy() for i, row in enumerate(numbers(32_000, 250))}


def sum_table(table: Any) -> list[Any]:
    sums = [pa.compute.sum(table[name]) for name in "ab"]
    return sums + [pa.compute.sum(pa.compute.binary_length(table[name])) for name in "st"]


def sum_polars(frame: Any) -> Any:
    return frame.select(pl.col("a", "b").sum(), pl.col("s", "t").str.len_bytes().sum())


@dataclass(frozen=True)
class Family:
    """A sort of value: how it is made and read; whether joblib maps it, and Arrow has files for it."""

    make: Callable[[], Value]
    touch: Callable[[Value], Any]
    use: Callable[[Value], Any]
    maps: bool = False
    arrow: bool = False


FAMILIES = {
    "numpy array": Family(lambda: numbers(8, MILLION), lambda a: a[0, 0], lambda a: a.sum(), maps=True),
    "pandas frame of numbers": Family(
        lambda: pd.DataFrame(numbers(MILLION, 8), columns=list("abcdefgh")),
        lambda f: f.iat[0, 0],
        lambda f: f.sum(),
        maps=True,
        arrow=True,
    ),
    "pandas frame with texts": Family(
        lambda: pd.DataFrame(columns()),
        lambda f: f.iat[0, 0],
        lambda f: [f["a"].sum(), f["b"].sum(), f["s"].str.len().sum(), f["t"].str.len().sum()],
        maps=True,
        arrow=True,
    ),
    "pyarrow table": Family(lambda: pa.table(columns()), lambda t: t["a"][0], sum_table, arrow=True),
    "polars frame": Family(lambda: pl.DataFrame(columns()), lambda f: f[0, 0], sum_polars, arrow=True),
    "scipy csr": Family(csr, lambda m: m.data[0], lambda m: m.sum(), maps=True),
    "xarray dataset": Family(
        dataset,
        lambda d: d["field 0"].values[0, 0],
        lambda d: [field.values.sum() for field in d.data_vars.values()],
        maps=True,
    ),
    "torch tensor": Family(tensor, lambda t: t[0, 0], lambda t: t.sum()),
    "Pillow image": Family(image, lambda i: i.getpixel((0, 0)), lambda i: np.asarray(i).sum()),
    "dict of 32,000 small arrays": Family(
        small_arrays, lambda d: d["sample 0"][0], lambda d: sum(array.sum() for array in d.values())
    ),
}

# ------------------------------------------------------------------ who writes and reads them


class Peer(ABC):
    """A way to write one value to a file, and to read it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, value: Value) -> None:
        """Have a value that is in memory, and no file."""
        self.value = value
        self.path.unlink(missing_ok=True)

    @abstractmethod
    def write(self) -> None: ...

    @abstractmethod
    def read(self, act: Callable[[Value], Any]) -> Any: ...

    def forget(self) -> None:  # noqa: B027
        """Keep the value in its file only; most keep none anyway."""


class Fbcache(Peer):
    def __init__(self, path: Path) -> None:
        self.pool = FBPool(1 << 30, directory=path, min_free=0)

    def put(self, value: Value) -> None:
        self.pool.put("x", value, copy=True)  # else what the test holds could be had without a file
        self.pool.drain()

    def write(self) -> None:
        self.pool.evict()

    def read(self, act: Callable[[Value], Any]) -> Any:
        with self.pool.get("x") as value:
            return act(value)

    def forget(self) -> None:
        self.pool.evict()


class OutOfBand(Peer):
    def write(self) -> None:
        parts = dump(self.value)
        with self.path.open("wb", buffering=0) as file:
            for start in range(0, len(parts), _AT_ONCE):
                batch = parts[start : start + _AT_ONCE]
                assert os.writev(file.fileno(), batch) == sum(map(len, batch))

    def read(self, act: Callable[[Value], Any]) -> Any:
        with self.path.open("rb") as file:
            return act(undump(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


class InBand(Peer):
    def write(self) -> None:
        with self.path.open("wb") as file:
            pickle.dump(self.value, file, protocol=5)

    def read(self, act: Callable[[Value], Any]) -> Any:
        with self.path.open("rb") as file:
            return act(pickle.load(file))


class Joblib(Peer):
    mode: str | None = None

    def write(self) -> None:
        joblib.dump(self.value, self.path)

    def read(self, act: Callable[[Value], Any]) -> Any:
        return act(joblib.load(self.path, mmap_mode=self.mode))


class JoblibMapped(Joblib):
    mode = "r"


class Arrow(Peer):
    """What ``to_feather`` and ``write_ipc`` write."""

    def write(self) -> None:
        if isinstance(self.value, pl.DataFrame):
            self.value.write_ipc(self.path, compression="uncompressed")
            return
        table = self.value if isinstance(self.value, pa.Table) else pa.Table.from_pandas(self.value)
        with pa.ipc.new_file(str(self.path), table.schema) as writer:
            writer.write_table(table)

    def read(self, act: Callable[[Value], Any]) -> Any:
        if isinstance(self.value, pl.DataFrame):
            return act(pl.read_ipc(self.path))
        table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        return act(table if isinstance(self.value, pa.Table) else table.to_pandas())


PEERS: dict[str, type[Peer]] = {
    "fbcache": Fbcache,
    "pickle, out of band": OutOfBand,
    "pickle, in one stream": InBand,
    "joblib": Joblib,
    "joblib, mapped": JoblibMapped,
    "Arrow file, mapped": Arrow,
}


def cases(*, reading: bool) -> list[tuple[str, str]]:
    """Each family with fbcache first; a peer where it is another than those before it."""
    found = []
    for what, family in FAMILIES.items():
        left_out = {"Arrow file, mapped"} if not family.arrow else set()
        if not (family.maps and reading):
            left_out.add("joblib, mapped")
        found += [(what, who) for who in PEERS if who not in left_out]
    return found


# ------------------------------------------------------------------ the benchmarks


@pytest.fixture(scope="module", autouse=True)
def warm_memory() -> None:
    """As for all benchmarks, but once: these are many and short."""
    touch_memory()


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[str], Value]]:
    """``made(what)``: a value; the last one is kept, for the next test is likely to want it too."""
    kept: dict[str, Value] = {}

    def make(what: str) -> Value:
        if what not in kept:
            kept.clear()
            kept[what] = FAMILIES[what].make()
        return kept[what]

    yield make
    kept.clear()


@pytest.fixture
def peer(who: str, tmp_path: Path) -> Iterator[Peer]:
    """The one that is measured; it leaves nothing on disk."""
    found = PEERS[who](tmp_path / "x")
    yield found
    if isinstance(found, Fbcache):
        found.pool.close()
    else:
        found.path.unlink(missing_ok=True)  # it is not there if the library is not


def report(benchmark: Benchmark, value: Value) -> None:
    benchmark.extra_info["GB/s"] = sizeof(value) / benchmark.stats.stats.median / 1e9


class TestFamilies:
    @pytest.mark.benchmark(group="out")
    @pytest.mark.parametrize(("what", "who"), cases(reading=False))
    def test_out(self, what: str, peer: Peer, benchmark: Benchmark, made: Any) -> None:
        value = made(what)
        benchmark.pedantic(peer.write, setup=lambda: peer.put(value), rounds=ROUNDS, warmup_rounds=1)
        report(benchmark, value)

    @pytest.mark.benchmark(group="in, first touch")
    @pytest.mark.parametrize(("what", "who"), cases(reading=True))
    def test_first_touch(self, what: str, peer: Peer, benchmark: Benchmark, made: Any) -> None:
        self._read(FAMILIES[what].touch, peer, benchmark, made(what))

    @pytest.mark.benchmark(group="in, all of it")
    @pytest.mark.parametrize(("what", "who"), cases(reading=True))
    def test_all_of_it(self, what: str, peer: Peer, benchmark: Benchmark, made: Any) -> None:
        value = made(what)
        self._read(FAMILIES[what].use, peer, benchmark, value)
        report(benchmark, value)

    def _read(self, act: Callable[[Value], Any], peer: Peer, benchmark: Benchmark, value: Value) -> None:
        peer.put(value)
        peer.write()
        benchmark.pedantic(peer.read, (act,), setup=peer.forget, rounds=ROUNDS, warmup_rounds=1)
        if isinstance(peer, Fbcache):
            assert peer.pool.stats().loads == ROUNDS + 1
