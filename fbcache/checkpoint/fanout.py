"""Jobs on a pool's own threads, waited for in the caller's.

Guarantees
----------
- At most as many jobs run at once as the pool has I/O threads; no job waits for another (invariant 6).
- However the wait ends, an interrupt included, no job is running any more: those that had
  not begun are not begun.
- When the pool is closed meanwhile, the jobs that its threads have left run in the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

from fbcache.store.syncing import Job, one_by_one
from fbcache.waiting import LOOK_UP, Waiter
from fbcache.workers import Workers


class FanOut:
    """Runs jobs on ``workers``; one alone, or from a worker, here."""

    __slots__ = ("_workers",)

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def __call__(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """Run ``jobs``, and return the outcome of each, in order."""
        if len(jobs) <= 1 or self._workers.is_worker():
            return one_by_one(jobs)
        runs = [_Run(job) for job in jobs]
        try:
            for run in runs:
                self._workers.submit(run.do)
            for run in runs:
                self._see_ended(run)
        except BaseException:
            for run in runs:
                run.called_off = True
            for run in runs:
                while run.begun and not run.ended.done:
                    run.ended.sleep()
            raise
        return [run.outcome for run in runs]

    def _see_ended(self, run: _Run) -> None:
        while not run.ended.done:
            if self._workers.ended and not run.begun:
                run.do()
            else:
                run.ended.sleep(LOOK_UP)


class _Run:
    """One job, and what came of it."""

    __slots__ = ("begun", "called_off", "ended", "job", "outcome")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.begun = False
        self.called_off = False
        self.ended = Waiter()
        self.outcome: BaseException | None = None

    def do(self) -> None:
        """Do it, unless it was called off."""
        # `begun` first: who calls off looks at it second.
        self.begun = True
        if not self.called_off:
            try:
                self.job()
            except BaseException as error:
                self.outcome = error
        self.ended.wake()
