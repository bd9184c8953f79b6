"""Faults on demand: what a test asks a node to do wrong, or to do again.

Guarantee: an injected failure takes the place of the action, which is not called; a repeat calls the action
several times as recovery would, and the last output counts. Injections live in memory only: a saga that
is recovered has none. Guarded by the executor's lock.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Injections:
    """What was asked of the nodes of one saga.

    Attributes
    ----------
    errors, undo_errors : set of str
        Nodes whose action, or undo, is to fail.
    repeats, undo_repeats : dict of str to int
        How often to call the action, or the undo, of a node.
    """

    errors: set[str] = field(default_factory=set)
    undo_errors: set[str] = field(default_factory=set)
    repeats: dict[str, int] = field(default_factory=dict)
    undo_repeats: dict[str, int] = field(default_factory=dict)

    def calls(self, node: str, *, undo: bool) -> int:
        """Return how often to call; 0: fail instead."""
        if node in (self.undo_errors if undo else self.errors):
            return 0
        return (self.undo_repeats if undo else self.repeats).get(node, 1)

