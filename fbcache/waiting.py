"""Waiting, once for threads and asyncio: owners, their holds, waiters, and work done off the loop.

Guarantees
----------
- A :class:`Waiter` is woken at most once, and a wake that comes before the wait is not lost:
  the waker sets ``done`` first and looks for a sleeper second, the sleeper registers first and
  looks at ``done`` second. Both are single attribute accesses, which no interpreter reorders.
- ``wake`` takes no lock of fbcache's and runs no user code, so it may be called under the
  pool's lock; it works from any thread, and when the sleeper's event loop is closed already.
- :class:`Work` abandoned by a cancelled task still runs to its end on the workers.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from threading import Lock, get_ident
from time import monotonic
from typing import Any, Final, Protocol, TypeAlias

from fbcache.helping import HELP

#: Seconds between looks up from a wait. A signal that comes just before the system call is not
#: noticed by it, so that an interrupt would have to be sent twice.
LOOK_UP: Final = 0.5

#: Who holds a guard: a thread's identifier, or under asyncio the task. By a weak reference: a task whose
#: loop has ended is collected then, and as its coroutine is closed the guard is left.
Owner: TypeAlias = "int | weakref.ref[asyncio.Task[Any]]"

_running_loop = asyncio._get_running_loop
_current_task = asyncio.current_task


def current_owner() -> Owner:
    """Return the running task where there is one, else this thread's identifier."""
    loop = _running_loop()
    if loop is None:
        return get_ident()
    task = _current_task(loop)
    return get_ident() if task is None else weakref.ref(task)


def runs_on(owner: Owner, loop: asyncio.AbstractEventLoop) -> bool:
    """Whether ``owner`` can go on only when ``loop`` does."""
    if isinstance(owner, int):
        return False
    task = owner()
    return task is not None and task.get_loop() is loop


class Hold:
    """A guard's place in an entry's lock.

    Attributes
    ----------
    owner : Owner
        Who holds it; set when the guard is entered.
    held : bool
        Whether it is in the lock now.
    next, prev : Hold or None
        Its neighbours in the entry's list of readers.
    """

    __slots__ = ("held", "next", "owner", "prev")

    def __init__(self) -> None:
        self.owner: Owner = 0
        self.held = False
        self.next: Hold | None = None
        self.prev: Hold | None = None

    @property
    def wanted(self) -> Any:
        """The entry that the guard is for."""
        raise NotImplementedError

    def look_up(self) -> None:
        """See whether what is waited for will come, while waiting. Outside the lock."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Leave the lock, or the line, and undo what entering has come to. Under the lock."""
        raise NotImplementedError


class Step(Protocol):
    """Something to be done outside the lock before a guard can be entered."""

    def run(self) -> None:
        """Do it, blocking this thread."""
        ...

    async def arun(self) -> None:
        """Do it without blocking the event loop."""
        ...


class Waiter:
    """One sleeper, asleep in a thread or in a task.

    Attributes
    ----------
    hold : Hold or None
        The guard that waits for an entry's lock; granted on its behalf by whoever lets go.
    exclusive : bool
        Whether that guard is for writing.
    entry : object or None
        The entry that waits to be let into memory; admitted on its behalf.
    error : BaseException or None
        Set before the wake: what the sleeper raises.
    since : float
        When the wait began, on the monotonic clock.
    """

    __slots__ = ("_future", "_lock", "_loop", "done", "entry", "error", "exclusive", "hold", "since")

    def __init__(
        self, *, hold: Hold | None = None, exclusive: bool = False, entry: Any = None
    ) -> None:
        self.hold = hold
        self.exclusive = exclusive
        self.entry = entry
        self.error: BaseException | None = None
        self.since = monotonic()
        self.done = False
        self._lock: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[None] | None = None

    @property
    def orphaned(self) -> bool:
        """Whether its event loop was closed meanwhile, so that nobody is left to be woken."""
        loop = self._loop
        return loop is not None and loop.is_closed()

    def wake(self, error: BaseException | None = None) -> None:
        """Let the sleeper go on, or raise ``error`` in it.

        Only the first error counts; a second wake does what an interrupted first one left undone.
        """
        if not self.done:
            self.error = error
            self.done = True
        lock = self._lock
        if lock is not None and lock.locked():
            lock.release()
        future, loop = self._future, self._loop
        if future is not None and loop is not None:
            _tell(loop, future)

    def sleep(self, timeout: float | None = None) -> bool:
        """Block this thread until woken; False when ``timeout`` seconds passed first."""
        if about_to_sleep is not None:
            about_to_sleep(self)
        return self._sleep(timeout)

    def _sleep(self, timeout: float | None) -> bool:
        if self.done:
            return True
        lock = Lock()
        lock.acquire()
        self._lock = lock
        until = None if timeout is None else monotonic() + timeout
        while not self.done:
            left = LOOK_UP if until is None else min(until - monotonic(), LOOK_UP)
            if left < 0:
                return self.done
            if not _help_out() and not lock.acquire(timeout=left) and self.hold is not None:
                self.hold.look_up()
        return True

    def run(self) -> None:
        """Sleep, then raise the error that came with the wake."""
        self.sleep()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the error that came with the wake, if one did.

        It is let go of: its traceback refers to frames that refer to this waiter, and the cycle would
        keep the values in those frames alive.
        """
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    async def arun(self) -> None:
        """Sleep without blocking the loop, then raise the error that came with the wake."""
        if about_to_sleep is not None:
            about_to_sleep(self)
        if not self.done:
            self._loop = asyncio.get_running_loop()
            self._future = self._loop.create_future()
            if not self.done:
                await self._future
        self.raise_error()


def _help_out() -> bool:
    return HELP.job is not None and HELP.job()


#: Told of each waiter for a guard, for a load, for memory or for the end of work: a seam for tests, which are
#: to go on when another waits.
about_to_sleep: Callable[[Waiter], None] | None = None


class Answer(Waiter):
    """What a thread waits for that has asked for a write.

    Unlike a ``Future``, whose condition an interrupt of the waiting thread can leave locked for the
    worker that answers.
    """

    __slots__ = ()

    def wait(self, timeout: float | None = None) -> bool:
        """Block this thread until answered; False when ``timeout`` seconds passed first."""
        return self._sleep(timeout)


class Executor(Protocol):
    """Where :class:`Work` goes when the loop must not be blocked."""

    def submit(self, job: Callable[[], None], *, urgent: bool = False) -> None:
        """Run ``job`` soon on another thread."""
        ...

    def see_done(self) -> None:
        """Do here what was submitted, should no other thread do it any more."""
        ...


class Work:
    """A call that reads a file or copies a value: inline in a thread, on the workers for a task."""

    __slots__ = ("_call", "_executor")

    def __init__(self, call: Callable[[], None], executor: Executor) -> None:
        self._call = call
        self._executor = executor

    def run(self) -> None:
        """Do it here."""
        self._call()

    async def arun(self) -> None:
        """Have the workers do it; cancelling the wait does not stop them."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def job() -> None:
            try:
                self._call()
            except BaseException as error:
                _tell(loop, future, error)
            else:
                _tell(loop, future)

        self._executor.submit(job, urgent=True)
        self._executor.see_done()
        await future


def _tell(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], error: BaseException | None = None
) -> None:
    try:
        loop.call_soon_threadsafe(_resolve, future, error)
    except RuntimeError:  # the loop was closed; nobody is left to be told
        pass


def _resolve(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():  # cancelled in the meantime
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
