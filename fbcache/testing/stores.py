"""The kit for stores: each promise of :mod:`fbcache.store.protocol`, tested."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np

from fbcache.codec.frames import Buffer, Frames
from fbcache.errors import CorruptBlobError, StorageError
from fbcache.store.protocol import BlobStore
from fbcache.testing.capabilities import BatchingTests, FileBackedTests
from fbcache.testing.material import files_below, frames_of, raised, random_bytes, same_frames, together
from fbcache.testing.storekit import LARGE, SMALL
from fbcache.testing.storeroom import RoomTests


class StoreTests(RoomTests, FileBackedTests, BatchingTests):
    """Tests for a :class:`~fbcache.store.protocol.BlobStore`; derive from it and give ``make_store``.

    ``failing`` should be overridden; ``damage``, ``slack`` and ``names_keys`` may be. What only some stores
    can do (:class:`~fbcache.store.protocol.FileBacked`, :class:`~fbcache.store.protocol.Batching`) is
    tested where a store does it.
    """

    # ------------------------------------------------------------------ what is written is what is read

    def test_frames_come_back_as_they_were(self, tmp_path: Path) -> None:
        """Codec, tree, note on pickle, and every buffer, of any length."""
        cases = [
            frames_of(),
            frames_of(tree=b""),
            frames_of(0),
            frames_of(SMALL, 0, 1, 63, 64, 65, 4095, 4096, 4097, pickled="value['é']: x.Y"),
            frames_of(LARGE, 0, LARGE + 1),
            frames_of(SMALL, tree=random_bytes(100_000)),
            frames_of(*[1] * 3000, 0, 300),
        ]
        with self.opened(tmp_path) as store:
            keys = [uuid4() for _ in cases]
            for key, frames in zip(keys, cases, strict=True):
                assert store.write(key, frames) > 0, "write returns the bytes taken on disk"
            for writable in (False, True):
                for verify in (False, True):
                    for key, frames in zip(keys, cases, strict=True):
                        got = store.read(key, writable=writable, verify=verify)
                        assert same_frames(got, frames), f"{key} came back as other frames"

    def test_any_contiguous_memory_can_be_a_buffer(self, tmp_path: Path) -> None:
        """Bytes, bytearrays, and memory of arrays, writeable or not."""
        content = random_bytes(5000)
        array = np.frombuffer(bytearray(content), np.uint8)
        views: list[Buffer] = [memoryview(content), array.data, array.data.toreadonly()]
        buffers = [content, bytearray(content), *views]
        with self.opened(tmp_path) as store:
            store.write(key := uuid4(), Frames("kit", b"tree", buffers))
            got = store.read(key, writable=False, verify=True)
        assert [bytes(buffer) for buffer in got.buffers] == [content] * len(buffers)

    def test_a_blob_is_a_copy_of_what_was_written(self, tmp_path: Path) -> None:
        """The memory is the writer's again when ``write`` returns."""
        for size in (SMALL, LARGE):
            content = random_bytes(size)
            memory = bytearray(content)
            with self.opened(tmp_path) as store:
                store.write(key := uuid4(), Frames("kit", b"tree", [memory]))
                memory[:] = bytes(size)
                got = bytes(store.read(key, writable=False, verify=True).buffers[0])
            assert got == content, "the blob changed with the memory that it was written from"

    def test_buffers_are_bytes_and_as_writeable_as_asked_for(self, tmp_path: Path) -> None:
        """One dimension of bytes; read-only for good, or writeable."""
        frames = frames_of(SMALL, LARGE, 0, 1)
        with self.opened(tmp_path) as store:
            store.write(key := uuid4(), frames)
            for writable in (False, True):
                for buffer in store.read(key, writable=writable, verify=False).buffers:
                    view = memoryview(buffer)
                    assert view.ndim == 1 and view.itemsize == 1 and view.c_contiguous
                    assert view.readonly is not writable, f"readonly={view.readonly}, writable={writable}"
                    assert np.frombuffer(buffer, np.uint8).flags.writeable is writable

    def test_writeable_buffers_are_memory_of_their_own(self, tmp_path: Path) -> None:
        """What is written into them reaches neither the blob nor another reader."""
        for size in (SMALL, LARGE):
            frames = frames_of(size)
            with self.opened(tmp_path) as store:
                store.write(key := uuid4(), frames)
                kept = store.read(key, writable=False, verify=False)
                first, second = (store.read(key, writable=True, verify=False) for _ in range(2))
                memoryview(first.buffers[0])[:] = bytes(size)
                assert same_frames(second, frames), "two readers share writeable memory"
                assert same_frames(kept, frames), "a read-only buffer shares memory with a writeable one"
                assert same_frames(store.read(key, writable=False, verify=True), frames), "the blob changed"

    def test_what_was_read_outlives_its_blob_and_the_store(self, tmp_path: Path) -> None:
        """Values made of the buffers stay in use after the blob was deleted."""
        frames = frames_of(SMALL, LARGE)
        with self.opened(tmp_path) as store:
            store.write(first := uuid4(), frames)
            store.write(second := uuid4(), frames)
            got = [store.read(key, writable=False, verify=False) for key in (first, second)]
            store.delete(first)
            store.write(uuid4(), frames_of(SMALL, LARGE, seed=1))
            assert same_frames(got[0], frames), "deleting a blob changed what was read from it"
        assert all(same_frames(each, frames) for each in got), "closing changed what was read before"

    # ------------------------------------------------------------------ whole or not at all

    def test_a_blob_is_there_whole_or_not_at_all(self, tmp_path: Path) -> None:
        """Invariants 1 and 2: readers that look while it is written see nothing, or all of it for good."""
        with self.opened(tmp_path) as store:
            for turn in range(20):
                key, frames = uuid4(), frames_of((SMALL, LARGE)[turn % 2], 10, seed=turn)
                written = threading.Event()
                look = partial(_look, store, key, frames, written)
                together(partial(_write, store, key, frames, written), look, look)

    def test_what_is_not_there_is_damaged(self, tmp_path: Path) -> None:
        """Never written, or deleted: the error names the key."""
        with self.opened(tmp_path) as store:
            store.write(deleted := uuid4(), frames_of(SMALL))
            store.delete(deleted)
            for key in (uuid4(), deleted):
                for writable in (False, True):
                    error = raised(CorruptBlobError, store.read, key, writable=writable, verify=False)
                    assert error.key == key, "the error names another key, or none"

    def test_damage_to_a_buffer_is_found_by_its_checksum(self, tmp_path: Path) -> None:
        """With ``verify=True``, wherever the bit is."""
        for size in (SMALL, LARGE):
            for place in (0, size // 2, size - 20):
                with self.opened(tmp_path) as store:
                    frames = frames_of(size)
                    store.write(key := uuid4(), frames)
                    needle = bytes(frames.buffers[0])[place : place + 20]
                    self.damage(store, self.directory(tmp_path), needle)
                    for writable in (False, True):
                        raised(CorruptBlobError, store.read, key, writable=writable, verify=True)

    def test_damage_to_a_header_is_always_found(self, tmp_path: Path) -> None:
        """Also with ``verify=False``: the tree and the blob's own key are never taken unchecked."""
        for size in (SMALL, LARGE):
            for part in ("tree", "key") if self.names_keys else ("tree",):
                with self.opened(tmp_path) as store:
                    key, tree = uuid4(), random_bytes(40, 7)
                    store.write(key, frames_of(size, tree=tree))
                    self.damage(store, self.directory(tmp_path), tree if part == "tree" else key.bytes)
                    for writable in (False, True):
                        raised(CorruptBlobError, store.read, key, writable=writable, verify=False)

    def test_damage_to_one_blob_leaves_the_others(self, tmp_path: Path) -> None:
        """They are read, and new ones written."""
        with self.opened(tmp_path) as store:
            blobs = {uuid4(): frames_of(SMALL, seed=seed) for seed in range(10)}
            for key, frames in blobs.items():
                store.write(key, frames)
            damaged, frames = blobs.popitem()
            self.damage(store, self.directory(tmp_path), bytes(frames.buffers[0])[100:120])
            raised(CorruptBlobError, store.read, damaged, writable=False, verify=True)
            store.delete(damaged)
            store.write(damaged, frames)
            for key, whole in {**blobs, damaged: frames}.items():
                assert same_frames(store.read(key, writable=False, verify=True), whole)

    # ------------------------------------------------------------------ threads

    def test_threads_write_read_and_delete_at_once(self, tmp_path: Path) -> None:
        """Each its own keys, and all of them one that stays."""
        with self.opened(tmp_path) as store:
            common, frames = uuid4(), frames_of(SMALL, seed=99)
            store.write(common, frames)
            together(*(partial(_work, store, seed, common, frames) for seed in range(8)))
            store.delete(common)
            assert store.disk_bytes <= self.slack, "something that was deleted still counts"

    # ------------------------------------------------------------------ deleting and closing

    def test_deleting_is_for_good_and_may_be_repeated(self, tmp_path: Path) -> None:
        """What is gone is no error, and the key may be written again."""
        with self.opened(tmp_path) as store:
            key, kept = uuid4(), uuid4()
            store.write(kept, frames_of(SMALL, seed=1))
            for seed in range(2):
                store.write(key, frames_of(SMALL, seed=seed))
                assert same_frames(store.read(key, writable=False, verify=True), frames_of(SMALL, seed=seed))
                store.delete(key)
                store.delete(key)
            store.delete(uuid4())
            assert same_frames(store.read(kept, writable=False, verify=True), frames_of(SMALL, seed=1))

    def test_places_are_text(self, tmp_path: Path) -> None:
        """For messages: of a key that is there, of one that is not, and of the store."""
        with self.opened(tmp_path) as store:
            store.write(key := uuid4(), frames_of(SMALL))
            for place in (store.locate(key), store.locate(uuid4()), store.path):
                assert isinstance(place, str) and place, f"{place!r} is no place"

    def test_close_removes_what_the_store_made_and_nothing_else(self, tmp_path: Path) -> None:
        """Invariant 13; and a second call does nothing."""
        directory = self.directory(tmp_path)
        with self.opened(tmp_path) as store:
            for seed in range(30):
                store.write(uuid4(), frames_of((SMALL, LARGE)[seed % 2], seed=seed))
            (directory / "foreign").mkdir()
            for foreign in (directory / "notes.txt", directory / "foreign" / "notes.txt"):
                foreign.write_text("mine")
            store.close()
            left = files_below(directory).keys()
            assert left == {"notes.txt", "foreign/notes.txt"}, f"files after close: {sorted(left)}"
            assert {path.name for path in directory.iterdir()} == {"notes.txt", "foreign"}
            store.close()
            assert files_below(directory).keys() == left, "the second close took something away"

    def test_a_closed_store_refuses_and_its_directory_can_be_used_again(self, tmp_path: Path) -> None:
        """Typed errors, and nothing of the former store shows in the next one."""
        with self.opened(tmp_path) as store:
            store.write(key := uuid4(), frames_of(SMALL))
            store.close()
            raised(StorageError, store.write, uuid4(), frames_of(SMALL))
            raised((CorruptBlobError, StorageError), store.read, key, writable=False, verify=False)
        assert files_below(self.directory(tmp_path)) == {}, "a write to the closed store left a file"
        with self.opened(tmp_path) as store:
            raised(CorruptBlobError, store.read, key, writable=False, verify=False)
            store.write(key, frames_of(SMALL))
            assert same_frames(store.read(key, writable=False, verify=True), frames_of(SMALL))


# ------------------------------------------------------------------ what the threads do


def _write(store: BlobStore, key: UUID, frames: Frames, written: threading.Event) -> None:
    try:
        store.write(key, frames)
    finally:
        written.set()


def _look(store: BlobStore, key: UUID, frames: Frames, written: threading.Event) -> None:
    seen = False
    while not seen or not written.is_set():
        last = written.is_set()
        try:
            got = store.read(key, writable=False, verify=False)
        except CorruptBlobError as error:
            assert not seen, "a blob that was there is gone"
            assert not last, f"what was written is not there: {error}"
        else:
            assert same_frames(got, frames), "a reader saw part of a blob"
            seen = True


def _work(store: BlobStore, seed: int, common: UUID, frames: Frames) -> None:
    for turn in range(20):
        key, mine = uuid4(), frames_of((SMALL, LARGE)[turn % 5 == 0], seed=100 * seed + turn)
        store.write(key, mine)
        assert same_frames(store.read(key, writable=turn % 3 == 0, verify=True), mine)
        assert same_frames(store.read(common, writable=False, verify=turn % 2 == 0), frames)
        store.delete(key)
        raised(CorruptBlobError, store.read, key, writable=False, verify=False)
