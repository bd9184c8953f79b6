"""The line of records, and what may be done to it from any thread; see :mod:`core` for the guarantees."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import Awaitable
from enum import Enum
from threading import Lock
from typing import Any, Final, Generic, TypeVar

from fbcache.recorder.errors import RecorderClosedError, RecorderError, RecorderFullError
from fbcache.recorder.request import Request
from fbcache.recorder.retry import DEFAULT_RETRY, Retry
from fbcache.recorder.storage import Storage

R = TypeVar("R")

_FORKED: Final = "this recorder belongs to the parent process; make a new one in the child"

_live: weakref.WeakSet[Line[Any]] = weakref.WeakSet()


class Phase(Enum):
    """What a recorder is about."""

    DELAYED = "delayed"  #: the storage has not appeared; records wait for it
    OPEN = "open"  #: records are written as they come
    FAILING = "failing"  #: the storage refused the last bulk, which is tried again
    CLOSING = "closing"  #: nothing more is taken; the rest is being written
    CLOSED = "closed"  #: all is written
    LOST = "lost"  #: closed, or without a storage, and not all could be written; ``close`` told of it


class Line(Generic[R]):
    """Records in line, and why none is taken any more."""

    def __init__(
        self,
        storage: Storage[R] | None,
        *,
        delayed: Awaitable[Storage[R]] | None = None,
        max_pending: int | None = None,
        retry: Retry | None = None,
    ) -> None:
        if max_pending is not None and (
            isinstance(max_pending, bool) or not isinstance(max_pending, int) or max_pending < 1
        ):
            raise ValueError(f"max_pending is a number of records from 1 up, or None, not {max_pending!r}")
        self.storage = storage
        self.closing = False
        self.front: list[R] = []
        self.writing = 0  # of those in front, being written now
        self._refused: list[tuple[R, Exception]] = []
        self._delayed = delayed
        self._max_pending = max_pending
        self._retry = DEFAULT_RETRY if retry is None else retry
        self._inbox: deque[R | Request] = deque()
        self._questions: set[Request] = set()  # those in the line
        self._refusal: str | None = None  # why nothing is taken
        self._failure: BaseException | None = None  # of the last try to write
        self._missing: BaseException | None = None  # why the storage did not appear
        self._ended = False
        self._lost = False
        self._forsaken = False
        self._forked = False
        self._binding = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._pumping = False
        self._turn: object = None  # tells the pump of now from one whose loop was closed
        self._asked: Request | None = None
        _live.add(self)

    def save(self, record: R) -> None:
        """Take a record. See the module's guarantees."""
        if self._refusal is not None:
            raise RecorderClosedError(self._refusal)
        limit = self._max_pending
        if limit is not None and self.pending >= limit:
            raise RecorderFullError(self.pending, limit)
        self._inbox.append(record)
        if not self._pumping:
            self._wake()
        if self._ended:  # close() was faster; who comes between its last look and here is told
            raise RecorderClosedError("the recorder was closed meanwhile; the record was not written")

    @property
    def pending(self) -> int:
        """How many records are taken and not written."""
        return max(0, len(self._inbox) - len(self._questions)) + len(self.front)

    @property
    def unended(self) -> bool:
        """Whether a drop has to be told of."""
        return not (self._forsaken or self._forked or self._ended or self._lost)

    @property
    def phase(self) -> Phase:
        """What the recorder is about now."""
        if self._ended:
            return Phase.CLOSED
        if self._lost or self._missing is not None:
            return Phase.LOST
        if self.closing:
            return Phase.CLOSING
        if self.storage is None:
            return Phase.DELAYED
        return Phase.OPEN if self._failure is None else Phase.FAILING

    def ask(self, request: Request) -> None:
        """Put a request in line."""
        if self._forked:
            raise RecorderClosedError(_FORKED)
        if request.closes:
            self.closing = True
            self._refusal = self._refusal or "the recorder was closed; the record was not taken"
        elif self.closing:
            raise RecorderClosedError("the recorder was closed; ask its storage, which close() returns")
        self._questions.add(request)
        self._inbox.append(request)
        if not self._wake():
            raise RecorderError("the recorder's event loop is gone", unsaved=tuple(self._records()))

    def _wake(self) -> bool:
        loop = self._loop
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(self._kick)
        except RuntimeError:  # closed; the records wait for another loop
            return False
        return True

    def _records(self) -> list[R]:
        return [*self.front, *(item for item in list(self._inbox) if not isinstance(item, Request))]

    def closed_storage(self) -> Storage[R]:
        """Return the storage, as the recorder needs it no more."""
        assert self.storage is not None
        return self.storage

    def forsake(self) -> int | None:
        """End without a close; return the number of records lost, or None if nobody need be told.

        Called by finalizers: takes no lock.
        """
        unended, self._forsaken = self.unended, True
        if not unended:
            return None
        self._refusal = "the recorder is gone; the record was not taken"
        return self.pending + len(self._refused)

    def leave_to_parent(self) -> None:
        """Leave all records to the parent of this forked process."""
        self._forked = True
        self._refusal = _FORKED
        self._loop = self._task = None

    def _kick(self) -> None:
        """Have the pump run. On its loop."""
        raise NotImplementedError


def _leave_all_to_parent() -> None:
    for core in list(_live):
        core.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
