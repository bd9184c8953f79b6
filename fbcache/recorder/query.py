"""Which records a load returns: by time, kind, key and name.

Guarantee: ``Query.matches`` and the SQL of a storage in a file say the same of a record, for both go by
its :class:`Facets`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any


@dataclass(frozen=True, slots=True)
class Facets:
    """What a record is found by; None where it has no such thing.

    Attributes
    ----------
    time : float or None
        Seconds since the epoch.
    kind, key, name : str or None
        Whatever these mean to the program.
    """

    time: float | None = None
    kind: str | None = None
    key: str | None = None
    name: str | None = None


def facets_of(record: Any) -> Facets:
    """Read a record's attributes, or a mapping's items, ``time``, ``kind``, ``key`` and ``name``.

    Raises
    ------
    TypeError, ValueError
        Its ``time`` is neither a number of seconds nor a datetime.
    """
    if isinstance(record, Mapping):
        return Facets(_seconds(record.get("time")), *(_text(record.get(what)) for what in _TEXTS))
    return Facets(
        _seconds(getattr(record, "time", None)), *(_text(getattr(record, what, None)) for what in _TEXTS)
    )


_TEXTS = ("kind", "key", "name")


def _seconds(moment: Any) -> float | None:
    if moment is None:
        return None
    if isinstance(moment, datetime):
        return moment.timestamp()  # one without a zone is local time
    return float(moment)


def _text(given: Any) -> str | None:
    if given is None:
        return None
    if isinstance(given, Enum):
        given = given.value
    return given if type(given) is str else str(given)


def _texts(given: Any) -> frozenset[str] | None:
    if given is None:
        return None
    several = isinstance(given, Collection) and not isinstance(given, (str, bytes))
    return frozenset(str(_text(one)) for one in (given if several else (given,)))


@dataclass(frozen=True, slots=True)
class Query:
    """All records for which each condition that is given holds.

    Parameters
    ----------
    kind, key, name : str, or a collection of them, optional
        The record's is this, or one of these. Enums stand for their values, other objects for
        their ``str``.
    since, until : float or datetime, optional
        The record's time is not before, and not after. Seconds since the epoch; a datetime without a
        zone is local time. Records without a time match neither.
    limit : int, optional
        Only the newest so many.

    Raises
    ------
    TypeError, ValueError
        A time is none, or ``limit`` is not a number from 0 up.
    """

    kind: Any = None
    key: Any = None
    name: Any = None
    since: Any = None
    until: Any = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for what in _TEXTS:
            object.__setattr__(self, what, _texts(getattr(self, what)))
        for what in ("since", "until"):
            object.__setattr__(self, what, _seconds(getattr(self, what)))
        limit = self.limit
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"limit is a number of records from 0 up, not {limit!r}")

    def matches(self, facets: Facets) -> bool:
        """Whether a record with these facets is one of them; ``limit`` aside."""
        return all(
            wanted is None or getattr(facets, what) in wanted
            for what, wanted in (("kind", self.kind), ("key", self.key), ("name", self.name))
        ) and self._matches_time(facets.time)

    def _matches_time(self, time: float | None) -> bool:
        if self.since is None and self.until is None:
            return True
        if time is None:
            return False
        return (self.since is None or time >= self.since) and (self.until is None or time <= self.until)
