"""Values as bytes, for the log and for records of sagas.

Guarantees: what was encoded needs no pickle; it is laid out as a blob is, with checksums, so that
:func:`decode` gives the value that was encoded or raises; each call gives a value of its own, whose arrays
are read-only.
"""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

from fbcache.codec import MsgpackCodec
from fbcache.codec.frames import Frames
from fbcache.codec.layout import pack, unpack_header, verify_buffer, verify_padding
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.saga.errors import CorruptSagaError

_CODEC: Final = MsgpackCodec()

#: Blobs have keys; a record in a log needs none.
_NO_KEY: Final = UUID(int=0)


def encode(value: Any) -> bytes:
    """Return ``value`` as bytes.

    Raises
    ------
    UnsupportedTypeError, PickleRefusedError
        A part has no encoder.
    """
    return b"".join(pack(_NO_KEY, _CODEC.encode(value, allow_pickle=False)).pieces)


def decode(record: bytes) -> Any:
    """Return the value that was encoded.

    Raises
    ------
    CorruptSagaError
        The bytes are not what was written, or are of a type that is not registered (any more).
    """
    try:
        view = memoryview(record)
        header = unpack_header(view, key=_NO_KEY, file_size=view.nbytes, path="")
        buffers = []
        for span in header.spans:
            buffer = view[span.offset : span.offset + span.length]
            verify_buffer(buffer, span)
            buffers.append(buffer)
        for offset, length in header.gaps:
            verify_padding(view[offset : offset + length])
        frames = Frames(header.codec, header.tree, buffers, header.pickled)
        return _CODEC.decode(frames, writable=False, allow_pickle=False)
    except (CorruptBlobError, UnsupportedTypeError, PickleRefusedError) as error:
        reason = error.reason if isinstance(error, CorruptBlobError) else error
        raise CorruptSagaError(f"a recorded value cannot be read: {reason}") from error
