"""A codec for one entry: put(..., codec=)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import Compressed, FBPool, Frames
from tests.conftest import MakePool

pytest.importorskip("zstandard")

SMOOTH = np.repeat(np.arange(100.0), 2000)


@pytest.fixture
def pool(make_pool: MakePool) -> FBPool:
    return make_pool("10MB")


def test_one_entry_is_compressed_and_the_others_are_not(pool: FBPool) -> None:
    pool.put("raw", SMOOTH.copy())
    pool.put("small", SMOOTH.copy(), codec=Compressed("zstd"))
    pool.evict(["raw"])
    raw = pool.stats().bytes_written
    pool.evict(["small"])
    assert pool.stats().bytes_written - raw < raw / 4
    with pool.get("small") as value:
        np.testing.assert_array_equal(value, SMOOTH)
        assert not value.flags.writeable


def test_the_codec_stays_the_entrys_through_changes_and_copies(pool: FBPool) -> None:
    fb = pool.put("x", SMOOTH.copy(), codec=Compressed("zstd"))
    pool.evict()
    with pool.get_mut("x") as value:
        value[0] = 7
    pool.evict()
    assert pool.stats().bytes_written < SMOOTH.nbytes
    twin = fb.clone()
    with twin.make_mut() as value:
        value[1] = 8
    pool.evict()
    assert pool.stats().bytes_written < SMOOTH.nbytes
    assert pool["x"][:2].tolist() == [7, 0]


def test_a_checkpoint_of_it_is_read_by_a_pool_that_was_told_nothing(pool: FBPool, tmp_path: Path) -> None:
    pool.put("x", SMOOTH.copy(), codec=Compressed("zstd"))
    pool.save(tmp_path / "saved")
    with FBPool.from_checkpoint(tmp_path / "saved") as other, other.get("x") as value:
        np.testing.assert_array_equal(value, SMOOTH)


def test_a_codec_that_only_its_maker_could_read_is_refused_and_nothing_is_stored(pool: FBPool) -> None:
    class Own:
        name = "own"

        def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
            raise NotImplementedError

        decode = encode

    with pytest.raises(ValueError, match="own codec is one of msgpack, compressed"):
        pool.put("x", 1, codec=Own())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decode"):
        pool.put("x", 1, codec="zstd")  # type: ignore[arg-type]
    assert len(pool) == 0 and not pool._engine.residency.codecs


def test_nothing_is_kept_of_entries_that_are_gone(pool: FBPool) -> None:
    pool.put("x", [1], codec=Compressed("zstd"))
    del pool["x"]
    with pytest.raises(TypeError):
        pool.put("y", [1], codec=Compressed("zstd"), nbytes="many")  # type: ignore[arg-type]
    assert not pool._engine.residency.codecs
