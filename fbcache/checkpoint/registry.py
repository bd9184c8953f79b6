"""Which :class:`Directory` of this process stands for which path.

Guarantee: two paths to one directory, through links or not, lead to one object for as long as
it is used. Those not in use are kept too, with their key sets, the last used ones: then a save to
a path does not look the directory through again if nobody else has written there.

``_lock`` guards the table; only the path is looked at under it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from threading import Lock
from typing import Final

from fbcache.checkpoint.directory import Directory
from fbcache.store.disk import DISK, Disk

#: How many directories that are not in use are remembered.
REMEMBERED: Final = 16

_lock = Lock()
_directories: OrderedDict[tuple[str, int], Directory] = OrderedDict()


def directory_at(path: str | os.PathLike[str], disk: Disk = DISK) -> Directory:
    """Return the directory at ``path``; nothing is made or opened.

    Raises
    ------
    TypeError
        It is no path.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"a tracked directory's path is a str or a pathlib.Path, not {path!r}")
    root = os.path.realpath(os.path.expanduser(text))
    key = (root, id(disk))
    with _lock:
        directory = _directories.get(key)
        if directory is None:
            directory = _directories[key] = Directory(root, disk)
        _directories.move_to_end(key)
        _forget_some()
        return directory


def _forget_some() -> None:
    idle = [key for key, directory in _directories.items() if directory.idle]
    for key in idle[: max(len(idle) - REMEMBERED, 0)]:
        del _directories[key]


def _leave_to_parent() -> None:
    global _lock
    _lock = Lock()
    for directory in _directories.values():
        directory.abandon_in_child()
    _directories.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
