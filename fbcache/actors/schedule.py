"""When an actor takes a snapshot by itself: after so many messages, or so long after the first unsaved one.

Guarantee: with ``seconds`` set, a message's effect is in a snapshot at most that long after it was
handled, plus what the actor needs for the messages before; no clock is looked at otherwise. All of it is
used in the actor's own thread only, but for the ``wake`` that the clock calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """What tells the time, and calls back."""

    def now(self) -> float:
        """Return seconds since some moment; never less than before."""
        ...

    def call_later(self, seconds: float, wake: Callable[[], None]) -> Callable[[], None]:
        """Call ``wake`` once, from any thread, after that time; return what cancels it."""
        ...


class SystemClock:
    """The machine's monotonic clock, and a thread for each call that is waited for."""

    def now(self) -> float:
        """Return the monotonic clock."""
        return time.monotonic()

    def call_later(self, seconds: float, wake: Callable[[], None]) -> Callable[[], None]:
        """Have a timer of the standard library call ``wake``."""
        timer = threading.Timer(seconds, wake)
        timer.name = "fbcache-actors-timer"
        timer.daemon = True  # what it would have saved is saved when the actor stops
        timer.start()
        return timer.cancel


SYSTEM_CLOCK = SystemClock()


class Schedule:
    """Counts messages and time since the last snapshot.

    Parameters
    ----------
    messages : int or None
        Take one after so many messages.
    seconds : float or None
        Take one so long after the first message that is in none.
    clock : Clock
        Whose seconds.

    Raises
    ------
    ValueError
        One of them is not positive.

    Attributes
    ----------
    dirty : bool
        Whether something was handled since the last snapshot, or that one failed.
    """

    def __init__(self, messages: int | None, seconds: float | None, clock: Clock) -> None:
        if (messages is not None and messages < 1) or (seconds is not None and not seconds > 0):
            raise ValueError(f"a snapshot every {messages} messages or {seconds} s: give positive numbers")
        self._messages = messages
        self._seconds = seconds
        self._clock = clock
        self._unsaved = 0
        self._deadline = 0.0
        self._cancel: Callable[[], None] | None = None
        self.dirty = False

    @property
    def active(self) -> bool:
        """Whether there is anything to be done."""
        return self._messages is not None or self._seconds is not None

    def handled(self, wake: Callable[[], None]) -> bool:
        """Count a message; return whether a snapshot is due, and else see to it that ``wake`` is called."""
        if not self.active:
            return False
        self.dirty = True
        self._unsaved += 1
        if self._messages is not None and self._unsaved >= self._messages:
            return True
        if self._seconds is None:
            return False
        if self._unsaved > 1:  # the timer runs
            return self._deadline <= self._clock.now()
        self._deadline = self._clock.now() + self._seconds
        self._cancel = self._clock.call_later(self._seconds, wake)
        return False

    def woken(self, wake: Callable[[], None]) -> bool:
        """Return whether the time has come; if a timer was too early, set another."""
        if self._seconds is None or self._unsaved == 0:  # a snapshot was taken meanwhile
            return False
        left = self._deadline - self._clock.now()
        if left <= 0:
            return True
        self._stop_timer()
        self._cancel = self._clock.call_later(left, wake)
        return False

    def begun(self) -> None:
        """A snapshot is being taken: count from here."""
        self._unsaved = 0
        self._stop_timer()

    def taken(self) -> None:
        """It was."""
        self.begun()
        self.dirty = False

    def _stop_timer(self) -> None:
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()
