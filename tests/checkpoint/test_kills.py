"""Savers that are killed: the directory opens as the last acknowledged save or the one after it, exactly.

Invariant 12. A child saves in a loop and is killed (SIGKILL), at a random time or at its n-th system call;
then the directory is opened by a reader and by a writer, every value of every version is loaded, the sweep
leaves no leftovers, and the next child goes on where this one was.

There are 500 kills in all, half of each kind; ``FBCACHE_KILLS=50000`` asks for another number, and ``--soak``
for ten times as many. A short random time between a child's line and its end is the experiment, not a
way to wait for something.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.checkpoint import killed_child
from tests.checkpoint.opened import Opened, Value, exact, in_memory, leftovers, look
from tests.faults import PATIENCE

KILLS = int(os.environ.get("FBCACHE_KILLS", "500"))

#: Saves of a child that is killed at a random time: more than it ever makes.
ENDLESS = 10_000


class Nursery:
    """The process that forks savers, and what has become of the present one.

    Attributes
    ----------
    acknowledged : int
        Number of the last save that a saver has told of, or that was found.
    calls : int
        System calls of the last saver that came to its end.
    status : int or None
        How the last saver ended; None while it runs.
    """

    def __init__(self, below: Path) -> None:
        self.tracked = below / "tracked"
        (spills := below / "spills").mkdir()
        program = [sys.executable, killed_child.__file__, str(self.tracked), str(spills)]
        pipe, where = subprocess.PIPE, {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(program, stdin=pipe, stdout=pipe, bufsize=0, env=where)
        self._lines: list[str] = []
        self._rest = b""
        self._pid = self.acknowledged = self.calls = 0
        self.status: int | None = None

    def start(self, count: int, seed: int, n: int = 0, since: str = "opening") -> None:
        """Fork a saver."""
        assert self._process.stdin is not None
        self.status = None
        self.calls = 0
        self._process.stdin.write(f"{count} {seed} {n} {since}\n".encode())
        self._hear("pid")

    def await_saves(self, count: int) -> None:
        """Wait until the saver has told of so many, or has ended."""
        for _ in range(count):
            if self.status is None:
                self._hear("saved")

    def await_end(self) -> int:
        """Wait until the saver has ended; return how."""
        while self.status is None:
            self._hear("")
        return self.status

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        with self._process as process:
            process.stdin.close()
        assert process.returncode == 0

    def _hear(self, awaited: str) -> None:
        """Take in what is said, up to a line of the word ``awaited`` or the saver's end."""
        word = ""
        while word != "ended" and (not awaited or word != awaited):
            word, number = self._line().split()
            if word == "pid":
                self._pid = int(number)
            elif word == "saved":
                self.acknowledged = int(number)
            elif word == "calls":
                self.calls = int(number)
            else:
                self.status = int(number)
            if not awaited:
                return

    def _line(self) -> str:
        fd = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            assert select.select([fd], [], [], PATIENCE)[0], "the saver says nothing"
            came = os.read(fd, 1 << 16)
            assert came, "the savers' parent has ended"
            self._rest += came
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with in_memory() as below:
        nursery = Nursery(below)
        try:
            yield nursery
        finally:
            nursery.close()


def check(nursery: Nursery) -> None:
    """Open what a killed saver has left."""
    if nursery.tracked.exists():
        check_versions(look(nursery.tracked, readonly=True), nursery.acknowledged)
    opened = look(nursery.tracked, readonly=False)
    numbers = check_versions(opened, nursery.acknowledged)
    assert not leftovers(nursery.tracked, opened)
    assert opened.present == opened.named
    nursery.acknowledged = max(numbers, default=0)
    for unborn in nursery.tracked.glob(".fbcache/readers/session-*"):
        shutil.rmtree(unborn)  # one that may be in the making is left alone: they would pile up


def check_versions(opened: Opened, acknowledged: int) -> list[int]:
    """Check every value; return the numbers of the saves."""
    numbers = [number_of(version.values) for version in opened.versions.values()]
    assert numbers == sorted(set(numbers))
    assert max(numbers, default=0) in (acknowledged, acknowledged + 1)
    return numbers


def number_of(values: dict[str, Value]) -> int:
    """The save that these are of, all of them."""
    filled = {name: int.from_bytes(value.content[:8], "little") for name, value in values.items()}
    number = max(filled.values())
    assert values == {
        name: exact(killed_child.array(name, n)) for name, n in killed_child.content(number).items()
    }
    return number


def test_a_saver_killed_at_any_time_leaves_its_last_save_or_the_next(nursery, soak):
    rng = Random(0)
    for seed in range(KILLS // 2 * (10 if soak else 1)):
        nursery.start(ENDLESS, seed)
        nursery.await_saves(rng.choice((0, 0, 1, 2, 5)))
        time.sleep(rng.choice((0.001, 0.003, 0.010)) * rng.random())
        nursery.kill()
        assert nursery.await_end() == -signal.SIGKILL
        check(nursery)


@pytest.mark.parametrize(("since", "stride"), [("opening", 5), ("saving", 1)])
def test_a_saver_killed_at_any_system_call_leaves_its_last_save_or_the_next(nursery, soak, since, stride):
    nursery.start(2, seed=0)
    assert nursery.await_end() == 0
    n = killed = rounds = 0
    least = KILLS // 4 * (10 if soak else 1)
    # Until every call has had its turn: a session killed while it was made makes a few calls more.
    while killed < least or not (rounds or killed >= 10 * least):
        n += stride
        nursery.start(1, killed, n, since)
        if nursery.await_end() == 0:  # there is no n-th call: begin again, with others of them
            assert n > nursery.calls
            rounds += 1
            n = rounds % stride
        else:
            assert nursery.status == -signal.SIGKILL
            killed += 1
        check(nursery)
    assert rounds or KILLS < 500, "not every call had its turn"
