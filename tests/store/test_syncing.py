"""make_durable, for invariant 12: the order of syncs, each tried once, and what a failure puts in doubt."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fbcache.store import syncing
from fbcache.store.syncing import SYNCFS_FROM, Job, NotDurableError, make_durable, one_by_one
from tests.faults import PATIENCE, FaultyDisk, Gate, oserror


class SyncDisk(FaultyDisk):
    """Knows which paths were synced, and fails or holds up those that a test names.

    Attributes
    ----------
    synced : list of str
        Every path that an fsync was begun for.
    bad : dict of str to BaseException
        What the fsync of a path raises.
    gates : dict of str to Gate
        Where the fsync of a path waits before it fails or works.
    """

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[str] = []
        self.bad: dict[str, BaseException] = {}
        self.gates: dict[str, Gate] = {}

    def fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        self.synced.append(path)
        if path in self.gates:
            self.gates[path].pass_through()
        if path in self.bad:
            raise self.bad[path]
        super().fsync(fd)


@pytest.fixture
def disk() -> SyncDisk:
    return SyncDisk()


@pytest.fixture
def root(tmp_path: Path) -> str:
    return os.path.realpath(tmp_path)


@pytest.fixture
def directories(root: str) -> list[str]:
    made = [f"{root}/{number:02x}" for number in range(3)]
    for directory in made:
        os.mkdir(directory)
    return made


@pytest.fixture
def make_files(directories: list[str]) -> Callable[[int], list[str]]:
    def make(count: int) -> list[str]:
        files = [f"{directories[number % 3]}/{number:04}" for number in range(count)]
        for file in files:
            Path(file).write_bytes(b"content")
        return files

    return make


@pytest.fixture
def files(make_files: Callable[[int], list[str]]) -> list[str]:
    return make_files(5)


@pytest.fixture
def syncfs_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let syncfs be relied on here, whatever the file system."""
    monkeypatch.setattr(syncing, "_syncfs_tells", lambda root: True)


def side_by_side(jobs: Sequence[Job]) -> list[BaseException | None]:
    with ThreadPoolExecutor(4) as executor:
        return [future.exception() for future in [executor.submit(job) for job in jobs]]


# ------------------------------------------------------------------ each by itself


@pytest.mark.parametrize("fan_out", [one_by_one, side_by_side])
def test_each_is_synced_once_and_all_files_before_any_directory(
    disk: SyncDisk,
    root: str,
    files: list[str],
    directories: list[str],
    fan_out: Callable[[Sequence[Job]], list[BaseException | None]],
) -> None:
    make_durable(disk, root, [*files, *files], [*directories, *directories, root], fan_out=fan_out)
    assert sorted(disk.synced[:5]) == sorted(files)
    assert sorted(disk.synced[5:]) == sorted([*directories, root])
    assert disk.count("syncfs") == 0


def test_the_last_file_is_done_before_the_first_directory_is_begun(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    gate = disk.gates[files[0]] = Gate()
    maker = threading.Thread(
        target=make_durable, args=(disk, root, files, directories), kwargs={"fan_out": side_by_side}
    )
    maker.start()
    try:
        gate.wait_reached()
        assert not set(disk.synced) & set(directories)
    finally:
        gate.open()
        maker.join(PATIENCE)
    assert disk.synced[5:] and not set(disk.synced[5:]) - set(directories)


def test_nothing_to_do_is_nothing_done(disk: SyncDisk, root: str) -> None:
    make_durable(disk, root, [], [])
    assert disk.log == []


def test_directories_alone(disk: SyncDisk, root: str, directories: list[str]) -> None:
    make_durable(disk, root, (), directories)
    assert disk.synced == directories


def test_jobs_are_handed_out_in_bounded_numbers(
    disk: SyncDisk, root: str, files: list[str], directories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncing, "_BATCH", 2)
    numbers = []

    def fan_out(jobs: Sequence[Job]) -> list[BaseException | None]:
        numbers.append(len(jobs))
        return one_by_one(jobs)

    make_durable(disk, root, files, directories, fan_out=fan_out)
    assert numbers == [2, 2, 1, 2, 1]
    assert disk.synced == files + directories
    disk.bad[files[1]] = oserror(errno.EIO)
    numbers.clear()
    with pytest.raises(NotDurableError):
        make_durable(disk, root, files, directories, fan_out=fan_out)
    assert numbers == [2]


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINVAL])
def test_a_file_that_fails_is_named_not_tried_again_and_the_end(
    disk: SyncDisk, root: str, files: list[str], directories: list[str], code: int
) -> None:
    disk.bad[files[2]] = oserror(code)
    with pytest.raises(NotDurableError) as caught:
        make_durable(disk, root, files, directories)
    assert caught.value.files == {files[2]} and caught.value.directories == frozenset()
    assert caught.value.cause is disk.bad[files[2]] is caught.value.__cause__
    assert caught.value.errno == code
    assert files[2] in str(caught.value) and os.strerror(code) in str(caught.value)
    assert disk.synced == files[:3]


@pytest.mark.parametrize("close_fails", [False, True])
def test_a_directory_that_fails_leaves_no_file_in_doubt(
    disk: SyncDisk, root: str, files: list[str], directories: list[str], close_fails: bool
) -> None:
    disk.bad[directories[1]] = oserror(errno.EIO)
    if close_fails:
        disk.fail("close", error=oserror(errno.EINTR), times=None)
    with pytest.raises(NotDurableError) as caught:
        make_durable(disk, root, files, directories)
    assert caught.value.files == frozenset() and caught.value.directories == {directories[1]}
    assert caught.value.errno == errno.EIO
    assert disk.synced == files + directories[:2]


def test_a_file_system_without_fsync_of_directories_is_taken_as_it_is(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    disk.bad[directories[0]] = oserror(errno.EINVAL)
    make_durable(disk, root, files, directories)
    assert disk.synced == files + directories


def test_a_close_that_fails_after_a_sync_that_worked_is_no_failure(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    disk.fail("close", error=oserror(errno.EIO), times=None)
    make_durable(disk, root, files, directories)
    assert disk.synced == files + directories


def test_those_under_way_are_finished_and_the_others_not_begun(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    gate = disk.gates[files[0]] = Gate()
    disk.bad[files[1]] = oserror(errno.EIO)
    fan_out = first_held_up(gate)
    with pytest.raises(NotDurableError) as caught:
        make_durable(disk, root, files, directories, fan_out=fan_out)
    assert caught.value.files == {files[1]}
    assert disk.synced == files[:2]


def test_two_that_fail_side_by_side_are_both_in_doubt(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    gate = disk.gates[files[0]] = Gate()
    disk.bad = {files[0]: oserror(errno.ENOSPC), files[1]: oserror(errno.EIO)}
    with pytest.raises(NotDurableError, match="and 1 more") as caught:
        make_durable(disk, root, files, directories, fan_out=first_held_up(gate))
    assert caught.value.files == set(files[:2])
    assert caught.value.cause is disk.bad[files[1]], "the first that failed"
    assert disk.synced == files[:2]


def first_held_up(gate: Gate) -> Callable[[Sequence[Job]], list[BaseException | None]]:
    """Begin the first job, run the others while it stands at ``gate``, then let it end."""

    def fan_out(jobs: Sequence[Job]) -> list[BaseException | None]:
        first = threading.Thread(target=jobs[0])
        first.start()
        try:
            gate.wait_reached()
            outcomes = one_by_one(jobs[1:])
        finally:
            gate.open()
            first.join(PATIENCE)
        return [None, *outcomes]

    return fan_out


def test_a_file_that_cannot_be_opened_counts_as_failed(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    os.unlink(files[1])
    with pytest.raises(NotDurableError) as caught:
        make_durable(disk, root, files, directories)
    assert caught.value.files == {files[1]} and caught.value.errno == errno.ENOENT
    assert disk.synced == files[:1]


@pytest.mark.parametrize(
    ("put", "code"),
    [
        pytest.param(lambda path: os.symlink(os.path.dirname(path), path), errno.ELOOP, id="link"),
        pytest.param(os.mkfifo, errno.EINVAL, id="pipe"),
    ],
)
def test_what_stands_in_a_files_place_is_a_failure_at_once(
    disk: SyncDisk, root: str, files: list[str], put: Callable[[str], None], code: int
) -> None:
    os.unlink(files[0])
    put(files[0])
    with pytest.raises(NotDurableError) as caught:
        make_durable(disk, root, files, [])
    assert caught.value.files == {files[0]} and caught.value.errno == code


def test_a_file_in_a_directorys_place_is_a_failure(disk: SyncDisk, root: str, files: list[str]) -> None:
    with pytest.raises(NotDurableError) as caught:
        make_durable(disk, root, [], [files[0]])
    assert caught.value.directories == {files[0]} and caught.value.errno == errno.ENOTDIR


def test_an_interrupt_ends_it_at_once_as_itself(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    disk.bad[files[1]] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        make_durable(disk, root, files, directories)
    assert disk.synced == files[:2]


def test_what_a_job_raises_besides_is_raised_as_it_is_even_beside_a_failure(
    disk: SyncDisk, root: str, files: list[str], directories: list[str]
) -> None:
    gate = disk.gates[files[0]] = Gate()
    disk.bad = {files[0]: KeyboardInterrupt(), files[1]: oserror(errno.EIO)}

    def fan_out(jobs: Sequence[Job]) -> list[BaseException | None]:
        with ThreadPoolExecutor(1) as executor:
            first = executor.submit(jobs[0])
            gate.wait_reached()
            outcomes = one_by_one(jobs[1:])
            gate.open()
            return [first.exception(), *outcomes]

    with pytest.raises(KeyboardInterrupt):
        make_durable(disk, root, files, directories, fan_out=fan_out)
    assert disk.synced == files[:2]


def test_one_by_one_has_an_outcome_for_each_in_order() -> None:
    errors = [ValueError("first"), OSError("third")]

    def fail(error: Exception) -> None:
        raise error

    assert one_by_one([]) == []
    jobs = [lambda: fail(errors[0]), lambda: None, lambda: fail(errors[1])]
    assert one_by_one(jobs) == [errors[0], None, errors[1]]


# ------------------------------------------------------------------ syncfs


@pytest.mark.usefixtures("syncfs_tells")
class TestSyncfs:
    @pytest.fixture
    def many(self, make_files: Callable[[int], list[str]]) -> list[str]:
        return make_files(SYNCFS_FROM)

    def test_it_takes_the_place_of_many_fsyncs(
        self, disk: SyncDisk, root: str, many: list[str], directories: list[str]
    ) -> None:
        make_durable(disk, root, many, directories)
        assert disk.log == ["open", "syncfs", "close"]

    def test_it_does_not_of_fewer(
        self, disk: SyncDisk, root: str, many: list[str], directories: list[str]
    ) -> None:
        make_durable(disk, root, many[1:], directories)
        assert disk.synced == many[1:] + directories and disk.count("syncfs") == 0

    def test_without_it_each_is_synced(
        self, disk: SyncDisk, root: str, many: list[str], directories: list[str]
    ) -> None:
        disk.fail("syncfs", error=oserror(errno.ENOSYS))
        make_durable(disk, root, many, directories)
        assert disk.synced == many + directories and disk.count("syncfs") == 1

    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EPERM])
    def test_when_it_fails_everything_is_in_doubt_and_nothing_is_tried_again(
        self, disk: SyncDisk, root: str, many: list[str], directories: list[str], code: int
    ) -> None:
        disk.fail("syncfs", error=oserror(code))
        with pytest.raises(NotDurableError) as caught:
            make_durable(disk, root, many, directories)
        assert caught.value.files == set(many) and caught.value.directories == set(directories)
        assert caught.value.errno == caught.value.cause.errno == code
        assert disk.log == ["open", "syncfs", "close"]

    def test_a_root_that_cannot_be_opened_puts_no_file_in_doubt(
        self, disk: SyncDisk, root: str, many: list[str], directories: list[str]
    ) -> None:
        disk.fail("open", error=oserror(errno.EMFILE))
        with pytest.raises(NotDurableError) as caught:
            make_durable(disk, root, many, directories)
        assert caught.value.files == frozenset() and caught.value.directories == {root}
        assert disk.log == ["open"]

    @pytest.mark.parametrize("code", [None, errno.EIO])
    def test_a_close_that_fails_changes_nothing(
        self, disk: SyncDisk, root: str, many: list[str], directories: list[str], code: int | None
    ) -> None:
        disk.fail("close", error=oserror(errno.EINTR))
        if code is None:
            make_durable(disk, root, many, directories)
            return
        disk.fail("syncfs", error=oserror(code))
        with pytest.raises(NotDurableError) as caught:
            make_durable(disk, root, many, directories)
        assert caught.value.errno == code

    def test_an_interrupt_is_raised_as_itself(
        self, disk: SyncDisk, root: str, many: list[str], directories: list[str]
    ) -> None:
        disk.fail("syncfs", error=KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_durable(disk, root, many, directories)
        assert disk.log == ["open", "syncfs", "close"]


@pytest.mark.parametrize(
    ("release", "kind", "tells"),
    [
        ("5.17.0", "ext4", True),
        ("6.8.0-45-generic", "xfs", True),
        ("6.1", "btrfs", True),
        ("5.16.20", "ext4", False),
        ("4.19.0", "ext4", False),
        ("unheard of", "ext4", False),
        ("6.8.0", "overlay", False),
        ("6.8.0", "fuse.sshfs", False),
        ("6.8.0", "nfs4", False),
        ("6.8.0", "", False),
    ],
)
def test_where_syncfs_does_not_tell_of_every_failure_each_is_synced(
    disk: SyncDisk,
    root: str,
    directories: list[str],
    make_files: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    kind: str,
    tells: bool,
) -> None:
    machine = os.uname_result(("Linux", "host", release, "version", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: machine)
    monkeypatch.setattr(syncing, "file_system_of", lambda path: kind if path == root else "other")
    files = make_files(SYNCFS_FROM)
    make_durable(disk, root, files, directories)
    assert disk.count("syncfs") == tells
    assert disk.synced == ([] if tells else files + directories)
