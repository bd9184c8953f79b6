"""Pipelines: results that outlive the process, and which steps run again."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from uuid import UUID, uuid4

import numpy as np
import pytest

from fbcache import CorruptBlobError, FBCacheWarning, TrackedDirectory
from fbcache.saga import (
    InMemorySagaStore,
    Pipeline,
    PipelineError,
    SagaCreateParams,
    SagaDag,
    SagaExecutor,
    SagaFailedError,
    SagaStatus,
    SagaStoppedError,
    SagaView,
    SqliteSagaStore,
)
from tests.faults import Gate
from tests.saga.sagas import TWO, TripStore

SIZE = 20_000


class World:
    """A pool, a tracked directory and a store, all of which can be opened anew; and calls of steps."""

    def __init__(self, tmp_path, make_pool):
        self.path = tmp_path
        self.make_pool = make_pool
        self.calls = []
        self.open()

    def open(self):
        self.pool = self.make_pool("4MB")
        self.tracked = TrackedDirectory(self.path / "results")
        self.store = SqliteSagaStore(self.path / "runs.sqlite")

    def close(self):
        self.store.close()
        self.tracked.close()
        self.pool.close()

    def reopen(self):
        self.close()
        self.open()

    def pipeline(self, *, factor_in_source=2, offset=1, fail=(), store=None, name="test"):
        """load -> double, shift -> join, with a side step that waits for load."""
        pipeline = Pipeline(self.pool, self.tracked, store or self.store, name)
        note = Note(self.calls, fail)

        @pipeline.step
        def load(size):
            note("load")
            return np.arange(float(size))

        if factor_in_source == 2:

            @pipeline.step
            def double(load):
                note("double")
                return load * 2

        else:

            @pipeline.step
            def double(load):
                note("double")
                return load * 3

        @pipeline.step
        def shift(load, by=offset):
            note("shift")
            return load + by

        @pipeline.step
        def join(double, shift, scale=1.0):
            note("join")
            return {"sum": float((double + shift).sum() * scale), "n": len(double)}

        @pipeline.step(after="load")
        def side():
            note("side")

        return pipeline

    def called(self):
        calls, self.calls[:] = sorted(self.calls), []
        return calls


class Note:
    """Notes calls; its type has no encoder, so its state is not part of a fingerprint."""

    def __init__(self, calls, fail):
        self.calls = calls
        self.fail = fail

    def __call__(self, name):
        self.calls.append(name)
        if name in self.fail:
            raise ValueError(name)


ALL = ["double", "join", "load", "shift", "side"]
TOTAL = float((np.arange(float(SIZE)) * 2 + np.arange(float(SIZE)) + 1).sum())


@pytest.fixture
def world(tmp_path, make_pool):
    world = World(tmp_path, make_pool)
    yield world
    world.close()


def test_a_run_computes_every_step_and_its_results_are_in_the_pool(world):
    result = world.pipeline().run(size=SIZE)
    assert world.called() == ALL == sorted(result.computed)
    assert list(result) == ["load", "double", "shift", "join", "side"] and len(result) == 5
    assert result.value("join") == {"sum": TOTAL, "n": SIZE}
    assert result.value("side") is None
    assert world.pool["test", "join"]["n"] == SIZE
    with result["double"].load() as double:
        assert double[3] == 6.0
        assert not double.flags.writeable


def test_results_are_durable_before_the_log_has_their_keys(world, monkeypatch):
    order = []
    sync, record = TrackedDirectory.sync, SqliteSagaStore.record_event

    def noted_sync(self):
        sync(self)
        order.append("sync")

    def noted_record(self, event):
        order.append(event.kind.name)
        record(self, event)

    monkeypatch.setattr(TrackedDirectory, "sync", noted_sync)
    monkeypatch.setattr(SqliteSagaStore, "record_event", noted_record)
    pipeline = Pipeline(world.pool, world.tracked, world.store, "order")
    pipeline.step(lambda: 1, name="one")
    pipeline.run()
    assert order == ["STARTED", "sync", "SUCCEEDED"]


def test_resume_loads_what_was_finished(world):
    world.pipeline().run(size=SIZE)
    world.called()
    for _ in range(2):
        world.reopen()
        result = world.pipeline().resume()
        assert world.called() == [] and result.computed == frozenset()
        assert result.value("join") == {"sum": TOTAL, "n": SIZE}
        assert np.array_equal(result.value("load"), np.arange(float(SIZE)))


def test_run_computes_all_again(world):
    world.pipeline().run(size=SIZE)
    world.called()
    assert sorted(world.pipeline().run(size=SIZE).computed) == ALL == world.called()


def test_resume_takes_the_newest_of_several_results(world):
    world.pipeline().run(size=SIZE)
    newer = world.pipeline().run(size=SIZE)
    result = world.pipeline().resume()
    assert {name: fb.key for name, fb in result.items()} == {name: fb.key for name, fb in newer.items()}


def test_a_pipeline_of_another_name_has_results_of_its_own(world):
    world.pipeline().run(size=SIZE)
    assert sorted(world.pipeline(name="other").resume(size=SIZE).computed) == ALL


def test_resume_with_nothing_recorded_runs(world):
    assert sorted(world.pipeline().resume(size=SIZE).computed) == ALL


@pytest.mark.parametrize(
    ("change", "arguments", "again"),
    [
        pytest.param({"factor_in_source": 3}, {}, ["double", "join"], id="source"),
        pytest.param({"offset": 5}, {}, ["join", "shift"], id="default"),
        pytest.param({}, {"scale": 2.0}, ["join"], id="argument"),
        pytest.param({}, {"size": SIZE + 1}, ALL, id="argument of the first"),
        pytest.param({}, {"size": SIZE}, [], id="same argument"),
    ],
)
def test_a_changed_step_runs_again_and_so_do_its_dependants(world, change, arguments, again):
    first = world.pipeline().run(size=SIZE)
    world.called()
    world.reopen()
    result = world.pipeline(**change).resume(**arguments)
    assert world.called() == again == sorted(result.computed)
    if "scale" in arguments:
        assert result.value("join")["sum"] == 2 * TOTAL
    assert first.saga_id != result.saga_id
    # And back: what was computed for the former source and arguments is still there. The default, given, is
    # the same argument.
    world.reopen()
    assert world.pipeline().resume(size=SIZE, scale=1.0).computed == frozenset()


def test_arguments_of_the_last_run_are_taken_where_none_are_given(world):
    world.pipeline().run(size=SIZE, scale=3.0)
    world.called()
    assert world.pipeline(factor_in_source=3).resume().value("join")["n"] == SIZE
    assert world.called() == ["double", "join"]


def test_a_failed_step_keeps_what_was_finished(world):
    pipeline = world.pipeline(fail=["join"])
    with pytest.raises(SagaFailedError) as caught:
        pipeline.run(size=SIZE)
    assert str(caught.value.__cause__) == "join" and list(caught.value.failures) == ["join"]
    assert pipeline.saga_get().status is SagaStatus.FAILED
    assert "failed, ValueError: join" in pipeline.saga_get().pretty()
    world.called()
    world.reopen()
    result = world.pipeline().resume()
    assert world.called() == ["join"]
    assert result.value("join")["sum"] == TOTAL


def test_a_result_that_is_gone_is_computed_again(world):
    result = world.pipeline().run(size=SIZE)
    world.called()
    world.tracked.delete(result["double"].key)
    world.reopen()
    assert sorted(world.pipeline().resume().computed) == ["double", "join"], "it has another key now"


def blob(world, key: UUID):
    return world.path / "results" / key.hex[:2] / key.hex


def test_a_result_with_a_damaged_header_is_computed_again(world):
    key = world.pipeline().run(size=SIZE)["load"].key
    world.called()
    world.close()
    damage(blob(world, key), 10)
    world.open()
    assert sorted(world.pipeline().resume().computed) == ALL


def test_a_damaged_result_that_a_step_needs_is_told_and_computed_by_the_next_resume(world):
    key = world.pipeline().run(size=SIZE)["load"].key
    world.close()
    damage(blob(world, key), -10)
    world.open()
    world.called()
    with pytest.raises(SagaFailedError) as caught:
        world.pipeline(factor_in_source=3).resume()
    assert isinstance(caught.value.__cause__, CorruptBlobError)
    assert "step 'load'" in caught.value.__cause__.__notes__[0]
    assert world.called() == []
    assert "load" in world.pipeline(factor_in_source=3).resume().computed


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.chmod(0o600)
    path.write_bytes(content)


def test_a_result_that_needs_pickle_fails_its_step(world):
    pipeline = Pipeline(world.pool, world.tracked, world.store, "odd")
    pipeline.step(lambda: Note([], []), name="odd")
    with pytest.raises(SagaFailedError, match="Pickle"):
        pipeline.run()


def test_with_a_store_that_keeps_nothing_resume_computes_all(world):
    for _ in range(2):
        world.pipeline(store=InMemorySagaStore()).resume(size=SIZE)
        assert world.called() == ALL


def test_a_store_that_fails_stops_the_run_and_resume_goes_on(world):
    def fail():
        raise OSError(28, "No space left on device")

    store = TripStore(world.store, fail, 5)
    pipeline = world.pipeline(store=store)
    with pytest.raises(SagaStoppedError, match="No space"):
        pipeline.run(size=SIZE)
    assert pipeline.saga_get().status is SagaStatus.STOPPED
    world.called()
    assert world.pipeline().resume().value("join")["sum"] == TOTAL
    assert "load" not in world.called()
    views = [SagaView.of_record(world.store.saga_load(each)) for each in world.store.saga_list()]
    assert [view.status for view in views] == [SagaStatus.SUPERSEDED, SagaStatus.DONE]


def test_a_run_that_cannot_be_read_is_warned_of_and_the_others_are_used(world):
    world.pipeline().run(size=SIZE)
    world.pipeline().run(size=7)
    world.called()
    world.store._connection.execute("UPDATE saga SET dag = x'00' WHERE seq = 2")
    with pytest.warns(FBCacheWarning, match="not used"):
        assert world.pipeline().resume().computed == frozenset()


def test_runs_of_other_pipelines_and_other_sagas_in_the_store_are_left_alone(world):
    foreign = [uuid4(), uuid4()]
    for saga_id, params in zip(foreign, (["no", "pipeline"], {"arguments": {"size": 3}}), strict=True):
        world.store.saga_create(SagaCreateParams(saga_id, "test", SagaDag.of(TWO, params)))
    other = Pipeline(world.pool, world.tracked, world.store, "other")
    other.step(lambda size: size, name="load")
    other.run(size=SIZE)
    assert sorted(world.pipeline().resume(size=SIZE).computed) == ALL
    assert world.store.saga_list(unfinished=True) == foreign


def test_prune_deletes_what_the_last_complete_run_does_not_need(world):
    world.pipeline().run(size=SIZE)
    result = world.pipeline(factor_in_source=3).resume()
    with pytest.raises(SagaFailedError):
        world.pipeline(fail=["load"]).resume(size=5)
    assert len(world.tracked) == 7
    assert world.pipeline().prune() == 2
    assert set(world.tracked.keys()) == {fb.key for fb in result.values()}
    assert world.pipeline().prune() == 0
    world.called()
    assert world.pipeline(factor_in_source=3).resume(size=SIZE).computed == frozenset()


def test_independent_steps_run_at_once(world):
    meeting = threading.Barrier(2)
    pipeline = Pipeline(world.pool, world.tracked, world.store, "wide", threads=2)
    for name in ("a", "b"):
        pipeline.step(lambda: meeting.wait(30) and None, name=name)
    pipeline.run()


def test_an_interrupt_lets_the_running_step_end_and_begins_no_other(world, monkeypatch):
    gate = Gate()
    pipeline = Pipeline(world.pool, world.tracked, world.store, "stop")
    note = Note(world.calls, ())
    hold = Holding(gate)

    @pipeline.step
    def first():
        hold()
        note("first")

    @pipeline.step
    def second(first):
        note("second")

    result, shutdown = Future.result, SagaExecutor.shutdown

    def interrupted(self, timeout=None):
        monkeypatch.setattr(Future, "result", result)
        gate.wait_reached()
        raise KeyboardInterrupt

    def opening(self, **options):
        gate.open()
        shutdown(self, **options)

    monkeypatch.setattr(SagaExecutor, "shutdown", opening)
    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run()
    assert world.called() == ["first"]
    assert pipeline.saga_get().status is SagaStatus.FAILED
    assert pipeline.resume().computed == {"second"}


class Holding:
    """Stands at a gate; its type has no encoder."""

    def __init__(self, gate):
        self.gate = gate

    def __call__(self):
        self.gate.pass_through()


# ------------------------------------------------------------------ definitions


def test_steps_that_do_not_fit_together_are_refused(world):
    pipeline = Pipeline(world.pool, world.tracked, world.store, "bad")
    with pytest.raises(PipelineError, match="no steps"):
        pipeline.run()
    with pytest.raises(PipelineError, match="not run"):
        pipeline.saga_get()

    async def aload():
        pass

    for wrong in (aload, len, 3, Note([], [])):
        with pytest.raises(TypeError, match="plain function"):
            pipeline.step(wrong)

    pipeline.step(lambda: 1, name="load")
    for function, options, says in (
        (lambda: 1, {"name": "load"}, "already"),
        (lambda *rest: 1, {"name": "x"}, "by name"),
        (lambda **rest: 1, {"name": "x"}, "by name"),
        (lambda a, /: 1, {"name": "x"}, "by name"),
        (lambda x: 1, {"name": "x"}, "its own name"),
        (lambda a: 1, {"name": "x", "inputs": {"b": "load"}}, "no parameter 'b'"),
        (lambda a: 1, {"name": "x", "inputs": {"a": "ghost"}}, "'ghost'"),
        (lambda: 1, {"name": "x", "after": ["ghost"]}, "'ghost'"),
    ):
        with pytest.raises(PipelineError, match=says):
            pipeline.step(function, **options)
    assert repr(pipeline) == "<Pipeline 'bad': load>"
    with pytest.raises(TypeError, match="TrackedDirectory"):
        Pipeline(world.pool, world.path, world.store, "bad")


def test_inputs_may_have_other_names_than_their_steps(world):
    pipeline = Pipeline(world.pool, world.tracked, world.store, "named")
    pipeline.step(lambda n: n + 1, name="more")
    pipeline.step(lambda a, b: (a, b), name="pair", inputs={"a": "more", "b": "more"})
    assert pipeline.run(n=1).value("pair") == (2, 2)


def test_arguments_that_are_missing_or_unknown_are_refused_before_anything_runs(world):
    for arguments, name in (({}, "size"), ({"size": 1, "odd": 2}, "odd"), ({"size": 1, "load": 2}, "load")):
        with pytest.raises(TypeError, match=f"'{name}'"):
            world.pipeline().run(**arguments)
    assert world.store.saga_list() == [] and world.calls == []


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_pipeline_killed_at_any_write_ends_with_the_same_result(world, tmp_path, after):
    world.close()
    log = tmp_path / "calls"

    def life(nth):
        def work():
            child = World(tmp_path, world.make_pool)
            child.calls = Lines(log)
            store = TripStore(child.store, lambda: os.kill(os.getpid(), signal.SIGKILL), nth, after=after)
            total = child.pipeline(store=store).resume(size=SIZE).value("join")["sum"]
            os._exit(0 if total == TOTAL else 1)

        return work

    # Each process resumes where the one before was killed, and is killed as it records one thing more.
    for nth in range(4, 60, 2):
        pid = os.fork()
        if pid == 0:
            try:
                life(nth)()
            finally:
                os._exit(2)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        raise AssertionError("it never came to its end")
    world.open()
    result = world.pipeline().resume()
    assert result.computed == frozenset() and result.value("join")["sum"] == TOTAL
    lines = log.read_text().split()
    assert sorted(set(lines)) == ALL
    assert len(lines) <= len(ALL) + 2 * (nth - 4) // 2, "only what was under way at a kill was computed again"
    assert world.store.saga_list(unfinished=True) == []


class Lines(list):
    """A list that survives its process."""

    def __init__(self, path):
        self.path = path

    def append(self, line):
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{line}\n".encode())
        os.close(fd)
