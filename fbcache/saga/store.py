"""What a saga leaves outside of its process: the protocol of stores, and one that keeps nothing.

What an executor asks of a store
--------------------------------
- A call that has returned is durable; one that raises may have recorded or not, which reading tells later.
- ``saga_create`` raises :class:`SagaExistsError` for an id that is there; ``record_event`` and
  ``saga_update`` raise :class:`UnknownSagaError` for one that is not. An event that is there already is
  recorded once.
- Calls may come from any thread.
- ``recovers`` says whether what was recorded can be read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from fbcache.saga.dag import SagaDag
from fbcache.saga.errors import UnknownSagaError
from fbcache.saga.log import SagaNodeEvent


class SagaCachedState(StrEnum):
    """What a store knows of a saga without its log. ``SagaCachedState("running")`` reads it back."""

    RUNNING = "running"  #: created, perhaps started; nothing has failed
    UNWINDING = "unwinding"  #: an action failed; what had finished is being undone, or an undo failed
    DONE = "done"  #: succeeded, or undone as a whole; recovery leaves it alone


@dataclass(frozen=True, slots=True)
class SagaCreateParams:
    """A saga as it is created.

    Attributes
    ----------
    id : UUID
        Its id.
    name : str
        Its name, for people.
    dag : SagaDag
        Its nodes and parameters.
    state : SagaCachedState
        Its state.
    """

    id: UUID
    name: str
    dag: SagaDag
    state: SagaCachedState = SagaCachedState.RUNNING


@dataclass(frozen=True, slots=True)
class SagaRecord:
    """All that a store has of a saga.

    Attributes
    ----------
    params : SagaCreateParams
        What was created, with the state as it is now.
    events : tuple of SagaNodeEvent
        Its events, in any order.
    """

    params: SagaCreateParams
    events: tuple[SagaNodeEvent, ...]


class SagaStore(Protocol):
    """Where sagas are recorded; see this module for what is asked of one."""

    @property
    def recovers(self) -> bool:
        """Whether what was recorded can be read again."""
        ...

    def saga_create(self, params: SagaCreateParams) -> None:
        """Record a new saga."""
        ...

    def record_event(self, event: SagaNodeEvent) -> None:
        """Record an event."""
        ...

    def saga_update(self, saga_id: UUID, state: SagaCachedState) -> None:
        """Record that the saga is in another state."""
        ...

    def saga_list(self, *, unfinished: bool = False) -> list[UUID]:
        """Return the ids of all sagas, or of those not done, oldest first."""
        ...

    def saga_load(self, saga_id: UUID) -> SagaRecord:
        """Return what there is of a saga; an unknown one is an :class:`UnknownSagaError`."""
        ...


class InMemorySagaStore:
    """A store that keeps nothing: sagas run, and end with the process."""

    @property
    def recovers(self) -> bool:
        """False: nothing can be read again."""
        return False

    def saga_create(self, params: SagaCreateParams) -> None:
        """Forget the saga."""

    def record_event(self, event: SagaNodeEvent) -> None:
        """Forget the event."""

    def saga_update(self, saga_id: UUID, state: SagaCachedState) -> None:
        """Forget the state."""

    def saga_list(self, *, unfinished: bool = False) -> list[UUID]:
        """Return nothing."""
        return []

    def saga_load(self, saga_id: UUID) -> SagaRecord:
        """Raise :class:`UnknownSagaError`."""
        raise UnknownSagaError(f"saga {saga_id} is not in a store that keeps nothing; take SqliteSagaStore")
