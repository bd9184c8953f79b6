"""The oldest versions of other libraries are the same wherever they are stated."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from fbcache.codec.families.kinds import LIBRARIES

SETUP = Path(__file__).parent.parent / "setup.cfg"


def floors(extra: str) -> dict[str, tuple[int, ...]]:
    """What an extra of setup.cfg asks for, and from which version on."""
    config = configparser.ConfigParser()
    config.read(SETUP)
    lines = config["options.extras_require"][extra].splitlines()
    found = [re.fullmatch(r"([\w-]+) >= ([\d.]+)", line) for line in lines if line and line[0] != "#"]
    assert all(found), lines
    return {match[1]: tuple(map(int, match[2].split("."))) for match in found if match is not None}


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_extra_asks_for_what_the_kinds_need(library: str) -> None:
    row = LIBRARIES[library]
    assert floors(row.distribution)[row.distribution] == row.floor


@pytest.mark.parametrize("library", sorted(set(LIBRARIES) - {"torch"}))
def test_the_extra_of_all_families_has_each(library: str) -> None:
    row = LIBRARIES[library]
    assert floors("families")[row.distribution] == row.floor
