"""Checkpoints of 256 arrays of 4 MiB: a full save, a save after changing four, one value in a fresh process.

Every save is durable and atomic, the peers' too: files are fsynced, then their directories, a rename
makes the new version visible, and the former one is removed, all within the time. "MiB written" is what
new files take on disk. Those that write everything each time are measured once for a save after changes.

Each turn goes through all peers before the next begins, in another order, so that what else the machine
does, and what the one before has left, meets them alike; ``benchmarks.table`` takes medians over the
turns. Data are random, so zarr's compression, which is on by default, is off. What is read back comes from
the page cache.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fbcache import FBPool

Benchmark = Any
Array = Any

COUNT = 256
LENGTH = (4 << 20) // 8
CHANGED = 4
TURNS = 3
FRESH_PROCESSES = 2

#: What a child does: imports, then opening and reading, each timed. %s are imports and the statement to time.
CHILD = """
from time import perf_counter
begun = perf_counter()
import json, sys, numpy
%s
path, scratch, name = sys.argv[1:]
imported = perf_counter()
value = %s
value[0]
touched = perf_counter()
value.sum()
summed = perf_counter()
print(json.dumps([touched - imported, summed - imported, touched - begun]))
"""


class Peer(ABC):
    """A way of saving arrays by name to ``root``: one version at a time, which a later one replaces."""

    needs: ClassVar[str] = "numpy"
    imports: ClassVar[str] = ""
    open: ClassVar[str]
    incremental: ClassVar[bool] = False

    def __init__(self, root: Path, values: dict[str, Array]) -> None:
        self.root = root
        self.values = dict(values)
        self.number = count(1)
        root.mkdir()

    @property
    def current(self) -> Path:
        """Where the newest version is."""
        return self.root / "current"

    def change(self, names: list[str]) -> None:
        for name in names:
            self.values[name] = self.values[name] + 1

    def save(self) -> None:
        new = self.root / f"version-{next(self.number)}"
        self.write(new)
        self.publish(new)

    @abstractmethod
    def write(self, new: Path) -> None:
        """Write all values to a file or directory, durably."""

    def publish(self, new: Path) -> None:
        os.replace(new, self.current)
        sync(self.root)

    def close(self) -> None:
        return


def sync(path: Path) -> None:
    """Fsync a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Fbcache(Peer):
    imports = "from fbcache import FBPool"
    open = "FBPool.from_checkpoint(path, memory='2GB', directory=scratch, min_free=0)[name]"
    incremental = True

    def __init__(self, root: Path, values: dict[str, Array]) -> None:
        super().__init__(root, {})
        self.pool = FBPool("4GB", directory=root / "session", min_free=0)
        for name, value in values.items():
            value.flags.writeable = True  # of a former pool's, which is closed; a new one takes it as it is
            self.pool.put(name, value)

    def change(self, names: list[str]) -> None:
        for name in names:
            with self.pool.get_mut(name) as value:
                value += 1

    def save(self) -> None:
        self.pool.save(self.current)

    def write(self, new: Path) -> None:
        raise NotImplementedError

    def spill(self) -> None:
        """Have everything on disk, as after a long time under pressure."""
        self.pool.evict()

    def close(self) -> None:
        self.pool.close()


class NumpySaveAndLinks(Peer):
    """A file for each array, hard links of those that have not changed: what a careful user would write."""

    open = "numpy.load(f'{path}/{name}.npy', mmap_mode='r')"
    incremental = True

    def __init__(self, root: Path, values: dict[str, Array]) -> None:
        super().__init__(root, values)
        self.saved: dict[str, Array] = {}
        self.former: Path | None = None

    def write(self, new: Path) -> None:
        new.mkdir()
        for name, value in self.values.items():
            path = new / f"{name}.npy"
            if self.former is not None and self.saved.get(name) is value:
                os.link(self.former / f"{name}.npy", path)
                continue
            with path.open("wb") as file:
                np.save(file, value)
                file.flush()
                os.fsync(file.fileno())
        sync(new)

    def publish(self, new: Path) -> None:
        link = self.root / "next"
        link.symlink_to(new.name)
        super().publish(link)
        if self.former is not None:
            shutil.rmtree(self.former)
        self.saved, self.former = dict(self.values), new

    def spill(self) -> None:
        """Have a file for each array, but no version of them."""
        self.write(self.root / "spilled")
        self.saved, self.former = dict(self.values), self.root / "spilled"


class OneFile(Peer):
    """Everything in one file, written anew each time."""

    def write(self, new: Path) -> None:
        self.dump(new)
        sync(new)

    @abstractmethod
    def dump(self, new: Path) -> None: ...


class NumpySavez(OneFile):
    open = "numpy.load(path)[name]"

    def dump(self, new: Path) -> None:
        with new.open("wb") as file:
            np.savez(file, **self.values)


class Pickle(OneFile):
    imports = "import pickle"
    open = "pickle.load(open(path, 'rb'))[name]"

    def dump(self, new: Path) -> None:
        with new.open("wb") as file:
            pickle.dump(self.values, file, protocol=5)


class Joblib(OneFile):
    needs = "joblib"
    imports = "import joblib"
    open = "joblib.load(path, mmap_mode='r')[name]"

    def dump(self, new: Path) -> None:
        import joblib  # type: ignore[import-untyped]

        joblib.dump(self.values, new)


class Safetensors(OneFile):
    needs = "safetensors"
    imports = "from safetensors import safe_open"
    open = "safe_open(path, 'numpy').get_tensor(name)"

    def dump(self, new: Path) -> None:
        from safetensors.numpy import save_file

        save_file(self.values, new)


class Zarr(Peer):
    """A group with an array of one chunk for each value, written anew each time: in place is not atomic."""

    needs = "zarr"
    imports = "import zarr"
    open = "zarr.open_group(path, mode='r')[name][:]"

    def __init__(self, root: Path, values: dict[str, Array]) -> None:
        super().__init__(root, values)
        self.former: Path | None = None

    def write(self, new: Path) -> None:
        import zarr

        group = zarr.open_group(new, mode="w")
        for name, value in self.values.items():
            group.create_array(name, data=value, chunks=value.shape, compressors=None)
        for directory, _, files in os.walk(new, topdown=False):
            for file in files:
                sync(Path(directory, file))
            sync(Path(directory))

    def publish(self, new: Path) -> None:
        link = self.root / "next"
        link.symlink_to(new.name)
        super().publish(link)
        if self.former is not None:
            shutil.rmtree(self.former)
        self.former = new


PEERS: dict[str, type[Peer]] = {
    "fbcache": Fbcache,
    "numpy.save and links by hand": NumpySaveAndLinks,
    "safetensors": Safetensors,
    "joblib": Joblib,
    "pickle protocol 5": Pickle,
    "numpy.savez": NumpySavez,
    "zarr": Zarr,
}


class ChildClock:
    """Tells the time that the measured part of children has taken."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CHILD_CLOCK = ChildClock()


# ------------------------------------------------------------------------------- fixtures


class Workshop:
    """Makes one peer at a time, and removes all files of the one before."""

    def __init__(self, kind: type[Peer], values: dict[str, Array], root: Path) -> None:
        self.kind = kind
        self._values = values
        self._roots = (root / str(number) for number in count())
        self._live: Peer | None = None

    def new(self) -> Peer:
        """A peer that has saved nothing."""
        self.clear()
        self._live = self.kind(next(self._roots), self._values)
        return self._live

    def saved(self) -> Peer:
        """A peer that has saved one version at least."""
        if self._live is not None and (self._live.root / "current").exists():
            return self._live
        peer = self.new()
        peer.save()
        return peer

    def clear(self) -> None:
        if self._live is not None:
            self._live.close()
            shutil.rmtree(self._live.root)
            self._live = None


@pytest.fixture
def warm_memory() -> None:
    """Nothing here: memory is warmed right before what is timed, see :func:`quiet`."""


def quiet() -> None:
    """Have nothing waiting to be written, and memory for the page cache that is not slow to get."""
    os.sync()
    block = np.empty(COUNT * LENGTH * 5 // 4)
    block[:: 4096 // 8] = 1


@pytest.fixture(scope="module")
def values() -> dict[str, Array]:
    whole = np.random.default_rng(0).random(LENGTH)
    return {f"array-{i}": whole + i for i in range(COUNT)}


def all_turns() -> list[str]:
    """Every peer once in each turn, and in each turn after another."""
    names = list(PEERS)
    order = [names[3 * turn % len(names) :] + names[: 3 * turn % len(names)] for turn in range(TURNS)]
    return [f"{name}, turn {turn}" for turn, names in enumerate(order) for name in names]


@pytest.fixture(scope="module", params=all_turns())
def who(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def workshop(
    who: str, values: dict[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    kind = PEERS[who.partition(", turn")[0]]
    pytest.importorskip(kind.needs)
    shop = Workshop(kind, values, tmp_path_factory.mktemp("peer"))
    yield shop
    shop.clear()


# ---------------------------------------------------------------------------------- tests


def footprint(root: Path) -> dict[tuple[int, int], int]:
    """Bytes on disk of each file under ``root``, by what changes when it is written."""
    found = {}
    for directory, _, files in os.walk(root):
        for file in files:
            status = os.lstat(os.path.join(directory, file))
            found[status.st_ino, status.st_mtime_ns] = status.st_blocks * 512
    return found


def written(before: dict[tuple[int, int], int], root: Path) -> float:
    """MiB in files that are new, each counted once however many names it has."""
    after = footprint(root)
    return sum(after[file] for file in after.keys() - before.keys()) / (1 << 20)


@pytest.mark.benchmark(group="checkpoint of 256 x 4 MiB, all of it in memory only")
def test_full_save(workshop: Workshop, benchmark: Benchmark) -> None:
    peer = workshop.new()
    quiet()
    before = footprint(peer.root)
    benchmark.pedantic(peer.save)
    benchmark.extra_info["MiB written"] = written(before, peer.root)


@pytest.mark.benchmark(group="checkpoint of 256 x 4 MiB, after changing 4")
def test_save_after_changes(who: str, workshop: Workshop, benchmark: Benchmark) -> None:
    if not (workshop.kind.incremental or who.endswith("turn 0")):
        pytest.skip("it writes everything anyway")
    peer = workshop.saved()
    names = iter([f"array-{i}" for i in range(COUNT)])
    before: list[dict[tuple[int, int], int]] = []

    def setup() -> None:
        peer.change([next(names) for _ in range(CHANGED)])
        if peer.incremental:
            os.sync()
        else:
            quiet()
        before[:] = [footprint(peer.root)]

    benchmark.pedantic(peer.save, setup=setup, rounds=5 if peer.incremental else 1)
    benchmark.extra_info["MiB written"] = written(before[0], peer.root)


@pytest.mark.benchmark(group="one of 256 x 4 MiB in a fresh process, to the first element", timer=CHILD_CLOCK)
def test_restore(workshop: Workshop, benchmark: Benchmark, tmp_path: Path) -> None:
    peer = workshop.saved()
    code = CHILD % (peer.imports, peer.open)
    command = [sys.executable, "-c", code, str(peer.current), str(tmp_path)]
    times: list[list[float]] = []

    def run() -> None:
        done = subprocess.run([*command, f"array-{len(times) + 100}"], check=True, capture_output=True)
        times.append(json.loads(done.stdout))
        CHILD_CLOCK.now += times[-1][0]

    benchmark.pedantic(run, rounds=FRESH_PROCESSES, warmup_rounds=1)
    _, summed, with_imports = np.median(times[-FRESH_PROCESSES:], axis=0) * 1e3
    benchmark.extra_info["and sum, ms"] = summed
    benchmark.extra_info["first element with imports, ms"] = with_imports


@pytest.mark.benchmark(group="checkpoint of 256 x 4 MiB, all of it on disk already")
def test_save_of_what_is_spilled(workshop: Workshop, benchmark: Benchmark) -> None:
    if not workshop.kind.incremental:
        pytest.skip("it writes everything anyway")
    peer: Any = workshop.new()
    peer.spill()
    os.sync()
    before = footprint(peer.root)
    benchmark.pedantic(peer.save)
    benchmark.extra_info["MiB written"] = written(before, peer.root)
