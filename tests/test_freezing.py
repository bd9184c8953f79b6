"""Values are taken over without copies where that is safe, and never where others could write."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fbcache.codec import Frames, MsgpackCodec
from fbcache.freezing import Ghost, deep_copy, take_over, thaw

CODEC = MsgpackCodec()


def is_sealed(array: Any) -> bool:
    if array.flags.writeable:
        return False
    try:
        array.flags.writeable = True
    except ValueError:
        return True
    return False


def shares(left: Any, right: Any) -> bool:
    return bool(np.shares_memory(left, right))


# -------------------------------------------------------------------------------- bare arrays


def test_an_array_that_owns_its_memory_is_frozen_in_place():
    mine = np.arange(10)
    kept = take_over(mine)
    assert shares(kept, mine) and not mine.flags.writeable and is_sealed(kept)
    assert kept is not mine


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(12).reshape(3, 4),
        lambda: np.zeros((3, 4)).T,
        lambda: np.arange(10)[::-1],
        lambda: np.arange(10)[:5],
        lambda: np.broadcast_to(np.arange(3.0), (5, 3)),
        lambda: np.arange(10, dtype="i8").view("M8[s]"),
    ],
)
def test_a_view_whose_owner_nobody_else_has_is_not_copied(make):
    mine = make()
    start = mine.__array_interface__["data"]
    kept = take_over(mine)
    assert kept.__array_interface__["data"][0] == start[0] and is_sealed(kept) and not mine.flags.writeable


def test_a_small_part_of_a_big_owner_is_copied_so_that_the_rest_can_go():
    mine = np.arange(100)[:20]
    kept = take_over(mine)
    assert not shares(kept, mine) and mine.flags.writeable and is_sealed(kept) and kept.nbytes == 160


def test_a_view_whose_owner_someone_has_is_copied():
    base = np.arange(10)
    kept = take_over(base[:])
    base[0] = 77
    assert kept[0] == 0 and is_sealed(kept) and base.flags.writeable


def test_a_view_whose_owner_another_view_keeps_is_copied():
    mine = np.arange(12).reshape(3, 4)
    other = mine[0]
    kept = take_over(mine)
    other[0] = 77
    assert kept[0, 0] == 0 and is_sealed(kept)


def test_one_reference_more_to_the_owner_is_noticed_whoever_holds_it():
    for hold in (lambda o: [o], lambda o: {"k": o}, lambda o: lambda: o, lambda o: o[:1], memoryview):
        mine = np.arange(12).reshape(3, 4)
        held = hold(mine.base)
        kept = take_over(mine)
        assert not shares(kept, mine), held


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.frombuffer(bytearray(80)),
        lambda: np.frombuffer(bytes(80)),
        lambda: np.ndarray(10, buffer=memoryview(bytearray(80))),
        lambda: np.lib.stride_tricks.as_strided(np.arange(10.0), (3,), (16,)),
    ],
)
def test_memory_of_others_is_copied(make):
    mine = make()
    kept = take_over(mine)
    assert not shares(kept, mine) and is_sealed(kept) and (kept == mine).all()


def test_a_mapped_file_is_copied(tmp_path):
    mapped = np.memmap(tmp_path / "f", "f8", "w+", shape=(10,))
    for mine in (mapped, mapped[:], np.asarray(mapped)):
        kept = take_over(mine)
        assert not shares(kept, mine) and not kept.flags.writeable and mine.flags.writeable


def test_what_is_frozen_already_may_be_another_entrys_and_is_copied():
    mine = np.arange(10)
    first = take_over(mine)
    for again in (first, mine, first[2:]):
        assert not shares(take_over(again), mine)
    assert not shares(take_over([mine])[0], mine)


def test_order_is_kept_in_copies():
    base = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    kept = take_over(base[:])
    assert kept.flags.f_contiguous and not shares(kept, base)


def test_odd_arrays():
    for mine in (np.array(5.0), np.zeros((0, 3)), np.array([1, "x"], object), np.zeros(2, [("a", "f4")])):
        kept = take_over(mine)
        assert is_sealed(kept) and type(kept) is np.ndarray and kept.shape == mine.shape


def test_what_holds_no_array_is_returned_as_it_is():
    for value in (1, "x", None, object(), {"a": 1}, [1, [2, {"b": (3,)}]], (1,), {1, 2}, np.float64(1)):
        assert take_over(value) is value


# ------------------------------------------------------------------------------- subclasses


def test_masked_arrays_are_frozen_with_their_mask():
    mine = np.ma.array(np.arange(4), mask=[0, 1, 0, 1])
    kept = take_over({"m": mine})["m"]
    assert type(kept) is np.ma.MaskedArray and not kept.flags.writeable and not kept.mask.flags.writeable
    value, owners = thaw({"m": kept})
    value["m"][0] = np.ma.masked
    value["m"][2] = 5
    again = take_over(value, owned=owners)["m"]
    assert (
        again.tolist() == [None, None, 5, None]
        and not again.flags.writeable
        and not again.mask.flags.writeable
    )


def test_a_masked_array_over_memory_of_others_is_copied():
    data, mask = np.arange(4), np.zeros(4, bool)
    kept = take_over(np.ma.array(data, mask=mask, copy=False))
    data[0], mask[1] = 77, True
    assert kept.tolist() == [0, 1, 2, 3] and not kept.flags.writeable and not kept.mask.flags.writeable


def test_records_keep_their_class():
    mine = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    kept = take_over([mine])[0]
    assert type(kept) is np.recarray and not kept.flags.writeable and kept.a[0] == 1


# ------------------------------------------------------------------------------- containers


def test_arrays_in_containers_are_frozen_and_the_containers_stay():
    array = np.arange(3)
    value = {"a": [array, (array, {"deep": array})], "b": 1}
    assert take_over(value) is value and not array.flags.writeable


def test_containers_on_the_way_to_a_copy_are_made_anew_and_no_others():
    base = np.arange(10)
    plain, loose = {"x": np.arange(2)}, base[:]
    value = {"plain": plain, "way": [1, (loose, plain)], "again": loose}
    kept = take_over(value)
    assert kept is not value and value["way"][1][0] is loose and loose.flags.writeable
    assert kept["plain"] is plain and kept["way"][1][1] is plain and kept["way"] is not value["way"]
    assert kept["way"][1][0] is kept["again"] and not kept["again"].flags.writeable
    assert list(kept) == list(value) and kept["way"][0] == 1


def test_views_of_an_owner_that_is_in_the_value_are_not_copied():
    base = np.arange(10)
    value = {"tail": base[5:], "base": base, "some": [base[::2]]}
    kept = take_over(value)
    assert kept is value and shares(kept["tail"], base)
    assert is_sealed(value["tail"]) and is_sealed(value["some"][0]) and not base.flags.writeable


def test_views_that_have_their_owner_for_themselves_are_not_copied():
    value = np.split(np.arange(10), 2)
    kept = take_over(value)
    assert kept is value and all(map(is_sealed, value))


def test_an_owner_that_one_view_too_many_refers_to_is_copied():
    first, second, third = np.split(np.arange(9), 3)
    kept = take_over([first, second])
    third[0] = 77
    assert not any(part.flags.writeable for part in kept)
    assert not shares(kept[0], first) and not shares(kept[1], second)


@pytest.mark.parametrize("copied", [False, True])
def test_values_that_contain_themselves(copied):
    base = np.arange(3)
    value: list[Any] = [base[:] if copied else base]
    value += [value, {"again": value}, (value, 1)]
    value.append((value[3], value))
    kept = take_over(value)
    assert (kept is value) is not copied
    assert kept[1] is kept and kept[2]["again"] is kept and kept[3][0] is kept
    assert kept[4][0] is kept[3] and kept[4][1] is kept
    assert not kept[0].flags.writeable


def test_a_tuple_that_contains_itself_through_a_list():
    inner: list[Any] = [np.arange(3)[::2][:1]]
    value = (inner, 1)
    inner.append(value)
    inner.append(np.frombuffer(bytes(8)))
    kept = take_over(value)
    assert kept is not value and kept[0] is not inner and not kept[0][2].flags.writeable
    assert kept[0][1][0] is kept[0]


# ------------------------------------------------------------------------------------- thaw


def test_thawing_gives_a_new_view_and_old_ones_stay_read_only():
    mine = np.arange(4)
    kept = take_over(mine)
    view, owners = thaw(kept)
    view[0] = 77
    assert view is not kept and shares(view, mine) and kept[0] == 77 and not kept.flags.writeable
    again = take_over(view, owned=owners)
    assert shares(again, mine) and is_sealed(again) and is_sealed(view) and not mine.flags.writeable


@pytest.mark.parametrize(
    "make", [lambda: np.zeros((3, 4), order="F"), lambda: np.arange(9)[::-2], lambda: np.array(1)]
)
def test_a_thawed_view_has_the_same_geometry(make):
    kept = take_over(make())
    view, owners = thaw(kept)
    assert (view.shape, view.strides, view.dtype) == (kept.shape, kept.strides, kept.dtype)
    assert shares(take_over(view, owned=owners), kept)


def test_what_is_bound_anew_in_a_guard_is_judged_by_itself():
    view, owners = thaw(take_over(np.arange(4)))
    part = take_over(view[:1], owned=owners)
    assert shares(part, view) and is_sealed(part)
    other = np.arange(4)
    assert not shares(take_over(other[:], owned=owners), other)


def test_owners_are_kept_so_that_no_other_array_gets_their_id():
    value, owners = thaw(take_over([np.arange(4)]))
    mine = id(value.pop())
    gc.collect()
    assert mine in owners and all(id(owner) == key for key, owner in owners.items())


def test_arrays_in_containers_are_thawed_in_place():
    array = np.arange(4)
    kept = take_over({"a": [array, array[1:]], "b": (array,)})
    value, owners = thaw(kept)
    assert value is kept and value["a"][0] is array
    value["a"][1][0] = 77
    assert array[1] == 77
    assert take_over(value, owned=owners) is value and is_sealed(value["a"][1]) and not array.flags.writeable


def test_memory_that_cannot_be_written_is_copied_on_thawing():
    encoded = CODEC.encode({"a": [np.arange(100)], "b": np.arange(3), "n": [1]}, allow_pickle=False)
    frames = Frames("msgpack", encoded.tree, [bytes(b) for b in encoded.buffers])
    kept = CODEC.decode(frames, writable=False, allow_pickle=False)
    value, owners = thaw(kept)
    value["a"][0][0] = value["b"][0] = 77
    assert kept["a"][0][0] == kept["b"][0] == 0 and value["n"] is kept["n"]
    assert take_over(value, owned=owners) is value
    view, owners = thaw(kept["b"])
    view[0] = 5
    assert kept["b"][0] == 0 and shares(take_over(view, owned=owners), view)


def test_a_value_read_for_writing_is_frozen_and_thawed_without_copies():
    encoded = CODEC.encode({"a": np.arange(100), "b": np.arange(3)}, allow_pickle=False)
    for name in ("a", "b", None):
        memory = [memoryview(np.array(memoryview(b))) for b in encoded.buffers]
        value = CODEC.decode(Frames("msgpack", encoded.tree, memory), writable=True, allow_pickle=False)
        value = value if name is None else value[name]
        whole, owners = thaw(value)
        kept = take_over(whole, owned=owners)
        arrays = kept.values() if name is None else [kept]
        assert all(map(is_sealed, arrays))
        again, owners = thaw(kept)
        for old, new in zip(arrays, again.values() if name is None else [again], strict=True):
            new[0] = 77
            assert old[0] == 77 and new.flags.writeable


# ------------------------------------------------------------------------------- deep copies


def test_deep_copies_are_fresh_writeable_and_of_the_same_types():
    mine = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    value = {"a": take_over(mine), "m": np.ma.array([1, 2], mask=[0, 1]), "t": (1, [2])}
    for original, fresh in ((value["a"], deep_copy(value["a"])), (value["a"], deep_copy(value)["a"])):
        assert type(fresh) is np.ndarray and fresh.flags.writeable and not shares(fresh, original)
        assert fresh.strides == original.strides and (fresh == original).all()
    assert type(deep_copy(value)["m"]) is np.ma.MaskedArray and deep_copy(value)["t"] == (1, [2])
    inner: list[Any] = [1]
    assert deep_copy(np.array([inner, None], object))[0] is not inner


# ------------------------------------------------------------------------------------ pandas


@pytest.fixture(params=[True, False])
def lazy(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether pandas copies on write."""
    pandas = pytest.importorskip("pandas", minversion="2.1")
    if int(pandas.__version__.partition(".")[0]) < 3:
        with pandas.option_context("mode.copy_on_write", request.param):
            yield request.param
    elif request.param:
        yield True
    else:
        pytest.skip("pandas 3 always does")


def make_frame() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"a": np.arange(4.0), "s": np.array(list("wxyz"), object)})


def test_frames_are_copied_lazily_where_pandas_can(lazy):
    frame, array = make_frame(), np.arange(3)
    value = {"f": [frame, frame], "a": array}
    kept = take_over(value)
    first, second = kept["f"]
    assert first is second is not frame and value["f"][0] is frame and kept["a"] is array
    assert shares(first["a"].to_numpy(), frame["a"].to_numpy()) is lazy
    frame.iloc[0, 0] = 77.0
    assert first.iloc[0, 0] == 0.0 and take_over(frame).iloc[0, 0] == 77.0


def test_a_frame_that_was_taken_over_refuses_to_be_written(lazy):
    kept = take_over(make_frame())
    for column in (0, 1):
        with pytest.raises(ValueError, match="read-only"):
            kept.iloc[0, column] = kept.iloc[1, column]


def test_a_frames_objects_are_not_copied_but_who_refers_to_them_is(lazy):
    pandas = pytest.importorskip("pandas")
    inner = [1]
    frame = pandas.DataFrame({"o": np.array([inner, None], object)})
    kept = take_over(frame)
    assert kept["o"].iloc[0] is inner
    frame.iloc[0, 0] = None
    assert kept["o"].iloc[0] is inner


def test_a_thawed_frame_is_written_in_place_if_nobody_else_has_its_memory(lazy):
    kept = take_over({"f": make_frame(), "b": np.arange(3)})
    start = kept["f"]["a"].to_numpy().__array_interface__["data"]
    value, owners = thaw(kept)
    del kept
    value["f"].iloc[0, 0] = 77.0
    value["b"][0] = 77
    again = take_over(value, owned=owners)
    assert again["f"].iloc[0, 0] == 77.0 and again["b"][0] == 77
    assert again["f"]["a"].to_numpy().__array_interface__["data"][0] == start[0]
    with pytest.raises(ValueError, match="read-only"):
        again["f"].iloc[0, 0] = 5.0


def test_a_thawed_frame_leaves_alone_what_others_have(lazy):
    mine = make_frame()
    kept = take_over(mine)
    value, _ = thaw(kept)
    value.iloc[0, 0] = 77.0
    assert mine.iloc[0, 0] == 0.0 and kept.iloc[0, 0] == (0.0 if lazy else 77.0)
    mine.iloc[1, 0] = 78.0
    assert value.iloc[1, 0] == 1.0


def test_a_column_that_was_added_is_taken_over_too(lazy):
    value, owners = thaw(take_over(make_frame()))
    column = np.arange(4.0)
    value["new"] = column
    again = take_over(value, owned=owners)
    column[0] = value.iloc[0, 2] = 77.0
    assert again["new"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_callers_frame_stays_writeable_after_the_pools_was_thawed(lazy):
    mine = make_frame()
    kept = take_over([mine, mine.index])
    thaw(kept)
    mine.iloc[0, 0] = 5.0
    mine.loc[1, "s"] = "other"
    assert mine.iloc[0].tolist() == [5.0, "w"] and kept[0].loc[1, "s"] == "x"


# ------------------------------------------------------------------------------------ ghosts


@pytest.mark.parametrize(
    "hold", [lambda kept: kept, lambda kept: kept[1:], lambda kept: kept.T, lambda kept: kept[0:1].base]
)
@pytest.mark.parametrize(
    "make", [lambda: np.arange(4), lambda: np.zeros((3, 4), "M8[s]", order="F"), lambda: np.arange(9)[::-2]]
)
def test_a_ghost_finds_the_memory_that_someone_still_holds(make, hold):
    kept = take_over(make())
    shape, strides, dtype, content = kept.shape, kept.strides, kept.dtype, kept.tolist()
    ghost = Ghost.of(kept)
    assert ghost is not None
    held = hold(kept)
    del kept
    found = ghost.recall()
    assert ghost.alive and found is not None and is_sealed(found)
    assert (found.shape, found.strides, found.dtype, found.tolist()) == (shape, strides, dtype, content)
    assert shares(found, held)
    del held, found
    assert not ghost.alive and ghost.recall() is None


@pytest.mark.parametrize(
    "wrap", [bytes, lambda raw: memoryview(bytearray(raw)).toreadonly()], ids=["bytes", "view"]
)
@pytest.mark.parametrize("size", [4, 1000])
def test_a_ghost_of_an_array_that_was_read_from_a_file(wrap, size):
    encoded = CODEC.encode(np.arange(size), allow_pickle=False)
    frames = Frames("msgpack", encoded.tree, [wrap(b) for b in encoded.buffers])
    kept = CODEC.decode(frames, writable=False, allow_pickle=False)
    ghost = Ghost.of(kept)
    assert ghost is not None
    part = kept[2:4]
    del kept, frames
    found = ghost.recall()
    assert (
        found is not None and found.tolist() == list(range(size)) and is_sealed(found) and shares(found, part)
    )
    del found, part
    assert not ghost.alive


def test_a_ghost_does_not_find_memory_that_was_made_writeable():
    mine = np.arange(4)
    ghost = Ghost.of(take_over(mine))
    assert ghost is not None and ghost.recall() is not None
    mine.flags.writeable = True
    assert ghost.alive and ghost.recall() is None


@pytest.mark.parametrize(
    "value", [1, [np.arange(3)], np.arange(3), np.array([None], object), np.zeros(0), np.float64(1)]
)
def test_what_has_no_ghost(value):
    if isinstance(value, np.ndarray) and (value.dtype.hasobject or not value.size):
        value = take_over(value)
    assert Ghost.of(value) is None
    assert Ghost.of(take_over(np.ma.array([1, 2]))) is None


def test_ghosts_hold_no_memory():
    mine = np.arange(4)
    before = sys.getrefcount(mine)
    ghost = Ghost.of(take_over(mine))
    assert sys.getrefcount(mine) == before and copy.copy([ghost])
