"""``Pipeline``: steps that are plain functions, whose results outlive the process.

Guarantees
----------
- A step's result is in the pool, and durable in the tracked directory, before the log says that the step
  has succeeded; the log holds the result's key. So whatever the log says can be had again.
- ``resume`` computes a step again exactly if no earlier run has recorded a result for the same source, the
  same arguments and the same results of the steps it depends on, or that result is gone or damaged. A step
  whose dependency was computed again depends on another result, so it is computed again too.
- A step that fails, or a process that is killed, takes nothing away from what was finished before.
- Each run is a saga of its own in the store. One that was cut off is marked as done, which is to
  say superseded, once the next has been created.

What is not guaranteed: :mod:`fbcache.saga.fingerprints` says which changes are seen. A result that
was made durable just before a kill, and not yet recorded, stays in the tracked directory unused.

A pipeline is used by one thread at a time; its steps run on several. What a step writes of a ``_Run``,
under its own name, only steps read that begin after it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, overload
from uuid import UUID, uuid4

from fbcache.checkpoint.tracked import TrackedDirectory
from fbcache.errors import CorruptBlobError, PickleRefusedError
from fbcache.handle import Fb
from fbcache.pool import FBPool
from fbcache.saga.actions import ActionContext, ActionRegistry
from fbcache.saga.errors import PipelineError
from fbcache.saga.executor import SagaExecutor
from fbcache.saga.fingerprints import combined, of_function, of_value
from fbcache.saga.history import PastRun, known_results, output_of, params_of, past_runs, result_of
from fbcache.saga.steps import PipelineStep, Steps
from fbcache.saga.store import SagaCachedState, SagaStore
from fbcache.saga.view import SagaView

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(slots=True)
class _Run:
    """One run.

    Attributes
    ----------
    arguments : dict
        What the caller has given.
    past : list of PastRun
        The runs before, whose results are taken where they fit.
    handles : dict of str to Fb
        The results of this run.
    computed : set of str
        The steps that were computed, not loaded.
    interrupted : bool
        Whether no further step is to begin.
    """

    arguments: dict[str, Any]
    past: list[PastRun] = field(default_factory=list)
    handles: dict[str, Fb] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    interrupted: bool = False


class PipelineResult(Mapping[str, Fb]):
    """The results of a run: handles by step.

    Attributes
    ----------
    saga_id : UUID
        The saga that the run was.
    computed : frozenset of str
        The steps that were computed; the others were finished before.
    """

    def __init__(self, saga_id: UUID, handles: Mapping[str, Fb], computed: Iterable[str]) -> None:
        self.saga_id = saga_id
        self.computed = frozenset(computed)
        self._handles = dict(handles)

    def __getitem__(self, step: str) -> Fb:
        return self._handles[step]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __repr__(self) -> str:
        computed = ", ".join(sorted(self.computed)) or "none"
        return f"<PipelineResult of {', '.join(self)}; computed: {computed}>"

    def value(self, step: str) -> Any:
        """Return the result of a step, read-only."""
        with self._handles[step].load() as value:
            return value


class Pipeline:
    """Steps by name, and where their results are kept.

    Parameters
    ----------
    pool : FBPool
        Where results live: each under the name ``(name, step)``.
    tracked : TrackedDirectory
        Where they are durable; open for writing.
    store : SagaStore
        Where runs are recorded. With one that does not recover, ``resume`` computes everything.
    name : str
        The pipeline's name: tells its runs from others in the store.
    threads : int, optional
        How many steps run at once; as in :class:`SagaExecutor`.
    """

    def __init__(
        self,
        pool: FBPool,
        tracked: TrackedDirectory,
        store: SagaStore,
        name: str,
        *,
        threads: int | None = None,
    ) -> None:
        if not isinstance(tracked, TrackedDirectory):
            raise TypeError(f"a pipeline takes a TrackedDirectory, which is open, not {tracked!r}")
        self._pool = pool
        self._tracked = tracked
        self._store = store
        self._name = name
        self._threads = threads
        self._steps = Steps()
        self._last: SagaView | None = None

    def __repr__(self) -> str:
        return f"<Pipeline {self._name!r}: {', '.join(self._steps) or 'no steps'}>"

    @overload
    def step(
        self,
        function: None = None,
        *,
        name: str | None = None,
        inputs: Mapping[str, str] | None = None,
        after: str | Iterable[str] = (),
    ) -> Callable[[_F], _F]: ...

    @overload
    def step(
        self,
        function: _F,
        *,
        name: str | None = None,
        inputs: Mapping[str, str] | None = None,
        after: str | Iterable[str] = (),
    ) -> _F: ...

    def step(
        self,
        function: Any = None,
        *,
        name: str | None = None,
        inputs: Mapping[str, str] | None = None,
        after: str | Iterable[str] = (),
    ) -> Any:
        """Add a step: ``@pipeline.step``, ``@pipeline.step(after=...)`` or ``pipeline.step(function)``.

        A parameter that is named as an earlier step is gets that step's result, read-only; the others are
        given by :meth:`run`, or have defaults.

        Parameters
        ----------
        function : function
            What to do. Its result is put into the pool, and must need no pickle.
        name : str, optional
            The step's name; the function's, where none is given.
        inputs : mapping of str to str, optional
            For parameters, the steps whose results they get.
        after : str or iterable of str
            Steps that must have finished, though their results are not passed on.

        Returns
        -------
        function
            The function, as it was.

        Raises
        ------
        TypeError
            It is no plain function.
        PipelineError
            The name is taken, a step is not there yet, or the parameters cannot be given by name.
        """
        if function is None:
            return partial(self.step, name=name, inputs=inputs, after=after)
        self._steps.add(function, name, inputs, after)
        return function

    # ---------------------------------------------------------------------------- running

    def run(self, **arguments: Any) -> PipelineResult:
        """Compute every step, whatever earlier runs have recorded.

        Parameters
        ----------
        **arguments
            What steps take that is no result of another.

        Returns
        -------
        PipelineResult
            Handles on the results.

        Raises
        ------
        TypeError
            An argument is missing, or no step takes it.
        SagaFailedError
            A step raised; its exception is the ``__cause__``. What had finished is kept for :meth:`resume`.
        SagaStoppedError
            The store failed to record.
        """
        return self._run(_Run(self._steps.bind(arguments, {})))

    def resume(self, **arguments: Any) -> PipelineResult:
        """Go on from earlier runs: load what is finished, and compute the rest.

        With nothing recorded it is :meth:`run`; after a run that has finished, it loads everything.

        Parameters
        ----------
        **arguments
            What differs from the last run's arguments.

        Returns
        -------
        PipelineResult
            Handles on the results; ``computed`` tells what was not loaded.

        Raises
        ------
        TypeError, SagaFailedError, SagaStoppedError
            As :meth:`run` does.

        Warns
        -----
        FBCacheWarning
            An earlier run cannot be read; its results are computed again.
        """
        past = past_runs(self._store, self._name)
        former = past[-1].arguments if past else {}
        return self._run(_Run(self._steps.bind(arguments, former), past))

    def saga_get(self) -> SagaView:
        """Return how the last run of this object was at its end.

        Raises
        ------
        PipelineError
            There was none.
        """
        if self._last is None:
            raise PipelineError(f"pipeline {self._name!r} was not run by this object; call `run` or `resume`")
        return self._last

    def prune(self) -> int:
        """Delete results that earlier runs have recorded, and the last complete one has not.

        Returns
        -------
        int
            How many went from the tracked directory.

        Raises
        ------
        StorageError
            A file could not be removed.
        """
        needed: set[UUID] = set()
        recorded: set[UUID] = set()
        for past in past_runs(self._store, self._name):
            keys = {key for _, key in past.results.values()}
            recorded |= keys
            if past.complete:
                needed = keys
        gone = [key for key in recorded - needed if key in self._tracked]
        for key in gone:
            self._tracked.delete(key)
        return len(gone)

    def _run(self, run: _Run) -> PipelineResult:
        dag = self._steps.dag()
        known = known_results(run.past)
        registry = ActionRegistry()
        for step in self._steps.values():
            registry.register(step.name, partial(self._do, run, known, step))
        saga_id = uuid4()
        with SagaExecutor(self._store, registry, threads=self._threads) as executor:
            future = executor.saga_create(saga_id, self._name, dag, params_of(run.arguments))
            for past in run.past:
                if past.open:
                    self._store.saga_update(past.id, SagaCachedState.DONE)
            executor.saga_start(saga_id)
            try:
                future.result()
            finally:
                run.interrupted = not future.done()
                executor.shutdown()  # waits for what has begun
                self._last = executor.saga_get(saga_id)
        return PipelineResult(saga_id, {name: run.handles[name] for name in self._steps}, run.computed)

    # ----------------------------------------------------------------------------- a step

    def _do(
        self,
        run: _Run,
        known: Mapping[tuple[str, str], list[UUID]],
        step: PipelineStep,
        context: ActionContext,
    ) -> dict[str, str]:
        """Run a step, or load what it gave before; return what the log is to hold."""
        if run.interrupted:
            raise InterruptedError("the run was interrupted; `resume` goes on")
        arguments = {name: run.arguments.get(name, each.default) for name, each in step.arguments.items()}
        fingerprint = _fingerprint(step, arguments, context)
        handle = self._loaded(step, known.get((step.name, fingerprint), ()))
        if handle is None:
            handle = self._computed(run, step, arguments, context)
            run.computed.add(step.name)
        run.handles[step.name] = handle
        key = handle.persist(self._tracked)
        self._tracked.sync()
        return output_of(fingerprint, key)

    def _loaded(self, step: PipelineStep, keys: Iterable[UUID]) -> Fb | None:
        for key in keys:
            try:
                return self._pool.register(self._tracked, key, (self._name, step.name), replace=True)
            except (KeyError, CorruptBlobError, PickleRefusedError):  # gone, or no use: compute it
                continue
        return None

    def _computed(
        self, run: _Run, step: PipelineStep, arguments: Mapping[str, Any], context: ActionContext
    ) -> Fb:
        with ExitStack() as guards:
            inputs = {}
            for parameter, other in step.inputs.items():
                try:
                    inputs[parameter] = guards.enter_context(run.handles[other].load())
                except CorruptBlobError as error:
                    self._discard(result_of(context.lookup(other))[1])
                    error.add_note(f"it was the result of step {other!r}; `resume` computes that again")
                    raise
            value = step.function(**inputs, **arguments)
            return self._pool.put((self._name, step.name), value)

    def _discard(self, key: UUID) -> None:
        try:
            self._tracked.delete(key)
        except KeyError:
            pass


def _fingerprint(step: PipelineStep, arguments: Mapping[str, Any], context: ActionContext) -> str:
    parts = [of_function(step.function, defaults=False)]
    for name, value in sorted(arguments.items()):
        parts += ["argument", name, of_value(value)]
    for parameter, other in sorted(step.inputs.items()):
        parts += ["input", parameter, result_of(context.lookup(other))[1].hex]
    for other in sorted(step.after):
        parts += ["after", other, result_of(context.lookup(other))[1].hex]
    return combined(*parts)
