"""Handles: who owns an entry, what `make_mut` leaves to the others, and writing now."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading
from uuid import UUID

import numpy as np
import pytest

from fbcache import (
    DeadlockError,
    DiskFullError,
    PoolClosedError,
    StaleKeyError,
    State,
    StorageError,
    UnsupportedTypeError,
    handle,
)
from tests.faults import oserror


def array(fill, nbytes=8_000):
    return np.full(nbytes // 8, fill, np.float64)


def entries(pool):
    pool.drain()
    gc.collect()
    return pool.stats().entries


# ------------------------------------------------------------------ ownership


def test_a_handle_says_what_it_owns(pool):
    fb = pool.put("a", array(1))
    assert isinstance(fb.key, UUID) and fb.key == fb.key
    assert (fb.name, fb.nbytes, fb.state, fb.pool) == ("a", 8_000, State.RESIDENT, pool)
    unnamed = pool.insert(array(1))
    assert unnamed.name is None and unnamed.key != fb.key
    pool.evict()
    assert fb.state is State.SPILLED and fb.nbytes == 8_000


def test_a_name_owns_its_entry_without_any_handle(pool):
    pool.put("a", array(1)).drop()
    gc.collect()
    assert entries(pool) == 1 and pool["a"][0] == 1


def test_an_entry_without_a_name_lives_as_long_as_a_handle(pool, blob_files):
    fb = pool.insert(array(1))
    other = fb.clone()
    pool.evict()
    fb.drop()
    with other.load() as value:
        assert value[0] == 1
    del value
    other.drop()
    assert entries(pool) == 0 and blob_files(pool) == [] and pool.stats().disk_bytes == 0


@pytest.mark.parametrize("spilled", [False, True])
def test_a_handle_that_is_collected_drops_its_entry_and_its_file(pool, blob_files, spilled):
    fb = pool.insert(array(1))
    if spilled:
        pool.evict()
    clones = [fb.clone() for _ in range(3)]
    del fb
    assert entries(pool) == 1
    del clones
    assert entries(pool) == 0 and blob_files(pool) == []
    assert pool.stats().resident_bytes == 0
    pool.validate()


def test_handles_in_a_reference_cycle_are_collected_too(pool):
    cycle = [pool.insert(array(1))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert entries(pool) == 0


def test_invariant_7_a_finalizer_takes_no_lock(pool, spawn):
    """Both finalizers run to their end while another thread sits on the pool's lock."""
    handles = [pool.insert(array(1))]
    pool["a"] = array(2)
    held = [pool.try_get("a")]
    locked, release = threading.Event(), threading.Event()

    def sit():
        with pool._engine.residency.lock:
            locked.set()
            release.wait()

    sitting = spawn(sit)
    locked.wait()
    handles.clear()
    held.clear()
    release.set()
    sitting.result()
    assert entries(pool) == 1 and pool.stats().pinned_bytes == 0


def test_drop_counts_once_however_often_it_is_called(pool):
    fb = pool.insert(array(1))
    other = fb.clone()
    for _ in range(3):
        fb.drop()
    del fb
    assert entries(pool) == 1
    other.drop()
    assert entries(pool) == 0


def test_a_dropped_handle_is_a_keyerror_that_says_so(pool):
    fb = pool.put("a", array(1))
    fb.drop()
    assert "dropped" in repr(fb)
    for use in (
        lambda: fb.key,
        lambda: fb.name,
        lambda: fb.nbytes,
        lambda: fb.state,
        fb.clone,
        fb.load,
        fb.load_mut,
        fb.try_load,
        fb.try_load_mut,
        fb.make_mut,
        fb.write_now,
        fb.spawn_write_now,
    ):
        with pytest.raises(KeyError, match="dropped"):
            use()
    assert pool["a"][0] == 1


def test_an_entered_guard_keeps_an_entry_that_lost_its_last_owner(pool):
    fb = pool.insert([1])
    with fb.load() as value:
        fb.drop()
        assert value == [1] and pool.stats().entries == 1
    assert entries(pool) == 0
    fb = pool.insert([1])
    with fb.load_mut() as value:
        fb.drop()
        value.append(2)
    assert entries(pool) == 0
    pool.validate()


def test_a_guard_waiting_in_line_keeps_an_entry_that_lost_its_last_owner(pool, spawn, sleepers):
    fb = pool.insert([1])
    guard = fb.load()

    def read():
        with guard as value:
            return list(value)

    with fb.load_mut() as value:
        reader = spawn(read)
        sleepers.next()
        value.append(2)
        fb.drop()
    assert reader.result() == [1, 2]
    assert entries(pool) == 0


def test_a_handle_keeps_its_pool(make_pool):
    fb = make_pool().insert([1])
    gc.collect()
    with fb.load() as value:
        assert value == [1]


def test_handles_of_one_entry_see_one_value_and_one_key(pool):
    fb = pool.put("a", [1])
    other = fb.clone()
    key = fb.key
    with other.load_mut() as value:
        value.append(2)
    assert pool["a"] == [1, 2] and fb.key == other.key != key
    with pytest.raises(StaleKeyError):
        pool.get(key)


# ------------------------------------------------------------------ make_mut

SHARINGS = ["name", "clone", "name and clone"]


def share(pool, value, sharing):
    """A handle, and functions that read what the others who share its entry see."""
    fb = pool.insert(value) if sharing == "clone" else pool.put("a", value)
    others = []
    if "name" in sharing:
        others.append(lambda: pool["a"])
    if "clone" in sharing:
        clone = fb.clone()

        def read():
            with clone.load() as value:
                return value

        others.append(read)
    return fb, others


def place_it(pool, fb, place):
    if place == "clean":
        fb.write_now()
    if place in ("spilled", "reloaded"):
        pool.evict()
        gc.collect()
    if place == "reloaded":
        with fb.load():
            pass
    assert fb.state.name == {"memory": "RESIDENT", "spilled": "SPILLED"}.get(place, "CLEAN")


def change(guard, use, make):
    """Enter a guard with ``with`` or ``async with``, and make the change."""
    if use == "with":
        with guard:
            make(guard)
        return

    async def main():
        async with guard:
            make(guard)

    asyncio.run(main())


def write_twos(guard):
    guard.value[0][:] = 2


def rebind(guard):
    guard.value = [array(2)]


@pytest.mark.parametrize("use", ["with", "async with"])
@pytest.mark.parametrize("make", [write_twos, rebind])
@pytest.mark.parametrize("place", ["memory", "clean", "spilled", "reloaded"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_make_mut_leaves_the_others_their_value_and_key(pool, monkeypatch, sharing, place, make, use):
    fb, others = share(pool, [array(1)], sharing)
    place_it(pool, fb, place)
    key = fb.key
    if place != "memory":
        monkeypatch.setattr(handle, "deep_copy", None)  # with a blob there is no copy in memory
    change(fb.make_mut(), use, make)
    assert fb.name is None and fb.key != key
    for read in others:
        assert (read()[0] == 1).all()
    with fb.load() as value:
        assert (value[0] == 2).all()
    with pool.get(key) as value:
        assert (value[0] == 1).all()
    del value
    assert pool.stats().entries == 2
    pool.validate()
    pool.evict()
    for read in others:
        assert (read()[0] == 1).all()
    with fb.load() as value:
        assert (value[0] == 2).all()


@pytest.mark.parametrize("place", ["memory", "clean", "spilled"])
def test_make_mut_of_a_handle_that_shares_with_nobody_copies_nothing(pool, monkeypatch, place):
    monkeypatch.setattr(handle, "deep_copy", None)
    fb = pool.insert([array(1)])
    fb.clone().drop()
    place_it(pool, fb, place)
    key = fb.key
    with fb.make_mut() as value:
        value[0][:] = 2
    assert fb.key != key and pool.stats().entries == 1
    with fb.load() as value:
        assert (value[0] == 2).all()


def test_make_mut_separates_once_and_can_be_entered_again(pool):
    fb = pool.put("a", [1])
    guard = fb.make_mut()
    for number in range(2, 5):
        with guard as value:
            value.append(number)
    assert pool["a"] == [1] and entries(pool) == 2
    with fb.load() as value:
        assert value == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["memory", "clean", "spilled"])
def test_make_mut_with_rollback_brings_the_content_back_and_leaves_the_others_alone(pool, place):
    fb = pool.put("a", [array(1)])
    place_it(pool, fb, place)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), fb.make_mut(rollback=True) as value:
            value[0][:] = 2
            1 / 0
        assert (pool["a"][0] == 1).all()
        with fb.load() as value:
            assert (value[0] == 1).all()
        pool.validate()


@pytest.mark.files
def test_a_blob_that_two_entries_share_goes_with_the_last_of_them(pool, blob_files):
    fb = pool.put("a", array(1))
    pool.evict()
    with fb.make_mut():
        pass
    pool.drain()
    assert len(blob_files(pool)) == 1, "the name still needs it"
    del pool["a"]
    pool.drain()
    assert blob_files(pool) == []
    with fb.load() as value:
        assert value[0] == 1


def test_make_mut_waits_for_a_writer_and_sees_what_it_wrote(pool, spawn, sleepers):
    fb = pool.put("a", [1])

    def separate():
        with fb.make_mut() as value:
            value.append("mine")
            return list(value)

    with pool.get_mut("a") as value:
        separating = spawn(separate)
        sleepers.next()
        value.append(2)
    assert separating.result() == [1, 2, "mine"]
    assert pool["a"] == [1, 2]
    pool.validate()


def test_make_mut_does_not_wait_for_readers_of_what_it_shares(pool):
    fb = pool.put("a", [1])
    with pool.get("a") as shared, fb.make_mut() as own:
        own.append(2)
        assert shared == [1]
    assert pool["a"] == [1]


def test_make_mut_inside_a_write_guard_on_the_same_entry_is_a_deadlockerror_at_once(pool):
    fb = pool.put("a", [1])
    with pool.get_mut("a"), pytest.raises(DeadlockError):
        fb.make_mut().__enter__()
    pool.validate()
    assert fb.name == "a"
    with fb.make_mut() as value:
        value.append(2)
        with pytest.raises(DeadlockError):
            fb.load().__enter__()
        assert pool["a"] == [1]


def test_a_value_that_cannot_be_copied_stays_shared(pool):
    fb = pool.put("a", [threading.Lock()])
    with pytest.raises(TypeError):
        fb.make_mut().__enter__()
    assert fb.name == "a" and pool.stats().entries == 1 and pool.stats().pinned_bytes == 0
    pool.validate()
    with pool.get_mut("a"):
        pass


class GatedCopy:
    """A value that can be held while it is copied."""

    def __init__(self, reached=None, go=None):
        self.reached, self.go = reached, go

    def __deepcopy__(self, memo):
        self.reached.set()
        assert self.go.wait(30)
        return GatedCopy()


def test_a_pool_that_is_closed_while_make_mut_copies_takes_nothing_in(make_pool, spawn):
    pool = make_pool()
    reached, go = threading.Event(), threading.Event()
    fb = pool.put("a", GatedCopy(reached, go))
    copying = spawn(fb.make_mut().__enter__)
    reached.wait()
    pool.close()
    go.set()
    assert isinstance(copying.error(), PoolClosedError)
    assert not pool._engine.residency.entries


def test_make_mut_gives_the_copy_the_size_of_the_original(pool):
    fb = pool.put("a", [1], nbytes=5_000)
    with fb.make_mut() as value:
        value.append(2)
    assert fb.nbytes == 5_000 and pool.stats().resident_bytes == 10_000


# ------------------------------------------------------------------ write_now


@pytest.mark.files
def test_write_now_writes_one_file_and_keeps_the_value(pool, blob_files):
    fb = pool.put("a", array(1))
    fb.write_now()
    assert fb.state is State.CLEAN and len(blob_files(pool)) == 1
    assert blob_files(pool)[0].name == fb.key.hex
    stats = pool.stats()
    assert (stats.spills, stats.resident_bytes, stats.writing_bytes) == (1, 8_000, 0)
    assert stats.bytes_written == stats.disk_bytes == blob_files(pool)[0].stat().st_size
    fb.write_now()
    pool.evict()
    fb.write_now()
    assert pool.stats().spills == 1, "a blob that is there is not written again (invariant 8)"
    assert fb.state is State.SPILLED


def test_spawn_write_now_gives_a_future_and_two_of_them_write_once(make_faulty_pool):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    gate = disk.gate("writev")
    first = fb.spawn_write_now()
    gate.wait_reached()
    second = fb.clone().spawn_write_now()
    assert not first.done() and not second.done()
    gate.open()
    assert first.result() is None and second.result() is None
    assert fb.spawn_write_now().done()
    assert pool.stats().spills == 1


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, StorageError), (errno.ENOSPC, DiskFullError)])
@pytest.mark.parametrize("call", ["open", "writev", "rename"])
def test_invariant_9_a_write_now_that_fails_keeps_the_value_leaves_no_file_and_can_be_repeated(
    make_faulty_pool, blob_files, call, code, kind
):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    disk.fail(call, error=oserror(code))
    with pytest.raises(kind) as caught:
        fb.write_now()
    assert caught.value.path and caught.value.needed >= 8_000
    assert fb.state is State.RESIDENT and blob_files(pool) == [] and pool.stats().disk_bytes == 0
    pool.drain()  # it has surfaced
    assert pool.stats().errors == 1
    fb.write_now()
    assert fb.state is State.CLEAN and pool["a"][0] == 1


def test_write_now_of_what_cannot_be_encoded_says_so(pool):
    fb = pool.put("a", [threading.Lock()])
    for _ in range(2):
        with pytest.raises(UnsupportedTypeError):
            fb.write_now()
    assert fb.state is State.RESIDENT
    pool.drain()


def test_write_now_inside_ones_own_write_guard_is_a_deadlock_error(pool):
    fb = pool.insert(array(1))
    with fb.load_mut() as x:
        with pytest.raises(DeadlockError, match="leave its guard first"):
            fb.write_now()
        x += 1
    fb.write_now()
    pool.validate()


async def write_from_two_tasks(fb):
    async with fb.load_mut():

        async def other():
            with pytest.raises(DeadlockError, match="to_thread"):
                fb.write_now()
            await asyncio.to_thread(lambda: None)

        await asyncio.create_task(other())


def test_write_now_that_would_block_the_loop_that_the_writer_needs_is_a_deadlock_error(pool):
    asyncio.run(write_from_two_tasks(pool.insert(array(1))))
    pool.validate()


def test_write_now_waits_for_a_write_guard_and_writes_what_it_left(pool, spawn):
    fb = pool.put("a", array(1))
    with pool.get_mut("a") as value:
        written = fb.spawn_write_now()
        assert not written.done()
        value[:] = 2
    written.result(30)
    assert fb.state is State.CLEAN
    pool.evict()
    gc.collect()
    assert (pool["a"] == 2).all()


def test_write_now_inside_a_read_guard_writes_although_a_writer_waits(pool, spawn, sleepers):
    fb = pool.put("a", array(1))

    def write():
        with pool.get_mut("a") as value:
            value += 1

    with pool.get("a"):
        writer = spawn(write)
        sleepers.next()
        fb.write_now()
        assert fb.state is State.CLEAN
    writer.result()
    assert pool["a"][0] == 2


@pytest.mark.files
def test_a_mutation_deletes_the_former_blob(pool, blob_files):
    fb = pool.put("a", array(1))
    fb.write_now()
    with pool.get_mut("a") as value:
        value[:] = 2
    pool.drain()
    assert blob_files(pool) == [] and fb.state is State.RESIDENT
    fb.write_now()
    assert [file.name for file in blob_files(pool)] == [fb.key.hex]


def test_a_handle_dropped_while_its_value_is_written_leaves_no_file(make_faulty_pool, blob_files):
    pool, disk = make_faulty_pool()
    fb = pool.insert(array(1))
    gate = disk.gate("rename")
    written = fb.spawn_write_now()
    gate.wait_reached()
    fb.drop()
    assert pool.stats().entries == 0 and pool.stats().resident_bytes == 8_000, "the write still needs it"
    pool.validate()
    gate.open()
    written.exception(30)
    assert entries(pool) == 0 and blob_files(pool) == [] and pool.stats().resident_bytes == 0
    pool.validate()
