"""What every recorder is made of: the line of records, bulks, retries, and the end.

Guarantees
----------
- :meth:`Core.save` takes no lock, waits for nothing and touches no file: an append to a deque and, when
  the pump rests, a wake of its loop. It may be called from any thread, a finalizer and a signal handler.
- Records reach the storage in the order of their appends, so in order for each thread. What comes while
  the storage is busy goes out as one bulk; a request (a load, the close) is a mark in the same line, and
  cuts the bulk there: it sees every record saved before it.
- A record is in the line, or in ``front``, until the storage has taken it. What the storage refuses for all
  of the retries stays in ``front``, is attached to the error of each request that comes to it, and is
  tried again with the next record or request.
- A record whose write was cancelled (its loop ended in the midst) is written again: at least once.
- ``max_pending`` is looked at without a lock: threads in ``save`` at one instant may each bring one more.

Phases
------
``DELAYED`` --the storage appears--> ``OPEN`` --a write fails--> ``FAILING`` --a write succeeds--> ``OPEN``;
from each of them --``close()``--> ``CLOSING`` --all is written--> ``CLOSED``, or --not all--> ``LOST``.
``DELAYED`` --the storage fails to appear--> ``LOST``. ``close()`` out of ``LOST`` tries once more.

Who owns what
-------------
The pump is a task on one event loop, there only while there is something to do; ``front``, ``_refused``
and the phase are its own. Anyone appends to ``_inbox``; only the pump takes from it, and it takes nothing
before it has put it into ``front`` (a straight line, without a call at which an interrupt could come).
``_binding`` guards which loop it is; ``save`` does not take it.

Wakes: the pump lowers ``_pumping`` first and looks at ``_inbox`` second, ``save`` appends first and looks at
``_pumping`` second; so none is missed. There is no flag that says "woken already", for an interrupt
between it and the wake would silence the recorder for good.

A loop that is closed first leaves records where they are; the next call of ``records`` or ``close``
brings its own loop, and the pump goes on there.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fbcache.recorder.errors import RecorderError, RecordsRefusedError
from fbcache.recorder.line import Line
from fbcache.recorder.request import Request
from fbcache.recorder.storage import Storage

R = TypeVar("R")

class Core(Line[R]):
    """A recorder without its face; does not keep the face alive, so that its drop is noticed."""

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Work on ``loop`` from now on, unless there is a loop that can go on.

        Raises
        ------
        RecorderError
            Another loop was stopped in the midst of a write.
        """
        with self._binding:
            former = self._loop
            if former is loop:
                return
            if former is not None and not former.is_closed():
                if former.is_running():
                    return
                if self._task is not None:
                    raise RecorderError(
                        "the recorder works on another event loop, which was stopped while it wrote; "
                        "let that run on, or close it",
                        unsaved=tuple(self._records()),
                    )
            self._loop = loop
            self._leave_turn()
        if self._inbox or self.front or self._delayed is not None:
            self._wake()

    def _leave_turn(self) -> None:
        self._turn = self._task = None
        self._pumping = False
        self.writing = 0
        asked, self._asked = self._asked, None
        if asked is not None:
            self._questions.add(asked)
            self._inbox.appendleft(asked)

    def _kick(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None and self._loop is loop and not self._forsaken:
            self._turn = turn = object()
            self._pumping = True
            task = loop.create_task(self._pump(turn), name="fbcache-recorder")
            if self._turn is turn:  # an eager task may have ended already
                self._task = task

    async def _pump(self, turn: object) -> None:
        try:
            await self._appear()
            former = 0  # of those in front, what failed in this turn; that waits for something new
            while not self._forsaken:
                request = self._take()
                if len(self.front) > former or request is not None:
                    await self._persist()
                    former = len(self.front)
                if request is not None:
                    await self._answer(request)
                elif self._rests():
                    break
        except BaseException:
            if self._turn is turn:
                self._give_up_questions()
            raise
        finally:
            if self._turn is turn:
                self._leave_turn()

    async def _appear(self) -> None:
        if self._delayed is None:
            return
        try:
            self.storage = await self._delayed
        except BaseException as error:
            self._missing = error
            self._refusal = f"the recorder's storage did not appear: {error!r}; the record was not taken"
            if not isinstance(error, (Exception, asyncio.CancelledError)) or _is_cancelled():
                raise
        finally:
            self._delayed = None

    def _take(self) -> Request | None:
        """Move records to ``front``, up to the next request, which is returned."""
        inbox = self._inbox
        while inbox:
            item = inbox[0]
            if not isinstance(item, Request):
                # Straight line, and no call: an interrupt neither loses the record nor doubles it.
                self.front += (item,)
                del inbox[0]
                continue
            pointless = item.pointless
            if not pointless:
                self._asked = item
            del inbox[0]
            self._questions.discard(item)
            if not pointless:
                return item
        return None

    def _rests(self) -> bool:
        self._pumping = False
        if not self._inbox:
            return True
        self._pumping = True
        return False

    # ------------------------------------------------------------------------- writing

    async def _persist(self) -> None:
        """Write ``front``, or say in ``_failure`` why not."""
        if not self.front:
            return
        if self.storage is None:
            self._failure = self._missing
            return
        for delay in (*self._retry.delays, None):
            self._failure = await self._try_to_write(self.storage)
            self.writing = 0
            if self._failure is None or delay is None or self._forsaken:
                return
            await self._retry.sleep(delay)

    async def _try_to_write(self, storage: Storage[R]) -> BaseException | None:
        while self.front:
            bulk = tuple(self.front)
            self.writing = len(bulk)
            try:
                await storage.save(bulk)
            except RecordsRefusedError as refusal:
                if not self._set_aside(refusal):
                    return refusal
            except asyncio.CancelledError as error:
                if _is_cancelled():
                    raise
                return error  # the storage's own
            except Exception as error:
                return error
            else:
                del self.front[: len(bulk)]
        return None

    def _set_aside(self, refusal: RecordsRefusedError) -> bool:
        """Take out what can never be written; whether there was something."""
        refused = [(r, refusal.refused[i]) for i, r in enumerate(self.front) if i in refusal.refused]
        kept = [r for i, r in enumerate(self.front) if i not in refusal.refused]
        # Straight line.
        self._refused += refused
        self.front = kept
        return bool(refused)

    # ------------------------------------------------------------------------- answers

    async def _answer(self, request: Request) -> None:
        """Give a request what it asks for, or the records that came before it and are not written."""
        error: BaseException | None = self._trouble(request)
        if error is None and request.closes:
            self._ended = True
            if any(not isinstance(item, Request) for item in list(self._inbox)):
                # A save that had begun before the close; it goes in too.
                self._ended = False
                self._questions.add(request)
                self._inbox.append(request)
                self._asked = None
                return
            request.result = self.storage
        elif error is None:
            assert self.storage is not None
            try:
                request.result = await self.storage.load(request.query)
            except asyncio.CancelledError as cancelled:
                if _is_cancelled():
                    raise
                error = cancelled
            except Exception as failure:
                error = failure
        self._asked = None
        request.wake(error)

    def _trouble(self, request: Request) -> RecorderError | None:
        if not (self.front or self._refused or self._missing):
            return None
        refused = tuple(record for record, _ in self._refused)
        cause = self._failure or self._missing or (self._refused[0][1] if self._refused else None)
        unsaved = (*refused, *self.front)
        if self._missing is not None:
            what = "the recorder's storage did not appear"
        elif self.front:
            what = f"the storage refused {len(self.front):,} records {len(self._retry.delays) + 1} times"
        else:
            what = f"the storage cannot write {len(refused):,} records"
        told = "`unsaved` has them"
        if self.front and not request.closes:
            told += "; they are tried again with the next call"
        error = RecorderError(f"{what}: {cause!r}; {told}", unsaved=unsaved, storage=self.storage)
        error.__cause__ = cause
        if not request.given_up:  # else nobody would hear of them
            self._refused = []
            self._lost = self._lost or request.closes
        return error

    def _give_up_questions(self) -> None:
        """Tell all who wait, as the loop ends."""
        asked, self._asked = self._asked, None
        for request in [*([] if asked is None else [asked]), *list(self._questions)]:
            request.wake(
                RecorderError(
                    "the recorder's event loop ended before it came to this call; call again from another",
                    unsaved=tuple(self._records()),
                    storage=self.storage if request.closes else None,
                )
            )


def _is_cancelled() -> bool:
    """Whether it is this task that is being cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


