"""A storage that tests hold shut, or let fail, and a retry that takes no time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from fbcache.recorder import MemoryStorage, Retry
from tests.faults import PATIENCE


class GatedStorage(MemoryStorage[Any]):
    """Notes each attempt and each bulk; ``shut`` it, and a save waits; ``failures`` are raised one by one."""

    def __init__(self, failures: Sequence[BaseException | None] = ()) -> None:
        super().__init__()
        self.attempts: list[tuple[Any, ...]] = []
        self.bulks: list[tuple[Any, ...]] = []
        self.failures = list(failures)
        self.entered = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        self.entered.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def save(self, bulk: Sequence[Any], /) -> None:
        self.attempts.append(tuple(bulk))
        self.entered.set()
        async with asyncio.timeout(PATIENCE):
            while not self._open.is_set():
                await asyncio.sleep(0)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        self.bulks.append(tuple(bulk))
        await super().save(bulk)

    async def has_entered(self) -> None:
        """Let other tasks run until a save is under way."""
        async with asyncio.timeout(PATIENCE):
            while not self.entered.is_set():
                await asyncio.sleep(0)


def patient(tries: int = 3) -> tuple[Retry, list[float]]:
    """Retries without sleeping, and the delays that would have passed."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    return Retry(delays=tuple(float(2**n) for n in range(tries - 1)), sleep=sleep), slept
