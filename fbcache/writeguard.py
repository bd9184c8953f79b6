"""The guard for writing: what ``with pool.get_mut(name) as x`` enters.

Guarantees
----------
- Entering gives the entry a new key (invariant 4); the value is writeable from then on, for this guard alone.
- Leaving freezes and measures the value anew. However the guard is left, the entry has a value again: the
  changed one, or with ``rollback`` and an exception the former.
- A save that still needs the former content gets a copy of it (:mod:`fbcache.captures`).
- In a pool with ``debug=True``, a value that was changed before is not taken: MutatedError, and not entered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any
from uuid import UUID

from fbcache.entry import MISSING, Entry, Event, State, Token, next_state
from fbcache.errors import DeadlockError, ForkedPoolError
from fbcache.events import EventKind
from fbcache.freezing import Owners, deep_copy, take_over, thaw
from fbcache.guard import Engine, Guard, not_entered
from fbcache.sizeof import Measure, measure
from fbcache.waiting import Step, Work, current_owner


@dataclass(slots=True)
class _Former:
    """What an entry was before a write guard took its value."""

    key: UUID | None
    exposed: bool
    token: Token | None
    kept: bool = False  # whether what the block did stays
    since: float = field(default_factory=monotonic)


class WriteGuard(Guard):
    """Exclusive access: ``with pool.get_mut(name) as value``, to change it in place.

    Entering gives the entry a new key. Leaving keeps what the block did, also after an
    exception; with ``rollback=True`` an exception brings the former content and key back.

    Attributes
    ----------
    value : Any
        The value; set it to replace the entry's content by another object.
    """

    __slots__ = ("_attempt", "_copy", "_former", "_looked", "_owners", "_rollback", "_value")

    def __init__(
        self, entry: Entry, engine: Engine, name: Hashable = MISSING, *, rollback: bool = False
    ) -> None:
        super().__init__(entry, engine, name)
        self._rollback = rollback
        self._value: Any = MISSING
        self._copy: Any = MISSING
        self._owners: Owners = {}
        self._former: _Former | None = None
        self._looked = False
        self._attempt = 0  # what a cancelled task has begun may end during the next one, for nothing

    @property
    def value(self) -> Any:
        """The value, while the guard is entered; assigning replaces it.

        Raises
        ------
        RuntimeError
            The guard is not entered.
        """
        if self._former is None:
            raise not_entered()
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        if self._former is None:
            raise not_entered()
        self._value = value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the value back, frozen and measured anew, or with ``rollback`` the former one."""
        try:
            if error is not None and self._rollback:
                self._residency.run(self._restore)
            else:
                self._give_back()
        except ForkedPoolError:
            pass
        except BaseException:
            self._residency.run(self.withdraw)
            raise

    def try_enter(self) -> bool:
        """Enter if the value is in memory and nobody else is there; not while it is being written."""
        self.owner = current_owner()
        if not self._residency.run(self._try):
            return False
        self._finish_entering()
        return True

    def _finish_entering(self) -> None:
        try:
            while (step := self._residency.run(self._advance, None)) is not None:
                step.run()
            self._opened()
        except BaseException:
            self._residency.run(self.withdraw)
            raise

    def _try(self) -> bool:
        entry = self._bind()
        if not entry.try_exclusive(self):
            return False
        self._residency.pin(entry)
        if entry.value is MISSING or self._residency.overfull:
            self._let_go(entry)
            return False
        return True

    def _advance(self, loop: asyncio.AbstractEventLoop | None) -> Step | None:
        residency = self._residency
        if not self.held:
            entry = self._bind()
            if entry.state is State.WRITING and residency.writes_itself(entry):
                raise DeadlockError(f"{entry!r} is being written by this very thread: a finalizer or a codec")
            waiter = entry.acquire_exclusive(self, loop)
            if waiter is not None:
                return waiter
            residency.pin(entry)
        residency.check_open()
        entry = self._entry
        if entry.state is State.LOADING:  # for a reader that was cancelled
            self._miss()
            return residency.watch(entry)
        if residency.noted and not self._looked and entry in residency.noted:
            return Work(partial(self._look, self._attempt), self._engine.workers)
        if entry.state is State.CLEAN and not entry.thawable:
            residency.evict(entry)  # a view of its file; what will be changed is read into memory
        if entry.state is State.SPILLED:
            self._miss()
            return self._load(entry, writable=True)
        if entry.captures is not None and entry.token is None:
            return Work(partial(self._leave_copy_to_save, self._attempt), self._engine.workers)
        if self._rollback and entry.token is None and self._copy is MISSING:
            return Work(partial(self._save_copy, self._attempt), self._engine.workers)
        waiter = residency.load_waits(self, writing=True)
        if waiter is not None:
            return waiter
        self._count()
        self._begin(entry)
        return None

    def _look(self, attempt: int) -> None:
        self._engine.promises.check_before(self._entry, self._entry.value, partial(self._goes_on, attempt))
        self._residency.run(self._note_look, attempt)

    def _note_look(self, attempt: int) -> None:
        self._looked = self._looked or self._goes_on(attempt)

    def _save_copy(self, attempt: int) -> None:
        copied = take_over(deep_copy(self._entry.value))
        self._residency.run(self._keep_copy, attempt, copied)

    def _keep_copy(self, attempt: int, copied: Any) -> None:
        if self._goes_on(attempt):
            self._copy = copied

    def _leave_copy_to_save(self, attempt: int) -> None:
        entry = self._entry
        twin = Entry(take_over(deep_copy(entry.value)), entry.nbytes, fixed=entry.fixed)
        self._residency.run(self._separate_for_save, attempt, entry, twin)

    def _separate_for_save(self, attempt: int, entry: Entry, twin: Entry) -> None:
        if self._goes_on(attempt):
            self._residency.separate(entry, twin)

    def _goes_on(self, attempt: int) -> bool:
        """Whether the guard has had the entry all the time since then. Under the lock."""
        return attempt == self._attempt

    def _begin(self, entry: Entry) -> None:
        """Take the value, and end its key (invariant 4)."""
        residency = self._residency
        if entry.order is not None:
            entry.order.remove(entry)
        if residency.noted:
            residency.noted.pop(entry, None)
        state = next_state(entry.state, Event.MUTATE)
        former = _Former(entry.key, entry.exposed, entry.token)
        # Straight line: from here on `withdraw` gives the value back.
        self._former = former
        self._value = entry.value
        entry.value = MISSING
        entry.key = None
        entry.exposed = False
        entry.token = None
        entry.stuck = False
        entry.state = state
        if former.exposed and former.key is not None:
            residency.keys.outdate(former.key, entry)
        if not self._rollback:
            self._release(former)

    def _release(self, former: _Former) -> None:
        token = former.token
        if token is not None:
            former.token = None
            self._residency.release_token(token)

    def _opened(self) -> Any:
        self._order = None
        self._entering = False
        self._value, self._owners = thaw(self._value)
        return self._value

    def _give_back(self) -> None:
        """Freeze and measure outside the lock, then settle; should that fail, settle all the same."""
        entry, value = self._entry, self._value
        size = Measure(entry.nbytes, entry.exact)
        try:
            if self._former is not None:
                value = take_over(value, owned=self._owners)
                if not entry.fixed:
                    size = measure(value)
        finally:
            self._residency.run(self._settle, value, size)

    def _settle(self, value: Any, size: Measure) -> None:
        former = self._former
        if former is None:
            return
        former.kept = True  # should an interrupt come now, there is no going back without the blob
        self._release(former)
        entry, log = self._entry, self._residency.log
        if log is not None and entry.state is State.MUTATING:  # else the pool was closed
            log.note(EventKind.MUTATION, entry, former.key, size.nbytes, monotonic() - former.since)
        entry.exact = size.exact
        self._put_back(value, size.nbytes)

    def _put_back(self, value: Any, nbytes: int) -> None:
        entry, residency = self._entry, self._residency
        state = next_state(entry.state, Event.SETTLE)
        # Straight line: the entry has its value again exactly when the guard has it no more.
        self._former = None
        if state is not State.DROPPED:
            entry.value = value
            entry.thawable = True
            entry.reloaded = False
        entry.state = state
        if state is not State.DROPPED:  # else the pool was closed
            residency.correct_size(entry, nbytes)
        self._let_go(entry)
        self._forget()

    def _restore(self) -> None:
        """Bring content and key back as they were: from the blob, or from the copy."""
        former, entry, residency = self._former, self._entry, self._residency
        if former is None:
            return
        if entry.exposed and entry.key is not None:
            residency.keys.outdate(entry.key, entry)
        if former.exposed and former.key is not None and entry.state is not State.DROPPED:
            residency.keys.renew(former.key, entry)
        entry.key = former.key
        entry.exposed = former.exposed
        if former.token is None:
            self._put_back(self._copy, entry.nbytes)
            return
        state = next_state(entry.state, Event.RESTORE)
        # Straight line.
        self._former = None
        if state is not State.DROPPED:
            entry.token = former.token
            residency.resident_bytes -= entry.nbytes
            residency.pinned_bytes -= entry.nbytes
        entry.state = state
        self._let_go(entry)
        self._forget()

    def _forget(self) -> None:
        for value in (self._value, self._copy):
            if value is not self._entry.value:
                self._residency.let_die(self._entry, value)
        self._value = self._copy = MISSING
        self._owners = {}
        self._looked = False
        self._attempt += 1

    def withdraw(self) -> None:
        """Undo whatever entering has come to; a value taken already goes back. Under the lock."""
        former = self._former
        if former is not None and self._rollback and not former.kept:
            self._restore()
        elif former is not None:
            entry = self._entry
            value = take_over(self._value, owned=self._owners)
            self._settle(value, Measure(entry.nbytes, entry.exact))
        else:
            self._forget()
            super().withdraw()
