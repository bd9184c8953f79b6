"""Captures: what a save sees of an entry, whatever becomes of the entry meanwhile.

Guarantees
----------
- A capture ends up with a share of a blob that holds the entry's content of the moment at which it was
  captured; of an entry in a write guard's hands, the content with which that guard leaves.
- No writer waits for a save. One that comes while the content is in memory only copies it first: the copy
  goes into an entry of its own, which nobody but the captures owns, and the writer goes on.
- A captured entry that is deleted lives on until its blob is written.
- Whatever ends a save, :meth:`Captures.release_capture` gives back all that the capture has; and what an
  interrupt kept from being released is given back when the capture is collected (invariant 7).

An entry refers to what its captures want by a linked list, so that adding one, moving one to the copy and
taking one out are straight lines of stores (:mod:`fbcache.entry`). All of it is guarded by the pool's lock.

Values that are only captured are written in turn with those that must leave memory, so that neither
waits for all of the others, and they keep their place in the order of eviction.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from fbcache.budget import Budget
from fbcache.entry import Entry, State, Token
from fbcache.errors import DeadlockError
from fbcache.lru import Policy
from fbcache.waiting import Answer, current_owner, runs_on
from fbcache.workers import Workers


class Want(Answer):
    """A capture's place among those that need one version of an entry's content.

    Woken when it has its share of the blob, or with the error that the write came to.

    Attributes
    ----------
    source : Entry or None
        The entry whose blob is waited for; it counts this among its handles.
    token : Token or None
        The blob, once there is one, with a share of it.
    nbytes : int
        The value's size in memory.
    next : Want or None
        The next one of the same entry.
    then : callable or None
        Called once it is woken, under the pool's lock: no more than handing a job to the workers.
        An interrupt may have it called twice.
    """

    __slots__ = ("nbytes", "next", "source", "then", "token")

    def __init__(self, entry: Entry, then: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.then = then
        self.source: Entry | None = None
        self.token: Token | None = None
        self.nbytes = entry.nbytes
        self.next: Want | None = None

    def wake(self, error: BaseException | None = None) -> None:
        """Let the sleeper go on, and have done what is to be done then."""
        super().wake(error)
        then = self.then
        if then is not None:
            then()
            self.then = None


class Capture:
    """One version of an entry's content, for as long as a save needs it."""

    __slots__ = ("_captures", "want")

    def __init__(self, want: Want, captures: Captures) -> None:
        self._captures = captures
        self.want: Want | None = want

    def __del__(self) -> None:
        want: Want | None = getattr(self, "want", None)
        if want is not None:
            captures = self._captures
            captures.lost_wants.append(want)
            captures.call_reaper()

    @property
    def token(self) -> Token | None:
        """The blob, once there is one."""
        return None if self.want is None else self.want.token

    @property
    def done(self) -> bool:
        """Whether there is a blob, or an error."""
        return self.want is None or self.want.done

    @property
    def nbytes(self) -> int:
        """The size in memory of the value that is captured, known exactly once there is a blob."""
        return 0 if self.want is None else self.want.nbytes

    def wait(self) -> None:
        """Block this thread until there is a blob, or an error."""
        if self.want is not None:
            self.want.wait()

    def raise_error(self) -> None:
        """Raise the error that the write came to, if it failed."""
        if self.want is not None:
            self.want.raise_error()


class Captures(Budget):
    """Decisions about captures."""

    def __init__(
        self, budget: int, policy: Policy[Entry], workers: Workers, mend: Callable[[Any], None]
    ) -> None:
        super().__init__(budget, policy, workers, mend)
        self.wanted: OrderedDict[Entry, None] = OrderedDict()  # to be written for captures
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
            for hold in entry.abandoned() if entry.held else ():
                hold.withdraw()
            token = entry.token
            if token is None:
                self._refuse_to_wait(entry, spawned=then is not None)
            want = Want(entry, then)
            into.append(Capture(want, self))
            if token is not None:
                # Straight line.
                token.shares += 1
                want.token = token
                want.done = True
                want.wake()
            else:
                # Straight line.
                want.next = entry.captures
                entry.captures = want
                entry.handles += 1
                want.source = entry
                self.attend(entry)

    def request_write_and_wait(self, entry: Entry, answer: Answer) -> None:
        """Have the entry's blob written soon, for a caller that is about to wait for ``answer``.

        Raises
        ------
        DeadlockError
            This thread or task holds the entry for writing, so that waiting would never end.
        """
        if entry.token is None:
            self._refuse_to_wait(entry)
        self.request_write(entry, answer)

    def _refuse_to_wait(self, entry: Entry, *, spawned: bool = False) -> None:
        if not spawned and self.writes_itself(entry):
            raise DeadlockError(f"{entry!r} is being written by this very thread, which cannot wait for that")
        _refuse_to_wait(entry)

    def release_capture(self, capture: Capture) -> None:
        """Give up what the capture has. A second call does nothing."""
        want = capture.want
        if want is not None:
            self._release(want)
            capture.want = None

    def _release(self, want: Want) -> None:
        entry, token = want.source, want.token
        if token is not None:
            # Straight line, so that no share is lost; `release_token`, written out.
            want.token = None
            token.shares -= 1
            if token.shares == 0 and not self.closed:
                self._delete(token)
        if entry is not None:
            self._take_out(entry, want)
            if entry.captures is None:
                self.wanted.pop(entry, None)
            self.disown(entry)

    def call_reaper(self) -> None:
        """Have the workers release what finalizers have reported."""
        self._workers.submit(self.reap)

    def _reap(self) -> None:
        super()._reap()
        while self.lost_wants:
            want = self.lost_wants[0]
            self._release(want)
            del self.lost_wants[0]

    def attend(self, entry: Entry) -> None:
        """Do so for the entry's captures, too."""
        super().attend(entry)
        if entry.captures is None:
            return
        if entry.token is not None:
            self.give_captures(entry, entry.token)
        elif entry.state is State.RESIDENT and entry.writer is None and entry not in self.wanted:
            self.wanted[entry] = None
            self._call_writer()

    def give_captures(self, entry: Entry, token: Token) -> None:
        """Give each capture of ``entry`` a share of its blob."""
        while (want := entry.captures) is not None:
            if want.token is None:
                # Straight line.
                token.shares += 1
                want.token = token
                want.nbytes = entry.nbytes
                want.done = True
            want.wake()
            # Straight line.
            entry.captures = want.next
            entry.handles -= 1
            want.next = want.source = None

    def fail_captures(self, entry: Entry, error: BaseException | None) -> bool:
        """Let each capture of ``entry`` hear that there is no blob; whether there was one to hear it."""
        if entry.stuck and entry.order is not None:
            entry.order.remove(entry)  # evicting it would fail too
        heard = entry.captures is not None
        while (want := entry.captures) is not None:
            want.wake(error)
            # Straight line.
            entry.captures = want.next
            entry.handles -= 1
            want.next = want.source = None
        return heard

    def separate(self, entry: Entry, twin: Entry) -> None:
        """Move the captures of ``entry``, which is about to be changed, to ``twin``, a copy of it.

        The copy's key is its own: the entry keeps its key if its writer gives up, or rolls back, and two
        blobs of one key would be one file.
        """
        if entry.captures is None:  # the save has given up
            return
        self.admit(twin)
        self.inherit(entry, twin)
        while (want := entry.captures) is not None:
            # Straight line.
            entry.captures = want.next
            entry.handles -= 1
            want.source = twin
            want.next = twin.captures
            twin.captures = want
            twin.handles += 1
        self.attend(twin)

    def _take_out(self, entry: Entry, want: Want) -> None:
        before, this = None, entry.captures
        while this is not None and this is not want:
            before, this = this, this.next
        if this is None:
            return
        # Straight line.
        if before is None:
            entry.captures = want.next
        else:
            before.next = want.next
        entry.handles -= 1
        want.next = want.source = None

    @property
    def _to_write(self) -> int:
        return super()._to_write + len(self.wanted)

    def next_to_write(self) -> Entry | None:
        """Take the next entry that is to be written: for captures and for eviction in turn."""
        self._turn_of_wanted = not self._turn_of_wanted
        first, second = self._pop_wanted, self._pop_queued
        if not self._turn_of_wanted:
            first, second = second, first
        return first() or second()

    def _pop_wanted(self) -> Entry | None:
        while self.wanted:
            entry = self.wanted.popitem(last=False)[0]
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

    def unpinned(self, entry: Entry) -> None:
        """Go on after the last guard has left, its bytes no longer counted as pinned."""
        super().unpinned(entry)
        self.disown(entry)  # what was given back may have been its captures' only


def _refuse_to_wait(entry: Entry) -> None:
    """Raise DeadlockError if waiting for the entry's writers would never end."""
    writer = entry.writer
    if writer is not None and writer.owner == current_owner():
        raise DeadlockError(f"{entry!r} is held for writing by the caller; leave its guard first")
    loop = asyncio._get_running_loop()
    if loop is None:
        return
    # One in line may be let in before the value is written, and could not go on then.
    waiting = [w.hold for w in entry.waiters or () if w.exclusive]
    if any(hold is not None and runs_on(hold.owner, loop) for hold in (writer, *waiting)):
        raise DeadlockError(
            f"{entry!r} is held for writing, or waited for, by a task of this event loop, which waiting "
            "for its blob would block; wait through asyncio.to_thread"
        )
