"""A store that fails to record stops its saga before the next step, visibly; and it can be resumed."""

from __future__ import annotations

import sqlite3
import threading
from uuid import uuid4

import pytest

from fbcache.saga import (
    DagBuilder,
    InMemorySagaStore,
    SagaExecutor,
    SagaExistsError,
    SagaFailedError,
    SagaLog,
    SagaStatus,
    SagaStoppedError,
    SagaStoreError,
    SqliteSagaStore,
)
from tests.faults import PATIENCE, Gate
from tests.saga.sagas import DIAMOND, TWO, Acts, RecordingStore, TripStore, chain, dag_of, ended, of, run


def fail():
    raise OSError(28, "No space left on device")


WAYS = [
    pytest.param(TWO, (), type(None), id="two-done"),
    pytest.param(TWO, ("n2",), SagaFailedError, id="two-failed"),
    pytest.param(DIAMOND, (), type(None), id="diamond-done"),
    pytest.param(DIAMOND, ("d",), SagaFailedError, id="diamond-failed"),
]


@pytest.mark.parametrize("after", [False, True], ids=["not recorded", "recorded"])
@pytest.mark.parametrize(("dag", "fails", "end"), WAYS)
@pytest.mark.parametrize("kind", ["sqlite", "memory"])
def test_a_write_that_fails_stops_the_saga_which_can_be_resumed(tmp_path, kind, dag, fails, end, after):
    nth = 1
    while True:
        nth += 1  # the first is the create, which has a test of its own
        acts, saga_id = Acts(fails), uuid4()
        real = SqliteSagaStore(tmp_path / str(nth)) if kind == "sqlite" else RecordingStore()
        store = TripStore(real, fail, nth, after=after, onwards=True)
        with SagaExecutor(store, acts.registry) as executor:
            future = run(executor, dag, saga_id=saga_id)
            error = ended(future)
            if store.writes < nth:
                assert type(error) is end and nth > 5
                break
            assert isinstance(error, SagaStoppedError) and isinstance(error.__cause__, OSError), nth
            assert "No space left" in str(error)
            view = executor.saga_get(saga_id)
            assert view.status is SagaStatus.STOPPED and "No space left" in view.trouble
            assert [each.status for each in executor.saga_list()] == [SagaStatus.STOPPED]
            if kind == "memory" and not after:
                log = SagaLog.recover(saga_id, dag, real.events)
                assert view.states == log.states, "what is shown is what is recorded"
            if not after:
                recorded = real.events if kind == "memory" else real.saga_load(saga_id).events
                starts = [event for event in of(recorded) if event.startswith("STARTED")]
                assert len(acts.done) == len(starts), "nothing runs whose start is not recorded"
            store.armed = False  # the disk has room again
            future = executor.saga_resume(saga_id)
            executor.saga_start(saga_id)
            assert type(ended(future)) is end
        if kind == "sqlite":
            assert real.saga_list(unfinished=True) == []
    if kind == "sqlite":
        real.close()


def test_a_failed_outcome_is_followed_by_no_step_but_others_in_flight_end():
    gate, tripped = Gate(), threading.Event()

    def fail_and_tell():
        tripped.set()
        fail()

    store = TripStore(RecordingStore(), fail_and_tell, 4)  # create, two starts, and the first outcome
    acts = Acts()
    registry = acts.registry
    registry.register("block", lambda _: gate.pass_through())
    builder = DagBuilder().add("quick", "act").add("slow", "block").add("below", "act", after="slow")
    dag = builder.add("after", "act", after="quick").build()
    with SagaExecutor(store, registry, threads=2) as executor:
        future = run(executor, dag)
        gate.wait_reached()
        assert tripped.wait(PATIENCE)
        assert ended(run(executor, chain("other"))) is None  # the driver has come round meanwhile
        assert not future.done(), "one of its actions still runs"
        assert executor.saga_list()[0].status is SagaStatus.STOPPED
        gate.open()
        assert isinstance(ended(future), SagaStoppedError)
        events = [event for event in of(store.store.events) if "other" not in event]
        assert events == ["STARTED quick", "STARTED slow", "SUCCEEDED slow"]
    assert acts.counts("quick", "after", "below") == ((1, 0), (0, 0), (0, 0))


def test_what_is_in_line_when_its_saga_is_stopped_does_not_run():
    store = TripStore(RecordingStore(), fail, 3)  # create, a start, and its outcome
    acts = Acts()
    with SagaExecutor(store, acts.registry, threads=1) as executor:
        assert isinstance(ended(run(executor, dag_of(a="", b="", c=""))), SagaStoppedError)
        assert ended(run(executor, chain("other"))) is None
    assert acts.journal == ["+a", "+other"]


@pytest.mark.parametrize("threads", [1, 4])
def test_other_sagas_go_on_when_one_is_stopped(threads):
    class Selective(InMemorySagaStore):
        def record_event(self, event):
            if event.saga_id == bad:
                raise OSError(5, "Input/output error")

    bad = uuid4()
    acts = Acts()
    with SagaExecutor(Selective(), acts.registry, threads=threads) as executor:
        stopped = run(executor, TWO, saga_id=bad)
        others = [run(executor, DIAMOND) for _ in range(3)]
        assert isinstance(ended(stopped), SagaStoppedError)
        assert [ended(other) for other in others] == [None] * 3
    assert acts.counts("n1") == ((0, 0),)


def test_a_create_that_fails_raises_and_leaves_no_saga():
    store = TripStore(RecordingStore(), fail, 1)
    with SagaExecutor(store, Acts().registry) as executor:
        saga_id = uuid4()
        with pytest.raises(OSError, match="No space"):
            executor.saga_create(saga_id, "test", TWO)
        assert executor.saga_list() == []
        assert ended(run(executor, TWO, saga_id=saga_id)) is None, "the id can be used"


def test_a_stopped_saga_whose_store_cannot_be_read_stays_stopped(tmp_path):
    real = SqliteSagaStore(tmp_path / "sagas")
    store = TripStore(real, fail, 3)
    with SagaExecutor(store, Acts().registry) as executor:
        saga_id = uuid4()
        assert isinstance(ended(run(executor, TWO, saga_id=saga_id)), SagaStoppedError)
        real.close()
        with pytest.raises(SagaStoreError, match="closed"):
            executor.saga_resume(saga_id)
        assert executor.saga_get(saga_id).status is SagaStatus.STOPPED


def test_a_file_that_turns_bad_in_the_middle_stops_the_saga(tmp_path):
    gate = Gate()
    acts = Acts()
    registry = acts.registry
    registry.register("block", lambda _: gate.pass_through())
    dag = DagBuilder().add("a", "block").add("b", "act", after="a").build()
    with SqliteSagaStore(tmp_path / "sagas") as store, SagaExecutor(store, registry) as executor:
        saga_id = uuid4()
        future = run(executor, dag, saga_id=saga_id)
        gate.wait_reached()
        with sqlite3.connect(tmp_path / "sagas") as other:
            other.execute("DROP TABLE event")
        other.close()
        gate.open()
        error = ended(future)
        assert isinstance(error, SagaStoppedError) and isinstance(error.__cause__, SagaStoreError)
        assert "no such table" in str(error)
    assert acts.journal == []


def test_creating_twice_at_once_makes_one_saga(spawn):
    gate = Gate()

    class Slow(InMemorySagaStore):
        def saga_create(self, params):
            gate.pass_through()

    with SagaExecutor(Slow(), Acts().registry) as executor:
        saga_id = uuid4()
        first = spawn(executor.saga_create, saga_id, "test", TWO)
        gate.wait_reached()
        with pytest.raises(SagaExistsError, match="being created"):
            executor.saga_create(saga_id, "test", TWO)
        with pytest.raises(KeyError):
            executor.saga_start(saga_id)
        gate.open()
        future = first.result()
        executor.saga_start(saga_id)
        assert future.result(PATIENCE).lookup("n1") == "n1"


def test_a_slow_create_holds_up_no_other_call(spawn):
    gate = Gate()

    class Slow(InMemorySagaStore):
        def saga_create(self, params):
            if params.name == "slow":
                gate.pass_through()

    with SagaExecutor(Slow(), Acts().registry) as executor:
        slow = spawn(executor.saga_create, uuid4(), "slow", TWO)
        gate.wait_reached()
        assert ended(run(executor, chain("a"))) is None
        assert len(executor.saga_list()) == 1
        gate.open()
        slow.result()
