"""What a recorder needs of a storage, and a storage in memory.

What a storage may rely on: one call at a time, a bulk is never empty and never changes, and the order of
bulks, and of records in one, is that in which they were saved.

What it has to guarantee: a ``save`` that returns has written the whole bulk, and a later ``load`` sees
it; one that raises has written nothing of it. One that is cancelled may have done either: the
recorder gives it the same records again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from fbcache.recorder.query import Facets, Query, facets_of

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class Storage(Protocol[R_contra]):
    """Where a recorder's records go. What a query is, and what a load returns, is the storage's own."""

    async def save(self, bulk: Sequence[R_contra], /) -> None:
        """Write all records of ``bulk``, or none.

        Raises
        ------
        RecordsRefusedError
            Some can never be written.
        Exception
            Not now: the recorder tries again.
        """
        ...

    async def load(self, query: Any, /) -> Any:
        """Return what ``query`` asks for; what this raises goes to whoever asked."""
        ...


class MemoryStorage(Generic[R]):
    """Keeps records in a list, ``records``.

    Parameters
    ----------
    records : iterable, optional
        What is there from the beginning.
    facets : callable, optional
        Returns the :class:`~fbcache.recorder.Facets` of a record.
    """

    def __init__(self, records: Iterable[R] = (), *, facets: Callable[[R], Facets] = facets_of) -> None:
        self.records = list(records)
        self._facets = facets

    def __repr__(self) -> str:
        return f"<MemoryStorage: {len(self.records):,} records>"

    async def save(self, bulk: Sequence[R], /) -> None:
        """Append all records of ``bulk``."""
        self.records.extend(bulk)

    async def load(self, query: Query | Callable[[R], object] | None = None, /) -> list[R]:
        """Return the records that match, oldest first: all, those of a Query, or of a predicate."""
        if query is None:
            return list(self.records)
        if not isinstance(query, Query):
            return [record for record in self.records if query(record)]
        found = [record for record in self.records if query.matches(self._facets(record))]
        return found if query.limit is None else found[max(0, len(found) - query.limit) :]
