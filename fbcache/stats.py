"""The pool's figures, read at one instant.

Guarantee: a :class:`PoolStats` is frozen, and all its fields are of the same moment.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool holds and has done.

    Attributes
    ----------
    entries, named : int
        Values alive, and how many of them have a name.
    budget, resident_bytes : int
        Bytes of values that may be, and are, in memory.
    pinned_bytes : int
        Of those, bytes under a guard that has been entered.
    writing_bytes : int
        Of those, bytes whose blob is being written.
    lingering_bytes : int
        Bytes of evicted values that variables of the program still keep alive.
    spilled_bytes : int
        Bytes of values that are on disk only.
    disk_bytes : int
        Bytes of blobs on disk, those being written included.
    hits, misses : int
        Accesses that found the value in memory, or did not.
    loads, spills : int
        Blobs read and written.
    evictions, clean_evictions : int
        Values dropped from memory; and how many of them needed no write since their last load.
    bytes_written, bytes_read : int
        Bytes of those blobs.
    stalls : int
        Times a call waited for memory to come free.
    stall_seconds : float
        Time those calls waited, in seconds.
    errors : int
        Writes that failed.
    """

    entries: int
    named: int
    budget: int
    resident_bytes: int
    pinned_bytes: int
    writing_bytes: int
    lingering_bytes: int
    spilled_bytes: int
    disk_bytes: int
    hits: int
    misses: int
    loads: int
    spills: int
    evictions: int
    clean_evictions: int
    bytes_written: int
    bytes_read: int
    stalls: int
    stall_seconds: float
    errors: int
