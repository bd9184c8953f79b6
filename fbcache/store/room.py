"""The room that a store has, and what it says when there is none.

Guarantee: nothing is begun that the limits forbid (:mod:`fbcache.store.ledger`), and every error names the
directory, the bytes, and the next step.
"""

from __future__ import annotations

import errno

from fbcache.errors import DiskFullError, StorageError
from fbcache.store.disk import Disk
from fbcache.store.ledger import Ledger

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Room:
    """A directory, its file system, and the ledger of what may be written there.

    Parameters
    ----------
    directory : str
        Where the blobs are.
    ledger : Ledger
        Shared by the stores that share limits.
    disk : Disk
        The system calls.
    """

    __slots__ = ("_directory", "_disk", "ledger")

    def __init__(self, directory: str, ledger: Ledger, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self.ledger = ledger

    @property
    def bytes_free(self) -> int:
        """Bytes that a write may still take before a limit or the disk's end is met."""
        try:
            return self.ledger.room(self._disk.free_bytes(self._directory))
        except OSError:  # no write could succeed; the next one says why
            return 0

    def reserve(self, nbytes: int, *, spare: int = 0) -> None:
        """Set ``nbytes`` aside for a write, if ``spare`` more would be left after it.

        Raises
        ------
        DiskFullError
            A limit, or the disk, is in the way.
        StorageError
            The store is closed, or its directory cannot be asked.
        """
        try:
            on_disk = self._disk.free_bytes(self._directory)
        except OSError as error:
            raise self.error("write to", self._directory, error, needed=nbytes) from error
        if self.ledger.closed:
            raise self.closed_error()
        free = self.ledger.reserve(nbytes, on_disk, spare=spare)
        if free is not None:
            raise self.full_error(nbytes, free)

    def write_error(self, error: OSError, nbytes: int) -> StorageError:
        """Return what a write of ``nbytes`` raises that came to ``error``."""
        if error.errno in _FULL:
            return self.full_error(nbytes, self.bytes_free)
        return self.error("write to", self._directory, error, needed=nbytes, free=self.bytes_free)

    def full_error(self, needed: int, free: int) -> DiskFullError:
        """Return the error for a write that there is no room for."""
        return DiskFullError(
            f"no room for a blob of {needed:,} bytes in {self._directory}: {free:,} bytes may be used"
            f" ({self.ledger.describe()}). Free some space or change the limits, and go on.",
            path=self._directory,
            needed=needed,
            free=free,
        )

    def error(
        self, doing: str, path: str, error: OSError, *, needed: int | None = None, free: int | None = None
    ) -> StorageError:
        """Return the error to raise when ``doing`` something with ``path`` came to ``error``."""
        return StorageError(
            f"cannot {doing} {path}: {error.strerror or error}."
            " See that the directory is there and that you may change it.",
            path=path,
            needed=needed,
            free=free,
            errno=error.errno,
        )

    def closed_error(self) -> StorageError:
        """Return the error for a write after ``close``."""
        return StorageError(f"the store in {self._directory} is closed", path=self._directory)
