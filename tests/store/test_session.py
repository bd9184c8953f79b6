"""Sessions: private, leased, reaped only when their owner is dead, and safe across a fork."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import platformdirs
import psutil
import pytest

from fbcache.codec.frames import Frames
from fbcache.errors import FBCacheWarning, StorageError
from fbcache.store import mounts, owner, reaper
from fbcache.store.disk import DISK
from fbcache.store.files import FileStore
from fbcache.store.mounts import file_system_of, warn_if_unsuitable
from fbcache.store.owner import Owner
from fbcache.store.reaper import LEASE, NEW_OWNER, OWNER, reap
from fbcache.store.session import Session
from tests.faults import FaultyDisk, oserror

AS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def no_warning_about_the_test_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_warned", True)


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def put_blob(session: str, key: UUID | None = None) -> Path:
    key = key or uuid4()
    FileStore(session).write(key, Frames("test", b"", [b"content"]))
    return Path(session, key.hex[:2], key.hex)


def is_locked(session: str | Path) -> bool:
    fd = os.open(f"{session}/{LEASE}", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def names_below(base: Path) -> list[str]:
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def dead_owner() -> Owner:
    """A process of this boot that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(child.pid).create_time()
    child.wait()
    return dataclasses.replace(Owner.current(), pid=child.pid, started=started)


def make_session(base: Path, owned_by: Owner | bytes) -> Path:
    """A session left behind, with a blob and a half-written one."""
    path = base / f"session-{uuid4().hex}"
    path.mkdir(parents=True, mode=0o700)
    (path / LEASE).touch(0o600)
    blob = put_blob(str(path))
    blob.with_name(f".{blob.name}.tmp").write_bytes(b"half")
    (path / OWNER).write_bytes(owned_by.to_bytes() if isinstance(owned_by, Owner) else owned_by)
    return path


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


# ------------------------------------------------------------------ reaping


def test_a_dead_session_is_reaped(tmp_path: Path, dead: Owner) -> None:
    path = make_session(tmp_path, dead)
    session = Session.open(tmp_path)
    assert not path.exists() and Path(session.path).exists()
    session.close()
    assert names_below(tmp_path) == []


def test_a_killed_process_is_reaped_even_as_a_zombie(tmp_path: Path) -> None:
    program = "import sys, time; from fbcache.store.session import Session; \
s = Session.open(sys.argv[1]); print(s.path, flush=True); time.sleep(600)"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        path = child.stdout.readline().strip()
        blob = put_blob(path)
        assert reap(str(tmp_path)) == [] and blob.exists(), "its owner lives"
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
        assert reap(str(tmp_path)) == [path]
    assert names_below(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "reaped"),
    [
        ({}, False),
        ({"host": "another"}, False),
        ({"host": "another", "boot_id": "another"}, False),
        ({"host": ""}, False),
        ({"boot_id": "another"}, True),
        ({"started": 1000.0}, True),
        ({"pid": -1}, False),
        ({"pid": 2**70}, False),
    ],
    ids=str,
)
def test_who_is_reaped_when_the_lock_is_free(tmp_path: Path, change: dict[str, object], reaped: bool) -> None:
    path = make_session(tmp_path, dataclasses.replace(Owner.current(), **change))  # type: ignore[arg-type]
    assert reap(str(tmp_path)) == ([str(path)] if reaped else [])
    assert path.exists() is not reaped


def test_nobody_is_reaped_while_the_lock_is_held(tmp_path: Path, dead: Owner) -> None:
    path = make_session(tmp_path, dead)
    fd = os.open(path / LEASE, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert reap(str(tmp_path)) == [] and (path / OWNER).exists()
    finally:
        os.close(fd)
    assert reap(str(tmp_path)) == [str(path)]


@pytest.mark.parametrize("missing", [OWNER, LEASE])
def test_without_an_owner_or_a_lock_it_is_left_alone(tmp_path: Path, dead: Owner, missing: str) -> None:
    path = make_session(tmp_path, dead)
    (path / missing).unlink()
    before = names_below(tmp_path)
    assert reap(str(tmp_path)) == [] and names_below(tmp_path) == before


def strange_owners() -> list[object]:
    good = json.loads(Owner("h", "b", 1, 1.0).to_bytes())
    return [
        b"",
        b"\xff\x00",
        b"[]",
        b"null",
        b"{" * 5000,
        json.dumps(good).encode()[:-1],
        {**good, "magic": "fbcache-session-2"},
        {**good, "pid": "1"},
        {**good, "pid": True},
        {**good, "pid": 1.0},
        {**good, "started": None},
        {**good, "extra": 1},
        {name: good[name] for name in ("magic", "host")},
    ]


@pytest.mark.parametrize("content", strange_owners(), ids=str)
def test_strange_owner_files_are_left_alone(tmp_path: Path, content: bytes | dict[str, object]) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    assert Owner.from_bytes(raw) is None
    path = make_session(tmp_path, raw)
    assert reap(str(tmp_path)) == [] and (path / OWNER).read_bytes() == raw


def test_an_owner_file_that_is_no_file_neither_blocks_nor_is_followed(tmp_path: Path, dead: Owner) -> None:
    (tmp_path / "owner").write_bytes(dead.to_bytes())
    makers: list[Callable[[Path], None]] = [
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(tmp_path / "owner"),
    ]
    for make in makers:
        path = make_session(tmp_path, dead)
        (path / OWNER).unlink()
        make(path / OWNER)
        assert reap(str(tmp_path)) == [] and path.exists()


def test_foreign_files_survive_reaping(tmp_path: Path, dead: Owner) -> None:
    """Invariant 13: neither in the session nor beside it, and nothing that only looks like a session."""
    path = make_session(tmp_path, dead)
    (path / "notes.txt").write_text("mine")
    beside = [tmp_path / "session-notes", tmp_path / f"session-{'A' * 32}", tmp_path / f"x-session-{'a' * 32}"]
    for directory in beside:
        directory.mkdir()
        (directory / OWNER).write_bytes(dead.to_bytes())
        (directory / LEASE).touch()
    (tmp_path / f"session-{'b' * 32}").write_text("a file")
    before = [name for name in names_below(tmp_path) if not name.startswith(path.name)]
    reap(str(tmp_path))
    assert names_below(tmp_path) == sorted([*before, path.name, f"{path.name}/notes.txt"])


def test_links_are_never_followed(tmp_path: Path, dead: Owner) -> None:
    """A base that others may write to: a session, a shard or a lock that points elsewhere."""
    base, elsewhere = tmp_path / "base", make_session(tmp_path / "elsewhere", dead)
    before = names_below(tmp_path / "elsewhere")
    base.mkdir()
    (base / elsewhere.name).symlink_to(elsewhere)
    shard = next(path for path in elsewhere.iterdir() if path.is_dir())
    linked_shard = make_session(base, dead)
    (linked_shard / shard.name).symlink_to(shard) if not (linked_shard / shard.name).exists() else None
    linked_lock = make_session(base, dead)
    (linked_lock / LEASE).unlink()
    (linked_lock / LEASE).symlink_to(elsewhere / LEASE)
    reap(str(base))
    assert names_below(tmp_path / "elsewhere") == before
    assert (base / elsewhere.name).is_symlink() and (linked_lock / OWNER).exists()


def test_another_users_session_is_left_alone(tmp_path: Path, dead: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_session(tmp_path, dead)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert reap(str(tmp_path)) == [] and (path / OWNER).exists()


def test_a_session_that_cannot_be_reaped_stops_neither_opening_nor_the_others(tmp_path: Path, dead: Owner) -> None:
    for _ in range(3):
        make_session(tmp_path, dead)
    disk = FaultyDisk()
    disk.fail("unlink", error=oserror(errno.EACCES))
    session = Session.open(tmp_path, disk=disk)
    assert len(list(tmp_path.iterdir())) == 2
    session.close()
    assert len(reap(str(tmp_path))) == 1


def test_a_base_that_cannot_be_listed_is_no_error(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail("listdir", error=oserror(errno.EACCES))
    session = Session.open(tmp_path, disk=disk)
    session.close()


@pytest.mark.parametrize("call", ["lock", "listdir", "unlink", "rmdir"])
def test_two_reapers_at_once(tmp_path: Path, dead: Owner, call: str) -> None:
    """One is held at each of its steps while the other goes through; the session goes, and neither fails."""
    make_session(tmp_path, dead)
    disk = FaultyDisk()
    gate = disk.gate(call, nth=2 if call == "listdir" else 1)  # the first listing is the base's
    slow = threading.Thread(target=reap, args=(str(tmp_path),), kwargs={"disk": disk})
    slow.start()
    gate.wait_reached()
    reap(str(tmp_path))
    gate.open()
    slow.join()
    assert names_below(tmp_path) == []


@pytest.mark.parametrize("call", ["mkdir", "open", "lock", "writev", "rename"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_session_being_made_is_not_reaped(tmp_path: Path, call: str, after: bool) -> None:
    """The race of a reaper with open, held at each of its steps."""
    disk = FaultyDisk()
    gate = disk.gate(call, after=after)
    made: list[Session] = []
    maker = threading.Thread(target=lambda: made.append(Session.open(tmp_path, disk=disk)))
    maker.start()
    gate.wait_reached()
    assert reap(str(tmp_path)) == []
    gate.open()
    maker.join()
    assert is_locked(made[0].path) and Path(made[0].path, OWNER).exists()
    assert not Path(made[0].path, NEW_OWNER).exists()
    made[0].close()


def test_sessions_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    first = Session.open(tmp_path)
    blob = put_blob(first.path)
    second = Session.open(tmp_path)
    assert blob.exists()
    second.close()
    assert blob.exists() and is_locked(first.path)
    first.close()
    assert names_below(tmp_path) == []


# ------------------------------------------------------------------ owners


def test_what_cannot_be_told_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    someone = dataclasses.replace(Owner.current(), pid=1)

    def denied(pid: int) -> None:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", denied)
    assert not someone.is_dead()


def test_without_boot_ids_the_process_decides(monkeypatch: pytest.MonkeyPatch, dead: Owner) -> None:
    monkeypatch.setattr(owner, "_boot_id", lambda: "")
    assert not dataclasses.replace(Owner.current(), boot_id="").is_dead()
    assert dataclasses.replace(dead, boot_id="").is_dead()


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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    pid, path = done.stdout.split()
    try:
        assert reap(str(tmp_path)) == [path]
    finally:
        os.kill(int(pid), signal.SIGKILL)


# ------------------------------------------------------------------ unsuitable file systems


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


def test_a_warning_turned_into_an_error_leaves_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_warned", False)
    monkeypatch.setattr(mounts, "file_system_of", lambda path: "tmpfs")
    with pytest.raises(FBCacheWarning):
        Session.open(tmp_path)
    assert names_below(tmp_path) == []


def test_this_machines_root_is_known() -> None:
    assert file_system_of("/proc/self") == "proc"


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
