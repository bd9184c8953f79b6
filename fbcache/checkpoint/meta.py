"""A user's notes on a checkpoint: what ``meta`` may hold, and how much of it.

Guarantee: what :func:`check_meta` lets pass comes back equal, but for tuples, which come back as
lists. :func:`check_parts` takes any bytes at all, and builds nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from fbcache.checkpoint.naming import is_text, shown
from fbcache.errors import UnsupportedTypeError

#: Most parts of ``meta``, keys included: Python takes 9 MB for as many, if they are empty lists.
MAX_PARTS: Final = 100_000

#: Most levels of ``meta``; msgpack has 511 at least, and each takes two Python frames to check.
MAX_DEPTH: Final = 100

_ALLOWED: Final = (
    "meta holds None, bool, int, float, str, bytes, and lists, dicts and tuples of these (tuples come back "
    "as lists), of exactly these types"
)


def check_meta(meta: Any) -> None:
    """Check that ``meta`` can be kept in a checkpoint.

    Parameters
    ----------
    meta : dict or None
        With parts of None, bool, int (of 64 bits), float, str, bytes, list, tuple and dict. Tuples
        come back as lists, so none is a key.

    Raises
    ------
    UnsupportedTypeError
        Part of it is of another type, too big an integer, a text with lone surrogates or nested too
        deep; or there are more than ``MAX_PARTS`` parts. The message names the place.
    """
    if meta is not None and type(meta) is not dict:
        raise UnsupportedTypeError(f"meta is a dict or None, not {shown(meta)}", "meta")
    _Walk().check(meta)


class _Walk:
    """One walk through notes, which knows where it is."""

    __slots__ = ("_parts", "_path")

    def __init__(self) -> None:
        self._parts = 0
        self._path: list[Any] = []

    def check(self, value: Any) -> None:
        kind = type(value)
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise self._refused(f"there are more than {MAX_PARTS} parts; keep what is big as a value")
        if kind is dict:
            self._check_keys(value)
            self._check_inside(value.items())
        elif kind is list or kind is tuple:
            self._check_inside(enumerate(value))
        elif flaw := _flaw(value):
            raise self._refused(flaw)

    def _check_keys(self, values: dict[Any, Any]) -> None:
        self._parts += len(values)
        for key in values:
            if flaw := _flaw(key):
                raise self._refused(f"of its key {shown(key)}, {flaw}")

    def _check_inside(self, parts: Iterable[tuple[Any, Any]]) -> None:
        if len(self._path) >= MAX_DEPTH:
            raise self._refused(f"it is nested more than {MAX_DEPTH} levels deep")
        for step, part in parts:
            self._path.append(step)
            self.check(part)
            self._path.pop()

    def _refused(self, reason: str) -> UnsupportedTypeError:
        where = "meta" + "".join(f"[{shown(step)}]" for step in self._path)
        return UnsupportedTypeError(f"{where} cannot be kept in a checkpoint: {reason}; {_ALLOWED}", where)


def _flaw(value: Any) -> str | None:
    """What stands against a part that has no parts."""
    kind = type(value)
    if kind is int:
        return None if -(1 << 63) <= value < 1 << 64 else "it takes more than 64 bits"
    if kind is str:
        return None if is_text(value) else "it has lone surrogates"
    if kind in (NoneType, bool, float, bytes):
        return None
    return f"it is a {kind.__module__}.{kind.__qualname__}"


def check_parts(packed: memoryview, most: int) -> None:
    """Check that ``packed`` is one msgpack value of at most so many parts, without building it.

    For lists, msgpack allocates what their headers say before it looks for items.

    Raises
    ------
    ValueError, msgpack.UnpackException
        It is not.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(packed.nbytes, 1))
    unpacker.feed(packed)
    parts, seen = 1, 0
    while seen < parts:
        if parts > most:
            raise ValueError(f"it has more than {most} parts")
        if unpacker.tell() >= packed.nbytes:
            raise ValueError("it ends within a value")
        parts += _enter(unpacker, packed[unpacker.tell()])
        seen += 1
    if unpacker.tell() != packed.nbytes:
        raise ValueError("it has bytes left over")


def _enter(unpacker: Any, lead: int) -> int:
    """Go past the header of a container, or past a value; return how many parts are in it."""
    if 0x90 <= lead <= 0x9F or lead in (0xDC, 0xDD):
        return int(unpacker.read_array_header())
    if 0x80 <= lead <= 0x8F or lead in (0xDE, 0xDF):
        return 2 * int(unpacker.read_map_header())
    unpacker.skip()
    return 0
