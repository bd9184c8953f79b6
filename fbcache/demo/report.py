"""What the demo shows: a progress bar on standard error, a table on standard output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from fbcache.demo.check import BLOCK, Verdict
from fbcache.demo.job import Report, Tick

_DOING: Final = {
    "fill": "filling the pool",
    "multiply": "multiplying",
    "check": "checking",
    "save": "saving",
}


class Stages:
    """Shows the stages of a run: as bars on a terminal, as a line each elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, name: str, steps: int, /) -> AbstractContextManager[Tick]:
        """Show a stage; see :class:`fbcache.demo.job.Stage`."""
        return self._stage(_DOING[name], steps)

    @contextmanager
    def _stage(self, doing: str, steps: int) -> Iterator[Tick]:
        if not self._console.is_terminal:
            self._console.print(f"{doing}: {steps:,} steps", soft_wrap=True)
            yield _nothing
            return
        task = self._progress.add_task(doing, total=steps)
        yield lambda: self._progress.advance(task)


def show(report: Report, console: Console) -> None:
    """Print the table, and what was checked."""
    console.print(_table(report))
    verdict = report.verdict
    if verdict.problem is None:
        console.print(Text("✓ right: ", "bold green").append(_checked(verdict), "default"))
    else:
        console.print(Text("✗ wrong: ", "bold red").append(verdict.problem, "default"))


def _table(report: Report) -> Table:
    table = Table(title=Text(report.plan.title), title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for number, section in enumerate((_sizes(report), _traffic(report), _times(report))):
        if number:
            table.add_section()
        for label, value in section:
            table.add_row(label, value)
    return table


def _sizes(report: Report) -> list[tuple[str, str]]:
    plan, budget = report.plan, report.stats.budget
    rows, inner = plan.left.shape
    side = plan.left.side
    return [
        ("shapes", f"({rows:,} x {inner:,}) @ ({inner:,} x {plan.right.shape[1]:,})"),
        ("tiles", f"{report.stats.named:,} of {side} x {side}, {size(8 * side * side)} each"),
        ("data in the pool", size(plan.nbytes)),
        ("budget", size(budget)),
        ("data / budget", f"{plan.nbytes / budget:.1f}"),
        ("peak of values in memory, by the pool", size(report.pool_peak)),
        ("peak of the process, by the system", size(report.process_peak)),
        ("of that, before the pool was used", size(report.process_before)),
    ]


def _traffic(report: Report) -> list[tuple[str, str]]:
    stats = report.stats
    moved = stats.bytes_written + stats.bytes_read
    return [
        ("hits / misses", f"{stats.hits:,} / {stats.misses:,}"),
        ("loads", f"{stats.loads:,}, {size(stats.bytes_read)}"),
        ("spills", f"{stats.spills:,}, {size(stats.bytes_written)}"),
        ("evictions, of those without a write", f"{stats.evictions:,}, {stats.clean_evictions:,}"),
        ("moved to and from files", f"{moved / 1e9 / sum(report.seconds.values()):.2f} GB/s"),
        ("waits for memory", f"{stats.stalls:,}, {stats.stall_seconds:.2f} s"),
    ]


def _times(report: Report) -> list[tuple[str, str]]:
    seconds = report.seconds
    rate = report.plan.flops / 1e9 / seconds["multiply"]
    return [
        (", ".join(seconds), ", ".join(f"{each:.1f}" for each in seconds.values()) + " s"),
        ("rate of the product", f"{rate:,.1f} GFLOP/s"),
        ("wall time", f"{sum(seconds.values()):.1f} s"),
    ]


def _checked(verdict: Verdict) -> str:
    how = "to the last bit" if verdict.exact else "but for rounding"
    blocks = "1 block agrees" if verdict.blocks == 1 else f"{verdict.blocks} blocks agree"
    return (
        f"C @ X equals A @ (B @ X) {how} for {verdict.vectors} random vectors of signs (a wrong product "
        f"passes with a chance of one in {2**verdict.vectors:,} at most), and {blocks} with numpy's own "
        f"product, at up to {BLOCK} x {BLOCK} elements each"
    )


def size(nbytes: int) -> str:
    """Return a number of bytes as people write it, in decimal units as the options take them."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def _nothing() -> None:
    pass
