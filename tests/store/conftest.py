"""What the tests of stores share: a disk that can fail, a store on it, and a check for leaks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from fbcache.store import mapping, mounts
from fbcache.store.files import FileStore
from tests.blobs import open_descriptors
from tests.faults import FaultyDisk


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def store(tmp_path: Path, disk: FaultyDisk) -> FileStore:
    return FileStore(str(tmp_path), disk=disk)


@pytest.fixture(autouse=True)
def no_warning_about_the_test_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_warned", True)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Neither a descriptor nor a map is left after a test."""
    before = _held()
    yield
    if _held() != before:
        gc.collect()  # a caught exception and the frame that caught it hold each other
    assert all(now <= then for now, then in zip(_held(), before, strict=True))


def _held() -> tuple[int, int]:
    return open_descriptors(), len(mapping.LIVE_MAPS)
