"""``TrackedStorage``: states with handles on a pool's entries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbcache import DeadlockError, Fb, FBPool, TrackedDirectory
from fbcache.actors import (
    ActorExistsError,
    CorruptSnapshotError,
    DirectoryStorage,
    NotPersistentError,
    PersistenceError,
    PersistenceKind,
    PersistentActor,
    SnapshotNotFoundError,
    TrackedStorage,
    own_snapshot,
)
from fbcache.actors.claims import claim
from fbcache.actors.storage import load, take
from tests.actors.counters import KillingDisk, Lists, killed_at
from tests.faults import oserror
from tests.powerloss import RecordingDisk, images


@own_snapshot
@dataclass
class Model(PersistentActor):
    weights: Fb
    fixed: Fb
    steps: int = 0

    def step(self) -> None:
        with self.weights.load_mut() as weights:
            weights += 1
        self.steps += 1
        self.save_snapshot()


@pytest.fixture
def storage(pool: FBPool, tmp_path: Path) -> TrackedStorage:
    return TrackedStorage(tmp_path / "actors", pool)


def blobs(storage: TrackedStorage, actor_id: str) -> dict[str, int]:
    root = Path(storage._files.directory_of(actor_id)) / "blobs"
    return {f.name: f.stat().st_ino for f in root.rglob("*") if len(f.name) == 32 and f.stat().st_size > 1000}


def handles(pool: FBPool, *values: float) -> list[Fb]:
    return [pool.insert(np.full(2000, value)) for value in values]


def contents(fbs: Any) -> list[float]:
    found = []
    for fb in fbs:
        with fb.load() as value:
            assert (value == value[0]).all()
            found.append(float(value[0]))
    return found


def test_values_come_back_as_handles_and_only_what_changed_is_written(
    pool: FBPool, storage: TrackedStorage
) -> None:
    ref = Model.spawn_persistent(storage, "m", tuple(handles(pool, 1.0, 9.0)))
    ref.proxy().step().get()
    ref.proxy().flush().get()
    before = blobs(storage, "m")
    ref.proxy().step().get()
    ref.proxy().flush().get()
    after = blobs(storage, "m")
    assert len(before) == len(after) == 2, "the former one's values are gone"
    assert len(before.items() & after.items()) == 1, "and what has not changed is the same file"
    ref.finish()
    ref = Model.respawn(storage, "m")
    proxy = ref.proxy()
    assert contents([proxy.weights.get(), proxy.fixed.get()]) == [3.0, 9.0]
    proxy.step().get()
    ref.finish()
    ref = Model.respawn(storage, "m")
    assert contents([ref.proxy().weights.get()]) == [4.0] and ref.proxy().steps.get() == 3
    ref.finish()
    with TrackedDirectory(f"{storage._files.directory_of('m')}/blobs") as tracked:
        assert not tracked.verify().damaged


def test_a_snapshot_sees_what_was_there_at_the_call(pool: FBPool, storage: TrackedStorage) -> None:
    (fb,) = handles(pool, 1.0)
    held = claim(storage, "m")
    taken = take(storage, "m", {"w": fb})
    with fb.load_mut() as value:
        value[:] = 2.0
    fb.drop()
    taken.write()
    taken.discard()
    assert contents([load(storage, "m")["w"]]) == [1.0]
    held.release()


def test_a_snapshot_that_is_given_up_leaves_nothing_in_the_pool(
    pool: FBPool, storage: TrackedStorage
) -> None:
    fbs = handles(pool, 1.0, 2.0)
    held = claim(storage, "m")
    for _ in range(3):
        take(storage, "m", fbs).discard()
    held.release()
    pool.drain()
    del fbs
    pool.drain()
    pool.validate()
    assert pool.stats().entries == 0


def test_handles_that_share_an_entry_come_back_as_one(pool: FBPool, storage: TrackedStorage) -> None:
    (fb,) = handles(pool, 1.0)
    ref = Lists.spawn_persistent(storage, "x", {"a": fb, "b": [fb, fb.clone()]})
    ref.proxy().put().get()
    ref.finish()
    ref = Lists.respawn(storage, "x")
    state = ref.proxy().state.get()
    assert state["a"] is state["b"][0] is state["b"][1]
    assert contents([state["a"]]) == [1.0]
    ref.finish()


def test_two_actors_with_one_handle_do_not_take_it_from_each_other(
    pool: FBPool, storage: TrackedStorage
) -> None:
    (fb,) = handles(pool, 1.0)
    one = Lists.spawn_persistent(storage, "one", {"w": fb})
    two = Lists.spawn_persistent(storage, "two", {"w": fb})
    one.proxy().put().get(), two.proxy().put().get()
    one.proxy().put(w=None).get()
    one.finish(), two.finish()
    assert not blobs(storage, "one")
    two = Lists.respawn(storage, "two")
    assert contents([two.proxy().state.get()["w"]]) == [1.0]
    two.finish()


def test_a_missing_or_damaged_value_is_a_corrupt_snapshot(pool: FBPool, storage: TrackedStorage) -> None:
    ref = Lists.spawn_persistent(storage, "x", {"w": handles(pool, 1.0)[0]})
    ref.proxy().put().get()
    ref.finish()
    root = Path(storage._files.directory_of("x")) / "blobs"
    (blob,) = (f for f in root.rglob("*") if f.name in blobs(storage, "x"))
    whole = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(b"x" + whole[1:])
    with pytest.raises(CorruptSnapshotError):
        Lists.respawn(storage, "x")
    blob.unlink()
    with pytest.raises(CorruptSnapshotError, match="missing"):
        Lists.respawn(TrackedStorage(storage._files.path, pool), "x")


def test_a_load_without_a_claim_is_no_absence(pool: FBPool, storage: TrackedStorage) -> None:
    ref = Lists.spawn_persistent(storage, "x", {})
    ref.proxy().put().get()
    ref.finish()
    with pytest.raises(NotPersistentError, match="nobody has claimed"):
        storage.load("x")


def test_a_snapshot_of_a_plain_directory_is_told(pool: FBPool, storage: TrackedStorage) -> None:
    plain = DirectoryStorage(storage._files.path)
    ref = Lists.spawn_persistent(plain, "x", {"a": 1})
    ref.proxy().put().get()
    ref.finish()
    with pytest.raises(PersistenceError, match="not made by a TrackedStorage") as caught:
        Lists.respawn(storage, "x")
    assert not isinstance(caught.value, CorruptSnapshotError)


def test_a_handle_elsewhere_is_refused_by_its_path(pool: FBPool, tmp_path: Path, storage: Any) -> None:
    (fb,) = handles(pool, 1.0)
    ref = Lists.spawn_persistent(DirectoryStorage(tmp_path / "plain"), "x", {"w": fb})
    with pytest.raises(PersistenceError, match=r"value\['w'\].*TrackedStorage") as caught:
        ref.proxy().put().get()
    assert caught.value.kind is PersistenceKind.SERIALIZE
    ref.finish()


def test_handles_of_another_pool_and_dropped_ones_are_refused(
    make_pool: Any, tmp_path: Path, storage: TrackedStorage, pool: FBPool
) -> None:
    ref = Lists.spawn_persistent(storage, "x", {})
    other = make_pool("1MB", directory=tmp_path / "other")
    with pytest.raises(PersistenceError, match="another pool"):
        ref.proxy().put(w=handles(other, 1.0)[0]).get()
    (fb,) = handles(pool, 1.0)
    fb.drop()
    with pytest.raises(PersistenceError, match="dropped"):
        ref.proxy().put(w=fb).get()
    ref.stop()


def test_saving_within_ones_own_write_guard_is_a_deadlock_error_that_leaves_nothing(
    pool: FBPool, storage: TrackedStorage
) -> None:
    class Inside(Lists):
        def save_inside(self) -> None:
            with self.state["w"].load_mut():
                self.save_snapshot()

    ref = Inside.spawn_persistent(storage, "x", {"v": handles(pool, 2.0)[0], "w": handles(pool, 1.0)[0]})
    with pytest.raises(DeadlockError):
        ref.proxy().save_inside().get()
    ref.proxy().put().get()
    ref.finish()


def test_a_value_that_needs_pickle_is_refused_as_serialize(pool: FBPool, storage: TrackedStorage) -> None:
    ref = Lists.spawn_persistent(storage, "x", {"w": pool.insert([Lists])})
    ref.proxy().put().get()
    with pytest.raises(PersistenceError) as caught:
        ref.proxy().flush().get()
    assert caught.value.kind is PersistenceKind.SERIALIZE
    ref.proxy().put(w=None).get()
    ref.finish()


def test_two_live_actors_of_an_id_are_refused_through_either_storage(
    pool: FBPool, storage: TrackedStorage
) -> None:
    ref = Lists.spawn_persistent(storage, "x", {})
    for other in (TrackedStorage(storage._files.path, pool), DirectoryStorage(storage._files.path)):
        with pytest.raises(ActorExistsError):
            Lists.spawn_persistent(other, "x", {})
    ref.finish()


def test_a_save_that_fails_on_the_way_is_tried_again_and_leaves_no_litter(
    pool: FBPool, tmp_path: Path
) -> None:
    disk = KillingDisk()  # that never kills
    storage = TrackedStorage(tmp_path / "a", pool, disk=disk)
    (fb,) = handles(pool, 1.0)
    held = claim(storage, "x")
    first = take(storage, "x", [fb])
    first.write(), first.discard()
    for call in ("rename", "fsync", "link", "writev"):
        with fb.load_mut() as value:
            value += 1
        taken = take(storage, "x", [fb])
        disk.fail(call, error=oserror(5))
        try:
            taken.write()
        except OSError:
            pass
        disk.clear()
        taken.write()
        taken.discard()
        assert len(blobs(storage, "x")) == 1, call
    assert contents(load(storage, "x")) == [5.0]
    held.release()


def test_a_loss_of_power_leaves_a_state_whose_values_are_whole(pool: FBPool, tmp_path: Path) -> None:
    (root := tmp_path / "real").mkdir()
    recording = RecordingDisk(root)
    storage = TrackedStorage(root / "a", pool, disk=recording)
    held = claim(storage, "x")
    (fb,) = handles(pool, 0.0)
    for number in range(3):
        with fb.load_mut() as value:
            value[:] = number
        taken = take(storage, "x", {"n": number, "w": fb})
        taken.write(), taken.discard()
        recording.mark(number)
    held.release()
    for number, image in enumerate(images(recording.log, 250)):
        (built := tmp_path / f"image-{number}").mkdir()
        image.build(built)
        found = -1
        again = TrackedStorage(built / "a", pool)
        claimed = claim(again, "x")
        try:
            state = load(again, "x")
            found = state["n"]
            assert contents([state.pop("w")]) == [float(found)], image
        except SnapshotNotFoundError:
            pass
        finally:
            claimed.release()
        assert len(image.marks) - 1 <= found <= len(image.marks), image


def test_a_directory_of_values_that_cannot_be_opened_leaves_the_id_free(
    pool: FBPool, storage: TrackedStorage
) -> None:
    root = Path(storage._files.directory_of("x"))
    root.mkdir(parents=True)
    (root / "blobs").write_bytes(b"mine")
    with pytest.raises(PersistenceError) as caught:
        Lists.spawn_persistent(storage, "x", {})
    assert caught.value.kind is PersistenceKind.IO
    assert (root / "blobs").read_bytes() == b"mine"
    (root / "blobs").unlink()
    Lists.spawn_persistent(storage, "x", {}).finish()


def test_a_kill_at_any_call_of_a_save_leaves_the_former_or_the_new_state(tmp_path: Path) -> None:
    """The pool is the child's own: threads do not survive a fork."""
    seen = []
    for nth in range(400):
        path = tmp_path / str(nth)

        def save(disk: KillingDisk, path: Path = path) -> None:
            left, disk.left = disk.left, None
            with FBPool("1MB", directory=path / "spill", min_free=0) as pool:
                storage = TrackedStorage(path / "a", pool, disk=disk)
                held = claim(storage, "x")
                one, two = handles(pool, 1.0, 2.0)
                former = take(storage, "x", {"s": [one, two], "n": 1})
                former.write(), former.discard()
                with two.load_mut() as value:
                    value[:] = 3.0
                del one
                disk.left = left
                new = take(storage, "x", {"s": [two], "n": 2})
                new.write(), new.discard()
                disk.left = None
                held.release()

        was_killed = killed_at(save, nth)
        with FBPool("1MB", directory=path / "spill2", min_free=0) as pool:
            storage = TrackedStorage(path / "a", pool)
            held = claim(storage, "x")
            state = load(storage, "x")
            found = state["n"], contents(state["s"])
            assert found in ((1, [1.0, 2.0]), (2, [3.0])), nth
            assert len(blobs(storage, "x")) == len(found[1]), "what the crash has left is gone"
            held.release()
            del state
        seen.append(found[0])
        if not was_killed:
            break
    # Threads share the calls out anew in each run, so the new state need not be there from one number on.
    assert not was_killed and (seen[0], seen[-1]) == (1, 2)
