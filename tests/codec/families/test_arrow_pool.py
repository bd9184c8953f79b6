"""Arrow values in a pool: spilled, mapped, saved, and opened elsewhere without pickle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", "21")

from fbcache import FBPool  # noqa: E402
from tests.codec.families.arrow_cases import arrays, same, tables  # noqa: E402

VALUES = {**arrays(), **tables(), "scalar": pa.scalar("x"), "type": pa.list_(pa.int8())}

_SCRIPT = """
import sys
from fbcache import FBPool
from tests.codec.families.arrow_cases import arrays, same, tables

values = {**arrays(), **tables()}
with FBPool.from_checkpoint(sys.argv[1], directory=sys.argv[2], min_free=0) as pool:
    for name, value in values.items():
        with pool.get(name) as back:
            assert same(back, value), name
"""


def mapped(path: Path) -> list[range]:
    """The memory at which files below a directory are mapped."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith(str(path))]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def test_values_are_spilled_saved_and_opened_in_a_process_that_refuses_pickle(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool("64MB")
    for name, value in VALUES.items():
        pool.put(name, value)
    pool.evict()
    for name, value in VALUES.items():
        with pool.get(name) as back:
            assert back is not value and same(back, value), name
    pool.save(tmp_path / "saved")
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "saved"), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


@pytest.mark.files
@pytest.mark.parametrize("name", ["numbers", "texts"])
def test_a_reloaded_table_is_a_view_of_its_file(name: str, make_pool: Any, tmp_path: Path) -> None:
    table = VALUES[name]
    pool = make_pool("64MB")
    pool.put("t", table)
    pool.evict()
    with pool.get("t") as back:
        spans = mapped(tmp_path)
        buffers = [part for column in back.columns for part in column.chunk(0).buffers() if part]
        large = [part for part in buffers if part.size >= 4096]
        assert large and all(any(part.address in span for span in spans) for part in large)
        assert not any(part.is_mutable for part in buffers)
    del back, buffers, large


def test_a_write_guard_gives_the_same_values_and_takes_new_ones(make_pool: Any) -> None:
    table = VALUES["numbers"]
    pool = make_pool("64MB")
    pool.put("t", table)
    pool.evict()
    with pool.get_mut("t") as back:
        assert same(back, table)
    with pool.get_mut("t") as guard_value:
        assert same(guard_value, table)
    guard = pool.get_mut("t")
    with guard:
        guard.value = table.slice(0, 10)
    pool.evict()
    with pool.get("t") as back:
        assert same(back, table.slice(0, 10))
    del back, guard_value


def test_arrow_and_numpy_share_memory_in_the_pool_too(make_pool: Any) -> None:
    numbers = np.arange(50_000.0)
    pool = make_pool("64MB")
    pool.put("both", {"numbers": numbers, "column": pa.array(numbers)})
    pool.evict()
    with pool.get("both") as back:
        start = back["numbers"].__array_interface__["data"][0]
        assert back["column"].buffers()[1].address == start
        assert not back["numbers"].flags.writeable
    del back


def test_a_checkpoint_of_what_takes_pickle_is_refused_by_name(make_pool: Any, tmp_path: Path) -> None:
    inner = pa.array(["a", "b"]).dictionary_encode()
    value = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), inner)
    pool: FBPool = make_pool("1MB")
    pool.put("odd", value)
    pool.evict()
    with pool.get("odd") as back:
        assert same(back, value)
    with pytest.raises(Exception, match=r"odd.*DictionaryArray"):
        pool.save(tmp_path / "saved")
