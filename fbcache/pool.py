"""``FBPool``: names, and the public face. What happens is decided in the rooms below.

Guarantee: a name leads to one entry at every instant, and a ``put`` that raises leaves the former
one in place. The table of names is guarded by the pool's lock; a look-up needs no lock, for
a dictionary's ``get`` is atomic.
"""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Literal
from uuid import UUID

import cachetools

from fbcache import audit
from fbcache.adoptee import Adoptee
from fbcache.checkpoint.persisting import persist
from fbcache.checkpoint.progress import Meter, check_progress
from fbcache.checkpoint.registering import register
from fbcache.checkpoint.restoring import check_names, restore
from fbcache.checkpoint.saver import Checkpoint, check_commit
from fbcache.checkpoint.tracked import TrackedDirectory, directory_of, saving
from fbcache.codec import MsgpackCodec
from fbcache.codec.frames import Codec
from fbcache.engine import Engine
from fbcache.entry import MISSING, Entry, State
from fbcache.errors import InternalError, PutTimeoutError
from fbcache.events import Sink, telling
from fbcache.freezing import deep_copy, take_over
from fbcache.guard import ReadGuard
from fbcache.handle import Fb
from fbcache.leash import HeldReadGuard, HeldWriteGuard, try_read, try_write
from fbcache.memory import default_budget, parse_size
from fbcache.sizeof import measure
from fbcache.stats import PoolStats
from fbcache.store.choice import STORES
from fbcache.store.protocol import BlobStore, StoreLimits
from fbcache.store.session import Session
from fbcache.waiting import Answer, Waiter
from fbcache.writeguard import WriteGuard

_RAISE: Any = object()


class FBPool:
    """More Python objects than fit in memory: an LRU with a budget in bytes, spilling to files.

    Parameters
    ----------
    memory : int or str, optional
        The budget: bytes, ``"2GB"``, ``"512MiB"``, or ``"50%"`` of what this process may use.
        Default: half of that, the limits of control groups included.
    directory : path, optional
        Where the pool makes its private session directory. Default: the user's cache directory.
    store : str or BlobStore
        Where blobs go: ``"auto"`` (default), small ones packed together and large ones in files of their
        own; ``"files"``, ``"packed"`` or ``"diskcache"``, all of them in one way; or a store, which the
        pool takes over, and closes. ``directory``, ``max_disk``, ``min_free`` and ``mmap`` are then its own.
    codec : Codec, optional
        How values become frames. Default: :class:`~fbcache.MsgpackCodec`.
    policy : str or class, optional
        Who is evicted first: ``"lru"`` (default), ``"lfu"``, ``"fifo"``, ``"rr"``, or one of
        cachetools' classes of those names.
    max_disk : int or str, optional
        Most bytes of blobs on disk.
    min_free : int or str, optional
        Bytes of the file system to leave free.
    io_threads : int, optional
        Threads that write, load and delete. Default: one for each processor, at most 4.
    mmap : bool, optional
        Whether values come back as views of their file; otherwise they are read into memory.
    verify : {"first", "always", "never"}, optional
        When the payload of a blob is compared with its checksums: at the first load of one that this
        pool did not write itself, at every load, or never. Headers are always checked.
    put_timeout : float, optional
        Most seconds that ``put`` and ``insert`` wait for memory to come free. Default: no limit.
    debug : bool, optional
        Whether guards compare fingerprints of the value at both ends of the block, and raise MutatedError if
        it was changed without :meth:`get_mut`. For what cannot be made read-only: dicts, lists, objects,
        frames. Each guard then costs about what writing the value does.
    events : Recorder, optional
        Who takes a :class:`~fbcache.events.PoolEvent` for each eviction, load, stall, mutation, persist
        and error: a recorder, which stays the caller's to close, or any object with such a ``save``. What
        it does not take is counted, and ``drain`` or ``close`` warns of it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or out of range.
    StorageError
        The session directory cannot be made.

    Notes
    -----
    Every method may be called from any thread. ``put`` may block; under asyncio call it through
    ``asyncio.to_thread``. Guards serve ``with`` and ``async with`` alike.
    """

    def __init__(
        self,
        memory: int | str | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        store: BlobStore | str | None = "auto",
        codec: Codec | None = None,
        policy: str | type[cachetools.Cache[Any, Any]] = "lru",
        max_disk: int | str | None = None,
        min_free: int | str = "512MB",
        io_threads: int | None = None,
        mmap: bool = True,
        verify: Literal["first", "always", "never"] = "first",
        put_timeout: float | None = None,
        debug: bool = False,
        events: Sink | None = None,
    ) -> None:
        budget = default_budget() if memory is None else parse_size(memory)
        limits = StoreLimits(
            max_disk=None if max_disk is None else parse_size(max_disk, name="max_disk"),
            min_free=parse_size(min_free, name="min_free", least=0),
        )
        self._put_timeout = _check_timeout(put_timeout)
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify is 'first', 'always' or 'never', not {verify!r}")
        threads = _check_threads(io_threads)
        _check_part("codec", codec, "encode", "decode", "name")
        if store is None:
            store = "auto"
        if not isinstance(store, str):
            _check_part("store", store, "write", "read", "delete", "close")
        elif store not in STORES:
            raise ValueError(f"store is one of {', '.join(map(repr, STORES))} or a store, not {store!r}")
        _check_part("events", events, "save")
        session = None
        try:
            blobs: BlobStore
            if isinstance(store, str):
                session = Session.open(directory)
                blobs = STORES[store](session.path, limits=limits, mmap=mmap)
            else:
                blobs = store
            self._engine = Engine(
                budget=budget,
                codec=MsgpackCodec() if codec is None else codec,
                store=blobs,
                session=session,
                policy=policy,
                io_threads=threads,
                verify=verify,
                events=events,
                debug=debug,
            )
        except BaseException:
            if session is not None:
                session.close()
            raise

    def __repr__(self) -> str:
        residency = self._engine.residency
        state = "closed" if residency.closed else f"{len(residency.entries):,} entries"
        return f"<FBPool: {state}, {residency.resident_bytes:,} of {residency.budget:,} bytes in memory>"

    def __reduce__(self) -> Any:
        raise TypeError("a pool cannot be pickled; make one in each process")

    # ---------------------------------------------------------------------------- putting

    def put(
        self,
        name: Hashable,
        value: Any,
        *,
        copy: bool = False,
        nbytes: int | None = None,
        codec: Codec | None = None,
    ) -> Fb:
        """Store ``value`` under ``name``, in place of what has the name now.

        The pool takes the value over: arrays become read-only, also for the caller's variable; a
        view of memory that something else could write is copied. What cannot be frozen (a
        dict, a list) must not be changed any more, except through :meth:`get_mut`.

        Parameters
        ----------
        name : hashable
            Anything but a UUID.
        value : Any
            What to keep.
        copy : bool
            Copy the value first, and leave the caller's as it is.
        nbytes : int, optional
            Its size in memory, instead of measuring it.
        codec : Codec, optional
            How this entry is encoded, now and after changes, instead of the pool's way: one whose frames
            every pool can read, such as :class:`~fbcache.Compressed`.

        Returns
        -------
        Fb
            A handle. The name owns the entry too, so that the handle may be dropped.

        Raises
        ------
        TypeError, ValueError
            The name is not hashable or is a UUID; ``nbytes`` is not a number of bytes.
        PutTimeoutError
            No memory came free within ``put_timeout``.
        DiskFullError, StorageError
            Memory was to come free, and what should leave it could not be written.
        PoolClosedError, ForkedPoolError
            The pool is gone.

        After an error nothing is stored, and the name's former value stands.
        """
        _check_name(name)
        return self._store(value, copy, nbytes, name, codec)

    def insert(
        self, value: Any, *, copy: bool = False, nbytes: int | None = None, codec: Codec | None = None
    ) -> Fb:
        """Store ``value`` without a name: it lives as long as a handle on it does.

        Parameters, errors and the state after one are those of :meth:`put`.
        """
        return self._store(value, copy, nbytes, MISSING, codec)

    def _store(
        self, value: Any, copy: bool, nbytes: int | None, name: Hashable, codec: Codec | None
    ) -> Fb:
        engine = self._engine
        residency = engine.residency
        residency.check_open()
        if codec is not None:
            engine.spiller.check_codec(codec)
        entry = _make_entry(value, copy, nbytes)
        del value
        if engine.read_guard is not ReadGuard:
            engine.promises.note(entry, entry.value)
        if codec is not None:
            residency.codecs[entry] = codec
        entry.name = None if name is MISSING else name
        fb = Fb(self)
        fb._own(entry)
        try:
            if entry.nbytes > residency.budget:
                self._spill_at_once(entry)
            else:
                waiter = residency.run(self._admit, name, entry)
                if waiter is None:
                    return fb
                self._await_admission(waiter, entry)
            if name is not MISSING:
                residency.run(self._install, name, entry)
        except BaseException:
            fb._entry = None
            entry.handles = 0
            residency.codecs.pop(entry, None)
            residency.noted.pop(entry, None)
            residency.run(residency.give_up_admission, entry)
            raise
        return fb

    def _admit(self, name: Hashable, entry: Entry) -> Waiter | None:
        """Let the entry in, and give it its name; or return what has to be waited for first."""
        waiter = self._engine.residency.admit_or_wait(entry)
        if waiter is None and name is not MISSING:
            self._install(name, entry)
        return waiter

    def _await_admission(self, waiter: Waiter, entry: Entry) -> None:
        if not waiter.sleep(self._put_timeout):
            raise self._too_late(entry)
        waiter.raise_error()

    def _spill_at_once(self, entry: Entry) -> None:
        """Admit a value larger than the budget, and wait until it is on disk."""
        residency = self._engine.residency
        written = Answer()
        residency.run(residency.admit_oversize, entry, written)
        if not written.wait(self._put_timeout):
            raise PutTimeoutError(
                f"a value larger than the budget was not written within {self._put_timeout} s; "
                "nothing was stored"
            )
        written.raise_error()

    def _too_late(self, entry: Entry) -> PutTimeoutError:
        return PutTimeoutError(
            f"no room for {entry.nbytes:,} bytes came free within {self._put_timeout} s; nothing "
            "was stored. Leave some guards, or give the pool more memory or a faster disk"
        )

    def _install(self, name: Hashable, entry: Entry) -> None:
        residency = self._engine.residency
        residency.check_open()
        names = self._engine.names
        former = names.get(name)
        entry.name = name
        # Straight line.
        names[name] = entry
        entry.named = True
        if former is not None:
            former.named = False
            residency.disown(former)

    # ---------------------------------------------------------------------------- getting

    def get(self, name_or_key: Hashable) -> ReadGuard:
        """Return a guard for reading: ``with pool.get(name) as value``.

        Nothing is loaded or pinned before the guard is entered.

        Parameters
        ----------
        name_or_key : hashable
            A name, or the current key of an entry.

        Raises
        ------
        KeyError
            Neither a name nor a key of this pool.
        StaleKeyError
            A mutation has replaced the key.
        TypeError
            It is not hashable.
        PoolClosedError, ForkedPoolError
            The pool is gone.
        """
        entry = self._look_up(name_or_key)
        engine = self._engine
        # Not `named` alone: another thread may have given the name to another entry just now.
        name = name_or_key if entry.named or type(name_or_key) is not UUID else MISSING
        return engine.read_guard(entry, engine, name)

    def get_mut(self, name_or_key: Hashable, *, rollback: bool = False) -> WriteGuard:
        """Return a guard for writing: ``with pool.get_mut(name) as value``.

        Entering it waits until nobody else holds the entry, and gives the entry a new key. Errors
        are those of :meth:`get`. While writes fail and memory is over the budget, entering tries
        one and raises its DiskFullError or StorageError; the value stays as it was.

        Parameters
        ----------
        rollback : bool
            Bring the former content and key back if the block raises. That is free where the
            entry is on disk, and takes a copy where not.
        """
        entry = self._look_up(name_or_key)
        name = name_or_key if entry.named or type(name_or_key) is not UUID else MISSING
        return WriteGuard(entry, self._engine, name, rollback=rollback)

    def try_get(self, name_or_key: Hashable) -> HeldReadGuard | None:
        """Return a held guard for reading if the value is in memory and free now, else None.

        Raises
        ------
        DeadlockError
            This thread or task holds the entry for writing.
        KeyError, TypeError
            As for :meth:`get`.
        """
        return try_read(self.get(name_or_key))

    def try_get_mut(self, name_or_key: Hashable) -> HeldWriteGuard | None:
        """Return a held guard for writing if the value is in memory and free now, else None.

        It is not free while it is being written.

        Raises
        ------
        DeadlockError
            This thread or task holds the entry already.
        KeyError, TypeError
            As for :meth:`get`.
        """
        return try_write(self.get_mut(name_or_key))

    def __getitem__(self, name: Hashable) -> Any:
        """Return the value, read-only, without pinning it.

        An array is the pool's own memory, not a copy: a later ``get_mut`` may change it in place.
        ``get`` keeps writers out for as long as its block runs.
        """
        engine = self._engine
        try:
            entry = engine.names.get(name)
        except TypeError:
            entry = None
        residency = engine.residency
        # Over the budget the guard's way is taken: its exit sends another in the place of this one.
        if entry is not None and residency.resident_bytes <= residency.budget:
            value = entry.value
            if value is not MISSING:
                residency.hits += 1
                if entry.order is not residency.front:
                    with residency.lock:
                        if entry.value is not MISSING:
                            residency.touch(entry)
                return value
        with self.get(name) as value:
            return value

    def _look_up(self, name_or_key: Hashable) -> Entry:
        try:
            entry = self._engine.names.get(name_or_key)
        except TypeError as error:
            raise TypeError(f"a name must be hashable, such as a string or a tuple: {error}") from None
        if entry is not None:
            return entry
        residency = self._engine.residency
        residency.check_open()
        if isinstance(name_or_key, UUID):
            return residency.run(residency.keys.find, name_or_key)
        raise self._unknown(name_or_key)

    def _unknown(self, name: Hashable) -> KeyError:
        message = f"no entry is named {name!r}"
        if isinstance(name, str):
            names = [n for n in list(self._engine.names)[:10_000] if isinstance(n, str)]
            near = difflib.get_close_matches(name, names, n=1)
            if near:
                message += f"; did you mean {near[0]!r}?"
        return KeyError(message)

    # --------------------------------------------------------------------------- as a dict

    def __setitem__(self, name: Hashable, value: Any) -> None:
        """Store ``value`` under ``name``, as :meth:`put` does."""
        self.put(name, value)

    def __delitem__(self, name: Hashable) -> None:
        """Remove the name, as :meth:`delete` does."""
        self.delete(name)

    def __contains__(self, name_or_key: object) -> bool:
        """Whether it is a name, or the current key of an entry."""
        try:
            self._look_up(name_or_key)
        except KeyError:
            return False
        return True

    def __len__(self) -> int:
        """Return the number of named entries."""
        return len(self._engine.names)

    def __iter__(self) -> Iterator[Hashable]:
        """Go through the names there are now."""
        return iter(self.keys())

    def keys(self) -> list[Hashable]:
        """Return the names there are now, oldest first."""
        return list(self._engine.names)

    def delete(self, name: Hashable) -> None:
        """Remove ``name``. Its entry goes too, unless handles or entered guards have it.

        Raises
        ------
        KeyError
            There is no such name.
        """
        self._look_up(name)
        self._engine.residency.run(self._unname, name, None)

    def pop(self, name: Hashable, default: Any = _RAISE) -> Any:
        """Remove ``name`` and return its value, read-only.

        Raises
        ------
        KeyError
            There is no such name, and no default.
        CorruptBlobError, StorageError
            The value could not be loaded; the name stands.
        """
        residency = self._engine.residency
        fb = Fb(self)
        try:
            self._look_up(name)
            residency.run(self._unname, name, fb)
        except KeyError:
            if default is _RAISE:
                raise
            return default
        entry = fb._owned
        try:
            with fb.load() as value:
                return value
        except BaseException:
            residency.run(self._rename, name, entry)
            raise
        finally:
            fb.drop()

    def _unname(self, name: Hashable, heir: Fb | None) -> None:
        """Take the name off its entry; ``heir`` owns it instead."""
        names = self._engine.names
        entry = names.get(name)
        if entry is None:
            raise self._unknown(name)
        if heir is not None:
            heir._own(entry)
        # Straight line.
        del names[name]
        entry.named = False
        self._engine.residency.disown(entry)

    def _rename(self, name: Hashable, entry: Entry) -> None:
        if name not in self._engine.names:
            self._install(name, entry)

    # ------------------------------------------------------------------------- what lasts

    def persist(
        self,
        name: Hashable,
        tracked: TrackedDirectory | str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
    ) -> UUID:
        """Give one value a durable place; see :meth:`Fb.persist <fbcache.Fb.persist>`.

        Raises
        ------
        KeyError
            There is no such name. Other errors, and the state after one, are those of ``Fb.persist``.
        """
        while True:
            entry = self._look_up(name)
            try:
                return persist(self._engine, entry, tracked, allow_pickle=allow_pickle)
            except KeyError:
                if entry.state is not State.DROPPED:
                    raise
                # Another entry may have been given the name just now.

    def register(
        self,
        tracked: TrackedDirectory | str | os.PathLike[str],
        key: UUID,
        name: Hashable = MISSING,
        *,
        replace: bool = False,
        allow_pickle: bool = False,
    ) -> Fb:
        """Return a handle on an entry whose content is the blob of ``key``. Nothing is loaded.

        Parameters
        ----------
        tracked : TrackedDirectory or path
            Where the blob is. It may be closed afterwards; the entry needs it no more.
        key : UUID
            What ``persist`` returned, or any key in ``tracked``. What checkpoints have packed there alone is
            copied into the pool's own store.
        name : hashable, optional
            A name for the entry; without one it lives as long as a handle does.
        replace : bool
            Take the name over from an entry that has it.
        allow_pickle : bool
            Take a blob that was pickled, which may run any code when it is loaded.

        Raises
        ------
        KeyError
            The key is not present.
        NameTakenError
            The name is taken.
        PickleRefusedError
            The value was pickled.
        CorruptBlobError
            The blob's header is damaged.
        StorageError
            It could not be read.

        After an error the pool is as it was.
        """
        if name is not MISSING:
            _check_name(name)
        directory = directory_of(tracked, write=False)
        return self._own_all(
            register(self._engine, directory, [key], name, replace=replace, allow_pickle=allow_pickle)
        )[0]

    def register_all(
        self, tracked: TrackedDirectory | str | os.PathLike[str], *, allow_pickle: bool = False
    ) -> list[Fb]:
        """Return a handle for each key in ``tracked``, as :meth:`register` does, all or none."""
        directory = directory_of(tracked, write=False)
        if not isinstance(tracked, TrackedDirectory):
            with TrackedDirectory(tracked, readonly=True) as opened:
                keys = opened.keys()
        else:
            keys = tracked.keys()
        return self._own_all(
            register(self._engine, directory, keys, MISSING, replace=False, allow_pickle=allow_pickle)
        )

    def _own_all(self, adoptees: Sequence[Adoptee]) -> list[Fb]:
        return self._engine.residency.run(self._take_over, adoptees)

    def _take_over(self, adoptees: Sequence[Adoptee]) -> list[Fb]:
        handles = []
        for adoptee in adoptees:
            entry = adoptee.entry
            assert entry is not None
            handles.append(Fb(self)._own(entry))
            if entry.key is not None:
                self._engine.residency.keys.expose(entry)
            self._engine.residency.release_adoptee(adoptee)
        return handles

    def save(
        self,
        tracked: TrackedDirectory | str | os.PathLike[str],
        names: Iterable[Hashable] | None = None,
        *,
        tag: str | None = None,
        keep: int | None = 1,
        meta: dict[Any, Any] | None = None,
        change_key: Callable[[Checkpoint], object] | None = None,
        wait: bool = True,
        allow_pickle: bool = False,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Checkpoint:
        """Write a checkpoint: what is under these names now, atomically and durably.

        The checkpoint has each value as it is when the save begins; of one that is being changed then, what
        that change comes to. Reading and changing go on meanwhile. What has not changed since it
        was last saved or persisted there is not written again.

        Parameters
        ----------
        tracked : TrackedDirectory or path
            Where to; a path is made if it is missing, and held for this call only.
        names : iterable of names, optional
            What to save; by default all that has a name.
        tag : str, optional
            A name for this version. It stays until ``forget``; a tag given before moves to it.
        keep : int or None
            How many untagged versions stay, this one included; None for all.
        meta : dict, optional
            Anything of msgpack's types, kept with the checkpoint.
        change_key : callable, optional
            Called with the checkpoint after it is committed and before former ones are removed. When
            it raises, the new version is withdrawn and the former one stands.
        wait : bool
            Wait for another save to the directory to end, or raise.
        allow_pickle : bool
            Save values that need pickle too; to restore them takes the same argument.
        progress : bool or callable
            True for a bar (needs ``fbcache[progress]``), or a function of ``(done, total)`` in bytes.

        Returns
        -------
        Checkpoint
            What was saved.

        Raises
        ------
        KeyError
            There is no such name.
        TypeError, ValueError, UnsupportedTypeError
            An argument is of the wrong kind, or a name or value cannot be encoded.
        PickleRefusedError
            A value needs pickle; the message names its entry and type.
        DeadlockError
            The caller holds an entry for writing.
        DirectoryInUseError
            Another process has the directory open; or, with ``wait=False``, saves to it.
        ReadOnlyError
            The directory was opened for reading only.
        StorageError, DiskFullError
            Something could not be written, or made durable.

        After an error, and after an interrupt that comes before the checkpoint is committed, the former one
        is the newest; the pool is as it was.
        """
        names = None if names is None else check_names(names)
        check_commit(tag, keep, meta, change_key)
        check_progress(progress)
        directory = directory_of(tracked, write=True)
        self._engine.residency.check_open()
        with (
            telling(self._engine.residency.log, None, directory.root) as outcome,
            Meter(progress, f"save {directory.root}") as meter,
            saving(directory, wait=wait, allow_pickle=allow_pickle) as saver,
        ):
            saver.gather_named(self._engine, names, self._unknown, meter)
            checkpoint = saver.finish(tag, keep, meta, change_key, meter)
            outcome.nbytes = checkpoint.nbytes
            outcome.detail = f"checkpoint {checkpoint.version} in {directory.root}"
        return checkpoint

    def restore(
        self,
        tracked: TrackedDirectory | str | os.PathLike[str],
        names: Iterable[Hashable] | None = None,
        *,
        version: int | None = None,
        tag: str | None = None,
        before: float | datetime | None = None,
        replace: bool = False,
        allow_pickle: bool = False,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Checkpoint:
        """Bring the entries of a checkpoint into this pool, under their names. Nothing is decoded.

        Large values are used where they lie, and stay there as long as they are needed. Small ones, which
        a checkpoint packs together, are copied into the pool's own store.

        Parameters
        ----------
        tracked : TrackedDirectory or path
            Where the checkpoint is. Others may write there meanwhile and afterwards.
        names : iterable of names, optional
            Which of its entries; by default all.
        version, tag, before : optional
            Which checkpoint: by number, by tag, or the newest from a time or earlier (a datetime, local
            time where it has no zone, or seconds since the epoch). By default the newest.
        replace : bool
            Take names over from entries that have them.
        allow_pickle : bool
            Take entries that were pickled, which may run any code when they are loaded.
        progress : bool or callable
            As for :meth:`save`.

        Returns
        -------
        Checkpoint
            What it is the checkpoint of; ``names`` has all that it holds.

        Raises
        ------
        CheckpointNotFoundError
            There is none, or none like that.
        KeyError
            It has no entry of such a name.
        NameTakenError
            A name is taken.
        PickleRefusedError
            An entry was pickled; the message names it and its type.
        CorruptCheckpointError
            The manifest is damaged, or of a newer format.
        StorageError, DiskFullError
            It could not be read; or the pool's store could not take what is copied.

        After an error the pool is as it was. A blob that is damaged shows when its entry is loaded.
        """
        check_progress(progress)
        return restore(
            self._engine,
            directory_of(tracked, write=False),
            names,
            version=version,
            tag=tag,
            before=before,
            replace=replace,
            allow_pickle=allow_pickle,
            progress=progress,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: TrackedDirectory | str | os.PathLike[str],
        *,
        version: int | None = None,
        tag: str | None = None,
        before: float | datetime | None = None,
        allow_pickle: bool = False,
        **pool_options: Any,
    ) -> FBPool:
        """Return a new pool with the entries of a checkpoint; ``pool_options`` are those of ``FBPool``.

        Errors are those of ``FBPool`` and of :meth:`restore`; after one there is no pool.
        """
        pool = cls(**pool_options)
        try:
            pool.restore(path, version=version, tag=tag, before=before, allow_pickle=allow_pickle)
        except BaseException:
            pool.close()
            raise
        return pool

    # ------------------------------------------------------------------------- the budget

    @property
    def memory(self) -> int:
        """The budget in bytes."""
        return self._engine.residency.budget

    def resize(self, memory: int | str) -> None:
        """Change the budget. Values above a smaller one are written and dropped in the background.

        Raises
        ------
        TypeError, ValueError
            It is no size; the budget stays.
        """
        residency = self._engine.residency
        residency.run(residency.resize, parse_size(memory))

    def evict(self, names: Iterable[Hashable] | None = None, *, nbytes: int | None = None) -> int:
        """Write values and drop them from memory; wait for it.

        Parameters
        ----------
        names : iterable of names, optional
            Which; by default all that is not pinned, next to leave first.
        nbytes : int, optional
            Stop after this many bytes.

        Returns
        -------
        int
            Bytes freed. Pinned values are passed over.

        Raises
        ------
        KeyError
            A name is unknown; nothing was done.
        DiskFullError, StorageError, UnsupportedTypeError, MutatedError
            A value could not be written, or with ``debug=True`` was changed; it is still in memory. The
            others were dropped.
        """
        if nbytes is not None and (isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0):
            raise ValueError(f"nbytes is a number of bytes from 0 up, not {nbytes!r}")
        residency = self._engine.residency
        residency.check_open()
        if names is None:
            entries = residency.run(residency.evictable, nbytes)
        else:
            entries = [self._look_up(name) for name in names]
        return self._evict(entries, nbytes)

    def _evict(self, entries: list[Entry], nbytes: int | None) -> int:
        residency = self._engine.residency
        planned = 0
        written: list[tuple[Entry, Answer]] = []
        for entry in entries:
            if nbytes is not None and planned >= nbytes:
                break
            answer = Answer()
            if residency.run(residency.request_eviction, entry, answer):
                planned += entry.nbytes
                written.append((entry, answer))
        freed = 0
        failed: BaseException | None = None
        for entry, answer in written:
            answer.wait()
            error = answer.error
            if error is None:
                freed += residency.run(residency.evict_if_possible, entry)
            elif failed is None:
                failed = error
            else:
                failed.add_note(f"and: {error!r}")
        if failed is not None:
            try:
                raise failed
            finally:
                del failed, error, answer, written  # they refer to each other through this frame
        return freed

    def drain(self) -> None:
        """Wait until nothing is being written, loaded or deleted in the background.

        Raises
        ------
        StorageError, UnsupportedTypeError
            The first error of a background write that no call has raised yet. Its value is
            still in memory. A second call does not raise it again.

        Warns of events that the pool's recorder did not take.
        """
        residency = self._engine.residency
        residency.check_open()
        while (waiter := residency.run(residency.idle)) is not None:
            waiter.run()
        error = residency.run(residency.take_background_error)
        try:
            if error is not None:
                raise error
            if residency.log is not None:
                residency.log.warn_of_missed(stacklevel=2)
        finally:
            del error  # it refers to this frame

    # ---------------------------------------------------------------------------- insight

    def stats(self) -> PoolStats:
        """Return the pool's figures, all of one instant."""
        residency = self._engine.residency
        residency.check_open()
        return residency.run(self._stats)

    def _stats(self) -> PoolStats:
        r = self._engine.residency
        spilled = [e for e in r.entries if e.state in (State.SPILLED, State.LOADING)]
        return PoolStats(
            entries=len(r.entries),
            named=len(self._engine.names),
            budget=r.budget,
            resident_bytes=r.resident_bytes,
            pinned_bytes=r.pinned_bytes,
            writing_bytes=r.writing_bytes,
            lingering_bytes=sum(e.nbytes for e, ghost in r.ghosts.items() if ghost.alive),
            spilled_bytes=sum(e.nbytes for e in spilled),
            disk_bytes=self._engine.store.disk_bytes,
            hits=r.hits,
            misses=r.misses,
            loads=r.loads,
            spills=r.spills,
            evictions=r.evictions,
            clean_evictions=r.clean_evictions,
            bytes_written=r.bytes_written,
            bytes_read=r.bytes_read,
            stalls=r.stalls,
            stall_seconds=r.stall_seconds,
            errors=r.errors,
        )

    def validate(self) -> None:
        """Recount everything from scratch, and compare it with the pool's own counts.

        For tests and for doubt; takes time in proportion to the number of entries.

        Raises
        ------
        InternalError
            Something disagrees: a bug in fbcache.
        """
        residency = self._engine.residency
        residency.check_open()
        residency.run(residency.withdraw_abandoned)
        residency.run(self._validate)

    def _validate(self) -> None:
        residency = self._engine.residency
        audit.check(residency)
        named = {e for e in residency.entries if e.named}
        if named != set(self._engine.names.values()):
            raise InternalError("the table of names and the entries disagree")
        for name, entry in self._engine.names.items():
            if entry.name is not name and entry.name != name:  # nan is not equal to itself
                raise InternalError(f"{entry!r} is listed as {name!r}")

    # -------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Drop all values, end the threads, and remove the files. May be called again.

        Calls that wait in other threads raise PoolClosedError. Values that variables still
        hold stay valid. An error of a background write that no call has raised is a warning.
        """
        self._engine.close()

    def __enter__(self) -> FBPool:
        """Return the pool."""
        self._engine.residency.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool."""
        self.close()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.collected()


def _make_entry(value: Any, copy: bool, nbytes: int | None) -> Entry:
    if nbytes is not None:
        nbytes = _check_nbytes(nbytes)
    value = take_over(deep_copy(value) if copy else value)
    if nbytes is not None:
        return Entry(value, nbytes, fixed=True)
    size = measure(value)
    return Entry(value, size.nbytes, exact=size.exact)


def _check_nbytes(nbytes: int) -> int:
    if isinstance(nbytes, bool) or not hasattr(nbytes, "__index__"):
        raise TypeError(f"nbytes is a number of bytes, not {nbytes!r}")
    if nbytes < 0:
        raise ValueError(f"nbytes is at least 0, not {nbytes}")
    return operator.index(nbytes)


def _check_name(name: Hashable) -> None:
    if isinstance(name, UUID):
        raise TypeError("a UUID is a key and cannot be a name; use its str() or another name")
    try:
        hash(name)
    except TypeError as error:
        raise TypeError(f"a name must be hashable, such as a string or a tuple: {error}") from None


def _check_part(argument: str, part: object, *needed: str) -> None:
    lacking = [name for name in needed if not hasattr(part, name)]
    if part is not None and lacking:
        raise TypeError(f"{argument}={part!r} has no {', '.join(lacking)}; see the protocol in the docs")


def _check_timeout(seconds: float | None) -> float | None:
    if seconds is not None and not (isinstance(seconds, (int, float)) and 0 <= seconds < 1e9):
        raise ValueError(f"put_timeout is a number of seconds or None, not {seconds!r}")
    return seconds


def _check_threads(count: int | None) -> int:
    if count is None:
        return min(4, os.cpu_count() or 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"io_threads is at least 1, not {count!r}")
    return count


