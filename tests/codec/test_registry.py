"""Types that users register."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fbcache.codec import register, registry
from fbcache.errors import PickleRefusedError, UnsupportedTypeError
from tests.codec.roundtrip import CODEC, same, through


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
