"""What runs behind a pool, and how it ends: by ``close()``, collection, exit or fork.

Guarantees
----------
- ``close()``, the collection of an unclosed pool, and interpreter exit each leave no file, no
  thread and no descriptor. Neither the threads nor the engine keep the pool alive.
- In a forked child everything raises ForkedPoolError, and nothing of the parent's is touched: the
  lock and the table of names, through which every call goes, are replaced by ones that raise.
- Errors of background writes that nobody has raised are a warning at the end.
"""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from collections.abc import Callable, Hashable
from threading import Lock, get_ident
from types import TracebackType
from typing import Any, Final, NoReturn

import cachetools

from fbcache import audit
from fbcache.codec.frames import Codec
from fbcache.entry import Entry
from fbcache.errors import FBCacheError, FBCacheWarning, ForkedPoolError, PoolClosedError, StorageError
from fbcache.events import EventLog, Sink
from fbcache.guard import ReadGuard
from fbcache.lru import make_policy
from fbcache.promises import Promises
from fbcache.residency import Residency
from fbcache.spill import Spiller
from fbcache.store.protocol import Batching, BlobStore, Packing
from fbcache.store.session import Session
from fbcache.watchedguard import WatchedReadGuard
from fbcache.workers import Workers

#: Bytes of small values that are written together, where the store gains by it: half a millisecond's work.
_BATCH: Final = 256 << 10

_live: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """A pool without its face: the parts, put together.

    Parameters
    ----------
    budget : int
        In bytes.
    store : BlobStore
        Taken over: closed with the engine.
    session : Session or None
        The directory that ``store`` is in, if it is the pool's own.
    events : Sink or None
        Who hears what the pool does; stays the caller's.
    debug : bool
        Whether readers are held to their promise.
    """

    def __init__(
        self,
        *,
        budget: int,
        codec: Codec,
        store: BlobStore,
        session: Session | None,
        policy: str | type[cachetools.Cache[Any, Any]],
        io_threads: int,
        verify: str,
        events: Sink | None = None,
        debug: bool = False,
    ) -> None:
        order = make_policy(policy, budget)
        self.names: dict[Hashable, Entry] = {}
        self.store = store
        self.session = session
        self.forked = False
        self._closing = Lock()
        self._closer: int | None = None
        self._closed = False
        self.workers = Workers(io_threads, name="fbcache")
        self.residency = Residency(budget, order, self.workers, verify=verify, mend=audit.mend)
        if events is not None:
            self.residency.log = EventLog(events)
        self.spiller = Spiller(self.residency, codec, store)
        self.promises = Promises(self.residency)
        self.read_guard = WatchedReadGuard if debug else ReadGuard
        if debug:
            self.spiller.check = self.promises.check_unwritten
        self.residency.by_slot = isinstance(store, Packing)
        if isinstance(store, (Packing, Batching)):
            self.residency.batch = _BATCH
        self.residency.write_job = self.spiller.write_next
        self.residency.delete_job = self.spiller.delete_next
        _live.add(self)

    def close(self) -> None:
        """Drop everything, end the threads, remove the files. May be called again, also after an error."""
        if self.forked or self._closer == get_ident():  # a finalizer that closing has called
            return
        if self.workers.is_worker():
            self._close_from_worker()
            return
        with self._closing:
            self._close()

    def _close_from_worker(self) -> None:
        """Close, unless somebody does who waits for this very thread."""
        if self._closing.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._closing.release()

    def _close(self) -> None:
        if self._closed:
            return
        try:
            self._closer = get_ident()
            self._end_all()
        finally:
            self._closer = None

    def _end_all(self) -> None:
        residency = self.residency
        residency.run(residency.close)
        residency.end_futures()  # the workers may be long at what they do
        self.names = _Gone(_closed)
        self.workers.stop()
        self.workers.join()
        self._remove_files()
        self._closed = True
        error = residency.take_background_error()
        if error is not None:
            warnings.warn(
                f"a pool was closed with an error that nobody had raised: {error!r}; "
                "`pool.drain()` raises such errors",
                FBCacheWarning,
                stacklevel=5,
            )
        if residency.log is not None:
            residency.log.warn_of_missed(stacklevel=5)

    def collected(self) -> None:
        """Close from a finalizer: the workers do it (invariant 7)."""
        if not self.forked and not self._closed:
            self.workers.submit(self._close_from_worker)

    def leave_to_parent(self) -> None:
        """Make every use in a forked child an error, and let go of what the child inherited."""
        self.forked = True
        self.names = _Gone(_forked)
        self.residency.closed = True
        self.residency.why_closed = _forked
        self.residency.lock = _GoneLock()
        if self.session is not None:
            self.session.abandon_in_child()

    def _remove_files(self) -> None:
        try:
            self.store.close()
            if self.session is not None:
                self.session.close()
        except StorageError as error:
            warnings.warn(f"files of a closed pool remain: {error}", FBCacheWarning, stacklevel=6)


class _Gone(dict[Hashable, Entry]):
    """A table of names that is no more."""

    def __init__(self, error: Callable[[], FBCacheError]) -> None:
        super().__init__()
        self._error = error

    def _raise(self, *_: object) -> NoReturn:
        raise self._error()

    get = __getitem__ = __setitem__ = __delitem__ = __contains__ = _raise
    __iter__ = __len__ = _raise


class _GoneLock:
    """A lock that nobody in this process may take."""

    def __enter__(self) -> NoReturn:
        raise _forked()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was taken."""


def _closed() -> FBCacheError:
    return PoolClosedError("the pool was closed; make a new FBPool")


def _forked() -> FBCacheError:
    return ForkedPoolError(
        "this pool belongs to the parent process; make a new FBPool in the child, or start "
        "processes with multiprocessing's 'spawn' method"
    )


def _close_all() -> None:
    for engine in list(_live):
        engine.close()


def _leave_all_to_parent() -> None:
    for engine in list(_live):
        engine.leave_to_parent()
    _live.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_leave_all_to_parent)
