"""Values that checkpoints pack together."""

from __future__ import annotations

from typing import Any

from fbcache import FBPool


def row(number: int, more: int = 0) -> dict[str, Any]:
    return {"n": number, "text": f"{number:08}" * 30, "more": more}


def fill(pool: FBPool, numbers: Any, more: int = 0) -> None:
    for number in numbers:
        pool[number] = row(number, more)
