"""The budget: who stays, who is written ahead, who leaves, who waits.

Guarantees
----------
- Resident bytes stay within the budget, plus what guards pin, plus one value per loading
  thread and the value being put (invariant 3). What cannot be encoded counts as pinned.
- Nothing waits here, and no file is touched: a decision returns what is to be waited for.
- Whoever waits for room is let in in the order of asking.

Where an unpinned value in memory is
------------------------------------
``policy`` (it may stay) -> ``queued`` (to be written; one job on the workers for each) -> being
written (in no order) -> ``clean`` (to be dropped as soon as room is needed). A hit on the way
brings it back to the front of ``policy``. A pinned entry that comes up for eviction is taken out of
its order, and put back at the front when the last guard leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import get_ident
from typing import Any, Final

from fbcache.books import Books
from fbcache.entry import IN_MEMORY, MISSING, Entry, Event, State, next_state
from fbcache.events import EventKind
from fbcache.freezing import Ghost
from fbcache.lru import Chain, Policy
from fbcache.waiting import Answer, Hold, Waiter
from fbcache.workers import Workers

#: Most bytes kept free or clean ahead of need: at 2 GB/s, a quarter of a second of writing.
MAX_HEADROOM: Final = 512 << 20


class Budget(Books):
    """Admission and eviction."""

    def __init__(
        self, budget: int, policy: Policy[Entry], workers: Workers, mend: Callable[[Any], None]
    ) -> None:
        super().__init__(workers, mend)
        self.budget = budget
        self.headroom = min(budget // 8, MAX_HEADROOM)
        self.policy = policy
        self.front = policy.front
        self.queued: Chain[Entry] = Chain()
        self.clean: Chain[Entry] = Chain()
        self.writing_bytes = 0
        self.writing_count = 0
        self.suspended = False  # a write has failed: none is begun before a put needs one
        self.in_hand: dict[int, list[Any]] = {}  # what each thread was told to write, by its identifier
        self.write_job: Callable[[], None]

    # ----------------------------------------------------------------------- admission

    def admit_or_wait(self, entry: Entry) -> Waiter | None:
        """Let a new value into memory, or return what its ``put`` has to wait for."""
        self.check_open()
        if not self.room:
            self._make_room(entry.nbytes, force=True)
        # A worker comes here in a value's finalizer; who waited for others there would wait for itself.
        if (not self.room and self._fits(entry.nbytes)) or self._may_not_wait():
            self.admit(entry)
            return None
        return self._wait_for_room(Waiter(entry=entry))

    def admit(self, entry: Entry) -> None:
        """Let a value into memory, whether it fits or not."""
        self.entries.add(entry)
        self.resident_bytes += entry.nbytes
        self.policy.add(entry)
        self._write_ahead()

    def admit_oversize(self, entry: Entry, answer: Answer) -> None:
        """Let in a value larger than the budget, to be written at once; ``answer`` comes after that."""
        self.check_open()
        self.entries.add(entry)
        self.resident_bytes += entry.nbytes
        self.request_write(entry, answer)
        if self.within:
            self._answer(entry, None)

    def give_up_admission(self, entry: Entry) -> None:
        """Undo what a ``put`` has come to, wherever it was interrupted."""
        self.leave_room(entry)
        self.disown(entry)

    @property
    def overfull(self) -> bool:
        """Whether memory is over the budget, beyond what is pinned, and waiting can change that."""
        return self.resident_bytes - self.pinned_bytes > self.budget and not self._hopeless()

    def load_waits(self, hold: Hold, *, writing: bool) -> Waiter | None:
        """Return what a load, or a write guard, under which a value may grow, has to wait for.

        A reader never hears of failing writes. A writer, who makes values that must be written
        before they can leave, tries one even after another has failed, and hears of its error.
        """
        if self.resident_bytes - self.pinned_bytes <= self.budget:
            return None
        self._make_room(0, force=writing)
        if not self.overfull or self._may_not_wait():
            return None
        return self._wait_for_room(Waiter(hold=hold, exclusive=writing))

    def _may_not_wait(self) -> bool:
        """Whether this thread would wait for itself."""
        return self.within or self._workers.is_worker()

    def writes_itself(self, entry: Entry) -> bool:
        """Whether who waits for the entry's blob would wait for itself, as a finalizer or a codec may.

        It may be another worker that writes it; but that one's finalizer may wait for this one.
        """
        if entry.state is not State.WRITING:
            return self.within and entry.token is None
        return self.within or any(not order.ended for order in self.in_hand.get(get_ident(), ()))

    def _wait_for_room(self, waiter: Waiter) -> Waiter:
        self.room.append(waiter)
        self.stalls += 1
        return waiter

    def leave_room(self, who: Entry | Hold) -> None:
        """Take an entry or a hold out of the line for room, if it waits there."""
        for waiter in self.room:
            if waiter.entry is who or waiter.hold is who:
                self.let_go_on(waiter)
                return

    def let_go_on(self, waiter: Waiter, error: BaseException | None = None) -> None:
        """Take a waiter out of the line for room, and wake it."""
        waiter.wake(error)  # first: one that an interrupt leaves in line is let go again
        self.room.remove(waiter)
        seconds = time.monotonic() - waiter.since
        self.stall_seconds += seconds
        if self.log is not None:
            hold = waiter.hold
            self.log.note_stall(waiter.entry if hold is None else hold.wanted, seconds)

    def _let_in(self) -> None:
        while self.room:
            waiter = self.room[0]
            entry = waiter.entry
            if waiter.done or entry in self.entries:
                pass  # but for an interrupt it would be gone
            elif entry is None:
                self._make_room(0, force=waiter.exclusive)
                if self.overfull:
                    return
            else:
                self._make_room(entry.nbytes, force=True)
                if not self._fits(entry.nbytes):
                    return
                self.admit(entry)
            self.let_go_on(waiter)

    def _fits(self, nbytes: int) -> bool:
        return self.resident_bytes + nbytes <= self.budget or self._hopeless()

    def _hopeless(self) -> bool:
        """Whether waiting cannot bring room: nothing is being written or about to be."""
        return not self.queued.count and not self.writing_count

    # ------------------------------------------------------------------------ eviction

    def _make_room(self, nbytes: int, *, force: bool) -> None:
        """Drop clean values, and queue others for writing, until ``nbytes`` fit or will.

        ``force`` tries to write even after a write has failed.
        """
        while self.resident_bytes + nbytes > self.budget:
            entry = self.clean.first
            if entry is not None:
                self.clean.remove(entry)
                if not entry.held:
                    self.evict(entry)
                continue
            lacking = self.resident_bytes + nbytes - self.budget
            enough = self.queued.nbytes + self.writing_bytes >= lacking or (self.suspended and not force)
            if enough and not self._cleanly_next():
                return
            entry = self._pick()
            if entry is None:
                return
            if entry.state is State.CLEAN:
                self.evict(entry)
            else:
                self._queue(entry)

    def _write_ahead(self) -> None:
        """Keep the headroom free, clean, or on its way to be clean (invariant 3)."""
        if self.suspended:
            return
        while (
            self.budget - self.resident_bytes + self.clean.nbytes + self.queued.nbytes + self.writing_bytes
            < self.headroom
        ):
            entry = self._pick()
            if entry is None:
                return
            if entry.state is State.CLEAN:
                self.clean.push_last(entry)
            else:
                self._queue(entry)

    def _cleanly_next(self) -> bool:
        """Whether the next to leave needs no write: then nobody has to wait for one."""
        entry = self.policy.last()
        return entry is not None and (entry.held or entry.state is State.CLEAN)

    def _pick(self) -> Entry | None:
        """Take the next unpinned entry from the policy."""
        while (entry := self.policy.victim()) is not None:
            # One that is being written comes to the clean ones by itself.
            if not entry.held and entry.state is not State.WRITING:
                return entry
        return None

    def _queue(self, entry: Entry, *, first: bool = False) -> None:
        if entry.order is not None:
            entry.order.remove(entry)
        if first:
            self.queued.push_first(entry)
        else:
            self.queued.push_last(entry)
        self._call_writer()

    @property
    def _to_write(self) -> int:
        """How many entries wait to be written."""
        return self.queued.count

    def _call_writer(self) -> None:
        """Have a worker write what was put in line just now.

        While anything is in line, a job to begin with it is on its way: it is called for the first, and each
        job, once it has taken what it will write, calls for another one if something is left.
        """
        if self._to_write == 1:
            self._workers.submit(self.write_job)

    def resume(self) -> None:
        """Have the workers look again for what is to be done; a call too many does no harm."""
        super().resume()
        for entry in list(self.entries):
            self.attend(entry)
        if self._to_write:
            self._workers.submit(self.write_job)

    def evict(self, entry: Entry) -> int:
        """Drop a clean, unpinned value from memory (invariant 8); return the bytes freed."""
        if entry.order is not None:
            entry.order.remove(entry)
        value = entry.value
        ghost = Ghost.of(value)
        state = next_state(entry.state, Event.EVICT)
        if self.noted:
            self.noted.pop(entry, None)  # what comes back may be laid out otherwise
        entry.state = state
        entry.value = MISSING
        self.resident_bytes -= entry.nbytes
        if entry.held:  # a write guard that is about to load it anew
            self.pinned_bytes -= entry.nbytes
        if ghost is not None:
            self.ghosts[entry] = ghost
        self.evictions += 1
        if self.log is not None and entry.token is not None:
            seconds = self.took.pop(entry, 0.0)
            self.log.note(EventKind.EVICTION, entry, entry.token.key, entry.nbytes, seconds)
        if entry.reloaded:
            self.clean_evictions += 1
        self._garbage.append((entry, value))
        return entry.nbytes

    def touch(self, entry: Entry) -> None:
        """Note a hit on an entry that is not in the policy's front segment."""
        torn, self.torn = self.torn, True  # a hit comes here without `run`
        deciding = self._deciding
        try:
            self._deciding = True
            self._touch(entry)
        finally:
            self._deciding = deciding
        self.torn = torn

    def _touch(self, entry: Entry) -> None:
        if entry.order is self.front:  # another hit was faster
            return
        if self.policy.owns(entry):
            self.policy.touch(entry)
        elif entry.stuck or entry in self.requests:
            return  # it is to be written all the same, or to stay whatever comes
        elif entry.order is not None:
            entry.order.remove(entry)
            self.policy.add(entry)
        elif entry.state is State.WRITING and entry.owned:
            self.policy.add(entry)

    def request_write(self, entry: Entry, answer: Answer | Future[None]) -> None:
        """Have the entry's blob written soon; ``answer`` is given when it is, or could not be."""
        self.check_open()
        if entry.state is State.DROPPED or entry.token is not None:
            if isinstance(answer, Answer):
                answer.wake()
            else:
                answer.set_result(None)  # nobody knows it yet: it has no callbacks
            return
        self.requests.setdefault(entry, []).append(answer)
        self.attend(entry)

    def request_eviction(self, entry: Entry, answer: Answer) -> bool:
        """Have the blob written of a value that can then leave memory; whether it is one."""
        if entry.held or entry.state in (State.SPILLED, State.LOADING) or self.writes_itself(entry):
            return False
        self.request_write(entry, answer)
        return True

    def attend(self, entry: Entry) -> None:
        """Answer those who have asked for the entry's blob, or have it written as soon as it can be."""
        if entry not in self.requests:
            return
        if entry.token is not None:  # a rollback may have brought it back
            self._answer(entry, None)
        elif entry.state is State.RESIDENT and entry.writer is None:
            entry.stuck = False
            self._queue(entry, first=True)

    def correct_size(self, entry: Entry, nbytes: int) -> None:
        """Give ``entry`` its true size, in whatever order it is."""
        order = entry.order
        if order is not None:
            order.remove(entry)
        if entry.value is not MISSING or entry.state is State.MUTATING:
            self.resident_bytes += nbytes - entry.nbytes
            if entry.held:
                self.pinned_bytes += nbytes - entry.nbytes
        entry.nbytes = nbytes
        if order is self.queued:
            self.queued.push_first(entry)
        elif order is self.clean:
            self.clean.push_first(entry)
        elif order is not None:
            self.policy.add(entry)

    def evict_if_possible(self, entry: Entry) -> int:
        """Drop the value if it is clean and unpinned; return the bytes freed."""
        if entry.state is not State.CLEAN or entry.held:
            return 0
        return self.evict(entry)

    def evictable(self, nbytes: int | None) -> list[Entry]:
        """Return unpinned values in memory, next to leave first, of ``nbytes`` at least, or all."""
        self.withdraw_abandoned()
        writing = [e for e in self.entries if e.state is State.WRITING]
        chosen = [e for e in (*self.clean, *writing, *self.queued) if not e.held]
        found = sum(e.nbytes for e in chosen)
        while (nbytes is None or found < nbytes) and (entry := self._pick()) is not None:
            chosen.append(entry)
            found += entry.nbytes
            if entry.state is State.CLEAN:
                self.clean.push_last(entry)
            else:
                self._queue(entry)
        return chosen

    # -------------------------------------------------------------------------- guards

    def pin(self, entry: Entry) -> None:
        """Count ``entry``, which has just got its first guard, as pinned."""
        if entry.state in IN_MEMORY:
            self.pinned_bytes += entry.nbytes

    def unpinned(self, entry: Entry) -> None:
        """Go on after the last guard has left, its bytes no longer counted as pinned."""
        if entry.state is State.DROPPED:
            return
        entry.hand_over()
        if entry.held:
            self.pin(entry)
            self.attend(entry)  # readers do not mind its being written
            return
        self.disown(entry)
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Find an unpinned entry its place, and come back to the budget."""
        self.attend(entry)
        if entry.order is None and entry.state in (State.RESIDENT, State.CLEAN) and not entry.stuck:
            if entry.nbytes > self.budget:
                self._leave_soon(entry)
            else:
                self.policy.add(entry)
        if self.resident_bytes > self.budget:
            self._make_room(0, force=False)
            if self.resident_bytes > self.budget and entry.state is State.CLEAN:
                self.evict(entry)
        self._write_ahead()

    def _leave_soon(self, entry: Entry) -> None:
        if entry.state is State.CLEAN:
            self.clean.push_first(entry)
        else:
            self._queue(entry)

    def resize(self, budget: int) -> None:
        """Follow a new budget: evict down to it, or let in who waits."""
        self.check_open()
        self.budget = budget
        self.headroom = min(budget // 8, MAX_HEADROOM)
        self.policy.resize(budget)
        self._make_room(0, force=True)
        self._write_ahead()
