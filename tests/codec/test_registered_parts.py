"""Instances of registered classes are looked into, and made anew, without running any code of theirs."""

from __future__ import annotations

import abc
import enum
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import pytest

from fbcache.codec import register
from fbcache.codec.registry import anatomy_of
from fbcache.freezing import take_over, thaw

attrs = pytest.importorskip("attrs")
pydantic = pytest.importorskip("pydantic")

T = TypeVar("T")


class Trapped:
    """A class that says so whenever its code is run, once it is armed."""

    __slots__ = ()
    armed: ClassVar[bool] = False

    def _tell(self, *_: Any, **__: Any) -> Any:
        assert not Trapped.armed, "the class's own code was run"

    def __getattribute__(self, name: str) -> Any:
        Trapped._tell(self)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        Trapped._tell(self)
        object.__setattr__(self, name, value)

    def __new__(cls, *_: Any, **__: Any) -> Any:
        Trapped._tell(cls)  # type: ignore[arg-type]
        return object.__new__(cls)

    def __init_subclass__(cls) -> None:
        Trapped._tell(cls)  # type: ignore[arg-type]

    __getattr__ = __eq__ = __hash__ = __bool__ = __len__ = __iter__ = __copy__ = __deepcopy__ = _tell
    __reduce_ex__ = __getstate__ = __setstate__ = __delattr__ = __post_init__ = __sizeof__ = _tell


@register
@dataclass(eq=False)
class Plain(Trapped):
    data: Any
    other: Any = None


@register
@dataclass(eq=False, slots=True)
class Slotted(Trapped):
    data: Any
    other: Any = None


@register
@attrs.define(eq=False, slots=False)
class Defined(Trapped):
    data: Any
    other: Any = attrs.field(default=None, validator=lambda *_: Trapped._tell(Trapped))

    def __attrs_post_init__(self) -> None:
        Trapped._tell(self)


@register
class Couple(NamedTuple):
    data: Any
    other: Any = None


class Loose(namedtuple("Loose", ["data", "other"])):
    __slots__ = ()


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the traps disarmed in the end, whatever comes."""
    monkeypatch.setattr(Trapped, "armed", False)


def read(value: Any, name: str) -> Any:
    """A field, read past the class's code."""
    for base in type(value).__mro__:
        if name in vars(base) and hasattr(vars(base)[name], "__set__"):
            return vars(base)[name].__get__(value)
    return object.__getattribute__(value, "__dict__")[name]


@pytest.mark.parametrize("cls", [Plain, Slotted, Defined])
def test_no_code_of_the_class_is_run(cls: Any, armed: None) -> None:
    first = cls(np.arange(4)[:1], [cls(np.arange(3))])
    frozen = cls(np.arange(4), {"a": cls(None, first)})
    Trapped.armed = True
    kept = take_over(frozen)
    fresh, owners = thaw(kept)
    again = take_over(fresh, owned=owners)
    Trapped.armed = False
    assert kept is not frozen and again is fresh and type(again) is cls
    inner = read(read(again, "other")["a"], "other")
    assert inner is not first and not read(inner, "data").flags.writeable
    assert read(inner, "other")[0] is read(first, "other")[0]


@pytest.mark.parametrize("cls", [Couple, Loose])
def test_no_code_of_a_named_tuple_is_run(cls: Any, armed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    value = cls(np.arange(4)[:1], None)
    for name in ("__iter__", "__getitem__", "__len__", "__new__", "__eq__", "__hash__", "__getattribute__"):
        monkeypatch.setattr(cls, name, Trapped._tell)
    Trapped.armed = True
    kept = take_over([value])[0]
    Trapped.armed = False
    monkeypatch.undo()
    assert type(kept) is cls and kept is not value and not kept.data.flags.writeable


def test_no_validator_of_a_model_is_run() -> None:
    calls: list[str] = []

    class Watched(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(validate_assignment=True, arbitrary_types_allowed=True)
        data: Any

        @pydantic.field_validator("data")
        @classmethod
        def look(cls, value: Any) -> Any:
            calls.append("validator")
            return value

        def model_post_init(self, context: Any) -> None:
            calls.append("post_init")

    register(Watched, name="tests.Watched")
    value = Watched(data=np.arange(4)[:1])
    calls.clear()
    kept = take_over(value)
    assert kept is not value and not kept.data.flags.writeable and not calls


def test_a_class_with_a_field_that_is_a_descriptor_of_its_own_is_not_looked_into() -> None:
    class Doubled:
        def __get__(self, instance: Any, owner: Any) -> Any:
            assert instance is None, "the descriptor was asked"
            return None

        def __set__(self, instance: Any, value: Any) -> None:
            vars(instance)["_data"] = value

    @register(name="tests.WithDescriptor")
    @dataclass
    class WithDescriptor:
        data: Any = Doubled()  # noqa: RUF009
        other: Any = None

    value = WithDescriptor(np.arange(4), np.arange(4))
    assert anatomy_of(WithDescriptor) is None
    assert take_over(value) is value and value.other.flags.writeable


def test_a_property_that_is_no_field_is_not_asked() -> None:
    @register(name="tests.WithProperty")
    @dataclass
    class WithProperty:
        data: Any

        @property
        def again(self) -> Any:
            raise AssertionError("it was asked")

    kept = take_over(WithProperty(np.arange(4)[:1]))
    assert not kept.data.flags.writeable


def test_what_a_class_inherits_is_found_where_it_is() -> None:
    @dataclass
    class Base(abc.ABC, Generic[T]):
        data: Any
        count: ClassVar[int] = 0

        @abc.abstractmethod
        def act(self) -> None: ...

    @dataclass
    class InDict(Base[int]):
        more: Any = None

        def act(self) -> None: ...

    @dataclass(slots=True)
    class InSlots(Base[int]):
        more: Any = None
        late: Any = field(init=False, default=5)

        def act(self) -> None: ...

    @attrs.define
    class Lower:
        data: Any

    @attrs.define
    class Upper(Lower):
        more: Any = None

    for cls in (InDict, InSlots, Upper):
        register(cls, name=f"tests.inherits.{cls.__name__}")
        value = cls(np.arange(4), np.arange(4)[:1])
        kept = take_over(value)
        assert type(kept) is cls and kept.data is value.data and kept.more is not value.more
        assert not kept.data.flags.writeable and not kept.more.flags.writeable
        assert getattr(kept, "late", 5) == 5


def test_what_has_no_anatomy() -> None:
    class Colour(enum.Enum):
        RED = 1

    class Own:
        pass

    class WithDict(Couple):
        pass

    @dataclass
    class Unregistered:
        data: Any

    register(Colour, name="tests.parts.Colour")
    register(Own, lambda own: 1, lambda state: Own(), name="tests.parts.Own")
    for cls in (Colour, Own, WithDict, Unregistered, dict, tuple, int, object, np.ndarray, type):
        assert anatomy_of(cls) is None


def test_a_dict_of_an_instances_attributes_is_read_past_its_own_code() -> None:
    class Strange(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise AssertionError("it was asked")

        get = __contains__ = __iter__ = keys = items = values = __getitem__  # type: ignore[assignment]

    @register(name="tests.WithStrangeDict")
    @dataclass
    class WithStrangeDict:
        data: Any

    value = WithStrangeDict(None)
    array = np.arange(4)
    value.__dict__ = Strange(data=array[:1])
    kept = take_over(value)
    assert kept is not value and not vars(kept)["data"].flags.writeable
