"""Whether what cannot be made read-only was left alone: fingerprints of values, for ``FBPool(debug=True)``.

Guarantee: that a value was changed outside of a write guard, in any way that its encoding shows, is told by
the next guard on it, once; until then it is not written, and who asks for that is told too. What cannot be
encoded is not watched, and a value that has a blob already may leave memory, and the change with it.

A fingerprint is taken when a value is put, and when a reader first meets it after a change or a reload. It
is a checksum of the value's frames, so taking one costs about what writing the value does. Nothing here is
used, and nothing is noted, in a pool without ``debug``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from xxhash import xxh3_64

from fbcache.codec.msgpack_codec import bare_frames
from fbcache.entry import Entry, State
from fbcache.errors import MutatedError
from fbcache.residency import Residency


def fingerprint(value: Any) -> int | None:
    """Return a checksum of a value's content; None if it cannot be encoded."""
    try:
        frames = bare_frames(value)
    except Exception:  # of the value's own making, too
        return None
    state = xxh3_64(frames.tree)
    for buffer in frames.buffers:
        state.update(buffer)
    return state.intdigest()


def _always() -> bool:
    return True


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

    def check_before(self, entry: Entry, value: Any, holds: Callable[[], bool] = _always) -> None:
        """Compare a value that a guard is about to give. Outside the lock, pinned.

        Parameters
        ----------
        entry : Entry
            What it is the value of.
        value : object
            The value.
        holds : callable
            Whether the guard has had the entry all the time; asked under the lock. If not, nothing counts.

        Raises
        ------
        MutatedError
            It was changed. As it is now, it has a fingerprint of its own from then on.
        """
        if self._is_changed(entry, value, holds):
            advice = f"The guard was not entered. {_replacing(entry)}to enter again takes what the pool has."
            raise _changed(entry, value, _BEFORE, advice)

    def check_within(self, entry: Entry, value: Any) -> None:
        """Compare a value at the end of a reader's block; otherwise as :meth:`check_before`."""
        if self._is_changed(entry, value, _always):
            how = f"pool.get_mut({entry.name!r})" if entry.named else "load_mut()"
            advice = f"Change it within `with {how} as value:`, or put a copy."
            raise _changed(entry, value, "within a read guard's block", advice)

    def check_unwritten(self, entry: Entry, value: Any) -> None:
        """Compare a value that is about to be written under its key. Outside the lock.

        Raises
        ------
        MutatedError
            It was changed. Its fingerprint stays, for the next guard to tell.
        """
        known = self._residency.noted.get(entry)
        if known is None or self._steady(value, known) in (None, known):
            return
        if self._residency.noted.get(entry) == known:  # else a guard has told of it meanwhile
            advice = (
                f"It was not written, and stays in memory. {_replacing(entry)}to enter a guard tells of this"
                " again, and takes it as it is from then on."
            )
            raise _changed(entry, value, _BEFORE, advice)

    def _is_changed(self, entry: Entry, value: Any, holds: Callable[[], bool]) -> bool:
        found = self._steady(value, self._residency.noted.get(entry))
        return found is not None and self._residency.run(self._renew, entry, found, holds)

    def _steady(self, value: Any, known: int | None) -> int | None:
        """Take a fingerprint, once more where it is not the one known; None if no two are alike.

        So with what is pickled otherwise each time, or is being changed just now: the next guard tells.
        """
        found = fingerprint(value)
        if found is None or known is None or found == known:
            return found
        return found if fingerprint(value) == found else None

    def _renew(self, entry: Entry, found: int, holds: Callable[[], bool]) -> bool:
        """Note a fingerprint; whether another one was. Under the lock."""
        if entry.state is State.DROPPED or not holds():
            return False
        noted = self._residency.noted
        known = noted.get(entry, found)
        noted[entry] = found
        if known != found:
            entry.stuck = False  # where its write has failed for that, another one will not
        return known != found


_BEFORE: Final = "outside of any guard, or by another reader"


def _changed(entry: Entry, value: Any, when: str, advice: str) -> MutatedError:
    who = repr(entry.name) if entry.named else "an unnamed entry"
    return MutatedError(
        f"the value of {who}, a {type(value).__name__}, was changed {when}, which leaves its blob and"
        " its checkpoints as they were: the change will be lost, or not, as memory happens to come free."
        f" {advice}",
        name=entry.name if entry.named else None,
    )


def _replacing(entry: Entry) -> str:
    return f"`pool[{entry.name!r}] = value` replaces the value; " if entry.named else "Put another value; or "
