"""``fbcache verify``: every blob and manifest held against its checksums."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fbcache.checkpoint.places import version_of
from fbcache.checkpoint.verifying import Damage, VerifyReport
from fbcache.demo.report import size
from fbcache.shell import screen
from fbcache.shell.details import ranges
from fbcache.shell.ending import Exit, ending
from fbcache.shell.names import name_fields, name_text
from fbcache.shell.opening import directory_argument, reading
from fbcache.shell.screen import Column

#: Foreign files that are listed for people; --json lists all.
_MOST_FOREIGN = 20

_COLUMNS = (
    Column("what", fold=True),
    Column("versions", fold=True),
    Column("file", fold=True),
    Column("reason", fold=True),
)


@click.command()
@directory_argument
@ending()
def verify(directory: str, as_json: bool) -> None:
    """Hold everything in DIR against its checksums, with all cores. Nothing is changed.

    Another process may save to DIR meanwhile.

    Exit codes: 0, 1 something is damaged, 2 there is no such directory, 3 it could not be read.
    """
    with reading(directory) as (tracked, inner):
        if as_json:
            report = tracked.verify()
            screen.tell_json(_fields(inner.root, report))
        else:
            with _bar() as progress:
                report = tracked.verify(progress=progress)
            _tell(inner.root, report)
    sys.exit(Exit.DONE if report.ok else Exit.DAMAGED)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Show how far it has come, where somebody watches; the bar goes when it is done."""
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(
        TextColumn("verifying"),
        *columns,
        console=screen.remarks(),
        transient=True,
        redirect_stdout=False,
        disable=not screen.is_watched(),
    )
    with bar:
        task = bar.add_task("verify", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


# ------------------------------------------------------------------------------- telling


def _fields(root: str, report: VerifyReport) -> dict[str, Any]:
    return {
        "directory": root,
        "ok": report.ok,
        "checked": report.checked,
        "nbytes": report.nbytes,
        "damaged": [_damage_fields(damage) for damage in report.damaged],
        "foreign": list(report.foreign),
    }


def _damage_fields(damage: Damage) -> dict[str, Any]:
    return {
        "path": damage.path,
        "reason": damage.reason,
        "key": None if damage.key is None else str(damage.key),
        "pack": None if damage.pack is None else str(damage.pack),
        "names": [{"version": version, **name_fields(name)} for version, name in damage.names],
    }


def _tell(root: str, report: VerifyReport) -> None:
    if report.damaged:
        screen.tell_table(_COLUMNS, [_row(root, damage) for damage in report.damaged])
        screen.tell("")
    if report.foreign:
        screen.tell(f"{_count(len(report.foreign), 'file')} of others, left alone:")
        for path in report.foreign[:_MOST_FOREIGN]:
            screen.tell(f"  {path}")
        if len(report.foreign) > _MOST_FOREIGN:
            screen.tell(f"  and {len(report.foreign) - _MOST_FOREIGN:,} more; --json lists them")
    checked = f"{_count(report.checked, 'blob')} checked, {size(report.nbytes)}"
    if report.ok:
        screen.tell(f"{checked}: nothing is damaged", style="green")
    else:
        count = len({damage.path for damage in report.damaged})
        verb = "is" if count == 1 else "are"
        screen.tell(f"{checked}: {_count(count, 'file')} {verb} damaged", style="red")


def _row(root: str, damage: Damage) -> tuple[str, ...]:
    file = os.path.relpath(damage.path, root)
    if damage.key is None:
        return "a checkpoint", str(version_of(os.path.basename(damage.path)) or ""), file, damage.reason
    names: dict[Hashable, None] = dict.fromkeys(name for _, name in damage.names)
    versions = sorted({version for version, _ in damage.names})
    nameless = "a blob that no checkpoint names" if damage.pack is None else "values packed together"
    what = ", ".join(map(name_text, names)) or nameless
    return what, ranges(versions), file, damage.reason


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
