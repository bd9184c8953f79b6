"""What all tests share: pools that are checked and closed, threads that are joined, leaks that are found.

Synchronization is by events only. A thread or task is known to wait when it has announced
itself through :class:`Sleepers`; a system call, when it stands at a gate of the faulty disk.
Both give up after ``PATIENCE`` seconds, so that a broken build fails instead of hanging.
"""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fbcache import FBPool, FileStore, waiting
from fbcache.store import mounts
from fbcache.store.choice import STORES
from fbcache.store.protocol import StoreLimits
from fbcache.waiting import Waiter
from tests.faults import PATIENCE, FaultyDisk, Gate

#: Opened once by the interpreter or a library, and kept.
_LAZILY_OPENED = frozenset({"/dev/urandom", "/dev/random", "/dev/null"})


#: Whether the pool is compiled here (see setup.py), so that its methods cannot be replaced.
COMPILED = not str(waiting.__file__).endswith(".py")

_FIXED = "it replaces a part of the pool, which is compiled here"
_CANNOT_REPLACE = re.compile(r"object attribute '\w+' is read-only|cannot set '\w+' attribute of immutable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--io-threads", type=int, default=None, help="I/O threads of every pool; 1 is enough")
    parser.addoption("--store", default="auto", help="the store of every pool that asks for none")
    parser.addoption("--soak", action="store_true", help="run the long tests too, and the others for longer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if COMPILED:
        fixed = pytest.mark.skip(reason=_FIXED)
        for item in items:
            if item.get_closest_marker("patches") is not None:
                item.add_marker(fixed)
    if config.getoption("--soak"):
        return
    skip = pytest.mark.skip(reason="long; chosen with --soak")
    for item in items:
        if item.get_closest_marker("soak") is not None:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip tests that found out only on their way that they could not replace what they wanted to."""
    report = yield
    if COMPILED and call.excinfo is not None and _CANNOT_REPLACE.search(str(call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.reportinfo()[1] or 0, f"Skipped: {_FIXED}")
    return report


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether to run for longer."""
    return bool(request.config.getoption("--soak"))


# ------------------------------------------------------------------ leaks


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No thread of a pool and no descriptor outlives a test."""
    descriptors = _descriptors()
    threads = set(threading.enumerate())
    yield
    if _new_threads(threads) or _new_descriptors(descriptors):
        gc.collect()  # a pool that the test forgot: its collection closes it
        for thread in _new_threads(threads):
            thread.join(PATIENCE)
    assert not _new_threads(threads), "threads of a pool are alive"
    assert not _new_descriptors(descriptors), "descriptors are open"


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fbcache") and t not in before]


def _descriptors() -> Counter[str]:
    targets: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            targets[os.readlink(f"/proc/self/fd/{fd}")] += 1
        except OSError:  # the one that listed the directory
            pass
    return targets


def _new_descriptors(before: Counter[str]) -> list[str]:
    new = _descriptors() - before
    return [target for target in new if target not in _LAZILY_OPENED]


@pytest.fixture(autouse=True)
def _default_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that look at the blobs' own files, or count their bytes, have all of them in files."""
    marked = request.node.get_closest_marker("files") is not None
    store = "files" if marked else request.config.getoption("--store")
    monkeypatch.setitem(STORES, "auto", STORES[store])


@pytest.fixture(autouse=True)
def _no_warning_about_the_test_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_warned", True)


# ------------------------------------------------------------------ pools

MakePool = Callable[..., FBPool]


class GatedDisk(FaultyDisk):
    """A faulty disk whose gates the end of the test opens."""

    __slots__ = ("gates",)

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[Gate] = []

    def gate(self, call: str, *, nth: int = 1, after: bool = False) -> Gate:
        gate = super().gate(call, nth=nth, after=after)
        self.gates.append(gate)
        return gate

    def open_all(self) -> None:
        self.clear()
        for gate in self.gates:
            gate.open()


class _Pools:
    def __init__(self, io_threads: int | None) -> None:
        self._io_threads = io_threads
        self._made: list[FBPool] = []
        self._disks: list[GatedDisk] = []

    def make(self, memory: Any, options: dict[str, Any], disk: GatedDisk | None = None) -> FBPool:
        options.setdefault("io_threads", self._io_threads)
        pool = FBPool(memory, **options)
        self._made.append(pool)
        if disk is not None:
            self._disks.append(disk)
        return pool

    def end(self) -> None:
        """Check and close every pool, even if one fails the check."""
        for disk in self._disks:
            disk.open_all()
        failed = []
        while self._made:
            pool = self._made.pop()
            path = Path(pool._engine.store.path)
            try:
                if not pool._engine.residency.closed:
                    pool.validate()
            except BaseException as error:
                failed.append(error)
            finally:
                pool.close()
            if [file for file in path.rglob("*") if file.is_file()]:
                failed.append(AssertionError(f"a closed pool left files in {path}"))
        if failed:
            raise failed[0]


@pytest.fixture
def _pools(request: pytest.FixtureRequest) -> Iterator[_Pools]:
    pools = _Pools(request.config.getoption("--io-threads"))
    yield pools
    pools.end()


@pytest.fixture
def make_pool(_pools: _Pools, tmp_path: Path) -> MakePool:
    """``make_pool(memory="1MB", **options)``: a pool in ``tmp_path``, checked and closed at the end."""

    def make(memory: Any = "1MB", **options: Any) -> FBPool:
        options.setdefault("directory", tmp_path / "spill")
        options.setdefault("min_free", 0)
        return _pools.make(memory, options)

    return make


@pytest.fixture
def make_faulty_pool(_pools: _Pools, tmp_path: Path) -> Callable[..., tuple[FBPool, GatedDisk]]:
    """``make_faulty_pool(memory="1MB", *, mmap=True, max_disk=None, **options)``: a pool and its disk."""

    def make(
        memory: Any = "1MB", *, mmap: bool = True, max_disk: int | None = None, **options: Any
    ) -> tuple[FBPool, GatedDisk]:
        disk = GatedDisk()
        directory = tmp_path / f"faulty-{len(_pools._disks)}"
        directory.mkdir()
        store = FileStore(str(directory), limits=StoreLimits(max_disk=max_disk), mmap=mmap, disk=disk)
        return _pools.make(memory, {**options, "store": store}, disk), disk

    return make


@pytest.fixture
def pool(make_pool: MakePool) -> FBPool:
    """A pool with room for all that a small test puts into it."""
    return make_pool("1MB")


@pytest.fixture
def blob_files() -> Callable[[FBPool], list[Path]]:
    """``blob_files(pool)``: its blobs on disk, half-written ones included."""

    def find(pool: FBPool) -> list[Path]:
        files = Path(pool._engine.store.path).rglob("*")
        return [f for f in files if re.fullmatch(r"\.?[0-9a-f]{32}(\.tmp)?", f.name)]

    return find


# ------------------------------------------------------------------ threads and waiting


class Running:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._future: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, args=(call, args, kwargs), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._future.set_result(call(*args, **kwargs))
        except BaseException as error:
            self._future.set_exception(error)

    @property
    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Any:
        """Wait for the call; return what it returned, or raise what it raised."""
        try:
            return self._future.result(PATIENCE)
        finally:
            self.join()

    def error(self) -> BaseException | None:
        """Wait for the call, and return what it raised."""
        error = self._future.exception(PATIENCE)
        self.join()
        return error

    def join(self) -> None:
        self._thread.join(PATIENCE)


@pytest.fixture
def spawn() -> Iterator[Callable[..., Running]]:
    """``spawn(call, *args)``: run it in a thread; joined at the end of the test."""
    running: list[Running] = []

    def start(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Running:
        running.append(Running(call, args, kwargs))
        return running[-1]

    yield start
    for each in running:
        each.join()


class Sleepers:
    """Hears of every thread and task that is about to wait, in order.

    When one is heard of, it is in line already: a wake that comes now is not lost.
    """

    def __init__(self) -> None:
        self._heard: queue.SimpleQueue[Waiter] = queue.SimpleQueue()

    def hear(self, waiter: Waiter) -> None:
        self._heard.put(waiter)

    def next(self) -> Waiter:
        """Block until one more waits."""
        return self._heard.get(timeout=PATIENCE)

    async def anext(self) -> Waiter:
        """Let other tasks run until one more waits."""
        async with asyncio.timeout(PATIENCE):
            while self._heard.empty():
                await asyncio.sleep(0)
        return self._heard.get()

    @property
    def none(self) -> bool:
        """Whether nobody has waited but those already heard of."""
        return self._heard.empty()


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> Sleepers:
    """Announces who waits for a guard, for a load of another, for memory or for the end of work."""
    heard = Sleepers()
    monkeypatch.setattr(waiting, "about_to_sleep", heard.hear)
    return heard
