"""How a recorder ends other than by close: drop, cancellation, loops, interrupts, fork, exit."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest

from fbcache.recorder import (
    MemoryStorage,
    Phase,
    Recorder,
    RecorderClosedError,
    RecorderError,
    RecordsLostWarning,
    RecordsRefusedError,
    Retry,
)
from fbcache.recorder.core import Core
from tests.faults import PATIENCE
from tests.interrupts import Interrupter
from tests.recorder.gated import GatedStorage


def drop(make, *, expecting):
    """Run ``make``, which leaves a recorder to the collector; return the one warning of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
        gc.collect()
    found = [w for w in caught if issubclass(w.category, (RecordsLostWarning, ResourceWarning))]
    assert len(found) == 1, [str(w.message) for w in found]
    warning = found[0]
    assert warning.category is expecting
    return str(warning.message)


def test_a_recorder_dropped_before_its_loop_says_how_many_are_lost():
    def make():
        recorder = Recorder(MemoryStorage())
        for number in range(3):
            recorder.save(number)

    assert "3 records were lost" in drop(make, expecting=RecordsLostWarning)


def test_a_recorder_dropped_in_the_midst_of_a_write_says_how_many_are_lost():
    storage = GatedStorage()

    async def main():
        storage.shut()
        recorder = Recorder(storage)
        recorder.save(0)
        await storage.has_entered()
        recorder.save(1)
        recorder.save(2)
        del recorder
        gc.collect()
        storage.open()
        for _ in range(10):
            await asyncio.sleep(0)
        assert storage.records == [0]  # the write that was under way; nothing after it

    told = drop(lambda: asyncio.run(main()), expecting=RecordsLostWarning)
    assert "3 records were lost" in told and "unless the 1 being written" in told


def test_a_recorder_dropped_with_nothing_to_write_leaks_but_loses_nothing():
    async def main():
        recorder = Recorder(MemoryStorage())
        recorder.save(1)
        await recorder.records()

    assert "written everything" in drop(lambda: asyncio.run(main()), expecting=ResourceWarning)


def test_a_thread_of_a_dropped_recorder_ends_and_says_how_many_are_lost():
    storage = GatedStorage()

    def make():
        storage.shut()
        recorder = Recorder.start(storage)
        recorder.save(0)
        assert storage.entered.wait(PATIENCE)
        recorder.save(1)

    assert "2 records were lost" in drop(make, expecting=RecordsLostWarning)
    storage.open()


def test_a_storage_that_never_appeared_does_not_make_a_drop_silent():
    async def fail():
        raise OSError

    async def main():
        recorder = Recorder.from_delayed_storage(fail())
        recorder.save(1)
        while recorder.phase is not Phase.LOST:
            await asyncio.sleep(0)

    assert "1 records were lost" in drop(lambda: asyncio.run(main()), expecting=RecordsLostWarning)


def test_a_refused_record_that_nobody_heard_of_is_lost_too():
    async def main():
        storage = GatedStorage([RecordsRefusedError({0: TypeError("bad")})])
        recorder = Recorder(storage)
        recorder.save("bad")
        while not storage.attempts or recorder.pending:
            await asyncio.sleep(0)

    assert "1 records were lost" in drop(lambda: asyncio.run(main()), expecting=RecordsLostWarning)


def test_a_close_that_told_of_the_unsaved_makes_the_drop_silent():
    async def main():
        recorder = Recorder(GatedStorage([OSError("x")]), retry=Retry(delays=()))
        recorder.save(0)
        with pytest.raises(RecorderError):
            await recorder.close()

    asyncio.run(main())
    gc.collect()  # a warning would be an error


def test_the_finalizer_takes_no_lock():
    recorder = Recorder(MemoryStorage())
    recorder.save(1)
    core = recorder._core
    with core._binding, pytest.warns(RecordsLostWarning):
        del recorder
        gc.collect()


def test_a_finalizer_and_a_signal_handler_may_save_in_the_midst_of_a_save():
    async def main():
        async with Recorder(storage := MemoryStorage()) as recorder:
            loop = asyncio.get_running_loop()
            real = loop.call_soon_threadsafe
            nested = iter(["nested"])

            def wake(*args):  # where a handler may come in
                for record in nested:
                    recorder.save(record)
                return real(*args)

            loop.call_soon_threadsafe = wake
            with recorder._core._binding:
                recorder.save("outer")
            del loop.call_soon_threadsafe
            assert await recorder.records() == ["outer", "nested"]
        assert storage.records == ["outer", "nested"]

    asyncio.run(main())


def test_a_real_signal_handler_saves():
    got = threading.Event()
    with Recorder.start(storage := MemoryStorage()) as recorder:

        def handler(*_):
            recorder.save("signal")
            got.set()

        former = signal.signal(signal.SIGUSR1, handler)
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert got.wait(PATIENCE)
        finally:
            signal.signal(signal.SIGUSR1, former)
    assert storage.records == ["signal"]


def test_a_loop_that_closes_first_leaves_the_records_to_the_next_one():
    storage = GatedStorage()

    async def first():
        storage.shut()
        recorder = Recorder(storage)
        recorder.save(0)
        await storage.has_entered()
        recorder.save(1)
        return recorder

    recorder = asyncio.run(first())  # cancels the write
    assert recorder.pending == 2
    recorder.save(2)  # its loop is closed
    storage.open()

    async def second():
        assert await recorder.records() == [0, 1, 2]
        recorder.save(3)
        return await recorder.close()

    assert asyncio.run(second()).records == [0, 1, 2, 3]


def test_a_loop_closed_without_cancelling_leaves_the_records_too():
    storage = GatedStorage()
    storage.shut()
    loop = asyncio.new_event_loop()

    async def first():
        recorder = Recorder(storage)
        recorder.save(0)
        await storage.has_entered()
        return recorder

    recorder = loop.run_until_complete(first())
    pump = recorder._core._task
    with pytest.raises(RecorderError, match="another event loop"):
        asyncio.run(recorder.records())
    pump._log_destroy_pending = False
    loop.close()
    pumps = [pump]
    del pump

    async def second():
        storage.entered.clear()
        close = asyncio.ensure_future(recorder.close())
        await storage.has_entered()
        pumps.clear()
        gc.collect()  # the former pump, closed now, changes nothing
        assert recorder._core._task is not None and recorder._core.writing == 1
        storage.open()
        return await close

    assert asyncio.run(second()) is storage
    assert storage.records == [0]


def test_a_load_from_another_loop_is_told_when_the_recorders_loop_ends(spawn):
    storage = GatedStorage()
    storage.shut()
    made: list[Recorder] = []

    async def home():
        made.append(Recorder(storage))
        made[0].save(0)
        await storage.has_entered()
        other = spawn(asyncio.run, made[0].records())
        while not made[0]._core._questions:
            await asyncio.sleep(0)
        return other

    other = asyncio.run(home())
    error = other.error()
    assert isinstance(error, RecorderError) and error.unsaved == (0,)
    storage.open()
    assert asyncio.run(made[0].close()) is storage


def test_a_cancelled_load_leaves_the_line_and_everything_else_as_it_was():
    async def main():
        storage = GatedStorage()
        storage.shut()
        async with Recorder(storage) as recorder:
            recorder.save(0)
            await storage.has_entered()
            recorder.save(1)
            load = asyncio.ensure_future(recorder.records())
            await asyncio.sleep(0)
            recorder.save(2)
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            storage.open()
        assert storage.bulks == [(0,), (1, 2)]  # who does not wait cuts nothing

    asyncio.run(main())


def test_a_cancelled_close_goes_on_and_another_one_waits_for_its_end():
    async def main():
        storage = GatedStorage()
        storage.shut()
        recorder = Recorder(storage)
        recorder.save(0)
        await storage.has_entered()
        close = asyncio.ensure_future(recorder.close())
        await asyncio.sleep(0)
        close.cancel()
        with pytest.raises(asyncio.CancelledError):
            await close
        with pytest.raises(RecorderClosedError):
            recorder.save(1)
        storage.open()
        async with asyncio.timeout(PATIENCE):
            while recorder.phase is not Phase.CLOSED:
                await asyncio.sleep(0)
        assert await recorder.close() is storage
        assert storage.records == [0]

    asyncio.run(main())


def test_an_error_that_a_cancelled_close_did_not_tell_is_told_by_the_next():
    async def main():
        storage = GatedStorage([OSError("x")])
        storage.shut()
        recorder = Recorder(storage, retry=Retry(delays=()))
        recorder.save(0)
        close = asyncio.ensure_future(recorder.close())
        await storage.has_entered()
        close.cancel()
        with pytest.raises(asyncio.CancelledError):
            await close
        storage.failures.append(OSError("y"))
        storage.open()
        with pytest.raises(RecorderError) as caught:
            await recorder.close()
        assert caught.value.unsaved == (0,)
        await recorder.close()

    asyncio.run(main())


def test_a_refused_record_that_a_cancelled_load_did_not_tell_is_told_by_the_next():
    class Picky(GatedStorage):
        async def save(self, bulk, /):
            if "bad" in bulk:
                await super().save(())
                raise RecordsRefusedError({bulk.index("bad"): TypeError("bad")})
            await super().save(bulk)

    async def main():
        storage = Picky()
        storage.shut()
        async with Recorder(storage) as recorder:
            recorder.save("bad")
            load = asyncio.ensure_future(recorder.records())
            await storage.has_entered()
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            storage.open()
            with pytest.raises(RecorderError) as caught:
                await recorder.records()
            assert caught.value.unsaved == ("bad",)

    asyncio.run(main())


def test_a_dropped_recorder_does_not_go_on_trying():
    storage = GatedStorage([OSError("x")] * 9)

    async def main():
        slept = asyncio.Event()

        async def sleep(_):
            slept.set()
            while not dropped:
                await asyncio.sleep(0)

        dropped = []
        recorder = Recorder(storage, retry=Retry(delays=(1.0,) * 5, sleep=sleep))
        recorder.save(1)
        await slept.wait()
        del recorder
        gc.collect()
        dropped.append(True)
        for _ in range(10):
            await asyncio.sleep(0)

    assert "1 records were lost" in drop(lambda: asyncio.run(main()), expecting=RecordsLostWarning)
    assert len(storage.attempts) <= 2


def test_a_save_that_began_before_the_close_is_written_or_told():
    async def main():
        class Watching(GatedStorage):
            async def save(self, bulk, /):
                assert recorder.phase is Phase.CLOSING
                await super().save(bulk)

        storage = Watching()
        storage.shut()
        recorder = Recorder(storage)
        recorder.save(0)
        close = asyncio.ensure_future(recorder.close())
        await storage.has_entered()
        core = recorder._core
        core._inbox.append("late")  # by a thread that saw the recorder open
        storage.open()
        await close
        assert storage.records == [0, "late"]
        core._refusal = None  # as a thread saw it that comes to its append only now
        with pytest.raises(RecorderClosedError, match="meanwhile"):
            recorder.save("too late")

    asyncio.run(main())


def test_who_cancels_all_tasks_does_not_end_the_recorder():
    async def main():
        storage = GatedStorage()
        storage.shut()
        async with Recorder(storage) as recorder:
            recorder.save(0)
            await storage.has_entered()
            recorder._core._task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            storage.open()
            recorder.save(1)
            assert await recorder.records() == [0, 1]

    asyncio.run(main())


def test_an_interrupt_anywhere_in_save_neither_wedges_the_recorder_nor_tears_it():
    nth = 0
    while True:
        nth += 1

        async def main(nth=nth):
            async with Recorder(storage := MemoryStorage()) as recorder:
                interrupter = Interrupter(nth)
                try:
                    with interrupter:
                        recorder.save("interrupted")
                except KeyboardInterrupt:
                    pass
                recorder.save("next")
                found = await recorder.records()
                assert found in (["interrupted", "next"], ["next"]), interrupter.where
            assert storage.records == found
            return interrupter.fired

        if not asyncio.run(main()):
            break
    assert nth > 3


def test_an_interrupt_anywhere_in_the_pumps_taking_neither_loses_a_record_nor_doubles_it():
    nth = 0
    while True:
        nth += 1
        core = Core(MemoryStorage())
        core._inbox.extend(range(5))
        interrupter = Interrupter(nth)
        try:
            with interrupter:
                core._take()
        except KeyboardInterrupt:
            pass
        assert [*core.front, *core._inbox] == list(range(5)), interrupter.where
        if not interrupter.fired:
            break
    assert nth > 3


def test_an_interrupt_anywhere_in_a_blocking_load_or_close_leaves_them_callable():
    nth = 0
    while True:
        nth += 1
        recorder = Recorder.start(storage := MemoryStorage())
        recorder.save(1)
        interrupter = Interrupter(nth)
        try:
            with interrupter:
                recorder.records()
                recorder.close()
        except KeyboardInterrupt:
            pass
        assert recorder.close() is storage
        assert storage.records == [1], interrupter.where
        if not interrupter.fired:
            break
    assert nth > 10


def test_a_forked_child_leaves_everything_to_the_parent():
    with Recorder.start(storage := GatedStorage()) as recorder:
        storage.shut()
        recorder.save(1)
        assert storage.entered.wait(PATIENCE)
        child = os.fork()
        if not child:
            code = 1
            try:
                for call in (lambda: recorder.save(2), recorder.records, recorder.close):
                    with pytest.raises(RecorderClosedError, match="parent"):
                        call()
                assert recorder._core.forsake() is None
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        storage.open()
    assert storage.records == [1]


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=PATIENCE
    )
    return done.stdout, done.stderr


def test_the_exit_of_the_interpreter_writes_what_a_thread_has_taken(tmp_path):
    out, err = run(f"""
        from fbcache.recorder import Recorder, SqliteStorage
        recorder = Recorder.start(SqliteStorage({str(tmp_path / "r")!r}))
        for number in range(1000):
            recorder.save(number)
    """)
    assert (out, err) == ("", "")
    with Recorder.start(_opened(tmp_path / "r")) as recorder:
        assert recorder.records() == list(range(1000))
    recorder.close().close()


def _opened(path):
    from fbcache.recorder import SqliteStorage

    return SqliteStorage(path)


def test_the_exit_of_the_interpreter_says_nothing_of_what_close_has_told():
    _, err = run("""
        from fbcache.recorder import Recorder, MemoryStorage, RecorderError, Retry
        class Failing(MemoryStorage):
            async def save(self, bulk, /):
                raise OSError
        recorder = Recorder.start(Failing(), retry=Retry(delays=()))
        recorder.save(1)
        try:
            recorder.close()
        except RecorderError:
            pass
    """)
    assert err == ""


def test_the_exit_of_the_interpreter_warns_of_what_has_no_loop():
    _, err = run("""
        from fbcache.recorder import Recorder, MemoryStorage
        recorder = Recorder(MemoryStorage())
        recorder.save(1)
    """)
    assert "RecordsLostWarning" in err and "1 records were lost" in err
