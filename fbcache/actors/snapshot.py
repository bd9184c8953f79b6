"""A state as bytes and back, and bytes sealed for a medium that may damage them.

Guarantees
----------
- Bytes are whole when they are read, or an error is raised: each snapshot is a blob
  (:mod:`fbcache.codec.layout`) with a version, exact lengths and checksums over every byte, and its key is
  made of the actor's id, so that another actor's snapshot is none.
- No code from a snapshot runs: pickle is refused both ways, and the error names the path to what needs it.
- :func:`encode` copies every array once, into the bytes that it returns; what happens to the state
  afterwards does not show in them. :func:`decode` copies it once more, so that a state's arrays
  are its own and writeable.
- Damage, of which a checksum tells, is :class:`CorruptSnapshotError`. What is whole and yet
  cannot be taken (a later version, a class that is not registered) is another ``PersistenceError``: the
  program must be mended, not the file.
"""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

from fbcache.actors.errors import CorruptSnapshotError, PersistenceError, PersistenceKind, explained
from fbcache.actors.naming import key_of
from fbcache.codec import Buffer, Frames, MsgpackCodec
from fbcache.codec.layout import (
    MAGIC,
    VERSION,
    BlobHeader,
    Plan,
    pack,
    unpack_header,
    verify_buffer,
    verify_padding,
)
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError

#: The ``codec`` of a blob whose one buffer is bytes from elsewhere.
_SEALED: Final = "snapshot"

_codec: Final = MsgpackCodec()


def encode(actor_id: str, state: Any) -> bytes:
    """Return the snapshot of ``state``.

    Raises
    ------
    PersistenceError
        Of the kind ``SERIALIZE``: a part of it would need pickle, or cannot be encoded at all. The message
        names the part; the cause is a ``PickleRefusedError`` or ``UnsupportedTypeError``.
    """
    try:
        frames = _codec.encode(state, allow_pickle=False)
    except (PickleRefusedError, UnsupportedTypeError) as error:
        raise explained("encode the state of", actor_id, error) from error
    return b"".join(pack(key_of(actor_id), frames).pieces)


def decode(actor_id: str, raw: Buffer, where: str) -> Any:
    """Return the state in a snapshot.

    Parameters
    ----------
    where : str
        Where it was found, for messages.

    Raises
    ------
    CorruptSnapshotError
        It is damaged, or another actor's.
    PersistenceError
        Of the kind ``DESERIALIZE``: it needs pickle, a class that is not registered, or a later fbcache.
    """
    view = memoryview(raw).cast("B").toreadonly()  # so that the codec copies what is to be writeable
    header = _open(actor_id, view, where)
    buffers = [view[span.offset : span.offset + span.length] for span in header.spans]
    frames = Frames(header.codec, header.tree, buffers, header.pickled)
    try:
        return _codec.decode(frames, writable=True, allow_pickle=False)
    except PickleRefusedError as error:
        message = f"it holds a pickle, at {error.path}, which could run any code and is not loaded"
        raise not_taken(actor_id, where, message) from error
    except (CorruptBlobError, UnsupportedTypeError) as error:
        raise not_taken(actor_id, where, getattr(error, "reason", str(error))) from error


def seal(actor_id: str, data: Buffer) -> Plan:
    """Return ``data`` as a blob to be written, without copying it."""
    return pack(key_of(actor_id), Frames(_SEALED, b"", (data,)))


def unseal(actor_id: str, raw: Buffer, where: str) -> bytes:
    """Return what :func:`seal` was given.

    Raises
    ------
    CorruptSnapshotError
        It is not what was written, or was sealed for another actor.
    PersistenceError
        A later fbcache has written it.
    """
    view = memoryview(raw).cast("B")
    header = _open(actor_id, view, where)
    if header.codec != _SEALED or len(header.spans) != 1:
        raise CorruptSnapshotError("it is another kind of blob", actor_id=actor_id, where=where)
    (span,) = header.spans
    return bytes(view[span.offset : span.offset + span.length])


def not_taken(actor_id: str, where: str, reason: str) -> PersistenceError:
    """Return the error for a snapshot that is whole and of no use to this program."""
    return PersistenceError(
        f"the snapshot of actor {actor_id!r} in {where} cannot be taken: {reason}",
        actor_id=actor_id,
        kind=PersistenceKind.DESERIALIZE,
    )


def _open(actor_id: str, view: memoryview, where: str) -> BlobHeader:
    """Hold every byte of a blob against its checksums; return its header."""
    version = int.from_bytes(view[len(MAGIC) : len(MAGIC) + 2], "little")
    if bytes(view[: len(MAGIC)]) == MAGIC and len(view) > len(MAGIC) + 1 and version != VERSION:
        # Perhaps a later version's, perhaps two damaged bytes. Not to be replaced by a default either way.
        raise not_taken(
            actor_id, where, f"it has version {version} of the layout, where this fbcache reads {VERSION}"
        )
    key: UUID = key_of(actor_id)
    try:
        header = unpack_header(view, key=key, file_size=len(view), path=where)
        for span in header.spans:
            verify_buffer(view[span.offset : span.offset + span.length], span, key, where)
        for offset, length in header.gaps:
            verify_padding(view[offset : offset + length], key, where)
    except CorruptBlobError as error:
        raise CorruptSnapshotError(error.reason, actor_id=actor_id, where=where) from error
    return header
