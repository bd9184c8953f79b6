"""A storage that fails, refuses or never appears: nothing vanishes, and whoever asks is told."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from fbcache.recorder import (
    MemoryStorage,
    Phase,
    Recorder,
    RecorderClosedError,
    RecorderError,
    RecorderFullError,
    RecordsRefusedError,
    Retry,
)
from tests.recorder.gated import GatedStorage, patient


def test_a_failing_write_is_tried_again_with_backoff_and_nobody_hears_of_it():
    async def main():
        retry, slept = patient(3)
        storage = GatedStorage([OSError("1"), OSError("2")])
        async with Recorder(storage, retry=retry) as recorder:
            recorder.save("a")
            assert await recorder.records() == ["a"]
        assert storage.attempts == [("a",)] * 3
        assert slept == [1.0, 2.0]

    asyncio.run(main())


def test_a_lasting_failure_surfaces_with_the_unsaved_and_later_saves_are_tried_with_them():
    async def main():
        retry, slept = patient(2)
        storage = GatedStorage([OSError("full")] * 2)
        async with Recorder(storage, retry=retry) as recorder:
            recorder.save("a")
            recorder.save("b")
            with pytest.raises(RecorderError, match=r"2 records 2 times.*full") as caught:
                await recorder.records()
            assert caught.value.unsaved == ("a", "b")
            assert isinstance(caught.value.__cause__, OSError)
            assert recorder.phase is Phase.FAILING and recorder.pending == 2
            recorder.save("c")
            assert await recorder.records() == ["a", "b", "c"]
            assert recorder.phase is Phase.OPEN and recorder.pending == 0
        assert storage.bulks == [("a", "b", "c")]
        assert slept == [1.0]

    asyncio.run(main())


def test_a_failure_without_a_waiter_is_tried_again_by_the_next_load():
    async def main():
        storage = GatedStorage([OSError("full")])
        async with Recorder(storage, retry=Retry(delays=())) as recorder:
            recorder.save("a")
            await storage.has_entered()
            while recorder.phase is not Phase.FAILING:
                await asyncio.sleep(0)
            assert await recorder.records() == ["a"]

    asyncio.run(main())


def test_a_close_that_fails_has_records_and_storage_and_another_one_tries_again():
    async def main():
        storage = GatedStorage([OSError("full")])
        recorder = Recorder(storage, retry=Retry(delays=()))
        recorder.save("a")
        with pytest.raises(RecorderError) as caught:
            await recorder.close()
        assert caught.value.unsaved == ("a",)
        assert caught.value.storage is storage
        assert recorder.phase is Phase.LOST
        with pytest.raises(RecorderClosedError):
            recorder.save("b")
        assert await recorder.close() is storage
        assert storage.records == ["a"]

    asyncio.run(main())


def test_the_bulks_before_a_load_fail_and_those_after_it_do_not_lose_their_place():
    async def main():
        storage = GatedStorage([OSError("1")])
        storage.shut()
        async with Recorder(storage, retry=Retry(delays=())) as recorder:
            recorder.save(1)
            first = asyncio.ensure_future(recorder.records())
            await storage.has_entered()
            recorder.save(2)
            second = asyncio.ensure_future(recorder.records())
            await asyncio.sleep(0)
            storage.open()
            with pytest.raises(RecorderError) as caught:
                await first
            assert caught.value.unsaved == (1,)
            assert await second == [1, 2]

    asyncio.run(main())


def test_a_record_that_can_never_be_written_does_not_hold_up_the_others():
    class Picky(GatedStorage):
        async def save(self, bulk, /):
            bad = {i: TypeError(f"no {r!r}") for i, r in enumerate(bulk) if r == "bad"}
            if bad:
                raise RecordsRefusedError(bad)
            await super().save(bulk)

    async def main():
        retry, slept = patient()
        storage = Picky()
        async with Recorder(storage, retry=retry) as recorder:
            for record in ("a", "bad", "b"):
                recorder.save(record)
            with pytest.raises(RecorderError, match="cannot write 1") as caught:
                await recorder.records()
            assert caught.value.unsaved == ("bad",)
            assert isinstance(caught.value.__cause__, TypeError)
            assert await recorder.records() == ["a", "b"]  # told once: it is the caller's now
        assert slept == []

    asyncio.run(main())


def test_a_storage_that_refuses_what_is_not_there_has_failed():
    async def main():
        storage = GatedStorage([RecordsRefusedError({7: TypeError("?")})])
        recorder = Recorder(storage, retry=Retry(delays=()))
        recorder.save("a")
        with pytest.raises(RecorderError) as caught:
            await recorder.close()
        assert caught.value.unsaved == ("a",)
        await recorder.close()

    asyncio.run(main())


def test_a_storage_that_cancels_itself_has_failed():
    async def main():
        async with Recorder(GatedStorage([asyncio.CancelledError()]), retry=patient()[0]) as recorder:
            recorder.save("a")
            assert await recorder.records() == ["a"]

    asyncio.run(main())


def test_a_storage_that_never_appears_gives_the_records_back():
    async def fail():
        raise OSError("no such host")

    async def main():
        recorder = Recorder.from_delayed_storage(fail())
        recorder.save("a")
        with pytest.raises(RecorderError, match=r"did not appear.*no such host") as caught:
            await recorder.records()
        assert caught.value.unsaved == ("a",)
        assert recorder.phase is Phase.LOST
        with pytest.raises(RecorderClosedError, match="did not appear"):
            recorder.save("b")
        with pytest.raises(RecorderError) as caught:
            await recorder.close()
        assert caught.value.unsaved == ("a",) and caught.value.storage is None

    asyncio.run(main())


def test_what_appears_and_is_no_storage_has_not_appeared():
    async def main():
        recorder = Recorder.from_delayed_storage(asyncio.sleep(0, "text"))
        with pytest.raises(RecorderError, match="no storage"):
            await recorder.close()

    asyncio.run(main())


def test_max_pending_refuses_instead_of_growing_and_takes_again_once_written():
    async def main():
        storage = GatedStorage()
        storage.shut()
        async with Recorder(storage, max_pending=3) as recorder:
            recorder.save(0)
            await storage.has_entered()
            load = asyncio.ensure_future(recorder.records())
            await asyncio.sleep(0)  # its mark in the line is no record
            recorder.save(1)
            recorder.save(2)
            with pytest.raises(RecorderFullError, match=r"3 records.*max_pending is 3") as caught:
                recorder.save(3)
            assert (caught.value.pending, caught.value.max_pending) == (3, 3)
            storage.open()
            assert await load == [0]
            await recorder.records()
            recorder.save(4)
        assert storage.records == [0, 1, 2, 4]

    asyncio.run(main())


def test_unsaved_records_of_a_failing_storage_count_as_pending():
    async def main():
        recorder = Recorder(GatedStorage([OSError("x")] * 2), max_pending=1, retry=Retry(delays=()))
        recorder.save(0)
        with pytest.raises(RecorderError):
            await recorder.records()
        with pytest.raises(RecorderFullError):
            recorder.save(1)
        with pytest.raises(RecorderError):
            await recorder.close()
        await recorder.close()

    asyncio.run(main())


def test_async_with_does_not_hide_the_error_of_its_block():
    async def main():
        with pytest.raises(RecorderError) as caught:
            async with Recorder(GatedStorage([OSError("x")]), retry=Retry(delays=())) as recorder:
                recorder.save(0)
                raise LookupError("the block's")
        assert isinstance(caught.value.__context__, (LookupError, OSError))
        await recorder.close()

    asyncio.run(main())


def test_errors_survive_pickling():
    full = pickle.loads(pickle.dumps(RecorderFullError(3, 2)))
    assert (full.pending, full.max_pending) == (3, 2)
    refused = pickle.loads(pickle.dumps(RecordsRefusedError({1: TypeError("x")})))
    assert str(refused.refused[1]) == "x"


def test_the_default_retry_waits_for_seconds_not_minutes():
    assert 1 < sum(Retry().delays) < 10
    assert MemoryStorage().records == []
