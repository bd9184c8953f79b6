"""``fbcache saga``: what is in a file of sagas. Reads only, also beside the process that writes.

Needs click. Exit codes: 0, or 2 where the file or saga cannot be read.
"""

from __future__ import annotations

import json
import sys
from typing import NoReturn
from uuid import UUID

import click

from fbcache.saga.errors import CorruptSagaError, SagaLogError, SagaStoreError
from fbcache.saga.sqlite import SqliteSagaStore
from fbcache.saga.view import SagaView

_UNREADABLE = 2


@click.group()
def saga() -> None:
    """Look at sagas that a SqliteSagaStore has recorded."""


@saga.command("ls")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON document, a list.")
def list_sagas(file: str, as_json: bool) -> None:
    """List the sagas in FILE, oldest first: id, status, nodes done of all, name."""
    rows = []
    with _opened(file) as store:
        for saga_id in _ids(store):
            try:
                rows.append(_row(SagaView.of_record(store.saga_load(saga_id))))
            except (CorruptSagaError, SagaLogError) as error:
                rows.append({"id": str(saga_id), "status": "unreadable", "trouble": str(error)})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        done = f"{row['done']}/{row['nodes']}" if "nodes" in row else "-"
        click.echo(f"{row['id']}  {row['status']:<10}  {done:>7}  {row.get('name') or row.get('trouble')}")


@saga.command("show")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("saga_id", metavar="[ID]", required=False)
@click.option("--dot", is_flag=True, help="A Graphviz graph instead of a tree.")
@click.option("--json", "as_json", is_flag=True, help="A JSON document instead of a tree.")
def show_saga(file: str, saga_id: str | None, dot: bool, as_json: bool) -> None:
    """Draw the saga of FILE whose id begins with ID; without an ID, the newest."""
    if dot and as_json:
        raise click.UsageError("--dot and --json exclude each other")
    with _opened(file) as store:
        chosen = _choose(_ids(store), saga_id)
        try:
            view = SagaView.of_record(store.saga_load(chosen))
        except (CorruptSagaError, SagaLogError, SagaStoreError) as error:
            _fail(str(error))
    if as_json:
        click.echo(json.dumps(view.as_dict(), indent=2))
    else:
        click.echo(view.dot() if dot else view.pretty())


def _opened(file: str) -> SqliteSagaStore:
    try:
        return SqliteSagaStore(file, readonly=True)
    except SagaStoreError as error:
        _fail(str(error))


def _ids(store: SqliteSagaStore) -> list[UUID]:
    try:
        return store.saga_list()
    except (SagaStoreError, CorruptSagaError) as error:
        _fail(str(error))


def _row(view: SagaView) -> dict[str, object]:
    done = sum(state == "succeeded" for state in view.states.values())
    status = str(view.status)
    return {"id": str(view.id), "name": view.name, "status": status, "done": done, "nodes": len(view.states)}


def _choose(ids: list[UUID], wanted: str | None) -> UUID:
    if not ids:
        _fail("there are no sagas in the file")
    if wanted is None:
        return ids[-1]
    found = [each for each in ids if str(each).startswith(wanted.lower())]
    if len(found) != 1:
        what = "several sagas' ids begin" if found else "no saga's id begins"
        _fail(f"{what} with {wanted!r}; `fbcache saga ls` lists them")
    return found[0]


def _fail(message: str) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(_UNREADABLE)
