"""Running: what runs at once, what an action sees, failures of every kind, ends, futures."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from uuid import uuid4

import numpy as np
import pytest

from fbcache.saga import (
    Action,
    ActionRegistry,
    DagBuilder,
    ExecutorClosedError,
    InjectedError,
    InMemorySagaStore,
    OutputError,
    SagaExecutor,
    SagaFailedError,
    SagaNodeState,
    SagaStateError,
    SagaStatus,
    SagaStuckError,
    UnknownActionError,
    UnknownNodeError,
)
from fbcache.saga import executor as executor_module
from tests.faults import PATIENCE, Gate
from tests.saga.sagas import DIAMOND, TWO, Acts, RecordingStore, chain, dag_of, ended, of, run


def executing(actions, **options):
    return SagaExecutor(InMemorySagaStore(), actions, **options)


def one(**actions):
    """A DAG with a node for each action, all free to run at once."""
    builder = DagBuilder()
    for name in actions:
        builder.add(name, name)
    return builder.build()


# ------------------------------------------------------------------ order


def test_each_step_is_recorded_before_what_depends_on_it():
    store = RecordingStore()
    with SagaExecutor(store, Acts(fails=["d"]).registry) as executor:
        ended(run(executor, DIAMOND))
    events = of(store.events)
    for parent, child in (("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")):
        assert events.index(f"SUCCEEDED {parent}") < events.index(f"STARTED {child}")
        if child != "d":
            assert events.index(f"UNDO_FINISHED {child}") < events.index(f"UNDO_STARTED {parent}")
    assert "UNDO_STARTED d" not in events
    assert store.states == ["unwinding", "done"]


def test_an_action_runs_only_after_its_start_is_recorded():
    store = RecordingStore()
    seen = []

    def act(context):
        seen.append(of(store.events)[-1])

    def undo(context):
        seen.append(of(store.events)[-1])
        raise ValueError

    def fail(context):
        raise ValueError

    dag = DagBuilder().add("a", "act").add("b", "fail", after="a").build()
    with SagaExecutor(store, {"act": (act, undo), "fail": fail}) as executor:
        ended(run(executor, dag))
    assert seen == ["STARTED a", "UNDO_STARTED a"]


def test_branches_run_at_once_in_threads_and_on_the_loop():
    meeting = threading.Barrier(2)
    tasks = []

    def act(context):
        meeting.wait(PATIENCE)

    async def aact(context):
        tasks.append(asyncio.current_task())
        while len(tasks) < 2:
            await asyncio.sleep(0)

    dag = DagBuilder().add("a", "act").add("b", "act").add("c", "aact").add("d", "aact").build()
    with executing({"act": act, "aact": aact}, threads=2) as executor:
        assert ended(run(executor, dag)) is None


def test_a_blocked_action_delays_neither_calls_nor_async_actions_nor_other_sagas():
    gate = Gate()

    async def quick(context):
        return threading.current_thread().name

    with executing({"block": lambda _: gate.pass_through(), "quick": quick}, threads=1) as executor:
        blocked = run(executor, one(block=1))
        gate.wait_reached()
        name = run(executor, one(quick=1)).result(PATIENCE).lookup("quick")
        assert name == "fbcache-saga-loop"
        assert not blocked.done()
        assert [view.status for view in executor.saga_list()] == [SagaStatus.RUNNING, SagaStatus.DONE]
        gate.open()
        assert ended(blocked) is None


def test_what_is_only_in_line_when_another_fails_has_not_started():
    gate = Gate()
    store = RecordingStore()

    def fail(context):
        gate.pass_through()
        raise ValueError

    acts = Acts()
    registry = acts.registry
    registry.register("fail", fail)
    dag = DagBuilder().add("first", "fail").add("second", "act").add("third", "act", after="second").build()
    with SagaExecutor(store, registry, threads=1) as executor:
        saga_id = uuid4()
        future = run(executor, dag, saga_id=saga_id)
        gate.wait_reached()
        assert executor.saga_get(saga_id).states["second"] is SagaNodeState.NEVER_STARTED
        gate.open()
        assert isinstance(ended(future), SagaFailedError)
    assert of(store.events) == ["STARTED first", "FAILED first"]
    assert acts.journal == []


def test_what_runs_when_another_fails_is_let_end_and_undone():
    running, failed = Gate(), threading.Event()

    class Told(RecordingStore):
        def saga_update(self, saga_id, state):
            super().saga_update(saga_id, state)
            failed.set()

    store = Told()
    undone = []

    def slow(context):
        running.pass_through()

    def fail(context):
        running.wait_reached()
        raise ValueError

    dag = DagBuilder().add("slow", "slow").add("fail", "fail").add("after", "slow", after="slow").build()
    actions = {"slow": (slow, lambda context: undone.append(context.node)), "fail": fail}
    with SagaExecutor(store, actions, threads=2) as executor:
        future = run(executor, dag)
        assert failed.wait(PATIENCE)  # the saga goes backwards while `slow` runs
        assert undone == []
        running.open()
        assert isinstance(ended(future), SagaFailedError)
    assert undone == ["slow"]
    assert "STARTED after" not in of(store.events)


def test_an_async_action_takes_no_thread_from_sync_ones():
    done = threading.Event()

    async def wait(context):
        while not done.is_set():
            await asyncio.sleep(0)

    dag = DagBuilder().add("wait", "wait").add("act", "act").build()
    with executing({"wait": wait, "act": lambda _: done.set()}, threads=1) as executor:
        assert ended(run(executor, dag)) is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_undos_in_line_all_run(threads):
    acts = Acts(fails=["z"])
    with SagaExecutor(InMemorySagaStore(), acts.registry, threads=threads) as executor:
        error = ended(run(executor, dag_of(a="", b="", c="a", d="a", e="b", z="c d e")))
    assert isinstance(error, SagaFailedError)
    assert acts.counts(*"abcde") == ((1, 1),) * 5


def test_no_more_sync_actions_run_at_once_than_there_are_threads():
    lock, now, most = threading.Lock(), [0], [0]

    def act(context):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        with lock:
            now[0] -= 1

    with executing({"act": act}, threads=3) as executor:
        futures = [run(executor, dag_of(**dict.fromkeys("abcdefgh", ""))) for _ in range(5)]
        assert all(ended(future) is None for future in futures)
    assert 1 <= most[0] <= 3


# ------------------------------------------------------------------ what an action sees


def test_an_action_sees_parameters_and_ancestors_and_no_other_node():
    seen = {}

    def act(context):
        seen[context.node] = context
        return {"from": context.node, "rows": np.arange(3)}

    with executing({"act": act}) as executor:
        saga_id = uuid4()
        run(executor, DIAMOND, {"n": [1]}, saga_id=saga_id).result(PATIENCE)
    context = seen["d"]
    assert (context.saga_id, context.saga_name, context.undoing) == (saga_id, "test", False)
    assert context.params == {"n": [1]} and context.params is not context.params
    assert context.lookup("a")["from"] == "a" and context.lookup("b")["from"] == "b"
    assert not context.lookup("a")["rows"].flags.writeable
    for other in ("d", "x", 3, []):
        with pytest.raises(UnknownNodeError):
            context.lookup(other)
    with pytest.raises(UnknownNodeError, match=r"'c'.*after"):
        seen["b"].lookup("c")


def test_an_undo_sees_the_output_of_its_own_node():
    outputs = []
    actions = {
        "act": (lambda context: 42, lambda context: outputs.append((context.undoing, context.lookup("a")))),
        "fail": lambda context: 1 / 0,
    }
    dag = DagBuilder().add("a", "act").add("b", "fail", after="a").build()
    with executing(actions) as executor:
        error = ended(run(executor, dag))
    assert outputs == [(True, 42)]
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_result_has_the_outputs_of_all_nodes():
    with executing(Acts().registry) as executor:
        result = run(executor, DIAMOND).result(PATIENCE)
    assert result.outputs == {name: name for name in "abcd"}
    with pytest.raises(UnknownNodeError):
        result.lookup("x")


# ------------------------------------------------------------------ failures


class OddError(Exception):
    def __str__(self):
        raise RuntimeError("no message")


def raising(error):
    def act(context):
        raise error

    async def aact(context):
        raise error

    return [act, aact]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        OddError(),
        GeneratorExit(),
        ValueError("\udc80"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
def test_whatever_an_action_raises_is_its_failure_and_ends_no_thread(error, which):
    acts = Acts()
    registry = acts.registry
    registry.register("bad", raising(error)[which])
    dag = DagBuilder().add("a", "act").add("b", "bad", after="a").build()
    with SagaExecutor(InMemorySagaStore(), registry, threads=1) as executor:
        failed = ended(run(executor, dag))
        assert isinstance(failed, SagaFailedError) and isinstance(failed, RuntimeError)
        assert failed.__cause__ is error
        assert type(error).__name__ in failed.failures["b"]
        assert ended(run(executor, dag_of(a=""))) is None, "the executor goes on"
    assert acts.counts("a") == ((2, 1),)


@pytest.mark.parametrize("which", ["sync", "async"])
def test_an_output_that_needs_pickle_is_the_actions_failure(which):
    async def aact(context):
        return {"f": print}

    act = aact if which == "async" else (lambda context: {"f": print})
    with executing({"act": act}) as executor:
        error = ended(run(executor, chain("a")))
    assert isinstance(error, SagaFailedError)
    assert isinstance(error.__cause__, OutputError) and isinstance(error.__cause__, TypeError)
    assert "'f'" in str(error.__cause__)


def test_a_coroutine_that_nobody_awaits_is_the_actions_failure():
    async def aact(context):
        return 1

    with executing({"act": lambda context: aact(context)}) as executor:
        assert "async def" in str(ended(run(executor, chain("a"))))


def test_async_functions_are_known_in_every_guise():
    class Callable:
        async def __call__(self, context):
            return threading.current_thread().name

        async def method(self, context, more=1):
            return threading.current_thread().name

    for function in (Callable(), Callable().method, functools.partial(Callable().method, more=2)):
        with executing({"act": function}) as executor:
            assert run(executor, chain("a")).result(PATIENCE).lookup("a") == "fbcache-saga-loop"


def test_an_async_undo_runs_and_an_action_without_undo_is_undone_by_nothing():
    undone = []

    async def undo(context):
        undone.append(context.node)

    dag = DagBuilder().add("a", "plain").add("b", "act", after="a").add("c", "fail", after="b").build()
    actions = {"plain": lambda _: 1, "act": Action(lambda _: 2, undo), "fail": lambda _: 1 / 0}
    with executing(actions) as executor:
        saga_id = uuid4()
        ended(run(executor, dag, saga_id=saga_id))
        states = [str(state) for state in executor.saga_get(saga_id).states.values()]
    assert states == ["undone", "undone", "failed"]
    assert undone == ["b"]


def test_several_failures_are_all_told():
    gates = [Gate(), Gate()]

    def fail(context):
        gates[context.node == "b"].pass_through()
        raise ValueError(context.node)

    dag = DagBuilder().add("a", "fail").add("b", "fail").build()
    with executing({"fail": fail}, threads=2) as executor:
        future = run(executor, dag)
        for gate in gates:
            gate.wait_reached()
        for gate in gates:
            gate.open()
        assert set(ended(future).failures) == {"a", "b"}


def test_a_stuck_saga_undoes_nothing_more_and_tells_what_is_known():
    acts = Acts(fails=["c"], undo_fails=["b"])
    store = RecordingStore()
    with SagaExecutor(store, acts.registry, threads=1) as executor:
        saga_id = uuid4()
        error = ended(run(executor, chain("a", "b", "c"), saga_id=saga_id))
        assert executor.saga_get(saga_id).status is SagaStatus.STUCK
        assert [view.status for view in executor.saga_list()] == [SagaStatus.STUCK]
    assert isinstance(error, SagaStuckError)
    assert error.undo_failures == {"b": "ValueError: b cannot be undone"}
    assert error.failures == {"c": "ValueError: c cannot"}
    assert error.states == {"a": "succeeded", "b": "stuck", "c": "failed"}
    assert str(error.__cause__) == "b cannot be undone"
    assert "'a', 'b'" in str(error)
    assert store.states == ["unwinding"], "the store does not call it done"
    assert acts.journal == ["+a", "+b", "+c", "-b"]


def test_undos_in_line_when_another_undo_fails_do_not_run():
    gate = Gate()
    undone = []

    def undo(context):
        undone.append(context.node)
        gate.pass_through()
        raise ValueError

    dag = DagBuilder().add("a", "act").add("b", "act").add("c", "fail", after=["a", "b"]).build()
    with executing({"act": (lambda _: 1, undo), "fail": lambda _: 1 / 0}, threads=1) as executor:
        future = run(executor, dag)
        gate.wait_reached()
        gate.open()
        assert isinstance(ended(future), SagaStuckError)
    assert undone == ["a"]


def test_an_injected_error_says_so():
    with executing(Acts().registry) as executor:
        saga_id = uuid4()
        future = executor.saga_create(saga_id, "test", TWO)
        executor.saga_inject_error(saga_id, "n1")
        executor.saga_start(saga_id)
        assert isinstance(ended(future).__cause__, InjectedError)


# ------------------------------------------------------------------ futures


def test_a_cancelled_future_does_not_disturb_its_saga():
    gate = Gate()
    acts = Acts()
    registry = acts.registry
    registry.register("block", lambda _: gate.pass_through())
    dag = DagBuilder().add("a", "block").add("b", "act", after="a").build()
    with SagaExecutor(InMemorySagaStore(), registry) as executor:
        saga_id = uuid4()
        future = run(executor, dag, saga_id=saga_id)
        gate.wait_reached()
        assert future.cancel()
        gate.open()
    assert future.cancelled()
    assert executor.saga_get(saga_id).status is SagaStatus.DONE
    assert acts.counts("b") == ((1, 0),)


def test_a_future_can_be_awaited():
    async def main(executor):
        return await asyncio.wait_for(asyncio.wrap_future(run(executor, TWO)), PATIENCE)

    with executing(Acts().registry) as executor:
        assert asyncio.run(main(executor)).lookup("n1") == "n1"


def test_a_callback_of_a_future_may_call_the_executor_and_sees_the_end():
    seen, called = [], threading.Event()
    with executing(Acts().registry) as executor:
        saga_id = uuid4()
        future = executor.saga_create(saga_id, "test", TWO)

        def callback(done):
            seen.append(executor.saga_get(saga_id).status)
            try:
                executor.shutdown()
            except SagaStateError as error:
                seen.append(error)
            seen.append(run(executor, TWO))
            called.set()

        future.add_done_callback(callback)
        executor.saga_start(saga_id)
        assert called.wait(PATIENCE)  # those who wait for the future go on before its callbacks do
    assert seen[0] is SagaStatus.DONE
    assert "wait=False" in str(seen[1])
    assert ended(seen[2]) is None


def test_an_action_may_start_another_saga_and_wait_for_it():
    def parent(context):
        return run(executor, TWO).result(PATIENCE).lookup("n2")

    registry = Acts().registry
    registry.register("parent", parent)
    with SagaExecutor(InMemorySagaStore(), registry, threads=2) as executor:
        dag = DagBuilder().add("p", "parent").build()
        assert run(executor, dag).result(PATIENCE).lookup("p") == "n2"


# ------------------------------------------------------------------ the end


def test_shutdown_waits_for_what_runs_and_refuses_what_is_new(spawn):
    gate = Gate()
    acts = Acts()
    registry = acts.registry
    registry.register("block", lambda _: gate.pass_through())
    dag = DagBuilder().add("a", "block").add("b", "act", after="a").build()
    executor = SagaExecutor(InMemorySagaStore(), registry)
    future = run(executor, dag)
    gate.wait_reached()
    ready = executor.saga_create(uuid4(), "test", TWO)
    executor.shutdown(wait=False)
    assert isinstance(ended(ready), ExecutorClosedError)
    unstarted = executor.saga_list()[1].id
    for call in (
        lambda: executor.saga_create(uuid4(), "test", TWO),
        lambda: executor.saga_resume(uuid4(), "test", TWO),
        lambda: executor.saga_start(unstarted),
    ):
        with pytest.raises(ExecutorClosedError):
            call()
    waiting = spawn(executor.shutdown)
    assert not future.done() and not waiting.done
    gate.open()
    waiting.result()
    assert future.done() and ended(future) is None
    assert acts.counts("b") == ((1, 0),), "a running saga ends, the rest of its nodes too"
    executor.shutdown()


def test_an_action_cannot_wait_for_its_own_end():
    async def aact(context):
        executor.shutdown()

    for act in (aact, lambda context: executor.shutdown()):
        with executing({"act": act}) as executor:
            assert isinstance(ended(run(executor, chain("a"))).__cause__, SagaStateError)


def test_tasks_that_an_action_leaves_behind_are_cancelled():
    left = []

    async def act(context):
        async def forever():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                left.append("cancelled")
                raise

        left.append(asyncio.create_task(forever()))
        await asyncio.sleep(0)

    with executing({"act": act}) as executor:
        assert ended(run(executor, chain("a"))) is None
    assert left[1:] == ["cancelled"]


def test_only_so_many_sagas_that_ended_are_remembered(monkeypatch):
    monkeypatch.setattr(executor_module, "_REMEMBERED", 2)
    with executing(Acts().registry) as executor:
        ready = uuid4()
        executor.saga_create(ready, "ready", TWO)
        for _ in range(6):
            assert ended(run(executor, TWO)) is None
        assert executor.saga_get(ready).status is SagaStatus.READY
        assert len(executor.saga_list()) <= 4


def test_an_executor_in_a_forked_child_refuses_and_does_not_hang():
    with executing(Acts().registry) as executor:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                executor.saga_create(uuid4(), "test", TWO)
            except ExecutorClosedError:
                executor.shutdown()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert ended(run(executor, TWO)) is None


# ------------------------------------------------------------------ arguments


def test_wrong_arguments_are_refused_before_anything_is_recorded():
    store = RecordingStore()
    with SagaExecutor(store, Acts().registry) as executor:
        for arguments in (("x", "n", TWO), (uuid4(), 3, TWO), (uuid4(), "n", {})):
            with pytest.raises(TypeError):
                executor.saga_create(*arguments)
        with pytest.raises(TypeError, match="id alone"):
            executor.saga_resume(uuid4(), "n")
        with pytest.raises(OutputError):
            executor.saga_create(uuid4(), "n", TWO, print)
        with pytest.raises(UnknownActionError, match="'ghost'"):
            executor.saga_create(uuid4(), "n", DagBuilder().add("a", "ghost").build())
        assert executor.saga_list() == []
    with pytest.raises(ValueError, match="threads"):
        executing({}, threads=0)


def test_actions_have_names_of_their_own():
    registry = ActionRegistry()
    registry.register("a", len)
    with pytest.raises(ValueError, match="'a'"):
        registry.register("a", len)
    for wrong in ((3, len), ("b", None), ("b", 3), ("b", len, 3)):
        with pytest.raises(TypeError):
            registry.register(*wrong)
    assert list(registry) == ["a"] and "a" in registry and len(registry) == 1
