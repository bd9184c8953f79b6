"""Actions: what a node does and how that is undone, by name, and what both are given.

Guarantee: an action sees the outputs of its node's ancestors and of no other node, each as it was recorded,
so that it sees the same whether it runs at first or again after a crash. Values are its own; arrays are
read-only.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

from fbcache.saga.encoding import decode
from fbcache.saga.errors import UnknownActionError, UnknownNodeError

#: What may be registered: a function of one argument, or an async one.
ActionFunction: TypeAlias = "Callable[[ActionContext], Any] | Callable[[ActionContext], Awaitable[Any]]"


class ActionContext:
    """What an action, or an undo, knows of its saga.

    Attributes
    ----------
    saga_id : UUID
        The saga.
    saga_name : str
        Its name.
    node : str
        The node's name.
    undoing : bool
        Whether this is the undo.
    """

    __slots__ = ("_outputs", "_params", "node", "saga_id", "saga_name", "undoing")

    def __init__(
        self,
        saga_id: UUID,
        saga_name: str,
        node: str,
        *,
        undoing: bool,
        params: bytes,
        outputs: Mapping[str, bytes],
    ) -> None:
        self.saga_id = saga_id
        self.saga_name = saga_name
        self.node = node
        self.undoing = undoing
        self._params = params
        self._outputs = outputs

    def __repr__(self) -> str:
        what = "undo of " if self.undoing else ""
        return f"<ActionContext: {what}{self.node!r} of saga {self.saga_name!r} {self.saga_id}>"

    @property
    def params(self) -> Any:
        """The saga's parameters."""
        return decode(self._params)

    def lookup(self, name: str) -> Any:
        """Return the output of an ancestor; an undo may look up that of its own node too.

        Raises
        ------
        UnknownNodeError
            The node is no ancestor: it may not have run.
        """
        try:
            packed = self._outputs[name]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self._outputs)) or "none"
            message = f"{self.node!r} can look up {known}, not {name!r}; put that into the node's `after`"
            raise UnknownNodeError(message) from None
        return decode(packed)


@dataclass(frozen=True, slots=True)
class Action:
    """What a node does.

    Attributes
    ----------
    do : function
        Called with an :class:`ActionContext`; what it returns is the node's output. Sync or async. It is run
        again if the process ended before its outcome was recorded, so it is idempotent.
    undo : function or None
        Takes back what ``do`` did; the same holds for it. None: there is nothing to take back.
    """

    do: ActionFunction
    undo: ActionFunction | None = None


class ActionRegistry:
    """Actions by name. Names are recorded, so they mean the same in the next process."""

    def __init__(self) -> None:
        self._actions: dict[str, Action] = {}

    def register(self, name: str, do: ActionFunction, undo: ActionFunction | None = None) -> Action:
        """Add an action.

        Raises
        ------
        TypeError
            The name is no string, or what should be called is not callable.
        ValueError
            The name is taken.
        """
        if not isinstance(name, str):
            raise TypeError(f"actions are named by strings, not {name!r}")
        for function in (do, undo):
            if not callable(function) and (function is do or function is not None):
                raise TypeError(f"action {name!r} takes a function and an undo function, not {function!r}")
        if name in self._actions:
            raise ValueError(f"there is an action {name!r} already; names are unique")
        action = self._actions[name] = Action(do, undo)
        return action

    def __getitem__(self, name: str) -> Action:
        """Return an action.

        Raises
        ------
        UnknownActionError
            There is none of that name.
        """
        try:
            return self._actions[name]
        except KeyError:
            known = ", ".join(map(repr, self._actions)) or "none"
            message = f"no action {name!r} is registered; there is {known}. Register it"
            raise UnknownActionError(message) from None

    def __contains__(self, name: object) -> bool:
        return name in self._actions

    def __iter__(self) -> Iterator[str]:
        return iter(self._actions)

    def __len__(self) -> int:
        return len(self._actions)


def registry_of(actions: ActionRegistry | Mapping[str, Any]) -> ActionRegistry:
    """Return a registry: the one given, or one of ``{name: (do, undo)}``, an ``Action`` or function also."""
    if isinstance(actions, ActionRegistry):
        return actions
    registry = ActionRegistry()
    for name, given in actions.items():
        if isinstance(given, Action):
            registry.register(name, given.do, given.undo)
        elif isinstance(given, tuple):
            registry.register(name, *given)
        else:
            registry.register(name, given)
    return registry


def is_async(function: ActionFunction | None) -> bool:
    """Whether calling it gives a coroutine: an async function, a partial of one, or an object with one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - what it is, not whether it is there
    )
