"""What is known of a saga: its events, and the state of each node that follows from them.

Guarantees
----------
- :func:`next_state` is the one function that says how a node's state goes on. It is total: for each pair of
  state and event it gives the next state, or None for a pair that is illegal.
- A :class:`SagaLog` takes an event only if it is of its saga and of one of its nodes and legal there; an
  event it refuses has changed nothing.
- :meth:`SagaLog.recover` gives the same log for every order of the same events: they are sorted by kind, and
  the kinds are in an order in which every legal sequence is legal. Times play no part. It
  takes only logs that a run may have left: see :data:`_PARENTS_OF`.

A node's states::

    NEVER_STARTED --started--> STARTED --succeeded--> SUCCEEDED --undo_started--> UNDO_STARTED
                                  |                                                 |      |
                                failed                                   undo_finished   undo_failed
                                  v                                                 v      v
                               FAILED                                   UNDO_FINISHED    UNDO_FAILED

A log has no lock; its owner sees to it that nobody reads while it is written to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Final
from uuid import UUID

from fbcache.saga.dag import Dag
from fbcache.saga.encoding import decode, encode
from fbcache.saga.errors import ForeignEventError, IllegalTransitionError, ImpossiblePairError


class SagaNodeState(StrEnum):
    """Where a node is."""

    NEVER_STARTED = "never started"  #: nothing was recorded of it; it is not undone
    STARTED = "started"  #: its action runs, or ran when the process ended; it is run again then
    SUCCEEDED = "succeeded"  #: its output is recorded; children may start; it is undone if another fails
    FAILED = "failed"  #: its action failed, and so does the saga; it is not undone
    UNDO_STARTED = "undoing"  #: its undo runs, or ran when the process ended; it is run again then
    UNDO_FINISHED = "undone"  #: its undo is done
    UNDO_FAILED = "stuck"  #: its undo failed; the saga is stuck


class SagaEventKind(IntEnum):
    """What happened to a node. The numbers are the order in which recovery takes events."""

    STARTED = 1  #: its action is about to run
    SUCCEEDED = 2  #: its action has returned; the payload is the output
    FAILED = 3  #: its action has raised; the payload says what
    UNDO_STARTED = 4  #: its undo is about to run
    UNDO_FINISHED = 5  #: its undo has returned
    UNDO_FAILED = 6  #: its undo has raised; the payload says what


_EDGES: Final = {
    (SagaNodeState.NEVER_STARTED, SagaEventKind.STARTED): SagaNodeState.STARTED,
    (SagaNodeState.STARTED, SagaEventKind.SUCCEEDED): SagaNodeState.SUCCEEDED,
    (SagaNodeState.STARTED, SagaEventKind.FAILED): SagaNodeState.FAILED,
    (SagaNodeState.SUCCEEDED, SagaEventKind.UNDO_STARTED): SagaNodeState.UNDO_STARTED,
    (SagaNodeState.UNDO_STARTED, SagaEventKind.UNDO_FINISHED): SagaNodeState.UNDO_FINISHED,
    (SagaNodeState.UNDO_STARTED, SagaEventKind.UNDO_FAILED): SagaNodeState.UNDO_FAILED,
}

_ANY: Final = frozenset(SagaNodeState)
_DONE: Final = frozenset({SagaNodeState.SUCCEEDED})
_LET_GO: Final = _DONE | {
    SagaNodeState.UNDO_STARTED,
    SagaNodeState.UNDO_FINISHED,
    SagaNodeState.UNDO_FAILED,
}

#: The states that a node's parents may be in, by its own. A node starts only when its parents have
#: succeeded; and they are undone only when nothing of it is left: it never started, failed or is undone.
_PARENTS_OF: Final = {
    SagaNodeState.NEVER_STARTED: _ANY,
    SagaNodeState.STARTED: _DONE,
    SagaNodeState.SUCCEEDED: _DONE,
    SagaNodeState.FAILED: _LET_GO,
    SagaNodeState.UNDO_STARTED: _DONE,
    SagaNodeState.UNDO_FINISHED: _LET_GO,
    SagaNodeState.UNDO_FAILED: _DONE,
}

#: The states of which each shows that the saga goes backwards.
_BACKWARDS: Final = _LET_GO - _DONE | {SagaNodeState.FAILED}

#: The output of an event without payload.
_NOTHING: Final = encode(None)

#: The states in which nothing of a node is left to be undone.
GONE: Final = frozenset({SagaNodeState.NEVER_STARTED, SagaNodeState.FAILED, SagaNodeState.UNDO_FINISHED})


def next_state(state: SagaNodeState, kind: SagaEventKind) -> SagaNodeState | None:
    """Return a node's state after an event, or None where that event is illegal."""
    return _EDGES.get((state, kind))


def may_be_parent(parent: SagaNodeState, child: SagaNodeState) -> bool:
    """Whether a node in state ``parent`` can have a child in state ``child``."""
    return parent in _PARENTS_OF[child]


@dataclass(frozen=True, slots=True)
class SagaNodeEvent:
    """One event of one node.

    Attributes
    ----------
    saga_id : UUID
        The saga.
    node : str
        The node's name.
    kind : SagaEventKind
        What happened.
    payload : bytes or None
        The encoded output of an action that succeeded, or reason of one that failed.
    """

    saga_id: UUID
    node: str
    kind: SagaEventKind
    payload: bytes | None = None


class SagaLog:
    """The events of one saga, and the states that follow."""

    __slots__ = ("_counts", "_dag", "_events", "_payloads", "_saga_id", "_states")

    def __init__(self, saga_id: UUID, dag: Dag) -> None:
        self._saga_id = saga_id
        self._dag = dag
        self._events: list[SagaNodeEvent] = []
        self._states = dict.fromkeys(dag, SagaNodeState.NEVER_STARTED)
        self._counts = Counter(self._states.values())
        self._payloads: dict[tuple[str, SagaEventKind], bytes] = {}

    @classmethod
    def recover(cls, saga_id: UUID, dag: Dag, events: Iterable[SagaNodeEvent]) -> SagaLog:
        """Return the log of these events, whatever their order.

        Raises
        ------
        ForeignEventError, IllegalTransitionError, ImpossiblePairError
            No run of this saga can have recorded these events.
        """
        log = cls(saga_id, dag)
        for event in sorted(events, key=lambda event: event.kind):
            log.record(event)
        log._check_pairs()
        return log

    @property
    def saga_id(self) -> UUID:
        """The saga's id."""
        return self._saga_id

    @property
    def events(self) -> tuple[SagaNodeEvent, ...]:
        """The events, in the order in which they were recorded."""
        return tuple(self._events)

    @property
    def states(self) -> dict[str, SagaNodeState]:
        """The state of each node, now."""
        return dict(self._states)

    def state(self, node: str) -> SagaNodeState:
        """Return the state of a node."""
        return self._states[self._dag[node].name]

    @property
    def unwinding(self) -> bool:
        """Whether a node has failed, so that the saga goes backwards."""
        return any(self._counts[state] for state in _BACKWARDS)

    @property
    def stuck(self) -> bool:
        """Whether an undo has failed."""
        return self._counts[SagaNodeState.UNDO_FAILED] > 0

    @property
    def succeeded(self) -> bool:
        """Whether every node has."""
        return self._counts[SagaNodeState.SUCCEEDED] == len(self._states)

    @property
    def undone(self) -> bool:
        """Whether the saga went backwards and nothing is left to be undone."""
        return self.unwinding and sum(self._counts[state] for state in GONE) == len(self._states)

    def check(self, event: SagaNodeEvent) -> SagaNodeState:
        """Return the node's state after ``event``, which is not recorded.

        Raises
        ------
        ForeignEventError
            It is of another saga, or of a node that this one does not have.
        IllegalTransitionError
            It cannot follow on the node's state.
        """
        if event.saga_id != self._saga_id:
            message = f"an event of saga {event.saga_id} is in the log of saga {self._saga_id}"
            raise ForeignEventError(message, self._saga_id, event.node)
        before = self._states.get(event.node)
        if before is None:
            message = f"saga {self._saga_id} has no node {event.node!r}, of which there is an event"
            raise ForeignEventError(message, self._saga_id, event.node)
        after = next_state(before, event.kind)
        if after is None:
            where = f"node {event.node!r} of saga {self._saga_id}"
            message = f"{where} is {before}: {event.kind.name} cannot follow"
            raise IllegalTransitionError(message, self._saga_id, event.node)
        return after

    def record(self, event: SagaNodeEvent) -> None:
        """Take an event in. Raises what :meth:`check` does, and has changed nothing then."""
        after = self.check(event)
        self._counts[self._states[event.node]] -= 1
        self._counts[after] += 1
        self._states[event.node] = after
        self._events.append(event)
        if event.payload is not None:
            self._payloads[event.node, event.kind] = event.payload

    def output(self, node: str) -> Any:
        """Return the output of a node that has succeeded, a value of its own each time."""
        return decode(self.packed_output(node))

    def packed_output(self, node: str) -> bytes:
        """Return the encoded output of a node that has succeeded."""
        return self._payloads.get((node, SagaEventKind.SUCCEEDED), _NOTHING)

    def failures(self, kind: SagaEventKind = SagaEventKind.FAILED) -> dict[str, str]:
        """Return why nodes failed, in the order in which that was recorded."""
        return {
            event.node: "" if event.payload is None else str(decode(event.payload))
            for event in self._events
            if event.kind is kind
        }

    def _check_pairs(self) -> None:
        for node, state in self._states.items():
            for parent in self._dag.parents(node):
                if not may_be_parent(self._states[parent], state):
                    message = (
                        f"saga {self._saga_id}: node {node!r} is {state}, which its parent {parent!r}, "
                        f"{self._states[parent]}, rules out; the log is damaged"
                    )
                    raise ImpossiblePairError(message, self._saga_id, node)
