"""Keys that somebody has seen: which entry each names now, and which are outdated.

Guarantee: a key leads to an entry only while it is that entry's current key. Guarded by the
pool's lock.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from typing import Final
from uuid import UUID

from fbcache.entry import Entry, State
from fbcache.errors import StaleKeyError

#: How many replaced keys are remembered; 8,192 take about 1.5 MB.
REMEMBERED: Final = 8192


class KeyIndex:
    """Entries by key. Only keys that were handed out are kept here."""

    __slots__ = ("_entries", "_others", "_stale")

    def __init__(self) -> None:
        self._entries: dict[UUID, Entry] = {}
        self._others: dict[UUID, list[Entry]] = {}  # further entries with the content of one key
        self._stale: OrderedDict[UUID, None] = OrderedDict()

    def of(self, entry: Entry) -> UUID:
        """Return the key of the entry's content, made if it had none."""
        key = entry.key
        if key is None:
            token = entry.token
            entry.key = key = uuid.uuid4() if token is None else token.key
        return key

    def expose(self, entry: Entry) -> UUID:
        """Return the key, to be given to the caller."""
        key = self.of(entry)
        if entry.state is not State.DROPPED and not entry.exposed:
            self._add(key, entry)
            entry.exposed = True
        return key

    def find(self, key: UUID) -> Entry:
        """Return the entry whose current key this is.

        Raises
        ------
        StaleKeyError
            A mutation has replaced the key.
        KeyError
            The key is unknown, or its entry is gone.
        """
        entry = self._entries.get(key)
        if entry is not None and entry.key == key:
            return entry
        if entry is not None or key in self._stale:
            raise StaleKeyError(
                f"key {key} was replaced when its entry was changed; use the entry's name, or "
                "the current `key` of its handle"
            )
        raise KeyError(f"no entry has the key {key}")

    def outdate(self, key: UUID, entry: Entry) -> None:
        """Note that a mutation has replaced ``key``, which was handed out, as the key of ``entry``."""
        self.forget(key, entry)
        if key in self._entries:  # another entry has this content still
            return
        self._stale[key] = None
        if len(self._stale) > REMEMBERED:
            self._stale.popitem(last=False)

    def renew(self, key: UUID, entry: Entry) -> None:
        """Note that ``key``, which was handed out, is the entry's again."""
        self._stale.pop(key, None)
        self._add(key, entry)

    def forget(self, key: UUID, entry: Entry) -> None:
        """Note that ``entry`` has ``key`` no more."""
        others = self._others.get(key)
        if self._entries.get(key) is entry:
            if others:
                self._entries[key] = others.pop()
            else:
                del self._entries[key]
        elif others and entry in others:
            others.remove(entry)
        if others is not None and not others:
            del self._others[key]

    def _add(self, key: UUID, entry: Entry) -> None:
        if self._entries.setdefault(key, entry) is not entry:
            others = self._others.setdefault(key, [])
            if entry not in others:
                others.append(entry)
