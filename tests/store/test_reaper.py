"""Reaping: only what is known to be dead, only what is fbcache's, and by several at once."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fbcache.store import owner
from fbcache.store.disk import DISK
from fbcache.store.owner import Owner
from fbcache.store.reaper import LEASE, NEW_OWNER, OWNER, reap
from fbcache.store.session import Session
from tests.faults import FaultyDisk, oserror
from tests.sessions import dead_owner, is_locked, make_session, names_below, put_blob


@pytest.fixture(scope="module")
def dead() -> Owner:
    return dead_owner()


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


def test_a_dead_owners_without_a_lock_is_reaped(tmp_path: Path, dead: Owner) -> None:
    path = make_session(tmp_path, dead)
    (path / LEASE).unlink()
    assert reap(str(tmp_path)) == [str(path)] and not path.exists()


def test_one_that_is_being_made_is_left_alone(tmp_path: Path, dead: Owner) -> None:
    path = make_session(tmp_path, dead)
    (path / OWNER).unlink()
    for name in names_below(path):
        if name not in (LEASE, OWNER):
            found = path / name
            if found.is_file():
                found.unlink()
    for shard in [found for found in path.iterdir() if found.is_dir()]:
        shard.rmdir()
    before = names_below(tmp_path)
    assert reap(str(tmp_path)) == [] and names_below(tmp_path) == before
    os.utime(path, (0, 0))  # given up long ago
    assert reap(str(tmp_path)) == [str(path)]


@pytest.mark.parametrize("owner", [None, b"", bytes(200), b"{" * 5000, b"\xff\x00", b'{"magic": "fbcache-se'])
@pytest.mark.parametrize("lease", [True, False])
def test_one_whose_owners_file_a_power_loss_took_is_reaped(
    tmp_path: Path, dead: Owner, owner: bytes | None, lease: bool
) -> None:
    path = make_session(tmp_path, dead)
    (path / "0000000001.manifest").write_bytes(b"x")
    (path / OWNER).unlink()
    if owner is not None:
        (path / OWNER).write_bytes(owner)
    if not lease:
        (path / LEASE).unlink()
    assert reap(str(tmp_path)) == [str(path)] and not path.exists()


def test_one_without_an_owners_file_that_is_locked_is_left_alone(tmp_path: Path, dead: Owner) -> None:
    path = make_session(tmp_path, dead)
    (path / "0000000001.manifest").write_bytes(b"x")
    (path / OWNER).write_bytes(b"")
    fd = os.open(path / LEASE, os.O_RDWR)
    try:
        assert DISK.lock(fd)
        assert reap(str(tmp_path)) == [] and path.exists()
    finally:
        os.close(fd)


def strange_owners() -> list[object]:
    good = json.loads(Owner("h", "b", 1, 1.0).to_bytes())
    return [
        b"[]",
        b"null",
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
    beside = [
        tmp_path / "session-notes",
        tmp_path / f"session-{'A' * 32}",
        tmp_path / f"x-session-{'a' * 32}",
    ]
    for directory in beside:
        directory.mkdir()
        (directory / OWNER).write_bytes(dead.to_bytes())
        (directory / LEASE).touch()
    (tmp_path / f"session-{'b' * 32}").write_text("a file")
    before = [name for name in names_below(tmp_path) if not name.startswith(path.name)]
    reap(str(tmp_path))
    assert names_below(tmp_path) == sorted([*before, path.name, f"{path.name}/notes.txt"])


def put_manifests(session: Path) -> list[Path]:
    """A reader's links to two manifests, which are returned, and what only looks like one."""
    elsewhere = session.parent.parent / "0000000001.manifest"
    elsewhere.write_text("the directory's own")
    links = [session / "0000000001.manifest", session / "9999999999.manifest"]
    for link in links:
        link.hardlink_to(elsewhere)
    foreign = [
        "000000001.manifest",
        "00000000011.manifest",
        "000000000a.manifest",
        "\u0661000000000.manifest",
    ]
    foreign += ["0000000001.manifest.bak", ".0000000001.manifest", "0000000001", ".0000000001.tmp"]
    for name in foreign:
        (session / name).write_text("mine")
    (session / "0000000002.manifest").mkdir()
    shard = session / "ff"
    shard.mkdir(exist_ok=True)
    (shard / "0000000001.manifest").write_text("mine")
    return links


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dead"])
def test_a_readers_links_to_manifests_go_with_its_session(tmp_path: Path, dead: Owner, closed: bool) -> None:
    """Invariant 13: those names and no others, and only in the session itself; the manifest stays."""
    base = tmp_path / "readers"
    if closed:
        session = Session.open(base)
        path = Path(session.path)
        put_blob(session.path)
    else:
        path = make_session(base, dead)
    ours = {OWNER, LEASE, *(name for name in names_below(path) if not (path / name).is_file())}
    links = put_manifests(path)
    before = {name for name in names_below(path) if not re.fullmatch(r"../\.?[0-9a-f]{32}(\.tmp)?", name)}
    if closed:
        session.close()
    else:
        assert reap(str(base)) == []
    kept = before - ours - {link.name for link in links} | {"ff"}
    assert names_below(path) == sorted(kept)
    assert (tmp_path / "0000000001.manifest").stat().st_nlink == 1


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dead"])
def test_a_session_of_blobs_and_manifests_leaves_nothing(tmp_path: Path, dead: Owner, closed: bool) -> None:
    session = Session.open(tmp_path)
    path = Path(session.path) if closed else make_session(tmp_path, dead)
    (path / "0000000001.manifest").write_text("a manifest")
    if not closed:
        assert reap(str(tmp_path)) == [str(path)]
    session.close()
    assert names_below(tmp_path) == []


def test_an_owner_outlasts_the_manifests(tmp_path: Path, dead: Owner) -> None:
    """A reaper that dies at one is followed by another."""
    path = make_session(tmp_path, dead)
    (path / "0000000001.manifest").write_text("a manifest")
    disk = FaultyDisk()
    disk.fail("unlink", error=oserror(errno.EIO), nth=1)
    assert reap(str(tmp_path), disk=disk) == [] and (path / OWNER).exists()
    assert reap(str(tmp_path)) == [str(path)]


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


def test_another_users_session_is_left_alone(
    tmp_path: Path, dead: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_session(tmp_path, dead)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert reap(str(tmp_path)) == [] and (path / OWNER).exists()


def test_a_session_that_cannot_be_reaped_stops_neither_opening_nor_the_others(
    tmp_path: Path, dead: Owner
) -> None:
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
