"""FileStore: faults of reading, and damaged blobs of every kind, read in every way."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from fbcache.codec.layout import PREFIX_SIZE, read_prefix
from fbcache.errors import CorruptBlobError, StorageError
from fbcache.store import mapping
from fbcache.store.files import FileStore
from tests.blobs import LARGE, SMALL, WAYS, blob_path, files_below, frames_of, same
from tests.faults import FaultyDisk, oserror

# ------------------------------------------------------------------ faults while reading


@pytest.mark.parametrize(
    ("call", "code"),
    [("open", errno.EMFILE), ("open", errno.EACCES), ("fstat", errno.EIO), ("preadv", errno.EIO)],
)
def test_a_read_that_fails_is_a_storage_error_and_works_later(
    store: FileStore, disk: FaultyDisk, call: str, code: int
) -> None:
    key = uuid4()
    store.write(key, frames_of(SMALL))
    disk.fail(call, error=oserror(code))
    with pytest.raises(StorageError) as caught:
        store.read(key, writable=False, verify=False)
    assert caught.value.errno == code and caught.value.path == str(blob_path(store, key))
    assert same(store.read(key, writable=False, verify=False), frames_of(SMALL))


def test_without_a_map_to_be_had_it_is_read(store: FileStore, disk: FaultyDisk) -> None:
    key, frames = uuid4(), frames_of(LARGE)
    store.write(key, frames)
    disk.fail("mmap", error=oserror(errno.ENOMEM))
    got = store.read(key, writable=False, verify=True)
    assert same(got, frames) and memoryview(got.buffers[0]).readonly
    assert disk.count("preadv") > 0


def test_past_the_bound_of_maps_it_is_read(
    store: FileStore, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, frames = uuid4(), frames_of(LARGE)
    store.write(key, frames)
    monkeypatch.setattr(mapping.LIVE_MAPS, "bound", len(mapping.LIVE_MAPS) + 2)
    kept = [store.read(key, writable=False, verify=False) for _ in range(5)]
    assert disk.count("mmap") == 2
    assert all(same(got, frames) for got in kept)
    del kept
    store.read(key, writable=False, verify=False)
    assert disk.count("mmap") == 3


def test_a_file_cut_off_while_it_is_read(store: FileStore, disk: FaultyDisk) -> None:
    unmapped = FileStore(store.path, mmap=False, disk=disk)
    key = uuid4()
    store.write(key, frames_of(LARGE))
    disk.gate("fstat", after=True).open()
    gate = disk.gate("preadv")
    caught: list[BaseException] = []

    def read() -> None:
        try:
            unmapped.read(key, writable=False, verify=False)
        except CorruptBlobError as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    gate.wait_reached()
    os.truncate(blob_path(store, key), LARGE // 2)
    gate.open()
    reader.join()
    assert "ends early" in str(caught[0])


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(("size", "may_map", "writable"), WAYS)
class TestDamage:
    """A damaged blob is CorruptBlobError with key, file and reason, never a wrong value or a hang."""

    @pytest.fixture
    def blob(self, tmp_path: Path, size: int, may_map: bool, writable: bool) -> Iterator[Path]:
        self.store = FileStore(str(tmp_path), mmap=may_map)
        self.writable = writable
        self.key = uuid4()
        self.store.write(self.key, frames_of(size, 100))
        yield blob_path(self.store, self.key)

    def refused(self, *, verify: bool = False) -> str:
        with pytest.raises(CorruptBlobError) as caught:
            self.store.read(self.key, writable=self.writable, verify=verify)
        assert caught.value.key == self.key
        assert caught.value.path == str(blob_path(self.store, self.key))
        return caught.value.reason

    def test_gone(self, blob: Path) -> None:
        blob.unlink()
        assert self.refused() == "the file is gone"

    @pytest.mark.parametrize("keep", [0, 1, PREFIX_SIZE - 1, PREFIX_SIZE, PREFIX_SIZE + 1, 200, -1])
    def test_truncated(self, blob: Path, keep: int) -> None:
        os.truncate(blob, keep if keep >= 0 else blob.stat().st_size + keep)
        self.refused()

    def test_extended(self, blob: Path) -> None:
        with blob.open("ab") as file:
            file.write(b"\0")
        self.refused()

    def test_swapped_with_another(self, blob: Path, size: int) -> None:
        other = uuid4()
        self.store.write(other, frames_of(size, 100))
        os.replace(blob_path(self.store, other), blob)
        assert "another key" in self.refused()

    def test_every_header_byte_flipped(self, blob: Path) -> None:
        whole = bytearray(blob.read_bytes())
        for position in range(read_prefix(bytes(whole))):
            whole[position] ^= 0x10
            with blob.open("r+b") as file:
                file.write(whole[:4096])
            self.refused()
            whole[position] ^= 0x10

    def test_a_flipped_payload_byte_is_told_by_verify(self, blob: Path) -> None:
        size = blob.stat().st_size
        start = read_prefix(blob.read_bytes())
        for position in (start, start + 1, size // 2, size - 101, size - 1):
            with blob.open("r+b") as file:
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 1]))
            self.refused(verify=True)
            with blob.open("r+b") as file:
                file.seek(position)
                file.write(bytes([byte]))

    def test_replaced_by_a_link_even_to_a_good_blob(self, blob: Path, tmp_path: Path) -> None:
        os.replace(blob, tmp_path / "elsewhere")
        blob.symlink_to(tmp_path / "elsewhere")
        assert self.refused() == "a symbolic link is in its place"

    def test_replaced_by_a_directory(self, blob: Path) -> None:
        blob.unlink()
        blob.mkdir()
        assert self.refused() == "it is no regular file"

    def test_replaced_by_a_pipe_does_not_block(self, blob: Path) -> None:
        blob.unlink()
        os.mkfifo(blob)
        assert self.refused() == "it is no regular file"

    def test_replaced_by_a_device(self, blob: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root makes devices")
        blob.unlink()
        os.mknod(blob, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        assert self.refused() == "it is no regular file"

    def test_replaced_by_a_socket(self, blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        blob.unlink()
        monkeypatch.chdir(blob.parent)  # a socket's address is short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(blob.name)
            assert self.refused() == "a socket is in its place"

    def test_others_go_on(self, blob: Path, size: int) -> None:
        os.truncate(blob, 10)
        self.refused()
        other = uuid4()
        self.store.write(other, frames_of(size))
        assert same(self.store.read(other, writable=self.writable, verify=True), frames_of(size))
        self.store.delete(self.key)
        assert files_below(Path(self.store.path)) == [f"{other.hex[:2]}/{other.hex}"]
