"""Sessions: private, leased, and safe across a fork."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import platformdirs
import pytest

from fbcache.codec.frames import Frames
from fbcache.errors import StorageError
from fbcache.store import reaper
from fbcache.store.disk import DISK
from fbcache.store.files import FileStore
from fbcache.store.owner import Owner
from fbcache.store.reaper import LEASE, OWNER, reap
from fbcache.store.session import Session
from tests.faults import FaultyDisk, oserror
from tests.sessions import dead_owner, is_locked, names_below, put_blob

AS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def dead() -> Owner:
    return dead_owner()


# ------------------------------------------------------------------ opening and closing


def test_a_session_is_private_leased_and_says_whose_it_is(tmp_path: Path) -> None:
    session = Session.open(tmp_path / "made" / "for it")
    path = Path(session.path)
    assert path.parent == tmp_path / "made" / "for it"
    assert [name for name in os.listdir(path) if name not in (OWNER, LEASE)] == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o700 == stat.S_IMODE(path.parent.stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}
    assert Owner.from_bytes((path / OWNER).read_bytes()) == Owner.current()
    assert is_locked(path)
    session.close()
    session.close()
    assert names_below(tmp_path / "made" / "for it") == []


def test_the_default_is_the_users_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    session = Session.open(None)
    assert Path(session.path).parent == tmp_path / "fbcache" / "spill"
    session.close()


def test_a_relative_directory_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session.open("spill")
    monkeypatch.chdir("/")
    assert session.path.startswith(f"{tmp_path}/spill/")
    session.close()
    assert names_below(tmp_path) == ["spill"]


def test_close_removes_blobs_and_leaves_foreign_files(tmp_path: Path) -> None:
    """Invariant 13."""
    session = Session.open(tmp_path)
    path = Path(session.path)
    blob = put_blob(session.path)
    other_shard = "00" if blob.name[:2] != "00" else "01"
    foreign = [
        path / "notes.txt",
        blob.parent / "notes.txt",
        blob.parent / f"{blob.name}.bak",
        blob.parent / f"{other_shard}{uuid4().hex[2:]}",
        path / uuid4().hex,
    ]
    for file in foreign:
        file.write_text("mine")
    (path / "0a").symlink_to(tmp_path)
    session.close()
    kept = [*foreign, path / "0a", path, blob.parent]
    assert names_below(tmp_path) == sorted(str(file.relative_to(tmp_path)) for file in kept)


def test_close_of_a_session_that_vanished(tmp_path: Path) -> None:
    session = Session.open(tmp_path)
    for file in Path(session.path).iterdir():
        file.unlink()
    Path(session.path).rmdir()
    session.close()


def test_a_close_that_fails_gives_the_lease_up_and_keeps_the_session_reapable(tmp_path: Path) -> None:
    disk = FaultyDisk()
    session = Session.open(tmp_path, disk=disk)
    blob = put_blob(session.path)
    disk.fail("unlink", error=oserror(errno.EIO))
    with pytest.raises(StorageError, match="Remove it by hand") as caught:
        session.close()
    assert caught.value.path == session.path
    assert blob.exists() and Path(session.path, OWNER).exists() and not is_locked(session.path)
    session.close()


@pytest.mark.parametrize("call", ["mkdir", "open", "lock", "writev", "rename", "makedirs"])
@pytest.mark.parametrize("error", [oserror(errno.EROFS), KeyboardInterrupt()], ids=["EROFS", "interrupt"])
def test_an_open_that_fails_leaves_nothing(tmp_path: Path, call: str, error: BaseException) -> None:
    disk = FaultyDisk()
    disk.fail(call, error=error)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        Session.open(tmp_path, disk=disk)
    if isinstance(caught.value, StorageError):
        assert caught.value.path == str(tmp_path) and "directory='/path'" in str(caught.value)
    assert names_below(tmp_path) == []


def test_a_file_in_the_way_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"file.*Give a directory") as caught:
            Session.open(path)
        assert caught.value.path == str(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Give a directory"):
        Session.open(tmp_path)


def test_a_store_in_a_session(tmp_path: Path) -> None:
    session = Session.open(tmp_path)
    store = FileStore(session.path)
    key = uuid4()
    store.write(key, Frames("test", b"", [b"content"]))
    store.close()
    assert sorted(os.listdir(session.path)) == [LEASE, OWNER]
    session.close()
    assert names_below(tmp_path) == []


def test_the_lock_is_filelocks(tmp_path: Path) -> None:
    """Leased with filelock: another program's FileLock on the same file sees the lease."""
    import filelock

    session = Session.open(tmp_path)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(f"{session.path}/{LEASE}").acquire(blocking=False)
    session.close()
    assert reaper.reap(str(tmp_path), disk=DISK) == []


# ------------------------------------------------------------------ forks


def run_in_child(work: Callable[[], None]) -> None:
    """Fork, and let the child end as a program does: through sys.exit, atexit and all."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_that_abandons_the_session_takes_nothing_with_it(tmp_path: Path) -> None:
    session = Session.open(tmp_path)
    blob = put_blob(session.path)

    def child() -> None:
        before = len(os.listdir("/proc/self/fd"))
        session.abandon_in_child()
        session.abandon_in_child()
        assert len(os.listdir("/proc/self/fd")) == before - 1
        session.close()
        assert reap(str(tmp_path)) == []

    run_in_child(child)
    assert blob.exists() and is_locked(session.path) and Path(session.path, OWNER).exists()
    session.close()
    assert names_below(tmp_path) == []


def test_close_in_a_child_that_did_not_abandon_takes_nothing_with_it(tmp_path: Path) -> None:
    session = Session.open(tmp_path)
    blob = put_blob(session.path)
    run_in_child(session.close)
    assert blob.exists() and is_locked(session.path)
    session.close()


def test_a_child_that_exits_normally_neither_unlocks_nor_removes(tmp_path: Path) -> None:
    """A whole program: the child leaves through sys.exit, with atexit handlers and garbage collection."""
    program = """
import atexit, gc, os, sys
from fbcache.store.session import Session
session = Session.open(sys.argv[1])
os.register_at_fork(after_in_child=session.abandon_in_child)
atexit.register(session.close)
pid = os.fork()
if pid == 0:
    gc.collect()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
import fcntl
fd = os.open(session.path + "/lease.lock", os.O_RDWR)
try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("locked", sorted(os.listdir(session.path)))
os.close(fd)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"locked {[LEASE, OWNER]}"
    assert names_below(tmp_path) == [], "the parent's own exit closes the session"


def test_the_lease_ends_with_the_parent_not_with_its_children(tmp_path: Path) -> None:
    """A worker that outlives the process whose pool it inherited must not keep the session for good."""
    program = """
import os, signal, sys
from fbcache.store.session import Session
session = Session.open(sys.argv[1])
os.register_at_fork(after_in_child=session.abandon_in_child)
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(read)
    os.write(write, b"x")
    signal.pause()
os.read(read, 1)
print(pid, session.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, path = parent.stdout.readline().split()
        parent.wait()
        try:
            assert reap(str(tmp_path)) == [path]
        finally:
            os.kill(int(pid), signal.SIGKILL)
