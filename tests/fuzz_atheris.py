"""The fuzz target of all families, driven by coverage: ``python tests/fuzz_atheris.py [folder] [options]``.

Needs atheris (``pip install atheris``), and runs until it is stopped, or something is found. Inputs are kept
in the folder, a tree and its buffers each, as msgpack; it is filled with the families' values first. Options
are those of libFuzzer: ``-max_total_time=600`` ends it after ten minutes. A file for a folder is run once.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from pathlib import Path

import msgpack

sys.path.insert(0, str(Path(__file__).parent.parent))

try:
    import atheris  # type: ignore[import-not-found]
except ImportError:
    sys.exit("atheris is not installed: pip install atheris")

with atheris.instrument_imports(include=["fbcache"]):
    from tests.codec import family_fuzz

from tests.codec.mutations import Taken, damaged

_others: list[Taken] = []


def one_input(data: bytes) -> None:
    """Run the target, if the bytes are a tree and buffers."""
    taken = _parsed(data)
    if taken is not None:
        family_fuzz.target(taken.tree, list(taken.buffers))


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """Damage an input as the seeded runs do, or as libFuzzer would."""
    taken = _parsed(data)
    rng = random.Random(seed)
    if taken is None or rng.random() < 0.1:
        return bytes(atheris.Mutate(data, len(data) + 8))
    tree, buffers = damaged(rng, taken, rng.choice(_others))
    made: bytes = msgpack.packb([tree, buffers])
    return made if len(made) <= max_size else data


def _parsed(data: bytes) -> Taken | None:
    try:
        tree, buffers = msgpack.unpackb(data)
        msgpack.unpackb(tree, strict_map_key=False)
    except Exception:
        return None
    if type(buffers) is not list or any(type(buffer) is not bytes for buffer in buffers):
        return None
    return Taken("", tree, tuple(buffers))


def _fill(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(_others):
        (folder / f"value-{number}").write_bytes(msgpack.packb([one.tree, one.buffers]))


def main() -> None:
    """Take the values apart, and hand over to libFuzzer."""
    warnings.simplefilter("ignore")
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    paths = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    _others.extend(one for family in family_fuzz.taken().values() for one in family)
    if not paths:
        paths = [Path(tempfile.mkdtemp(prefix="fbcache-fuzz-"))]
    if not paths[0].is_file():
        _fill(paths[0])
    arguments = [sys.argv[0], *map(str, paths), "-max_len=100000", "-rss_limit_mb=4000", *options]
    atheris.Setup(arguments, one_input, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
