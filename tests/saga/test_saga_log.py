"""The log: every pair of state and event, every pair of parent and child, every order of events."""

from __future__ import annotations

import re
from itertools import permutations, product
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbcache.saga import (
    ForeignEventError,
    IllegalTransitionError,
    ImpossiblePairError,
    SagaEventKind,
    SagaLog,
    SagaNodeEvent,
    SagaNodeState,
    next_state,
)
from fbcache.saga import log as log_module
from fbcache.saga.log import GONE, may_be_parent
from fbcache.saga.planning import plan
from tests.saga.sagas import (
    DIAMOND,
    FAILED,
    STARTED,
    SUCCEEDED,
    TWO,
    UNDO_FAILED,
    UNDO_FINISHED,
    UNDO_STARTED,
    Acts,
    chain,
    dag_of,
    recorded,
)

State = SagaNodeState
ID = uuid4()

EDGES = {
    State.NEVER_STARTED: {STARTED: State.STARTED},
    State.STARTED: {SUCCEEDED: State.SUCCEEDED, FAILED: State.FAILED},
    State.SUCCEEDED: {UNDO_STARTED: State.UNDO_STARTED},
    State.FAILED: {},
    State.UNDO_STARTED: {UNDO_FINISHED: State.UNDO_FINISHED, UNDO_FAILED: State.UNDO_FAILED},
    State.UNDO_FINISHED: {},
    State.UNDO_FAILED: {},
}

#: Events that bring a new node into a state.
PATHS = {
    State.NEVER_STARTED: (),
    State.STARTED: (STARTED,),
    State.SUCCEEDED: (STARTED, SUCCEEDED),
    State.FAILED: (STARTED, FAILED),
    State.UNDO_STARTED: (STARTED, SUCCEEDED, UNDO_STARTED),
    State.UNDO_FINISHED: (STARTED, SUCCEEDED, UNDO_STARTED, UNDO_FINISHED),
    State.UNDO_FAILED: (STARTED, SUCCEEDED, UNDO_STARTED, UNDO_FAILED),
}


def event(kind, node="n1", saga_id=ID):
    return SagaNodeEvent(saga_id, node, kind)


def events_to(state, node):
    return [event(kind, node) for kind in PATHS[state]]


@pytest.mark.parametrize(("state", "kind"), list(product(State, SagaEventKind)), ids=lambda each: each.name)
def test_every_event_in_every_state_is_taken_or_refused(state, kind):
    after = EDGES[state].get(kind)
    assert next_state(state, kind) is after
    log = SagaLog.recover(ID, chain("n1"), events_to(state, "n1"))
    assert log.state("n1") is state
    before = (log.events, log.states, log.unwinding, log.stuck, log.succeeded, log.undone)
    if after is None:
        with pytest.raises(IllegalTransitionError, match=rf"'n1'.*{state}.*{kind.name}") as caught:
            log.record(event(kind))
        assert (caught.value.saga_id, caught.value.node) == (ID, "n1")
        assert (log.events, log.states, log.unwinding, log.stuck, log.succeeded, log.undone) == before
    else:
        log.record(event(kind))
        assert log.state("n1") is after


def test_every_state_and_event_is_documented():
    source = Path(log_module.__file__).read_text()
    for member in (*State, *SagaEventKind):
        assert re.search(rf"^    {member.name} = \S.*  #: \S", source, re.MULTILINE), member


@pytest.mark.parametrize("state", State)
def test_what_a_state_says_of_its_saga(state):
    log = SagaLog.recover(ID, chain("n1"), events_to(state, "n1"))
    assert log.unwinding == (state not in (State.NEVER_STARTED, State.STARTED, State.SUCCEEDED))
    assert log.stuck == (state is State.UNDO_FAILED)
    assert log.succeeded == (state is State.SUCCEEDED)
    assert log.undone == (state in (State.FAILED, State.UNDO_FINISHED))


# ------------------------------------------------------------------ parents and children


def reachable(dag, *, bound=99):
    """All states of the nodes that runs of ``dag``, crashes included, can come to.

    ``bound``: how many steps may be under way at once.
    """
    start = tuple(State.NEVER_STARTED for _ in dag)
    found, pending = {start}, [start]
    while pending:
        states = pending.pop()
        for following in successors(dag, states, bound):
            if following not in found:
                found.add(following)
                pending.append(following)
    return found


def log_of(dag, states):
    events = [each for node, state in zip(dag, states, strict=True) for each in events_to(state, node)]
    return SagaLog.recover(ID, dag, events)


def successors(dag, states, bound):
    """What may be recorded next: a planned step's start, or the outcome of one under way."""
    log = log_of(dag, states)
    running = [node for node in dag if log.state(node) in (State.STARTED, State.UNDO_STARTED)]
    kinds = [(node, kind) for node in running for kind in EDGES[log.state(node)]]
    if len(running) < bound:
        steps = plan(dag, log, running, dag)
        kinds += [(step.node, UNDO_STARTED if step.undo else STARTED) for step in steps]
    for node, kind in kinds:
        log = log_of(dag, states)
        log.record(event(kind, node))
        yield tuple(log.states.values())


def test_exactly_the_pairs_that_runs_come_to_are_possible():
    # The parent has another child, whose failure turns the saga round while the first is anywhere.
    dag = dag_of(p="", c="p", other="")
    parent, child = list(dag).index("p"), list(dag).index("c")
    pairs = {(states[parent], states[child]) for states in reachable(dag)}
    assert pairs == {pair for pair in product(State, State) if may_be_parent(*pair)}


@pytest.mark.parametrize(("parent", "child"), list(product(State, State)), ids=lambda each: each.name)
def test_an_impossible_pair_of_parent_and_child_is_refused(parent, child):
    events = events_to(parent, "n1") + events_to(child, "n2")
    if may_be_parent(parent, child):
        assert SagaLog.recover(ID, TWO, events).states == {"n1": parent, "n2": child}
    else:
        with pytest.raises(ImpossiblePairError, match=r"'n2'.*'n1'") as caught:
            SagaLog.recover(ID, TWO, events)
        assert caught.value.node == "n2"


@pytest.mark.parametrize("bound", [1, 2, 99])
def test_a_run_never_comes_to_a_point_where_nothing_goes_on_and_nothing_is_over(bound):
    for states in reachable(DIAMOND, bound=bound):
        log = log_of(DIAMOND, states)
        over = log.succeeded or log.undone or log.stuck
        running = any(state in (State.STARTED, State.UNDO_STARTED) for state in states)
        assert over or running or plan(DIAMOND, log, (), DIAMOND)
        if log.undone:
            assert set(states) <= GONE


def test_nothing_is_planned_for_a_stuck_saga_nor_an_undo_above_a_step_in_line():
    dag = dag_of(a="", b="a", x="", y="x", z="b y")
    for states in reachable(dag):
        log = log_of(dag, states)
        if log.stuck:
            assert plan(dag, log, (), dag) == []
        for step in plan(dag, log, (), dag):
            if step.undo:
                for child in dag.children(step.node):
                    assert step not in plan(dag, log, {child}, dag)
            assert step not in plan(dag, log, {step.node}, dag)


# ------------------------------------------------------------------ foreign events


def test_events_of_other_sagas_and_nodes_are_refused():
    log = SagaLog(ID, TWO)
    with pytest.raises(ForeignEventError, match="of saga"):
        log.record(event(STARTED, saga_id=uuid4()))
    with pytest.raises(ForeignEventError, match="no node 'n3'") as caught:
        log.record(event(STARTED, "n3"))
    assert isinstance(caught.value, ValueError) and caught.value.node == "n3"
    assert log.events == ()
    with pytest.raises(ForeignEventError):
        SagaLog.recover(ID, TWO, [event(STARTED), event(STARTED, saga_id=uuid4())])


# ------------------------------------------------------------------ orders


def whole_logs():
    yield "done", TWO, recorded(TWO, Acts())
    yield "failed", TWO, recorded(TWO, Acts(fails=["n2"]))
    yield "stuck", TWO, recorded(TWO, Acts(fails=["n2"], undo_fails=["n1"]))


def content(log):
    return log.states, log.unwinding, log.stuck, log.failures(), log.failures(UNDO_FAILED), set(log.events)


@pytest.mark.parametrize(("dag", "events"), [pytest.param(*rest, id=name) for name, *rest in whole_logs()])
def test_every_permutation_of_every_part_of_a_log_recovers_to_the_same(dag, events):
    for length in range(len(events) + 1):
        saga_id = events[0].saga_id
        live = SagaLog(saga_id, dag)
        for each in events[:length]:
            live.record(each)
        for shuffled in permutations(events[:length]):
            assert content(SagaLog.recover(saga_id, dag, shuffled)) == content(live)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_order_of_a_larger_log_recovers_to_the_same(data):
    events = recorded(DIAMOND, Acts(fails=["d"]))
    shuffled = data.draw(st.permutations(events))
    log = SagaLog.recover(events[0].saga_id, DIAMOND, shuffled)
    assert log.undone and list(log.failures()) == ["d"]


@pytest.mark.parametrize(("dag", "events"), [pytest.param(*rest, id=name) for name, *rest in whole_logs()])
def test_an_event_that_is_there_twice_is_refused(dag, events):
    for each in events:
        with pytest.raises(IllegalTransitionError):
            SagaLog.recover(each.saga_id, dag, [*events, each])


@pytest.mark.parametrize(("dag", "events"), [pytest.param(*rest, id=name) for name, *rest in whole_logs()])
def test_a_log_with_a_hole_is_refused_or_what_a_run_can_leave(dag, events):
    possible = {tuple(each) for each in reachable(dag)}
    for hole in range(len(events)):
        rest = events[:hole] + events[hole + 1 :]
        try:
            log = SagaLog.recover(events[0].saga_id, dag, rest)
        except (IllegalTransitionError, ImpossiblePairError):
            continue
        assert tuple(log.states.values()) in possible
