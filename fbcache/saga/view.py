"""A saga as people see it: a status, a tree of nodes, a Graphviz graph.

Guarantee: a :class:`SagaView` is what was there at one instant, and changes no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from fbcache.saga.dag import Dag
from fbcache.saga.log import SagaEventKind, SagaLog, SagaNodeState
from fbcache.saga.store import SagaCachedState, SagaRecord


class SagaStatus(StrEnum):
    """How a saga is."""

    READY = "ready"  #: created or resumed, not started
    RUNNING = "running"  #: started, and nothing has failed
    UNWINDING = "unwinding"  #: a node failed; what had finished is being undone
    STUCK = "stuck"  #: an undo failed; it needs a person
    STOPPED = "stopped"  #: the store failed to record; it can be resumed
    DONE = "done"  #: every node has succeeded
    FAILED = "failed"  #: a node failed, and all others are undone
    SUPERSEDED = "superseded"  #: cut off, and another run of its pipeline has taken its place


_COLOURS: Final = {
    SagaNodeState.NEVER_STARTED: "white",
    SagaNodeState.STARTED: "lightyellow",
    SagaNodeState.SUCCEEDED: "palegreen",
    SagaNodeState.FAILED: "lightpink",
    SagaNodeState.UNDO_STARTED: "moccasin",
    SagaNodeState.UNDO_FINISHED: "lightgrey",
    SagaNodeState.UNDO_FAILED: "tomato",
}


def status_of(log: SagaLog) -> SagaStatus:
    """Return what a log tells of its saga's status."""
    if log.stuck:
        return SagaStatus.STUCK
    if log.succeeded:
        return SagaStatus.DONE
    if log.undone:
        return SagaStatus.FAILED
    return SagaStatus.UNWINDING if log.unwinding else SagaStatus.RUNNING


@dataclass(frozen=True, slots=True)
class SagaView:
    """A saga at one instant.

    Attributes
    ----------
    id : UUID
        Its id.
    name : str
        Its name.
    dag : Dag
        Its nodes.
    status : SagaStatus
        How it is.
    states : dict of str to SagaNodeState
        The state of each node.
    reasons : dict of str to str
        Why nodes, or their undo, have failed.
    trouble : str
        Why it was stopped; empty otherwise.
    """

    id: UUID
    name: str
    dag: Dag
    status: SagaStatus
    states: Mapping[str, SagaNodeState]
    reasons: Mapping[str, str]
    trouble: str = ""

    @classmethod
    def of_record(cls, record: SagaRecord) -> SagaView:
        """Return the view of what a store has.

        Raises
        ------
        SagaLogError
            No run can have recorded these events.
        """
        params = record.params
        log = SagaLog.recover(params.id, params.dag.dag, record.events)
        reasons = {**log.failures(), **log.failures(SagaEventKind.UNDO_FAILED)}
        status = status_of(log)
        if params.state is SagaCachedState.DONE and status in (SagaStatus.RUNNING, SagaStatus.UNWINDING):
            status = SagaStatus.SUPERSEDED
        return cls(params.id, params.name, params.dag.dag, status, log.states, reasons)

    def pretty(self) -> str:
        """Return the saga as a tree, each node under the first of its parents."""
        trouble = f": {self.trouble}" if self.trouble else ""
        lines = [f"{self.name} {self.id} {self.status}{trouble}"]
        roots = [name for name, node in self.dag.nodes.items() if not node.after]
        lines += self._branches(roots)
        return "\n".join(lines)

    def dot(self) -> str:
        """Return the saga as a Graphviz graph."""
        lines = [f"digraph {_quoted(self.name)} {{", f"  label={_quoted(f'{self.name}: {self.status}')};"]
        lines.append('  node [shape=box, style="rounded,filled"];')
        for name, state in self.states.items():
            label = _quoted(f"{name}\n{self._note(name)}")
            lines.append(f"  {_quoted(name)} [label={label}, fillcolor={_COLOURS[state]}];")
        for name, node in self.dag.nodes.items():
            lines += (f"  {_quoted(parent)} -> {_quoted(name)};" for parent in node.after)
        return "\n".join([*lines, "}"])

    def as_dict(self) -> dict[str, Any]:
        """Return the saga as JSON has it."""
        return {
            "id": str(self.id),
            "name": self.name,
            "status": str(self.status),
            "trouble": self.trouble,
            "nodes": [
                {
                    "name": name,
                    "action": node.action,
                    "after": list(node.after),
                    "state": str(self.states[name]),
                    "reason": self.reasons.get(name, ""),
                }
                for name, node in self.dag.nodes.items()
            ],
        }

    def _branches(self, roots: list[str]) -> Iterator[str]:
        # A stack, for a chain of nodes may be longer than Python's.
        pending = [(name, "", name == roots[-1]) for name in reversed(roots)]
        while pending:
            name, indent, is_last = pending.pop()
            joined = self.dag.parents(name)[1:]
            also = f" (also after {', '.join(joined)})" if joined else ""
            yield f"{indent}{'└─' if is_last else '├─'} {name}{also}: {self._note(name)}"
            deeper = indent + ("   " if is_last else "│  ")
            below = [child for child in self.dag.children(name) if self.dag.parents(child)[0] == name]
            pending += [(child, deeper, child == below[-1]) for child in reversed(below)]

    def _note(self, name: str) -> str:
        reason = self.reasons.get(name)
        return f"{self.states[name]}, {reason}" if reason else str(self.states[name])


def _quoted(text: str) -> str:
    """Return a quoted string of Graphviz's: a backslash stands for itself, a line feed for a new line."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\0", "")
    return f'"{escaped}"'
