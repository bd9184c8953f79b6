"""Captures: what a save sees of an entry, whatever becomes of the entry meanwhile.

Guarantees
----------
- A capture ends up with a share of a blob that holds the entry's content of the moment at which it was
  captured; of an entry in a write guard's hands, the content with which that guard leaves.
- No writer waits for a save. One that comes while the content is in memory only copies it first: the copy
  goes into an entry of its own, which nobody but the captures owns, and the writer goes on.
- A captured entry that is deleted lives on until its blob is written.
- Whatever ends a save, :meth:`Captures.release_capture` gives back all that the capture has.

An entry refers to its captures by a linked list, so that adding one, moving one to the copy and taking
one out are straight lines of stores (:mod:`fbcache.entry`). All of it is guarded by the pool's lock.

Values that are only captured are written in turn with those that must leave memory, so that neither
waits for all of the others, and they keep their place in the order of eviction.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from fbcache.budget import Budget
from fbcache.entry import Entry, State, Token
from fbcache.errors import DeadlockError
from fbcache.lru import Policy
from fbcache.waiting import Answer, current_owner, runs_on
from fbcache.workers import Workers


class Capture(Answer):
    """One version of an entry's content, for as long as a save needs it.

    Woken when it has its share of the blob, or with the error that the write came to.

    Attributes
    ----------
    source : Entry or None
        The entry whose blob is waited for; it counts this capture among its handles.
    token : Token or None
        The blob, once there is one; the capture has a share of it.
    nbytes : int
        The value's size in memory.
    next : Capture or None
        The next one of the same entry.
    then : callable or None
        Called once it is woken, under the pool's lock: no more than handing a job to the workers.
    """

    __slots__ = ("nbytes", "next", "source", "then", "token")

    def __init__(self, entry: Entry, then: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.then = then
        self.source: Entry | None = None
        self.token: Token | None = None
        self.nbytes = entry.nbytes
        self.next: Capture | None = None

    def wake(self, error: BaseException | None = None) -> None:
        """Let the sleeper go on, and have done what is to be done then."""
        super().wake(error)
        then, self.then = self.then, None
        if then is not None:
            then()


class Captures(Budget):
    """Decisions about captures."""

    def __init__(
        self, budget: int, policy: Policy[Entry], workers: Workers, mend: Callable[[Any], None]
    ) -> None:
        super().__init__(budget, policy, workers, mend)
        self.wanted: deque[Entry] = deque()  # to be written for captures only
        self._turn_of_wanted = False

    def capture(
        self, entries: Iterable[Entry], into: list[Capture], then: Callable[[], None] | None = None
    ) -> None:
        """Capture ``entries``, all at this instant; ``into`` has each capture from its beginning on.

        Raises
        ------
        DeadlockError
            This thread or task holds one of them for writing, so that waiting would never end.
        KeyError
            One is gone.
        """
        self.check_open()
        for entry in entries:
            if entry.state is State.DROPPED:
                raise KeyError("an entry was deleted before it could be saved")
            _refuse_own(entry)
            capture = Capture(entry, then)
            into.append(capture)
            token = entry.token
            if token is not None:
                # Straight line.
                token.shares += 1
                capture.token = token
                capture.done = True
                capture.wake()
            else:
                # Straight line.
                capture.next = entry.captures
                entry.captures = capture
                entry.handles += 1
                capture.source = entry
                self.attend(entry)

    def release_capture(self, capture: Capture) -> None:
        """Give up what the capture has."""
        entry, token = capture.source, capture.token
        if token is not None:
            capture.token = None
            self.release_token(token)
        elif entry is not None:
            self._take_out(entry, capture)
            self.disown(entry)

    def attend(self, entry: Entry) -> None:
        """Give the entry's captures its blob, or have that written, if they wait for it."""
        if entry.captures is None:
            return
        if entry.token is not None:
            self.give_captures(entry, entry.token)
        elif entry.state is State.RESIDENT and entry.writer is None:
            self.wanted.append(entry)
            self._workers.submit(self.write_job)

    def give_captures(self, entry: Entry, token: Token) -> None:
        """Give each capture of ``entry`` a share of its blob."""
        while (capture := entry.captures) is not None:
            # Straight line.
            entry.captures = capture.next
            entry.handles -= 1
            capture.next = capture.source = None
            token.shares += 1
            capture.token = token
            capture.done = True
            capture.wake()

    def fail_captures(self, entry: Entry, error: BaseException | None) -> bool:
        """Let each capture of ``entry`` hear that there is no blob; whether there was one to hear it."""
        heard = entry.captures is not None
        while (capture := entry.captures) is not None:
            # Straight line.
            entry.captures = capture.next
            entry.handles -= 1
            capture.next = capture.source = None
            capture.error = error
            capture.done = True
            capture.wake()
        return heard

    def separate(self, entry: Entry, twin: Entry) -> None:
        """Move the captures of ``entry``, which is about to be changed, to ``twin``, a copy of it."""
        if entry.captures is None:  # the save has given up
            return
        twin.key = self.keys.of(entry)
        self.admit(twin)
        while (capture := entry.captures) is not None:
            # Straight line.
            entry.captures = capture.next
            entry.handles -= 1
            capture.source = twin
            capture.next = twin.captures
            twin.captures = capture
            twin.handles += 1
        self.attend(twin)

    def _take_out(self, entry: Entry, capture: Capture) -> None:
        before, this = None, entry.captures
        while this is not None and this is not capture:
            before, this = this, this.next
        if this is None:
            return
        # Straight line.
        if before is None:
            entry.captures = capture.next
        else:
            before.next = capture.next
        entry.handles -= 1
        capture.source = None

    def next_to_write(self) -> Entry | None:
        """Take the next entry that is to be written: for captures and for eviction in turn."""
        self._turn_of_wanted = not self._turn_of_wanted
        first, second = self._pop_wanted, self._pop_queued
        if not self._turn_of_wanted:
            first, second = second, first
        return first() or second()

    def _pop_wanted(self) -> Entry | None:
        while self.wanted:
            entry = self.wanted.popleft()
            if entry.captures is not None and entry.state is State.RESIDENT and entry.writer is None:
                if entry.order is self.queued:
                    self.queued.remove(entry)
                return entry
        return None

    def _pop_queued(self) -> Entry | None:
        while (entry := self.queued.first) is not None:
            self.queued.remove(entry)
            if entry.state is State.RESIDENT and entry.writer is None:
                return entry
            # A write guard has it; its exit finds it a place.
        return None

    def resume(self) -> None:
        """Have the workers look again for what is to be done; a call too many does no harm."""
        super().resume()
        for entry in list(self.entries):
            self.attend(entry)

    def unpinned(self, entry: Entry) -> None:
        """Go on after the last guard has left, its bytes no longer counted as pinned."""
        super().unpinned(entry)
        if entry.held:  # by those who waited; what was changed may be written while they read
            self.attend(entry)

    def settle(self, entry: Entry) -> None:
        """Find an unpinned entry its place, and come back to the budget."""
        self.attend(entry)
        super().settle(entry)


def _refuse_own(entry: Entry) -> None:
    """Raise DeadlockError if waiting for the entry's writer would never end."""
    writer = entry.writer
    if writer is None:
        return
    loop = asyncio._get_running_loop()
    if writer.owner == current_owner():
        raise DeadlockError(f"{entry!r} is held for writing by the caller; leave its guard first")
    if loop is not None and runs_on(writer.owner, loop):
        raise DeadlockError(
            f"{entry!r} is held for writing by a task of this event loop, which saving would block; "
            "save through asyncio.to_thread"
        )
