"""Persistent actors: a state that survives its actor.

- :mod:`actor`: ``PersistentActor``, on pykka, with its :mod:`ref` and :mod:`arguments`; :mod:`own`: a
  dataclass that is its own snapshot
- :mod:`spawning`, :mod:`life`, :mod:`schedule`: how one starts, what it needs while it lives, when it saves
  by itself
- :mod:`saving`: the writer; :mod:`claims`: one live actor for an id
- :mod:`storage` (the protocols, and memory), :mod:`directory`, :mod:`objects`, :mod:`tracked`: where
  snapshots go
- :mod:`snapshot`, :mod:`naming`: states as bytes, ids as names
- :mod:`errors`

Storages need nothing but fbcache (and :class:`ObjectStorage` obstore); whoever asks for an actor needs
pykka, which is imported then.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fbcache.actors.arguments import Args
from fbcache.actors.directory import DirectoryStorage
from fbcache.actors.errors import (
    ActorExistsError,
    CorruptSnapshotError,
    NotPersistentError,
    PersistenceError,
    PersistenceKind,
    SnapshotNotFoundError,
)
from fbcache.actors.objects import ObjectStorage
from fbcache.actors.schedule import Clock
from fbcache.actors.storage import MemoryStorage, PersistentStorage
from fbcache.actors.tracked import TrackedStorage

if TYPE_CHECKING:
    from fbcache.actors.actor import PersistentActor
    from fbcache.actors.own import own_snapshot
    from fbcache.actors.ref import PersistentRef

__all__ = [
    # actors
    "PersistentActor",
    "PersistentRef",
    "own_snapshot",
    "Args",
    "Clock",
    # where their states go
    "PersistentStorage",
    "MemoryStorage",
    "DirectoryStorage",
    "ObjectStorage",
    "TrackedStorage",
    # errors
    "PersistenceError",
    "PersistenceKind",
    "CorruptSnapshotError",
    "SnapshotNotFoundError",
    "ActorExistsError",
    "NotPersistentError",
]

_ON_PYKKA = {"PersistentActor": "actor", "PersistentRef": "ref", "own_snapshot": "own"}


def __getattr__(name: str) -> Any:
    if name not in _ON_PYKKA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_ON_PYKKA[name]}")
    except ModuleNotFoundError as error:
        if error.name != "pykka":
            raise
        raise ModuleNotFoundError(
            f"{name} needs pykka, which is not installed: pip install 'fbcache[actors]'", name="pykka"
        ) from error
    return getattr(module, name)
