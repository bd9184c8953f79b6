"""``pool.save``: what a checkpoint has, what it costs, which versions stay, and who may save when."""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest

from fbcache import (
    CheckpointNotFoundError,
    DeadlockError,
    DirectoryInUseError,
    FBPool,
    NameTakenError,
    PickleRefusedError,
    StorageError,
    TrackedDirectory,
    UnsupportedTypeError,
)
from fbcache.checkpoint import tracked as tracked_module
from fbcache.checkpoint.registry import directory_at
from fbcache.checkpoint.rights import Rights
from fbcache.checkpoint.versions import Versions
from tests.directories import HOLDER, Child, blobs_in, large, manifest_of, versions_on
from tests.faults import FaultyDisk, oserror

NAMES = [
    *("train", "", "../x", "/etc/passwd", "a\0b", "naïve 🌍", "\ud800", 7, -1.5, b"bytes"),
    *(("tile", 3, (4, None)), frozenset({1, "a"}), date(2024, 2, 29), 1 << 70, True),
]


class Odd:
    """Of a type that takes pickle."""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    """The disk of every directory that is given by its path."""
    disk = FaultyDisk()
    monkeypatch.setattr(tracked_module, "directory_at", lambda path: directory_at(path, disk))
    return disk


Restored = Callable[..., dict]


@pytest.fixture
def restored(make_pool) -> Restored:
    """``restored(path, **choice)``: what another pool gets of a checkpoint."""

    def restore(path, **choice):
        with make_pool("50MB") as other:
            checkpoint = other.restore(path, **choice)
            assert set(checkpoint.names) >= set(other.keys())
            return {name: other[name] for name in other}

    return restore


# ------------------------------------------------------------------ what is in it


def test_every_kind_of_name_comes_back_with_its_own_value(pool, target, restored):
    for number, name in enumerate(NAMES):
        pool[name] = [number]
    checkpoint = pool.save(target)
    assert checkpoint.names == tuple(NAMES)
    found = restored(target)
    assert list(found) == NAMES and list(map(type, found)) == list(map(type, NAMES))
    assert list(found.values()) == [[number] for number in range(len(NAMES))]
    assert sorted(path.name for path in target.parent.iterdir()) == ["ck", "spill"]


def test_a_save_of_some_names_has_those_once_and_in_that_order(pool, target, restored):
    for name in "abcd":
        pool[name] = name
    assert pool.save(target, ["d", "b", "d"]).names == ("d", "b")
    assert pool.save(target, (name for name in "ca")).names == ("c", "a")
    assert restored(target) == {"c": "c", "a": "a"}


def test_an_unknown_name_commits_nothing_and_says_what_was_near(pool, target):
    pool["train"] = 1
    pool.save(target)
    with pytest.raises(KeyError, match="train"):
        pool.save(target, ["train", "trian"])
    assert versions_on(target) == [1]


def test_a_checkpoint_tells_what_it_is(pool, target):
    before = datetime.now(UTC)
    pool["a"], pool["b"] = np.zeros(1000), "text"
    size = sum(pool.put(name, pool[name]).nbytes for name in "ab")
    checkpoint = pool.save(str(target), tag="first", meta={"lr": 0.1, "of": [1, None, {"x": b"y"}]})
    assert (checkpoint.version, checkpoint.tag, checkpoint.names) == (1, "first", ("a", "b"))
    assert checkpoint.meta == {"lr": 0.1, "of": [1, None, {"x": b"y"}]}
    assert checkpoint.path == os.path.realpath(target)
    assert checkpoint.nbytes == size
    assert checkpoint.blobs_written == 2
    written = [path.stat().st_size for path in target.glob("??/*")]
    assert checkpoint.bytes_written == sum(written) and len(written) == 2
    assert before <= checkpoint.created <= datetime.now(UTC) and checkpoint.created.tzinfo is UTC
    with TrackedDirectory(target) as tracked:
        assert tracked.checkpoints() == [checkpoint]


def test_an_empty_pool_is_a_checkpoint_too(pool, target, restored):
    assert pool.save(target).names == ()
    assert restored(target) == {}
    pool["a"] = 1
    pool.save(target)
    pool.delete("a")
    assert pool.save(target).version == 3
    assert restored(target) == {} and blobs_in(target) == set()


def test_entries_under_two_names_and_with_one_key_are_saved_for_both(pool, target, restored):
    fb = pool.put("a", np.arange(100))
    with TrackedDirectory(target) as tracked:
        key = fb.persist(tracked)
        pool.register(tracked, key, "b")
        assert pool.save(tracked).names == ("a", "b")
    found = restored(target)
    assert (found["a"] == found["b"]).all() and len(blobs_in(target)) == 1


def test_restored_entries_are_saved_elsewhere_without_being_loaded(
    pool, target, make_pool, restored, tmp_path
):
    pool["a"] = np.arange(100)
    pool.save(target)
    other = make_pool()
    other.restore(target)
    assert other.save(tmp_path / "copy").blobs_written == 1
    assert other.stats().loads == 0
    assert (restored(tmp_path / "copy")["a"] == np.arange(100)).all()


def test_what_a_writer_changes_during_a_save_is_not_in_it(make_faulty_pool, target, spawn, restored):
    pool, disk = make_faulty_pool(io_threads=1)
    for name in "abcd":
        pool[name] = [1]
    gate = disk.gate("writev")
    saving = spawn(pool.save, target)
    gate.wait_reached()  # with the first one's file
    with pool.get_mut("b") as value:
        value.append(2)
    pool["c"] = pool["e"] = [2]
    pool.delete("d")
    gate.open()
    saving.result()
    assert restored(target) == {name: [1] for name in "abcd"}


# ------------------------------------------------------------------ what it costs


def counted(disk: FaultyDisk, call: Callable[[], object]) -> Counter[str]:
    disk.log.clear()
    call()
    return Counter(disk.log)


@pytest.mark.parametrize("kept_open", [False, True])
def test_unchanged_entries_cost_neither_link_nor_open_nor_write_nor_fsync(
    make_pool, tmp_path, disk, kept_open
):
    costs = []
    for count in (3, 60):
        with make_pool() as pool:
            for number in range(count):
                pool[number] = np.full(100, number)
            target = tmp_path / f"of-{count}"
            tracked = target
            if kept_open:
                tracked = TrackedDirectory(target)
            pool.save(tracked)
            costs.append(counted(disk, lambda: pool.save(tracked)))  # noqa: B023  # called at once
            again = pool.save(tracked)
            assert (again.version, again.blobs_written, again.bytes_written) == (3, 0, 0)
            if kept_open:
                tracked.close()
    few, many = costs
    assert few == many and few["link"] == few["copy_range"] == few["clone"] == 0


@pytest.mark.files
def test_one_changed_entry_of_many_costs_one_link_and_is_the_only_one_written(pool, target, disk):
    for number in range(40):
        pool[number] = np.full(100, number)
    pool.save(target)
    former = blobs_in(target)
    with pool.get_mut(7) as value:
        value[0] = -1
    cost = counted(disk, lambda: pool.save(target))
    assert cost["link"] in (1, 2)  # where the shard is new, the first one tells so
    assert len(blobs_in(target) - former) == 1 and len(blobs_in(target)) == 40
    with TrackedDirectory(target) as tracked:
        (checkpoint,) = tracked.checkpoints()
        assert checkpoint.blobs_written == 1
        (new,) = blobs_in(target) - former
        assert checkpoint.bytes_written == (target / new[:2] / new).stat().st_size


def test_a_second_save_to_a_path_looks_into_no_shard_unless_another_process_wrote_meanwhile(
    pool, target, disk, spawn
):
    for number in range(12):  # too few for a pack
        pool[number] = number
    pool.save(target)
    shards = len(list(target.glob("??")))
    assert counted(disk, lambda: pool.save(target))["listdir"] < shards
    with Child(HOLDER, target) as child:
        assert child.hear() == "open"
        child.end()
    assert counted(disk, lambda: pool.save(target))["listdir"] > shards
    assert counted(disk, lambda: pool.save(target))["listdir"] < shards


# ------------------------------------------------------------------ which versions stay


def history(path: Path) -> dict[int, str | None]:
    with TrackedDirectory(path, readonly=True) as tracked:
        return {checkpoint.version: checkpoint.tag for checkpoint in tracked.checkpoints()}


def test_only_the_newest_version_stays_by_default_and_its_blobs(pool, target):
    pool["same"] = 0
    for number in range(4):
        pool["a"] = number
        pool.save(target)
        assert versions_on(target) == [number + 1]
        assert len(blobs_in(target)) == 2


@pytest.mark.parametrize("keep", [1, 2, 3, None])
def test_keep_counts_untagged_versions_and_tagged_ones_stay(pool, target, keep, restored):
    tags = [None, "a", None, "b", None, None]
    for number, tag in enumerate(tags, 1):
        pool["x"] = number
        pool.save(target, keep=keep, tag=tag)
    untagged = [number for number, tag in enumerate(tags, 1) if tag is None]
    stay = sorted([2, 4, *(untagged if keep is None else untagged[-keep:])])
    assert list(history(target)) == stay and len(blobs_in(target)) == len(stay)
    for version in stay:
        assert restored(target, version=version) == {"x": version}


def test_a_tag_given_again_moves_and_the_former_version_counts_as_untagged(pool, target, restored):
    for number in range(1, 5):
        pool["x"] = number
        pool.save(target, tag="best" if number in (1, 3) else None, keep=2)
    assert list(history(target)) == [2, 3, 4]  # version 1 has lost its tag, and is the oldest
    assert restored(target, tag="best") == {"x": 3}
    pool.save(target, tag="best", keep=2)
    assert list(history(target)) == [3, 4, 5] and restored(target, tag="best") == {"x": 4}


def test_blobs_that_only_removed_versions_need_go_and_shared_ones_stay(pool, target, restored):
    pool["shared"], pool["old"] = "shared", "old"
    pool.save(target, tag="kept")
    pool.delete("old")
    pool["new"] = "new"
    pool.save(target)
    assert len(blobs_in(target)) == 3
    with TrackedDirectory(target) as tracked:
        assert tracked.forget("kept") == 1
    assert restored(target) == {"shared": "shared", "new": "new"} and len(blobs_in(target)) == 2


def test_what_was_persisted_stays_when_no_version_needs_it(pool, target):
    key = pool.put("a", 1).persist(target)
    pool.save(target)
    pool.delete("a")
    pool.save(target)
    assert blobs_in(target) == {key.hex}


# ------------------------------------------------------------------ change_key


def test_change_key_is_called_between_commit_and_cleanup(pool, target, restored):
    pool["x"] = 1
    pool.save(target)
    pool["x"] = 2
    seen = []

    def change(checkpoint):
        seen.append(checkpoint)
        assert versions_on(target) == [1, 2]
        assert restored(target) == {"x": 2} and restored(target, version=1) == {"x": 1}

    assert pool.save(target, change_key=change) == seen[0] and len(seen) == 1
    assert versions_on(target) == [2] and len(blobs_in(target)) == 1


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_change_key_that_raises_withdraws_the_version_durably_and_the_former_stands(
    pool, target, disk, restored, error
):
    pool["x"], pool["same"] = 1, 0
    pool.save(target)
    former = blobs_in(target)
    pool["x"] = 2

    def change(checkpoint):
        disk.log.clear()
        raise error

    with pytest.raises(type(error)) as caught:
        pool.save(target, change_key=change)
    assert caught.value is error
    first_blob = disk.log.index("unlink", disk.log.index("fsync"))
    assert disk.log.index("unlink") < disk.log.index("fsync") < first_blob  # manifest, durable, blob
    assert versions_on(target) == [1] and blobs_in(target) == former
    assert restored(target) == {"x": 1, "same": 0}
    assert pool.save(target).version == 3  # a number is never given twice
    assert restored(target) == {"x": 2, "same": 0}


def test_a_withdrawal_that_fails_too_is_told_beside_the_users_error(pool, target, disk):
    pool["x"] = 1

    def change(checkpoint):
        disk.fail("unlink", error=oserror(5))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as caught:
        pool.save(target, change_key=change)
    assert any("version 1 could not be withdrawn" in note for note in caught.value.__notes__)


# ------------------------------------------------------------------ who may save when


def test_the_second_save_of_two_at_once_waits_or_raises_by_argument(
    pool, target, make_pool, spawn, monkeypatch
):
    other = make_pool()
    pool["x"], other["x"] = 1, 2
    inside, go = threading.Event(), threading.Event()

    def change(checkpoint):
        inside.set()
        assert go.wait(30)

    first = spawn(pool.save, target, change_key=change)
    assert inside.wait(30)
    with pytest.raises(DirectoryInUseError, match="in this process") as caught:
        other.save(target, wait=False)
    assert caught.value.pid == os.getpid()
    directory = directory_at(target)
    asked = threading.Event()

    class Announced(Rights):
        def acquire(self, key, right, *, wait=True):
            asked.set()
            return turns.acquire(key, right, wait=wait)

        def release(self, key, right):
            turns.release(key, right)

        def owner(self, key):
            return turns.owner(key)

    turns = directory._turns
    monkeypatch.setattr(directory, "_turns", Announced())
    second = spawn(other.save, target, keep=None)
    assert asked.wait(30)
    assert not second.done and versions_on(target) == [1]
    go.set()
    assert (first.result().version, second.result().version) == (1, 2)


def test_saves_of_many_threads_come_one_after_the_other_and_lose_nothing(make_pool, target, spawn, restored):
    pools = [make_pool() for _ in range(4)]
    for number, each in enumerate(pools):
        each["x"] = number
    running = [spawn(each.save, target, keep=None) for each in pools for _ in range(5)]
    assert sorted(run.result().version for run in running) == list(range(1, 21))
    values = {version: restored(target, version=version)["x"] for version in versions_on(target)}
    assert Counter(values.values()) == dict.fromkeys(range(4), 5)


@pytest.mark.parametrize("wait", [True, False])
def test_a_directory_that_another_process_has_open_is_in_use_and_by_whom(pool, target, restored, wait):
    pool["x"] = 1
    pool.save(target)
    pool["x"] = 2
    with Child(HOLDER, target) as child:
        assert child.hear() == "open"
        with pytest.raises(DirectoryInUseError) as caught:
            pool.save(target, wait=wait)
        assert caught.value.pid == child.pid and str(child.pid) in str(caught.value)
        assert caught.value.host == os.uname().nodename and caught.value.host in str(caught.value)
        assert restored(target) == {"x": 1}  # readers are let in all the same
        child.end()
    assert pool.save(target).version == 2


def test_a_save_within_a_save_of_the_same_thread_is_a_deadlock(pool, target):
    pool["x"] = 1
    with TrackedDirectory(target) as tracked:
        with tracked.saving():
            with pytest.raises(DeadlockError):
                pool.save(tracked)
            with pytest.raises(DeadlockError):
                pool.save(target, wait=False)
            with pytest.raises(DeadlockError), tracked.saving():
                pass
        with pytest.raises(DeadlockError):
            pool.save(tracked, change_key=lambda checkpoint: pool.save(tracked))
        assert versions_on(target) == []
        assert pool.save(tracked).version > 0


def test_a_save_by_who_holds_an_entry_for_writing_is_a_deadlock_and_commits_nothing(pool, target):
    pool["a"], pool["x"] = 0, [1]
    with pool.get_mut("x"), pytest.raises(DeadlockError):
        pool.save(target)
    assert versions_on(target) == [] and blobs_in(target) == set()
    pool.save(target)


def test_the_lock_is_given_back_after_a_save_to_a_path_however_it_ends(pool, target):
    pool["x"] = 1
    pool.save(target)
    with pytest.raises(KeyError):
        pool.save(target, ["y"])
    with Child(HOLDER, target) as child:
        assert child.hear() == "open"
        child.end()


# ------------------------------------------------------------------ paths


def test_two_paths_to_one_directory_are_one_directory(pool, target, tmp_path, restored, monkeypatch):
    pool["x"] = 1
    link = tmp_path / "link"
    link.symlink_to("ck")
    target.mkdir()
    assert pool.save(link).path == os.path.realpath(target)
    assert link.is_symlink() and versions_on(target) == [1]
    with TrackedDirectory(target) as tracked, TrackedDirectory(link) as same:
        assert tracked.path == same.path
        pool.save(same)
        monkeypatch.chdir(tmp_path)
        pool.save("ck/../link/.")
        assert [c.version for c in tracked.checkpoints()] == [3]
        with pytest.raises(DeadlockError), tracked.saving():
            pool.save(link)
    assert restored(target) == restored(link) == {"x": 1}


def test_a_home_directory_may_be_meant(pool, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pool.save("~/ck").path == os.path.realpath(tmp_path / "ck")


def test_what_fbcache_makes_is_for_its_user_only(pool, target):
    pool.put("x", 1).persist(target)
    pool.save(target)
    for path in (target, *target.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


# ------------------------------------------------------------------ the saver


def test_a_saver_makes_one_checkpoint_of_two_pools_and_of_what_has_no_name(pool, make_pool, target, restored):
    other = make_pool()
    unnamed = other.insert([3])
    with TrackedDirectory(target) as tracked:
        with tracked.saving() as saver:
            key = saver.persist(pool.put("a", [1]))
            saver.persist(other.put("a", [2]), "b")
            saver.persist(unnamed, ("c", 3))
            with pytest.raises(TypeError, match="name="):
                saver.persist(unnamed)
            with pytest.raises(NameTakenError, match="'a'"):
                saver.persist(unnamed, "a")
            checkpoint = saver.commit(tag="both", meta={"n": 3})
        assert key in tracked and pool["a"] == [1]
    assert checkpoint.names == ("a", "b", ("c", 3)) and checkpoint.blobs_written == 3
    assert restored(target, tag="both") == {"a": [1], "b": [2], ("c", 3): [3]}
    unnamed.drop()


def test_a_saver_without_commit_takes_back_what_it_brought_in(pool, target, restored):
    pool["x"] = 1
    pool.save(target)
    former = blobs_in(target)
    fb = pool.put("y", 2)
    with TrackedDirectory(target) as tracked:
        with tracked.saving() as saver:
            key = saver.persist(fb)
        assert key not in tracked and blobs_in(target) == former
        with pytest.raises(ZeroDivisionError), tracked.saving() as saver:
            saver.persist(fb)
            1 / 0
        assert blobs_in(target) == former
    assert restored(target) == {"x": 1}


def test_a_saver_that_has_ended_says_so(pool, target):
    fb = pool.put("x", 1)
    with TrackedDirectory(target) as tracked:
        with tracked.saving() as saver:
            saver.persist(fb)
            saver.commit()
            for call in (lambda: saver.persist(fb), saver.commit):
                with pytest.raises(RuntimeError, match="begin another"):
                    call()
        with pytest.raises(RuntimeError, match="begin another"):
            saver.commit()
        assert versions_on(target) == [1]


def test_an_entry_that_a_saver_cannot_take_leaves_the_others(pool, target, restored):
    fb, odd = pool.put("x", 1), pool.put("odd", Odd())
    with TrackedDirectory(target) as tracked, tracked.saving() as saver:
        saver.persist(fb)
        with pytest.raises(PickleRefusedError):
            saver.persist(odd)
        assert saver.commit().names == ("x",)
    assert restored(target) == {"x": 1}
    assert len(blobs_in(target)) == 1


# ------------------------------------------------------------------ pickle


def test_pickle_is_refused_by_name_and_type_and_nothing_is_left(pool, target, restored):
    pool["x"] = 1
    pool.save(target)
    former = blobs_in(target)
    pool["model"] = {"w": [np.zeros(3), Odd()]}
    pool["x"] = 2
    with pytest.raises(PickleRefusedError, match=r"'model'.*allow_pickle=True.*Odd") as caught:
        pool.save(target)
    assert caught.value.path == "value['w'][1]"
    assert versions_on(target) == [1] and blobs_in(target) == former
    assert restored(target) == {"x": 1}


def test_pickle_is_taken_where_both_sides_allow_it(pool, target, restored):
    pool["model"] = {"w": Odd()}
    pool.save(target, allow_pickle=True)
    with pytest.raises(PickleRefusedError):
        pool.save(target)  # the blob is there already, and that changes nothing
    assert type(restored(target, allow_pickle=True)["model"]["w"]) is Odd
    assert pool.save(target, [], keep=2).names == ()


def test_a_name_that_cannot_be_kept_commits_nothing(pool, target):
    class Name:
        pass

    for bad in (Name(), ("x", object), "x" * 70_000 + "\ud800"):
        pool[bad] = 1
        with pytest.raises((UnsupportedTypeError, PickleRefusedError), match="name"):
            pool.save(target)
        pool.delete(bad)
    assert versions_on(target) == [] and blobs_in(target) == set()


# ------------------------------------------------------------------ failures (invariant 12)

CALLS = ["link", "open", "writev", "fsync", "rename", "preadv", "fstat"]


@pytest.mark.files
@pytest.mark.parametrize("call", CALLS)
def test_a_failure_at_any_call_of_a_save_leaves_the_former_checkpoint_and_the_next_save_works(
    pool, target, disk, restored, call
):
    pool["x"], pool["same"] = 1, 0
    pool.save(target)
    failures = 0
    for nth in range(1, 100):
        pool["x"] = nth + 1
        disk.clear()
        disk.fail(call, error=oserror(5), nth=nth)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the checkpoint is saved, but former ones")
                pool.save(target)
        except StorageError as error:
            failures += 1
            assert str(target) in str(error) and error.errno == 5
            assert restored(target) == {"x": nth, "same": 0}
            disk.clear()
            pool.save(target)
        else:
            if disk._rules[call][0].seen < nth:
                assert len(versions_on(target)) == 1
                break
        assert restored(target) == {"x": nth + 1, "same": 0}
    else:
        raise AssertionError("it never came to an end")
    assert failures > 0


@pytest.mark.parametrize(
    ("call", "after"),
    # An interrupt at the very return of open loses the descriptor, which nobody can help.
    [("open", False), *((call, after) for call in ("writev", "fsync", "rename") for after in (False, True))],
)
def test_an_interrupt_while_a_manifest_is_published_leaves_it_invisible(target, pool, disk, call, after):
    """Invariant 12: also if it comes right after the rename."""
    pool["x"] = 1
    pool.save(target)
    for nth in range(1, 4):
        disk.clear()

        def publish(self, manifest, real=Versions.publish, nth=nth):
            (disk.fail_after if after else disk.fail)(call, error=KeyboardInterrupt(), nth=nth)
            real(self, manifest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Versions, "publish", publish)
            try:
                pool.save(target)
            except KeyboardInterrupt:
                assert len(versions_on(target)) == 1
                assert [p.name for p in (target / ".fbcache/checkpoints").glob(".*")] == []
            else:
                assert nth > 1
        disk.clear()
        latest = versions_on(target)[0]
        with FBPool.from_checkpoint(target, directory=target.parent / "spill") as other:
            assert other["x"] == 1
        assert pool.save(target).version > latest


def test_a_cleanup_that_fails_is_a_warning_and_the_checkpoint_stands(pool, target, disk, restored):
    pool["x"] = 1
    pool.save(target)
    pool["x"] = 2
    with pytest.warns(UserWarning, match="is saved, but former ones"):
        disk.fail("unlink", error=oserror(13), times=None)
        pool.save(target)
    assert versions_on(target) == [1, 2]
    disk.clear()
    assert restored(target) == {"x": 2}
    pool.save(target)
    assert versions_on(target) == [3] and len(blobs_in(target)) == 1


def test_a_manifest_that_was_removed_by_hand_is_no_hindrance(pool, target, restored):
    pool["x"] = 1
    pool.save(target)
    manifest_of(target, 1).unlink()
    with pytest.raises(CheckpointNotFoundError):
        restored(target)
    assert pool.save(target).version == 2
    assert restored(target) == {"x": 1}


def test_a_value_larger_than_the_budget_is_saved_and_comes_back(make_pool, target, restored):
    pool = make_pool("100KB")
    pool["big"] = large(1)
    pool.save(target)
    assert (restored(target)["big"] == large(1)).all()
