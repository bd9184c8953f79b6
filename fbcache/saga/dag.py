"""The shape of a saga: named nodes, each with an action, and what each waits for.

Guarantees: a :class:`Dag` is immutable and acyclic, has at least one node, and lists its nodes in an order
in which parents come before their children; nodes that are free to come in either order keep the one in
which they were added, so the same calls give the same DAG. A :class:`SagaDag` is a DAG with the parameters
of one run of it, and goes to bytes and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType
from typing import Any

from fbcache.errors import PickleRefusedError, UnsupportedTypeError
from fbcache.saga.encoding import decode, encode
from fbcache.saga.errors import CorruptSagaError, DagCycleError, DagError, OutputError, UnknownNodeError


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    Attributes
    ----------
    name : str
        Its name, under which descendants look its output up.
    action : str
        The name of its action.
    after : tuple of str
        Its parents: the nodes that it waits for.
    """

    name: str
    action: str
    after: tuple[str, ...] = ()


class Dag:
    """Nodes by name, parents before children. Made by :class:`DagBuilder`."""

    __slots__ = ("_children", "_nodes")

    def __init__(self, nodes: Iterable[Node]) -> None:
        given = {node.name: node for node in nodes}
        self._nodes = {name: given[name] for name in _sorted(given)}
        children: dict[str, list[str]] = {name: [] for name in self._nodes}
        for node in self._nodes.values():
            for parent in node.after:
                children[parent].append(node.name)
        self._children = {name: tuple(names) for name, names in children.items()}

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes by name, parents before children."""
        return MappingProxyType(self._nodes)

    def __getitem__(self, name: str) -> Node:
        """Return a node.

        Raises
        ------
        UnknownNodeError
            There is none of that name.
        """
        try:
            return self._nodes[name]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self._nodes))
            raise UnknownNodeError(f"there is no node {name!r}; there are {known}") from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._nodes

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __eq__(self, other: object) -> bool:
        return self._nodes == other._nodes if isinstance(other, Dag) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._nodes.values()))

    def __repr__(self) -> str:
        return f"<Dag of {len(self)} nodes: {', '.join(self)}>"

    def parents(self, name: str) -> tuple[str, ...]:
        """Return the nodes that ``name`` waits for."""
        return self[name].after

    def children(self, name: str) -> tuple[str, ...]:
        """Return the nodes that wait for ``name``."""
        return self._children[self[name].name]

    def ancestors(self, name: str) -> frozenset[str]:
        """Return the nodes whose outputs ``name`` may look up."""
        found: set[str] = set()
        pending = list(self.parents(name))
        while pending:
            parent = pending.pop()
            if parent not in found:
                found.add(parent)
                pending.extend(self.parents(parent))
        return frozenset(found)


class DagBuilder:
    """Collects nodes, in any order, and checks them when the DAG is built."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def add(self, name: str, action: str, *, after: str | Iterable[str] = ()) -> DagBuilder:
        """Add a node that runs once all those in ``after`` have succeeded.

        Parameters
        ----------
        name : str
            Its name.
        action : str
            The name under which its action is registered.
        after : str or iterable of str
            The nodes it waits for; they may be added later.

        Returns
        -------
        DagBuilder
            This one, so that calls can be chained.

        Raises
        ------
        TypeError
            A name is not a string.
        DagError
            The name is empty, or taken. Nothing was added.
        """
        parents = (after,) if isinstance(after, str) else tuple(dict.fromkeys(after))
        for text in (name, action, *parents):
            if not isinstance(text, str):
                raise TypeError(f"nodes and actions are named by strings, not {text!r}")
            if not text:
                raise DagError("a node or action needs a name of at least one character")
        if name in self._nodes:
            raise DagError(f"there is a node {name!r} already; names are unique within a DAG", (name,))
        self._nodes[name] = Node(name, action, parents)
        return self

    def build(self) -> Dag:
        """Return the DAG.

        Raises
        ------
        DagError
            There is no node, or one waits for a node that does not exist.
        DagCycleError
            Nodes wait for each other.
        """
        return Dag(self._nodes.values())


@dataclass(frozen=True, slots=True)
class SagaDag:
    """A DAG and the parameters of one run of it.

    Attributes
    ----------
    dag : Dag
        The shape.
    packed_params : bytes
        The parameters, encoded.
    """

    dag: Dag
    packed_params: bytes

    @classmethod
    def of(cls, dag: Dag, params: Any = None) -> SagaDag:
        """Join a DAG and parameters.

        Raises
        ------
        OutputError
            The parameters cannot be recorded without pickle.
        """
        try:
            return cls(dag, encode(params))
        except (UnsupportedTypeError, PickleRefusedError) as error:
            raise OutputError(f"the saga's parameters cannot be recorded: {error}") from error

    @property
    def params(self) -> Any:
        """The parameters, a value of its own each time."""
        return decode(self.packed_params)

    def to_bytes(self) -> bytes:
        """Return all of it as bytes."""
        nodes = [[node.name, node.action, list(node.after)] for node in self.dag.nodes.values()]
        return encode({"nodes": nodes, "params": self.packed_params})

    @classmethod
    def from_bytes(cls, packed: bytes) -> SagaDag:
        """Read what :meth:`to_bytes` has made.

        Raises
        ------
        CorruptSagaError
            It is not that.
        """
        fields = decode(packed)
        try:
            builder = DagBuilder()
            for name, action, after in fields["nodes"]:
                builder.add(name, action, after=after)
            return cls(builder.build(), bytes(fields["params"]))
        except (TypeError, ValueError, LookupError) as error:
            raise CorruptSagaError(f"a recorded DAG cannot be read: {error}") from error


def _sorted(nodes: Mapping[str, Node]) -> list[str]:
    if not nodes:
        raise DagError("a DAG needs at least one node; add one")
    for node in nodes.values():
        for parent in node.after:
            if parent not in nodes:
                message = f"node {node.name!r} waits for {parent!r}, which is not there; add it"
                raise DagError(message, (node.name, parent))
    sorter = TopologicalSorter({name: node.after for name, node in nodes.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = tuple(error.args[1])
        raise DagCycleError(f"nodes wait for each other: {' -> '.join(circle)}", circle) from None
    position = {name: number for number, name in enumerate(nodes)}
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=position.__getitem__)
        order += ready
        sorter.done(*ready)
    return order
