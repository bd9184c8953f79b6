"""Snapshots that an actor takes by itself: every so many messages, and so long after the first of them."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from pykka.messages import ProxyCall

from fbcache.actors import MemoryStorage, PersistenceError, PersistenceKind, PersistentActor
from fbcache.actors.schedule import Schedule, SystemClock
from fbcache.actors.storage import load
from tests.actors.counters import Counter, FakeClock, SlowStorage
from tests.faults import PATIENCE, oserror


class EveryThree(Counter):
    snapshot_every_messages = 3


class EveryTen(Counter):
    snapshot_every_seconds = 10.0


def saved(ref: Any, storage: Any) -> Any:
    """What is stored once all that was taken is; a look takes no part in the count."""
    ref._life.flush()
    return load(storage, ref.actor_id)


def test_every_third_message_is_followed_by_a_snapshot() -> None:
    storage = MemoryStorage()
    ref = EveryThree.spawn_persistent(storage, "c", 0)
    found = []
    for _ in range(7):
        ref.proxy().add_unsaved(1).get()
        ref.proxy().count.get()  # only looks, and comes after what was due
        ref._life.flush()
        found.append(load(storage, "c") if storage._snapshots else 0)
    assert found == [0, 0, 3, 3, 3, 6, 6]
    ref.finish()
    assert load(storage, "c") == 7, "and the last one when it stops"


def test_a_snapshot_of_the_users_own_begins_the_count_anew() -> None:
    storage = SlowStorage()
    ref = EveryThree.spawn_persistent(storage, "c", 0)
    ref.proxy().add_unsaved(1).get(), ref.proxy().add_unsaved(1).get()
    ref.proxy().save_snapshot().get()  # itself a message, after its own snapshot
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    assert saved(ref, storage) == 2
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    assert saved(ref, storage) == 4
    ref.finish()
    assert len(storage.writes) == 2, "nothing was left to be saved at the end"


def test_a_message_is_saved_by_the_clock_though_no_other_comes() -> None:
    storage, clock = MemoryStorage(), FakeClock()
    ref = EveryTen.spawn_persistent(storage, "c", 0, clock=clock)
    clock.advance(100)
    assert not clock.waiting, "an idle actor has no timer"
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    clock.advance(6)
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    assert (clock.calls, len(clock.waiting), storage._snapshots) == (1, 1, {})
    clock.advance(4)
    ref.proxy().count.get()
    assert saved(ref, storage) == 2
    clock.advance(100)
    ref.proxy().count.get()
    assert not clock.waiting
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    assert len(clock.waiting) == 1
    ref.finish()
    assert not clock.waiting, "the timer is cancelled"
    assert load(storage, "c") == 3


def test_a_message_that_comes_late_finds_the_snapshot_due_without_a_timer() -> None:
    storage, clock = MemoryStorage(), FakeClock()
    ref = EveryTen.spawn_persistent(storage, "c", 0, clock=clock)
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    clock.time += 10  # the timer is late
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    assert saved(ref, storage) == 2 and not clock.waiting


def test_a_timer_that_is_early_is_set_again() -> None:
    clock = FakeClock()
    schedule = Schedule(None, 10.0, clock)
    assert not schedule.handled(lambda: None)
    (_, wake), clock.waiting = clock.waiting[0], []
    clock.time = 9.0
    assert not schedule.woken(wake)
    assert [at for at, _ in clock.waiting] == [10.0]
    clock.time = 10.0
    assert schedule.woken(wake)
    schedule.taken()
    assert not schedule.woken(wake), "a timer that was under way when a snapshot was taken"


def test_a_timer_after_the_end_does_nothing() -> None:
    storage, clock = MemoryStorage(), FakeClock()
    ref = EveryTen.spawn_persistent(storage, "c", 0, clock=clock)
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    ((_, wake),) = clock.waiting
    ref.finish()
    wake()


def test_the_system_clock_calls_and_can_be_stopped() -> None:
    clock, called = SystemClock(), threading.Event()
    clock.call_later(0.0, called.set)
    assert called.wait(PATIENCE)
    clock.call_later(1000.0, called.set)()
    assert clock.now() <= clock.now()


def test_a_due_snapshot_that_fails_leaves_the_answer_and_the_actor_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[PersistenceError] = []

    class Listening(EveryThree):
        def take_snapshot(self) -> Any:
            return object() if self.count == 3 else self.count

        def on_snapshot_failed(self, error: PersistenceError) -> None:
            heard.append(error)
            super().on_snapshot_failed(error)

    storage = MemoryStorage()
    ref = Listening.spawn_persistent(storage, "c", 0)
    with caplog.at_level(logging.ERROR):
        assert [ref.proxy().add_unsaved(1).get() for _ in range(3)] == [1, 2, 3]
        ref.proxy().count.get()
    assert [error.kind for error in heard] == [PersistenceKind.SERIALIZE]
    assert "a snapshot of actor 'c' failed" in caplog.text
    ref.proxy().add_unsaved(1).get()
    ref.finish()
    assert load(storage, "c") == 4


def test_a_state_that_was_due_and_not_saved_is_tried_again_at_the_end() -> None:
    class Late(EveryThree):
        def take_snapshot(self) -> Any:
            if self.step == 1:
                return object()
            return self.count

    storage = MemoryStorage()
    ref = Late.spawn_persistent(storage, "c", 0)
    for _ in range(3):
        ref.proxy().add_unsaved(1).get()
    ref.proxy().step = 2
    ref.finish()
    assert load(storage, "c") == 3


def test_a_write_that_failed_is_heard_of_when_the_next_snapshot_is_due() -> None:
    heard: list[PersistenceError] = []

    class Listening(EveryThree):
        def on_snapshot_failed(self, error: PersistenceError) -> None:
            heard.append(error)

    storage = SlowStorage()
    storage.errors = [oserror(5)]
    ref = Listening.spawn_persistent(storage, "c", 0)
    for _ in range(3):
        ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    saver = next(iter(ref._life._channels.values())).saver
    with saver._settled:
        saver._settled.wait_for(lambda: not saver._writing, PATIENCE)
    for _ in range(3):
        ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    assert [error.kind for error in heard] == [PersistenceKind.IO]
    ref.finish()
    assert load(storage, "c") == 6


def test_a_last_snapshot_that_cannot_be_taken_is_raised_by_finish() -> None:
    class Broken(EveryThree):
        def take_snapshot(self) -> int:
            raise ZeroDivisionError

    ref = Broken.spawn_persistent(MemoryStorage(), "c", 0)
    ref.proxy().add_unsaved(1).get()
    with pytest.raises(PersistenceError, match="ZeroDivisionError") as caught:
        ref.finish()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_crash_takes_no_snapshot() -> None:
    storage = MemoryStorage()
    ref = EveryThree.spawn_persistent(storage, "c", 0)
    for _ in range(4):
        ref.proxy().add_unsaved(1).get()
    ref.tell(ProxyCall(("die",), (), {}))
    assert ref._life.ended.wait(PATIENCE)
    assert load(storage, "c") == 3


def test_a_crash_cancels_the_timer() -> None:
    storage, clock = MemoryStorage(), FakeClock()
    ref = EveryTen.spawn_persistent(storage, "c", 0, clock=clock)
    ref.proxy().add_unsaved(1).get()
    ref.proxy().count.get()
    assert clock.waiting
    ref.tell(ProxyCall(("die",), (), {}))
    ref.finish()
    assert not clock.waiting and not storage._snapshots


def test_an_actor_that_does_not_say_what_to_save_is_refused_at_once() -> None:
    class Silent(PersistentActor):
        snapshot_every_messages = 1

    with pytest.raises(TypeError, match="override take_snapshot"):
        Silent.spawn_persistent(MemoryStorage(), "c")


@pytest.mark.parametrize(("messages", "seconds"), [(0, None), (-1, None), (None, 0.0), (None, float("nan"))])
def test_numbers_that_make_no_sense_are_refused(messages: Any, seconds: Any) -> None:
    with pytest.raises(ValueError, match="give positive numbers"):
        Schedule(messages, seconds, FakeClock())
