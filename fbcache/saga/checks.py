"""Arguments that callers give: each of the right kind, or an error that says which kind is."""

from __future__ import annotations

from uuid import UUID

from fbcache.saga.dag import Dag


def check_id(saga_id: object) -> None:
    """Raise ``TypeError`` for what is no saga's id."""
    if not isinstance(saga_id, UUID):
        raise TypeError(f"a saga's id is a UUID, uuid.uuid4() say, not {saga_id!r}")


def check_name(name: object) -> str:
    """Return a saga's name; raise ``TypeError`` for what is none."""
    if not isinstance(name, str):
        raise TypeError(f"a saga's name is a string, not {name!r}")
    return name


def check_dag(dag: object) -> Dag:
    """Return a DAG; raise ``TypeError`` for anything else."""
    if not isinstance(dag, Dag):
        raise TypeError(f"a saga takes the Dag that DagBuilder.build() returns, not {dag!r}")
    return dag


def check_count(what: str, count: int) -> int:
    """Return a number of at least one; raise ``TypeError`` or ``ValueError`` for anything else."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{what} is a number, not {count!r}")
    if count < 1:
        raise ValueError(f"{what} is at least 1, not {count}")
    return count
