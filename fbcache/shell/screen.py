"""What people and programs see: tables and sentences, or one JSON document.

Guarantees
----------
- Text out of a directory's files reaches the terminal as printable characters that its encoding has: a
  name cannot colour, clear or break what is shown.
- Standard output has the answer alone; remarks and errors go to standard error.
- A table fits the terminal: text is folded, and where that does not suffice each row becomes lines of its
  own. In a pipe nothing is folded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

#: Wider than any table, for output that is no terminal.
_UNBOUNDED = 100_000

#: Rows that rich lays out; it takes a quarter of a millisecond for each. More are laid out here.
_MANY = 1000

#: Least width that text is folded to.
_FOLDED = 16


#: What columns are apart by; rich makes it of a divider and a padding.
_GAP = "  "

#: Columns apart by spaces, and a line of hyphens below the titles: every encoding has them.
_BOX = box.Box("\n".join(("    ", "    ", " -- ", "    ", "    ", "    ", "    ", "    ")), ascii=True)


class Column(NamedTuple):
    """A column of a table.

    Attributes
    ----------
    title : str
        What stands above it.
    right : bool
        Whether it is aligned to the right.
    fold : bool
        Whether its text may take several lines.
    """

    title: str
    right: bool = False
    fold: bool = False


Row = tuple[str, ...]


def is_watched() -> bool:
    """Whether somebody looks on: standard output and standard error are terminals."""
    return bool(_console(sys.stdout).is_terminal and _console(sys.stderr).is_terminal)


def remarks() -> Console:
    """Return standard error as rich takes it."""
    return _console(sys.stderr)


def say(message: str, *, style: str = "") -> None:
    """Print one line of remark or error; where nobody can hear it, it is lost."""
    try:
        _print(sys.stderr, Text(printable(message, _encoding(sys.stderr)), style))
    except OSError:
        pass


def tell(message: str, *, style: str = "") -> None:
    """Print one line of the answer."""
    _print(sys.stdout, Text(printable(message, _encoding(sys.stdout)), style))


def tell_json(document: dict[str, Any]) -> None:
    """Print the answer as JSON, in ASCII."""
    _write(sys.stdout, json.dumps(document, indent=2) + "\n")


def tell_rich(part: RenderableType) -> None:
    """Print what was laid out already; its texts have gone through :func:`shown`."""
    _print(sys.stdout, part, fold=True)


def tell_table(columns: Sequence[Column], rows: Iterable[Row], *, bad: Iterable[int] = ()) -> None:
    """Print a table; the rows whose numbers are in ``bad`` in red."""
    lines = [tuple(map(shown, row)) for row in rows]
    if len(lines) > _MANY:
        _tell_plainly(columns, lines)
        return
    red = set(bad)
    if _least_width(columns, lines) <= _console(sys.stdout).width:
        _print(sys.stdout, _table(columns, lines, red), fold=True)
        return
    for number, row in enumerate(lines):
        _print(sys.stdout, _record(columns, row, "red" if number in red else ""), fold=True)


def tell_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print pairs of label and value, one below the other."""
    _print(sys.stdout, _facts([(label, shown(value)) for label, value in facts], ""), fold=True)


def shown(text: str) -> str:
    """Return ``text`` as standard output can show it."""
    return printable(text, _encoding(sys.stdout))


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Return ``text`` with all that is not printable, or not in ``encoding``, as ``\x1b`` and the like."""
    if text.isascii() and text.isprintable():
        return text
    marks = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return marks.encode(encoding, "backslashreplace").decode(encoding)


# ------------------------------------------------------------------------------- tables


def _table(columns: Sequence[Column], rows: Sequence[Row], bad: set[int]) -> Table:
    table = Table(box=_BOX, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["right", "left"] = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=not column.fold, overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(Text, row), style="red" if number in bad else "")
    return table


def _record(columns: Sequence[Column], row: Row, style: str) -> Table:
    pairs = [(column.title, cell) for column, cell in zip(columns, row, strict=True) if cell]
    return _facts([*pairs, ("", "")], style)


def _facts(facts: Sequence[tuple[str, str]], style: str) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style=style or "bold")
    table.add_column(overflow="fold", style=style)
    for label, value in facts:
        table.add_row(label, Text(value))
    return table


def _least_width(columns: Sequence[Column], rows: Sequence[Row]) -> int:
    """How wide the table is with all folded that can be."""
    widths = _widths(columns, rows)
    folded = (min(width, _FOLDED) if c.fold else width for c, width in zip(columns, widths, strict=True))
    return sum(folded) + len(_GAP) * (len(columns) - 1)


def _widths(columns: Sequence[Column], rows: Sequence[Row]) -> list[int]:
    titles = tuple(column.title for column in columns)
    return [max(map(cell_len, cells)) for cells in zip(titles, *rows, strict=True)]


def _tell_plainly(columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Write the columns by themselves, each row in one line."""
    titles, widths = tuple(column.title for column in columns), _widths(columns, rows)
    rule = "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))
    lines = (_line(columns, widths, titles), rule, *(_line(columns, widths, row) for row in rows))
    _write(sys.stdout, "\n".join(lines) + "\n")


def _line(columns: Sequence[Column], widths: Sequence[int], row: Row) -> str:
    cells = []
    for column, width, cell in zip(columns, widths, row, strict=True):
        space = " " * (width - cell_len(cell))
        cells.append(space + cell if column.right else cell + space)
    return _GAP.join(cells).rstrip()


# ------------------------------------------------------------------------------ streams


def _console(stream: TextIO | None) -> Console:
    console = Console(file=stream, emoji=False, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBOUNDED
    return console


def _encoding(stream: TextIO | None) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _print(stream: TextIO | None, part: RenderableType, *, fold: bool = False) -> None:
    console = _console(stream)
    with console.capture() as captured:
        console.print(part, soft_wrap=not fold)
    # rich pads what it lays out to the width of its table
    _write(stream, "".join(line.rstrip(" ") + "\n" for line in captured.get().splitlines()))


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed before the start
        return
    encoding = _encoding(stream)
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write what there is to say: {error.strerror or error}") from error
