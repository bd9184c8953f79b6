"""Arrow data that nobody wrote like this: an error of ours or a valid value, and the process lives on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", "21")

from fbcache.codec import Frames  # noqa: E402
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError  # noqa: E402
from tests.codec.families.arrow_cases import arrays, tables  # noqa: E402
from tests.codec.families.damage import damaged  # noqa: E402
from tests.codec.roundtrip import CODEC  # noqa: E402

OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)


def decoded(tree: bytes, buffers: list[bytes], *, writable: bool = False) -> Any:
    return CODEC.decode(Frames("msgpack", tree, buffers), writable=writable, allow_pickle=False)


def test_random_damage_gives_our_errors_or_a_valid_value() -> None:
    rng = random.Random(4)
    frames = [CODEC.encode(value, allow_pickle=False) for value in [*arrays().values(), *tables().values()]]
    valid = 0
    for _ in range(1500):
        tree, buffers = damaged(rng, rng.choice(frames))
        try:
            value = decoded(tree, buffers, writable=rng.random() < 0.3)
        except OURS:
            continue
        if isinstance(value, (pa.Array, pa.ChunkedArray, pa.Table, pa.RecordBatch)):
            value.validate(full=True)
            valid += 1
    assert valid > 50


def edited(value: Any, edit: Callable[[Any], None]) -> Any:
    """The value as it comes back when the node of its array has been changed."""
    frames = CODEC.encode(value, allow_pickle=False)
    tree = msgpack.unpackb(frames.tree, strict_map_key=False)
    edit(tree[2][1])
    return decoded(msgpack.packb(tree), [bytes(buffer) for buffer in frames.buffers])


def set_at(*path: int, to: Any) -> Callable[[Any], None]:
    def edit(node: Any) -> None:
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = to

    return edit


def packed(memory: bytes) -> list[Any]:
    return [48, "|u1", [len(memory)], memory, False]


CASES = arrays()
RISING = np.arange(16, dtype="i4").tobytes()

EDITS = {
    "a length beyond the memory": ("int64", set_at(0, to=16)),
    "a length that overflows": ("int64", set_at(0, to=2**61)),
    "a negative length": ("int64", set_at(0, to=-1)),
    "an offset": ("int64", set_at(1, to=1)),
    "a bitmap that is too short": ("int64", set_at(2, 0, to=packed(b""))),
    "no values": ("int64", set_at(2, 1, to=None)),
    "too many buffers": ("int64", lambda node: node[2].append(None)),
    "offsets that leave the text": ("string", set_at(2, 1, to=packed(RISING[:-1] + b"\x7f"))),
    "offsets that go back": ("string", set_at(2, 1, to=packed(RISING[:32] + bytes(4) + RISING[36:]))),
    "text that is none": ("string", set_at(2, 2, to=packed(b"\xff" * 2000))),
    "a view that leaves its text": ("string_view", set_at(2, 2, to=packed(b"a"))),
    "no text behind the views": ("string_view", lambda node: node[2].pop()),
    "indices beyond the dictionary": ("dictionary", set_at(2, 1, to=packed(b"\x7f\0\0\0" * 16))),
    "a dictionary that comes later": ("dictionary", set_at(4, to=0)),
    "a union without codes": ("dense union", set_at(2, 1, to=None)),
    "a union with a bitmap": ("sparse union", set_at(2, 0, to=packed(b"\0" * 8))),
    "codes that stand for nothing": ("dense union", set_at(2, 1, to=packed(b"\x01" * 5))),
    "runs with a bitmap": ("runs", set_at(2, 0, to=packed(b"\0" * 8))),
    "runs that end too early": ("runs", set_at(0, to=100)),
    "a map whose keys are null": ("map", set_at(3, 0, 3, 0, 2, 0, to=packed(b"\0" * 8))),
    "a map whose entries are null": ("map", set_at(3, 0, 2, 0, to=packed(b"\0" * 8))),
    "a child that is too short": ("struct", set_at(3, 0, 0, to=3)),
    "a child too few": ("struct", lambda node: node[3].pop()),
    "a list beyond its values": ("list_", set_at(3, 0, 0, to=2)),
    "a view of lists beyond its values": ("list_view", set_at(3, 0, 0, to=2)),
    "a decimal beyond its precision": ("decimal128", set_at(2, 1, to=packed(b"\x7f" * 48))),
    "a buffer that is no bytes": ("int64", set_at(2, 1, to=[48, "<f8", [15], b"\0" * 120, False])),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_arrays_are_refused(name: str) -> None:
    case, edit = EDITS[name]
    with pytest.raises(CorruptBlobError):
        edited(CASES[case], edit)


def test_a_dictionary_of_another_type_is_refused() -> None:
    words, numbers = pa.array(["a"]).dictionary_encode(), pa.array([1]).dictionary_encode()
    frames = CODEC.encode(pa.table({"words": words, "numbers": numbers}), allow_pickle=False)
    tree = msgpack.unpackb(frames.tree, strict_map_key=False)
    tree[2][2][1][0][4] = 0
    with pytest.raises(CorruptBlobError, match="dictionary is none"):
        decoded(msgpack.packb(tree), [])


def test_buffers_that_are_askew_take_no_more_than_three_copies() -> None:
    def back(*offsets: int) -> Any:
        arrays = [pa.array(np.arange(1000) + i) for i in range(len(offsets))]
        frames = CODEC.encode(arrays, allow_pickle=False)
        tree = msgpack.unpackb(frames.tree, strict_map_key=False)
        for node, offset in zip(tree[1], offsets, strict=True):
            node[2][1][0] = 999
            node[2][1][2][1] = [49, "|u1", [7992], 0, offset, [1]]
        return decoded(msgpack.packb(tree), [bytes(buffer) for buffer in frames.buffers])

    assert [len(array) for array in back(1, 2, 3, 3, 1)] == [999] * 5
    starts = {array.buffers()[1].address for array in back(3, 3)}
    assert len(starts) == 1 and starts.pop() % 8 == 0
    with pytest.raises(CorruptBlobError, match="never aligned"):
        back(1, 2, 3, 4)


def test_a_table_without_columns_takes_nothing_whatever_its_rows() -> None:
    frames = CODEC.encode(pa.table({"a": [1]}).select([]), allow_pickle=False)
    tree = msgpack.unpackb(frames.tree, strict_map_key=False)
    tree[2][1] = 2**60
    assert decoded(msgpack.packb(tree), []).num_rows == 2**60
    tree[2][1] = -1
    with pytest.raises(CorruptBlobError):
        decoded(msgpack.packb(tree), [])


def test_an_extension_type_that_is_a_pickle_is_refused() -> None:
    names = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": b"cos\nsystem\n"}
    schema = pa.schema([pa.field("x", pa.int8(), metadata=names)])
    frames = CODEC.encode(schema, allow_pickle=False)
    with pytest.raises(UnsupportedTypeError, match="pickle"):
        decoded(frames.tree, [])
