"""A disk that fails where a test says so, and that can be held at a system call.

Guarantee: without rules :class:`FaultyDisk` does what :class:`~fbcache.store.disk.Disk` does, and
logs it. Rules may be added, and calls made, from any thread. ``_lock`` guards the log and the
rules; it is never held during a call or while a gate is closed.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fbcache.codec.frames import Buffer
from fbcache.store.disk import Disk

#: Longest that a gate stays closed: a test that forgot to open one fails instead of hanging.
PATIENCE = 30.0


@dataclass(eq=False)
class Gate:
    """A point where one call waits.

    Attributes
    ----------
    reached : threading.Event
        Set when the call has come to the gate.
    go : threading.Event
        Set it to let the call pass.
    """

    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def wait_reached(self) -> None:
        """Wait until the call stands at the gate."""
        assert self.reached.wait(PATIENCE), "the gated call never came"

    def open(self) -> None:
        """Let the call pass."""
        self.go.set()

    def pass_through(self) -> None:
        """Stand at the gate; called by the disk."""
        self.reached.set()
        assert self.go.wait(PATIENCE), "nobody opened the gate"


@dataclass(eq=False)
class _Rule:
    """What happens to calls ``first`` to ``last`` of one kind, counted from when the rule was made."""

    first: int
    last: float
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None
    shorten: int | None = None
    seen: int = 0

    def applies(self) -> bool:
        self.seen += 1
        return self.first <= self.seen <= self.last


class FaultyDisk(Disk):
    """A disk with rules.

    Attributes
    ----------
    log : list of str
        The names of all calls so far, in the order in which they began.
    """

    __slots__ = ("_lock", "_rules", "log")

    def __init__(self) -> None:
        self.log: list[str] = []
        self._rules: dict[str, list[_Rule]] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ rules

    def fail(self, call: str, *, error: BaseException, nth: int = 1, times: int | None = 1) -> None:
        """Raise ``error`` instead of making the ``nth`` ``call`` from now, and ``times`` in all.

        ``times=None`` fails every one from the ``nth`` on. A failing ``close`` closes, as the kernel's does.
        """
        moment = "after" if call == "close" else "before"
        self._add(call, _Rule(nth, _last(nth, times), **{moment: lambda: _raise(error)}))  # type: ignore[arg-type]

    def fail_after(self, call: str, *, error: BaseException, nth: int = 1, times: int | None = 1) -> None:
        """Make the call, then raise ``error``: what an interrupted caller sees."""
        self._add(call, _Rule(nth, _last(nth, times), after=lambda: _raise(error)))

    def short(self, call: str, nbytes: int, *, nth: int = 1, times: int | None = 1) -> None:
        """Let the ``nth`` ``writev`` or ``preadv`` move at most ``nbytes``."""
        assert call in ("writev", "preadv")
        self._add(call, _Rule(nth, _last(nth, times), shorten=nbytes))

    def gate(self, call: str, *, nth: int = 1, after: bool = False) -> Gate:
        """Hold the ``nth`` ``call`` from now, before it is made or after."""
        gate = Gate()
        moment = "after" if after else "before"
        self._add(call, _Rule(nth, nth, **{moment: gate.pass_through}))  # type: ignore[arg-type]
        return gate

    def clear(self) -> None:
        """Forget all rules; gates that calls stand at must still be opened."""
        with self._lock:
            self._rules.clear()

    def count(self, call: str) -> int:
        """How many of ``call`` there were."""
        with self._lock:
            return self.log.count(call)

    # --------------------------------------------------------------- mechanism

    def _add(self, call: str, rule: _Rule) -> None:
        assert call in CALLS, f"no such call: {call!r}; there are {', '.join(CALLS)}"
        with self._lock:
            self._rules.setdefault(call, []).append(rule)

    def _note(self, call: str) -> list[_Rule]:
        with self._lock:
            self.log.append(call)
            return [rule for rule in self._rules.get(call, ()) if rule.applies()]


def _last(nth: int, times: int | None) -> float:
    return float("inf") if times is None else nth + times - 1


def _raise(error: BaseException) -> None:
    # A fresh copy: one instance raised by two threads would mix up their tracebacks.
    raise type(error)(*error.args)


def _first_bytes(buffers: Sequence[Buffer], nbytes: int) -> list[memoryview]:
    """The first ``nbytes`` of ``buffers``, as views of them."""
    views = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")[:nbytes]
        views.append(view)
        nbytes -= len(view)
        if nbytes == 0:
            break
    return views


def _wrap(call: str) -> Callable[..., Any]:
    real = getattr(Disk, call)

    def method(self: FaultyDisk, *args: Any, **kwargs: Any) -> Any:
        rules = self._note(call)
        for rule in rules:
            if rule.before is not None:
                rule.before()
            if rule.shorten is not None:
                args = (args[0], _first_bytes(args[1], rule.shorten), *args[2:])
        result = real(self, *args, **kwargs)
        for rule in rules:
            if rule.after is not None:
                rule.after()
        return result

    return method


#: Every call there is.
CALLS = tuple(name for name, _ in inspect.getmembers(Disk, inspect.isfunction) if not name.startswith("_"))

for _call in CALLS:
    setattr(FaultyDisk, _call, _wrap(_call))


def oserror(code: int) -> OSError:
    """An ``OSError`` with its number and text, as the kernel would give it."""
    return OSError(code, os.strerror(code))
