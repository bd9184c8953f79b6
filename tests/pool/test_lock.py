"""Invariant 5: the lock is not held during a system call on a file, nor while code of the user's runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fbcache import FBPool, FileStore, Frames, MsgpackCodec
from tests.faults import FaultyDisk

ITEM = 8192


class Watch:
    """Notes each call that was made with the lock in the caller's hands."""

    def __init__(self) -> None:
        self.lock: Any = None
        self.calls: set[str] = set()
        self.held: list[str] = []

    def note(self, call: str) -> None:
        self.calls.add(call)
        if self.lock is not None and self.lock._is_owned():
            self.held.append(call)


class WatchedDisk(FaultyDisk):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def _note(self, call: str) -> Any:
        self.watch.note(call)
        return super()._note(call)


class WatchedCodec(MsgpackCodec):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        self.watch.note("encode")
        return super().encode(value, allow_pickle=allow_pickle)

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        self.watch.note("decode")
        return super().decode(frames, writable=writable, allow_pickle=allow_pickle)


class Mortal:
    """A value that tells of being measured and of its end."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __sizeof__(self) -> int:
        self.watch.note("sizeof")
        return ITEM

    def __reduce__(self) -> Any:
        return (int, (0,))

    def __del__(self) -> None:
        self.watch.note("finalizer")


def test_invariant_5_no_lock_is_held_during_io_or_code_of_the_users(tmp_path: Path) -> None:
    watch = Watch()
    store = FileStore(str(tmp_path), disk=WatchedDisk(watch))
    with FBPool(4 * ITEM, store=store, codec=WatchedCodec(watch)) as pool:
        watch.lock = pool._engine.residency.lock
        pool.insert(Mortal(watch)).drop()  # it dies of a decision, and of nothing else
        for name in range(12):
            pool.put(name, np.full(ITEM // 8, float(name)))
            pool.put(("mortal", name), Mortal(watch))
        for name in range(12):
            with pool.get_mut(name, rollback=name % 2 == 0) as x:
                x += 1
            assert pool[name][0] == name + 1
            pool.delete(("mortal", name))
        with pool.put("shared", np.ones(ITEM // 8)).make_mut() as x:
            x += 1
        pool.evict()
        pool.drain()
    assert not watch.held
    assert {"open", "writev", "rename", "unlink", "encode", "decode", "sizeof", "finalizer"} <= watch.calls
