"""The kits of fbcache.testing: our own stores and codecs pass them, and each broken promise fails one."""

from __future__ import annotations

import errno
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest

from fbcache.codec import MsgpackCodec
from fbcache.errors import FBCacheError
from fbcache.store.diskcached import DiskcacheStore
from fbcache.store.files import FileStore
from fbcache.store.protocol import BlobStore, StoreLimits
from fbcache.testing import CodecTests, StoreTests
from tests import broken
from tests.faults import FaultyDisk, oserror


class TestFileStore(StoreTests):
    def make_store(self, directory: Path, limits: StoreLimits) -> FileStore:
        self.disk = FaultyDisk()
        return FileStore(str(directory), limits=limits, disk=self.disk)

    @contextmanager
    def failing(self, store: BlobStore) -> Iterator[None]:
        self.disk.fail("writev", error=oserror(errno.EIO), times=None)
        yield
        self.disk.clear()


class TestFileStoreWithoutMaps(TestFileStore):
    def make_store(self, directory: Path, limits: StoreLimits) -> FileStore:
        self.disk = FaultyDisk()
        return FileStore(str(directory), limits=limits, mmap=False, disk=self.disk)


class TestDiskcacheStore(StoreTests):
    def make_store(self, directory: Path, limits: StoreLimits) -> DiskcacheStore:
        pytest.importorskip("diskcache")
        self.disk = FaultyDisk()
        return DiskcacheStore(str(directory), limits=limits, disk=self.disk)

    @contextmanager
    def failing(self, store: BlobStore) -> Iterator[None]:
        assert isinstance(store, DiskcacheStore)
        self.disk.fail("writev", error=oserror(errno.EIO), times=None)
        cache = store._rows._cache
        connect = cache.connect

        def connect_for_reading() -> sqlite3.Connection:
            connection: sqlite3.Connection = connect()
            connection.execute("PRAGMA query_only = 1")
            return connection

        _close_idle(store)
        cache.connect = connect_for_reading
        yield
        cache.connect = connect
        _close_idle(store)
        self.disk.clear()

    def damage(self, store: BlobStore, directory: Path, needle: bytes) -> None:
        """Where SQLite itself sees nothing of it: in the row."""
        with closing(sqlite3.connect(directory / "diskcache" / "cache.db")) as database, database:
            rows = database.execute("SELECT rowid, value FROM Cache").fetchall()
            for row, value in rows:
                if needle in value:
                    place = value.index(needle)
                    changed = value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]
                    database.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (changed, row))
                    return
        super().damage(store, directory, needle)


def _close_idle(store: DiskcacheStore) -> None:
    while store._rows._idle:
        store._rows._idle.pop().close()


class TestMsgpackCodec(CodecTests):
    def make_codec(self) -> MsgpackCodec:
        return MsgpackCodec()

    def values(self) -> list[Any]:
        shared = [1, "two", float("nan")]
        return [
            *(None, True, -5, 1 << 80, 2.5, "text", b"bytes", 2j, Decimal("1.50")),
            [shared, (shared, {1, 2}), {"a": shared, (1, "key"): b"x" * 5000}],
            *(np.arange(5), np.arange(600.0).reshape(20, 30)[3:7, ::2], np.array([1, "x", None], object)),
            {"part": self.raw_arrays()[0], "whole": self.raw_arrays()},
            datetime(2020, 1, 1, tzinfo=UTC),
        ]

    def raw_arrays(self) -> list[Any]:
        base = np.arange(10_000.0)
        return [base, base.reshape(100, 100).T, base[10:900]]


# ------------------------------------------------------------------ each promise is tested


#: What is raised by a test that notices, or by the call that it makes; to be skipped is not among them.
NOTICED = (AssertionError, FBCacheError, KeyError)


def below(cls: type) -> list[Any]:
    return [one for each in cls.__subclasses__() for one in (each, *below(each))]


def names_in(kit: type) -> set[str]:
    return {name for name in dir(kit) if name.startswith("test_")}


class KitOfStores(TestFileStore):
    """The kit, for a store that is given."""

    __test__ = False

    def __init__(self, store: type[broken.Store]) -> None:
        self.store = store

    def make_store(self, directory: Path, limits: StoreLimits) -> FileStore:
        self.disk = FaultyDisk()
        return self.store(str(directory), limits=limits, disk=self.disk)


class KitOfCodecs(TestMsgpackCodec):
    """The kit, for a codec that is given."""

    __test__ = False

    def __init__(self, codec: type[broken.Codec]) -> None:
        self.codec = codec

    def make_codec(self) -> MsgpackCodec:
        return self.codec()


@pytest.mark.parametrize("test", sorted(names_in(StoreTests)))
def test_a_store_that_keeps_all_promises_passes(test: str, tmp_path: Path) -> None:
    getattr(KitOfStores(broken.Store), test)(tmp_path)


@pytest.mark.parametrize("store", below(broken.Store), ids=lambda store: store.__name__)
def test_a_store_that_breaks_a_promise_fails(store: type[broken.Store], tmp_path: Path) -> None:
    with pytest.raises(NOTICED):
        getattr(KitOfStores(store), store.fails)(tmp_path)


@pytest.mark.parametrize("codec", below(broken.Codec), ids=lambda codec: codec.__name__)
def test_a_codec_that_breaks_a_promise_fails(codec: type[broken.Codec]) -> None:
    with pytest.raises(NOTICED):
        getattr(KitOfCodecs(codec), codec.fails)()


@pytest.mark.parametrize(("kit", "base"), [(StoreTests, broken.Store), (CodecTests, broken.Codec)])
def test_every_test_of_a_kit_notices_something(kit: type, base: type) -> None:
    assert {each.fails for each in below(base)} == names_in(kit)


def test_a_kit_imports_no_pytest_and_skips_without_it() -> None:
    script = "import sys, fbcache.testing; assert not {'pytest', '_pytest'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(SkipTest, match="failing"):
        StoreTests.failing(TestFileStore(), None)  # type: ignore[arg-type]
    with pytest.raises(SkipTest, match="raw_arrays"):
        class Nothing(TestMsgpackCodec):
            __test__ = False

            def raw_arrays(self) -> list[Any]:
                return []

        Nothing().test_raw_memory_is_not_copied_when_it_is_encoded()
