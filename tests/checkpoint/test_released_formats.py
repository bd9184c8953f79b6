"""Checkpoints of every released format keep opening: whole directories, as they were written then.

``fixtures/format-<n>`` is never written again once a release has made such files. For a new format
``PYTHONPATH=. python -m tests.checkpoint.test_released_formats`` writes the next one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import FBPool, TrackedDirectory
from fbcache.checkpoint.manifest import FORMAT

FIXTURES = Path(__file__).parent / "fixtures"


def contents(number: int = FORMAT) -> dict[Any, Any]:
    """What the fixture of a format holds; from format 2 on enough small values to be packed."""
    many = {("row", n): {"n": n, "rest": [n] * (n % 5)} for n in range(20)} if number > 1 else {}
    return many | {
        "array": np.arange(12.0).reshape(3, 4),
        ("tile", 3): np.arange(5, dtype=">i2"),
        "nested": {"a": [1, 2.5, None], "b": (True, b"bytes"), 3: "three"},
        "text": "snow \u2603",
        7: np.array(["2020-01-01", "NaT"], "M8[D]"),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def write(target: Path) -> None:
    with FBPool("1MB", min_free=0) as pool:
        for name, value in contents().items():
            pool.put(name, value)
        pool.save(target, tag="first", meta={"epoch": 3})
        with pool.get_mut("array") as array:
            array += 1
        pool.save(target, meta={"epoch": 4})


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_checkpoint_of_a_released_format_opens_and_is_whole(number: int, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / f"format-{number}", directory)
    with FBPool.from_checkpoint(directory, tag="first", memory="1MB", directory=tmp_path / "spill") as pool:
        for name, value in contents(number).items():
            with pool.get(name) as loaded:
                assert equal(loaded, value), name
        newest = pool.restore(directory, replace=True)
        assert (newest.version, newest.meta) == (2, {"epoch": 4})
        with pool.get("array") as array:
            assert equal(array, contents()["array"] + 1)
    with TrackedDirectory(directory) as tracked:
        assert [c.tag for c in tracked.checkpoints()] == ["first", None]
        assert tracked.verify().ok
        assert len(tracked) == len(contents(number)) + 1


if __name__ == "__main__":
    target = FIXTURES / f"format-{FORMAT}"
    assert not target.exists(), "a released fixture is never written again"
    write(target)
    (target / ".fbcache" / "lock").unlink()  # it names this machine
