"""``fbcache events``: what it takes from the command line, and its exit codes.

Guarantee: no record is written to the file, and what is printed is text: a name or an error in it
cannot colour or move anything in the terminal. What comes later is not waited for.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fbcache.errors import FBCacheError, StorageError
from fbcache.events import EventKind, PoolEvent
from fbcache.recorder.book import Book
from fbcache.recorder.query import Query

_AGO: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", re.ASCII)
_UNITS: Final = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days"}

_COLOURS: Final = {EventKind.ERROR: "red", EventKind.STALL: "yellow", EventKind.MUTATION: "cyan"}


class Exit(IntEnum):
    """How the command ended."""

    SHOWN = 0
    BAD_INPUT = 2  #: click's own, for arguments
    UNREADABLE = 3  #: the file is none of records, is damaged, or could not be read


def _moment(_: click.Context, parameter: click.Parameter, given: str | None) -> float | None:
    """Return the time in seconds since the epoch."""
    if given is None:
        return None
    try:
        ago = _AGO.fullmatch(given)
        if ago is not None:
            return (datetime.now() - timedelta(**{_UNITS[ago[2]]: float(ago[1])})).timestamp()
        return datetime.fromisoformat(given).timestamp()
    except (ValueError, OverflowError) as error:
        told = f"{given!r} is no time: give 2026-01-31T12:00, or how long ago, as 90s, 15min, 2h or 1d"
        raise click.BadParameter(told) from error


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([kind.value for kind in EventKind]),
    help="Only these; may be given again.",
)
@click.option("--name", "names", multiple=True, help="Only of the entry of this name; may be given again.")
@click.option("--key", "keys", multiple=True, help="Only of the content with this key; may be given again.")
@click.option("--since", callback=_moment, help="Not before: 2026-01-31T12:00, or 15min, 2h, 1d ago.")
@click.option("--until", callback=_moment, help="Not after.")
@click.option("--limit", type=click.IntRange(min=0), help="Only the newest so many.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object on each line.")
@click.pass_context
def events(
    context: click.Context,
    file: str,
    kinds: tuple[str, ...],
    names: tuple[str, ...],
    keys: tuple[str, ...],
    since: float | None,
    until: float | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Print what pools have recorded in FILE, oldest first.

    FILE is that of the SqliteStorage of a recorder that was given to FBPool(events=...). It may be in
    use. A name is given as in Python, or without its quotes.

    Exit codes: 0 printed, also if nothing matches; 2 an argument is wrong; 3 FILE is no file of
    records, is damaged, or cannot be read.
    """
    query = Query(
        kind=kinds or None,
        key=keys or None,
        name=[form for name in names for form in (name, repr(name))] or None,
        since=since,
        until=until,
        limit=limit,
    )
    try:
        records = _read(file, query)
    except (FBCacheError, StorageError) as error:
        errors = Console(stderr=True, emoji=False)
        errors.print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        context.exit(Exit.UNREADABLE)
    if as_json:
        for record in records:
            print(json.dumps(_plain(record), default=str))
    else:
        _show(records, Console(emoji=False, highlight=False))


def _read(file: str, query: Query) -> list[Any]:
    book = Book(file, readonly=True, durable=False)
    try:
        return book.read(query)
    finally:
        book.close()


def _plain(record: Any) -> Any:
    if isinstance(record, PoolEvent):
        return {**asdict(record), "kind": record.kind.value}
    return record


def _show(records: Iterable[Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify, overflow="fold")
    for record in records:
        table.add_row(*_cells(record))
    if table.row_count:
        console.print(table)
    print(f"{table.row_count:,} events", file=sys.stderr)


_COLUMNS: Final[tuple[tuple[str, Any], ...]] = (
    ("time", "left"),
    ("kind", "left"),
    ("name", "left"),
    ("bytes", "right"),
    ("ms", "right"),
    ("key", "left"),
    ("detail", "left"),
)


def _cells(record: Any) -> list[Text]:
    if not isinstance(record, PoolEvent):  # another program's recorder
        return [Text(""), Text("record", "dim"), *[Text("")] * 4, _text(repr(record))]
    when = datetime.fromtimestamp(record.time).isoformat(" ", "milliseconds")
    return [
        Text(when, "dim"),
        Text(record.kind.value, _COLOURS.get(record.kind, "")),
        _text(record.name or ""),
        Text(f"{record.nbytes:,}"),
        Text(f"{record.seconds * 1000:,.1f}"),
        Text("" if record.key is None else record.key[:8], "dim"),
        _text(record.detail),
    ]


def _text(given: str) -> Text:
    """What the user's code has said, control characters spelt out."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in given))
