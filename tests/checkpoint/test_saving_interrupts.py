"""The stop button during a save, a persist, a register or a restore: a KeyboardInterrupt at every place.

After each, ``validate()`` passes, every value is right, no entry, handle or share is held back, the former
checkpoint or the new one opens, and the same call works.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fbcache import Fb, FBPool, TrackedDirectory
from fbcache.checkpoint.registry import directory_at
from fbcache.store.disk import Disk
from tests.checkpoint.cuts import array, change, contents, nothing_is_left
from tests.checkpoint.opened import in_memory
from tests.faults import PATIENCE
from tests.interrupts import Interrupter

NAMES = ("memory", "disk", "clean")
Scenario = Callable[["Room"], None]


class Room:
    """A pool, a directory with a checkpoint of it, and what the values are."""

    def __init__(self, path: Path) -> None:
        self.pool = FBPool("1MB", directory=path, min_free=0, io_threads=1)
        self.directory = directory_at(path / "dir", Disk())  # shared with nobody
        self.tracked = TrackedDirectory._over(self.directory)
        self.hung = False
        self.handles: list[Fb] = []
        self.futures: list[Future[Any]] = []
        self.values = dict.fromkeys(NAMES, 0.0)
        for name in NAMES:
            self.pool.put(name, array(0))
        self.pool.save(self.tracked)
        self.former = dict(self.values)
        self.kept = self.pool.insert(array(77)).persist(self.tracked)
        self.pool.drain()
        self.lent = self.pool.register(self.tracked, self.kept)  # begins a reader's session
        for name in NAMES:
            change(self.pool, name, 1)
            self.values[name] += 1
        self.pool.evict(["disk", "clean"])
        self.pool["clean"]
        self.pool.drain()

    def close(self) -> None:
        """End it all, the reader's session too if a loan was lost."""
        self.lent.drop()
        self.pool.close()
        self.tracked.close()
        session, self.directory.loans._session = self.directory.loans._session, None
        if session is not None:
            session.close()

    def settle(self) -> None:
        """Let background work come to its end."""
        while self.futures:
            self.futures.pop().result(PATIENCE)
        reached = threading.Event()  # by the one I/O thread, after a persist that nobody waits for
        self.pool.drain()
        self.pool._engine.workers.submit(reached.set)
        assert reached.wait(PATIENCE)
        self.handles.clear()
        for name in set(self.pool) - set(NAMES):
            self.pool.delete(name)
        self.pool.drain()

    def trouble(self) -> list[str]:
        """What is wrong, also after a collection."""
        if [*self.pools_trouble(), *self.directorys_trouble()]:
            gc.collect()  # takes long, so that it is not done each time
            self.settle()
        return [*self.pools_trouble(), *self.directorys_trouble()]

    def pools_trouble(self) -> Iterator[str]:
        pool = self.pool
        pool.validate()
        for name, value in self.values.items():
            if not (pool[name] == value).all() and not (pool[name] == self.former[name]).all():
                yield f"{name} has another value"
        entries = pool._engine.residency.entries
        if len(entries) != len(NAMES) + 1:
            yield "an entry is left over"
        for entry in entries:
            if entry.handles != (entry is self.lent._entry) or entry.captures is not None:
                yield f"{entry} is owned by nobody living"
            if entry.token is not None and entry.token.shares != 1:
                yield f"a share of {entry} is left"
        shared = {entry.token.key for entry in entries if entry.token is not None}
        if pool._engine.residency.known.keys() - shared:
            yield "a token is left"

    def directorys_trouble(self) -> Iterator[str]:
        directory = self.directory
        if self.hung:
            yield "the call hung"
        if None in directory._turns:
            yield "a save holds its turn"
        if any(key in directory._changing for key in list(directory._present)):
            yield "a blob is being changed for ever"

    def committed(self) -> Any:
        """The newest checkpoint, as another process finds it."""
        return contents(self.directory.root)


def save(room: Room) -> None:
    room.pool.save(room.tracked)


def save_and_forget(room: Room) -> None:
    room.pool.save(room.tracked, ["memory", "disk", "clean"], tag="t", keep=2, meta={"n": 1})
    room.pool.save(room.tracked)
    room.tracked.forget("t")


def spawn_persist(room: Room) -> None:
    room.handles.append(room.pool.insert(array(3)))
    room.handles[-1].spawn_persist(room.tracked).result(30)


def give_to_a_persist_in_the_background(room: Room) -> None:
    """The leaving of a guard, here, gives a blob to whoever has captured the entry elsewhere."""
    fb = room.pool.insert(array(3))
    room.handles.append(fb)
    fb.write_now()
    with contextlib.suppress(ZeroDivisionError), fb.load_mut(rollback=True) as x:
        x += 1
        elsewhere = threading.Thread(target=lambda: room.futures.append(fb.spawn_persist(room.tracked)))
        elsewhere.start()
        elsewhere.join()
        raise ZeroDivisionError


def register(room: Room) -> None:
    room.handles.append(room.pool.register(room.tracked, room.kept, "registered", replace=True))
    room.handles += room.pool.register_all(room.tracked)


def restore(room: Room) -> None:
    room.pool.restore(room.tracked, ["disk", "clean"], replace=True)


SCENARIOS: list[tuple[Scenario, int]] = [
    (save, 9),
    (save_and_forget, 37),
    (spawn_persist, 1),
    (give_to_a_persist_in_the_background, 1),
    (register, 5),
    (restore, 3),
]


class _Hang(BaseException):
    """A call that should have ended has not, seconds after."""


@contextlib.contextmanager
def _watched(room: Room) -> Iterator[None]:
    def give_up(*_: object) -> None:
        room.hung = True
        raise _Hang

    former = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def every_place(scenario: Scenario, stride: int, path: Path) -> Iterator[tuple[str, Room]]:
    """Interrupt the call at each ``stride``-th place, in a room of its own; then look."""
    for nth in itertools.count(1, stride):
        place = path / str(nth)
        place.mkdir()
        room = Room(place)
        try:
            interrupter = Interrupter(nth)
            with contextlib.suppress(KeyboardInterrupt, _Hang), interrupter, _watched(room):
                scenario(room)
            room.settle()
            yield interrupter.where, room
        finally:
            room.close()
        if not interrupter.fired:
            assert nth > 20 * stride, "hardly anything was interrupted"
            return


@pytest.fixture
def memory() -> Iterator[Path]:
    """Nothing here is about the disk."""
    with in_memory() as path:
        yield path


# The interpreter drops what a finalizer raises.
@pytest.mark.files
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("scenario", "stride"), SCENARIOS, ids=lambda p: getattr(p, "__name__", ""))
def test_an_interrupt_anywhere_keeps_nothing_back_of_the_pool_and_no_half_checkpoint(
    scenario: Scenario, stride: int, memory: Path, soak: bool
) -> None:
    """Invariants 1 and 12."""
    for where, room in every_place(scenario, 1 if soak else stride, memory):
        assert room.trouble() == [], where
        assert room.committed() in (room.former, room.values), where
        scenario(room)
        room.settle()
        assert room.trouble() == [], f"the next call after {where}"
        room.lent.drop()
        if (
            scenario is not restore
        ):  # which drops entries: an interrupt of that keeps a blob until the pool ends
            nothing_is_left(room.pool)
