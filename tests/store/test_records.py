"""Records: frames come back as they were, and no bytes at all are taken for a record that was not written."""

from __future__ import annotations

import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError
from fbcache.store import records
from fbcache.store.records import HEAD_SIZE, body_of, head_of, length_of, parse, whole_length_of
from tests.blobs import same

SLOTS = st.integers(0, 2**40)
FRAMES = st.builds(
    Frames,
    st.sampled_from(["msgpack", "test", "", "é"]),
    st.binary(max_size=200),
    st.lists(st.binary(max_size=50), max_size=5),
    st.none() | st.text(max_size=20),
)


def join(frames: Frames, slot: int) -> bytes:
    body, length = body_of(frames)
    return head_of(slot, body, length) + body


def forged(body: bytes, *, slot: int = 5, length: int = 0xFFFFFFFF, nbytes: int | None = None) -> memoryview:
    """A record whose checksum is right, whatever it holds."""
    nbytes = len(body) if nbytes is None else nbytes
    seed = slot ^ nbytes << 20 ^ length << 40
    return memoryview(struct.pack("<QIIQ", slot, nbytes, length, xxh3_64_intdigest(body, seed)) + body)


def read(raw: bytes | memoryview, slot: int, *, at: int = 0, writable: bool = False) -> Frames:
    return parse(memoryview(raw), at, len(raw), slot, writable=writable)


@settings(deadline=None)
@given(FRAMES, SLOTS, st.binary(max_size=40), st.binary(max_size=40), st.booleans())
def test_frames_come_back_from_wherever_they_are(
    frames: Frames, slot: int, before: bytes, after: bytes, mut: bool
) -> None:
    raw = join(frames, slot)
    memory = memoryview(before + raw + after)
    got = parse(memory, len(before), len(before) + len(raw), slot, writable=mut)
    assert same(got, frames)
    assert type(got.tree) is bytes and isinstance(got.pickled, (str, type(None)))
    for buffer in got.buffers:
        assert np.frombuffer(buffer, np.uint8).flags.writeable is mut
    assert length_of(memory, len(before)) == (slot, len(raw))
    assert whole_length_of(memory, len(before), len(memory), slot) == len(raw)


@settings(deadline=None, max_examples=300)
@given(raw=st.binary(max_size=200), slot=SLOTS, at=st.integers(0, 250), end=st.integers(0, 200))
def test_random_bytes_are_no_record(raw: bytes, slot: int, at: int, end: int) -> None:
    with pytest.raises(CorruptBlobError):
        parse(memoryview(raw), at, min(end, len(raw)), slot, writable=False)
    assert whole_length_of(memoryview(raw), at, min(end, len(raw)), slot) == 0


@pytest.mark.parametrize(
    "frames",
    [
        Frames("msgpack", b"tree", ()),
        Frames("msgpack", b"", ()),
        Frames("other", b"tree", [b"buffer", b""], "value: x"),
        # One whose tree could be taken for all of another record's frames.
        Frames("msgpack", msgpack.packb(("msgpack", b"tree", None, [])), ()),
    ],
    ids=["tree", "empty", "whole", "tree-like-whole"],
)
def test_no_byte_can_change_unnoticed(frames: Frames) -> None:
    raw = bytearray(join(frames, 7))
    for place in range(len(raw)):
        for bit in range(8):
            raw[place] ^= 1 << bit
            with pytest.raises(CorruptBlobError):
                read(raw, 7)
            raw[place] ^= 1 << bit
    assert same(read(raw, 7), frames)


@pytest.mark.parametrize("frames", [Frames("msgpack", b"tree", ()), Frames("other", b"tree", [b"buffer"])])
def test_a_record_that_is_cut_or_somewhere_else_is_none(frames: Frames) -> None:
    raw = join(frames, 7)
    for end in range(len(raw)):
        with pytest.raises(CorruptBlobError):
            read(raw[:end], 7)
        with pytest.raises(CorruptBlobError):
            parse(memoryview(raw), 0, end, 7, writable=False)
    for slot in (6, 0, 7 + (1 << 32)):
        with pytest.raises(CorruptBlobError, match="another record"):
            read(raw, slot)
    with pytest.raises(CorruptBlobError):
        read(raw, 7, at=1)


@pytest.mark.parametrize(
    "content",
    [
        *(None, 7, "text", [], {}, {1: 2}, [1, 2, 3], ["test", b"", None], ["test", b"", None, [], 5]),
        *(["test", "tree", None, []], [b"test", b"", None, []], ["test", b"", 5, []], ["test", b"", b"", []]),
        *(["test", b"", None, 5], ["test", b"", None, None], ["test", b"", None, ["text"]]),
        *(["test", b"", None, [b"", None]], ["test", b"", None, {b"a": b"b"}], ["test", b"", None, {}]),
        *(["test", b"", None, b"ab"], ["test", b"", None, ""], ["test", b"", None, b""]),
    ],
    ids=str,
)
def test_what_holds_no_frames_is_damaged_although_its_checksum_is_right(content: object) -> None:
    raw = forged(msgpack.packb(content))
    for writable in (False, True):
        with pytest.raises(CorruptBlobError):
            read(raw, 5, writable=writable)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x94\xa4test", b"\x91" * 5000),
        *(b"\x94\xa2\xff\xfe\xc4\x00\xc0\x90", b"\x94\xa4test\xc4\x00\xc0\x90\x00", b"\x81\x90\x90"),
    ],
    ids=str,
)
def test_a_body_that_is_no_msgpack_is_damaged(body: bytes) -> None:
    with pytest.raises(CorruptBlobError):
        read(forged(body), 5)


@settings(deadline=None, max_examples=500)
@given(body=st.binary(max_size=60))
def test_a_forged_body_is_frames_or_damaged(body: bytes) -> None:
    try:
        got = read(forged(body), 5, writable=True)
    except CorruptBlobError:
        return
    assert same(got, read(join(got, 1), 1))


def test_the_largest_record_is_one_less_than_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_LONGEST", 40)
    body_of(Frames("msgpack", bytes(40), ()))
    for frames in (Frames("msgpack", bytes(41), ()), Frames("msgpack", b"", [bytes(35)])):
        with pytest.raises(ValueError, match="more than a record can hold"):
            body_of(frames)
    assert HEAD_SIZE == 24
