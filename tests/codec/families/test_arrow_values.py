"""Arrow values come back equal, with their types and metadata; slices go out alone."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", "21")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fbcache.errors import PickleRefusedError, UnsupportedTypeError  # noqa: E402
from fbcache.sizeof import sizeof  # noqa: E402
from tests.codec.families.arrow_cases import Money, arrays, money, same, tables  # noqa: E402
from tests.codec.roundtrip import CODEC, through  # noqa: E402

ARRAYS = arrays()


def encoded_bytes(value: Any) -> int:
    return CODEC.encode(value, allow_pickle=False).nbytes


# ------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("writable", [False, True])
def test_arrays_of_every_layout_come_back(name: str, writable: bool) -> None:
    array = ARRAYS[name]
    for part in (array, array[1:], array[1:2], array[1:1], array[:-1], array[3:7]):
        assert same(through(part, writable=writable), part)
        assert same(through(part, writable=writable, allow_pickle=True), part)
    for value in (array.type, array[0], array[1], pa.chunked_array([array, array[1:]])):
        assert same(through(value, writable=writable), value)


@pytest.mark.parametrize("name", tables())
def test_tables_schemas_and_buffers_come_back(name: str) -> None:
    value = tables()[name]
    assert same(through(value), value) and same(through(value, writable=True), value)


_FLAT = [make() for make in (pa.int8, pa.int64, pa.bool_, pa.string, pa.string_view, pa.null)]


def _made_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(pa.list_view),
        inner.map(lambda value: pa.list_(value, 2)),
        inner.map(lambda value: pa.map_(pa.string(), value)),
        st.tuples(inner, inner).map(lambda pair: pa.struct([("a", pair[0]), ("b", pair[1])])),
    )


_TYPES = st.recursive(st.sampled_from(_FLAT), _made_of, max_leaves=4)


def _values(type_: Any) -> st.SearchStrategy[Any]:
    return st.none() | _present(type_)


def _present(type_: Any) -> st.SearchStrategy[Any]:
    types = pa.types
    if types.is_struct(type_):
        return st.fixed_dictionaries({field.name: _values(field.type) for field in type_})
    if types.is_map(type_):
        return st.lists(st.tuples(st.text(max_size=3), _values(type_.item_type)), max_size=3)
    if types.is_fixed_size_list(type_):
        return st.lists(_values(type_.value_type), min_size=2, max_size=2)
    if types.is_nested(type_):
        return st.lists(_values(type_.value_type), max_size=3)
    if types.is_boolean(type_):
        return st.booleans()
    if types.is_null(type_):
        return st.none()
    return st.integers(-128, 127) if types.is_integer(type_) else st.text(max_size=20)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), type_=_TYPES)
def test_any_array_and_any_slice_come_back(data: Any, type_: Any) -> None:
    array = pa.array(data.draw(st.lists(_values(type_), max_size=12)), type_)
    start = data.draw(st.integers(0, len(array)))
    part = array.slice(start, data.draw(st.integers(0, len(array) - start)))
    inner = part.slice(len(part) // 3)
    assert same(through(part), part) and same(through(inner), inner)


# ------------------------------------------------------------------ what goes out


@pytest.mark.parametrize("shift", [0, 1, 8, 5003])
@pytest.mark.parametrize("name", ["int64", "string", "string_view", "list_", "list_view", "struct", "map"])
def test_a_small_slice_does_not_take_its_array_along(name: str, shift: int) -> None:
    whole = pa.concat_arrays([ARRAYS[name]] * 2000)
    part = whole[shift : shift + 100]
    assert same(through(part), part)
    assert encoded_bytes(part) < 0.1 * encoded_bytes(whole)


def test_a_small_slice_of_a_dense_union_goes_alone() -> None:
    count = 10_000
    codes, offsets = pa.array([0] * count, pa.int8()), pa.array(range(count), pa.int32())
    union = pa.UnionArray.from_dense(codes, offsets, [pa.array(range(count))])
    assert same(through(union[500:510]), union[500:510]) and encoded_bytes(union[500:510]) < 2000


def test_a_small_slice_of_runs_goes_alone() -> None:
    ends = pa.array(range(3, 30_003, 3), pa.int32())
    runs = pa.RunEndEncodedArray.from_arrays(ends, pa.array([f"run {i}" for i in range(10_000)]))
    for part in (runs[20_000:20_010], runs[20_001:20_002], runs[29_999:]):
        assert same(through(part), part) and encoded_bytes(part) < 2000


def test_memory_goes_out_and_comes_in_without_a_copy() -> None:
    table = pa.table({"x": np.arange(10_000), "s": [f"text {i}" for i in range(10_000)]})
    frames = CODEC.encode(table, allow_pickle=False)
    there = {buffer.address for column in table.columns for buffer in column.chunk(0).buffers() if buffer}
    gone = {np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] for buffer in frames.buffers}
    assert gone == there
    back = CODEC.decode(frames, writable=False, allow_pickle=False)
    here = {buffer.address for column in back.columns for buffer in column.chunk(0).buffers() if buffer}
    assert here == there


def test_what_shares_memory_still_does() -> None:
    words = pa.array([f"word {i}" for i in range(1000)])
    codes = pa.array(np.arange(1000, dtype="i4"))
    chunks = [pa.DictionaryArray.from_arrays(codes[i : i + 100], words) for i in range(0, 1000, 100)]
    chunked = pa.chunked_array(chunks)
    numbers = np.arange(1000.0)
    table = pa.table({"a": numbers, "b": numbers})
    value = {"chunked": chunked, "words": words, "numbers": numbers, "table": table}
    assert encoded_bytes(value) < 4000 + words.nbytes + numbers.nbytes + 5000
    tree = msgpack.unpackb(CODEC.encode(chunked, allow_pickle=False).tree)
    assert [chunk[-1] for chunk in tree[2][1][1:]] == [0] * 9  # the number of the first one's dictionary
    back = through(value)
    addresses = {chunk.dictionary.buffers()[2].address for chunk in back["chunked"].chunks}
    assert addresses == {back["words"].buffers()[2].address}
    start = back["numbers"].__array_interface__["data"][0]
    assert {column.chunk(0).buffers()[1].address for column in back["table"].columns} == {start}
    one, other = through([table, table])
    assert one is other


def test_what_lies_askew_is_put_straight() -> None:
    memory = pa.py_buffer(b"\0" * 3 + np.arange(1000).tobytes())
    askew = pa.Array.from_buffers(pa.int64(), 1000, [None, memory.slice(3)])
    small = pa.Array.from_buffers(pa.int8(), 8000, [None, memory.slice(3)])
    back, other = through([askew, small[5:]])
    assert same(back, pa.array(np.arange(1000))) and same(other, small[5:])
    all_ways = [pa.Array.from_buffers(pa.int64(), 900, [None, memory.slice(start)]) for start in range(8)]
    assert all(map(same, through(all_ways), all_ways))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 4, 1, 0, 2)])
def test_memory_that_is_shared_from_an_odd_place_on_comes_back_aligned(order: tuple[int, ...]) -> None:
    raw = np.zeros(5000, np.uint8)
    memory = pa.py_buffer(raw[-raw.__array_interface__["data"][0] % 64 :])
    starts = {5: pa.int8(), 8: pa.int64(), 16: pa.int64(), 12: pa.int32(), 14: pa.int16()}
    made = [pa.Array.from_buffers(type_, 100, [None, memory.slice(at)]) for at, type_ in starts.items()]
    arrays = [made[index] for index in order]
    for allow_pickle in (False, True):
        for back, array in zip(through(arrays, allow_pickle=allow_pickle), arrays, strict=True):
            assert same(back, array)
            assert back.buffers()[1].address % (array.type.bit_width // 8) == 0


def test_values_are_read_only() -> None:
    for writable in (False, True):
        back = through(pa.array(np.arange(1000)), writable=writable)
        assert not any(buffer.is_mutable for buffer in back.buffers() if buffer)
        assert not back.to_numpy().flags.writeable
        assert not through(pa.py_buffer(bytearray(5)), writable=writable).is_mutable


# ------------------------------------------------------------------ what Arrow's schemas cannot say


def test_an_extension_type_has_to_be_registered_on_both_sides() -> None:
    column = money()
    table = pa.table({"price": column})
    with pytest.raises(PickleRefusedError):  # it would come back as its storage
        through(table)
    pa.register_extension_type(Money())
    try:
        assert same(through(column), column) and same(through(table), table)
        frames = CODEC.encode(table, allow_pickle=False)
    finally:
        pa.unregister_extension_type("tests.money")
    with pytest.raises(UnsupportedTypeError, match=r"tests\.money.*register_extension_type"):
        CODEC.decode(frames, writable=False, allow_pickle=False)


def test_the_storage_of_an_extension_type_that_nobody_registered_stays_what_it_is() -> None:
    metadata = {"ARROW:extension:name": "nobody.s", "ARROW:extension:metadata": ""}
    table = pa.table([pa.array([1])], schema=pa.schema([pa.field("x", pa.int64(), metadata=metadata)]))
    assert same(through(table), table)


def test_what_a_schema_cannot_say_goes_by_pickle() -> None:
    inner = pa.array(["a", "b"]).dictionary_encode()
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), inner)
    with pytest.raises(PickleRefusedError):
        through(array)
    assert same(through(array, allow_pickle=True), array)
    key = pa.field("k", pa.string(), nullable=False)
    named = pa.array([[("a", 1)]], pa.map_(key, pa.field("v", pa.int8())))  # Arrow would rename them
    with pytest.raises(PickleRefusedError):
        through(named)
    assert through(named, allow_pickle=True).equals(named)
    deep = pa.int8()
    for _ in range(300):
        deep = pa.list_(deep)
    with pytest.raises(PickleRefusedError):
        through(pa.nulls(1, deep))


# ------------------------------------------------------------------ sizes


def test_sizes_are_those_of_the_buffers() -> None:
    for name, value in {**ARRAYS, **tables()}.items():
        if hasattr(value, "get_total_buffer_size"):
            assert sizeof(value) == 64 + value.get_total_buffer_size(), name
    numbers = np.arange(100_000.0)
    for value in (pa.array(numbers), pa.table({"x": numbers}), pa.array(numbers)[:5], pa.py_buffer(numbers)):
        assert abs(sizeof(value) - numbers.nbytes) < 1000  # a slice keeps all of it
    assert sizeof(pa.scalar("x" * 1000)) >= 1000
    assert 0 < sizeof(pa.schema([("a", pa.int8())])) < 1000 and sizeof(pa.int8()) > 0
    assert sizeof(pa.field("a", pa.int8())) > 0
