"""The kit for stores, continued: writes that fail, limits, and what is counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError, DiskFullError, StorageError
from fbcache.store.protocol import BlobStore, StoreLimits
from fbcache.testing.material import files_below, frames_of, raised, same_frames, together
from fbcache.testing.storekit import LARGE, SMALL, StoreKit


class RoomTests(StoreKit):
    """Failures and limits; part of :class:`~fbcache.testing.StoreTests`."""

    # ------------------------------------------------------------------ writes that fail

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path) -> None:
        """Invariant 9: one typed error, no blob, no file, no room taken; and the same write works later."""
        for size in (SMALL, LARGE):
            with self.opened(tmp_path) as store:
                store.write(other := uuid4(), frames_of(size, seed=1))  # whatever the store sets up, it has
                before, files = store.disk_bytes, files_below(self.directory(tmp_path)).keys()
                key, frames = uuid4(), frames_of(size)
                with self.failing(store):
                    raised(StorageError, store.write, key, frames)
                raised(CorruptBlobError, store.read, key, writable=False, verify=False)
                assert store.disk_bytes == before, "the failed write still counts"
                assert files_below(self.directory(tmp_path)).keys() <= files, "the failed write left a file"
                store.write(key, frames)
                assert same_frames(store.read(key, writable=False, verify=True), frames)
                assert same_frames(store.read(other, writable=False, verify=True), frames_of(size, seed=1))

    def test_a_limit_in_the_way_is_a_full_disk(self, tmp_path: Path) -> None:
        """The error says what was needed and what was free; nothing is stored; room lets the write work."""
        with self.opened(tmp_path, StoreLimits(max_disk=2 * LARGE)) as store:
            first, second = uuid4(), uuid4()
            store.write(first, frames_of(LARGE))
            before = store.disk_bytes
            error = raised(DiskFullError, store.write, second, frames_of(3 * LARGE // 2))
            assert error.needed is not None and error.needed >= 3 * LARGE // 2, "needed is too little"
            assert error.free is not None and error.free < error.needed, "free is more than was needed"
            assert error.path, "the error names no path"
            raised(CorruptBlobError, store.read, second, writable=False, verify=False)
            assert store.disk_bytes == before, "the refused write still counts"
            store.delete(first)
            store.write(second, frames_of(3 * LARGE // 2))

    def test_min_free_is_left_free(self, tmp_path: Path) -> None:
        """With more than the disk has, nothing is written."""
        with self.opened(tmp_path, StoreLimits(min_free=2**62)) as store:
            raised(DiskFullError, store.write, uuid4(), frames_of(SMALL))
            assert store.bytes_free == 0 and store.disk_bytes <= self.slack

    # ------------------------------------------------------------------ room

    def test_room_is_counted(self, tmp_path: Path) -> None:
        """``disk_bytes`` and ``bytes_free`` move by what is written and deleted."""
        most = 10 * LARGE
        with self.opened(tmp_path, StoreLimits(max_disk=most)) as store:
            empty = store.disk_bytes
            blobs = {uuid4(): frames_of(size, seed=size) for size in (SMALL, LARGE, 5 * SMALL, 0)}
            taken = 0
            for key, frames in blobs.items():
                nbytes = store.write(key, frames)
                assert nbytes >= frames.nbytes, "random bytes take less room than there are"
                taken += nbytes
                assert self.near(store.disk_bytes, empty + taken), "disk_bytes does not follow the writes"
                assert self.near(store.disk_bytes + store.bytes_free, most), "bytes_free is not what is left"
            for key in blobs:
                store.delete(key)
            assert self.near(store.disk_bytes, empty), "deleting gives the room back"
            assert self.near(store.disk_bytes + store.bytes_free, most)

    def test_writers_at_once_stay_within_the_limit(self, tmp_path: Path) -> None:
        """Each write has its room or is refused; the bytes of all of them never exceed ``max_disk``."""
        most = 10 * LARGE
        with self.opened(tmp_path, StoreLimits(max_disk=most)) as store:
            blobs = [[(uuid4(), frames_of(LARGE // 2, seed=seed)) for _ in range(8)] for seed in range(8)]
            outcomes = together(*(partial(_fill, store, most + self.slack, mine) for mine in blobs))
            stored = {key: nbytes for outcome in outcomes for key, nbytes in outcome.items()}
            assert 0 < len(stored) < 64, "some have room, and some have not"
            assert sum(stored.values()) <= most + self.slack, "more was stored than may be"
            for mine in blobs:
                for key, frames in mine:
                    if key in stored:
                        assert same_frames(store.read(key, writable=False, verify=True), frames)
                        store.delete(key)
                    else:
                        raised(CorruptBlobError, store.read, key, writable=False, verify=False)
            assert store.disk_bytes <= self.slack, "refused writes keep room"


def _fill(store: BlobStore, most: int, blobs: list[tuple[UUID, Frames]]) -> dict[UUID, int]:
    """Write what there is room for; return what each blob took."""
    stored = {}
    for key, frames in blobs:
        try:
            stored[key] = store.write(key, frames)
        except DiskFullError:
            pass
        assert store.disk_bytes <= most, "more is on disk than may be"
    return stored
