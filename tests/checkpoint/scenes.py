"""What is done to a tracked directory before the power fails.

A scene is a generator of recordings, each a :class:`~tests.checkpoint.scene.Scene` that has been played.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from fbcache import StorageError
from fbcache.store import syncing
from tests.checkpoint.opened import look
from tests.checkpoint.scene import Make, MortalDisk, Scene, new_boot, values_of
from tests.faults import FaultyDisk, oserror
from tests.powerloss import images_at


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
    scene.mutate(pool, "b")
    scene.persist(pool, "b")
    scene.reopen()  # what is pinned by a process that did not sync is not durable yet
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
    for times in (1, 2):  # the second sync is of taking it back
        scene = make(disk := MortalDisk())
        pool = scene.pool(a=1)
        scene.save(pool)
        scene.mutate(pool, "a")
        disk.at_manifests_sync(1, lambda disk=disk: disk.fail("fsync", error=oserror(errno.EIO)), times)
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


def syncs_that_fail_and_one_that_does_not(make: Make) -> Iterator[Scene]:
    for nth in range(1, 5):  # two blobs, their shards
        scene = make(FaultyDisk())
        pool = scene.pool(a=1, b=2, c=3)
        scene.save(pool, ["c"])
        scene.persist(pool, "a", "b", "c")
        failing(scene, "fsync", errno.EIO, nth)
        with pytest.raises(StorageError):
            scene.opened.sync()
        scene.faulty.clear()
        scene.sync(pool, "a", "b", "c")
        scene.save(pool)
        yield scene


def killed_and_opened_before_the_power_fails(make: Make) -> Iterator[Scene]:
    """What the next process has seen is what stays, or nothing of what it found may be removed yet."""
    for nth in range(1 + make.seed % 3, 80, 3):
        scene = make(MortalDisk())
        pool = scene.pool(a=1, b=2)
        scene.save(pool)
        scene.mutate(pool, "a", "b")
        scene.put(pool, c=3)
        scene.faulty.die_at(nth)
        scene.dies_saving(pool)
        other = scene.pool(d=4)
        scene.save(other, keep=2)
        yield scene


def killed_while_manifests_are_taken_away(make: Make) -> Iterator[Scene]:
    """They may come back: what the next process sweeps on opening must not be their blobs."""
    for nth in (1, 2):  # the first sync is of the new one
        scene = make(disk := MortalDisk())
        pool = scene.pool(a=1, b=2)
        scene.save(pool)
        scene.mutate(pool, "a", "b")
        disk.at_manifests_sync(nth, lambda disk=disk: disk.die_at(1))
        scene.dies_saving(pool)
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
    syncs_that_fail_and_one_that_does_not: 2,
    killed_and_opened_before_the_power_fails: 8,
    killed_while_manifests_are_taken_away: 2,
    saves_across_file_systems: 2,
    saves_by_syncfs: 2,
    opened_after_power_loss_and_again: 8,
}
