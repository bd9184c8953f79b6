"""What a reader of a tracked directory finds in it: contents, with files of their own or packed.

Guarantee: nothing is changed, and nothing is remembered: each look is a new one. A pack is no content.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from uuid import UUID

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob, Manifest
from fbcache.checkpoint.packs import CODEC
from fbcache.checkpoint.scanning import look_through
from fbcache.errors import CheckpointNotFoundError, CorruptBlobError, CorruptCheckpointError
from fbcache.store.blobfile import BlobFile

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


def keys_present(directory: Directory) -> list[UUID]:
    """Return the keys of the contents that are there.

    Raises
    ------
    OSError
        The directory could not be read.
    """
    there = look_through(directory.disk, directory.places)
    packs: set[UUID] = set()
    named: set[UUID] = set()
    packed: dict[UUID, None] = {}
    for manifest in _newest_first(directory):
        for key, blob in zip(manifest.keys, manifest.blobs, strict=True):
            if blob.pack is None:
                named.add(key)
            else:
                packs.add(blob.pack.key)
                if blob.pack.key in there.blobs:
                    packed[key] = None
    # What a save under way has brought in, or one that has crashed.
    packs.update(key for key in there.blobs - packs - named - there.pins if _is_pack(directory, key))
    return [*(key for key in there.blobs if key not in packs and key not in packed), *packed]


def is_present(directory: Directory, key: UUID) -> bool:
    """Whether content is there under ``key``."""
    disk, places = directory.disk, directory.places
    if disk.exists(places.blob(key)):
        return not _is_pack(directory, key)
    blob = places_of(directory, [key]).get(key)
    return blob is not None and blob.pack is not None and disk.exists(places.blob(blob.pack.key))


def places_of(directory: Directory, keys: Iterable[UUID]) -> dict[UUID, Blob]:
    """Return where these keys are packed, as the newest checkpoint says that has them."""
    lacking = set(keys)
    found: dict[UUID, Blob] = {}
    if not lacking:
        return found
    for manifest in _newest_first(directory):
        for row, key in enumerate(manifest.keys):
            if key in lacking and (blob := manifest.blobs[row]).pack is not None:
                found[key] = blob
                lacking.discard(key)
        if not lacking:
            break
    return found


def _newest_first(directory: Directory) -> Iterator[Manifest]:
    for version in reversed(directory.versions.numbers()):
        try:
            yield directory.versions.read(version)
        except (CheckpointNotFoundError, CorruptCheckpointError):
            continue


def _is_pack(directory: Directory, key: UUID) -> bool:
    disk, path = directory.disk, directory.places.blob(key)
    try:
        fd = disk.open(path, _READ)
        try:
            return BlobFile(disk, fd, key, path).header().codec == CODEC
        finally:
            disk.close(fd)
    except (CorruptBlobError, OSError):
        return False
