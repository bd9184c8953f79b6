"""Threads that come at the same moment, served in one go by one of them.

Guarantees: what a thread brings is served whole, in the order of arrival, with whatever else waits then;
one thread at a time serves, and none serves for others once its own is done. A thread that is
interrupted withdraws what it brought, unless that is being served: then it waits for the end of that.

``_lock`` guards the fields; it is not held while serving, nor while waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")

#: Most that is served in one go, if no thread alone brings more: it bounds how long the first one waits.
_MOST = 256


class _Turn(Generic[T]):
    """What one thread brings, and how it is told that it was served or has to lead."""

    __slots__ = ("is_served", "items", "wake")

    def __init__(self, items: Sequence[T]) -> None:
        self.items = items
        self.is_served = False
        self.wake = Lock()
        self.wake.acquire()


class Group(Generic[T]):
    """One at a time, and all that wait at once.

    Parameters
    ----------
    serve : callable
        Takes what several threads brought, and leaves its outcome in each item.
    """

    def __init__(self, serve: Callable[[list[T]], None]) -> None:
        self._serve = serve
        self._lock = Lock()
        self._waiting: deque[_Turn[T]] = deque()
        self._leader: _Turn[T] | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether a thread waits to be served."""
        return bool(self._waiting)

    def run(self, items: Sequence[T]) -> None:
        """Have items served, by this thread or by another.

        Raises
        ------
        BaseException
            This thread was interrupted, or led and ``serve`` raised: items may have no outcome, as those of
            others may that were served along with them.
        """
        turn = _Turn(items)
        with self._lock:
            if self._leader is None:
                self._leader = turn
            else:
                self._waiting.append(turn)
        try:
            if self._leader is not turn:
                turn.wake.acquire()
            if not turn.is_served:
                self._lead(turn)
        except BaseException:
            self._withdraw(turn)
            raise

    def _lead(self, turn: _Turn[T]) -> None:
        turns = [turn, *self._others(len(turn.items))]
        try:
            self._serve([item for each in turns for item in each.items])
        finally:
            for each in turns:
                each.is_served = True
            for each in turns[1:]:
                each.wake.release()
            self._hand_over(turn)

    def _others(self, count: int) -> list[_Turn[T]]:
        """Those that wait and are served along with ``count`` items."""
        turns: list[_Turn[T]] = []
        with self._lock:
            while self._waiting and count + len(self._waiting[0].items) <= _MOST:
                turns.append(self._waiting.popleft())
                count += len(turns[-1].items)
        return turns

    def _hand_over(self, turn: _Turn[T]) -> None:
        with self._lock:
            if self._leader is turn:
                self._leader = self._waiting.popleft() if self._waiting else None
                if self._leader is not None:
                    self._leader.wake.release()

    def _withdraw(self, turn: _Turn[T]) -> None:
        with self._lock:
            is_waiting = turn in self._waiting
            if is_waiting:
                self._waiting.remove(turn)
        if is_waiting or turn.is_served:
            return
        if self._leader is turn:  # chosen, and interrupted before it could serve
            self._hand_over(turn)
        else:
            turn.wake.acquire()
