"""Guards: what `with pool.get(name) as x` enters, for threads and for asyncio.

Guarantees
----------
- A guard is lazy: until it is entered it holds, pins and loads nothing; its ``repr`` never does.
- Entering is a loop of decisions (``_advance``, under the lock) and steps (waiting, loading, copying,
  outside it). ``with`` runs the steps in this thread, ``async with`` awaits them; that is all
  in which the two differ.
- Whatever ends an entering early, a KeyboardInterrupt or a cancellation included, ``withdraw``
  takes the guard out of the lock and out of the line. A load that the workers have begun goes
  on and its value stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping
from threading import get_ident
from time import monotonic
from types import TracebackType
from typing import Any, Protocol

from fbcache.entry import MISSING, Entry, Event, State, next_state
from fbcache.errors import CorruptBlobError, FBCacheError, ForkedPoolError, StorageError
from fbcache.events import EventKind
from fbcache.promises import Promises
from fbcache.residency import Residency
from fbcache.spill import LoadOrder, Spiller
from fbcache.store.protocol import BlobStore
from fbcache.waiting import Hold, Step, Work, current_owner
from fbcache.workers import Workers

_running_loop = asyncio._get_running_loop


class Engine(Protocol):
    """What guards and handles need of their pool."""

    residency: Residency
    spiller: Spiller
    workers: Workers
    store: BlobStore
    read_guard: type[ReadGuard]
    promises: Promises

    @property
    def names(self) -> Mapping[Hashable, Entry]:
        """Entries by name."""
        ...


class Guard(Hold):
    """What read and write guards share: entering in steps, and withdrawing.

    Parameters
    ----------
    entry : Entry
        What it guards.
    engine : Engine
        The pool.
    name : hashable or MISSING
        The name by which it was asked for, if it was: should another entry have taken the
        name over, and this one be gone, when the guard is entered, it enters the other.
    """

    __slots__ = (
        "__weakref__",
        "_engine",
        "_entering",
        "_entry",
        "_missed",
        "_name",
        "_order",
        "_residency",
        "source",  # the handle that gave the guard, which it keeps from being collected
    )

    source: object

    def __init__(self, entry: Entry, engine: Engine, name: Hashable = MISSING) -> None:
        self.owner = 0
        self.held = False
        self.next = None
        self.prev = None
        self._entry = entry
        self._engine = engine
        self._name = name
        self._residency = engine.residency
        self._order: LoadOrder | None = None
        self._entering = False
        self._missed = False

    def __repr__(self) -> str:
        entry = self._entry
        who = repr(entry.name) if entry.named else "an unnamed entry"
        held = "held" if self.held else "not entered"
        return f"<{type(self).__name__} of {who}: {entry.state.name}, {entry.nbytes:,} bytes, {held}>"

    def __reduce__(self) -> Any:
        raise TypeError("a guard cannot be pickled; pickle the value it gives")

    def __enter__(self) -> Any:
        """Wait for the entry, load it if it is on disk, pin it, and return its value."""
        if self.held or self._entering:
            raise self._entered_twice()
        try:
            self._entering = True
            self.owner = current_owner()
            loop = _running_loop()
            while (step := self._residency.run(self._advance, loop)) is not None:
                step.run()
                if self._has_loaded():
                    break
            return self._opened()
        except BaseException:
            self._residency.run(self.withdraw)
            raise

    async def __aenter__(self) -> Any:
        """Do what ``with`` does, without blocking the event loop."""
        if self.held or self._entering:
            raise self._entered_twice()
        try:
            self._entering = True
            self.owner = current_owner()
            while (step := self._residency.run(self._advance, None)) is not None:
                await step.arun()
                if self._has_loaded():
                    break
            return self._opened()
        except BaseException:
            self._residency.run(self.withdraw)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the entry go."""
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the entry go; nothing here waits."""
        self.__exit__(kind, error, trace)

    def _advance(self, loop: asyncio.AbstractEventLoop | None) -> Step | None:
        """Decide the next step; None when the guard has what it needs. Under the lock."""
        raise NotImplementedError

    def _has_loaded(self) -> bool:
        """Whether the step just taken has brought all that there is to wait for."""
        return False

    def _opened(self) -> Any:
        """Return the value that the block gets. Outside the lock."""
        raise NotImplementedError

    def try_enter(self) -> bool:
        """Enter if the value is in memory and free now."""
        raise NotImplementedError

    @property
    def wanted(self) -> Entry:
        """The entry that the guard is for."""
        return self._entry

    def _bind(self) -> Entry:
        """Return the entry, or the one that has taken over its name since ``get``."""
        self._residency.check_open()
        entry = self._entry
        if entry.held:
            self._release_abandoned()
        if entry.state is not State.DROPPED:
            return entry
        successor = self._engine.names.get(self._name) if self._name is not MISSING else None
        if successor is None:
            what = "the entry" if self._name is MISSING else repr(self._name)
            raise KeyError(f"{what} was deleted before its guard was entered")
        self._entry = successor
        return successor

    def _load(self, entry: Entry, *, writable: bool) -> Step:
        """Return the step that brings a spilled entry's value, or that its load has to wait for."""
        residency = self._residency
        waiter = residency.load_waits(self, writing=writable)
        if waiter is not None:
            return waiter
        order = residency.order_load(entry, writable=writable)
        work = Work(lambda: self._carry_out(order), self._engine.workers)
        state = next_state(entry.state, Event.LOAD)
        # Straight line: `withdraw` finds the order if the state says LOADING.
        self._order = order
        order.token.shares += 1
        residency.loading_count += 1
        entry.state = state
        return work

    def _carry_out(self, order: LoadOrder) -> None:
        residency, me = self._residency, get_ident()
        try:
            residency.in_load[me] = (order.entry, *residency.in_load.get(me, ()))
            self._engine.spiller.load(order)
        except (CorruptBlobError, StorageError) as error:
            self._residency.check_open()  # the blob went with the pool
            self._tell(order, error)
            raise
        except Exception as error:
            self._tell(order, error)
            raise
        finally:
            rest = residency.in_load.pop(me, ())[1:]
            if rest:
                residency.in_load[me] = rest

    def _tell(self, order: LoadOrder, error: Exception) -> None:
        log, entry = self._residency.log, order.entry
        if log is not None:
            seconds = monotonic() - order.since
            log.tell(EventKind.ERROR, entry, order.token.key, entry.nbytes, seconds, error)

    def _miss(self) -> None:
        if not self._missed:
            self._missed = True
            self._residency.misses += 1

    def _count(self) -> None:
        if not self._missed:
            self._residency.hits += 1
        self._missed = False

    def look_up(self) -> None:
        """Let the entry go that is held by guards which nobody has any more. Outside the lock."""
        self._residency.run(self._release_abandoned)

    def _release_abandoned(self) -> None:
        for hold in self._entry.abandoned():
            hold.withdraw()

    def withdraw(self) -> None:
        """Undo whatever entering has come to. Under the lock."""
        residency, entry, order = self._residency, self._entry, self._order
        self._order = None
        self._entering = False
        self._missed = False
        if order is not None and not order.started and order.entry.state is State.LOADING:
            residency.give_up_load(order)
        was_held = entry.held
        entry.give_up(self)
        residency.leave_room(self)
        if entry.held and not was_held:
            residency.pin(entry)
        if self.held:
            self._let_go(entry)
        else:
            residency.disown(entry)

    def _let_go(self, entry: Entry) -> None:
        residency = self._residency
        pinned = entry.value is not MISSING
        entry.leave(self)
        if not entry.held:
            if pinned:
                residency.pinned_bytes -= entry.nbytes
            residency.unpinned(entry)

    def _entered_twice(self) -> FBCacheError | RuntimeError:
        return RuntimeError("this guard is entered already; ask the pool for another one")


class ReadGuard(Guard):
    """Shared access to an entry's value: ``with pool.get(name) as value``.

    The value is pinned in memory, and read-only where that can be had, until the block ends.
    A guard can be entered again after it was left.
    """

    __slots__ = ()

    @property
    def value(self) -> Any:
        """The value, while the guard is entered.

        Raises
        ------
        RuntimeError
            The guard is not entered.
        """
        if not self.held:
            raise not_entered()
        value = self._entry.value
        if value is MISSING:
            self._residency.check_open()
        return value

    def __enter__(self) -> Any:
        """Wait for the entry, load it if it is on disk, pin it, and return its value.

        Raises
        ------
        DeadlockError
            This thread or task holds the entry for writing.
        CorruptBlobError, StorageError
            The blob could not be read; the entry stays as it is.
        PoolClosedError, ForkedPoolError, KeyError
            The pool, or the entry, is gone.
        """
        if self.held:
            raise self._entered_twice()
        entry = self._entry
        residency = self._residency
        owner = get_ident() if _running_loop() is None else current_owner()
        try:
            with residency.lock:
                value = entry.value
                if (
                    value is not MISSING
                    and entry.writer is None
                    and entry.waiters is None
                    and not (self.held or self._entering)  # in another thread, meanwhile
                ):
                    # The common case: Entry._enter_shared, written out.
                    self.owner = owner
                    first = entry.readers
                    self.next = first
                    if first is None:
                        residency.pinned_bytes += entry.nbytes
                    else:
                        first.prev = self
                    entry.readers = self
                    self.held = True
                    residency.hits += 1
                    if entry.order is not residency.front:
                        residency.touch(entry)
                    return value
        except BaseException:
            self._residency.run(self.withdraw)
            raise
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the entry go. An error about writing to a read-only array says what would do."""
        entry = self._entry
        residency = self._residency
        try:
            with residency.lock:
                simple = (
                    entry.order is not None
                    and entry.waiters is None
                    and residency.resident_bytes <= residency.budget
                    and not residency.room
                    and self.held
                )
                if simple:
                    # The common case: Entry.leave, written out.
                    before, after = self.prev, self.next
                    if before is not None:
                        before.next = after
                        self.prev = None
                    else:
                        entry.readers = after
                        if after is None:
                            residency.pinned_bytes -= entry.nbytes
                    if after is not None:
                        after.prev = before
                        self.next = None
                    self.held = False
            if not simple:
                residency.run(self.withdraw)
        except ForkedPoolError:
            pass  # the parent's guard, left in the child
        except BaseException:
            residency.run(self.withdraw)
            raise
        if error is not None:
            _explain(error, entry)

    def try_enter(self) -> bool:
        """Enter if the value is in memory and no writer is there or waits."""
        self.owner = current_owner()
        return self._residency.run(self._try)

    def _try(self) -> bool:
        entry = self._bind()
        was_held = entry.held
        if not entry.try_shared(self):
            return False
        if not was_held:
            self._residency.pin(entry)
        if entry.value is MISSING:
            self._let_go(entry)
            return False
        self._count()
        if entry.order is not self._residency.front:
            self._residency.touch(entry)
        return True

    def _advance(self, loop: asyncio.AbstractEventLoop | None) -> Step | None:
        residency = self._residency
        if not self.held:
            entry = self._bind()
            was_held = entry.held
            waiter = entry.acquire_shared(self, loop)
            if waiter is not None:
                return waiter
            if not was_held:
                residency.pin(entry)
        residency.check_open()
        entry = self._entry
        if entry.value is not MISSING or (entry.state is State.SPILLED and residency.recall(entry)):
            self._count()
            if entry.order is not residency.front:
                residency.touch(entry)
            return None
        self._miss()
        if entry.state is State.LOADING:
            return residency.watch(entry)
        return self._load(entry, writable=False)

    def _has_loaded(self) -> bool:
        # What the guard itself has loaded, it has pinned: nobody can take it away any more.
        order = self._order
        if order is None or order.open or not self.held or self._entry.value is MISSING:
            return False
        self._missed = False
        return True

    def _opened(self) -> Any:
        self._order = None
        self._entering = False
        return self._entry.value


def not_entered() -> RuntimeError:
    """Return the error for a use of a guard's value outside its block."""
    return RuntimeError("the guard is not entered; use `with guard as value:`")


def _explain(error: BaseException, entry: Entry) -> None:
    """Name ``get_mut`` in numpy's error about a read-only array (invariant 15)."""
    if isinstance(error, ValueError) and "read-only" in str(error) and len(error.args) == 1:
        which = f"pool.get_mut({entry.name!r})" if entry.named else "load_mut(), or pool.get_mut(key),"
        error.args = (f"{error.args[0]}: it was read from the pool; open it with {which} to change it",)
