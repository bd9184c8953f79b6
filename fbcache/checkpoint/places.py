"""Where things are in a tracked directory, and what is ours there.

Guarantee: a name that these patterns do not match is foreign, and nothing in this room touches it
(invariant 13). Keys and versions alone become paths, never a name out of a manifest.

::

    <2 hex>/<32 hex>                          a blob
    <2 hex>/<32 hex>.pin                      empty: persist() asked for this blob
    <2 hex>/.<32 hex>.tmp                     a blob on its way in
    .fbcache/lock                             the writer's lock
    .fbcache/checkpoints/<10 digits>.manifest
    .fbcache/checkpoints/.<10 digits>.tmp     a manifest on its way in
    .fbcache/readers/session-<32 hex>/        links to what a reader needs
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from uuid import UUID

OWN: Final = ".fbcache"

_SHARD: Final = re.compile(r"[0-9a-f]{2}")
_BLOB: Final = re.compile(r"[0-9a-f]{32}")
_PIN: Final = re.compile(r"([0-9a-f]{32})\.pin")
_TEMPORARY: Final = re.compile(r"\.([0-9a-f]{32})\.tmp")
_MANIFEST: Final = re.compile(r"([0-9]{10})\.manifest")
_NEW_MANIFEST: Final = re.compile(r"\.[0-9]{10}\.tmp")

#: The last version there can be; at one save a second it comes after 317 years.
MOST_VERSIONS: Final = 10**10 - 1


@dataclass(frozen=True, slots=True)
class Places:
    """The paths in the tracked directory ``root``."""

    root: str

    @property
    def own(self) -> str:
        """The directory of all that is neither blob nor pin."""
        return f"{self.root}/{OWN}"

    @property
    def lock(self) -> str:
        """The writer's lock."""
        return f"{self.root}/{OWN}/lock"

    @property
    def checkpoints(self) -> str:
        """The directory of manifests."""
        return f"{self.root}/{OWN}/checkpoints"

    @property
    def readers(self) -> str:
        """The directory of readers' sessions."""
        return f"{self.root}/{OWN}/readers"

    def shard(self, key: UUID) -> str:
        """The directory of the blob of ``key``."""
        return f"{self.root}/{key.hex[:2]}"

    def blob(self, key: UUID) -> str:
        """The blob of ``key``."""
        name = key.hex
        return f"{self.root}/{name[:2]}/{name}"

    def pin(self, key: UUID) -> str:
        """The pin of ``key``."""
        return f"{self.blob(key)}.pin"

    def temporary(self, key: UUID) -> str:
        """Where the blob of ``key`` is made if it cannot be linked."""
        name = key.hex
        return f"{self.root}/{name[:2]}/.{name}.tmp"

    def manifest(self, version: int) -> str:
        """The manifest of ``version``."""
        return f"{self.checkpoints}/{manifest_name(version)}"

    def new_manifest(self, version: int) -> str:
        """Where the manifest of ``version`` is made."""
        return f"{self.checkpoints}/.{version:010d}.tmp"


def manifest_name(version: int) -> str:
    """Return the file name of the manifest of ``version``."""
    return f"{version:010d}.manifest"


def version_of(name: str) -> int | None:
    """Return the version whose manifest is called ``name``, if it is one's."""
    match = _MANIFEST.fullmatch(name)
    return None if match is None else int(match[1])


def is_shard(name: str) -> bool:
    """Whether a directory of blobs may be called ``name``."""
    return _SHARD.fullmatch(name) is not None


def is_new_manifest(name: str) -> bool:
    """Whether a manifest on its way in may be called ``name``."""
    return _NEW_MANIFEST.fullmatch(name) is not None


@dataclass(slots=True)
class Shard:
    """What is ours in one shard; ``foreign`` are the names that are not."""

    name: str
    blobs: list[UUID]
    pins: list[UUID]
    temporary: list[UUID]
    foreign: list[str]

    @classmethod
    def of(cls, name: str, listing: list[str]) -> Shard:
        """Sort what a shard holds. A blob in another's shard is foreign."""
        shard = cls(name, [], [], [], [])
        for entry in listing:
            if _BLOB.fullmatch(entry) and entry.startswith(name):
                shard.blobs.append(UUID(hex=entry))
            elif (pin := _PIN.fullmatch(entry)) and entry.startswith(name):
                shard.pins.append(UUID(hex=pin[1]))
            elif (new := _TEMPORARY.fullmatch(entry)) and new[1].startswith(name):
                shard.temporary.append(UUID(hex=new[1]))
            else:
                shard.foreign.append(entry)
        return shard
