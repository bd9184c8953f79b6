"""Thousands of damaged files: each is told by a typed error, and none gives a wrong value or runs code.

``FBCACHE_DAMAGED=n`` makes it n files instead of 20,000.
"""

from __future__ import annotations

import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgpack
import numpy as np
import pytest
from xxhash import xxh3_64

from fbcache import (
    CorruptBlobError,
    CorruptCheckpointError,
    MsgpackCodec,
    PickleRefusedError,
    TrackedDirectory,
    UnsupportedTypeError,
)
from fbcache.checkpoint import manifest as manifests
from fbcache.checkpoint.manifest import Blob, Head, Manifest
from fbcache.checkpoint.places import Places
from fbcache.checkpoint.versions import Versions
from fbcache.codec import Frames, tags
from fbcache.codec.layout import pack
from fbcache.store.blobfile import MAP_LEAST, BlobFile
from fbcache.store.disk import DISK
from tests.directories import blob_of, large, manifest_of, replaced

COUNT = int(os.environ.get("FBCACHE_DAMAGED", 20_000))
MASKS = (0x01, 0x10, 0x80, 0xFF)
KEY = UUID("12345678123456781234567812345678")
CODEC = MsgpackCodec()
OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)
MIB = 1 << 20

ran: list[str] = []


def set_off() -> None:
    ran.append("a pickle")


class Bomb:
    def __reduce__(self) -> Any:
        return set_off, ()


@pytest.fixture(autouse=True)
def _no_code_ran() -> Iterator[None]:
    """Invariant 14."""
    ran.clear()
    yield
    assert ran == []


def some_values() -> list[Any]:
    shared = np.arange(700.0)
    return [
        {"lr": 0.1, "step": 3, "name": "flat"},
        [1, "two", (3.0, {"four": b"5" * 5000}), shared, shared[10:90:2], {1, 2}],
        {"w": np.arange(300, dtype=">i4"), "b": np.zeros((3, 4), "c16"), ("k", 1): bytearray(b"x" * 6000)},
        np.array(["texts", "of", "any length"], np.dtypes.StringDType()),
    ]


def blob_bytes(value: Any, *, allow_pickle: bool = False) -> bytes:
    return b"".join(pack(KEY, CODEC.encode(value, allow_pickle=allow_pickle)).pieces)


def some_manifest() -> Manifest:
    names = ["train", ("tile", 3, 4), "../x", b"bytes", 7, ""]
    blobs = [
        Blob(100 + n, 200 + n, "msgpack", None if n % 2 else "value: a.B", n << 40) for n in range(len(names))
    ]
    head = Head(
        version=3,
        tag="best",
        created=1_700_000_000.0,
        count=len(names),
        nbytes=sum(blob.nbytes for blob in blobs),
        disk_bytes=sum(blob.disk_bytes for blob in blobs),
        blobs_written=2,
        bytes_written=3,
        meta={"lr": [0.1, {"deep": None}]},
    )
    return Manifest(head, names, [UUID(int=n) for n in range(len(names))], blobs)


class OneFile:
    """A file that is written anew for each damage, and read as a store does."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def close(self) -> None:
        os.close(self._fd)

    def read(
        self, raw: bytes, *, verify: bool = True, writable: bool = False, digest: int | None = None
    ) -> Any:
        os.ftruncate(self._fd, len(raw))
        os.pwrite(self._fd, raw, 0)
        frames = BlobFile(DISK, self._fd, KEY, self.path, digest).read(
            may_map=not writable, writable=writable, verify=verify
        )
        return CODEC.decode(frames, writable=writable, allow_pickle=False)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OneFile]:
    file = OneFile(tmp_path / "blob")
    yield file
    file.close()


def flips(raw: bytes, end: int) -> Iterator[bytes]:
    """Every byte before ``end``, flipped by each mask."""
    for at in range(end):
        for mask in MASKS:
            damaged = bytearray(raw)
            damaged[at] ^= mask
            yield bytes(damaged)


def cuts(raw: bytes) -> Iterator[bytes]:
    for length in range(len(raw)):
        yield raw[:length]


def at_random(raw: bytes, rng: random.Random) -> bytes:
    """Several bytes at once: changed, copied, cut out, put in, exchanged."""
    while True:
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 2, 3, 8))):
            at, length = rng.randrange(len(damaged)), rng.choice((1, 2, 8, 64))
            match rng.randrange(6):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    damaged[at : at + length] = rng.randbytes(len(damaged[at : at + length]))
                case 2:
                    damaged[at : at + length] = bytes(len(damaged[at : at + length]))
                case 3:
                    other = rng.randrange(len(damaged))
                    chunk = damaged[other : other + length]
                    damaged[at : at + len(chunk)] = chunk
                case 4:
                    del damaged[at : at + length]
                case 5:
                    damaged[at:at] = rng.randbytes(length)
            if not damaged:
                break
        if damaged != raw:
            return bytes(damaged)


def header_end(raw: bytes) -> int:
    return 24 + int.from_bytes(raw[8:16], "little")


# ------------------------------------------------------------------ the fuzz


def test_every_damage_to_a_blob_is_found_when_it_is_verified(file):
    """Each byte of a file is covered by a checksum, a fixed value or its length."""
    raws = [blob_bytes(value) for value in some_values()]
    seen = 0
    for raw in raws:
        file.read(raw)
        end = header_end(raw)
        for damaged in flips(raw, min(len(raw), end + 80)):
            seen += 1
            is_found(file, damaged, writable=bool(seen % 2))
        step = max(1, len(raw) // 700)
        for length in {*range(min(len(raw), end + 80)), *range(0, len(raw), step), len(raw) - 1}:
            seen += 1
            is_found(file, raw[:length], writable=bool(seen % 2))
    rng = random.Random(1)
    while seen < COUNT // 2:
        seen += 1
        is_found(file, at_random(raws[seen % len(raws)], rng), writable=bool(seen % 2))


def is_found(file: OneFile, damaged: bytes, *, writable: bool) -> None:
    try:
        value = file.read(damaged, writable=writable)
    except CorruptBlobError as error:
        assert (error.key, error.path) == (KEY, file.path) and error.reason
    else:
        raise AssertionError(f"damage went unnoticed, and gave {value!r}")


def test_every_damage_to_a_large_mapped_blob_is_found_when_it_is_verified(file):
    raw = blob_bytes([np.arange(MAP_LEAST // 8 + 100.0), np.arange(1000.0)])
    rng = random.Random(2)
    for _ in range(COUNT // 100):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= rng.choice(MASKS)
        is_found(file, bytes(damaged), writable=bool(rng.randrange(2)))
        is_found(file, raw[: rng.randrange(len(raw))], writable=bool(rng.randrange(2)))


def test_without_verification_damage_to_the_payload_alone_gives_a_value_or_our_error(file):
    raws = [blob_bytes(value) for value in some_values()]
    rng = random.Random(3)
    for number in range(COUNT // 10):
        raw = raws[number % len(raws)]
        damaged = at_random(raw, rng)
        end = header_end(raw)
        try:
            file.read(damaged, verify=False, writable=bool(number % 2))
        except OURS:
            continue
        assert damaged[:end] == raw[:end] and len(damaged) == len(raw)


def test_every_damage_to_a_manifest_is_found(tmp_path):
    """The same bytes through :func:`unpack`, and some as files."""
    raw = b"".join(manifests.pack(some_manifest()))
    places = Places(str(tmp_path))
    os.makedirs(places.checkpoints)
    path = Path(places.manifest(3))
    path.write_bytes(raw)
    versions = Versions(DISK, places)
    assert versions.read(3).names == some_manifest().names
    rng = random.Random(4)

    def damages() -> Iterator[bytes]:
        yield from flips(raw, len(raw))
        yield from cuts(raw)
        while True:
            yield at_random(raw, rng)

    for number, damaged in zip(range(max(COUNT * 3 // 10, 5 * len(raw))), damages(), strict=False):
        with pytest.raises(CorruptCheckpointError) as caught:
            manifests.unpack(damaged, path="the manifest", version=3)
        assert caught.value.path == "the manifest" and caught.value.reason
        if number % 20 == 0:
            path.write_bytes(damaged)
            with pytest.raises(CorruptCheckpointError, match=str(path)):
                versions.read(3)
            try:
                assert versions.head(3) == some_manifest().head
            except CorruptCheckpointError:
                pass


# ------------------------------------------------------------------ damage under right checksums


def sealed(header: bytes, rest: bytes = b"") -> bytes:
    """A blob with this header and the checksum that belongs to it."""
    summed = struct.pack("<6sHQ", b"\x89FBC\r\n", 1, len(header))
    return summed + xxh3_64(summed + header).intdigest().to_bytes(8, "little") + header + rest


def resealed(raw: bytes) -> bytes:
    end = header_end(raw)
    return sealed(raw[24:end], raw[end:])


def test_sealed_blobs_read_as_the_real_ones(file):
    for value in some_values():
        raw = blob_bytes(value)
        assert resealed(raw) == raw


def test_damage_to_a_header_under_a_right_checksum_gives_a_value_or_our_error_and_runs_no_code(file):
    """And whatever value it gives: with the digest of the checkpoint it is refused."""
    raws = [*map(blob_bytes, some_values()), blob_bytes({"p": [Bomb()], "q": 1.5}, allow_pickle=True)]
    rng = random.Random(5)
    for number in range(COUNT // 10):
        raw = raws[number % len(raws)]
        end = header_end(raw)
        header = at_random(raw[24:end], rng)
        damaged = sealed(header, raw[end:])
        for digest in (None, int.from_bytes(raw[16:24], "little")):
            try:
                file.read(damaged, verify=bool(number % 2), writable=bool(number % 3), digest=digest)
            except OURS:
                continue
            assert digest is None


def test_damage_to_a_tree_under_right_checksums_gives_a_value_or_our_error_and_runs_no_code(file):
    values = [*some_values(), {"p": [Bomb()], "q": 1.5}]
    frames = [CODEC.encode(value, allow_pickle=True) for value in values]
    rng = random.Random(6)
    for number in range(COUNT // 10):
        one = frames[number % len(frames)]
        tree = at_random(one.tree, rng)
        raw = b"".join(pack(KEY, Frames("msgpack", tree, one.buffers, None)).pieces)
        try:
            file.read(raw, writable=bool(number % 2))
        except OURS:
            pass


def test_damage_to_a_manifest_under_right_checksums_gives_a_manifest_or_our_error(tmp_path):
    raw = b"".join(manifests.pack(some_manifest()))
    start = manifests.PREFIX_SIZE
    head_length = struct.unpack_from("<Q", raw, 8)[0]
    rng = random.Random(7)
    for number in range(COUNT // 10):
        head, body = raw[start : start + head_length], raw[start + head_length :]
        if number % 2:
            head = at_random(head, rng)
        else:
            body = at_random(body, rng)
        summed = raw[:8] + struct.pack("<QQ", len(head), len(body))
        sums = struct.pack("<QQ", xxh3_64(summed + head).intdigest(), xxh3_64(body).intdigest())
        try:
            found = manifests.unpack(summed + sums + head + body, path="the manifest")
        except CorruptCheckpointError:
            continue
        assert len(found.names) == len(found.keys) == len(list(found.blobs)) == found.head.count
        for key, name in zip(found.keys, found.names, strict=True):
            assert type(key) is UUID
            hash(name)


# ------------------------------------------------------------------ lies


def header_of(tree: Any, spans: Any = b"", **changes: Any) -> bytes:
    fields = {"key": KEY.bytes, "codec": "msgpack", "tree": tree, "pickled": None, "spans": spans, **changes}
    return msgpack.packb(list(fields.values()))


def span(offset: int, length: int, checksum: int = 0) -> bytes:
    return struct.pack("<QQQ", offset, length, checksum)


def nested(header: bytes, tree_length: int) -> bytes:
    return header * (tree_length // len(header))


NIL = b"\xc0"
#: Headers that lie, each with what it lies about.
HEADER_LIES = {
    "a buffer beyond the end": header_of(NIL, span(192, 1 << 40)),
    "a buffer of 2**64 - 1 bytes": header_of(NIL, span(192, (1 << 64) - 1)),
    "an offset of 2**64 - 64": header_of(NIL, span((1 << 64) - 64, 64)),
    "a buffer in the header": header_of(NIL, span(0, 64)),
    "buffers that overlap": header_of(NIL, span(256, 100) + span(320, 100)),
    "half a span": header_of(NIL, span(192, 0)[:-1]),
    "more fields": msgpack.packb([KEY.bytes, "msgpack", NIL, None, b"", 1]),
    "fewer fields": msgpack.packb([KEY.bytes, "msgpack", NIL, None]),
    "no list": msgpack.packb({"key": 1}),
    "nothing": b"",
    "an array of 2**32 - 1 fields": b"\xdd\xff\xff\xff\xff" + header_of(NIL)[1:],
    "a tree of 2**32 - 1 bytes": b"\x95" + msgpack.packb(KEY.bytes) + b"\xa7msgpack\xc6\xff\xff\xff\xff",
    "a text of 2**32 - 1 bytes": b"\x95" + msgpack.packb(KEY.bytes) + b"\xdb\xff\xff\xff\xff",
    "fields nested 4,000 deep": b"\x91" * 4000,
    "fields of arrays that lie": nested(b"\xdc\x0f\x00", 4000),
    "another's key": header_of(NIL, key=bytes(16)),
    "a key of 15 bytes": header_of(NIL, key=bytes(15)),
    "a tree that is a text": header_of("text"),
    "a codec of another kind": header_of(NIL, codec=3),
    "an unknown codec": header_of(NIL, codec="pickle"),
    "a note that is a number": header_of(NIL, pickled=3),
    "an extension type": msgpack.packb([KEY.bytes, "msgpack", msgpack.ExtType(5, b"x" * 100), None, b""]),
}

A, L = tags.ARRAY, tags.LIST
#: Trees that lie, with buffer 0 of 4096 bytes.
TREE_LIES = {
    "an array longer than its buffer": msgpack.packb([A, "<f8", [1 << 40], 0, False]),
    "an array of too many dimensions": msgpack.packb([A, "<f8", [1] * 100, 0, False]),
    "a shape whose product overflows": msgpack.packb([A, "<f8", [1 << 62, 1 << 62], 0, False]),
    "a negative length": msgpack.packb([A, "<f8", [-512], 0, False]),
    "an array shorter than its buffer": msgpack.packb([A, "<f8", [511], 0, False]),
    "an item of 4 GB": msgpack.packb([A, "|U1000000000", [1], 0, False]),
    "objects out of bytes": msgpack.packb([A, "|O8", [512], 0, False]),
    "a view beyond its buffer": msgpack.packb([tags.VIEW, "<f8", [513], 0, 0, [8]]),
    "a view before its buffer": msgpack.packb([tags.VIEW, "<f8", [2], 0, 8, [-16]]),
    "a view with an offset of 2**63": msgpack.packb([tags.VIEW, "<f8", [1], 0, 1 << 63, [8]]),
    "a buffer that is not there": msgpack.packb([A, "<f8", [512], 1, False]),
    "a buffer with a negative number": msgpack.packb([tags.BYTES, -1]),
    "2**30 objects": msgpack.packb([tags.OBJECTS, [1 << 30], [1], False]),
    "2**30 texts": msgpack.packb([tags.STRINGS, [1 << 30], ["a"], True, []]),
    "a list of 2**32 - 1": b"\x92\x00\xdd\xff\xff\xff\xff",
    "a map of 2**32 - 1": b"\xdf\xff\xff\xff\xff\xa1x\x01",
    "bytes of 2**32 - 1": b"\x92\x00\xc6\xff\xff\xff\xff",
    "lists of lists that lie, in 300 bytes": nested(b"\xdc\x01\x20", 300),
    "lists of lists that lie, in 500 bytes": nested(b"\xdc\x01\xf0", 500),
    "lists of lists that lie, in 4 KB": nested(b"\xdc\x0f\xf0", 4096),
    "lists of lists that lie, in 64 KB": nested(b"\xdd\x00\x00\xff\x00", 65536),
    "maps of lists that lie": nested(b"\x81\x01\xdc\x0f\xf0", 4096),
    "nested 300 deep": nested(b"\x92\x00\x91", 900) + b"\x92\x00\x90",
    "nested 100,000 deep": b"\x91" * 100_000,
    "bytes left over": msgpack.packb([L, [1]]) + b"\x00" * 1000,
    "a reference to what is not there": msgpack.packb([L, [[tags.REF, 1 << 40]]]),
    "a reference to itself": msgpack.packb([L, [[tags.REF, 0]]]),
    "a hash without end": None,
}


def without_end() -> bytes:
    key: Any = [tags.TUPLE, []]
    for number in range(60):
        key = [tags.TUPLE, [key, [tags.REF, number]]]
    return msgpack.packb([tags.SET, [key]])


TREE_LIES["a hash without end"] = without_end()


def peak_of(call: Callable[[], Any], error: type[BaseException]) -> int:
    """Most bytes that the call takes on its way to its error."""
    with pytest.raises(error):
        call()  # imports and caches
    tracemalloc.start()
    try:
        with pytest.raises(error):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_header_that_lies_is_damage_and_allocates_little(file, lie, writable):
    raw = sealed(HEADER_LIES[lie], b"\0" * 500)
    peak = peak_of(lambda: file.read(raw, writable=writable), CorruptBlobError)
    assert peak < 2 * len(raw) + MIB


@pytest.mark.parametrize(
    "places",
    [
        [(256, 99), (256, 99)],
        [(256, 99), (320, 35)],
        [(257, 99)],
        [(320, 99)],
        [(384, 99), (256, 99)],
        [(0, 99)],
    ],
    ids=["the same", "overlapping", "unaligned", "with a gap", "in disorder", "in the header"],
)
def test_buffers_in_the_wrong_places_are_damage_also_where_lengths_and_checksums_fit(file, places):
    checksum = xxh3_64(bytes(99)).intdigest()

    def lie(checksums: list[int]) -> bytes:
        spans = b"".join(span(*place, each) for place, each in zip(places, checksums, strict=True))
        header = sealed(header_of(msgpack.packb([tags.LIST, [[tags.BYTES, 0]]]), spans))
        assert len(header) < 256
        return header.ljust(places[-1][0] + places[-1][1], b"\0")

    raw = lie([checksum if length == 99 else xxh3_64(bytes(length)).intdigest() for _, length in places])
    for verify in (False, True):
        with pytest.raises(CorruptBlobError, match="not where it should be"):
            file.read(raw, verify=verify)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 25, (1 << 64) - 1])
def test_a_length_of_the_header_that_lies_is_damage_and_allocates_little(file, length):
    raw = bytearray(blob_bytes(large(1)))
    struct.pack_into("<Q", raw, 8, length)
    assert peak_of(lambda: file.read(bytes(raw)), CorruptBlobError) < 2 * len(raw) + MIB
    assert peak_of(lambda: file.read(bytes(raw), writable=True), CorruptBlobError) < 2 * len(raw) + MIB


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("lie", TREE_LIES)
def test_a_tree_that_lies_is_damage_and_allocates_little(file, lie, writable):
    raw = b"".join(pack(KEY, Frames("msgpack", TREE_LIES[lie], [bytes(4096)])).pieces)
    peak = peak_of(lambda: file.read(raw, writable=writable), CorruptBlobError)
    assert peak < 2 * len(raw) + MIB


@pytest.mark.parametrize("tag", [tags.BYTES, tags.BYTEARRAY])
def test_bytes_that_name_one_buffer_many_times_are_damage_and_are_not_copied_out(file, tag):
    tree = msgpack.packb([L, [[tag, 0]] * 100])
    raw = b"".join(pack(KEY, Frames("msgpack", tree, [bytes(MIB)])).pieces)
    for writable in (False, True):
        assert peak_of(lambda w=writable: file.read(raw, writable=w), CorruptBlobError) < 2 * len(raw) + MIB


def test_an_honest_large_tree_is_what_it_says(file):
    """The walk before the building refuses nothing that is right."""
    for value in ([[n, str(n)] for n in range(20_000)], {n: n for n in range(20_000)}, {"x": "y" * 100_000}):
        assert file.read(blob_bytes(value)) == value


@pytest.mark.parametrize(
    ("at", "lie"),
    [(8, 1 << 40), (8, (1 << 64) - 1), (8, 0), (16, 1 << 40), (16, (1 << 64) - 1), (16, 0)],
)
def test_a_manifest_that_lies_about_its_lengths_is_damage_and_allocates_little(tmp_path, at, lie):
    raw = bytearray(b"".join(manifests.pack(some_manifest())))
    struct.pack_into("<Q", raw, at, lie)
    places = Places(str(tmp_path))
    os.makedirs(places.checkpoints)
    Path(places.manifest(3)).write_bytes(raw)
    versions = Versions(DISK, places)
    for call in (lambda: versions.read(3), lambda: versions.head(3)):  # one checksum covers both lengths
        assert peak_of(call, CorruptCheckpointError) < 2 * len(raw) + MIB


# ------------------------------------------------------------------ through whole pools


def test_damaged_files_in_a_directory_are_told_by_the_entries_they_belong_to(make_pool, tmp_path):
    """A sample of all the above, through restore, load, register and verify."""
    target = tmp_path / "ck"
    values = {"flat": {"a": 1}, "array": np.arange(900.0), "large": large(1), "nest": [[1], (2, {"x": b"3"})]}
    with make_pool() as pool:
        for name, value in values.items():
            pool[name] = value
        pool.save(target)
        keys = {name: pool.persist(name, target) for name in values}
    sound = {name: blob_of(target, key).read_bytes() for name, key in keys.items()}
    rng = random.Random(8)
    for number in range(min(COUNT // 250, 2000)):
        name = list(values)[number % len(values)]
        path = blob_of(target, keys[name])
        replaced(path, at_random(sound[name], rng))
        with make_pool() as pool:
            pool.restore(target)
            for other, value in values.items():
                if other == name:
                    with pytest.raises(CorruptBlobError) as caught:
                        pool.get_mut(other).__enter__() if number % 3 else pool[other]
                    assert caught.value.key == keys[name] and caught.value.path == str(path)
                elif isinstance(value, np.ndarray):
                    assert np.array_equal(pool[other], value)
                else:
                    assert pool[other] == value
            pool.validate()
        if number % 10 == 0:
            with TrackedDirectory(target, readonly=True) as tracked:
                (damage,) = tracked.verify().damaged
            assert damage.path == str(path) and damage.names == ((1, name),)
        replaced(path, sound[name])
    with make_pool() as pool:
        pool.restore(target)
        assert np.array_equal(pool["array"], values["array"]) and pool["nest"] == values["nest"]


def test_a_lie_in_a_blob_that_is_registered_is_told_and_its_pool_goes_on(make_pool, tmp_path):
    target = tmp_path / "ck"
    with make_pool() as pool:
        key = pool.put("x", 1).persist(target)
    path = blob_of(target, key)
    pool = make_pool()
    for number, tree in enumerate(TREE_LIES.values()):
        replaced(path, b"".join(pack(key, Frames("msgpack", tree, [bytes(4096)])).pieces))
        fb = pool.register(target, key, number)
        with pytest.raises(CorruptBlobError, match=key.hex):
            fb.load().__enter__()
        fb.drop()
        pool.delete(number)
        pool.drain()
    pool.validate()


def test_a_pickle_under_any_disguise_is_refused_and_not_run(file):
    stream = pickle.dumps(Bomb())
    for tree in (
        [tags.PICKLE, stream, 0, 0],
        [L, [[tags.PICKLE, stream, 0, 0]]],
        {"x": [tags.PICKLE, 0, 0, 0]},
        [tags.DICT, [[tags.TUPLE, [[tags.PICKLE, stream, 0, 0]]], 1]],
        [tags.SET, [[tags.PICKLE, stream, 0, 0]]],
        [tags.OBJECTS, [1], [[tags.PICKLE, stream, 0, 0]], False],
    ):
        raw = b"".join(pack(KEY, Frames("msgpack", msgpack.packb(tree), [stream])).pieces)
        for writable in (False, True):
            with pytest.raises((PickleRefusedError, CorruptBlobError)):
                file.read(raw, writable=writable)


def test_a_manifest_that_hides_a_pickle_loads_nothing(make_pool, tmp_path):
    """The blob's own header says what the manifest denies."""
    target = tmp_path / "ck"
    with make_pool() as pool:
        pool["x"] = Bomb()
        pool.save(target, allow_pickle=True)
    with TrackedDirectory(target, readonly=True) as tracked:
        manifest = tracked._directory.versions.read(1)
    innocent = [Blob(b.nbytes, b.disk_bytes, b.codec, None, b.digest) for b in manifest.blobs]
    lie = Manifest(manifest.head, manifest.names, manifest.keys, innocent)
    replaced(manifest_of(target, 1), b"".join(manifests.pack(lie)))
    pool = make_pool()
    pool.restore(target)
    with pytest.raises(PickleRefusedError):
        pool["x"]
    with pytest.raises(PickleRefusedError):
        pool.get_mut("x").__enter__()
    pool.validate()
