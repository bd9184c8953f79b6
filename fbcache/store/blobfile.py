"""One open blob file, read: mapped, or into fresh memory.

Guarantees: header, key and length are checked before a buffer is handed out; buffers are
read-only unless they were asked for writeable; nothing here opens or closes a descriptor.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from fbcache.codec.frames import Frames
from fbcache.codec.layout import BlobHeader, read_prefix, unpack_header, verify_buffer, verify_padding
from fbcache.errors import CorruptBlobError
from fbcache.store.disk import Disk
from fbcache.store.mapping import try_map
from fbcache.store.transfer import read_all

#: Blobs from this size up are mapped. Reading one whole, into one piece, is as fast up to two or
#: three times this size (at it: 24 us, mapping 29 us), but takes a second copy of it in memory.
MAP_LEAST = 128 * 1024

#: First read of a large file: holds the header of nearly every value.
_HEADER_GUESS = 4096


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A blob's file, open for reading.

    Attributes
    ----------
    disk : Disk
        The system calls.
    fd : int
        The file, which stays the caller's to close.
    key : UUID
        Whose blob it should be.
    path : str
        Where it is, for messages.
    digest : int, optional
        The checksum that its header has to have.
    """

    disk: Disk
    fd: int
    key: UUID
    path: str
    digest: int | None = None

    def read(self, *, may_map: bool, writable: bool, verify: bool) -> Frames:
        """Return the frames in the file.

        Parameters
        ----------
        may_map : bool
            Whether buffers may be views of the page cache; not together with ``writable``.
        writable : bool
            Whether buffers are writeable.
        verify : bool
            Whether each buffer is held against its checksum, and the padding against zeros.

        Raises
        ------
        CorruptBlobError
            It is no regular file, damaged, or another key's.
        OSError
            It could not be read.
        """
        size = self._size()
        whole = self._whole(size, may_map=may_map)
        if whole is None:
            header = self._read_header(size)
            buffers, padding = self._read_parts(header)
        else:
            header = unpack_header(whole, key=self.key, file_size=size, path=self.path)
            buffers = [whole[span.offset : span.offset + span.length] for span in header.spans]
            if size < MAP_LEAST:  # else each would keep header and padding in memory, uncounted
                buffers = [_copy(buffer) for buffer in buffers]
            padding = [whole[offset : offset + length] for offset, length in header.gaps] if verify else []
        if self.digest is not None and header.digest != self.digest:
            raise self._corrupt("it is another blob than the checkpoint names, under the same key")
        if verify:
            self._verify(header, buffers, padding)
        if not writable:
            buffers = [buffer.toreadonly() for buffer in buffers]
        return Frames(header.codec, header.tree, buffers, header.pickled)

    def header(self) -> BlobHeader:
        """Return the header, checked against key and length of the file.

        Raises
        ------
        CorruptBlobError, OSError
            As for :meth:`read`.
        """
        return self._read_header(self._size())

    def _size(self) -> int:
        status = self.disk.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._corrupt("it is no regular file")
        return status.st_size

    def _whole(self, size: int, *, may_map: bool) -> memoryview | None:
        """The whole file in one piece, if it is small or can be mapped; else None."""
        if size < MAP_LEAST:
            return self._read_at(0, size)
        return try_map(self.disk, self.fd, size) if may_map else None

    def _read_header(self, size: int) -> BlobHeader:
        raw = self._read_at(0, min(size, _HEADER_GUESS))
        length = read_prefix(raw, key=self.key, path=self.path)
        if len(raw) < length <= size:  # a longer one is a lie, for unpack_header to tell
            raw = self._read_at(0, length)
        return unpack_header(raw, key=self.key, file_size=size, path=self.path)

    def _read_parts(self, header: BlobHeader) -> tuple[list[memoryview], list[memoryview]]:
        """The buffers, and the padding before each, in one go: it makes one system call of many.

        Each buffer has memory of its own, so that one kept alive does not keep the others.
        """
        buffers = [_fresh(span.length) for span in header.spans]
        padding = []
        end = header.start
        for span in header.spans:
            padding.append(_fresh(span.offset - end))
            end = span.offset + span.length
        in_order = [piece for pair in zip(padding, buffers, strict=True) for piece in pair]
        self._fill(in_order, header.start)
        return buffers, padding

    def _verify(self, header: BlobHeader, buffers: list[memoryview], padding: list[memoryview]) -> None:
        for buffer, span in zip(buffers, header.spans, strict=True):
            verify_buffer(buffer, span, self.key, self.path)
        for gap in padding:
            verify_padding(gap, self.key, self.path)

    def _read_at(self, offset: int, nbytes: int) -> memoryview:
        memory = _fresh(nbytes)
        self._fill([memory], offset)
        return memory

    def _fill(self, pieces: list[memoryview], offset: int) -> None:
        if read_all(self.disk, self.fd, pieces, offset) < sum(map(len, pieces)):
            raise self._corrupt("the file ends early")

    def _corrupt(self, reason: str) -> CorruptBlobError:
        return CorruptBlobError(reason, key=self.key, path=self.path)


def _copy(buffer: memoryview) -> memoryview:
    fresh = _fresh(len(buffer))
    fresh[:] = buffer
    return fresh


def _fresh(nbytes: int) -> memoryview:
    """Memory that nobody else has; not cleared first, as a bytearray would be."""
    return np.empty(nbytes, np.uint8).data
