"""What the tests of actors share: counters, storages that wait or fail, a clock that stands still."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from fbcache.actors import MemoryStorage, PersistentActor
from tests.faults import FaultyDisk, Gate


class Counter(PersistentActor[int]):
    """Counts, and saves its count after every addition."""

    def __init__(self, count: int = 0, step: int = 1) -> None:
        super().__init__()
        self.count = count
        self.step = step

    def take_snapshot(self) -> int:
        return self.count

    def add(self, number: int) -> int:
        self.count += number * self.step
        self.save_snapshot()
        return self.count

    def add_unsaved(self, number: int) -> int:
        self.count += number
        return self.count

    def get(self) -> int:
        return self.count

    def die(self) -> None:
        self.count = -1
        raise RuntimeError("a message that this actor does not survive")


class Lists(PersistentActor[dict]):
    """Saves whatever it is given."""

    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.state = state

    def take_snapshot(self) -> Any:
        return self.state

    def put(self, **parts: Any) -> None:
        self.state.update(parts)
        self.save_snapshot()


class SlowStorage(MemoryStorage):
    """Stands at a gate before some writes, fails others, and notes all."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.errors: list[BaseException | None] = []  # what the next writes come to
        self.gates: list[Gate] = []

    def gate(self) -> Gate:
        """Hold the next write that no gate holds yet."""
        self.gates.append(Gate())
        return self.gates[-1]

    def try_write(self, actor_id: str, data: bytes) -> None:
        self.writes.append(data)
        if self.gates:
            self.gates.pop(0).pass_through()
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        super().try_write(actor_id, data)


class FakeClock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waiting: list[tuple[float, Callable[[], None]]] = []
        self.calls = 0

    def now(self) -> float:
        return self.time

    def call_later(self, seconds: float, wake: Callable[[], None]) -> Callable[[], None]:
        self.calls += 1
        entry = (self.time + seconds, wake)
        self.waiting.append(entry)
        return lambda: self.waiting.remove(entry) if entry in self.waiting else None

    def advance(self, seconds: float) -> None:
        self.time += seconds
        for entry in [entry for entry in self.waiting if entry[0] <= self.time]:
            self.waiting.remove(entry)
            entry[1]()


class KillingDisk(FaultyDisk):
    """A disk whose ``left``-th call from now is this process's last; it is not made."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None

    def _note(self, call: str) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super()._note(call)


def killed_at(call: Callable[[KillingDisk], None], nth: int) -> bool:
    """Run ``call`` in a child that dies before the ``nth`` system call; whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            disk = KillingDisk()
            disk.left = nth
            call(disk)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the child failed: {status}"
    return status != 0
