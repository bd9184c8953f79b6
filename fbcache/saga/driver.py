"""The thread that carries sagas on: it plans, records and hands out; it runs no action itself.

Guarantees
----------
- What a step needs to have happened is in the store before the step begins: an action's start before it
  runs, an outcome before any child starts, a failure and the turn backwards before any undo.
- If the store raises, nothing more of that saga begins. What runs is let end, and its outcome is offered to
  the store; then the saga ends with that error. Others go on.
- A sync action is recorded as started only when a thread is free for it. So when another fails, what was only
  in line has not started, and is not undone. Async ones start at once.
- A saga's future is resolved after its last step has ended, when its view says so too; not under the lock.

Everything here happens on one thread, in the order of one queue of messages, which all threads may send to.
So ``_line``, ``_free`` and ``_active`` need no lock. What others read of a saga is written under the
executor's lock; no store's, action's or future's code is called under it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from queue import SimpleQueue
from typing import Any

from fbcache.errors import InternalError
from fbcache.saga.actions import ActionFunction, ActionRegistry, is_async
from fbcache.saga.encoding import encode
from fbcache.saga.instance import Phase, Saga, describe
from fbcache.saga.log import SagaEventKind, SagaNodeEvent, SagaNodeState
from fbcache.saga.planning import Step, affected, plan
from fbcache.saga.running import Job, Outcome, Runners
from fbcache.saga.store import SagaCachedState, SagaStore


class Driver:
    """Carries on the sagas of one executor.

    Parameters
    ----------
    store : SagaStore
        Where to record.
    actions : ActionRegistry
        What nodes do.
    threads : int
        How many sync actions run at once.
    lock : Lock
        The executor's.
    ended : callable
        Called with each saga that has ended, under the lock.
    """

    def __init__(
        self,
        store: SagaStore,
        actions: ActionRegistry,
        threads: int,
        lock: threading.Lock,
        ended: Callable[[Saga], None],
    ) -> None:
        self._store = store
        self._actions = actions
        self._lock = lock
        self._on_end = ended
        self._runners = Runners(threads)
        self._messages: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._line: deque[tuple[Saga, Step]] = deque()
        self._free = threads
        self._active = 0
        self._stopping = False
        # A daemon: a program that ends without `shutdown` ends, and the store has what it needs.
        self._thread = threading.Thread(target=self._work, name="fbcache-saga-driver", daemon=True)
        self._thread.start()

    @property
    def calls_here(self) -> bool:
        """Whether the caller is an action, or a callback of a future: waiting would never end."""
        return threading.current_thread() is self._thread or self._runners.running_here

    def begin(self, saga: Saga) -> None:
        """Carry a saga on, from whatever its log says."""
        self._messages.put(partial(self._handle, saga, self._begin))

    def stop(self) -> None:
        """End the threads once no saga is active. Nothing is begun afterwards."""
        self._messages.put(self._note_stop)

    def join(self) -> None:
        """Wait for the threads' end."""
        self._thread.join()

    # -------------------------------------------------------------------------- messages

    def _work(self) -> None:
        while not (self._stopping and self._active == 0):
            self._messages.get()()
            self._hand_out()
        self._runners.close()

    def _note_stop(self) -> None:
        self._stopping = True

    def _handle(self, saga: Saga, act: Callable[..., None], *arguments: Any) -> None:
        """Do something for a saga; whatever it raises stops that saga, and no other."""
        try:
            act(saga, *arguments)
        except BaseException as error:
            self._halt(saga, error)
        if saga.phase is Phase.ACTIVE and not saga.busy:
            self._end(saga)

    def _begin(self, saga: Saga) -> None:
        self._active += 1
        self._advance(saga, saga.dag.dag)

    def _step_ended(self, saga: Saga, step: Step, threads: int, outcome: Outcome) -> None:
        self._free += threads
        with self._lock:
            saga.busy.discard(step.node)
            if outcome.error is not None:
                saga.causes[step.node] = outcome.error
        self._record(saga, _event(saga, step, outcome))
        self._advance(saga, affected(saga.dag.dag, saga.log, step.node))

    # ------------------------------------------------------------------------------ steps

    def _advance(self, saga: Saga, candidates: Iterable[str]) -> None:
        if saga.halted is not None:
            return
        if saga.log.stuck:
            self._leave_line(saga, everything=True)
        elif saga.log.unwinding:
            self._leave_line(saga)
            if saga.cached is SagaCachedState.RUNNING:
                self._store.saga_update(saga.id, SagaCachedState.UNWINDING)
                saga.cached = SagaCachedState.UNWINDING
        for step in plan(saga.dag.dag, saga.log, saga.busy, candidates):
            with self._lock:
                saga.busy.add(step.node)
            if is_async(self._function(saga, step)):
                self._launch(saga, step)
            else:
                self._line.append((saga, step))

    def _hand_out(self) -> None:
        while self._free and self._line:
            saga, step = self._line.popleft()
            self._handle(saga, self._launch, step)

    def _launch(self, saga: Saga, step: Step) -> None:
        job = self._job(saga, step)
        threads = 0 if job.is_async else 1
        self._free -= threads
        try:
            if saga.log.state(step.node) in (SagaNodeState.NEVER_STARTED, SagaNodeState.SUCCEEDED):
                kind = SagaEventKind.UNDO_STARTED if step.undo else SagaEventKind.STARTED
                self._record(saga, SagaNodeEvent(saga.id, step.node, kind))
            self._runners.submit(job, partial(self._report, saga, step, threads))
        except BaseException:
            self._free += threads
            with self._lock:
                saga.busy.discard(step.node)
            raise

    def _report(self, saga: Saga, step: Step, threads: int, outcome: Outcome) -> None:
        self._messages.put(partial(self._handle, saga, self._step_ended, step, threads, outcome))

    def _job(self, saga: Saga, step: Step) -> Job:
        with self._lock:
            calls = saga.injections.calls(step.node, undo=step.undo)
        return Job(self._function(saga, step), saga.context(step), calls)

    def _function(self, saga: Saga, step: Step) -> ActionFunction | None:
        action = self._actions[saga.dag.dag[step.node].action]
        return action.undo if step.undo else action.do

    def _record(self, saga: Saga, event: SagaNodeEvent) -> None:
        saga.log.check(event)
        self._store.record_event(event)
        with self._lock:
            saga.log.record(event)

    # -------------------------------------------------------------------------------- end

    def _halt(self, saga: Saga, error: BaseException) -> None:
        with self._lock:
            if saga.halted is None:
                saga.halted = error
        self._leave_line(saga, everything=True)

    def _leave_line(self, saga: Saga, *, everything: bool = False) -> None:
        """Take out of the line what has not started; what had before a crash is to be run again."""
        stay: deque[tuple[Saga, Step]] = deque()
        for other, step in self._line:
            if other is saga and (everything or saga.log.state(step.node) is SagaNodeState.NEVER_STARTED):
                with self._lock:
                    saga.busy.discard(step.node)
            else:
                stay.append((other, step))
        self._line = stay

    def _end(self, saga: Saga) -> None:
        if not saga.is_over():
            message = f"saga {saga.id} has nothing to do and is not done: {saga.log.states}"
            self._halt(saga, InternalError(message))
        if saga.halted is None and not saga.log.stuck:
            try:
                self._store.saga_update(saga.id, SagaCachedState.DONE)
            except BaseException as error:
                self._halt(saga, error)
        with self._lock:
            saga.phase = Phase.ENDED
            self._on_end(saga)
        self._active -= 1
        saga.resolve()


def _event(saga: Saga, step: Step, outcome: Outcome) -> SagaNodeEvent:
    if outcome.error is None:
        kind = SagaEventKind.UNDO_FINISHED if step.undo else SagaEventKind.SUCCEEDED
        return SagaNodeEvent(saga.id, step.node, kind, outcome.output)
    kind = SagaEventKind.UNDO_FAILED if step.undo else SagaEventKind.FAILED
    return SagaNodeEvent(saga.id, step.node, kind, encode(describe(outcome.error)))
