"""One segment: a file of records, and what is known of it.

Guarantee: none of its own; it is what :mod:`~fbcache.store.appending` and :mod:`~fbcache.store.segments`
work on. Their lock guards every field.
"""

from __future__ import annotations

import os
from typing import Final

#: Bytes of a segment. Ten files hold a million values of 300 bytes; compacting one that is half dead
#: takes some 40 ms of an I/O thread.
SEGMENT: Final = 32 << 20

#: How a segment is opened to be read, without a link being followed.
READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

#: A place is a segment's number, and below it so many bits of offset.
OFFSET_BITS: Final = 40
OFFSET: Final = (1 << OFFSET_BITS) - 1

#: The place of what is in no segment.
NOWHERE: Final = (1 << 64) - 1


class Segment:
    """One file.

    Attributes
    ----------
    fd : int
        Open for as long as it is written to; -1 afterwards.
    memory : memoryview or None
        All of the file, mapped, beyond its end too.
    room : int
        Bytes that it was made for.
    end : int
        Bytes given out to writers.
    counted : int
        Bytes that were written, which the ledger counts.
    live : int
        Bytes of records that a slot leads to.
    users : int
        Who is writing to it, compacting it or removing it now.
    damaged : bool
        Whether a record could not be moved, so that it stays until nothing of it is needed.
    stuck : bool
        Whether its file could not be removed, which is tried again at the end.
    """

    __slots__ = (
        "counted",
        "damaged",
        "end",
        "fd",
        "live",
        "memory",
        "number",
        "path",
        "room",
        "stuck",
        "users",
    )

    def __init__(self, number: int, path: str, room: int) -> None:
        self.number = number
        self.path = path
        self.fd = -1
        self.memory: memoryview | None = None
        self.room = room
        self.end = self.counted = self.live = self.users = 0
        self.damaged = self.stuck = False
