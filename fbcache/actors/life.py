"""What an actor needs to be persistent, from its spawning to its end.

Guarantees: an actor's id is claimed on a storage before anything is read from it, and released
after the last write to it. :meth:`Life.end` always releases, and tells of what could not be saved in
``error`` and in the log.

Used in the actor's own thread, but for ``error``, which others read when the actor has stopped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from fbcache.actors.claims import Claim, claim, place_of
from fbcache.actors.errors import NotPersistentError, PersistenceError
from fbcache.actors.saving import Saver
from fbcache.actors.schedule import SYSTEM_CLOCK, Clock
from fbcache.actors.storage import PersistentStorage, take

logger: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Channel:
    claim: Claim
    saver: Saver


class Life:
    """An actor's id, its storages, and what came of saving to them.

    Attributes
    ----------
    actor_id : str or None
        The id; None for an actor that was started without one.
    storage : PersistentStorage or None
        What it was spawned with.
    clock : Clock
        For snapshots by time.
    error : PersistenceError or None
        What the last snapshot came to, when the actor ended.
    ended : threading.Event
        Set when nothing is written any more and the id is free.
    """

    def __init__(self, storage: PersistentStorage | None = None, actor_id: str | None = None) -> None:
        self.storage = storage
        self.actor_id = actor_id
        self.clock: Clock = SYSTEM_CLOCK
        self.error: PersistenceError | None = None
        self.ended = threading.Event()
        self._ending = False
        self._channels: dict[Hashable, _Channel] = {}

    def save(self, storage: PersistentStorage | None, state: Any) -> None:
        """Take a snapshot of ``state`` and have it written; errors as ``PersistentActor.save_snapshot``."""
        saver = self.open(storage)
        assert storage is not None and self.actor_id is not None
        saver.save(take(storage, self.actor_id, state))

    def open(self, storage: PersistentStorage | None) -> Saver:
        """Return the saver for ``storage``; claim the id there first, the first time."""
        if storage is None or self.actor_id is None:
            raise NotPersistentError(
                "this actor has no id to be saved under; spawn_persistent, respawn and respawn_or give it one"
            )
        if self._ending:
            raise NotPersistentError(f"actor {self.actor_id!r} has ended; its state is no longer saved")
        place = place_of(storage)
        channel = self._channels.get(place)
        if channel is None:
            channel = _Channel(claim(storage, self.actor_id), Saver(self.actor_id))
            self._channels[place] = channel
        return channel.saver

    def flush(self) -> None:
        """Wait until all that was saved is stored.

        Raises
        ------
        PersistenceError
            Some is not; the others were waited for.
        """
        failed = [error for channel in self._channels.values() if (error := _error_of(channel.saver.flush))]
        if failed:
            raise failed[0]

    def end(self) -> None:
        """Flush, save no more, and give the id back. May be called again; raises nothing."""
        self._ending = True
        while self._channels:
            _, channel = self._channels.popitem()
            try:
                error = _error_of(channel.saver.end)
            finally:
                channel.claim.release()
            if error is not None:
                self.note(error)
        self.ended.set()

    def note(self, error: PersistenceError) -> None:
        """Keep an error that nobody is there to be told of, and log it."""
        self.error = self.error or error
        logger.error("the last state of actor %r is not saved: %s", self.actor_id, error, exc_info=error)


def _error_of(call: Any) -> PersistenceError | None:
    try:
        call()
    except PersistenceError as error:
        return error
    return None


# ------------------------------------------------------------------ from the spawning call to the object

_starting = threading.local()


@contextmanager
def starting(life: Life) -> Iterator[None]:
    """Give ``life`` to the next actor that this thread makes."""
    _starting.life = life
    try:
        yield
    finally:
        _starting.life = None


def begin() -> Life:
    """Return the life that the actor being made was given, once; else one without an id."""
    life: Life | None = getattr(_starting, "life", None)
    _starting.life = None  # actors that it makes in its turn have lives of their own
    return Life() if life is None else life
