"""Guards that are handed out held: what ``try_get`` returns.

Guarantee: a held guard that is forgotten before it was entered lets its entry go when it is
collected; its finalizer appends to a queue and does nothing else (invariant 7).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, TypeVar

from fbcache.guard import Guard, ReadGuard
from fbcache.writeguard import WriteGuard

G = TypeVar("G", bound=Guard)


class _Leash(Generic[G]):
    """Stands before a guard that is held already; the first ``with`` only hands its value over."""

    __slots__ = ("__weakref__", "_fresh", "_guard")

    def __init__(self, guard: G) -> None:
        self._guard = guard
        self._fresh = False

    def take(self) -> bool:
        """Enter the guard, if that needs neither waiting nor loading."""
        guard = self._guard
        try:
            entered = guard.try_enter()
        except BaseException:
            guard._residency.run(guard.withdraw)
            raise
        self._fresh = entered  # straight line after the call: from here on the finalizer lets go
        return entered

    def __repr__(self) -> str:
        return repr(self._guard)

    def __enter__(self) -> Any:
        """Return the value; a second time, enter anew."""
        if self._fresh:
            self._fresh = False
            return self._guard.value  # type: ignore[attr-defined]
        return self._guard.__enter__()

    async def __aenter__(self) -> Any:
        """Return the value; a second time, enter anew."""
        if self._fresh:
            self._fresh = False
            return self._guard.value  # type: ignore[attr-defined]
        return await self._guard.__aenter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the entry go."""
        self._guard.__exit__(kind, error, trace)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the entry go."""
        self._guard.__exit__(kind, error, trace)

    def __del__(self) -> None:
        if getattr(self, "_fresh", False):
            engine = self._guard._engine
            engine.residency.lost_guards.append(self._guard)
            engine.workers.submit(engine.residency.reap)


class HeldReadGuard(_Leash[ReadGuard]):
    """A :class:`~fbcache.ReadGuard` that holds its entry already."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        """The value."""
        return self._guard.value


class HeldWriteGuard(_Leash[WriteGuard]):
    """A :class:`~fbcache.WriteGuard` that holds its entry already."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        """The value; assigning replaces it."""
        return self._guard.value

    @value.setter
    def value(self, value: Any) -> None:
        self._guard.value = value


def try_read(guard: ReadGuard) -> HeldReadGuard | None:
    """Return ``guard``, held, if that needs neither waiting nor loading, else None."""
    held = HeldReadGuard(guard)
    return held if held.take() else None


def try_write(guard: WriteGuard) -> HeldWriteGuard | None:
    """Return ``guard``, held, if that needs neither waiting nor loading, else None."""
    held = HeldWriteGuard(guard)
    return held if held.take() else None
