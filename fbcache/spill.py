"""The acts: writing, loading and deleting blobs, always outside the lock.

Guarantees
----------
- Nothing here decides: what to do comes from :class:`Decisions`, which is told how it went.
- A value is written from its own memory while readers go on reading it (invariant 10).
- Small values are encoded and written together, and large ones one by one; a failure concerns one value.
- A load that ends in any exception, an interrupt included, is reported before the exception
  goes on, so that the next caller can load.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Protocol
from uuid import UUID

from fbcache.codec import BUILT_IN
from fbcache.codec.frames import Codec, Frames, Reads
from fbcache.entry import Entry, Token
from fbcache.errors import CorruptBlobError, FBCacheError, StorageError
from fbcache.freezing import seal, take_over, thaw
from fbcache.store.protocol import Batching, BlobStore, Packing


class WriteOrder:
    """Write ``value``, which is the content of ``entry``; decided at ``since``.

    ``key`` is that of the content, and None while nobody needs one; ``codec`` the entry's own, if it has
    one; ``ended`` once the outcome is known.
    """

    __slots__ = ("codec", "ended", "entry", "key", "since", "value")

    def __init__(self, entry: Entry, key: UUID | None, value: Any, codec: Codec | None = None) -> None:
        self.codec = codec
        self.entry = entry
        self.key = key
        self.value = value
        self.since = monotonic()
        self.ended = False


class Written:
    """The blob of ``order`` is whole on disk: in a slot, or under its key."""

    __slots__ = ("disk_bytes", "order", "payload", "slot")

    def __init__(self, order: WriteOrder, disk_bytes: int, payload: int, slot: int | None = None) -> None:
        self.order = order
        self.disk_bytes = disk_bytes
        self.payload = payload
        self.slot = slot


class LoadOrder:
    """Load the blob of ``token`` for ``entry``, for writing or for reading only.

    ``started`` once somebody acts on it; ``open`` until its outcome is known; decided at ``since``.
    """

    __slots__ = ("entry", "open", "since", "started", "token", "verify", "writable")

    def __init__(self, entry: Entry, token: Token, writable: bool, verify: bool) -> None:
        self.entry = entry
        self.token = token
        self.writable = writable
        self.verify = verify
        self.started = False
        self.open = True
        self.since = monotonic()


class LostToken(Token):
    """A blob that was found damaged, or gone, when it was to be copied into the store."""

    __slots__ = ("damage",)

    def __init__(self, key: UUID, nbytes: int, damage: CorruptBlobError) -> None:
        super().__init__(key, nbytes)
        self.damage = damage


class Decisions(Protocol):
    """Who says what to do, and hears what came of it."""

    def next_writes(self) -> list[WriteOrder]:
        """Return the entries to be written now."""
        ...

    def key_of(self, order: WriteOrder) -> UUID:
        """Return the key of the content to be written."""
        ...

    def written(self, outcomes: Sequence[Written]) -> None:
        """Hear which blobs are whole on disk."""
        ...

    def write_failed(self, order: WriteOrder, error: BaseException, *, hopeless: bool) -> None:
        """Hear that no blob was written; ``hopeless`` when trying again cannot help."""
        ...

    def loaded(self, order: LoadOrder, value: Any) -> None:
        """Take the value in."""
        ...

    def load_failed(self, order: LoadOrder) -> None:
        """Hear that nothing was loaded, unless it is known that something was."""
        ...

    def next_deletions(self) -> list[Token]:
        """Return blobs that nobody needs any more."""
        ...

    def deleted(self, tokens: Sequence[Token], error: Exception | None) -> None:
        """Hear that deletions came to their end."""
        ...


class Spiller:
    """Does what it is told, with a codec and a store."""

    __slots__ = ("_batching", "_codec", "_decisions", "_packing", "_store", "check")

    def __init__(self, decisions: Decisions, codec: Codec, store: BlobStore) -> None:
        self._decisions = decisions
        self._codec = codec
        self._store = store
        self.check: Callable[[Entry, Any], None] | None = None  # in debug mode, of what is to be written
        self._packing = store if isinstance(store, Packing) else None
        self._batching = store if isinstance(store, Batching) else None

    def check_codec(self, codec: Codec) -> None:
        """Raise TypeError or ValueError for a codec whose frames this could not read again."""
        lacking = [part for part in ("name", "encode", "decode") if not hasattr(codec, part)]
        if lacking:
            raise TypeError(f"codec={codec!r} has no {', '.join(lacking)}")
        if codec.name != self._codec.name and codec.name not in BUILT_IN:
            known = ", ".join(BUILT_IN)
            raise ValueError(f"an entry's own codec is one of {known}, not {codec.name!r}: FBPool(codec=...)")

    def write_next(self) -> None:
        """Write what is to be written now."""
        orders = self._decisions.next_writes()
        try:
            self._write_all(orders)
        except BaseException as error:  # an interrupt, where this thread was only helping
            for order in orders:
                self._decisions.write_failed(order, error, hopeless=False)

    def _write_all(self, orders: Sequence[WriteOrder]) -> None:
        small = self._packing.small if self._packing is not None else -1
        together: list[tuple[WriteOrder, Frames]] = []
        apart: list[tuple[WriteOrder, Frames]] = []
        try:
            for order in orders:
                frames = self._try_to_encode(order)
                if frames is not None:
                    (together if frames.nbytes <= small else apart).append((order, frames))
            frames = None
            if together:
                self._pack(together)
            if len(apart) > 1 and self._batching is not None:
                self._write_batch(self._batching, apart)
            else:
                while apart:
                    self._write_one(apart)
        finally:  # an error that somebody keeps has this frame above its own
            together.clear()
            apart.clear()

    def _try_to_encode(self, order: WriteOrder) -> Frames | None:
        try:
            if self.check is not None:
                self.check(order.entry, order.value)
            return self._encode(order)
        except BaseException as error:
            # Memory may come free again; what cannot be encoded stays so.
            self._decisions.write_failed(order, error, hopeless=not isinstance(error, MemoryError))
            return None

    def _pack(self, together: list[tuple[WriteOrder, Frames]]) -> None:
        assert self._packing is not None
        try:
            slots, sizes = self._packing.append([frames for _, frames in together])
        except BaseException as error:
            if len(together) == 1:
                self._decisions.write_failed(together[0][0], error, hopeless=_is_too_large(error))
                return
            for one in together:  # there may be room for some
                self._pack([one])
        else:
            found = zip(together, slots, sizes, strict=True)
            outcomes = [Written(o, nbytes, f.nbytes, slot) for (o, f), slot, nbytes in found]
            together.clear()  # whoever waits for the outcome is not to find the values in memory still
            self._decisions.written(outcomes)

    def _write_batch(self, store: Batching, apart: list[tuple[WriteOrder, Frames]]) -> None:
        items = [(self._decisions.key_of(order), frames) for order, frames in apart]
        done = []
        for (order, frames), outcome in zip(apart, store.write_many(items), strict=True):
            if isinstance(outcome, int):
                done.append(Written(order, outcome, frames.nbytes))
            else:
                self._decisions.write_failed(order, outcome, hopeless=False)
        items.clear()
        apart.clear()
        del frames
        self._decisions.written(done)

    def _write_one(self, apart: list[tuple[WriteOrder, Frames]]) -> None:
        order, frames = apart.pop(0)
        try:
            disk_bytes = self._store.write(self._decisions.key_of(order), frames)
        except BaseException as error:
            self._decisions.write_failed(order, error, hopeless=False)
        else:
            outcome = Written(order, disk_bytes, frames.nbytes)
            del frames
            self._decisions.written([outcome])

    def load(self, order: LoadOrder) -> None:
        """Load one entry.

        Raises
        ------
        CorruptBlobError, StorageError
            From the store. The entry is spilled as before.
        """
        try:
            order.started = True
            self._decisions.loaded(order, self._read(order))
        except BaseException:
            order.started = False  # should an interrupt come now, the guard gives the load up
            self._decisions.load_failed(order)
            raise

    def delete_next(self) -> None:
        """Delete what is to be deleted now."""
        tokens = self._decisions.next_deletions()
        if not tokens:
            return
        failure: Exception | None = None
        try:
            if tokens[0].slot < 0:
                self._store.delete(tokens[0].key)
            elif self._packing is not None:
                self._packing.free([token.slot for token in tokens], [token.nbytes for token in tokens])
        except Exception as error:  # whatever a store raises, the thread goes on
            failure = error
        self._decisions.deleted(tokens, failure)

    def fetch(self, token: Token, *, writable: bool, verify: bool) -> Frames:
        """Return the frames of a blob of which the caller has a share.

        Raises
        ------
        CorruptBlobError, StorageError
            From the store.
        """
        slot = token.slot
        if slot < 0:
            if isinstance(token, LostToken):
                damage = token.damage
                raise CorruptBlobError(damage.reason, key=damage.key, path=damage.path)
            return self._store.read(token.key, writable=writable, verify=verify)
        assert self._packing is not None
        return self._packing.at(slot, writable=writable)

    def locate(self, token: Token) -> str:
        """Return where a blob is, for messages."""
        if token.slot < 0 or self._packing is None:
            return self._store.locate(token.key)
        return self._packing.path_of(token.slot)

    def _encode(self, order: WriteOrder) -> Frames:
        codec = order.codec or self._codec
        try:
            frames = codec.encode(order.value, allow_pickle=True)
        except (FBCacheError, MemoryError):
            raise
        except BaseException as error:  # a KeyboardInterrupt here is the codec's own
            failure = StorageError(
                f"the codec {codec.name!r} failed on {order.entry!r}: {error!r}",
                path=self._store.path,
                needed=order.entry.nbytes,
                free=self._store.bytes_free,
            )
            failure.__cause__ = error  # compiled code does nothing for ``from``
            raise failure from error
        if not isinstance(frames, Frames):
            raise TypeError(
                f"the codec {codec.name!r} returned {type(frames).__name__}; encode must "
                "return fbcache.codec.Frames"
            )
        return frames

    def _read(self, order: LoadOrder) -> Any:
        token = order.token
        frames = self.fetch(token, writable=order.writable, verify=order.verify)
        codec: Reads = self._codec
        if frames.codec != codec.name:
            codec = self._codec_of(frames, token)
        try:
            value = codec.decode(frames, writable=order.writable, allow_pickle=token.allow_pickle)
        except CorruptBlobError as error:  # a codec does not know whose frames they are
            failure = CorruptBlobError(error.reason, key=token.key, path=self.locate(token))
            failure.__cause__ = error
            raise failure from error
        if not order.writable:
            return value if frames.pickled is None else seal(value)
        # Frozen like every value in memory; all its arrays are its own, whatever they are views of.
        value, owners = thaw(value)
        return take_over(value, owned=owners)

    def _codec_of(self, frames: Frames, token: Token) -> Reads:
        found = BUILT_IN.get(frames.codec)
        if found is None:
            raise CorruptBlobError(
                f"it was written by the codec {frames.codec!r}, not {self._codec.name!r}",
                key=token.key,
                path=self.locate(token),
            )
        return found


def _is_too_large(error: BaseException) -> bool:
    return isinstance(error, StorageError) and error.errno == errno.EMSGSIZE
