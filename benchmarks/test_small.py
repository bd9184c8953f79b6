"""Many small values, of which a tenth fits in memory; and where packing them ends to pay.

"put" includes making the value, and ends when everything that does not fit is on disk. Slow peers are given
fewer values; what is compared is the time of one. FBCACHE_SMALL sets the count.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import sqlite3
import threading
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any
from uuid import uuid4

import diskcache
import lmdb
import numpy as np
import pytest
import zict

from fbcache import FBPool, Frames, PackedStore

Benchmark = Any

COUNT = int(os.environ.get("FBCACHE_SMALL", 1_000_000))
READS = 100_000

#: Bytes of one value in memory, as the pool measures it; a tenth of them fit.
IN_MEMORY = 784


def value(number: int) -> dict[str, Any]:
    """A dict of five fields: some 300 bytes when it is written."""
    return {"id": number, "name": f"user-{number:08d}", "score": number * 0.5, "text": "x" * 230, "ok": True}


def payload(number: int) -> int:
    return len(pickle.dumps(value(number), 5))


class Peer:
    """A way to keep many values: by put and get, and how much of the disk it takes."""

    count = COUNT

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory

    def flush(self) -> None:
        """Wait until everything is written."""

    def close(self) -> None:
        """End it."""

    def files(self) -> list[Path]:
        return [path for path in self.directory.rglob("*") if path.is_file()]


class Pool(Peer):
    store = "auto"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        memory = self.count * IN_MEMORY // 10
        self.pool = FBPool(memory, directory=directory, min_free=0, store=self.store)
        self.put: Callable[[Any, Any], Any] = self.pool.put
        self.flush = self.pool.drain  # type: ignore[method-assign]
        self.close = self.pool.close  # type: ignore[method-assign]

    def get(self, number: int) -> Any:
        with self.pool.get(number) as found:
            return found


class OverDiskcache(Pool):
    store = "diskcache"
    count = COUNT // 5


class InFiles(Pool):
    store = "files"
    count = COUNT // 25


class Zict(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        slow = zict.Func(lambda v: pickle.dumps(v, 5), pickle.loads, self.slow())
        keys = zict.KeyMap(str, slow) if hasattr(zict, "KeyMap") else slow
        self.cache: Any = zict.Buffer({}, keys, n=self.count // 10, weight=lambda key, value: 1)

    def slow(self) -> Any:
        raise NotImplementedError

    def put(self, number: int, value: Any) -> None:
        self.cache[str(number)] = value

    def get(self, number: int) -> Any:
        return self.cache[str(number)]


class ZictLmdb(Zict):
    count = COUNT // 10

    def slow(self) -> Any:
        return zict.LMDB(str(self.directory), map_size=1 << 34)


class ZictFile(Zict):
    count = COUNT // 25

    def slow(self) -> Any:
        return zict.File(str(self.directory))


class Lmdb(Peer):
    """lmdb alone, in transactions of 1,000, without a tier in memory or anything else around it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.env = lmdb.open(str(directory), map_size=1 << 34, sync=False, metasync=False)
        self.held: list[tuple[bytes, bytes]] = []

    def put(self, number: int, value: Any) -> None:
        self.held.append((number.to_bytes(8, "big"), pickle.dumps(value, 5)))
        if len(self.held) == 1000:
            self.flush()

    def flush(self) -> None:
        with self.env.begin(write=True) as transaction:
            transaction.cursor().putmulti(self.held)
        self.held.clear()

    def get(self, number: int) -> Any:
        with self.env.begin() as transaction:
            return pickle.loads(transaction.get(number.to_bytes(8, "big")))

    def close(self) -> None:
        self.env.close()


class Diskcache(Peer):
    count = COUNT // 25

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.cache = diskcache.Cache(str(directory), eviction_policy="none", size_limit=1 << 40)
        self.put = self.cache.__setitem__
        self.get = self.cache.__getitem__
        self.close = self.cache.close  # type: ignore[method-assign]


PEERS: dict[str, Any] = {
    "fbcache": Pool,
    "fbcache, on diskcache": OverDiskcache,
    "fbcache, in files": InFiles,
    "lmdb alone, batches of 1,000": Lmdb,
    "zict.Buffer, LMDB": ZictLmdb,
    "zict.Buffer, File": ZictFile,
    "diskcache": Diskcache,
}


def own_memory() -> int:
    """Bytes of memory that are the process's own, and not mapped files."""
    gc.collect()
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.parametrize("who", PEERS)
class TestSmall:
    """The median is that of one; what differs is how many of them a peer is given."""

    @pytest.mark.benchmark(group="put 300 bytes, a tenth fits")
    def test_put(self, who: str, tmp_path: Path, benchmark: Benchmark) -> None:
        peer = PEERS[who](tmp_path / "peer")
        put, count = peer.put, peer.count
        before = own_memory()
        numbers = iter(range(count + 1))  # pytest-benchmark calls once more, unmeasured

        def run() -> None:
            number = next(numbers)
            put(number, value(number))
            if number == count - 1:
                peer.flush()

        benchmark.pedantic(run, rounds=1, iterations=count)
        total = sum(payload(number) for number in range(0, count, 1000)) * 1000
        files = peer.files()
        info = benchmark.extra_info
        info["values"] = count
        info["disk of payload"] = sum(path.stat().st_blocks * 512 for path in files) / total
        info["files"] = len(files)
        if isinstance(peer, Pool):
            peer.pool.evict()
            peer.pool.drain()
            info["memory of one spilled, bytes"] = (own_memory() - before) / count
        peer.close()

    @pytest.mark.benchmark(group="random read of 300 bytes, a tenth fits")
    def test_random_read(self, who: str, tmp_path: Path, benchmark: Benchmark) -> None:
        peer = PEERS[who](tmp_path / "peer")
        for number in range(peer.count):
            peer.put(number, value(number))
        peer.flush()
        get = peer.get
        rng = random.Random(1)
        numbers = cycle([rng.randrange(peer.count) for _ in range(READS)])
        benchmark.pedantic(lambda: get(next(numbers)), rounds=1, iterations=READS)
        benchmark.extra_info["values"] = peer.count
        peer.close()


@pytest.mark.parametrize("nbytes", [1 << 10, 8 << 10, 32 << 10, 64 << 10, 120 << 10])
@pytest.mark.parametrize("who", ["fbcache, packed", "fbcache, files"])
@pytest.mark.benchmark(group="spill and reload 1,000 arrays")
def test_threshold(who: str, nbytes: int, benchmark: Benchmark, pools: Callable[..., FBPool]) -> None:
    """Where a file of its own begins to pay: each array written, dropped, read again, deleted."""

    def run() -> None:
        pool = pools(1 << 30, store=who.rpartition(" ")[2])
        for number in range(1000):
            pool[number] = np.full(nbytes // 8, float(number))
        pool.evict()
        for number in range(1000):
            with pool.get(number) as array:
                assert array[0] == number
        for number in range(1000):
            del pool[number]
        pool.close()

    benchmark.pedantic(run, rounds=5)


class Busy:
    """A thread that computes, as a program does while its pool writes in the background."""

    def __enter__(self) -> None:
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()

    def work(self) -> None:
        while not self.stop.is_set():
            sum(range(1000))


@pytest.mark.parametrize("who", ["fbcache, segments", "lmdb"])
@pytest.mark.benchmark(group="20,000 records of 330 bytes in batches of 256, while another thread computes")
def test_write_beside_a_busy_thread(who: str, benchmark: Benchmark, tmp_path: Path) -> None:
    """Why the packed store is not on lmdb: its binding waits for the interpreter once for each item."""
    count, size = 20_000, 256
    body = os.urandom(330)
    store = PackedStore(str(tmp_path))
    env = lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 34, sync=False, metasync=False)

    def to_segments() -> None:
        for _ in range(0, count, size):
            store.append([Frames("msgpack", body, ())] * size)

    def to_lmdb() -> None:
        for _ in range(0, count, size):
            with env.begin(write=True) as transaction:
                transaction.cursor().putmulti([(uuid4().bytes, body) for _ in range(size)])

    with Busy():
        benchmark.pedantic(to_lmdb if who == "lmdb" else to_segments, rounds=1)
    benchmark.extra_info["one, us"] = benchmark.stats.stats.median / count * 1e6
    store.close()
    env.close()


SAVED = min(COUNT, 100_000)


class Saved:
    """A way to make many values of a running program durable, all or nothing, and to have them again."""

    count = SAVED

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.values = {number: value(number) for number in range(self.count)}

    def save(self) -> None:
        raise NotImplementedError

    def first(self) -> Any:
        """Open what was saved, and return one value."""
        raise NotImplementedError

    def close(self) -> None:
        """End it."""


class SavedPool(Saved):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.pool = FBPool(self.count * IN_MEMORY // 10, min_free=0)
        for number, each in self.values.items():
            self.pool.put(number, each)
        self.pool.drain()
        self.values.clear()

    def save(self) -> None:
        self.pool.save(self.directory / "state")

    def first(self) -> Any:
        with FBPool.from_checkpoint(self.directory / "state") as pool:
            return pool[7]

    def close(self) -> None:
        self.pool.close()


class SavedPickle(Saved):
    def save(self) -> None:
        write_durably(self.directory / "state", pickle.dumps(self.values, 5))

    def first(self) -> Any:
        return pickle.loads((self.directory / "state").read_bytes())[7]


class SavedSqlite(Saved):
    def save(self) -> None:
        with contextlib.closing(sqlite3.connect(self.directory / "state")) as base, base:
            base.execute("CREATE TABLE state (name INTEGER PRIMARY KEY, value BLOB)")
            rows = ((name, pickle.dumps(each, 5)) for name, each in self.values.items())
            base.executemany("INSERT INTO state VALUES (?, ?)", rows)

    def first(self) -> Any:
        with contextlib.closing(sqlite3.connect(self.directory / "state")) as base:
            return pickle.loads(base.execute("SELECT value FROM state WHERE name = 7").fetchone()[0])


class SavedFiles(Saved):
    count = SAVED // 25

    def save(self) -> None:
        for name, each in self.values.items():
            (self.directory / str(name)).write_bytes(pickle.dumps(each, 5))
        os.sync()

    def first(self) -> Any:
        return pickle.loads((self.directory / "7").read_bytes())


SAVERS: dict[str, type[Saved]] = {
    "fbcache": SavedPool,
    "one pickle of all": SavedPickle,
    "sqlite3, a pickle each": SavedSqlite,
    "a file each": SavedFiles,
}


def write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("who", SAVERS)
class TestSaveSmall:
    """What compares is the time of one; peers have all values in memory, the pool a tenth."""

    @pytest.mark.benchmark(group="save dicts of 300 bytes durably")
    def test_save(self, who: str, tmp_path: Path, benchmark: Benchmark) -> None:
        saved = SAVERS[who](tmp_path)
        benchmark.pedantic(saved.save, rounds=1)
        info = benchmark.extra_info
        info["values"] = saved.count
        info["one, us"] = benchmark.stats.stats.median / saved.count * 1e6
        info["files"] = sum(path.is_file() for path in tmp_path.rglob("*"))
        saved.close()

    @pytest.mark.benchmark(group="open what was saved of dicts of 300 bytes, and read one")
    def test_open(self, who: str, tmp_path: Path, benchmark: Benchmark) -> None:
        saved = SAVERS[who](tmp_path)
        saved.save()
        found = benchmark.pedantic(saved.first, rounds=3)
        assert found == value(7)
        benchmark.extra_info["values"] = saved.count
        saved.close()
