"""What a save sees of a pool: names, keys and what the directory knows of them, all at one instant.

Guarantee: a content that the directory has already, packed or not, costs a look-up there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fbcache.captures import Capture
from fbcache.checkpoint.directory import Directory
from fbcache.entry import Entry
from fbcache.residency import Residency
from fbcache.spill import Spiller
from fbcache.store.protocol import BlobStore
from fbcache.workers import Workers


class Source(Protocol):
    """The pool that an entry is saved from."""

    residency: Residency
    spiller: Spiller
    store: BlobStore
    workers: Workers


class NamedSource(Source, Protocol):
    """A pool with names."""

    @property
    def names(self) -> Mapping[Hashable, Entry]:
        """Entries by name."""
        ...


class Cut:
    """What a save sees of a pool: by row what is known, and captures of what is not in the directory.

    A row whose blob is in the directory already costs a look-up there: none is removed during a save.
    """

    __slots__ = ("_directory", "blobs", "captures", "keys", "names", "rows", "sizes")

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.names: Sequence[Hashable] = ()
        self.keys: list[Any] = []  # UUID, once known
        self.blobs: list[Any] = []  # Blob, once known
        self.sizes: list[int] = []
        self.rows: list[int] = []  # of the captures
        self.captures: list[Capture] = []

    def make(
        self, residency: Residency, choose: Callable[[], tuple[Sequence[Hashable], Sequence[Entry]]]
    ) -> None:
        """Make the cut, all at one instant; under the pool's lock."""
        residency.check_open()
        self.names, entries = choose()
        known = self._directory.known
        missing = []
        for row, entry in enumerate(entries):
            token, nbytes = entry.token, entry.nbytes
            key = None if token is None else token.key
            blob = None if key is None else known(key)
            if blob is None:
                self.rows.append(row)
                missing.append(entry)
            elif blob.nbytes != nbytes:
                blob = replace(blob, nbytes=nbytes)
            self.keys.append(key)
            self.blobs.append(blob)
            self.sizes.append(nbytes)
        residency.capture(missing, self.captures)


def look_up(
    source: NamedSource, names: Sequence[Hashable] | None, unknown: Callable[[Hashable], KeyError]
) -> tuple[list[Hashable], list[Entry]]:
    """Return the entries of these names; all that is named, where they are None. Under the pool's lock."""
    if names is None:
        return list(source.names), list(source.names.values())
    entries = []
    for name in names:
        entry = source.names.get(name)
        if entry is None:
            raise unknown(name)
        entries.append(entry)
    return list(names), entries
