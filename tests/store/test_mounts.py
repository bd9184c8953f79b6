"""Which file system a spill directory lies on, and the warning about it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fbcache.errors import FBCacheWarning
from fbcache.store import mounts
from fbcache.store.mounts import file_system_of, warn_if_unsuitable
from fbcache.store.session import Session
from tests.sessions import names_below


@pytest.fixture
def fake_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"/": "ext4", "/data": "nfs4", "/data/local": "xfs", "/tmp": "tmpfs", "/dat": "ext2"}
    partitions = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in table.items()]
    partitions.append(SimpleNamespace(mountpoint="/tmp", fstype="ramfs"))
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    monkeypatch.setattr(mounts, "_warned", False)


@pytest.mark.usefixtures("fake_mounts")
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home/x", "ext4"),
        ("/data", "nfs4"),
        ("/data/x", "nfs4"),
        ("/database", "ext4"),
        ("/data/local/x", "xfs"),
        ("/tmp/x", "ramfs"),
    ],
)
def test_the_longest_mount_point_counts_and_of_two_the_later(path: str, kind: str) -> None:
    assert file_system_of(path) == kind


@pytest.mark.usefixtures("fake_mounts")
@pytest.mark.parametrize(("path", "why"), [("/tmp/x", "kept in memory"), ("/data/x", "across a network")])
def test_an_unsuitable_file_system_is_warned_about_once(path: str, why: str) -> None:
    with pytest.warns(FBCacheWarning, match=f"{why}.*Give a directory on a local disk"):
        warn_if_unsuitable(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_unsuitable(path)


@pytest.mark.usefixtures("fake_mounts")
def test_a_suitable_one_is_not() -> None:
    warn_if_unsuitable("/home/x")
    assert not mounts._warned


def test_a_warning_turned_into_an_error_leaves_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_warned", False)
    monkeypatch.setattr(mounts, "file_system_of", lambda path: "tmpfs")
    with pytest.raises(FBCacheWarning):
        Session.open(tmp_path)
    assert names_below(tmp_path) == []


def test_this_machines_root_is_known() -> None:
    assert file_system_of("/proc/self") == "proc"
