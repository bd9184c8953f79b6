"""The manifest's format: what is packed comes back, and nothing else is taken for it (invariant 14).

Run as a program, this writes the fixture of the format at hand. Fixtures of released formats stay as
they are, and have to load for ever.
"""

from __future__ import annotations

import contextlib
import enum
import math
import struct
import tracemalloc
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fbcache.checkpoint import naming
from fbcache.checkpoint.manifest import (
    FORMAT,
    MAGIC,
    PREFIX_SIZE,
    Blob,
    Head,
    Manifest,
    Pack,
    head_size,
    pack,
    unpack,
    unpack_head,
)
from fbcache.checkpoint.meta import MAX_DEPTH, MAX_PARTS, check_meta
from fbcache.codec import MsgpackCodec, layout, register, tags
from fbcache.codec.frames import Frames
from fbcache.errors import CorruptCheckpointError, PickleRefusedError, UnsupportedTypeError
from tests.codec.roundtrip import same

FIXTURES = Path(__file__).parent / "fixtures"
PATH = "/some/0000000007.manifest"


@register(name="tests.checkpoint.Colour")
class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@register(name="tests.checkpoint.Tile")
@dataclass(frozen=True)
class Tile:
    row: int
    column: Any


def blob(number: int = 1, pickled: str | None = None, codec: str = "msgpack") -> Blob:
    return Blob(1000 + number, 1100 + number, codec, pickled, 2**64 - 1 - number)


def manifest(names: list[Any], blobs: list[Blob] | None = None, **head: Any) -> Manifest:
    blobs = [blob(number) for number in range(len(names))] if blobs is None else blobs
    keys = [UUID(int=0x1234_0000 + number) for number in range(len(names))]
    fields = {
        "version": 7,
        "tag": None,
        "created": 1.75e9,
        "count": len(names),
        "nbytes": sum(each.nbytes for each in blobs),
        "disk_bytes": sum(each.disk_bytes for each in blobs),
        "blobs_written": len(names),
        "bytes_written": 5,
        "meta": None,
    }
    return Manifest(Head(**fields | head), names, keys, blobs)


def joined(packed: Manifest) -> bytes:
    return b"".join(pack(packed))


def through(packed: Manifest) -> Manifest:
    return unpack(joined(packed), path=PATH)


def damaged(raw: bytes, match: str = "", version: int | None = None) -> CorruptCheckpointError:
    with pytest.raises(CorruptCheckpointError, match=match or None) as caught:
        unpack(raw, path=PATH, version=version)
    assert caught.value.path == PATH
    return caught.value


PACKS = [Pack(UUID(int=0x9999 + number), 60_000 + number, 2**63 + number) for number in range(3)]


def packed(each: Blob, number: int, offset: int | None = None) -> Blob:
    return replace(each, pack=PACKS[number], offset=100 + 1300 * number if offset is None else offset)


def sample(written: int = FORMAT) -> Manifest:
    """A name of each kind; the fixtures are made of this. From format 2 on, some blobs are in packs."""
    names = [
        *("text", "", "ünï ☃ 😀", "lone \ud800", "../../etc/passwd", "/abs"),
        *(0, -1, 2**64, 2.5, None, b"bytes", 3j, Decimal("1.50"), date(2020, 1, 2)),
        *(("tile", 3, (4, None)), frozenset({1, "a"}), Colour.BLUE, Tile(1, ("x",))),
        datetime(2020, 1, 2, 3, 4, 5, 6, UTC),
    ]
    blobs = [blob(n, "value['f']: a.B" if n % 5 == 2 else None, f"codec{n % 3}") for n in range(len(names))]
    if written > 1:
        blobs = [packed(each, n % 3, 100 + n * 1300) if n % 4 else each for n, each in enumerate(blobs)]
    meta = {"note": "ü", "loss": [0.5, 1, -1, 2**64 - 1, None, True], 3: {b"key": b"bytes", None: []}}
    return manifest(names, blobs, tag="best", created=1_750_000_000.125, meta=meta)


def plain(name: Any) -> Any:
    """The name with its tiles taken apart: one with a NaN in it does not equal its copy."""
    if type(name) is Tile:
        return "Tile", plain(name.row), plain(name.column)
    return type(name)(map(plain, name)) if type(name) in (tuple, frozenset) else name


def alike(left: Manifest, right: Manifest) -> bool:
    return (
        left.head == right.head
        and same(list(map(plain, left.names)), list(map(plain, right.names)))
        and list(left.keys) == list(right.keys)
        and list(left.blobs) == list(right.blobs)
    )


# ------------------------------------------------------------------ there and back


def test_what_is_packed_comes_back():
    made = sample()
    raw = joined(made)
    assert alike(unpack(raw, path=PATH, version=7), made)
    assert unpack_head(raw, path=PATH, version=7) == made.head


def test_a_checkpoint_may_have_no_names():
    assert alike(through(manifest([])), manifest([]))


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.manifest")), ids=lambda path: path.name)
def test_manifests_of_every_released_format_load(path):
    written = int(path.stem.removeprefix("format-"))
    assert alike(unpack(path.read_bytes(), path=str(path)), sample(written))


@pytest.mark.parametrize("written", range(1, FORMAT + 1))
def test_each_format_has_a_fixture_and_is_still_written_so(written):
    if list(frozenset({1, "a"})) != [1, "a"]:  # the fixture's order; texts have another hash in each process
        pytest.skip("sets are in another order in this process")
    assert (FIXTURES / f"format-{written}.manifest").read_bytes() == joined(sample(written))


def write_fixture() -> None:
    (FIXTURES / f"format-{FORMAT}.manifest").write_bytes(joined(sample()))


atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\ud800", "a\udfffb", "../../etc/passwd", "/abs", "a\0b"])
    | st.binary(max_size=100)
    | st.complex_numbers()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.sampled_from([*Colour, ..., np.float32(1.5), np.str_("x"), range(3)])
)
any_names = st.recursive(
    atoms,
    lambda parts: (
        st.lists(parts, max_size=3).map(tuple)
        | st.frozensets(parts, max_size=3)
        | st.builds(Tile, st.integers(), parts)
    ),
    max_leaves=6,
)
numbers = st.integers(0, 2**62)
unpacked = st.builds(
    Blob,
    st.integers(0, 2**50),
    st.integers(0, 2**50),
    st.sampled_from(["msgpack", "other", ""]),
    st.none() | st.text(max_size=5),
    st.integers(0, 2**64 - 1),
)
in_packs = st.builds(
    packed, unpacked.map(lambda each: replace(each, disk_bytes=each.disk_bytes % 7000)), st.integers(0, 2)
)
blobs_of = unpacked | in_packs


@given(st.lists(any_names, max_size=8), st.data())
def test_any_names_and_blobs_come_back(names, data):
    names = list(dict.fromkeys(names))
    blobs = data.draw(st.lists(blobs_of, min_size=len(names), max_size=len(names)))
    blobs = [  # records do not overlap
        each if each.pack is None else replace(each, offset=100 + 7000 * row)
        for row, each in enumerate(blobs)
    ]
    made = manifest(names, blobs, blobs_written=data.draw(numbers), bytes_written=data.draw(numbers))
    keys = [data.draw(st.sampled_from(made.keys)) for _ in names]  # a key may occur twice
    made = replace(made, keys=keys)
    got = through(made)
    assert alike(got, made)
    assert got.files == made.files and got.packs == made.packs


noted = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text() | st.integers(0, 9) | st.binary(), parts),
)


@given(st.none() | st.text(), st.none() | st.dictionaries(st.text(), noted, max_size=4))
def test_any_tag_and_meta_come_back(tag, meta):
    assert through(manifest(["a"], tag=tag, meta=meta)).head == manifest(["a"], tag=tag, meta=meta).head


@given(st.floats(1e9, 9e9))
def test_a_time_comes_back_exactly(created):
    assert through(manifest([], created=created)).head.created == created


def test_tuples_in_meta_come_back_as_lists():
    assert through(manifest([], meta={"shape": (1, (2,))})).head.meta == {"shape": [1, [2]]}


def test_nan_is_a_name_and_may_be_one_twice():
    names = through(manifest([math.nan, float("nan"), (math.nan,)])).names
    assert math.isnan(names[0]) and math.isnan(names[1])


def test_a_head_is_read_from_the_start_of_the_file_alone():
    raw = joined(sample())
    size = head_size(raw[:PREFIX_SIZE], path=PATH)
    assert PREFIX_SIZE < size < len(raw)
    assert unpack_head(raw[:size], path=PATH) == sample().head
    with pytest.raises(CorruptCheckpointError):
        unpack_head(raw[: size - 1], path=PATH)


def test_rows_are_sequences():
    made, got = sample(), through(sample())
    assert got.keys[0] == made.keys[0] and got.blobs[-1] == made.blobs[-1]
    assert got.keys[2:5] == made.keys[2:5] and got.blobs[::-7] == made.blobs[::-7]
    assert len(got.keys) == len(got.blobs) == len(made.names)
    assert made.keys[3] in got.keys and got.blobs.index(made.blobs[4]) == 4
    for index in (len(made.names), -len(made.names) - 1):
        with pytest.raises(IndexError):
            got.keys[index]
    assert joined(got) == joined(made), "what was read can be written"


def test_a_digest_is_the_checksum_in_a_blobs_header():
    key = uuid4()
    written = b"".join(layout.pack(key, Frames("c", b"tree", [b"buffer"])).pieces)
    digest = int.from_bytes(written[16:24], "little")
    assert through(manifest(["a"], [replace(blob(), digest=digest)])).blobs[0].digest == digest


# ------------------------------------------------------------------ what cannot be kept


class Text(str):
    __slots__ = ()


@dataclass(frozen=True)
class Unregistered:
    x: int


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (UUID(int=5), "a UUID is a key"),
        (b"x" * 5000, "too big"),
        (("a", b"x" * 5000), "too big"),
        ("\ud800" * 30_000, "too big"),
        (Text("a"), "would take pickle"),
        (("a", (print,)), r"value\[1\]\[0\] would take pickle"),
        (Unregistered(1), "would take pickle"),
        (str, "would take pickle"),
        ((10**5000, print), "of type tuple"),  # it has no repr
    ],
    ids=lambda part: str(type(part)),
)
def test_a_name_that_cannot_be_kept_is_named(name, reason):
    with pytest.raises(TypeError, match=rf"(?s)the name.*{reason}.*a name there is a text") as caught:
        pack(manifest(["fine", name]))
    assert isinstance(caught.value, (UnsupportedTypeError, PickleRefusedError))
    assert len(str(caught.value)) < 600


class Fickle:
    pass


def test_a_name_whose_decoder_fails_is_refused_when_it_is_written():
    register(Fickle, lambda value: 1, lambda state: 1 / 0, name="tests.checkpoint.Fickle")
    with pytest.raises(UnsupportedTypeError, match="could not be restored"):
        pack(manifest([Fickle()]))


def test_names_that_would_come_back_as_one_are_refused_when_they_are_written():
    register(Fickle, lambda value: 1, lambda state: state, name="tests.checkpoint.Fickle")
    with pytest.raises(ValueError, match="only 1 are distinct"):
        pack(manifest([Fickle(), Fickle()]))


def deep(levels: int) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    for _ in range(levels - 1):
        meta = {"a": meta}
    return meta


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ([1], "meta is a dict or None"),
        ({"a": [print]}, r"meta\['a'\]\[0\] .*builtin_function"),
        ({"a": {"b": {1}}}, r"meta\['a'\]\['b'\] .*builtins\.set"),
        ({"a": np.float64(1)}, r"meta\['a'\] .*numpy\.float64"),
        ({"a": np.arange(3)}, r"meta\['a'\] .*numpy\.ndarray"),
        ({"a": bytearray(b"x")}, "bytearray"),
        ({"a": datetime.now()}, r"datetime\.datetime"),
        ({"a": Text("x")}, "Text"),
        ({"a": Colour.RED}, "Colour"),
        ({"a": 2**64}, r"meta\['a'\] .*64 bits"),
        ({"a": -(2**63) - 1}, "64 bits"),
        ({"a": ["\ud800"]}, r"meta\['a'\]\[0\] .*surrogates"),
        ({"\ud800": 1}, "its key .*surrogates"),
        ({"a": {(1, 2): 3}}, r"meta\['a'\] .*its key \(1, 2\)"),
        ({2**64: 1}, "its key .*64 bits"),
        (deep(MAX_DEPTH + 1), "nested more than 100 levels"),
        ({"a": [0] * MAX_PARTS}, "more than 100000 parts"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_meta_that_cannot_be_kept_is_a_type_error_that_says_where(meta, reason):
    for check in (check_meta, lambda meta: pack(manifest([], meta=meta))):
        with pytest.raises(UnsupportedTypeError, match=reason) as caught:
            check(meta)
        assert caught.value.path.startswith("meta")


def test_meta_up_to_its_limits_is_kept():
    for meta in (deep(MAX_DEPTH), {"a": [0] * (MAX_PARTS - 3)}):
        assert through(manifest([], meta=meta)).head.meta == meta
    itself: dict[str, Any] = {}
    itself["a"] = [itself]
    with pytest.raises(UnsupportedTypeError, match="nested"):
        check_meta(itself)


@pytest.mark.parametrize("tag", [1, b"a", "\ud800", Text("a")], ids=repr)
def test_a_tag_that_is_no_text_is_refused(tag):
    with pytest.raises(UnsupportedTypeError, match="a tag is a text"):
        pack(manifest([], tag=tag))


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 3},
        {"nbytes": 1},
        {"disk_bytes": 1},
        {"version": -1},
        {"created": -1.0},
        {"created": math.nan},
        {"created": math.inf},
        {"blobs_written": 2**63},
    ],
    ids=str,
)
def test_a_head_that_does_not_fit_is_not_written(wrong):
    with pytest.raises((ValueError, OverflowError)):
        pack(manifest(["a", "b"], **wrong))


def test_rows_that_do_not_fit_are_not_written():
    made = manifest(["a", "b"])
    for wrong in (
        {"names": ["a"]},
        {"names": ["a", "a"]},
        {"names": [1, True]},
        {"keys": made.keys[:1]},
        {"blobs": made.blobs[:1]},
        {"blobs": [replace(blob(), nbytes=-1), blob()]},
        {"blobs": [replace(blob(), digest=2**64), blob()]},
    ):
        with pytest.raises((ValueError, OverflowError)):
            pack(replace(made, **wrong))


def test_too_many_codecs_are_an_error():
    names = list(range(65_536))
    blobs = [blob(codec=str(number)) for number in names]
    with pytest.raises(ValueError, match="65536 codecs, where 65535 may be"):
        pack(manifest(names, blobs))
    assert through(manifest(names[1:], blobs[1:])).blobs[-1].codec == "65535"


# ------------------------------------------------------------------ damage


SMALL = joined(manifest(["a", ("b", 1), None], [blob(1), blob(2, "value: a.B"), blob(3)], meta={"x": [1]}))


def test_every_truncation_and_extension_is_damage():
    for length in range(len(SMALL)):
        damaged(SMALL[:length])
    for extra in (b"\0", b"\xc0", bytes(4096), SMALL):
        damaged(SMALL + extra, "bytes, where")


def test_every_flipped_bit_is_damage():
    raw = bytearray(SMALL)
    for position in range(len(raw)):
        for bit in range(8):
            raw[position] ^= 1 << bit
            damaged(bytes(raw))
            raw[position] ^= 1 << bit


def test_every_changed_byte_of_the_head_is_damage_to_who_reads_the_head_alone():
    raw = bytearray(SMALL[: head_size(SMALL, path=PATH)])
    for position in set(range(len(raw))) - set(range(32, 40)):  # those are the body's checksum
        raw[position] ^= 0x41
        with pytest.raises(CorruptCheckpointError):
            unpack_head(bytes(raw), path=PATH)
        raw[position] ^= 0x41


@given(st.binary(max_size=200))
def test_any_bytes_are_damage(raw):
    damaged(raw)
    damaged(MAGIC + raw)
    for read in (unpack_head, head_size):
        with pytest.raises(CorruptCheckpointError):
            read(raw, path=PATH)


def test_another_version_than_the_files_name_says_is_damage():
    damaged(SMALL, "it holds version 7, where its name says 8", version=8)
    with pytest.raises(CorruptCheckpointError, match="version 7"):
        unpack_head(SMALL, path=PATH, version=8)


@pytest.mark.parametrize("rest", [b"", b"whatever a newer one writes", SMALL[8:]])
def test_a_newer_format_is_named_before_anything_else_is_looked_at(rest):
    raw = MAGIC + struct.pack("<H", FORMAT + 1) + rest
    damaged(raw, rf"written by a newer fbcache, in format {FORMAT + 1}.*upgrade fbcache")
    for read in (unpack_head, head_size):
        with pytest.raises(CorruptCheckpointError, match=f"newer fbcache, in format {FORMAT + 1}"):
            read(raw, path=PATH)
    damaged(MAGIC + struct.pack("<H", 0) + rest, "its format is 0")


# ------------------------------------------------------------------ lies with right checksums


def sealed(
    head: bytes, body: bytes, *, head_length: int = -1, body_length: int = -1, written: int = 1
) -> bytes:
    lengths = (len(head) if head_length < 0 else head_length, len(body) if body_length < 0 else body_length)
    summed = MAGIC + struct.pack("<HQQ", written, *lengths)
    sums = struct.pack("<QQ", xxh3_64_intdigest(summed + head), xxh3_64_intdigest(body))
    return summed + sums + head + body


HEAD = {
    "version": 7,
    "tag": None,
    "created": 10**18,
    "count": 2,
    "nbytes": 30,
    "disk_bytes": 50,
    "blobs_written": 2,
    "bytes_written": 50,
    "meta": None,
}
COLUMNS = {
    "keys": bytes(32),
    "nbytes": struct.pack("<2Q", 10, 20),
    "disk_bytes": struct.pack("<2Q", 20, 30),
    "digests": bytes(16),
    "codecs": struct.pack("<2H", 0, 0),
    "notes": struct.pack("<2I", 0, 1),
}
TEXTS = [1, 1, "msgpack", "value: a.B", "a", "b"]
PLACES = {
    "packs": struct.pack("<2I", 0, 1),
    "offsets": struct.pack("<2Q", 0, 70),
    "count": struct.pack("<I", 1),
    "table": struct.pack("<16sQQ", bytes(range(16)), 100, 5),
}


def lying(head: Any = HEAD, texts: Any = TEXTS, *, written: int = 1, **columns: bytes) -> bytes:
    """A file whose checksums are right, whatever it says."""
    head = head if type(head) is bytes else msgpack.packb(head)
    texts = texts if type(texts) is bytes else b"".join(map(msgpack.packb, texts))
    right = COLUMNS if written == 1 else COLUMNS | PLACES
    return sealed(head, b"".join((right | columns).values()) + texts, written=written)


def named(*names: Any) -> bytes:
    return lying(texts=[*TEXTS[:4], *names])


def tree(name: Any) -> bytes:
    return MsgpackCodec().encode(name, allow_pickle=True).tree


def test_the_lies_below_are_of_a_file_that_is_right():
    assert unpack(lying(), path=PATH).names == ["a", "b"]
    assert unpack(named("a", tree((1, 2))), path=PATH).names == ["a", (1, 2)]


def test_the_lies_about_packs_are_of_a_file_that_is_right():
    got = unpack(lying(written=2), path=PATH)
    key = UUID(bytes=bytes(range(16)))
    assert [(blob.pack, blob.offset) for blob in got.blobs] == [(None, 0), (Pack(key, 100, 5), 70)]
    assert got.files == {UUID(int=0), key}


@pytest.mark.parametrize(
    "columns",
    [
        {"packs": struct.pack("<2I", 0, 2)},
        {"packs": struct.pack("<2I", 0, 2**32 - 1)},
        {"packs": struct.pack("<2I", 0, 0)},  # and an offset
        {"packs": struct.pack("<2I", 0, 0), "offsets": bytes(16)},  # a pack that holds nothing
        {"offsets": struct.pack("<2Q", 1, 70)},  # of a file of its own
        {"offsets": struct.pack("<2Q", 0, 71)},  # beyond the end
        {"offsets": struct.pack("<2Q", 0, 2**63)},
        {"offsets": struct.pack("<2Q", 0, 2**64 - 30)},  # the end of its record modulo 2**64 is 0
        {"packs": b"", "offsets": b""},
        {"packs": b"", "offsets": b"", "count": b"", "table": b""},
        {"count": struct.pack("<I", 0), "table": b"", "packs": bytes(8), "offsets": bytes(16)},
        {"count": b"", "table": b""},
        {"count": struct.pack("<I", 2)},
        {"count": struct.pack("<I", 3)},
        {"count": struct.pack("<I", 2**32 - 1)},
        {"table": struct.pack("<16sQQ", bytes(16), 99, 5)},  # shorter than the record's end
        {"table": struct.pack("<16sQQ", bytes(16), 2**63, 5)},
        {"table": struct.pack("<16sQQ", bytes(16), 2**64 - 1, 5)},
        {
            "packs": struct.pack("<2I", 1, 2),
            "offsets": struct.pack("<2Q", 70, 70),
            "count": struct.pack("<I", 2),
            "table": struct.pack("<16sQQ", bytes(16), 100, 5) * 2,  # two of one key
        },
    ],
    ids=lambda columns: repr(columns)[:60],
)
def test_packs_that_lie_are_damage(columns):
    damaged(lying(written=2, **columns))


def test_a_blob_that_does_not_fit_its_pack_is_not_written():
    for wrong in (
        packed(blob(), 0, 59_000),
        replace(blob(), offset=5),
        packed(blob(), 0, -1),
        packed(replace(blob(), disk_bytes=2**62), 0, 2**63),
        replace(blob(), pack=Pack(PACKS[0].key, 2**63, 1), offset=5),
    ):
        with pytest.raises((ValueError, OverflowError)):
            pack(manifest(["a"], [wrong]))
    twice = [packed(blob(1), 0), replace(packed(blob(2), 0), pack=replace(PACKS[0], digest=1))]
    with pytest.raises(ValueError, match="one key"):
        pack(manifest(["a", "b"], twice))


def test_a_checkpoint_without_packs_is_one_that_format_1_has():
    assert joined(manifest(["a"]))[6:8] == b"\x01\x00"
    assert joined(manifest(["a"], [packed(blob(), 1)]))[6:8] == b"\x02\x00"


@given(st.data())
def test_flipped_bits_of_packs_under_right_checksums_are_damage_or_a_manifest(data):
    raw = bytearray(lying(written=2))
    size = head_size(raw, path=PATH)
    start = size + 46 * 2
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(start, start + 24 + 36))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        got = unpack(sealed(bytes(raw[PREFIX_SIZE:size]), bytes(raw[size:]), written=2), path=PATH)
    except CorruptCheckpointError:
        return
    for each in got.blobs:
        assert each.pack is None or each.offset + each.disk_bytes <= each.pack.nbytes


@pytest.mark.parametrize("field", [field for field in HEAD if field not in ("tag", "meta")])
@pytest.mark.parametrize("wrong", [-1, 2**63, 2**64 - 1, 1.0, True, None, "1", [], {}], ids=repr)
def test_a_number_of_the_head_that_is_none_is_damage(field, wrong):
    raw = lying(HEAD | {field: wrong})
    damaged(raw)
    with pytest.raises(CorruptCheckpointError):
        unpack_head(raw, path=PATH)


@pytest.mark.parametrize(
    "head",
    [
        HEAD | {"count": 1},
        HEAD | {"count": 3},
        HEAD | {"count": 2**62},
        HEAD | {"nbytes": 31},
        HEAD | {"disk_bytes": 49},
        HEAD | {"tag": 1},
        HEAD | {"tag": b"a"},
        HEAD | {"meta": []},
        HEAD | {"meta": {"a": msgpack.ExtType(5, b"")}},
        HEAD | {"meta": {"a": msgpack.ExtType(5, b"abc")}},
        HEAD | {"meta": {"a": msgpack.Timestamp(5, 5)}},
        HEAD | {"meta": {(1, 2): 3}},
        HEAD | {"meta": deep(MAX_DEPTH + 1)},
        HEAD | {"meta": {"a": [[]] * MAX_PARTS}},
        HEAD | {"more": 1},
        {field: HEAD[field] for field in HEAD if field != "tag"},
        list(HEAD.values()),
        None,
        b"",
        b"\xc1",
        b"\xc0\xc0",
        b"\x80",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\x00\x00\x27\x10" * 500,
        msgpack.packb(HEAD) + b"\xc0",
        msgpack.packb(HEAD)[:-1],
        msgpack.packb(HEAD)[:-1] + b"\x81\xa1\xff\xc0",
        msgpack.packb(HEAD)[:-1] + b"\x81\xc7\x00\x01\xc0",
    ],
    ids=lambda head: repr(head)[:60],
)
def test_a_head_that_lies_is_damage(head):
    damaged(lying(head))


@pytest.mark.parametrize(
    "columns",
    [
        {"nbytes": struct.pack("<2Q", 2**64 - 10, 40)},  # their sum modulo 2**64 is right
        {"nbytes": struct.pack("<2q", -10, 40)},
        {"disk_bytes": struct.pack("<2Q", 2**63, 2**63 + 50)},
        {"nbytes": struct.pack("<2Q", 11, 20)},
        {"codecs": struct.pack("<2H", 0, 1)},
        {"codecs": struct.pack("<2H", 0, 0xFFFF)},
        {"notes": struct.pack("<2I", 0, 2)},
        {"notes": struct.pack("<2I", 0, 2**32 - 1)},
        {"keys": bytes(31)},
        {"keys": bytes(48)},
        {"keys": b"", "nbytes": b"", "disk_bytes": b"", "digests": b""},
    ],
    ids=str,
)
def test_columns_that_lie_are_damage(columns):
    damaged(lying(**columns))


@pytest.mark.parametrize(
    "texts",
    [
        b"",
        TEXTS[:-1],
        [*TEXTS, "c"],
        [*TEXTS, None],
        [2, *TEXTS[1:]],
        [0, *TEXTS[1:]],
        [1, 0, *TEXTS[2:]],
        [-1, *TEXTS[1:]],
        [3, 0, "a", "b", "c", "a", "b"],
        [2**64 - 1, *TEXTS[1:]],
        [True, *TEXTS[1:]],
        [1.0, *TEXTS[1:]],
        [1, 1, b"msgpack", *TEXTS[3:]],
        [1, 1, None, *TEXTS[3:]],
        [1, 1, "msgpack", b"value: a.B", "a", "b"],
        [1, 1, "msgpack", [], "a", "b"],
        [*TEXTS[:4], "a", 1],
        [*TEXTS[:4], "a", None],
        [*TEXTS[:4], "a", []],
        [*TEXTS[:4], "a", ["b"]],
        [*TEXTS[:4], "a", {}],
        [*TEXTS[:4], "a", {"b": 1}],
        [*TEXTS[:4], "a", msgpack.ExtType(5, b"")],
        [*TEXTS[:4], "a", msgpack.ExtType(5, b"b")],
        [*TEXTS[:4], "a", msgpack.Timestamp(1, 1)],
        b"".join(map(msgpack.packb, TEXTS[:5])) + b"\xc1",
        b"".join(map(msgpack.packb, TEXTS[:5])) + b"\xa1\xff",
        b"".join(map(msgpack.packb, TEXTS[:5])) + b"\xdb\xff\xff\xff\xffb",
        b"".join(map(msgpack.packb, TEXTS[:5])) + b"\xdd\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
    ],
    ids=lambda texts: repr(texts)[:70],
)
def test_texts_that_lie_are_damage(texts):
    damaged(lying(texts=texts))


def test_a_table_of_more_codecs_than_there_can_be_is_damage():
    count = 65_536
    head = HEAD | {"count": count, "nbytes": 0, "disk_bytes": 0}
    columns = {"keys": bytes(40 * count), "codecs": bytes(2 * count), "notes": bytes(4 * count)}
    texts = [count, 0, *[""] * count, *map(str, range(count))]
    damaged(lying(head, texts, nbytes=b"", disk_bytes=b"", digests=b"", **columns), "tables of")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("a", "a"), "only 1 are distinct"),
        (("a", tree("a")), "distinct"),
        ((tree(1), tree(True)), "distinct"),
        ((tree((1, 2.0)), tree((1.0, 2))), "distinct"),
        (("a", tree(UUID(int=1))), "a UUID"),
        (("a", tree([1])), "unhashable"),
        (("a", tree(([1],))), "unhashable"),
        (("a", tree({"a": 1})), "unhashable"),
        (("a", tree(np.arange(3))), "unhashable"),
        (("a", tree(print)), "pickle"),
        (("a", tree((1, Unregistered(1)))), "pickle"),
        (("a", b""), ""),
        (("a", b"\xc1"), ""),
        (("a", tree((1, 2))[:-1]), ""),
        (("a", tree((1, 2)) + b"\xc0"), "left over"),
        (("a", b"\x92\x01\xdd\xff\xff\xff\xff"), ""),
        (("a", b"\xdd\x00\x00\x27\x10" * 500), ""),
        (("a", b"\x91" * 5000), ""),
        (("a", msgpack.packb([tags.BYTES, 0])), ""),
        (("a", msgpack.packb([255])), ""),
        (("a", msgpack.packb([tags.OBJECT, "tests.checkpoint.Nobody", 1])), "not registered"),
        (("a", msgpack.packb([tags.OBJECT, "tests.checkpoint.Colour", "GREEN"])), "GREEN"),
        (("a", msgpack.packb([tags.OBJECT, "tests.checkpoint.Tile", {"row": 1}])), ""),
        (("a", tree(Tile(1, [2]))), "unhashable"),
        (("a", msgpack.packb([tags.ZONEINFO, "../../etc/passwd"])), ""),
        (("a", tree(("x" * naming.MAX_TREE,))), "where 65536 are allowed"),
    ],
    ids=lambda part: repr(part)[:60],
)
def test_names_that_lie_are_damage(names, reason):
    damaged(named(*names), reason)


class Hostile:
    """As a registered class may be by mistake."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")


def test_what_registered_classes_raise_is_damage():
    register(Hostile, lambda value: 1, lambda state: Hostile(), name="tests.checkpoint.Hostile")
    node = msgpack.packb([tags.OBJECT, "tests.checkpoint.Hostile", 1])
    damaged(named(node, node), "no comparison")


def test_lengths_of_head_and_body_that_lie_are_damage():
    head, body = msgpack.packb(HEAD), b"".join(COLUMNS.values()) + b"".join(map(msgpack.packb, TEXTS))
    assert unpack(sealed(head, body), path=PATH).head.count == 2
    for lie in (0, 1, len(head) - 1, len(head) + 1, len(head) + len(body) + 1, 2**63, 2**64 - 1):
        damaged(sealed(head, body, head_length=lie))
        damaged(sealed(head, body, body_length=lie))
    raw = sealed(head, body, head_length=2**64 - 1)
    assert head_size(raw, path=PATH) == PREFIX_SIZE + 2**64 - 1, "unchecked, as it says"


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_any_head_and_body_with_right_checksums_are_damage(head, body):
    damaged(sealed(head, body))
    damaged(sealed(msgpack.packb(HEAD), body))


@given(st.binary(max_size=60))
def test_any_tree_of_a_name_is_damage_or_a_name(packed):
    try:
        name = unpack(named("a", packed), path=PATH).names[1]
    except CorruptCheckpointError:
        return
    hash(name)


@given(st.data())
def test_flipped_bits_under_right_checksums_are_damage_or_a_manifest(data):
    size = head_size(SMALL, path=PATH)
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(PREFIX_SIZE, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        got = unpack(sealed(bytes(raw[PREFIX_SIZE:size]), bytes(raw[size:])), path=PATH)
    except CorruptCheckpointError:
        return
    assert len(list(got.blobs)) == len(list(got.keys)) == len(set(got.names)) == got.head.count


# ------------------------------------------------------------------ memory


def peak_of(raw: bytes) -> int:
    tracemalloc.start()
    try:
        unpack(raw, path=PATH)
    except CorruptCheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def crowd(count: int, texts: bytes) -> bytes:
    """So many names in head and columns, and any texts."""
    head = HEAD | {"count": count, "nbytes": 0, "disk_bytes": 0}
    return sealed(msgpack.packb(head), bytes(46 * count) + texts)


START = b"".join(map(msgpack.packb, [*TEXTS[:1], 0, TEXTS[2]]))
MANY = 100_000


@pytest.mark.parametrize(
    "raw",
    [
        lying(HEAD | {"count": 2**62}),
        lying(b"\xdd\xff\xff\xff\xff"),
        lying(b"\xdd\x00\x0f\xff\xff" * 200),
        lying(HEAD | {"meta": {"a": [[]] * 2_000_000}}),
        lying(texts=[2**62, 2**62]),
        lying(texts=b"\xdd\xff\xff\xff\xff"),
        named("a", b"\xdd\x00\x00\xff\xff" * 13_000),
        named("a", b"\x90" * 2_000_000),
        crowd(MANY, START + b"\x90" * MANY),
        crowd(MANY, START + b"\x80" * MANY),
        crowd(MANY, START + b"\xc7\x00\x01" * MANY),
        crowd(MANY, START + b"\xdd\x00\x01\x86\xa0" * MANY),
        crowd(MANY, START + b"\xdd\x00\x01\x86\xa0" + b"\x90" * MANY),
        crowd(MANY, START + b"\xc4\x00" * MANY),
        crowd(MANY, START + b"\xa1a" * MANY),
        crowd(1, START + b"\x90" * 5_000_000),
        sealed(b"", b"", head_length=2**62, body_length=2**62),
        lying(written=2, count=struct.pack("<I", 2**32 - 1)),
        sealed(
            msgpack.packb(HEAD | {"count": MANY, "nbytes": 0, "disk_bytes": 0}),
            bytes(58 * MANY) + struct.pack("<I", MANY) + bytes(32 * MANY),
            written=2,
        ),
    ],
    ids=range(19),
)
def test_a_lie_allocates_no_more_than_twice_the_file_and_a_little(raw):
    damaged(raw)
    assert peak_of(raw) <= 2 * len(raw) + (1 << 20)


@pytest.mark.parametrize("count", [0, 100, 20_000, 100_000])
def test_names_that_are_texts_take_no_more_than_twice_the_file_and_a_little(count):
    raw = joined(manifest([f"layer/{number}" for number in range(count)]))
    assert peak_of(raw) <= 2 * len(raw) + (1 << 20)


def test_what_is_really_there_takes_what_pythons_objects_take_and_is_bounded():
    """The most parts that ``meta`` and a name may have, of the kind that grows most."""
    raw = lying(HEAD | {"meta": {"a": [[]] * (MAX_PARTS - 3)}})
    assert unpack(raw, path=PATH).head.meta
    assert peak_of(raw) < 16 << 20
    empty = msgpack.packb([tags.TUPLE, [[tags.LIST, []]] * (naming.MAX_TREE // 3 - 10)])
    assert len(empty) <= naming.MAX_TREE
    raw = named("a", empty)
    damaged(raw, "unhashable")
    assert peak_of(raw) < 16 << 20


if __name__ == "__main__":
    write_fixture()


@pytest.mark.parametrize(
    "name",
    [0, 127, 128, -1, -32, -33, 1 << 32, (1 << 64) - 1, -(1 << 63), 1 << 64, -(1 << 63) - 1, True, ("a", 3)],
)
def test_a_number_is_written_as_the_codec_writes_it_and_comes_back_as_its_type(name: Any) -> None:
    """Integers take a short cut."""
    written = naming.encode(name)
    assert written == naming._tree(name)
    assert isinstance(written, bytes)
    found = naming.decode(written)
    assert found == name and type(found) is type(name)


@given(st.binary(max_size=12))
def test_what_looks_like_a_number_is_one_or_a_value_error(tree: bytes) -> None:
    with contextlib.suppress(ValueError):
        hash(naming.decode(tree))
