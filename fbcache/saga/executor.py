"""``SagaExecutor``: creates, starts, resumes and shows sagas. What happens to a started one is the driver's.

Guarantees
----------
- No call waits for an action, except ``shutdown`` when told to. Those that write or read the store
  (``saga_create``, ``saga_resume``, ``recover``) wait for the store, in the caller's thread.
- The record of a new saga is durable before ``saga_create`` returns.
- A started saga ends: its future is resolved once no step of it is under way. Cancelling that is harmless.

Threads and locks
-----------------
``_lock`` guards the table of sagas, the reserved ids, whether the executor is open, and of each saga
what :mod:`fbcache.saga.instance` says. It is held for moments only; no code of a store, an action or a
future runs under it, and no other lock is taken under it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from threading import Lock
from types import TracebackType
from typing import Any, Final
from uuid import UUID

from fbcache.saga.actions import ActionRegistry, registry_of
from fbcache.saga.checks import check_count, check_dag, check_id, check_name
from fbcache.saga.dag import Dag, SagaDag
from fbcache.saga.driver import Driver
from fbcache.saga.errors import (
    CorruptSagaError,
    ExecutorClosedError,
    SagaExistsError,
    SagaLogError,
    SagaStateError,
    UnknownActionError,
    UnknownSagaError,
)
from fbcache.saga.instance import Phase, Saga, SagaResult
from fbcache.saga.log import SagaLog, SagaNodeEvent
from fbcache.saga.store import SagaCreateParams, SagaStore
from fbcache.saga.view import SagaView

#: How many sagas that have ended are remembered, for ``saga_get``; a long-lived executor must not grow.
_REMEMBERED: Final = 1000


class SagaExecutor:
    """Runs sagas. A context manager; otherwise call :meth:`shutdown`.

    Parameters
    ----------
    store : SagaStore
        Where sagas are recorded. It stays the caller's, who closes it after ``shutdown``.
    actions : ActionRegistry or mapping
        The actions by name; a mapping has ``(do, undo)``, an :class:`Action` or a function under each.
    threads : int, optional
        How many sync actions run at once. Default: four more than there are processors, at most 32.

    Notes
    -----
    Callbacks of futures run on the thread that carries all sagas on, and must not block. An action may call
    any method but a waiting ``shutdown``; one that waits for another saga takes a thread from it.
    """

    def __init__(
        self, store: SagaStore, actions: ActionRegistry | Mapping[str, Any], *, threads: int | None = None
    ) -> None:
        if threads is None:
            threads = min(32, (os.cpu_count() or 1) + 4)
        self._store = store
        self._actions = registry_of(actions)
        self._lock = Lock()
        self._sagas: dict[UUID, Saga] = {}
        self._reserved: set[UUID] = set()
        self._ended: deque[Saga] = deque()
        self._open = True
        self._pid = os.getpid()
        self._driver = Driver(
            store, self._actions, check_count("threads", threads), self._lock, self._ended.append
        )

    def __repr__(self) -> str:
        return f"<SagaExecutor, {'open' if self._open else 'closed'}: {len(self._sagas)} sagas>"

    # --------------------------------------------------------------------------- beginning

    def saga_create(self, saga_id: UUID, name: str, dag: Dag, params: Any = None) -> Future[SagaResult]:
        """Record a new saga. Nothing of it runs before :meth:`saga_start`.

        Parameters
        ----------
        saga_id : UUID
            Its id, ``uuid.uuid4()`` say.
        name : str
            Its name, for people.
        dag : Dag
            Its nodes.
        params : Any
            What every action sees as ``context.params``.

        Returns
        -------
        Future
            Ends with a :class:`SagaResult`, or raises :class:`SagaFailedError`, :class:`SagaStuckError`,
            :class:`SagaStoppedError`, or, if the executor is shut down before it was started,
            :class:`ExecutorClosedError`.

        Raises
        ------
        TypeError
            An argument is of the wrong kind.
        SagaExistsError
            The id is in use.
        UnknownActionError
            A node's action is not registered.
        OutputError
            The parameters cannot be recorded without pickle.
        SagaStoreError
            It could not be recorded; whether it was is known when the store is read again.
        ExecutorClosedError
            The executor was shut down.

        After an error the executor has no such saga.
        """
        check_name(name)
        saga = self._make(saga_id, name, SagaDag.of(check_dag(dag), params), ())
        self._reserve(saga_id)
        try:
            self._store.saga_create(SagaCreateParams(saga.id, saga.name, saga.dag))
            return self._insert(saga)
        finally:
            self._release(saga_id)

    def saga_start(self, saga_id: UUID) -> None:
        """Let a saga run that was created or resumed.

        Raises
        ------
        UnknownSagaError
            There is none with this id.
        SagaStateError
            It was started already.
        ExecutorClosedError
            The executor was shut down.
        """
        with self._lock:
            saga = self._find(saga_id)
            self._check_open()
            if saga.phase is not Phase.READY:
                raise SagaStateError(f"saga {saga_id} is {saga.status()}: it was started, which is done once")
            saga.phase = Phase.ACTIVE
            # Under the lock, so that a shutdown comes wholly before or after.
            self._driver.begin(saga)

    def saga_resume(
        self,
        saga_id: UUID,
        name: str | None = None,
        dag: Dag | None = None,
        params: Any = None,
        *,
        events: Iterable[SagaNodeEvent] | None = None,
    ) -> Future[SagaResult]:
        """Take up a saga from its log. Nothing of it runs before :meth:`saga_start`.

        With an id alone it is read from the store; one that was stopped in this executor is taken up from
        memory if the store keeps nothing. With ``name`` and ``dag`` it is what these say, and its log is
        ``events``, in any order.

        Returns
        -------
        Future
            As :meth:`saga_create` does.

        Raises
        ------
        SagaExistsError
            This executor has the saga, and it was not stopped.
        UnknownSagaError
            The store does not have it.
        CorruptSagaError, SagaLogError
            What was recorded cannot be read, or is nothing that a run could have recorded.
        UnknownActionError
            A node's action is not registered.
        SagaStoreError
            The store could not be read.
        ExecutorClosedError
            The executor was shut down.

        After an error the executor is as it was.
        """
        check_id(saga_id)
        if dag is None and not (name is None and params is None and events is None):
            raise TypeError("give the saga's id alone, or its name and dag too")
        self._reserve(saga_id, stopped=True)
        try:
            if dag is None:
                saga = self._load(saga_id)
            else:
                saga = self._make(saga_id, check_name(name), SagaDag.of(check_dag(dag), params), events or ())
            return self._insert(saga)
        finally:
            self._release(saga_id)

    def recover(self, *, start: bool = True) -> dict[UUID, Future[SagaResult]]:
        """Resume, and start, all sagas of the store that are not done. One that is stuck is listed as such.

        A saga that was created and never started is among them: the store does not know the difference.

        Parameters
        ----------
        start : bool
            Whether to start them.

        Returns
        -------
        dict of UUID to Future
            Their futures. One that cannot be resumed has its error in its future, and is left as it is.

        Raises
        ------
        SagaStoreError
            The store could not be read.
        ExecutorClosedError
            The executor was shut down.
        """
        futures: dict[UUID, Future[SagaResult]] = {}
        for saga_id in self._store.saga_list(unfinished=True):
            try:
                futures[saga_id] = self.saga_resume(saga_id)
            except SagaExistsError:  # this executor's own
                continue
            except (CorruptSagaError, SagaLogError, UnknownActionError, UnknownSagaError) as error:
                futures[saga_id] = Future()
                futures[saga_id].set_exception(error)
            else:
                if start:
                    self.saga_start(saga_id)
        return futures

    # ----------------------------------------------------------------------------- looking

    def saga_list(self) -> list[SagaView]:
        """Return the sagas of this executor, oldest first; of those that ended, the last thousand."""
        with self._lock:
            return [saga.view() for saga in self._sagas.values()]

    def saga_get(self, saga_id: UUID) -> SagaView:
        """Return how a saga is now.

        Raises
        ------
        UnknownSagaError
            This executor has none with this id.
        """
        with self._lock:
            return self._find(saga_id).view()

    # --------------------------------------------------------------------------- injecting

    def saga_inject_error(self, saga_id: UUID, node: str) -> None:
        """Have a node's action fail without being called. An action that runs already is not affected.

        Raises
        ------
        UnknownSagaError, UnknownNodeError
            There is none of that id or name.
        SagaStateError
            The saga has ended.
        """
        with self._lock:
            self._injectable(saga_id, node).injections.errors.add(node)

    def saga_inject_error_undo(self, saga_id: UUID, node: str) -> None:
        """Have a node's undo fail without being called; raises what :meth:`saga_inject_error` does."""
        with self._lock:
            self._injectable(saga_id, node).injections.undo_errors.add(node)

    def saga_inject_repeat(self, saga_id: UUID, node: str, *, action: int = 1, undo: int = 1) -> None:
        """Have a node's action, or undo, called several times, as after crashes; the last output counts.

        Raises what :meth:`saga_inject_error` does, and ``ValueError`` for a number below one.
        """
        check_count("action", action)
        check_count("undo", undo)
        with self._lock:
            injections = self._injectable(saga_id, node).injections
            injections.repeats[node] = action
            injections.undo_repeats[node] = undo

    # --------------------------------------------------------------------------------- end

    def shutdown(self, *, wait: bool = True) -> None:
        """Take no more sagas, and let the started ones end. May be called again.

        Those never started have :class:`ExecutorClosedError` in their future; they stay in the store.

        Parameters
        ----------
        wait : bool
            Wait until they have ended, and the threads too.

        Raises
        ------
        SagaStateError
            An action, or a future's callback, would wait for its own end. Nothing was changed.
        """
        if os.getpid() != self._pid:
            return  # the threads are the parent's
        if wait and self._driver.calls_here:
            raise SagaStateError("an action or callback would wait for its own end; use wait=False")
        with self._lock:
            was_open, self._open = self._open, False
            unstarted = [saga for saga in self._sagas.values() if saga.phase is Phase.READY]
        if was_open:
            self._driver.stop()
        for saga in unstarted if was_open else ():
            if saga.future.set_running_or_notify_cancel():
                message = f"saga {saga.id} was never started, and the executor is shut down; recover it later"
                saga.future.set_exception(ExecutorClosedError(message))
        if wait:
            self._driver.join()

    def __enter__(self) -> SagaExecutor:
        """Return the executor."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down, and wait."""
        self.shutdown()

    # --------------------------------------------------------------------------- mechanism

    def _make(self, saga_id: UUID, name: str, dag: SagaDag, events: Iterable[SagaNodeEvent]) -> Saga:
        check_id(saga_id)
        for node in dag.dag.nodes.values():
            self._actions[node.action]  # raises where there is none
        return Saga(saga_id, name, dag, SagaLog.recover(saga_id, dag.dag, events))

    def _load(self, saga_id: UUID) -> Saga:
        with self._lock:
            stopped = self._sagas.get(saga_id)
        if stopped is not None and not self._store.recovers:
            return self._make(saga_id, stopped.name, stopped.dag, stopped.log.events)
        record = self._store.saga_load(saga_id)
        saga = self._make(saga_id, record.params.name, record.params.dag, record.events)
        saga.cached = record.params.state
        return saga

    def _reserve(self, saga_id: UUID, *, stopped: bool = False) -> None:
        """Keep an id for this call; ``stopped`` allows one of a saga that was stopped."""
        with self._lock:
            self._check_open()
            known = self._sagas.get(saga_id)
            may_replace = stopped and known is not None and known.phase is Phase.ENDED and known.halted
            if saga_id in self._reserved or (known is not None and not may_replace):
                status = "being created" if known is None else known.status()
                raise SagaExistsError(f"saga {saga_id} is in this executor already, {status}")
            self._reserved.add(saga_id)

    def _release(self, saga_id: UUID) -> None:
        with self._lock:
            self._reserved.discard(saga_id)

    def _insert(self, saga: Saga) -> Future[SagaResult]:
        with self._lock:
            self._check_open()
            self._sagas.pop(saga.id, None)  # one that was stopped; the new one comes last
            self._sagas[saga.id] = saga
            while len(self._ended) > _REMEMBERED:
                oldest = self._ended.popleft()
                if self._sagas.get(oldest.id) is oldest:
                    del self._sagas[oldest.id]
        return saga.future

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise ExecutorClosedError("this executor is the parent process's; make one in this process")
        if not self._open:
            raise ExecutorClosedError("this executor was shut down; make another, and recover what is left")

    def _find(self, saga_id: UUID) -> Saga:
        try:
            return self._sagas[saga_id]
        except (KeyError, TypeError):
            raise UnknownSagaError(f"there is no saga {saga_id} here; create it, or resume it") from None

    def _injectable(self, saga_id: UUID, node: str) -> Saga:
        saga = self._find(saga_id)
        saga.dag.dag[node]  # raises where there is none
        if saga.phase is Phase.ENDED:
            raise SagaStateError(f"saga {saga_id} is {saga.status()}; inject before it ends")
        return saga

