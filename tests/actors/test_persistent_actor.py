"""Actors whose state outlives them: starting, restoring, ending, and one live actor for an id."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pykka
import pytest
from pykka._envelope import Envelope
from pykka.messages import ProxyCall

from fbcache import FBCacheWarning
from fbcache.actors import (
    ActorExistsError,
    Args,
    CorruptSnapshotError,
    DirectoryStorage,
    MemoryStorage,
    NotPersistentError,
    ObjectStorage,
    PersistenceError,
    PersistenceKind,
    PersistentActor,
    SnapshotNotFoundError,
    TrackedStorage,
)
from fbcache.actors.life import Life
from fbcache.actors.snapshot import encode
from tests.actors.counters import Counter, Lists, SlowStorage
from tests.faults import PATIENCE, Gate, oserror


@pytest.fixture(params=["memory", "directory", "objects", "local objects", "tracked"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        return MemoryStorage()
    if request.param == "directory":
        return DirectoryStorage(tmp_path / "actors")
    if request.param == "tracked":
        pool = request.getfixturevalue("pool")
        request.getfixturevalue("no_actor_is_left")
        return TrackedStorage(tmp_path / "actors", pool)
    from obstore.store import LocalStore, MemoryStore

    return ObjectStorage(MemoryStore() if request.param == "objects" else LocalStore(tmp_path), prefix="a/b")


# ------------------------------------------------------------------ state that outlives its actor


def test_a_counter_that_was_stopped_goes_on_where_it_was(storage: Any) -> None:
    ref = Counter.spawn_persistent(storage, "c", 5)
    assert ref.proxy().add(10).get() == 15
    ref.stop()
    again = Counter.respawn(storage, "c")
    assert again.proxy().get().get() == 15
    again.finish()


def test_spawning_takes_the_snapshot_rather_than_the_arguments(storage: Any) -> None:
    Counter.spawn_persistent(storage, "c", 5).proxy().add(10).get()
    pykka.ActorRegistry.stop_all()
    ref = Counter.spawn_persistent(storage, "c", 99)
    assert ref.proxy().get().get() == 15
    ref.finish()


def test_without_a_snapshot_it_starts_from_the_default_and_has_the_id(storage: Any) -> None:
    ref = Counter.respawn_or(storage, "new", default_args=(7, 2))
    assert ref.actor_id == "new" == ref.proxy().actor_id.get()
    assert ref.proxy().get().get() == 7
    assert ref.proxy().add(1).get() == 9
    ref.finish()
    with_snapshot = Counter.respawn_or(storage, "new", default_args=0)
    assert with_snapshot.proxy().get().get() == 9
    with_snapshot.finish()


def test_respawn_of_what_was_never_saved_is_a_key_error_and_leaves_the_id_free(storage: Any) -> None:
    for _ in range(2):
        with pytest.raises(SnapshotNotFoundError, match="there is no snapshot of actor 'x' in ") as caught:
            Counter.respawn(storage, "x")
    assert isinstance(caught.value, KeyError)
    Counter.spawn_persistent(storage, "x", 1).finish()


@pytest.mark.parametrize("actor_id", ["", "../x", "/etc/passwd", "a" * 5000, "näö 雪\n\0", "\udcff", "A"])
def test_any_text_is_an_id(storage: Any, actor_id: str, tmp_path: Path) -> None:
    outside = set(tmp_path.iterdir())
    ref = Counter.spawn_persistent(storage, actor_id, len(actor_id))
    ref.proxy().add(1).get()
    ref.finish()
    ref = Counter.respawn(storage, actor_id)
    assert ref.proxy().get().get() == len(actor_id) + 1
    ref.finish()
    assert {path.name for path in set(tmp_path.iterdir()) - outside} <= {"actors", "a"}


def test_ids_that_differ_in_case_only_are_two(storage: Any) -> None:
    one, two = Counter.spawn_persistent(storage, "Id", 1), Counter.spawn_persistent(storage, "id", 2)
    one.proxy().add(0).get(), two.proxy().add(0).get()
    one.finish(), two.finish()
    ref = Counter.respawn(storage, "Id")
    assert ref.proxy().get().get() == 1
    ref.finish()


def test_an_id_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="id is a str, not 7"):
        Counter.spawn_persistent(MemoryStorage(), 7)  # type: ignore[arg-type]


def test_a_storage_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="is no storage"):
        Counter.spawn_persistent("here", "c", 7)  # type: ignore[arg-type]
    ref = Counter.spawn_persistent(MemoryStorage(), "c", 7)
    with pytest.raises(TypeError, match="pass a state by its name"):
        ref.proxy().save_snapshot(7).get()


# ------------------------------------------------------------------ arguments


def test_runtime_arguments_come_after_the_snapshot() -> None:
    storage = MemoryStorage()
    Counter.spawn_persistent(storage, "c", 5).proxy().add(0).get()
    pykka.ActorRegistry.stop_all()
    for runtime, step in [(None, 1), (3, 3), ((4,), 4), (Args(step=5), 5)]:
        ref = Counter.respawn(storage, "c", runtime)
        assert ref.proxy().step.get() == step
        assert ref.proxy().count.get() == 5
        ref.finish()


def test_a_class_says_what_becomes_of_its_snapshot() -> None:
    class Doubled(Counter):
        @classmethod
        def persistent_args(cls, snapshot: int, runtime_args: Any) -> Any:
            return Args(count=2 * snapshot, step=runtime_args["step"])

    storage = MemoryStorage()
    Counter.spawn_persistent(storage, "c", 5).proxy().add(0).get()
    pykka.ActorRegistry.stop_all()
    ref = Doubled.respawn_or(storage, "c", runtime_args={"step": 7})
    assert (ref.proxy().count.get(), ref.proxy().step.get()) == (10, 7)


def test_persistent_args_that_raise_a_key_error_do_not_pass_for_an_absent_snapshot() -> None:
    class Older(Lists):
        @classmethod
        def persistent_args(cls, snapshot: Any, runtime_args: Any) -> Any:
            return snapshot["not there"]

    storage = MemoryStorage()
    storage.try_write("x", encode("x", {"a": 1}))
    with pytest.raises(PersistenceError, match="persistent_args raised KeyError"):
        Older.respawn_or(storage, "x", default_args={})
    assert Lists.respawn(storage, "x").proxy().state.get() == {"a": 1}


def test_a_manager_restores_its_two_children() -> None:
    class Manager(PersistentActor[list]):
        def __init__(self, names: list[str], storage: Any) -> None:
            super().__init__()
            self.names = names
            self.children = {name: Counter.respawn_or(storage, name) for name in names}

        def hire(self, name: str) -> None:
            self.names.append(name)
            self.children[name] = Counter.respawn_or(self.storage, name)
            self.save_snapshot(self.storage, self.names)

        def add(self, name: str, number: int) -> int:
            return self.children[name].proxy().add(number).get()

        def on_stop(self) -> None:
            for child in self.children.values():
                child.stop()

    storage = MemoryStorage()
    manager = Manager.spawn_persistent(storage, "manager", ([], storage)).proxy()
    manager.hire("left").get(), manager.hire("right").get()
    assert manager.add("left", 3).get() == 3 and manager.add("right", 4).get() == 4
    manager.actor_ref.stop()
    assert not pykka.ActorRegistry.get_all(), "the children stopped with it"

    manager = Manager.respawn(storage, "manager", (storage,)).proxy()
    assert manager.add("left", 10).get() == 13 and manager.add("right", 10).get() == 14


# ------------------------------------------------------------------ what is no snapshot of its


def test_absent_and_damaged_are_different_errors() -> None:
    storage = MemoryStorage()
    storage.try_write("x", b"no snapshot at all")
    for start in (Counter.respawn, Counter.spawn_persistent, Counter.respawn_or):
        with pytest.raises(CorruptSnapshotError, match=r"'x' in .* is damaged") as caught:
            start(storage, "x")
        assert caught.value.kind is PersistenceKind.DESERIALIZE
        assert not isinstance(caught.value, KeyError)
    assert storage.try_read("x") == b"no snapshot at all", "and it stays as it is"


def test_a_damaged_snapshot_becomes_the_default_only_when_told_and_with_a_warning() -> None:
    storage = MemoryStorage()
    storage.try_write("x", b"no snapshot at all")
    with pytest.warns(FBCacheWarning, match="'x' starts from its default") as warned:
        ref = Counter.respawn_or(storage, "x", default_args=3, on_corrupt="default")
    assert warned[0].filename == __file__
    assert ref.proxy().get().get() == 3
    assert storage.try_read("x") == b"no snapshot at all", "until the first save"
    ref.finish()
    with pytest.raises(ValueError, match="on_corrupt is"):
        Counter.respawn_or(storage, "x", on_corrupt="ignore")  # type: ignore[arg-type]


def test_what_cannot_be_read_does_not_become_the_default() -> None:
    class Failing(MemoryStorage):
        error: BaseException = oserror(5)

        def try_read(self, actor_id: str) -> bytes:
            raise self.error

    for error in (oserror(5), KeyError("a bug of the storage's"), ValueError("another")):
        storage = Failing()
        storage.error = error
        with pytest.raises(PersistenceError, match="cannot read") as caught:
            Counter.respawn_or(storage, "x", default_args=3, on_corrupt="default")
        assert caught.value.kind is PersistenceKind.IO
        assert caught.value.__cause__ is error


def test_a_snapshot_of_another_type_is_not_taken_and_no_default_either() -> None:
    storage = MemoryStorage()
    storage.try_write("x", encode("x", ["a list"]))
    with pytest.raises(PersistenceError, match="is a list, where the actor's snapshot_type is int") as caught:
        Counter.respawn_or(storage, "x", on_corrupt="default")
    assert caught.value.kind is PersistenceKind.DESERIALIZE


def test_a_state_of_another_type_is_not_saved() -> None:
    storage = SlowStorage()
    ref = Counter.spawn_persistent(storage, "x", 5)
    with pytest.raises(PersistenceError, match="its state is a str") as caught:
        ref.proxy().save_snapshot(state="five").get()
    assert caught.value.kind is PersistenceKind.SERIALIZE
    ref.finish()
    assert storage.writes == []


def test_a_state_that_needs_pickle_is_refused_by_its_path_and_the_actor_lives() -> None:
    storage = MemoryStorage()
    ref = Lists.spawn_persistent(storage, "x", {"fine": 1})
    ref.proxy().put().get()
    with pytest.raises(PersistenceError, match=r"value\['bad'\]\[1\]") as caught:
        ref.proxy().put(bad=[1, threading.Event]).get()
    assert caught.value.kind is PersistenceKind.SERIALIZE
    ref.finish()
    ref = Lists.respawn(storage, "x")
    assert ref.proxy().state.get() == {"fine": 1}, "the snapshot before stands"


# ------------------------------------------------------------------ one live actor for an id


def test_a_second_live_actor_of_an_id_is_refused(storage: Any) -> None:
    first = Counter.spawn_persistent(storage, "c", 5)
    for start in (Counter.spawn_persistent, Counter.respawn, Counter.respawn_or):
        with pytest.raises(ActorExistsError, match="'c' is alive"):
            start(storage, "c")
    assert first.proxy().add(1).get() == 6
    Counter.spawn_persistent(MemoryStorage(), "c").finish()  # elsewhere it is another one
    first.finish()
    Counter.spawn_persistent(storage, "c").finish()


def test_two_storages_of_one_directory_know_of_each_other(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ref = Counter.spawn_persistent(DirectoryStorage(tmp_path / "real"), "c", 5)
    with pytest.raises(ActorExistsError):
        Counter.spawn_persistent(DirectoryStorage(tmp_path / "link"), "c", 5)
    ref.finish()


def test_the_id_is_free_when_an_actor_could_not_be_started() -> None:
    class Refusing(Counter):
        def __init__(self, count: int) -> None:
            super().__init__(count)
            raise ValueError("not today")

    storage = MemoryStorage()
    with pytest.raises(ValueError, match="not today"):
        Refusing.spawn_persistent(storage, "c", 5)
    Counter.spawn_persistent(storage, "c", 5).finish()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_id_is_free_after_a_start_that_failed_in_the_actors_thread() -> None:
    class Refusing(Counter):
        def on_start(self) -> None:
            raise SystemExit if self.count else ValueError("not today")

    storage = MemoryStorage()
    for count in (0, 1):
        ref = Refusing.spawn_persistent(storage, "c", count)
        assert ref._life.ended.wait(PATIENCE)
        Counter.spawn_persistent(storage, "c", 5).finish()
        pykka.ActorRegistry.unregister(ref)


def test_an_actor_made_by_another_in_its_constructor_has_no_share_in_its_id() -> None:
    class Parent(Counter):
        def __init__(self, count: int) -> None:
            self.child = Counter.start(1)
            super().__init__(count)

    ref = Parent.spawn_persistent(MemoryStorage(), "c", 5)
    child = ref.proxy().child.get()
    assert child.proxy().actor_id.get() is None and ref.proxy().actor_id.get() == "c"


def test_a_constructor_that_forgets_pykkas_is_told() -> None:
    class Forgetful(Counter):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"Forgetful.__init__ must call super\(\).__init__\(\)"):
        Forgetful.spawn_persistent(MemoryStorage(), "c")


# ------------------------------------------------------------------ ending


def test_what_a_users_on_stop_saves_is_written_before_stop_returns() -> None:
    class Saving(Counter):
        def on_stop(self) -> None:  # no call of ours
            self.save_snapshot(state=77)

    storage = MemoryStorage()
    Saving.spawn_persistent(storage, "c", 5).stop()
    assert Saving.respawn(storage, "c").proxy().get().get() == 77


def test_stopping_while_a_snapshot_is_written_waits_for_it_and_for_the_newest(spawn: Any) -> None:
    storage = SlowStorage()
    ref = Counter.spawn_persistent(storage, "c", 0)
    gate = storage.gate()
    ref.proxy().add(1).get()
    gate.wait_reached()
    ref.proxy().add(1).get(), ref.proxy().add(1).get()
    stopping = spawn(ref.stop)
    assert not stopping.done
    with pytest.raises(ActorExistsError):
        Counter.respawn(storage, "c")
    gate.open()
    stopping.result()
    assert len(storage.writes) == 2
    assert Counter.respawn(storage, "c").proxy().get().get() == 3


def test_an_actor_that_crashes_leaves_its_last_snapshot_even_one_that_is_not_written_yet() -> None:
    storage = SlowStorage()
    ref = Counter.spawn_persistent(storage, "c", 0)
    gate = storage.gate()
    ref.proxy().add(1).get()
    gate.wait_reached()
    ref.proxy().add(1).get()
    waiting = ref.proxy().get()
    ref.tell("nothing")  # only warned of
    ref.tell(ProxyCall(("die",), (), {}))
    gate.open()
    assert waiting.get() == 2
    ref.finish()
    assert Counter.respawn(storage, "c").proxy().get().get() == 2


def test_who_asked_a_crashed_actor_is_answered_when_its_id_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, end = Gate(), Life.end

    def gated_end(life: Life) -> None:
        gate.pass_through()
        end(life)

    storage = MemoryStorage()
    ref = Counter.spawn_persistent(storage, "c", 0)
    with monkeypatch.context() as patched:
        patched.setattr(Life, "end", gated_end)
        ref.tell(ProxyCall(("die",), (), {}))
        late = Counter._create_future()
        ref.actor_inbox.put(Envelope("too late", reply_to=late))
        gate.wait_reached()
        with pytest.raises(pykka.Timeout):
            late.get(timeout=0)
        gate.open()
        with pytest.raises(pykka.ActorDeadError):
            late.get(timeout=PATIENCE)
    Counter.spawn_persistent(storage, "c", 0).finish()


def test_finishing_a_crashed_actor_waits_until_its_snapshot_is_written() -> None:
    storage = SlowStorage()
    ref = Counter.spawn_persistent(storage, "c", 0)
    gate = storage.gate()
    ref.proxy().add(1).get()
    gate.wait_reached()
    ref.tell(ProxyCall(("die",), (), {}))
    assert ref.actor_stopped.wait(PATIENCE)
    with pytest.raises(pykka.Timeout):
        ref.finish(timeout=0)
    gate.open()
    ref.finish()
    assert Counter.respawn(storage, "c").proxy().get().get() == 1


def test_an_exception_that_ends_all_actors_leaves_the_last_snapshot() -> None:
    class Fatal(Counter):
        snapshot_every_messages = 100

        def fatal(self) -> None:
            self.count = -1
            raise SystemExit

    storage = MemoryStorage()
    ref = Fatal.spawn_persistent(storage, "c", 0)
    ref.proxy().add(4).get()
    ref.proxy().add_unsaved(1).get()
    ref.proxy().fatal()
    assert ref._life.ended.wait(PATIENCE)
    assert Counter.respawn(storage, "c").proxy().get().get() == 4


def test_a_last_snapshot_that_cannot_be_written_is_raised_by_finish_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = SlowStorage()
    ref = Counter.spawn_persistent(storage, "c", 0)
    ref.proxy().add(1).get()
    ref.proxy().flush().get()
    storage.errors = [oserror(28)] * 2  # once in the background, once more at the end
    ref.proxy().add(1).get()
    with caplog.at_level(logging.ERROR), pytest.raises(PersistenceError, match="No space left") as caught:
        ref.finish()
    assert caught.value.kind is PersistenceKind.IO and isinstance(caught.value.__cause__, OSError)
    assert "'c' is not saved" in caplog.text
    with pytest.raises(PersistenceError):
        ref.finish()
    assert Counter.respawn(storage, "c").proxy().get().get() == 1


def test_a_write_that_fails_once_is_made_up_for_when_the_actor_stops() -> None:
    storage = SlowStorage()
    storage.errors = [oserror(5)]
    ref = Counter.spawn_persistent(storage, "c", 0)
    ref.proxy().add(1).get()
    ref.finish()
    assert Counter.respawn(storage, "c").proxy().get().get() == 1


def test_after_its_end_an_actor_saves_nothing() -> None:
    kept: list[Counter] = []

    class Kept(Counter):
        def on_start(self) -> None:
            kept.append(self)

    storage = MemoryStorage()
    ref = Kept.spawn_persistent(storage, "c", 5)
    ref.proxy().add(1).get()
    ref.finish()
    with pytest.raises(NotPersistentError, match="has ended"):
        kept[0].save_snapshot(state=1)
    assert Counter.respawn(storage, "c").proxy().get().get() == 6


# ------------------------------------------------------------------ other storages, or none


def test_an_actor_without_an_id_is_told_how_to_get_one() -> None:
    ref = Counter.start(5)
    for storage in (None, MemoryStorage()):
        with pytest.raises(NotPersistentError, match="spawn_persistent"):
            ref.proxy().save_snapshot(storage).get()
    ref.stop()


def test_a_snapshot_may_go_to_another_storage_where_the_id_is_taken_too() -> None:
    first, second = MemoryStorage(), MemoryStorage()
    ref = Counter.spawn_persistent(first, "c", 5)
    ref.proxy().save_snapshot(second, 70).get()
    with pytest.raises(ActorExistsError):
        Counter.respawn(second, "c")
    ref.finish()
    assert Counter.respawn(second, "c").proxy().get().get() == 70
    with pytest.raises(SnapshotNotFoundError):
        Counter.respawn(first, "c")


def test_a_snapshot_does_not_go_where_another_actor_of_the_id_lives() -> None:
    first, second = MemoryStorage(), MemoryStorage()
    one, two = Counter.spawn_persistent(first, "c", 1), Counter.spawn_persistent(second, "c", 2)
    with pytest.raises(ActorExistsError):
        one.proxy().save_snapshot(second, 1).get()
    two.proxy().add(0).get()
    one.finish(), two.finish()
    assert Counter.respawn(second, "c").proxy().get().get() == 2


# ------------------------------------------------------------------ states


def test_arrays_come_back_writeable_and_as_they_were_at_the_call() -> None:
    storage = SlowStorage()
    weights = np.arange(5000.0)
    ref = Lists.spawn_persistent(storage, "x", {"w": weights, "log": [1]})
    gate = storage.gate()
    ref.proxy().put().get()
    gate.wait_reached()
    weights[:] = -1  # while it is written
    ref.proxy().state.get()["log"].append(2)
    gate.open()
    ref.finish()
    state = Lists.respawn(storage, "x").proxy().state.get()
    assert state["log"] == [1]
    assert np.array_equal(state["w"], np.arange(5000.0)) and state["w"].flags.writeable


def test_frozen_arrays_are_copied_too_for_a_pool_thaws_them() -> None:
    storage = SlowStorage()
    weights = np.arange(5000.0)
    weights.flags.writeable = False
    ref = Lists.spawn_persistent(storage, "x", {"w": weights})
    gate = storage.gate()
    ref.proxy().put().get()
    gate.wait_reached()
    weights.flags.writeable = True
    weights[:] = -1
    gate.open()
    ref.finish()
    assert Lists.respawn(storage, "x").proxy().state.get()["w"][7] == 7.0


@pytest.mark.parametrize(
    ("missing", "use", "extra"),
    [
        ("pykka", "from fbcache.actors import PersistentActor", "fbcache[actors]"),
        ("pykka", "from fbcache.actors import own_snapshot", "fbcache[actors]"),
        ("obstore", "from fbcache.actors import ObjectStorage; ObjectStorage(None)", "fbcache[objects]"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(missing: str, use: str, extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nimport fbcache.actors\n{use}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError") and f"pip install '{extra}'" in last


def test_the_public_names_are_there_and_documented() -> None:
    import fbcache.actors as package

    for name in package.__all__:
        assert getattr(package, name).__doc__, name
    with pytest.raises(AttributeError):
        package.nothing_of_that_name  # type: ignore[attr-defined]
