"""Counting everything anew from the entries: to check the counters, and to mend them.

Guarantees
----------
- :func:`check` trusts no counter: each is compared with what the entries themselves say.
- :func:`mend` brings a torn decision to a consistent end. What it takes as true are the fields of
  the entries, each of which is changed by a straight line of stores (:mod:`fbcache.entry`).

Called with the pool's lock held. Both take time in proportion to the number of entries.
"""

from __future__ import annotations

from fbcache.entry import IN_MEMORY, MISSING, Entry, State
from fbcache.errors import InternalError
from fbcache.residency import Residency


def mend(residency: Residency) -> None:
    """Make counters, orders and locks agree with the entries again."""
    residency.resident_bytes = _resident(residency)
    residency.pinned_bytes = _pinned(residency)
    residency.resume()
    for entry in residency.left_behind():
        residency.forget_dropped(entry)
    for entry in list(residency.entries):
        if entry.waiters is not None:
            was_held = entry.held
            entry.hand_over()
            if entry.held and not was_held:
                residency.pin(entry)
        if entry.state is not State.LOADING:
            residency.wake_watchers(entry)
        residency.disown(entry)
        if _homeless(entry):
            residency.settle(entry)


def check(residency: Residency) -> None:
    """Compare every counter with a recount.

    Raises
    ------
    InternalError
        Something disagrees; the message says what.
    """
    _expect("resident_bytes", residency.resident_bytes, _resident(residency))
    _expect("pinned_bytes", residency.pinned_bytes, _pinned(residency))
    writing = [e for e in residency.entries if e.state is State.WRITING] + list(residency.ending)
    _expect("writing_bytes", residency.writing_bytes, sum(e.nbytes for e in writing))
    _expect("writing_count", residency.writing_count, len(writing))
    ordered = _check_chains(residency)
    for entry in residency.entries:
        _check_entry(residency, entry)
        if entry.order is not None and entry not in ordered:
            raise InternalError(f"{entry!r} says it is in an order that does not hold it")
    waited_for = residency.requests.keys() | residency.watchers.keys()
    if not waited_for <= residency.entries:
        raise InternalError(f"dropped entries are still waited for: {waited_for - residency.entries}")
    if residency.stalled:
        raise InternalError(f"{residency.stalled} would never go on")
    if ordered - residency.entries:
        raise InternalError(f"dropped entries are still in line: {ordered - residency.entries}")


def _check_entry(residency: Residency, entry: Entry) -> None:
    present = entry.value is not MISSING
    if present != (entry.state in (State.RESIDENT, State.WRITING, State.CLEAN)):
        raise InternalError(f"{entry!r}: value present is {present}")
    if (entry.token is not None) != (entry.state in (State.CLEAN, State.SPILLED, State.LOADING)):
        raise InternalError(f"{entry!r}: blob is {entry.token}")
    if entry.state is State.MUTATING and entry.writer is None:
        raise InternalError(f"{entry!r} has no write guard")
    if entry.readers is not None and entry.writer is not None:
        raise InternalError(f"{entry!r} has readers and a writer")
    if not entry.held and entry.waiters is not None and entry.state is not State.WRITING:
        raise InternalError(f"{entry!r} is free, and waited for")
    if not (entry.owned or entry.held or entry.waiters) and entry not in residency.lost_handles:
        raise InternalError(f"{entry!r} belongs to nobody")
    if entry in residency.requests and not _will_be_written(entry, entry.order is residency.queued):
        raise InternalError(f"{entry!r} is to be written, and would never be")
    if entry in residency.watchers and entry.state is not State.LOADING:
        raise InternalError(f"{entry!r} is waited for as if it were being loaded")
    if entry.captures is not None and not _will_be_written(entry, entry in residency.wanted):
        raise InternalError(f"{entry!r} is to be saved, and would never be")
    if _homeless(entry):
        raise InternalError(f"{entry!r} is in memory and would never be evicted")
    if entry.order is not None and entry.state not in IN_MEMORY:
        raise InternalError(f"{entry!r} is in line for eviction")


def _check_chains(residency: Residency) -> set[Entry]:
    ordered: set[Entry] = set() if residency.policy.chains else set(residency.policy)
    for chain in (*residency.policy.chains, residency.queued, residency.clean):
        members = list(chain)
        _expect("bytes in line", chain.nbytes, sum(e.nbytes for e in members))
        _expect("entries in line", chain.count, len(members))
        if any(e.order is not chain for e in members) or ordered & set(members):
            raise InternalError("an entry is in two orders")
        ordered.update(members)
    if any(e.state is not State.CLEAN for e in residency.clean):
        raise InternalError("an entry that is not clean is in line to be dropped")
    return ordered


def _will_be_written(entry: Entry, in_line: bool) -> bool:
    """Whether those who wait for the blob will hear: from a write, or from the guard that has the entry."""
    if entry.state is State.RESIDENT and entry.writer is None:
        return in_line
    return entry.token is None


def _homeless(entry: Entry) -> bool:
    return (
        entry.order is None
        and entry.state in (State.RESIDENT, State.CLEAN)
        and not entry.held
        and not entry.stuck
    )


def _resident(residency: Residency) -> int:
    living = sum(e.nbytes for e in residency.entries if e.state in IN_MEMORY)
    return living + sum(e.nbytes for e in residency.ending - residency.entries)


def _pinned(residency: Residency) -> int:
    return sum(e.nbytes for e in residency.entries if e.held and e.state in IN_MEMORY)


def _expect(what: str, counted: int, true: int) -> None:
    if counted != true:
        raise InternalError(f"{what} is {counted}, and should be {true}")
