"""``BlockingRecorder``: a recorder on a thread of its own, for programs without an event loop.

Guarantees
----------
- It is the same recorder (:mod:`core`) on a loop that its thread runs; ``records`` and ``close`` sleep on the
  same requests that a task awaits.
- The thread holds the core and not the face, so it does not keep a dropped recorder alive; the finalizer
  takes no lock, ends the thread, and warns.
- At the interpreter's exit what was taken is written, for ``EXIT_PATIENCE`` seconds at most.

``_ending`` is held by the call of ``close`` that ends the thread; ``save`` and finalizers do not take it.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import warnings
import weakref
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from fbcache.errors import DeadlockError
from fbcache.recorder.core import Core
from fbcache.recorder.errors import RecordsLostWarning
from fbcache.recorder.line import Phase
from fbcache.recorder.request import Request
from fbcache.recorder.storage import Storage
from fbcache.waiting import Answer

R = TypeVar("R")

#: Seconds that the exit of the interpreter waits for a recorder that nobody closed. A disk that has not
#: taken a bulk by then is not expected to.
EXIT_PATIENCE: Final = 5.0

_live: weakref.WeakSet[BlockingRecorder[Any]] = weakref.WeakSet()


class BlockingRecorder(Generic[R]):
    """What :meth:`Recorder.start <fbcache.recorder.Recorder.start>` returns; a context manager."""

    def __init__(self, core: Core[R]) -> None:
        self._core = core
        self._ending = Lock()
        self._host = _Host(core)
        self._finalizer = weakref.finalize(self, _dropped, core, self._host)
        self._finalizer.atexit = False  # _close_all is for that
        _live.add(self)

    def __repr__(self) -> str:
        return f"<BlockingRecorder: {self.phase.value}, {self.pending:,} records to be written>"

    @property
    def phase(self) -> Phase:
        """What the recorder is about."""
        return self._core.phase

    @property
    def pending(self) -> int:
        """How many records are taken and not written."""
        return self._core.pending

    def save(self, record: R) -> None:
        """Take a record, to be written soon; see :meth:`Recorder.save <fbcache.recorder.Recorder.save>`."""
        self._core.save(record)

    def records(self, query: Any = None) -> Any:
        """Block until what was saved before is written; return what ``query`` asks for.

        Errors are those of :meth:`Recorder.records <fbcache.recorder.Recorder.records>`, and DeadlockError
        from within the storage, on the recorder's own thread.
        """
        return self._ask(Request(query), None)

    def close(self) -> Storage[R]:
        """Block until all is written, end the thread, and return the storage. May be called again.

        Raises
        ------
        RecorderError
            As for :meth:`Recorder.close <fbcache.recorder.Recorder.close>`. The thread stays, and
            another ``close`` tries once more.
        """
        return self._close(None)

    def _close(self, patience: float | None) -> Storage[R]:
        if self._core.phase is not Phase.CLOSED:
            self._ask(Request(closes=True), patience)
        with self._ending:
            self._host.stop()
            self._host.join()
        return self._core.closed_storage()

    def _ask(self, request: Request, patience: float | None) -> Any:
        if self._host.is_here():
            raise DeadlockError("the recorder's own thread cannot wait for the recorder")
        try:
            self._core.ask(request)
            if not request.sleep(patience):
                raise TimeoutError(f"the storage did not come to it within {patience} s")
        except BaseException:
            request.given_up = True
            raise
        request.raise_error()
        return request.result

    def __enter__(self) -> BlockingRecorder[R]:
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the recorder."""
        self.close()


class _Host:
    """The thread, and the loop that it runs."""

    def __init__(self, core: Core[Any]) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Future[None] | None = None
        started = Answer()
        self._thread = threading.Thread(
            target=self._run, args=(core, started), name="fbcache-recorder", daemon=True
        )
        self._thread.start()
        started.wait()
        started.raise_error()

    def _run(self, core: Core[Any], started: Answer) -> None:
        try:
            asyncio.run(self._serve(core, started))
        finally:
            started.wake(RuntimeError("the recorder's thread ended before it began"))

    async def _serve(self, core: Core[Any], started: Answer) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = self._loop.create_future()
        core.attach(self._loop)
        started.wake()
        await self._stopping

    def is_here(self) -> bool:
        """Whether this is the thread."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """Have the thread end. Takes no lock, and may be called again."""
        loop, stopping = self._loop, self._stopping
        if loop is None or stopping is None:
            return
        try:
            loop.call_soon_threadsafe(_end, stopping)
        except RuntimeError:  # it has ended
            pass

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def warn_of_drop(core: Core[Any], warn: Callable[..., None]) -> None:
    """End a recorder that nobody has any more, and say what is lost. Takes no lock."""
    writing = core.writing
    lost = core.forsake()
    if lost is None:
        return
    if not lost:
        warn("a recorder was dropped without close(); it had written everything", ResourceWarning)
        return
    perhaps = f" (unless the {writing:,} being written just then got through)" if writing else ""
    warn(
        f"a recorder was dropped without close(): {lost:,} records were lost{perhaps}. "
        "Call close(), or use `with` or `async with`",
        RecordsLostWarning,
    )


def _dropped(core: Core[Any], host: _Host) -> None:
    host.stop()
    warn_of_drop(core, warnings.warn)


def _close_all() -> None:
    for recorder in list(_live):
        if not recorder._core.unended:
            continue
        try:
            recorder._close(EXIT_PATIENCE)
        except Exception as error:
            # The finalizer would not come any more; whoever reads this cannot catch the error.
            told = f"a recorder was not closed before the exit: {error}"
            warnings.warn(told, RecordsLostWarning, stacklevel=1)


atexit.register(_close_all)
