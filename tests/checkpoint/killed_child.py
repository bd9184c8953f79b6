"""A process that saves until it is killed: the program of the children in test_kills.py.

``killed_child.py DIR SPILLS`` imports everything once, and then, for each line ``count seed n since`` on
its standard input, forks a saver: it opens DIR, restores the newest checkpoint, makes ``count`` saves, and
kills itself at its ``n``-th system call on files, if ``n`` is not 0, counted since ``opening`` or ``saving``.
What there is to say goes to standard output, unbuffered: ``pid P``, ``saved N`` when a save has returned,
``calls N`` at the end, and, once it is dead, ``ended STATUS``.

What a save of a given number holds is a function of that number: see :func:`content`.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import sys
import tempfile
import traceback
from random import Random
from typing import Any

import numpy as np

from fbcache import CheckpointNotFoundError, FBPool, FileStore, TrackedDirectory
from fbcache.checkpoint.directory import Directory
from fbcache.store.disk import Disk

NAMES = tuple("abcdef")


def changed(number: int) -> list[str]:
    """The names whose arrays save ``number`` has anew; the first has all."""
    return list(NAMES) if number == 1 else Random(number).sample(NAMES, 1 + number % 3)


def content(number: int) -> dict[str, int]:
    """What each array of save ``number`` is filled with: the save that changed it last."""
    filled: dict[str, int] = {}
    while len(filled) < len(NAMES):
        filled = dict.fromkeys(changed(number), number) | filled
        number -= 1
    return filled


def array(name: str, number: int) -> np.ndarray:
    return np.full(700 if name == "a" else 25, number)


class CountingDisk(Disk):
    """Counts its calls, and kills this process at the ``n``-th, before it is made."""

    def __init__(self, n: int) -> None:
        self.count = 0
        self._n = n

    def note(self) -> None:
        self.count += 1
        if self.count == self._n:
            os.kill(os.getpid(), signal.SIGKILL)


def _counted(name: str) -> Any:
    real = getattr(Disk, name)

    def call(self: CountingDisk, *args: Any, **kwargs: Any) -> Any:
        self.note()
        return real(self, *args, **kwargs)

    return call


for _name, _ in inspect.getmembers(Disk, inspect.isfunction):
    if not _name.startswith("_"):
        setattr(CountingDisk, _name, _counted(_name))


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def save_until_killed(tracked: str, spill: str, count: int, seed: int, n: int, since: str) -> None:
    say(f"pid {os.getpid()}")
    rng, disk = Random(seed), CountingDisk(n)
    if since == "saving":
        disk.count = -(10**9)
    pool = FBPool("1MB", store=FileStore(spill, disk=disk), io_threads=rng.choice((1, 2)))
    directory = TrackedDirectory._over(Directory(os.path.realpath(tracked), disk))
    with pool, directory:
        former = newest(pool, directory)
        if since == "saving":
            disk.count = 0
        for number in range(former + 1, former + count + 1):
            for name in changed(number):
                change(pool, name, number, rng)
            pool.save(directory, keep=rng.choice((1, 2)), meta={"number": number})
            say(f"saved {number}")
    say(f"calls {disk.count}")


def newest(pool: FBPool, directory: TrackedDirectory) -> int:
    try:
        meta = pool.restore(directory).meta
    except CheckpointNotFoundError:
        return 0
    assert meta is not None
    return int(meta["number"])


def change(pool: FBPool, name: str, number: int, rng: Random) -> None:
    if name not in pool or rng.random() < 0.3:
        pool.put(name, array(name, number))
        return
    with pool.get_mut(name) as value:
        value[:] = number


def main() -> None:
    tracked, spills = sys.argv[1:]
    for line in sys.stdin:
        count, seed, n, since = line.split()
        spill = tempfile.mkdtemp(dir=spills)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                save_until_killed(tracked, spill, int(count), int(seed), int(n), since)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        shutil.rmtree(spill)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
