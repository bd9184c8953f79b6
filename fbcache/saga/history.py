"""Earlier runs of a pipeline, as its store has them.

Guarantee: a run that cannot be read is warned of and left out; it spoils no other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Final
from uuid import UUID

from fbcache.errors import FBCacheWarning
from fbcache.saga.dag import SagaDag
from fbcache.saga.errors import CorruptSagaError, SagaLogError
from fbcache.saga.log import SagaEventKind, SagaLog
from fbcache.saga.store import SagaCachedState, SagaRecord, SagaStore

#: In a saga's parameters: tells the runs of pipelines from other sagas.
_MARK: Final = "fbcache.pipeline"


class PastRun:
    """One run.

    Attributes
    ----------
    id : UUID
        Its saga.
    arguments : dict
        What it was given.
    results : dict
        For each step that finished, its fingerprint and the key of its result.
    complete : bool
        Whether all steps did.
    open : bool
        Whether its saga is not done, as far as the store knows.
    """

    def __init__(self, record: SagaRecord) -> None:
        params = record.params
        log = SagaLog.recover(params.id, params.dag.dag, record.events)
        self.id = params.id
        self.arguments: dict[str, Any] = params.dag.params["arguments"]
        self.results = {
            event.node: result_of(log.output(event.node))
            for event in log.events
            if event.kind is SagaEventKind.SUCCEEDED
        }
        self.complete = log.succeeded
        self.open = params.state is not SagaCachedState.DONE


def params_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a saga that is to be a run."""
    return {"kind": _MARK, "arguments": arguments}


def output_of(fingerprint: str, key: UUID) -> dict[str, str]:
    """Return what the log holds of a step."""
    return {"fingerprint": fingerprint, "key": key.hex}


def result_of(output: dict[str, str]) -> tuple[str, UUID]:
    """Return fingerprint and key from what the log holds of a step."""
    return output["fingerprint"], UUID(output["key"])


def past_runs(store: SagaStore, name: str) -> list[PastRun]:
    """Return the runs of the pipeline of that name, oldest first."""
    runs = []
    for saga_id in store.saga_list():
        try:
            record = store.saga_load(saga_id)
            if record.params.name == name and _is_run(record.params.dag):
                runs.append(PastRun(record))
        except (CorruptSagaError, SagaLogError) as error:
            warnings.warn(f"{error}; its results are not used", FBCacheWarning, stacklevel=4)
    return runs


def known_results(runs: Iterable[PastRun]) -> dict[tuple[str, str], list[UUID]]:
    """Return keys by step and fingerprint, the newest first."""
    known: dict[tuple[str, str], list[UUID]] = {}
    for run in runs:
        for step, (fingerprint, key) in run.results.items():
            known.setdefault((step, fingerprint), []).insert(0, key)
    return known


def _is_run(dag: SagaDag) -> bool:
    params = dag.params
    return isinstance(params, dict) and params.get("kind") == _MARK
