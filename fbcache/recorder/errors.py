"""What a recorder and its storages raise.

Guarantee: an error that tells of records which are not in the storage has them attached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fbcache.errors import FBCacheError, FBCacheWarning


class RecorderError(FBCacheError, RuntimeError):
    """Records could not be written; ``__cause__`` is what the storage raised last.

    Attributes
    ----------
    unsaved : tuple
        Every record taken before the call that is not in the storage, oldest first.
    storage : Storage or None
        The storage, when ``close`` raised this; None if it never appeared.
    """

    def __init__(self, message: str, *, unsaved: tuple[Any, ...] = (), storage: Any = None) -> None:
        super().__init__(message)
        self.unsaved = unsaved
        self.storage = storage


class RecorderFullError(FBCacheError, RuntimeError):
    """``max_pending`` records wait to be written; this one was not taken.

    Attributes
    ----------
    pending, max_pending : int
        How many wait, and how many may.
    """

    def __init__(self, pending: int, max_pending: int) -> None:
        super().__init__(
            f"{pending:,} records wait to be written, and max_pending is {max_pending:,}; the record was "
            "not taken. Save it again later, drop it, or give the recorder a faster storage"
        )
        self.pending = pending
        self.max_pending = max_pending

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.pending, self.max_pending)


class RecorderClosedError(FBCacheError, RuntimeError):
    """The recorder takes nothing any more; the record was not taken."""


class RecordsRefusedError(FBCacheError, TypeError):
    """Some records of a bulk can never be written; nothing of the bulk was.

    Raised by storages. The recorder sets these records aside, goes on with the others, and raises
    a RecorderError that has them from the next ``records`` or ``close``.

    Attributes
    ----------
    refused : mapping of int to Exception
        The positions of such records in the bulk, and what is wrong with each.
    """

    def __init__(self, refused: Mapping[int, Exception]) -> None:
        reasons = "; ".join(f"record {position}: {error}" for position, error in refused.items())
        super().__init__(f"{len(refused)} records cannot be written: {reasons}")
        self.refused = dict(refused)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.refused,)


class CorruptRecordsError(FBCacheError, ValueError):
    """A file of records is damaged. What can still be read of it, SQLite's ``.recover`` finds.

    Attributes
    ----------
    path : str
        The file.
    reason : str
        What did not match.
    """

    def __init__(self, reason: str, *, path: str) -> None:
        super().__init__(f"the records in {path} are damaged: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.reason, self.path)


class ForeignFileError(FBCacheError, ValueError):
    """The file is not one of records, or of a newer fbcache; it was not changed.

    Attributes
    ----------
    path : str
        The file.
    reason : str
        What it is instead.
    """

    def __init__(self, reason: str, *, path: str) -> None:
        super().__init__(f"{path} is no file of records: {reason}; give another path")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.reason, self.path)


def _rebuild(
    kind: type[CorruptRecordsError] | type[ForeignFileError], reason: str, path: str
) -> CorruptRecordsError | ForeignFileError:
    return kind(reason, path=path)


class RecordsLostWarning(FBCacheWarning):
    """A recorder was dropped without ``close``, and records that it had taken are lost."""
