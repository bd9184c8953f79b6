"""Arrays in records, as registered classes and named tuples are, and in all dicts are frozen alike."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbcache import FBPool
from fbcache.codec import register
from fbcache.freezing import deep_copy, seal, take_over, thaw
from fbcache.sizeof import sizeof
from tests.conftest import MakePool

attrs = pytest.importorskip("attrs")
pydantic = pytest.importorskip("pydantic")


@register
@dataclass
class Record:
    data: Any
    other: Any = None

    def __post_init__(self) -> None:
        self.made = True

    @functools.cached_property
    def total(self) -> float:
        return float(self.data.sum())


@register
@dataclass(frozen=True, slots=True)
class Slotted:
    data: Any
    other: Any = field(default=None, compare=False)


@register
@attrs.define
class Defined:
    data: Any
    other: Any = attrs.field(default=None, converter=lambda value: value)


@register
@attrs.frozen(slots=False, eq=True, cache_hash=True)
class Hashed:
    other: Any
    data: Any = attrs.field(eq=False)


@register
class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", arbitrary_types_allowed=True)
    data: Any
    other: Any = None
    _secret: Any = pydantic.PrivateAttr(default=None)


@register
class Root(pydantic.RootModel[Any]):
    pass


@register
class Pair(NamedTuple):
    data: Any
    other: Any = None


class Plain(NamedTuple):
    data: Any
    other: Any = None


def with_extra(data: Any, other: Any) -> Model:
    return Model(data=0, other=other, more=data)


def with_secret(data: Any, other: Any) -> Model:
    model = Model(data=0, other=other)
    model._secret = data
    return model


def with_attribute(data: Any, other: Any) -> OrderedDict[str, Any]:
    value: OrderedDict[str, Any] = OrderedDict(other=other)
    value.data = data  # type: ignore[attr-defined]
    return value


def default_dict(data: Any, other: Any) -> defaultdict[str, Any]:
    return defaultdict(list, data=data, other=other)


Make = Callable[[Any, Any], Any]
Get = Callable[[Any], Any]

by_field: Get = lambda value: value.data  # noqa: E731
by_key: Get = lambda value: value["data"]  # noqa: E731

#: How each is made of two parts, and the first one found again.
WAYS: dict[str, tuple[Make, Get]] = {
    "dict": (lambda data, other: {"data": data, "other": other}, by_key),
    "OrderedDict": (lambda data, other: OrderedDict(data=data, other=other), by_key),
    "OrderedDict's attribute": (with_attribute, by_field),
    "defaultdict": (default_dict, by_key),
    "dataclass": (Record, by_field),
    "dataclass with slots": (Slotted, by_field),
    "attrs": (Defined, by_field),
    "attrs with a hash": (lambda data, other: Hashed(other, data), by_field),
    "model": (lambda data, other: Model(data=data, other=other), by_field),
    "model's extra": (with_extra, lambda value: value.more),
    "model's private": (with_secret, lambda value: value._secret),
    "root model": (lambda data, other: Root([data, other]), lambda value: value.root[0]),
    "named tuple, registered": (Pair, by_field),
    "named tuple": (Plain, by_field),
}

every_way = pytest.mark.parametrize(("make", "get"), WAYS.values(), ids=WAYS)


@every_way
def test_an_array_that_owns_its_memory_is_frozen_in_place(make: Make, get: Get) -> None:
    """Invariant 15."""
    array, other = np.arange(4), [np.arange(2)]
    value = make(array, other)
    assert take_over(value) is value and get(value) is array
    assert not array.flags.writeable and not other[0].flags.writeable


@every_way
def test_one_over_memory_of_others_is_copied_and_the_record_made_anew(make: Make, get: Get) -> None:
    base, other = np.arange(4), [np.arange(2)]
    value = make(base[:], other)
    mine = get(value)
    kept = take_over([value, value])
    base[0] = 77
    assert type(kept[0]) is type(value) and kept[0] is kept[1] is not value
    assert get(kept[0]).tolist() == [0, 1, 2, 3] and not get(kept[0]).flags.writeable
    assert get(value) is mine and mine.flags.writeable and not other[0].flags.writeable


@every_way
def test_other_parts_of_what_is_made_anew_are_the_same_objects(make: Make, get: Get) -> None:
    other = OrderedDict(x=np.arange(2))
    kept = take_over(make(np.arange(4)[:1], other))
    assert any(part is other for part in (children(kept)))


@every_way
def test_it_is_thawed_in_place_and_taken_over_again(make: Make, get: Get) -> None:
    array = np.arange(4)
    kept = take_over(make(array, [array[1:]]))
    value, owners = thaw(kept)
    assert value is kept
    get(value)[1] = 77
    assert array.tolist() == [0, 77, 2, 3]
    assert take_over(value, owned=owners) is value and not array.flags.writeable


@every_way
def test_memory_that_cannot_be_written_is_copied_on_thawing(make: Make, get: Get) -> None:
    kept = make(np.frombuffer(bytes(32), "i8"), None)
    value, owners = thaw(kept)
    get(value)[0] = 77
    assert value is not kept and type(value) is type(kept) and get(kept)[0] == 0
    assert take_over(value, owned=owners) is value and not get(value).flags.writeable


@every_way
def test_deep_copies_are_independent_and_can_be_written(make: Make, get: Get) -> None:
    kept = take_over(make(np.arange(4), None))
    fresh = deep_copy(kept)
    get(fresh)[0] = 77
    assert type(fresh) is type(kept) and get(kept)[0] == 0
    assert take_over(fresh) is fresh and not get(fresh).flags.writeable


@every_way
def test_what_comes_out_of_a_pickle_is_sealed(make: Make, get: Get) -> None:
    value = make(np.arange(4), None)
    assert seal(value) is value and not get(value).flags.writeable


@every_way
def test_the_memory_of_its_arrays_is_measured_before_and_after(make: Make, get: Get) -> None:
    value = make(np.zeros(10_000), [np.zeros(10_000)])
    assert sizeof(value) == pytest.approx(160_000, rel=0.02)
    kept = take_over(make(np.zeros(10_000)[:], np.zeros(30_000)[:10_000]))
    assert sizeof(kept) == pytest.approx(160_000, rel=0.02)


# ----------------------------------------------------------------------------------- in a pool


@pytest.fixture
def pool(make_pool: MakePool) -> FBPool:
    return make_pool("10MB")


@every_way
def test_a_reader_cannot_write_and_a_writer_can(make: Make, get: Get, pool: FBPool) -> None:
    mine = np.zeros(50_000)
    given = make(mine, {"inner": np.zeros(3)})
    pool["x"] = given
    del given
    with pytest.raises(ValueError, match=r"read-only"):
        mine[0] = 1
    for number in range(4):
        with pytest.raises(ValueError, match=r"read-only.*get_mut\('x'\)"), pool.get("x") as value:
            get(value)[0] = 77
        with pool.get_mut("x") as value:
            assert get(value)[0] == number
            get(value)[0] += 1
        with pytest.raises(ValueError, match="read-only"):
            get(value)[0] = 77
        del value
        if number % 2:
            pool.evict()
        pool.validate()
    with pytest.raises(ValueError, match="undo"), pool.get_mut("x", rollback=True) as value:
        get(value)[0] = 77
        raise ValueError("undo")
    assert get(pool["x"])[0] == 4


@every_way
def test_a_copy_leaves_the_callers_alone(make: Make, get: Get, pool: FBPool) -> None:
    given = make(np.arange(4), [np.arange(2)])
    pool.put("x", given, copy=True)
    get(given)[0] = 77
    assert get(pool["x"])[0] == 0
    fb = pool.put("y", given)
    with fb.make_mut() as value:
        get(value)[1] = 78
    assert get(pool["y"]).tolist() == [77, 1, 2, 3]
    with fb.load() as value:
        assert get(value).tolist() == [77, 78, 2, 3] and not get(value).flags.writeable


def test_frames_in_records_are_taken_over_too(pool: FBPool) -> None:
    pandas = pytest.importorskip("pandas", minversion="3")
    frame = pandas.DataFrame({"a": np.arange(4.0)})
    given = Record(frame)
    pool["x"] = given
    assert given.data is frame
    frame.iloc[0, 0] = 77.0
    with pytest.raises(ValueError, match="read-only"), pool.get("x") as value:
        value.data.iloc[1, 0] = 5.0
    with pool.get_mut("x") as value:
        value.data.iloc[1, 0] = 5.0
    assert pool["x"].data["a"].tolist() == [0.0, 5.0, 2.0, 3.0]


# ------------------------------------------------------------------------------- what is made anew


def test_an_instance_made_anew_is_as_a_decoded_one() -> None:
    value = Record(np.arange(4)[:1])
    value.made, value.note = False, "x"  # type: ignore[attr-defined]
    assert value.total == 0.0
    kept = take_over(value)
    assert vars(kept).keys() == {"data", "other"}
    hashed = take_over(Hashed(1, np.arange(4)[:1]))
    assert hash(hashed) == hash(Hashed(1, None))
    model = Model(data=np.arange(4)[:1], more=1)
    model._secret = 2
    fresh = take_over(model)
    assert fresh.model_fields_set == {"data", "more"} and (fresh.more, fresh._secret) == (1, 2)
    fresh.other = fresh.more = fresh._secret = 5
    assert (model.other, model.more, model._secret) == (None, 1, 2) and "other" not in model.model_fields_set


def test_fields_that_are_not_set_stay_so() -> None:
    for cls in (Record, Slotted, Defined):
        value = object.__new__(cls)
        object.__setattr__(value, "data", np.arange(4)[:1])
        kept = take_over(value)
        assert kept is not value and not kept.data.flags.writeable
        if cls is Record:
            assert vars(kept).keys() == {"data"}
        else:
            assert not hasattr(kept, "other")


def test_arrays_of_classes_registered_by_callables_are_the_callers_promise() -> None:
    class Box:
        def __init__(self, data: Any) -> None:
            self.data = data

    class Couple(NamedTuple):
        data: Any

    register(Box, lambda box: box.data, Box, name="tests.freezing.Box")
    register(Couple, lambda couple: couple[0], Couple, name="tests.freezing.Couple")
    for value in (Box(np.arange(4)), Couple(np.arange(4))):
        assert take_over(value) is value and value.data.flags.writeable


def test_a_chain_of_ten_thousand_records_is_no_trouble() -> None:
    value = Record(np.arange(4)[:1])
    for _ in range(10_000):
        value = Record(None, [value])
    kept, depth = take_over(value), 0
    while kept.other is not None:
        kept, depth = kept.other[0], depth + 1
    assert depth == 10_000 and not kept.data.flags.writeable


@pytest.mark.parametrize("base", [np.arange(4), np.arange(9)], ids=["frozen", "copied"])
def test_records_that_contain_themselves(base: Any) -> None:
    value = Record(base if base.size == 4 else base[:1])
    model = Model(data=None)
    model.data = model
    slots = Slotted(value, Pair(value, OrderedDict(v=value)))
    value.other = [value, slots, defaultdict(list, v=value), model]
    model.other = value
    kept = take_over(value)
    assert (kept is value) is (base.size == 4)
    again, slotted, default, fresh = kept.other
    assert again is slotted.data is slotted.other.data is slotted.other.other["v"] is default["v"] is kept
    assert default.default_factory is list and fresh.data is fresh and fresh.other is kept
    assert not kept.data.flags.writeable and value.other[0] is value and model.data is model


# -------------------------------------------------------------------------------------- mixtures

KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda parts: dict(enumerate(parts)),
    "ordered": lambda parts: OrderedDict(enumerate(parts)),
    "default": lambda parts: defaultdict(None, enumerate(parts)),
    "record": lambda parts: Record(*(parts * 2)[:2]),
    "slotted": lambda parts: Slotted(*(parts * 2)[:2]),
    "attrs": lambda parts: Defined(*(parts * 2)[:2]),
    "model": lambda parts: Model.model_construct(data=parts[0], more=parts[-1]),
    "pair": lambda parts: Pair(*(parts * 2)[:2]),
    "plain": lambda parts: Plain(*(parts * 2)[:2]),
}
LEAVES = ("own", "mine", "part", "atom")

recipes = st.lists(
    st.tuples(st.sampled_from([*KINDS, *LEAVES]), st.lists(st.integers(0, 50), min_size=1, max_size=4)),
    min_size=1,
    max_size=25,
)
loops = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=4)


class Scene:
    """A value, in which anything may occur twice, and itself; and the caller's own array."""

    def __init__(self, recipe: list[tuple[str, list[int]]], loops: list[tuple[int, int]]) -> None:
        self.mine = np.arange(100)
        nodes: list[Any] = []
        for kind, picks in recipe:
            nodes.append(self._node(kind, [nodes[pick % len(nodes)] for pick in picks] if nodes else [0]))
        for here, there in loops:
            holder, part = nodes[here % len(nodes)], nodes[there % len(nodes)]
            if type(holder) is list:
                holder.append(part)
            elif type(holder) in (Record, Defined, Model):
                holder.other = part
        self.value = nodes[-1]

    def _node(self, kind: str, parts: list[Any]) -> Any:
        if kind == "own":
            return np.arange(3)
        if kind == "mine":
            return self.mine[len(parts) :]
        if kind == "part":
            found = [part for part in parts if isinstance(part, np.ndarray) and part.size > 1]
            return found[0][1:] if found else 1.5
        return "x" if kind == "atom" else KINDS[kind](parts)


def children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values(), *vars(value).values()] if hasattr(value, "__dict__") else [*value.values()]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, Root):
        return [value.root, *value.root]
    if isinstance(value, Model):
        return [value.data, value.other, *(value.model_extra or {}).values(), value._secret]
    return [value.data, value.other] if isinstance(value, (Record, Slotted, Defined, Hashed)) else []


def everything(value: Any) -> Iterator[Any]:
    seen, pending = {id(value)}, [value]
    while pending:
        item = pending.pop()
        yield item
        new = [part for part in children(item) if id(part) not in seen]
        seen.update(map(id, new))
        pending += new


def arrays_of(value: Any) -> list[Any]:
    return [part for part in everything(value) if isinstance(part, np.ndarray)]


def outline(value: Any) -> list[Any]:
    """Types, places and contents, each object numbered as it is met: the same for what is alike."""
    numbers: dict[int, int] = {}
    lines, pending = [], [value]
    while pending:
        item = pending.pop()
        if isinstance(item, (int, float, str, type(None))):
            lines.append(item)
            continue
        if id(item) in numbers:
            lines.append(numbers[id(item)])
            continue
        numbers[id(item)] = -len(numbers) - 1
        content = (item.tolist(), item.dtype.str) if isinstance(item, np.ndarray) else len(children(item))
        lines.append((type(item), content))
        pending += children(item)
    return lines


@settings(max_examples=300, deadline=None)
@given(recipes, loops)
def test_any_mixture_is_taken_over_thawed_and_taken_over_again(recipe: Any, loops: Any) -> None:
    scene = Scene(recipe, loops)
    value = scene.value
    before, held = outline(value), [(item, [*map(id, children(item))]) for item in everything(value)]
    kept = take_over(value)
    assert outline(kept) == before == outline(value)
    assert all([*map(id, children(item))] == parts for item, parts in held), "the caller's are modified"
    assert not any(array.flags.writeable for array in arrays_of(kept))
    assert scene.mine.flags.writeable
    assert not any(np.shares_memory(array, scene.mine) for array in arrays_of(kept))
    loose = any(np.shares_memory(array, scene.mine) for array in arrays_of(value))
    if not loose and "part" not in dict(recipe):
        assert kept is value or isinstance(value, np.ndarray)

    fresh, owners = thaw(kept)
    assert outline(fresh) == before and all(array.flags.writeable for array in arrays_of(fresh))
    for array in arrays_of(fresh):
        array += 1
    changed = outline(fresh)
    again = take_over(fresh, owned=owners)
    assert again is fresh or isinstance(fresh, np.ndarray)
    assert outline(again) == changed and not any(array.flags.writeable for array in arrays_of(again))
    assert scene.mine.tolist() == list(range(100))
