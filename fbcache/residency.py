"""What the workers are told to do, and what becomes of an entry when they report.

Guarantees
----------
- Loads are single-flight (invariant 11): the state says LOADING from the order to its outcome, and who
  comes in between waits for that.
- A failed write keeps the value, and its error surfaces once (invariant 9): in the call that waits
  for this write, else in a ``put`` or a write guard that waits for room, else in ``drain()`` or
  ``close()``.
- A blob is not deleted while a load needs it: the load has a share of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from time import monotonic
from typing import Any, Final
from uuid import UUID

from fbcache.adoption import Adoption
from fbcache.entry import MISSING, Entry, Event, State, Token, next_state
from fbcache.errors import DeadlockError, PoolClosedError
from fbcache.events import EventKind
from fbcache.lru import Policy
from fbcache.spill import LoadOrder, WriteOrder, Written
from fbcache.waiting import Waiter
from fbcache.workers import Workers

#: Most values written, or blobs deleted, in one go; more makes the others wait, and saves nothing.
_MOST_AT_ONCE: Final = 256


class Residency(Adoption):
    """All decisions of a pool: what guards, handles, the pool and its workers talk to."""

    def __init__(
        self,
        budget: int,
        policy: Policy[Entry],
        workers: Workers,
        *,
        verify: str,
        mend: Callable[[Any], None],
    ) -> None:
        super().__init__(budget, policy, workers, mend)
        self._always_verify = verify == "always"
        self._never_verify = verify == "never"
        self.by_slot = False  # whether the store packs small blobs, which then need no key
        self.batch = 0  # bytes of small values that are written together
        self.loading_count = 0
        self.in_load: dict[int, tuple[Entry, ...]] = {}  # what each thread is loading, by its identifier

    # -------------------------------------------------------------------------- writes

    def next_writes(self) -> list[WriteOrder]:
        """Return the entries to be written now: one, or some that are small."""
        return self.run(self._next_writes)

    def _next_writes(self) -> list[WriteOrder]:
        mine = self.in_hand.setdefault(get_ident(), [])
        mine[:] = [order for order in mine if not order.ended]  # a worker begins others while it waits
        orders: list[WriteOrder] = []
        room = self.batch
        while len(orders) < _MOST_AT_ONCE and (entry := self.next_to_write()) is not None:
            key = entry.key if self.by_slot else self.keys.of(entry)
            orders.append(WriteOrder(entry, key, entry.value, self.codecs.get(entry)))
            entry.state = next_state(entry.state, Event.WRITE)
            self.writing_bytes += entry.nbytes
            self.writing_count += 1
            room -= entry.nbytes
            if room <= 0:
                break
        mine += orders
        if self._to_write:
            self._workers.submit(self.write_job)
        return orders

    def key_of(self, order: WriteOrder) -> UUID:
        """Return the key of the content that ``order`` is about."""
        if order.key is None:
            self.run(self._name, order)
        assert order.key is not None
        return order.key

    def _name(self, order: WriteOrder) -> None:
        order.key = self.keys.of(order.entry)

    def written(self, outcomes: Sequence[Written]) -> None:
        """Count entries as clean."""
        self.run(self._all_written, outcomes)

    def _all_written(self, outcomes: Sequence[Written]) -> None:
        for outcome in outcomes:
            if not outcome.order.ended:
                self._written(outcome)

    def _written(self, outcome: Written) -> None:
        order, disk_bytes, payload = outcome.order, outcome.disk_bytes, outcome.payload
        entry = order.entry
        order.ended = True
        self._let_go_of(order)
        self._write_ended(entry, Event.WRITTEN)
        # What was named meanwhile, as it was shown to somebody, keeps its name.
        token = Token(order.key if order.key is not None else entry.key, disk_bytes, slot=outcome.slot)
        self.spills += 1
        self.bytes_written += disk_bytes
        self.suspended = False
        if entry.state is State.DROPPED:
            self.release_token(token)
        else:
            entry.token = token
            entry.reloaded = False
            entry.stuck = False
            if self.log is not None:
                self.took[entry] = monotonic() - order.since
            if not entry.exact:
                entry.exact = True
                if payload > entry.nbytes:
                    self.correct_size(entry, payload)
            if entry in self.requests:
                self._answer(entry, None)
            if entry.captures is not None:
                self.give_captures(entry, token)
            self._after_write(entry)
            if self.resident_bytes > self.budget:  # the estimate was too low
                self._make_room(0, force=False)
            if not entry.owned:  # only captures may have owned it
                self.disown(entry)

    def write_failed(self, order: WriteOrder, error: BaseException, *, hopeless: bool) -> None:
        """Keep the value, and say so once (invariant 9)."""
        self.run(self._write_failed, order, error, hopeless)

    def _write_failed(self, order: WriteOrder, error: BaseException, hopeless: bool) -> None:
        entry = order.entry
        if order.ended:
            return
        order.ended = True
        self._let_go_of(order)
        self._write_ended(entry, Event.WRITE_FAILED)
        self.errors += 1
        if self.log is not None:
            seconds = monotonic() - order.since
            self.log.note(EventKind.ERROR, entry, order.key, entry.nbytes, seconds, error)
        if entry.state is not State.DROPPED:
            entry.stuck = hopeless
            self.suspended = self.suspended or not hopeless
            self._surface(entry, error, hopeless)
            self._after_write(entry)
            self.disown(entry)

    def _let_go_of(self, order: WriteOrder) -> None:
        if order.entry.state is State.DROPPED:
            self.let_die(order.entry, order.value)
        order.value = MISSING  # an error's traceback may keep the order

    def _write_ended(self, entry: Entry, event: Event) -> None:
        state = next_state(entry.state, event)
        entry.state = state
        self.writing_bytes -= entry.nbytes
        self.writing_count -= 1
        if state is State.DROPPED:
            self.ending.discard(entry)
            self.resident_bytes -= entry.nbytes

    def _after_write(self, entry: Entry) -> None:
        if not entry.held:
            entry.hand_over()  # to a writer that has waited for the write
            if entry.held:
                self.pin(entry)
        if entry.held or entry.order is not None or entry.stuck:
            return
        if entry.state is State.RESIDENT:
            self.policy.restore(entry)
        elif entry.nbytes > self.budget:
            self._leave_soon(entry)
            self._make_room(0, force=False)
        else:
            self.clean.push_last(entry)

    def _surface(self, entry: Entry, error: BaseException, hopeless: bool) -> None:
        """Give the error to the calls that wait for this write, or keep it for ``drain()``."""
        heard = self.fail_captures(entry, error)
        if entry in self.requests:
            self._answer(entry, error)
            heard = True
        if heard:
            return
        if not hopeless:
            for waiter in self.room:
                if waiter.entry is not None or waiter.exclusive:
                    self.let_go_on(waiter, error)
                    return
        self._keep_for_later(error)

    # --------------------------------------------------------------------------- loads

    def order_load(self, entry: Entry, *, writable: bool) -> LoadOrder:
        """Return the order to load a spilled entry. The caller sets the state with it."""
        self._make_room(entry.nbytes, force=False)
        token = entry.token
        assert token is not None
        verify = self._always_verify or (token.unverified and not self._never_verify)
        return LoadOrder(entry, token, writable, verify)

    def loaded(self, order: LoadOrder, value: Any) -> None:
        """Take the value in, for whoever waits for it."""
        self.run(self._loaded, order, value)

    def _loaded(self, order: LoadOrder, value: Any) -> None:
        entry = order.entry
        state = next_state(entry.state, Event.LOADED) if order.open else State.DROPPED
        if state is State.DROPPED:
            self._garbage.append((entry, value))
            self._close_order(order)
            return
        # Straight line.
        order.open = False
        self.loading_count -= 1
        entry.value = value
        entry.thawable = order.writable
        entry.reloaded = True
        entry.state = state
        self.take_in(entry)
        if order.verify:
            order.token.unverified = False
        self.loads += 1
        self.bytes_read += order.token.nbytes
        if self.log is not None:
            seconds = monotonic() - order.since
            self.log.note(EventKind.LOAD, entry, order.token.key, entry.nbytes, seconds)
        self.release_token(order.token)
        self.wake_watchers(entry)

    def take_in(self, entry: Entry) -> None:
        """Count a value that is back in memory."""
        self.ghosts.pop(entry, None)
        self.resident_bytes += entry.nbytes
        if entry.held:
            self.pinned_bytes += entry.nbytes
        if entry.nbytes <= self.budget and entry.owned:
            self.policy.add(entry)
        if not entry.held:  # whoever asked for it has been cancelled
            self.settle(entry)
        self._write_ahead()

    def load_failed(self, order: LoadOrder) -> None:
        """Let the next one try, unless the outcome is known already."""
        self.run(self.give_up_load, order)

    def give_up_load(self, order: LoadOrder) -> None:
        """Do what :meth:`load_failed` does, as part of a decision."""
        entry = order.entry
        if order.open:
            state = next_state(entry.state, Event.LOAD_FAILED)
            # Straight line.
            order.open = False
            self.loading_count -= 1
            entry.state = state
            self.release_token(order.token)
            self.wake_watchers(entry)

    def _close_order(self, order: LoadOrder) -> None:
        if order.open:
            # Straight line.
            order.open = False
            self.loading_count -= 1
            self.release_token(order.token)

    def recall(self, entry: Entry) -> bool:
        """Bring a spilled value back from the program's own variables, if it is there."""
        ghost = self.ghosts.get(entry)
        value = None if ghost is None else ghost.recall()
        if value is None:
            return False
        entry.state = next_state(entry.state, Event.RECALL)
        entry.value = value
        self.take_in(entry)
        return True

    def watch(self, entry: Entry) -> Waiter:
        """Return what ends when the load that is under way does.

        Raises
        ------
        DeadlockError
            It is this thread's own: what it calls amid the load waits for that.
        """
        if entry in self.in_load.get(get_ident(), ()):
            raise DeadlockError(f"{entry!r} is being loaded by this very thread, below this call")
        waiter = Waiter()
        self.watchers.setdefault(entry, []).append(waiter)
        return waiter

    # ------------------------------------------------------------------------ deletion

    def next_deletions(self) -> list[Token]:
        """Return blobs that nobody needs any more: one, or some that are packed."""
        return self.run(self._next_deletions)

    def _next_deletions(self) -> list[Token]:
        tokens: list[Token] = []
        deletions = self._deletions
        while not self.closed and deletions and len(tokens) < _MOST_AT_ONCE:
            if tokens and deletions[0].slot < 0:
                break
            # Straight line.
            token = deletions[0]
            self.deleting_count += 1
            del deletions[0]
            tokens.append(token)
            if token.slot < 0:
                break
        if deletions and not self.closed:
            self._workers.submit(self.delete_job)
        return tokens

    def deleted(self, tokens: Sequence[Token], error: Exception | None) -> None:
        """Hear that deletions came to their end."""
        self.run(self._deleted, tokens, error)

    def _deleted(self, tokens: Sequence[Token], error: Exception | None) -> None:
        self.deleting_count -= len(tokens)
        for token in tokens:
            self.forget_deleted(token)
        if error is not None:
            self.errors += 1
            if self.log is not None:
                token = tokens[0]
                self.log.note(EventKind.ERROR, None, token.key, token.nbytes, why=error)
            self._keep_for_later(error)

    # ----------------------------------------------------------------- resize and close

    def idle(self) -> Waiter | None:
        """Return what to wait for until no background work is left, or None."""
        self.check_open()
        if not self._busy() or self._may_not_wait() or get_ident() in self.in_load:
            return None
        waiter = Waiter()
        self.idlers.append(waiter)
        return waiter

    def _let_in(self) -> None:
        super()._let_in()
        if self.idlers and not self._busy():
            for waiter in self.idlers:
                waiter.wake()
            self.idlers.clear()

    @property
    def stalled(self) -> str:
        """Who waits for what will not come, after a decision; the empty string if nobody does."""
        if self.room and self._hopeless():
            return "calls that wait for room"
        if self.idlers and not self._busy():
            return "calls that wait for the end of background work"
        if self.deletion_watchers and not (self.deleting_count or self._claims):
            return "restores that wait for a deletion, or for another restore"
        return ""

    def _busy(self) -> bool:
        return bool(
            self.queued.count
            or self.wanted
            or self.writing_count
            or self.loading_count
            or self._deletions
            or self.deleting_count
        )

    def _keep_for_later(self, error: BaseException) -> None:
        """Keep an error that no call waits for; those after the first as its notes."""
        if self.background_error is None:
            self.background_error = error
        else:
            self.background_error.add_note(f"and: {error!r}")

    def take_background_error(self) -> BaseException | None:
        """Return the first error not raised yet, and count it as raised."""
        error, self.background_error = self.background_error, None
        return error

    def close(self) -> None:
        """Drop everything and let everybody go who waits."""
        self.closed = True
        for waiter in self.room:
            waiter.wake(PoolClosedError("the pool was closed while this call waited"))
        self.room.clear()
        for entry in list(self.entries):
            for waiter in entry.waiters or ():
                waiter.wake()  # to find the pool closed
            entry.waiters = None
            self.fail_captures(entry, PoolClosedError("the pool was closed while it was being saved"))
            self.drop(entry)
        for waiter in (*self.idlers, *self.deletion_watchers):
            waiter.wake()
        self.idlers.clear()
        self.deletion_watchers.clear()
