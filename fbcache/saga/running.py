"""Where actions run: sync ones on a bounded number of threads, async ones on one event loop's thread.

Guarantees
----------
- Every job that :meth:`Runners.submit` has taken is reported on once, from some thread, whatever it raises:
  also ``SystemExit``, ``KeyboardInterrupt`` and a cancellation count as the action's failure and end no
  thread.
- An output is encoded before it is reported; one that needs pickle is the action's failure.
- The loop's thread starts with the first async action. When it ends, tasks that actions left behind are
  cancelled.

Only the driver's thread calls ``submit`` and ``close``; there is no lock.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from fbcache.errors import PickleRefusedError, UnsupportedTypeError
from fbcache.saga.actions import ActionContext, ActionFunction, is_async
from fbcache.saga.encoding import encode
from fbcache.saga.errors import InjectedError, OutputError

#: Whose action the running code belongs to.
_within: Final[ContextVar[object]] = ContextVar("fbcache-saga", default=None)


@dataclass(frozen=True, slots=True)
class Job:
    """A call to be made.

    Attributes
    ----------
    function : function or None
        The action, or its undo; None does nothing.
    context : ActionContext
        What it is called with.
    calls : int
        How often; 0: fail instead.
    """

    function: ActionFunction | None
    context: ActionContext
    calls: int

    @property
    def is_async(self) -> bool:
        """Whether it goes to the event loop."""
        return is_async(self.function)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended.

    Attributes
    ----------
    output : bytes or None
        What the action returned, encoded; None for an undo, or after an error.
    error : BaseException or None
        What it raised.
    """

    output: bytes | None = None
    error: BaseException | None = None


class Runners:
    """The threads of one executor."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fbcache-saga-action")
        self._loop: _LoopThread | None = None

    @property
    def running_here(self) -> bool:
        """Whether the caller is one of the actions."""
        return _within.get() is self

    def submit(self, job: Job, report: Callable[[Outcome], None]) -> None:
        """Have a job run, and ``report`` be called with its outcome.

        Raises
        ------
        RuntimeError
            The interpreter ends; the job is not run.
        """
        if job.is_async:
            if self._loop is None:
                self._loop = _LoopThread()
            self._loop.submit(self._arun(job), report)
        else:
            self._threads.submit(self._run, job, report)

    def close(self) -> None:
        """End the threads; no job is running any more."""
        self._threads.shutdown(wait=True)
        if self._loop is not None:
            self._loop.close()

    def _run(self, job: Job, report: Callable[[Outcome], None]) -> None:
        token = _within.set(self)
        try:
            value = None
            for _ in range(_calls(job)):
                value = _refuse_coroutine(job, job.function(job.context)) if job.function else None
            outcome = _outcome(job, value)
        except BaseException as error:
            outcome = Outcome(error=error)
        finally:
            _within.reset(token)
        report(outcome)

    async def _arun(self, job: Job) -> Outcome:
        _within.set(self)  # of this task's own context
        try:
            value = None
            for _ in range(_calls(job)):
                assert job.function is not None
                value = await job.function(job.context)
            return _outcome(job, value)
        except BaseException as error:
            return Outcome(error=error)


class _LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._tasks: set[asyncio.Task[Outcome]] = set()
        self._thread = threading.Thread(
            target=asyncio.run, args=(self._serve(),), name="fbcache-saga-loop", daemon=True
        )
        self._thread.start()
        self._loop = self._ready.result()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self._ready.set_result(asyncio.get_running_loop())
        await self._end.wait()

    def submit(self, coroutine: Any, report: Callable[[Outcome], None]) -> None:
        self._loop.call_soon_threadsafe(self._start, coroutine, report)

    def _start(self, coroutine: Any, report: Callable[[Outcome], None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: report(_ended(done)))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


def _ended(task: asyncio.Task[Outcome]) -> Outcome:
    if task.cancelled():  # before its first step, else it would have been caught
        return Outcome(error=asyncio.CancelledError())
    return task.result()


def _calls(job: Job) -> int:
    if job.calls == 0:
        what = "undo" if job.context.undoing else "action"
        raise InjectedError(f"the {what} of node {job.context.node!r} was told to fail")
    return job.calls


def _refuse_coroutine(job: Job, value: Any) -> Any:
    if inspect.iscoroutine(value):
        value.close()
        raise OutputError(
            f"the function of node {job.context.node!r} returned a coroutine; register an `async def` instead"
        )
    return value


def _outcome(job: Job, value: Any) -> Outcome:
    if job.context.undoing:
        return Outcome()
    try:
        return Outcome(output=encode(value))
    except (UnsupportedTypeError, PickleRefusedError) as error:
        raise OutputError(f"the output of node {job.context.node!r} cannot be recorded: {error}") from error
