"""The writer: snapshots are taken at the call and written afterwards, the last of several winning.

Guarantees
----------
- :meth:`Saver.save` never waits for the storage. The snapshots of one saver are written one at a time and
  in order; one that has not begun when a newer one comes is left out.
- A write that fails loses nothing: its snapshot is kept until a newer one has come, and is tried again by
  :meth:`Saver.flush` and :meth:`Saver.end`.
- A failure is told once, by the next ``save`` (whose own snapshot is taken all the same), ``flush`` or
  ``end``, unless a later snapshot was written meanwhile: then the storage has all that it should.
- When ``flush`` or ``end`` has returned, the newest snapshot is in the storage.

States
------
==================== =======================================================================
idle                 nothing to write: no pending, no failed, not writing
writing              a thread writes; what is pending is written next
failed               the newest snapshot is kept in ``_failed``; nobody writes
ended                like idle, and ``save`` raises
==================== =======================================================================

``save`` leads from idle and failed to writing; the thread to idle or failed, when nothing is pending;
``flush`` from failed to writing, and waits for its end.

``_lock`` guards all fields, and ``_settled`` on it wakes who waits for the end of writing. Nothing is
written, discarded or encoded under it. A thread lives only while there is something to write. It
is no daemon: an interpreter that ends waits for it.
"""

from __future__ import annotations

import threading

from fbcache.actors.errors import NotPersistentError, PersistenceError, explained
from fbcache.actors.storage import Taken


class Saver:
    """Writes one actor's snapshots to one storage. May be used from any thread."""

    def __init__(self, actor_id: str) -> None:
        self._actor_id = actor_id
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._pending: Taken | None = None
        self._failed: Taken | None = None
        self._untold: PersistenceError | None = None
        self._writing = False
        self._ended = False

    def save(self, taken: Taken) -> None:
        """Have ``taken`` written, unless a newer one comes first.

        Raises
        ------
        NotPersistentError
            The actor has ended; ``taken`` is discarded.
        PersistenceError
            An earlier write failed. ``taken`` will be written all the same.
        """
        with self._lock:
            if self._ended:
                outdated: list[Taken | None] = [taken]
            else:
                outdated = [self._pending, self._failed]
                self._pending, self._failed = taken, None
            ended, untold, self._untold = self._ended, self._untold, None
            must_start = not ended and self._begin()
        _discard(outdated)
        if ended:
            raise NotPersistentError(f"actor {self._actor_id!r} has ended; its state is no longer saved")
        if must_start:
            self._start()
        if untold is not None:
            raise untold

    def flush(self) -> None:
        """Wait until the newest snapshot is in the storage; one that failed is tried once more.

        Raises
        ------
        PersistenceError
            It could not be written. It is kept, to be tried again.
        """
        with self._lock:
            must_start = False
            if self._failed is not None and not self._writing:
                self._pending, self._failed, self._untold = self._failed, None, None
                must_start = self._begin()
        if must_start:
            self._start()
        with self._settled:
            self._settled.wait_for(lambda: not self._writing)
            untold, self._untold = self._untold, None
        if untold is not None:
            raise untold

    def end(self) -> None:
        """Take no more snapshots, and flush. May be called again.

        Raises
        ------
        PersistenceError
            The newest snapshot could not be written, and is given up: the one before stands.
        """
        with self._lock:
            self._ended = True
        try:
            self.flush()
        finally:
            with self._lock:
                failed, self._failed = self._failed, None
            _discard([failed])

    def _begin(self) -> bool:
        """Be writing from now on; whether a thread is to be started for it. Under the lock."""
        was_writing, self._writing = self._writing, True
        return not was_writing

    def _start(self) -> None:
        name = f"fbcache-actors-{self._actor_id[:20]!r}"
        try:
            threading.Thread(target=self._write_all, name=name, daemon=False).start()
        except RuntimeError:  # no more threads, or the interpreter ends: late is better than never
            self._write_all()

    def _write_all(self) -> None:
        while (taken := self._next()) is not None:
            try:
                taken.write()
            except Exception as error:
                self._keep(taken, _linked(explained("write the snapshot of", self._actor_id, error), error))
            except BaseException as error:  # whatever it is, somebody may wait for this thread
                self._keep(taken, _linked(self._stopped(error), error))
            else:
                with self._lock:
                    self._untold = None
                _discard([taken])

    def _next(self) -> Taken | None:
        """What is to be written next; None, and nobody is writing any more, if there is nothing."""
        with self._lock:
            taken, self._pending = self._pending, None
            if taken is None:
                self._writing = False
                self._settled.notify_all()
            return taken

    def _keep(self, taken: Taken, error: PersistenceError) -> None:
        with self._lock:
            self._untold = error
            is_outdated = self._pending is not None
            if not is_outdated:
                self._failed = taken
        if is_outdated:
            _discard([taken])

    def _stopped(self, error: BaseException) -> PersistenceError:
        return explained("write the snapshot of", self._actor_id, RuntimeError(f"stopped by {error!r}"))


def _linked(error: PersistenceError, cause: BaseException) -> PersistenceError:
    if error is not cause:
        error.__cause__ = cause
    return error


def _discard(snapshots: list[Taken | None]) -> None:
    for taken in snapshots:
        if taken is not None:
            taken.discard()
