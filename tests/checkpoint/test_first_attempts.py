"""What a caller gets wrong, or right, at the first attempt; and a tree that would take any memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest

from fbcache import MsgpackCodec
from fbcache.codec import Frames, tags
from fbcache.errors import CorruptBlobError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


def test_one_name_as_a_text_is_no_list_of_names(pool, target):
    for name in ("train", "t", "r", "a", "i", "n"):
        pool[name] = 1
    with pytest.raises(TypeError, match=r"pass \['train'\]"):
        pool.save(target, names="train")


@pytest.mark.parametrize("tag", [tags.BYTES, tags.BYTEARRAY])
def test_bytes_that_name_one_buffer_many_times_are_damage(tag):
    tree = msgpack.packb([tags.LIST, [[tag, 0]] * 100])
    frames = Frames("msgpack", tree, [bytes(1_000_000)])
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlobError):
            MsgpackCodec().decode(frames, writable=False, allow_pickle=False)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_a_guard_keeps_the_handle_that_it_came_from(pool, target, make_pool):
    key = pool.put("x", np.arange(3)).persist(target)
    with make_pool().register(target, key).load() as value:
        assert value.sum() == 3
