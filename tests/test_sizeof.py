"""Memory is counted once, honestly, in bounded time, and without ever raising."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbcache import sizeof as module
from fbcache.sizeof import Measure, measure, register, sizeof

MIB = 1 << 20
HEADER = 4096  # more than the objects around an array take


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(module, "_registry", {})


def about(nbytes: int) -> Any:
    return pytest.approx(nbytes, abs=HEADER)


@pytest.mark.parametrize(
    "value", [None, True, 1, 1 << 100, 1.5, 1j, "text", "\u1234" * 99, b"bytes", bytearray(99)]
)
def test_atoms_take_what_python_says(value):
    assert measure(value) == Measure(sys.getsizeof(value), True) and sizeof(value) == sys.getsizeof(value)


@pytest.mark.parametrize(
    "array", [np.zeros(MIB, "u1"), np.zeros((8, MIB // 8), "u1", order="F"), np.zeros(0)], ids=len
)
def test_a_bare_array_takes_its_elements(array):
    assert measure(array) == Measure(array.nbytes, True) and sizeof(array) == array.nbytes
    assert measure([array]).nbytes == about(array.nbytes)


def test_a_view_counts_the_whole_memory_that_it_keeps():
    base = np.zeros(MIB, "u1")
    assert sizeof(base[:10]) == MIB and sizeof([base[:10], base[4:].reshape(4, -1), base]) == about(MIB)


def test_the_same_object_counts_once():
    array, text = np.zeros(MIB, "u1"), "x" * MIB
    assert sizeof([array, {"a": array}, (array,), text, {text: text}]) == about(2 * MIB)
    assert sizeof([text] * 500) == about(MIB + 500 * 8)


def test_one_array_in_a_long_list_counts_once():
    assert sizeof([np.zeros(MIB, "u1")] * 100_000) == about(MIB + 800_000)


@pytest.mark.parametrize("wrap", [bytes, bytearray, lambda raw: memoryview(raw)[:]], ids=str)
def test_memory_of_others_counts_its_length(wrap):
    raw = wrap(bytes(MIB))
    first, second = np.frombuffer(raw, "u1", 100), np.frombuffer(raw, "f8", 100, offset=8000)
    assert sizeof(first) == MIB and sizeof([first, second]) == about(MIB)


def test_a_mapped_array_counts_its_length(tmp_path):
    mapped = np.memmap(tmp_path / "mapped", "u1", "w+", shape=(MIB,))
    assert sizeof(mapped) == about(MIB) and sizeof([mapped, mapped[:5]]) == about(MIB)


def test_masks_and_objects_in_arrays_count():
    masked = np.ma.array(np.zeros(MIB, "u1"), mask=np.ones(MIB, bool))
    assert sizeof(masked) == about(2 * MIB)
    assert sizeof(np.array([np.zeros(MIB, "u1"), "x" * MIB], object)) == about(2 * MIB)


def test_containers_and_their_subclasses():
    array = np.zeros(MIB, "u1")
    kinds = [[array], (array,), {1: array}, OrderedDict(a=array), defaultdict(list, a=array), deque([array])]
    for value in kinds:
        assert sizeof(value) == about(MIB) and measure(value).exact
    for value in ({"x" * MIB}, frozenset({"x" * MIB}), {"x" * MIB: 1}):
        assert sizeof(value) == about(MIB)


@dataclass(slots=True)
class Slotted:
    content: Any
    __hidden: Any = None


class Plain:
    def __init__(self, content: Any) -> None:
        self.content = content


class Both(Slotted):
    pass


def test_attributes_and_slots_count():
    array = np.zeros(MIB, "u1")
    both = Both(array)
    both.more = np.zeros(MIB, "u1")
    for value in (Plain(array), Slotted(array), Slotted(1, array)):
        assert sizeof(value) == about(MIB)
    assert sizeof(both) == about(2 * MIB)


def test_what_belongs_to_the_program_does_not_count():
    assert sizeof([np, Plain, about, "".join, Plain(1).__init__]) < 5 * HEADER


def test_values_that_contain_themselves():
    value: list[Any] = [np.zeros(MIB, "u1")]
    value += [value, {"again": value}, Plain(value)]
    assert sizeof(value) == about(MIB)


def test_nesting_without_end():
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert sizeof(value) > 100_000


# ---------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "value",
    [
        [b"x" * (n % 100) for n in range(50_000)],
        {n: "x" * (n % 100) for n in range(50_000)},
        {f"{n:050}" for n in range(50_000)},
        [{"id": n, "name": f"{n:020}"} for n in range(20_000)],
        [[np.zeros(n % 100) for n in range(30)] for _ in range(2000)],
    ],
    ids=["bytes", "dict", "set", "dicts", "arrays"],
)
def test_large_containers_are_estimated_closely_and_alike_each_time(value):
    seen = set()

    def walk(part: Any) -> int:
        if id(part) in seen:
            return 0
        seen.add(id(part))
        inner = [*part, *part.values()] if type(part) is dict else part if type(part) in (list, set) else ()
        return sys.getsizeof(part) + sum(map(walk, inner))

    measured = measure(value)
    assert not measured.exact and measured == measure(value)
    assert measured.nbytes == pytest.approx(walk(value), rel=0.2)


def test_up_to_the_sample_containers_are_exact():
    values = [bytes(n) for n in range(1000)]
    assert measure(values) == Measure(sys.getsizeof(values) + sum(map(sys.getsizeof, values)), True)


def test_the_work_is_bounded():
    visited = []
    register(Plain, lambda value: (visited.append(1) or 10, value.content))
    leaf = [[[[Plain(()) for _ in range(10)] for _ in range(10)] for _ in range(10)] for _ in range(300)]
    measured = measure(leaf)
    assert len(visited) <= module._ALLOWANCE and not measured.exact
    assert measured.nbytes > 300_000 * 10


# ---------------------------------------------------------------------------- strange objects


class NoSize:
    def __sizeof__(self) -> int:
        raise RuntimeError("no size")


class NoAttributes:
    @property
    def __dict__(self) -> Any:
        raise RuntimeError("no attributes")


class Says:
    def __init__(self, nbytes: Any) -> None:
        self._nbytes = nbytes

    @property
    def nbytes(self) -> Any:
        if isinstance(self._nbytes, Exception):
            raise self._nbytes
        return self._nbytes


class NoIteration(list):
    def __iter__(self) -> Any:
        raise RuntimeError("no iteration")


class Anything:
    def __getattr__(self, name: str) -> Any:
        return self


@pytest.mark.parametrize(
    "value",
    [NoSize(), NoAttributes(), NoIteration([1]), Anything(), *map(Says, ("x", -1, None, 1.5, KeyError("x")))],
    ids=lambda value: type(value).__name__,
)
def test_strange_objects_count_something_and_spoil_nothing(value):
    assert sizeof(value) > 0
    assert sizeof([value, np.zeros(MIB, "u1")]) == about(MIB)


def test_nbytes_of_array_likes_is_believed():
    assert measure(Says(MIB)) == Measure(MIB, True) and sizeof(Says(np.int64(5))) == 5


@given(
    st.recursive(
        st.integers() | st.text() | st.binary(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_any_plain_value_takes_at_least_its_own_object(value):
    assert sizeof(value) == measure(value).nbytes >= sys.getsizeof(value)


# ---------------------------------------------------------------------------------- registry


def test_a_registered_class_says_its_size_for_subclasses_too():
    class Derived(Plain):
        pass

    register(Plain, lambda value: 12345)
    assert sizeof(Plain(1)) == sizeof(Derived(1)) == 12345
    register(Derived, lambda value: 5)
    assert sizeof(Derived(1)) == 5


def test_a_registered_class_may_name_its_parts():
    array = np.zeros(MIB, "u1")
    register(Plain, lambda value: (100, [value.content]))
    assert sizeof([Plain(array), array, Plain(Plain(array))]) == about(MIB)


@pytest.mark.parametrize("wrong", ["x", -1, None, (1,), (1, 2), ("x", [])])
def test_a_registered_function_that_is_wrong_spoils_nothing(wrong):
    register(Plain, lambda value: wrong)
    assert not measure(Plain(1)).exact and sizeof(Plain(1)) > 0


def test_only_classes_are_registered():
    with pytest.raises(TypeError):
        register("numpy.ndarray", lambda value: 1)  # type: ignore[arg-type]
