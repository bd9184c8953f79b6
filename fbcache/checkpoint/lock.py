"""One writer at a time in a tracked directory, and who it is.

``DIR/.fbcache/lock`` is locked (flock) for as long as somebody writes to DIR. Its first 512 bytes are the
holder's record: JSON, filled up with spaces. Whoever acquires the lock gives the record a new stamp, the
directory's generation; whoever finds there the stamp of his own last tenure knows that nobody else has
written since.

Guarantees:

- Two processes on file systems with flock are never both between :meth:`WriterLock.acquire` and
  :meth:`WriterLock.release`, unless the lock file is taken away beneath the first.
- The kernel frees the lock when its holder dies, however it dies. No record, true or not, keeps
  anybody out: the lock alone does.
- What :meth:`WriterLock.acquire` raises, a KeyboardInterrupt included, leaves no descriptor open and
  no lock held. Two places are beyond help: the return of ``os.open`` and the entry of the seam's ``close``.
- A record is read as what it is or as None; no content of the file raises anything.

What can happen at the same time, and what comes of it:

- The holder has locked but not yet written its record, or has written it as free but not yet closed: the
  record is free, or a dead process's. It is looked at a few times before "another process" is reported.
  And nobody is named on one look: it may be a living process's that could not write "free" once.
- The holder forked: the child's descriptor is the same lock, and keeps it when the holder ends or releases
  it. A child calls :meth:`WriterLock.abandon_in_child`; where it did not, it is "another process".
- The lock file goes. fbcache never unlinks it, for two could lock two files then; a user who removes
  ``.fbcache`` does. After locking, the file must still be the one at the path, else it is opened
  anew. Who holds the lock meanwhile learns it from :meth:`WriterLock.still_there` alone.
- The record is torn: it is one write of 512 bytes at offset 0, which file systems do not tear in practice;
  a mixture is no record, or has another stamp.
- The machine stops: the record is not fsynced, and may be an older one afterwards. The processes that
  remember stamps have ended too; and ``last_version`` may be too low, so manifests are to be looked at.

A :class:`WriterLock` has no lock of its own: its caller sees to it that one thread at a time uses it, and
that a process has one for a directory. flock keeps apart two in one process also.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import uuid
from collections import deque
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from fbcache.errors import DirectoryInUseError, DiskFullError, StorageError
from fbcache.store.disk import DISK, Disk
from fbcache.store.owner import Owner
from fbcache.store.transfer import read_all

#: First field of a record; changes when its meaning does.
MAGIC = "fbcache-lock-1"

#: Bytes of a record: what it needs, with a long host name, rounded up to a disk's smallest sector.
RECORD_SIZE = 512

#: A record's tenure while nobody holds the lock.
FREE = "free"

_STAMP = re.compile(r"[0-9a-f]{32}")

#: One more than the highest version: a manifest's name has ten digits.
_VERSIONS_END = 10**10

_LOCK_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO in its place must not block

#: Seconds between two looks at a held lock: the first, doubled each time, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02

#: Looks at a holder that stays unknown. Between lock and record lie some 20 us: 15 ms are plenty where
#: nobody wants to wait, and 5 s where somebody does, for the holder may be stopped just there.
_LOOKS, _LOOKS_WAITING = 5, 250

#: Times that the file may be replaced before we say so: where inode numbers change by themselves, always.
_MOST_REPLACED = 20

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class Tenure(StrEnum):
    """How long a lock is going to be held."""

    CALL = "call"  #: for one call, such as ``pool.save(path)``
    OBJECT = "object"  #: for as long as a ``TrackedDirectory`` is open


@dataclass(frozen=True, slots=True)
class Record:
    """What the lock file says of its holder, or of the last one: an Owner's fields, and three more."""

    host: str  #: '' where it was too long
    boot_id: str
    pid: int
    started: float
    tenure: str  #: a :class:`Tenure`, or ``FREE``
    stamp: str  #: 32 hex digits, new at every acquisition: the directory's generation
    last_version: int  #: the highest checkpoint version ever given, as far as known; 0 for none

    def to_bytes(self) -> bytes:
        """Return the record as it is written, ``RECORD_SIZE`` bytes."""
        raw = json.dumps({"magic": MAGIC, **asdict(self)}).encode()
        if len(raw) > RECORD_SIZE and self.host:
            return replace(self, host="").to_bytes()
        return raw.ljust(RECORD_SIZE)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Record | None:
        """Return the record that ``raw`` is; None if it is not exactly one."""
        if len(raw) != RECORD_SIZE:
            return None
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict) or fields.pop("magic", None) != MAGIC:
            return None
        if {name: type(value).__name__ for name, value in fields.items()} != cls.__annotations__:
            return None
        record = cls(**fields)
        return record if record._is_sound() else None

    def has_ended(self) -> bool:
        """Whether it is certain, from this machine, that the process has ended."""
        return Owner(self.host, self.boot_id, self.pid, self.started).is_dead()

    def _is_sound(self) -> bool:
        return (
            self.host.isprintable()  # it goes into messages
            and self.pid > 0
            and self.tenure in (*Tenure, FREE)
            and _STAMP.fullmatch(self.stamp) is not None
            and 0 <= self.last_version < _VERSIONS_END
        )


def read_record(path: str, disk: Disk = DISK) -> Record | None:
    """Return what the lock file at ``path`` says, without locking it.

    None if there is no file or no record in it, or if this user may not read it. Nothing is raised.
    """
    try:
        fd = disk.open(path, _READ_ONLY)
        try:
            return _read(fd, disk)
        finally:
            disk.close(fd)
    except OSError:
        return None


class WriterLock:
    """The right to write to a tracked directory, held until :meth:`release`.

    Made by :meth:`acquire`.

    Attributes
    ----------
    former : Record or None
        What the record said before; None if there was none, or a damaged one.
    """

    __slots__ = ("_directory", "_disk", "_fd", "_path", "_pid", "_record", "former")

    def __init__(self, path: str, directory: str, tenure: Tenure, disk: Disk) -> None:
        me = Owner.current()
        self._path = path
        self._directory = directory
        self._disk = disk
        self._fd: int | None = None
        self._pid = me.pid
        self._record = Record(me.host, me.boot_id, me.pid, me.started, tenure.value, uuid.uuid4().hex, 0)
        self.former: Record | None = None

    @classmethod
    def acquire(
        cls, path: str, directory: str, tenure: Tenure, *, wait: bool, disk: Disk = DISK
    ) -> WriterLock:
        """Become the one writer to ``directory``.

        Parameters
        ----------
        path, directory : str
            The lock file, made if it is missing, in a directory that is there; and, for messages, DIR.
        tenure : Tenure
            How long the lock is going to be held; others read it.
        wait : bool
            Wait for a holder whose tenure is a call. Any other is not waited for: it may stay for days.
        disk : Disk
            The system calls.

        Raises
        ------
        DirectoryInUseError
            Another process holds the lock.
        StorageError
            The lock file cannot be opened, locked, read or written; ``DiskFullError`` if there is no room.
            Whatever is raised, the lock is not held.
        """
        _close_lost()
        lock = cls(path, directory, tenure, disk)
        try:
            try:
                lock._take(_Contest(path, directory, wait))
                lock._sign()
            except BaseException:
                fd, lock._fd = lock._fd, None
                if fd is not None:  # no call of our own on the way, at whose entry an interrupt could come
                    disk.close(fd)
                raise
        except OSError as error:
            raise lock._explained("lock", error) from error
        return lock

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:  # an interrupt has lost this object; the next acquisition closes its file
            _lost.append((self._disk, fd, self._pid))

    @property
    def stamp(self) -> str:
        """The stamp of this tenure."""
        return self._record.stamp

    def still_there(self) -> bool:
        """Whether the lock is held, and its file is still the one that others would lock.

        Raises
        ------
        OSError
            The file cannot be looked at.
        """
        try:
            there = self._disk.lstat(self._path)
        except FileNotFoundError:
            return False
        return self._fd is not None and os.path.samestat(there, self._disk.fstat(self._fd))

    def stay(self) -> None:
        """Tell others that the lock is no longer held for one call only.

        Raises
        ------
        StorageError
            The record could not be written; others wait for this process in vain.
        """
        assert self._fd is not None
        record = replace(self._record, tenure=Tenure.OBJECT.value)
        try:
            _write(self._fd, record, self._disk)
        except OSError as error:
            raise self._explained("write to", error) from error
        self._record = record

    def release(self, last_version: int) -> None:
        """Let others write, and tell them that versions up to ``last_version`` were given.

        May be called twice. In a forked child it only closes the child's descriptor.

        Raises
        ------
        StorageError
            The record could not be written, and names this process still. The lock is free all the same.
        """
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            try:
                if os.getpid() == self._pid:
                    last_version = max(last_version, self._record.last_version)
                    _write(fd, replace(self._record, tenure=FREE, last_version=last_version), self._disk)
            finally:
                self._disk.close(fd)
        except OSError as error:
            raise self._explained("write to", error) from error

    def abandon_in_child(self) -> None:
        """Let go of the parent's lock; to be called in a forked child, by ``os.register_at_fork``.

        The child's copy of the descriptor is closed, so that the lock ends with the parent and not with the
        last of its children. It is not unlocked, for the lock is the parent's too.
        """
        fd, self._fd = self._fd, None
        if fd is not None:
            self._disk.close(fd)

    def _take(self, contest: _Contest) -> None:
        """Lock the file that is at the path."""
        while True:
            # Kept here from the start: whatever is raised from now on, there is one who closes it.
            self._fd = fd = self._disk.open(self._path, _LOCK_FILE)
            while not self._disk.lock(fd):
                contest.lost_to(_read(fd, self._disk))
            if self.still_there():
                return
            contest.replaced()
            self._fd = None
            self._disk.close(fd)

    def _sign(self) -> None:
        """Learn what the record said, and write this tenure's."""
        assert self._fd is not None
        self.former = _read(self._fd, self._disk)
        if self.former is not None:
            self._record = replace(self._record, last_version=self.former.last_version)
        _write(self._fd, self._record, self._disk)

    def _explained(self, doing: str, error: OSError) -> StorageError:
        """Return the error that says what to do about ``error``."""
        what = f"cannot {doing} {self._path}: {error.strerror or error}"
        if error.errno in _FULL:
            free = self._free_bytes()
            message = f"{what} ({RECORD_SIZE} bytes are needed, {free:,} free). Free some space, then go on."
            return DiskFullError(message, path=self._path, needed=RECORD_SIZE, free=free)
        if error.errno in _NO_LOCKS:
            todo = "Its file system gives no locks (flock): keep the tracked directory on one that does"
        elif error.errno in _FORBIDDEN:
            todo = "See that you may write there; to read only, open the directory with readonly=True"
        else:
            todo = f"See that {self._directory} is there and that nothing else lies in the file's place"
        return StorageError(f"{what}. {todo}.", path=self._path, errno=error.errno)

    def _free_bytes(self) -> int:
        try:
            return self._disk.free_bytes(self._directory)
        except OSError:  # what is reported is the failure before
            return 0


# ------------------------------------------------------------------ the others


class _Contest:
    """One acquisition's encounters with others: whether to go on, and when to say who is in the way."""

    __slots__ = ("_directory", "_former_stamp", "_path", "_pause", "_replaced", "_unknown", "_wait")

    def __init__(self, path: str, directory: str, wait: bool) -> None:
        self._path, self._directory, self._wait = path, directory, wait
        self._former_stamp = ""
        self._unknown = self._replaced = 0
        self._pause = _FIRST_PAUSE

    def lost_to(self, record: Record | None) -> None:
        """Another holds the lock, and this is what the record says. Pause, or raise."""
        if record is None or record.tenure == FREE or record.has_ended():
            self._unknown += 1
            if self._unknown == (_LOOKS_WAITING if self._wait else _LOOKS):
                raise self._held_by_another(record)
        else:
            self._unknown = 0
            again, self._former_stamp = record.stamp == self._former_stamp, record.stamp
            if again and not (self._wait and record.tenure == Tenure.CALL):
                raise self._held_by(record)
        _sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def replaced(self) -> None:
        """The file that was locked is no longer the one at the path."""
        self._replaced += 1
        if self._replaced == _MOST_REPLACED:
            raise OSError(errno.ESTALE, "another file takes its place again and again")

    def _held_by(self, holder: Record) -> DirectoryInUseError:
        host = holder.host or "an unnamed host"
        if holder.tenure == Tenure.CALL:
            doing, todo = "is saving to", "Try again when it is done, or wait for it with wait=True"
        else:
            doing, todo = "has open for writing", "Close its TrackedDirectory, or end that process"
        return DirectoryInUseError(
            f"process {holder.pid} on {host} {doing} the tracked directory {self._directory}."
            f" {todo}; to read meanwhile, open the directory with readonly=True.",
            path=self._directory,
            host=holder.host,
            pid=holder.pid,
        )

    def _held_by_another(self, record: Record | None) -> DirectoryInUseError:
        message = (
            f"another process has locked the tracked directory {self._directory}. See who has its lock"
            f" open (fuser {self._path}) and end that, or try again later; to read meanwhile, open the"
            " directory with readonly=True."
        )
        if record is not None and record.tenure != FREE:
            message += f" Process {record.pid}, which had it last, has ended, but may have left children."
        return DirectoryInUseError(message, path=self._directory)


#: Locked files whose objects were lost, and the process that opened them.
_lost: deque[tuple[Disk, int, int]] = deque()


def _close_lost() -> None:
    while _lost:
        disk, fd, pid = _lost.popleft()
        if pid == os.getpid():
            disk.close(fd)


def _sleep(seconds: float) -> None:  # the holder is another process, which wakes nobody
    time.sleep(seconds)


# ------------------------------------------------------------------ the file


def _read(fd: int, disk: Disk) -> Record | None:
    raw = bytearray(RECORD_SIZE)
    length = read_all(disk, fd, [memoryview(raw)], 0)
    return Record.from_bytes(bytes(raw[:length]))


def _write(fd: int, record: Record, disk: Disk) -> None:
    if disk.pwrite(fd, record.to_bytes(), 0) != RECORD_SIZE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # why else it would take but a part
