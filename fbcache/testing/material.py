"""What the kits work with: frames to store, calls that must fail, threads that start together.

Guarantee: everything is the same at each run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fbcache.codec.frames import Frames

E = TypeVar("E", bound=BaseException)

#: Longest that a thread is waited for: a test that hangs fails instead.
PATIENCE = 60.0


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    """Return bytes that cannot be compressed and that occur nowhere else."""
    return np.random.default_rng([seed, nbytes]).bytes(nbytes)


def frames_of(*sizes: int, tree: bytes = b"the tree", pickled: str | None = None, seed: int = 0) -> Frames:
    """Return frames with buffers of these sizes."""
    buffers = [random_bytes(size, 1000 * seed + number) for number, size in enumerate(sizes)]
    return Frames("kit", tree, buffers, pickled)


def same_frames(one: Frames, other: Frames) -> bool:
    """Whether two frames hold the same bytes and say the same."""
    return (one.codec, bytes(one.tree), one.pickled) == (other.codec, bytes(other.tree), other.pickled) and [
        bytes(buffer) for buffer in one.buffers
    ] == [bytes(buffer) for buffer in other.buffers]


def same_values(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of the same types all the way down; NaN equals itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        is_alike = one.dtype == other.dtype and one.shape == other.shape
        return is_alike and same_values(one.tolist(), other.tolist())
    if isinstance(one, dict):
        return same_values(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    return bool(one == other) or (one != one and other != other)


def raised(
    kinds: type[E] | tuple[type[E], ...], call: Callable[..., Any], /, *args: Any, **options: Any
) -> E:
    """Return the error of one of these kinds that a call has to raise."""
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    names = " or ".join(kind.__name__ for kind in wanted)
    try:
        result = call(*args, **options)
    except wanted as error:
        return error
    except Exception as error:
        raise AssertionError(f"{error!r} was raised, where {names} should be") from error
    raise AssertionError(f"it returned {result!r:.200}, where it should raise {names}")


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls in a thread each, all at once; return what they return, or raise what the first raises."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        running = [threads.submit(run, call) for call in calls]
        return [each.result(PATIENCE) for each in running]


def files_below(directory: Path) -> dict[str, int]:
    """The size of each file below a directory, by its path from there."""
    return {str(path.relative_to(directory)): path.stat().st_size for path in _files(directory)}


def flip_where(needle: bytes, directory: Path) -> int:
    """Flip a bit of each place below a directory where these bytes are; return how many there were."""
    count = 0
    for path in _files(directory):
        content = path.read_bytes()
        place = content.find(needle)
        while place >= 0:
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([content[place] ^ 1]))
            count += 1
            place = content.find(needle, place + 1)
    return count


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink())
