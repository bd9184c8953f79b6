"""Snapshots as bytes: every damage is an error, no code runs, ids and versions are held."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbcache import MsgpackCodec, UnsupportedTypeError, register
from fbcache.actors import (
    ActorExistsError,
    CorruptSnapshotError,
    DirectoryStorage,
    MemoryStorage,
    PersistenceError,
    PersistenceKind,
    SnapshotNotFoundError,
)
from fbcache.actors.naming import key_of, name_of
from fbcache.actors.snapshot import decode, encode, seal, unseal
from fbcache.codec import registry
from fbcache.codec.layout import VERSION, pack
from tests.actors.counters import Lists

STATE = {"count": 15, "weights": np.arange(700.0), "names": ["a", ("b", None)], "raw": b"\0" * 9}


def same(got: Any) -> bool:
    plain = {name: value for name, value in got.items() if name != "weights"}
    expected = {name: value for name, value in STATE.items() if name != "weights"}
    return plain == expected and np.array_equal(got["weights"], STATE["weights"])


def test_a_state_comes_back() -> None:
    assert same(decode("x", encode("x", STATE), "memory"))


@pytest.mark.parametrize("which", ["snapshot", "sealed"])
def test_every_truncation_is_a_corrupt_snapshot(which: str) -> None:
    whole = encode("x", STATE)
    if which == "sealed":
        whole = b"".join(seal("x", whole).pieces)
    read = decode if which == "snapshot" else unseal
    for length in range(len(whole)):
        with pytest.raises(CorruptSnapshotError):
            read("x", whole[:length], "memory")
    with pytest.raises(CorruptSnapshotError):
        read("x", whole + b"\0", "memory")


@pytest.mark.parametrize("which", ["snapshot", "sealed"])
def test_every_flipped_byte_is_a_typed_error_and_never_a_state(which: str) -> None:
    whole = encode("x", STATE)
    if which == "sealed":
        whole = b"".join(seal("x", whole).pieces)
    read = decode if which == "snapshot" else unseal
    kinds = []
    for position in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            with pytest.raises(PersistenceError) as caught:
                read("x", damaged, "memory")
            assert caught.value.kind is PersistenceKind.DESERIALIZE
            kinds.append((position, type(caught.value)))
    others = {position for position, kind in kinds if kind is not CorruptSnapshotError}
    assert others == {6, 7}, "the version alone may be a later fbcache's"


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(PersistenceError):
        decode("x", raw, "memory")


def test_a_later_version_is_not_damage_and_not_replaced_by_the_default() -> None:
    storage = MemoryStorage()
    later = bytearray(encode("x", {"a": 1}))
    later[6:8] = (VERSION + 1).to_bytes(2, "little")
    storage.try_write("x", bytes(later))
    with pytest.raises(PersistenceError, match=f"version {VERSION + 1} of the layout") as caught:
        Lists.respawn_or(storage, "x", default_args={}, on_corrupt="default")
    assert type(caught.value) is PersistenceError


def test_another_actors_snapshot_is_none() -> None:
    with pytest.raises(CorruptSnapshotError, match="another key"):
        decode("y", encode("x", STATE), "memory")
    with pytest.raises(CorruptSnapshotError, match="another key"):
        unseal("y", b"".join(seal("x", b"abc").pieces), "memory")


def test_a_snapshot_that_is_not_sealed_is_no_file_of_a_storage() -> None:
    with pytest.raises(CorruptSnapshotError, match="another kind of blob"):
        unseal("x", encode("x", STATE), "memory")


# ------------------------------------------------------------------ pickle, classes


class Unregistered:
    pass


@pytest.mark.parametrize(
    ("state", "path"),
    [
        (Unregistered(), "value"),
        ({"a": [1, Unregistered()]}, r"value\['a'\]\[1\]"),
        (Counter(a=1), "value"),
        ([lambda: None], r"value\[0\]"),
    ],
    ids=["itself", "within", "subclass", "function"],
)
def test_what_needs_pickle_is_refused_by_its_path(state: Any, path: str) -> None:
    with pytest.raises(PersistenceError, match=path) as caught:
        encode("x", state)
    assert caught.value.kind is PersistenceKind.SERIALIZE


def test_a_pickle_in_a_snapshot_is_not_loaded() -> None:
    frames = MsgpackCodec().encode({"a": Unregistered()}, allow_pickle=True)
    raw = b"".join(pack(key_of("x"), frames).pieces)
    with pytest.raises(PersistenceError, match=r"a pickle, at value\['a'\]") as caught:
        decode("x", raw, "memory")
    assert caught.value.kind is PersistenceKind.DESERIALIZE
    assert not isinstance(caught.value, CorruptSnapshotError)


def test_a_class_that_is_not_registered_any_more_is_no_damage() -> None:
    @dataclass
    class Point:
        x: int

    register(Point, name="tests.actors.point")
    raw = encode("x", Point(3))
    registry._by_type.pop(registry._by_name.pop("tests.actors.point").cls)
    with pytest.raises(PersistenceError, match="not registered") as caught:
        decode("x", raw, "memory")
    assert isinstance(caught.value.__cause__, UnsupportedTypeError)
    assert not isinstance(caught.value, CorruptSnapshotError)


def test_whole_bytes_that_describe_no_value_are_not_replaced_by_a_default() -> None:
    frames = MsgpackCodec().encode([1], allow_pickle=False)
    raw = b"".join(pack(key_of("x"), type(frames)(frames.codec, b"\xc1", ())).pieces)
    with pytest.raises(PersistenceError) as caught:
        decode("x", raw, "memory")
    assert type(caught.value) is PersistenceError


# ------------------------------------------------------------------ cost


def test_a_snapshot_costs_one_copy_of_its_arrays() -> None:
    array = np.ones(4 << 20, np.uint8)
    tracemalloc.start()
    try:
        raw = encode("x", {"a": array})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(raw) > array.nbytes
    assert peak < 1.1 * array.nbytes


def test_arrays_that_come_back_are_their_owners_alone() -> None:
    raw = bytearray(encode("x", {"a": np.zeros(5000)}))
    one, two = decode("x", raw, "memory"), decode("x", raw, "memory")
    one["a"][:] = 1
    assert not two["a"].any() and raw == encode("x", {"a": np.zeros(5000)})


# ------------------------------------------------------------------ ids


@given(st.lists(st.text(alphabet=st.characters(), max_size=300), min_size=2, max_size=2, unique=True))
def test_different_ids_have_different_names_that_any_file_system_takes(ids: list[str]) -> None:
    one, two = map(name_of, ids)
    assert one.lower() != two.lower()
    assert set(one) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and len(one) <= 65


def test_names_stay_as_they_are_for_files_have_them() -> None:
    assert name_of("Counter 5") == "counter_5-fa3b7d4d88b7b3a85bb311ef6b964477"
    assert name_of("") == "-" + key_of("").hex


# ------------------------------------------------------------------ errors


def test_errors_can_be_pickled_and_copied(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path)
    with pytest.raises(SnapshotNotFoundError) as absent:
        storage.try_read("x")
    errors: list[Exception] = [
        PersistenceError("m", actor_id="x", kind=PersistenceKind.IO),
        CorruptSnapshotError("r", actor_id="x", where="w"),
        ActorExistsError("m", actor_id="x", host="h", pid=7),
        absent.value,
    ]
    for error in errors:
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
