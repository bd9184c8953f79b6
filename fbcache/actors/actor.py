"""``PersistentActor``: a pykka actor whose state outlives it.

Guarantees
----------
- An actor that was spawned with an id is the only live one of that id on its storage
  (:mod:`fbcache.actors.claims`), until it has ended and all its snapshots are written or given up.
- A snapshot is the state of the moment at which it was taken (:mod:`fbcache.actors.snapshot`), and is written
  afterwards, on another thread (:mod:`fbcache.actors.saving`). Taking one costs a copy of the state's arrays.
- When ``ref.stop()`` returns, every snapshot that was taken is written, those of ``on_stop`` included, and
  the id is free. Of an actor that crashed, it is when ``ref.finish()`` returns, or the messages that waited
  for it are answered.
- An actor that crashes takes no snapshot: the last one that was taken stands, and is still written.
- What the storage holds is never replaced by a default, unless it is absent, or damaged and
  ``on_corrupt="default"`` was given.

The hooks into pykka are ``_stop``, ``_actor_loop_teardown`` and ``_actor_loop``, for ``on_stop`` is the
user's, who need not call ours and may save in it, and ``_handle_receive``, around every message. They are
pykka's own inner methods, the same from 4.0 to 4.5, and tests hold that they are called.

An actor's fields belong to its thread; there is no lock here.
"""

from __future__ import annotations

import typing
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

import pykka
from pykka.messages import ProxyGetAttr

from fbcache.actors.arguments import Args
from fbcache.actors.errors import PersistenceError, PersistenceKind
from fbcache.actors.life import Life, begin, logger
from fbcache.actors.ref import PersistentRef
from fbcache.actors.schedule import SYSTEM_CLOCK, Clock, Schedule
from fbcache.actors.spawning import ABSENT, OnCorrupt, Spawning, mismatch
from fbcache.actors.storage import PersistentStorage

S = TypeVar("S")

_MISSING: Final[Any] = object()
_DUE: Final = object()  # the message by which a timer wakes its actor


class PersistentActor(pykka.ThreadingActor, Generic[S]):
    """A pykka actor that can save its state, and be started from it.

    Subclass it with the snapshot's type, as ``PersistentActor[dict]`` or by setting ``snapshot_type``, and
    call :meth:`save_snapshot` wherever the state is worth keeping; or decorate a dataclass with
    :func:`~fbcache.actors.own_snapshot`.

    Attributes
    ----------
    snapshot_type : type or None
        What a snapshot must be an instance of, both ways; None for anything that can be encoded.
    snapshot_every_messages : int or None
        Take a snapshot by itself after so many messages, reads of attributes through a proxy not counted.
    snapshot_every_seconds : float or None
        Take one by itself so long after the first message that is in none. Either way, one more is taken
        when the actor stops, unless nothing was handled since the last.
    """

    snapshot_type: ClassVar[type | None] = None
    snapshot_every_messages: ClassVar[int | None] = None
    snapshot_every_seconds: ClassVar[float | None] = None

    _life: Life
    _schedule: Schedule

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin = typing.get_origin(base)
            if isinstance(origin, type) and issubclass(origin, PersistentActor):
                (argument,) = typing.get_args(base)
                kind = typing.get_origin(argument) or argument
                if isinstance(kind, type) and "snapshot_type" not in cls.__dict__:
                    cls.snapshot_type = kind

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Receive what the spawning call knows, before any ``__init__`` runs."""
        self = super().__new__(cls)
        self._life = begin()
        self._schedule = Schedule(cls.snapshot_every_messages, cls.snapshot_every_seconds, self._life.clock)
        if self._schedule.active and cls.take_snapshot is PersistentActor.take_snapshot:
            raise TypeError(f"{cls.__qualname__} is to take snapshots by itself: override take_snapshot")
        return self

    # ------------------------------------------------------------------ starting

    @classmethod
    def spawn_persistent(
        cls,
        storage: PersistentStorage,
        actor_id: str,
        args: Any = (),
        *,
        runtime_args: Any = None,
        on_corrupt: OnCorrupt = "raise",
        clock: Clock = SYSTEM_CLOCK,
    ) -> PersistentRef[Self]:
        """Start the actor from its snapshot if there is one, else from ``args``.

        Parameters
        ----------
        storage : PersistentStorage
            Where its snapshots are.
        actor_id : str
            Any text.
        args : tuple, Args or object
            What ``__init__`` takes where there is no snapshot: a tuple or :class:`Args` is spread, anything
            else is the one argument.
        runtime_args : object
            What :meth:`persistent_args` gets beside the snapshot: connections, other actors' references.
        on_corrupt : {"raise", "default"}
            With "default" a damaged snapshot is warned of, and ``args`` are taken. It stays in the storage
            until the first save. Only damage counts: not an unreadable file, nor a snapshot that needs a
            class that is not registered.
        clock : Clock
            For ``snapshot_every_seconds``.

        Returns
        -------
        PersistentRef
            A pykka ``ActorRef`` with ``actor_id`` and ``finish``.

        Raises
        ------
        ActorExistsError
            An actor with this id is alive on this storage.
        CorruptSnapshotError
            The snapshot is damaged.
        PersistenceError
            It could not be read, or not be taken by this class.

        After an error no actor was started, the id is free, and the snapshot is as it was.
        """
        spawning = Spawning(cls, storage, actor_id, runtime_args, on_corrupt, clock)
        return spawning.start(args)

    @classmethod
    def respawn(
        cls,
        storage: PersistentStorage,
        actor_id: str,
        runtime_args: Any = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> PersistentRef[Self]:
        """Start the actor from its snapshot.

        Raises
        ------
        SnapshotNotFoundError
            There is none.

        Parameters and all else are those of :meth:`spawn_persistent`.
        """
        return Spawning(cls, storage, actor_id, runtime_args, "raise", clock).start(ABSENT)

    @classmethod
    def respawn_or(
        cls,
        storage: PersistentStorage,
        actor_id: str,
        *,
        runtime_args: Any = None,
        default_args: Any = (),
        on_corrupt: OnCorrupt = "raise",
        clock: Clock = SYSTEM_CLOCK,
    ) -> PersistentRef[Self]:
        """Start the actor from its snapshot; from ``default_args``, with the same id, if there is none.

        Parameters, errors and the state after one are those of :meth:`spawn_persistent`.
        """
        return Spawning(cls, storage, actor_id, runtime_args, on_corrupt, clock).start(default_args)

    @classmethod
    def persistent_args(cls, snapshot: S, runtime_args: Any) -> Any:
        """Return what ``__init__`` takes to start from ``snapshot``: a tuple or :class:`Args` is spread.

        To be overridden. By default the snapshot is the first argument, and ``runtime_args``,
        unless they are None, follow.
        """
        return Args.of(runtime_args if runtime_args is not None else ()).after(snapshot)

    # ------------------------------------------------------------------ saving

    @property
    def actor_id(self) -> str | None:
        """The id that the actor was spawned with; None if it was started without one."""
        return self._life.actor_id

    @property
    def storage(self) -> PersistentStorage | None:
        """The storage that the actor was spawned with."""
        return self._life.storage

    def take_snapshot(self) -> S:
        """Return the state to be saved. To be overridden by actors that save without naming a state."""
        raise NotImplementedError(
            f"{type(self).__qualname__} does not say what its snapshot is: override take_snapshot, or pass"
            " the state to save_snapshot"
        )

    def save_snapshot(self, storage: PersistentStorage | None = None, state: S = _MISSING) -> None:
        """Take a snapshot now; it is written later, unless a newer one comes first.

        To be called in the actor's own thread. The state is encoded before this returns, and may be changed
        afterwards. That takes one copy of its arrays (frozen ones too), the checksums, and memory for the
        copy until it is written. A state of gigabytes goes through :class:`~fbcache.actors.TrackedStorage`.

        Parameters
        ----------
        storage : PersistentStorage, optional
            Where to; by default what the actor was spawned with. The id is claimed in another one too.
        state : object, optional
            The state; by default :meth:`take_snapshot`'s.

        Raises
        ------
        PersistenceError
            Of the kind ``SERIALIZE``: the state cannot be encoded, or is none of ``snapshot_type``; no
            snapshot was taken, and those before go their way. Of the kind ``IO``: an earlier write failed;
            this snapshot was taken, and will be written all the same.
        ActorExistsError
            Another actor with this id is alive on ``storage``.
        NotPersistentError
            The actor has no id, or has ended.
        """
        target = self._life.storage if storage is None else storage
        if target is not None and not hasattr(target, "try_write"):
            raise TypeError(f"{target!r} is no storage; pass a state by its name, save_snapshot(state=...)")
        self._life.open(target)
        taken = self.take_snapshot() if state is _MISSING else state
        self._check(taken)
        self._life.save(target, taken)
        self._schedule.taken()

    def flush(self) -> None:
        """Wait until every snapshot that was taken is in its storage; one that failed is tried once more.

        Raises
        ------
        PersistenceError
            The newest one is not; it is kept, and tried again by the next ``flush``, or when the actor stops.
        """
        self._life.flush()

    def on_snapshot_failed(self, error: PersistenceError) -> None:
        """Hear that a snapshot that was due by itself failed, or the write of an earlier one.

        The message that was just handled is answered all the same. By default this is logged.
        """
        logger.error("a snapshot of actor %r failed: %s", self.actor_id, error, exc_info=error)

    def _check(self, state: object) -> None:
        if self.snapshot_type is not None and not isinstance(state, self.snapshot_type):
            raise self._not_saved(f"its state is {mismatch(state, self.snapshot_type)}")

    def _not_saved(self, reason: str) -> PersistenceError:
        message = f"cannot save actor {self.actor_id!r}: {reason}"
        return PersistenceError(message, actor_id=str(self.actor_id), kind=PersistenceKind.SERIALIZE)

    # ------------------------------------------------------------------ pykka

    @property
    def actor_ref(self) -> PersistentRef[Self]:
        """The reference to this actor."""
        ref = self.__dict__.get("_persistent_ref")
        if ref is None:
            if "actor_urn" not in self.__dict__:
                raise TypeError(f"{type(self).__qualname__}.__init__ must call super().__init__() first")
            ref = self._persistent_ref = PersistentRef(self, self._life)
        return ref

    def _handle_receive(self, message: Any) -> Any:
        if message is _DUE:
            if self._schedule.woken(self._wake):
                self._save_by_itself()
            return None
        try:
            answer = super()._handle_receive(message)
        except Exception:  # told to who asked, or the end of this actor; nothing is due for it
            raise
        except BaseException:
            self._schedule.taken()  # what the message has left half done is no state to save
            raise
        counts = self._life.storage is not None and not isinstance(message, ProxyGetAttr)
        if counts and not self.actor_stopped.is_set() and self._schedule.handled(self._wake):
            self._save_by_itself()
        return answer

    def _wake(self) -> None:
        try:
            self.actor_ref.tell(_DUE)
        except pykka.ActorDeadError:
            pass

    def _save_by_itself(self) -> None:
        self._schedule.begun()
        try:
            self.save_snapshot()
        except PersistenceError as error:
            self.on_snapshot_failed(error)

    def _stop(self) -> None:
        super()._stop()
        if self._schedule.dirty:
            try:
                self.save_snapshot()
            except PersistenceError as error:
                self._life.note(error)
            except Exception as error:
                failed = self._not_saved(f"taking its last snapshot raised {error!r}")
                failed.__cause__ = error
                self._life.note(failed)
        self._end()

    def _actor_loop_teardown(self) -> None:
        self._end()  # before those are answered who wait for a crashed actor, and may start another
        super()._actor_loop_teardown()

    def _actor_loop(self) -> None:
        try:
            super()._actor_loop()
        finally:  # also after what pykka does not catch
            self._end()

    def _end(self) -> None:
        self._schedule.taken()
        self._life.end()
