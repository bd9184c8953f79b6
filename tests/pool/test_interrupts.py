"""The stop button: a KeyboardInterrupt at any moment of a put, a load, a wait or a change.

After each, ``validate()`` passes, every value is there and right, and the same call works again.
Places are gone through one by one (:mod:`tests.interrupts`); waits are interrupted by a real signal.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fbcache import FBPool
from tests.conftest import MakePool, Running, Sleepers
from tests.interrupts import Interrupter

ITEM = 8192
ENTRIES = 12


def array(value: float) -> np.ndarray[Any, Any]:
    return np.full(ITEM // 8, value)


def put_over_a_name(pool: FBPool) -> None:
    pool.put(5, array(5))


def put_anew(pool: FBPool) -> None:
    pool.put("new", array(1))
    pool.delete("new")


def put_too_large(pool: FBPool) -> None:
    pool.put("large", np.ones(ITEM))
    pool.delete("large")


def insert_and_forget(pool: FBPool) -> None:
    pool.insert(array(2))


def load(pool: FBPool) -> None:
    with pool.get(0), pool.get(7):
        pass


def look(pool: FBPool) -> None:
    pool[1]
    pool[6]


def change(pool: FBPool) -> None:
    for name in (2, 8):
        with pool.get_mut(name) as x:
            x += 0


def replace_by_rebinding(pool: FBPool) -> None:
    with pool.get_mut(3) as x:
        del x
    guard = pool.get_mut(3)
    with guard:
        guard.value = array(3)


def roll_back(pool: FBPool) -> None:
    with contextlib.suppress(ZeroDivisionError), pool.get_mut(4, rollback=True) as x:
        x += 1
        raise ZeroDivisionError


def change_a_clone(pool: FBPool) -> None:
    fb = pool.insert(array(5))
    twin = fb.clone()
    with twin.make_mut() as x:
        x += 1
    with fb.load() as y:
        assert y[0] == 5


def pop(pool: FBPool) -> None:
    pool.put("p", array(3))
    pool.pop("p")


def evict(pool: FBPool) -> None:
    pool.evict([9])
    pool.evict()


def try_both(pool: FBPool) -> None:
    guard = pool.try_get(10)
    if guard is not None:
        with guard:
            pass
    other = pool.try_get_mut(11)
    if other is not None:
        with other as x:
            x += 0


SCENARIOS = [
    put_over_a_name,
    put_anew,
    put_too_large,
    insert_and_forget,
    load,
    look,
    change,
    replace_by_rebinding,
    roll_back,
    change_a_clone,
    pop,
    evict,
    try_both,
]


# The interpreter drops what a finalizer raises; the handle is then counted until the pool closes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_an_interrupt_anywhere_loses_no_value_and_leaves_no_lock(
    scenario: Callable[[FBPool], None], policy: str, make_pool: MakePool, soak: bool
) -> None:
    pool = make_pool(4 * ITEM, policy=policy)
    for name in range(ENTRIES):
        pool.put(name, array(name))
    nth, stride = 1, 1 if soak or policy == "lru" else 7
    while True:
        pool.drain()
        interrupter = Interrupter(nth)
        with contextlib.suppress(KeyboardInterrupt), interrupter:
            scenario(pool)
        pool.validate()
        for name in range(ENTRIES):
            with pool.get(name) as x:
                assert (x == name).all(), f"{name} after {interrupter.where}"
        scenario(pool)
        pool.drain()
        pool.validate()
        if not interrupter.fired:
            break
        nth += stride


# ------------------------------------------------------------------ waits, by a real signal


@pytest.fixture
def interrupt_me(spawn: Callable[..., Running], sleepers: Sleepers) -> Callable[[], Running]:
    """Have another thread send SIGINT to this one as soon as it is about to wait."""
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        sleepers.next()
        signal.pthread_kill(main, signal.SIGINT)

    return lambda: spawn(send)


@pytest.fixture(autouse=True)
def _interrupts_raise() -> Any:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


class Held:
    """A guard held in another thread until it is let go."""

    def __init__(self, guard: Any, spawn: Callable[..., Running]) -> None:
        self._entered, self._leave = threading.Event(), threading.Event()
        self._guard = guard
        self._thread = spawn(self._hold)
        assert self._entered.wait(30)

    def _hold(self) -> None:
        with self._guard:
            self._entered.set()
            assert self._leave.wait(30)

    def let_go(self) -> None:
        self._leave.set()
        self._thread.result()


@pytest.mark.parametrize("method", ["get", "get_mut"])
def test_interrupting_a_wait_for_a_writer_leaves_no_lock_held(
    method: str, pool: FBPool, spawn: Callable[..., Running], interrupt_me: Callable[[], Running]
) -> None:
    pool.put("x", array(1))
    writer = Held(pool.get_mut("x"), spawn)
    sender = interrupt_me()
    with pytest.raises(KeyboardInterrupt), getattr(pool, method)("x"):
        pass
    sender.result()
    pool.validate()
    writer.let_go()
    with pool.get_mut("x") as x:
        x += 1
    assert pool["x"][0] == 2


def test_interrupting_a_put_that_waits_for_room_stores_nothing_and_the_next_put_works(
    make_faulty_pool: Callable[..., Any], interrupt_me: Callable[[], Running]
) -> None:
    pool, disk = make_faulty_pool(2 * ITEM)
    pool.put("a", array(1))
    gate = disk.gate("writev")
    pool.put("b", array(2))
    sender = interrupt_me()
    with pytest.raises(KeyboardInterrupt):
        pool.put("a", array(3))
    sender.result()
    pool.validate()
    gate.open()
    assert pool["a"][0] == 1
    pool.put("a", array(4))
    assert pool["a"][0] == 4
    assert pool["b"][0] == 2


def test_interrupting_a_wait_for_anothers_load_lets_the_load_go_on(
    make_faulty_pool: Callable[..., Any], spawn: Callable[..., Running], interrupt_me: Callable[[], Running]
) -> None:
    pool, disk = make_faulty_pool()
    pool.put("x", array(7))
    pool.evict(["x"])
    gate = disk.gate("open")
    loading = spawn(lambda: pool["x"][0])
    gate.wait_reached()
    sender = interrupt_me()
    with pytest.raises(KeyboardInterrupt):
        pool["x"]
    sender.result()
    gate.open()
    assert loading.result() == 7
    assert pool.stats().loads == 1


def test_an_interrupt_during_a_load_lets_the_next_caller_load(make_faulty_pool: Callable[..., Any]) -> None:
    pool, disk = make_faulty_pool()
    pool.put("x", array(7))
    pool.evict(["x"])
    for call in ("fstat", "close"):
        disk.fail_after(call, error=KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pool["x"]
        disk.clear()
        pool.validate()
    assert pool["x"][0] == 7
