"""``DirectoryStorage``: faults, kills and power loss leave the former snapshot or the new one, no more."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fbcache import DiskFullError, StorageError
from fbcache.actors import (
    ActorExistsError,
    CorruptSnapshotError,
    DirectoryStorage,
    PersistenceError,
    PersistenceKind,
    SnapshotNotFoundError,
)
from fbcache.actors.naming import name_of
from tests.actors.counters import Counter, KillingDisk, killed_at
from tests.faults import CALLS, FaultyDisk, oserror
from tests.powerloss import RecordingDisk, images

OLD, NEW = b"old" * 3000, b"new" * 5000


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}


def snapshot_of(path: Path, actor_id: str = "x") -> Path:
    return path / name_of(actor_id) / "snapshot"


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def storage(tmp_path: Path, disk: FaultyDisk) -> DirectoryStorage:
    storage = DirectoryStorage(tmp_path / "a", disk=disk)
    storage.try_write("x", OLD)
    return storage


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("data", [b"", b"a", b"ab" * 2047, b"x" * 4096, bytes(range(256)) * 5000])
def test_bytes_come_back_and_one_file_holds_them(tmp_path: Path, data: bytes) -> None:
    storage = DirectoryStorage(tmp_path / "deep" / "down")
    with pytest.raises(SnapshotNotFoundError):
        storage.try_read("x")
    storage.try_write("x", b"former")
    storage.try_write("x", data)
    assert DirectoryStorage(tmp_path / "deep" / "down").try_read("x") == data
    assert files_below(tmp_path / "deep" / "down") == {f"{name_of('x')}/snapshot"}
    assert snapshot_of(tmp_path / "deep" / "down").stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_an_error_and_stays(storage: DirectoryStorage, tmp_path: Path) -> None:
    file = snapshot_of(tmp_path / "a")
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100], whole + b"x", b"x" + whole[1:], whole[:-1] + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(CorruptSnapshotError, match="is damaged") as caught:
            storage.try_read("x")
        assert caught.value.where == str(file)
        assert file.read_bytes() == damaged
    storage.try_write("x", NEW)
    assert storage.try_read("x") == NEW


def test_what_lies_in_the_files_place_is_not_followed_or_waited_for(
    storage: DirectoryStorage, tmp_path: Path
) -> None:
    file = snapshot_of(tmp_path / "a")
    whole = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CorruptSnapshotError, match="no regular file"):
        storage.try_read("x")
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        storage.try_read("x")
    storage.try_write("x", NEW)
    assert (tmp_path / "elsewhere").read_bytes() == whole


def test_a_file_in_the_directorys_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="give a directory"):
            DirectoryStorage(path)
    storage = DirectoryStorage(tmp_path / "a")
    (tmp_path / "a" / name_of("x")).write_bytes(b"mine")
    with pytest.raises(StorageError):
        storage.try_write("x", NEW)
    with pytest.raises(PersistenceError) as caught:
        Counter.spawn_persistent(storage, "x", 1)
    assert caught.value.kind is PersistenceKind.IO
    assert (tmp_path / "a" / name_of("x")).read_bytes() == b"mine"


def test_foreign_files_are_left_alone(storage: DirectoryStorage, tmp_path: Path) -> None:
    inner = tmp_path / "a" / name_of("x")
    names = ["snapshot.tmp", "snapshot.zz.tmp", "notes", f"snapshot.{'0' * 32}.tmp.mine"]
    foreign = [inner / name for name in names] + [tmp_path / "a" / f"snapshot.{'0' * 32}.tmp"]
    for file in foreign:
        file.write_bytes(b"mine")
    ref = Counter.spawn_persistent(DirectoryStorage(tmp_path / "a"), "other", 1)
    ref.finish()
    storage.claim("x").release()
    storage.try_write("x", NEW)
    assert all(file.read_bytes() == b"mine" for file in foreign)


def test_writers_of_one_id_at_once_leave_one_whole_snapshot(
    storage: DirectoryStorage, disk: FaultyDisk, spawn: Any, tmp_path: Path
) -> None:
    gate = disk.gate("rename")
    first = spawn(storage.try_write, "x", NEW)
    gate.wait_reached()
    storage.try_write("x", OLD * 2)
    gate.open()
    first.result()
    assert storage.try_read("x") == NEW
    assert files_below(tmp_path / "a") == {f"{name_of('x')}/snapshot"}


# ------------------------------------------------------------------ faults


def calls_of(write: Any, disk: FaultyDisk) -> list[tuple[str, int]]:
    """Each system call of ``write``: its name, and its number among its kind."""
    start = len(disk.log)
    write()
    names = disk.log[start:]
    return [(name, names[: at + 1].count(name)) for at, name in enumerate(names)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_a_fault_at_any_call_of_a_write_leaves_one_whole_snapshot_and_no_litter(
    tmp_path: Path, first: bool, when: str
) -> None:
    def made(number: int) -> tuple[DirectoryStorage, FaultyDisk, Path]:
        disk = FaultyDisk()
        storage = DirectoryStorage(path := tmp_path / str(number), disk=disk)
        if not first:
            storage.try_write("x", OLD)
        return storage, disk, path

    storage, disk, _ = made(0)
    calls = calls_of(lambda: storage.try_write("x", NEW), disk)
    assert {"open", "writev", "fsync", "close", "rename"} <= {name for name, _ in calls}
    for number, (name, nth) in enumerate(calls, start=1):
        if (when, name) == ("after", "open"):  # no call of the kernel's opens and fails
            continue
        storage, disk, path = made(number)
        fail = disk.fail if when == "before" else disk.fail_after
        fail(name, error=oserror(errno.EIO), nth=nth)
        failed = None
        try:
            storage.try_write("x", NEW)
        except StorageError as error:
            failed = error
        assert failed is not None or name == "close", (name, nth)
        disk.clear()
        try:
            found = storage.try_read("x")
        except SnapshotNotFoundError:
            found = b""
        assert found in ((NEW,) if failed is None else (NEW, b"" if first else OLD)), (name, nth)
        assert files_below(path) <= {f"{name_of('x')}/snapshot"}, (name, nth)
        storage.try_write("x", NEW)
        assert storage.try_read("x") == NEW


def test_a_full_disk_names_the_bytes(storage: DirectoryStorage, disk: FaultyDisk) -> None:
    disk.fail("writev", error=oserror(errno.ENOSPC))
    with pytest.raises(DiskFullError, match="Free some space") as caught:
        storage.try_write("x", NEW)
    assert caught.value.needed >= len(NEW)
    assert storage.try_read("x") == OLD


def test_short_writes_are_gone_on_with(storage: DirectoryStorage, disk: FaultyDisk) -> None:
    disk.short("writev", 1000, times=5)
    disk.short("preadv", 700, times=5)
    storage.try_write("x", NEW)
    assert storage.try_read("x") == NEW


def test_a_failed_fsync_is_not_repeated_on_the_same_file(storage: DirectoryStorage, disk: FaultyDisk) -> None:
    disk.fail("fsync", error=oserror(errno.EIO))
    before = disk.count("open")
    with pytest.raises(StorageError):
        storage.try_write("x", NEW)
    assert disk.count("open") == before + 1 and disk.log[-1] == "unlink"
    storage.try_write("x", NEW)
    assert storage.try_read("x") == NEW


@pytest.mark.parametrize("call", ["open", "fstat", "preadv", "close"])
def test_a_failing_read_is_no_absence(storage: DirectoryStorage, disk: FaultyDisk, call: str) -> None:
    disk.fail(call, error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        storage.try_read("x")
    assert storage.try_read("x") == OLD


def test_the_content_is_durable_before_its_name_and_the_name_before_the_return(
    storage: DirectoryStorage, disk: FaultyDisk
) -> None:
    start = len(disk.log)
    storage.try_write("x", NEW)
    log = [call for call in disk.log[start:] if call in ("writev", "fsync", "rename")]
    assert log == ["writev", "fsync", "rename", "fsync"]


def test_a_directory_that_was_removed_is_made_and_its_name_durable_again(
    storage: DirectoryStorage, disk: FaultyDisk, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "a" / name_of("x"))
    start = len(disk.log)
    storage.try_write("x", NEW)
    assert storage.try_read("x") == NEW
    assert disk.log[start:].count("fsync") == 3, "the file, its directory, and the one above"


# ------------------------------------------------------------------ kills and power loss


def test_a_kill_at_any_call_leaves_the_former_or_the_new_state(tmp_path: Path) -> None:
    seen = set()
    for nth in range(100):
        path = tmp_path / str(nth)
        DirectoryStorage(path).try_write("x", OLD)

        def save(disk: KillingDisk, path: Path = path) -> None:
            storage = DirectoryStorage(path, disk=disk)
            held = storage.claim("x")
            storage.try_write("x", NEW)
            held.release()

        was_killed = killed_at(save, nth)
        storage = DirectoryStorage(path)
        seen.add(storage.try_read("x"))
        storage.claim("x").release()  # nobody holds the id, and the next one clears up
        assert files_below(path) == {f"{name_of('x')}/{name}" for name in ("snapshot", "lock")}
        if not was_killed:
            break
    assert not was_killed and nth > 15
    assert seen == {OLD, NEW}


def test_a_kill_at_any_call_of_the_first_save_leaves_nothing_or_the_state(tmp_path: Path) -> None:
    for nth in range(100):
        path = tmp_path / str(nth)

        def save(disk: KillingDisk, path: Path = path) -> None:
            DirectoryStorage(path, disk=disk).try_write("x", NEW)

        was_killed = killed_at(save, nth)
        try:
            assert DirectoryStorage(path).try_read("x") == NEW
        except SnapshotNotFoundError:
            assert was_killed
        if not was_killed:
            break
    assert not was_killed


def test_a_loss_of_power_leaves_the_former_or_the_new_state(tmp_path: Path) -> None:
    root = tmp_path / "real"
    root.mkdir()
    recording = RecordingDisk(root)
    storage = DirectoryStorage(root / "a", disk=recording)
    for number, data in enumerate((OLD, NEW)):
        storage.try_write("x", data)
        recording.mark(number)
    (built := tmp_path / "image").mkdir()
    for image in images(recording.log, 300):
        image.build(built, clear=True)
        try:
            found: bytes | None = DirectoryStorage(built / "a").try_read("x")
        except SnapshotNotFoundError:
            found = None
        allowed: tuple[bytes | None, ...] = {0: (None, OLD), 1: (OLD, NEW), 2: (NEW,)}[len(image.marks)]
        assert found in allowed, image


# ------------------------------------------------------------------ one live actor, across processes

HOLDER = """
import sys
from fbcache.actors import DirectoryStorage
held = DirectoryStorage(sys.argv[1]).claim("x")
print("held", flush=True)
sys.stdin.read()
"""


def test_an_id_that_lives_in_another_process_is_refused_with_host_and_pid(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        where = f"in process {holder.pid} on {os.uname().nodename}"
        with pytest.raises(ActorExistsError, match=where) as caught:
            Counter.spawn_persistent(DirectoryStorage(tmp_path), "x", 1)
        assert (caught.value.pid, caught.value.host) == (holder.pid, os.uname().nodename)
        Counter.spawn_persistent(DirectoryStorage(tmp_path), "y", 1).finish()
        holder.send_signal(signal.SIGKILL)
    Counter.spawn_persistent(DirectoryStorage(tmp_path), "x", 1).finish()


def test_a_forked_child_neither_keeps_nor_takes_its_parents_id(tmp_path: Path) -> None:
    from fbcache.actors.claims import claim

    held = claim(DirectoryStorage(tmp_path), "x")
    go_reading, go_writing = os.pipe()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)  # a test that fails must not leave it waiting
            try:
                claim(DirectoryStorage(tmp_path), "x")
                os.write(writing, b"t")
            except ActorExistsError as error:
                os.write(writing, b"r" if error.pid == os.getppid() else b"?")
            os.read(go_reading, 1)
        finally:
            os._exit(0)
    assert os.read(reading, 1) == b"r", "the child must not have it while the parent does"
    held.release()
    Counter.spawn_persistent(DirectoryStorage(tmp_path), "x", 1).finish()  # though the child still lives
    os.write(go_writing, b"g")
    os.waitpid(child, 0)
    for fd in (reading, writing, go_reading, go_writing):
        os.close(fd)


@pytest.mark.parametrize("call", sorted({"open", "lock", "pwrite", "makedirs", "preadv"} & set(CALLS)))
def test_an_id_that_cannot_be_claimed_is_an_io_error_and_is_free_again(tmp_path: Path, call: str) -> None:
    disk = FaultyDisk()
    storage = DirectoryStorage(tmp_path, disk=disk)
    disk.fail(call, error=oserror(errno.EACCES))
    with pytest.raises(PersistenceError) as caught:
        Counter.spawn_persistent(storage, "x", 1)
    assert caught.value.kind is PersistenceKind.IO
    Counter.spawn_persistent(storage, "x", 1).finish()


def test_a_lock_that_cannot_be_given_back_cleanly_is_free_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FaultyDisk()
    storage = DirectoryStorage(tmp_path, disk=disk)
    ref = Counter.spawn_persistent(storage, "x", 1)
    disk.fail("pwrite", error=oserror(errno.EIO))
    ref.finish()
    assert "not given back cleanly" in caplog.text
    Counter.spawn_persistent(storage, "x", 1).finish()
