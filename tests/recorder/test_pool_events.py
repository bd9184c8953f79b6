"""A pool tells its recorder what it does, with the right numbers, and never suffers from it."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading

import numpy as np
import pytest

from fbcache import (
    CorruptBlobError,
    FBCacheWarning,
    FBPool,
    MsgpackCodec,
    PickleRefusedError,
    StorageError,
    TrackedDirectory,
)
from fbcache.events import EventKind, EventLog, PoolEvent
from fbcache.recorder import MemoryStorage, Query, Recorder, RecorderFullError, SqliteStorage
from tests.faults import oserror

KB = 1000


class Sink:
    """Takes events at once, and notes what the pool's lock was meanwhile."""

    def __init__(self):
        self.events = []
        self.pool = None
        self.under_lock = 0

    def save(self, event):
        if self.pool is not None and self.pool._engine.residency.lock._is_owned():
            self.under_lock += 1
        self.events.append(event)

    def of(self, kind, name=None):
        wanted = None if name is None else repr(name)
        return [e for e in self.events if e.kind is kind and (name is None or e.name == wanted)]


@pytest.fixture
def sink():
    return Sink()


@pytest.fixture
def pool(make_pool, sink):
    sink.pool = pool = make_pool("1MB", events=sink)
    yield pool
    assert not sink.under_lock


@pytest.fixture
def faulty(make_faulty_pool, sink):
    sink.pool, disk = make_faulty_pool("100kB", events=sink, io_threads=1)
    yield sink.pool, disk
    assert not sink.under_lock


def value(nbytes=100 * KB):
    return np.zeros(nbytes, "u1")


def test_a_hit_tells_nothing(pool, sink):
    pool.put("a", value())
    fb = pool.insert(value())
    for _ in range(3):
        with pool.get("a"), fb.load():
            pass
        assert pool["a"] is not None
        pool.try_get("a").__exit__(None, None, None)
    assert sink.events == []


def test_an_eviction_has_entry_bytes_and_the_time_of_its_write(pool, sink):
    fb = pool.put("a", value())
    freed = pool.evict(["a"])
    (event,) = sink.events
    assert (event.kind, event.name, event.key) == (EventKind.EVICTION, "'a'", str(fb.key))
    assert event.nbytes == freed == fb.nbytes >= 100 * KB
    assert event.seconds > 0
    assert pool.stats().evictions == 1


def test_an_eviction_without_a_write_took_no_time(pool, sink):
    pool.put("a", value())
    pool.evict()
    pool["a"]
    pool.evict()
    first, second = sink.of(EventKind.EVICTION)
    assert first.seconds > 0
    assert second.seconds == 0 and second.key == first.key


def test_a_load_has_the_key_that_was_read_and_comes_once_for_all_who_wait(pool, sink):
    fb = pool.put("a", value())
    pool.evict()
    with pool.get("a"), pool.get("a"):
        pass
    (event,) = sink.of(EventKind.LOAD)
    assert (event.name, event.key, event.nbytes) == ("'a'", str(fb.key), fb.nbytes)
    assert event.seconds > 0
    assert pool.stats().loads == 1


def test_a_mutation_has_the_key_that_it_ended_and_the_new_size(pool, sink):
    fb = pool.put("a", value())
    key = fb.key
    with pool.get_mut("a"):
        pass
    with pool.get_mut("a", rollback=True):
        pass
    guard = pool.get_mut("a")
    with guard:
        guard.value = value(200 * KB)
    first, second, third = sink.of(EventKind.MUTATION)
    assert (first.key, second.key) == (str(key), None)
    assert first.nbytes == second.nbytes == 100 * KB
    assert third.nbytes == fb.nbytes == 200 * KB and third.name == "'a'" and third.seconds > 0


def test_a_rolled_back_mutation_is_none(pool, sink):
    pool.put("a", value())
    with pytest.raises(LookupError), pool.get_mut("a", rollback=True):
        raise LookupError
    pool.evict()
    with pytest.raises(LookupError), pool.get_mut("a", rollback=True):
        raise LookupError
    assert sink.of(EventKind.MUTATION) == []


def test_a_mutation_that_the_pools_end_took_the_value_from_is_none(pool, sink):
    pool.put("a", value())
    with pool.get_mut("a"):
        pool.close()
    assert sink.of(EventKind.MUTATION) == []


def test_what_a_decision_within_a_decision_notes_is_told_outside_the_lock(pool, sink):
    residency = pool._engine.residency
    note = residency.log.note

    def finalizer():
        residency.run(note, EventKind.ERROR, None, None, 7)
        assert sink.events == []

    residency.run(finalizer)
    assert [e.nbytes for e in sink.events] == [7]


def test_a_stall_of_a_put_has_the_name_it_will_have_and_how_long(faulty, sink, sleepers, spawn):
    pool, disk = faulty
    pool.put("a", value(90 * KB))
    gate = disk.gate("writev")
    put = spawn(pool.put, "b", value(90 * KB))
    sleepers.next()
    assert sink.of(EventKind.STALL) == []
    gate.open()
    put.result()
    (event,) = sink.of(EventKind.STALL)
    assert event.name == "'b'" and event.nbytes >= 90 * KB and event.key is None
    assert event.seconds == pytest.approx(pool.stats().stall_seconds)


def test_a_stall_of_a_guard_has_its_entry(faulty, sink, sleepers, spawn):
    pool, disk = faulty
    fb = pool.put("a", value(60 * KB))
    pool.evict()
    pool.put("b", value(90 * KB))
    gate = disk.gate("writev")
    guard = pool.get_mut("b")
    with guard:
        guard.value = value(150 * KB)
    load = spawn(pool.__getitem__, "a")
    sleepers.next()
    gate.open()
    load.result()
    events = sink.of(EventKind.STALL)
    assert [(e.name, e.key) for e in events] == [("'a'", str(fb.key))] * pool.stats().stalls
    assert events


def test_a_put_that_gives_up_has_stalled(make_faulty_pool, sink):
    from fbcache import PutTimeoutError

    pool, disk = make_faulty_pool("100kB", events=sink, put_timeout=0, io_threads=1)
    pool.put("a", value(90 * KB))
    gate = disk.gate("writev")
    with pytest.raises(PutTimeoutError):
        pool.put("b", value(90 * KB))
    gate.open()
    (event,) = sink.of(EventKind.STALL)
    assert event.name == "'b'"


def test_a_failed_write_is_an_error_with_its_entry(faulty, sink):
    pool, disk = faulty
    pool.put("a", value(50 * KB))
    disk.fail("writev", error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        pool.evict()
    (event,) = sink.events
    assert event.kind is EventKind.ERROR and event.name == "'a'" and event.nbytes >= 50 * KB
    assert event.detail.startswith("StorageError: ")
    assert pool.stats().errors == 1


@pytest.mark.files
def test_a_failed_load_is_an_error_with_its_key(pool, sink, blob_files):
    fb = pool.put("a", value())
    pool.evict()
    gc.collect()
    (blob,) = blob_files(pool)
    blob.write_bytes(b"")
    with pytest.raises(CorruptBlobError):
        pool["a"]
    (event,) = sink.of(EventKind.ERROR)
    assert (event.name, event.key) == ("'a'", str(fb.key))
    assert "CorruptBlobError" in event.detail


def test_a_load_that_the_codec_fails_is_an_error_too(make_pool, sink):
    class Broken(MsgpackCodec):
        def decode(self, frames, *, writable, allow_pickle):
            raise MemoryError("too big")

    pool = make_pool("1MB", events=sink, codec=Broken())
    pool.put("a", [1, 2])
    pool.evict()
    with pytest.raises(MemoryError):
        pool["a"]
    (event,) = sink.of(EventKind.ERROR)
    assert (event.name, event.detail) == ("'a'", "MemoryError: too big")


def test_a_failed_deletion_is_an_error_without_an_entry(faulty, sink):
    pool, disk = faulty
    fb = pool.put("a", value(50 * KB))
    key = fb.key
    pool.evict()
    disk.fail("unlink", error=oserror(errno.EIO))
    fb.drop()
    pool.delete("a")
    with pytest.raises(StorageError):
        pool.drain()
    (event,) = sink.of(EventKind.ERROR)
    assert (event.name, event.key) == (None, str(key)) and event.nbytes > 50 * KB


def test_a_persist_has_its_key_and_its_bytes_on_disk(pool, sink, tmp_path):
    fb = pool.put("a", value())
    with TrackedDirectory(tmp_path / "tracked") as tracked:
        key = pool.persist("a", tracked)
        assert fb.spawn_persist(tracked).result() == key
    events = sink.of(EventKind.PERSIST)
    assert [(e.name, e.key) for e in events] == [("'a'", str(key))] * 2
    assert events[0].nbytes > 100 * KB and events[0].seconds > 0
    assert events[0].detail == str(tmp_path / "tracked")


def test_a_refused_persist_is_an_error(pool, sink, tmp_path):
    pool.put("a", [threading.Event])
    with pytest.raises(PickleRefusedError):
        pool.persist("a", tmp_path / "tracked")
    (event,) = sink.of(EventKind.ERROR)
    assert event.name == "'a'" and "PickleRefusedError" in event.detail
    assert sink.of(EventKind.PERSIST) == []


def test_a_checkpoint_is_one_persist_with_all_its_bytes(pool, sink, tmp_path):
    pool.put("a", value())
    pool.put("b", value())
    checkpoint = pool.save(tmp_path / "tracked")
    (event,) = sink.of(EventKind.PERSIST)
    assert (event.name, event.key, event.nbytes) == (None, None, checkpoint.nbytes)
    assert event.detail == f"checkpoint {checkpoint.version} in {tmp_path / 'tracked'}"


def test_the_counts_of_events_are_the_pools_own(make_pool, sink):
    pool = make_pool("1MB", events=sink)
    for number in range(40):
        pool.put(number, value())
    for number in range(40):
        with pool.get(number):
            pass
        with pool.get_mut(number):
            pass
    pool.drain()
    stats = pool.stats()
    assert len(sink.of(EventKind.EVICTION)) == stats.evictions > 40
    assert len(sink.of(EventKind.LOAD)) == stats.loads >= 40
    assert len(sink.of(EventKind.STALL)) == stats.stalls
    assert len(sink.of(EventKind.MUTATION)) == 40
    assert sink.of(EventKind.ERROR) == []
    assert sum(e.seconds for e in sink.of(EventKind.STALL)) == pytest.approx(stats.stall_seconds)


def test_a_name_is_shown_by_its_repr_outside_the_lock_even_if_that_raises(pool, sink):
    class Name:
        def __repr__(self):
            assert not pool._engine.residency.lock._is_owned()
            raise RuntimeError("unprintable")

    class Long(str):
        def __repr__(self):
            return "x" * 10_000

    pool.put(Name(), value())
    pool.put(Long(), value())
    pool.evict()
    names = sorted(e.name for e in sink.events)
    assert names[0] == "<Name, whose repr raised RuntimeError>"
    assert len(names[1]) < 1000


def test_a_deleted_name_is_not_that_of_the_entry_any_more(pool, sink):
    fb = pool.put("a", value())
    pool.put("a", value())
    fb.write_now()
    pool.evict()
    assert sorted(str(e.name) for e in sink.of(EventKind.EVICTION)) == ["'a'", "None"]


# ------------------------------------------------------------------ recorders


def test_what_a_call_did_is_saved_before_it_returns(make_pool):
    with Recorder.start(storage := MemoryStorage()) as recorder:
        pool = make_pool("1MB", events=recorder)
        for number in range(20):
            pool.put("a", value())
            pool.evict()
            assert len(recorder.records(Query(kind=EventKind.EVICTION))) == number + 1
        pool.close()
        recorder.save("still open")  # the pool does not close it
    assert storage.records[-1] == "still open"


def test_a_pool_under_asyncio_tells_a_recorder_of_that_loop(make_pool, tmp_path):
    async def main():
        with SqliteStorage(tmp_path / "events.db") as storage:
            async with Recorder(storage) as recorder:
                pool = make_pool("1MB", events=recorder)
                pool.put("a", value())
                await asyncio.to_thread(pool.evict)
                async with pool.get("a"):
                    pass
                found = await recorder.records(Query(name="'a'"))
                assert [e.kind for e in found] == [EventKind.EVICTION, EventKind.LOAD]
                assert all(type(e) is PoolEvent for e in found)

    asyncio.run(main())


def test_a_full_recorder_does_not_break_the_pool_and_is_told_of_once(make_pool):
    class Full:
        def save(self, event):
            raise RecorderFullError(2, 2)

    pool = make_pool("1MB", events=Full())
    for name in "abc":
        pool.put(name, value())
        pool.evict([name])
        assert pool[name] is not None
    with pytest.warns(FBCacheWarning, match=r"6 events.*max_pending is 2"):
        pool.drain()
    pool.drain()
    pool.evict()
    with pytest.warns(FBCacheWarning, match="3 events") as caught:
        pool.close()
    assert [w.filename for w in caught] == [__file__]


def test_an_object_without_save_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(TypeError, match="events"):
        FBPool("1MB", directory=tmp_path, events=object())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ cost


class Counted(EventLog):
    def __init__(self, sink):
        super().__init__(sink)
        self.calls = []

    def note(self, *args, **kwargs):
        self.calls.append("note")
        super().note(*args, **kwargs)

    def hand_over(self):
        self.calls.append("hand_over")
        super().hand_over()


def test_a_hit_makes_no_call_of_the_log_and_an_eviction_one_note(pool, sink):
    residency = pool._engine.residency
    residency.log = log = Counted(sink)
    pool.put("a", value())
    for _ in range(5):
        pool["a"]
        with pool.get("a"):
            pass
    assert log.calls == []
    pool.evict()
    assert log.calls == ["note", "hand_over"]


@pytest.mark.patches
def test_the_way_of_a_hit_knows_nothing_of_events():
    from fbcache.guard import ReadGuard

    for method in (FBPool.__getitem__, FBPool.get, ReadGuard.__enter__, ReadGuard.__exit__):
        assert not {"log", "untold", "note", "hand_over"} & set(method.__code__.co_names)
