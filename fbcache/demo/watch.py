"""The highest use of memory over a while, sampled by a thread.

Guarantee: the thread has ended when the ``with`` block has; the samples cost at most about a
twentieth of one processor.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Final, Self

from fbcache.memory import resident_memory
from fbcache.pool import FBPool

#: Seconds between samples, at least.
_PAUSE: Final = 0.01

#: A pause is at least this many times the time that a sample takes.
_RATIO: Final = 20


class Watch:
    """Samples a pool and the process while its ``with`` block runs.

    Attributes
    ----------
    pool_bytes : int
        Most bytes of values in memory, as the pool counts them.
    process_bytes : int
        Most physical memory of the process, as the operating system counts it.
    """

    def __init__(self, pool: FBPool) -> None:
        self.pool_bytes = 0
        self.process_bytes = 0
        self._pool = pool
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            since = time.perf_counter()
            self._sample()
            self._ended.wait(max(_PAUSE, _RATIO * (time.perf_counter() - since)))

    def _sample(self) -> None:
        self.pool_bytes = max(self.pool_bytes, self._pool.stats().resident_bytes)
        self.process_bytes = max(self.process_bytes, resident_memory())
