"""A value, or a few alike, of every type that has a row in docs/types.rst; 1 MiB where there is bulk."""

from __future__ import annotations

import enum
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np

from fbcache.codec import register

COUNT = 1 << 17  # numbers of eight bytes: 1 MiB

Write = Callable[[Any], Any]


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes
    ----------
    title : str
        What the row is called.
    make : callable
        Returns new values, which all have to behave alike.
    writes : mapping
        Ways to change a value in place, by what they change; none for what cannot be changed by anybody.
    """

    title: str
    make: Callable[[], list[Any]]
    writes: Mapping[str, Write] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """The rows of one library, of which the table is about versions from ``since`` on."""

    title: str
    library: str
    since: tuple[int, ...]
    samples: Callable[[], list[Sample]]


def numbers() -> np.ndarray[Any, Any]:
    return np.arange(float(COUNT))


def set_first(value: Any) -> None:
    value[0] = value[1]


def _writes(write: Write) -> dict[str, Write]:
    return {"elements": write}


FIRST = _writes(set_first)

# ----------------------------------------------------------------------------------------- Python


class Colour(enum.Enum):
    RED = 1


class PickledColour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    first: Any
    second: Any


class PickledPair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Record:
    data: Any


@dataclass
class PickledRecord:
    data: Any


class Thing:
    def __init__(self, data: Any) -> None:
        self.data = data


class OwnThing(Thing):
    pass


for _cls in (Colour, Pair, Record):
    register(_cls)
register(OwnThing, lambda thing: thing.data, OwnThing)


def _python() -> list[Sample]:
    instants = [datetime.now(UTC), datetime(2020, 1, 1), date(2020, 1, 1), time(1, 2), timedelta(1)]
    zones = [UTC, timezone(timedelta(hours=1)), ZoneInfo("Europe/Paris")]
    plain = [None, True, 1, 1 << 80, 1.5, 2j, Decimal("1.50"), Fraction(1, 3)]
    wide = [float(n) for n in range(COUNT // 8)]
    data = _writes(lambda value: set_first(value.data))
    attribute = {"attributes": lambda value: setattr(value, "data", None)}
    return [
        Sample("None, ``bool``, ``int``, ``float``, ``complex``, ``Decimal``, ``Fraction``", lambda: plain),
        Sample("``str``", lambda: ["x" * (1 << 20)]),
        Sample("``bytes``", lambda: [b"x" * (1 << 20)]),
        Sample("``bytearray``", lambda: [bytearray(range(256)) * 4096], FIRST),
        Sample("``list``", lambda: [list(wide)], FIRST),
        Sample("``tuple``", lambda: [tuple(wide)]),
        Sample("``set``", lambda: [set(wide)], {"members": lambda value: value.add(-1.0)}),
        Sample("``frozenset``", lambda: [frozenset(wide)]),
        Sample("``dict``", lambda: [dict(enumerate(wide))], FIRST),
        Sample("``OrderedDict``", lambda: [OrderedDict(enumerate(wide))], FIRST),
        Sample("arrays in a ``list``", lambda: [[numbers()]], _writes(lambda v: set_first(v[0]))),
        Sample("arrays in a ``dict``", lambda: [{0: numbers()}], _writes(lambda v: set_first(v[0]))),
        Sample(
            "arrays in an ``OrderedDict``",
            lambda: [OrderedDict({0: numbers()})],
            _writes(lambda v: set_first(v[0])),
        ),
        Sample(
            "arrays in a ``defaultdict``",
            lambda: [defaultdict(list, {0: numbers()})],
            _writes(lambda v: set_first(v[0])),
        ),
        Sample("``range``, ``slice``, ``Ellipsis``", lambda: [range(9), slice(1, 2), ...]),
        Sample("``datetime``, ``date``, ``time``, ``timedelta``, time zones", lambda: [*instants, *zones]),
        Sample("``UUID``", lambda: [uuid.UUID(int=5)]),
        Sample("enum, registered", lambda: [Colour.RED]),
        Sample("enum", lambda: [PickledColour.RED]),
        Sample("named tuple, registered", lambda: [Pair(numbers(), 1)], FIRST_OF_FIRST),
        Sample("named tuple", lambda: [PickledPair(numbers(), 1)], FIRST_OF_FIRST),
        Sample("dataclass, registered", lambda: [Record(numbers())], {**data, **attribute}),
        Sample("dataclass", lambda: [PickledRecord(numbers())], {**data, **attribute}),
        Sample("any other class, registered", lambda: [OwnThing(numbers())], {**data, **attribute}),
        Sample("any other class", lambda: [Thing(numbers())], {**data, **attribute}),
        Sample("subclass of a builtin (``Counter``)", lambda: [Counter({"a": 1})], {"items": Counter.clear}),
    ]


FIRST_OF_FIRST = _writes(lambda value: set_first(value[0]))


def _attrs() -> list[Sample]:
    attrs = import_module("attrs")
    fields = {"data": attrs.field(eq=False)}
    Plot = attrs.make_class("Plot", fields)  # noqa: N806
    globals()["PickledPlot"] = attrs.make_class("PickledPlot", fields)
    PickledPlot.__module__ = __name__  # noqa: F821
    register(Plot, name="samples.Plot")
    writes = _record_writes()
    return [
        Sample("class of attrs, registered", lambda: [Plot(numbers())], writes),
        Sample("class of attrs", lambda: [PickledPlot(numbers())], writes),  # noqa: F821
    ]


def _pydantic() -> list[Sample]:
    pydantic = import_module("pydantic")
    options = {"__base__": None, "__config__": {"arbitrary_types_allowed": True}, "data": (Any, ...)}
    Model = pydantic.create_model("Model", **options)  # noqa: N806
    PickledModel = pydantic.create_model("PickledModel", __module__=__name__, **options)  # noqa: N806
    globals()["PickledModel"] = PickledModel
    register(Model, name="samples.Model")
    writes = _record_writes()
    return [
        Sample("model of pydantic, registered", lambda: [Model(data=numbers())], writes),
        Sample("model of pydantic", lambda: [PickledModel(data=numbers())], writes),
    ]


def _record_writes() -> dict[str, Write]:
    return {
        "elements": lambda value: set_first(value.data),
        "attributes": lambda value: setattr(value, "data", None),
    }


# ------------------------------------------------------------------------------------------ numpy


def _numpy() -> list[Sample]:
    fields = np.dtype([("a", "<f8"), ("b", "<i4", (2,))])
    objects = np.array([None, 1, "x", (1, 2)] * 1000, object)
    texts = np.array(["text"] * (COUNT // 4))
    any_length = np.array(["text", "longer text"] * 40_000, np.dtypes.StringDType())
    masked = np.ma.array(numbers(), mask=np.arange(COUNT) % 2 == 0)
    scalars = [np.float64(1), np.int8(1), np.bool(True), np.datetime64(1, "s"), np.timedelta64(1, "s")]
    record = np.zeros(1, fields)[0].copy()
    return [
        Sample("array of numbers", lambda: [numbers(), numbers().reshape(2, -1).T.copy("F")], FIRST),
        Sample(
            "array of ``datetime64``, ``timedelta64``",
            lambda: [numbers().astype(code) for code in ("M8[s]", "m8[s]")],
            FIRST,
        ),
        Sample("structured array", lambda: [np.zeros(COUNT, fields)], FIRST),
        Sample("array of bytes or texts of a fixed width", lambda: [texts.copy(), texts.astype("S")], FIRST),
        Sample("array of texts of any length (``StringDType``)", lambda: [any_length.copy()], FIRST),
        Sample("array of objects", lambda: [objects.copy()], FIRST),
        Sample("masked array", lambda: [masked.copy()], FIRST),
        Sample("scalar", lambda: [*scalars, np.str_("x"), np.bytes_(b"x")]),
        Sample("structured scalar (``numpy.void``)", lambda: [record.copy()], FIRST),
    ]


def _ml_dtypes() -> list[Sample]:
    ml_dtypes = import_module("ml_dtypes")
    from fbcache.codec.families.ml_scalars import KINDS

    array = np.zeros(1 << 19, ml_dtypes.bfloat16)
    return [
        Sample("array of a dtype of ml_dtypes", lambda: [array.copy()], FIRST),
        Sample("scalar of ml_dtypes", lambda: [kind.cls(0) for kind in KINDS]),
    ]


SECTIONS = (
    Section("Python", "fbcache", (), _python),
    Section("attrs", "attrs", (), _attrs),
    Section("pydantic", "pydantic", (2,), _pydantic),
    Section("numpy", "numpy", (2,), _numpy),
    Section("ml_dtypes", "ml_dtypes", (0, 5), _ml_dtypes),
)
