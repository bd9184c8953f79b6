"""Pandas' own scalars, offsets (frequencies) and time zones.

An offset travels as its class, its count and its arguments, not as its text, which has changed from version
to version ("M", "ME"). A time zone is one of :mod:`zoneinfo`, :mod:`datetime` or pytz, that pandas 2 gives
to what it parses; others are pickled.
"""

from __future__ import annotations

from datetime import MAXYEAR, MINYEAR, tzinfo
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from pandas.tseries import offsets  # type: ignore[import-untyped]

from fbcache.codec.families.kinds import Kind
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

_UNITS: Final = frozenset({"s", "ms", "us", "ns"})
_CALENDAR: Final = "calendar"  # what an offset has made of its weekmask and holidays
_SCALAR_BYTES: Final = 120


# --------------------------------------------------------------------------------------- zones


def encode_zone(encoder: Encoder, zone: tzinfo | None) -> Node:
    """Encode the time zone of a dtype or a timestamp."""
    if zone is not None and type(zone).__module__.partition(".")[0] == "pytz":
        name = getattr(zone, "zone", None)
        if name is not None:
            return ["pytz", name]
        minutes = getattr(zone, "_minutes", None)  # of a fixed offset
        if type(minutes) is int:
            return ["pytz", minutes]
    return ["", encoder.part(".tz", zone)]


def decode_zone(decoder: Decoder, node: Node, depth: int) -> tzinfo | None:
    """Decode what :func:`encode_zone` has encoded."""
    library, content = expect(node, list)
    if library == "pytz":
        return _pytz_zone(content)
    zone = decoder.value(content, depth + 1)
    if zone is not None and not isinstance(zone, tzinfo):
        raise TypeError(f"a time zone is a {type(zone).__name__}")
    return zone


def _pytz_zone(content: Node) -> tzinfo:
    pytz = import_module("pytz")
    zone: tzinfo = pytz.timezone(content) if type(content) is str else pytz.FixedOffset(expect(content, int))
    return zone


# ------------------------------------------------------------------------------------- scalars


def _encode_timestamp(encoder: Encoder, stamp: Any) -> Node:
    return [*_count(stamp.to_datetime64()), encode_zone(encoder, stamp.tzinfo), stamp.fold]


def _decode_timestamp(decoder: Decoder, node: Node, depth: int) -> Any:
    count, unit, zone_node, fold = node
    zone = decode_zone(decoder, zone_node, depth)
    stamp = pd.Timestamp(np.datetime64(expect(count, int), _unit(unit)))
    if zone is not None:
        if not MINYEAR <= stamp.year <= MAXYEAR:
            raise ValueError("a time with a zone is beyond what zones know")
        stamp = stamp.tz_localize("UTC").tz_convert(zone)
    if stamp.fold != expect(fold, int):
        stamp = stamp.replace(fold=fold)
    return _exactly(stamp, pd.Timestamp)


def _encode_timedelta(encoder: Encoder, delta: Any) -> Node:
    return _count(delta.to_timedelta64())


def _decode_timedelta(decoder: Decoder, node: Node, depth: int) -> Any:
    count, unit = node
    return _exactly(pd.Timedelta(np.timedelta64(expect(count, int), _unit(unit))), pd.Timedelta)


def _count(moment: np.datetime64 | np.timedelta64) -> list[Node]:
    return [int(moment.view("i8")), np.datetime_data(moment.dtype)[0]]


def _unit(node: Node) -> Any:
    if node not in _UNITS:
        raise ValueError(f"{node!r} is no unit of time")
    return node


def _encode_period(encoder: Encoder, period: Any) -> Node:
    return [period.ordinal, encoder.part(".freq", period.freq)]


def _decode_period(decoder: Decoder, node: Node, depth: int) -> Any:
    ordinal, freq = node
    period = pd.Period(ordinal=expect(ordinal, int), freq=decode_offset(decoder, freq, depth))
    return _exactly(period, pd.Period)


def _encode_interval(encoder: Encoder, interval: Any) -> Node:
    parts = [encoder.part(".left", interval.left), encoder.part(".right", interval.right)]
    return [*parts, interval.closed]


def _decode_interval(decoder: Decoder, node: Node, depth: int) -> Any:
    left, right, closed = node
    bounds = [decoder.value(part, depth + 1) for part in (left, right)]
    return pd.Interval(*bounds, closed=expect(closed, str))


def _exactly(value: Any, cls: type) -> Any:
    if type(value) is not cls:  # of "not a time" each constructor makes NaT
        raise ValueError(f"it is no {cls.__name__}")
    return value


# ------------------------------------------------------------------------------------- offsets


def _encode_offset(encoder: Encoder, offset: Any) -> Node:
    arguments = {name: value for name, value in offset.kwds.items() if name != _CALENDAR}
    return [offset.n, offset.normalize, encoder.part(".kwds", arguments)]


def _offset_decoder(cls: type) -> Any:
    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        count, normalize, content = node
        arguments = expect(decoder.value(content, depth + 1), dict)
        if _CALENDAR in arguments:
            raise ValueError("an offset's calendar is not data")
        return cls(expect(count, int), normalize=expect(normalize, bool), **arguments)

    return decode


def decode_offset(decoder: Decoder, node: Node, depth: int) -> Any:
    """Decode what must be an offset."""
    offset = decoder.value(node, depth + 1)
    if not isinstance(offset, offsets.BaseOffset):
        raise TypeError(f"a frequency is a {type(offset).__name__}")
    return offset


_ABSTRACT: Final = {offsets.BaseOffset, offsets.Tick}
_OFFSETS: Final = {getattr(offsets, name) for name in offsets.__all__} - _ABSTRACT


def _size(value: Any) -> int:
    return _SCALAR_BYTES


def _offset_kind(cls: type) -> Kind:
    name = f"pandas.offsets.{cls.__name__}"
    return Kind(cls, name, _encode_offset, _offset_decoder(cls), _size, travels="msgpack")


def _single(value: Any, name: str) -> Kind:
    return Kind(type(value), name, lambda *_: None, lambda *_: value, lambda _: 0, travels="msgpack")


KINDS = (
    Kind(pd.Timestamp, "pandas.Timestamp", _encode_timestamp, _decode_timestamp, _size, travels="msgpack"),
    Kind(pd.Timedelta, "pandas.Timedelta", _encode_timedelta, _decode_timedelta, _size, travels="msgpack"),
    Kind(pd.Period, "pandas.Period", _encode_period, _decode_period, _size, travels="msgpack"),
    Kind(pd.Interval, "pandas.Interval", _encode_interval, _decode_interval, _size, travels="msgpack"),
    _single(pd.NaT, "pandas.NaT"),
    _single(pd.NA, "pandas.NA"),
    *map(_offset_kind, sorted(_OFFSETS, key=lambda cls: cls.__name__)),
)
