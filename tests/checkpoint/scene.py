"""A tracked directory on a recording disk, and what power loss may leave of it.

A :class:`Scene` marks in the disk's log, with :class:`Allowed`, what may be found from that point on.
"""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from fbcache import Fb, FBCacheWarning, FBPool, FileStore, StorageError, TrackedDirectory
from fbcache.store import owner
from fbcache.store.disk import DISK, Disk
from tests.checkpoint.opened import Value, Version, exact, fresh, look
from tests.faults import CALLS, FaultyDisk, oserror
from tests.powerloss import RecordingDisk

FOREIGN = {
    "notes.txt": b"mine",
    "mine/data.bin": bytes(range(256)),
    "ab/not-a-blob": b"in a shard",
    "ab/.ffffffffffffffffffffffffffffffff.tmp": b"of another shard",
    ".fbcache/checkpoints/notes": b"beside manifests",
}


# ------------------------------------------------------------------ what may be found


@dataclass(frozen=True)
class Allowed:
    """What the directory may hold.

    Attributes
    ----------
    kept : dict
        The versions that were acknowledged.
    flight : Version or None
        One more that is being saved.
    going : frozenset of int
        Those of ``kept`` that are removed once the one in flight is there.
    loose : frozenset of int
        Those of ``kept`` that were, or are being, removed, but not durably.
    ghosts : tuple of Version
        Failed saves that may have come back. They are whole if they did.
    pinned : dict
        What was persisted and synced.
    """

    kept: dict[int, Version] = field(default_factory=dict)
    flight: Version | None = None
    going: frozenset[int] = frozenset()
    loose: frozenset[int] = frozenset()
    ghosts: tuple[Version, ...] = ()
    pinned: dict[UUID, Value] = field(default_factory=dict)

    def check(self, found: dict[int, Version]) -> None:
        new = {number: version for number, version in found.items() if number not in self.kept}
        newest = max(self.kept, default=0)
        assert all(found[number] == version for number, version in self.kept.items() if number in found)
        assert all(number > newest for number in new), f"versions {list(new)} came back"
        landed = [version for version in new.values() if version not in self.ghosts]
        assert landed in ([], [self.flight]), f"versions {list(new)} are not what was being saved"
        is_there = self.flight in new.values()
        lost = self.kept.keys() - found.keys() - self.loose - (self.going if is_there else frozenset())
        assert not lost, f"versions {sorted(lost)} are lost"


def left_by(kept: dict[int, Version], keep: int | None) -> set[int]:
    """The versions that stay when ``keep`` untagged ones do."""
    tagged = {version.tag: number for number, version in sorted(kept.items()) if version.tag is not None}
    untagged = sorted(kept.keys() - set(tagged.values()))
    return {*tagged.values(), *(untagged if keep is None else untagged[-keep:])}


# ------------------------------------------------------------------ scenes


class MortalDisk(FaultyDisk):
    """A disk on which nothing happens any more after some point; and that knows manifests from the rest."""

    _last: int | None = None
    _manifest_syncs: Callable[[], None] | None = None

    def die_at(self, nth: int) -> None:
        """Make the ``nth`` call from now, of any kind, and all after it without effect."""
        with self._lock:
            self._last = len(self.log) + nth

    def revive(self) -> None:
        with self._lock:
            self._last = None
        self.clear()

    def at_manifests_sync(self, nth: int, do: Callable[[], None], times: int = 1) -> None:
        """Call ``do`` before the ``nth`` fsync of the directory of manifests from now."""
        numbers = itertools.count(1)

        def step() -> None:
            if nth <= next(numbers) < nth + times:
                do()

        self._manifest_syncs = step

    def fsync(self, fd: int) -> None:
        if self._manifest_syncs is not None and os.readlink(f"/proc/self/fd/{fd}").endswith("/checkpoints"):
            self._manifest_syncs()
        super().fsync(fd)

    def _note(self, call: str) -> Any:
        if self._last is not None and len(self.log) >= self._last - 1 and not self._rules:
            for each in CALLS:
                self.fail(each, error=oserror(errno.EIO), times=None)
        return super()._note(call)


class Scene:
    """A tracked directory on a recording disk, pools that save to it, and what may be found."""

    def __init__(
        self, base: Path, disk: Disk = DISK, *, where: str = "tracked", kept: dict[int, Version] | None = None
    ) -> None:
        self.base, self.where = base, where
        for spill in ("spill-0", "spill-1"):
            (base / spill).mkdir(exist_ok=True, parents=True)
        if where == "tracked":
            for path, content in FOREIGN.items():
                (base / where / path).parent.mkdir(exist_ok=True, parents=True)
                (base / where / path).write_bytes(content)
        self.faulty = disk
        self.disk = RecordingDisk(base, disk)
        self.allowed = Allowed(dict(kept or {}))
        self.disk.mark(self.allowed)
        self.pools: list[FBPool] = []
        self.handles: list[Fb] = []
        self.opened = TrackedDirectory._over(fresh(self.path, self.disk))

    @property
    def path(self) -> Path:
        return self.base / self.where

    def reopen(self) -> None:
        """Open the directory as a fresh process does."""
        self.opened.close()
        self.opened = TrackedDirectory._over(fresh(self.path, self.disk))

    def pool(self, **numbers: int) -> FBPool:
        """A pool with an array of each name."""
        store = FileStore(str(self.base / f"spill-{len(self.pools)}"), disk=self.disk)
        pool = FBPool("1MB", store=store, io_threads=1, verify="always")
        self.pools.append(pool)
        self.put(pool, **numbers)
        return pool

    def put(self, pool: FBPool, **numbers: int) -> None:
        for name, number in numbers.items():
            size = 700 if name.startswith("big") else 30
            self.handles.append(pool.put(name, np.arange(size) * 1000 + number))

    def mutate(self, pool: FBPool, *names: str) -> None:
        for name in names:
            with pool.get_mut(name) as array:
                array += 1

    def mark(self, **changes: Any) -> None:
        self.allowed = replace(self.allowed, **changes)
        self.disk.mark(self.allowed)

    # ---------------------------------------------------------------- steps

    def save(
        self,
        pool: FBPool,
        names: list[str] | None = None,
        *,
        tag: str | None = None,
        keep: int | None = 1,
        **rest: Any,
    ) -> None:
        """Save, and say before what may come of it, and after what has."""
        with self.saving(values_of([pool], names), tag, keep) as done:
            done(pool.save(self.opened, names, tag=tag, keep=keep, **rest).version)
        pool.drain()

    @contextmanager
    def saving(
        self, values: dict[Any, Value], tag: str | None, keep: int | None
    ) -> Iterator[Callable[[int], None]]:
        """What a save is surrounded by. A warning or a failure makes less sure of what is found later."""
        former, flight = self.allowed, Version(tag, values)
        after = left_by({**former.kept, 10**10: flight}, keep)
        self.mark(flight=flight, going=former.kept.keys() - after)
        numbers: list[int] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FBCacheWarning)
            try:
                yield numbers.append
            except Exception:
                self.mark(flight=None, going=frozenset(), ghosts=(*former.ghosts, flight))
                raise
        kept = {**former.kept, numbers[0]: flight}
        if caught:  # what was to go may have gone or not
            self.mark(flight=None, kept=kept, going=frozenset(), loose=former.loose | self.allowed.going)
        else:
            gone = self.allowed.going
            kept = {number: version for number, version in kept.items() if number not in gone}
            self.mark(flight=None, kept=kept, going=frozenset(), loose=former.loose - gone, ghosts=())

    def fails_to_save(self, pool: FBPool, error: type[BaseException] = StorageError, **rest: Any) -> None:
        """Save, and see it fail; what the disk was told to do is forgotten then."""
        with pytest.raises(error):
            self.save(pool, **rest)
        assert isinstance(self.faulty, FaultyDisk)
        self.faulty.clear()

    def withdraws(self, pool: FBPool, **rest: Any) -> None:
        """Save with a ``change_key`` that raises."""
        former = self.allowed

        def change_key(_: Any) -> None:
            raise LookupError

        with pytest.raises(LookupError):
            self.save(pool, change_key=change_key, **rest)
        self.mark(ghosts=former.ghosts)  # it was withdrawn durably

    def forget(self, version_or_tag: int | str, number: int) -> None:
        self.mark(loose=self.allowed.loose | {number})
        self.opened.forget(version_or_tag)
        kept = {n: version for n, version in self.allowed.kept.items() if n != number}
        self.mark(kept=kept, loose=self.allowed.loose - {number})

    def dies_saving(self, pool: FBPool) -> None:
        """Save, and die where the disk was told to. Then another process opens it."""
        assert isinstance(self.faulty, MortalDisk)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FBCacheWarning)
            try:
                self.save(pool)
            except OSError:
                pass
            self.opened.close()
        self.faulty.revive()
        self.opened = TrackedDirectory._over(fresh(self.path, self.disk))
        seen = look(self.path, readonly=True).versions
        self.mark(kept=seen, flight=None, going=frozenset(), loose=frozenset(), ghosts=())

    def persist(self, pool: FBPool, *names: str) -> list[UUID]:
        """Persist, which is durable after the next :meth:`sync`."""
        return [pool.persist(name, self.opened) for name in names]

    def sync(self, pool: FBPool, *names: str) -> None:
        self.opened.sync()
        keys = [pool.persist(name, self.opened) for name in names]  # a look-up, now
        values = values_of([pool], list(names))
        self.mark(pinned={**self.allowed.pinned, **dict(zip(keys, values.values(), strict=True))})

    def delete(self, key: UUID) -> None:
        pinned = {each: value for each, value in self.allowed.pinned.items() if each != key}
        self.mark(pinned=pinned)
        self.opened.delete(key)

    def close(self) -> None:
        self.opened.close()
        self.handles.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FBCacheWarning)  # of deletions that failed
            while self.pools:
                self.pools.pop().close()


def values_of(pools: list[FBPool], names: list[str] | None = None) -> dict[Any, Value]:
    found = {}
    for pool in pools:
        for name in names if names is not None else list(pool):
            with pool.get(name) as value:
                found[name] = exact(value)
    return found


class Make:
    """Makes scenes below a directory, each in a new one; ``seed`` is for what they choose."""

    def __init__(self, below: Path, seed: int) -> None:
        self._below = below
        self.seed = seed
        self._made: list[Scene] = []

    def new_base(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._below))

    def __call__(self, disk: Disk = DISK, *, base: Path | None = None, **options: Any) -> Scene:
        self._made.append(Scene(base or self.new_base(), disk, **options))
        return self._made[-1]

    def close(self) -> None:
        """End those scenes that have not, whatever became of them."""
        while self._made:
            self._made.pop().close()


@contextmanager
def new_boot() -> Iterator[None]:
    """See who wrote an image as what he is: a process of before the power failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "_boot_id", lambda: "another")
        yield
