"""Sparse arrays of scipy: exactly back, over their memory, and checked where they come from elsewhere."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("scipy", "1.15")  # the first with all of the dimensions that are tried

import scipy.sparse as sp

from fbcache import FBPool
from fbcache.codec import Frames, MsgpackCodec
from fbcache.codec.families import sparse_checks
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.sizeof import sizeof
from tests.codec.families.damage import damaged
from tests.codec.families.sparse_cases import CLASSES, arrays, cases, dense, flags, large, same
from tests.codec.roundtrip import through

CODEC = MsgpackCodec()
CASES = cases()
OF_ARRAYS = [name for name, value in CASES.items() if value.format not in ("dok", "lil")]
OURS = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)


@st.composite
def matrices(draw: st.DrawFn) -> Any:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=8))
    dtype = draw(st.sampled_from(["?", "i1", "u4", "i8", "f4", "f8", "c8"]))
    values = draw(hnp.arrays(np.dtype(dtype), shape, fill=st.just(np.dtype(dtype).type(0))))
    return draw(st.sampled_from(CLASSES))(np.nan_to_num(values))


@given(matrices(), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_matrix_comes_back(matrix: Any, writable: bool, trusted: bool) -> None:
    back = through(matrix, writable=writable, allow_pickle=trusted)
    assert same(back, matrix, trusted=trusted)
    assert np.array_equal(back.toarray(), matrix.toarray())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("writable", [False, True])
def test_every_format_comes_back_exactly(name: str, writable: bool) -> None:
    value = CASES[name]
    assert same(through(value, writable=writable, allow_pickle=True), value)
    assert same(through(value, writable=writable), value, trusted=False)


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_arrays_come_back_as_views_that_are_as_writeable_as_asked(name: str) -> None:
    for writable in (False, True):
        back = through(CASES[name], writable=writable)
        assert all(not array.flags.owndata and array.flags.writeable == writable for array in arrays(back))


def test_encoding_asks_no_matrix_to_find_out_about_itself() -> None:
    matrix = sp.csr_array(dense())
    through(matrix)
    assert flags(matrix) == {}


def test_claims_of_order_are_taken_from_the_pool_alone() -> None:
    matrix = sp.csr_array((np.ones(2), np.array([1, 0], "i4"), np.array([0, 2], "i4")), (1, 2))
    matrix.has_canonical_format = True  # a lie
    assert through(matrix, allow_pickle=True).has_sorted_indices
    assert not through(matrix).has_sorted_indices


@pytest.mark.parametrize("order", [1, -1])
def test_a_coo_is_canonical_again_where_that_shows(order: int) -> None:
    rows, columns = dense().nonzero()
    coords = (rows, columns)[::order]
    matrix = sp.coo_array((np.ones(len(rows)), coords), (12, 12))
    matrix.has_canonical_format = True
    assert through(matrix).has_canonical_format
    matrix.coords = tuple(axis[::-1] for axis in coords)
    assert not through(matrix).has_canonical_format


def test_arrays_shared_between_two_matrices_stay_shared() -> None:
    one = sp.csr_array(dense())
    two = sp.csr_array((one.data * 2, one.indices, one.indptr), one.shape, copy=False)
    view = sp.csc_array((one.data, one.indices, one.indptr), one.shape[::-1], copy=False)
    two.indices, two.indptr, view.data = one.indices, one.indptr, one.data  # the constructors make views
    back = through([one, two, view, one, one.data[2:5]], writable=True)
    assert back[1].indices is back[0].indices and back[1].indptr is back[0].indptr
    assert back[2].data is back[0].data and back[3] is back[0]
    back[4][:] = 77
    assert back[0].data[2:5].tolist() == [77] * 3


def test_index_arrays_that_overlap_what_is_written_are_parted() -> None:
    axis = np.arange(5, dtype="i4")
    twice = sp.coo_array((np.ones(5), (axis, axis)), (5, 5), copy=False)
    assert through(twice).coords[0] is through(twice).coords[1] or np.may_share_memory(*through(twice).coords)
    three = sp.coo_array((axis, (axis, axis)), (5, 5), copy=False)
    for trusted in (False, True):
        back = through(three, writable=True, allow_pickle=trusted)
        assert same(back, three, trusted=False) and not np.may_share_memory(back.data, back.coords[0])
    rows, columns = np.broadcast_to(np.int32(3), 300), np.arange(300, dtype="i4")
    broad = sp.coo_array((np.ones(300), (rows, columns)), (5, 300), copy=False)
    assert same(through(broad), broad, trusted=False)


def test_what_is_no_sparse_array_of_ours_takes_pickle() -> None:
    with_more = sp.csr_array(dense())
    with_more.note = "mine"
    narrow = sp.csr_array(dense())
    narrow.indices = narrow.indices.astype("i2")
    masked = sp.csr_array(dense())
    masked.data = np.ma.array(masked.data)
    short = sp.csr_array(dense())
    short.indptr = short.indptr[:-1]
    objects = sp.dok_array((2, 2))
    objects.dtype = np.dtype(object)
    beyond = sp.csr_array(dense())
    beyond.indices[3] = 10
    long_row = sp.lil_array(dense())
    long_row.rows[0].append(99)
    long_row.data[0].append(1.0)
    for value in (with_more, narrow, masked, short, objects, beyond, long_row):
        with pytest.raises(PickleRefusedError, match="scipy"):
            through(value)
        assert type(through(value, allow_pickle=True)) is type(value)


def test_a_lil_can_be_read_and_written() -> None:
    back = through(sp.lil_array(dense()))
    assert back[0].toarray().tolist() == dense()[0].tolist() and back[0, 0] == dense()[0, 0]
    back[0, 0] = 5
    assert back[0, 0] == 5


# ------------------------------------------------------------------------------------ damage


def tampered(name: str, change: Any) -> bytes:
    """The tree of a value with another state; its arrays are small enough to be in it."""
    tree = msgpack.unpackb(CODEC.encode(CASES[name], allow_pickle=False).tree)
    change(tree[2])
    packed: bytes = msgpack.packb(tree)
    return packed


def replaced(place: tuple[int, ...], array: Any) -> Any:
    def change(state: Any) -> None:
        node = msgpack.unpackb(CODEC.encode(np.array(array), allow_pickle=False).tree)
        *way, last = place
        for step in way:
            state = state[step]
        state[last] = node

    return change


LIES = {
    "index beyond": ("not sorted", replaced((4, 0), np.array([3, 0, 1], "i4"))),
    "index below": ("not sorted", replaced((4, 0), np.array([-1, 0, 1], "i4"))),
    "pointer beyond": ("not sorted", replaced((4, 1), np.array([0, 4], "i4"))),
    "pointer below": ("not sorted", replaced((4, 1), np.array([0, -4], "i4"))),
    "pointer late": ("not sorted", replaced((4, 1), np.array([1, 3], "i4"))),
    "pointer of floats": ("not sorted", replaced((4, 1), np.array([0, 3.0]))),
    "pointer of bytes swapped": ("not sorted", replaced((4, 1), np.array([0, 3], ">i4"))),
    "pointer descends": ("csr_array", replaced((4, 1), np.array([0, 5, 3, *[5] * 9, 31], "i4"))),
    "more rows": ("not sorted", lambda state: state.__setitem__(0, [2, 3])),
    "fewer columns": ("not sorted", lambda state: state.__setitem__(0, [1, 2])),
    "no columns": ("not sorted", lambda state: state.__setitem__(0, [1])),
    "negative columns": ("not sorted", lambda state: state.__setitem__(0, [1, -3])),
    "coo index beyond": ("duplicates", replaced((4, 0), np.array([1, 3, 0]))),
    "coo of lengths": ("duplicates", replaced((4, 0), np.array([1, 2]))),
    "coo of dimensions": ("duplicates", lambda state: state[4].pop()),
    "dia of lengths": ("far diagonals", replaced((4, 0), np.array([1], "i4"))),
    "dia overflows": ("far diagonals", replaced((4, 0), np.array([1, 2**31 - 1], "i4"))),
    "blocks do not fit": ("wide blocks", lambda state: state.__setitem__(0, [12, 11])),
    "blocks of nothing": ("wide blocks", replaced((3,), np.zeros((8, 0, 5)))),
}


@pytest.mark.parametrize("lie", LIES)
def test_indices_out_of_bounds_are_damage(lie: str) -> None:
    tree = tampered(*LIES[lie])
    buffers = [bytes(b) for b in CODEC.encode(CASES[LIES[lie][0]], allow_pickle=False).buffers]
    for writable in (False, True):
        with pytest.raises(CorruptBlobError):
            CODEC.decode(Frames("msgpack", tree, buffers), writable=writable, allow_pickle=False)


@pytest.mark.parametrize("row", [[0, 10], [-1, 0], [0, 1, 2], (0, 1), [0, "a"], [0, 1 << 70]])
def test_rows_of_a_lil_are_held_against_its_shape(row: Any) -> None:
    matrix = sp.lil_array((3, 10))
    matrix[0, [0, 1]] = 5
    tree = msgpack.unpackb(CODEC.encode(matrix, allow_pickle=False).tree)
    rows = np.empty(3, object)
    rows[:] = [row, [], []]
    tree[2][3][0] = msgpack.unpackb(CODEC.encode(rows, allow_pickle=False).tree)
    with pytest.raises(CorruptBlobError):
        CODEC.decode(Frames("msgpack", msgpack.packb(tree), []), writable=False, allow_pickle=False)


def test_many_matrices_over_one_index_are_checked_once_and_many_views_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = sp.csr_array(dense(300, 400))
    many = [sp.csr_array((one.data, one.indices, one.indptr), one.shape, copy=False) for _ in range(200)]
    assert all(same(back, one, trusted=False) for back in through(many))
    axes = [one.indices[:n] for n in range(9000, 9600)]
    views = [sp.coo_array((np.ones(len(axis)), (axis, axis)), (400, 400), copy=False) for axis in axes]
    with pytest.raises(PickleRefusedError):
        through(views)
    with monkeypatch.context() as patch:
        patch.setattr(sparse_checks, "_LOOKS", 1000)
        frames = CODEC.encode(views, allow_pickle=False)
    with pytest.raises(CorruptBlobError, match="again and again"):
        CODEC.decode(frames, writable=False, allow_pickle=False)


def use(matrix: Any) -> None:
    """Have scipy's compiled code go over all of it."""
    def multiply() -> Any:
        return matrix @ np.ones(matrix.shape[1])

    if matrix.ndim == 2 and max(matrix.shape) < 1000:
        for work in (multiply, matrix.tocsr, matrix.tocsc, matrix.toarray, lambda: matrix[0]):
            try:
                work()
            except (ValueError, TypeError, IndexError, NotImplementedError, OverflowError, MemoryError):
                pass


@pytest.mark.filterwarnings("ignore")
def test_damage_gives_our_errors_or_a_matrix_that_is_safe_to_use() -> None:
    rng = random.Random(5)
    for value in CASES.values():
        frames = CODEC.encode(value, allow_pickle=False)
        for _ in range(25):
            tree, buffers = damaged(rng, frames)
            spoilt = Frames("msgpack", tree, buffers)
            try:
                back = CODEC.decode(spoilt, writable=rng.random() < 0.5, allow_pickle=False)
            except OURS:
                continue
            if type(back) in CLASSES:
                use(back)


# ------------------------------------------------------------------------------------ in a pool

_SCRIPT = """
import sys
from fbcache import FBPool
from tests.codec.families.sparse_cases import cases, same

with FBPool.from_checkpoint(sys.argv[1], directory=sys.argv[2], min_free=0) as pool:
    for name, value in cases().items():
        with pool.get(name) as back:
            assert same(back, value, trusted=False), name
"""


def test_matrices_are_spilled_saved_and_opened_in_a_process_that_refuses_pickle(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool("64MB")
    for name, value in cases().items():
        pool.put(name, value)
    pool.evict()
    for name, value in CASES.items():
        with pool.get(name) as back:
            assert same(back, value), name
    pool.save(tmp_path / "saved")
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "saved"), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


def test_put_freezes_the_arrays_and_a_write_guard_thaws_them(pool: FBPool) -> None:
    matrix = sp.csr_array(dense())
    pool.put("m", matrix)
    assert not any(array.flags.writeable for array in arrays(matrix))
    with pool.get("m") as kept:
        assert kept is matrix
        with pytest.raises(ValueError, match="read-only"):
            kept.data *= 2
    with pool.get_mut("m") as changed:
        changed.data *= 2
    with pool.get("m") as kept:
        assert np.array_equal(kept.toarray(), 2 * dense())
        assert not any(array.flags.writeable for array in arrays(kept))


@pytest.mark.parametrize("form", ["bsr", "coo", "csc", "csr", "dia"])
def test_a_matrix_over_memory_outside_is_copied_and_the_callers_is_left_alone(
    form: str, pool: FBPool
) -> None:
    matrix = getattr(sp, f"{form}_array")(dense())
    outside = np.concatenate([matrix.data, matrix.data])
    matrix.data = outside[: len(matrix.data)]
    before = matrix.toarray()
    pool.put("m", matrix)
    matrix.data[:] = 99
    with pool.get("m") as kept:
        assert np.array_equal(kept.toarray(), before) and kept.shape == matrix.shape
        assert flags(kept) == flags(matrix)


def test_a_reloaded_matrix_is_a_view_of_its_file_and_what_sorts_in_place_says_so(make_pool: Any) -> None:
    size = 40_000
    indices = np.random.default_rng(0).permutation(size).astype("i4")
    matrix = sp.csr_array((np.ones(size), indices, np.array([0, size], "i4")), (1, size))
    pool = make_pool("4MB")
    pool.put("m", matrix)
    pool.evict()
    with pool.get("m") as back:
        assert not any(array.flags.owndata or array.flags.writeable for array in arrays(back)[:2])
        assert (back @ np.ones(size))[0] == size
        with pytest.raises(ValueError, match="read-only"):
            back.sum_duplicates()
        with pytest.raises(ValueError, match="WRITEABLE"):
            back.data.setflags(write=True)
    with pool.get_mut("m") as back:
        back.sum_duplicates()
    del back
    pool.evict()
    with pool.get("m") as back:
        assert back.has_canonical_format and back.indices[:3].tolist() == [0, 1, 2]
    del back


def test_dok_and_lil_are_changed_under_a_write_guard(pool: FBPool) -> None:
    for form in ("dok", "lil"):
        pool.put(form, getattr(sp, f"{form}_array")(dense()))
        pool.evict()
        with pool.get_mut(form) as changed:
            changed[0, 0] = 77
        pool.evict()
        with pool.get(form) as back:
            assert back[0, 0] == 77


@pytest.mark.parametrize("form", ["bsr", "coo", "csc", "csr", "dia"])
def test_a_matrix_counts_what_its_arrays_take(form: str) -> None:
    matrix = large(form)
    truth = sum(array.nbytes for array in arrays(matrix))
    assert truth <= sizeof(matrix) <= truth + 1000


@pytest.mark.parametrize("form", ["dok", "lil"])
def test_a_matrix_counts_what_its_objects_take(form: str) -> None:
    matrix = getattr(sp, f"{form}_array")(dense(100, 100))
    held = [matrix._dict] if form == "dok" else [matrix.rows, matrix.data]
    assert sizeof(held) <= sizeof(matrix) + 200 and sizeof(matrix) > 30_000
