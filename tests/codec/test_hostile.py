"""Trees that were not written by the encoder: an error of ours or a value, never anything else."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbcache.codec import Frames, MsgpackCodec, register, tags
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from tests.codec.roundtrip import HAS_STRINGS, texts_of_any_length

CODEC = MsgpackCodec()
REFUSED = CorruptBlobError if HAS_STRINGS else (CorruptBlobError, UnsupportedTypeError)
OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)


@register
@dataclass
class Point:
    x: Any
    y: Any


def sample() -> dict[str, Any]:
    shared = [1, "two", 3.0, b"four", None, True]
    big = np.arange(600.0).reshape(20, 30)
    return {
        "shared": [shared, shared, (shared, {1, 2}, frozenset({"a"}))],
        "big": big,
        "part": big[3:7, ::2],
        "small": np.arange(5, dtype=">i2"),
        "fields": np.zeros(3, [("a", "<f4", (2,)), ("b", [("c", "<M8[ns]")])]),
        "objects": np.array([1, "x", None], object),
        "texts": texts_of_any_length(["a", "b"]),
        "masked": np.ma.array([1, 2], mask=[0, 1]),
        "scalars": [np.float32(1.5), np.datetime64(5, "s"), np.str_("x"), np.void(b"abc")],
        "times": [datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=ZoneInfo("UTC"))],
        "offset": timezone(timedelta(hours=2), "two"),
        "numbers": [1 << 80, Decimal("1.50"), Fraction(1, 3), 2j, UUID(int=5), range(4), slice(1), ...],
        "bytes": b"x" * 5000,
        "array": bytearray(b"y" * 10),
        "point": Point([1, 2], shared),
        (1, "key"): {2: 3},
    }


def decoded(tree: bytes, buffers: list[bytes], *, writable: bool = False) -> Any:
    return CODEC.decode(Frames("msgpack", tree, buffers), writable=writable, allow_pickle=False)


def survives(tree: bytes, buffers: list[bytes]) -> None:
    for writable in (False, True):
        try:
            decoded(tree, buffers, writable=writable)
        except OURS:
            pass


def test_flipped_bits_in_a_tree_give_our_errors_or_a_value():
    rng = random.Random(1)
    frames = CODEC.encode(sample(), allow_pickle=False)
    buffers = [bytes(b) for b in frames.buffers]
    for _ in range(4000):
        tree = bytearray(frames.tree)
        for _ in range(rng.choice((1, 1, 2, 5))):
            tree[rng.randrange(len(tree))] ^= 1 << rng.randrange(8)
        survives(bytes(tree), buffers)


def test_truncated_trees_are_damaged():
    frames = CODEC.encode(sample(), allow_pickle=False)
    for length in range(len(frames.tree)):
        with pytest.raises(CorruptBlobError):
            decoded(frames.tree[:length], list(frames.buffers))


def test_missing_short_and_swapped_buffers_give_our_errors_or_a_value():
    frames = CODEC.encode(sample(), allow_pickle=False)
    buffers = [bytes(b) for b in frames.buffers]
    with pytest.raises(CorruptBlobError):
        decoded(frames.tree, [])
    for index in range(len(buffers)):
        survives(frames.tree, [*buffers[:index], buffers[index][:-1], *buffers[index + 1 :]])
    survives(frames.tree, buffers[::-1])


def nodes() -> st.SearchStrategy[Any]:
    texts = ["<f8", "|O8", "<U3", "|V0", "<M8[ns]", "f8,f8", "UTC", "../../etc/passwd"]
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=5)
        | st.binary(max_size=20)
        | st.sampled_from(texts)
    )
    known = sorted(v for k, v in vars(tags).items() if k.isupper() and type(v) is int and v < 64)

    def node(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        tagged = st.builds(
            lambda tag, rest: [tag, *rest], st.sampled_from(known), st.lists(children, max_size=6)
        )
        return st.lists(children, max_size=4) | st.dictionaries(leaves, children, max_size=3) | tagged

    return st.recursive(leaves, node, max_leaves=20)


@given(nodes())
def test_any_tree_of_nodes_gives_our_errors_or_a_value(node):
    survives(msgpack.packb(node), [b"12345678" * 8])


@given(st.binary(max_size=300))
def test_any_bytes_give_our_errors_or_a_value(tree):
    survives(tree, [b"12345678"])


def test_a_tree_may_be_nested_without_end():
    ints_first = {tags.LIST: 0, tags.TUPLE: 0, tags.DATETIME: 8, tags.RANGE: 2, tags.FRACTION: 1}
    for tag, first in ints_first.items():
        node: Any = None
        for _ in range(250):
            node = [tag, *[1] * first, [node] if first == 0 else node]
        with pytest.raises(CorruptBlobError):
            decoded(msgpack.packb(node), [])
    with pytest.raises(CorruptBlobError):
        decoded(b"\x91" * 100_000, [])


@pytest.mark.parametrize(
    "node",
    [
        [tags.ARRAY, "<f8", [2**40], b"", False],
        [tags.ARRAY, "<f8", [2**62, 2**62], b"12345678", False],
        [tags.ARRAY, "<f8", [-1], b"12345678", False],
        [tags.ARRAY, "<f8", [1], b"123456789", False],
        [tags.ARRAY, "<f8", [1], b"1234567", False],
        [tags.ARRAY, "<f8", [1], 0, False],
        [tags.ARRAY, "<f8", [1], -1, False],
        [tags.ARRAY, "|O8", [1], b"12345678", False],
        [tags.ARRAY, "O", [1], b"12345678", False],
        [tags.ARRAY, "|V8,O", [1], b"12345678", False],
        [tags.ARRAY, [["a"], ["|O8"], [0], [None], 8, False, False], [1], b"12345678", False],
        [tags.ARRAY, [["a"], ["<f8"], [1], [None], 8, False, False], [1], b"12345678", False],
        [tags.ARRAY, [["a"], [["<f8", [2**40]]], [0], [None], 8, False, False], [1], b"12345678", False],
        [tags.VIEW, "<f8", [2], 0, 0, [8]],
        [tags.VIEW, "<f8", [1], 0, -8, [8]],
        [tags.VIEW, "<f8", [1], 0, 2**63, [8]],
        [tags.VIEW, "<f8", [2], 0, 0, [-8]],
        [tags.VIEW, "|O8", [1], 0, 0, [8]],
        [tags.OBJECTS, [2**40], [1], False],
        [tags.STRINGS, [2**40], ["a"], True, []],
        [tags.SCALAR, "<f8", b"1"],
        [tags.SCALAR, "|U4000000000", b"1"],
        [tags.MASKED, [1, None, None], False],
        [tags.DATE, b"\xff\xff\xff\xff"],
        [tags.DATETIME, b"\xff" * 10, None],
        [tags.DATE, 2020, 13, 1],
        [tags.FRACTION, 1, 0],
        [tags.RANGE, 1, 2, 0],
        [tags.DECIMAL, "one"],
        [tags.ZONEINFO, "/etc/passwd"],
        [tags.ZONEINFO, "Europe"],
        [tags.ZONEINFO, "No/Such"],
        [tags.REF, 0],
        [tags.REF, -1],
        [tags.LIST, [[tags.REF, 0]]],
        [tags.SET, [[tags.LIST, [1]]]],
        [tags.DICT, [1]],
        [tags.LIST, b"bytes"],
        [tags.TUPLE],
        [True, [1]],
        [255],
        [],
        msgpack.ExtType(5, b"x"),
        msgpack.Timestamp(5, 5),
        {"a": msgpack.ExtType(5, b"x")},
        {msgpack.ExtType(5, b"x"): 1},
    ],
    ids=repr,
)
def test_a_lie_is_damage(node):
    buffers = [b"12345678"] if type(node) is list and node[:1] == [tags.VIEW] else []
    for writable in (False, True):
        with pytest.raises(REFUSED):
            decoded(msgpack.packb(node), buffers, writable=writable)


def test_a_lie_about_a_size_allocates_nothing():
    lies = [
        [tags.ARRAY, "<f8", [2**30], b"", False],
        [tags.ARRAY, "|U100000000", [3], b"", False],
        [tags.OBJECTS, [2**30], [], False],
        [tags.STRINGS, [2**30], [], True, []],
    ]
    tracemalloc.start()
    try:
        for lie in lies:
            with pytest.raises(REFUSED):
                decoded(msgpack.packb(lie), [])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_keys_that_name_each_other_cannot_make_a_hash_without_end():
    pair: Any = [tags.TUPLE, []]
    key = pair
    for number in range(60):
        key = [tags.TUPLE, [key, [tags.REF, number]]]
    with pytest.raises(CorruptBlobError, match="reference"):
        decoded(msgpack.packb([tags.SET, [key]]), [])


def test_a_pickle_that_the_header_does_not_mention_is_refused_and_not_run():
    frames = CODEC.encode({"f": print}, allow_pickle=True)
    with pytest.raises(PickleRefusedError):
        decoded(frames.tree, list(frames.buffers))


def test_a_damaged_pickle_is_damage():
    frames = Frames("msgpack", msgpack.packb([tags.PICKLE, b"no pickle", 0, 0]), [])
    with pytest.raises(CorruptBlobError):
        CODEC.decode(frames, writable=False, allow_pickle=True)


def test_another_codecs_frames_are_refused():
    with pytest.raises(CorruptBlobError, match="another codec"):
        CODEC.decode(Frames("other", b"\xc0", []), writable=False, allow_pickle=False)
