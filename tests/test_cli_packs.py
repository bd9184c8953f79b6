"""The commands on values that a checkpoint has packed together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import FBPool, TrackedDirectory
from tests import shellcalls
from tests.directories import blob_of, blobs_in, flip
from tests.shellcalls import answer

MakePool = Callable[..., FBPool]


class Odd:
    """Takes pickle."""


@pytest.fixture
def saved(tmp_path: Path, make_pool: MakePool) -> Path:
    """Two versions; in the second few values have changed."""
    pool, path = make_pool("50MB", store="auto"), tmp_path / "saved"
    for number in range(40):
        pool[number] = {"n": number, "x": np.arange(number)}
    pool["array"] = np.arange(1000.0)
    pool["large"] = np.arange(100_000.0)
    pool["odd"] = Odd()
    pool.save(path, keep=None, allow_pickle=True)
    for number in range(3):
        pool[number] = {"n": -number}
    pool.save(path, keep=None, allow_pickle=True)
    assert len(blobs_in(path)) == 5, "a pack, the large one, and three that are too few for another pack"
    return path


run = partial(shellcalls.run, columns=250)


def damage(saved: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = answer("info", saved, name)
    flip(Path(found["path"]), found["offset"] + found["disk_bytes"] - 1)
    return found


def test_packed_entries_are_listed(saved: Path) -> None:
    entries = answer("ls", saved, "--version", 2)["entries"]
    assert len(entries) == 43
    assert all(0 < entry["disk_bytes"] < 10_000 for entry in entries if entry["name"] != "large")
    assert run("ls", saved, "--version", 2).exit_code == 0
    assert [version["entries"] for version in answer("ls", saved)["versions"]] == [43, 43]


def test_a_packed_entry_is_told_of_as_any_other(saved: Path) -> None:
    packed, own = answer("info", saved, "array"), answer("info", saved, "large")
    assert packed["offset"] > 0 and own["offset"] is None
    assert packed["buffers"] == 1 and packed["buffer_bytes"] == 8000 and packed["verified"]
    assert packed["content"].keys() == own["content"].keys() and packed["codec"] == own["codec"]
    assert Path(packed["path"]).is_file() and packed["key"].replace("-", "") not in packed["path"]
    shown = run("info", saved, "array").stdout
    assert f"from byte {packed['offset']:,} on" in shown and "all match" in shown
    assert [version["same"] for version in packed["versions"]] == [True, True]
    assert "from byte" not in run("info", saved, "large").stdout
    assert answer("info", saved, "odd")["pickled"].endswith("Odd")


def test_a_packed_entry_is_exported(saved: Path, tmp_path: Path) -> None:
    assert run("export", saved, "array", tmp_path / "array.npy").exit_code == 0
    assert (np.load(tmp_path / "array.npy") == np.arange(1000.0)).all()
    assert run("export", saved, 5, tmp_path / "five.pkl").exit_code == 0
    assert pickle.loads((tmp_path / "five.pkl").read_bytes())["n"] == 5
    assert run("export", saved, "odd", tmp_path / "odd.pkl").exit_code == 2
    assert run("export", saved, "odd", tmp_path / "odd.pkl", "--allow-pickle").exit_code == 0
    assert type(pickle.loads((tmp_path / "odd.pkl").read_bytes())) is Odd


def test_a_damaged_record_is_told_by_all_commands_and_no_other_is(saved: Path, tmp_path: Path) -> None:
    found = damage(saved, "array")
    assert "checksum" in answer("info", saved, "array", code=1)["damaged"]
    assert run("export", saved, "array", tmp_path / "array.npy").exit_code == 1
    assert not (tmp_path / "array.npy").exists()
    report = answer("verify", saved, code=1)
    (damaged,) = report["damaged"]
    assert damaged["key"] == found["key"] and damaged["path"] == found["path"]
    assert damaged["pack"].replace("-", "") == Path(found["path"]).name
    assert [name["version"] for name in damaged["names"]] == [1, 2]
    damage(saved, "7")
    shown = run("verify", saved)
    assert shown.exit_code == 1 and "array" in shown.stdout and "1 file is damaged" in shown.stdout
    assert run("info", saved, 8).exit_code == 0


def test_a_pack_that_is_gone(saved: Path, tmp_path: Path) -> None:
    path = Path(answer("info", saved, "array")["path"])
    path.unlink()
    assert "gone" in answer("info", saved, "array", code=1)["damaged"]
    assert run("export", saved, "array", tmp_path / "array.npy").exit_code == 1
    assert len(answer("verify", saved, code=1)["damaged"]) == 42
    assert run("info", saved, "large").exit_code == 0


def test_a_pack_that_is_damaged_where_no_value_is(saved: Path) -> None:
    flip(Path(answer("info", saved, "array")["path"]), 60)
    assert "values packed together" in run("verify", saved).stdout


def test_what_a_dry_run_counts_is_what_goes(saved: Path) -> None:
    with TrackedDirectory(saved, readonly=True) as reader:
        manifest = reader._directory.versions.read(1)
        there = set(reader.keys())
    assert answer("gc", saved, "--dry-run")["blobs"] == 0
    (saved / ".fbcache" / "checkpoints" / "0000000002.manifest").unlink()
    assert answer("gc", saved, "--dry-run")["blobs"] == 3
    assert answer("gc", saved)["blobs"] == 3
    assert all(blob_of(saved, key).exists() for key in manifest.files)
    with TrackedDirectory(saved, readonly=True) as reader:
        assert set(reader.keys()) == set(manifest.keys) < there
