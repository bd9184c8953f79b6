"""What is saved is there, in order, in bulks that a load cuts; the reference's five behaviours among it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque

import pytest

from fbcache.recorder import MemoryStorage, Phase, Query, Recorder, RecorderClosedError, SqliteStorage
from tests.faults import PATIENCE
from tests.recorder.gated import GatedStorage


def test_save_and_close_leaves_exactly_what_was_saved():
    async def main():
        recorder = Recorder(MemoryStorage())
        for number in range(100):
            assert recorder.save(number) is None
        return await recorder.close()

    assert asyncio.run(main()).records == list(range(100))


def test_what_is_saved_while_the_storage_is_busy_arrives_as_one_bulk():
    async def main():
        storage = GatedStorage()
        storage.shut()
        async with Recorder(storage) as recorder:
            recorder.save("first")
            await storage.has_entered()
            for number in range(50):
                recorder.save(number)
            storage.open()
        assert storage.bulks == [("first",), tuple(range(50))]

    asyncio.run(main())


def test_a_query_filters_and_a_predicate_does():
    async def main():
        async with Recorder(MemoryStorage()) as recorder:
            for number in range(10):
                recorder.save({"kind": "odd" if number % 2 else "even", "number": number, "time": number})
            odd = await recorder.records(Query(kind="odd", since=3, until=7))
            assert [r["number"] for r in odd] == [3, 5, 7]
            assert [r["number"] for r in await recorder.records(Query(limit=2))] == [8, 9]
            assert await recorder.records(Query(limit=0)) == []
            assert [r["number"] for r in await recorder.records(lambda r: r["number"] < 2)] == [0, 1]

    asyncio.run(main())


def test_a_delayed_storage_gets_everything_in_order():
    async def main():
        appears = asyncio.get_running_loop().create_future()
        recorder = Recorder.from_delayed_storage(appears)
        recorder.save(1)
        assert recorder.phase is Phase.DELAYED
        load = asyncio.ensure_future(recorder.records())
        await asyncio.sleep(0)
        recorder.save(2)
        recorder.save(3)
        assert not load.done() and recorder.pending == 3
        storage = GatedStorage()
        appears.set_result(storage)
        assert await load == [1]
        assert await recorder.close() is storage
        assert storage.bulks == [(1,), (2, 3)]

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_storage_is_chosen_at_run_time(kind, tmp_path):
    async def choose():
        return MemoryStorage() if kind == "memory" else SqliteStorage(tmp_path / "records")

    async def main():
        async with Recorder.from_delayed_storage(choose()) as recorder:
            recorder.save({"kind": "a"})
            assert await recorder.records(Query(kind="a")) == [{"kind": "a"}]
        storage = await recorder.close()
        if kind == "file":
            storage.close()

    asyncio.run(main())


def test_a_load_cuts_the_bulk_and_sees_what_was_saved_before_it_only():
    async def main():
        storage = GatedStorage()
        storage.shut()
        async with Recorder(storage) as recorder:
            recorder.save(0)
            await storage.has_entered()
            recorder.save(1)
            first = asyncio.ensure_future(recorder.records())
            await asyncio.sleep(0)
            recorder.save(2)
            second = asyncio.ensure_future(recorder.records())
            await asyncio.sleep(0)
            recorder.save(3)
            storage.open()
            assert await first == [0, 1]
            assert await second == [0, 1, 2]
        assert storage.bulks == [(0,), (1,), (2,), (3,)]

    asyncio.run(main())


def test_records_without_anything_saved_asks_the_storage():
    async def main():
        async with Recorder(MemoryStorage(["old"])) as recorder:
            assert await recorder.records() == ["old"]

    asyncio.run(main())


def test_records_of_each_thread_stay_in_order():
    def produce(recorder, who, ready):
        ready.wait()
        for number in range(2000):
            recorder.save((who, number))

    async def main():
        async with Recorder(storage := GatedStorage()) as recorder:
            ready = threading.Barrier(8)
            threads = [threading.Thread(target=produce, args=(recorder, who, ready)) for who in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                await asyncio.to_thread(thread.join, PATIENCE)
            assert len(await recorder.records()) == 16_000
        for who in range(8):
            assert [n for w, n in storage.records if w == who] == list(range(2000))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        asyncio.run(main())
    finally:
        sys.setswitchinterval(interval)


def test_a_save_from_another_thread_wakes_an_idle_recorder():
    async def main():
        storage = GatedStorage()
        async with Recorder(storage) as recorder:
            await recorder.records()
            await asyncio.to_thread(recorder.save, 1)
            await storage.has_entered()

    asyncio.run(main())


def test_a_save_just_as_the_pump_looks_for_the_last_time_is_not_missed():
    class Inbox(deque):
        def __len__(self):
            length = super().__len__()
            if saves and not length and sys._getframe(1).f_code.co_name == "_rests":
                recorder.save(saves.pop())  # right after the look
            return length

    async def main():
        nonlocal recorder
        storage = GatedStorage()
        recorder = Recorder(storage)
        recorder._core._inbox = Inbox()
        recorder.save("first")
        async with asyncio.timeout(PATIENCE):
            while len(storage.records) < 2:
                await asyncio.sleep(0)
        await recorder.close()
        assert storage.records == ["first", "late"]

    recorder, saves = None, ["late"]
    asyncio.run(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
def test_a_loop_whose_tasks_begin_at_once_is_served_too():
    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with Recorder(MemoryStorage()) as recorder:
            for number in range(3):
                recorder.save(number)
                assert len(await recorder.records()) == number + 1

    asyncio.run(main())


def test_a_save_costs_one_append_and_while_the_pump_runs_no_wake(monkeypatch):
    async def main():
        storage = GatedStorage()
        storage.shut()
        async with Recorder(storage) as recorder:
            recorder.save(0)
            await storage.has_entered()
            loop = asyncio.get_running_loop()
            with monkeypatch.context() as patch:
                patch.setattr(loop, "call_soon_threadsafe", None)  # not called
                for number in range(100):
                    recorder.save(number)
            storage.open()

    asyncio.run(main())


def test_a_record_that_equals_nothing_and_everything_is_kept():
    class Odd:
        def __eq__(self, other):
            raise RuntimeError("compared")

        __hash__ = None

    async def main():
        odd = [Odd(), Odd()]
        async with Recorder(storage := MemoryStorage()) as recorder:
            for each in odd:
                recorder.save(each)
            await recorder.records()
        assert all(a is b for a, b in zip(storage.records, odd, strict=True))

    asyncio.run(main())


def test_a_save_after_close_is_refused_and_close_again_returns_the_storage():
    async def main():
        recorder = Recorder(storage := MemoryStorage())
        recorder.save(1)
        assert await recorder.close() is storage
        assert recorder.phase is Phase.CLOSED
        with pytest.raises(RecorderClosedError, match="not taken"):
            recorder.save(2)
        with pytest.raises(RecorderClosedError, match="storage"):
            await recorder.records()
        assert await recorder.close() is storage
        assert storage.records == [1]

    asyncio.run(main())


def test_two_closes_at_once_both_get_the_storage():
    async def main():
        recorder = Recorder(storage := GatedStorage())
        storage.shut()
        recorder.save(1)
        closes = [asyncio.ensure_future(recorder.close()) for _ in range(2)]
        await storage.has_entered()
        assert recorder.phase is Phase.CLOSING
        storage.open()
        assert await asyncio.gather(*closes) == [storage, storage]

    asyncio.run(main())


def test_what_a_load_raises_goes_to_who_asked_and_the_recorder_goes_on():
    class Unreadable(MemoryStorage):
        async def load(self, query=None, /):
            if query == "bad":
                raise OSError("unreadable")
            return await super().load(query)

    async def main():
        async with Recorder(Unreadable()) as recorder:
            recorder.save(1)
            with pytest.raises(OSError, match="unreadable"):
                await recorder.records("bad")
            assert await recorder.records() == [1]

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "3"])
def test_a_max_pending_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="max_pending"):
        Recorder(MemoryStorage(), max_pending=wrong)


def test_what_is_no_storage_is_refused():
    with pytest.raises(TypeError, match="no save"):
        Recorder(object())
    with pytest.raises(TypeError, match="no load"):
        Recorder.start(type("Half", (), {"save": None})())
    with pytest.raises(TypeError, match="awaited"):
        Recorder.from_delayed_storage(MemoryStorage())
