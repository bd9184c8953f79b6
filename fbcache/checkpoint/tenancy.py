"""How this process is the writer of a tracked directory: for one call, or for as long as objects are open.

Guarantees
----------
- The lock file is held exactly while somebody in this process writes, and one tenancy serves all of them.
- A tenancy that an interrupt kept from being ended ends when its object is collected; finalizers only append
  to a queue (invariant 7), which the next call here looks at.

``_lock`` is held while the lock file is taken and given back, and while ``enter`` looks the directory
through: it is what excludes, as the lock file is.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fbcache.checkpoint.lock import Record, Tenure, WriterLock
from fbcache.checkpoint.places import Places
from fbcache.errors import FBCacheWarning, StorageError
from fbcache.store.disk import Disk
from fbcache.store.trouble import storage_error


class Tenancy:
    """One writer's share of the tenancy; ended by :meth:`Tenancies.end`, or when it is collected."""

    __slots__ = ("_ended", "open")

    def __init__(self, ended: deque[None]) -> None:
        self._ended = ended
        self.open = False

    def __del__(self) -> None:
        if self.open:
            self._ended.append(None)


class Tenancies:
    """All writers of one directory in this process.

    Parameters
    ----------
    prepare : callable
        Makes what the lock file lies in.
    enter : callable
        Called with the former holder's record, and whether nobody has written since this process did.

    Attributes
    ----------
    last_version : int
        The highest version ever given, as far as known.
    """

    def __init__(
        self, disk: Disk, places: Places, prepare: Callable[[], None], enter: Callable[[bool], None]
    ) -> None:
        self.last_version = 0
        self._disk = disk
        self._places = places
        self._prepare = prepare
        self._enter = enter
        self._lock = threading.Lock()
        self._ended: deque[None] = deque()  # appended to by finalizers
        self._count = 0
        self._writer: WriterLock | None = None
        self._stamp = ""

    @property
    def any(self) -> bool:
        """Whether there is a writer in this process."""
        return self._count > 0

    def new(self) -> Tenancy:
        """Return a tenancy that has not begun."""
        return Tenancy(self._ended)

    def begin(self, tenancy: Tenancy, tenure: Tenure, *, wait: bool = False) -> None:
        """Become the writer, or one more of this process.

        Raises
        ------
        DirectoryInUseError
            Another process is.
        StorageError
            The directory cannot be made, locked or read; nothing has changed.
        """
        with self._lock:
            self._settle()
            if self._writer is not None:
                if tenure is Tenure.OBJECT:
                    self._writer.stay()
                # Straight line.
                self._count += 1
                tenancy.open = True
                return
            self._prepare()
            places = self._places
            writer = WriterLock.acquire(places.lock, places.root, tenure, wait=wait, disk=self._disk)
            try:
                self._look_through(writer.former)
                stamp = writer.stamp
            except BaseException as error:
                self._stamp = ""
                writer.release(self.last_version)
                if isinstance(error, OSError) and not isinstance(error, StorageError):
                    raise storage_error("open", places.root, error, self._disk) from error
                raise
            # Straight line.
            self._writer = writer
            self._stamp = stamp
            self._count = 1
            tenancy.open = True

    def _look_through(self, former: Record | None) -> None:
        if former is not None:
            self.last_version = max(self.last_version, former.last_version)
        self._enter(former is not None and former.stamp == self._stamp)

    def end(self, tenancy: Tenancy) -> None:
        """Be the writer no more; with the last one of this process others may write. May be repeated."""
        with self._lock:
            if tenancy.open:
                # Straight line.
                tenancy.open = False
                self._count -= 1
            self._settle()

    def _settle(self) -> None:
        while self._ended:
            # Straight line but for the last step, which does no harm if it is lost with the process.
            self._count -= 1
            del self._ended[0]
        writer = self._writer
        if self._count > 0 or writer is None:
            return
        try:
            writer.release(self.last_version)
        except StorageError as error:  # the lock is free all the same
            warnings.warn(str(error), FBCacheWarning, stacklevel=4)
        self._writer = None

    @contextmanager
    def writing(self, *, wait: bool = False) -> Iterator[None]:
        """Be the writer for the length of the block."""
        tenancy = self.new()
        try:
            self.begin(tenancy, Tenure.CALL, wait=wait)
            yield
        finally:
            self.end(tenancy)

    def check(self) -> None:
        """Make sure that nobody else can be writing, as they can when the lock's file was removed.

        Raises
        ------
        StorageError
            They can.
        """
        path, root = self._places.lock, self._places.root
        try:
            held = self._writer is not None and self._writer.still_there()
        except OSError as error:
            raise storage_error("look at", path, error, self._disk) from error
        if not held:
            raise StorageError(
                f"the lock of {root} was removed while it was held, so that another process may be "
                "writing; nothing was committed. Close the directory and open it anew.",
                path=path,
            )

    def abandon_in_child(self) -> None:
        """Let go of the parent's lock, in a forked child."""
        if self._writer is not None:
            self._writer.abandon_in_child()
