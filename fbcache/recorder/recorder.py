"""``Recorder``: the face for asyncio; see :mod:`core` for what it guarantees.

A recorder works on the loop that runs where it is made, else on that of the first ``await``. It is dropped
when nobody has it any more: the finalizer takes no lock, ends the pump, and warns.
"""

from __future__ import annotations

import asyncio
import warnings
import weakref
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Generic, TypeVar

from fbcache.recorder.blocking import BlockingRecorder, warn_of_drop
from fbcache.recorder.core import Core
from fbcache.recorder.line import Phase
from fbcache.recorder.request import Request
from fbcache.recorder.retry import Retry
from fbcache.recorder.storage import Storage

R = TypeVar("R")


class Recorder(Generic[R]):
    """Persists records without making their producer wait.

    Parameters
    ----------
    storage : Storage
        Where they go. Nobody else should save to it meanwhile.
    max_pending : int, optional
        Most records that may wait to be written. Default: no limit.
    retry : Retry, optional
        How often a bulk is tried before its failure surfaces.

    Raises
    ------
    TypeError, ValueError
        ``storage`` is none, or ``max_pending`` is not a number from 1 up.

    Examples
    --------
    In a coroutine::

        async with Recorder(MemoryStorage()) as recorder:
            recorder.save({"kind": "greeting"})
            found = await recorder.records(Query(kind="greeting"))
    """

    def __init__(
        self, storage: Storage[R], *, max_pending: int | None = None, retry: Retry | None = None
    ) -> None:
        self._begin(Core(_checked(storage), max_pending=max_pending, retry=retry))

    def _begin(self, core: Core[R]) -> None:
        self._core = core
        self._finalizer = weakref.finalize(self, _dropped, core)
        loop = asyncio._get_running_loop()
        if loop is not None:
            core.attach(loop)

    @classmethod
    def from_delayed_storage(
        cls,
        storage: Awaitable[Storage[R]],
        *,
        max_pending: int | None = None,
        retry: Retry | None = None,
    ) -> Recorder[R]:
        """Return a recorder that takes records before its storage exists.

        Parameters
        ----------
        storage : awaitable
            Gives the storage. Should it raise instead, ``records`` and ``close`` raise a RecorderError
            with all records attached, and ``save`` takes no more.
        max_pending, retry : optional
            As for ``Recorder``.
        """
        if not isinstance(storage, Awaitable):
            raise TypeError(f"from_delayed_storage takes what gives a storage when awaited, not {storage!r}")
        self = cls.__new__(cls)
        self._begin(Core(None, delayed=_appearing(storage), max_pending=max_pending, retry=retry))
        return self

    @classmethod
    def start(
        cls, storage: Storage[R], *, max_pending: int | None = None, retry: Retry | None = None
    ) -> BlockingRecorder[R]:
        """Return a recorder on a thread of its own, whose ``records`` and ``close`` block.

        For programs without an event loop, and for recorders that outlive one. Parameters and errors
        are those of ``Recorder``.
        """
        return BlockingRecorder(Core(_checked(storage), max_pending=max_pending, retry=retry))

    def __repr__(self) -> str:
        return f"<Recorder: {self.phase.value}, {self.pending:,} records to be written>"

    @property
    def phase(self) -> Phase:
        """What the recorder is about."""
        return self._core.phase

    @property
    def pending(self) -> int:
        """How many records are taken and not written."""
        return self._core.pending

    def save(self, record: R) -> None:
        """Take a record, to be written soon. Never blocks; from any thread, finalizer or signal handler.

        The record must not change any more.

        Raises
        ------
        RecorderFullError
            ``max_pending`` records wait already.
        RecorderClosedError
            The recorder was closed, or its storage never appeared.

        After an error the record was not taken.
        """
        self._core.save(record)

    async def records(self, query: Any = None) -> Any:
        """Return what ``query`` asks for, once every record saved before is written.

        Parameters
        ----------
        query : Any
            What the storage takes; for fbcache's own a :class:`~fbcache.recorder.Query`, or None for all.

        Raises
        ------
        RecorderError
            Records saved before could not be written; it has them as ``unsaved``. They stay and are
            tried again with the next call, but for those that can never be written: they are the
            caller's now.
        RecorderClosedError
            The recorder was closed.
        Exception
            Whatever the storage's ``load`` raises.

        Cancelling the wait leaves the recorder as it is.
        """
        return await self._ask(Request(query))

    async def close(self) -> Storage[R]:
        """Write all that was taken, and return the storage. May be called again.

        Raises
        ------
        RecorderError
            Not all could be written; it has the records as ``unsaved``, and the ``storage``. Nothing more is
            taken; another ``close`` tries once more.

        When the wait is cancelled, closing goes on; another ``close`` waits for its end.
        """
        if self._core.phase is Phase.CLOSED:
            return self._core.closed_storage()
        storage: Storage[R] = await self._ask(Request(closes=True))
        return storage

    async def _ask(self, request: Request) -> Any:
        self._core.attach(asyncio.get_running_loop())
        try:
            self._core.ask(request)
            await request.arun()
        except BaseException:
            request.given_up = True
            raise
        return request.result

    async def __aenter__(self) -> Recorder[R]:
        """Return the recorder."""
        self._core.attach(asyncio.get_running_loop())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the recorder."""
        await self.close()


def _checked(storage: Storage[R]) -> Storage[R]:
    lacking = [name for name in ("save", "load") if not hasattr(storage, name)]
    if lacking:
        raise TypeError(f"{storage!r} is no storage: it has no {' and no '.join(lacking)}")
    return storage


async def _appearing(storage: Awaitable[Storage[R]]) -> Storage[R]:
    return _checked(await storage)


def _dropped(core: Core[Any]) -> None:
    warn_of_drop(core, warnings.warn)
