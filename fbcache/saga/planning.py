"""What a saga does next. Pure: a log and what is under way go in, steps come out.

Guarantees
----------
- An action is planned only when all parents have succeeded and nothing has failed, or when it had
  started before a crash: that one must end before anybody can know whether it is to be undone.
- An undo is planned only when something has failed and nothing is left of any child: it never started and is
  not about to, failed, or is undone. What never started and what failed is not undone.
- Once an undo has failed, nothing is planned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fbcache.saga.dag import Dag
from fbcache.saga.log import GONE, SagaLog, SagaNodeState


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do.

    Attributes
    ----------
    node : str
        The node.
    undo : bool
        Whether its undo is to run, rather than its action.
    """

    node: str
    undo: bool


def plan(dag: Dag, log: SagaLog, busy: Collection[str], candidates: Iterable[str]) -> list[Step]:
    """Return the steps that may be taken now.

    Parameters
    ----------
    dag, log
        The saga.
    busy : collection of str
        Nodes with a step that was planned and has not ended.
    candidates : iterable of str
        Nodes to look at: all, or the neighbours of the one that has changed.
    """
    if log.stuck:
        return []
    judge = _backwards if log.unwinding else _forwards
    steps = (judge(dag, log, busy, node) for node in candidates if node not in busy)
    return [step for step in steps if step is not None]


def affected(dag: Dag, log: SagaLog, node: str) -> Iterable[str]:
    """Return the nodes that may have something to do because of the last event of ``node``."""
    if not log.unwinding:
        return dag.children(node)
    # The first failure turns the saga round: any node may be next.
    return dag if log.state(node) is SagaNodeState.FAILED else (node, *dag.parents(node))


def _forwards(dag: Dag, log: SagaLog, busy: Collection[str], node: str) -> Step | None:
    state = log.state(node)
    if state is SagaNodeState.STARTED:
        return Step(node, undo=False)
    if state is SagaNodeState.NEVER_STARTED and all(
        log.state(parent) is SagaNodeState.SUCCEEDED for parent in dag.parents(node)
    ):
        return Step(node, undo=False)
    return None


def _backwards(dag: Dag, log: SagaLog, busy: Collection[str], node: str) -> Step | None:
    state = log.state(node)
    if state is SagaNodeState.STARTED:
        return Step(node, undo=False)
    if state in (SagaNodeState.SUCCEEDED, SagaNodeState.UNDO_STARTED) and all(
        log.state(child) in GONE and child not in busy for child in dag.children(node)
    ):
        return Step(node, undo=True)
    return None
