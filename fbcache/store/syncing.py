"""What has to be durable, made durable once.

Guarantees of :func:`make_durable`, for invariant 12:

- When it returns, the content of all files is durable, and then the names in all directories:
  no directory is begun before the last file is done.
- Nothing is synced again after it failed. The kernel may report a failure once and take the pages for
  clean afterwards, so that a second fsync would succeed over lost bytes.
- A failure says which files' content is in doubt; the others were synced or not begun.
- No descriptor is left.

It may be called from any thread. The jobs of one call share what failed so far, and each only
adds to it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Final

from fbcache.store.disk import Disk
from fbcache.store.mounts import file_system_of

#: A piece of work that may run beside others.
Job = Callable[[], None]

#: Runs jobs, perhaps side by side, and returns when all have ended: the outcome of each, in order.
FanOut = Callable[[Sequence[Job]], list[BaseException | None]]

#: From so many files on, one syncfs takes the place of an fsync for each. Measured on ext4: at 64 small
#: files a tenth of the time, at 64 of 1 MiB two thirds. It also writes what others left in memory,
#: so that for few files it may take much longer than they would.
SYNCFS_FROM: Final = 64

#: Where syncfs writes everything and tells of everything that was not written. A FUSE server never
#: hears of it, and overlayfs drops the errors of the file system below.
_SYNCFS_TELLS_ON: Final = frozenset({"ext4", "xfs", "btrfs"})

#: Linux before 5.8 reports no lost writes from syncfs, and before 5.17 no failure of the file system's own.
_SYNCFS_TELLS_SINCE: Final = (5, 17)

#: Jobs handed out at a time: what bounds their number, not their speed.
_BATCH: Final = 256

#: A link is not followed, and a pipe in a file's place must not hold us up. Reading is all that fsync needs.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY


class NotDurableError(OSError):
    """Something could not be made durable. For callers inside fbcache, who make a ``StorageError`` of it.

    Attributes
    ----------
    files : frozenset of str
        The files whose content is in doubt. No fsync may be tried on them again.
    directories : frozenset of str
        The directories whose names are in doubt.
    cause : OSError
        The first failure.
    """

    def __init__(self, files: Iterable[str], directories: Iterable[str], cause: OSError) -> None:
        self.files = frozenset(files)
        self.directories = frozenset(directories)
        self.cause = cause
        paths = sorted(self.files) or sorted(self.directories)
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        reason = cause.strerror or str(cause)
        super().__init__(cause.errno, f"not durable{more}: {reason}", paths[0])


def one_by_one(jobs: Sequence[Job]) -> list[BaseException | None]:
    """Run ``jobs`` here, one after the other. An interrupt ends it at once."""
    outcomes: list[BaseException | None] = []
    for job in jobs:
        try:
            job()
        except Exception as error:
            outcomes.append(error)
        else:
            outcomes.append(None)
    return outcomes


def make_durable(
    disk: Disk,
    root: str,
    files: Collection[str],
    directories: Collection[str],
    *,
    fan_out: FanOut = one_by_one,
) -> None:
    """Make the content of ``files`` durable, then the names in ``directories``.

    From :data:`SYNCFS_FROM` files on, one syncfs does both where it can be relied on.

    Parameters
    ----------
    root : str
        A directory on the file system of all of them.
    fan_out : callable
        Runs the fsyncs; how many at once is its own affair.

    Raises
    ------
    NotDurableError
        An fsync failed, or what it was for could not be opened. Those under way were finished,
        the others not begun. After a failed syncfs, everything is in doubt.

    Whatever else ends it early, such as a KeyboardInterrupt, may have swallowed a failure: then all the
    files are in doubt.
    """
    if len(files) >= SYNCFS_FROM and _syncfs_tells(root) and _sync_at_once(disk, root, files, directories):
        return
    if failed := _sync_each(files, partial(_sync_file, disk), fan_out):
        cause = next(iter(failed.values()))
        raise NotDurableError(failed, (), cause) from cause
    if failed := _sync_each(directories, partial(_sync_directory, disk), fan_out):
        cause = next(iter(failed.values()))
        raise NotDurableError((), failed, cause) from cause


# ---------------------------------------------------------------------------------- all at once


def _syncfs_tells(root: str) -> bool:
    """Whether a syncfs that returns without an error means what as many fsyncs would."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or (int(release[1]), int(release[2])) < _SYNCFS_TELLS_SINCE:
        return False
    return file_system_of(root) in _SYNCFS_TELLS_ON


def _sync_at_once(disk: Disk, root: str, files: Collection[str], directories: Collection[str]) -> bool:
    """Sync the whole file system; say False if there is no such call."""
    try:
        fd = disk.open(root, _DIRECTORY)
    except OSError as error:  # nothing was tried, so no file is in doubt
        raise NotDurableError((), (root,), error) from error
    try:
        disk.syncfs(fd)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return False
        raise NotDurableError(files, directories, error) from error
    finally:
        _close(disk, fd)
    return True


# ---------------------------------------------------------------------------------- each by itself


def _sync_each(paths: Collection[str], sync: Callable[[str], None], fan_out: FanOut) -> dict[str, OSError]:
    """Sync ``paths`` until one fails; return those that failed, in the order in which they did."""
    failed: dict[str, OSError] = {}
    once = list(dict.fromkeys(paths))
    for start in range(0, len(once), _BATCH):
        jobs = [partial(_sync_unless_failed, failed, path, sync) for path in once[start : start + _BATCH]]
        for outcome in fan_out(jobs):
            if outcome is not None:
                raise outcome
        if failed:
            break
    return failed


def _sync_unless_failed(failed: dict[str, OSError], path: str, sync: Callable[[str], None]) -> None:
    if failed:
        return
    try:
        sync(path)
    except OSError as error:
        failed[path] = error


def _sync_file(disk: Disk, path: str) -> None:
    fd = disk.open(path, _FILE)
    try:
        disk.fsync(fd)
    finally:
        _close(disk, fd)


def _sync_directory(disk: Disk, path: str) -> None:
    fd = disk.open(path, _DIRECTORY)
    try:
        disk.fsync(fd)
    except OSError as error:
        # The file system has no fsync of directories, as some shared folders of virtual machines.
        # There is nothing more to be had from it; any other answer is a failure.
        if error.errno != errno.EINVAL:
            raise
    finally:
        _close(disk, fd)


def _close(disk: Disk, fd: int) -> None:
    """Close what was only read: that has nothing left to write, and the sync has told of what it had."""
    try:
        disk.close(fd)
    except OSError:
        pass
