"""The target of the fuzzers over all families, and a process that runs it until it is through, or dies.

``python -m tests.codec.family_fuzz SEED FIRST LAST [PROGRESS]``: each case depends on its seed and number
alone, so that one that killed the process is run again by itself.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fbcache.codec import Frames
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.freezing import take_over, thaw
from fbcache.sizeof import sizeof
from tests.codec.family_values import use, values
from tests.codec.mutations import Taken, damaged
from tests.codec.roundtrip import CODEC

OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)

#: What a decode may add to the process's memory: so much, and so many times the blob's length. Some
#: bytes of a tree make a pandas frame of some kilobytes.
SLACK = 48 << 20
FACTOR = 300

#: Address space for all that is asked for and not touched; above what the libraries themselves take.
ADDRESS_SPACE = 3 << 30

#: Seconds after which a case is taken to hang.
PATIENCE = 60


class ExcessError(Exception):
    """A decode has taken more memory than its blob accounts for."""


def target(tree: bytes, buffers: list[bytes]) -> None:
    """Decode for a reader and for a writer, and use what comes out.

    Raises
    ------
    Exception
        Whatever the codec should not have raised.
    """
    for writable in (False, True):
        frames = Frames("msgpack", tree, buffers)
        try:
            with bounded(frames.nbytes):
                value = CODEC.decode(frames, writable=writable, allow_pickle=False)
        except OURS:
            continue
        use(value)
        try:
            sizeof(value)
            CODEC.encode(thaw(take_over(value))[0], allow_pickle=False)
        except Exception:
            pass


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """See that the block takes no memory, at its peak, that so many bytes do not account for."""
    Path("/proc/self/clear_refs").write_bytes(b"5")  # the peak is now what there is
    before = _peak()
    try:
        yield
    finally:
        grown = _peak() - before
        if grown > SLACK + FACTOR * nbytes:
            raise ExcessError(f"{grown} bytes were taken for a blob of {nbytes}")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text("ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def taken() -> dict[str, list[Taken]]:
    """All the values, taken apart, by family. Their libraries are fully imported by that."""
    found = {}
    for family, named in values().items():
        found[family] = [_taken(f"{family}: {name}", value) for name, value in sorted(named.items())]
    return found


def _taken(title: str, value: object) -> Taken:
    frames = CODEC.encode(value, allow_pickle=False)
    one = Taken(title, frames.tree, tuple(bytes(memoryview(buffer)) for buffer in frames.buffers))
    use(CODEC.decode(Frames("msgpack", one.tree, one.buffers), writable=True, allow_pickle=False))
    return one


def case(seed: int, number: int, families: dict[str, list[Taken]]) -> tuple[str, bytes, list[bytes]]:
    """The title, tree and buffers of one case."""
    rng = random.Random(f"{seed} {number}")
    one, other = (rng.choice(families[rng.choice(sorted(families))]) for _ in range(2))
    return f"{one.title} with {other.title}", *damaged(rng, one, other)


def main(seed: int, first: int, last: int, progress: str) -> None:
    """Run cases; the number of the one at hand stands in a file."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    families = taken()
    limit = _status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with open(progress, "wb", buffering=0) as file:
        for number in range(first, last):
            os.pwrite(file.fileno(), b"%12d" % number, 0)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            title, tree, buffers = case(seed, number, families)
            try:
                target(tree, buffers)
            except Exception as error:
                error.add_note(f"case {seed} {number}: {title}")
                raise
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.write("survived")


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:4]]
    main(numbers[0], numbers[1], numbers[2], sys.argv[4] if len(sys.argv) > 4 else os.devnull)
