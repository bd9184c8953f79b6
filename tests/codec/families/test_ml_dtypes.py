"""Arrays and scalars of ml_dtypes: each bit comes back, by a name from a fixed list."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")

import msgpack  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402

from fbcache import FBPool  # noqa: E402
from fbcache.codec import Frames, dtypes  # noqa: E402
from fbcache.codec.dtypes import ML_TYPES  # noqa: E402
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError  # noqa: E402
from fbcache.sizeof import sizeof  # noqa: E402
from tests.codec.roundtrip import CODEC, same, same_array, through  # noqa: E402

OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)
TYPES = [getattr(ml_dtypes, name) for name in sorted(ML_TYPES) if hasattr(ml_dtypes, name)]


def of(kind: Any, *shape: int) -> Any:
    """An array of values that the type has."""
    ramp = np.arange(int(np.prod(shape))) % 2
    return ramp.astype(kind).reshape(shape)


def test_all_types_of_the_library_are_known() -> None:
    here = {
        name
        for name, kind in vars(ml_dtypes).items()
        if isinstance(kind, type) and issubclass(kind, np.generic)
    }
    assert here <= ML_TYPES


@settings(max_examples=100, deadline=None)
@given(data=st.data(), kind=st.sampled_from(TYPES), writable=st.booleans())
def test_arrays_come_back(data: Any, kind: Any, writable: bool) -> None:
    size = np.dtype(kind).itemsize
    raw = data.draw(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_side=6).map(lambda s: (*s, size))))
    array = raw.copy().view(kind)[..., 0]
    for value in (array, array.T, array[::2]):
        back = through(value, writable=writable)
        assert same_array(back, value) and back.dtype.type is kind
        assert back.flags.writeable == writable


@pytest.mark.parametrize("kind", TYPES)
def test_awkward_arrays_and_scalars(kind: Any) -> None:
    fields = np.dtype([("a", kind), ("b", "<f4"), ("c", kind, (2,))])
    values = [
        of(kind, 40, 30),
        np.asfortranarray(of(kind, 40, 30)),
        of(kind, 0, 3),
        of(kind),
        np.broadcast_to(of(kind, 1), (500,)),
        np.zeros(3, fields),
        np.zeros(300, fields),
        np.zeros(3, fields)[1],
    ]
    back = through(values)
    for left, right in zip(back, values, strict=True):
        assert left.dtype == right.dtype and left.dtype.type is right.dtype.type
        assert left.tobytes() == right.tobytes() and left.flags.f_contiguous == right.flags.f_contiguous
    masked = np.ma.array(of(kind, 4), mask=[0, 1, 0, 1])
    assert same_array(through(masked).data, masked.data)
    scalars = [kind(1), {kind(0): kind(1)}, np.array(of(kind, 3))[1]]
    again = through(scalars)
    assert repr(again) == repr(scalars) and type(again[0]) is kind
    assert again[0].tobytes() == scalars[0].tobytes()


def test_views_of_one_array_are_views_of_one_again() -> None:
    array = of(ml_dtypes.bfloat16, 1000)
    back = through([array, array[10:], array.view(np.uint16)], writable=True)
    back[2][10] = 0x3F80
    assert back[0][10] == 1 and back[1][0] == 1


def test_another_order_of_bytes_is_left_to_pickle() -> None:
    swapped = np.zeros(3, np.dtype(ml_dtypes.bfloat16).newbyteorder())
    with pytest.raises(PickleRefusedError):
        CODEC.encode(swapped, allow_pickle=False)


# ------------------------------------------------------------------ through a pool


def case() -> dict[str, Any]:
    return {
        "big": of(ml_dtypes.bfloat16, 300, 400),
        "eight": of(ml_dtypes.float8_e4m3fn, 200_000),
        "four": of(ml_dtypes.int4, 10),
        "scalar": ml_dtypes.bfloat16(1.5),
        "fields": np.zeros(5, [("x", ml_dtypes.float8_e5m2)]),
    }


def same_case(left: dict[str, Any]) -> bool:
    return all(
        left[name].dtype == value.dtype and left[name].tobytes() == value.tobytes()
        for name, value in case().items()
    )


SCRIPT = """
import sys
from fbcache import FBPool
with FBPool.from_checkpoint(sys.argv[1], directory=sys.argv[2], min_free=0) as pool:
    with pool.get("x") as x:
        assert "ml_dtypes" in sys.modules
        from tests.codec.families.test_ml_dtypes import same_case
        assert same_case(x)
"""


def test_through_a_pool_and_a_checkpoint(tmp_path: Path) -> None:
    with FBPool("1GB", directory=tmp_path / "spill", min_free=0) as pool:
        pool.put("x", case())
        pool.evict()
        with pool.get("x") as x:
            assert same_case(x)
            assert not x["big"].flags.owndata and not x["big"].flags.writeable
            with pytest.raises(ValueError):
                x["eight"][0] = 0
        with pool.get_mut("x") as x:
            x["big"][0] = 1
            x["big"][0] = case()["big"][0]
        pool.evict()
        with pool.get("x") as x:
            assert same_case(x)
        pool.save(tmp_path / "saved")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "elsewhere")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes() -> None:
    array = of(ml_dtypes.bfloat16, 1000)
    assert sizeof(array) == 2000
    assert sizeof(ml_dtypes.bfloat16(1)) < 100


# ------------------------------------------------------------------ what cannot be read


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = CODEC.encode(of(ml_dtypes.bfloat16, 3), allow_pickle=False)
    dtypes._parse_simple.cache_clear()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UnsupportedTypeError, match=r"fbcache\[ml_dtypes\]"):
        CODEC.decode(frames, writable=False, allow_pickle=False)


@pytest.mark.parametrize("name", ["ml:", "ml:finfo", "ml:__doc__", "ml:bfloat16 ", "ml:os.system"])
def test_a_name_that_is_not_on_the_list_is_refused(name: str) -> None:
    tree = msgpack.packb([48, name, [2], b"1234", False])
    with pytest.raises(UnsupportedTypeError, match="cannot be read"):
        CODEC.decode(Frames("msgpack", tree, []), writable=False, allow_pickle=False)


@pytest.mark.parametrize("state", [b"", b"1", b"1234", 3, [b"12"], None])
def test_a_scalar_of_another_length_is_damage(state: Any) -> None:
    tree = msgpack.packb([10, "ml_dtypes.bfloat16", state])
    with pytest.raises(CorruptBlobError):
        CODEC.decode(Frames("msgpack", tree, []), writable=False, allow_pickle=False)


def test_damage_gives_our_errors_or_a_value() -> None:
    frames = CODEC.encode(case(), allow_pickle=False)
    buffers = [bytes(buffer) for buffer in frames.buffers]
    rng = random.Random(0)
    for _ in range(600):
        tree = bytearray(frames.tree)
        for _ in range(rng.choice((1, 1, 2, 5))):
            tree[rng.randrange(len(tree))] ^= 1 << rng.randrange(8)
        for writable in (False, True):
            try:
                damaged = Frames(frames.codec, bytes(tree), buffers)
                repr(CODEC.decode(damaged, writable=writable, allow_pickle=False))
            except OURS:
                pass


def test_values_are_the_same_by_their_bits() -> None:
    nan = np.array([float("nan"), 1, -0.0], ml_dtypes.bfloat16)
    assert same([through(nan).tobytes()], [nan.tobytes()])
