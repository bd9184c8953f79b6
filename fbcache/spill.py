"""The acts: writing, loading and deleting blobs, always outside the lock.

Guarantees
----------
- Nothing here decides: what to do comes from :class:`Decisions`, which is told how it went.
- A value is written from its own memory while readers go on reading it (invariant 10).
- A load that ends in any exception, an interrupt included, is reported before the exception
  goes on, so that the next caller can load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol
from uuid import UUID

from fbcache.codec.frames import Codec, Frames
from fbcache.entry import Entry, Token
from fbcache.errors import CorruptBlobError, FBCacheError, StorageError
from fbcache.freezing import seal, take_over, thaw
from fbcache.store.protocol import BlobStore


@dataclass(frozen=True, slots=True)
class WriteOrder:
    """Write ``value``, which is the content of ``entry``, under ``key``; decided at ``since``."""

    entry: Entry
    key: UUID
    value: Any
    since: float = field(default_factory=monotonic)


@dataclass(slots=True)
class LoadOrder:
    """Load the blob of ``token`` for ``entry``, for writing or for reading only.

    ``started`` once somebody acts on it; ``open`` until its outcome is known; decided at ``since``.
    """

    entry: Entry
    token: Token
    writable: bool
    verify: bool
    started: bool = False
    open: bool = True
    since: float = field(default_factory=monotonic)


class Decisions(Protocol):
    """Who says what to do, and hears what came of it."""

    def next_write(self) -> WriteOrder | None:
        """Return the entry to be written now."""
        ...

    def written(self, order: WriteOrder, disk_bytes: int, payload: int) -> None:
        """Hear that the blob is whole on disk."""
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

    def next_deletion(self) -> Token | None:
        """Return a blob that nobody needs any more."""
        ...

    def deleted(self, token: Token, error: Exception | None) -> None:
        """Hear that a deletion came to its end."""
        ...


class Spiller:
    """Does what it is told, with a codec and a store."""

    __slots__ = ("_codec", "_decisions", "_store")

    def __init__(self, decisions: Decisions, codec: Codec, store: BlobStore) -> None:
        self._decisions = decisions
        self._codec = codec
        self._store = store

    def write_next(self) -> None:
        """Write one entry, if one is to be written."""
        order = self._decisions.next_write()
        if order is None:
            return
        try:
            frames = self._encode(order)
        except BaseException as error:
            # Memory may come free again; what cannot be encoded stays so.
            self._decisions.write_failed(order, error, hopeless=not isinstance(error, MemoryError))
            return
        try:
            disk_bytes = self._store.write(order.key, frames)
        except BaseException as error:
            self._decisions.write_failed(order, error, hopeless=False)
        else:
            self._decisions.written(order, disk_bytes, frames.nbytes)

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
            self._decisions.load_failed(order)
            raise

    def delete_next(self) -> None:
        """Delete one blob, if one is to be deleted."""
        token = self._decisions.next_deletion()
        if token is None:
            return
        failure: Exception | None = None
        try:
            self._store.delete(token.key)
        except Exception as error:  # whatever a store raises, the thread goes on
            failure = error
        self._decisions.deleted(token, failure)

    def _encode(self, order: WriteOrder) -> Frames:
        try:
            frames = self._codec.encode(order.value, allow_pickle=True)
        except (FBCacheError, MemoryError):
            raise
        except BaseException as error:  # a KeyboardInterrupt here is the codec's own
            raise StorageError(
                f"the codec {self._codec.name!r} failed on {order.entry!r}: {error!r}",
                path=self._store.path,
                needed=order.entry.nbytes,
                free=self._store.bytes_free,
            ) from error
        if not isinstance(frames, Frames):
            raise TypeError(
                f"the codec {self._codec.name!r} returned {type(frames).__name__}; encode must "
                "return fbcache.codec.Frames"
            )
        return frames

    def _read(self, order: LoadOrder) -> Any:
        key = order.token.key
        frames = self._store.read(key, writable=order.writable, verify=order.verify)
        if frames.codec != self._codec.name:
            raise CorruptBlobError(
                f"it was written by the codec {frames.codec!r}, not {self._codec.name!r}",
                key=key,
                path=self._store.locate(key),
            )
        try:
            allowed = order.token.allow_pickle
            value = self._codec.decode(frames, writable=order.writable, allow_pickle=allowed)
        except CorruptBlobError as error:  # a codec does not know whose frames they are
            raise CorruptBlobError(error.reason, key=key, path=self._store.locate(key)) from error
        if not order.writable:
            return value if frames.pickled is None else seal(value)
        # Frozen like every value in memory; all its arrays are its own, whatever they are views of.
        value, owners = thaw(value)
        return take_over(value, owned=owners)
