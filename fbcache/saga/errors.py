"""What sagas and pipelines raise, grouped by whose fault it is.

Guarantee: each error derives from :class:`~fbcache.errors.FBCacheError` and from the builtin that a caller
without fbcache in mind would catch, and its message says what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from fbcache.errors import FBCacheError, StorageError


class _SpokenKeyError(FBCacheError, KeyError):
    """A ``KeyError`` whose text is its message, not the message's ``repr``."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


# --------------------------------------------------------------------------- the caller's


class DagError(FBCacheError, ValueError):
    """The nodes are no DAG: a name is taken, a dependency is unknown, or there are none.

    Attributes
    ----------
    nodes : tuple of str
        The nodes in question.
    """

    def __init__(self, message: str, nodes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes


class DagCycleError(DagError):
    """The nodes wait for each other in a circle; ``nodes`` is that circle."""


class UnknownSagaError(_SpokenKeyError):
    """There is no saga with this id: not in this executor, or not in this store."""


class UnknownNodeError(_SpokenKeyError):
    """The saga has no such node, or none that is an ancestor of the one that asks."""


class UnknownActionError(_SpokenKeyError):
    """A node's action is not registered with this executor. Nothing of the saga has run."""


class SagaExistsError(FBCacheError, ValueError):
    """The id is in use. Nothing was changed; take another, or go on with the saga there is."""


class SagaStateError(FBCacheError, RuntimeError):
    """The saga is not in the state that the call needs: it was started already, say. Nothing was changed."""


class ExecutorClosedError(FBCacheError, RuntimeError):
    """The executor was shut down, or belongs to the parent process. What is in the store can be recovered."""


class OutputError(FBCacheError, TypeError):
    """What an action returned cannot be recorded without pickle; that counts as the action's failure."""


class InjectedError(FBCacheError, RuntimeError):
    """The failure that ``saga_inject_error`` or ``saga_inject_error_undo`` asked for."""


class PipelineError(FBCacheError, ValueError):
    """The steps or arguments of a pipeline do not fit together. Nothing was run."""


# ---------------------------------------------------------------------------- a saga's end


class SagaFailedError(FBCacheError, RuntimeError):
    """An action failed, and what had finished was undone. The first failure is the ``__cause__``.

    Attributes
    ----------
    saga_id : UUID
        The saga.
    failures : dict of str to str
        The nodes that failed, and why.
    """

    def __init__(self, message: str, saga_id: UUID, failures: Mapping[str, str]) -> None:
        super().__init__(message)
        self.saga_id = saga_id
        self.failures = dict(failures)


class SagaStuckError(FBCacheError, RuntimeError):
    """An undo failed. Nothing more of the saga is run, nor undone, by any executor: it needs a person.

    Attributes
    ----------
    saga_id : UUID
        The saga.
    failures : dict of str to str
        The nodes whose actions failed, and why.
    undo_failures : dict of str to str
        The nodes whose undo failed, and why.
    states : dict of str to str
        The state of every node: what is done, what undone, what neither.
    """

    def __init__(
        self,
        message: str,
        saga_id: UUID,
        failures: Mapping[str, str],
        undo_failures: Mapping[str, str],
        states: Mapping[str, str],
    ) -> None:
        super().__init__(message)
        self.saga_id = saga_id
        self.failures = dict(failures)
        self.undo_failures = dict(undo_failures)
        self.states = dict(states)


class SagaStoppedError(FBCacheError, RuntimeError):
    """The store failed to record, so the saga was stopped before its next step. ``saga_resume`` goes on.

    Attributes
    ----------
    saga_id : UUID
        The saga. What the store failed with is the ``__cause__``.
    """

    def __init__(self, message: str, saga_id: UUID) -> None:
        super().__init__(message)
        self.saga_id = saga_id


class ActionFailedError(FBCacheError, RuntimeError):
    """What an earlier process recorded of an action's failure; the exception itself is gone with it."""


# -------------------------------------------------------------------------- the storage's


class SagaStoreError(StorageError):
    """The store could not read or record. Whether a record got through is known when it is read again."""


class SagaStoreInUseError(FBCacheError, RuntimeError):
    """Another process, or another object of this one, has the store open for writing."""


# ----------------------------------------------------------------------------- the data's


class SagaLogError(FBCacheError, ValueError):
    """The events of a saga are not what any run of it could have recorded.

    Attributes
    ----------
    saga_id : UUID
        The saga.
    node : str
        The node in question.
    """

    def __init__(self, message: str, saga_id: UUID, node: str) -> None:
        super().__init__(message)
        self.saga_id = saga_id
        self.node = node


class ForeignEventError(SagaLogError):
    """The event is of another saga, or of a node that this one does not have."""


class IllegalTransitionError(SagaLogError):
    """The event cannot follow on the node's state."""


class ImpossiblePairError(SagaLogError):
    """A child and its parent are in states that exclude each other."""


class CorruptSagaError(FBCacheError, ValueError):
    """What the store has of a saga cannot be read. Other sagas are not affected; this one is not touched."""
