"""A blob of a tracked directory, opened for one look: in a file of its own, or packed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob
from fbcache.checkpoint.packs import read_records
from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError
from fbcache.store.blobfile import BlobFile
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


def path_of(directory: Directory, key: UUID, blob: Blob) -> str:
    """Return the file that the blob of ``key`` is in."""
    return directory.places.blob(key if blob.pack is None else blob.pack.key)


def load(directory: Directory, key: UUID, blob: Blob) -> Frames:
    """Return the frames of the blob of ``key``, verified; views of the file where they are large.

    Raises
    ------
    CorruptBlobError
        It is damaged, or gone.
    StorageError
        It cannot be read.
    """
    if blob.pack is None:
        with opened(directory, key, blob) as file:
            return file.read(may_map=True, writable=False, verify=True)
    (found,) = read_records(directory.disk, directory.places, blob.pack, [(key, blob)])
    if isinstance(found, CorruptBlobError):
        raise found
    return found


@contextmanager
def opened(directory: Directory, key: UUID, blob: Blob) -> Iterator[BlobFile]:
    """Open the file of the blob of ``key``, which a held checkpoint describes as ``blob``.

    Raises
    ------
    CorruptBlobError
        It is gone.
    StorageError
        It cannot be read.
    """
    path, disk = directory.places.blob(key), directory.disk
    try:
        fd = disk.open(path, _READ)
        try:
            yield BlobFile(disk, fd, key, path, blob.digest)
        finally:
            disk.close(fd)
    except FileNotFoundError:
        raise CorruptBlobError("the file is gone", key=key, path=path) from None
    except OSError as error:
        raise storage_error("read", path, error, disk) from error
