"""Encoders that come with other packages: entry points of the group ``fbcache.codecs``.

A package that knows how values of a library are stored says so in its metadata::

    [fbcache.codecs]
    shapely = shapely_fbcache:register_all

The name is the top-level module whose classes it serves. What it names is imported when a value of such a
class, which nobody has registered, is first put or encoded, or a blob names a class of that library; if it is
callable, it is called, without arguments. It registers the classes with :func:`fbcache.codec.register`,
by names that start with the library's.

Guarantees
----------
- Data picks from what is installed, and does nothing else: a name in a blob is looked up among the entry
  points of this group, and neither imported nor run itself. Whoever installed the package trusts it.
- A broken entry point warns, once, and is left out: its library's values are then pickled, or refused.
- Entry points are looked for once in a process, at the first value that is neither built in nor registered.

No lock is held while one is loaded: threads that meet a library at the same moment may each call what it
names. ``_lock`` guards ``_settled`` alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from fbcache.errors import FBCacheWarning

if TYPE_CHECKING:
    from importlib import metadata

GROUP: Final = "fbcache.codecs"

_lock = threading.Lock()
_settled: set[str] = set()
_found: dict[str, list[metadata.EntryPoint]] | None = None
_loading = threading.local()


def load(library: str) -> bool:
    """Load what is installed for a library, unless that was done.

    Parameters
    ----------
    library : str
        A top-level module's name; any text will do.

    Returns
    -------
    bool
        Whether there is something for it, so that a class may be registered now.

    Warns
    -----
    FBCacheWarning
        An entry point is broken; said once of each library.
    """
    points = _entry_points().get(library)
    if points is None:
        return False
    if library not in _settled:
        _load(library, points)
    return True


def _entry_points() -> dict[str, list[metadata.EntryPoint]]:
    global _found
    if _found is None:
        found: dict[str, list[metadata.EntryPoint]] = {}
        for point in sorted(_installed(), key=lambda point: point.value):
            found.setdefault(point.name, []).append(point)
        _found = found
    return _found


def _installed() -> Iterable[metadata.EntryPoint]:
    from importlib import metadata  # takes longer than most of fbcache, and may never be needed

    try:
        return metadata.entry_points(group=GROUP)
    except Exception as error:  # metadata of any package: not to be read, or not what it should be
        _warn(f"entry points cannot be looked for, and none of {GROUP!r} are used: {error!r}")
        return ()


def _load(library: str, points: list[metadata.EntryPoint]) -> None:
    """Load each, unless this very thread is at it: what an entry point does may encode values."""
    busy: set[str] = _loading.__dict__.setdefault("libraries", set())
    if library in busy:
        return
    busy.add(library)
    try:
        troubles = [trouble for point in points if (trouble := _trouble_with(point)) is not None]
    finally:
        busy.discard(library)
    with _lock:
        is_first = library not in _settled
        _settled.add(library)
    if is_first:
        for trouble in troubles:
            _warn(trouble)


def _warn(message: str) -> None:
    warnings.warn(message, FBCacheWarning, stacklevel=2)


def _trouble_with(point: metadata.EntryPoint) -> str | None:
    """Load one entry point; return what to warn of."""
    try:
        loaded = point.load()
        if callable(loaded):
            loaded()
    except (Exception, SystemExit) as error:  # code of anybody's, which must not end the pool's thread
        source = f"{point.name} = {point.value}"
        return (
            f"the entry point {source!r} of the group {GROUP!r} is broken and left out: {error!r}."
            f" Values of {point.name} are pickled, or refused; update or remove the package it comes from."
        )
    return None
