"""What a reader of a tracked directory finds in it: contents, with files of their own or packed.

Guarantee: nothing is changed, and nothing is remembered: each look is a new one. A pack is no content.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, TypeVar
from uuid import UUID

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob, Manifest
from fbcache.checkpoint.scanning import look_through
from fbcache.errors import CheckpointNotFoundError, CorruptCheckpointError

T = TypeVar("T")

#: How often checkpoints may come or go while something is looked up.
_ATTEMPTS: Final = 20


def keys_present(directory: Directory) -> list[UUID]:
    """Return the keys of the contents that are there.

    Raises
    ------
    OSError
        The directory could not be read.
    """
    return _steadily(directory, lambda: _keys_present(directory))


def _steadily(directory: Directory, look: Callable[[], T]) -> T:
    """Return what ``look`` finds while no checkpoint comes or goes, for a save may move what is packed."""
    for _ in range(_ATTEMPTS):
        before = directory.versions.numbers()
        found = look()
        if directory.versions.numbers() == before:
            break
    return found


def _keys_present(directory: Directory) -> list[UUID]:
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
    contents = named | there.pins
    packs -= {key for key in packs & contents & there.blobs if not directory.is_pack(key)}
    # What a save under way has brought in, or one that has crashed.
    packs.update(key for key in there.blobs - packs - contents if directory.is_pack(key))
    return [*(key for key in there.blobs if key not in packs and key not in packed), *packed]


def is_present(directory: Directory, key: UUID) -> bool:
    """Whether content is there under ``key``."""
    if directory.disk.exists(directory.places.blob(key)):
        return not directory.is_pack(key)
    return key in places_of(directory, [key])


def places_of(directory: Directory, keys: Collection[UUID]) -> dict[UUID, Blob]:
    """Return where these keys are packed: as the newest checkpoint says of those whose packs are there."""
    return _steadily(directory, lambda: _places_of(directory, keys)) if keys else {}


def _places_of(directory: Directory, keys: Iterable[UUID]) -> dict[UUID, Blob]:
    lacking = set(keys)
    found: dict[UUID, Blob] = {}
    for manifest in _newest_first(directory):
        packs = {pack for pack in manifest.packs if directory.disk.exists(directory.places.blob(pack.key))}
        for row, key in enumerate(manifest.keys if packs else ()):
            if key in lacking and (blob := manifest.blobs[row]).pack in packs:
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
