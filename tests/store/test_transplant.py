"""transplant and copy_checked: every way there is, every fault on it, and nothing left of a copy that failed.

Ways are forced by failing the calls before them; reflinks, which few file systems have, are acted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from fbcache.codec.layout import PREFIX_SIZE, pack, read_prefix, unpack_header
from fbcache.errors import CorruptBlobError
from fbcache.store import transplant as module
from fbcache.store.disk import Disk
from fbcache.store.transplant import Way, copy_checked, transplant
from tests.blobs import LARGE, SMALL, files_below, frames_of
from tests.faults import FaultyDisk, oserror
from tests.interrupts import Interrupter

#: Each way, and the calls that have to fail before it is gone.
BEFORE = {
    Way.LINK: [],
    Way.CLONE: ["link"],
    Way.RANGE: ["link", "clone"],
    Way.COPY: ["link", "clone", "copy_range"],
}
COPIES = [Way.CLONE, Way.RANGE, Way.COPY]

#: Small enough that blobs have several; not a multiple of anything.
PIECE = 5000


class Place:
    """A blob in one directory, and a shard in another that it is to get to."""

    def __init__(self, directory: Path, *sizes: int) -> None:
        self.key = uuid4()
        self.content = b"".join(pack(self.key, frames_of(*sizes)).pieces)
        self.from_directory, self.shard = directory / "from", directory / "to"
        self.from_directory.mkdir(parents=True)
        self.shard.mkdir()
        self.source = self.from_directory / self.key.hex
        self.target = self.shard / self.key.hex
        self.temporary = self.shard / f".{self.key.hex}.tmp"
        self.source.write_bytes(self.content)

    def go(self, disk: Disk) -> Way:
        return transplant(disk, str(self.source), str(self.target), str(self.temporary))

    def go_checked(self, disk: Disk, key: UUID | None = None) -> None:
        copy_checked(disk, str(self.source), str(self.target), str(self.temporary), key or self.key)

    def assert_made(self) -> None:
        assert self.target.read_bytes() == self.content
        assert files_below(self.shard) == [self.key.hex], "a temporary file was left"
        self.assert_source_is_well()

    def assert_nothing_made(self) -> None:
        assert files_below(self.shard) == []
        self.assert_source_is_well()

    def assert_source_is_well(self) -> None:
        assert self.source.read_bytes() == self.content


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, SMALL, 0, 1, LARGE, 100)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", PIECE)
    monkeypatch.setattr(module, "_RANGE", 3 * PIECE)


@pytest.fixture(autouse=True)
def reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FICLONE work on every file system."""

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        return os.pwrite(target, os.pread(source, 1 << 30, 0), 0)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def only(way: Way, disk: FaultyDisk) -> FaultyDisk:
    """Leave ``disk`` no better way than ``way``."""
    for call in BEFORE[way]:
        disk.fail(call, error=oserror(errno.EXDEV), times=None)
    return disk


# ------------------------------------------------------------------ the ways


@pytest.mark.parametrize("way", Way)
def test_the_blob_gets_there_each_way(place: Place, disk: FaultyDisk, way: Way) -> None:
    assert place.go(only(way, disk)) is way
    place.assert_made()
    assert (place.target.stat().st_ino == place.source.stat().st_ino) is (way is Way.LINK)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_private(place: Place, disk: FaultyDisk, way: Way) -> None:
    os.chmod(place.source, 0o644)
    place.go(only(way, disk))
    assert stat.S_IMODE(place.target.stat().st_mode) == 0o600


def test_a_link_is_one_call(place: Place, disk: FaultyDisk) -> None:
    place.go(disk)
    assert disk.log == ["link"]


def test_a_copy_has_its_name_only_after_all_is_written_and_closed(place: Place, disk: FaultyDisk) -> None:
    """Invariant 1: a blob is visible under its key whole or not at all."""
    place.go(only(Way.CLONE, disk))
    assert disk.log == [
        *("link", "open", "open"),
        *("fstat", "clone", "fstat", "fstat"),
        *("close", "close", "rename"),
    ]


def test_a_target_that_is_there_is_left_alone(place: Place, disk: FaultyDisk) -> None:
    """Invariant 2: a blob, once visible under its key, never changes."""
    place.target.write_bytes(place.content)
    before = place.target.stat()
    assert place.go(disk) is Way.LINK
    place.assert_made()
    assert place.target.stat() == before and disk.log == ["link"]


def test_a_copy_to_another_device(place: Place, disk: FaultyDisk, elsewhere: Path) -> None:
    place.shard = elsewhere
    place.target, place.temporary = elsewhere / place.target.name, elsewhere / place.temporary.name
    assert place.go(disk) in COPIES
    place.assert_made()
    place.target.unlink()
    place.go_checked(disk)
    place.assert_made()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    directory = memory / f"fbcache-test-{uuid4().hex}"
    directory.mkdir()
    yield directory
    for name in os.listdir(directory):
        os.unlink(directory / name)
    directory.rmdir()


@pytest.mark.soak
def test_a_file_with_as_many_links_as_it_may_have_is_copied(place: Place, disk: FaultyDisk) -> None:
    spare = place.source.parent / "links"
    spare.mkdir()
    try:
        for number in range(70_000):  # ext4 allows 65,000
            os.link(place.source, spare / str(number))
    except OSError as error:
        assert error.errno == errno.EMLINK
    else:
        pytest.skip("this file system has no bound that a test could reach")
    assert place.go(disk) in COPIES
    place.assert_made()
    shutil.rmtree(spare)


# ------------------------------------------------------------------ which errors lead to the next way

NOT_HERE = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV, errno.EPERM, errno.EACCES]
NO_HELP = [*NOT_HERE, errno.EINVAL, errno.ENOTTY, errno.EBADF]
FINAL = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EROFS]

LEADING_ON = [
    *(("link", code, Way.CLONE) for code in [*NOT_HERE, errno.EMLINK]),
    *(("clone", code, Way.RANGE) for code in NO_HELP),
    *(("copy_range", code, Way.COPY) for code in NO_HELP),
]


@pytest.mark.parametrize(("call", "code", "way"), LEADING_ON)
def test_where_a_call_does_not_work_the_next_is_tried(
    place: Place, disk: FaultyDisk, call: str, code: int, way: Way
) -> None:
    for earlier in BEFORE[way][:-1]:
        disk.fail(earlier, error=oserror(errno.EXDEV))
    disk.fail(call, error=oserror(code))
    assert place.go(disk) is way
    place.assert_made()


@pytest.mark.parametrize("code", FINAL)
@pytest.mark.parametrize("call", ["link", "clone", "copy_range"])
def test_a_failing_disk_is_not_asked_in_other_ways(
    place: Place, disk: FaultyDisk, call: str, code: int
) -> None:
    way = {"link": Way.LINK, "clone": Way.CLONE, "copy_range": Way.RANGE}[call]
    only(way, disk).fail(call, error=oserror(code))
    with pytest.raises(OSError) as caught:
        place.go(disk)
    assert caught.value.errno == code
    place.assert_nothing_made()
    assert disk.count("writev") == 0 and disk.count(call) == 1


@pytest.mark.parametrize("after", [1, 2])
def test_a_copy_range_that_stops_early_is_followed_by_a_plain_copy(
    place: Place, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    real, calls = os.copy_file_range, iter(range(1, 100))

    def copy_file_range(*args: int) -> int:
        return real(*args) if next(calls) < after else 0

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    assert place.go(only(Way.RANGE, disk)) is Way.COPY
    place.assert_made()
    assert disk.count("copy_range") == after


def test_a_copy_range_that_fails_halfway_is_followed_by_a_plain_copy(place: Place, disk: FaultyDisk) -> None:
    only(Way.RANGE, disk).fail("copy_range", error=oserror(errno.EXDEV), nth=3)
    assert place.go(disk) is Way.COPY
    place.assert_made()


@pytest.mark.parametrize("checked", [False, True])
def test_short_reads_and_writes_are_gone_on_with(place: Place, disk: FaultyDisk, checked: bool) -> None:
    only(Way.COPY, disk)
    disk.short("preadv", 777, times=20)
    disk.short("writev", 333, times=20)
    (place.go_checked if checked else place.go)(disk)
    place.assert_made()


# ------------------------------------------------------------------ sources


class ChangingDisk(FaultyDisk):
    """Once somebody has asked for the source's length, it has another."""

    def __init__(self, source: Path, change: int) -> None:
        super().__init__()
        self.source: Path | None = source
        self.change = change

    def fstat(self, fd: int) -> os.stat_result:
        status = super().fstat(fd)
        if self.source is not None:
            os.truncate(self.source, status.st_size + self.change)
            self.source = None
        return status


@pytest.mark.parametrize("change", [-1, -LARGE, 1, LARGE])
@pytest.mark.parametrize("way", COPIES)
def test_a_source_whose_length_changes_is_not_taken_for_copied(place: Place, way: Way, change: int) -> None:
    disk = ChangingDisk(place.source, change)
    with pytest.raises(OSError, match="length changed") as caught:
        place.go(only(way, disk))
    assert caught.value.errno == errno.EIO
    assert files_below(place.shard) == []


@pytest.mark.parametrize("way", Way)
def test_a_missing_source_or_shard_is_told_as_it_is(place: Place, disk: FaultyDisk, way: Way) -> None:
    only(way, disk)
    place.shard.rmdir()
    with pytest.raises(FileNotFoundError):
        place.go(disk)
    place.shard.mkdir()
    place.source.unlink()
    with pytest.raises(FileNotFoundError):
        place.go(disk)
    assert files_below(place.shard) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_not_copied_nor_waited_for(
    place: Place, disk: FaultyDisk, make: Callable[[Path], None]
) -> None:
    place.source.unlink()
    make(place.source)
    with pytest.raises(OSError, match="no regular file"):
        place.go(only(Way.CLONE, disk))
    with pytest.raises(CorruptBlobError, match="no regular file"):
        place.go_checked(disk)
    assert files_below(place.shard) == []


def test_a_link_in_the_source_is_not_followed(place: Place, disk: FaultyDisk) -> None:
    os.replace(place.source, place.from_directory / "elsewhere")
    place.source.symlink_to(place.from_directory / "elsewhere")
    for copy in (place.go, place.go_checked):
        with pytest.raises(OSError) as caught:
            copy(only(Way.COPY, disk))
        assert caught.value.errno == errno.ELOOP
    place.assert_nothing_made()


# ------------------------------------------------------------------ temporary files


@pytest.mark.parametrize("checked", [False, True])
def test_a_leftover_of_a_crash_is_removed_first(place: Place, disk: FaultyDisk, checked: bool) -> None:
    place.temporary.write_bytes(b"half" * LARGE)
    (place.go_checked if checked else place.go)(only(Way.COPY, disk))
    place.assert_made()


def test_a_link_in_the_temporary_place_is_removed_and_what_it_names_is_not_written(
    place: Place, disk: FaultyDisk, tmp_path: Path
) -> None:
    """Invariant 13."""
    (tmp_path / "foreign").write_bytes(b"mine")
    place.temporary.symlink_to(tmp_path / "foreign")
    place.go(only(Way.COPY, disk))
    place.assert_made()
    assert (tmp_path / "foreign").read_bytes() == b"mine" and not place.target.is_symlink()


def test_a_directory_in_the_temporary_place_is_an_error_and_stays(place: Place, disk: FaultyDisk) -> None:
    place.temporary.mkdir()
    with pytest.raises(OSError):
        place.go(only(Way.COPY, disk))
    assert place.temporary.is_dir() and files_below(place.shard) == []


def test_a_cleaning_up_that_fails_does_not_hide_why(place: Place, disk: FaultyDisk) -> None:
    only(Way.COPY, disk)
    disk.fail("writev", error=oserror(errno.ENOSPC))
    disk.fail("unlink", error=oserror(errno.EACCES))
    with pytest.raises(OSError) as caught:
        place.go(disk)
    assert caught.value.errno == errno.ENOSPC
    assert files_below(place.shard) == [place.temporary.name]
    place.go(disk)
    place.assert_made()


# ------------------------------------------------------------------ each call failing

ERRORS = [oserror(errno.EIO), oserror(errno.ENOSPC), KeyboardInterrupt()]

#: What is done, on a disk that leaves it this way.
CASES = [*((way, False) for way in Way), (Way.LINK, True)]


def calls_of(directory: Path, way: Way, checked: bool) -> Iterator[tuple[Place, FaultyDisk, str, int]]:
    """A new place and a disk for each call that copying makes, and which call it is, from 1 on."""
    first, disk = Place(directory / "first", SMALL, 2 * PIECE), only(way, FaultyDisk())
    (first.go_checked if checked else first.go)(disk)
    for index, call in enumerate(disk.log):
        if call not in BEFORE[way]:
            place = Place(directory / str(index), SMALL, 2 * PIECE)
            yield place, only(way, FaultyDisk()), call, disk.log[: index + 1].count(call)


@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "ENOSPC", "interrupt"])
@pytest.mark.parametrize(("way", "checked"), CASES)
def test_whatever_call_fails_nothing_is_left_and_it_works_later(
    tmp_path: Path, way: Way, checked: bool, error: BaseException
) -> None:
    """Invariant 9."""
    tried = []
    for place, disk, call, nth in calls_of(tmp_path, way, checked):
        disk.fail(call, error=error, nth=nth)
        go = place.go_checked if checked else place.go
        with pytest.raises(type(error)) as caught:
            go(disk)
        assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
        place.assert_nothing_made()
        go(disk)
        place.assert_made()
        tried.append(call)
    expected = {
        Way.LINK: {"link"},
        Way.CLONE: {"clone"},
        Way.RANGE: {"copy_range"},
        Way.COPY: {"preadv", "writev"},
    }
    if checked:
        assert set(tried) == {"open", "fstat", "preadv", "writev", "close", "rename"}
    else:
        assert set(tried) >= expected[way] | ({"open", "fstat", "close", "rename"} if BEFORE[way] else set())


@pytest.mark.parametrize(("way", "checked"), CASES)
def test_an_interrupt_right_after_a_call_leaves_the_blob_whole_or_not_at_all(
    tmp_path: Path, way: Way, checked: bool
) -> None:
    for place, disk, call, nth in calls_of(tmp_path, way, checked):
        if call == "open":  # its descriptor would be lost, which no code can help
            continue
        disk.fail_after(call, error=KeyboardInterrupt(), nth=nth)
        with pytest.raises(KeyboardInterrupt):
            (place.go_checked if checked else place.go)(disk)
        if call in ("link", "rename"):
            place.assert_made()
        else:
            place.assert_nothing_made()


@pytest.mark.parametrize(("way", "checked"), CASES)
def test_an_interrupt_anywhere_leaves_the_blob_whole_or_not_at_all(
    tmp_path: Path, way: Way, checked: bool
) -> None:
    nth = 1
    while True:
        place, disk = Place(tmp_path / str(nth), SMALL), only(way, FaultyDisk())
        interrupter = Interrupter(nth)
        go = place.go_checked if checked else place.go
        with contextlib.suppress(KeyboardInterrupt), interrupter:
            go(disk)
        if not interrupter.fired:
            break
        if files_below(place.shard):
            place.assert_made()
        go(disk)
        place.assert_made()
        nth += 1
    assert nth > 2


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("checked", [False, True])
def test_a_copy_takes_little_memory(
    tmp_path: Path, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    monkeypatch.setattr(module, "_PIECE", 1 << 20)
    place = Place(tmp_path, 16 << 20)
    only(Way.COPY, disk)
    tracemalloc.start()
    try:
        (place.go_checked if checked else place.go)(disk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    place.assert_made()
    assert peak < 2 << 20


# ------------------------------------------------------------------ checked copies


@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1,),
        (SMALL, LARGE),
        (PIECE - 1, PIECE, PIECE + 1),
        (0, 1, 63, 64, 65, 4095, 4096, 4097, LARGE),
    ],
)
def test_a_checked_copy_is_a_new_file_with_the_same_bytes(
    tmp_path: Path, disk: FaultyDisk, sizes: tuple[int, ...]
) -> None:
    place = Place(tmp_path, *sizes)
    place.go_checked(disk)
    place.assert_made()
    assert place.target.stat().st_ino != place.source.stat().st_ino
    assert place.source.stat().st_nlink == 1
    assert stat.S_IMODE(place.target.stat().st_mode) == 0o600
    assert not {"link", "clone", "copy_range"} & set(disk.log)


def test_a_checked_copy_takes_the_place_of_a_file_in_doubt(place: Place, disk: FaultyDisk) -> None:
    place.target.write_bytes(b"lost")
    place.go_checked(disk)
    place.assert_made()


def damaged(content: bytes, place: Place) -> Iterator[bytes]:
    """``content`` with a byte changed in every part of it, cut off, and too long."""
    start = read_prefix(content)
    header = unpack_header(content, key=place.key, file_size=len(content), path="")
    spans = [(span.offset, span.length) for span in header.spans if span.length]
    positions = [*range(start), *(offset for offset, _ in header.gaps)]
    positions += [offset + length - 1 for offset, length in [*header.gaps, *spans]]
    positions += [offset + length // 2 for offset, length in spans]
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 0x10
        yield bytes(changed)
    for length in (0, 1, PREFIX_SIZE - 1, PREFIX_SIZE, start - 1, start, len(content) // 2, len(content) - 1):
        yield content[:length]
    yield content + b"\0"


def test_no_damage_is_copied(place: Place, disk: FaultyDisk) -> None:
    for content in damaged(place.content, place):
        place.content = content
        place.source.write_bytes(content)
        with pytest.raises(CorruptBlobError) as caught:
            place.go_checked(disk)
        assert caught.value.key == place.key and caught.value.path == str(place.source)
        place.assert_nothing_made()
    assert disk.count("rename") == 0


def test_another_keys_blob_is_not_copied_over_a_good_one(place: Place, disk: FaultyDisk) -> None:
    place.target.write_bytes(b"as it was")
    with pytest.raises(CorruptBlobError, match="another key"):
        place.go_checked(disk, uuid4())
    assert place.target.read_bytes() == b"as it was"
    assert files_below(place.shard) == [place.key.hex]


def test_a_file_cut_off_while_it_is_checked(place: Place) -> None:
    with pytest.raises(CorruptBlobError, match="ends early"):
        place.go_checked(ChangingDisk(place.source, -LARGE))
    assert files_below(place.shard) == []
