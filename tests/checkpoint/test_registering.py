"""register: an entry of a blob that was there before, loaded by nobody, and safe beside its deletion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fbcache import NameTakenError, PoolClosedError, State, TrackedDirectory
from fbcache.adoptee import Adoptee
from fbcache.entry import Token
from tests.checkpoint.cuts import ITEM, MakeFaulty, Spawn, array, change, entry_of, nothing_is_left, state
from tests.conftest import MakePool, Sleepers
from tests.directories import blob_of, sessions_in


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "dir"


@pytest.fixture
def tracked(target: Path) -> Iterator[TrackedDirectory]:
    with TrackedDirectory(target) as tracked:
        yield tracked


@pytest.fixture
def keys(make_pool: MakePool, tracked: TrackedDirectory) -> list[Any]:
    """Keys of the values 0 to 3, persisted by a pool that is gone."""
    pool = make_pool()
    keys = [pool.insert(array(value)).persist(tracked) for value in range(4)]
    pool.close()
    return keys


def value_of(fb: Any) -> Any:
    with fb.load() as x:
        return x[0]


def test_register_reads_no_value_and_the_key_and_content_are_the_same(
    make_faulty_pool: MakeFaulty, tracked: TrackedDirectory, keys: list[Any]
) -> None:
    pool, disk = make_faulty_pool()
    fb = pool.register(tracked, keys[2], "two")
    assert (fb.key, fb.name, fb.state) == (keys[2], "two", State.SPILLED)
    assert disk.log == []
    assert pool.stats().loads == pool.stats().resident_bytes == 0
    assert value_of(fb) == pool["two"][0] == 2
    assert pool.stats().loads == 1
    assert fb.key == keys[2]


def test_registering_keeps_no_directory_open(make_pool: MakePool, target: Path, keys: list[Any]) -> None:
    with TrackedDirectory(target) as tracked:
        pool = make_pool()
        fb = pool.register(tracked, keys[0])
    assert value_of(fb) == 0


def test_entries_of_one_key_share_its_blob_and_nothing_else(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], target: Path
) -> None:
    """Each as separate as two puts: under two names, or none."""
    pool = make_pool()
    one = pool.register(tracked, keys[1], "one")
    other = pool.register(tracked, keys[1], "other")
    third = pool.register(tracked, keys[1])
    assert entry_of(pool, "one").token is entry_of(pool, "other").token
    change(pool, "one", 10)
    assert [value_of(fb) for fb in (one, other, third)] == [11, 1, 1]
    with third.load_mut() as x:
        x += 20
    assert [value_of(fb) for fb in (one, other, third)] == [11, 1, 21]
    assert other.key == keys[1] and len({one.key, other.key, third.key}) == 3
    pool.validate()
    for fb in (one, third, other):
        fb.drop()
    del x
    nothing_is_left(pool)
    assert sessions_in(target) == [], "a loan was not given back"
    assert blob_of(target, keys[1]).exists()


def test_the_last_of_several_owners_gives_the_loan_back(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], target: Path
) -> None:
    pool = make_pool()
    handles = [pool.register(tracked, keys[1]) for _ in range(5)]
    while handles:
        assert len(sessions_in(target)) == 1
        assert value_of(handles[-1]) == 1
        handles.pop().drop()
        pool.drain()
        pool.validate()
    assert sessions_in(target) == []


def test_a_deleted_key_stays_readable_for_who_registered_it(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], target: Path
) -> None:
    pool = make_pool()
    fb = pool.register(tracked, keys[3])
    tracked.delete(keys[3])
    assert not blob_of(target, keys[3]).exists()
    assert value_of(fb) == 3
    with pytest.raises(KeyError):
        pool.register(tracked, keys[3])


def test_a_taken_name_leaves_everything_as_it_was(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], target: Path
) -> None:
    pool = make_pool()
    pool.put("x", array(9))
    with pytest.raises(NameTakenError, match="'x'"):
        pool.register(tracked, keys[0], "x")
    pool.validate()
    assert pool["x"][0] == 9
    assert pool.stats().entries == 1
    assert sessions_in(target) == []
    assert pool._engine.residency.known == {}


def test_replace_takes_the_name_over_and_handles_keep_the_former_value(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any]
) -> None:
    pool = make_pool()
    former = pool.put("x", array(9))
    fb = pool.register(tracked, keys[0], "x", replace=True)
    assert pool["x"][0] == value_of(fb) == 0
    assert value_of(former) == 9
    assert former.name is None
    pool.validate()
    former.drop()
    fb.drop()
    pool.drain()
    assert pool.stats().entries == 1
    nothing_is_left(pool)


@pytest.mark.parametrize("key", ["absent", "no key"])
def test_what_is_not_there_registers_nothing(
    key: str, make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], target: Path
) -> None:
    pool = make_pool()
    with pytest.raises(KeyError if key == "absent" else TypeError):
        pool.register(tracked, uuid4() if key == "absent" else "x")  # type: ignore[arg-type]
    pool.validate()
    assert pool.stats().entries == 0
    assert sessions_in(target) == []


def test_register_all_brings_all_or_none(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], target: Path
) -> None:
    pool = make_pool()
    handles = pool.register_all(tracked)
    assert sorted(value_of(fb) for fb in handles) == [0, 1, 2, 3]
    assert {fb.key for fb in handles} == set(keys)
    del handles
    pool.drain()
    assert pool.stats().entries == 0
    blob_of(target, keys[2]).write_bytes(b"no blob")
    with pytest.raises(Exception, match=keys[2].hex):
        pool.register_all(tracked)
    pool.drain()
    pool.validate()
    assert pool.stats().entries == 0
    assert sessions_in(target) == []


# ---------------------------------------------------------------- while its last token is being dropped


class Persisted:
    """A pool whose own blob is in the directory too; its token's last share is about to go."""

    def __init__(self, make: MakeFaulty, tracked: TrackedDirectory) -> None:
        self.pool, self.disk = make(io_threads=1)
        self.tracked = tracked
        self.fb = self.pool.put("x", array(5))
        self.key = self.fb.persist(tracked)
        self.pool.evict()
        self.fb.drop()

    @property
    def token(self) -> Token:
        found: Token = self.pool._engine.residency.known[self.key]
        return found

    def check(self, fb: Any) -> None:
        self.pool.drain()
        self.pool.validate()
        assert (value_of(fb), fb.key) == (5, self.key)
        with fb.load_mut() as x:
            x += 1
        del x
        fb.drop()
        nothing_is_left(self.pool)
        assert self.key in self.tracked


@pytest.fixture
def persisted(make_faulty_pool: MakeFaulty, tracked: TrackedDirectory) -> Persisted:
    return Persisted(make_faulty_pool, tracked)


def test_register_before_the_deletion_has_begun_revives_the_token(persisted: Persisted) -> None:
    pool, disk = persisted.pool, persisted.disk
    gate = disk.gate("writev")
    writing = pool.put("busy", array(0)).spawn_write_now()
    gate.wait_reached()
    token = persisted.token
    pool.delete("x")
    assert token.shares == 0
    assert token in pool._engine.residency._deletions
    fb = pool.register(persisted.tracked, persisted.key)
    assert persisted.token is token and token.shares == 1
    gate.open()
    writing.result(30)
    pool.drain()
    assert disk.count("unlink") == 0
    persisted.check(fb)


def test_register_while_the_deletion_stands_at_the_disk_waits_for_its_end(
    persisted: Persisted, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool, disk = persisted.pool, persisted.disk
    token = persisted.token
    gate = disk.gate("unlink")
    pool.delete("x")
    gate.wait_reached()
    registering = spawn(pool.register, persisted.tracked, persisted.key)
    sleepers.next()
    assert not registering.done
    gate.open()
    fb = registering.result()
    assert persisted.token is not token
    persisted.check(fb)


def test_register_while_the_deletion_has_been_made_and_not_yet_told_waits_too(
    persisted: Persisted, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool, disk = persisted.pool, persisted.disk
    gate = disk.gate("unlink", after=True)
    pool.delete("x")
    gate.wait_reached()
    registering = spawn(pool.register, persisted.tracked, persisted.key)
    sleepers.next()
    gate.open()
    persisted.check(registering.result())


def test_register_after_the_deletion_lends_the_blob_anew(persisted: Persisted) -> None:
    pool = persisted.pool
    pool.delete("x")
    pool.drain()
    assert persisted.key not in pool._engine.residency.known
    persisted.check(pool.register(persisted.tracked, persisted.key))


def test_register_while_a_deletion_fails_gets_the_value(
    persisted: Persisted, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool, disk = persisted.pool, persisted.disk
    gate = disk.gate("unlink")
    disk.fail("unlink", error=OSError(5, "input/output error"))
    pool.delete("x")
    gate.wait_reached()
    registering = spawn(pool.register, persisted.tracked, persisted.key)
    sleepers.next()
    gate.open()
    fb = registering.result()
    with suppress(OSError):
        pool.drain()
    assert value_of(fb) == 5
    pool.validate()


def test_several_that_register_during_a_deletion_share_one_token(
    persisted: Persisted, spawn: Spawn, sleepers: Sleepers
) -> None:
    pool, disk = persisted.pool, persisted.disk
    gate = disk.gate("unlink")
    pool.delete("x")
    gate.wait_reached()
    registering = [spawn(pool.register, persisted.tracked, persisted.key) for _ in range(4)]
    for _ in registering:
        sleepers.next()
    gate.open()
    handles = [each.result() for each in registering]
    assert persisted.token.shares == 4
    for fb in handles[1:]:
        assert value_of(fb) == 5
        fb.drop()
    persisted.check(handles[0])


def test_closing_the_pool_ends_the_wait_for_a_deletion(
    persisted: Persisted, spawn: Spawn, sleepers: Sleepers, target: Path
) -> None:
    pool, disk = persisted.pool, persisted.disk
    gate = disk.gate("unlink")
    pool.delete("x")
    gate.wait_reached()
    registering = spawn(pool.register, persisted.tracked, persisted.key)
    sleepers.next()
    closing = spawn(pool.close)
    assert isinstance(registering.error(), PoolClosedError)
    gate.open()
    closing.result()
    assert sessions_in(target) == []


def test_a_loan_that_is_dropped_and_taken_again_at_once_is_never_read_from_nowhere(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], spawn: Spawn, target: Path
) -> None:
    pool = make_pool(4 * ITEM, io_threads=2)

    def churn(value: int) -> None:
        for _ in range(30):
            fb = pool.register(tracked, keys[value])
            assert value_of(fb) == value
            fb.drop()

    threads = [spawn(churn, n % 2) for n in range(4)]
    for thread in threads:
        thread.result()
    pool.drain()
    pool.validate()
    nothing_is_left(pool)
    assert sessions_in(target) == []


# --------------------------------------------------------------------------- what is left behind


def test_an_adoptee_that_is_forgotten_leaves_no_entry(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any]
) -> None:
    """Invariant 7: an interrupt may come before a handle has taken its entry over."""
    pool = make_pool()
    residency = pool._engine.residency
    adoptee = Adoptee("x", Token(keys[0], 100, unverified=True), 100, None)
    assert residency.run(residency.adopt, [adoptee], None) is None
    assert pool.stats().entries == 1
    del adoptee
    pool.drain()
    assert pool.stats().entries == 0
    assert residency.known == {}


def test_saving_what_was_registered_links_the_same_file(
    make_pool: MakePool, tracked: TrackedDirectory, keys: list[Any], tmp_path: Path
) -> None:
    pool = make_pool()
    pool.register(tracked, keys[1], "one")
    pool.save(tracked)
    pool.save(tmp_path / "other")
    assert state(pool, "one") is State.SPILLED
    places = (Path(tracked.path), tmp_path / "other")
    assert len({blob_of(place, keys[1]).stat().st_ino for place in places}) == 1
