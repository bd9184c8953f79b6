"""Whether what cannot be made read-only was left alone: fingerprints of values, for ``FBPool(debug=True)``.

Guarantee: a value that was changed outside of a write guard, in any way that its encoding shows, is told by
the next guard on it, once. What cannot be encoded is not watched.

A fingerprint is taken when a value is put, and when a guard first meets it after a change or a reload. It
is a checksum of the value's frames, so taking one costs about what writing the value does. Nothing here is
used, and nothing is noted, in a pool without ``debug``.
"""

from __future__ import annotations

from typing import Any

from xxhash import xxh3_64

from fbcache.codec import MsgpackCodec
from fbcache.entry import Entry
from fbcache.errors import MutatedError
from fbcache.residency import Residency

_codec = MsgpackCodec()


def fingerprint(value: Any) -> int | None:
    """Return a checksum of a value's content; None if it cannot be encoded."""
    try:
        frames = _codec.encode(value, allow_pickle=True)
    except Exception:  # of the value's own making, too
        return None
    state = xxh3_64(frames.tree)
    for buffer in frames.buffers:
        state.update(buffer)
    return state.intdigest()


class Promises:
    """The fingerprints of one pool's values in memory, kept with its books."""

    __slots__ = ("_residency",)

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def note(self, entry: Entry, value: Any) -> None:
        """Take the fingerprint of a value that was just put. Outside the lock."""
        found = fingerprint(value)
        if found is not None:
            self._residency.noted[entry] = found

    def check(self, entry: Entry, value: Any, when: str) -> None:
        """Compare a value with its fingerprint, or take that if it has none. Outside the lock, pinned.

        Raises
        ------
        MutatedError
            It was changed. Its content as it is now has a fingerprint of its own from then on.
        """
        known = self._residency.noted.get(entry)
        found = fingerprint(value)
        if found is None:
            return
        self._residency.noted[entry] = found
        if known is not None and known != found:
            raise _changed(entry, when)


def _changed(entry: Entry, when: str) -> MutatedError:
    who = repr(entry.name) if entry.named else "an unnamed entry"
    how = f"pool.get_mut({entry.name!r})" if entry.named else "load_mut()"
    return MutatedError(
        f"the value of {who}, a {type(entry.value).__name__}, was changed {when}, which leaves its blob and"
        f" its checkpoints as they were: the change will be lost, or not, as memory happens to come free."
        f" Change it within `with {how} as value:`, or put a copy.",
        name=entry.name if entry.named else None,
    )
