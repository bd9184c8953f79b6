"""FileStore: what is on disk, what faults of writing leave behind, what counts, what is removed."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest

from fbcache.codec.frames import Frames
from fbcache.errors import DiskFullError, StorageError
from fbcache.store.files import FileStore
from fbcache.store.protocol import BlobStore, StoreLimits
from fbcache.store.transfer import IOV_MAX
from tests.blobs import (
    LARGE,
    SMALL,
    WAYS,
    blob_path,
    files_below,
    frames_of,
    random_bytes,
    same,
)
from tests.faults import FaultyDisk, oserror

# ------------------------------------------------------------------ round trips and layout


def test_it_is_a_blob_store(store: FileStore) -> None:
    as_protocol: BlobStore = store
    assert as_protocol.path == store.path


@pytest.mark.parametrize(("size", "may_map", "writable"), WAYS)
@pytest.mark.parametrize("verify", [True, False])
def test_frames_come_back_as_they_were(
    tmp_path: Path, size: int, may_map: bool, writable: bool, verify: bool
) -> None:
    store = FileStore(str(tmp_path), mmap=may_map)
    frames = frames_of(size, 0, 1, 63, 64, 65, 4095, 4096, 4097, size, pickled="value: x.Y")
    key = uuid4()
    assert store.write(key, frames) == blob_path(store, key).stat().st_size
    got = store.read(key, writable=writable, verify=verify)
    assert same(got, frames)
    for buffer in got.buffers:
        assert isinstance(buffer, memoryview) and buffer.readonly is not writable
        assert np.frombuffer(buffer, np.uint8).flags.writeable is writable
    store.close()
    assert same(got, frames), "the buffers must outlive their file"


def test_a_value_without_buffers_and_one_of_thousands(store: FileStore) -> None:
    none, many = uuid4(), uuid4()
    store.write(none, frames_of())
    store.write(many, frames_of(*[1] * (2 * IOV_MAX), 0, *[300] * IOV_MAX))
    assert same(store.read(none, writable=False, verify=True), frames_of())
    unmapped = FileStore(store.path, mmap=False)
    for reader in (store, unmapped):
        got = reader.read(many, writable=True, verify=True)
        assert same(got, frames_of(*[1] * (2 * IOV_MAX), 0, *[300] * IOV_MAX))


def test_a_header_longer_than_the_first_read(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path), mmap=False)
    key, frames = uuid4(), frames_of(LARGE, tree=random_bytes(100_000, 7))
    store.write(key, frames)
    assert same(store.read(key, writable=True, verify=True), frames)


def test_buffers_of_one_large_blob_do_not_keep_each_other_alive(store: FileStore) -> None:
    key = uuid4()
    store.write(key, frames_of(LARGE, LARGE))
    first, second = store.read(key, writable=True, verify=False).buffers
    assert memoryview(first).obj is not memoryview(second).obj


def test_a_writeable_reading_leaves_the_blob_alone(store: FileStore) -> None:
    """Invariant 2: what is written into the memory does not reach the file."""
    for size in (SMALL, LARGE):
        key = uuid4()
        store.write(key, frames_of(size))
        buffer = memoryview(store.read(key, writable=True, verify=False).buffers[0])
        buffer[:] = bytes(size)
        assert same(store.read(key, writable=False, verify=True), frames_of(size))


def test_names_and_permissions(store: FileStore, tmp_path: Path) -> None:
    key = uuid4()
    assert files_below(tmp_path) == []
    store.write(key, frames_of(SMALL))
    assert files_below(tmp_path) == [f"{key.hex[:2]}/{key.hex}"]
    assert stat.S_IMODE(blob_path(store, key).stat().st_mode) == 0o600
    assert stat.S_IMODE(blob_path(store, key).parent.stat().st_mode) == 0o700


def test_a_write_is_four_calls_and_a_mapped_read_too(store: FileStore, disk: FaultyDisk) -> None:
    first, key = UUID(int=1), UUID(int=2)
    store.write(first, frames_of(SMALL))
    disk.log.clear()
    store.write(key, frames_of(LARGE))
    assert disk.log == ["free_bytes", "open", "writev", "close", "rename"]
    disk.log.clear()
    store.read(key, writable=False, verify=False)
    assert disk.log == ["open", "fstat", "mmap", "close"]


def test_a_write_makes_no_joined_copy(
    store: FileStore, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = np.arange(LARGE, dtype=np.uint8)
    given: list[memoryview] = []
    real = FaultyDisk.writev

    def writev(self: FaultyDisk, fd: int, pieces: list[memoryview]) -> int:
        given.extend(pieces)
        return real(self, fd, pieces)

    monkeypatch.setattr(FaultyDisk, "writev", writev)
    store.write(uuid4(), Frames("test", b"", [value.data.cast("B")]))
    assert any(np.shares_memory(np.frombuffer(piece, np.uint8), value) for piece in given)


# ------------------------------------------------------------------ faults while writing


WRITE_FAULTS = [
    ("open", errno.EMFILE),
    ("open", errno.EACCES),
    ("writev", errno.EIO),
    ("writev", errno.ENOSPC),
    ("writev", errno.EDQUOT),
    ("writev", errno.EFBIG),
    ("close", errno.EIO),
    ("close", errno.EDQUOT),
    ("rename", errno.EIO),
    ("rename", errno.ENOSPC),
    ("rename", errno.EROFS),
    ("mkdir", errno.EROFS),
    ("free_bytes", errno.EIO),
]
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@pytest.mark.parametrize(("call", "code"), WRITE_FAULTS, ids=lambda item: errno.errorcode.get(item, item))
def test_a_failed_write_leaves_no_file_and_no_room_taken(
    store: FileStore, disk: FaultyDisk, tmp_path: Path, call: str, code: int
) -> None:
    """Invariant 9: no file, one typed error with what its reader needs, and the same write works later."""
    key, frames = uuid4(), frames_of(LARGE)
    disk.fail(call, error=oserror(code))
    with pytest.raises(StorageError) as caught:
        store.write(key, frames)
    assert isinstance(caught.value, DiskFullError) == (code in FULL)
    assert caught.value.path.startswith(str(tmp_path)) and caught.value.needed is not None
    assert caught.value.needed > LARGE
    assert caught.value.errno == (errno.ENOSPC if code in FULL else code)
    assert files_below(tmp_path) == [] and store.disk_bytes == 0
    store.write(key, frames)
    assert same(store.read(key, writable=False, verify=True), frames)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_the_disk_fills_up_in_the_middle_of_a_blob(
    store: FileStore, disk: FaultyDisk, tmp_path: Path, nth: int
) -> None:
    """Invariant 9."""
    disk.short("writev", 5000, times=None)
    disk.fail("writev", nth=nth, error=oserror(errno.ENOSPC))
    with pytest.raises(DiskFullError, match="no room for a blob"):
        store.write(uuid4(), frames_of(LARGE))
    assert disk.count("writev") == nth
    assert files_below(tmp_path) == [] and store.disk_bytes == 0


@pytest.mark.parametrize(
    ("call", "moment"),
    [("open", "fail"), ("writev", "fail"), ("writev", "fail_after"), ("close", "fail"), ("rename", "fail")],
)
def test_an_interrupted_write_leaves_no_temporary_file(
    store: FileStore, disk: FaultyDisk, tmp_path: Path, call: str, moment: str
) -> None:
    """Invariant 9, for what is no OSError: the notebook's stop button."""
    key = uuid4()
    store.write(key, frames_of(SMALL))
    store.delete(key)
    getattr(disk, moment)(call, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        store.write(key, frames_of(LARGE))
    assert store.disk_bytes == 0
    assert store.write(key, frames_of(LARGE)) == store.disk_bytes
    assert files_below(tmp_path) == [f"{key.hex[:2]}/{key.hex}"]


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_writes_and_short_reads_are_continued(store: FileStore, disk: FaultyDisk, most: int) -> None:
    frames = frames_of(100, 5000, 1)
    key = uuid4()
    disk.short("writev", most, times=None)
    disk.short("preadv", most, times=None)
    store.write(key, frames)
    assert same(store.read(key, writable=False, verify=True), frames)


def test_a_disk_that_takes_nothing_is_an_error_and_no_endless_loop(
    store: FileStore, disk: FaultyDisk
) -> None:
    disk.short("writev", 0, times=None)
    with pytest.raises(StorageError, match="takes no more bytes"):
        store.write(uuid4(), frames_of(SMALL))


def test_a_real_limit_on_file_size_is_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, in a child of its own: EFBIG from the kernel after a short write."""
    pid = os.fork()
    if pid == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE // 2, LARGE // 2))
        try:
            FileStore(str(tmp_path)).write(uuid4(), frames_of(LARGE))
        except DiskFullError:
            os._exit(0 if files_below(tmp_path) == [] else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_a_dead_write_left_is_replaced(store: FileStore, tmp_path: Path) -> None:
    key, victim = uuid4(), tmp_path / "victim"
    victim.write_bytes(b"mine")
    shard = tmp_path / key.hex[:2]
    shard.mkdir()
    (shard / f".{key.hex}.tmp").symlink_to(victim)
    store.write(key, frames_of(SMALL))
    assert same(store.read(key, writable=False, verify=True), frames_of(SMALL))
    assert victim.read_bytes() == b"mine"


def test_writing_a_key_again_never_touches_the_visible_file(store: FileStore) -> None:
    """Invariant 2: the former file keeps its content for who still reads it."""
    key = uuid4()
    store.write(key, frames_of(LARGE))
    with blob_path(store, key).open("rb") as former:
        before = former.read()
        store.write(key, frames_of(SMALL))
        former.seek(0)
        assert former.read() == before
    assert store.disk_bytes == blob_path(store, key).stat().st_size


def test_a_shard_that_vanished_is_made_again(store: FileStore, tmp_path: Path) -> None:
    key = uuid4()
    store.write(key, frames_of(SMALL))
    store.delete(key)
    (tmp_path / key.hex[:2]).rmdir()
    store.write(key, frames_of(SMALL))
    assert same(store.read(key, writable=False, verify=True), frames_of(SMALL))


def test_a_directory_that_vanished_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    store = FileStore(str(tmp_path / "gone"))
    key = uuid4()
    store.write(key, frames_of(SMALL))
    for path in [*(tmp_path / "gone").rglob("*")][::-1]:
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "gone").rmdir()
    with pytest.raises(StorageError, match="gone"):
        store.write(uuid4(), frames_of(SMALL))
    with pytest.raises(StorageError, match="cannot read"):
        store.read(key, writable=False, verify=False)
    assert store.bytes_free == 0
    store.delete(key)
    store.close()


# ------------------------------------------------------------------ room


def test_max_disk_is_checked_before_anything_is_written(tmp_path: Path, disk: FaultyDisk) -> None:
    store = FileStore(str(tmp_path), limits=StoreLimits(max_disk=LARGE + 8192), disk=disk)
    first, second = uuid4(), uuid4()
    store.write(first, frames_of(LARGE))
    assert store.disk_bytes + store.bytes_free == LARGE + 8192
    opened = disk.count("open")
    with pytest.raises(DiskFullError) as caught:
        store.write(second, frames_of(LARGE))
    assert disk.count("open") == opened
    assert caught.value.free == store.bytes_free < LARGE < (caught.value.needed or 0)
    assert caught.value.path == str(tmp_path)
    store.delete(first)
    store.write(second, frames_of(LARGE))


def test_min_free_is_kept_free(tmp_path: Path, disk: FaultyDisk) -> None:
    store = FileStore(str(tmp_path), limits=StoreLimits(min_free=2**62), disk=disk)
    with pytest.raises(DiskFullError, match=f"min_free={2**62:,}"):
        store.write(uuid4(), frames_of(SMALL))
    assert disk.count("open") == 0 and store.bytes_free == 0


def test_two_writes_at_once_do_not_share_the_last_room(tmp_path: Path, disk: FaultyDisk) -> None:
    store = FileStore(str(tmp_path), limits=StoreLimits(max_disk=LARGE + 8192), disk=disk)
    gate = disk.gate("writev")
    writer = threading.Thread(target=store.write, args=(uuid4(), frames_of(LARGE)))
    writer.start()
    gate.wait_reached()
    try:
        assert store.disk_bytes > LARGE, "a blob being written counts"
        with pytest.raises(DiskFullError):
            store.write(uuid4(), frames_of(LARGE))
    finally:
        gate.open()
        writer.join()
    assert len(files_below(tmp_path)) == 1


def test_threads_write_read_and_delete_at_once(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(30):
                key, size = uuid4(), (SMALL, LARGE)[turn % 2]
                frames = Frames("test", b"%d" % seed, [random_bytes(size, seed)])
                store.write(key, frames)
                assert same(store.read(key, writable=turn % 3 == 0, verify=True), frames)
                store.delete(key)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.disk_bytes == 0 and files_below(tmp_path) == []


# ------------------------------------------------------------------ deleting and closing


def test_deleting_gives_the_room_back_and_twice_is_no_error(store: FileStore, tmp_path: Path) -> None:
    key = uuid4()
    store.write(key, frames_of(SMALL))
    store.delete(key)
    store.delete(key)
    store.delete(uuid4())
    assert store.disk_bytes == 0 and files_below(tmp_path) == []


def test_a_delete_that_fails_still_counts_and_may_be_tried_again(store: FileStore, disk: FaultyDisk) -> None:
    key = uuid4()
    nbytes = store.write(key, frames_of(SMALL))
    disk.fail("unlink", error=oserror(errno.EIO))
    with pytest.raises(StorageError, match="cannot remove"):
        store.delete(key)
    assert store.disk_bytes == nbytes
    store.delete(key)
    assert store.disk_bytes == 0


def test_deleting_what_is_mapped_leaves_the_map_whole(store: FileStore) -> None:
    key, frames = uuid4(), frames_of(LARGE)
    store.write(key, frames)
    got = store.read(key, writable=False, verify=False)
    store.delete(key)
    assert same(got, frames)


def test_close_removes_its_own_and_leaves_foreign_files(store: FileStore, tmp_path: Path) -> None:
    """Invariant 13: not even a file that looks like a blob, if this store did not write it."""
    ours, foreign_blob = uuid4(), uuid4()
    store.write(ours, frames_of(SMALL))
    shard = tmp_path / ours.hex[:2]
    foreign = [tmp_path / "notes.txt", shard / "notes.txt", shard / (ours.hex[:2] + foreign_blob.hex[2:])]
    for path in foreign:
        path.write_text("mine")
    (tmp_path / "zz").mkdir()
    store.close()
    store.close()
    assert files_below(tmp_path) == sorted(str(path.relative_to(tmp_path)) for path in foreign)
    assert (tmp_path / "zz").is_dir()


def test_close_leaves_an_empty_directory(store: FileStore, tmp_path: Path) -> None:
    for _ in range(50):
        store.write(uuid4(), frames_of(SMALL))
    store.close()
    assert list(tmp_path.iterdir()) == [] and store.disk_bytes == 0


def test_close_goes_on_after_a_file_that_will_not_go(
    store: FileStore, disk: FaultyDisk, tmp_path: Path
) -> None:
    for _ in range(3):
        store.write(uuid4(), frames_of(SMALL))
    disk.fail("unlink", nth=2, error=oserror(errno.EIO))
    with pytest.raises(StorageError, match="cannot remove"):
        store.close()
    assert len(files_below(tmp_path)) == 1
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_store_writes_nothing(store: FileStore, disk: FaultyDisk) -> None:
    store.close()
    with pytest.raises(StorageError, match="is closed"):
        store.write(uuid4(), frames_of(SMALL))
    assert disk.count("open") == 0


@pytest.mark.parametrize("call", ["writev", "rename"])
def test_close_during_a_write_leaves_no_file(
    store: FileStore, disk: FaultyDisk, tmp_path: Path, call: str
) -> None:
    """Invariant 9, in the race of close with a write."""
    gate = disk.gate(call, after=True)
    caught: list[StorageError] = []

    def write() -> None:
        try:
            store.write(uuid4(), frames_of(SMALL))
        except StorageError as error:
            caught.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    gate.wait_reached()
    store.close()
    gate.open()
    writer.join()
    assert "is closed" in str(caught[0])
    assert list(tmp_path.iterdir()) == [] and store.disk_bytes == 0
