"""Every error fbcache raises, grouped by whose fault it is.

Guarantee: each one derives from :class:`FBCacheError` and from the builtin that a
caller without fbcache in mind would catch (``KeyError``, ``TypeError``, ``OSError``, ...),
and its message says what to do next. An unknown name or key is a plain ``KeyError``.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable
from uuid import UUID


class FBCacheError(Exception):
    """Base of every error of fbcache's own."""


class FBCacheWarning(UserWarning):
    """Something that lost nothing, but that its reader should know."""


# --------------------------------------------------------------------------- the caller's


class StaleKeyError(FBCacheError, KeyError):
    """The key named a version of the content that a mutation has replaced.

    Look the entry up by its name, or ask its handle for the current ``key``.
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DeadlockError(FBCacheError, RuntimeError):
    """Waiting for this guard could never end: its owner already holds the entry."""


class PoolClosedError(FBCacheError, RuntimeError):
    """The pool was closed; its values are gone."""


class ForkedPoolError(FBCacheError, RuntimeError):
    """The pool belongs to the parent process; make a new one in the child."""


class DirectoryInUseError(FBCacheError, RuntimeError):
    """Another process writes to the tracked directory; or, with ``wait=False``, another save does.

    Attributes
    ----------
    path : str
        The directory.
    host, pid
        Who holds it, where that is known.
    """

    def __init__(self, message: str, *, path: str = "", host: str = "", pid: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.host = host
        self.pid = pid


class ReadOnlyError(FBCacheError, PermissionError):
    """The tracked directory was opened with ``readonly=True``; nothing was changed."""


class MutatedError(FBCacheError, RuntimeError):
    """A value was changed outside of a write guard: only pools with ``debug=True`` find out.

    The value is as the change has left it.

    Attributes
    ----------
    name : hashable
        The entry's name; None if it has none.
    """

    def __init__(self, message: str, *, name: Hashable = None) -> None:
        super().__init__(message)
        self.name = name


class MissingLibraryError(FBCacheError, ImportError):
    """A library that is optional is not installed; the message names the extra. Nothing was made."""


class NameTakenError(FBCacheError, ValueError):
    """A name that was to be given is taken; nothing was changed. ``replace=True`` takes it over."""


class CheckpointNotFoundError(FBCacheError, KeyError):
    """There is no such checkpoint: no such version or tag, or none at all in the directory."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedTypeError(FBCacheError, TypeError):
    """No codec can encode part of the value.

    Attributes
    ----------
    path : str
        Where the offending part is, e.g. ``value['a'][3].x``.
    """

    def __init__(self, message: str, path: str = "value") -> None:
        super().__init__(message)
        self.path = path


class PickleRefusedError(FBCacheError, TypeError):
    """The value needs pickle, which is not allowed here.

    Attributes
    ----------
    path : str
        Where in the value the part is that needs pickle.
    """

    def __init__(self, message: str, path: str = "value") -> None:
        super().__init__(message)
        self.path = path


# -------------------------------------------------------------------------- the storage's


class StorageError(FBCacheError, OSError):
    """A file could not be written, read or removed. The value is still in memory.

    Attributes
    ----------
    path : str
        The file or directory in question.
    needed, free : int or None
        Bytes that the write needed and that were free, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str = "",
        needed: int | None = None,
        free: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.needed = needed
        self.free = free
        self.errno = errno


class DiskFullError(StorageError):
    """There is no room for the blob: the disk, ``min_free`` or ``max_disk`` forbids it.

    Free some space or raise the limit; the pool goes on by itself.
    """

    def __init__(self, message: str, *, path: str = "", needed: int, free: int) -> None:
        super().__init__(message, path=path, needed=needed, free=free, errno=errno.ENOSPC)


class PutTimeoutError(FBCacheError, TimeoutError):
    """No room came free within ``put_timeout``. Nothing was stored, nothing was lost."""


# ----------------------------------------------------------------------------- the data's


class CorruptBlobError(FBCacheError):
    """A blob on disk is not what was written. Other entries are not affected.

    Attributes
    ----------
    key : UUID or None
        The blob's key.
    path : str
        Its file.
    reason : str
        What did not match.
    """

    def __init__(self, reason: str, *, key: UUID | None = None, path: str = "") -> None:
        super().__init__(f"blob {key} in {path or 'memory'} is damaged: {reason}")
        self.key = key
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_corrupt, (self.reason, self.key, self.path)


def _rebuild_corrupt(reason: str, key: UUID | None, path: str) -> CorruptBlobError:
    return CorruptBlobError(reason, key=key, path=path)


class CorruptCheckpointError(FBCacheError):
    """A checkpoint's manifest is not what was written, or of a format not known here.

    Other versions, and the blobs, are not affected.

    Attributes
    ----------
    path : str
        The manifest's file.
    reason : str
        What did not match.
    """

    def __init__(self, reason: str, *, path: str = "") -> None:
        super().__init__(f"the checkpoint in {path or 'memory'} cannot be opened: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_checkpoint, (self.reason, self.path)


def _rebuild_checkpoint(reason: str, path: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(reason, path=path)


# ------------------------------------------------------------------------------- our own


class InternalError(FBCacheError, AssertionError):
    """A bug in fbcache: a state was reached that the design rules out. Please report it."""
