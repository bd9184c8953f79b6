"""Images of Pillow: exactly back, over their buffer where that can be, and no file behind them."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", "10")

from PIL import Image, ImageDraw

from fbcache import FBPool
from fbcache.codec import Frames, MsgpackCodec
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.sizeof import sizeof
from tests.codec.families.damage import damaged
from tests.codec.families.image_cases import FILES, MODES, OVER_BUFFERS, cases, file, noise, same
from tests.codec.roundtrip import through

CODEC = MsgpackCodec()
CASES = cases()
OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)


def encoded(image: Image.Image) -> tuple[Any, list[bytes]]:
    frames = CODEC.encode(image, allow_pickle=False)
    return msgpack.unpackb(frames.tree, strict_map_key=False), [bytes(buffer) for buffer in frames.buffers]


def decoded(tree: Any, buffers: list[bytes], *, writable: bool = False) -> Any:
    frames = Frames("msgpack", msgpack.packb(tree), buffers)
    return CODEC.decode(frames, writable=writable, allow_pickle=False)


@given(
    st.sampled_from(MODES),
    st.tuples(st.integers(0, 90), st.integers(0, 90)),
    st.integers(0, 1000),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_any_image_comes_back(mode: str, size: tuple[int, int], seed: int, writable: bool) -> None:
    image = noise(mode, size, seed)
    assert same(image, through(image, writable=writable))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("writable", [False, True])
def test_every_case_comes_back_exactly_without_pickle(name: str, writable: bool) -> None:
    assert same(CASES[name], through(CASES[name], writable=writable))


@pytest.mark.parametrize("mode", MODES)
def test_a_readers_image_is_over_its_buffer_where_it_can_be_and_copies_to_be_drawn_on(mode: str) -> None:
    image = noise(mode, (301, 201))
    frames = CODEC.encode(image, allow_pickle=False)
    (raw,) = map(bytes, frames.buffers)
    back = CODEC.decode(Frames("msgpack", frames.tree, [raw]), writable=False, allow_pickle=False)
    assert bool(back.readonly) == (mode in OVER_BUFFERS)
    if back.readonly:
        with pytest.raises(ValueError, match="readonly"):
            back.load()[0, 0] = back.getpixel((1, 1))
    back.paste(back.crop((5, 5, 9, 9)), (0, 0))
    assert back.tobytes() != raw == image.tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_a_writers_image_takes_pixels(mode: str) -> None:
    back = through(noise(mode, (301, 201)), writable=True)
    pixels = back.load()
    pixels[0, 0] = pixels[7, 7]
    assert back.getpixel((0, 0)) == back.getpixel((7, 7))


@pytest.mark.parametrize("kind", FILES)
def test_what_was_read_from_a_file_comes_back_plain(kind: str) -> None:
    image = Image.open(io.BytesIO(file(kind)))
    assert type(image) is not Image.Image
    back = through(image)
    assert same(image, back) and back.format == kind


def test_one_of_several_frames_is_refused() -> None:
    held = io.BytesIO()
    noise("P", (9, 9)).save(held, "GIF", save_all=True, append_images=[noise("P", (9, 9), 1)])
    image = Image.open(io.BytesIO(held.getvalue()))
    with pytest.raises(UnsupportedTypeError, match=r"2 frames .*\.copy\(\)"):
        through(image)
    assert same(image.copy(), through(image.copy()))


def test_a_file_that_is_cut_off_is_unsupported_and_says_why() -> None:
    image = Image.open(io.BytesIO(file("PNG")[:1000]))
    with pytest.raises(UnsupportedTypeError, match="truncated"):
        through(image)


def test_what_stands_in_info_and_cannot_be_encoded_takes_pickle() -> None:
    image = noise("L", (3, 3))
    image.info["module"] = pytest.Item
    with pytest.raises(PickleRefusedError, match=r"info\['module'\]|value\['module'\]"):
        through(image)
    assert through(image, allow_pickle=True).info == image.info


def test_an_image_that_occurs_twice_is_one() -> None:
    image = noise("L", (90, 90))
    back = through([image, image])
    assert back[0] is back[1]


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("mode", MODES)
def test_a_size_that_lies_is_damage(mode: str) -> None:
    tree, buffers = encoded(noise(mode, (301, 201)))
    assert tree[2][1] == [301, 201]
    for size in ([310, 201], [301, 202], [301, 200], [-301, -201], [0, 201], [1 << 40, 1], [301]):
        tree[2][1] = size
        with pytest.raises(CorruptBlobError):
            decoded(tree, buffers)


def test_images_without_pixels_take_no_memory_that_is_not_in_the_blob() -> None:
    tree, buffers = encoded(Image.new("L", (0, 3)))
    for size in ([0, 1 << 30], [0, 4], [1 << 30, 0], [70_000, 0], [1 << 40, 0]):
        tree[2][1] = size
        with pytest.raises(CorruptBlobError):
            decoded(tree, buffers)


def test_two_images_of_one_buffer_are_damage() -> None:
    image, other = noise("RGB", (301, 201)), noise("RGB", (301, 201), 1)
    tree, buffers = encoded([image, other])
    tree[1][1][2][-1] = tree[1][0][2][-1]
    with pytest.raises(CorruptBlobError, match="two values"):
        decoded(tree, buffers)


def test_a_rational_of_texts_is_damage() -> None:
    tree, buffers = encoded(CASES["info"])
    good, bad = (msgpack.packb(["PIL.IFDRational", [number, 1]])[1:] for number in (72, "1e9"))
    packed = msgpack.packb(tree).replace(good, bad)
    assert packed != msgpack.packb(tree)
    with pytest.raises(CorruptBlobError, match="numbers"):
        CODEC.decode(Frames("msgpack", packed, buffers), writable=False, allow_pickle=False)


@pytest.mark.filterwarnings("ignore")
def test_damage_gives_our_errors_or_an_image_that_is_safe_to_use() -> None:
    rng = random.Random(7)
    for image in CASES.values():
        frames = CODEC.encode(image, allow_pickle=False)
        for _ in range(10):
            tree, buffers = damaged(rng, frames)
            spoilt = Frames("msgpack", tree, buffers)
            try:
                back = CODEC.decode(spoilt, writable=rng.random() < 0.5, allow_pickle=False)
            except OURS:
                continue
            if type(back) is Image.Image and 0 not in back.size:
                back.copy().resize((3, 3)), back.tobytes(), back.getpixel((0, 0)), back.histogram()


# ------------------------------------------------------------------------------------ in a pool

_SCRIPT = """
import sys
from fbcache import FBPool
from tests.codec.families.image_cases import cases, same

with FBPool.from_checkpoint(sys.argv[1], directory=sys.argv[2], min_free=0) as pool:
    for name, image in cases().items():
        with pool.get(name) as back:
            assert same(image, back), name
"""


def test_images_are_spilled_saved_and_opened_in_a_process_that_refuses_pickle(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool("64MB")
    for name, image in CASES.items():
        pool.put(name, image)
    pool.evict()
    for name, image in CASES.items():
        with pool.get(name) as back:
            assert same(image, back), name
    pool.save(tmp_path / "saved")
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "saved"), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", FILES)
def test_a_pool_loads_what_has_a_file_and_keeps_a_plain_image(
    kind: str, pool: FBPool, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(file(kind))
    with Image.open(path) as image:
        pool.put("i", [image])
    path.unlink()
    expected = Image.open(io.BytesIO(file(kind)))
    for _ in range(2):
        with pool.get("i") as (kept,):
            assert same(expected, kept) and kept.format == kind
        pool.evict()


def test_put_refuses_one_of_several_frames_and_stores_nothing(pool: FBPool) -> None:
    held = io.BytesIO()
    noise("P", (9, 9)).save(held, "GIF", save_all=True, append_images=[noise("P", (9, 9), 1)])
    with pytest.raises(UnsupportedTypeError, match="2 frames"):
        pool.put("i", Image.open(io.BytesIO(held.getvalue())))
    assert "i" not in pool


def test_the_callers_image_and_the_pools_do_not_affect_each_other(pool: FBPool) -> None:
    image = noise("RGB", (30, 30))
    before = image.copy()
    pool.put("i", image)
    ImageDraw.Draw(image).rectangle((0, 0, 9, 9), "red")
    with pool.get("i") as kept:
        assert same(before, kept)
    with pool.get_mut("i") as changed:
        changed.load()[0, 0] = (1, 2, 3)
    image.load()[0, 0] = (4, 5, 6)
    with pool.get("i") as kept:
        assert kept.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_write_guard_changes_an_image_that_a_reader_has_reloaded(mode: str, make_pool: Any) -> None:
    pool = make_pool("4MB")
    pool.put("i", noise(mode, (500, 400)))
    pool.evict()
    with pool.get("i") as back:
        assert bool(back.readonly) == (mode != "RGB")
        other = back.getpixel((7, 7))
    del back
    with pool.get_mut("i") as changed:
        changed.load()[0, 0] = other
    del changed
    pool.evict()
    with pool.get("i") as back:
        assert back.getpixel((0, 0)) == other
    del back


@pytest.mark.parametrize("mode", MODES)
def test_an_image_counts_what_its_pixels_take(mode: str) -> None:
    image = noise(mode, (301, 201))
    stored = 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4
    assert 301 * 201 * stored <= sizeof(image) <= 301 * 201 * stored + 4000
