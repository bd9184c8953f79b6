"""The table of bad input: each a typed error that names the file or the argument, and costs nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from fbcache import (
    CheckpointNotFoundError,
    CorruptBlobError,
    CorruptCheckpointError,
    DiskFullError,
    FBCacheWarning,
    FBPool,
    StorageError,
    TrackedDirectory,
)
from fbcache.checkpoint import tracked as tracked_module
from fbcache.checkpoint.manifest import FORMAT, Blob, Head, Manifest, pack
from fbcache.checkpoint.registry import directory_at
from tests.directories import (
    blob_of,
    blobs_in,
    flip,
    large,
    manifest_of,
    replaced,
    sessions_in,
    versions_on,
)
from tests.faults import FaultyDisk, oserror


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    """The disk of every directory that is given by its path."""
    disk = FaultyDisk()
    monkeypatch.setattr(tracked_module, "directory_at", lambda path: directory_at(path, disk))
    return disk


def everything(pool: FBPool, path, tmp_path: Path) -> dict:
    """All calls that take a path."""
    pool["x"] = 1
    key = uuid4()
    return {
        "save": lambda: pool.save(path),
        "restore": lambda: pool.restore(path, replace=True),
        "from_checkpoint": lambda: FBPool.from_checkpoint(path, directory=tmp_path / "own", min_free=0),
        "persist": lambda: pool.persist("x", path),
        "fb.persist": lambda: pool.put("y", 1).persist(path),
        "register": lambda: pool.register(path, key),
        "register_all": lambda: pool.register_all(path),
        "open": lambda: TrackedDirectory(path),
        "read": lambda: TrackedDirectory(path, readonly=True),
    }


CALLS = list(everything({}, None, Path()))


# ------------------------------------------------------------------ paths


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("below", ["", "/below", "/far/below"])
def test_a_file_in_the_path_is_an_error_that_names_it_and_the_file_stays(pool, tmp_path, call, below):
    (tmp_path / "file").write_text("the user's")
    path = f"{tmp_path}/file{below}"
    with pytest.raises((StorageError, KeyError)) as caught:
        everything(pool, path, tmp_path)[call]()
    if call != "register":  # which looks for a key
        assert isinstance(caught.value, StorageError) and path in str(caught.value)
        assert "give a directory" in str(caught.value)
    assert (tmp_path / "file").read_text() == "the user's"
    pool.validate()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("path", [None, 3, b"bytes", ["ck"], 1.5], ids=repr)
def test_what_is_no_path_is_a_typeerror(pool, tmp_path, call, path):
    with pytest.raises(TypeError):
        everything(pool, path, tmp_path)[call]()
    pool.validate()


@pytest.mark.parametrize("call", ["save", "restore", "open", "read"])
def test_a_path_with_a_zero_is_an_error_and_nothing_else(pool, tmp_path, call):
    with pytest.raises((ValueError, StorageError)):
        everything(pool, f"{tmp_path}/a\0b", tmp_path)[call]()


@pytest.mark.parametrize("call", ["save", "restore", "open", "read", "persist"])
def test_an_unreadable_directory_is_an_error_that_names_it(pool, target, tmp_path, disk, call):
    pool["x"] = 1
    pool.save(target)
    with TrackedDirectory(target):
        pass
    directory_at(target, disk)._stamp = ""
    for name in ("listdir", "open", "lstat", "link"):
        disk.fail(name, error=oserror(errno.EACCES), times=None)
    with pytest.raises(StorageError, match=str(target)) as caught:
        everything(pool, target, tmp_path)[call]()
    assert caught.value.errno == errno.EACCES
    pool.validate()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["link", "makedirs", "fsync", "writev", "rename", "pwrite"])
def test_a_full_disk_is_a_diskfullerror_and_the_former_checkpoint_stands(
    pool, make_pool, target, disk, call, code
):
    pool["x"] = 1
    pool.save(target)
    former = blobs_in(target)
    pool["x"] = large(1)
    disk.fail(call, error=oserror(code))
    with pytest.raises(DiskFullError, match=r"[Ff]ree some space") as caught:
        pool.save(target)
    assert str(target) in str(caught.value) and caught.value.free > 0 and caught.value.errno == errno.ENOSPC
    assert versions_on(target) == [1] and blobs_in(target) == former
    pool.save(target)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_a_readonly_file_system_is_an_error_that_says_so(pool, target, disk, code):
    for call in ("makedirs", "writev", "pwrite", "rename", "link", "copy_range"):
        disk.fail(call, error=oserror(code), times=None)
    pool["x"] = 1
    for call in (
        lambda: pool.save(target),
        lambda: pool.persist("x", target),
        lambda: TrackedDirectory(target),
    ):
        with pytest.raises(StorageError, match="write") as caught:
            call()
        assert caught.value.errno == code and str(target) in str(caught.value)


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A file system in memory."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True)


def test_a_file_system_that_runs_full_keeps_the_former_checkpoint(make_pool, tmp_path):
    """Invariant 12, on a real one; blobs come there by copies, for it is another file system."""
    mount = tmp_path / "small"
    with mounted(mount, "size=8m"):
        pool = make_pool("50MB")
        pool["x"] = np.full(2**20, 1, np.uint8)
        pool.save(mount / "ck")
        former = blobs_in(mount / "ck")
        for number in range(9):
            pool[number] = np.full(2**20, number, np.uint8)
        for _ in range(3):
            with pytest.raises(DiskFullError) as caught:
                pool.save(mount / "ck")
            assert 0 <= caught.value.free < 8 * 2**20
            assert blobs_in(mount / "ck") == former and versions_on(mount / "ck") == [1]
            assert not list((mount / "ck").rglob(".*.tmp"))
        other = make_pool("50MB")
        other.restore(mount / "ck")
        assert other["x"].sum() == 2**20
        other.close()
        for number in range(4):
            pool.delete(number)
        assert pool.save(mount / "ck").names == ("x", 4, 5, 6, 7, 8)
        remounted = subprocess.run(["mount", "-o", "remount,ro", str(mount)], capture_output=True)
        if remounted.returncode == 0:
            with pytest.raises(StorageError) as caught:
                pool.save(mount / "ck")
            assert caught.value.errno == errno.EROFS
            other = make_pool("50MB")
            other.restore(mount / "ck")
            assert other[8][0] == 8
            other.close()
        pool.close()
        directory_at(mount / "ck")


# ------------------------------------------------------------------ manifests


@pytest.fixture
def two_versions(make_pool, target) -> Path:
    """Version 1 with x=1, tagged, and version 2 with x=2; returns the manifest of version 2."""
    with make_pool() as pool:
        pool["x"] = 1
        pool.save(target, tag="first")
        pool["x"] = 2
        pool.save(target, tag="second")
    return manifest_of(target, 2)


def as_another_format(path: Path, number: int) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<H", raw, 6, number)
    replaced(path, bytes(raw))


def as_a_socket(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def as_a(make):
    def instead(path: Path) -> None:
        path.unlink()
        make(path)

    return instead


DAMAGE = {
    "empty": (lambda path: replaced(path, b""), "does not start"),
    "truncated": (lambda path: replaced(path, path.read_bytes()[:-1]), "bytes"),
    "cut in its head": (lambda path: replaced(path, path.read_bytes()[:60]), "head"),
    "longer": (lambda path: replaced(path, path.read_bytes() + b"\0"), "bytes"),
    "flipped head": (lambda path: flip(path, 60), "checksum"),
    "flipped body": (lambda path: flip(path, -1), "checksum"),
    "flipped magic": (lambda path: flip(path, 0), "does not start"),
    "text": (lambda path: replaced(path, b"once upon a time there was a manifest" * 9), "does not start"),
    "newer": (lambda path: as_another_format(path, FORMAT + 1), "upgrade fbcache"),
    "format 0": (lambda path: as_another_format(path, 0), "format is 0"),
    "another's": (
        lambda path: replaced(path, path.with_name("0000000001.manifest").read_bytes()),
        "version 1",
    ),
    "a blob": (
        lambda path: replaced(path, next(path.parents[2].glob("??/*")).read_bytes()),
        "does not start",
    ),
    "a directory": (as_a(Path.mkdir), "something else"),
    "a fifo": (as_a(os.mkfifo), "something else"),
    "a link": (as_a(lambda path: path.symlink_to("0000000001.manifest")), "a link or a socket"),
    "a loop": (as_a(lambda path: path.symlink_to(path.name)), "a link or a socket"),
    "a socket": (as_a_socket, "a link or a socket"),
    "huge": (lambda path: replaced(path, path.read_bytes()[:8] + b"\xff" * 32), "head"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_manifest_that_is_not_what_was_written_is_named_and_keeps_no_other_from_opening(
    pool, make_pool, target, two_versions, kind
):
    damage, says = DAMAGE[kind]
    damage(two_versions)
    blobs = blobs_in(target)
    for choice in ({}, {"version": 2}, {"tag": "second"}):
        with pytest.raises(CorruptCheckpointError, match=says) as caught:
            pool.restore(target, **choice)
        assert caught.value.path == str(two_versions) and len(pool) == 0
    sound_head = kind in ("truncated", "longer", "flipped body")
    with contextlib.nullcontext() if sound_head else pytest.warns(FBCacheWarning, match="passed over"):
        assert pool.restore(target, tag="first").version == 1
    assert pool["x"] == 1
    directory_at(target)._stamp = ""  # as in a process that comes anew
    with TrackedDirectory(target) as tracked:
        with pytest.warns(FBCacheWarning, match=str(two_versions)):
            assert [c.version for c in tracked.checkpoints()] == [1]
        assert tracked.gc().kept == (str(two_versions),)
        report = tracked.verify()
        assert [damaged.path for damaged in report.damaged] == [str(two_versions)]
        pool["x"] = 3
        assert pool.save(tracked).version == 3
        assert blobs < blobs_in(target)  # what the damaged one names is not known, so all stays
    assert os.path.lexists(two_versions)
    assert make_pool().restore(target).version == 3


def test_a_manifest_renamed_to_another_version_says_whose_it_is(pool, target, two_versions):
    two_versions.rename(manifest_of(target, 7))
    with pytest.raises(CorruptCheckpointError, match="version 2") as caught:
        pool.restore(target)
    assert caught.value.path == str(manifest_of(target, 7))
    directory_at(target)._stamp = ""
    assert pool.save(target).version == 8


def test_a_manifest_that_is_not_readable_is_an_error_and_not_a_missing_one(pool, target, disk, two_versions):
    disk.fail("preadv", error=oserror(errno.EIO))
    with pytest.raises(StorageError, match=str(two_versions)):
        pool.restore(target)
    pool.restore(target)


def write_manifest(target: Path, version: int, names, keys, blobs) -> None:
    head = Head(
        version=version,
        tag=None,
        created=0.0,
        count=len(names),
        nbytes=sum(blob.nbytes for blob in blobs),
        disk_bytes=sum(blob.disk_bytes for blob in blobs),
        blobs_written=0,
        bytes_written=0,
        meta=None,
    )
    manifest_of(target, version).write_bytes(b"".join(pack(Manifest(head, names, keys, blobs))))


NASTY = ["../../../etc/passwd", "/etc/passwd", "..", ".", ".fbcache/lock", "a\0b", "~root", "\n", "C:\\x", ""]


def test_names_that_try_to_leave_the_directory_are_names(pool, make_pool, target, tmp_path):
    """Invariant 13: no name becomes a path."""
    for name in NASTY:
        pool[name] = [name]
    pool.save(target)
    other = make_pool()
    other.restore(target)
    assert {name: other[name] for name in other} == {name: [name] for name in NASTY}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "spill"]
    with TrackedDirectory(target) as tracked:
        assert tracked.verify().foreign == ()


def test_a_manifest_that_names_what_is_not_there_opens_and_its_entries_say_so(pool, target, two_versions):
    strange = [uuid4() for _ in range(3)]
    write_manifest(target, 3, ["a", "b", "c"], strange, [Blob(8, 64, "msgpack", None, 1)] * 3)
    pool.restore(target)
    for name, key in zip("abc", strange, strict=True):
        with pytest.raises(CorruptBlobError, match=r"gone|missing|no file") as caught:
            pool[name]
        assert caught.value.key == key and key.hex in caught.value.path
    directory_at(target)._stamp = ""
    with TrackedDirectory(target) as tracked:
        assert len(tracked.verify().damaged) == 3
    pool["mine"] = 1
    with pytest.raises((CorruptBlobError, StorageError)):
        pool.save(target)
    assert pool.save(target, ["mine"]).names == ("mine",)


@pytest.mark.files
def test_a_manifest_that_lies_about_its_values_cannot_break_the_pools_books(make_pool, target, two_versions):
    with TrackedDirectory(target, readonly=True) as tracked:
        manifest = tracked._directory.versions.read(2)
    key, blob = manifest.keys[0], manifest.blobs[0]
    for nbytes in (0, 2**62):
        lie = Blob(nbytes, 2**62, "no such codec", None, blob.digest)
        write_manifest(target, 3, ["x"], [key], [lie])
        pool = make_pool()
        pool.restore(target)
        assert pool["x"] == 2
        pool.validate()
        pool.evict()
        with pool.get_mut("x"):
            pass
        pool.validate()
        pool.close()


# ------------------------------------------------------------------ blobs


@pytest.fixture
def three(make_pool, target) -> dict:
    with make_pool() as pool:
        for name, value in {"x": large(1), "y": [2], "z": np.arange(500.0)}.items():
            pool[name] = value
        pool.save(target)
        return {name: pool.persist(name, target) for name in pool}


def exchange(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    replaced(one, second)
    replaced(other, first)


BLOB_DAMAGE = {
    "gone": (Path.unlink, "gone|missing|no file"),
    "empty": (lambda path: replaced(path, b""), "too short"),
    "truncated": (lambda path: replaced(path, path.read_bytes()[:-1]), "bytes|length|ends"),
    "longer": (lambda path: replaced(path, path.read_bytes() + b"\0"), "bytes|length"),
    "a directory": (as_a(Path.mkdir), "regular file"),
    "a fifo": (as_a(os.mkfifo), "regular file"),
    "a link": (as_a(lambda path: path.symlink_to("/etc/passwd")), "link"),
    "a socket": (as_a_socket, "."),
    "flipped": (lambda path: flip(path, 30), "checksum"),
    "a newer layout": (lambda path: flip(path, 6, 3), "version"),
}


@pytest.mark.parametrize("kind", BLOB_DAMAGE)
@pytest.mark.parametrize("name", ["x", "y"])
def test_a_damaged_blob_is_named_and_keeps_no_other_from_loading(make_pool, target, three, kind, name):
    damage, says = BLOB_DAMAGE[kind]
    path = blob_of(target, three[name])
    damage(path)
    pool = make_pool()
    pool.restore(target)
    for _ in range(2):
        with pytest.raises(CorruptBlobError, match=says) as caught:
            pool[name]
        assert caught.value.key == three[name] and caught.value.path == str(path)
    others = {"x": large(1), "y": [2], "z": np.arange(500.0)}
    del others[name]
    for other, value in others.items():
        assert np.array_equal(pool[other], value)
    pool.validate()
    if kind != "gone":
        for call in (lambda: pool.register(target, three[name]), lambda: pool.register_all(target)):
            with pytest.raises((CorruptBlobError, StorageError), match=str(path)):
                call()
    pool.validate()


def test_two_blobs_that_were_exchanged_are_both_found(make_pool, target, three):
    exchange(blob_of(target, three["y"]), blob_of(target, three["z"]))
    pool = make_pool(verify="never")
    pool.restore(target)
    for name in "yz":
        with pytest.raises(CorruptBlobError, match="key"):
            pool[name]
    assert (pool["x"] == large(1)).all()


# ------------------------------------------------------------------ arguments


CYCLE: list = []
CYCLE.append(CYCLE)
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"keep": 0}, ValueError, "at least 1"),
        ({"keep": -3}, ValueError, "at least 1"),
        ({"keep": True}, TypeError, "number of versions"),
        ({"keep": 1.5}, TypeError, "number of versions"),
        ({"keep": "1"}, TypeError, "number of versions"),
        ({"tag": 3}, TypeError, "a tag is a str"),
        ({"tag": b"t"}, TypeError, "a tag is a str"),
        ({"tag": ""}, ValueError, "at least one character"),
        ({"meta": 3}, TypeError, "meta is a dict"),
        ({"meta": [1]}, TypeError, "meta is a dict"),
        ({"meta": {"a": object()}}, TypeError, r"meta\['a'\]"),
        ({"meta": {"a": [1, {2}]}}, TypeError, r"meta\['a'\]\[1\]"),
        ({"meta": {"a": np.float64(1)}}, TypeError, r"meta\['a'\]"),
        ({"meta": {"a": 1 << 64}}, TypeError, "64 bits"),
        ({"meta": {"a": "\ud800"}}, TypeError, "surrogates"),
        ({"meta": {(1, 2): 3}}, TypeError, "key"),
        ({"meta": {"a": CYCLE}}, TypeError, "levels deep"),
        ({"meta": {"a": DEEP}}, TypeError, "levels deep"),
        ({"meta": {"a": [0] * 200_000}}, TypeError, "parts"),
        ({"change_key": 3}, TypeError, "function of the checkpoint"),
        ({"names": "x"}, TypeError, r"pass \['x'\]"),
        ({"names": 3}, TypeError, "."),
        ({"names": [[]]}, TypeError, "."),
        ({"names": ["no"]}, KeyError, "'no'"),
        ({"names": [uuid4()]}, KeyError, "."),
        ({"keep": 0, "names": ["no"]}, ValueError, "at least 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_argument_of_save_commits_and_leaves_nothing(pool, target, options, error, says):
    pool["x"] = 1
    with pytest.raises(error, match=says):
        pool.save(target, **options)
    assert not target.exists() or (versions_on(target) == [] and blobs_in(target) == set())
    assert pool.save(target).version == 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"version": "1"}, TypeError, "goes into tag="),
        ({"version": 1.0}, TypeError, "a version is an int"),
        ({"version": True}, TypeError, "a version is an int"),
        ({"tag": 1}, TypeError, "a tag is a str"),
        ({"tag": ""}, ValueError, "at least one character"),
        ({"before": "yesterday"}, TypeError, "a time is"),
        ({"before": True}, TypeError, "a time is"),
        ({"before": float("nan")}, ValueError, "a time is"),
        ({"before": np.datetime64("2020-01-01")}, TypeError, "a time is"),
        ({"version": 1, "tag": "t"}, ValueError, "not by several"),
        ({"version": 1, "before": 5}, ValueError, "not by several"),
        ({"tag": "t", "before": 5}, ValueError, "not by several"),
        ({"names": "x"}, TypeError, r"pass \['x'\]"),
        ({"names": b"x"}, TypeError, r"pass \[b'x'\]"),
        ({"names": 3}, TypeError, "."),
        ({"names": [[]]}, TypeError, "."),
        ({"names": ["no"]}, KeyError, "'no'"),
        ({"version": 2**70}, CheckpointNotFoundError, "no version"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_argument_of_restore_brings_nothing(pool, make_pool, target, options, error, says):
    pool["x"] = 1
    pool.save(target, tag="t")
    other = make_pool()
    with pytest.raises(error, match=says):
        other.restore(target, **options)
    assert len(other) == 0 and other.stats().entries == 0 and sessions_in(target) == []
    other.restore(target)


@pytest.mark.parametrize("name", [uuid4(), [], {}], ids=lambda n: type(n).__name__)
def test_a_name_that_cannot_be_one_registers_nothing(pool, target, name):
    key = pool.put("x", 1).persist(target)
    with pytest.raises(TypeError):
        pool.register(target, key, name)
    assert pool.stats().entries == 1 and sessions_in(target) == []
