"""One value's life: its states, its lock, and the only function that changes a state.

Guarantees
----------
- :func:`next_state` is total: every pair of state and event either has an edge below or is an
  :class:`~fbcache.errors.InternalError`.
- The lock is fair: who asks is served in order, neighbouring readers together, so that a stream
  of readers does not starve a writer. An owner that reads already may always read again.
- An owner never waits for itself: that is a :class:`~fbcache.errors.DeadlockError`.

Everything here is called with the pool's lock held, which guards every field of every entry
and hold.

Interpreter facts this rests on
-------------------------------
CPython runs signal handlers, and switches threads, only at calls, function entries and backward
jumps. A straight line of attribute stores is therefore never torn by a KeyboardInterrupt. Places
that lean on it are marked *straight line*; wherever a call comes between two stores that belong
together, :meth:`Residency.run <fbcache.residency.Residency.run>` mends what an interrupt tears.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Hashable
from enum import IntEnum
from threading import Lock
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from fbcache.errors import DeadlockError, InternalError
from fbcache.lru import Node
from fbcache.waiting import Hold, Owner, Waiter, runs_on

if TYPE_CHECKING:
    from fbcache.captures import Want


class State(IntEnum):
    """Where an entry's value is."""

    RESIDENT = 0  #: in memory only
    WRITING = 1  #: in memory; its blob is being written
    CLEAN = 2  #: in memory, and whole on disk
    SPILLED = 3  #: on disk only
    LOADING = 4  #: on disk; being read
    MUTATING = 5  #: in memory, in the hands of a write guard
    DROPPED = 6  #: gone; what was under way ends without effect


class Event(IntEnum):
    """What can happen to an entry."""

    WRITE = 0  #: its blob is begun
    WRITTEN = 1  #: its blob is whole
    WRITE_FAILED = 2  #: its blob was not written; no file is left
    EVICT = 3  #: its value leaves memory
    LOAD = 4  #: its blob is being read
    LOADED = 5  #: its value is in memory again
    LOAD_FAILED = 6  #: it could not be read, or reading was interrupted
    RECALL = 7  #: the program still had the evicted value
    MUTATE = 8  #: a write guard takes it
    SETTLE = 9  #: the write guard gives it back, changed
    RESTORE = 10  #: the write guard gives it back as its blob, or its copy, has it
    DROP = 11  #: nobody owns it any more


_EDGES: Final[dict[tuple[State, Event], State]] = {
    (State.RESIDENT, Event.WRITE): State.WRITING,
    (State.RESIDENT, Event.MUTATE): State.MUTATING,
    (State.RESIDENT, Event.DROP): State.DROPPED,
    (State.WRITING, Event.WRITTEN): State.CLEAN,
    (State.WRITING, Event.WRITE_FAILED): State.RESIDENT,
    (State.WRITING, Event.DROP): State.DROPPED,
    (State.CLEAN, Event.EVICT): State.SPILLED,
    (State.CLEAN, Event.MUTATE): State.MUTATING,
    (State.CLEAN, Event.DROP): State.DROPPED,
    (State.SPILLED, Event.LOAD): State.LOADING,
    (State.SPILLED, Event.RECALL): State.CLEAN,
    (State.SPILLED, Event.DROP): State.DROPPED,
    (State.LOADING, Event.LOADED): State.CLEAN,
    (State.LOADING, Event.LOAD_FAILED): State.SPILLED,
    (State.LOADING, Event.DROP): State.DROPPED,
    (State.MUTATING, Event.SETTLE): State.RESIDENT,
    (State.MUTATING, Event.RESTORE): State.SPILLED,
    (State.MUTATING, Event.DROP): State.DROPPED,
    # What was under way when the entry was dropped comes to its end.
    (State.DROPPED, Event.WRITTEN): State.DROPPED,
    (State.DROPPED, Event.WRITE_FAILED): State.DROPPED,
    (State.DROPPED, Event.LOADED): State.DROPPED,
    (State.DROPPED, Event.LOAD_FAILED): State.DROPPED,
    (State.DROPPED, Event.SETTLE): State.DROPPED,
    (State.DROPPED, Event.RESTORE): State.DROPPED,
}

#: The same by the numbers of state and event: an enum's hash is a Python call.
_TABLE: Final = tuple(tuple(_EDGES.get((state, event)) for event in Event) for state in State)

#: States in which an entry's value takes memory.
IN_MEMORY: Final = frozenset({State.RESIDENT, State.WRITING, State.CLEAN, State.MUTATING})


def next_state(state: State, event: Event) -> State:
    """Return the state that ``event`` leads to.

    Raises
    ------
    InternalError
        The design rules this pair out.
    """
    following = _TABLE[state][event]
    if following is None:
        raise InternalError(f"an entry that is {state.name} met {event.name}")
    return following


class _Missing:
    """No value. Not None, which is a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final[Any] = _Missing()


#: Where in a token's place its slot begins; the bytes below say how many it takes on disk.
_SLOT_SHIFT: Final = 48
_NBYTES: Final = (1 << _SLOT_SHIFT) - 1

_UNVERIFIED: Final = 1
_ALLOW_PICKLE: Final = 2

_naming = Lock()


class Token:
    """Shared ownership of a blob: when ``shares`` falls to 0, the blob is deleted.

    Attributes
    ----------
    shares : int
        How many entries, loads, captures and saved contents need it.
    """

    __slots__ = ("_key", "_marks", "_place", "shares")

    def __init__(
        self,
        key: UUID | None,
        nbytes: int,
        *,
        slot: int | None = None,
        unverified: bool = False,
        allow_pickle: bool = True,
    ) -> None:
        self._key = key
        nbytes = min(nbytes, _NBYTES)  # a manifest may say anything
        self._place = nbytes if slot is None else nbytes | (slot + 1) << _SLOT_SHIFT
        self.shares = 1
        self._marks = _UNVERIFIED * unverified | _ALLOW_PICKLE * allow_pickle

    @property
    def key(self) -> UUID:
        """The blob's key. One that is packed gets it when it is first asked for."""
        key = self._key
        if key is None:
            fresh = uuid4()
            with _naming:
                key = self._key
                if key is None:
                    key = self._key = fresh
        return key

    @property
    def has_key(self) -> bool:
        """Whether anybody may know the key."""
        return self._key is not None

    @property
    def nbytes(self) -> int:
        """The blob's size on disk."""
        return self._place & _NBYTES

    @nbytes.setter
    def nbytes(self, nbytes: int) -> None:
        self._place = self._place & ~_NBYTES | min(nbytes, _NBYTES)

    @property
    def unverified(self) -> bool:
        """Whether its payload is still to be compared with its checksums.

        So for what was not written by this pool, or what the disk has failed to make durable.
        """
        return bool(self._marks & _UNVERIFIED)

    @unverified.setter
    def unverified(self, unverified: bool) -> None:
        self._marks = self._marks & ~_UNVERIFIED | _UNVERIFIED * unverified

    @property
    def allow_pickle(self) -> bool:
        """Whether code from it may run; so for what this pool has written."""
        return bool(self._marks & _ALLOW_PICKLE)

    @allow_pickle.setter
    def allow_pickle(self, allow_pickle: bool) -> None:
        self._marks = self._marks & ~_ALLOW_PICKLE | _ALLOW_PICKLE * allow_pickle

    @property
    def slot(self) -> int:
        """Where the store has packed it; -1 where the store has it by its key."""
        return (self._place >> _SLOT_SHIFT) - 1


#: Sizes of small values: a number of each entry's own would take 32 bytes, a fifteenth of all that it takes.
_SIZES: Final = tuple(range(4096))


class Entry(Node):
    """One value, wherever it is.

    Attributes
    ----------
    state : State
        Where the value is.
    value : Any
        The value, frozen, or ``MISSING`` when a reader may not have it now.
    fixed : bool
        Whether the caller gave its size.
    exact : bool
        Whether the size is known exactly; an estimate is corrected at the first spill.
    thawable : bool
        Whether the value's memory may be made writeable; not so for a view of a file.
    key : UUID or None
        Of this version of the content; made when it is first needed.
    exposed : bool
        Whether anybody has seen the key.
    token : Token or None
        The blob with this version of the content.
    reloaded : bool
        Whether the value has come from its blob, so that evicting it again costs no write.
    name, named, handles
        The name it was put under; whether the name still owns it; how many handles do.
    readers, writer : Hold or None
        Who is in the lock.
    waiters : deque of Waiter or None
        Who waits for the lock, in order; None when nobody does.
    captures : Want or None
        The first of those that need this version of the content for a save.
    stuck : bool
        Whether this version could not be encoded, so that it stays in memory.

    What few entries have at a time is kept in dictionaries of :class:`~fbcache.books.Books`: a field takes
    eight bytes of each of a million.
    """

    __slots__ = (
        "captures",
        "exact",
        "exposed",
        "fixed",
        "handles",
        "key",
        "name",
        "named",
        "readers",
        "reloaded",
        "state",
        "stuck",
        "thawable",
        "token",
        "value",
        "waiters",
        "writer",
    )

    def __init__(self, value: Any, nbytes: int, *, fixed: bool = False, exact: bool = True) -> None:
        super().__init__(_SIZES[nbytes] if nbytes < len(_SIZES) else nbytes)
        self.state = State.RESIDENT
        self.value = value
        self.fixed = fixed
        self.exact = exact
        self.thawable = True
        self.key: UUID | None = None
        self.exposed = False
        self.token: Token | None = None
        self.reloaded = False
        self.name: Hashable = None
        self.named = False
        self.handles = 0
        self.readers: Hold | None = None
        self.writer: Hold | None = None
        self.waiters: deque[Waiter] | None = None
        self.captures: Want | None = None
        self.stuck = False

    def __repr__(self) -> str:
        who = f"{self.name!r} " if self.named else ""
        return f"<Entry {who}{self.state.name} {self.nbytes} bytes>"

    @property
    def held(self) -> bool:
        """Whether any guard is in the lock."""
        return self.readers is not None or self.writer is not None

    @property
    def owned(self) -> bool:
        """Whether a name or a handle owns the entry."""
        return self.named or self.handles > 0

    # ------------------------------------------------------------------------- the lock

    def acquire_shared(self, hold: Hold, loop: asyncio.AbstractEventLoop | None) -> Waiter | None:
        """Let ``hold`` in for reading, or return what it has to wait for.

        ``loop`` is the event loop that waiting would block, if any.

        Raises
        ------
        DeadlockError
            Its owner holds the entry for writing, or waiting would block the loop that the
            present holder needs. Nothing has changed.
        """
        if self._may_read(hold.owner):
            self._enter_shared(hold)
            return None
        self._refuse_own(hold, exclusive=False)
        return self._wait_in_line(hold, exclusive=False, loop=loop)

    def acquire_exclusive(self, hold: Hold, loop: asyncio.AbstractEventLoop | None) -> Waiter | None:
        """Let ``hold`` in for writing, or return what it has to wait for.

        Raises
        ------
        DeadlockError
            As for :meth:`acquire_shared`, or its owner holds the entry for reading.
        """
        if self._free and self.waiters is None:
            self._enter_exclusive(hold)
            return None
        self._refuse_own(hold, exclusive=True)
        return self._wait_in_line(hold, exclusive=True, loop=loop)

    def try_exclusive(self, hold: Hold) -> bool:
        """Let ``hold`` in for writing if that needs no waiting.

        Raises
        ------
        DeadlockError
            Its owner holds the entry.
        """
        self._refuse_held(hold, exclusive=True)
        if not self._free or self.waiters is not None:
            return False
        self._enter_exclusive(hold)
        return True

    def try_shared(self, hold: Hold) -> bool:
        """Let ``hold`` in for reading if that needs no waiting.

        Raises
        ------
        DeadlockError
            Its owner holds the entry for writing.
        """
        self._refuse_held(hold, exclusive=False)
        if not self._may_read(hold.owner):
            return False
        self._enter_shared(hold)
        return True

    def abandoned(self) -> list[Hold]:
        """Return holds whose guards nothing but this lock refers to any more.

        An interrupt at the entry of a guard's ``__exit__``, before its first instruction, ends the
        block without a word to the guard; so does a program that calls ``__enter__`` and forgets.
        A guard in use is referred to by the block's frame.
        """
        if not _COUNTED:
            return []
        holds: list[Hold] = [] if self.writer is None else [self.writer]
        hold = self.readers
        while hold is not None:
            holds.append(hold)
            hold = hold.next
        return [h for h in map(holds.pop, [0] * len(holds)) if _references(h) == _OWN + _links(h)]

    def leave(self, hold: Hold) -> None:
        """Take ``hold`` out of the lock. Call :meth:`hand_over` next. Straight line."""
        if self.writer is hold:
            self.writer = None
        else:
            before, after = hold.prev, hold.next
            if before is None:
                self.readers = after
            else:
                before.next = after
            if after is not None:
                after.prev = before
            hold.prev = hold.next = None
        hold.held = False

    def hand_over(self) -> None:
        """Let in, in order, those who wait and now may enter."""
        waiters = self.waiters
        if waiters is None:
            return
        if self.state is State.WRITING:  # the writers in line wait for that; readers need not
            waiters = deque(sorted(waiters, key=_is_exclusive))
            self.waiters = waiters
        while waiters:
            waiter = waiters[0]
            hold = waiter.hold
            assert hold is not None
            # One that is in the lock already was let in by a call that an interrupt tore.
            if not (hold.held or waiter.orphaned):
                if not (self._free if waiter.exclusive else self.writer is None):
                    break
                if waiter.exclusive:
                    self._enter_exclusive(hold)
                else:
                    self._enter_shared(hold)
            waiter.wake()
            del waiters[0]
        if not waiters:
            self.waiters = None

    def give_up(self, hold: Hold) -> None:
        """Take ``hold`` out of the line, if it waits there."""
        waiters = self.waiters
        if waiters is None:
            return
        others = deque(w for w in waiters if w.hold is not hold)
        self.waiters = others or None
        if len(others) < len(waiters) and self.writer is None:
            self.hand_over()  # it may have been a writer with readers behind it

    @property
    def _free(self) -> bool:
        """Whether a writer may enter. A write to disk is one more reader (invariant 10)."""
        return self.readers is None and self.writer is None and self.state is not State.WRITING

    def _enter_shared(self, hold: Hold) -> None:  # straight line
        first = self.readers
        hold.next = first
        if first is not None:
            first.prev = hold
        self.readers = hold
        hold.held = True

    def _enter_exclusive(self, hold: Hold) -> None:  # straight line
        self.writer = hold
        hold.held = True

    def _may_read(self, owner: Owner) -> bool:
        """Whether a reader may enter now: ahead of writers that wait for a write to disk, too."""
        if self.writer is not None:
            return False
        return self.waiters is None or self.state is State.WRITING or self._reads(owner)

    def _reads(self, owner: Owner) -> bool:
        hold = self.readers
        while hold is not None:
            if hold.owner == owner:
                return True
            hold = hold.next
        return False

    def _refuse_own(self, hold: Hold, *, exclusive: bool) -> None:
        """Refuse what would wait for itself: for a hold, or for one in line that comes in before it."""
        self._refuse_held(hold, exclusive=exclusive)
        waiters = list(self.waiters or ())
        mine = [w.hold is not None and w.hold.owner == hold.owner for w in waiters]
        # Neighbouring readers come in together.
        if any(mine) and (exclusive or any(w.exclusive for w in waiters[mine.index(True) :])):
            raise DeadlockError(
                f"{self._label()} is waited for by this {_kind(hold.owner)} already; what it calls while it "
                "waits, a finalizer or a signal's handler, cannot have it"
            )

    def _refuse_held(self, hold: Hold, *, exclusive: bool) -> None:
        writer = self.writer
        if writer is not None and writer.owner == hold.owner:
            raise DeadlockError(
                f"{self._label()} is held for writing by this {_kind(hold.owner)} already; "
                "use that guard's value, or leave it first"
            )
        if exclusive and self.readers is not None and self._reads(hold.owner):
            raise DeadlockError(
                f"{self._label()} is held for reading by this {_kind(hold.owner)}; "
                "leave that guard before asking for get_mut, or ask for get_mut at first"
            )

    def _wait_in_line(
        self, hold: Hold, *, exclusive: bool, loop: asyncio.AbstractEventLoop | None
    ) -> Waiter:
        if loop is not None and self._needs(loop):
            raise DeadlockError(
                f"{self._label()} is held, or waited for, by a task of this event loop, which a "
                "plain `with` would block; use `async with`"
            )
        waiter = Waiter(hold=hold, exclusive=exclusive)
        if self.waiters is None:
            self.waiters = deque((waiter,))
        else:
            self.waiters.append(waiter)
        return waiter

    def _needs(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether the lock comes free only if ``loop`` goes on."""
        holds = [self.writer] if self.writer is not None else []
        hold = self.readers
        while hold is not None:
            holds.append(hold)
            hold = hold.next
        holds += [w.hold for w in self.waiters or () if w.hold is not None]
        return any(runs_on(h.owner, loop) for h in holds)

    def _label(self) -> str:
        return repr(self.name) if self.named else "the entry"


def _is_exclusive(waiter: Waiter) -> bool:
    return waiter.exclusive


def _references(hold: Hold) -> int:
    return sys.getrefcount(hold)


def _links(hold: Hold) -> int:
    """How often the lock refers to ``hold``: as its first or writer, and from a neighbour or two."""
    return 1 + (hold.next is not None)


#: Whether reference counts tell what refers to an object: with a GIL, in CPython.
_COUNTED: Final = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()

#: References to a hold that come from looking at it; how many differs between interpreters.
_OWN: Final = next(_references(h) for h in map([Hold()].pop, [0]))


def _kind(owner: Owner) -> str:
    return "thread" if isinstance(owner, int) else "task"
