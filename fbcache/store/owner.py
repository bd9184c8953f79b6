"""Who owns a spill session, and whether that process still lives.

Guarantee: an owner is only ever called dead on evidence from its own host: another boot, no such
process, a zombie, or a process that started at another time. Whatever cannot be told counts
as alive.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass

import psutil

#: First field of an owner's file; changes when its meaning does.
MAGIC = "fbcache-session-1"

_FIELDS = {"host": str, "boot_id": str, "pid": int, "started": float}

#: Start times are derived from the clock and may be read a little differently by two processes.
_SAME_START = 2.0


@dataclass(frozen=True, slots=True)
class Owner:
    """One process on one machine, in one life of each.

    Attributes
    ----------
    host, boot_id : str
        The machine's name, and the kernel's identifier of its present boot ('' where unknown).
    pid : int
        The process.
    started : float
        When it began, in seconds since the epoch.
    """

    host: str
    boot_id: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Owner:
        """This process; found out once, for that takes as long as all the rest of making a session."""
        global _current
        pid = os.getpid()
        if _current is None or _current.pid != pid:
            _current = cls(platform.node(), _boot_id(), pid, psutil.Process(pid).create_time())
        return _current

    def to_bytes(self) -> bytes:
        """Return what the owner's file holds."""
        return json.dumps({"magic": MAGIC, **asdict(self)}).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Owner | None:
        """Return the owner that ``raw`` describes; None if it is not exactly an owner's file."""
        try:
            record = json.loads(raw)
        except ValueError:
            return None
        if not isinstance(record, dict) or record.pop("magic", None) != MAGIC:
            return None
        if {name: type(value) for name, value in record.items()} != _FIELDS:
            return None
        return cls(**record)

    def is_dead(self) -> bool:
        """Whether it is certain, from this machine, that the process has ended."""
        here = platform.node(), _boot_id()
        if not self.host or self.host != here[0]:
            return False
        return self.boot_id != here[1] or not _is_running(self.pid, self.started)


#: This process, once it is known; a forked child finds another pid in it.
_current: Owner | None = None


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _is_running(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # nothing left but its exit status
            return False
        return abs(process.create_time() - started) < _SAME_START
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    except (ValueError, OverflowError):  # a number that is no process
        return True
