"""``PersistentRef``: the reference to a persistent actor, which outlives it."""

from __future__ import annotations

from typing import TypeVar

import pykka

from fbcache.actors.life import Life

A = TypeVar("A", bound=pykka.Actor)


class PersistentRef(pykka.ActorRef[A]):
    """A pykka reference that also knows the actor's id, and what became of its last snapshot."""

    def __init__(self, actor: A, life: Life) -> None:
        super().__init__(actor)
        self._life = life

    @property
    def actor_id(self) -> str | None:
        """The id that the actor was spawned with; None if it was started without one."""
        return self._life.actor_id

    def finish(self, *, timeout: float | None = None) -> None:
        """Stop the actor after the messages sent so far, as ``stop`` does, and make sure that it is saved.

        ``stop`` itself only logs a last snapshot that could not be written, as pykka does with all that
        goes wrong in an actor's end. May be called on an actor that has stopped.

        Raises
        ------
        PersistenceError
            The last snapshot is not in the storage; the one before stands. The actor has ended, and the id
            is free.
        pykka.Timeout
            It has not ended yet.
        """
        self.stop(timeout=timeout)
        if not self._life.ended.wait(timeout):  # one that crashed is called dead before it has ended
            raise pykka.Timeout(f"{timeout} seconds")
        if self._life.error is not None:
            raise self._life.error
