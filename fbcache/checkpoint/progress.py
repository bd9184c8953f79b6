"""How far a long call has come: a bar, or a caller's own function.

Guarantee: a caller's function is called in the thread of the call, under no lock, with
``(done, total)`` in bytes; ``done`` never falls, and comes to ``total`` only at the end. What it
raises ends the call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

#: ``True`` for a bar, or a function of ``(done, total)``.
Progress: TypeAlias = "bool | Callable[[int, int], None]"


class Meter:
    """Counts bytes towards ``total``, and shows it."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._call = progress if callable(progress) else None
        self._bar: Any = _bar(what) if progress is True else None
        self._total = 0
        self._done = 0

    def begin(self, total: int) -> None:
        """Say how many bytes there are."""
        self._total = total
        if self._bar is not None:
            self._bar.reset(total=total)
        self._show()

    def advance(self, nbytes: int) -> None:
        """Count ``nbytes`` more; the last one is kept for :meth:`end`."""
        done = min(self._done + nbytes, max(self._total - 1, 0))
        if done > self._done:
            self._done = done
            self._show()

    def end(self) -> None:
        """Say that all is done."""
        self._done = self._total
        self._show()

    def _show(self) -> None:
        if self._call is not None:
            self._call(self._done, self._total)
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)

    def __enter__(self) -> Meter:
        """Return the meter."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _bar(what: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs tqdm, which is not installed: pip install 'fbcache[progress]'; "
            "or pass a function of (done, total)",
            name=error.name,
        ) from error
    return tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024)


def check_progress(progress: object) -> None:
    """Raise TypeError unless ``progress`` is a bool or can be called."""
    if not (isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress is True, False or a function of (done, total), not {progress!r}")
