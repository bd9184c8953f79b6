"""Recovery: from every part of a log, and after a SIGKILL at every write of a running saga."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from uuid import uuid4

import pytest

from fbcache.saga import (
    ActionFailedError,
    ActionRegistry,
    CorruptSagaError,
    DagBuilder,
    ImpossiblePairError,
    InMemorySagaStore,
    SagaCachedState,
    SagaExecutor,
    SagaFailedError,
    SagaNodeEvent,
    SagaStatus,
    SagaStuckError,
    SqliteSagaStore,
    UnknownActionError,
)
from fbcache.saga.encoding import encode
from tests.faults import PATIENCE
from tests.saga.sagas import (
    DIAMOND,
    FAILED,
    STARTED,
    SUCCEEDED,
    TWO,
    UNDO_FAILED,
    UNDO_FINISHED,
    Acts,
    RecordingStore,
    TripStore,
    chain,
    dag_of,
    ended,
    of,
    recorded,
    run,
)

#: How a saga can go: its DAG, which actions fail, which undos fail, and how it ends.
WAYS = [
    pytest.param(TWO, (), (), SagaStatus.DONE, id="two-done"),
    pytest.param(TWO, ("n2",), (), SagaStatus.FAILED, id="two-failed"),
    pytest.param(TWO, ("n2",), ("n1",), SagaStatus.STUCK, id="two-stuck"),
    pytest.param(TWO, ("n1",), (), SagaStatus.FAILED, id="two-first-failed"),
    pytest.param(DIAMOND, (), (), SagaStatus.DONE, id="diamond-done"),
    pytest.param(DIAMOND, ("d",), (), SagaStatus.FAILED, id="diamond-failed"),
    pytest.param(DIAMOND, ("c",), (), SagaStatus.FAILED, id="diamond-branch-failed"),
    pytest.param(DIAMOND, ("d",), ("b",), SagaStatus.STUCK, id="diamond-stuck"),
]

ERRORS = {SagaStatus.DONE: type(None), SagaStatus.FAILED: SagaFailedError, SagaStatus.STUCK: SagaStuckError}


def calls(events, before):
    """How often recovery must call each action and undo, given the events before and all there are then."""
    had, has = Counter(of(before)), Counter(of(events))
    done, undone = Counter(), Counter()
    for each in events:
        node = each.node
        for counter, outcomes in ((done, (SUCCEEDED, FAILED)), (undone, (UNDO_FINISHED, UNDO_FAILED))):
            names = [f"{kind.name} {node}" for kind in outcomes]
            if any(has[name] for name in names) and not any(had[name] for name in names):
                counter[node] = 1
    return done, undone


@pytest.mark.parametrize(("dag", "fails", "undo_fails", "status"), WAYS)
def test_every_truncation_of_a_log_is_recovered_to_the_same_end(dag, fails, undo_fails, status):
    whole = recorded(dag, Acts(fails, undo_fails))
    saga_id = whole[0].saga_id
    for length in range(len(whole) + 1):
        acts, store = Acts(fails, undo_fails), RecordingStore()
        with SagaExecutor(store, acts.registry) as executor:
            future = executor.saga_resume(saga_id, "test", dag, events=whole[:length])
            executor.saga_start(saga_id)
            assert type(ended(future)) is ERRORS[status], length
            assert executor.saga_get(saga_id).status is status
        everything = whole[:length] + store.events
        assert len(set(of(everything))) == len(everything), "nothing is recorded twice"
        assert (acts.done, acts.undone) == calls(everything, whole[:length]), "nothing finished is run again"


def test_a_started_action_is_run_again_also_when_the_saga_goes_backwards():
    events = [("a", STARTED), ("a", SUCCEEDED, encode("a")), ("b", STARTED), ("c", STARTED), ("b", FAILED)]
    acts, store, saga_id = Acts(), RecordingStore(), uuid4()
    with SagaExecutor(store, acts.registry) as executor:
        log = [SagaNodeEvent(saga_id, *event) for event in events]
        future = executor.saga_resume(saga_id, "test", DIAMOND, events=log)
        executor.saga_start(saga_id)
        assert isinstance(ended(future), SagaFailedError)
    assert acts.journal == ["+c", "-c", "-a"], "only what has ended can be undone"


def test_the_failure_that_an_earlier_process_recorded_is_told():
    whole = recorded(TWO, Acts(fails=["n2"]))
    saga_id = whole[0].saga_id
    with SagaExecutor(InMemorySagaStore(), Acts().registry) as executor:
        future = executor.saga_resume(saga_id, "test", TWO, events=whole)
        executor.saga_start(saga_id)
        error = ended(future)
    assert error.failures == {"n2": "ValueError: n2 cannot"}
    assert isinstance(error.__cause__, ActionFailedError)


def test_an_impossible_log_is_refused_and_leaves_no_saga():
    saga_id = uuid4()
    with SagaExecutor(InMemorySagaStore(), Acts().registry) as executor:
        with pytest.raises(ImpossiblePairError):
            executor.saga_resume(saga_id, "test", TWO, events=[SagaNodeEvent(saga_id, "n2", STARTED)])
        assert executor.saga_list() == []
        executor.saga_resume(saga_id, "test", TWO, events=[])


def test_a_store_that_does_not_recover_recovers_nothing():
    store = InMemorySagaStore()
    with SagaExecutor(store, Acts().registry) as executor:
        assert not store.recovers
        future = run(executor, TWO)
        assert executor.recover() == {}
        assert ended(future) is None
        assert store.saga_list() == []


def test_with_one_thread_started_actions_in_line_are_run_again_when_one_fails():
    saga_id, dag = uuid4(), dag_of(a="", b="", c="")
    acts = Acts(fails=["a"])
    with SagaExecutor(InMemorySagaStore(), acts.registry, threads=1) as executor:
        log = [SagaNodeEvent(saga_id, node, STARTED) for node in "ab"]
        future = executor.saga_resume(saga_id, "test", dag, events=log)
        executor.saga_start(saga_id)
        assert isinstance(ended(future), SagaFailedError)
    assert acts.journal == ["+a", "+b", "-b"]


def test_a_program_that_ends_without_shutdown_ends_and_can_be_recovered(tmp_path):
    script = """
        import asyncio, sys, threading
        from uuid import uuid4
        from fbcache.saga import DagBuilder, SagaExecutor, SqliteSagaStore

        begun = threading.Barrier(3)

        def act(context):
            if context.node == "a":
                begun.wait()

        async def aact(context):
            begun.wait()
            await asyncio.Event().wait()

        dag = DagBuilder().add("a", "act").add("b", "aact").add("c", "act", after="a").build()
        store = SqliteSagaStore(sys.argv[1])
        executor = SagaExecutor(store, {"act": act, "aact": aact})
        saga_id = uuid4()
        executor.saga_create(saga_id, "test", dag)
        executor.saga_start(saga_id)
        begun.wait()
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path / "sagas")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    actions = ActionRegistry()
    actions.register("act", lambda _: 1)
    actions.register("aact", lambda _: 2)
    with SqliteSagaStore(tmp_path / "sagas") as store, SagaExecutor(store, actions) as executor:
        (future,) = executor.recover().values()
        assert future.result(PATIENCE).outputs["b"] == 2


# ------------------------------------------------------------------ from a file


def test_recovery_takes_up_what_is_not_done_and_nothing_else(tmp_path):
    ready, done, failed, stuck = (uuid4() for _ in range(4))
    with SqliteSagaStore(tmp_path / "sagas") as store:
        with SagaExecutor(store, Acts().registry) as executor:
            executor.saga_create(ready, "ready", TWO)
            ended(run(executor, TWO, saga_id=done))
        with SagaExecutor(store, Acts(["n2"]).registry) as executor:
            ended(run(executor, TWO, saga_id=failed))
        with SagaExecutor(store, Acts(["n2"], ["n1"]).registry) as executor:
            ended(run(executor, TWO, saga_id=stuck))
    acts = Acts()
    with SqliteSagaStore(tmp_path / "sagas") as store, SagaExecutor(store, acts.registry) as executor:
        futures = executor.recover()
        assert set(futures) == {ready, stuck}
        assert futures[ready].result(PATIENCE).lookup("n2") == "n2"
        error = ended(futures[stuck])
        assert isinstance(error, SagaStuckError) and list(error.undo_failures) == ["n1"]
        assert executor.saga_get(stuck).status is SagaStatus.STUCK, "listed as such, in the next process too"
        assert executor.saga_get(ready).name == "ready"
        assert acts.journal == ["+n1", "+n2"]
        assert executor.recover() == {}, "those that it has it leaves alone"
        assert store.saga_list(unfinished=True) == [stuck]


def test_recovery_without_start_lets_faults_be_injected(tmp_path):
    saga_id = uuid4()
    with SqliteSagaStore(tmp_path / "sagas") as store:
        with SagaExecutor(store, Acts().registry) as executor:
            executor.saga_create(saga_id, "test", TWO)
        with SagaExecutor(store, Acts().registry) as executor:
            futures = executor.recover(start=False)
            executor.saga_inject_error(saga_id, "n2")
            executor.saga_start(saga_id)
            assert isinstance(ended(futures[saga_id]), SagaFailedError)


def test_a_saga_that_cannot_be_resumed_keeps_no_other_from_it(tmp_path):
    good, odd, foreign, damaged, impossible = (uuid4() for _ in range(5))
    registry = ActionRegistry()
    registry.register("ghost", len)
    with SqliteSagaStore(tmp_path / "sagas") as store:
        with SagaExecutor(store, registry) as executor:
            executor.saga_create(odd, "odd", DagBuilder().add("a", "ghost").build())
        with SagaExecutor(store, Acts().registry) as executor:
            for saga_id in (foreign, damaged, impossible, good):
                executor.saga_create(saga_id, "test", TWO)
        store.record_event(SagaNodeEvent(foreign, "ghost", STARTED))
        store.record_event(SagaNodeEvent(impossible, "n2", STARTED))
        store.record_event(SagaNodeEvent(damaged, "n1", STARTED))
        store._connection.execute("UPDATE event SET kind = 77 WHERE saga = 3")
        before = store.saga_list(unfinished=True)
        with SagaExecutor(store, Acts().registry) as executor:
            futures = executor.recover()
            assert ended(futures[good]) is None
            assert isinstance(ended(futures[odd]), UnknownActionError)
            assert isinstance(ended(futures[foreign]), ValueError)
            assert isinstance(ended(futures[damaged]), CorruptSagaError)
            assert isinstance(ended(futures[impossible]), ImpossiblePairError)
        assert store.saga_list(unfinished=True) == before[:-1], "they are left as they are"


# ------------------------------------------------------------------ killed


class Journal:
    """Calls of actions, one line each, in a file that survives its process."""

    def __init__(self, path, fails=(), undo_fails=()):
        self.path = path
        self.fails = fails
        self.undo_fails = undo_fails

    @property
    def registry(self):
        registry = ActionRegistry()
        registry.register("act", self.do, self.undo)
        return registry

    def note(self, text):
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{text}\n".encode())
        os.close(fd)

    def lines(self):
        return self.path.read_text().split() if self.path.exists() else []

    def do(self, context):
        self.note(f"+{context.node}")
        if context.node in self.fails:
            raise ValueError(context.node)
        return context.node

    def undo(self, context):
        self.note(f"-{context.node}")
        if context.node in self.undo_fails:
            raise ValueError(context.node)


def in_a_child(work):
    """Run ``work`` in a forked process; return its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def life(path, journal, dag, saga_id, nth, after):
    """What a process does that is killed at its n-th write."""

    def work():
        with SqliteSagaStore(path) as real:
            store = TripStore(real, kill, nth, after=after)
            with SagaExecutor(store, journal.registry) as executor:
                ended(run(executor, dag, saga_id=saga_id))

    return work


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("dag", "fails", "undo_fails", "status"), WAYS)
def test_a_saga_killed_at_any_write_is_recovered(tmp_path, dag, fails, undo_fails, status, after):
    for nth in range(1, 100):
        path, journal = tmp_path / f"{nth}.sqlite", Journal(tmp_path / f"{nth}.journal", fails, undo_fails)
        saga_id = uuid4()
        exit_status = in_a_child(life(path, journal, dag, saga_id, nth, after))
        if exit_status == 0:
            assert nth > 4, "it was killed at each of several writes"
            return
        assert os.WTERMSIG(exit_status) == signal.SIGKILL
        had = journal.lines()
        with SqliteSagaStore(path) as store:
            left = store.saga_list(unfinished=True)
            before = list(store.saga_load(saga_id).events) if store.saga_list() else []
            with SagaExecutor(store, journal.registry) as executor:
                futures = executor.recover()
                assert set(futures) == set(left)
                for future in futures.values():
                    assert type(ended(future)) is ERRORS[status]
            if not store.saga_list():
                assert (nth, after, had) == (1, False, []), "only an unrecorded saga is gone"
                continue
            record = store.saga_load(saga_id)
            if status is not SagaStatus.STUCK:
                assert record.params.state is SagaCachedState.DONE
        done, undone = calls(record.events, before)
        again = Counter(journal.lines()[len(had) :])
        assert again == Counter([f"+{node}" for node in done] + [f"-{node}" for node in undone])
        total = Counter(journal.lines())
        for event in record.events:  # whatever has an outcome was called, twice at most
            if event.kind in (SUCCEEDED, FAILED):
                assert 1 <= total[f"+{event.node}"] <= 2
            if event.kind is UNDO_FINISHED:
                assert 1 <= total[f"-{event.node}"] <= 2
    raise AssertionError("it never came to its end")


def test_recovery_that_is_killed_at_every_write_in_turn_comes_to_the_end(tmp_path):
    path, journal, saga_id = tmp_path / "sagas", Journal(tmp_path / "journal", fails=("c",)), uuid4()
    dag = chain("a", "b", "c")

    def work():
        with SqliteSagaStore(path) as real:
            store = TripStore(real, kill, 1, after=True)  # each process gets one write further
            with SagaExecutor(store, journal.registry) as executor:
                futures = executor.recover()
                if real.saga_list():
                    for future in futures.values():
                        ended(future)
                else:
                    ended(run(executor, dag, saga_id=saga_id))

    lives = 0
    while in_a_child(work):
        lives += 1
        assert lives < 50
    with SqliteSagaStore(path, readonly=True) as store:
        events = of(store.saga_load(saga_id).events)
    assert lives == 1 + len(events) + 2, "create, every event, and two states"
    assert [event for event in events if "UNDO_FINISHED" in event] == ["UNDO_FINISHED b", "UNDO_FINISHED a"]
