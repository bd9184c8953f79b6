"""Files of a tracked directory that pools of this process use, or copy from, and what keeps them there.

Guarantees
----------
- What was borrowed stays readable until it is given back, whoever writes to the directory meanwhile. A
  single file gets a hard link in this process's reader session (``.fbcache/readers/session-...``). Of a
  whole checkpoint only the manifest is linked there, whatever its size: a writer takes no file away
  that a manifest in a living reader's session needs. Within this process, where the writer
  knows better, it asks :meth:`Loans.keys`. Packs are lent for as long as is copied from them.
- The order makes that safe: a reader links the manifest before it reads it; a writer unlinks the manifest
  before it looks for readers. If the link came too late it fails, and the reader chooses again.
- The session is made with the first loan and ends with the last.
- Where links cannot be made, on a read-only file system or without the right to write, blobs are
  lent without protection; nobody who can write there is expected to clean up.

``_lock`` guards every field. It is held while links are made and removed, which is what it is there for;
nobody takes another lock under it.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock
from uuid import UUID
from weakref import WeakSet

from fbcache.checkpoint.places import Places, manifest_name
from fbcache.errors import FBCacheWarning, StorageError
from fbcache.store.disk import Disk
from fbcache.store.session import Session

_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTSUP})


@dataclass(eq=False, slots=True, weakref_slot=True)
class Reading:
    """Files of a held checkpoint that are read from, until this is ``over`` or collected."""

    files: frozenset[UUID]
    over: bool = False


class Loans:
    """All that this process has borrowed from one tracked directory."""

    def __init__(self, disk: Disk, places: Places) -> None:
        self._disk = disk
        self._places = places
        self._lock = Lock()
        self._session: Session | None = None
        self._versions: Counter[int] = Counter()  # loans under each linked manifest, and those being read
        self._links: Counter[UUID] = Counter()  # loans of each blob lent by itself
        self._unlinked: set[UUID] = set()  # of those, the ones that could not be linked
        self._keys: Counter[UUID] = Counter()  # loans of blobs that have no link of their own
        self._readings: WeakSet[Reading] = WeakSet()

    def keys(self) -> set[UUID]:
        """Return the keys of the files that are used where they lie in the directory."""
        with self._lock:
            read = [reading.files for reading in self._readings if not reading.over]
            return (self._keys.keys() | self._unlinked).union(*read)

    @property
    def session_path(self) -> str | None:
        """This process's reader session, while there is one."""
        with self._lock:
            return None if self._session is None else self._session.path

    # ----------------------------------------------------------------------- checkpoints

    def hold_version(self, version: int) -> str | None:
        """Link the manifest of ``version``, and return the directory of the link; None if none can be made.

        Must be followed by :meth:`let_go_of_version`.

        Raises
        ------
        FileNotFoundError
            There is no such version any more.
        """
        with self._lock:
            self._versions[version] += 1
            try:
                return self._link_manifest(version)
            except BaseException:
                self._drop_version(version, 1)
                raise

    def _link_manifest(self, version: int) -> str | None:
        session = self._opened()
        if session is None:
            return None
        link = f"{session.path}/{manifest_name(version)}"
        try:
            self._disk.link(self._places.manifest(version), link)
        except FileExistsError:  # held for another restore
            pass
        except FileNotFoundError:
            raise
        except OSError as error:
            self._warn(error)
            return None
        return session.path

    def borrow_all(self, version: int, keys: Iterable[UUID]) -> None:
        """Count one loan of each of ``keys``, all of which the held ``version`` names."""
        with self._lock:
            before = self._keys.total()
            self._keys.update(keys)
            self._versions[version] += self._keys.total() - before

    def read_from(self, reading: Reading) -> None:
        """Keep the files of ``reading``, all of which a held version needs."""
        with self._lock:
            self._readings.add(reading)

    def let_go_of_version(self, version: int) -> None:
        """End what :meth:`hold_version` began; loans go on."""
        with self._lock:
            self._drop_version(version, 1)

    def give_back(self, version: int, key: UUID) -> None:
        """End one loan of :meth:`borrow_all`."""
        with self._lock:
            self._keys[key] -= 1
            if self._keys[key] <= 0:
                del self._keys[key]
            self._drop_version(version, 1)

    def _drop_version(self, version: int, count: int) -> None:
        self._versions[version] -= count
        if self._versions[version] <= 0:
            del self._versions[version]
            if self._session is not None:
                self._unlink(f"{self._session.path}/{manifest_name(version)}")
        self._close_if_idle()

    # ------------------------------------------------------------------------- one blob

    def borrow(self, key: UUID) -> str:
        """Return the path of a link to the blob of ``key``, or of the blob itself if none can be made.

        Raises
        ------
        FileNotFoundError
            There is no such blob.
        """
        blob = self._places.blob(key)
        self._disk.lstat(blob)  # before anything is made for its sake
        with self._lock:
            self._links[key] += 1
            try:
                return self._link_blob(key, blob)
            except BaseException:
                self._drop_link(key)
                raise

    def _link_blob(self, key: UUID, blob: str) -> str:
        session = self._opened()
        if session is not None:
            shard = f"{session.path}/{key.hex[:2]}"
            try:
                try:
                    self._disk.link(blob, f"{shard}/{key.hex}")
                except FileNotFoundError:
                    self._disk.makedirs(shard)
                    self._disk.link(blob, f"{shard}/{key.hex}")
            except FileExistsError:  # lent already
                return f"{shard}/{key.hex}"
            except FileNotFoundError:
                raise
            except OSError as error:  # its links may be at their limit
                self._warn(error)
            else:
                return f"{shard}/{key.hex}"
        self._unlinked.add(key)
        return blob

    def give_back_blob(self, key: UUID) -> None:
        """End one loan of :meth:`borrow`."""
        with self._lock:
            self._drop_link(key)

    def _drop_link(self, key: UUID) -> None:
        self._links[key] -= 1
        if self._links[key] <= 0:
            del self._links[key]
            self._unlinked.discard(key)
            if self._session is not None:
                self._unlink(f"{self._session.path}/{key.hex[:2]}/{key.hex}")
        self._close_if_idle()

    # -------------------------------------------------------------------------- session

    def _opened(self) -> Session | None:
        if self._session is None:
            try:
                self._session = Session.open(self._places.readers, disk=self._disk, warn=False)
            except StorageError as error:
                self._warn(error)
        return self._session

    def _close_if_idle(self) -> None:
        session = self._session
        if session is None or self._versions or self._links:
            return
        self._session = None
        try:
            session.close()
        except StorageError as error:
            warnings.warn(f"a reader's session remains: {error}", FBCacheWarning, stacklevel=5)

    def abandon_in_child(self) -> None:
        """Let go of the parent's session, in a forked child."""
        session, self._session = self._session, None
        self._lock = Lock()
        if session is not None:
            session.abandon_in_child()

    def _unlink(self, path: str) -> None:
        try:
            self._disk.unlink(path)
        except OSError:  # the session's end, or the next writer, removes it
            pass

    def _warn(self, error: OSError) -> None:
        if error.errno not in _FORBIDDEN:
            warnings.warn(
                f"{self._places.root} is read without protection from a writer that cleans up: {error}",
                FBCacheWarning,
                stacklevel=6,
            )


class CheckpointLoan:
    """A blob used where it lies, kept there by the manifest of its checkpoint."""

    __slots__ = ("_key", "_loans", "_open", "_version", "digest", "nbytes")

    def __init__(self, loans: Loans, version: int, key: UUID, digest: int, nbytes: int) -> None:
        self._loans = loans
        self._version = version
        self._key = key
        self._open = True
        self.digest: int | None = digest
        self.nbytes = nbytes

    @property
    def path(self) -> str:
        """The file."""
        return self._loans._places.blob(self._key)

    def release(self) -> None:
        """Give it back. A second call does nothing."""
        if self._open:
            self._open = False
            self._loans.give_back(self._version, self._key)


class LinkedLoan:
    """A blob with a link of its own in this process's reader session."""

    __slots__ = ("_key", "_loans", "_open", "digest", "nbytes", "path")

    def __init__(self, loans: Loans, key: UUID, path: str, digest: int | None, nbytes: int) -> None:
        self._loans = loans
        self._key = key
        self._open = True
        self.path = path
        self.digest = digest
        self.nbytes = nbytes

    def release(self) -> None:
        """Give it back. A second call does nothing."""
        if self._open:
            self._open = False
            self._loans.give_back_blob(self._key)


def reader_directories(disk: Disk, places: Places) -> list[str]:
    """Return the sessions of readers, living or not."""
    try:
        names = disk.listdir(places.readers)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [os.path.join(places.readers, name) for name in names if name.startswith("session-")]
