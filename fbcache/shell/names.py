"""Names of entries as text: how they are shown, and which one a text on the command line means.

A text in a name's place is, in this order: the name that is this very text; the name that it denotes as a
Python literal (``3``, ``"('tile', 3)"``); the name whose ``repr`` it is. So ``ls`` shows each name as
``info`` and ``export`` take it. Where both ``"3"`` and ``3`` are names, ``3`` is the text, and
``"(3)"`` the number.
"""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

from fbcache.checkpoint import naming

#: Names among which a similar one is looked for; 20 us each.
_MOST_COMPARED = 100_000


def name_repr(name: Hashable) -> str:
    """Return the ``repr`` of a name, shortened where Python has none."""
    try:
        return repr(name)
    except ValueError:  # an integer of thousands of digits
        return naming.shown(name)


def name_text(name: Hashable) -> str:
    """Return a name as it is shown: a text that can be printed as itself, any other by its ``repr``."""
    if isinstance(name, str) and name.isprintable() and name == name.strip() != "":
        return name
    return name_repr(name)


def name_fields(name: Hashable) -> dict[str, str]:
    """Return a name for JSON: itself if it is a text, else its ``repr``; and the ``repr`` in any case."""
    return {"name": name if isinstance(name, str) else name_repr(name), "name_repr": name_repr(name)}


def find(names: Sequence[Hashable], text: str) -> int | None:
    """Return the place of the name that ``text`` means, if there is one."""
    places = {name: place for place, name in enumerate(names)}
    if text in places:
        return places[text]
    for meant in _literals(text):
        try:
            if meant in places:
                return places[meant]
        except TypeError:  # a list, say
            pass
    return next((place for name, place in places.items() if name_repr(name) == text), None)


def similar(names: Sequence[Hashable], text: str) -> list[str]:
    """Return the names that look most like ``text``, as they are shown."""
    return difflib.get_close_matches(text, [name_text(name) for name in names[:_MOST_COMPARED]])


def _literals(text: str) -> list[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in it
            return [ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []
