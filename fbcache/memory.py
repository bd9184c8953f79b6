"""Sizes in bytes as people write them, and how much memory this process may use.

Guarantee: nothing is changed or kept. The limits are read anew at each call, for those of a
container can be changed while it runs.
"""

from __future__ import annotations

import math
import operator
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import psutil

#: No memory and no disk is as large; a size past it is a slip of the pen.
_ABSURD = 2**63

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("I", 1024), ("IB", 1024))
}

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*|%)\s*", re.ASCII)

_WHAT_WOULD_DO = "give bytes as a positive int, or text such as '2GB', '512MiB' or '50%'"


def parse_size(spec: SupportsIndex | float | str | None, *, name: str = "memory", least: int = 1) -> int:
    """Return the bytes that ``spec`` means.

    Parameters
    ----------
    spec : int, float, str or None
        Bytes; or text with a unit in any case, ``GB`` decimal and ``GiB`` binary; or a share of
        :func:`usable_memory`, as ``"50%"``; or None for :func:`default_budget`.
    name : str
        What the size is for, in messages.
    least : int
        The smallest size allowed, in bytes.

    Raises
    ------
    TypeError
        ``spec`` is of another type; a bool is.
    ValueError
        It cannot be read, or is no number, below ``least`` or absurdly large. The message says
        what would do.
    """
    if spec is None:
        return default_budget()
    nbytes = _from_text(spec, name) if isinstance(spec, str) else _from_number(spec, name)
    if nbytes < least:
        raise ValueError(f"{name} must be at least {least} bytes, not {spec!r}: {_WHAT_WOULD_DO}")
    if nbytes >= _ABSURD:
        raise ValueError(f"{name}={spec!r} is more than any machine has: {_WHAT_WOULD_DO}")
    return int(nbytes)


def _from_number(spec: SupportsIndex | float, name: str) -> float:
    if isinstance(spec, float):
        if math.isnan(spec):
            raise ValueError(f"{name} must be a number of bytes, not nan: {_WHAT_WOULD_DO}")
        return spec
    if isinstance(spec, bool) or not hasattr(spec, "__index__"):
        raise TypeError(f"{name} must not be of type {type(spec).__name__}: {_WHAT_WOULD_DO}")
    return operator.index(spec)


def _from_text(spec: str, name: str) -> float:
    match = _SIZE.fullmatch(spec)
    if match is None:
        raise ValueError(f"cannot read {name}={spec!r} as a size: {_WHAT_WOULD_DO}")
    number, unit = match.groups()
    if unit == "%":
        return _share(float(number), spec, name)
    scale: int | None = _UNITS.get(unit.upper())
    if scale is None:
        raise ValueError(f"{name}={spec!r} has an unknown unit {unit!r}: {_WHAT_WOULD_DO}")
    # Whole numbers stay exact; a float holds no more than 53 bits.
    return int(number) * scale if number.isdigit() else float(number) * scale


def _share(percent: float, spec: str, name: str) -> float:
    if percent > 100:
        raise ValueError(f"{name}={spec!r} is more than the process may use: {_WHAT_WOULD_DO}")
    return usable_memory() * percent / 100


def default_budget() -> int:
    """Return half of :func:`usable_memory`: the rest is for the user's own variables and the page cache."""
    return usable_memory() // 2


def resident_memory() -> int:
    """Return the bytes of physical memory that this process takes now, as the system counts them."""
    return int(psutil.Process().memory_info().rss)


def usable_memory(root: str | Path = "/") -> int:
    """Return the bytes that this process may use.

    The least of: physical memory, the limits of its control groups (version 1 and 2) and of those
    above them, and its own finite ``RLIMIT_AS`` and ``RLIMIT_DATA``. A limit that cannot be read
    is taken for none.

    Parameters
    ----------
    root : path
        Where ``proc`` and the control groups' mount points are looked for.
    """
    return min([psutil.virtual_memory().total, *_cgroup_limits(Path(root)), *_resource_limits()])


def _resource_limits() -> Iterator[int]:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft


# ------------------------------------------------------------------ control groups


class _Mount(NamedTuple):
    """A mounted hierarchy of control groups: its part from ``root`` down is seen at ``point``."""

    root: str
    point: str
    version: int


_LIMIT_FILE = {1: "memory.limit_in_bytes", 2: "memory.max"}


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The memory limits that bind this process, from its own group up to the top that can be seen."""
    groups = _own_groups(_read(root / "proc/self/cgroup"))
    for mount in _cgroup_mounts(_read(root / "proc/self/mountinfo")):
        if mount.version not in groups:
            continue
        top = root / mount.point.lstrip("/")
        below = _below(groups[mount.version], mount.root)
        for directory in (top / below, *(top / below).parents):
            limit = _read(directory / _LIMIT_FILE[mount.version]).strip()
            if limit.isdigit():  # not "max", and not missing
                yield int(limit)
            if directory == top:
                break


def _own_groups(text: str) -> dict[int, str]:
    """The process's group in each version's memory hierarchy, from ``/proc/self/cgroup``."""
    groups = {}
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            groups[2] = path
        elif "memory" in controllers.split(","):
            groups[1] = path
    return groups


def _cgroup_mounts(text: str) -> Iterator[_Mount]:
    """The mounted memory hierarchies, from ``/proc/self/mountinfo``."""
    for line in text.splitlines():
        place, _, kind = line.partition(" - ")
        fstype, _, options = kind.split(" ", 2)
        root, point = (_unescape(field) for field in place.split(" ")[3:5])
        if fstype == "cgroup2":
            yield _Mount(root, point, 2)
        elif fstype == "cgroup" and "memory" in options.split(","):
            yield _Mount(root, point, 1)


def _below(group: str, root: str) -> str:
    """Where ``group`` is below a mount of ``root``; the mount itself, where a namespace hides it."""
    prefix = root.rstrip("/") + "/"
    if not (group + "/").startswith(prefix) or ".." in group.split("/"):
        return ""
    return group[len(prefix) :]


def _unescape(field: str) -> str:
    r"""Undo the kernel's ``\040`` for a space, and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""
