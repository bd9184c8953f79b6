"""Types that users register."""

from __future__ import annotations

import collections
import enum
import functools
import random
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbcache.codec import Frames, register, registry
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from tests.codec.roundtrip import CODEC, same, through

attrs = pytest.importorskip("attrs")
pydantic = pytest.importorskip("pydantic")


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796
    BLUE = "b"


class Access(enum.IntFlag):
    READ = 1
    WRITE = 2


@dataclass
class Point:
    x: Any
    y: Any = None


@dataclass(frozen=True, slots=True)
class Sealed:
    name: str
    parts: list[Any] = field(default_factory=list)
    length: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", len(self.parts))


for cls in (Colour, Access, Point, Sealed):
    register(cls)


def test_enums_come_back_as_their_members():
    value = [Colour.RED, Colour.BLUE, Colour.CRIMSON, Access.READ | Access.WRITE, Access(0), {Colour.RED: 1}]
    back = through(value)
    assert all(a is b for a, b in zip(back, value, strict=False) if isinstance(a, enum.Enum))
    assert back[5] == {Colour.RED: 1}


def test_dataclasses_come_back_field_by_field_without_their_init():
    value = Sealed("a", [1, Point(np.arange(3), (2,))])
    object.__setattr__(value, "length", 77)
    back = through(value)
    assert (back.name, back.length, type(back)) == ("a", 77, Sealed)
    assert same(back.parts[1].x, np.arange(3)) and back.parts[1].y == (2,)


def test_a_type_with_callables_of_its_own_and_a_fresh_state_each_time():
    class Box:
        def __init__(self, content: Any) -> None:
            self.content = content

    register(Box, lambda box: [box.content], lambda state: Box(state[0]), name="tests.Box")
    shared = Box([1])
    back = through([shared, shared, *(Box([number]) for number in range(100))])
    assert back[0] is back[1] and [box.content for box in back[2:]] == [[number] for number in range(100)]


def test_register_decorates_with_and_without_a_name():
    @register(name="tests.Decorated")
    @dataclass
    class Decorated:
        a: int

    assert through(Decorated(1)) == Decorated(1)
    assert registry.by_name("tests.Decorated").cls is Decorated


def test_a_name_stands_for_one_class():
    @dataclass
    class Other:
        a: int

    register(Other, name="tests.one_name")
    register(Other, name="tests.one_name")
    with pytest.raises(ValueError, match="stands for"):
        register(Point, name="tests.one_name")


def test_a_class_defined_anew_takes_its_name_over():
    def define() -> Any:
        @register
        @dataclass
        class Cell:
            a: int

        return Cell

    old, new = define(), define()
    assert type(through(new(1))) is new
    with pytest.raises(PickleRefusedError):
        CODEC.encode(old(1), allow_pickle=False)


@pytest.mark.parametrize(
    "arguments", [(list,), (np.ndarray,), (int, str, int), ("text",), (object,), (Point, str)], ids=str
)
def test_what_cannot_be_registered(arguments):
    with pytest.raises(TypeError):
        register(*arguments)


def test_what_is_not_registered_any_more_is_named(monkeypatch):
    frames = CODEC.encode({"a": Point(1)}, allow_pickle=False)
    monkeypatch.setattr(registry, "_by_name", {})
    with pytest.raises(UnsupportedTypeError, match=r"Point'.*not registered.*register"):
        CODEC.decode(frames, writable=False, allow_pickle=False)


def test_callables_that_raise_are_named():
    class Bad:
        pass

    register(Bad, lambda _: 1 / 0, lambda _: None, name="tests.Bad")
    with pytest.raises(UnsupportedTypeError, match="Bad raised ZeroDivisionError") as caught:
        CODEC.encode([Bad()], allow_pickle=True)
    assert caught.value.path == "value[0]" and isinstance(caught.value.__cause__, ZeroDivisionError)
    register(Bad, lambda _: None, lambda _: 1 / 0, name="tests.Bad")
    with pytest.raises(UnsupportedTypeError, match="Bad raised"):
        through(Bad())


def test_a_dataclass_that_gained_a_field_says_so():
    def define(fields: tuple[str, ...]) -> Any:
        cls = type("Grown", (), {"__annotations__": dict.fromkeys(fields, int), "__module__": "tests"})
        return register(dataclass(cls))

    frames = CODEC.encode(define(("a",))(1), allow_pickle=False)
    define(("a", "b"))
    with pytest.raises(UnsupportedTypeError, match="other fields"):
        CODEC.decode(frames, writable=False, allow_pickle=False)


# ------------------------------------------------------------------ classes that say what they are made of

T = TypeVar("T")


class Celsius:
    """A descriptor that keeps a whole number."""

    def __init__(self, *, default: int) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: Any, owner: type) -> int:
        return self.default if instance is None else getattr(instance, self.name, self.default)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self.name, int(value))


def must_not_run(*_: Any) -> Any:
    raise AssertionError("code of the class ran while it was restored")


class Guarded:
    """Classes below this one notice when they are made the usual way, while ``armed``."""

    armed: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if Guarded.armed:
            must_not_run()
        return super().__new__(cls)


@register
@dataclass
class Base(Guarded):
    x: Any
    scale: InitVar[int] = 1
    count: ClassVar[int] = 0

    def __post_init__(self, scale: int) -> None:
        if Guarded.armed:
            must_not_run()


@register
@dataclass
class Derived(Base):
    _: KW_ONLY
    y: Any = 5
    cached: list[Any] = field(default_factory=list, compare=False, repr=False)


@register
@dataclass
class Measured:
    degrees: Celsius = Celsius(default=20)


@register
@dataclass
class Late:
    made: Any = field(init=False)


@register
@dataclass(slots=True)
class LateSlots(Generic[T]):
    first: T
    made: Any = field(init=False)


@register
@attrs.define
class Slotted:
    x: Any = attrs.field(converter=lambda x: must_not_run() if Guarded.armed else x)
    _private: Any = attrs.field(default=1, alias="private")
    late: Any = attrs.field(init=False)
    names: list[str] = attrs.field(factory=list, kw_only=True)

    @x.validator
    def _check(self, attribute: Any, value: Any) -> None:
        if Guarded.armed:
            must_not_run()


@register
@attrs.define
class SlottedChild(Slotted):
    z: Any = None


@register
@attrs.frozen(cache_hash=True)
class Frozen:
    x: Any

    @functools.cached_property
    def twice(self) -> Any:
        return 2 * self.x


@register
@attrs.frozen(cache_hash=True, slots=False)
class FrozenDict:
    x: Any


@register
@attrs.define(slots=False)
class Plain:
    x: Any


@register
class Position(NamedTuple):
    row: int
    column: Any = None


Old = register(collections.namedtuple("Old", "a b"), name="tests.Old")


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    number: int = pydantic.Field(default=1, alias="Number")
    data: Any = None
    hidden: str = pydantic.Field(default="", exclude=True)
    _note: Any = pydantic.PrivateAttr(default=None)
    _unset: int = pydantic.PrivateAttr()

    @pydantic.field_validator("number")
    @classmethod
    def _check(cls, number: int) -> int:
        return must_not_run() if Guarded.armed else number

    def model_post_init(self, context: Any) -> None:
        if Guarded.armed:
            must_not_run()

    @functools.cached_property
    def twice(self) -> int:
        return 2 * self.number


@register
class Open(Model, extra="allow"):
    pass


@register
class Closed(pydantic.BaseModel, frozen=True):
    a: int
    inner: Model | None = None


@register
class Names(pydantic.RootModel[list[str]]):
    pass


register(Model, name="tests.Model")


def state_of(value: Any) -> Any:
    """All that there is of an instance of one of these classes."""
    if isinstance(value, pydantic.BaseModel):
        parts = [getattr(value, name, None) for name in ("__pydantic_extra__", "__pydantic_private__")]
        return [vars(value), sorted(value.model_fields_set), *parts]
    if isinstance(value, tuple):
        return tuple(value)
    names = {name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())} - {"__weakref__"}
    slots = {name: getattr(value, name) for name in sorted(names) if hasattr(value, name)}
    return [getattr(value, "__dict__", None), slots]


def open_model() -> Open:
    model = Open(Number=3, data=np.arange(3), other=[1], another=None)
    model._note = {"a": 1}
    return model


def loose_model() -> Model:
    model = Model.model_construct(number="no number")
    model.data = (1, 2)
    return model


def late(cls: Any, *args: Any, **made: Any) -> Any:
    value = cls(*args)
    for name, part in made.items():
        setattr(value, name, part)
    return value


DECLARED = [
    Derived([1], y={"a": np.arange(2)}, cached=[1]),
    Measured(37),
    Measured(),
    Late(),
    late(Late, made=[1]),
    LateSlots("a"),
    late(LateSlots, "a", made=()),
    Slotted(5, [2], names=["a"]),
    late(Slotted, (), late=1),
    late(SlottedChild, None, z=np.float32(2)),
    Frozen(7),
    FrozenDict((1, 2)),
    Plain([Plain(None)]),
    Position(1, [Position(2)]),
    Old(b"a", 2.5),
    Model(),
    open_model(),
    loose_model(),
    Closed(a=1, inner=Model(Number=2)),
    Names(["a", "b"]),
]


def name_of(value: Any) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", DECLARED, ids=name_of)
@pytest.mark.parametrize("writable", [False, True])
def test_a_class_that_says_what_it_is_made_of_comes_back_without_its_code(monkeypatch, value, writable):
    before = repr(state_of(value))
    with monkeypatch.context() as patch:
        patch.setattr(Guarded, "armed", True)
        back = through(value, writable=writable)
    assert type(back) is type(value)
    assert repr(state_of(back)) == before == repr(state_of(value))


@pytest.mark.parametrize("value", DECLARED, ids=name_of)
def test_damaged_trees_of_declared_classes_give_our_errors_or_a_value(value):
    rng = random.Random(name_of(value))
    frames = CODEC.encode(value, allow_pickle=False)
    for _ in range(300):
        tree = bytearray(frames.tree)
        for _ in range(rng.choice((1, 1, 3))):
            tree[rng.randrange(len(tree))] ^= 1 << rng.randrange(8)
        damaged = Frames(frames.codec, bytes(tree), frames.buffers)
        try:
            CODEC.decode(damaged, writable=rng.random() < 0.5, allow_pickle=False)
        except (CorruptBlobError, PickleRefusedError, UnsupportedTypeError):
            pass


parts = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: st.builds(Plain, inner)
    | st.builds(Slotted, inner, names=st.lists(st.text(max_size=2), max_size=2))
    | st.builds(Position, st.integers(), inner)
    | st.builds(lambda data, more: Open(data=data, more=more), inner, inner)
    | st.lists(inner, max_size=2),
    max_leaves=8,
)


@given(parts)
@settings(max_examples=100, deadline=None)
def test_declared_classes_within_each_other(value):
    assert repr(through(value)) == repr(value)


def test_an_instance_that_occurs_twice_is_one_again():
    shared = [Slotted([1]), Position(1), Model()]
    back = through([*shared, *shared])
    assert all(back[index] is back[index + 3] for index in range(3))


def test_a_hash_that_attrs_caches_is_computed_anew_and_cached_properties_too():
    for value in (Frozen("a"), FrozenDict("a")):
        hash(value)
        back = through({value: [value]})
        assert back[value] == [value] and hash(next(iter(back))) == hash(value)
    value = Frozen(4)
    assert value.twice == through(value).twice == 8
    model = Model(Number=4)
    assert model.twice == 8
    back = through(model)
    assert "twice" not in vars(back) and back.twice == 8


def test_private_attributes_of_a_model_can_be_set_after_it_came_back():
    back = through(Model())
    back._note = 5
    assert back._note == 5 and not hasattr(back, "_unset")
    assert through(loose_model())._note is None


def test_a_model_that_gained_a_private_attribute_can_be_given_it():
    def define(annotations: dict[str, Any]) -> Any:
        namespace = {"__module__": "tests", "__annotations__": {"a": int, **annotations}}
        return register(type(pydantic.BaseModel)("Private", (pydantic.BaseModel,), namespace))

    frames = CODEC.encode(define({})(a=1), allow_pickle=False)
    define({"_b": int})
    back = CODEC.decode(frames, writable=False, allow_pickle=False)
    assert not hasattr(back, "_b")
    back._b = 5
    assert back.a == 1 and back._b == 5


def test_a_part_that_cannot_be_encoded_is_named():
    model = Model()
    model._note = object()
    for value, path in (
        (Slotted(1, object()), "value._private"),
        (Position(1, [object()]), "value.column[0]"),
        (model, "value._note"),
        (Open(data=1, more=object()), "value.more"),
    ):
        with pytest.raises(PickleRefusedError) as caught:
            CODEC.encode(value, allow_pickle=False)
        assert caught.value.path == path


def with_content() -> list[Any]:
    @dataclass
    class CodeError(Exception):
        code: int

    @attrs.define
    class OtherError(Exception):
        code: int

    @dataclass
    class Table(dict):  # type: ignore[type-arg]
        title: str

    return [CodeError, OtherError, Table]


@pytest.mark.parametrize("cls", with_content(), ids=lambda cls: cls.__name__)
def test_a_class_with_content_besides_its_fields_needs_callables(cls):
    with pytest.raises(TypeError, match="give encode and decode"):
        register(cls)


def test_classes_that_changed_say_so():
    def define(number: int) -> dict[str, Any]:
        class Gained(pydantic.BaseModel):
            a: int = 1
            _b: int = 2

        class Changed(pydantic.BaseModel, extra=("allow", "ignore")[number]):
            a: int = 1

        gained = attrs.make_class("Fields", ["a", "b"][: number + 1])
        wider = collections.namedtuple("Wider", ["a", "b"][: 2 - number])
        if number:
            Gained.__private_attributes__.clear()
        return {cls.__name__: register(cls, name=cls.__name__) for cls in (Gained, Changed, gained, wider)}

    old = define(0)
    made = [old["Fields"](1), old["Wider"](1, 2), old["Gained"](), old["Changed"](a=1, c=3)]
    frames = [CODEC.encode(value, allow_pickle=False) for value in made]
    define(1)
    for each in frames:
        with pytest.raises(UnsupportedTypeError, match=r"other fields|other private|no extra fields"):
            CODEC.decode(each, writable=False, allow_pickle=False)


def test_a_descriptor_that_refuses_what_was_stored_is_an_error_of_ours():
    frames = CODEC.encode(Measured(37), allow_pickle=False)
    tree = frames.tree.replace(b"\x25", b"\xc0")
    with pytest.raises(UnsupportedTypeError, match=r"Measured\.degrees cannot be set"):
        CODEC.decode(Frames(frames.codec, tree, ()), writable=False, allow_pickle=False)


def test_a_class_whose_module_is_no_text_is_looked_up_all_the_same():
    assert registry.by_type(type("Strange", (), {"__module__": None})) is None
