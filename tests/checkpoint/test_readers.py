"""Readers beside a writer: what they need stays, is shared, and goes when they have gone."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from fbcache import FBCacheWarning, TrackedDirectory
from fbcache.checkpoint import tracked as tracked_module
from fbcache.checkpoint.registry import directory_at
from tests.directories import (
    READER,
    Child,
    blob_of,
    blobs_in,
    flip,
    large,
    manifest_of,
    map_of,
    sessions_in,
    versions_on,
)
from tests.faults import FaultyDisk, oserror


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


@pytest.fixture
def saved(make_pool, target):
    pool = make_pool("50MB")
    pool["x"], pool["y"] = large(1), large(2)
    pool.save(target)
    return pool


def change_all(pool, target) -> None:
    """Save other values, so that the former version's blobs are not needed any more."""
    pool["x"], pool["y"] = large(3), large(4)
    pool.save(target)


def sum_of(seed: int) -> str:
    return str(int(large(seed).sum()))


# ------------------------------------------------------------------ other processes


@pytest.mark.parametrize("ended", ["well", "killed"])
def test_a_reader_that_has_not_loaded_yet_keeps_what_it_needs_until_it_ends(saved, target, tmp_path, ended):
    """Invariant 12: the writer removes nothing that an open reader needs, however often it saves."""
    with Child(READER, target, tmp_path / "reader") as reader:
        assert reader.hear() == "restored"
        assert len(sessions_in(target)) == 1
        former = blobs_in(target)
        for _ in range(3):
            change_all(saved, target)
            with TrackedDirectory(target) as tracked:
                tracked.gc()
            assert former <= blobs_in(target) and len(versions_on(target)) == 1
        directory_at(target)._stamp = ""
        TrackedDirectory(target).close()  # an opening that sweeps
        assert former <= blobs_in(target)
        reader.tell("x")
        assert reader.hear().split()[0] == sum_of(1)
        change_all(saved, target)
        reader.tell("y")
        assert reader.hear().split()[0] == sum_of(2)
        reader.end() if ended == "well" else reader.kill()
    with TrackedDirectory(target) as tracked:
        tracked.gc()
        assert blobs_in(target) == {key.hex for key in tracked} and len(tracked) == 2
    assert sessions_in(target) == []


def test_a_writer_of_another_process_cleans_up_after_a_killed_reader(saved, target, tmp_path):
    saver = """
import sys, fbcache
with fbcache.FBPool("50MB", directory=sys.argv[2], min_free=0) as pool:
    pool["z"] = 1
    pool.save(sys.argv[1])
"""
    with Child(READER, target, tmp_path / "reader") as reader:
        assert reader.hear() == "restored"
        with Child(saver, target, tmp_path / "saver") as child:
            child.end()
        assert len(blobs_in(target)) == 3
        reader.kill()
    with Child(saver, target, tmp_path / "saver") as child:
        child.end()
    with TrackedDirectory(target) as tracked:
        assert blobs_in(target) == {key.hex for key in tracked} and len(tracked) == 1
    assert sessions_in(target) == []


def test_readers_in_several_processes_share_the_page_cache(saved, target, tmp_path, make_pool):
    pool = make_pool("50MB")
    pool.restore(target)
    ours = map_of(pool["x"])
    with Child(READER, target, tmp_path / "1") as one, Child(READER, target, tmp_path / "2") as two:
        for reader in (one, two):
            assert reader.hear() == "restored"
        for reader in (one, two):
            reader.tell("x")
            total, address = reader.hear().split()
            assert total == sum_of(1)
            stand_in = np.ndarray.__new__(_At, 0)
            stand_in.address = int(address)
            assert map_of(stand_in, reader.pid) == ours
        assert len(sessions_in(target)) == 3
    assert ours is not None and ours[0].startswith("r--")


class _At(np.ndarray):
    """Stands for an array at an address of another process."""

    address = 0

    @property
    def __array_interface__(self):
        return {"data": (self.address, True)}


def test_a_reader_that_only_holds_a_registered_key_keeps_it(make_pool, target, tmp_path):
    code = """
import sys, uuid, fbcache
with fbcache.FBPool("50MB", directory=sys.argv[2], min_free=0) as pool:
    fb = pool.register(sys.argv[1], uuid.UUID(sys.argv[3]))
    print("registered", flush=True)
    sys.stdin.readline()
    with fb.load() as value:
        print(int(value.sum()), flush=True)
    sys.stdin.readline()
"""
    pool = make_pool("50MB")
    key = pool.put("x", large(1)).persist(target)
    with Child(code, target, tmp_path / "reader", key) as reader:
        assert reader.hear() == "registered"
        with TrackedDirectory(target) as tracked:
            assert tracked.delete(key) is True
        assert not blob_of(target, key).exists()  # the reader has a link of its own
        reader.tell()
        assert reader.hear() == sum_of(1)
        reader.end()
    assert sessions_in(target) == []


def test_a_reader_that_is_stopped_in_between_is_not_taken_for_dead(saved, target, tmp_path):
    with Child(READER, target, tmp_path / "reader") as reader:
        assert reader.hear() == "restored"
        os.kill(reader.pid, signal.SIGSTOP)
        try:
            change_all(saved, target)
            assert len(blobs_in(target)) == 4 and len(sessions_in(target)) == 1
        finally:
            os.kill(reader.pid, signal.SIGCONT)
        reader.tell("x")
        assert reader.hear().split()[0] == sum_of(1)
        reader.end()


def test_a_damaged_manifest_in_a_readers_hands_fails_no_save(saved, target, tmp_path):
    """The link in its session is the same file. What it names is not known, so nothing is removed."""
    with Child(READER, target, tmp_path / "reader") as reader:
        assert reader.hear() == "restored"
        former = blobs_in(target)
        flip(manifest_of(target, 1), -1)
        change_all(saved, target)
        assert versions_on(target) == [2] and former < blobs_in(target)
        directory_at(target)._stamp = ""  # as in a process that comes anew
        TrackedDirectory(target).close()
        assert former < blobs_in(target)
        reader.tell("x")
        assert reader.hear().split()[0] == sum_of(1)
        reader.end()


# ------------------------------------------------------------------ this process


def test_an_entry_of_this_process_keeps_its_blob_and_the_next_sweep_takes_it(saved, target, make_pool):
    reader = make_pool("50MB")
    reader.restore(target)
    former = blobs_in(target)
    change_all(saved, target)
    assert former < blobs_in(target)
    assert (reader["x"] == large(1)).all()
    reader.delete("x")
    reader.drain()
    with TrackedDirectory(target) as tracked:
        tracked.gc()
        assert len(blobs_in(target)) == 3  # y is needed still
        assert (reader["y"] == large(2)).all()
        reader.close()
        assert sessions_in(target) == []
        tracked.gc()
        assert blobs_in(target) == {key.hex for key in tracked} and len(tracked) == 2


def test_a_forgotten_version_stays_readable_for_who_has_it(saved, target, make_pool):
    reader = make_pool("50MB")
    reader.restore(target)
    with TrackedDirectory(target) as tracked:
        tracked.forget(1)
        assert tracked.checkpoints() == [] and (reader["y"] == large(2)).all()
        reader.save(tracked)  # and can be saved anew
    saved.close()
    reader.close()
    again = make_pool("50MB")
    again.restore(target)
    assert (again["x"] == large(1)).all()


def test_the_session_begins_with_the_first_loan_and_ends_with_the_last(saved, target, make_pool):
    one, two = make_pool("50MB"), make_pool("50MB")
    one.restore(target, ["x"])
    two.restore(target, ["x", "y"])
    (session,) = sessions_in(target)
    one.close()
    assert sessions_in(target) == [session]
    two.delete("x")
    two.drain()
    assert sessions_in(target) == [session]
    two.delete("y")
    two.drain()
    assert sessions_in(target) == []


# ------------------------------------------------------------------ directories that cannot be written to


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    """The disk of every directory that is given by its path."""
    disk = FaultyDisk()
    monkeypatch.setattr(tracked_module, "directory_at", lambda path: directory_at(path, disk))
    return disk


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_a_directory_that_cannot_be_written_to_is_read_all_the_same(saved, target, make_pool, disk, code):
    saved.put("k", [1]).persist(target)
    key = saved.put("p", [1]).persist(target)
    saved.close()
    before = {path: path.lstat().st_mtime_ns for path in target.rglob("*")}
    for call in ("makedirs", "mkdir", "link", "unlink", "rename", "rmdir", "writev", "pwrite"):
        disk.fail(call, error=oserror(code), times=None)
    reader = make_pool("50MB")
    reader.restore(target)
    assert (reader["x"] == large(1)).all()
    fb = reader.register(target, key)
    with fb.load() as value:
        assert value == [1]
    fb.drop()
    reader.close()
    with TrackedDirectory(target, readonly=True) as tracked:
        assert len(tracked) == 4 and tracked.verify().ok and len(tracked.checkpoints()) == 1
    assert {path: path.lstat().st_mtime_ns for path in target.rglob("*")} == before


def test_who_cannot_protect_itself_for_want_of_room_is_warned(saved, target, make_pool, disk):
    disk.fail("makedirs", error=oserror(errno.ENOSPC), times=None)
    reader = make_pool("50MB")
    with pytest.warns(FBCacheWarning, match="without protection"):
        reader.restore(target)
    assert (reader["x"] == large(1)).all()


def test_without_links_the_writer_of_the_same_process_still_knows_of_its_readers(
    saved, target, make_pool, disk
):
    saved.save(target)
    disk.fail("link", error=oserror(errno.EPERM), times=None)
    reader = make_pool("50MB")
    reader.restore(target)
    change_all(saved, target)
    for name, seed in (("x", 1), ("y", 2)):
        assert (reader[name] == large(seed)).all()


def test_a_session_that_cannot_be_removed_is_a_warning(saved, target, make_pool, disk):
    reader = make_pool("50MB")
    reader.restore(target)
    disk.fail("unlink", error=oserror(errno.EIO), times=None)
    with pytest.warns(FBCacheWarning, match="session"):
        reader.close()
    disk.clear()
    assert len(sessions_in(target)) == 1
