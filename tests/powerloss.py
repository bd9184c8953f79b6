"""Power loss, simulated: a disk that records, and the states it could be found in afterwards.

:class:`RecordingDisk` does what another disk does and keeps a log of the changes below one
directory. :func:`images` gives states in which power loss after some prefix of that log may
leave that directory, and :meth:`Image.build` makes one of them real.

The model is what POSIX leaves open, and so more than any one file system does:

- A file is an inode with content, a directory an inode with names. What is there when the
  recording begins is durable. ``fsync`` of a file makes its content and length durable, not its
  name; of a directory its names, not what they name; ``syncfs`` makes everything durable.
- Each write not yet durable is, independently, there, absent, only a longer file with zeros
  in it, cut anywhere or at a sector, or has a sector of garbage or zeros. A crash in the middle of
  a write is a cut write at the end of the log.
- Changes of names not yet durable are kept in one of three ways. ``ORDERED``: those up to a
  point in time, as a journal does. ``UNORDERED``: in each directory those up to a point of its own.
  ``WILD``: each name is in any of the states it went through. In all of them a renamed file has its
  old name, its new one or both, and a name that was replaced names the one file or the other.
- A directory is lost with all it holds where its own name is.
- A failed ``fsync`` or ``syncfs`` leaves the unsynced writes of its files in doubt for good, for
  their pages are clean now: only writing them again helps, as does another file. Changes of names are
  not lost in this way: a file system either tries them again or shuts down.

Not in the model: calls past this disk (what they made is found when a call names it, and is
taken as just made, unsynced), modes and times, symbolic links and devices (left out), and
calls that take effect and raise.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import accumulate, pairwise
from random import Random
from typing import Any

from fbcache.codec.frames import Buffer
from fbcache.store.disk import DISK, Disk

#: What a disk writes whole or not at all, at best.
_SECTOR = 512

#: Errors of fsync and syncfs that say that nothing was attempted.
_NOT_ATTEMPTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP})


# ------------------------------------------------------------------ the log


@dataclass(eq=False, slots=True)
class Inode:
    """A file or directory, whatever its names."""

    is_directory: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """``data`` went to ``offset`` of ``file``; where it is None, the file was emptied."""

    file: Inode
    offset: int
    data: bytes | None
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """``name`` in ``directory`` means ``inode`` now, or nothing; it is gone if it ``moved_to`` a place."""

    directory: Inode
    name: str
    inode: Inode | None
    moved_to: tuple[Inode, str] | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """One call changed these entries; what a file moved to comes before what it moved from."""

    entries: tuple[Entry, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Sync:
    """``inode``, or everything if it is None, was synced, or could not be."""

    inode: Inode | None
    succeeded: bool
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """The test has come to a point that it calls ``label``."""

    label: Any
    text: str


Call = Write | Names | Sync | Mark


class Log(Sequence[Call]):
    """What was there at first, and the changes since, in the order in which they were made."""

    def __init__(self, root: str) -> None:
        self.root = Inode(is_directory=True)
        self.names: dict[Inode, dict[str, Inode]] = {self.root: {}}
        self.contents: dict[Inode, bytes] = {}
        self.calls: list[Call] = []
        if os.path.isdir(root):
            self._read(root, self.root, {})

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: Any) -> Any:
        return self.calls[index]

    def __str__(self) -> str:
        return "\n".join(f"{number:5} {call.text}" for number, call in enumerate(self.calls))

    def _read(self, path: str, directory: Inode, seen: dict[int, Inode]) -> None:
        for name in sorted(os.listdir(path)):
            status = os.lstat(inner := f"{path}/{name}")
            if stat.S_ISDIR(status.st_mode):
                inode = Inode(is_directory=True)
                self.names[inode] = {}
                self._read(inner, inode, seen)
            elif stat.S_ISREG(status.st_mode):
                inode = seen.setdefault(status.st_ino, Inode())
                self.contents[inode] = _bytes_of(inner)
            else:
                continue
            self.names[directory][name] = inode


def _bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class RecordingDisk(Disk):
    """A disk that logs the changes below one directory.

    Guarantee: the log has the order in which the calls took effect, whichever threads made them,
    for ``_lock`` is held during a change and its record. It guards all fields. So a gate of
    ``disk`` at a call that changes something holds up all others that do.

    Parameters
    ----------
    root : path
        The directory; itself durable. It need not be there yet.
    disk : Disk
        Makes the calls; a :class:`~tests.faults.FaultyDisk`, for one. A call that raises is taken as
        not made.

    Attributes
    ----------
    log : Log
        For :func:`images`. A position ``n`` in it is the time after its first ``n`` calls.
    """

    def __init__(self, root: str | os.PathLike[str], disk: Disk = DISK) -> None:
        self._root = os.path.realpath(root)
        self._disk = disk
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Inode, str]] = {}
        self.log = Log(self._root)
        self._names = {inode: dict(names) for inode, names in self.log.names.items()}

    def mark(self, label: Any) -> None:
        """Log that the test has come to this point."""
        with self._lock:
            self.log.calls.append(Mark(label, f"mark {label!r}"))

    # ------------------------------------------------------------------ descriptors

    def open(self, path: str, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        assert flags & os.O_TMPFILE != os.O_TMPFILE, "files without a name are not in the model"
        with self._lock:
            place = self._place(path, dir_fd, follow=True)
            is_new = place is not None and not os.path.lexists(f"{self._root}/{place}")
            fd = self._disk.open(path, flags, mode, dir_fd=dir_fd)
            self._open.pop(fd, None)
            if place is not None and is_new:
                self._set(f"create {place}", place, Inode())
            if place is not None and (inode := self._find(place)) is not None:
                self._open[fd] = inode, place
                if flags & os.O_TRUNC and not is_new:
                    self.log.calls.append(Write(inode, 0, None, f"truncate {place}"))
        return fd

    def close(self, fd: int) -> None:
        with self._lock:
            self._open.pop(fd, None)
            self._disk.close(fd)

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        call = lambda: self._disk.writev(fd, buffers)  # noqa: E731
        start = lambda moved: os.lseek(fd, 0, os.SEEK_CUR) - moved  # noqa: E731
        return self._write(fd, call, lambda moved: (start(moved), b"".join(buffers)[:moved]))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        call = lambda: self._disk.pwrite(fd, data, offset)  # noqa: E731
        return self._write(fd, call, lambda moved: (offset, bytes(data[:moved])))

    def copy_range(self, source: int, target: int, nbytes: int, offset: int) -> int:
        call = lambda: self._disk.copy_range(source, target, nbytes, offset)  # noqa: E731
        return self._write(target, call, lambda moved: (offset, os.pread(source, moved, offset)))

    def clone(self, source: int, target: int) -> None:
        call = lambda: self._disk.clone(source, target)  # noqa: E731
        self._write(target, call, lambda _: (0, os.pread(source, os.fstat(source).st_size, 0)))

    def _write(self, fd: int, call: Callable[[], Any], told: Callable[[Any], tuple[int, bytes]]) -> Any:
        """Make ``call`` and log the offset and bytes that ``told`` makes of its result."""
        if fd not in self._open:
            return call()
        with self._lock:
            moved = call()
            inode, place = self._open[fd]
            offset, data = told(moved)
            if data:
                self.log.calls.append(Write(inode, offset, data, f"write {place}: {len(data)} at {offset}"))
        return moved

    def fsync(self, fd: int) -> None:
        self._sync(fd, lambda: self._disk.fsync(fd), everything=False)

    def syncfs(self, fd: int) -> None:
        self._sync(fd, lambda: self._disk.syncfs(fd), everything=True)

    def _sync(self, fd: int, call: Callable[[], None], *, everything: bool) -> None:
        if fd not in self._open:
            return call()
        with self._lock:
            inode, place = self._open[fd]
            target, text = (None, "syncfs") if everything else (inode, f"fsync {place or '.'}")
            try:
                call()
            except OSError as error:
                if error.errno not in _NOT_ATTEMPTED:
                    self.log.calls.append(Sync(target, False, f"{text} fails"))
                raise
            self.log.calls.append(Sync(target, True, text))
        return None

    # ------------------------------------------------------------------ names

    def link(self, source: str, target: str) -> None:
        with self._lock:
            self._disk.link(source, target)
            place = self._place(target)
            if place is not None and (inode := self._file_at(source, source)) is not None:
                self._set(f"link {self._place(source) or source} to {place}", place, inode)

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            old, new = self._place(source), self._place(target)
            moved, replaced = self._find(old), self._find(new)  # before the call changes them
            self._disk.rename(source, target)
            if new is not None and moved is None:
                moved = self._file_at(source, target)
            if moved is None or moved is replaced:  # two names of one file: nothing is done
                return
            entries, text = [], f"rename {old or source} to {new or target}"
            if new is not None:
                entries.append(Entry(*self._split(new), moved))
            if old is not None:
                entries.append(Entry(*self._split(old), None, self._split(new) if new is not None else None))
            self._change(Names(tuple(entries), text))

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def _remove(self, call: str, path: str, dir_fd: int | None) -> None:
        with self._lock:
            place = self._place(path, dir_fd)
            inode = self._find(place)
            getattr(self._disk, call)(path, dir_fd=dir_fd)
            if place and inode is not None:
                self._set(f"{call} {place}", place, None)

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        with self._lock:
            self._disk.mkdir(path, mode)
            self._made(path)

    def makedirs(self, path: str, mode: int = 0o700) -> None:
        with self._lock:
            missing, above = [], os.path.abspath(path)
            while not os.path.lexists(above):
                missing.append(above)
                above = os.path.dirname(above)
            self._disk.makedirs(path, mode)
            for made in reversed(missing):
                self._made(made)

    def _made(self, path: str) -> None:
        if place := self._place(path):
            self._set(f"mkdir {place}", place, Inode(is_directory=True))

    # ------------------------------------------------------------------ where things are

    def _place(self, path: str, dir_fd: int | None = None, *, follow: bool = False) -> str | None:
        """``path`` as seen from the root, which is the empty string, or None if it is elsewhere."""
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        head, tail = os.path.split(os.path.abspath(path))
        real = os.path.realpath(path) if follow else os.path.join(os.path.realpath(head), tail)
        if real == self._root:
            return ""
        return real[len(self._root) + 1 :] if real.startswith(f"{self._root}/") else None

    def _split(self, place: str) -> tuple[Inode, str]:
        head, _, name = place.rpartition("/")
        directory = self._find(head)
        assert directory is not None, f"{head} is gone, past this disk"
        return directory, name

    def _find(self, place: str | None) -> Inode | None:
        """What is at ``place``, unless there is nothing or neither a file nor a directory."""
        if not place:
            return None if place is None else self.log.root
        head, _, name = place.rpartition("/")
        directory = self._find(head)
        if directory not in self._names:
            return None
        return self._names[directory].get(name) or self._adopt(place)

    def _adopt(self, place: str) -> Inode | None:
        """Log as just made what was made past this disk."""
        path = f"{self._root}/{place}"
        if os.path.islink(path) or not os.path.exists(path):
            return None
        inode = Inode(is_directory=True) if os.path.isdir(path) else self._file_at(None, path)
        if inode is not None:
            self._set(f"find {place}", place, inode)
        return inode

    def _file_at(self, known_as: str | None, path: str) -> Inode | None:
        """The file that is, or was, ``known_as``; else one with the content of ``path``, in doubt."""
        known = None if known_as is None else self._find(self._place(known_as))
        if known is not None or not os.path.isfile(path):
            return known
        inode = Inode()
        self.log.calls.append(Write(inode, 0, _bytes_of(path), f"find {path}"))
        return inode

    def _set(self, text: str, place: str, inode: Inode | None) -> None:
        self._change(Names((Entry(*self._split(place), inode),), text))

    def _change(self, names: Names) -> None:
        self.log.calls.append(names)
        for entry in names.entries:
            if entry.inode is None:
                self._names[entry.directory].pop(entry.name, None)
                continue
            self._names[entry.directory][entry.name] = entry.inode
            if entry.inode.is_directory:
                self._names.setdefault(entry.inode, {})


def _pass_on(call: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self._disk, call)(*args, **kwargs)


for _call in ("start_writing", "preadv", "fstat", "mmap", "lock", "listdir", "lstat", "exists", "free_bytes"):
    setattr(RecordingDisk, _call, _pass_on(_call))


# ------------------------------------------------------------------ what is durable


class Fate(Enum):
    """What may become of a write since its file was last durable as a whole."""

    OPEN = auto()  #: anything; the next sync makes it durable
    LOST = auto()  #: anything for good: a sync of it failed
    FIRM = auto()  #: it is there, but writes before it are lost


@dataclass(slots=True)
class _Pending:
    """A write that is not durable, or comes after one that is not."""

    write: Write
    fate: Fate = Fate.OPEN


@dataclass(eq=False)
class _State:
    """What is durable after a prefix of the log, and what else has happened.

    Attributes
    ----------
    names, contents
        What is durable.
    changes : list of (int, Entry)
        The changes of names that are not, with their positions.
    writes : dict
        The writes to each file that are not.
    newest : dict
        What programs see in those files.
    journal : int
        Position of the last change of names that is durable.
    """

    names: dict[Inode, dict[str, Inode]]
    contents: dict[Inode, bytes]
    changes: list[tuple[int, Entry]] = field(default_factory=list)
    writes: dict[Inode, list[_Pending]] = field(default_factory=dict)
    newest: dict[Inode, bytes] = field(default_factory=dict)
    journal: int = -1
    marks: tuple[Any, ...] = ()

    @property
    def doubts(self) -> int:
        return len(self.changes) + sum(map(len, self.writes.values()))

    def apply(self, position: int, call: Call) -> None:
        match call:
            case Write(file):
                self.newest[file] = _whole(self.newest.get(file, self.contents.get(file, b"")), call)
                self.writes.setdefault(file, []).append(_Pending(call))
            case Names(entries):
                self.changes += ((position, entry) for entry in entries)
                for entry in entries:
                    if entry.inode is not None and entry.inode.is_directory:
                        self.names.setdefault(entry.inode, {})
            case Sync(inode, succeeded):
                for file in list(self.writes) if inode is None else [inode]:
                    self._sync_file(file, succeeded)
                if succeeded:
                    self._sync_names(inode)
            case Mark(label):
                self.marks = (*self.marks, label)

    def _sync_file(self, file: Inode, succeeded: bool) -> None:
        pending = self.writes.get(file, [])
        for each in pending:
            if each.fate is Fate.OPEN:
                each.fate = Fate.FIRM if succeeded else Fate.LOST
        if pending and all(each.fate is Fate.FIRM for each in pending):
            self.contents[file] = self.newest.pop(file)
            del self.writes[file]

    def _sync_names(self, directory: Inode | None) -> None:
        """Make the names in ``directory`` durable, and where files that it moved away have gone."""
        moved: dict[tuple[Inode, str], int] = {}
        durable, rest = [], []
        for position, entry in reversed(self.changes):
            synced = directory in (None, entry.directory)
            if synced or position <= moved.get((entry.directory, entry.name), -1):
                durable.append(entry)
                self.journal = max(self.journal, position)
                if entry.moved_to is not None:
                    moved.setdefault(entry.moved_to, position)
            else:
                rest.append((position, entry))
        self.changes = rest[::-1]
        for entry in reversed(durable):
            _enter(self.names[entry.directory], entry)


def _enter(names: dict[str, Inode], entry: Entry) -> None:
    if entry.inode is None:
        names.pop(entry.name, None)
    else:
        names[entry.name] = entry.inode


def _states(log: Log) -> Iterator[_State]:
    """The state at each position; one object, which moves on."""
    state = _State({inode: dict(names) for inode, names in log.names.items()}, dict(log.contents))
    yield state
    for position, call in enumerate(log.calls):
        state.apply(position, call)
        yield state


# ------------------------------------------------------------------ what becomes of a write


def _patched(content: bytes, offset: int, data: bytes) -> bytes:
    return b"".join((content[:offset].ljust(offset, b"\0"), data, content[offset + len(data) :]))


def _whole(content: bytes, write: Write) -> bytes:
    return b"" if write.data is None else _patched(content, write.offset, write.data)


def _absent(content: bytes, _write: Write, _rng: Random) -> bytes:
    return content


def _zeros(content: bytes, write: Write, _rng: Random) -> bytes:
    return content.ljust(write.offset + len(write.data or b""), b"\0")


def _cut(content: bytes, write: Write, rng: Random) -> bytes:
    if not write.data:
        return content
    end = write.offset + rng.randrange(len(write.data))
    if rng.random() < 0.5:
        end = end // _SECTOR * _SECTOR
    kept = write.data[: max(end - write.offset, 0)]
    return _patched(content, write.offset, kept) if kept else content


def _cut_and_zeros(content: bytes, write: Write, rng: Random) -> bytes:
    return _zeros(_cut(content, write, rng), write, rng)


def _garbled(content: bytes, write: Write, rng: Random) -> bytes:
    if not write.data:
        return content
    end = write.offset + len(write.data)
    sector = rng.randrange(write.offset, end) // _SECTOR * _SECTOR
    first, last = max(sector, write.offset), min(sector + _SECTOR, end)
    bad = rng.choice((bytes(last - first), rng.randbytes(last - first)))
    return _patched(_whole(content, write), first, bad)


_DAMAGES = (_absent, _zeros, _cut, _cut_and_zeros, _garbled)


# ------------------------------------------------------------------ images


class Mode(Enum):
    """Which changes of names are kept or dropped together."""

    ORDERED = auto()  #: all
    UNORDERED = auto()  #: those in one directory
    WILD = auto()  #: those of one name


@dataclass(frozen=True, slots=True)
class Image:
    """A state in which power loss may leave the directory.

    Attributes
    ----------
    position, choice, seed : int
        It is the image ``choice`` of ``images_at(log, position, choice + 1, seed)``.
    after : str
        The last call before the crash.
    mode : Mode
        How changes of names were chosen.
    marks : tuple
        The labels of the marks before the crash.
    directories : list of str
        Relative paths, each after the one above it.
    files : list of (str, Inode, bytes)
        Relative path, identity and content of each; one with several names is there several times.
    """

    position: int
    choice: int
    seed: int
    after: str
    mode: Mode
    marks: tuple[Any, ...]
    directories: list[str]
    files: list[tuple[str, Inode, bytes]]

    def __str__(self) -> str:
        files = "".join(f"\n  {path}: {len(content)} bytes" for path, _, content in self.files)
        where = f"position={self.position}, choice={self.choice}, seed={self.seed}"
        return f"image {where}, {self.mode.name.lower()}, after: {self.after}{files}"

    def tree(self) -> dict[str, bytes | None]:
        """The content of each file by its path, and None for each directory."""
        return dict.fromkeys(self.directories) | {path: content for path, _, content in self.files}

    def build(self, directory: str | os.PathLike[str], *, clear: bool = False) -> None:
        """Make it in ``directory``, which must be empty unless ``clear`` says to remove what is there."""
        base = os.fspath(directory)
        if clear:
            _clear(base)
        assert not os.listdir(base), f"{base} is not empty; pass clear=True if it may be emptied"
        for path in self.directories:
            os.mkdir(f"{base}/{path}", 0o700)
        made: dict[Inode, str] = {}
        for path, inode, content in self.files:
            if inode in made:
                os.link(made[inode], f"{base}/{path}")
                continue
            made[inode] = f"{base}/{path}"
            _make_file(made[inode], content)


def _make_file(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        assert os.write(fd, content) == len(content), "no room for the image"
    finally:
        os.close(fd)


def _clear(directory: str) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _clear(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)


def images(log: Log, count: int, seed: int = 0) -> Iterator[Image]:
    """Yield ``count`` images, of every position in the log while there are enough, in its order.

    A position gets two at least, all dropped and all kept, if there are enough, and more the more
    is in doubt there. The same log, count and seed give the same images.
    """
    doubts = [state.doubts for state in _states(log)]
    for (position, state), choices in zip(enumerate(_states(log)), _shares(doubts, count, seed), strict=True):
        for choice in choices:
            yield _image(log, state, position, choice, seed)


def images_at(log: Log, position: int, count: int, seed: int = 0) -> Iterator[Image]:
    """Yield ``count`` images after the first ``position`` calls, of which there may be none to all.

    The first have all that is in doubt dropped; all kept; the names kept and the writes dropped;
    the names and the lengths kept.
    """
    state = next(state for number, state in enumerate(_states(log)) if number == position)
    for choice in range(count):
        yield _image(log, state, position, choice, seed)


def _shares(doubts: list[int], count: int, seed: int) -> list[Sequence[int]]:
    """The choices to be made at each position."""
    rng, positions = Random(f"{seed}"), len(doubts)
    if count < positions:
        chosen = set(rng.sample(range(positions), count))
        return [[rng.randrange(8)] if position in chosen else () for position in range(positions)]
    each = min(count // positions, 2)
    weights = [min(doubt, 16) for doubt in doubts] if any(doubts) else [1] * positions
    total, rest = sum(weights), count - each * positions
    ends = [rest * weight // total for weight in accumulate(weights, initial=0)]
    return [range(each + end - start) for start, end in pairwise(ends)]


# ------------------------------------------------------------------ choosing


@dataclass(frozen=True, slots=True)
class _Plan:
    """How an image is chosen.

    Attributes
    ----------
    names : float or None
        How likely a group of names is kept as it was last; None keeps nothing that is not durable.
    writes : float
        How likely a write is kept whole.
    damages : tuple of callable
        What becomes of the others.
    """

    names: float | None
    writes: float
    damages: tuple[Callable[[bytes, Write, Random], bytes], ...] = _DAMAGES


#: The first choices at each position: what file systems do most.
_WHOLESALE = (_Plan(None, 0, (_absent,)), _Plan(1, 1), _Plan(1, 0, (_absent,)), _Plan(1, 0, (_zeros,)))


def _plan(choice: int, rng: Random) -> _Plan:
    if choice < len(_WHOLESALE):
        return _WHOLESALE[choice]
    return _Plan(rng.choice((0.0, 0.4, 0.8, 1.0)), rng.choice((0.0, 0.5, 0.9, 1.0)))


def _image(log: Log, state: _State, position: int, choice: int, seed: int) -> Image:
    rng = Random(f"{seed}/{position}/{choice}")
    mode = rng.choice(tuple(Mode))
    plan = _plan(choice, rng)
    names = _names_kept(state, mode, plan, rng)
    contents: dict[Inode, bytes] = {}
    directories: dict[Inode, str] = {}
    files: list[tuple[str, Inode, bytes]] = []

    def walk(directory: Inode, prefix: str) -> None:
        for name, inode in names.get(directory, state.names[directory]).items():
            if not inode.is_directory:
                if inode not in contents:
                    contents[inode] = _content_kept(state, inode, plan, rng)
                files.append((prefix + name, inode, contents[inode]))
            elif inode not in directories:  # it has one name, even if it was caught moving
                directories[inode] = prefix + name
                walk(inode, f"{prefix}{name}/")

    walk(log.root, "")
    after = log.calls[position - 1].text if position else "nothing"
    return Image(position, choice, seed, after, mode, state.marks, list(directories.values()), files)


def _content_kept(state: _State, file: Inode, plan: _Plan, rng: Random) -> bytes:
    content = state.contents.get(file, b"")
    for pending in state.writes.get(file, ()):
        if pending.fate is Fate.FIRM or rng.random() < plan.writes:
            content = _whole(content, pending.write)
        else:
            content = rng.choice(plan.damages)(content, pending.write, rng)
    return content


def _names_kept(state: _State, mode: Mode, plan: _Plan, rng: Random) -> dict[Inode, dict[str, Inode]]:
    """The directories whose names are more than the durable ones."""
    kept: dict[Inode, dict[str, Inode]] = {}
    if plan.names is None:
        return kept
    ends = _ends(state, mode, plan.names, rng)
    for position, entry in state.changes:
        if position <= ends[_group(mode, entry.directory, entry.name)]:
            if entry.directory not in kept:
                kept[entry.directory] = dict(state.names[entry.directory])
            _enter(kept[entry.directory], entry)
    return kept


def _ends(state: _State, mode: Mode, likely: float, rng: Random) -> dict[Any, int]:
    """The position of the last change that is kept, for each group of them."""
    pasts: dict[Any, list[int]] = {}
    for position, entry in state.changes:
        pasts.setdefault(_group(mode, entry.directory, entry.name), [-1]).append(position)
    ends = {group: past[-1] if rng.random() < likely else rng.choice(past) for group, past in pasts.items()}
    if mode is Mode.ORDERED:
        ends = {group: max(end, state.journal) for group, end in ends.items()}
    # What is gone from its old name because it was renamed must be at its new one.
    for position, entry in reversed(state.changes):
        if entry.moved_to is not None and position <= ends[_group(mode, entry.directory, entry.name)]:
            new = _group(mode, *entry.moved_to)
            if new in ends:
                ends[new] = max(ends[new], position)
    return ends


def _group(mode: Mode, directory: Inode, name: str) -> Any:
    """What is the same for changes that are kept or dropped together."""
    if mode is Mode.ORDERED:
        return None
    return directory if mode is Mode.UNORDERED else (directory, name)
