"""Print what pytest-benchmark measured, as the tables of ``RESULTS.rst``.

    python -m pytest benchmarks --benchmark-json=results.json
    python -m benchmarks.table results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    """Print a table for each group: the median, its ratio to fbcache's, and the figures beside."""
    report = json.loads(Path(path).read_text())
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["benchmarks"]:
        params = row.get("params") or {}
        what = ", ".join(str(v) for v in params.values() if v != row["name"])
        group = row["group"] if "checksum" in row["group"] else f"{row['group']}: {what}".rstrip(": ")
        groups.setdefault(group, []).append(row)
    for group, rows in groups.items():
        _print_group(group, rows)


def _print_group(title: str, rows: list[dict[str, Any]]) -> None:
    print(title)
    print("~" * len(title))
    print()
    ours = next((r["stats"]["median"] for r in rows if "fbcache" in r["name"]), rows[0]["stats"]["median"])
    print(".. list-table::\n   :header-rows: 1\n")
    extras = list(dict.fromkeys(key for row in rows for key in row["extra_info"]))
    _print_row(["who", "median", "of fbcache's", *extras])
    for row in sorted(rows, key=lambda r: float(r["stats"]["median"])):
        name = row["name"].removeprefix("test_").partition("[")[0].replace("_", " ")
        if row["name"].startswith("test_checksum"):
            name = next(iter(row["params"].values()))
        median = row["stats"]["median"]
        figures = [_figure(row["extra_info"].get(key)) for key in extras]
        _print_row([name, _duration(median), f"{median / ours:.2f}", *figures])
    print()


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
