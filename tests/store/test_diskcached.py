"""DiskcacheStore: shared transactions, faults of SQLite, connections, room, and refusing to unpickle.

What every store promises is tested by the kit, in tests/test_testing_kits.py.
"""

from __future__ import annotations

import errno
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

pytest.importorskip("diskcache")

from fbcache import FBPool
from fbcache.errors import CorruptBlobError, DiskFullError, StorageError
from fbcache.store import rows
from fbcache.store.diskcached import DATABASE_FILES, LARGE, NAME, DiskcacheStore
from fbcache.store.grouping import Group
from fbcache.store.protocol import Batching, BlobStore, FileBacked, StoreLimits
from tests.blobs import files_below, frames_of, random_bytes, same
from tests.faults import PATIENCE, FaultyDisk, oserror

SMALL = 1000


@pytest.fixture
def store(tmp_path: Path, disk: FaultyDisk) -> Iterator[DiskcacheStore]:
    store = DiskcacheStore(str(tmp_path), disk=disk)
    yield store
    store.close()


def database(store: DiskcacheStore) -> Path:
    return Path(store.path, NAME, "cache.db")


def altered(store: DiskcacheStore, statement: str, *values: Any) -> None:
    """Change the database behind the store's back."""
    with closing(sqlite3.connect(database(store))) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


def idle(store: DiskcacheStore) -> list[sqlite3.Connection]:
    return store._rows._idle


class Queue(deque[Any]):
    """A group's queue that tells when so many have come."""

    def __init__(self) -> None:
        super().__init__()
        self._come = threading.Semaphore(0)

    def append(self, turn: Any) -> None:
        super().append(turn)
        self._come.release()

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self._come.acquire(timeout=PATIENCE)


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many changes each transaction holds, in order."""
    found: list[int] = []
    real = rows.Rows._made

    def made(self: Any, changes: list[Any]) -> bool:
        found.append(len(changes))
        return real(self, changes)

    monkeypatch.setattr(rows.Rows, "_made", made)
    return found


# ------------------------------------------------------------------ what lies where


def test_it_is_a_store_that_batches_and_whose_blobs_are_no_files(store: DiskcacheStore) -> None:
    as_protocol: BlobStore = store
    assert isinstance(as_protocol, Batching) and not isinstance(as_protocol, FileBacked)


def test_small_blobs_are_rows_and_large_ones_files(store: DiskcacheStore, tmp_path: Path) -> None:
    small, large = uuid4(), uuid4()
    store.write(small, frames_of(LARGE - 50))
    assert {Path(file).name for file in files_below(tmp_path)} <= set(DATABASE_FILES)
    store.write(large, frames_of(LARGE))
    assert f"{large.hex[:2]}/{large.hex}" in files_below(tmp_path)
    assert store.locate(small) == f"{tmp_path}/{NAME}" and store.locate(large).endswith(large.hex)
    assert database(store).parent.stat().st_mode & 0o777 == 0o700


def test_what_sqlite_is_set_to(store: DiskcacheStore) -> None:
    store.write(uuid4(), frames_of(SMALL))
    (connection,) = idle(store)
    wanted = {"journal_mode": "wal", "synchronous": 0, "auto_vacuum": 2, "mmap_size": 0, "cache_size": -512}
    assert {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in wanted} == wanted
    cache = store._rows._cache
    assert (cache.eviction_policy, cache.cull_limit, cache.statistics) == ("none", 0, 0)


def test_rows_count_what_the_database_takes(tmp_path: Path) -> None:
    for number, sizes in enumerate(((100,), (1500,), (2500,), (4500,), (30_000,), (10, 700, 3000, 9000))):
        directory = tmp_path / str(number)
        directory.mkdir()
        store = DiskcacheStore(str(directory))
        count = 500_000 // sum(sizes)
        store.write_many([(uuid4(), frames_of(size)) for _ in range(count) for size in sizes])
        connection = idle(store)[0]
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        taken = 4096 * pages
        store.close()
        with pytest.raises(StorageError):
            store.write(uuid4(), frames_of(1))
        assert store.disk_bytes == 0
        assert 0.85 * taken <= _counted(sizes, count) <= 1.2 * taken, (sizes, taken)


def _counted(sizes: tuple[int, ...], count: int) -> int:
    from fbcache.store.diskcached import _row

    return sum(_row(uuid4(), frames_of(size)).nbytes for size in sizes) * count


# ------------------------------------------------------------------ shared transactions


def test_writes_that_come_together_share_a_transaction(
    store: DiskcacheStore, transactions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one goes alone; what comes while it does goes in one."""
    inside, go = threading.Event(), threading.Event()
    real = rows.Rows._apply

    def apply(self: Any, change: Any) -> None:
        if not inside.is_set():
            inside.set()
            assert go.wait(PATIENCE)
        real(self, change)

    monkeypatch.setattr(rows.Rows, "_apply", apply)
    queue = store._rows._group._waiting = Queue()
    keys = [uuid4() for _ in range(9)]
    threads = [threading.Thread(target=store.write, args=(key, frames_of(SMALL))) for key in keys]
    threads[0].start()
    assert inside.wait(PATIENCE)
    for thread in threads[1:]:
        thread.start()
    queue.wait_for(8)
    go.set()
    for thread in threads:
        thread.join()
    assert transactions == [1, 8]
    for key in keys:
        assert same(store.read(key, writable=False, verify=True), frames_of(SMALL))


def test_many_are_one_transaction_and_large_ones_none(store: DiskcacheStore, transactions: list[int]) -> None:
    items = [(uuid4(), frames_of((SMALL, LARGE)[number % 10 == 0], seed_of(number))) for number in range(50)]
    results = store.write_many(items)
    assert transactions == [45] and sum(map(int, results)) == store.disk_bytes  # type: ignore[arg-type]
    for key, frames in items:
        assert same(store.read(key, writable=True, verify=True), frames)


def seed_of(number: int) -> int:
    return 10 + number


def test_one_that_fails_in_a_shared_transaction_fails_alone(
    store: DiskcacheStore, transactions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = uuid4()
    real = rows.Rows._apply

    def apply(self: Any, change: Any) -> None:
        real(self, change)
        if change.key == bad.bytes:
            raise sqlite3.OperationalError("this one does not go")

    items = [(uuid4(), frames_of(SMALL)) for _ in range(3)] + [(bad, frames_of(SMALL))]
    with monkeypatch.context() as patch:
        patch.setattr(rows.Rows, "_apply", apply)
        results = store.write_many(items)
    assert transactions == [4, 1, 1, 1, 1]
    assert [type(result) for result in results] == [int, int, int, StorageError]
    assert "does not go" in str(results[3])
    assert store.disk_bytes == sum(results[:3])  # type: ignore[arg-type]
    with pytest.raises(CorruptBlobError):
        store.read(bad, writable=False, verify=False)
    store.write(bad, frames_of(SMALL))


def test_an_interrupted_write_is_undone(store: DiskcacheStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 9, for the notebook's stop button, whenever it comes."""
    key = uuid4()
    for after in (False, True):
        real = rows.Rows._made
        interrupts = iter([True])

        def made(self: Any, changes: list[Any], after: bool = after, interrupts: Any = interrupts) -> bool:
            if after:
                real(self, changes)  # noqa: B023
            if next(interrupts, False):
                raise KeyboardInterrupt
            return real(self, changes)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(rows.Rows, "_made", made)
            with pytest.raises(KeyboardInterrupt):
                store.write(key, frames_of(SMALL))
        assert store.disk_bytes == 0 and store._rows.get(key.bytes) is None
    store.write(key, frames_of(SMALL))


def test_those_who_waited_for_an_interrupted_leader_are_served_all_the_same() -> None:
    served: list[str] = []
    inside, go = threading.Event(), threading.Event()

    def serve(items: list[str]) -> None:
        if "leader" in items:
            inside.set()
            assert go.wait(PATIENCE)
            raise KeyboardInterrupt
        served.extend(items)

    group: Group[str] = Group(serve)
    queue = group._waiting = Queue()
    caught: list[BaseException] = []
    leader = threading.Thread(target=_catch, args=(caught, lambda: group.run(["leader"])))
    leader.start()
    assert inside.wait(PATIENCE)
    others = [threading.Thread(target=group.run, args=([name],)) for name in ("a", "b")]
    for thread in others:
        thread.start()
    queue.wait_for(2)
    assert group.is_waited_for
    go.set()
    for thread in (leader, *others):
        thread.join(PATIENCE)
    assert sorted(served) == ["a", "b"] and [type(error) for error in caught] == [KeyboardInterrupt]
    group.run(["c"])
    assert served[-1] == "c" and not group.is_waited_for


def _catch(caught: list[BaseException], call: Callable[[], Any]) -> None:
    try:
        call()
    except BaseException as error:
        caught.append(error)


# ------------------------------------------------------------------ faults of SQLite


def fill(store: DiskcacheStore) -> None:
    """Let the database grow no further, on the one connection that there is."""
    (connection,) = idle(store)
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    connect = store._rows._cache.connect

    def limited() -> sqlite3.Connection:
        connection: sqlite3.Connection = connect()
        connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
        return connection

    store._rows._cache.connect = limited


def test_a_full_disk_is_told_as_such_and_passes(store: DiskcacheStore) -> None:
    """SQLITE_FULL, from SQLite itself; it has rolled back already when diskcache wants to."""
    store.write(first := uuid4(), frames_of(SMALL))
    before = store.disk_bytes
    fill(store)
    key = uuid4()
    with pytest.raises(DiskFullError, match="no room") as caught:
        store.write(key, frames_of(50_000))
    assert caught.value.needed is not None and caught.value.needed > 50_000
    results = store.write_many([(uuid4(), frames_of(50_000)) for _ in range(3)])
    assert all(isinstance(result, DiskFullError) for result in results)
    assert store.disk_bytes == before
    del store._rows._cache.connect
    while idle(store):
        idle(store).pop().close()
    store.write(key, frames_of(50_000))
    for written, size in ((first, SMALL), (key, 50_000)):
        assert same(store.read(written, writable=False, verify=True), frames_of(size))


def test_a_failed_connection_is_closed_and_not_used_again(store: DiskcacheStore) -> None:
    """What it has begun ends with it: no transaction is left open, to make the next one fail."""
    store.write(uuid4(), frames_of(SMALL))
    (connection,) = idle(store)
    connection.execute("BEGIN IMMEDIATE")
    key = uuid4()
    with pytest.raises(StorageError, match="transaction"):
        store.write(key, frames_of(SMALL))
    assert connection not in idle(store)
    store.write(key, frames_of(SMALL))


def test_a_damaged_database_is_told_as_such(store: DiskcacheStore) -> None:
    keys = [uuid4() for _ in range(200)]
    store.write_many([(key, frames_of(SMALL)) for key in keys])
    (connection,) = idle(store)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    idle(store).pop().close()
    content = bytearray(database(store).read_bytes())
    content[4096:] = random_bytes(len(content) - 4096)
    database(store).write_bytes(content)
    with pytest.raises(CorruptBlobError, match="the database is"):
        store.read(keys[0], writable=False, verify=False)
    with pytest.raises(StorageError, match="cannot write"):
        store.write(uuid4(), frames_of(SMALL))


def test_what_is_no_database_is_damaged(store: DiskcacheStore) -> None:
    store.write(key := uuid4(), frames_of(SMALL))
    idle(store).pop().close()
    for name in DATABASE_FILES:
        if database(store).with_name(name).exists():
            database(store).with_name(name).write_bytes(random_bytes(8192))
    with pytest.raises(CorruptBlobError, match="not a database"):
        store.read(key, writable=False, verify=False)


def test_a_delete_that_fails_still_counts_and_may_be_tried_again(store: DiskcacheStore) -> None:
    nbytes = store.write(key := uuid4(), frames_of(SMALL))
    idle(store)[0].execute("PRAGMA query_only = 1")
    with pytest.raises(StorageError, match="cannot remove a row"):
        store.delete(key)
    assert store.disk_bytes == nbytes
    store.delete(key)
    assert store.disk_bytes == 0


# ------------------------------------------------------------------ nothing is unpickled


class Trap:
    sprung = False

    def __reduce__(self) -> Any:
        return _spring, ()


def _spring() -> None:
    Trap.sprung = True


@pytest.mark.parametrize("mode", [1, 2, 3, 4], ids=["raw", "binary", "text", "pickle"])
def test_a_row_that_diskcache_would_unpickle_is_refused(store: DiskcacheStore, mode: int) -> None:
    """CVE-2025-69872: what lies in the directory is data, whoever put it there."""
    store.write(key := uuid4(), frames_of(SMALL))
    altered(store, "UPDATE Cache SET mode = ?, value = ?", mode, pickle.dumps(Trap()))
    with pytest.raises(CorruptBlobError, match="does not start" if mode == 1 else "not one of fbcache's"):
        store.read(key, writable=False, verify=False)
    Path(store.path, NAME, "trap").write_bytes(pickle.dumps(Trap()))
    altered(store, "UPDATE Cache SET mode = ?, filename = 'trap', value = NULL", mode)
    with pytest.raises(CorruptBlobError):
        store.read(key, writable=False, verify=False)
    Path(store.path, NAME, "trap").unlink()
    assert not Trap.sprung


@pytest.mark.parametrize("value", ["text", 5, 2.5, None, b"short"])
def test_a_row_of_another_kind_is_damaged(store: DiskcacheStore, value: Any) -> None:
    store.write(key := uuid4(), frames_of(SMALL))
    altered(store, "UPDATE Cache SET value = ?", value)
    with pytest.raises(CorruptBlobError):
        store.read(key, writable=False, verify=False)


def test_nothing_but_bytes_goes_in(tmp_path: Path) -> None:
    disk = rows.BytesDisk(str(tmp_path))
    for call in (disk.put, lambda value: disk.store(value, False), lambda value: disk.get(value, False)):
        for value in ("text", 5, Trap(), bytearray(b"x"), None):
            with pytest.raises(ValueError, match="where bytes should be"):
                call(value)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ space


def test_deleted_space_is_given_back(store: DiskcacheStore) -> None:
    """And what is left is read as before."""
    keys = [uuid4() for _ in range(1500)]
    store.write_many([(key, frames_of(10_000, seed_of(0))) for key in keys])
    (connection,) = idle(store)
    full = connection.execute("PRAGMA page_count").fetchone()[0]
    for key in keys[::2] + keys[1:1400:2]:
        store.delete(key)
    left, free = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
    )
    assert left < full / 3 and free <= 256 + left // 4
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert database(store).stat().st_size == 4096 * left
    for key in keys[1401::2]:
        assert same(store.read(key, writable=False, verify=True), frames_of(10_000, seed_of(0)))


# ------------------------------------------------------------------ connections, threads and processes


def test_threads_that_come_and_go_share_a_few_connections(store: DiskcacheStore, tmp_path: Path) -> None:
    """All of which close() closes, from one thread."""
    key = uuid4()
    store.write(key, frames_of(SMALL))
    for _ in range(20):
        thread = threading.Thread(target=store.read, args=(key,), kwargs={"writable": False, "verify": True})
        thread.start()
        thread.join()
    assert len(idle(store)) == 1
    connections = list(idle(store))
    store.close()
    assert list(tmp_path.iterdir()) == []
    for connection in connections:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_a_connection_in_use_is_closed_when_its_call_ends(
    store: DiskcacheStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() during a write: the write fails, and leaves nothing."""
    inside, go = threading.Event(), threading.Event()
    used: list[sqlite3.Connection] = []
    real = rows.Rows._apply

    def apply(self: Any, change: Any) -> None:
        used.append(self._cache._con)
        inside.set()
        assert go.wait(PATIENCE)
        real(self, change)

    monkeypatch.setattr(rows.Rows, "_apply", apply)
    caught: list[BaseException] = []
    writer = threading.Thread(target=_catch, args=(caught, lambda: store.write(uuid4(), frames_of(SMALL))))
    writer.start()
    assert inside.wait(PATIENCE)
    store.close()
    go.set()
    writer.join()
    assert "is closed" in str(caught[0]) and isinstance(caught[0], StorageError)
    assert list(tmp_path.iterdir()) == [] and store.disk_bytes == 0
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        used[0].execute("SELECT 1")


def test_a_forked_child_leaves_the_parents_rows_alone(store: DiskcacheStore) -> None:
    store.write(key := uuid4(), frames_of(SMALL))
    pid = os.fork()
    if pid == 0:
        failures = 0
        for call in (
            lambda: store.write(uuid4(), frames_of(SMALL)),
            lambda: store.read(key, writable=False, verify=False),
        ):
            try:
                call()
                failures += 1
            except StorageError:
                pass
        store.close()
        os._exit(failures)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert same(store.read(key, writable=False, verify=True), frames_of(SMALL))


def test_closing_leaves_foreign_files_in_its_own_directory(tmp_path: Path) -> None:
    store = DiskcacheStore(str(tmp_path))
    store.write(uuid4(), frames_of(SMALL))
    (tmp_path / NAME / "mine.txt").write_text("mine")
    store.close()
    assert files_below(tmp_path) == [f"{NAME}/mine.txt"]


def test_closing_goes_on_after_a_file_that_will_not_go(tmp_path: Path, disk: FaultyDisk) -> None:
    store = DiskcacheStore(str(tmp_path), disk=disk)
    store.write_many([(uuid4(), frames_of(size)) for size in (SMALL, LARGE)])
    disk.fail("unlink", error=oserror(errno.EIO))
    with pytest.raises(StorageError):
        store.close()
    assert files_below(tmp_path) == [f"{NAME}/cache.db"]
    store.close()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ making one


def test_one_directory_serves_one_store(store: DiskcacheStore) -> None:
    store.write(key := uuid4(), frames_of(SMALL))
    with pytest.raises(StorageError, match="cannot make"):
        DiskcacheStore(store.path)
    assert same(store.read(key, writable=False, verify=True), frames_of(SMALL))


def test_a_path_that_diskcache_would_take_for_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELSEWHERE", "elsewhere")
    (tmp_path / "$ELSEWHERE").mkdir()
    with pytest.raises(StorageError, match="expands"):
        DiskcacheStore(str(tmp_path / "$ELSEWHERE"))
    assert [path.name for path in tmp_path.iterdir()] == ["$ELSEWHERE"]


@pytest.mark.parametrize("error", [sqlite3.OperationalError("unable to open"), oserror(errno.EIO)])
def test_a_database_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = rows._Cache.connect

    def connect(self: Any) -> Any:
        real(self).close()
        raise error

    monkeypatch.setattr(rows._Cache, "connect", connect)
    with pytest.raises(StorageError, match="cannot open"):
        DiskcacheStore(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_diskcache_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(rows.diskcache.Cache, "_con")
    with pytest.raises(StorageError, match="not known here"):
        DiskcacheStore(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_diskcache_is_named_with_its_extra(tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["diskcache"] = None
from fbcache import MissingLibraryError
from fbcache.store.diskcached import DiskcacheStore
try: DiskcacheStore({str(tmp_path)!r})
except MissingLibraryError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'fbcache[diskcache]'" in done.stdout and list(tmp_path.iterdir()) == []


def test_limits_hold_for_rows_and_files_together(tmp_path: Path) -> None:
    store = DiskcacheStore(str(tmp_path), limits=StoreLimits(max_disk=3 * LARGE))
    store.write(uuid4(), frames_of(2 * LARGE))
    results = store.write_many([(uuid4(), frames_of(10_000)) for _ in range(10)])
    assert 4 <= sum(isinstance(result, int) for result in results) <= 6
    with pytest.raises(DiskFullError):
        store.write(uuid4(), frames_of(LARGE))
    assert store.disk_bytes <= 3 * LARGE
    store.close()


def test_a_pool_spills_to_it_and_reads_back(tmp_path: Path) -> None:
    store = DiskcacheStore(str(tmp_path))
    with FBPool("1MB", store=store, io_threads=2) as pool:
        values = {number: random_bytes((100, 5000, LARGE)[number % 3], number) for number in range(60)}
        for name, value in values.items():
            pool.put(name, value)
        pool.evict()
        for name, value in values.items():
            with pool.get(name) as back:
                assert back == value
        for name in values:
            pool.delete(name)
        pool.drain()
    assert list(tmp_path.iterdir()) == []


def test_any_uuid_is_a_key(store: DiskcacheStore) -> None:
    keys = [UUID(int=0), UUID(int=2**128 - 1), UUID(int=1 << 120)]
    for number, key in enumerate(keys):
        store.write(key, frames_of(number))
    for number, key in enumerate(keys):
        assert same(store.read(key, writable=False, verify=True), frames_of(number))
