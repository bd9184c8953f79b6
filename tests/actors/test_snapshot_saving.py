"""The writer: what is written, in which order, and what becomes of a write that fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fbcache.actors import MemoryStorage, NotPersistentError, PersistenceError, PersistenceKind
from fbcache.actors.saving import Saver
from fbcache.actors.storage import load, take
from fbcache.errors import DiskFullError
from tests.actors.counters import Counter, SlowStorage
from tests.faults import PATIENCE, oserror


class Noted:
    """A snapshot that notes what becomes of it."""

    def __init__(self, storage: SlowStorage, state: object) -> None:
        self._taken = take(storage, "x", state)
        self.discarded = 0

    def write(self) -> None:
        self._taken.write()

    def discard(self) -> None:
        self.discarded += 1
        self._taken.discard()


@pytest.fixture
def storage() -> SlowStorage:
    return SlowStorage()


@pytest.fixture
def saver() -> Saver:
    return Saver("x")


def test_save_does_not_wait_and_the_last_of_several_wins(storage: SlowStorage, saver: Saver) -> None:
    gate = storage.gate()
    snapshots = [Noted(storage, [n] * 1000) for n in range(6)]
    for each in snapshots:
        saver.save(each)
        if each is snapshots[0]:
            gate.wait_reached()
    assert [each.discarded for each in snapshots] == [0, 1, 1, 1, 1, 0]
    gate.open()
    saver.flush()
    assert len(storage.writes) == 2
    assert load(storage, "x") == [5] * 1000
    assert [each.discarded for each in snapshots] == [1] * 6, "each is given up once"


def test_threads_that_save_at_once_leave_one_whole_snapshot_of_theirs(
    storage: SlowStorage, saver: Saver, spawn: Any
) -> None:
    together = threading.Barrier(8)

    def save(number: int) -> None:
        together.wait(PATIENCE)
        for turn in range(20):
            saver.save(take(storage, "x", [number, turn] * 500))

    for thread in [spawn(save, number) for number in range(8)]:
        thread.result()
    saver.end()
    state = load(storage, "x")
    assert state[1] == 19 and state == state[:2] * 500
    assert storage.writes[-1] == storage.try_read("x")


def test_many_actors_that_save_at_once_each_keep_their_own_state() -> None:
    storage = MemoryStorage()
    refs = [Counter.spawn_persistent(storage, f"c{n}", n) for n in range(20)]
    for _ in range(10):
        futures = [ref.proxy().add(100) for ref in refs]
    for future in futures:
        future.get()
    for ref in refs:
        ref.finish()
    again = [Counter.respawn(storage, f"c{n}") for n in range(20)]
    assert [ref.proxy().get().get() for ref in again] == [1000 + n for n in range(20)]


def test_flush_returns_when_the_newest_is_stored(storage: SlowStorage, saver: Saver, spawn: Any) -> None:
    gate, second = storage.gate(), storage.gate()
    saver.save(take(storage, "x", 1))
    gate.wait_reached()
    saver.save(take(storage, "x", 2))
    flushing = spawn(saver.flush)
    gate.open()
    second.wait_reached()
    assert not flushing.done and load(storage, "x") == 1
    second.open()
    flushing.result()
    assert load(storage, "x") == 2


# ------------------------------------------------------------------ failures


def wait_idle(saver: Saver) -> None:
    with saver._settled:
        assert saver._settled.wait_for(lambda: not saver._writing, PATIENCE)


def test_a_failed_write_is_told_by_the_next_save_which_is_taken_all_the_same(
    storage: SlowStorage, saver: Saver
) -> None:
    storage.errors = [cause := oserror(5)]
    first = Noted(storage, 1)
    saver.save(first)
    wait_idle(saver)
    with pytest.raises(PersistenceError, match="cannot write the snapshot of actor 'x'") as caught:
        saver.save(take(storage, "x", 2))
    assert caught.value.kind is PersistenceKind.IO and caught.value.__cause__ is cause
    assert caught.value.actor_id == "x"
    saver.flush()
    assert load(storage, "x") == 2
    assert first.discarded == 1
    saver.save(take(storage, "x", 3))  # told once
    saver.end()


def test_flush_tries_the_failed_one_again_and_raises_if_that_fails_too(
    storage: SlowStorage, saver: Saver
) -> None:
    storage.errors = [oserror(5), oserror(5), oserror(28)]
    saver.save(take(storage, "x", 1))
    wait_idle(saver)
    for text in ("Input/output error", "No space left"):
        with pytest.raises(PersistenceError, match=text):
            saver.flush()
    saver.flush()
    assert load(storage, "x") == 1
    saver.flush()
    assert len(storage.writes) == 4


def test_a_failure_that_a_newer_snapshot_has_made_good_is_not_told(
    storage: SlowStorage, saver: Saver
) -> None:
    storage.errors = [oserror(5)]
    gate = storage.gate()
    first = Noted(storage, 1)
    saver.save(first)
    gate.wait_reached()
    saver.save(take(storage, "x", 2))
    gate.open()
    saver.flush()
    assert load(storage, "x") == 2 and first.discarded == 1
    saver.save(take(storage, "x", 3))
    saver.end()


def test_the_end_raises_gives_up_what_failed_and_takes_no_more(storage: SlowStorage, saver: Saver) -> None:
    storage.errors = [oserror(5)] * 2
    last, late = Noted(storage, 1), Noted(storage, 2)
    saver.save(last)
    wait_idle(saver)
    with pytest.raises(PersistenceError):
        saver.end()
    assert last.discarded == 1
    saver.end()
    with pytest.raises(NotPersistentError, match="has ended"):
        saver.save(late)
    assert late.discarded == 1 and len(storage.writes) == 2


def test_what_is_no_exception_does_not_hang_who_waits(storage: SlowStorage, saver: Saver) -> None:
    storage.errors = [SystemExit(3)] * 2
    saver.save(take(storage, "x", 1))
    wait_idle(saver)
    with pytest.raises(PersistenceError, match=r"SystemExit\(3\)"):
        saver.flush()
    saver.flush()
    assert load(storage, "x") == 1


def test_without_threads_to_be_had_the_caller_writes(
    storage: SlowStorage, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    saver.save(take(storage, "x", 1))
    assert load(storage, "x") == 1
    saver.end()


def test_errors_of_the_storage_keep_their_kind_and_text(storage: SlowStorage, saver: Saver) -> None:
    storage.errors = [DiskFullError("full; free some space", needed=5, free=1)] * 2
    saver.save(take(storage, "x", 1))
    wait_idle(saver)
    with pytest.raises(PersistenceError, match="full; free some space") as caught:
        saver.flush()
    assert isinstance(caught.value.__cause__, DiskFullError)


def test_no_thread_is_left_when_nothing_is_to_be_written(storage: SlowStorage, saver: Saver) -> None:
    before = set(threading.enumerate())
    saver.save(take(storage, "x", 1))
    saver.flush()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
    assert set(threading.enumerate()) <= before
