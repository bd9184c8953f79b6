"""``Fb``: a handle, which owns an entry.

Guarantees
----------
- An entry lives as long as its name or one of its handles; the last one dropped drops it.
- A handle's finalizer appends to a queue and does nothing else (invariant 7).
- ``repr`` neither loads nor pins.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Hashable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fbcache.checkpoint.persisting import persist, spawn_persist
from fbcache.checkpoint.tracked import TrackedDirectory
from fbcache.entry import MISSING, Entry, State
from fbcache.freezing import deep_copy, take_over
from fbcache.guard import Engine, ReadGuard
from fbcache.leash import HeldReadGuard, HeldWriteGuard, try_read, try_write
from fbcache.waiting import Answer, Step, Work
from fbcache.writeguard import WriteGuard

if TYPE_CHECKING:
    from fbcache.pool import FBPool


class Fb:
    """A handle: owns an entry, and gives guards on it.

    Handles come from ``pool.put``, ``pool.insert`` and :meth:`clone`. A name counts as one more
    owner, so the handle that ``put`` returns shares its entry with the name.
    """

    __slots__ = ("__weakref__", "_entry", "_pool")

    def __init__(self, pool: FBPool) -> None:
        self._entry: Entry | None = None
        self._pool = pool

    def _own(self, entry: Entry) -> Fb:
        """Become an owner of ``entry``. Under the lock, or before anybody else knows it."""
        # Straight line: the handle counts exactly when it refers to the entry.
        entry.handles += 1
        self._entry = entry
        return self

    def __repr__(self) -> str:
        entry = self._entry
        if entry is None:
            return "<Fb, dropped>"
        who = repr(entry.name) if entry.named else "unnamed"
        return f"<Fb {who}: {entry.state.name}, {entry.nbytes:,} bytes>"

    def __reduce__(self) -> Any:
        raise TypeError("a handle cannot be pickled; pickle the value, or share a checkpoint")

    def __del__(self) -> None:
        try:
            entry, engine = self._entry, self._pool._engine
        except AttributeError:  # __init__ did not get that far
            return
        if entry is not None:
            self._entry = None
            engine.residency.lost_handles.append(entry)
            if not entry.named:
                engine.workers.submit(engine.residency.reap)

    # ------------------------------------------------------------------------- what it is

    @property
    def pool(self) -> FBPool:
        """The pool the entry is in."""
        return self._pool

    @property
    def key(self) -> UUID:
        """The key of the content as it is now; another one after each mutation."""
        residency = self._engine.residency
        residency.check_open()
        return residency.run(residency.keys.expose, self._owned)

    @property
    def name(self) -> Hashable:
        """The entry's name, or None when it has none, or no longer."""
        entry = self._owned
        return entry.name if entry.named else None

    @property
    def nbytes(self) -> int:
        """The value's size in memory, in bytes, as the pool counts it."""
        return self._owned.nbytes

    @property
    def state(self) -> State:
        """Where the value is now."""
        return self._owned.state

    # ------------------------------------------------------------------------- ownership

    def clone(self) -> Fb:
        """Return one more handle on the same entry.

        Raises
        ------
        KeyError
            This handle was dropped.
        """
        engine = self._engine
        return engine.residency.run(self._clone)

    def _clone(self) -> Fb:
        self._engine.residency.check_open()
        entry = self._owned
        return Fb(self._pool)._own(entry)

    def drop(self) -> None:
        """Give up ownership now; with the last owner the value and its blob go. May be repeated."""
        residency = self._engine.residency
        residency.run(self._drop)

    def _drop(self) -> None:
        entry = self._entry
        if entry is not None:
            # Straight line: the finalizer counts the same handle, and must not count it twice.
            self._entry = None
            entry.handles -= 1
            self._engine.residency.disown(entry)

    # ---------------------------------------------------------------------------- guards

    def load(self) -> ReadGuard:
        """Return a guard for reading. Nothing is loaded until it is entered."""
        guard = self._engine.read_guard(self._owned, self._engine)
        guard.source = self
        return guard

    def load_mut(self, *, rollback: bool = False) -> WriteGuard:
        """Return a guard for writing; the entry, and its key, change for all who share it."""
        guard = WriteGuard(self._owned, self._engine, rollback=rollback)
        guard.source = self
        return guard

    def try_load(self) -> HeldReadGuard | None:
        """Return a held guard for reading if the value is in memory and free now, else None."""
        return try_read(self.load())

    def try_load_mut(self) -> HeldWriteGuard | None:
        """Return a held guard for writing if the value is in memory and free now, else None."""
        return try_write(self.load_mut())

    def make_mut(self, *, rollback: bool = False) -> WriteGuard:
        """Return a guard for writing that leaves all others who share the entry their value.

        When it is entered and the entry has other owners, a name included, this handle moves to
        an entry of its own with the same content: without a copy in memory where there is a blob.
        """
        return MakeMutGuard(self, self._engine, rollback=rollback)

    # ---------------------------------------------------------------------------- writing

    def spawn_write_now(self) -> Future[None]:
        """Have the value's blob written in the background.

        Returns
        -------
        Future
            Ends when the blob is whole, or with the error; at once when there is a blob already.
        """
        engine = self._engine
        engine.residency.check_open()
        future: Future[None] = Future()
        engine.residency.run(engine.residency.request_write, self._owned, future)
        return future

    def write_now(self) -> None:
        """Write the value's blob now, and keep the value in memory.

        Raises
        ------
        StorageError, UnsupportedTypeError
            It could not be written; the value is still in memory.
        DeadlockError
            The caller holds the entry for writing.
        """
        residency = self._engine.residency
        residency.check_open()
        answer = Answer()
        residency.run(residency.request_write_and_wait, self._owned, answer)
        answer.wait()
        answer.raise_error()

    # --------------------------------------------------------------------------- lasting

    def persist(
        self, tracked: TrackedDirectory | str | os.PathLike[str], *, allow_pickle: bool = False
    ) -> UUID:
        """Give the content as it is now a durable place: a hard link to its blob where that can be.

        What is in memory only is written once, for the pool and for ``tracked``. Where the key is
        present already, nothing is done. It stays until ``tracked.delete(key)``, and is durable once
        ``tracked.sync()`` has returned.

        Parameters
        ----------
        tracked : TrackedDirectory or path
            Where to.
        allow_pickle : bool
            Persist a value that needs pickle too; to register it takes the same argument.

        Returns
        -------
        UUID
            The key under which it is there.

        Raises
        ------
        PickleRefusedError
            The value needs pickle; the message names its entry and type.
        UnsupportedTypeError
            It cannot be encoded.
        DeadlockError
            The caller holds the entry for writing.
        DirectoryInUseError
            Another process has the directory open for writing.
        ReadOnlyError
            It was opened for reading only.
        StorageError, DiskFullError
            It could not be written or linked.

        After an error the directory and the pool are as they were.
        """
        return persist(self._engine, self._owned, tracked, allow_pickle=allow_pickle)

    def spawn_persist(
        self, tracked: TrackedDirectory | str | os.PathLike[str], *, allow_pickle: bool = False
    ) -> Future[UUID]:
        """Do what :meth:`persist` does, in the background, with the content as it is now.

        Returns
        -------
        Future
            Ends with the key, or with what :meth:`persist` raises.
        """
        return spawn_persist(self._engine, self._owned, tracked, allow_pickle=allow_pickle)

    @property
    def _engine(self) -> Engine:
        return self._pool._engine

    @property
    def _owned(self) -> Entry:
        entry = self._entry
        if entry is None:
            raise KeyError("this handle was dropped; clone a handle before dropping it")
        return entry


class MakeMutGuard(WriteGuard):
    """A write guard that first moves its handle to an entry of its own."""

    __slots__ = ("_handle", "_source")

    def __init__(self, handle: Fb, engine: Engine, *, rollback: bool) -> None:
        super().__init__(handle._owned, engine, rollback=rollback)
        self._handle = handle
        self._source: ReadGuard | None = None

    def _advance(self, loop: asyncio.AbstractEventLoop | None) -> Step | None:
        if not self.held:
            step = self._separate(loop)
            if step is not None:
                return step
        return super()._advance(loop)

    def _separate(self, loop: asyncio.AbstractEventLoop | None) -> Step | None:
        residency = self._residency
        residency.check_open()
        entry = self._entry = self._handle._owned
        if self._source is not None and self._source.wanted is not entry:  # another guard has moved it
            self._leave_source()
        source = self._source
        if source is None and entry.handles + entry.named <= 1:
            return None
        if entry.token is not None:
            self._move(_twin_on_disk(entry))
            return None
        if source is None:
            source = self._source = ReadGuard(entry, self._engine)
            source.owner = self.owner
        step = source._advance(loop)
        if step is not None:
            return step
        return Work(partial(self._copy_and_move, self._attempt), self._engine.workers)

    def _copy_and_move(self, attempt: int) -> None:
        entry = self._entry
        if entry in self._residency.noted:
            self._engine.promises.check_before(entry, entry.value, partial(self._goes_on, attempt))
        twin = Entry(take_over(deep_copy(entry.value)), entry.nbytes, fixed=entry.fixed)
        self._residency.run(self._move_to_copy, attempt, twin)

    def _move_to_copy(self, attempt: int, twin: Entry) -> None:
        self._residency.check_open()
        # Cancelled; or dropped, or moved by another guard.
        if not self._goes_on(attempt) or self._handle._entry is not self._entry:
            return
        # It takes the place of a value being loaded: room is found when the guard leaves.
        self._residency.admit(twin)
        self._move(twin)

    def _move(self, twin: Entry) -> None:
        entry = self._entry
        self._residency.entries.add(twin)
        self._residency.inherit(entry, twin)
        # Straight line.
        twin.handles = 1
        entry.handles -= 1
        self._entry = twin
        self._handle._entry = twin
        self._leave_source()
        self._residency.disown(entry)

    def _leave_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.withdraw()

    def withdraw(self) -> None:
        """Undo whatever entering has come to. Under the lock."""
        self._leave_source()
        super().withdraw()


def _twin_on_disk(entry: Entry) -> Entry:
    """Return a spilled entry that shares the blob of ``entry``."""
    twin = Entry(MISSING, entry.nbytes, fixed=entry.fixed)
    token = entry.token
    assert token is not None
    # Straight line.
    token.shares += 1
    twin.token = token
    twin.state = State.SPILLED
    return twin
