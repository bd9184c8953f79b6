"""``fbcache export``: what comes out is what was saved, and what stops it leaves the target as it was."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fbcache import FBPool, StorageError
from fbcache.commands import fbcache
from fbcache.shell import formats
from fbcache.shell.ending import Refused
from fbcache.shell.target import new_file
from tests.faults import PATIENCE, FaultyDisk

MakePool = Callable[..., FBPool]


class Opened:
    """Pickled by a call that leaves a directory."""

    path = ""

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture
def save(tmp_path: Path, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """``save(value)``: a directory whose newest checkpoint has ``value`` under the name ``it``."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    pool = make_pool("300MB")

    def saved(value: Any) -> Path:
        pool.put("it", value)
        pool.save(tmp_path / "saved", keep=None, allow_pickle=True)
        return tmp_path / "saved"

    return saved


def export(directory: Path, out: Any, *options: Any) -> Result:
    result = CliRunner().invoke(fbcache, ["export", str(directory), "it", str(out), *map(str, options)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def ended_well(result: Result) -> None:
    assert result.exit_code == 0, result.output


# ------------------------------------------------------------------ .npy and .pkl

ARRAYS = [
    np.arange(12.0).reshape(3, 4),
    np.asfortranarray(np.arange(2000).reshape(40, 50)),
    np.arange(1000, dtype=">i2"),
    np.arange(1000)[::-1],
    np.arange(6000).reshape(10, 20, 30).transpose(1, 0, 2),
    np.zeros((0, 3)),
    np.array(5),
    np.array(["a", "bcd"]),
    np.array(["2020-01-01"], "M8[D]"),
    np.array([(1, 2.0)], [("x", "i4"), ("y", "f8")]),
    np.array([True, False]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
@pytest.mark.parametrize("suffix", ["npy", "pkl"])
def test_an_array_comes_out_as_it_was(save: Callable[[Any], Path], array: Any, suffix: str) -> None:
    ended_well(export(save(array.copy("K") if array.flags.forc else array), f"out.{suffix}"))
    if suffix == "npy":
        made = np.load("out.npy", allow_pickle=False)
    else:
        made = pickle.loads(Path("out.pkl").read_bytes())
    assert made.dtype == array.dtype
    assert made.shape == array.shape
    assert (made == array).all()
    assert made.flags.writeable
    assert made.flags.f_contiguous == array.flags.f_contiguous or not array.flags.forc


def test_a_numpy_scalar_becomes_an_array_without_dimensions(save: Callable[[Any], Path]) -> None:
    ended_well(export(save(np.float32(2.5)), "out.npy"))
    assert np.load("out.npy").shape == ()


@pytest.mark.parametrize(
    "value",
    [{"a": [1, (2, None)], "b": np.arange(5000)}, "text", None, [b"x" * 9000], {1, 2}, 1 << 70],
    ids=str,
)
def test_any_value_goes_into_a_pickle_that_needs_no_fbcache(save: Callable[[Any], Path], value: Any) -> None:
    ended_well(export(save(value), "out.pkl"))
    raw = Path("out.pkl").read_bytes()
    assert raw[:2] == b"\x80\x05"
    assert b"fbcache" not in raw
    np.testing.assert_equal(pickle.loads(raw), value)


@pytest.mark.parametrize("suffix", ["npy", "pkl"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_array_is_not_copied_in_memory(save: Callable[[Any], Path], suffix: str, order: Any) -> None:
    nbytes = 96 << 20
    directory = save(np.zeros((nbytes // 8000, 1000), order=order))
    tracemalloc.start()
    try:
        ended_well(export(directory, f"out.{suffix}"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert os.path.getsize(f"out.{suffix}") > 0.99 * nbytes
    assert peak < nbytes / 2


def test_the_version_can_be_chosen(save: Callable[[Any], Path]) -> None:
    save(np.array([1]))
    directory = save(np.array([2]))
    ended_well(export(directory, "new.npy"))
    ended_well(export(directory, "old.npy", "--version", 1))
    assert (np.load("old.npy")[0], np.load("new.npy")[0]) == (1, 2)


def test_what_was_written_is_told(save: Callable[[Any], Path]) -> None:
    result = export(save(np.zeros(1000)), "out.npy", "--json")
    told = json.loads(result.stdout)
    assert told["output"] == os.path.abspath("out.npy")
    assert told["nbytes"] == os.path.getsize("out.npy")
    assert (told["name"], told["format"], told["version"]) == ("it", "npy", 1)
    assert "array of float64" in export(save(np.zeros(1000)), "again.npy").stdout


# ------------------------------------------------------------------ what does not fit

MISFITS = [
    ({"a": 1}, "npy", ".pkl would do"),
    (np.array([None]), "npy", ".pkl would do"),
    (np.ma.masked_equal([1, 2], 1), "npy", "masked"),
    ([1, 2], "npy", "a list of 2 parts"),
    ({"x": np.arange(3), "y": np.arange(3)}, "npy", ".parquet or .pkl would do"),
]


@pytest.mark.parametrize(
    ("value", "suffix", "told"), MISFITS, ids=lambda part: part if type(part) is str else ""
)
def test_a_value_that_does_not_fit_names_the_formats_that_do(
    save: Callable[[Any], Path], value: Any, suffix: str, told: str
) -> None:
    result = export(save(value), f"out.{suffix}")
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not os.listdir()


def test_an_entry_that_was_pickled_is_loaded_only_when_it_is_allowed(
    save: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Opened, "path", str(tmp_path / "code-has-run"))
    directory = save(Opened())
    result = export(directory, "out.pkl")
    assert result.exit_code == 2
    assert "Opened" in result.stderr
    assert "--allow-pickle" in result.stderr
    assert not Path(Opened.path).exists()
    result = export(directory, "out.pkl", "--allow-pickle")
    ended_well(result)
    assert result.stderr.startswith("Warning: loading it runs code")
    assert Path(Opened.path).exists()


def test_a_damaged_entry_is_not_exported(save: Callable[[Any], Path]) -> None:
    directory = save(np.arange(5000))
    (blob,) = (path for path in directory.rglob("*") if len(path.name) == 32)
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(raw)
    result = export(directory, "out.npy")
    assert result.exit_code == 1
    assert str(blob) in result.stderr
    assert not os.listdir()


# ------------------------------------------------------------------ the target


def test_what_is_there_is_overwritten_by_force_only(save: Callable[[Any], Path]) -> None:
    directory = save(np.arange(3))
    Path("out.npy").write_text("mine")
    result = export(directory, "out.npy")
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert Path("out.npy").read_text() == "mine"
    ended_well(export(directory, "out.npy", "--force"))
    assert np.load("out.npy").shape == (3,)
    assert os.listdir() == ["out.npy"]


def test_a_link_is_replaced_and_not_followed(save: Callable[[Any], Path], tmp_path: Path) -> None:
    directory = save(np.arange(3))
    (tmp_path / "target").write_text("mine")
    os.symlink(tmp_path / "target", "out.npy")
    assert export(directory, "out.npy").exit_code == 2
    ended_well(export(directory, "out.npy", "--force"))
    assert not os.path.islink("out.npy")
    assert (tmp_path / "target").read_text() == "mine"


def test_nothing_is_written_into_the_tracked_directory(save: Callable[[Any], Path]) -> None:
    directory = save(np.arange(3))
    os.symlink(directory / ".fbcache", "way")
    before = sorted(directory.rglob("*"))
    for target in (
        directory / "out.npy",
        directory / ".fbcache" / "out.npy",
        "way/out.npy",
        "../saved/out.npy",
    ):
        result = export(directory, target, "--force")
        assert result.exit_code == 2
        assert "tracked directory itself" in result.stderr
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("target", ["out.txt", "out", "none/out.npy", "dir.npy"])
def test_a_target_that_cannot_be_is_refused(save: Callable[[Any], Path], target: str) -> None:
    directory = save(np.arange(3))
    os.mkdir("dir.npy")
    for options in ((), ("--force",)):
        result = export(directory, target, *options)
        assert result.exit_code == 2
        assert target in result.stderr
    assert os.listdir() == ["dir.npy"]


def test_a_file_has_the_rights_that_the_user_gives_new_ones(save: Callable[[Any], Path]) -> None:
    former = os.umask(0o027)
    try:
        ended_well(export(save(np.arange(3)), "out.npy"))
    finally:
        os.umask(former)
    assert os.stat("out.npy").st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("call", "force"),
    [
        *((call, force) for call in ("open", "writev", "fsync") for force in (True, False)),
        *(("link", False), ("rename", True)),
    ],
)
def test_a_target_that_cannot_be_written_stays_as_it_was(tmp_path: Path, call: str, force: bool) -> None:
    disk, target = FaultyDisk(), tmp_path / "out.npy"
    if force:
        target.write_text("mine")
    disk.fail(call, error=OSError(errno.ENOSPC, "No space left on device"), times=None)
    with pytest.raises(StorageError, match="No space left"):
        with new_file(str(target), force=force, disk=disk) as sink:
            sink.write(b"new")
    assert (target.read_text() if force else target.exists()) == ("mine" if force else False)
    assert len(os.listdir(tmp_path)) == force


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(str(tmp_path / "out"), force=False) as sink:
        sink.write(b"half")
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_is_not_overwritten(tmp_path: Path, links: bool) -> None:
    disk, target = FaultyDisk(), tmp_path / "out"
    if not links:
        disk.fail("link", error=OSError(errno.EPERM, "no links"), times=None)
    with pytest.raises(Refused, match="--force"), new_file(str(target), force=False, disk=disk) as sink:
        sink.write(b"new")
        target.write_text("mine")
    assert target.read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_where_there_are_no_links_the_file_is_renamed(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail("link", error=OSError(errno.EPERM, "no links"), times=None)
    with new_file(str(tmp_path / "out"), force=False, disk=disk) as sink:
        sink.write(b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_as_a_process(save: Callable[[Any], Path]) -> None:
    arguments = ["export", save(np.arange(3)), "it", "out.npy"]
    run = [sys.executable, "-m", "fbcache", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load("out.npy").tolist() == [0, 1, 2]


# ------------------------------------------------------------------ .parquet


def test_without_pyarrow_it_says_what_to_install(
    save: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    result = export(save(np.zeros((2, 2))), "out.parquet")
    assert result.exit_code == 2
    assert "pip install 'fbcache[parquet]'" in result.stderr


@pytest.fixture
def read_table() -> Callable[[], Any]:
    pytest.importorskip("pyarrow")
    return lambda: importlib.import_module("pyarrow.parquet").read_table("out.parquet")


TABLES: list[tuple[Any, dict[str, list[Any]]]] = [
    ({"x": np.arange(3), "y": np.array(["a", "b", "c"])}, {"x": [0, 1, 2], "y": ["a", "b", "c"]}),
    ({"x": np.arange(3, dtype=">f8")[::-1]}, {"x": [2.0, 1.0, 0.0]}),
    (
        {"x": np.array([None, "text"], object), "y": np.array([True, False])},
        {"x": [None, "text"], "y": [True, False]},
    ),
    (np.array([(1, 2.5), (3, 4.5)], [("a", "i4"), ("b", "f4")]), {"a": [1, 3], "b": [2.5, 4.5]}),
    (np.arange(6).reshape(2, 3), {"0": [0, 3], "1": [1, 4], "2": [2, 5]}),
    (np.zeros((0, 2)), {"0": [], "1": []}),
    ({"x": np.ma.masked_equal([1, 2], 1)}, {"x": [None, 2]}),
]


@pytest.mark.parametrize(("value", "columns"), TABLES, ids=lambda part: type(part).__name__)
def test_a_table_comes_out_as_it_was(
    save: Callable[[Any], Path], read_table: Callable[[], Any], value: Any, columns: dict[str, list[Any]]
) -> None:
    ended_well(export(save(value), "out.parquet"))
    assert read_table().to_pydict() == columns


def test_a_table_is_written_in_groups_of_rows(
    save: Callable[[Any], Path], read_table: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats.parquet, "_GROUP_ROWS", 100)
    objects = np.array([None] * 150 + ["late"] * 100, object)
    ended_well(export(save({"x": np.arange(250), "y": objects}), "out.parquet"))
    assert read_table().to_pydict() == {"x": list(range(250)), "y": objects.tolist()}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"x": np.zeros(2), "z": np.zeros(2, complex)}, "its column 'z' of complex128"),
        ({"x": np.zeros(2), "y": np.zeros(3)}, "a table"),
        ({"x": np.zeros((2, 2))}, "a table"),
        ({1: np.zeros(2)}, "a table"),
        ({}, "a table"),
        (np.zeros(3), ".npy or .pkl would do"),
        ([1], ".pkl would do"),
    ],
    ids=str,
)
def test_what_is_no_table_is_refused(
    save: Callable[[Any], Path], read_table: Callable[[], Any], value: Any, told: str
) -> None:
    result = export(save(value), "out.parquet")
    assert result.exit_code == 2
    assert told in result.stderr
    assert not os.listdir()


def test_a_data_frame_comes_out_as_it_was(save: Callable[[Any], Path], read_table: Callable[[], Any]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": [1, 2], "y": ["a", None]}, index=[5, 6])
    directory = save(frame)
    ended_well(export(directory, "out.parquet", "--allow-pickle"))
    assert read_table().to_pandas().equals(frame)


def test_numpy_reads_back_what_the_sink_was_given_in_pieces() -> None:
    made = io.BytesIO()
    value = np.arange(4_000_000).reshape(2000, 2000)[::2, ::2]
    formats.FORMATS[0].write(value, made)  # type: ignore[arg-type]
    made.seek(0)
    assert (np.load(made) == value).all()
