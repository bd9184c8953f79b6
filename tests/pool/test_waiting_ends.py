"""Every wait comes to an end, whatever happens to what is waited for, and whoever makes it happen.

Each test names who waits and for what, and the event that must wake it. All waits give up after a while, so
that a broken build fails instead of hanging.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import queue
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import DeadlockError, FBPool, InternalError, MsgpackCodec, PoolClosedError, StorageError
from fbcache.adoptee import Adoptee, Claim
from fbcache.captures import Want
from fbcache.entry import Entry, Token
from fbcache.waiting import Answer, Waiter, Work
from tests.conftest import MakePool, Running, Sleepers
from tests.interrupts import Interrupter

ITEM = 8192
PATIENCE = 5.0
Spawn = Callable[..., Running]
MakeFaulty = Callable[..., Any]


def array(value: float) -> np.ndarray[Any, Any]:
    return np.full(ITEM // 8, value)


# -------------------------------------------------------------------------------- against close


def test_drain_against_close_with_blobs_left_to_delete(
    make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers
) -> None:
    """Those are not deleted any more, one by one: waiting for the end of it would take for ever."""
    pool, disk = make_faulty_pool(io_threads=1)
    for name in range(4):
        pool.put(name, array(name))
    pool.evict()
    gate = disk.gate("unlink")
    for name in range(4):
        pool.delete(name)
    gate.wait_reached()
    draining = spawn(pool.drain)
    sleepers.next()
    closing = spawn(pool.close)
    assert isinstance(draining.error(), PoolClosedError)
    gate.open()
    closing.result()


def test_entering_on_a_loop_against_close_between_the_decision_and_the_load(
    pool: FBPool, monkeypatch: pytest.MonkeyPatch, spawn: Spawn
) -> None:
    """The workers have ended when they are told to load: nobody would ever do it."""
    pool.put("x", array(1))
    pool.evict()
    load = Work.arun

    async def closed_first(work: Work) -> None:
        spawn(pool.close).result()
        await load(work)

    monkeypatch.setattr(Work, "arun", closed_first)

    async def read() -> None:
        async with asyncio.timeout(PATIENCE):
            async with pool.get("x"):
                pass

    with pytest.raises(PoolClosedError):
        asyncio.run(read())


def test_restoring_against_close_with_a_blob_that_was_to_be_deleted(
    make_pool: MakePool, tmp_path: Any, spawn: Spawn
) -> None:
    """Its deletion never comes, so that nobody may wait for it."""
    pool = make_pool(store="packed")
    fb = pool.put("x", array(1))
    key = fb.persist(tmp_path / "tracked")
    residency = pool._engine.residency
    pool.close()
    adoptee = Adoptee("y", Token(key, 1), 1, None)
    with pytest.raises(PoolClosedError):
        residency.run(residency.reserve, [adoptee], Claim(residency), lends=False)


@pytest.mark.parametrize("where", ["in a finalizer", "in a callback"])
def test_closing_amid_closing_returns(make_pool: MakePool, where: str, spawn: Spawn) -> None:
    pool = make_pool()
    closed = []

    class Closer:
        def __del__(self) -> None:
            pool.close()
            closed.append(True)

    if where == "in a finalizer":
        pool.put("x", Closer(), nbytes=100)
    else:
        with pool.insert(array(1)).load_mut() as value:
            value += 1
            fb = pool.insert(array(2))
            with fb.load_mut():
                future = fb.spawn_write_now()
                future.add_done_callback(lambda _: (pool.close(), closed.append(True)))
                spawn(pool.close).result()
    spawn(pool.close).result()
    gc.collect()
    assert closed == [True]


def test_closing_from_a_worker_against_close_returns(
    make_pool: MakePool, spawn: Spawn
) -> None:
    """The one that closes waits for the workers' ends, and a worker must not wait for it."""
    pool = make_pool()
    within, go = threading.Event(), threading.Event()

    def close() -> None:
        within.set()
        assert go.wait(PATIENCE)
        pool.close()

    pool._engine.workers.submit(close)
    assert within.wait(PATIENCE)
    residency = pool._engine.residency
    let_go, stopping = pool._engine.workers.stop, threading.Event()

    def stop() -> None:
        let_go()
        stopping.set()

    pool._engine.workers.stop = stop  # type: ignore[method-assign]
    closing = spawn(pool.close)
    assert stopping.wait(PATIENCE)
    go.set()
    closing.result()
    assert residency.closed


# ------------------------------------------------------------------------------------ make_mut


class GatedCopy:
    """A value whose copies are gated, each on its own."""

    def __init__(self) -> None:
        self.copied: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()

    def __deepcopy__(self, memo: Any) -> GatedCopy:
        go = threading.Event()
        self.copied.put(go)
        assert go.wait(30)
        return GatedCopy()


def move(guard: Any) -> None:
    with guard:
        pass


@pytest.mark.parametrize("other", ["make_mut", "drop"])
def test_make_mut_against_another_call_that_moves_or_drops_the_same_handle(
    pool: FBPool, spawn: Spawn, other: str
) -> None:
    """Whoever comes second finds the handle elsewhere, and must not take it from the former entry again."""
    value = GatedCopy()
    fb = pool.insert(value, nbytes=100)
    twin = fb.clone()
    first = spawn(move, fb.make_mut())
    go_first = value.copied.get(timeout=30)
    if other == "drop":
        fb.drop()
        go_first.set()
        assert isinstance(first.error(), KeyError)
    else:
        second = spawn(move, fb.make_mut())
        go_second = value.copied.get(timeout=30)
        go_first.set()
        first.result()
        go_second.set()
        second.result()
        assert fb.state.name == "RESIDENT"
    pool.validate()
    with twin.load() as found:
        assert found is value
    del fb, first
    twin.drop()
    pool.drain()
    gc.collect()
    pool.validate()
    assert pool.stats().entries == 0


# -------------------------------------------------------------- a wait for oneself, from below


class Calling(MsgpackCodec):
    """Has ``call`` called amid the encoding of each dictionary."""

    call: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.came: list[object] = []

    def encode(self, value: Any, *, allow_pickle: bool) -> Any:
        if isinstance(value, dict):
            try:
                self.came.append(self.call())
            except BaseException as error:
                self.came.append(type(error))
        return super().encode(value, allow_pickle=allow_pickle)


def from_below(pool: FBPool, path: Any) -> dict[str, tuple[Callable[[], object], object]]:
    """What code on a pool's own thread may call, of the value being written, and what comes of it."""
    return {
        "get_mut": (lambda: move(pool.get_mut("x")), DeadlockError),
        "get": (lambda: move(pool.get("x")), None),
        "evict": (lambda: pool.evict(), 0),
        "evict by name": (lambda: pool.evict(["x"]), 0),
        "save": (lambda: pool.save(path, ["x"]), DeadlockError),
        "persist": (lambda: pool.persist("x", path), DeadlockError),
        "drain": (lambda: pool.drain(), None),
        "put": (lambda: pool.put("x", 1) and None, None),
        "insert": (lambda: pool.insert(np.zeros(200_000)) and None, None),
        "delete": (lambda: pool.delete("x"), None),
        "pop": (lambda: pool.pop("x"), {"a": 1}),
        "close": (lambda: pool.close(), None),
        "resize": (lambda: pool.resize("2MB"), None),
        "stats": (lambda: pool.stats() and None, None),
    }


@pytest.mark.parametrize("what", list(from_below(None, None)))  # type: ignore[arg-type]
@pytest.mark.parametrize("io_threads", [1, 2])
def test_what_a_codec_calls_of_the_value_that_it_encodes_ends(
    make_pool: MakePool, spawn: Spawn, tmp_path: Any, what: str, io_threads: int
) -> None:
    codec = Calling()
    pool = make_pool(codec=codec, io_threads=io_threads)
    fb = pool.put("x", {"a": 1})
    call, expected = from_below(pool, tmp_path / "tracked")[what]
    codec.call = call  # type: ignore[method-assign]
    future = fb.spawn_write_now()
    if what == "close":
        assert isinstance(future.exception(30), PoolClosedError)
    else:
        assert future.exception(30) is None
    spawn(pool.close).result()
    assert codec.came == [expected]


@pytest.mark.parametrize("what", ["evict", "get_mut", "drain", "put"])
@pytest.mark.parametrize("io_threads", [1, 2])
def test_what_a_futures_callback_calls_ends_while_others_of_its_batch_are_being_written(
    make_pool: MakePool, spawn: Spawn, what: str, io_threads: int
) -> None:
    """Small values are written together, and the large ones of the same order after them."""
    pool = make_pool("100MB", io_threads=io_threads, store="auto")
    came: list[object] = []
    done = threading.Event()
    calls: dict[str, Callable[[], object]] = {
        "evict": pool.evict,
        "get_mut": lambda: move(pool.get_mut("large")),
        "drain": pool.drain,
        "put": lambda: pool.put("large", 1),
    }

    def call(_: object) -> None:
        try:
            came.append(calls[what]())
        except BaseException as error:
            came.append(error)
        done.set()

    held, go = threading.Event(), threading.Event()
    for _ in range(io_threads):
        pool._engine.workers.submit(lambda: (held.set(), go.wait(30)))
    large = pool.put("large", np.zeros(20_000))
    small = pool.put("small", 1)
    futures = [large.spawn_write_now(), small.spawn_write_now()]
    futures[1].add_done_callback(call)
    go.set()
    assert done.wait(PATIENCE)
    assert [future.result(PATIENCE) for future in futures] == [None, None]
    assert not isinstance(came[0], BaseException)


# ------------------------------------------------------------------- finalizers under the lock


class Finalized:
    """Calls something when it dies."""

    def __init__(self, call: Callable[[], object], came: list[object]) -> None:
        self.call, self.came = call, came

    def __deepcopy__(self, memo: Any) -> Finalized:
        return Finalized(self.call, self.came)

    def __del__(self) -> None:
        try:
            self.came.append(self.call())
        except BaseException as error:
            self.came.append(type(error))


def test_a_copy_kept_for_a_rollback_dies_without_the_lock(pool: FBPool, spawn: Spawn) -> None:
    """Its finalizer may wait for another thread, which may need the pool."""
    came: list[object] = []
    pool.put("x", Finalized(lambda: spawn(pool.stats).result() and None, came), nbytes=100)
    with pool.get_mut("x", rollback=True):
        pass
    assert came == [None]


def test_a_value_deleted_while_it_is_written_dies_without_the_lock(make_pool: MakePool, spawn: Spawn) -> None:
    came: list[object] = []
    reached, go = threading.Event(), threading.Event()

    class Gated(MsgpackCodec):
        def encode(self, value: Any, *, allow_pickle: bool) -> Any:
            reached.set()
            assert go.wait(30)
            return super().encode(1, allow_pickle=allow_pickle)

    pool = make_pool(codec=Gated(), io_threads=1)
    fb = pool.insert(Finalized(lambda: spawn(pool.stats).result() and None, came), nbytes=100)
    fb.spawn_write_now()
    assert reached.wait(30)
    fb.drop()
    go.set()
    pool.drain()
    assert came == [None]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("put", None),
        ("put too large", None),
        ("evict", 0),
        ("write_now", DeadlockError),
        ("get_mut", DeadlockError),
        ("save", DeadlockError),
        ("drain", None),
        ("load", None),
    ],
)
@pytest.mark.patches
def test_what_a_finalizer_calls_that_the_collector_runs_amid_a_decision_ends(
    make_pool: MakePool, spawn: Spawn, sleepers: Sleepers, monkeypatch: pytest.MonkeyPatch, what: str,
    expected: object, tmp_path: Any,
) -> None:
    """Its thread has the pool's lock, so that nobody can do what it would wait for."""
    pool = make_pool(10 * ITEM, io_threads=1)
    pool.put("spilled", array(0))
    pool.evict()
    fb = pool.insert(array(1))
    pool.put("held", array(1))
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.get_mut("held"):
            held.set()
            assert go.wait(30)

    holding = spawn(hold)
    assert held.wait(30)
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: [pool.put(n, array(n)) for n in range(30)] and None,
        "put too large": lambda: pool.put("large", np.zeros(11 * ITEM // 8)) and None,
        "evict": lambda: pool.evict() and 0,
        "write_now": fb.write_now,
        "get_mut": lambda: move(pool.get_mut("held")),
        "save": lambda: pool.save(tmp_path / "tracked"),
        "drain": pool.drain,
        "load": lambda: move(pool.get("spilled")),
    }
    came: list[object] = []
    residency = pool._engine.residency
    make_room = residency._make_room

    def die_first(nbytes: int, *, force: bool) -> None:
        monkeypatch.undo()
        Finalized(calls[what], came)
        make_room(nbytes, force=force)

    monkeypatch.setattr(residency, "_make_room", die_first)
    spawn(pool.put, "y", array(2)).result()
    assert came == [expected]
    go.set()
    holding.result()
    with contextlib.suppress(StorageError):
        pool.drain()
    pool.validate()


@pytest.mark.patches
def test_a_finalizer_that_the_collector_runs_amid_a_hit_does_not_wait(
    make_pool: MakePool, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit is noted under the lock, too, without the frame of a decision."""
    pool = make_pool(4 * ITEM, io_threads=1)
    for name in "ab":
        pool.put(name, array(1))
    pool.drain()
    came: list[object] = []
    residency = pool._engine.residency
    touch = residency._touch

    def die_first(entry: Entry) -> None:
        monkeypatch.undo()
        Finalized(lambda: [pool.put(n, array(n)) for n in range(9)] and None, came)
        touch(entry)

    monkeypatch.setattr(residency, "_touch", die_first)
    entry = pool._engine.names["a"]

    def hit() -> None:
        with residency.lock:
            residency.touch(entry)

    spawn(hit).result()
    assert came == [None]
    pool.drain()
    pool.validate()
    assert pool["a"][0] == 1


# ----------------------------------------------------------------------------- abandoned guards


@pytest.mark.parametrize("method", ["get", "get_mut"])
def test_a_guard_that_is_forgotten_while_another_waits_lets_it_in(
    pool: FBPool, spawn: Spawn, sleepers: Sleepers, method: str
) -> None:
    """As after an interrupt at the very entry of its ``__exit__``."""
    pool.put("x", array(1))
    forgotten = getattr(pool, method)("x")
    forgotten.__enter__()
    waiting = spawn(move, pool.get_mut("x"))
    sleepers.next()
    del forgotten
    waiting.result()
    pool.validate()


def test_one_thread_is_not_twice_in_line_for_an_entry(pool: FBPool, spawn: Spawn, sleepers: Sleepers) -> None:
    """A signal's handler, or a finalizer, that asks for what its own thread waits for below it."""
    pool.put("x", array(1))
    came: list[object] = []

    def wait_within() -> None:
        guard = pool.get_mut("x")
        residency = pool._engine.residency
        guard._entering = True
        guard.owner = threading.get_ident()
        waiter = residency.run(guard._advance, None)
        assert waiter is not None
        with pytest.raises(DeadlockError), pool.get_mut("x"):
            pass
        came.append(None)
        waiter.run()
        assert residency.run(guard._advance, None) is None
        guard._opened()
        guard.__exit__(None, None, None)

    with pool.get("x"):
        waiting = spawn(wait_within)
        sleepers.next()
    waiting.result()
    assert came == [None]


# --------------------------------------------------------------------------- cancelled futures


def test_a_cancelled_future_ends_the_waits_for_it(make_faulty_pool: MakeFaulty, spawn: Spawn) -> None:
    pool, disk = make_faulty_pool()
    fb = pool.put("x", array(1))
    gate = disk.gate("writev")
    first = fb.spawn_write_now()
    gate.wait_reached()
    second = fb.spawn_write_now()
    assert second.cancel()
    waiting = spawn(wait, [first, second], 20)
    gate.open()
    assert not waiting.result().not_done


# ------------------------------------------------------------------------------ what is stuck


def test_a_value_that_could_not_be_encoded_is_evicted_once_a_save_has_written_it(
    make_pool: MakePool, tmp_path: Any
) -> None:
    class Moody(MsgpackCodec):
        fails = True

        def encode(self, value: Any, *, allow_pickle: bool) -> Any:
            if self.fails:
                raise ValueError("not today")
            return super().encode(value, allow_pickle=allow_pickle)

    codec = Moody()
    pool = make_pool(10 * ITEM, codec=codec)
    pool.put("x", array(1))
    with pytest.raises(StorageError):
        pool.evict()
    codec.fails = False
    pool.persist("x", tmp_path / "tracked")
    pool.validate()
    for name in range(20):
        pool.put(name, array(name))
    pool.drain()
    assert pool._engine.names["x"].state.name == "SPILLED"


# ---------------------------------------------------------------- interrupts of whom one waits for


class Waited:
    """Somebody waits for what this thread is about to do, and is interrupted in.

    ``act`` is what it does; ``ends`` whoever waits; ``last`` opens what was held.
    """

    def __init__(self, pool: FBPool, disk: Any, spawn: Spawn, sleepers: Sleepers) -> None:
        self.pool, self.disk, self.spawn, self.sleepers = pool, disk, spawn, sleepers
        self.ends: list[Running] = []

    def await_asleep(self, call: Callable[..., Any], *args: Any) -> None:
        self.ends.append(self.spawn(call, *args))
        self.sleepers.next()

    def act(self) -> None:
        raise NotImplementedError

    def last(self) -> None:
        self.disk.open_all()


class LoadOfAnother(Waited):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pool.put("x", array(1))
        self.pool.evict()
        self.guard = self.pool.get("x")
        self.step = self.pool._engine.residency.run(self.begin)
        self.await_asleep(move, self.pool.get("x"))
        self.await_asleep(self.pool.drain)

    def begin(self) -> Any:
        self.guard._entering = True
        self.guard.owner = threading.get_ident()
        return self.guard._advance(None)

    def act(self) -> None:
        try:
            self.step.run()
        finally:
            self.pool._engine.residency.run(self.guard.withdraw)

    def last(self) -> None:
        self.pool._engine.residency.run(self.guard.withdraw)
        super().last()


class FailingLoadOfAnother(LoadOfAnother):
    def act(self) -> None:
        self.disk.fail("open", error=OSError(5, "input/output error"))
        with contextlib.suppress(StorageError):
            super().act()


class WriteOfWhatIsDeleted(Waited):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pool.put("x", array(1)).drop()
        gate = self.disk.gate("writev")
        self.ends.append(self.spawn(self.pool.evict))
        gate.wait_reached()

    def act(self) -> None:
        with contextlib.suppress(KeyError):
            self.pool.delete("x")


class WriteAmidAMutation(Waited):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fb = self.pool.put("x", array(1))
        self.fb.write_now()
        self.guard = self.pool.get_mut("x", rollback=True)
        self.guard.__enter__()
        self.ends.append(self.spawn(self.fb.spawn_write_now().result, 20))
        self.await_asleep(move, self.pool.get("x"))
        self.await_asleep(move, self.pool.get_mut("x"))

    def act(self) -> None:
        error = ZeroDivisionError()
        self.guard.__exit__(ZeroDivisionError, error, None)


class MutationKept(WriteAmidAMutation):
    def act(self) -> None:
        self.guard.__exit__(None, None, None)


class SaveAmidAMutation(WriteAmidAMutation):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        path = Path(self.pool._engine.store.path).parent / "tracked"
        self.ends.append(self.spawn(self.spawn(self.fb.spawn_persist, path).result().result, 20))
        self.ends.append(self.spawn(self.fb.spawn_write_now().result, 20))


class Room(Waited):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name in "abcd":
            self.pool.put(name, array(1)).drop()
        gate = self.disk.gate("writev")
        self.await_asleep(self.pool.put, "e", array(2))
        gate.wait_reached()

    def act(self) -> None:
        for name in "abcd":
            with contextlib.suppress(KeyError):
                self.pool.delete(name)


class Closing(Waited):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        pool = self.pool
        for name in "abc":
            pool.put(name, array(1))
        self.guard = pool.get_mut("a")
        self.guard.__enter__()
        gate = self.disk.gate("writev")
        self.ends.append(self.spawn(pool.put("c", array(1)).write_now))
        gate.wait_reached()
        self.ends.append(self.spawn(pool.put("b", array(1)).spawn_write_now().result, 20))
        self.await_asleep(move, pool.get("a"))
        self.await_asleep(move, pool.get_mut("a"))
        self.await_asleep(pool.drain)
        self.await_asleep(pool.put, "d", np.zeros(2 * ITEM // 8))

    def act(self) -> None:
        self.disk.open_all()
        self.pool.close()

    def last(self) -> None:
        self.pool.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "kind",
    [
        LoadOfAnother,
        FailingLoadOfAnother,
        WriteOfWhatIsDeleted,
        WriteAmidAMutation,
        MutationKept,
        SaveAmidAMutation,
        Room,
        Closing,
    ],
)
def test_an_interrupt_anywhere_leaves_nobody_waiting(
    kind: type[Waited], make_faulty_pool: MakeFaulty, spawn: Spawn, sleepers: Sleepers, soak: bool
) -> None:
    nth, stride = 1, 1 if soak else 2
    fired = True
    while fired:
        pool, disk = make_faulty_pool(4 * ITEM, io_threads=1)
        scene = kind(pool, disk, spawn, sleepers)
        interrupter = Interrupter(nth)
        with contextlib.suppress(KeyboardInterrupt), interrupter:
            scene.act()
        fired = interrupter.fired
        if fired:
            with contextlib.suppress(RuntimeError):  # the guard was left
                scene.act()
        scene.last()
        for each in scene.ends:
            error = each.error()
            assert error is None or isinstance(error, (PoolClosedError, StorageError, KeyError)), (
                f"{error!r} after {interrupter.where}"
            )
        if not pool._engine.residency.closed:
            pool.validate()
        pool.close()
        while not sleepers.none:
            sleepers.next()
        nth += stride


# ---------------------------------------------------------------- calls from within one's own calls


def all_calls(pool: FBPool, path: Path) -> dict[str, Callable[[], object]]:
    """Public calls, of the entry "x", which the caller may hold, and of others."""
    fb = pool.put("x", array(1)).clone()
    other = pool.insert(array(2))
    tracked = path / "tracked"
    return {
        "get": lambda: move(pool.get("x")),
        "get_mut": lambda: move(pool.get_mut("x")),
        "rollback": lambda: move(pool.get_mut("x", rollback=True)),
        "try_get": lambda: pool.try_get("x"),
        "try_get_mut": lambda: pool.try_get_mut("x"),
        "getitem": lambda: pool["x"],
        "put": lambda: pool.put("x", 1),
        "put too large": lambda: pool.put("x", np.zeros(2_000_000 // 8)),
        "pop": lambda: pool.pop("x"),
        "delete": lambda: pool.delete("x"),
        "make_mut": lambda: move(fb.make_mut()),
        "write_now": fb.write_now,
        "spawn_write_now": fb.spawn_write_now,
        "persist": lambda: fb.persist(tracked),
        "spawn_persist": lambda: fb.spawn_persist(tracked),
        "persist another": lambda: other.persist(tracked),
        "save": lambda: pool.save(tracked),
        "save elsewhere": lambda: pool.save(path / "elsewhere"),
        "restore": lambda: pool.restore(tracked, replace=True),
        "evict": pool.evict,
        "evict by name": lambda: pool.evict(["x"]),
        "resize": lambda: pool.resize("500KB"),
        "drain": pool.drain,
        "validate": pool.validate,
        "close": pool.close,
        "drop": fb.drop,
        "key": lambda: fb.key,
    }


class Told:
    """A recorder that calls something of each event."""

    def __init__(self) -> None:
        self.call: Callable[[], object] | None = None

    def save(self, record: Any) -> None:
        call, self.call = self.call, None
        if call is not None:
            with contextlib.suppress(DeadlockError, KeyError, PoolClosedError):
                call()


class Decoding(MsgpackCodec):
    """Has something called amid the next decoding."""

    call: Callable[[], object] | None = None

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        call, self.call = self.call, None
        if call is not None:
            call()
        return super().decode(*args, **kwargs)


def from_within(
    place: str, pool: FBPool, codec: Decoding, told: Told, path: Path, call: Callable[[], Any]
) -> None:
    """Have ``call`` called where ``place`` says."""
    if place.endswith("guard"):
        guard = pool.get("x") if place == "read guard" else pool.get_mut("x")
        with guard:
            call()
    elif place == "task":

        async def hold() -> None:
            async with pool.get_mut("x"):
                call()

        asyncio.run(hold())
    elif place == "change_key":
        pool.save(path / "tracked", change_key=lambda _: call())
    elif place == "events":
        told.call = call
        move(pool.get_mut("x"))
    else:
        pool.evict()
        codec.call = call
        move(pool.get("x" if place == "own decode" else "y"))


CALLS = [
    *("get", "get_mut", "rollback", "try_get", "try_get_mut", "getitem", "put", "put too large", "pop"),
    *("delete", "make_mut", "write_now", "spawn_write_now", "persist", "spawn_persist", "persist another"),
    *("save", "save elsewhere", "restore", "evict", "evict by name", "resize", "drain", "validate", "close"),
    *("drop", "key"),
]
PLACES = ["read guard", "write guard", "task", "change_key", "events", "decode", "own decode"]


@pytest.mark.filterwarnings("ignore::fbcache.FBCacheWarning")
@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("place", PLACES)
def test_a_call_from_within_ones_own_call_ends(
    make_pool: MakePool, spawn: Spawn, tmp_path: Path, place: str, what: str
) -> None:
    codec, told = Decoding(), Told()
    pool = make_pool(codec=codec, events=told, io_threads=1)
    calls = all_calls(pool, tmp_path)
    pool.put("y", array(3))
    if what == "restore":
        pool.save(tmp_path / "tracked")
    calls["write_now"]()  # and the entry has a blob, as most have
    error = spawn(from_within, place, pool, codec, told, tmp_path, calls[what]).error()
    allowed = (DeadlockError, KeyError, PoolClosedError, StorageError)
    assert error is None or isinstance(error, allowed), repr(error)
    assert list(calls) == CALLS
    if not pool._engine.residency.closed:
        calls.clear()
        gc.collect()
        pool.validate()


# ------------------------------------------------------------------------------------- validate


@pytest.mark.parametrize("what", ["a load", "a blob", "a blob of what is gone", "a save", "a deletion"])
def test_validate_tells_of_whoever_would_wait_for_ever(pool: FBPool, what: str) -> None:
    pool.put("x", array(1))
    residency = pool._engine.residency
    entry = pool._engine.names["x"]
    if what == "a load":
        residency.watchers[entry] = [Waiter()]
    elif what == "a blob":
        residency.requests[entry] = [Answer()]
    elif what == "a blob of what is gone":
        residency.requests[Entry(1, 1)] = [Answer()]
    elif what == "a save":
        entry.captures = Want(entry)
    else:
        residency.deletion_watchers.append(Waiter())
    with pytest.raises(InternalError):
        pool.validate()
    residency.requests.clear()
    residency.watchers.clear()
    residency.deletion_watchers.clear()
    entry.captures = None
    pool.validate()
