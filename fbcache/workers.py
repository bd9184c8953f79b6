"""The pool's threads: one queue of jobs, two ranks.

Guarantees
----------
- ``submit`` takes no lock and may be called from a finalizer (invariant 7): a deque's ``append``
  is atomic, and ``queue.SimpleQueue.put`` is made to be called from ``__del__``.
- Urgent jobs, on which a task waits, go before the others.
- Jobs never wait for jobs (invariant 6); one thread does everything, only later.
- The threads hold no reference to a pool, so they do not keep one alive. They are daemons,
  because the interpreter joins other threads before the exit handler that stops them.

``_growing`` guards ``_threads`` and ``_stopping``; no job runs under it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from fbcache.helping import HELP

Job = Callable[[], None]


class Workers:
    """Up to ``size`` threads: the first is started at once, others as jobs pile up."""

    def __init__(self, size: int, *, name: str) -> None:
        self._size = size
        self._name = name
        self._urgent: deque[Job] = deque()
        self._normal: deque[Job] = deque()
        self._foreign: deque[Job] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._growing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._ended = False
        self._grow()

    def submit(self, job: Job, *, urgent: bool = False) -> None:
        """Have ``job`` run; it must not raise, nor wait for another job."""
        (self._urgent if urgent else self._normal).append(job)
        self._calls.put(True)

    def submit_foreign(self, job: Job) -> None:
        """Have ``job`` run, which calls a program's code: not by a worker that waits within another job."""
        self._foreign.append(job)
        self._calls.put(True)

    def is_worker(self) -> bool:
        """Whether this is one of the threads, which must not wait for a job (invariant 6)."""
        return threading.current_thread() in self._threads

    @property
    def ended(self) -> bool:
        """Whether no thread is left, so that a job which has not begun never will."""
        return self._stopping and not any(thread.is_alive() for thread in self._threads)

    def see_done(self) -> None:
        """Do what jobs there are if the threads have ended; else they will."""
        if self._ended:
            while self._do_next() or self._do_foreign():
                pass

    def stop(self) -> None:
        """End the threads after the jobs that were submitted before. Does not wait."""
        with self._growing:
            self._stopping = True
        for _ in range(self._size):
            self._calls.put(False)

    def join(self) -> None:
        """Wait until the threads have ended, and do what they have left; a worker waits for the others."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        # First this: who submits a job looks at it second, so that one of the two finds the job.
        self._ended = True
        self.see_done()

    def _grow(self) -> None:
        with self._growing:
            number = len(self._threads)
            if self._stopping or number >= self._size:
                return
            thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads are to be had; one is enough
                if not number:
                    raise
                return
            self._threads.append(thread)

    def _work(self) -> None:
        HELP.job = self._do_next
        while self._calls.get():
            # All jobs there are, not one for each call: an interrupt between `submit`'s two
            # steps leaves a job without a call, which must not wait for the next one.
            while self._do_next() or self._do_foreign():
                pass

    def _do_foreign(self) -> bool:
        try:
            job = self._foreign.popleft()
        except IndexError:
            return False
        if len(self._threads) < self._size:  # there is no telling how long that takes
            self._grow()
        try:
            job()
        except BaseException as error:  # it ends no thread that others wait for
            if not self.is_worker():
                raise
            told = type(error), error, error.__traceback__, threading.current_thread()
            threading.excepthook(threading.ExceptHookArgs(told))
        return True

    def _do_next(self) -> bool:
        """Do one job, if there is one."""
        job = self._next_job()
        if job is None:
            return False
        if len(self._threads) < self._size and (self._urgent or self._normal):
            self._grow()
        job()
        return True

    def _next_job(self) -> Job | None:
        try:
            return self._urgent.popleft()
        except IndexError:
            pass
        try:
            return self._normal.popleft()
        except IndexError:
            return None
