"""What a codec makes of a value: a small header and raw buffers, never joined.

Guarantee: a :class:`Frames` holds contiguous buffers only, so that a store can hand them
to ``writev`` as they are; nothing in this module copies one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

#: Anything that offers a contiguous buffer: bytes, memoryview, a mapped file.
Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(slots=True)
class Frames:
    """A value, taken apart.

    Attributes
    ----------
    codec : str
        Name of the codec that made them, and that can put them together again.
    tree : bytes
        The value's shape: small, and refers to the buffers by position.
    buffers : sequence of Buffer
        The value's bulk, each C-contiguous and one-dimensional, in bytes.
    pickled : str or None
        The path and type of the first part that took pickle (``"value['f']: module.Type"``);
        None when no part did.
    """

    codec: str
    tree: bytes
    buffers: Sequence[Buffer]
    pickled: str | None = None

    @property
    def nbytes(self) -> int:
        """Payload in bytes: the tree and all buffers."""
        nbytes = len(self.tree)
        for buffer in self.buffers:
            nbytes += memoryview(buffer).nbytes
        return nbytes


class Reads(Protocol):
    """Turns frames back into values; half of a :class:`Codec`."""

    name: str

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        """Put the value together again.

        Parameters
        ----------
        writable : bool
            Whether the caller will change the value: arrays come out writeable, as views of
            ``frames.buffers``, which are then writeable memory of their own. Otherwise arrays
            come out read-only.

        Raises
        ------
        CorruptBlobError
            The frames do not describe a value. No code from them has run.
        PickleRefusedError
            They hold a pickle and ``allow_pickle`` is false.
        """
        ...


class Codec(Reads, Protocol):
    """Turns values into frames and back. ``name`` is written into every blob.

    A codec is called from several threads at once and keeps no state between calls.
    """

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        """Take ``value`` apart, without copying what is raw already.

        Raises
        ------
        UnsupportedTypeError
            A part has no encoder, and pickle fails on it or the value contains itself.
        PickleRefusedError
            A part would take pickle and ``allow_pickle`` is false.
        """
        ...
