"""The store in a file: what it keeps, who may open it, what it refuses, what damage does."""

from __future__ import annotations

import os
import sqlite3
from uuid import uuid4

import numpy as np
import pytest

from fbcache.errors import StorageError
from fbcache.saga import (
    CorruptSagaError,
    SagaCachedState,
    SagaCreateParams,
    SagaDag,
    SagaExistsError,
    SagaNodeEvent,
    SagaStoreError,
    SagaStoreInUseError,
    SqliteSagaStore,
    UnknownSagaError,
)
from fbcache.saga.encoding import decode, encode
from tests.saga.sagas import DIAMOND, STARTED, SUCCEEDED, TWO


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sagas ?#%.sqlite"  # a name that is not its own URI


@pytest.fixture
def store(path):
    with SqliteSagaStore(path) as store:
        yield store


def params(**fields):
    return SagaCreateParams(**{"id": uuid4(), "name": "test", "dag": SagaDag.of(TWO, {"n": 1}), **fields})


def test_what_was_recorded_is_there_for_the_next_process(path):
    given = params(name="näme\n", dag=SagaDag.of(DIAMOND, np.arange(3)))
    events = [
        SagaNodeEvent(given.id, "a", STARTED),
        SagaNodeEvent(given.id, "a", SUCCEEDED, encode(np.arange(1000.0))),
        SagaNodeEvent(given.id, "b", STARTED),
    ]
    with SqliteSagaStore(path) as store:
        store.saga_create(given)
        for event in events:
            store.record_event(event)
        store.saga_update(given.id, SagaCachedState.UNWINDING)
    with SqliteSagaStore(path) as store:
        record = store.saga_load(given.id)
    assert record.params == SagaCreateParams(given.id, given.name, given.dag, SagaCachedState.UNWINDING)
    assert record.events == tuple(events)
    assert np.array_equal(decode(record.events[1].payload), np.arange(1000.0))


@pytest.mark.parametrize("state", SagaCachedState)
def test_a_state_goes_to_a_string_and_back(store, state):
    assert SagaCachedState(str(state)) is state
    given = params()
    store.saga_create(given)
    store.saga_update(given.id, state)
    assert store.saga_load(given.id).params.state is state
    assert store.saga_list(unfinished=True) == ([] if state is SagaCachedState.DONE else [given.id])
    assert store.saga_list() == [given.id]


def test_every_commit_is_synced(store):
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._connection.isolation_level is None
    store.saga_create(params())
    assert not store._connection.in_transaction


def test_what_is_there_is_not_recorded_twice_and_what_is_not_is_refused(store):
    given = params()
    store.saga_create(given)
    with pytest.raises(SagaExistsError, match=str(given.id)):
        store.saga_create(params(id=given.id, name="other"))
    assert store.saga_load(given.id).params.name == "test"
    event = SagaNodeEvent(given.id, "n1", SUCCEEDED, encode(1))
    store.record_event(event)
    store.record_event(event)
    assert store.saga_load(given.id).events == (event,)
    with pytest.raises(SagaStoreError, match="another SUCCEEDED of node 'n1'"):
        store.record_event(SagaNodeEvent(given.id, "n1", SUCCEEDED, encode(2)))
    assert store.saga_load(given.id).events == (event,)
    unknown = uuid4()
    for call in (
        lambda: store.record_event(SagaNodeEvent(unknown, "n1", STARTED)),
        lambda: store.saga_update(unknown, SagaCachedState.DONE),
        lambda: store.saga_load(unknown),
    ):
        with pytest.raises(UnknownSagaError, match=str(unknown)):
            call()


# ------------------------------------------------------------------ who may open it


def test_one_writer_at_a_time_and_any_number_of_readers(path):
    with SqliteSagaStore(path) as store:
        with pytest.raises(SagaStoreInUseError, match="readonly=True"):
            SqliteSagaStore(path)
        given = params()
        store.saga_create(given)
        with SqliteSagaStore(path, readonly=True) as one, SqliteSagaStore(path, readonly=True) as other:
            assert one.saga_list() == other.saga_list() == [given.id]
            store.record_event(SagaNodeEvent(given.id, "n1", STARTED))
            assert len(one.saga_load(given.id).events) == 1
            with pytest.raises(SagaStoreError, match="readonly"):
                one.saga_update(given.id, SagaCachedState.DONE)
    with SqliteSagaStore(path) as store:
        assert store.saga_list() == [given.id]


def test_another_process_is_kept_out_until_the_holder_is_dead(path):
    reads, writes = os.pipe()
    stay, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = SqliteSagaStore(path)
        store.saga_create(params())
        os.write(writes, b"x")
        os.read(stay, 1)
        os._exit(1)
    os.read(reads, 1)
    try:
        with pytest.raises(SagaStoreInUseError):
            SqliteSagaStore(path)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        for fd in (reads, writes, stay, go):
            os.close(fd)
    with SqliteSagaStore(path) as store:
        assert len(store.saga_list()) == 1


def test_a_forked_child_cannot_use_its_parents_store(path):
    with SqliteSagaStore(path) as store:
        store.saga_create(params())
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                store.saga_list()
            except SagaStoreError:
                store.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(store.saga_list()) == 1
        with pytest.raises(SagaStoreInUseError):
            SqliteSagaStore(path)


def test_a_closed_store_says_so(store):
    store.close()
    store.close()
    with pytest.raises(SagaStoreError, match="closed"):
        store.saga_list()
    assert "closed" in repr(store)


# ------------------------------------------------------------------ what it refuses


def test_files_that_are_no_store_are_refused_and_not_changed(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"not a database" * 100)
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for path in (text, foreign):
        before = path.read_bytes()
        for readonly in (False, True):
            with pytest.raises(SagaStoreError) as caught:
                SqliteSagaStore(path, readonly=readonly)
            assert caught.value.path == str(path) and isinstance(caught.value, StorageError)
        assert path.read_bytes() == before
    (tmp_path / "folder").mkdir()
    for name, readonly in (("missing", True), ("folder", False), ("no/such", False), ("text/x", False)):
        with pytest.raises(SagaStoreError):
            SqliteSagaStore(tmp_path / name, readonly=readonly)
    assert not (tmp_path / "missing").exists() and not (tmp_path / "no").exists()


def test_an_empty_file_becomes_a_store_but_not_for_a_reader(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(SagaStoreError, match="no store"):
        SqliteSagaStore(tmp_path / "empty", readonly=True)
    with SqliteSagaStore(tmp_path / "empty") as store:
        assert store.saga_list() == []


def test_a_store_of_a_later_version_is_refused(path):
    SqliteSagaStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(SagaStoreError, match="version 2"):
        SqliteSagaStore(path)


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE saga SET dag = x'00' WHERE seq = 1",
        "UPDATE saga SET dag = 'text' WHERE seq = 1",
        "UPDATE saga SET state = 'odd' WHERE seq = 1",
        "UPDATE event SET kind = 9 WHERE saga = 1",
        "UPDATE event SET payload = x'0102' WHERE saga = 1",
        "UPDATE event SET payload = 'text' WHERE saga = 1",
    ],
)
def test_a_damaged_row_spoils_its_saga_only(store, damage):
    first, second = params(), params()
    for given in (first, second):
        store.saga_create(given)
        store.record_event(SagaNodeEvent(given.id, "n1", STARTED))
    store._connection.execute(damage)
    assert store.saga_list() == [first.id, second.id]
    with pytest.raises(CorruptSagaError, match=str(first.id)):
        store.saga_load(first.id)
    assert len(store.saga_load(second.id).events) == 1


def test_a_damaged_id_is_told(store):
    store.saga_create(params())
    store._connection.execute("UPDATE saga SET id = 'odd'")
    with pytest.raises(CorruptSagaError, match="id is damaged"):
        store.saga_list()


def test_threads_share_a_store(store, spawn):
    given = [params() for _ in range(4)]

    def work(each):
        store.saga_create(each)
        for node in ("n1", "n2"):
            store.record_event(SagaNodeEvent(each.id, node, STARTED))
        store.saga_update(each.id, SagaCachedState.DONE)

    for running in [spawn(work, each) for each in given]:
        running.result()
    assert set(store.saga_list()) == {each.id for each in given}
    assert all(len(store.saga_load(each.id).events) == 2 for each in given)
