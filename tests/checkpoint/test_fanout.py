"""Jobs on a pool's own threads: no more at once than those, none left behind, none forgotten."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fbcache.checkpoint.fanout import FanOut
from fbcache.workers import Workers
from tests.checkpoint.cuts import Spawn
from tests.conftest import Sleepers
from tests.faults import PATIENCE


@pytest.fixture
def make_workers() -> Iterator[Callable[[int], Workers]]:
    made: list[Workers] = []

    def make(size: int) -> Workers:
        made.append(Workers(size, name="fbcache-test"))
        return made[-1]

    yield make
    for workers in made:
        workers.stop()
        workers.join()


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


@pytest.mark.parametrize("size", [1, 3])
def test_no_more_jobs_run_at_once_than_there_are_threads(
    size: int, make_workers: Callable[[int], Workers]
) -> None:
    lock = threading.Lock()
    running = most = 0
    full = threading.Barrier(size)

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        full.wait(PATIENCE)  # so many do run at once, or this breaks
        with lock:
            running -= 1

    assert FanOut(make_workers(size))([job] * (4 * size)) == [None] * (4 * size)
    assert most == size


def test_outcomes_come_in_the_order_of_the_jobs(make_workers: Callable[[int], Workers]) -> None:
    errors = [ValueError("a"), None, KeyboardInterrupt(), None, OSError("b")]

    def make(error: BaseException | None) -> Callable[[], None]:
        def job() -> None:
            if error is not None:
                raise error

        return job

    assert FanOut(make_workers(2))([make(error) for error in errors]) == errors


def test_no_jobs_and_one_job_need_no_thread(make_workers: Callable[[int], Workers]) -> None:
    fan_out = FanOut(make_workers(1))
    where: list[int] = []
    assert fan_out([]) == []
    assert fan_out([lambda: where.append(threading.get_ident())]) == [None]
    assert where == [threading.get_ident()]


def test_from_a_worker_the_jobs_run_there(make_workers: Callable[[int], Workers]) -> None:
    """Invariant 6: it would wait for itself."""
    workers = make_workers(1)
    where: list[int] = []
    done = threading.Event()

    def job() -> None:
        FanOut(workers)([lambda: where.append(threading.get_ident())] * 3)
        where.append(threading.get_ident())
        done.set()

    workers.submit(job)
    wait(done)
    assert len(where) == 4 and len(set(where)) == 1


def test_an_interrupt_of_the_wait_leaves_no_job_running_and_begins_no_other(
    make_workers: Callable[[int], Workers], spawn: Spawn, sleepers: Sleepers
) -> None:
    """What a job does to the directory must not come after the save has cleaned up."""
    workers = make_workers(1)
    begun, go = threading.Event(), threading.Event()
    ended: list[int] = []
    main = threading.main_thread().ident
    assert main is not None

    def first() -> None:
        begun.set()
        wait(go)
        ended.append(1)

    def send() -> None:
        wait(begun)
        sleepers.next()
        signal.pthread_kill(main, signal.SIGINT)
        sleepers.next()  # for the job that runs
        go.set()

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sender = spawn(send)
        with pytest.raises(KeyboardInterrupt):
            FanOut(workers)([first, lambda: ended.append(2), lambda: ended.append(3)])
        assert ended == [1]
    finally:
        signal.signal(signal.SIGINT, former)
    sender.result()
    later = threading.Event()
    workers.submit(later.set)
    wait(later)
    assert ended == [1], "a job was begun after the wait had ended"


def test_a_pool_that_closes_before_the_jobs_have_begun_does_not_hang_the_save(
    make_workers: Callable[[int], Workers],
) -> None:
    workers = make_workers(2)
    workers.stop()
    workers.join()
    done: list[Any] = []
    assert FanOut(workers)([lambda: done.append(1), lambda: done.append(2)]) == [None, None]
    assert done == [1, 2]


def test_a_pool_that_closes_while_jobs_run_has_each_done_once(
    make_workers: Callable[[int], Workers], spawn: Spawn
) -> None:
    workers = make_workers(1)
    begun, go = threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        begun.set()
        wait(go)
        done.append(0)

    jobs = [first, *(lambda n=n: done.append(n) for n in range(1, 20))]
    running = spawn(FanOut(workers), jobs)
    wait(begun)
    workers.stop()
    go.set()
    assert running.result() == [None] * 20
    assert sorted(done) == list(range(20))
