"""What tests of saving and persisting share: arrays, the moment of a cut, and a store without files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from fbcache import FBPool, Frames, State
from fbcache.errors import CorruptBlobError
from tests.conftest import Running
from tests.faults import PATIENCE

ITEM = 8192
Spawn = Callable[..., Running]
MakeFaulty = Callable[..., Any]


def array(value: float) -> np.ndarray[Any, Any]:
    return np.full(ITEM // 8, float(value))


def entry_of(pool: FBPool, name: Any) -> Any:
    return pool._engine.names[name]


def state(pool: FBPool, name: Any) -> State:
    found: State = entry_of(pool, name).state
    return found


def change(pool: FBPool, name: Any, by: float) -> None:
    with pool.get_mut(name) as x:
        x += by


def contents(path: Any, **options: Any) -> dict[Any, Any]:
    """The first items of the arrays in the newest checkpoint, whose items are all the same."""
    with FBPool.from_checkpoint(path, memory="4MB", min_free=0, **options) as pool:
        found = {}
        for name in pool:
            value = pool[name]
            assert (value == value.flat[0]).all(), f"{name!r} is of two moments"
            found[name] = value.flat[0]
        return found


def nothing_is_left(pool: FBPool) -> None:
    """Drop all names, and see that nothing of any entry remains: no share, handle, entry or file."""
    for name in list(pool):
        pool.delete(name)
    pool.drain()
    pool.validate()
    residency = pool._engine.residency
    assert pool.stats().entries == 0, residency.entries
    assert residency.known == {}, "a token has shares that nobody will give up"
    assert not residency.wanted
    assert pool.stats().disk_bytes == 0
    blobs = [p for p in Path(pool._engine.store.path).glob("??/*") if p.is_file()]
    assert blobs == [], "a blob was not deleted"


@contextmanager
def cut_of(pool: FBPool) -> Iterator[Callable[[], None]]:
    """``with cut_of(pool) as passed``: ``passed()`` waits until the next save has captured its entries."""
    residency = pool._engine.residency
    captured = threading.Event()
    real = residency.capture

    def capture(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        captured.set()

    def passed() -> None:
        assert captured.wait(PATIENCE), "nothing was captured"

    residency.capture = capture  # type: ignore[method-assign]
    try:
        yield passed
    finally:
        del residency.capture  # type: ignore[method-assign]


class HeldOpen:
    """A guard that another thread is in until it is told to leave, perhaps by an exception."""

    def __init__(self, spawn: Spawn, guard: Any, act: Callable[[Any], object] = lambda x: None) -> None:
        self._go = threading.Event()
        self._entered = threading.Event()
        self._fails = False
        self._thread = spawn(self._hold, guard, act)
        assert self._entered.wait(PATIENCE)

    def _hold(self, guard: Any, act: Callable[[Any], object]) -> None:
        try:
            with guard as x:
                act(x)
                self._entered.set()
                assert self._go.wait(PATIENCE)
                if self._fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    def leave(self, *, fails: bool = False) -> None:
        self._fails = fails
        self._go.set()
        self._thread.result()


class MemoryStore:
    """Blobs in a dictionary: a store that has no files to link or to lend."""

    path = "memory"
    bytes_free = 1 << 40

    def __init__(self) -> None:
        self.blobs: dict[UUID, Frames] = {}
        self.deleted: list[UUID] = []

    def write(self, key: UUID, frames: Frames) -> int:
        buffers = [bytes(buffer) for buffer in frames.buffers]
        self.blobs[key] = Frames(frames.codec, bytes(frames.tree), buffers, frames.pickled)
        return frames.nbytes

    def read(self, key: UUID, *, writable: bool, verify: bool) -> Frames:
        try:
            kept = self.blobs[key]
        except KeyError:
            raise CorruptBlobError("it is gone", key=key, path=self.path) from None
        buffers = [bytearray(b) if writable else b for b in kept.buffers]
        return Frames(kept.codec, kept.tree, buffers, kept.pickled)

    def delete(self, key: UUID) -> None:
        self.deleted.append(key)
        self.blobs.pop(key, None)

    def locate(self, key: UUID) -> str:
        return f"memory:{key}"

    @property
    def disk_bytes(self) -> int:
        return sum(frames.nbytes for frames in self.blobs.values())

    def close(self) -> None:
        self.blobs.clear()
