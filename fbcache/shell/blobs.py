"""A blob of a tracked directory, opened for one look."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob
from fbcache.errors import CorruptBlobError
from fbcache.store.blobfile import BlobFile
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def opened(directory: Directory, key: UUID, blob: Blob) -> Iterator[BlobFile]:
    """Open the blob of ``key``, which a held checkpoint describes as ``blob``.

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
