"""What persistent actors and their storages raise.

Guarantee: absent, damaged, unreadable and taken are four different errors. A ``PersistenceError`` tells
its kind, and has what the storage or the codec raised as its ``__cause__``.
"""

from __future__ import annotations

from enum import StrEnum

from fbcache.errors import FBCacheError, PickleRefusedError, UnsupportedTypeError


class PersistenceKind(StrEnum):
    """What went wrong with a snapshot."""

    IO = "I/O"  #: the storage could not read or write it
    SERIALIZE = "serialize"  #: the state cannot be encoded
    DESERIALIZE = "deserialize"  #: what is stored is no snapshot, or none that this program can take


class PersistenceError(FBCacheError, RuntimeError):
    """A snapshot could not be written or read.

    Attributes
    ----------
    actor_id : str
        Whose snapshot it is.
    kind : PersistenceKind
        At which step it failed.
    """

    def __init__(self, message: str, *, actor_id: str, kind: PersistenceKind) -> None:
        super().__init__(message)
        self.actor_id = actor_id
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class CorruptSnapshotError(PersistenceError):
    """What is stored is not what was written. It stays as it is until something else is saved.

    Attributes
    ----------
    where : str
        The file, or the object, in question.
    reason : str
        What did not match.
    """

    def __init__(self, reason: str, *, actor_id: str, where: str) -> None:
        super().__init__(
            f"the snapshot of actor {actor_id!r} in {where} is damaged: {reason}. Put a sound copy in its"
            ' place, or start from the default with on_corrupt="default"',
            actor_id=actor_id,
            kind=PersistenceKind.DESERIALIZE,
        )
        self.where = where
        self.reason = reason


def _rebuild(kind: type[Exception], args: tuple[object, ...], state: dict[str, object]) -> Exception:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class SnapshotNotFoundError(FBCacheError, KeyError):
    """The storage has no snapshot of this actor.

    ``spawn_persistent`` and ``respawn_or`` start from arguments then.
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ActorExistsError(FBCacheError, RuntimeError):
    """An actor with this id is alive on this storage; stop that one first. Nothing was changed.

    Attributes
    ----------
    actor_id : str
        The id.
    host, pid
        Where it lives, if it is another process and known.
    """

    def __init__(self, message: str, *, actor_id: str, host: str = "", pid: int | None = None) -> None:
        super().__init__(message)
        self.actor_id = actor_id
        self.host = host
        self.pid = pid

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class NotPersistentError(FBCacheError, RuntimeError):
    """The actor has no id to be saved under, or has ended: it was not, or is no longer, persistent."""


def not_found(actor_id: str, where: str) -> SnapshotNotFoundError:
    """Return the error for a snapshot that is not there."""
    return SnapshotNotFoundError(f"there is no snapshot of actor {actor_id!r} in {where}")


def explained(doing: str, actor_id: str, error: Exception) -> PersistenceError:
    """Return ``error`` as a ``PersistenceError``; it is to be raised from ``error``."""
    if isinstance(error, PersistenceError):
        return error
    refused = isinstance(error, (PickleRefusedError, UnsupportedTypeError))
    kind = PersistenceKind.SERIALIZE if refused else PersistenceKind.IO
    return PersistenceError(f"cannot {doing} actor {actor_id!r}: {error}", actor_id=actor_id, kind=kind)
