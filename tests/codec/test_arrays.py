"""Arrays and numpy scalars come back exactly, and their memory is copied only where it has to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbcache.codec import Frames
from fbcache.errors import PickleRefusedError
from tests.codec.roundtrip import CODEC, HAS_STRINGS, same, texts_of_any_length, through


def test_a_dense_array_is_neither_copied_out_nor_in():
    for array in (np.arange(1000.0), np.asfortranarray(np.ones((20, 30))), np.arange(90).astype("M8[ns]")):
        (buffer,) = CODEC.encode(array, allow_pickle=False).buffers
        assert np.shares_memory(np.frombuffer(buffer, np.uint8), array.view(np.int64))
        back = CODEC.decode(CODEC.encode(array, allow_pickle=False), writable=False, allow_pickle=False)
        assert np.shares_memory(back.view(np.int64), array.view(np.int64))
        assert back.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("size", [0, 3, 1000])
def test_read_only_arrays_cannot_be_made_writeable(size):
    value = [np.arange(size), np.zeros(size, [("a", "f4")]), np.array([None] * size, object)]
    value += [texts_of_any_length(["x"] * size), np.ma.array(np.arange(size))]
    frames = CODEC.encode(value, allow_pickle=False)
    writeable_memory = [memoryview(bytearray(memoryview(b))) for b in frames.buffers]
    back = CODEC.decode(Frames("msgpack", frames.tree, writeable_memory), writable=False, allow_pickle=False)
    for array in back:
        assert not array.flags.writeable
        with pytest.raises(ValueError):
            array.flags.writeable = True


@pytest.mark.parametrize("size", [0, 3, 1000])
def test_writable_arrays_are_views_of_the_buffers(size):
    frozen = np.arange(size)
    frozen.flags.writeable = False
    value = [frozen, np.array([None] * size, object), np.ma.array(np.arange(size))]
    back = through(value, writable=True)
    for array in back:
        assert array.flags.writeable
        array[:] = 7
    frames = CODEC.encode(np.arange(1000), allow_pickle=False)
    memory = np.array(memoryview(frames.buffers[0]))
    view = CODEC.decode(
        Frames("msgpack", frames.tree, [memoryview(memory)]), writable=True, allow_pickle=False
    )
    assert view.base is memory


@pytest.mark.parametrize("size", [20, 1000])
def test_views_that_overlap_overlap_again_and_are_sent_once(size):
    base = np.arange(float(size))
    value = {
        "tail": base[size // 2 :],
        "base": base,
        "every": base[::3],
        "as_int": base[:4].view("i4"),
        "back": base[::-1],
    }
    frames = CODEC.encode(value, allow_pickle=False)
    assert sum(memoryview(b).nbytes for b in frames.buffers) == base.nbytes
    back = through(value, writable=True)
    assert same(back, value)
    back["base"][:] = -1
    assert all((view == -1).all() for name, view in back.items() if name != "as_int")


def test_views_without_their_base_overlap_again():
    base = np.arange(1000)
    back = through([base[100:600], base[500:900:2], base[950:]], writable=True)
    back[0][400:] = 0
    assert (back[1][:50] == 0).all() and back[1][50] == 600
    frames = CODEC.encode([base[100:600], base[500:900:2], base[950:]], allow_pickle=False)
    assert [memoryview(b).nbytes for b in frames.buffers] == [799 * 8, 50 * 8]


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2),
        lambda a: a[:, ::2],
        lambda a: a[..., 1],
        lambda a: a[::-1, ::-2, ::3],
        lambda a: np.broadcast_to(a[0, 0, 0], (50, 60)),
        lambda a: np.broadcast_to(a[:1], (9, *a.shape[1:])),
        lambda a: a["f"] if a.dtype.names else a[5:5],
    ],
)
@pytest.mark.parametrize("dtype", ["f8", "M8[us]", ">i2", [("x", "i1"), ("f", "f8")]])
def test_strided_views(view, dtype):
    array = view(np.arange(6 * 8 * 10).reshape(6, 8, 10).astype("i8").astype(dtype))
    assert same(through(array), array)
    assert same(through([array, array.copy()], writable=True), [array, array])


axis = st.slices(12)
view_of_base = st.tuples(axis, axis, st.booleans(), st.sampled_from(["i8", "M8[s]"]))


@given(st.lists(view_of_base, max_size=5))
def test_any_views_of_one_array_keep_content_and_sharing(choices):
    base = np.arange(144).reshape(12, 12)
    views = []
    for rows, columns, transpose, dtype in choices:
        view = base.T if transpose else base
        views.append(view.view(dtype)[rows, columns])
    back = through(views, writable=True)
    assert same(back, views)
    for number, (left, new_left) in enumerate(zip(views, back, strict=True)):
        for right, new_right in zip(views[:number], back, strict=False):
            assert np.shares_memory(left, right) == np.shares_memory(new_left, new_right)


def test_a_broadcast_array_takes_no_more_than_its_memory():
    frames = CODEC.encode(np.broadcast_to(np.arange(3.0), (10**6, 3)), allow_pickle=False)
    assert frames.nbytes < 200


STRUCTURED = [
    np.dtype([("a", "<i4"), ("b", ">f8", (2, 3)), ("c", "S3")]),
    np.dtype({"names": ["a", "b"], "formats": ["u1", "f8"]}, align=True),
    np.dtype({"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [9, 0], "itemsize": 32}),
    np.dtype([(("title", "a"), "f4"), ("b", [("c", "M8[D]"), ("d", "?")])]),
    np.dtype((np.record, [("a", "f4")])),
    np.dtype([]),
]


@pytest.mark.parametrize("dtype", STRUCTURED, ids=str)
def test_structured_dtypes(dtype):
    array = np.zeros(40, dtype)
    back = through(array).dtype
    assert (back, back.isalignedstruct, back.type, back.fields) == (
        dtype,
        dtype.isalignedstruct,
        dtype.type,
        dtype.fields,
    )
    assert same(through(array[0]), array[0])


def test_object_arrays_hold_any_value():
    array = np.empty((2, 3), object, order="F")
    array[:] = [[1, [2], np.arange(3)], [np.array(5), None, {"a": (1,)}]]
    array[1, 0] = np.array(5)
    back = through(array, writable=True)
    assert back.flags.f_contiguous and back.shape == (2, 3)
    assert all(same(a, b) for a, b in zip(array.flat, back.flat, strict=True))
    assert same(through(np.array(None, object)), np.array(None, object))


@pytest.mark.skipif(not HAS_STRINGS, reason="since numpy 2")
@pytest.mark.parametrize("missing", [{}, {"na_object": None}, {"na_object": float("nan")}])
def test_strings_of_any_length(missing):
    dtype = np.dtypes.StringDType(coerce=False, **missing)
    array = np.array([["a", "b" * 100], ["", missing.get("na_object", "x")]], dtype)
    back = through(array)
    assert (
        back.shape == (2, 2)
        and repr(back.dtype) == repr(dtype)
        and repr(back.tolist()) == repr(array.tolist())
    )


@pytest.mark.parametrize("mask", [np.ma.nomask, [True, False, True]])
@pytest.mark.parametrize("hard", [False, True])
def test_masked_arrays(mask, hard):
    array = np.ma.array([1, 2, 3], mask=mask, hard_mask=hard, fill_value=9)
    back = through(array, writable=True)
    assert type(back) is np.ma.MaskedArray and (back.mask is np.ma.nomask) == (mask is np.ma.nomask)
    assert back.hardmask is hard and back.fill_value == 9 and back.fill_value.dtype == array.fill_value.dtype
    assert same(np.asarray(back.data), array.data) and (back.mask == array.mask).all()
    unfilled = through(np.ma.array([1.5]))
    assert unfilled._fill_value is None


@pytest.mark.parametrize("code", sorted(set(np.typecodes["All"]) - {"O"}))
def test_numpy_scalars_keep_their_exact_type(code):
    scalar = np.ones(1, np.dtype(code))[0]
    back = through([scalar])[0]
    assert type(back) is type(scalar) and back.dtype == scalar.dtype and back.tobytes() == scalar.tobytes()


def test_texts_and_times_as_numpy_scalars():
    scalars = [
        np.str_("a\0"),
        np.str_("\ud800"),
        np.bytes_(b"a\0"),
        np.datetime64("NaT"),
        np.datetime64(3, "25s"),
    ]
    scalars += [np.timedelta64(5), np.zeros(1, [("a", "i4", 2)])[0], np.rec.array([(1, 2.0)])[0]]
    for scalar in scalars:
        back = through(scalar)
        assert type(back) is type(scalar) and str(back) == str(scalar)
        assert getattr(back, "dtype", None) == getattr(scalar, "dtype", None)


def test_a_dtypes_metadata_is_not_lost_silently():
    array = np.zeros(3, np.dtype("f8", metadata={"unit": "m"}))
    with pytest.raises(PickleRefusedError):
        CODEC.encode(array, allow_pickle=False)
    field_array = np.zeros(3, [("a", np.dtype("f8", metadata={"unit": "m"}))])
    with pytest.raises(PickleRefusedError):
        CODEC.encode(field_array, allow_pickle=False)
