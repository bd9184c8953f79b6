"""What a pool tells a recorder: each eviction, load, stall, mutation, persist and error.

Guarantees
----------
- A hit tells nothing and costs nothing more. The rest costs one append under the pool's lock; the record is
  made, and given to the recorder, outside it, before the call that caused it returns.
- A recorder that fails, or is full, never breaks the pool: what it did not take is counted, and the next
  ``drain()`` or ``close()`` warns once, with the number and the first error.

``untold`` is appended to under the pool's lock and taken from outside it, by whichever thread comes by: a
record may overtake one of another thread by as much; their times are right.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from time import monotonic, time
from typing import Any, Final, Protocol, TypeAlias
from uuid import UUID

from fbcache.codec.registry import register
from fbcache.errors import FBCacheWarning


class EventKind(Enum):
    """What has happened to an entry."""

    EVICTION = "eviction"  #: its value left memory; ``seconds``: its write, 0 where its blob was there
    LOAD = "load"  #: its value came back; ``seconds``: reading it
    STALL = "stall"  #: a call waited for memory; ``seconds``: how long
    MUTATION = "mutation"  #: a write guard was left; ``key``: the one it ended; ``seconds``: how long it held
    PERSIST = "persist"  #: it, or without a name a checkpoint, was brought to a tracked directory
    ERROR = "error"  #: something could not be written, loaded, deleted or persisted; the pool goes on


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """One thing that a pool did.

    Attributes
    ----------
    time : float
        When it was done, in seconds since the epoch.
    kind : EventKind
        What it was.
    name : str or None
        The ``repr`` of the entry's name; None where it had none.
    key : str or None
        The key of its content, where it had one.
    nbytes : int
        Its size in memory; of a persist or a failed deletion that on disk.
    seconds : float
        How long it took; see :class:`EventKind`.
    detail : str
        The error, or where it was persisted to.
    """

    time: float
    kind: EventKind
    name: str | None
    key: str | None
    nbytes: int
    seconds: float = 0.0
    detail: str = ""


def _encode(event: PoolEvent) -> list[Any]:
    rest = (event.name, event.key, event.nbytes, event.seconds, event.detail)
    return [event.time, event.kind.value, *rest]


def _decode(state: list[Any]) -> PoolEvent:
    when, kind, *rest = state
    return PoolEvent(when, EventKind(kind), *rest)


register(PoolEvent, _encode, _decode, name="fbcache.PoolEvent")


class Sink(Protocol):
    """Who takes events: a recorder."""

    def save(self, record: Any, /) -> object:
        """Take one, without blocking."""
        ...


#: An event as it is noted: time, kind, name, key, nbytes, seconds, error or detail.
_Note: TypeAlias = tuple[float, EventKind, Any, "UUID | None", int, float, Any]

#: Longest part of a name or an error that is kept; a name may be a tuple of any size.
_LONGEST: Final = 500

_NAMELESS: Final = object()


class EventLog:
    """The way of a pool's events to its recorder."""

    __slots__ = ("_error", "_missed", "_sink", "untold")

    def __init__(self, sink: Sink) -> None:
        self.untold: deque[_Note] = deque()
        self._sink = sink
        self._missed = 0
        self._error: Exception | None = None

    def note(
        self, kind: EventKind, entry: Any, key: UUID | None, nbytes: int, seconds: float = 0.0, why: Any = ""
    ) -> None:
        """Note an event, under the pool's lock; ``entry`` may be None. Calls no code of the user's."""
        name = _NAMELESS if entry is None or not entry.named else entry.name
        self.untold.append((time(), kind, name, key, nbytes, seconds, why))

    def note_stall(self, entry: Any, seconds: float) -> None:
        """Note the end of a wait; a new entry has no name yet, but carries the one it will have."""
        name = entry.name if entry.named or entry.name is not None else _NAMELESS
        self.untold.append((time(), EventKind.STALL, name, entry.key, entry.nbytes, seconds, ""))

    def tell(
        self, kind: EventKind, entry: Any, key: UUID | None, nbytes: int, seconds: float = 0.0, why: Any = ""
    ) -> None:
        """Record an event. Outside the lock."""
        self.note(kind, entry, key, nbytes, seconds, why)
        self.hand_over()

    def hand_over(self) -> None:
        """Give the recorder what was noted. Outside the lock: a name's ``repr`` is the user's code."""
        while self.untold:
            try:
                noted = self.untold.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                self._sink.save(_event(*noted))
            except Exception as error:
                # Straight line.
                self._missed += 1
                self._error = self._error or error

    def warn_of_missed(self, *, stacklevel: int) -> None:
        """Say once how many events the recorder did not take."""
        missed, error = self._missed, self._error
        if missed:
            self._missed -= missed
            self._error = None
            warnings.warn(
                f"{missed:,} events of the pool were not recorded; the first because of {error!r}",
                FBCacheWarning,
                stacklevel=stacklevel + 1,
            )


def _event(
    when: float, kind: EventKind, name: Any, key: UUID | None, nbytes: int, seconds: float, why: Any
) -> PoolEvent:
    return PoolEvent(
        when,
        kind,
        None if name is _NAMELESS else _shown(name, repr),
        None if key is None else str(key),
        nbytes,
        seconds,
        f"{type(why).__name__}: {_shown(why, str)}" if isinstance(why, BaseException) else str(why),
    )


def _shown(thing: Any, how: Any) -> str:
    try:
        shown: str = how(thing)
    except Exception as error:  # the user's own repr
        return f"<{type(thing).__name__}, whose {how.__name__} raised {type(error).__name__}>"
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


@dataclass(slots=True)
class Outcome:
    """What came of a persist or a save; filled in by whoever does it."""

    detail: str
    key: UUID | None = None
    nbytes: int = 0


@contextmanager
def telling(log: EventLog | None, entry: Any, place: str) -> Iterator[Outcome]:
    """Record the block as a persist to ``place``, or as an error if it raises one."""
    began = monotonic()
    outcome = Outcome(place)
    try:
        yield outcome
    except Exception as error:
        if log is not None:
            nbytes = 0 if entry is None else entry.nbytes
            log.tell(EventKind.ERROR, entry, None, nbytes, monotonic() - began, error)
        raise
    if log is not None:
        seconds = monotonic() - began
        log.tell(EventKind.PERSIST, entry, outcome.key, outcome.nbytes, seconds, outcome.detail)
