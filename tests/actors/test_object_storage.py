"""``ObjectStorage`` on the stores that need no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import LocalStore, MemoryStore

from fbcache import StorageError
from fbcache.actors import ActorExistsError, CorruptSnapshotError, ObjectStorage, SnapshotNotFoundError
from tests.actors.counters import Counter


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path)


def test_bytes_come_back_under_their_prefix_and_others_objects_are_left_alone(store: Any) -> None:
    obstore.put(store, "mine", b"mine")
    storage = ObjectStorage(store, prefix="/states/of/")
    with pytest.raises(SnapshotNotFoundError):
        storage.try_read("../x")
    for data in (b"", b"abc", bytes(100_000)):
        storage.try_write("../x", data)
        assert ObjectStorage(store, prefix="states/of").try_read("../x") == data
    names = {each["path"] for each in obstore.list(store).collect()}
    assert names == {"mine", storage.path_of("../x")} and storage.path_of("../x").startswith("states/of/x-")
    assert obstore.get(store, "mine").bytes() == b"mine"
    with pytest.raises(SnapshotNotFoundError):
        ObjectStorage(store).try_read("../x")


def test_every_truncation_and_damage_of_an_object_is_an_error(store: Any) -> None:
    storage = ObjectStorage(store)
    storage.try_write("x", b"state" * 10)
    path = storage.path_of("x")
    whole = bytes(obstore.get(store, path).bytes())
    for damaged in [*(whole[:n] for n in range(len(whole))), whole + b"\0", whole[:-1] + b"\xff"]:
        obstore.put(store, path, damaged)
        with pytest.raises(CorruptSnapshotError) as caught:
            storage.try_read("x")
        assert path in caught.value.where
    storage.try_write("x", b"new")
    assert storage.try_read("x") == b"new"


def test_another_actors_object_in_its_place_is_damage(store: Any) -> None:
    storage = ObjectStorage(store)
    storage.try_write("x", b"state")
    obstore.put(store, storage.path_of("y"), bytes(obstore.get(store, storage.path_of("x")).bytes()))
    with pytest.raises(CorruptSnapshotError, match="another key"):
        storage.try_read("y")


def test_a_store_that_fails_is_a_storage_error_and_no_absence(tmp_path: Path) -> None:
    storage = ObjectStorage(LocalStore(tmp_path))
    (tmp_path / storage.path_of("x")).mkdir()
    with pytest.raises(StorageError, match="cannot put"):
        storage.try_write("x", b"state")
    nothing: Any = object()
    with pytest.raises(StorageError, match="cannot get"):
        ObjectStorage(nothing).try_read("x")


def test_two_storages_on_one_store_know_of_each_other(store: Any) -> None:
    ref = Counter.spawn_persistent(ObjectStorage(store), "c", 1)
    with pytest.raises(ActorExistsError):
        Counter.spawn_persistent(ObjectStorage(store), "c", 1)
    Counter.spawn_persistent(ObjectStorage(store, prefix="other"), "c", 1).finish()
    ref.finish()
