"""What a pipeline is made of: its steps, and which of their parameters are other steps' results.

Guarantee: a step depends only on steps that were added before it, so no circle can be made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Final

from fbcache.saga.dag import Dag, DagBuilder
from fbcache.saga.errors import PipelineError

_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class PipelineStep:
    """A step.

    Attributes
    ----------
    name : str
        Its name.
    function : function
        What it does.
    inputs : mapping of str to str
        For parameters, the steps whose results they get.
    after : tuple of str
        Further steps that it waits for.
    """

    name: str
    function: FunctionType
    inputs: Mapping[str, str]
    after: tuple[str, ...]

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The parameters that the caller of the pipeline gives."""
        parameters = inspect.signature(self.function).parameters
        return {name: each for name, each in parameters.items() if name not in self.inputs}


class Steps(dict[str, PipelineStep]):
    """The steps of a pipeline, by name, in the order in which they were added."""

    def add(
        self, function: Any, name: str | None, inputs: Mapping[str, str] | None, after: str | Iterable[str]
    ) -> None:
        """Add a step; see :meth:`Pipeline.step`."""
        if not isinstance(function, FunctionType) or inspect.iscoroutinefunction(function):
            raise TypeError(f"a step is a plain function, not {function!r}")
        name = function.__name__ if name is None else name
        others = (after,) if isinstance(after, str) else tuple(after)
        parameters = inspect.signature(function).parameters
        given = {each: each for each in parameters if each in self} | dict(inputs or {})
        self._check_parameters(name, parameters, given)
        for other in (*given.values(), *others):
            if other not in self:
                known = ", ".join(map(repr, self)) or "none"
                raise PipelineError(f"step {name!r} needs {other!r}; there is {known}. Add that one first")
        self[name] = PipelineStep(name, function, given, others)

    def _check_parameters(
        self, name: str, parameters: Mapping[str, inspect.Parameter], inputs: Mapping[str, str]
    ) -> None:
        if name in self:
            raise PipelineError(f"there is a step {name!r} already; give this one another `name`")
        for parameter, each in parameters.items():
            if each.kind not in _NAMED:
                raise PipelineError(f"step {name!r} takes {each}; a step's parameters are given by name")
            if parameter == name:
                raise PipelineError(f"step {name!r} has a parameter of its own name; rename one")
        for parameter in inputs:
            if parameter not in parameters:
                raise PipelineError(f"step {name!r} has no parameter {parameter!r}, though an input for it")

    def bind(self, given: Mapping[str, Any], former: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a run: those given, else those of the run before.

        Raises
        ------
        TypeError
            One is missing, or no step takes it.
        """
        taken: dict[str, list[inspect.Parameter]] = {}
        for step in self.values():
            for name, parameter in step.arguments.items():
                taken.setdefault(name, []).append(parameter)
        for name in given:
            if name not in taken:
                raise TypeError(f"no step takes an argument {name!r}")
        bound = {name: value for name, value in {**former, **given}.items() if name in taken}
        for name, parameters in taken.items():
            if name not in bound and any(each.default is each.empty for each in parameters):
                raise TypeError(f"a step needs an argument {name!r}; give it")
        return bound

    def dag(self) -> Dag:
        """Return the steps as a DAG, each its own action.

        Raises
        ------
        PipelineError
            There is no step.
        """
        if not self:
            raise PipelineError("the pipeline has no steps; add one")
        builder = DagBuilder()
        for step in self.values():
            builder.add(step.name, step.name, after=(*step.inputs.values(), *step.after))
        return builder.build()
