"""Sagas for tests: actions that count, stores that fail or hold, logs of whole runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any
from uuid import UUID, uuid4

from fbcache.saga import (
    ActionContext,
    ActionRegistry,
    Dag,
    DagBuilder,
    InMemorySagaStore,
    SagaCachedState,
    SagaCreateParams,
    SagaEventKind,
    SagaExecutor,
    SagaNodeEvent,
    SagaRecord,
    SagaStore,
)
from tests.faults import PATIENCE

STARTED, SUCCEEDED, FAILED, UNDO_STARTED, UNDO_FINISHED, UNDO_FAILED = SagaEventKind


def chain(*names: str) -> Dag:
    """Each node after the one before."""
    builder = DagBuilder()
    for before, name in zip((None, *names), names, strict=False):
        builder.add(name, "act", after=() if before is None else before)
    return builder.build()


def dag_of(**after: str) -> Dag:
    """``dag_of(a="", b="a", c="a b")``: nodes, and what each waits for."""
    builder = DagBuilder()
    for name, parents in after.items():
        builder.add(name, "act", after=parents.split())
    return builder.build()


TWO = chain("n1", "n2")
DIAMOND = dag_of(a="", b="a", c="a", d="b c")


class Acts:
    """The action ``act``: counts its calls by node, and returns the node's name.

    Attributes
    ----------
    done, undone : Counter
        Calls of the action and of the undo, by node.
    journal : list of str
        ``"+a"`` for an action, ``"-a"`` for an undo, in the order in which they began.
    fails, undo_fails : set of str
        Nodes whose action or undo raises ``ValueError``.
    """

    def __init__(self, fails: Iterable[str] = (), undo_fails: Iterable[str] = ()) -> None:
        self.done: Counter[str] = Counter()
        self.undone: Counter[str] = Counter()
        self.journal: list[str] = []
        self.fails = set(fails)
        self.undo_fails = set(undo_fails)
        self._lock = threading.Lock()

    @property
    def registry(self) -> ActionRegistry:
        registry = ActionRegistry()
        registry.register("act", self._do, self._undo)
        return registry

    def counts(self, *names: str) -> tuple[tuple[int, int], ...]:
        """``(actions, undos)`` of each node."""
        return tuple((self.done[name], self.undone[name]) for name in names)

    def _do(self, context: ActionContext) -> str:
        with self._lock:
            self.done[context.node] += 1
            self.journal.append(f"+{context.node}")
        if context.node in self.fails:
            raise ValueError(f"{context.node} cannot")
        return context.node

    def _undo(self, context: ActionContext) -> None:
        with self._lock:
            self.undone[context.node] += 1
            self.journal.append(f"-{context.node}")
        assert context.lookup(context.node) == context.node
        if context.node in self.undo_fails:
            raise ValueError(f"{context.node} cannot be undone")


class RecordingStore(InMemorySagaStore):
    """Keeps nothing to recover, but what a test can look at.

    Attributes
    ----------
    events : list of SagaNodeEvent
        In the order in which they were recorded.
    states : list of SagaCachedState
        What ``saga_update`` was told.
    """

    def __init__(self) -> None:
        self.events: list[SagaNodeEvent] = []
        self.states: list[SagaCachedState] = []

    def record_event(self, event: SagaNodeEvent) -> None:
        self.events.append(event)

    def saga_update(self, saga_id: UUID, state: SagaCachedState) -> None:
        self.states.append(state)


class TripStore:
    """Another store, in front of which something happens before or after the n-th write.

    Parameters
    ----------
    store : SagaStore
        The other store.
    trip : callable
        What happens; it may raise.
    nth : int
        At which write, from 1; all from there on with ``onwards``.
    after : bool
        Whether the write is made first.
    """

    def __init__(
        self,
        store: SagaStore,
        trip: Callable[[], None],
        nth: int,
        *,
        after: bool = False,
        onwards: bool = False,
    ) -> None:
        self.store = store
        self.writes = 0
        self.armed = True
        self._trip = trip
        self._nth = nth
        self._after = after
        self._onwards = onwards

    @property
    def recovers(self) -> bool:
        return self.store.recovers

    def saga_create(self, params: SagaCreateParams) -> None:
        self._write(self.store.saga_create, params)

    def record_event(self, event: SagaNodeEvent) -> None:
        self._write(self.store.record_event, event)

    def saga_update(self, saga_id: UUID, state: SagaCachedState) -> None:
        self._write(self.store.saga_update, saga_id, state)

    def saga_list(self, *, unfinished: bool = False) -> list[UUID]:
        return self.store.saga_list(unfinished=unfinished)

    def saga_load(self, saga_id: UUID) -> SagaRecord:
        return self.store.saga_load(saga_id)

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        self.writes += 1
        tripped = self.armed and (self.writes == self._nth or (self._onwards and self.writes > self._nth))
        if tripped and not self._after:
            self._trip()
        write(*arguments)
        if tripped and self._after:
            self._trip()


def run(executor: SagaExecutor, dag: Dag, params: Any = None, *, saga_id: UUID | None = None) -> Future[Any]:
    """Create and start a saga."""
    saga_id = saga_id or uuid4()
    future = executor.saga_create(saga_id, "test", dag, params)
    executor.saga_start(saga_id)
    return future


def ended(future: Future[Any]) -> BaseException | None:
    """Wait for a saga; return its error."""
    return future.exception(PATIENCE)


def recorded(dag: Dag, acts: Acts) -> list[SagaNodeEvent]:
    """The log of a whole run."""
    store = RecordingStore()
    with SagaExecutor(store, acts.registry) as executor:
        ended(run(executor, dag))
    return store.events


def of(events: Iterable[SagaNodeEvent]) -> list[str]:
    """``"STARTED a"`` for each event."""
    return [f"{event.kind.name} {event.node}" for event in events]
