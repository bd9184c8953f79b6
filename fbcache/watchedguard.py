"""The guard for reading of a pool with ``debug=True``: it holds readers to their promise.

Guarantee: a change that a reader has made, of what could not be made read-only, is a MutatedError at the end
of the block, if the block has raised nothing itself; one that was made before, at its beginning.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from fbcache.errors import ForkedPoolError, MutatedError, PoolClosedError
from fbcache.guard import ReadGuard


class WatchedReadGuard(ReadGuard):
    """A :class:`~fbcache.ReadGuard` that compares fingerprints at both ends of the block."""

    __slots__ = ()

    def __enter__(self) -> Any:
        """Do what :class:`ReadGuard` does.

        Raises
        ------
        MutatedError
            The value was changed since it was put or last looked at. The guard is not entered.
        """
        value = super().__enter__()
        self._check_before(value)
        return value

    async def __aenter__(self) -> Any:
        """Do what ``with`` does, without blocking the event loop; the fingerprint is taken on it."""
        value = await super().__aenter__()
        self._check_before(value)
        return value

    def try_enter(self) -> bool:
        """Enter if the value is in memory and no writer is there or waits."""
        if not super().try_enter():
            return False
        self._check_before(self.value)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the entry go.

        Raises
        ------
        MutatedError
            The value was changed within the block.
        """
        changed: MutatedError | None = None
        try:
            if self.held:
                self._engine.promises.check_within(self._entry, self.value)
        except MutatedError as found:
            changed = found
        except (ForkedPoolError, PoolClosedError):  # which the block's own end does not say either
            pass
        finally:
            super().__exit__(kind, error, trace)
        if changed is not None:
            if error is None:
                raise changed
            error.add_note(f"and: {changed}")

    def _check_before(self, value: Any) -> None:
        try:
            self._engine.promises.check_before(self._entry, value)
        except BaseException:
            self._residency.run(self.withdraw)
            raise
