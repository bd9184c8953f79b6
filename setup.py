"""Everything about the package is declared in setup.cfg, but for the compiling of the pool's hot path.

``FBCACHE_COMPILE=1 pip install .`` compiles it with mypyc, from the same source; see docs/guide/compiled.rst.
"""

import os
from pathlib import Path
from typing import Any

from setuptools import setup

HERE = Path(__file__).parent

#: What decides and what waits. A class here may inherit only from classes here: mypyc does not see that,
#: and instances would have no room for their base's fields. tests/test_compiled.py looks.
COMPILED = [
    "lru",
    "keys",
    "entry",
    "waiting",
    "books",
    "budget",
    "captures",
    "adoption",
    "residency",
    "spill",
    "guard",
    "writeguard",
    "watchedguard",
    "handle",
    "recorder/request",
]

#: The same whatever is installed where this runs: what else is imported counts as ``Any``.
_CHECKING = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]


def compiled() -> dict[str, Any]:
    """Return what ``setup`` takes to compile, if that is asked for."""
    if os.environ.get("FBCACHE_COMPILE", "0") in ("", "0"):
        return {}
    needed: dict[str, Any] = {"setup_requires": ["mypy >= 1.18"]}
    try:
        from mypyc.build import mypycify
    except ImportError:  # pip asks what is needed first, and then installs that
        return needed
    paths = [str(HERE / "fbcache" / f"{module}.py") for module in COMPILED]
    return needed | {"ext_modules": mypycify([*_CHECKING, *paths], opt_level="2", group_name="fbcache")}


if __name__ == "__main__":
    setup(**compiled())
