"""``TrackedDirectory``: a user's directory of persisted blobs and checkpoints.

Guarantee: nothing here touches a file that fbcache did not make (invariant 13), and nothing of a
directory that is opened with ``readonly=True``, but for the reader's own session in it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from uuid import UUID

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.lock import Tenure
from fbcache.checkpoint.presence import is_present, keys_present
from fbcache.checkpoint.progress import Progress, check_progress
from fbcache.checkpoint.registry import directory_at
from fbcache.checkpoint.saver import Checkpoint, Saver
from fbcache.checkpoint.scanning import Swept
from fbcache.checkpoint.verifying import VerifyReport, verify
from fbcache.checkpoint.versions import number_of
from fbcache.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FBCacheWarning,
    ReadOnlyError,
    StorageError,
)
from fbcache.store.trouble import storage_error


class TrackedDirectory:
    """A directory of persisted values, and which keys are present in it.

    One process at a time writes to it; any number read beside it. Objects for one directory in one
    process share its lock and its keys. A context manager; otherwise call :meth:`close`.

    Parameters
    ----------
    path : path
        The directory; made if it is missing, unless ``readonly``.
    ignored : iterable of str
        Names of files of your own in it, which :meth:`verify` does not report as foreign.
    readonly : bool
        Read only: no lock is taken, and nothing is swept.

    Raises
    ------
    DirectoryInUseError
        Another process writes to it; the message names its host and process.
    StorageError
        It is a file, cannot be made, read or written to. Nothing has changed.

    Notes
    -----
    Opening it for writing removes what a crash has left of fbcache's own: files on their way in, and blobs
    that no checkpoint, reader or :meth:`FBPool.persist <fbcache.FBPool.persist>` refers to. Other files are
    never touched.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, ignored: Iterable[str] = (), readonly: bool = False
    ) -> None:
        self._open = False
        if isinstance(ignored, str):
            raise TypeError("ignored is a list of names, not one name")
        self._ignored = frozenset(ignored)
        self._readonly = readonly
        self._directory = directory_at(path)
        self._begin()

    @classmethod
    def _over(cls, directory: Directory, *, readonly: bool = False) -> TrackedDirectory:
        """Return one over a :class:`Directory` of one's own."""
        self = cls.__new__(cls)
        self._open = False
        self._ignored = frozenset()
        self._readonly = readonly
        self._directory = directory
        self._begin()
        return self

    def _begin(self) -> None:
        self._tenancy = self._directory.tenancies.new()  # ends with this object, if it is not closed
        if self._readonly:
            try:
                self._directory.disk.listdir(self._directory.root)
            except OSError as error:
                raise storage_error("open", self._directory.root, error, self._directory.disk) from error
        else:
            self._directory.tenancies.begin(self._tenancy, Tenure.OBJECT)
        self._open = True

    def __repr__(self) -> str:
        state = "closed" if not self._open else "read-only" if self._readonly else "open"
        return f"<TrackedDirectory {self._directory.root!r}, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError("a tracked directory cannot be pickled; open it in each process")

    # ------------------------------------------------------------------------------ keys

    @property
    def path(self) -> str:
        """The directory's real path."""
        return self._directory.root

    @property
    def readonly(self) -> bool:
        """Whether it was opened for reading only."""
        return self._readonly

    def keys(self) -> list[UUID]:
        """Return the keys present: held in memory by the writer, looked up anew by a reader.

        They are those of contents: of blobs with files of their own, and of small ones that checkpoints
        have packed together.
        """
        directory = self._checked()
        if not self._readonly:
            return directory.keys()
        try:
            return keys_present(directory)
        except OSError as error:
            raise storage_error("read", directory.root, error, directory.disk) from error

    def __contains__(self, key: object) -> bool:
        """Whether content is present under ``key``: with a file of its own, or packed."""
        directory = self._checked()
        if not isinstance(key, UUID):
            return False
        return is_present(directory, key) if self._readonly else directory.has(key)

    def __len__(self) -> int:
        """Return the number of keys present."""
        return len(self.keys())

    def __iter__(self) -> Iterator[UUID]:
        """Go through the keys there are now."""
        return iter(self.keys())

    def delete(self, key: UUID) -> bool:
        """Take back what ``persist`` has asked for; the blob goes unless a checkpoint needs it.

        Returns
        -------
        bool
            Whether the content is gone. What a checkpoint has packed stays as long as that.

        Raises
        ------
        KeyError
            It is not present.
        ReadOnlyError
            The directory was opened for reading only.
        StorageError
            A file could not be removed; the key may be deleted again.
        """
        return self._writable().delete(key)

    def sync(self) -> None:
        """Make all that is present durable: after this it survives a power loss.

        Raises
        ------
        StorageError
            Something could not be made durable. It is copied into a new file before that is tried
            again, by the next ``sync`` or ``save``.
        """
        self._writable().sync()

    def verify(self, *, progress: Progress = False) -> VerifyReport:
        """Hold every blob against its checksums, with all cores; see :class:`VerifyReport`.

        Nothing is changed, and no code from the files runs.
        """
        check_progress(progress)
        return verify(self._checked(), self._ignored, progress)

    def gc(self) -> Swept:
        """Remove what nothing refers to; tell what went, what opening the directory removed included.

        Raises
        ------
        ReadOnlyError
            The directory was opened for reading only.
        StorageError
            It could not be looked through.
        """
        directory = self._writable()
        with directory.turn():
            return directory.sweep_again()

    # ----------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints there are, oldest first.

        Warns
        -----
        FBCacheWarning
            A manifest cannot be read; it is left out.
        """
        directory = self._checked()
        found = []
        for version in directory.versions.numbers():
            try:
                found.append(Checkpoint.of(directory.versions.read(version), directory.root))
            except CheckpointNotFoundError:  # forgotten meanwhile
                pass
            except CorruptCheckpointError as error:
                warnings.warn(str(error), FBCacheWarning, stacklevel=2)
        return found

    def forget(self, version_or_tag: int | str) -> int:
        """Remove a checkpoint, and the blobs that nothing else needs.

        Returns
        -------
        int
            How many blobs went.

        Raises
        ------
        CheckpointNotFoundError
            There is no such version or tag.
        ReadOnlyError
            The directory was opened for reading only.
        StorageError
            Something could not be removed.
        """
        directory = self._writable()
        with directory.turn():
            if isinstance(version_or_tag, str):
                version = directory.versions.choose(None, version_or_tag, None)
            else:
                version = directory.versions.choose(number_of(version_or_tag), None, None)
            return directory.withdraw([version])

    @contextmanager
    def saving(self, *, wait: bool = True, allow_pickle: bool = False) -> Iterator[Saver]:
        """Make a checkpoint of entries of one or several pools.

        ``with tracked.saving() as saver: saver.persist(fb, "a"); saver.commit()``. Without ``commit``
        the former checkpoint stands, and what was brought in is taken back.

        Parameters
        ----------
        wait : bool
            Wait for another save to this directory, or raise.
        allow_pickle : bool
            Save entries that need pickle too.

        Raises
        ------
        DirectoryInUseError
            Another save is under way, and ``wait`` is false.
        DeadlockError
            It is this thread's own.
        ReadOnlyError
            The directory was opened for reading only.
        """
        directory = self._writable()
        with saving(directory, wait=wait, allow_pickle=allow_pickle) as saver:
            yield saver

    # ------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Let others write. May be called again. Entries that pools have from it stay usable."""
        if self._open:
            self._open = False
            if not self._readonly:
                self._directory.tenancies.end(self._tenancy)

    def __enter__(self) -> TrackedDirectory:
        """Return the directory."""
        self._checked()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _checked(self) -> Directory:
        if not self._open:
            raise StorageError(f"{self!r} is closed; open it anew", path=self._directory.root)
        return self._directory

    def _writable(self) -> Directory:
        directory = self._checked()
        if self._readonly:
            raise ReadOnlyError(f"{directory.root} was opened with readonly=True; open it without, to write")
        return directory


@contextmanager
def saving(directory: Directory, *, wait: bool, allow_pickle: bool) -> Iterator[Saver]:
    """Have a saver to oneself, and the lock for as long as it lives."""
    with directory.turn(wait=wait), directory.tenancies.writing(wait=wait):
        saver = Saver(directory, allow_pickle)
        try:
            yield saver
        finally:
            saver.close()


def directory_of(tracked_or_path: TrackedDirectory | str | os.PathLike[str], *, write: bool) -> Directory:
    """Return the directory that a caller means by a path or an object."""
    if not isinstance(tracked_or_path, TrackedDirectory):
        return directory_at(tracked_or_path)
    return tracked_or_path._writable() if write else tracked_or_path._checked()
