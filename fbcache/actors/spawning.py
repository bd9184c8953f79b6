"""From an id to a running actor: the claim, the snapshot, the arguments, the start.

Guarantee: whatever is raised, no actor runs, the id is free again, and the storage holds what it held.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeAlias, TypeVar

from fbcache.actors.arguments import Args
from fbcache.actors.errors import CorruptSnapshotError, SnapshotNotFoundError
from fbcache.actors.life import Life, starting
from fbcache.actors.ref import PersistentRef
from fbcache.actors.schedule import Clock
from fbcache.actors.snapshot import not_taken
from fbcache.actors.storage import PersistentStorage, load
from fbcache.errors import FBCacheWarning

if TYPE_CHECKING:
    from fbcache.actors.actor import PersistentActor

#: In place of arguments: there must be a snapshot.
ABSENT: Final[Any] = object()

OnCorrupt: TypeAlias = Literal["raise", "default"]

A = TypeVar("A", bound="PersistentActor[Any]")


class Spawning(Generic[A]):
    """One call of ``spawn_persistent``, ``respawn`` or ``respawn_or``, whose parameters these are."""

    def __init__(
        self,
        cls: type[A],
        storage: PersistentStorage,
        actor_id: str,
        runtime_args: Any,
        on_corrupt: OnCorrupt,
        clock: Clock,
    ) -> None:
        if on_corrupt not in ("raise", "default"):
            raise ValueError(f"on_corrupt is 'raise' or 'default', not {on_corrupt!r}")
        for call in ("try_read", "try_write"):
            if not hasattr(storage, call):
                raise TypeError(f"{storage!r} is no storage: it has no {call}")
        self._cls = cls
        self._storage = storage
        self._actor_id = actor_id
        self._runtime_args = runtime_args
        self._on_corrupt = on_corrupt
        self._life = Life(storage, actor_id)
        self._life.clock = clock

    def start(self, default: Any) -> PersistentRef[A]:
        """Start the actor from its snapshot, or else from ``default``."""
        self._life.open(self._storage)
        try:
            args = self._args(default)
            with starting(self._life):
                return self._cls.start(*args.args, **args.kwargs)  # type: ignore[return-value]
        except BaseException:
            self._life.end()
            raise

    def _args(self, default: Any) -> Args:
        try:
            snapshot = load(self._storage, self._actor_id)
        except SnapshotNotFoundError:
            if default is ABSENT:
                raise
            return Args.of(default)
        except CorruptSnapshotError as error:
            if self._on_corrupt != "default":
                raise
            warnings.warn(
                f"actor {self._actor_id!r} starts from its default: its snapshot in {error.where} is damaged"
                f" ({error.reason}), and will be replaced when it is saved next",
                FBCacheWarning,
                stacklevel=4,
            )
            return Args.of(default)
        kind = self._cls.snapshot_type
        if kind is not None and not isinstance(snapshot, kind):
            raise not_taken(self._actor_id, str(self._storage), f"it is {mismatch(snapshot, kind)}")
        try:
            return Args.of(self._cls.persistent_args(snapshot, self._runtime_args))
        except Exception as error:  # a KeyError would pass for an absent snapshot
            reason = f"{self._cls.__qualname__}.persistent_args raised {error!r}"
            raise not_taken(self._actor_id, str(self._storage), reason) from error


def mismatch(state: object, kind: type) -> str:
    """Return the end of a message on a state of the wrong type."""
    return f"a {type(state).__qualname__}, where the actor's snapshot_type is {kind.__qualname__}"
