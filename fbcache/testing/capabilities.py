"""The kit for stores, continued: what only some can do. Tests are skipped where a store cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest
from uuid import UUID, uuid4

from fbcache.codec.frames import Frames
from fbcache.codec.layout import pack, unpack_header
from fbcache.errors import CorruptBlobError, DiskFullError, StorageError
from fbcache.store.protocol import Batching, BlobStore, FileBacked, StoreLimits
from fbcache.testing.material import files_below, frames_of, raised, same_frames
from fbcache.testing.storekit import LARGE, SMALL, StoreKit


@dataclass
class Lent:
    """A blob's file somewhere else; counts how often it was given back."""

    file: Path
    nbytes: int
    digest: int | None
    released: int = 0

    @property
    def path(self) -> str:
        """The file."""
        return str(self.file)

    def release(self) -> None:
        """Count one more return."""
        self.released += 1


class FileBackedTests(StoreKit):
    """Tests for a :class:`~fbcache.store.protocol.FileBacked` store."""

    def test_the_file_of_a_blob_is_exactly_the_blob(self, tmp_path: Path) -> None:
        """Byte for byte, so that it may be linked into a tracked directory."""
        for size in (SMALL, LARGE):
            with self.opened(tmp_path) as store:
                backed = _backed(store)
                key, frames = uuid4(), frames_of(size, 3, size)
                store.write(key, frames)
                content = Path(backed.file_of(key)).read_bytes()
                assert content == _packed(key, frames), "the file holds something besides the blob"

    def test_a_borrowed_blob_is_read_where_it_is_and_given_back_once(self, tmp_path: Path) -> None:
        """The file is another's: it stays, and takes none of the store's room."""
        with self.opened(tmp_path) as store:
            backed = _backed(store)
            before = store.disk_bytes
            key, frames = uuid4(), frames_of(LARGE)
            lent = _lend(tmp_path, key, frames)
            backed.borrow(key, lent)
            assert backed.file_of(key) == lent.path, "file_of does not lead to what was borrowed"
            for writable in (False, True):
                assert same_frames(store.read(key, writable=writable, verify=True), frames)
            assert store.disk_bytes == before, "a borrowed blob takes none of the store's room"
            store.delete(key)
            store.delete(key)
            assert lent.released == 1, f"the loan was given back {lent.released} times"
            raised(CorruptBlobError, store.read, key, writable=False, verify=False)
        assert lent.file.exists(), "the lender's file is gone"
        assert lent.file.read_bytes() == _packed(key, frames), "the lender's file changed"

    def test_closing_gives_back_what_is_borrowed(self, tmp_path: Path) -> None:
        """And leaves the lender's file alone."""
        with self.opened(tmp_path) as store:
            lent = _lend(tmp_path, key := uuid4(), frames_of(SMALL))
            _backed(store).borrow(key, lent)
        assert lent.released == 1, f"the loan was given back {lent.released} times"
        assert lent.file.exists(), "the lender's file is gone"

    def test_a_borrowed_blob_that_is_another_than_was_lent_is_damaged(self, tmp_path: Path) -> None:
        """The loan's digest is that of the header."""
        with self.opened(tmp_path) as store:
            lent = _lend(tmp_path, key := uuid4(), frames_of(SMALL))
            assert lent.digest is not None
            lent.digest ^= 1
            _backed(store).borrow(key, lent)
            raised(CorruptBlobError, store.read, key, writable=False, verify=False)


class BatchingTests(StoreKit):
    """Tests for a :class:`~fbcache.store.protocol.Batching` store."""

    def test_many_blobs_are_written_at_once(self, tmp_path: Path) -> None:
        """One result each, in order; each blob is as if written alone."""
        with self.opened(tmp_path) as store:
            write_many = _batching(store).write_many
            empty = store.disk_bytes
            assert list(write_many([])) == []
            items = [(uuid4(), frames_of(SMALL + seed, seed % 3, seed=seed)) for seed in range(50)]
            results = write_many(items)
            assert len(results) == len(items), "there is one result for each item"
            for result, (key, frames) in zip(results, items, strict=True):
                assert isinstance(result, int) and result >= frames.nbytes, f"{result!r} is no result"
                assert same_frames(store.read(key, writable=False, verify=True), frames)
            taken = sum(result for result in results if isinstance(result, int))
            assert self.near(store.disk_bytes, empty + taken), "disk_bytes does not follow the writes"
            for key, _ in items:
                store.delete(key)
            assert self.near(store.disk_bytes, empty), "deleting gives the room back"

    def test_of_many_blobs_those_without_room_fail_alone(self, tmp_path: Path) -> None:
        """Nothing is raised: the others are written, and what failed leaves nothing."""
        with self.opened(tmp_path, StoreLimits(max_disk=LARGE)) as store:
            write_many = _batching(store).write_many
            sizes = (SMALL, 2 * LARGE, SMALL, LARGE // 2, LARGE, SMALL)
            items = [(uuid4(), frames_of(size, seed=seed)) for seed, size in enumerate(sizes)]
            results = write_many(items)
            for size, result, (key, frames) in zip(sizes, results, items, strict=True):
                if size >= LARGE:
                    assert isinstance(result, DiskFullError), f"{result!r}, where a limit is in the way"
                    raised(CorruptBlobError, store.read, key, writable=False, verify=False)
                else:
                    assert isinstance(result, int), f"{result!r}, where there is room"
                    assert same_frames(store.read(key, writable=False, verify=True), frames)

    def test_many_blobs_fail_on_a_disk_that_does_not_work(self, tmp_path: Path) -> None:
        """Each with an error of its own; nothing is left, and they can be written later."""
        with self.opened(tmp_path) as store:
            write_many = _batching(store).write_many
            store.write(uuid4(), frames_of(SMALL, seed=99))
            before, files = store.disk_bytes, files_below(self.directory(tmp_path)).keys()
            items = [(uuid4(), frames_of(SMALL, seed=seed)) for seed in range(10)]
            with self.failing(store):
                results = write_many(items)
            assert len(results) == len(items)
            assert all(isinstance(result, StorageError) for result in results), f"{results} on a broken disk"
            assert store.disk_bytes == before, "failed writes still count"
            assert files_below(self.directory(tmp_path)).keys() <= files, "failed writes left files"
            assert all(isinstance(result, int) for result in write_many(items))


def _backed(store: BlobStore) -> FileBacked:
    if not isinstance(store, FileBacked):
        raise SkipTest("the store's blobs are no files of their own")
    return store


def _batching(store: BlobStore) -> Batching:
    if not isinstance(store, Batching):
        raise SkipTest("the store writes one blob at a time")
    return store


def _packed(key: UUID, frames: Frames) -> bytes:
    return b"".join(pack(key, frames).pieces)


def _lend(directory: Path, key: UUID, frames: Frames) -> Lent:
    content = _packed(key, frames)
    file = directory / "lent"
    file.write_bytes(content)
    header = unpack_header(content, key=key, file_size=len(content), path=str(file))
    return Lent(file, len(content), header.digest)
