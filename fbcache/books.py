"""The pool's books: its one lock, its counters, and who owns what.

Guarantees
----------
- No value dies, and no future is answered, while the lock is held (invariant 5).
- A finalizer appends to ``lost_handles`` or ``lost_guards`` and does nothing else (invariant 7).
- An entry that nobody owns, holds or waits for is dropped, with its share of a blob.

The lock
--------
``lock`` is the only lock of a pool. It guards every field here and in the classes below, every entry
and every order of eviction. It is reentrant, because the garbage collector may run a program's
finalizer, and that may call the pool, at any allocation made under it.

Decisions run through :meth:`Books.run`, which raises a flag, ``torn``, for as long as one is under
way. A KeyboardInterrupt, or any exception thrown in from outside, leaves it raised; the next
decision then recounts everything from the entries (:mod:`fbcache.audit`) before it goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from threading import RLock
from typing import Any, ParamSpec, TypeVar

from fbcache.codec.frames import Codec
from fbcache.entry import IN_MEMORY, MISSING, Entry, Event, State, Token, next_state
from fbcache.errors import DeadlockError, FBCacheError, PoolClosedError
from fbcache.events import EventLog
from fbcache.freezing import Ghost
from fbcache.keys import KeyIndex
from fbcache.waiting import Answer, Hold, Waiter
from fbcache.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")


class Books:
    """Entries, counters, and the frame in which every decision is made."""

    def __init__(self, workers: Workers, mend: Callable[[Any], None]) -> None:
        self.lock: Any = RLock()
        self.torn = False
        self._deciding = False
        self.within = False  # whether a finalizer calls the pool amid a decision of its own thread
        self.closed = False
        self.why_closed: Callable[[], FBCacheError] = _closed
        self.entries: set[Entry] = set()
        self.ending: set[Entry] = set()  # dropped while their blob was being written
        self.keys = KeyIndex()
        self.resident_bytes = 0
        self.pinned_bytes = 0
        self.background_error: BaseException | None = None
        # Appended to by finalizers.
        self.lost_handles: deque[Entry] = deque()
        self.lost_guards: deque[Hold] = deque()
        self.lost_wants: deque[Any] = deque()
        # Of few entries, or of none: who waits for its blob to be written, or for its load to end; weak
        # references to evicted values, which the program may still have; codecs of their own; fingerprints.
        self.requests: dict[Entry, list[Answer | Future[None]]] = {}
        self.watchers: dict[Entry, list[Waiter]] = {}
        self.ghosts: dict[Entry, Ghost] = {}
        self.codecs: dict[Entry, Codec] = {}
        self.noted: dict[Entry, int] = {}
        # Who waits for what a decision may bring about.
        self.room: deque[Waiter] = deque()
        self.idlers: list[Waiter] = []
        # Dealt with after the lock is released.
        self._garbage: deque[tuple[Entry, Any]] = deque()
        # Ended by a job of the workers.
        self._futures: deque[tuple[Future[None], BaseException | None]] = deque()
        # Blobs that nobody needs.
        self._deletions: deque[Token] = deque()
        self.deleting_count = 0  # of those, being deleted now
        self.delete_job: Callable[[], None] = _nothing
        # What a recorder is to hear, if there is one.
        self.log: EventLog | None = None
        self.took: dict[Entry, float] = {}  # how long the write took, until it hears of that
        self._beside: tuple[dict[Entry, Any], ...] = (self.ghosts, self.codecs, self.noted, self.took)
        self._workers = workers
        self._mend = mend
        self.hits = self.misses = self.loads = self.spills = 0
        self.evictions = self.clean_evictions = 0
        self.bytes_written = self.bytes_read = 0
        self.stalls = self.errors = 0
        self.stall_seconds = 0.0

    # ----------------------------------------------------------------------- the frame

    def run(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Decide something: call ``act`` under the lock, then let values die outside it."""
        within = False
        try:
            with self.lock:
                if self._deciding:  # the collector has run a finalizer that calls the pool
                    within = True
                    return self._run_within(act, *args, **kwargs)
                try:
                    self._deciding = True
                    if self.torn:
                        self._mend(self)
                    self.torn = True
                    if self.lost_handles or self.lost_guards or self.lost_wants:
                        self._reap()
                    result = act(*args, **kwargs)
                    if self.room or self.idlers:
                        self._let_in()
                    self.torn = False
                except (FBCacheError, KeyError):  # said by a decision itself, between two changes
                    self.torn = False
                    raise
                finally:
                    self._deciding = False
        finally:
            log = self.log
            if log is not None and log.untold and not within:
                log.hand_over()
            if self._garbage:
                self._clear()
        return result

    def _run_within(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Decide for a finalizer that runs under the lock: nobody could do what it would wait for."""
        before = self.within
        try:
            self.within = True
            result = act(*args, **kwargs)
        finally:
            self.within = before
            if self.room or self.idlers:  # whom the decision that is under way may not look at any more
                self._workers.submit(self.reap)
        if isinstance(result, Waiter):
            raise DeadlockError("a finalizer that runs while its own thread has the pool's lock cannot wait")
        return result

    def _let_in(self) -> None:
        """Let those go on who wait for what this decision has brought about."""
        raise NotImplementedError

    def _clear(self) -> None:
        while self._garbage:
            try:
                entry, value = self._garbage.popleft()
            except IndexError:  # another thread was faster
                break
            del value
            ghost = self.ghosts.get(entry)
            if ghost is not None and not ghost.alive:
                with self.lock:
                    if self.ghosts.get(entry) is ghost:
                        del self.ghosts[entry]

    def let_die(self, entry: Entry, value: Any) -> None:
        """Keep what the caller is about to let go of alive until the lock is released."""
        self._garbage.append((entry, value))

    def end_futures(self) -> None:
        """Answer those who wait for a write by a future. Outside the lock."""
        while self._futures:
            try:
                ended = self._futures[0]
                _end(*ended)
                self._futures.remove(ended)  # last: what an interrupt tears is done again
            except (IndexError, ValueError):  # another thread was faster
                pass

    def resume(self) -> None:
        """Have the workers look again for what is to be done; a call too many does no harm."""
        if self._deletions:
            self._workers.submit(self.delete_job)
        if self._futures:
            self._workers.submit_foreign(self.end_futures)

    def check_open(self) -> None:
        """Raise PoolClosedError after ``close()``, and ForkedPoolError in a forked child."""
        if self.closed:
            raise self.why_closed()

    # ----------------------------------------------------------------------- ownership

    def reap(self) -> None:
        """Drop what finalizers have reported; a job for the workers."""
        self.run(_nothing)

    def _reap(self) -> None:
        while self.lost_handles:
            # Subscripts instead of popleft: no call, so no interrupt can come between.
            entry = self.lost_handles[0]
            entry.handles -= 1
            del self.lost_handles[0]
            self.disown(entry)
        while self.lost_guards:
            hold = self.lost_guards[0]
            del self.lost_guards[0]
            hold.withdraw()

    def inherit(self, entry: Entry, twin: Entry) -> None:
        """Have ``twin``, which takes over content of ``entry``, encoded as that is."""
        codec = self.codecs.get(entry)
        if codec is not None:
            self.codecs[twin] = codec

    def withdraw_abandoned(self) -> None:
        """Let all entries go that are held by guards which nobody has any more."""
        for entry in [e for e in self.entries if e.held]:
            for hold in entry.abandoned():
                hold.withdraw()

    def disown(self, entry: Entry) -> None:
        """Drop ``entry`` if no name, handle, guard or waiter has it."""
        if entry.owned or entry not in self.entries:
            return
        if entry.held or entry.waiters is not None:
            if entry.order is not None:  # the last guard's exit looks closer where there is none
                entry.order.remove(entry)
            self._answer(entry, None)  # nobody needs the blob any more
            return
        self.drop(entry)

    def drop(self, entry: Entry) -> None:
        """End the entry's life. Its value dies and its blob is deleted in the background."""
        state = next_state(entry.state, Event.DROP)
        former = entry.state
        if entry.order is not None:
            entry.order.remove(entry)
        if former is State.WRITING:  # the value takes memory until the write ends
            self.ending.add(entry)
        entry.state = state
        self.entries.discard(entry)
        if entry.key is not None and entry.exposed:
            self.keys.forget(entry.key, entry)
        if entry.held and former in IN_MEMORY:  # at close() only
            self.pinned_bytes -= entry.nbytes
        if former in IN_MEMORY and former is not State.WRITING:
            self.resident_bytes -= entry.nbytes
        self._garbage.append((entry, entry.value))
        entry.value = MISSING
        self.release(entry)
        self.forget_dropped(entry)

    def forget_dropped(self, entry: Entry) -> None:
        """Let everybody go who waits for what will not come to be. A second call does no harm."""
        for few in self._beside:
            few.pop(entry, None)
        self._answer(entry, PoolClosedError("the pool was closed") if self.closed else None)
        self.wake_watchers(entry)

    def left_behind(self) -> list[Entry]:
        """Return dropped entries of which something is left, after an interrupt."""
        few = set[Entry]().union(self.requests, self.watchers, *self._beside)
        return [entry for entry in few if entry.state is State.DROPPED]

    def release(self, entry: Entry) -> None:
        """Give up the entry's share of its blob."""
        token = entry.token
        if token is not None:
            entry.token = None
            self.release_token(token)

    def release_token(self, token: Token) -> None:
        """Give up one share of a blob; with the last one it is deleted in the background."""
        token.shares -= 1
        if token.shares == 0 and not self.closed:
            self._delete(token)

    def _delete(self, token: Token) -> None:
        """Have a blob deleted. While there are any to be deleted, a job to begin with them is on its way."""
        self._deletions.append(token)
        if len(self._deletions) == 1:
            self._workers.submit(self.delete_job)

    def _answer(self, entry: Entry, error: BaseException | None) -> None:
        requests = self.requests.get(entry)
        if requests is not None:
            for answer in requests:
                self._give(answer, error)
            del self.requests[entry]  # last: who is answered twice, after an interrupt, hears it once

    def _give(self, answer: Answer | Future[None], error: BaseException | None) -> None:
        if isinstance(answer, Answer):
            answer.wake(error)
        else:  # its callbacks are the program's code, and may wait for what this thread is about to do
            self._futures.append((answer, error))
            self._workers.submit_foreign(self.end_futures)

    def wake_watchers(self, entry: Entry) -> None:
        """Let those go on who waited for a load."""
        watchers = self.watchers.get(entry)
        if watchers is not None:
            for waiter in watchers:
                waiter.wake()
            del self.watchers[entry]


def _nothing() -> None:
    pass


def _closed() -> FBCacheError:
    return PoolClosedError("the pool was closed; make a new FBPool")


def _end(future: Future[None], error: BaseException | None) -> None:
    if future.done() and not future.cancelled():
        return
    try:
        # It tells those that wait for it among others, too. Running already: an interrupt came in between.
        if not (future.running() or future.set_running_or_notify_cancel()):
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
    except (RuntimeError, InvalidStateError):  # another thread was faster
        return
