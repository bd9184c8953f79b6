"""How often actions and undos of two nodes are called; and what is refused."""

from __future__ import annotations

from uuid import uuid4

import pytest

from fbcache.saga import (
    InMemorySagaStore,
    SagaExecutor,
    SagaExistsError,
    SagaFailedError,
    SagaStateError,
    SagaStatus,
    UnknownNodeError,
    UnknownSagaError,
)
from tests.faults import PATIENCE
from tests.saga.sagas import TWO, Acts, ended, run


@pytest.fixture
def acts():
    return Acts()


@pytest.fixture
def executor(acts):
    with SagaExecutor(InMemorySagaStore(), acts.registry) as executor:
        yield executor


@pytest.mark.parametrize(
    ("repeat", "fails", "counts"),
    [
        pytest.param(None, None, ((1, 0), (1, 0)), id="plain"),
        pytest.param((2, 1), None, ((2, 0), (1, 0)), id="repeat the first"),
        pytest.param((2, 1), "n2", ((2, 1), (0, 0)), id="repeat the first, then the second fails"),
        pytest.param((2, 2), "n2", ((2, 2), (0, 0)), id="repeat action and undo"),
        pytest.param((1, 2), "n2", ((1, 2), (0, 0)), id="repeat the undo only"),
        pytest.param((3, 5), "n2", ((3, 5), (0, 0)), id="many"),
        pytest.param(None, "n1", ((0, 0), (0, 0)), id="an error in the first"),
    ],
)
def test_actions_and_undos_are_called_this_often(executor, acts, repeat, fails, counts):
    saga_id = uuid4()
    future = executor.saga_create(saga_id, "test", TWO)
    if repeat:
        executor.saga_inject_repeat(saga_id, "n1", action=repeat[0], undo=repeat[1])
    if fails:
        executor.saga_inject_error(saga_id, fails)
    executor.saga_start(saga_id)
    if fails:
        assert isinstance(ended(future), SagaFailedError)
        assert list(ended(future).failures) == [fails]
        assert executor.saga_get(saga_id).status is SagaStatus.FAILED
    else:
        assert future.result(PATIENCE).outputs == {"n1": "n1", "n2": "n2"}
        assert executor.saga_get(saga_id).status is SagaStatus.DONE
    assert acts.counts("n1", "n2") == counts


def test_nothing_runs_of_a_saga_that_was_not_started(acts):
    executor = SagaExecutor(InMemorySagaStore(), acts.registry)
    saga_id = uuid4()
    future = executor.saga_create(saga_id, "test", TWO)
    assert ended(run(executor, TWO)) is None  # the driver has come round meanwhile
    assert not future.done()
    assert executor.saga_get(saga_id).status is SagaStatus.READY
    executor.shutdown()
    assert acts.counts("n1", "n2") == ((1, 0), (1, 0)), "those of the other saga"


def test_a_saga_resumed_from_an_empty_log_runs_once_started(executor, acts):
    saga_id = uuid4()
    future = executor.saga_resume(saga_id, "test", TWO, events=[])
    executor.saga_start(saga_id)
    assert future.result(PATIENCE).lookup("n2") == "n2"
    assert acts.counts("n1", "n2") == ((1, 0), (1, 0))


@pytest.mark.parametrize("start", [False, True])
def test_resuming_a_saga_that_exists_is_refused(executor, acts, start):
    saga_id = uuid4()
    future = executor.saga_create(saga_id, "test", TWO)
    if start:
        executor.saga_start(saga_id)
        future.result(PATIENCE)
    with pytest.raises(SagaExistsError, match=str(saga_id)):
        executor.saga_resume(saga_id, "test", TWO, events=[])
    with pytest.raises(SagaExistsError):
        executor.saga_resume(saga_id)
    with pytest.raises(SagaExistsError):
        executor.saga_create(saga_id, "test", TWO)
    assert acts.done.total() == (2 if start else 0)


def test_an_unknown_saga_is_refused_by_every_call(executor):
    unknown = uuid4()
    for call in (
        executor.saga_start,
        executor.saga_get,
        executor.saga_resume,
        lambda saga_id: executor.saga_inject_error(saga_id, "n1"),
        lambda saga_id: executor.saga_inject_error_undo(saga_id, "n1"),
        lambda saga_id: executor.saga_inject_repeat(saga_id, "n1", action=2),
    ):
        with pytest.raises(UnknownSagaError, match=str(unknown)):
            call(unknown)
        with pytest.raises(KeyError):
            call(unknown)


def test_starting_twice_is_refused(executor, acts):
    saga_id = uuid4()
    future = executor.saga_create(saga_id, "test", TWO)
    executor.saga_start(saga_id)
    with pytest.raises(SagaStateError, match="done once"):
        executor.saga_start(saga_id)
    future.result(PATIENCE)
    with pytest.raises(SagaStateError):
        executor.saga_start(saga_id)
    assert acts.counts("n1", "n2") == ((1, 0), (1, 0))


def test_faults_are_injected_only_into_nodes_of_sagas_that_have_not_ended(executor):
    saga_id = uuid4()
    future = executor.saga_create(saga_id, "test", TWO)
    with pytest.raises(UnknownNodeError, match="'n3'"):
        executor.saga_inject_error(saga_id, "n3")
    for wrong in ({"action": 0}, {"undo": 0}, {"action": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            executor.saga_inject_repeat(saga_id, "n1", **wrong)
    with pytest.raises(TypeError):
        executor.saga_inject_repeat(saga_id, "n1", action="2")
    executor.saga_start(saga_id)
    future.result(PATIENCE)
    with pytest.raises(SagaStateError, match="done"):
        executor.saga_inject_error(saga_id, "n1")


def test_an_injected_error_of_an_undo_leaves_the_saga_stuck(executor, acts):
    saga_id = uuid4()
    future = executor.saga_create(saga_id, "test", TWO)
    executor.saga_inject_error(saga_id, "n2")
    executor.saga_inject_error_undo(saga_id, "n1")
    executor.saga_start(saga_id)
    error = ended(future)
    assert list(error.undo_failures) == ["n1"] and list(error.failures) == ["n2"]
    assert acts.counts("n1", "n2") == ((1, 0), (0, 0))
