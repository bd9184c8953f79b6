"""Values of all families, damaged and mixed up: our errors or a value, and the process that uses it lives on.

``FBCACHE_DAMAGED=n`` makes it n / 4 cases instead of 5,000. A case that fails is named, and run again by
``python -m tests.codec.family_fuzz SEED NUMBER NUMBER+1``. ``tests/fuzz_atheris.py`` has coverage choose.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from fbcache.codec import Frames, tags
from fbcache.errors import CorruptBlobError
from tests.codec import family_fuzz
from tests.codec.mutations import TAGS, Taken, damaged
from tests.codec.roundtrip import CODEC

ROOT = Path(__file__).parents[2]
COUNT = int(os.environ.get("FBCACHE_DAMAGED", 20_000)) // 4
BATCH = 50_000  # cases in one process
SEED = 20
READING: dict[str, Any] = {"writable": False, "allow_pickle": False}
PER_CASE = 0.1  # seconds that a batch may take for each, on a machine that is ten times too slow


def run(seed: int, first: int, last: int, progress: Path) -> None:
    command = [sys.executable, "-m", "tests.codec.family_fuzz", *map(str, (seed, first, last, progress))]
    environment = {**os.environ, "RUST_BACKTRACE": "0", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120 + PER_CASE * (last - first),
        )
        outcome = f"ended with {done.returncode}: {done.stderr[-4000:]}"
        survived = done.returncode == 0 and done.stdout.endswith("survived")
    except subprocess.TimeoutExpired:
        outcome, survived = "did not end", False
    number = progress.read_text("ascii").strip() if progress.exists() else "none"
    assert survived, f"the process of seed {seed}, at case {number}, {outcome}"


def test_damage_to_any_family_gives_our_errors_or_a_value_that_can_be_used(tmp_path: Path) -> None:
    for first in range(0, COUNT, BATCH):
        run(SEED, first, min(first + BATCH, COUNT), tmp_path / "progress")


def fields(**changes: Any) -> list[Any]:
    """An array of one element, of 16 bytes: a float, and four bytes at 8."""
    parts = {"offsets": [0, 8], "formats": ["<f8", "|S4"], **changes}
    described = [["a", "b"], parts["formats"], parts["offsets"], [None, None], 16, False, False]
    return [tags.ARRAY, described, [1], bytes(16), False]


def array(length: int, dtype: str = "<f8") -> list[Any]:
    return [tags.ARRAY, dtype, [length], bytes(length * np.dtype(dtype).itemsize), False]


FOUND = {
    "strides whose sum overflows": [tags.VIEW, "<f8", [85], 0, 40, [-(1 << 62)]],
    "strides that cancel each other": [tags.VIEW, "<f8", [3, 3], 0, 0, [1 << 62, -(1 << 62)]],
    "strides that lead below": [tags.VIEW, "<f8", [2], 0, 0, [-8]],
    "strides that lead above": [tags.VIEW, "<f8", [75], 0, 16, [8]],
    "strides that are no numbers": [tags.VIEW, "<f8", [2], 0, 0, [8.0]],
    "a mask that is too long": [tags.MASKED, [array(2), array(3, "|b1"), None], False],
    "a mask of another shape": [tags.MASKED, [array(2), array(1, "|b1"), None], False],
    "a field whose end overflows": fields(offsets=[(1 << 31) - 1, 8]),
    "a field beyond its element": fields(offsets=[9, 8]),
    "a field before its element": fields(offsets=[-1, 8]),
    "a field with nowhere to be": fields(offsets=[0]),
    "a field whose length overflows": fields(formats=["<f8", ["|S4", [1 << 29]]]),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_numpy_does_not_see_is_refused(name: str) -> None:
    """What the fuzzers have found, and its like: sums that overflow in numpy, and errors of its own."""
    buffers = [bytes(600)]
    views = [[tags.VIEW, "<f8", [74], 0, 8, [8]], [tags.VIEW, "<f8", [75], 0, 592, [-8]]]
    masked = [tags.MASKED, [array(2), array(2, "|b1"), None], False]
    good = [tags.LIST, [fields(), *views, masked]]
    assert len(CODEC.decode(Frames("msgpack", msgpack.packb(good), buffers), **READING)) == 4
    with pytest.raises(CorruptBlobError):
        CODEC.decode(Frames("msgpack", msgpack.packb([tags.LIST, [FOUND[name]]]), buffers), **READING)


def test_a_case_depends_on_its_seed_and_number_alone() -> None:
    families = {"a": [Taken("x", b"\x93\x01\x02\x93\x00\xa1x\xc4\x01y", (b"one", b"two" * 9))]}
    before = [family_fuzz.case(1, number, families) for number in range(300)]
    random.seed(5)
    assert [family_fuzz.case(1, number, families) for number in reversed(range(300))] == before[::-1]
    assert len({tree for _, tree, _ in before}) > 150
    assert len({tuple(buffers) for _, _, buffers in before}) > 50


def test_a_damaged_tree_may_hold_itself_nowhere() -> None:
    """An edit that puts a node into itself gives a tree all the same."""
    one = Taken("x", b"\x92\x92\x01\x92\x02\x03\x81\xa1k\x90", ())
    for number in range(2000):
        tree, _ = damaged(random.Random(number), one, one)
        assert type(tree) is bytes


def test_the_target_sees_a_foreign_error_and_an_excess(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, **options: object) -> None:
        raise KeyError("foreign")

    monkeypatch.setattr(family_fuzz.CODEC, "decode", wrong)
    with pytest.raises(KeyError):
        family_fuzz.target(b"\xc0", [])
    with pytest.raises(family_fuzz.ExcessError):
        with family_fuzz.bounded(1000):
            np.ones(2 * family_fuzz.SLACK // 8)


def test_all_tags_are_tried() -> None:
    assert set(TAGS) >= {tags.LIST, tags.FAMILY, tags.ORDERED, tags.VIEW, tags.VOID}
