"""Compression: values come back, what does not gain stays raw, and lies about lengths take no memory."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbcache import FBPool
from fbcache.codec import BUILT_IN, Frames, MsgpackCodec, compressed, planes
from fbcache.codec.compressed import Compressed, Expanding
from fbcache.codec.compression import METHODS
from fbcache.errors import (
    CorruptBlobError,
    FBCacheError,
    MissingLibraryError,
    PickleRefusedError,
    UnsupportedTypeError,
)
from tests.codec.roundtrip import same

pytest.importorskip("zstandard")
pytest.importorskip("lz4")

OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)
PLAIN = MsgpackCodec()
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, 300_000, np.uint8)
RAMP = np.arange(100_000.0)
TEXTS = [f"line {number} of a text" for number in range(5000)]


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def through(value: Any, codec: Any, *, writable: bool = False, allow_pickle: bool = False) -> Any:
    frames = codec.encode(value, allow_pickle=allow_pickle)
    kept = [memoryview(bytearray(buffer)) for buffer in frames.buffers]
    buffers = kept if writable else [buffer.toreadonly() for buffer in kept]
    frames = Frames(frames.codec, frames.tree, buffers, frames.pickled)
    return BUILT_IN["compressed"].decode(frames, writable=writable, allow_pickle=allow_pickle)


# ------------------------------------------------------------------ values


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    method=st.sampled_from(list(METHODS)),
    writable=st.booleans(),
    level=st.sampled_from([None, 1, 9]),
)
def test_arrays_of_any_length_come_back(data: Any, method: str, writable: bool, level: int | None) -> None:
    length = data.draw(st.integers(0, 40_000) | st.sampled_from([4095, 4096, 4097, 65536, 65537, 1 << 20]))
    dtype = data.draw(st.sampled_from(["u1", "<i2", "<f4", "<f8", "<c16", "S3", "S7"]))
    top = data.draw(st.sampled_from([1, 2, 200, 60_000]))
    array = np.random.default_rng(length).integers(0, top, length).astype("u4").astype(dtype)
    back = through([array, TEXTS[: length % 300]], Compressed(method, level=level), writable=writable)
    assert same(back, [array, TEXTS[: length % 300]])
    assert back[0].flags.writeable == writable


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"a": 1},
        [RAMP, RAMP[10:], RAMP.reshape(100, 1000).T],
        [RAMP, NOISE, np.zeros(5_000_000, np.uint8), TEXTS, b"abc" * 5000],
        np.zeros(3 * (1 << 20) + 5, np.uint8),
        np.arange(1 << 18),
        np.empty(0),
        TEXTS,
        "x" * 100_000,
        RNG.bytes(100_000),
        bytearray(100_000),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_values_come_back(value: Any, method: str, writable: bool) -> None:
    assert same(through(value, Compressed(method), writable=writable), value)


def test_views_of_one_memory_are_views_of_one_again(method: str) -> None:
    whole, part = through([RAMP, RAMP[10:]], Compressed(method), writable=True)
    part[0] = -1
    assert whole[10] == -1 and RAMP[10] == 10


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4099])
def test_bytes_that_were_sorted_are_put_back(width: int, length: int) -> None:
    data = RNG.integers(0, 256, length, np.uint8)
    out = np.empty_like(data)
    planes.join(planes.split(data, width), width, out)
    assert np.array_equal(out, data)


def test_sorted_bytes_stand_plane_by_plane() -> None:
    data = np.array([0x0201, 0x0403, 0x0605], "<u2").view(np.uint8)
    assert planes.split(np.append(data, np.uint8(9)), 2).tolist() == [1, 3, 5, 2, 4, 6, 9]


# ------------------------------------------------------------------ what is compressed


def sizes(value: Any, codec: Any) -> tuple[int, int]:
    return PLAIN.encode(value, allow_pickle=True).nbytes, codec.encode(value, allow_pickle=True).nbytes


@pytest.mark.parametrize(
    ("value", "ratio"),
    [(RAMP, 4), (np.arange(100_000), 4), (np.zeros(1 << 20), 200), (TEXTS, 4), (RAMP.astype("f4"), 2)],
    ids=["floats", "integers", "zeros", "texts", "small floats"],
)
def test_what_is_regular_becomes_smaller(value: Any, ratio: float, method: str) -> None:
    before, after = sizes(value, Compressed(method))
    assert before > ratio * after


def test_what_gains_nothing_stays_the_very_memory_of_the_value(method: str) -> None:
    frames = Compressed(method).encode({"x": NOISE, "y": RAMP, "z": TEXTS}, allow_pickle=False)
    addresses = [np.frombuffer(b, np.uint8).__array_interface__["data"][0] for b in frames.buffers]
    assert NOISE.__array_interface__["data"][0] in addresses
    raw = [memoryview(bytes(b)) for b in frames.buffers]
    back = Expanding().decode(
        Frames(frames.codec, frames.tree, raw), writable=False, allow_pickle=False
    )
    starts = [np.frombuffer(b, np.uint8).__array_interface__["data"][0] for b in raw]
    assert back["x"].__array_interface__["data"][0] in starts


def test_noise_is_only_sampled(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Compressed(method)
    seen: list[int] = []
    kind = type(codec._method)
    monkeypatch.setattr(kind, "compress", lambda *_: pytest.fail("noise was compressed"))
    sample = kind.sample

    def sampled(self: Any, piece: Any) -> int:
        seen.append(piece.nbytes)
        return sample(self, piece)

    monkeypatch.setattr(kind, "sample", sampled)
    codec.encode(RNG.integers(0, 256, 10_000_000, np.uint8), allow_pickle=False)
    assert sum(seen) <= 4 * 64 * 1024


def test_a_buffer_that_disappoints_stays_raw_and_those_after_it_do_not(method: str) -> None:
    """The chunks of the sample are of zeros, and all the rest is noise."""
    liar = RNG.integers(0, 256, 3_000_000, np.uint8)
    step = (liar.nbytes - compressed._CHUNK) // 3 // compressed._CHUNK * compressed._CHUNK
    for place in range(4):
        liar[place * step :][: compressed._CHUNK] = 0
    codec = Compressed(method, min_ratio=2)
    assert codec._promise(liar)[1]
    before, after = sizes([liar, RAMP], codec)
    assert liar.nbytes < after < before - RAMP.nbytes / 2
    assert same(through([liar, RAMP], codec), [liar, RAMP])


def test_min_ratio_is_held() -> None:
    assert sizes(RAMP, Compressed(min_ratio=1000))[1] >= RAMP.nbytes
    assert sizes(RAMP, Compressed(min_ratio=2))[1] <= RAMP.nbytes / 2


def test_small_buffers_and_trees_stay_as_they_are(method: str) -> None:
    frames = Compressed(method).encode([np.zeros(100), "x" * 1000], allow_pickle=False)
    assert frames.nbytes >= 1800


def test_a_higher_level_is_used() -> None:
    rough = RNG.integers(0, 40, 200_000).astype("u1")
    texts = [str(number * 7919 % 10007) for number in range(50_000)]
    for method in METHODS:
        value = [rough, texts]
        assert sizes(value, Compressed(method, level=12))[1] < sizes(value, Compressed(method))[1]


def test_encoding_takes_little_memory_beside_its_output(method: str) -> None:
    value = np.arange(4_000_000) % 1000
    codec = Compressed(method)
    codec.encode(value, allow_pickle=False)
    tracemalloc.start()
    try:
        frames = codec.encode(value, allow_pickle=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < frames.nbytes + 4 * (1 << 20)


# ------------------------------------------------------------------ options


def test_options_are_checked() -> None:
    for options in (
        {"method": "gzip"},
        {"level": 100},
        {"level": True},
        {"level": "high"},
        {"method": "lz4", "level": 0},
        {"min_ratio": 0.5},
        {"min_ratio": float("nan")},
    ):
        with pytest.raises(ValueError):
            Compressed(**options)  # type: ignore[arg-type]


def test_a_missing_library_is_told_at_once_and_at_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, module in (("zstd", "zstandard"), ("lz4", "lz4.block")):
        frames = Compressed(method).encode(RAMP, allow_pickle=False)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingLibraryError, match=rf"fbcache\[{method}\]") as caught:
                Compressed(method)
            assert isinstance(caught.value, ImportError) and isinstance(caught.value, FBCacheError)
            with pytest.raises(UnsupportedTypeError, match=rf"fbcache\[{method}\]"):
                Expanding().decode(frames, writable=False, allow_pickle=False)


class Shouting:
    """A codec of somebody else's."""

    name = "shouting"

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        return Frames(self.name, b"!" * 10_000, [value.encode().upper()])

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        assert frames.tree == b"!" * 10_000
        return bytes(frames.buffers[0]).decode()


def test_another_codec_can_be_inside(method: str) -> None:
    codec = Compressed(method, inner=Shouting())
    frames = codec.encode("hello" * 5000, allow_pickle=False)
    assert frames.nbytes < 1000
    assert codec.decode(frames, writable=False, allow_pickle=False) == "HELLO" * 5000
    with pytest.raises(CorruptBlobError, match="shouting"):
        Expanding().decode(frames, writable=False, allow_pickle=False)


class Unknown:
    pass


def test_pickle_is_refused_as_by_the_codec_inside(method: str) -> None:
    codec = Compressed(method)
    value = {"a": [1, Unknown()], "x": RAMP}
    with pytest.raises(PickleRefusedError, match="Unknown"):
        codec.encode(value, allow_pickle=False)
    frames = codec.encode(value, allow_pickle=True)
    assert frames.pickled is not None and "Unknown" in frames.pickled
    with pytest.raises(PickleRefusedError, match="Unknown") as caught:
        codec.decode(frames, writable=False, allow_pickle=False)
    assert caught.value.path == "value['a'][1]"
    hidden = Frames(frames.codec, frames.tree, frames.buffers)
    with pytest.raises(PickleRefusedError):
        codec.decode(hidden, writable=False, allow_pickle=False)
    assert np.array_equal(codec.decode(frames, writable=False, allow_pickle=True)["x"], RAMP)


# ------------------------------------------------------------------ through a pool


def case() -> dict[str, Any]:
    return {
        "ramp": np.arange(100_000.0),
        "noise": np.random.default_rng(1).integers(0, 256, 300_000, np.uint8),
        "texts": TEXTS,
        "small": np.arange(5),
    }


SCRIPT = """
import sys
from fbcache import FBPool
from tests.codec.roundtrip import same
from tests.codec.test_compressed import case
with FBPool.from_checkpoint(sys.argv[1], directory=sys.argv[2], min_free=0) as pool:
    with pool.get("x") as x:
        assert same(x, case())
"""


def test_through_a_pool_and_a_checkpoint_that_another_reads_without_being_told(
    method: str, tmp_path: Path
) -> None:
    with FBPool("1GB", directory=tmp_path / "spill", min_free=0, codec=Compressed(method)) as pool:
        pool.put("x", case())
        pool.evict()
        assert pool.stats().disk_bytes < 600_000
        with pool.get("x") as x:
            assert same(x, case())
            assert not any(x[name].flags.writeable for name in ("ramp", "noise", "small"))
            with pytest.raises(ValueError, match="WRITEABLE"):
                x["ramp"].flags.writeable = True
        with pool.get_mut("x") as x:
            x["ramp"][0] = -5
            x["noise"][0] = 7
        pool.evict()
        with pool.get("x") as x:
            assert x["ramp"][0] == -5 and x["noise"][0] == 7
        pool.put("x", case())
        pool.save(tmp_path / "saved")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "elsewhere")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_pool_that_compresses_reads_what_was_not(tmp_path: Path) -> None:
    with FBPool("1GB", directory=tmp_path / "spill", min_free=0) as pool:
        pool.put("x", case())
        pool.save(tmp_path / "saved")
    options: Any = {"directory": tmp_path / "more", "min_free": 0, "codec": Compressed()}
    with FBPool.from_checkpoint(tmp_path / "saved", **options) as pool:
        with pool.get("x") as x:
            assert same(x, case())


# ------------------------------------------------------------------ damage


def decoded(tree: bytes, buffers: list[Any], *, writable: bool = False) -> Any:
    return Expanding().decode(Frames("compressed", tree, buffers), writable=writable, allow_pickle=False)


def test_damage_gives_our_errors_or_a_value(method: str) -> None:
    frames = Compressed(method).encode([RAMP, NOISE[:5000], TEXTS, np.arange(400_000)], allow_pickle=False)
    buffers = [bytes(buffer) for buffer in frames.buffers]
    rng = random.Random(0)
    for number in range(600):
        tree, kept = bytearray(frames.tree), [bytearray(buffer) for buffer in buffers]
        for _ in range(rng.choice((1, 1, 2, 5))):
            target = rng.choice([tree, *kept]) if number % 2 else tree
            target[rng.randrange(len(target))] ^= 1 << rng.randrange(8)
        if number % 7 == 0:
            place = rng.randrange(len(kept))
            del kept[place][rng.randrange(len(kept[place])) :]
        if number % 11 == 0:
            rng.shuffle(kept)
        try:
            decoded(bytes(tree), kept, writable=bool(number % 3))
        except OURS:
            pass


NIL = msgpack.packb(None)


def tree_of(method: str, piece: int, *specs: tuple[int, int], tree: Any = NIL) -> bytes:
    packed = b"".join(compressed._SPEC.pack(*spec) for spec in specs)
    head: bytes = msgpack.packb(["msgpack", method, piece, tree, packed])
    return head


def lies(method: str) -> Iterator[tuple[bytes, list[bytes]]]:
    piece = METHODS[method](None).compress(np.zeros(10_000, np.uint8))
    yield tree_of(method, 1 << 20, (10_001, 1)), [piece]
    yield tree_of(method, 1 << 20, (9_999, 1)), [piece]
    yield tree_of(method, 1 << 40, (1 << 40, 1)), [piece]
    yield tree_of(method, (1 << 64) - 1, ((1 << 64) - 1, 8)), [piece]
    yield tree_of(method, 1, (1 << 50, 1)), [piece]
    yield tree_of(method, 0, (10_000, 1)), [piece]
    yield tree_of(method, -1, (10_000, 1)), [piece]
    yield tree_of(method, 1 << 20, (10_000, 3)), [piece]
    yield tree_of(method, 1 << 20, (10_000, 255)), [piece]
    yield tree_of(method, 1 << 20, (0, 1)), [piece]
    yield tree_of(method, 1 << 20, (5, 0)), [piece]
    yield tree_of(method, 1 << 20, (len(piece), 0)), []
    yield tree_of(method, 1 << 20), [piece]
    yield tree_of(method, 1 << 20, tree=None), []
    yield tree_of(method, 1 << 20, (10_000, 1), tree="text"), [piece]
    yield tree_of(method, 1 << 20, (10_000, 1)), [piece[:-3]]
    yield tree_of(method, 1 << 20, (10_000, 1)), [b""]
    yield tree_of(method, 1 << 20, (10_000, 1)), [bytes(200)]
    yield tree_of("brotli", 1 << 20, (10_000, 1)), [piece]
    yield msgpack.packb(["compressed", method, 1, b"", b""]), []
    yield msgpack.packb(["msgpack", method, 1 << 20, b"\xc0", b"123"]), [piece]
    yield msgpack.packb([["msgpack"] * 9, method]), []
    yield msgpack.packb({"a": 1}), []
    yield b"\xdd\xff\xff\xff\xff", []
    yield b"", []


def test_lies_are_found_and_take_no_memory(method: str) -> None:
    for tree, buffers in lies(method):
        tracemalloc.start()
        try:
            with pytest.raises(FBCacheError) as caught:
                decoded(tree, buffers)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert isinstance(caught.value, OURS)
        # Room for what is claimed is taken up to what so many bytes could hold, and not touched.
        assert peak < 2 * (1 << 15) * max(map(len, buffers), default=1) + (1 << 20)


def test_a_frame_that_lies_about_its_own_length_makes_no_room() -> None:
    """A zstd frame's header is believed by the library."""
    import zstandard

    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(100_000)))
    assert zstandard.frame_content_size(bytes(frame)) == 100_000
    frame[5:9] = (0xFFFFFFF0).to_bytes(4, "little")
    with pytest.raises(CorruptBlobError):
        decoded(tree_of("zstd", 1 << 20, (100_000, 1)), [bytes(frame)])
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100_000))
    with pytest.raises(CorruptBlobError):
        decoded(tree_of("zstd", 1 << 20, (100_000, 1)), [unsized])


def test_a_block_longer_than_the_library_can_count_is_damage() -> None:
    with pytest.raises(CorruptBlobError):
        decoded(tree_of("lz4", 1 << 40, (3 << 30, 1)), [bytes(16 << 20)])


def test_zstd_reaches_no_more_than_it_is_taken_for() -> None:
    for kind in METHODS.values():
        method = kind(None)
        assert (1 << 24) / len(method.compress(np.zeros(1 << 24, np.uint8))) < method.most


def test_frames_of_another_codec_are_told() -> None:
    with pytest.raises(CorruptBlobError, match="another codec"):
        Expanding().decode(PLAIN.encode(1, allow_pickle=False), writable=False, allow_pickle=False)


def test_it_keeps_no_state_between_threads(method: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    codec = Compressed(method)
    values = [np.arange(n, n + 50_000) for n in range(16)]
    turn: Callable[[Any], Any] = lambda value: through(value, codec)  # noqa: E731
    with ThreadPoolExecutor(4) as threads:
        assert all(map(np.array_equal, threads.map(turn, values), values))
