"""Blobs damaged on disk: a typed error that names key and file, never a wrong value, and the pool goes on."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from fbcache import CorruptBlobError, Fb, FBPool, State, StorageError
from fbcache.codec.layout import PREFIX_SIZE, read_prefix
from tests.conftest import MakePool

SMALL = 1_000
LARGE = 300_000  # is mapped
BUDGET = 8 * LARGE


def content(number: int, nbytes: int) -> np.ndarray[Any, Any]:
    return np.full(nbytes, number, np.uint8)


def file_of(pool: FBPool, fb: Fb) -> Path:
    return Path(pool._engine.store.locate(fb.key))


def spilled(pool: FBPool, value: Any, name: str = "x") -> tuple[Fb, Path]:
    fb = pool.put(name, value, copy=True)  # else the test's own variable would be found again
    pool.evict()
    assert fb.state is State.SPILLED
    return fb, file_of(pool, fb)


def flip(file: Path, offset: int, mask: int = 0xFF) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ mask]))


def head_size(file: Path) -> int:
    """How long prefix and header are."""
    return read_prefix(memoryview(file.read_bytes()), key=UUID(file.name), path=str(file))


# ---------------------------------------------------------------------------- damages


def truncate(keep: Callable[[Path], int]) -> Callable[[Path, Path], None]:
    def damage(file: Path, other: Path) -> None:
        os.truncate(file, keep(file))

    return damage


def swap(file: Path, other: Path) -> None:
    aside = file.with_name("aside")
    file.rename(aside)
    other.rename(file)
    aside.rename(other)


def overwrite_by_other(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def link_to_other(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(other)


def link_to_its_own_copy(file: Path, other: Path) -> None:
    copy = file.with_name("copy")
    file.rename(copy)
    file.symlink_to(copy)


def dangle(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def remove(file: Path, other: Path) -> None:
    file.unlink()


def make_directory(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def make_fifo(file: Path, other: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def lengthen(file: Path, other: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


def fill_with_zeros(file: Path, other: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def fill_with_ones(file: Path, other: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


def flip_header(offset: int) -> Callable[[Path, Path], None]:
    return lambda file, other: flip(file, offset)


DAMAGES = {
    "emptied": truncate(lambda file: 0),
    "cut within the prefix": truncate(lambda file: PREFIX_SIZE - 1),
    "cut after the prefix": truncate(lambda file: PREFIX_SIZE),
    "cut after the header": truncate(head_size),
    "cut in the middle": truncate(lambda file: file.stat().st_size // 2),
    "cut by a byte": truncate(lambda file: file.stat().st_size - 1),
    "lengthened": lengthen,
    "swapped with another": swap,
    "overwritten by another": overwrite_by_other,
    "link to another": link_to_other,
    "link to its own copy": link_to_its_own_copy,
    "dangling link": dangle,
    "removed": remove,
    "a directory": make_directory,
    "a pipe": make_fifo,
    "zeros": fill_with_zeros,
    "ones": fill_with_ones,
    "magic": flip_header(0),
    "version": flip_header(6),
    "header's length": flip_header(8),
    "header's length, high byte": flip_header(15),
    "header's checksum": flip_header(16),
    "header": flip_header(PREFIX_SIZE + 1),
}


async def _read_in_a_task(pool: FBPool) -> None:
    async with pool.get("x"):
        pass


ACCESSES: dict[str, Callable[[FBPool], Any]] = {
    "get": lambda pool: pool.get("x").__enter__(),
    "get_mut": lambda pool: pool.get_mut("x").__enter__(),
    "get_mut, rollback": lambda pool: pool.get_mut("x", rollback=True).__enter__(),
    "pool[]": lambda pool: pool["x"],
    "pop": lambda pool: pool.pop("x"),
    "async": lambda pool: asyncio.run(_read_in_a_task(pool)),
}


@pytest.mark.files
@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("mmap", [True, False], ids=["map", "read"])
def test_a_damaged_blob_is_told_by_key_and_file_and_the_pool_goes_on(
    make_pool: MakePool, nbytes: int, damage: Callable[[Path, Path], None], mmap: bool
) -> None:
    pool = make_pool(BUDGET, mmap=mmap)
    pool.put("other", content(2, nbytes))
    pool.put("third", content(3, nbytes))
    fb, file = spilled(pool, content(1, nbytes))
    other = pool.put("victim", content(4, nbytes))
    pool.evict()
    damage(file, file_of(pool, other))
    key = fb.key
    for access in ACCESSES.values():
        with pytest.raises(CorruptBlobError) as caught:
            access(pool)
        assert caught.value.key == key
        assert caught.value.path == str(file)
        assert str(key) in str(caught.value)
        assert str(file) in str(caught.value)
        assert caught.value.reason
        assert pool.stats().pinned_bytes == 0
        assert fb.state is State.SPILLED
        assert fb.key == key
        assert "x" in pool
        pool.validate()
    for name, number in [("other", 2), ("third", 3)]:
        with pool.get(name) as value:
            assert (value == number).all()
            assert len(value) == nbytes
    pool.put("x", content(5, nbytes))
    fb.drop()
    with suppress(StorageError) if file.is_dir() else nullcontext():
        pool.drain()
    pool.evict()
    assert (pool["x"] == 5).all()
    if file.is_dir():
        file.rmdir()
    file.with_name("copy").unlink(missing_ok=True)


@pytest.mark.files
@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES.keys())
@pytest.mark.parametrize("how", ["replace", "delete", "drop"])
def test_an_entry_whose_blob_is_damaged_can_be_replaced_and_deleted(
    make_pool: MakePool, access: Callable[[FBPool], Any], how: str
) -> None:
    pool = make_pool(BUDGET)
    fb, file = spilled(pool, content(1, SMALL))
    flip(file, PREFIX_SIZE)
    with pytest.raises(CorruptBlobError):
        access(pool)
    if how == "replace":
        pool["x"] = 7
        assert pool["x"] == 7
    else:
        pool.delete("x")
        assert "x" not in pool
    fb.drop()
    pool.drain()
    assert not file.exists()
    assert pool.stats().disk_bytes == 0
    pool.validate()


@pytest.mark.files
@pytest.mark.parametrize("access", ["make_mut", "load", "load_mut"])
def test_a_handle_whose_blob_is_damaged_says_so_and_can_be_dropped(make_pool: MakePool, access: str) -> None:
    pool = make_pool(BUDGET)
    fb = pool.insert(content(1, SMALL))
    other = fb.clone()
    pool.evict()
    file = file_of(pool, fb)
    key = fb.key
    os.truncate(file, 10)
    with pytest.raises(CorruptBlobError) as caught:
        getattr(fb, access)().__enter__()
    assert caught.value.path == str(file)
    assert caught.value.key == key
    pool.validate()
    fb.drop()
    other.drop()
    pool.drain()
    assert pool.stats().entries == 0
    assert pool.stats().disk_bytes == 0


@pytest.mark.files
def test_a_blob_that_is_mended_can_be_read_again(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET)
    _, file = spilled(pool, content(1, LARGE))
    flip(file, PREFIX_SIZE)
    with pytest.raises(CorruptBlobError):
        pool["x"]
    flip(file, PREFIX_SIZE)
    assert (pool["x"] == 1).all()


@pytest.mark.files
def test_many_readers_of_a_damaged_blob_all_hear_of_it(
    make_pool: MakePool, spawn: Callable[..., Any]
) -> None:
    pool = make_pool(BUDGET)
    _, file = spilled(pool, content(1, LARGE))
    flip(file, PREFIX_SIZE)
    readers = [spawn(ACCESSES["get"], pool) for _ in range(8)]
    assert all(isinstance(reader.error(), CorruptBlobError) for reader in readers)
    pool.validate()
    assert pool.stats().pinned_bytes == 0


# ------------------------------------------------------------------- each byte of a blob


VALUES: dict[str, Any] = {
    "array": np.arange(60, dtype=np.uint16),
    "dict": {"a": [1, 2.5, None], "b": np.arange(40), "s": "text" * 30},
    "bytes": bytes(range(200)),
}


@pytest.mark.files
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_with_verify_always_a_flipped_byte_anywhere_is_told(make_pool: MakePool, value: Any) -> None:
    pool = make_pool(BUDGET, verify="always")
    fb, file = spilled(pool, value)
    for offset in range(file.stat().st_size):
        for mask in (0x01, 0xFF):
            flip(file, offset, mask)
            with pytest.raises(CorruptBlobError) as caught:
                pool["x"]
            assert caught.value.path == str(file)
            assert caught.value.key == fb.key
            flip(file, offset, mask)
    pool["x"]
    pool.validate()


@pytest.mark.files
@pytest.mark.parametrize("mmap", [True, False], ids=["map", "read"])
@pytest.mark.parametrize("access", ["get", "get_mut"])
def test_with_verify_always_a_flipped_byte_in_a_large_blob_is_told(
    make_pool: MakePool, mmap: bool, access: str
) -> None:
    pool = make_pool(BUDGET, verify="always", mmap=mmap)
    fb, file = spilled(pool, {"a": content(1, LARGE), "b": content(2, 3 * 4096), "c": content(3, 100)})
    size = file.stat().st_size
    for offset in {*range(0, size, size // 50), *range(size - 100, size, 7)}:
        flip(file, offset, 0x10)
        with pytest.raises(CorruptBlobError) as caught:
            ACCESSES[access](pool)
        assert caught.value.path == str(file)
        assert caught.value.key == fb.key
        flip(file, offset, 0x10)
    with pool.get("x") as value:
        assert (value["a"] == 1).all()


@pytest.mark.files
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_a_flipped_byte_anywhere_in_a_header_is_told_without_being_asked_to_verify(
    make_pool: MakePool, value: Any
) -> None:
    pool = make_pool(BUDGET, verify="never")
    _, file = spilled(pool, value)
    for offset in range(head_size(file)):
        flip(file, offset, 0x20)
        with pytest.raises(CorruptBlobError):
            pool["x"]
        flip(file, offset, 0x20)


@pytest.mark.files
def test_a_blob_cut_anywhere_is_told_without_being_asked_to_verify(make_pool: MakePool) -> None:
    pool = make_pool(BUDGET, verify="never")
    _, file = spilled(pool, VALUES["dict"])
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptBlobError):
            pool["x"]
    file.write_bytes(whole)
    assert pool["x"]["s"] == VALUES["dict"]["s"]


class Plain:
    """Goes by pickle."""

    def __init__(self, text: str) -> None:
        self.text = text


@pytest.mark.files
@pytest.mark.parametrize("value", ["ä" * 5_000, Plain("ä" * 50_000)], ids=["text", "pickle"])
def test_content_that_no_longer_decodes_is_told_by_key_and_file(make_pool: MakePool, value: Any) -> None:
    """Payloads of a session's own blobs are trusted, and may turn out to be no value all the same."""
    pool = make_pool(BUDGET)
    fb, file = spilled(pool, value)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size - 1_000)
        opened.write(b"\xff" * 1_000)
    with pytest.raises(CorruptBlobError) as caught:
        pool["x"]
    assert caught.value.path == str(file)
    assert caught.value.key == fb.key
    pool.validate()
    pool["x"] = 1
    assert pool["x"] == 1
