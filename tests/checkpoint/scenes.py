"""What is done to a tracked directory before the power fails, and what may be found there then.

Each scene works on a recording disk and marks in its log, with :class:`Allowed`, what power loss may
leave from that point on. A scene is a generator: it may have several recordings.
"""

from __future__ import annotations

import errno
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
from fbcache.store import owner, syncing
from fbcache.store.disk import DISK, Disk
from tests.checkpoint.opened import Value, Version, exact, fresh, look
from tests.faults import FaultyDisk, oserror
from tests.powerloss import RecordingDisk, images_at

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


def a_first_save_makes_the_directory(make: Make) -> Iterator[Scene]:
    scene = make(where="deep/er/tracked")
    scene.save(scene.pool(a=1, b=2, big=3))
    yield scene


def saves_one_after_the_other(make: Make) -> Iterator[Scene]:
    scene = make()
    pool = scene.pool(a=1, b=2, big=3)
    scene.save(pool)
    for names in (["a"], ["b", "big"], [], ["a", "b"]):
        scene.mutate(pool, *names)
        scene.save(pool)
    yield scene


def saves_that_keep_three(make: Make) -> Iterator[Scene]:
    scene = make()
    pool = scene.pool(a=1, b=2, big=3)
    for _ in range(5):
        scene.save(pool, keep=3)
        scene.mutate(pool, "a", "big")
    scene.put(pool, c=4, b=5)
    scene.save(pool, keep=None)
    scene.save(pool, ["a", "c"], keep=1)  # four go at once
    yield scene


def tags_that_move(make: Make) -> Iterator[Scene]:
    scene = make()
    pool = scene.pool(a=1, b=2)
    for tag in ("best", None, "best", "last", None, "last"):
        scene.save(pool, tag=tag)
        scene.mutate(pool, "a")
    yield scene


def withdrawn_by_change_key(make: Make) -> Iterator[Scene]:
    scene = make()
    pool = scene.pool(a=1, b=2)
    scene.withdraws(pool)
    scene.save(pool)
    scene.mutate(pool, "a")
    scene.withdraws(pool, tag="no")
    scene.save(pool, keep=2, change_key=lambda checkpoint: None)
    scene.withdraws(pool)
    yield scene


def forgotten(make: Make) -> Iterator[Scene]:
    scene = make()
    pool = scene.pool(a=1, b=2)
    for tag in ("one", None, "three", "four"):
        scene.save(pool, tag=tag, keep=None)
        scene.mutate(pool, "b")
    scene.forget(2, 2)
    scene.forget("four", 4)
    scene.save(pool, keep=2)
    scene.forget("one", 1)
    yield scene


def persisted_synced_and_deleted(make: Make) -> Iterator[Scene]:
    scene = make()
    pool = scene.pool(a=1, b=2, c=3)
    a, _ = scene.persist(pool, "a", "b")
    scene.sync(pool, "a", "b")
    scene.save(pool)
    scene.delete(a)
    scene.mutate(pool, "a", "b")
    scene.persist(pool, "a", "c")
    scene.save(pool)
    scene.sync(pool, "a", "c")
    for key in list(scene.allowed.pinned):
        scene.delete(key)
    scene.persist(pool, "b")
    scene.sync(pool, "b")
    yield scene


def savers_without_commit(make: Make) -> Iterator[Scene]:
    scene = make()
    first, second = scene.pool(a=1, b=2), scene.pool(c=3, d=4)
    for commit in (False, True, False, True):
        with scene.opened.saving() as saver:
            for handle in scene.handles:
                saver.persist(handle)
            if commit:
                with scene.saving(values_of([first, second]), None, 1) as done:
                    done(saver.commit().version)
        scene.mutate(first, "a")
        scene.mutate(second, "d")
    yield scene


def two_pools_to_one_directory(make: Make) -> Iterator[Scene]:
    scene = make()
    first, second = scene.pool(a=1, b=2), scene.pool(a=3, c=4)
    for pool in (first, second, first, second):
        scene.save(pool, keep=2)
        scene.mutate(pool, "a")
    yield scene


def restored_changed_and_saved(make: Make) -> Iterator[Scene]:
    scene = make()
    pool = scene.pool(a=1, b=2, big=3)
    scene.save(pool)
    other = scene.pool()
    scene.reopen()
    other.restore(scene.opened)
    scene.mutate(other, "a", "big")
    scene.save(other)
    scene.mutate(pool, "b")
    pool.restore(scene.opened, ["a"], replace=True)
    scene.save(pool, keep=2)
    other.restore(scene.opened, replace=True)
    scene.mutate(other, "b")
    scene.save(other)
    yield scene


def failing(scene: Scene, call: str, code: int, nth: int, times: int | None = 1) -> None:
    assert isinstance(scene.faulty, FaultyDisk)
    scene.faulty.fail(call, error=oserror(code), nth=nth, times=times)


#: A call of a save of three arrays, and the numbers of those that may fail before the commit.
FAILURES = [
    ("fsync", errno.EIO, range(1, 12)),
    ("writev", errno.ENOSPC, range(1, 5)),
    ("link", errno.EIO, range(1, 4)),
    ("rename", errno.ENOSPC, range(1, 5)),
]


def saves_that_fail_and_one_that_does_not(make: Make) -> Iterator[Scene]:
    for call, code, numbers in FAILURES:
        for nth in numbers:
            scene = make(FaultyDisk())
            pool = scene.pool(a=1, b=2)
            scene.save(pool)
            scene.put(pool, c=3, d=4)
            scene.mutate(pool, "a")
            failing(scene, call, code, nth)
            try:
                scene.save(pool)
            except StorageError:
                pass
            scene.faulty.clear()
            scene.mutate(pool, "d")
            scene.save(pool, keep=2)
            yield scene


def a_save_whose_manifest_is_in_doubt(make: Make) -> Iterator[Scene]:
    for times in (1, 2):  # of the directory of manifests; the second is of taking it back
        scene = make(FaultyDisk())
        pool = scene.pool(a=1)
        scene.save(pool)
        scene.mutate(pool, "a")
        failing(scene, "fsync", errno.EIO, 5, times)
        scene.fails_to_save(pool)
        scene.put(pool, b=2)
        scene.save(pool, keep=2)
        yield scene


def saves_that_cannot_clean_up(make: Make) -> Iterator[Scene]:
    for call, numbers in (("unlink", range(1, 4)), ("fsync", range(6, 10))):
        for nth in numbers:
            scene = make(FaultyDisk())
            pool = scene.pool(a=1, b=2)
            scene.save(pool)
            scene.mutate(pool, "a", "b")
            failing(scene, call, errno.EIO, nth, None)
            try:
                scene.save(pool)
            except StorageError:
                pass
            scene.faulty.clear()
            scene.mutate(pool, "a")
            scene.save(pool)
            yield scene


def saves_across_file_systems(make: Make) -> Iterator[Scene]:
    disk = FaultyDisk()
    for call in ("link", "clone", "copy_range"):
        disk.fail(call, error=oserror(errno.EXDEV), times=None)
    scene = make(disk)
    pool = scene.pool(a=1, big=3)
    for _ in range(3):
        scene.save(pool)
        scene.mutate(pool, "a", "big")
    scene.persist(pool, "big")
    scene.sync(pool, "big")
    yield scene


def saves_by_syncfs(make: Make) -> Iterator[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syncing, "SYNCFS_FROM", 1)
        patch.setattr(syncing, "_syncfs_tells", lambda root: True)
        scene = make(FaultyDisk())
        pool = scene.pool(a=1, b=2, big=3)
        scene.save(pool, keep=2)
        scene.mutate(pool, "a", "big")
        failing(scene, "syncfs", errno.EIO, 1)
        scene.fails_to_save(pool)
        scene.save(pool)
        scene.mutate(pool, "b")
        scene.save(pool, keep=2)
        yield scene


def opened_after_power_loss_and_again(make: Make) -> Iterator[Scene]:
    """Opening sweeps, and saving goes on: the power fails in the midst of that too."""
    for former in (*saves_one_after_the_other(make), *forgotten(make), *persisted_synced_and_deleted(make)):
        former.close()
        for position in range(3, len(former.disk.log), 17):
            *_, image = images_at(former.disk.log, position, 6, seed=make.seed)
            base = make.new_base()
            image.build(base)
            with new_boot():
                scene = make(base=base, kept=look(base / former.where, readonly=True).versions)
                scene.save(scene.pool(a=7, z=8))
            yield scene


@contextmanager
def new_boot() -> Iterator[None]:
    """See who wrote an image as what he is: a process of before the power failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "_boot_id", lambda: "another")
        yield


#: All of them, and their shares of the images.
SCENES = {
    a_first_save_makes_the_directory: 1,
    saves_one_after_the_other: 2,
    saves_that_keep_three: 2,
    tags_that_move: 2,
    withdrawn_by_change_key: 2,
    forgotten: 2,
    persisted_synced_and_deleted: 2,
    savers_without_commit: 2,
    two_pools_to_one_directory: 2,
    restored_changed_and_saved: 2,
    saves_that_fail_and_one_that_does_not: 8,
    a_save_whose_manifest_is_in_doubt: 2,
    saves_that_cannot_clean_up: 4,
    saves_across_file_systems: 2,
    saves_by_syncfs: 2,
    opened_after_power_loss_and_again: 8,
}
