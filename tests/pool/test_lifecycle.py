"""How a pool ends: by `close()`, collection, exit or a fork; no file, thread or descriptor stays."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from unittest.mock import MagicMock
from uuid import uuid4

import numpy as np
import pytest

from fbcache import FBCacheWarning, FBPool, ForkedPoolError, PoolClosedError, UnsupportedTypeError
from tests.faults import PATIENCE

ROOT = Path(__file__).parents[2]

fork_with_threads = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def array(fill, nbytes=8_000):
    return np.full(nbytes // 8, fill, np.float64)


def pool_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fbcache")]


def uses(pool, fb, key):
    """Every public call that needs the pool, by name."""

    def enter(guard):
        with guard:
            pass

    async def aenter(guard):
        async with guard:
            pass

    return {
        "put": lambda: pool.put("b", 1),
        "put, oversize": lambda: pool.put("b", 1, nbytes=2_000_000),
        "insert": lambda: pool.insert(1),
        "get": lambda: pool.get("a"),
        "get unknown": lambda: pool.get("zzz"),
        "get by key": lambda: pool.get(key),
        "get, entered": lambda: enter(pool.get("a")),
        "get_mut": lambda: pool.get_mut("a"),
        "try_get": lambda: pool.try_get("a"),
        "try_get_mut": lambda: pool.try_get_mut("a"),
        "[]": lambda: pool["a"],
        "[] by key": lambda: pool[key],
        "[] =": lambda: pool.__setitem__("b", 1),
        "del []": lambda: pool.__delitem__("a"),
        "in": lambda: "a" in pool,
        "in, unknown": lambda: uuid4() in pool,
        "len": lambda: len(pool),
        "iter": lambda: list(pool),
        "keys": pool.keys,
        "pop": lambda: pool.pop("a"),
        "pop with default": lambda: pool.pop("zzz", None),
        "delete": lambda: pool.delete("a"),
        "resize": lambda: pool.resize("2MB"),
        "evict": pool.evict,
        "evict names": lambda: pool.evict(["a"]),
        "evict no names": lambda: pool.evict([]),
        "drain": pool.drain,
        "stats": pool.stats,
        "validate": pool.validate,
        "with pool": pool.__enter__,
        "fb.key": lambda: fb.key,
        "fb.clone": fb.clone,
        "fb.load": lambda: enter(fb.load()),
        "fb.load_mut": lambda: enter(fb.load_mut()),
        "fb.load, async": lambda: asyncio.run(aenter(fb.load())),
        "fb.load_mut, async": lambda: asyncio.run(aenter(fb.load_mut())),
        "fb.try_load": fb.try_load,
        "fb.try_load_mut": fb.try_load_mut,
        "fb.make_mut": lambda: enter(fb.make_mut()),
        "fb.write_now": fb.write_now,
        "fb.spawn_write_now": fb.spawn_write_now,
    }


USES = list(uses(MagicMock(), MagicMock(), None))


# ------------------------------------------------------------------ close


def test_close_removes_every_file_and_thread_and_may_be_called_again(tmp_path):
    before = set(pool_threads())
    pool = FBPool("1MB", directory=tmp_path, min_free=0)
    pool["a"] = array(1)
    pool.evict()
    assert [file for file in tmp_path.rglob("*") if file.is_file()]
    for _ in range(3):
        pool.close()
        assert list(tmp_path.iterdir()) == [] and set(pool_threads()) == before
    assert "closed" in repr(pool)


def test_with_closes_the_pool_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), FBPool("1MB", directory=tmp_path, min_free=0) as pool:
        pool["a"] = array(1)
        1 / 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PoolClosedError):
        pool["a"]


def test_two_threads_that_close_at_once_both_find_it_closed(make_pool, spawn):
    pool = make_pool()
    pool["a"] = array(1)
    pool.evict()
    path = Path(pool._engine.store.path)
    start = threading.Barrier(4)

    def close():
        start.wait()
        pool.close()
        return path.exists()

    assert [running.result() for running in [spawn(close) for _ in range(4)]] == [False] * 4


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("use", USES)
def test_every_use_after_close_is_the_typed_error(make_pool, use, spilled):
    pool = make_pool()
    fb = pool.put("a", array(1))
    key = fb.key
    if spilled:
        pool.evict()
    pool.close()
    with pytest.raises(PoolClosedError):
        uses(pool, fb, key)[use]()


def test_nothing_is_frozen_by_a_put_into_a_closed_pool(make_pool):
    pool = make_pool()
    pool.close()
    mine = array(1)
    with pytest.raises(PoolClosedError):
        pool.put("a", mine)
    assert mine.flags.writeable


def test_what_describes_and_what_gives_up_works_after_close(make_pool):
    pool = make_pool()
    fb = pool.put("a", array(1))
    guard = pool.get("a")
    held = pool.try_get("a")
    pool.close()
    for thing in (pool, fb, guard, held):
        assert repr(thing)
    assert fb.pool is pool and pool.memory == 1_000_000
    fb.drop()
    fb.drop()
    del fb, guard, held
    gc.collect()


def test_values_in_variables_outlive_the_pool(make_pool):
    pool = make_pool()
    pool["a"], pool["b"] = array(1, 400_000), array(2)
    pool.evict()
    gc.collect()
    mapped, plain = pool["a"], pool["b"]
    pool.close()
    assert (mapped == 1).all() and (plain == 2).all()


# ------------------------------------------------------------------ close while others wait


def test_close_ends_the_wait_of_a_put(make_faulty_pool, spawn, sleepers):
    pool, disk = make_faulty_pool("100KB")
    pool["a"] = array(1, 90_000)
    gate = disk.gate("writev")
    putting = spawn(pool.put, "b", array(2, 80_000))
    sleepers.next()
    gate.wait_reached()
    closing = spawn(pool.close)
    assert isinstance(putting.error(), PoolClosedError)
    gate.open()
    closing.result()


def test_close_ends_the_wait_of_an_oversize_put(make_faulty_pool, spawn):
    pool, disk = make_faulty_pool("100KB")
    gate = disk.gate("writev")
    putting = spawn(pool.put, "b", array(2, 800_000))
    gate.wait_reached()
    closing = spawn(pool.close)
    assert isinstance(putting.error(), PoolClosedError)
    gate.open()
    closing.result()


@pytest.mark.parametrize("call", ["get", "get_mut"])
def test_close_ends_the_wait_for_a_guard(make_pool, spawn, sleepers, call):
    pool = make_pool()
    pool["a"] = array(1)

    def enter():
        with getattr(pool, call)("a"):
            raise AssertionError("the pool is closed")

    async def aenter():
        async with getattr(pool, call)("a"):
            raise AssertionError("the pool is closed")

    with pool.get_mut("a") as value:
        waiting = [spawn(enter), spawn(asyncio.run, aenter())]
        sleepers.next()
        sleepers.next()
        pool.close()
        for running in waiting:
            assert isinstance(running.error(), PoolClosedError)
        value[:] = 2  # the holder's value is its own now
    assert value[0] == 2


@pytest.mark.parametrize("call", ["get", "get_mut"])
@pytest.mark.parametrize("moment", ["open", "preadv", "close"])
def test_close_during_a_load_is_the_typed_error_for_all_who_wait_for_it(
    make_faulty_pool, spawn, sleepers, call, moment
):
    """Whether the reader came too late to open the file, or had read it all."""
    pool, disk = make_faulty_pool()
    pool["a"] = array(1)
    pool.evict()
    gc.collect()
    gate = disk.gate(moment)

    def enter():
        with getattr(pool, call)("a"):
            raise AssertionError("the pool is closed")

    loading = spawn(enter)
    gate.wait_reached()
    watching = spawn(enter)
    sleepers.next()
    pool.close()
    assert isinstance(watching.error(), PoolClosedError)
    gate.open()
    assert isinstance(loading.error(), PoolClosedError)


@pytest.mark.parametrize("moment", ["open", "preadv"])
def test_close_during_the_load_of_a_task_is_the_typed_error(make_faulty_pool, spawn, sleepers, moment):
    pool, disk = make_faulty_pool()
    pool["a"] = array(1)
    pool.evict()
    gc.collect()
    gate = disk.gate(moment)

    async def main():
        async with pool.get("a"):
            raise AssertionError("the pool is closed")

    loading = spawn(asyncio.run, main())
    gate.wait_reached()
    watching = spawn(asyncio.run, main())
    sleepers.next()
    closing = spawn(pool.close)
    assert isinstance(watching.error(), PoolClosedError)
    gate.open()
    assert isinstance(loading.error(), PoolClosedError)
    closing.result()


@pytest.mark.patches
def test_close_during_evict_and_write_now_is_the_typed_error(make_faulty_pool, spawn, monkeypatch):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    pool["b"] = array(2)
    gate = disk.gate("writev")
    written = fb.spawn_write_now()
    gate.wait_reached()
    residency, asked = pool._engine.residency, threading.Event()

    def announced(entry, answer, request=residency.request_write):
        request(entry, answer)
        asked.set()

    monkeypatch.setattr(residency, "request_write", announced)
    evicting = spawn(pool.evict, ["a"])
    assert asked.wait(PATIENCE)
    closing = spawn(pool.close)
    assert isinstance(evicting.error(), PoolClosedError)
    assert isinstance(written.exception(PATIENCE), PoolClosedError)
    gate.open()
    closing.result()


def test_close_ends_a_drain(make_faulty_pool, spawn, sleepers):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    gate = disk.gate("writev")
    fb.spawn_write_now()
    gate.wait_reached()
    draining = spawn(pool.drain)
    sleepers.next()
    closing = spawn(pool.close)
    gate.open()
    closing.result()
    error = draining.error()
    assert error is None or isinstance(error, PoolClosedError)


def test_close_waits_for_deletions_and_writes_that_are_under_way(make_faulty_pool, blob_files, spawn):
    pool, disk = make_faulty_pool()
    fb = pool.put("a", array(1))
    pool["b"] = array(2)
    pool.evict(["b"])
    gate = disk.gate("rename")
    fb.spawn_write_now()
    gate.wait_reached()
    del pool["b"]
    closing = spawn(pool.close)
    gate.open()
    closing.result()
    assert blob_files(pool) == []


# ------------------------------------------------------------------ errors that nobody raised


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("no")


def fail_in_background(pool):
    pool.put("bad", Unpicklable(), nbytes=500_000)
    pool.put("more", 1, nbytes=450_000)
    residency = pool._engine.residency
    while (waiter := residency.run(residency.idle)) is not None:  # as drain() does, and raises nothing
        waiter.run()
    assert residency.background_error is not None


def test_an_error_that_nobody_raised_is_a_warning_at_close_and_only_once(make_pool):
    pool = make_pool()
    fail_in_background(pool)
    with pytest.warns(FBCacheWarning, match="UnsupportedTypeError"):
        pool.close()
    pool.close()


def test_an_error_that_drain_raised_is_no_warning_at_close(make_pool):
    pool = make_pool()
    fail_in_background(pool)
    with pytest.raises(UnsupportedTypeError):
        pool.drain()
    pool.close()


def test_the_warning_points_at_the_line_that_closed_the_pool(make_pool):
    pool = make_pool()
    fail_in_background(pool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pool.close()
    assert [Path(w.filename).name for w in caught] == ["test_lifecycle.py"]


# ------------------------------------------------------------------ collection


def test_a_pool_that_is_forgotten_leaves_no_file_and_no_thread(tmp_path):
    before = set(pool_threads())
    pool = FBPool("1MB", directory=tmp_path, min_free=0)
    fb = pool.put("a", array(1))
    pool.evict()
    value = pool["a"]
    threads = set(pool_threads()) - before
    assert threads
    del fb, pool
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert list(tmp_path.iterdir()) == []
    assert value[0] == 1


def test_a_pool_that_is_forgotten_in_a_reference_cycle_with_its_own_values_is_collected(tmp_path):
    before = set(pool_threads())
    pool = FBPool("1MB", directory=tmp_path, min_free=0)
    pool["self"] = [pool]
    threads = set(pool_threads()) - before
    del pool
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_a_handle_keeps_its_pool_and_a_guard_says_that_it_is_gone(tmp_path):
    before = set(pool_threads())
    pool = FBPool("1MB", directory=tmp_path, min_free=0)
    fb, guard = pool.put("a", [1]), pool.get("a")
    threads = set(pool_threads()) - before
    del pool
    gc.collect()
    with fb.load() as value:
        assert value == [1]
    fb.drop()
    del fb
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
    with pytest.raises(PoolClosedError):
        guard.__enter__()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ interpreter exit


STRICT = ["-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning"]


def run_script(script, *args, code=0):
    """Run a program of its own; return what it printed."""
    script = "import numpy as np\nfrom fbcache import *\n" + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, *STRICT, "-c", script, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    if code == 0:
        assert done.stderr == ""
    return done.stdout


EXITS = {
    "with values spilled": "pool.evict()",
    "with guards held": """
        one, two = pool.get("a"), pool.get_mut("b")
        one.__enter__(), two.__enter__()
        three = pool.try_get("a")
    """,
    "with writes in flight": """
        handles = [pool.put(n, np.full(100_000, n)) for n in range(50)]
        for handle in handles:
            handle.spawn_write_now()
    """,
    "with a thread that waits for a guard": """
        import threading
        def read():
            try:
                with pool.get("b"):
                    pass
            except PoolClosedError:
                pass
        guard = pool.get_mut("b")
        guard.__enter__()
        threading.Thread(target=read, daemon=True).start()
    """,
    "with the pool in a module's global and in a cycle": """
        import sys
        sys.modules["kept"] = [pool]
        pool["self"] = pool
    """,
    "after the pool was forgotten": "del pool",
    "by sys.exit inside a guard": """
        with pool.get_mut("a"):
            raise SystemExit(0)
    """,
}


@pytest.mark.parametrize("how", EXITS)
def test_the_end_of_the_interpreter_leaves_no_file(tmp_path, how):
    script = """
        import sys
        from fbcache.store import mounts
        mounts._warned = True
        pool = FBPool("5MB", directory=sys.argv[1], min_free=0)
        pool["a"], pool["b"] = np.zeros(1000), np.ones(1000)
    """
    run_script(textwrap.dedent(script) + textwrap.dedent(EXITS[how]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_uncaught_exception_leaves_no_file(tmp_path):
    script = """
        import sys
        from fbcache.store import mounts
        mounts._warned = True
        pool = FBPool("5MB", directory=sys.argv[1], min_free=0)
        pool["a"] = np.zeros(1000)
        pool.evict()
        with pool.get("a"):
            1 / 0
    """
    run_script(script, tmp_path, code=1)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ fork


def in_child(call):
    """Fork; return what ``call`` returned in the child, as text, or its traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                answer = str(call())
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@fork_with_threads
@pytest.mark.parametrize("spilled", [False, True])
def test_every_use_in_a_forked_child_is_the_typed_error_and_the_parent_goes_on(pool, spilled):
    fb = pool.put("a", array(1))
    key = fb.key
    if spilled:
        pool.evict()
        gc.collect()
    before = pool.stats()

    def use_all():
        signal.alarm(30)  # a hang is a failure too
        wrong = []
        for name, use in uses(pool, fb, key).items():
            try:
                use()
            except ForkedPoolError:
                continue
            except BaseException as error:
                wrong.append((name, repr(error)))
            else:
                wrong.append((name, "no error"))
        return wrong

    assert in_child(use_all) == "[]"
    assert pool.stats() == before
    with pool.get_mut("a") as value:
        value += 1
    pool.evict()
    gc.collect()
    assert pool["a"][0] == 2
    pool.validate()


@fork_with_threads
def test_nothing_is_frozen_by_a_put_in_a_forked_child(pool):
    mine = array(1)

    def put():
        try:
            pool.put("a", mine)
        except ForkedPoolError:
            return mine.flags.writeable

    assert in_child(put) == "True"


@fork_with_threads
def test_a_child_may_leave_guards_drop_handles_and_close_without_harm(pool):
    pool["a"], pool["b"] = array(1), array(2)
    handles = [pool.insert(array(3))]
    held = [pool.try_get("a")]

    def leave_all(*guards):
        signal.alarm(30)
        for guard in guards:
            guard.__exit__(None, None, None)
        handles.clear()
        held.clear()
        gc.collect()
        pool.close()
        pool.close()
        return "left"

    reading, writing = pool.get("a"), pool.get_mut("b")
    with reading, writing as value:
        assert in_child(lambda: leave_all(reading, writing)) == "left"
        value += 1
    held.clear()
    pool.drain()
    assert pool["b"][0] == 3 and pool.stats().entries == 3
    pool.evict()
    gc.collect()
    with handles[0].load() as value:
        assert value[0] == 3
    pool.validate()


@fork_with_threads
def test_a_child_may_read_what_its_variables_hold_and_make_a_pool_of_its_own(pool, tmp_path):
    pool["a"] = array(1, 400_000)
    pool.evict()
    gc.collect()
    value = pool["a"]

    def work():
        signal.alarm(30)
        with FBPool("1MB", directory=tmp_path / "spill", min_free=0, io_threads=1) as own:
            own["a"] = array(5)
            own.evict()
            gc.collect()
            return own["a"][0] + value[0]

    assert in_child(work) == "6.0"
    assert Path(pool._engine.store.path).exists(), "the child's pool reaped the living parent's session"
    assert pool["a"][0] == 1


@fork_with_threads
def test_a_fork_while_a_write_and_a_load_are_under_way_harms_neither(make_faulty_pool, spawn):
    pool, disk = make_faulty_pool()
    pool["a"] = array(1)
    pool.evict()
    gc.collect()
    fb = pool.put("b", array(2))
    writing, loading = disk.gate("writev"), disk.gate("preadv")
    written = fb.spawn_write_now()
    writing.wait_reached()
    reading = spawn(lambda: float(pool["a"][0]))
    loading.wait_reached()

    def use():
        signal.alarm(30)
        try:
            pool["a"]
        except ForkedPoolError:
            return "refused"

    assert in_child(use) == "refused"
    writing.open()
    loading.open()
    written.result(PATIENCE)
    assert reading.result() == 1
    pool.evict()
    gc.collect()
    assert pool["b"][0] == 2


@fork_with_threads
def test_a_fork_while_another_thread_holds_the_lock_does_not_hang_the_child(pool, spawn):
    pool["a"] = array(1)
    locked, release = threading.Event(), threading.Event()

    def sit():
        with pool._engine.residency.lock:
            locked.set()
            release.wait()

    sitting = spawn(sit)
    locked.wait()

    def use():
        signal.alarm(30)
        try:
            pool.get("a").__enter__()
        except ForkedPoolError:
            return "refused"

    assert in_child(use) == "refused"
    release.set()
    sitting.result()
    assert pool["a"][0] == 1


def test_the_normal_exit_of_a_child_leaves_the_parents_files_lease_and_threads(tmp_path):
    script = """
        import gc, os, sys, threading
        from pathlib import Path
        from fbcache.store import mounts
        mounts._warned = True
        base = Path(sys.argv[1])
        pool = FBPool("5MB", directory=base, min_free=0)
        fb = pool.put("a", np.arange(1000.0))
        pool["b"] = np.ones(1000)
        guard = pool.get_mut("b")
        guard.__enter__()
        pool.evict()
        files = sorted(base.rglob("*"))
        child = os.fork()
        if child == 0:
            sys.exit(0)  # atexit and all finalizers
        assert os.waitpid(child, 0)[1] == 0
        assert sorted(base.rglob("*")) == files and len(files) > 3, files
        other = FBPool("1MB", directory=base, min_free=0)  # reaps the dead
        other.close()
        assert sorted(base.rglob("*")) == files
        guard.__exit__(None, None, None)
        gc.collect()
        assert pool["a"][999] == 999
        pool.evict()
        gc.collect()
        assert pool["b"][0] == 1
        pool.validate()
        print("whole")
    """
    assert run_script(script, tmp_path) == "whole\n"
    assert list(tmp_path.iterdir()) == []


def test_a_session_is_reaped_although_a_child_of_its_dead_owner_lives(tmp_path):
    """The child lets go of the lease, so that the files of a parent that was killed do not stay."""
    script = """
        import os, signal, sys
        from fbcache.store import mounts
        mounts._warned = True
        pool = FBPool("5MB", directory=sys.argv[1], min_free=0)
        pool["a"] = np.zeros(1000)
        pool.evict()
        child = os.fork()
        if child == 0:
            sys.stdout.close()
            os.close(1)
            os.close(2)
            os.read(0, 1)  # until the test is over
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    reading, writing = os.pipe()
    try:
        text = "import numpy as np\nfrom fbcache import *\n" + textwrap.dedent(script)
        command = [sys.executable, "-c", text, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, stdin=reading, capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list(tmp_path.iterdir())) == 1
        FBPool("1MB", directory=tmp_path, min_free=0).close()
        assert list(tmp_path.iterdir()) == []
    finally:
        os.close(reading)
        os.close(writing)


def _try_the_parents_pool(pool, answers):
    try:
        pool["a"]
    except ForkedPoolError as error:
        answers.put(str(error))


@fork_with_threads
def test_multiprocessing_with_fork_gets_the_typed_error_that_says_what_would_do(pool):
    pool["a"] = array(1)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_try_the_parents_pool, args=(pool, answers))
    process.start()
    answer = answers.get()
    process.join(PATIENCE)
    assert process.exitcode == 0 and "'spawn'" in answer
    process.close()
    answers.close()
    assert pool["a"][0] == 1
