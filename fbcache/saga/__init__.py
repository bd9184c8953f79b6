"""Sagas: a DAG of named actions with undo actions, run so that it survives the process.

The map of the room, from the street to the cellar:

``pipeline``, ``steps``, ``history``, ``fingerprints``, ``command``
    steps whose results live in a pool, earlier runs, when a step must run again; ``fbcache saga``
``executor``
    ``SagaExecutor``: creates, starts, resumes and shows
``driver``, ``running``, ``instance``
    the thread that carries sagas on, where actions run, one saga in memory
``planning``, ``inject``, ``view``, ``checks``
    what comes next, faults on demand, what people see, arguments of the right kind
``sqlite``, ``store``
    where sagas are recorded
``log``, ``dag``, ``actions``, ``encoding``
    events and states, nodes, what nodes do, values as bytes
"""

from fbcache.saga.actions import Action, ActionContext, ActionRegistry
from fbcache.saga.dag import Dag, DagBuilder, Node, SagaDag
from fbcache.saga.errors import (
    ActionFailedError,
    CorruptSagaError,
    DagCycleError,
    DagError,
    ExecutorClosedError,
    ForeignEventError,
    IllegalTransitionError,
    ImpossiblePairError,
    InjectedError,
    OutputError,
    PipelineError,
    SagaExistsError,
    SagaFailedError,
    SagaLogError,
    SagaStateError,
    SagaStoppedError,
    SagaStoreError,
    SagaStoreInUseError,
    SagaStuckError,
    UnknownActionError,
    UnknownNodeError,
    UnknownSagaError,
)
from fbcache.saga.executor import SagaExecutor
from fbcache.saga.instance import SagaResult
from fbcache.saga.log import SagaEventKind, SagaLog, SagaNodeEvent, SagaNodeState, next_state
from fbcache.saga.pipeline import Pipeline, PipelineResult
from fbcache.saga.sqlite import SqliteSagaStore
from fbcache.saga.store import InMemorySagaStore, SagaCachedState, SagaCreateParams, SagaRecord, SagaStore
from fbcache.saga.view import SagaStatus, SagaView

__all__ = [
    # what a saga is
    "DagBuilder",
    "Dag",
    "Node",
    "SagaDag",
    "Action",
    "ActionContext",
    "ActionRegistry",
    # running it
    "SagaExecutor",
    "SagaResult",
    "SagaStatus",
    "SagaView",
    # steps whose results live in a pool
    "Pipeline",
    "PipelineResult",
    # where it is recorded
    "SagaStore",
    "InMemorySagaStore",
    "SqliteSagaStore",
    "SagaCreateParams",
    "SagaCachedState",
    "SagaRecord",
    "SagaLog",
    "SagaNodeEvent",
    "SagaEventKind",
    "SagaNodeState",
    "next_state",
    # errors
    "DagError",
    "DagCycleError",
    "UnknownSagaError",
    "UnknownNodeError",
    "UnknownActionError",
    "SagaExistsError",
    "SagaStateError",
    "ExecutorClosedError",
    "OutputError",
    "InjectedError",
    "PipelineError",
    "SagaFailedError",
    "SagaStuckError",
    "SagaStoppedError",
    "ActionFailedError",
    "SagaStoreError",
    "SagaStoreInUseError",
    "SagaLogError",
    "ForeignEventError",
    "IllegalTransitionError",
    "ImpossiblePairError",
    "CorruptSagaError",
]
