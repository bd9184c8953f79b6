"""Interrupts at every place where CPython lets one in.

CPython runs signal handlers at function entries, after calls and at backward jumps, and nowhere
else. :class:`Interrupter` traces fbcache's code instruction by instruction and raises a KeyboardInterrupt at
the n-th such place, as Ctrl-C would there. Places where the tracer's exception would be caught by
another handler than a signal's (the edge of a ``try`` runs between a call and its next
instruction) are passed over.

One place is left out, where no Python code can help: an interrupt at the very return of ``os.open``
loses the descriptor's number.
"""

from __future__ import annotations

import dis
import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import fbcache

_ROOM = str(Path(fbcache.__file__).parent)
_LETS_IN = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}
_OPEN = "Disk.open"
_UNTOLD = {"__del__"}  # the interpreter drops what a finalizer raises


class Interrupter:
    """Raises KeyboardInterrupt at the ``nth`` place of the block; ``fired`` says whether it came to that."""

    def __init__(self, nth: int) -> None:
        self._left = nth
        self._last: dict[FrameType, int] = {}
        self._opened = False
        self.fired = False
        self.where = ""

    def __enter__(self) -> Interrupter:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._last.clear()

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if self.fired or not frame.f_code.co_filename.startswith(_ROOM):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "return":
            self._last.pop(frame, None)
            self._opened = frame.f_code.co_qualname == _OPEN
        if event != "opcode" or self.fired:
            return self._step
        last, self._last[frame] = self._last.get(frame), frame.f_lasti
        opened, self._opened = self._opened, False
        if last is not None and not opened and _lets_in(frame.f_code, last, frame.f_lasti):
            self._left -= 1
            if self._left == 0:
                self.fired = True
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._step


@cache
def _lets_in(code: CodeType, last: int, now: int) -> bool:
    names = _opnames(code)
    name = names.get(last, "")
    if (name == "RESUME" and code.co_name in _UNTOLD) or code.co_qualname == _OPEN:
        return False
    return name in _LETS_IN and _handler(code, last) == _handler(code, now)


@cache
def _opnames(code: CodeType) -> dict[int, str]:
    return {i.offset: i.opname for i in dis.get_instructions(code)}


@cache
def _handler(code: CodeType, offset: int) -> int | None:
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        if entry.start <= offset < entry.end:
            return int(entry.target)
    return None
