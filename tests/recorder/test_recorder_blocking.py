"""A recorder on a thread of its own is the same recorder."""

from __future__ import annotations

import threading

import pytest

from fbcache.errors import DeadlockError
from fbcache.recorder import (
    MemoryStorage,
    Phase,
    Query,
    Recorder,
    RecorderClosedError,
    RecorderError,
    RecorderFullError,
    Retry,
)
from tests.faults import PATIENCE
from tests.recorder.gated import GatedStorage, patient


def test_it_saves_loads_and_closes_without_a_loop_of_the_users():
    with Recorder.start(storage := MemoryStorage()) as recorder:
        recorder.save({"kind": "a"})
        recorder.save({"kind": "b"})
        assert recorder.records(Query(kind="b")) == [{"kind": "b"}]
        assert recorder.phase is Phase.OPEN and recorder.pending == 0
    assert recorder.close() is storage
    assert len(storage.records) == 2
    assert "closed" in repr(recorder)
    with pytest.raises(RecorderClosedError):
        recorder.records()


def test_saves_while_the_storage_is_busy_are_one_bulk_that_a_load_cuts(spawn):
    storage = GatedStorage()
    storage.shut()
    with Recorder.start(storage) as recorder:
        recorder.save(0)
        assert storage.entered.wait(PATIENCE)
        recorder.save(1)
        recorder.save(2)
        before = len(recorder._core._questions)
        load = spawn(recorder.records)
        while len(recorder._core._questions) == before and not load.done:
            pass
        recorder.save(3)
        storage.open()
        assert load.result() == [0, 1, 2]
    assert storage.bulks == [(0,), (1, 2), (3,)]


def test_a_failure_surfaces_and_close_can_be_called_again():
    storage = GatedStorage([OSError("full")] * 6)
    recorder = Recorder.start(storage, retry=patient(2)[0])
    recorder.save(1)
    while len(storage.attempts) < 2 or recorder._core._task is not None:
        pass
    with pytest.raises(RecorderError, match="full"):
        recorder.records()
    with pytest.raises(RecorderError) as caught:
        recorder.close()
    assert caught.value.unsaved == (1,)
    assert recorder.close() is storage
    assert storage.records == [1]


def test_max_pending_holds_for_it_too():
    storage = GatedStorage()
    storage.shut()
    with Recorder.start(storage, max_pending=1) as recorder:
        recorder.save(1)
        with pytest.raises(RecorderFullError):
            recorder.save(2)
        storage.open()


def test_a_storage_that_asks_its_own_recorder_is_told_and_not_hung():
    class Curious(MemoryStorage):
        async def load(self, query=None, /):
            return recorder.records()

    recorder = Recorder.start(Curious())
    with pytest.raises(DeadlockError):
        recorder.records()
    recorder.close()


def test_two_threads_may_close_at_once(spawn):
    storage = GatedStorage()
    storage.shut()
    recorder = Recorder.start(storage)
    recorder.save(1)
    closes = [spawn(recorder.close) for _ in range(3)]
    assert storage.entered.wait(PATIENCE)
    storage.open()
    assert [close.result() for close in closes] == [storage] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_that_dies_of_its_storage_leaves_the_records_to_be_had():
    storage = GatedStorage([SystemExit(3)])
    storage.shut()
    recorder = Recorder.start(storage, retry=Retry(delays=()))
    recorder.save(1)
    assert storage.entered.wait(PATIENCE)
    storage.open()
    recorder._host.join()
    with pytest.raises(RecorderError, match="gone") as caught:
        recorder.close()
    assert caught.value.unsaved == (1,)
    recorder._core.forsake()


def test_no_thread_is_left_behind():
    before = threading.active_count()
    for _ in range(3):
        Recorder.start(MemoryStorage()).close()
    assert threading.active_count() == before
