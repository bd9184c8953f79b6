"""What the tests of a store have to be told, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import SkipTest

from fbcache.store.protocol import BlobStore, StoreLimits
from fbcache.testing.material import flip_where

_NO_LIMITS = StoreLimits()

#: Sizes of a small blob, and of one that is large to any store.
SMALL = 1000
LARGE = 400_000


class StoreKit(ABC):
    """What a kit for stores has to be told; see :class:`~fbcache.testing.StoreTests`."""

    #: Bytes by which ``disk_bytes`` may be off, for a store that takes and gives back room in pieces.
    slack = 0

    #: Whether a stored blob says whose it is. One that is only ever found by its place need not.
    names_keys = True

    @abstractmethod
    def make_store(self, directory: Path, limits: StoreLimits) -> BlobStore:
        """Return a new store below ``directory``, which is empty and private to this user."""

    def failing(self, store: BlobStore) -> AbstractContextManager[None]:
        """Return a context in which the store's writes fail as on a disk that does not work.

        Default: the tests that need it are skipped.
        """
        raise SkipTest(f"{type(self).__name__}.failing does not say how the disk is made to fail")

    def damage(self, store: BlobStore, directory: Path, needle: bytes) -> None:
        """Change a bit in each place where these bytes are stored.

        ``needle`` is part of a blob: of a buffer, or of its header. Default: files below the directory are
        searched for it.
        """
        places = flip_where(needle, directory)
        assert places, f"no file in {directory} holds the blob's bytes: {type(self).__name__} needs damage()"

    @contextmanager
    def opened(self, tmp_path: Path, limits: StoreLimits = _NO_LIMITS) -> Iterator[BlobStore]:
        """Make a store in a directory of its own, and close it at the end."""
        directory = self.directory(tmp_path)
        directory.mkdir(mode=0o700, exist_ok=True)
        store = self.make_store(directory, limits)
        try:
            yield store
        finally:
            store.close()

    def directory(self, tmp_path: Path) -> Path:
        """Where :meth:`opened` makes stores."""
        return tmp_path / "store"

    def near(self, one: int, other: int) -> bool:
        """Whether two numbers of bytes are the same, but for the slack."""
        return abs(one - other) <= self.slack
