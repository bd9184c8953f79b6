"""One writer at a time: who is let in, who is named, what is left after a failure, a kill or a fork."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import inspect
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fbcache
from fbcache.checkpoint import lock as module
from fbcache.checkpoint.lock import FREE, RECORD_SIZE, Record, Tenure, WriterLock, read_record
from fbcache.errors import DirectoryInUseError, DiskFullError, StorageError
from fbcache.store.disk import DISK, Disk
from fbcache.store.owner import Owner
from tests.conftest import Running
from tests.faults import PATIENCE, FaultyDisk, oserror
from tests.interrupts import Interrupter
from tests.sessions import dead_owner

A_RECORD = Record("elsewhere", "boot", 4711, 1.0, Tenure.OBJECT, "a" * 32, 3)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / ".fbcache").mkdir()
    return tmp_path


@pytest.fixture
def path(directory: Path) -> str:
    return str(directory / ".fbcache" / "lock")


def acquire(path: str, tenure: Tenure = Tenure.CALL, *, wait: bool = False, disk: Disk = DISK) -> WriterLock:
    return WriterLock.acquire(path, str(Path(path).parent.parent), tenure, wait=wait, disk=disk)


def is_free(path: str) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextlib.contextmanager
def locked_by_somebody(path: str, content: Record | bytes = b"") -> Iterator[int]:
    """The lock, held by nobody of ours, and what the record says meanwhile."""
    raw = content.to_bytes() if isinstance(content, Record) else content
    Path(path).write_bytes(raw)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


class Pauses:
    """Stands in for the pause between two looks: counts them, and does at each what the test says."""

    def __init__(self) -> None:
        self.lengths: list[float] = []
        self.then: Callable[[], object] = lambda: None

    def __call__(self, seconds: float) -> None:
        self.lengths.append(seconds)
        self.then()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    made = Pauses()
    monkeypatch.setattr(module, "_sleep", made)
    return made


# ------------------------------------------------------------------ tenures


def test_whoever_holds_the_lock_is_on_record(path: str) -> None:
    me = Owner.current()
    lock = acquire(path, Tenure.OBJECT)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and os.path.getsize(path) == RECORD_SIZE
    held = Record(me.host, me.boot_id, me.pid, me.started, "object", lock.stamp, 0)
    assert read_record(path) == held and len(lock.stamp) == 32
    assert not is_free(path) and lock.still_there()
    lock.release(7)
    lock.release(8)
    assert read_record(path) == dataclasses.replace(held, tenure=FREE, last_version=7)
    assert is_free(path) and not lock.still_there()
    assert os.listdir(os.path.dirname(path)) == ["lock"]


def test_the_stamp_tells_whether_another_has_written_since(path: str) -> None:
    mine = acquire(path)
    assert mine.former is None
    mine.release(1)
    again = acquire(path)
    assert again.former is not None and again.former.stamp == mine.stamp != again.stamp
    again.release(1)
    acquire(path).release(1)
    last = acquire(path)
    assert last.former is not None and last.former.stamp not in (mine.stamp, again.stamp)
    last.release(1)


def test_the_last_version_outlives_a_holder_and_never_falls(path: str) -> None:
    acquire(path).release(41)
    held = acquire(path)
    assert held.former is not None and held.former.last_version == 41
    record = read_record(path)
    assert record is not None and record.last_version == 41, "a holder that dies leaves it behind"
    held.release(0)
    assert (last := read_record(path)) is not None and last.last_version == 41


def test_a_host_name_that_has_no_room_is_left_out() -> None:
    record = dataclasses.replace(A_RECORD, host="\u00e9" * 200)
    assert Record.from_bytes(record.to_bytes()) == dataclasses.replace(record, host="")
    assert not dataclasses.replace(record, host="").has_ended(), "nothing is known of it"


# ------------------------------------------------------------------ other processes

_HOLDER = """
import sys
from fbcache.checkpoint.lock import Tenure, WriterLock
path, tenure = sys.argv[1:]
lock = WriterLock.acquire(path, "", Tenure(tenure), wait=False)
print(lock.stamp, flush=True)
sys.stdin.readline()
lock.release(5)
"""


class Holder:
    """Another process that holds the lock until it is told to release it, or killed."""

    def __init__(self, path: str, tenure: Tenure) -> None:
        command = [sys.executable, "-c", _HOLDER, path, tenure]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.stamp = self._process.stdout.readline().strip()
        self.pid = self._process.pid
        assert len(self.stamp) == 32

    def release(self) -> None:
        self._process.communicate("go\n", timeout=PATIENCE)
        assert self._process.returncode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)


@pytest.fixture
def hold(path: str) -> Iterator[Callable[[Tenure], Holder]]:
    made: list[Holder] = []

    def start(tenure: Tenure) -> Holder:
        made.append(Holder(path, tenure))
        return made[-1]

    yield start
    for holder in made:
        holder.kill()


@pytest.mark.parametrize("tenure", Tenure)
def test_a_second_process_is_refused_and_told_who_is_first(
    tenure: Tenure, path: str, directory: Path, hold: Callable[[Tenure], Holder]
) -> None:
    holder = hold(tenure)
    with pytest.raises(DirectoryInUseError, match=r"readonly=True") as caught:
        acquire(path)
    host = Owner.current().host
    assert (caught.value.path, caught.value.host, caught.value.pid) == (str(directory), host, holder.pid)
    assert f"process {holder.pid} on {host}" in str(caught.value) and str(directory) in str(caught.value)
    assert ("wait=True" in str(caught.value)) is (tenure is Tenure.CALL)
    holder.release()
    lock = acquire(path)
    assert lock.former is not None
    assert (lock.former.stamp, lock.former.tenure, lock.former.last_version) == (holder.stamp, FREE, 5)
    lock.release(6)


def test_a_call_is_waited_for_until_it_is_done(
    path: str, hold: Callable[[Tenure], Holder], pauses: Pauses, spawn: Callable[..., Running]
) -> None:
    holder = hold(Tenure.CALL)
    waits = threading.Event()

    def wait_a_little() -> None:
        waits.set()
        threading.Event().wait(0.001)

    pauses.then = wait_a_little
    waiting = spawn(acquire, path, wait=True)
    assert waits.wait(PATIENCE) and not waiting.done
    holder.release()
    lock = waiting.result()
    assert lock.former is not None and lock.former.stamp == holder.stamp
    lock.release(1)


def test_an_open_directory_is_not_waited_for(path: str, hold: Callable[[Tenure], Holder]) -> None:
    holder = hold(Tenure.OBJECT)
    with pytest.raises(DirectoryInUseError, match="Close its TrackedDirectory") as caught:
        acquire(path, wait=True)
    assert caught.value.pid == holder.pid


def test_waiting_ends_when_the_directory_is_opened_by_another(path: str, pauses: Pauses) -> None:
    """The call that was waited for is over, and an object holds the lock: whom to wait for is asked anew."""
    saving = acquire(path)
    opened: list[WriterLock] = []

    def take_over() -> None:
        if len(pauses.lengths) == 3:
            saving.release(1)
            opened.append(acquire(path, Tenure.OBJECT))

    pauses.then = take_over
    with pytest.raises(DirectoryInUseError, match="has open for writing"):
        acquire(path, wait=True)
    opened[0].release(1)


def test_pauses_grow_and_are_bounded(path: str, pauses: Pauses) -> None:
    saving = acquire(path)
    pauses.then = lambda: saving.release(1) if len(pauses.lengths) == 10 else None
    acquire(path, wait=True).release(1)
    assert pauses.lengths == sorted(pauses.lengths)
    assert (pauses.lengths[0], pauses.lengths[-1]) == (0.001, 0.02)


def test_a_killed_holder_keeps_nobody_out(path: str, hold: Callable[[Tenure], Holder]) -> None:
    holder = hold(Tenure.OBJECT)
    holder.kill()
    lock = acquire(path)
    assert lock.former is not None and (lock.former.pid, lock.former.tenure) == (holder.pid, "object")
    assert lock.former.has_ended()
    lock.release(1)


def test_no_two_processes_hold_it_at_once(path: str) -> None:
    """Each counts on from what it finds; a count would be lost if two were in at once."""
    processes, times = 4, 25

    def count() -> None:
        for _ in range(times):
            lock = acquire(path, wait=True)
            lock.release((lock.former.last_version if lock.former else 0) + 1)

    children = [fork(count) for _ in range(processes)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * processes
    record = read_record(path)
    assert record is not None and record.last_version == processes * times


# ------------------------------------------------------------------ holders that cannot be named


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("content", [b"", dataclasses.replace(A_RECORD, tenure=FREE)], ids=["none", "free"])
def test_an_unknown_holder_is_another_process(
    path: str, directory: Path, pauses: Pauses, wait: bool, content: Record | bytes
) -> None:
    with locked_by_somebody(path, content):
        with pytest.raises(DirectoryInUseError, match=r"another process.*fuser") as caught:
            acquire(path, wait=wait)
    assert (caught.value.path, caught.value.host, caught.value.pid) == (str(directory), "", None)
    assert len(pauses.lengths) + 1 == (module._LOOKS_WAITING if wait else module._LOOKS)


def test_the_dead_do_not_hold_it(path: str, pauses: Pauses) -> None:
    """What a killed holder wrote is still there when the next one has locked, and not yet written."""
    gone = dead_owner()
    record = Record(gone.host, gone.boot_id, gone.pid, gone.started, "object", "a" * 32, 1)
    with locked_by_somebody(path, record):
        with pytest.raises(DirectoryInUseError, match=f"Process {gone.pid}.* left children") as caught:
            acquire(path)
    assert caught.value.pid is None


def test_a_holder_that_has_not_yet_signed_is_looked_at_again(path: str, pauses: Pauses) -> None:
    with locked_by_somebody(path):
        pauses.then = lambda: Path(path).write_bytes(A_RECORD.to_bytes())
        with pytest.raises(DirectoryInUseError, match="process 4711 on elsewhere"):
            acquire(path)


def test_nobody_is_named_on_one_look(path: str, pauses: Pauses) -> None:
    """A living process that could not write "free" looks like the holder until the holder has signed."""
    lives_on = dataclasses.replace(A_RECORD, pid=1234, stamp="b" * 32)
    with locked_by_somebody(path, lives_on):
        pauses.then = lambda: Path(path).write_bytes(A_RECORD.to_bytes())
        with pytest.raises(DirectoryInUseError, match="process 4711 on elsewhere"):
            acquire(path)


# ------------------------------------------------------------------ records


def strange_records() -> list[bytes]:
    good = json.loads(A_RECORD.to_bytes())
    changes: list[dict[str, object]] = [
        {"magic": "fbcache-lock-2"},
        {"pid": "1"},
        {"pid": True},
        {"pid": 0},
        {"pid": 1.0},
        {"started": 1},
        {"tenure": "forever"},
        {"tenure": None},
        {"stamp": "A" * 32},
        {"stamp": "a" * 33},
        {"last_version": -1},
        {"last_version": 10**10},
        {"host": "\x1b[2Jhost"},
        {"host": ["h"]},
        {"extra": 1},
    ]
    whole = [{**good, **change} for change in changes]
    whole.append({name: good[name] for name in good if name != "stamp"})
    raw = A_RECORD.to_bytes()
    return [
        *(json.dumps(fields).encode().ljust(RECORD_SIZE) for fields in whole),
        b"",
        raw[:-1],
        raw.rstrip(),
        bytes(RECORD_SIZE),
        b"\xff\xfe" * (RECORD_SIZE // 2),
        b"[" * RECORD_SIZE,
        b'{"a":' * (RECORD_SIZE // 5) + b"  ",
        b"null".ljust(RECORD_SIZE),
        b"x" * 3_000_000,
    ]


@pytest.mark.parametrize("raw", strange_records(), ids=lambda raw: str(raw[:60]))
def test_what_is_not_a_record_is_none_and_keeps_nobody_out(path: str, raw: bytes) -> None:
    Path(path).write_bytes(raw)
    assert Record.from_bytes(raw) is None and read_record(path) is None
    lock = acquire(path)
    assert lock.former is None
    assert (now := read_record(path)) is not None and now.stamp == lock.stamp
    lock.release(1)


def test_nesting_is_no_error_even_where_the_stack_is_nearly_used_up() -> None:
    room = RECORD_SIZE // 2
    depth = sys.getrecursionlimit() - len(inspect.stack()) - room
    assert _at_depth(depth, lambda: Record.from_bytes(b"[" * RECORD_SIZE)) is None


def _at_depth(depth: int, call: Callable[[], object]) -> object:
    return call() if depth == 0 else _at_depth(depth - 1, call)


def test_reading_where_there_is_nothing_to_read(path: str, directory: Path) -> None:
    assert read_record(path) is None
    assert read_record(str(directory / "missing" / "lock")) is None
    for error in (errno.EACCES, errno.EIO):
        acquire(path).release(1)
        disk = FaultyDisk()
        disk.fail("preadv", error=oserror(error))
        assert read_record(path, disk) is None


@pytest.mark.parametrize("kind", ["fifo", "directory", "link"])
def test_what_is_no_file_neither_blocks_nor_is_followed(path: str, directory: Path, kind: str) -> None:
    (directory / "mine").write_bytes(A_RECORD.to_bytes())
    makers: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(path),
        "directory": lambda: os.mkdir(path),
        "link": lambda: os.symlink(directory / "mine", path),
    }
    makers[kind]()
    assert read_record(path) is None
    with pytest.raises(StorageError, match="nothing else lies in the file's place") as caught:
        acquire(path)
    assert caught.value.path == path and (directory / "mine").read_bytes() == A_RECORD.to_bytes()


# ------------------------------------------------------------------ a lock file that goes


class ReplacingDisk(Disk):
    """Before each of the first ``times`` locks somebody removes the file, or replaces it."""

    def __init__(self, path: str, times: int, anew: bool) -> None:
        self._path, self._left, self._anew = path, times, anew

    def lock(self, fd: int) -> bool:
        if self._left:
            self._left -= 1
            os.unlink(self._path)
            if self._anew:
                Path(self._path).touch()
        return super().lock(fd)


@pytest.mark.parametrize("anew", [False, True])
def test_the_file_that_is_locked_is_the_one_at_the_path(path: str, anew: bool) -> None:
    lock = acquire(path, disk=ReplacingDisk(path, 3, anew))
    assert lock.still_there() and not is_free(path)
    assert (record := read_record(path)) is not None and record.stamp == lock.stamp
    lock.release(1)


def test_a_file_that_never_stays_is_an_error(path: str) -> None:
    with pytest.raises(StorageError, match="again and again"):
        acquire(path, disk=ReplacingDisk(path, 1000, True))


def test_a_holder_can_tell_that_its_lock_is_gone(path: str, directory: Path) -> None:
    """A user removes .fbcache beneath it; its release then leaves the new holder's record alone."""
    first = acquire(path, Tenure.OBJECT)
    shutil.rmtree(directory / ".fbcache")
    assert not first.still_there()
    with pytest.raises(StorageError, match="is there"):
        acquire(path)
    (directory / ".fbcache").mkdir()
    second = acquire(path)
    assert not first.still_there() and second.still_there()
    first.release(9)
    assert (record := read_record(path)) is not None and record.stamp == second.stamp and not is_free(path)
    second.release(1)


# ------------------------------------------------------------------ forks


def fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def run_in_child(work: Callable[[], object]) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 0


@pytest.mark.parametrize("leave", [WriterLock.abandon_in_child, lambda lock: lock.release(99)])
def test_a_child_neither_unlocks_nor_writes(path: str, leave: Callable[[WriterLock], None]) -> None:
    lock = acquire(path)
    held = read_record(path)

    def child() -> None:
        before = len(os.listdir("/proc/self/fd"))
        leave(lock)
        assert len(os.listdir("/proc/self/fd")) == before - 1
        leave(lock)
        lock.release(99)

    run_in_child(child)
    assert not is_free(path) and read_record(path) == held and lock.still_there()
    lock.release(1)


def test_a_child_signs_with_its_own_number(path: str) -> None:
    acquire(path).release(1)

    def child() -> None:
        lock = acquire(path)
        record = read_record(path)
        assert record is not None and record.pid == os.getpid() != os.getppid() and not record.has_ended()
        lock.release(2)

    run_in_child(child)


@pytest.mark.parametrize("abandons", [True, False])
def test_the_lock_ends_with_its_holder_if_the_children_abandon_it(path: str, abandons: bool) -> None:
    program = """
import os, signal, sys
from fbcache.checkpoint.lock import Tenure, WriterLock
lock = WriterLock.acquire(sys.argv[1], "", Tenure.OBJECT, wait=False)
if sys.argv[2] == "True":
    os.register_at_fork(after_in_child=lock.abandon_in_child)
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(write, b"x")
    signal.pause()
os.read(read, 1)
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-W", "ignore", "-c", program, path, str(abandons)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.wait()
        try:
            if abandons:
                acquire(path).release(1)
            else:
                with pytest.raises(DirectoryInUseError, match="may have left children"):
                    acquire(path)
        finally:
            os.kill(child, signal.SIGKILL)


# ------------------------------------------------------------------ interrupts and faults

#: The seam's calls of one acquisition and release, in order.
CALLS = ("open", "lock", "lstat", "fstat", "preadv", "pwrite")


def test_these_are_the_calls(path: str) -> None:
    acquire(path).release(1)
    disk = FaultyDisk()
    acquire(path, disk=disk).release(1)
    assert disk.log == [*CALLS, "pwrite", "close"]


#: After "open" the descriptor's number is lost, and nobody can help.
MOMENTS = [(c, m) for c in CALLS for m in ("fail", "fail_after") if (c, m) != ("open", "fail_after")]


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("error", [oserror(errno.EIO), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_acquisition_leaves_no_lock(path: str, call: str, moment: str, error: BaseException) -> None:
    acquire(path).release(3)
    disk = FaultyDisk()
    getattr(disk, moment)(call, error=error)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        acquire(path, disk=disk)
    assert is_free(path)
    lock = acquire(path)
    assert lock.former is not None and lock.former.last_version == 3
    lock.release(1)


@pytest.mark.parametrize("call", ["pwrite", "close"])
@pytest.mark.parametrize("moment", ["fail", "fail_after"])
@pytest.mark.parametrize("error", [oserror(errno.EIO), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_release_frees_the_lock(path: str, call: str, moment: str, error: BaseException) -> None:
    disk = FaultyDisk()
    lock = acquire(path, disk=disk)
    getattr(disk, moment)(call, error=error)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        lock.release(1)
    assert is_free(path)
    lock.release(1)
    after = acquire(path)
    assert after.former is not None and after.former.stamp == lock.stamp, "nobody has written since"
    after.release(1)


def test_an_interrupted_wait_leaves_no_descriptor(path: str, pauses: Pauses) -> None:
    holder = acquire(path)
    pauses.then = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        acquire(path, wait=True)
    assert len(pauses.lengths) == 1 and not is_free(path)
    holder.release(1)


def descriptors_of(path: str) -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(path):
                found.append(int(name))
    return found


class EntryInterrupter(Interrupter):
    """Interrupts where a function of fbcache's is entered, which tracing by instruction does not see."""

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not self.fired and code.co_filename.startswith(str(Path(fbcache.__file__).parent)):
            self._left -= 1
            if self._left == 0:
                self.fired, self.where = True, f"{code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt


# Reading the boot's identifier opens a file as Python does: its object is dropped, and that closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("at", [Interrupter, EntryInterrupter])
@pytest.mark.parametrize("way", ["straight", "replaced", "refused"])
def test_an_interrupt_anywhere_leaves_no_lock(
    path: str, way: str, at: type[Interrupter], pauses: Pauses
) -> None:
    """At every place where CPython lets one in, but the entry of the seam's close."""
    nth, left_open = 1, set()
    while True:
        lock: WriterLock | None = None
        disk = ReplacingDisk(path, int(way == "replaced"), True)
        acquire(path).release(1)
        other = locked_by_somebody(path, A_RECORD) if way == "refused" else contextlib.nullcontext()
        interrupter = at(nth)
        with other, contextlib.suppress(DirectoryInUseError, KeyboardInterrupt), interrupter:
            lock = acquire(path, disk=disk)
            lock.release(2)
        if lock is not None:
            lock.release(2)  # the entry of release is its caller's, who does it again
        for fd in descriptors_of(path):
            left_open.add(interrupter.where.partition(":")[0])
            os.close(fd)
        assert is_free(path)
        if not interrupter.fired:
            break
        nth += 1
    assert nth > 25
    assert left_open == ({"Disk.close"} if at is EntryInterrupter else set())


FAULTS: list[tuple[str, int, type[StorageError], str]] = [
    ("open", errno.EROFS, StorageError, r"may write there.*readonly=True"),
    ("open", errno.EACCES, StorageError, r"may write there.*readonly=True"),
    ("open", errno.ENOENT, StorageError, r"is there"),
    ("open", errno.ENOSPC, DiskFullError, r"512 bytes are needed.*Free some space"),
    ("lock", errno.ENOLCK, StorageError, r"no locks \(flock\)"),
    ("lock", errno.EOPNOTSUPP, StorageError, r"no locks \(flock\)"),
    ("lock", errno.ENOSYS, StorageError, r"no locks \(flock\)"),
    ("lstat", errno.EIO, StorageError, r"cannot lock"),
    ("preadv", errno.EIO, StorageError, r"cannot lock"),
    ("pwrite", errno.ENOSPC, DiskFullError, r"512 bytes are needed.*Free some space"),
    ("pwrite", errno.EDQUOT, DiskFullError, r"512 bytes are needed.*Free some space"),
    ("pwrite", errno.EROFS, StorageError, r"may write there"),
]


@pytest.mark.parametrize(("call", "code", "kind", "says"), FAULTS)
@pytest.mark.parametrize("statvfs", [True, False])
def test_faults_are_typed_and_say_what_to_do(
    path: str, call: str, code: int, kind: type[StorageError], says: str, statvfs: bool
) -> None:
    disk = FaultyDisk()
    disk.fail(call, error=oserror(code))
    if not statvfs:
        disk.fail("free_bytes", error=oserror(errno.EIO))
    with pytest.raises(kind, match=says) as caught:
        acquire(path, disk=disk)
    assert type(caught.value) is kind and caught.value.path == path and path in str(caught.value)
    assert caught.value.errno == (errno.ENOSPC if kind is DiskFullError else code)
    acquire(path, disk=disk).release(1)


def test_a_record_that_is_written_in_part_is_a_full_disk(path: str) -> None:
    class ShortDisk(Disk):
        def pwrite(self, fd: int, data: bytes, offset: int) -> int:
            return super().pwrite(fd, data[:100], offset)

    with pytest.raises(DiskFullError):
        acquire(path, disk=ShortDisk())
    assert is_free(path) and read_record(path) is None


def test_a_release_that_cannot_write_says_so_and_keeps_what_was_known(path: str) -> None:
    disk = FaultyDisk()
    lock = acquire(path, disk=disk)
    held: Any = read_record(path)
    disk.fail("pwrite", error=oserror(errno.ENOSPC))
    with pytest.raises(DiskFullError, match="cannot write to"):
        lock.release(8)
    assert is_free(path) and read_record(path) == held
