"""The layout of a blob: what is packed comes back, and nothing else is taken for it."""

from __future__ import annotations

import struct
from uuid import UUID, uuid4

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fbcache.codec import Frames
from fbcache.codec.layout import (
    ALIGNMENT,
    MAGIC,
    PAGE,
    PREFIX_SIZE,
    BlobHeader,
    pack,
    read_prefix,
    unpack_header,
    verify_buffer,
    verify_padding,
)
from fbcache.errors import CorruptBlobError

KEY = UUID(int=0x1234)


def joined(frames: Frames, key: UUID = KEY) -> bytes:
    plan = pack(key, frames)
    raw = b"".join(plan.pieces)
    assert len(raw) == plan.nbytes
    return raw


def unpacked(raw: bytes, key: UUID = KEY) -> BlobHeader:
    return unpack_header(raw, key=key, file_size=len(raw), path="/some/file")


def sealed(header: bytes, version: int = 1) -> bytes:
    """A prefix and header whose checksum is right, whatever they say."""
    summed = MAGIC + struct.pack("<HQ", version, len(header))
    return summed + struct.pack("<Q", xxh3_64_intdigest(summed + header)) + header


def lying(**changed: object) -> bytes:
    fields = {"key": KEY.bytes, "codec": "c", "tree": b"tree", "pickled": None, "spans": b""} | changed
    return sealed(msgpack.packb(list(fields.values())))


FRAMES = Frames("c", b"tree", [b"a" * 70, b"", bytearray(b"b" * 5000), b"c"], "value['f']: a.B")


@given(st.binary(max_size=200), st.lists(st.binary(max_size=PAGE + 200), max_size=4), st.none() | st.text())
def test_what_is_packed_comes_back(tree, buffers, pickled):
    key = uuid4()
    raw = joined(Frames("codec", tree, buffers, pickled), key)
    header = unpacked(raw, key)
    assert (header.key, header.codec, header.tree, header.pickled) == (key, "codec", tree, pickled)
    assert header.nbytes == len(raw)
    assert [raw[s.offset : s.offset + s.length] for s in header.spans] == buffers
    for buffer, span in zip(buffers, header.spans, strict=True):
        verify_buffer(buffer, span)
    for offset, length in header.gaps:
        verify_padding(raw[offset : offset + length])


def test_buffers_are_aligned_to_lines_and_from_a_page_up_to_pages():
    header = unpacked(joined(FRAMES))
    assert [s.length for s in header.spans] == [70, 0, 5000, 1]
    assert all(s.offset % ALIGNMENT == 0 for s in header.spans)
    assert header.spans[2].offset % PAGE == 0


def test_gaps_and_spans_and_header_cover_the_whole_file():
    raw = joined(FRAMES)
    header = unpacked(raw)
    covered = [(0, header.start), *header.gaps, *((s.offset, s.length) for s in header.spans if s.length)]
    end = 0
    for offset, length in sorted(covered):
        assert offset == end
        end += length
    assert end == len(raw)


def test_pieces_are_the_buffers_own_memory():
    array = np.arange(10_000)
    plan = pack(KEY, Frames("c", b"", [memoryview(array)]))
    assert any(
        np.shares_memory(np.frombuffer(piece, np.uint8), array) for piece in plan.pieces if piece.nbytes
    )


def test_a_blob_without_buffers_ends_with_its_header():
    raw = joined(Frames("c", b"tree", []))
    assert read_prefix(raw[:PREFIX_SIZE]) == len(raw) == unpacked(raw).start


def test_a_buffer_that_is_not_contiguous_is_refused():
    with pytest.raises(TypeError, match="C-contiguous"):
        pack(KEY, Frames("c", b"", [memoryview(b"abcd")[::2]]))


# ------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_of_prefix_and_header_is_found():
    raw = bytearray(joined(FRAMES))
    for position in range(unpacked(bytes(raw)).start):
        for bit in range(8):
            raw[position] ^= 1 << bit
            with pytest.raises(CorruptBlobError) as caught:
                unpacked(bytes(raw))
            assert (caught.value.key, caught.value.path) == (KEY, "/some/file")
            raw[position] ^= 1 << bit


def test_every_truncation_and_extension_is_found():
    raw = joined(FRAMES)
    for length in range(len(raw)):
        with pytest.raises(CorruptBlobError):
            unpacked(raw[:length])
    for extra in (1, 64, 4096):
        with pytest.raises(CorruptBlobError, match="where its header says"):
            unpacked(raw + bytes(extra))


def test_any_flipped_byte_after_the_header_is_found_by_verifying():
    raw = bytearray(joined(FRAMES))
    header = unpacked(bytes(raw))
    for position in range(header.start, len(raw), 7):
        raw[position] ^= 0x40
        with pytest.raises(CorruptBlobError):
            for span in header.spans:
                verify_buffer(memoryview(raw)[span.offset : span.offset + span.length], span, KEY, "f")
            for offset, length in header.gaps:
                verify_padding(memoryview(raw)[offset : offset + length], KEY, "f")
        raw[position] ^= 0x40


def test_another_keys_blob_is_refused():
    with pytest.raises(CorruptBlobError, match="another key"):
        unpacked(joined(FRAMES), uuid4())


def test_a_newer_version_is_named():
    with pytest.raises(CorruptBlobError, match=r"layout version 2.*reads version 1"):
        unpacked(sealed(b"", version=2))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_damage(raw):
    with pytest.raises(CorruptBlobError):
        unpacked(raw)


@given(st.binary(max_size=200))
def test_any_header_with_a_right_checksum_is_refused_as_damage(header):
    with pytest.raises(CorruptBlobError):
        unpacked(sealed(header))


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "text"},
        {"key": b"short"},
        {"codec": b"bytes"},
        {"codec": None},
        {"tree": "text"},
        {"tree": [1]},
        {"pickled": b"bytes"},
        {"pickled": True},
        {"spans": []},
        {"spans": b"123"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_is_refused(changed):
    with pytest.raises(CorruptBlobError):
        unpacked(lying(**changed))


@pytest.mark.parametrize(
    ("spans", "size"),
    [
        ([(0, 1, 0)], 128),  # over the header
        ([(64, 1, 0)], 128),  # over the header's end
        ([(129, 1, 0)], 130),  # not aligned
        ([(192, 1, 0)], 193),  # a line left out
        ([(128, 64, 0), (128, 64, 0)], 192),  # overlapping
        ([(192, 1, 0), (128, 1, 0)], 193),  # out of order
        ([(128, 4096, 0)], 4224),  # a page, not aligned to pages
        ([(128, 2**64 - 1, 0)], 129),
        ([(2**63, 1, 0)], 129),
        ([(128, 2, 0)], 129),  # past the end
    ],
)
def test_spans_that_lie_are_refused(spans, size):
    head = lying(spans=b"".join(struct.pack("<QQQ", *span) for span in spans))
    assert 64 < len(head) <= 128
    with pytest.raises(CorruptBlobError):
        unpacked(head.ljust(size, b"\0"))


@pytest.mark.parametrize(
    "header",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 items
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # bytes of as many
        b"\x95" * 5000,  # arrays in arrays
        b"\xc7\x05\x01hello",  # an extension type
        b"\xc1",  # no msgpack
        b"",
    ],
)
def test_a_header_that_promises_more_than_it_holds_is_refused(header):
    with pytest.raises(CorruptBlobError):
        unpacked(sealed(header))


def test_a_header_longer_than_the_file_is_refused_unread():
    raw = MAGIC + struct.pack("<HQQ", 1, 2**63, 0)
    assert read_prefix(raw) == 2**63 + PREFIX_SIZE
    with pytest.raises(CorruptBlobError, match="should take"):
        unpacked(raw)
