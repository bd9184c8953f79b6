"""Print what pytest-benchmark measured, as the tables of ``RESULTS.rst``.

    python -m pytest benchmarks --benchmark-json=results.json
    python -m benchmarks.table results.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    """Print a table for each group: the median, its ratio to fbcache's, and the figures beside."""
    report = json.loads(Path(path).read_text())
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["benchmarks"]:
        params = row.get("params") or {}
        what = ", ".join(str(v) for k, v in params.items() if k != "who" and v != row["name"])
        group = row["group"] if "checksum" in row["group"] else f"{row['group']}: {what}".rstrip(": ")
        groups.setdefault(group, []).append(row)
    for group, rows in groups.items():
        _print_group(group, rows)


def _print_group(title: str, rows: list[dict[str, Any]]) -> None:
    print(title)
    print("~" * len(title))
    print()
    turns: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        turns.setdefault(_name(row), []).append(row)
    medians = {name: statistics.median(row["stats"]["median"] for row in turns[name]) for name in turns}
    ours = next((medians[name] for name in medians if "fbcache" in name), next(iter(medians.values())))
    print(".. list-table::\n   :header-rows: 1\n")
    extras = list(dict.fromkeys(key for row in rows for key in row["extra_info"]))
    _print_row(["who", "median", "of fbcache's", *extras])
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        figures = [_median(row["extra_info"].get(key) for row in turns[name]) for key in extras]
        _print_row([name, _duration(median), f"{median / ours:.2f}", *map(_figure, figures)])
    print()


def _name(row: dict[str, Any]) -> str:
    """Who was measured: what the parameter says, or else the test's name."""
    if who := (row.get("params") or {}).get("who"):
        return str(who).partition(", turn")[0]
    if row["name"].startswith("test_checksum"):
        return str(next(iter(row["params"].values())))
    return str(row["name"].removeprefix("test_").partition("[")[0].replace("_", " "))


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return statistics.median(known) if known else None


def _print_row(cells: list[str]) -> None:
    print("   * - " + "\n     - ".join(cells))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


if __name__ == "__main__":
    main(sys.argv[1])
