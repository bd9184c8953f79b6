"""Records in a file: whole bulks, found again, after a kill too; damage and foreign files are told apart."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pytest

from fbcache import DiskFullError, StorageError, UnsupportedTypeError
from fbcache.codec import registry
from fbcache.events import EventKind, PoolEvent
from fbcache.recorder import (
    CorruptRecordsError,
    Facets,
    ForeignFileError,
    MemoryStorage,
    Query,
    Recorder,
    RecorderError,
    RecordsRefusedError,
    Retry,
    SqliteStorage,
    facets_of,
)
from fbcache.recorder.book import Book
from tests.faults import PATIENCE
from tests.recorder.gated import patient


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.db"


def written(path, *records, **options):
    with SqliteStorage(path, **options) as storage, Recorder.start(storage) as recorder:
        for record in records:
            recorder.save(record)


def read(path, query=None):
    with SqliteStorage(path, readonly=True) as storage:
        return asyncio.run(storage.load(query))


def statements(storage):
    heard = []
    storage._book._connection.set_trace_callback(heard.append)
    return heard


def test_what_is_saved_is_read_again_in_order(path):
    event = PoolEvent(1.5, EventKind.LOAD, "'a'", str(uuid.uuid4()), 10, 0.25, "")
    records = [{"kind": "a", 1: (2, None)}, "text", 7, event, {"array": 1.5}]
    written(path, *records)
    assert read(path) == records
    written(path, "more")
    assert read(path) == [*records, "more"]


def test_an_array_in_a_record_is_checked_and_read_again(path):
    written(path, {"a": np.arange(1000), "b": np.ones(3)})
    (record,) = read(path)
    assert record["a"].sum() == 499_500 and list(record["b"]) == [1, 1, 1]
    with sqlite3.connect(path) as other:
        (blob,) = other.execute("SELECT record FROM records").fetchone()
        other.execute("UPDATE records SET record = ?", (blob[:-1] + b"x",))
    other.close()
    with pytest.raises(CorruptRecordsError, match="buffer"):
        read(path)


def test_a_bulk_is_one_transaction(path):
    with SqliteStorage(path) as storage:
        heard = statements(storage)
        asyncio.run(storage.save(["a", "b", "c"]))
        assert [h.split()[0] for h in heard] == ["BEGIN", "INSERT", "INSERT", "INSERT", "COMMIT"]


def test_it_logs_ahead_and_syncs_each_bulk_unless_told_not_to(path):
    def pragmas(**options):
        with SqliteStorage(path, **options) as storage:
            run = storage._book._connection.execute
            return [run(f"PRAGMA {what}").fetchone()[0] for what in ("journal_mode", "synchronous")]

    assert pragmas() == ["wal", 2]
    assert pragmas(durable=False) == ["wal", 1]


def test_no_call_of_sqlites_runs_on_the_loop(path):
    async def main():
        with SqliteStorage(path) as storage:
            seen = set()
            storage._book._connection.set_trace_callback(lambda _: seen.add(threading.get_ident()))
            async with Recorder(storage) as recorder:
                recorder.save(1)
                await recorder.records()
            assert seen and threading.get_ident() not in seen

    asyncio.run(main())


QUERIES = [
    None,
    Query(),
    Query(kind="a"),
    Query(kind=["a", "b"], since=2),
    Query(key="k1"),
    Query(name=["n", "m"], limit=2),
    Query(since=2, until=4),
    Query(since=datetime.fromtimestamp(3, UTC)),
    Query(until=datetime.fromtimestamp(3)),
    Query(kind=EventKind.LOAD),
    Query(kind=[]),
    Query(limit=3),
    Query(limit=0),
    Query(kind="a", key="k2", since=5),
]


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_a_file_and_memory_answer_a_query_alike(path, query):
    records = [
        {"time": t, "kind": kind, "key": f"k{t % 3}", "name": name, "t": t}
        for t, (kind, name) in enumerate([("a", "n"), ("b", "m"), ("load", "n"), ("a", None)] * 3)
    ]
    written(path, *records)
    assert read(path, query) == asyncio.run(MemoryStorage(records).load(query))


def test_facets_come_from_attributes_items_or_the_programs_own_function(path):
    @dataclass
    class Thing:
        time: datetime
        kind: EventKind
        key: uuid.UUID

    key = uuid.uuid4()
    moment = datetime(2026, 1, 31, tzinfo=UTC)
    assert facets_of(Thing(moment, EventKind.LOAD, key)) == Facets(moment.timestamp(), "load", str(key), None)
    assert facets_of(17) == Facets()
    written(path, 1, 2, facets=lambda record: Facets(kind=f"k{record}"))
    assert read(path, Query(kind="k2")) == [2]


def test_a_record_without_a_time_gets_that_of_its_bulk(path):
    before = datetime.now(UTC)
    written(path, "x")
    assert read(path, Query(since=before)) == ["x"]
    assert read(path, Query(until=before)) == []


def test_a_record_that_cannot_be_encoded_surfaces_and_the_others_are_written(path):
    odd = object()
    with SqliteStorage(path) as storage:
        with pytest.raises(RecordsRefusedError) as refused:
            asyncio.run(storage.save(["a", odd, {"time": "never"}]))
        assert set(refused.value.refused) == {1, 2}
        recorder = Recorder.start(storage)
        recorder.save("a")
        recorder.save(odd)
        recorder.save("b")
        with pytest.raises(RecorderError) as caught:
            recorder.close()
        assert caught.value.unsaved == (odd,)
        assert recorder.close() is storage
    assert read(path) == ["a", "b"]


def test_a_full_disk_loses_nothing_and_goes_on_when_there_is_room(path):
    with SqliteStorage(path) as storage:
        limit = storage._book._connection.execute
        limit("PRAGMA max_page_count = 12")
        recorder = Recorder.start(storage, retry=patient(2)[0])
        recorder.save("small")
        recorder.records()
        recorder.save("large" * 10_000)
        with pytest.raises(RecorderError) as caught:
            recorder.records()
        cause = caught.value.__cause__
        assert isinstance(cause, DiskFullError)
        assert cause.needed > 50_000 and cause.free > 0 and cause.path == str(path)
        assert caught.value.unsaved == ("large" * 10_000,)
        assert read(path) == ["small"]
        limit("PRAGMA max_page_count = 1000000")
        assert recorder.close() is storage
    assert [len(r) for r in read(path)] == [5, 50_000]


def test_a_bulk_that_fails_half_way_leaves_nothing_and_the_next_one_is_written(path):
    with SqliteStorage(path) as storage:
        run = storage._book._connection.execute
        run(
            "CREATE TEMP TRIGGER fails BEFORE INSERT ON records WHEN NEW.kind = 'bad' "
            "BEGIN SELECT RAISE(FAIL, 'half way'); END"
        )
        with pytest.raises(StorageError, match="half way"):
            asyncio.run(storage.save(["a", {"kind": "bad"}]))
        asyncio.run(storage.save(["b"]))
    assert read(path) == ["b"]


def test_a_file_that_another_one_has_locked_is_tried_again(path):
    written(path, 0)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with SqliteStorage(path) as storage:
        storage._book._connection.execute("PRAGMA busy_timeout = 0")
        slept = []

        async def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 2:
                await asyncio.to_thread(other.execute, "ROLLBACK")

        with Recorder.start(storage, retry=Retry(delays=(1.0,) * 5, sleep=sleep)) as recorder:
            recorder.save(1)
            assert recorder.records() == [0, 1]
        assert slept == [1.0, 1.0]
    other.close()


def test_two_storages_write_to_one_file(path):
    with SqliteStorage(path) as one, SqliteStorage(path) as two:
        with Recorder.start(one) as first, Recorder.start(two) as second:
            for number in range(100):
                first.save(("first", number))
                second.save(("second", number))
    for who in ("first", "second"):
        assert [n for w, n in read(path) if w == who] == list(range(100))


# ------------------------------------------------------------------ files that are something else


@pytest.mark.parametrize("readonly", [False, True])
def test_another_programs_file_is_refused_and_left_as_it_is(path, readonly):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE records (seq, record)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(ForeignFileError, match=r"records\.db is no file of records"):
        SqliteStorage(path, readonly=readonly)
    assert path.read_bytes() == before
    path.write_text("not a database at all, but long enough to be taken for one" * 20)
    with pytest.raises(ForeignFileError, match="no SQLite file"):
        SqliteStorage(path, readonly=readonly)


def test_a_file_of_a_newer_version_is_refused(path):
    written(path, 1)
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 2")
    other.close()
    with pytest.raises(ForeignFileError, match="version is 2"):
        SqliteStorage(path)


def test_an_empty_file_becomes_one_of_records_but_not_for_a_reader(path):
    path.touch()
    with pytest.raises(ForeignFileError):
        SqliteStorage(path, readonly=True)
    written(path, 1)
    assert read(path) == [1]


@pytest.mark.parametrize("name", ["a?mode=rwc", "b#c", "d%20e", "f g"])
def test_a_path_is_taken_as_it_is_also_by_readers(tmp_path, name):
    written(tmp_path / name, 1)
    assert read(tmp_path / name) == [1]
    assert os.listdir(tmp_path) == [name]


def test_two_who_make_the_file_at_once_both_have_it(path, monkeypatch):
    create = Book._create

    def slower(book):
        monkeypatch.setattr(Book, "_create", create)
        written(path, "other")
        create(book)

    monkeypatch.setattr(Book, "_create", slower)
    written(path, "own")
    assert read(path) == ["other", "own"]


def test_a_file_that_is_not_there_or_cannot_be_is_a_storage_error(path, tmp_path):
    with pytest.raises(StorageError, match=r"records\.db"):
        SqliteStorage(path, readonly=True)
    assert not path.exists()
    with pytest.raises(StorageError):
        SqliteStorage(tmp_path / "no" / "such")
    with pytest.raises(StorageError):
        SqliteStorage(tmp_path)


def test_a_damaged_record_is_told_by_its_checksum(path):
    written(path, "a", "b")
    with sqlite3.connect(path) as other:
        (blob,) = other.execute("SELECT record FROM records WHERE seq = 2").fetchone()
        for damaged in (blob[:-1] + b"x", blob[:10], b"", 5):
            other.execute("UPDATE records SET record = ? WHERE seq = 2", (damaged,))
            other.commit()
            with pytest.raises(CorruptRecordsError, match="record 2") as caught:
                read(path)
            assert caught.value.path == str(path)
            assert read(path, Query(until=0)) == []  # the others are not touched
    other.close()


def test_damaged_pages_are_told(path):
    written(path, *("x" * 500 for _ in range(100)))
    raw = bytearray(path.read_bytes())
    raw[4096 * 2 :] = b"\xff" * (len(raw) - 4096 * 2)
    path.write_bytes(raw)
    with pytest.raises(CorruptRecordsError):
        read(path)


def test_a_class_that_is_not_registered_any_more_is_told(path, monkeypatch):
    written(path, PoolEvent(1.0, EventKind.LOAD, None, None, 1))
    monkeypatch.delitem(registry._by_name, "fbcache.PoolEvent")
    with pytest.raises(UnsupportedTypeError, match="PoolEvent"):
        read(path)


# ------------------------------------------------------------------ ends


def test_a_closed_or_readonly_storage_says_so(path):
    storage = SqliteStorage(path)
    storage.close()
    storage.close()
    for call in (storage.save(["a"]), storage.load()):
        with pytest.raises(StorageError, match="closed"):
            asyncio.run(call)
    with SqliteStorage(path, readonly=True) as reader:
        with pytest.raises(StorageError, match="reading only"):
            asyncio.run(reader.save(["a"]))
        with pytest.raises(TypeError, match="Query"):
            asyncio.run(reader.load("kind"))
    assert read(path) == []


def test_closing_ends_the_thread(path):
    before = threading.active_count()
    SqliteStorage(path).close()
    assert threading.active_count() == before


def test_closing_folds_the_log_in(path):
    written(path, 1)
    assert os.listdir(path.parent) == [path.name]


def test_a_dropped_storage_closes_its_file_and_thread(path):
    written(path, 1)
    storage = SqliteStorage(path)
    asyncio.run(storage.save([2]))
    del storage  # the fixture finds leaks
    assert read(path) == [1, 2]


def test_a_reader_beside_a_writer_sees_whole_bulks(path):
    with SqliteStorage(path) as storage:
        asyncio.run(storage.save([1, 2]))
        assert read(path) == [1, 2]
        asyncio.run(storage.save([3]))
        assert read(path) == [1, 2, 3]


WRITER = """
    import os, signal, sys
    from fbcache.recorder import Recorder, SqliteStorage
    storage = SqliteStorage(sys.argv[1])
    recorder = Recorder.start(storage)
"""


def child(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER) + textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("acknowledged", [1, 2, 5, 20])
def test_what_records_has_acknowledged_survives_a_kill(path, acknowledged):
    script = """
        number = 0
        while True:
            for _ in range(37):
                recorder.save(number)
                number += 1
            recorder.records()
            print(number, flush=True)
    """
    with child(script, path) as writer:
        for _ in range(acknowledged):
            least = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(PATIENCE)
    found = read(path)
    assert len(found) >= least
    assert found == list(range(len(found)))


def test_a_kill_within_a_transaction_leaves_none_of_its_bulk(path):
    script = """
        recorder.save("before")
        recorder.records()
        connection = storage._book._connection
        connection.set_trace_callback(lambda s: s == "COMMIT" and os.kill(os.getpid(), signal.SIGKILL))
        for number in range(500):
            recorder.save(number)
        recorder.records()
        print("not reached")
    """
    with child(script, path) as writer:
        assert writer.wait(PATIENCE) == -signal.SIGKILL
    assert read(path) == ["before"]


def test_what_close_has_acknowledged_survives_a_kill(path):
    script = """
        for number in range(500):
            recorder.save(number)
        recorder.close()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with child(script, path) as writer:
        assert writer.wait(PATIENCE) == -signal.SIGKILL
    assert read(path) == list(range(500))
