"""persist: one more name for a blob that is written once, pinned, or nothing at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import (
    DiskFullError,
    FBPool,
    PickleRefusedError,
    PoolClosedError,
    State,
    StorageError,
    TrackedDirectory,
    UnsupportedTypeError,
)
from fbcache.checkpoint.registry import directory_at
from tests.checkpoint.cuts import (
    ITEM,
    HeldOpen,
    MakeFaulty,
    MemoryStore,
    Spawn,
    array,
    change,
    entry_of,
    nothing_is_left,
    state,
)
from tests.conftest import GatedDisk, MakePool, Sleepers
from tests.directories import blob_of, blobs_in
from tests.faults import oserror


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "dir"


@pytest.fixture
def disk() -> Iterator[GatedDisk]:
    """The tracked directory's own disk."""
    disk = GatedDisk()
    yield disk
    disk.open_all()


@pytest.fixture
def tracked(target: Path, disk: GatedDisk) -> Iterator[TrackedDirectory]:
    with TrackedDirectory._over(directory_at(target, disk)) as tracked:
        yield tracked


def pins_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("??/*.pin"))


def loaded(pool: FBPool, tracked: TrackedDirectory, key: Any) -> Any:
    fb = pool.register(tracked, key)
    with fb.load() as x:
        return x[0]


# ------------------------------------------------------------------------------- one blob


@pytest.mark.files
def test_a_persisted_blob_is_the_pools_own_file_under_one_more_name(
    pool: FBPool, tracked: TrackedDirectory, target: Path
) -> None:
    fb = pool.put("x", array(1))
    key = fb.persist(tracked)
    assert key == fb.key
    here = os.stat(blob_of(target, key))
    there = os.stat(pool._engine.store.file_of(key))
    assert (here.st_ino, here.st_nlink) == (there.st_ino, 2)
    assert pins_in(target) == [f"{key.hex}.pin"]
    assert fb.state is State.CLEAN, "the value left memory"


def test_what_is_only_in_memory_is_written_once_for_the_pool_and_the_directory(
    make_faulty_pool: MakeFaulty, tracked: TrackedDirectory, disk: GatedDisk
) -> None:
    """Invariant 8: evicting it afterwards writes nothing."""
    pool, own = make_faulty_pool()
    pool.put("x", array(1))
    pool.persist("x", tracked)
    assert own.count("writev") == 1
    assert disk.count("writev") == disk.count("copy_range") == disk.count("clone") == 0
    pool.evict()
    assert own.count("writev") == 1
    assert pool["x"][0] == 1


def test_a_key_that_is_present_costs_no_system_call(
    make_faulty_pool: MakeFaulty, tracked: TrackedDirectory, disk: GatedDisk
) -> None:
    pool, own = make_faulty_pool()
    pool.put("x", array(1))
    key = pool.persist("x", tracked)
    before = len(own.log), len(disk.log)
    assert pool.persist("x", tracked) == key
    assert (len(own.log), len(disk.log)) == before
    pool.evict()
    before = len(own.log), len(disk.log)
    assert pool.persist("x", tracked) == key
    assert (len(own.log), len(disk.log)) == before


def test_persisting_what_a_checkpoint_has_only_pins_it(
    pool: FBPool, tracked: TrackedDirectory, disk: GatedDisk, target: Path
) -> None:
    pool.put("x", array(1))
    pool.save(tracked)
    linked = disk.count("link")
    key = pool.persist("x", tracked)
    assert disk.count("link") == linked
    change(pool, "x", 1)
    pool.save(tracked)
    assert key.hex in blobs_in(target), "the checkpoint's end took a persisted blob with it"


@pytest.mark.files
def test_each_content_has_a_key_of_its_own_there(pool: FBPool, tracked: TrackedDirectory) -> None:
    """Invariant 4."""
    pool.put("x", array(1))
    keys = []
    for _ in range(3):
        keys.append(pool.persist("x", tracked))
        change(pool, "x", 1)
    assert len(set(keys)) == len(tracked) == 3
    assert [loaded(pool, tracked, key) for key in keys] == [1, 2, 3]
    nothing_is_left(pool)


@pytest.mark.files
def test_two_directories_have_the_blob_each_and_deleting_one_leaves_the_other(
    pool: FBPool, tracked: TrackedDirectory, tmp_path: Path
) -> None:
    pool.put("x", array(1))
    key = pool.persist("x", tracked)
    with TrackedDirectory(tmp_path / "other") as other:
        assert pool.persist("x", other) == key
        assert tracked.delete(key)
        assert key in other and key not in tracked
        assert loaded(pool, other, key) == 1
    assert pool["x"][0] == 1
    nothing_is_left(pool)


def test_a_spilled_value_is_persisted_without_being_loaded(
    make_faulty_pool: MakeFaulty, tracked: TrackedDirectory
) -> None:
    pool, own = make_faulty_pool()
    pool.put("x", array(1))
    pool.evict()
    opened = own.count("open")
    pool.persist("x", tracked)
    assert own.count("open") == opened
    assert state(pool, "x") is State.SPILLED


def test_a_persisted_blob_outlives_its_pool(make_pool: MakePool, target: Path) -> None:
    first = make_pool()
    key = first.insert(array(7)).persist(target)
    first.close()
    with TrackedDirectory(target) as tracked:
        assert loaded(make_pool(), tracked, key) == 7


# ----------------------------------------------------------------------- where no link can be


@pytest.mark.files
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EMLINK, errno.EPERM])
@pytest.mark.parametrize("ways", [0, 1, 2])
def test_across_file_systems_the_blob_is_copied_and_the_pool_keeps_its_own(
    code: int, ways: int, pool: FBPool, tracked: TrackedDirectory, disk: GatedDisk, target: Path
) -> None:
    """By reflink, else within the kernel, else through memory: always under a temporary name first."""
    for call in ("clone", "copy_range")[:ways]:
        disk.fail(call, error=oserror(errno.EOPNOTSUPP), times=None)
    disk.fail("link", error=oserror(code), times=None)
    pool.put("x", array(1))
    key = pool.persist("x", tracked)
    own = pool._engine.store.file_of(key)
    assert os.stat(own).st_ino != blob_of(target, key).stat().st_ino
    assert Path(own).read_bytes() == blob_of(target, key).read_bytes()
    assert disk.count("rename") == 1
    disk.clear()
    assert tracked.verify().damaged == ()
    assert loaded(pool, tracked, key) == 1


@pytest.mark.files
@pytest.mark.parametrize("call", ["rename", "writev", "pin"])
def test_a_copy_or_pin_that_fails_leaves_nothing_and_the_next_try_works(
    call: str, pool: FBPool, tracked: TrackedDirectory, disk: GatedDisk, target: Path
) -> None:
    pool.put("x", array(1))
    if call == "pin":
        disk.fail("open", error=oserror(errno.ENOSPC), nth=2)  # the first reads the header
    else:
        disk.fail("link", error=oserror(errno.EXDEV), times=None)
        disk.fail("clone", error=oserror(errno.EOPNOTSUPP), times=None)
        disk.fail("copy_range", error=oserror(errno.EOPNOTSUPP), times=None)
        disk.fail(call, error=oserror(errno.ENOSPC))
    with pytest.raises(DiskFullError) as caught:
        pool.persist("x", tracked)
    assert any("'x'" in note for note in caught.value.__notes__)
    assert list(target.glob("??/*")) == []
    assert len(tracked) == 0
    pool.validate()
    disk.clear()
    key = pool.persist("x", tracked)
    assert blobs_in(target) == {key.hex}
    nothing_is_left(pool)


# -------------------------------------------------------------------------------- refusals


def test_pickle_is_refused_by_entry_and_type_and_nothing_is_left(
    pool: FBPool, tracked: TrackedDirectory, target: Path
) -> None:
    """Invariant 14."""
    fb = pool.put("odd", {"inside": np.ma.masked_array})
    for call in (lambda: pool.persist("odd", tracked), lambda: fb.spawn_persist(tracked).result(30)):
        with pytest.raises(PickleRefusedError, match=r"'odd'.*inside.*type"):
            call()
        assert list(target.glob("??/*")) == []
        assert len(tracked) == 0
        pool.validate()
    assert pool["odd"] == {"inside": np.ma.masked_array}
    key = pool.persist("odd", tracked, allow_pickle=True)
    assert key in tracked
    with pytest.raises(PickleRefusedError):
        pool.persist("odd", tracked)
    assert key in tracked, "a refusal took away what was asked for before"


def test_what_cannot_be_encoded_is_named(pool: FBPool, tracked: TrackedDirectory) -> None:
    pool.put("odd", (i for i in ()))
    with pytest.raises(UnsupportedTypeError) as caught:
        pool.persist("odd", tracked)
    assert any("'odd'" in note for note in caught.value.__notes__)
    pool.validate()
    assert len(tracked) == 0


def test_a_write_that_fails_is_persists_error_and_surfaces_once(
    make_faulty_pool: MakeFaulty, tracked: TrackedDirectory
) -> None:
    """Invariant 9."""
    pool, own = make_faulty_pool(io_threads=1)
    fb = pool.put("x", array(1))
    for begin in (lambda: fb.persist(tracked), lambda: fb.spawn_persist(tracked).result(30)):
        own.fail("writev", error=oserror(errno.ENOSPC))
        with pytest.raises(DiskFullError):
            begin()
        pool.drain()
        pool.validate()
    assert fb.persist(tracked) in tracked
    assert pool["x"][0] == 1


# ------------------------------------------------------------------------------- futures


def test_spawn_persist_ends_with_the_key_of_the_content_as_it_was(
    make_faulty_pool: MakeFaulty, tracked: TrackedDirectory
) -> None:
    pool, own = make_faulty_pool(io_threads=1)
    gate = own.gate("writev")
    fb = pool.put("x", array(1))
    busy = pool.put("busy", array(0)).spawn_write_now()
    gate.wait_reached()
    future = fb.spawn_persist(tracked)
    change(pool, "x", 1)
    second = fb.spawn_persist(tracked)
    assert not future.done()
    assert not future.cancel(), "a persist under way cannot be called off"
    gate.open()
    busy.result(30)
    assert loaded(pool, tracked, future.result(30)) == 1
    assert loaded(pool, tracked, second.result(30)) == 2
    assert second.result() == fb.key
    fb.drop()
    nothing_is_left(pool)


def test_spawn_persist_of_what_is_being_changed_waits_for_that_on_no_thread_of_the_pool(
    make_pool: MakePool, tracked: TrackedDirectory, spawn: Spawn
) -> None:
    """Invariant 6: the one I/O thread goes on meanwhile."""
    pool = make_pool(io_threads=1)
    fb = pool.put("x", array(1))
    writer = HeldOpen(spawn, pool.get_mut("x"), lambda x: x.__iadd__(1))
    future = fb.spawn_persist(tracked)
    pool.put("y", array(5)).write_now()
    assert not future.done()
    writer.leave()
    assert loaded(pool, tracked, future.result(30)) == 2


def test_closing_the_pool_ends_every_spawned_persist(
    make_faulty_pool: MakeFaulty, tracked: TrackedDirectory, spawn: Spawn
) -> None:
    pool, own = make_faulty_pool(io_threads=1)
    gate = own.gate("writev")
    futures = [pool.put(name, array(name)).spawn_persist(tracked) for name in range(3)]
    gate.wait_reached()
    closing = spawn(pool.close)
    gate.open()
    closing.result()
    for future in futures:
        assert isinstance(future.exception(30), PoolClosedError)
    assert len(tracked) == 0


@pytest.mark.files
def test_closing_the_pool_while_persist_is_at_the_link_is_a_closed_pool(
    make_pool: MakePool, tracked: TrackedDirectory, disk: GatedDisk, spawn: Spawn
) -> None:
    """The blob goes with the pool; the error is about that, not about a damaged file."""
    pool = make_pool()
    pool.put("x", array(1)).write_now()
    gate = disk.gate("link")
    persisting = spawn(pool.persist, "x", tracked)
    gate.wait_reached()
    pool.close()
    gate.open()
    assert isinstance(persisting.error(), PoolClosedError)
    assert len(tracked) == 0


# --------------------------------------------------------------------------------- races


@pytest.mark.files
def test_many_threads_that_persist_one_key_link_it_once(
    pool: FBPool, tracked: TrackedDirectory, disk: GatedDisk, target: Path, spawn: Spawn
) -> None:
    pool.put("x", array(1))
    pool.put("y", array(2)).persist(tracked)  # the shards' own calls apart
    gate = disk.gate("link")
    threads = [spawn(pool.persist, "x", tracked) for _ in range(6)]
    gate.wait_reached()
    before = disk.count("link")
    gate.open()
    keys = {thread.result() for thread in threads}
    (key,) = keys
    assert disk.count("link") - before <= 1, "more than the retry after the shard was made"
    assert blobs_in(target) >= {key.hex}
    assert os.stat(blob_of(target, key)).st_nlink == 2
    pool.validate()


def test_deleting_a_key_while_it_is_persisted_again_keeps_what_persist_returned(
    pool: FBPool, tracked: TrackedDirectory, disk: GatedDisk, target: Path, spawn: Spawn
) -> None:
    """The deletion stands at the blob's unlink: the persist waits for its end and links anew."""
    pool.put("x", array(1))
    key = pool.persist("x", tracked)
    gate = disk.gate("unlink", nth=2)  # the first takes the pin away
    deleting = spawn(tracked.delete, key)
    gate.wait_reached()
    persisting = spawn(pool.persist, "x", tracked)
    gate.open()
    deleting.result()
    assert persisting.result() == key
    assert blobs_in(target) == {key.hex}
    assert pins_in(target) == [f"{key.hex}.pin"]
    assert loaded(pool, tracked, key) == 1


@pytest.mark.files
def test_deleting_a_key_while_its_blob_is_being_linked_is_a_key_error_and_the_persist_stands(
    pool: FBPool, tracked: TrackedDirectory, disk: GatedDisk, target: Path, spawn: Spawn
) -> None:
    pool.put("x", array(1)).write_now()
    gate = disk.gate("link")
    persisting = spawn(pool.persist, "x", tracked)
    gate.wait_reached()
    with pytest.raises(KeyError):
        tracked.delete(entry_of(pool, "x").key)
    gate.open()
    key = persisting.result()
    assert blobs_in(target) == {key.hex}
    assert tracked.delete(key)
    assert list(target.glob("??/*")) == []


def test_a_refused_persist_does_not_take_anothers_blob_back(
    pool: FBPool, tracked: TrackedDirectory, disk: GatedDisk, target: Path, spawn: Spawn
) -> None:
    """One allows pickle and one does not, at once: the refusal's cleaning up leaves the other's blob."""
    pool.put("odd", np.ma.masked_array)
    gate = disk.gate("open", nth=2)  # of the pin, after the header was read
    allowed = spawn(pool.persist, "odd", tracked, allow_pickle=True)
    gate.wait_reached()
    refused = spawn(pool.persist, "odd", tracked)
    gate.open()
    key = allowed.result()
    assert isinstance(refused.error(), PickleRefusedError)
    assert blobs_in(target) == {key.hex}
    assert key in tracked


def test_persisting_to_a_directory_that_is_closed_changes_nothing(pool: FBPool, target: Path) -> None:
    tracked = TrackedDirectory(target)
    tracked.close()
    pool.put("x", array(1))
    with pytest.raises(StorageError, match="closed"):
        pool.persist("x", tracked)
    assert state(pool, "x") is State.RESIDENT
    nothing_is_left(pool)


def test_a_path_is_locked_for_the_call_only(pool: FBPool, target: Path) -> None:
    pool.put("x", array(1))
    pool.persist("x", target)
    assert directory_at(target).idle
    with pytest.raises(PickleRefusedError):
        pool.put("odd", np.ma.masked_array).persist(target)
    assert directory_at(target).idle


# ---------------------------------------------------------------------- a store without files


@pytest.fixture
def memory_pool(make_pool: MakePool, tmp_path: Path) -> FBPool:
    store = MemoryStore()
    store.path = str(tmp_path / "no files here")
    return make_pool(8 * ITEM, store=store, io_threads=1)


def test_a_store_without_files_can_persist_save_register_and_restore(
    memory_pool: FBPool, tracked: TrackedDirectory, make_pool: MakePool
) -> None:
    pool = memory_pool
    pool.put("x", array(1))
    key = pool.persist("x", tracked)
    pool.put("y", array(2))
    checkpoint = pool.save(tracked)
    assert checkpoint.blobs_written == 1, "the persisted one was there"
    assert tracked.verify().damaged == ()
    assert pool.save(tracked).blobs_written == 0
    del pool["x"], pool["y"]
    pool.drain()
    assert pool._engine.store.blobs == {}  # type: ignore[attr-defined]
    pool.restore(tracked)
    assert pool["x"][0] == 1 and pool["y"][0] == 2
    assert loaded(pool, tracked, key) == 1
    change(pool, "x", 1)
    assert loaded(pool, tracked, key) == 1
    other = make_pool()
    other.restore(tracked)
    assert other["y"][0] == 2
    for name in list(pool):
        pool.delete(name)
    pool.drain()
    assert pool.stats().entries == 0
    assert pool._engine.store.blobs == {}  # type: ignore[attr-defined]


def test_a_store_without_files_copies_again_what_it_has_deleted(
    memory_pool: FBPool, tracked: TrackedDirectory, sleepers: Sleepers
) -> None:
    pool = memory_pool
    key = pool.insert(array(3)).persist(tracked)
    for _ in range(3):
        pool.drain()
        assert loaded(pool, tracked, key) == 3
