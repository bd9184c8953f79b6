"""How often a bulk that the storage refuses is tried."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a bulk is tried before the failure surfaces, and what passes in between.

    Attributes
    ----------
    delays : tuple of float
        Seconds before each further try. By default five tries in about three seconds: long enough for
        a file that another process has locked, short enough for whoever waits in ``close``.
    sleep : callable
        Awaited with each delay.
    """

    delays: tuple[float, ...] = (0.1, 0.3, 0.8, 2.0)
    sleep: Callable[[float], Awaitable[None]] = _sleep


DEFAULT_RETRY: Final = Retry()
