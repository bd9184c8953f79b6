"""One saga in an executor: what there is of it in memory, and how it ended.

Fields are guarded by the executor's lock, except that the driver's thread, the only one that writes to
``log``, ``busy``, ``halted``, ``cached`` and ``causes``, reads those without it.

Phases::

    READY --saga_start--> ACTIVE --nothing left to do, or stopped--> ENDED
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from uuid import UUID

from fbcache.saga.actions import ActionContext
from fbcache.saga.dag import SagaDag
from fbcache.saga.encoding import decode
from fbcache.saga.errors import (
    ActionFailedError,
    SagaFailedError,
    SagaStoppedError,
    SagaStuckError,
    UnknownNodeError,
)
from fbcache.saga.inject import Injections
from fbcache.saga.log import SagaEventKind, SagaLog, SagaNodeState
from fbcache.saga.planning import Step
from fbcache.saga.store import SagaCachedState
from fbcache.saga.view import SagaStatus, SagaView, status_of


class Phase(Enum):
    """Where a saga is in its executor."""

    READY = 1  #: created or resumed, not started: nothing runs
    ACTIVE = 2  #: started; the driver has it
    ENDED = 3  #: its future is, or is about to be, resolved


@dataclass(frozen=True, slots=True)
class SagaResult:
    """What a saga that succeeded has given.

    Attributes
    ----------
    saga_id : UUID
        The saga.
    name : str
        Its name.
    """

    saga_id: UUID
    name: str
    _outputs: Mapping[str, bytes] = field(repr=False)

    def lookup(self, node: str) -> Any:
        """Return the output of a node, a value of its own each time.

        Raises
        ------
        UnknownNodeError
            There is no such node.
        """
        try:
            return decode(self._outputs[node])
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self._outputs))
            raise UnknownNodeError(f"there is no node {node!r}; there are {known}") from None

    @property
    def outputs(self) -> dict[str, Any]:
        """The outputs of all nodes, by name."""
        return {node: decode(packed) for node, packed in self._outputs.items()}


@dataclass(eq=False, slots=True)
class Saga:
    """A saga; see this module for who may touch what.

    Attributes
    ----------
    id, name, dag
        As it was created.
    log : SagaLog
        Its log; has only what the store has recorded.
    cached : SagaCachedState
        What the store was last told.
    phase : Phase
        Where it is.
    injections : Injections
        Faults on demand.
    busy : set of str
        Nodes with a step that is in line or runs.
    halted : BaseException or None
        Why it was stopped before its next step.
    causes : dict of str to BaseException
        What actions and undos of this process have raised.
    future : Future
        Its result.
    """

    id: UUID
    name: str
    dag: SagaDag
    log: SagaLog
    cached: SagaCachedState = SagaCachedState.RUNNING
    phase: Phase = Phase.READY
    injections: Injections = field(default_factory=Injections)
    busy: set[str] = field(default_factory=set)
    halted: BaseException | None = None
    causes: dict[str, BaseException] = field(default_factory=dict)
    future: Future[SagaResult] = field(default_factory=Future)

    def context(self, step: Step) -> ActionContext:
        """Return what the step's function is called with."""
        visible = self.dag.dag.ancestors(step.node)
        if step.undo:
            visible |= {step.node}
        return ActionContext(
            self.id,
            self.name,
            step.node,
            undoing=step.undo,
            params=self.dag.packed_params,
            outputs={name: self.log.packed_output(name) for name in self.dag.dag if name in visible},
        )

    def is_over(self) -> bool:
        """Whether there is nothing more to do, once no step is under way."""
        return self.halted is not None or self.log.stuck or self.log.succeeded or self.log.undone

    def view(self) -> SagaView:
        """Return what there is to see. Under the lock."""
        return SagaView(
            self.id, self.name, self.dag.dag, self.status(), self.log.states, self._reasons(), self._trouble()
        )

    def status(self) -> SagaStatus:
        """Return its status. Under the lock."""
        if self.phase is Phase.READY:
            return SagaStatus.READY
        return SagaStatus.STOPPED if self.halted is not None else status_of(self.log)

    def _reasons(self) -> dict[str, str]:
        return {**self.log.failures(), **self.log.failures(SagaEventKind.UNDO_FAILED)}

    def _trouble(self) -> str:
        return "" if self.halted is None else describe(self.halted)

    def resolve(self) -> None:
        """Give the future its result, unless its owner has cancelled it. Not under the lock."""
        if not self.future.set_running_or_notify_cancel():
            return
        error = self._error()
        if error is None:
            self.future.set_result(
                SagaResult(self.id, self.name, {node: self.log.packed_output(node) for node in self.dag.dag})
            )
        else:
            self.future.set_exception(error)

    def _error(self) -> BaseException | None:
        who = f"saga {self.name!r} {self.id}"
        failures = self.log.failures()
        undo_failures = self.log.failures(SagaEventKind.UNDO_FAILED)
        if self.halted is not None:
            stopped = SagaStoppedError(
                f"{who} was stopped before its next step: {describe(self.halted)}. Mend the store, and "
                "`saga_resume` goes on",
                self.id,
            )
            stopped.__cause__ = self.halted
            return stopped
        if self.log.stuck:
            states = {node: str(state) for node, state in self.log.states.items()}
            message = (
                f"{who} is stuck: {_listed(undo_failures, 'the undo of ')}, after {_listed(failures)}. "
                f"Something is left of {_left(states)}; see to it by hand, nothing more is run or undone"
            )
            stuck = SagaStuckError(message, self.id, failures, undo_failures, states)
            stuck.__cause__ = self._cause(undo_failures)
            return stuck
        if self.log.undone:
            failed = SagaFailedError(
                f"{who} failed, and what had finished was undone: {_listed(failures)}", self.id, failures
            )
            failed.__cause__ = self._cause(failures)
            return failed
        return None

    def _cause(self, failures: Mapping[str, str]) -> BaseException:
        node, reason = next(iter(failures.items()))
        return self.causes.get(node) or ActionFailedError(f"{reason} (recorded by an earlier process)")


def describe(error: BaseException) -> str:
    """Return an exception as one line; never raises."""
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "its message cannot be shown"
    return f"{kind}: {text}" if text else kind


def _listed(failures: Mapping[str, str], what: str = "") -> str:
    return "; ".join(f"{what}node {node!r} failed with {reason}" for node, reason in failures.items())


def _left(states: Mapping[str, str]) -> str:
    gone = (SagaNodeState.NEVER_STARTED, SagaNodeState.FAILED, SagaNodeState.UNDO_FINISHED)
    return ", ".join(repr(node) for node, state in states.items() if state not in gone)
