"""The manifests of a tracked directory: found, read, published, withdrawn.

Guarantees
----------
- A manifest is visible only whole and durable (invariant 12): written under a temporary name, fsynced,
  renamed, its directory fsynced. If any of that fails it is not visible afterwards, and the next
  attempt is made with a new file.
- Reading runs no code from the file and raises CorruptCheckpointError for whatever is wrong in it.

Which version has a tag: the newest one that was given it. Others that once had it count as untagged.
"""

from __future__ import annotations

import errno
import math
import operator
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from fbcache.checkpoint.manifest import Head, Manifest, head_size, pack, unpack, unpack_head
from fbcache.checkpoint.places import Places, manifest_name
from fbcache.checkpoint.scanning import versions_in
from fbcache.errors import CheckpointNotFoundError, CorruptCheckpointError, FBCacheWarning, StorageError
from fbcache.store.disk import Disk
from fbcache.store.transfer import read_all, write_all
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)

#: First read of a manifest: holds the head of nearly every one.
_HEAD_GUESS = 4096


class Versions:
    """The checkpoints of one tracked directory, as its files tell."""

    __slots__ = ("_disk", "_places", "in_doubt")

    def __init__(self, disk: Disk, places: Places) -> None:
        self._disk = disk
        self._places = places
        #: Versions that were taken back, but that a power loss may bring back.
        self.in_doubt: set[int] = set()

    # ---------------------------------------------------------------------------- reading

    def numbers(self) -> list[int]:
        """Return the versions there are, oldest first."""
        try:
            return versions_in(self._disk, self._places.checkpoints)
        except OSError as error:
            raise storage_error("read", self._places.checkpoints, error, self._disk) from error

    def has(self, version: int) -> bool:
        """Whether there is such a version, sound or not."""
        try:
            self._disk.lstat(self._places.manifest(version))
        except OSError:
            return False
        return True

    def read(self, version: int, directory: str | None = None) -> Manifest:
        """Return the manifest of ``version``, from a link to it in ``directory`` if that is given.

        Raises
        ------
        CheckpointNotFoundError
            There is none.
        CorruptCheckpointError
            It is damaged, or of a newer format.
        StorageError
            It could not be read.
        """
        file = path = self._places.manifest(version)
        if directory is not None:
            file = f"{directory}/{manifest_name(version)}"
            if not self.has(version):
                path = file  # errors name the manifest itself while there is one
        with self._opened(file, path, version) as fd:
            raw = self._read(fd, self._size(fd, path))
        return unpack(raw, path=path, version=version)

    def head(self, version: int) -> Head:
        """Return what the manifest of ``version`` says of itself; errors are those of :meth:`read`."""
        path = self._places.manifest(version)
        with self._opened(path, path, version) as fd:
            size = self._size(fd, path)
            raw = self._read(fd, min(size, _HEAD_GUESS))
            length = head_size(raw, path=path)
            if len(raw) < length <= size:
                raw = self._read(fd, length)
            head = unpack_head(raw, path=path)
        if head.version != version:
            raise CorruptCheckpointError(f"it is the manifest of version {head.version}", path=path)
        return head

    def choose(self, version: int | None, tag: str | None, before: float | datetime | None) -> int:
        """Return the version that is meant: by number, tag or time, else the newest.

        Raises
        ------
        CheckpointNotFoundError
            There is none like that.
        CorruptCheckpointError
            One that cannot be read may be it.
        TypeError, ValueError
            More than one way of choosing was given, or what was given is of the wrong kind.
        """
        if sum(choice is not None for choice in (version, tag, before)) > 1:
            raise ValueError("choose a checkpoint by version, by tag or by before, not by several of them")
        numbers = self.numbers()
        if version is not None:
            number = number_of(version)
            if number not in numbers:
                raise self._not_found(f"no version {number}")
            return number
        if tag is not None:
            check_tag(tag)
            return self._first(lambda head: head.tag == tag, f"none tagged {tag!r}")
        if before is not None:
            latest, what = micros_of(before), f"none from {before} or earlier"
            return self._first(lambda head: micros_of(head.created) <= latest, what)
        if not numbers:
            raise self._not_found("none at all")
        return numbers[-1]

    def _first(self, matches: Callable[[Head], bool], what: str) -> int:
        damaged: CorruptCheckpointError | None = None
        for version, head in self.heads():
            if isinstance(head, CorruptCheckpointError):
                damaged = damaged or head
            elif matches(head):
                if damaged is not None:
                    warnings.warn(f"passed over a checkpoint: {damaged}", FBCacheWarning, stacklevel=6)
                return version
        if damaged is not None:
            raise damaged
        raise self._not_found(what)

    def heads(self) -> Iterator[tuple[int, Head | CorruptCheckpointError]]:
        """Go through the versions, newest first, with what their manifests say of themselves."""
        for version in reversed(self.numbers()):
            try:
                yield version, self.head(version)
            except CorruptCheckpointError as error:
                yield version, error
            except CheckpointNotFoundError:  # forgotten meanwhile
                pass

    def _not_found(self, what: str) -> CheckpointNotFoundError | StorageError:
        try:
            if not stat.S_ISDIR(self._disk.lstat(self._places.root).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except NotADirectoryError as error:
            return storage_error("read", self._places.root, error, self._disk)
        except OSError:  # it is not there, or not to be looked at
            pass
        there = ", ".join(map(str, self.numbers()[-5:]))
        message = f"{self._places.root} has no such checkpoint: {what}"
        return CheckpointNotFoundError(f"{message}; its newest versions are {there}" if there else message)

    @contextmanager
    def _opened(self, file: str, path: str, version: int) -> Iterator[int]:
        try:
            fd = self._disk.open(file, _READ)
        except FileNotFoundError:
            raise self._not_found(f"version {version} is gone") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise CorruptCheckpointError("a link or a socket is in its place", path=path) from error
            raise storage_error("read", path, error, self._disk) from error
        try:
            yield fd
        except OSError as error:
            raise storage_error("read", path, error, self._disk) from error
        finally:
            try:
                self._disk.close(fd)
            except OSError:  # what was only read has nothing left to write
                pass

    def _size(self, fd: int, path: str) -> int:
        status = self._disk.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpointError("something else than a file is in its place", path=path)
        return status.st_size

    def _read(self, fd: int, size: int) -> memoryview:
        raw = memoryview(bytearray(size))
        return raw[: read_all(self._disk, fd, [raw], 0)].toreadonly()

    # --------------------------------------------------------------------------- changing

    def publish(self, manifest: Manifest) -> None:
        """Make ``manifest`` visible, whole and durable.

        Raises
        ------
        StorageError
            It could not be done. The manifest is not visible.
        """
        version = manifest.head.version
        temporary, final = self._places.new_manifest(version), self._places.manifest(version)
        pieces = pack(manifest)
        written = False
        try:
            self._write(temporary, pieces)
            written = True
            self._disk.rename(temporary, final)
            self.make_durable()
        except BaseException as error:
            if written:  # an interrupt may have come right after the rename
                self._discard(final)
                self._settle(version)
            self._discard(temporary)
            if isinstance(error, OSError):
                needed = sum(map(len, pieces))
                raise storage_error("write", final, error, self._disk, needed=needed) from error
            raise

    def withdraw(self, versions: list[int]) -> None:
        """Take manifests away, durably.

        Raises
        ------
        StorageError
            It could not be done; some may be gone, and may come back after a power loss.
        """
        try:
            for version in versions:
                try:
                    self._disk.unlink(self._places.manifest(version))
                except FileNotFoundError:
                    pass
                self.in_doubt.add(version)
            self.make_durable()
        except OSError as error:
            path = self._places.checkpoints
            raise storage_error("remove manifests from", path, error, self._disk) from error

    def make_durable(self) -> None:
        """Have the names of manifests on disk as they are now."""
        fd = self._disk.open(self._places.checkpoints, _DIRECTORY)
        try:
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)

    def _write(self, path: str, pieces: list[bytes]) -> None:
        try:
            fd = self._disk.open(path, _NEW)
        except FileExistsError:  # of a save that was killed
            self._disk.unlink(path)
            fd = self._disk.open(path, _NEW)
        try:
            write_all(self._disk, fd, pieces)
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)

    def _settle(self, version: int) -> None:
        """Make it durable that ``version`` is gone, or remember that it is not."""
        self.in_doubt.add(version)
        try:
            self.make_durable()
        except OSError:
            return
        self.in_doubt.discard(version)

    def _discard(self, path: str) -> None:
        try:
            self._disk.unlink(path)
        except OSError:  # the failure before is what the caller hears of; the next sweep comes by
            pass


def check_tag(tag: object) -> None:
    """Raise TypeError or ValueError unless ``tag`` can be a tag."""
    if not isinstance(tag, str):
        raise TypeError(f"a tag is a str, not {tag!r}")
    if not tag:
        raise ValueError("a tag has at least one character")


def number_of(version: object) -> int:
    """Return a version as an int.

    Raises
    ------
    TypeError
        It is none.
    """
    if isinstance(version, bool) or not hasattr(version, "__index__"):
        raise TypeError(f"a version is an int, not {version!r}; a tag goes into tag=")
    return operator.index(version)


def micros_of(moment: float | datetime) -> float:
    """Return a time as microseconds since the epoch; a datetime without a zone is local time.

    A checkpoint's ``created`` is a datetime, which knows no finer ones: so ``before=created`` finds it.
    """
    if isinstance(moment, datetime):
        return (moment.astimezone(UTC) - _EPOCH) // _MICROSECOND
    if isinstance(moment, bool) or not isinstance(moment, (int, float)):
        raise TypeError(f"a time is a datetime or seconds since the epoch, not {moment!r}")
    if math.isnan(moment):
        raise ValueError("a time is a datetime or seconds since the epoch, not nan")
    if math.isinf(moment):
        return moment
    fraction, whole = math.modf(moment)  # as datetime.fromtimestamp, so that the rounding is the same
    return int(whole) * 1_000_000 + round(fraction * 1_000_000)
