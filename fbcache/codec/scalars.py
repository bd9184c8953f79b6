"""Values without parts: numbers, texts, times, ranges.

Each has a node ``[tag, ...]`` of its constructor's arguments, so that what comes back went
through the same checks as what a user makes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID, SafeUUID
from zoneinfo import ZoneInfo

from fbcache.codec import tags
from fbcache.codec.pickling import encode_pickled
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

_INT_LEAST: Final = -(1 << 63)
_INT_BOUND: Final = 1 << 64


def _encode_int(encoder: Encoder, value: int) -> Node:
    if _INT_LEAST <= value < _INT_BOUND:
        return value
    return [tags.INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]


def _encode_text(encoder: Encoder, value: str) -> Node:
    try:
        value.encode()
    except UnicodeEncodeError:
        return [tags.TEXT, value.encode(errors="surrogatepass")]
    return value


def _encode_complex(encoder: Encoder, value: complex) -> Node:
    return [tags.COMPLEX, value.real, value.imag]


def _encode_ellipsis(encoder: Encoder, value: EllipsisType) -> Node:
    return [tags.ELLIPSIS]


def _encode_range(encoder: Encoder, value: range) -> Node:
    return [tags.RANGE, *map(encoder.node, (value.start, value.stop, value.step))]


def _encode_decimal(encoder: Encoder, value: Decimal) -> Node:
    return [tags.DECIMAL, str(value)]


def _encode_fraction(encoder: Encoder, value: Fraction) -> Node:
    return [tags.FRACTION, encoder.node(value.numerator), encoder.node(value.denominator)]


def _encode_uuid(encoder: Encoder, value: UUID) -> Node:
    return [tags.UUID, value.bytes, value.is_safe.value]


def _encode_date(encoder: Encoder, value: date) -> Node:
    return [tags.DATE, value.year, value.month, value.day]


def _encode_time(encoder: Encoder, value: time) -> Node:
    clock = value.hour, value.minute, value.second, value.microsecond
    return [tags.TIME, *clock, value.fold, encoder.node(value.tzinfo)]


def _encode_datetime(encoder: Encoder, value: datetime) -> Node:
    day = value.year, value.month, value.day
    clock = value.hour, value.minute, value.second, value.microsecond
    return [tags.DATETIME, *day, *clock, value.fold, encoder.node(value.tzinfo)]


def _encode_timedelta(encoder: Encoder, value: timedelta) -> Node:
    return [tags.TIMEDELTA, value.days, value.seconds, value.microseconds]


def _encode_timezone(encoder: Encoder, value: timezone) -> Node:
    offset, name = value.utcoffset(None), value.tzname(None)
    given = None if name == timezone(offset).tzname(None) else name
    return [tags.TIMEZONE, offset.days, offset.seconds, offset.microseconds, given]


def _encode_zone(encoder: Encoder, value: ZoneInfo) -> Node:
    if value.key is None:  # made from a file of the user's own: no name to find it by
        return encode_pickled(encoder, value)
    return [tags.ZONEINFO, value.key]


def _encode_slice(encoder: Encoder, value: slice) -> Node:
    return [tags.SLICE, encoder.items((value.start, value.stop, value.step))]


_Encode: TypeAlias = Callable[["Encoder", Any], Node]
_Decode: TypeAlias = Callable[["Decoder", list[Node], int], Any]

LEAVES: Final[dict[type, _Encode]] = {
    int: _encode_int,
    str: _encode_text,
    complex: _encode_complex,
    EllipsisType: _encode_ellipsis,
    range: _encode_range,
    Decimal: _encode_decimal,
    Fraction: _encode_fraction,
    UUID: _encode_uuid,
    date: _encode_date,
    time: _encode_time,
    datetime: _encode_datetime,
    timedelta: _encode_timedelta,
    timezone: _encode_timezone,
}

NUMBERED: Final[dict[type, _Encode]] = {slice: _encode_slice, ZoneInfo: _encode_zone}


# --------------------------------------------------------------------------------- decoding


def _decode_int(decoder: Decoder, node: list[Node], depth: int) -> int:
    return int.from_bytes(expect(node[1], bytes), "little", signed=True)


def _decode_text(decoder: Decoder, node: list[Node], depth: int) -> str:
    raw: bytes = expect(node[1], bytes)
    return raw.decode(errors="surrogatepass")


def _decode_complex(decoder: Decoder, node: list[Node], depth: int) -> complex:
    _, real, imag = node
    return complex(expect(real, float), expect(imag, float))


def _decode_ellipsis(decoder: Decoder, node: list[Node], depth: int) -> EllipsisType:
    return ...


def _decode_range(decoder: Decoder, node: list[Node], depth: int) -> range:
    _, start, stop, step = node
    return range(*(expect(decoder.value(part, depth + 1), int) for part in (start, stop, step)))


def _decode_decimal(decoder: Decoder, node: list[Node], depth: int) -> Decimal:
    return Decimal(expect(node[1], str))


def _decode_fraction(decoder: Decoder, node: list[Node], depth: int) -> Fraction:
    _, numerator, denominator = node
    return Fraction(*(expect(decoder.value(part, depth + 1), int) for part in (numerator, denominator)))


def _decode_uuid(decoder: Decoder, node: list[Node], depth: int) -> UUID:
    _, raw, is_safe = node
    return UUID(bytes=expect(raw, bytes), is_safe=SafeUUID(is_safe))


def _decode_date(decoder: Decoder, node: list[Node], depth: int) -> date:
    return date(*_ints(node[1:], 3))


def _decode_time(decoder: Decoder, node: list[Node], depth: int) -> time:
    hour, minute, second, micro, fold = _ints(node[1:-1], 5)
    return time(hour, minute, second, micro, _zone(decoder, node[-1], depth), fold=fold)


def _decode_datetime(decoder: Decoder, node: list[Node], depth: int) -> datetime:
    year, month, day, hour, minute, second, micro, fold = _ints(node[1:-1], 8)
    zone = _zone(decoder, node[-1], depth)
    return datetime(year, month, day, hour, minute, second, micro, zone, fold=fold)


def _ints(parts: list[Node], count: int) -> list[int]:
    # Given bytes, these constructors would take them for a pickled state, and check nothing.
    if len(parts) != count:
        raise ValueError(f"a date or time has {len(parts)} fields")
    return [expect(part, int) for part in parts]


def _zone(decoder: Decoder, node: Node, depth: int) -> tzinfo | None:
    zone = decoder.value(node, depth + 1)
    if zone is not None and not isinstance(zone, tzinfo):
        raise ValueError(f"a time zone is a {type(zone).__name__}")
    return zone


def _decode_timedelta(decoder: Decoder, node: list[Node], depth: int) -> timedelta:
    return timedelta(*_ints(node[1:], 3))


def _decode_timezone(decoder: Decoder, node: list[Node], depth: int) -> timezone:
    *offset, name = node
    delta = _decode_timedelta(decoder, offset, depth)
    return timezone(delta) if name is None else timezone(delta, expect(name, str))


def _decode_zone(decoder: Decoder, node: list[Node], depth: int) -> ZoneInfo:
    return ZoneInfo(expect(node[1], str))


def _decode_slice(decoder: Decoder, node: list[Node], depth: int) -> slice:
    start, stop, step = decoder.items(node[1], depth)
    return slice(start, stop, step)


LEAF_DECODERS: Final[dict[int, _Decode]] = {
    tags.INT: _decode_int,
    tags.TEXT: _decode_text,
    tags.COMPLEX: _decode_complex,
    tags.ELLIPSIS: _decode_ellipsis,
    tags.RANGE: _decode_range,
    tags.DECIMAL: _decode_decimal,
    tags.FRACTION: _decode_fraction,
    tags.UUID: _decode_uuid,
    tags.DATE: _decode_date,
    tags.TIME: _decode_time,
    tags.DATETIME: _decode_datetime,
    tags.TIMEDELTA: _decode_timedelta,
    tags.TIMEZONE: _decode_timezone,
}

NUMBERED_DECODERS: Final[dict[int, _Decode]] = {tags.SLICE: _decode_slice, tags.ZONEINFO: _decode_zone}
