"""A tracked directory, driven by chance against a model that keeps every version.

Invariants 1, 9, 12 and 13. The model knows what each checkpoint and each persisted key holds; after every
step all of them are loaded by a reader of its own, from their files. A crash is a copy of the files as
they are, with leftovers of half-done work planted, that another process opens.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fbcache import FBCacheWarning, FBPool, FileStore, NameTakenError, StorageError, TrackedDirectory
from fbcache.store import owner
from tests.checkpoint.opened import Value, Version, exact, files_of, fresh, is_ours, load, look
from tests.checkpoint.scene import left_by
from tests.faults import FaultyDisk, oserror

NAMES = ("a", "b", ("tile", 3), 4)

FOREIGN = {"notes.txt": b"mine", "ab/mine": b"in a shard", ".fbcache/mine": b"beside the lock"}

#: The call that fails, which of them, and how.
TROUBLES = st.one_of(
    st.none(),
    st.none(),
    st.tuples(
        st.sampled_from(["fsync", "open", "link", "rename", "writev", "unlink", "close", "pwrite"]),
        st.integers(1, 9),
        st.sampled_from([errno.EIO, errno.ENOSPC]),
    ),
)

#: Which of those there are; whether there are any depends on the disk's timing, so that no rule's choice may.
PICKS = st.integers(0, 1 << 16)


def make(number: int) -> np.ndarray:
    return np.arange(10 + number % 50) + number


class CheckpointMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.lives = self.numbers = 0
        self.kept: dict[int, Version] = {}
        self.pins: dict[UUID, Value] = {}
        self.maybe: set[UUID] = set()  # what may be present, or pinned, since something failed or was lent
        self.begin()
        for path, content in FOREIGN.items():
            (self.path / path).parent.mkdir(parents=True, exist_ok=True)
            (self.path / path).write_bytes(content)

    # ------------------------------------------------------------------ lives

    @property
    def path(self) -> Path:
        return self.base / f"life-{self.lives}" / "tracked"

    def begin(self) -> None:
        """Begin as a new process, after a new boot, so that those before are known to be dead."""
        self.patch.setattr(owner, "_boot_id", lambda life=self.lives: f"boot {life}")
        self.disk = FaultyDisk()
        self.path.parent.mkdir(exist_ok=True)
        self.directory = fresh(self.path, self.disk)
        self.highest = 0
        self.begin_pool()

    def begin_pool(self) -> None:
        store = FileStore(tempfile.mkdtemp(dir=self.path.parent), disk=self.disk)
        self.pool = FBPool("1MB", store=store, io_threads=2)
        self.values: dict[Any, Value] = {}

    def open(self) -> TrackedDirectory:
        return TrackedDirectory._over(self.directory)

    @rule(
        crashed=st.booleans(),
        planted=st.lists(st.sampled_from(["blob", "new blob", "pin", "new manifest"]), max_size=3),
        back=st.sampled_from([True, True, True, False]),
    )
    def go_on_elsewhere(self, crashed: bool, planted: list[str], back: bool) -> None:
        """Go on in a new process, or with a new pool, which has what it restores on loan."""
        if crashed:
            self.crash()
            for what in planted:
                self.plant(what)
        else:
            self.end()
            self.begin_pool()
        if back and self.kept:
            self.bring_back(max(self.kept), None, True)

    def crash(self) -> None:
        former = self.path
        self.pool.drain()
        self.lives += 1
        shutil.copytree(former, self.path, symlinks=True)
        self.lives -= 1
        self.end()
        self.lives += 1
        self.begin()
        self.maybe &= self.pins.keys()

    def plant(self, what: str) -> None:
        key = uuid.uuid4()
        places = self.directory.places
        path = {
            "blob": places.blob(key),
            "new blob": places.temporary(key),
            "pin": places.pin(key),
            "new manifest": places.new_manifest(len(self.kept) + 1),
        }[what]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).write_bytes(b"half of it")

    def end(self) -> None:
        for name in self.values:
            self.check_value(name)
        self.pool.validate()
        self.quietly(self.pool.close)

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.patch.undo()
            shutil.rmtree(self.base)

    # ------------------------------------------------------------------ the pool

    @rule(name=st.sampled_from(NAMES))
    def put(self, name: Any) -> None:
        self.numbers += 1
        self.pool[name] = make(self.numbers)
        self.values[name] = exact(make(self.numbers))

    @rule(pick=PICKS, drops=st.sampled_from([False, False, False, True]))
    def change(self, pick: int, drops: bool) -> None:
        if not self.values:
            return
        name = self.one_of(self.values, pick)
        if drops:
            self.pool.delete(name)
            del self.values[name]
            return
        with self.pool.get_mut(name) as array:
            array += 1
            self.values[name] = exact(array)

    @rule(pick=PICKS, evicts=st.booleans())
    def read(self, pick: int, evicts: bool) -> None:
        if not self.values:
            return
        if evicts:
            self.pool.evict()
        self.check_value(self.one_of(self.values, pick))

    def one_of(self, there: dict[Any, Any], pick: int) -> Any:
        return list(there)[pick % len(there)]

    def check_value(self, name: Any) -> None:
        with self.pool.get(name) as array:
            assert exact(array) == self.values[name]

    # ------------------------------------------------------------------ troubles

    def attempt(self, trouble: tuple[str, int, int] | None, do: Callable[[], Any]) -> tuple[Any, bool]:
        """Do it while a call may fail; return what comes of it, and whether it raised."""
        self.before = self.directory.loans.keys()
        if trouble is not None:
            call, nth, code = trouble
            self.disk.fail(call, error=oserror(code), nth=nth)
        try:
            return self.quietly(do), False
        except StorageError:
            if trouble is None:
                raise
            return None, True
        finally:
            try:
                self.quietly(self.pool.drain)
            except StorageError:
                assert trouble is not None
            self.disk.clear()
            self.maybe |= self.before
            if trouble is not None:
                self.maybe |= self.present() | self.directory.loans.keys()

    def quietly(self, do: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FBCacheWarning)
            return do()

    def present(self) -> set[UUID]:
        with self.open() as tracked:
            return set(tracked.keys())

    # ------------------------------------------------------------------ checkpoints

    @rule(
        names=st.one_of(st.none(), st.none(), st.sets(st.sampled_from(NAMES))),
        keep=st.sampled_from([1, 1, 2, 3, None]),
        tag=st.sampled_from([None, None, None, "x", "y"]),
        refused=st.sampled_from([False, False, False, True]),
        trouble=TROUBLES,
    )
    def save(self, names: Any, keep: int | None, tag: str | None, refused: bool, trouble: Any) -> None:
        chosen = [name for name in self.values if names is None or name in names]

        def change_key(_: Any) -> None:
            if refused:
                raise LookupError

        def do() -> int | None:
            with self.open() as tracked:
                try:
                    return self.pool.save(tracked, chosen, keep=keep, tag=tag, change_key=change_key).version
                except LookupError:
                    return None

        version, raised = self.attempt(trouble, do)
        if raised:
            return
        former = dict(self.kept)
        if version is None:
            if trouble is not None:  # it may have been committed, and not be withdrawn
                self.settle(former | self.new(former, tag, chosen), former)
            return
        assert version > max(self.highest, *self.kept, 0)
        self.highest = version
        self.kept[version] = Version(tag, {name: self.values[name] for name in chosen})
        due = {number: self.kept[number] for number in left_by(self.kept, keep)}
        self.settle(self.kept if trouble is not None else due, due)

    def new(self, former: dict[int, Version], tag: str | None, names: list[Any]) -> dict[int, Version]:
        """The versions that there were not before, as what has just been saved."""
        saved = Version(tag, {name: self.values[name] for name in names})
        return dict.fromkeys(look(self.path, readonly=True).versions.keys() - former.keys(), saved)

    def settle(self, most: dict[int, Version], least: dict[int, Version]) -> None:
        """Take over which versions there are, where a failure leaves that open."""
        found = look(self.path, readonly=True).versions
        assert least.keys() <= found.keys() <= most.keys()
        self.kept = {number: most[number] for number in found}

    @rule(really=st.booleans())
    def forget_all(self, really: bool) -> None:
        """What the pool has on loan stays readable."""
        while really and self.kept:
            self.forget_one(0, None, False)

    @rule(pick=PICKS, trouble=TROUBLES, by_tag=st.booleans())
    def forget(self, pick: int, trouble: Any, by_tag: bool) -> None:
        if not self.kept:
            return
        self.forget_one(pick, trouble, by_tag)

    def forget_one(self, pick: int, trouble: Any, by_tag: bool) -> None:
        which: Any = self.one_of(self.kept, pick)
        number = which
        if by_tag and (tag := self.kept[which].tag) is not None:
            which, number = tag, max(n for n, version in self.kept.items() if version.tag == tag)

        def do() -> None:
            with self.open() as tracked:
                tracked.forget(which)

        _, raised = self.attempt(trouble, do)
        left = {n: version for n, version in self.kept.items() if n != number}
        self.settle(self.kept if raised else left, left)

    @rule(pick=PICKS, names=st.one_of(st.none(), st.sets(st.sampled_from(NAMES))), replace=st.booleans())
    def restore(self, pick: int, names: Any, replace: bool) -> None:
        if not self.kept:
            return
        self.bring_back(self.one_of(self.kept, pick), names, replace)

    def bring_back(self, number: int, names: Any, replace: bool) -> None:
        saved = self.kept[number].values
        chosen = [name for name in saved if names is None or name in names]
        if not replace and any(name in self.values for name in chosen):
            with pytest.raises(NameTakenError):
                self.pool.restore(self.reader(), chosen, version=number)
            return
        checkpoint = self.pool.restore(self.reader(), chosen, version=number, replace=replace)
        assert checkpoint.version == number and set(checkpoint.names) == set(saved)
        self.values |= {name: saved[name] for name in chosen}

    def reader(self) -> TrackedDirectory:
        return TrackedDirectory._over(self.directory, readonly=True)

    # ------------------------------------------------------------------ single keys

    @rule(pick=PICKS, trouble=TROUBLES)
    def persist(self, pick: int, trouble: Any) -> None:
        if not self.values:
            return
        name = self.one_of(self.values, pick)

        def do() -> UUID:
            with self.open() as tracked:
                return self.pool.persist(name, tracked)

        key, raised = self.attempt(trouble, do)
        if not raised:
            self.pins[key] = self.values[name]

    @rule(pick=PICKS, trouble=TROUBLES)
    def delete(self, pick: int, trouble: Any) -> None:
        if not self.pins:
            return
        key = self.one_of(self.pins, pick)

        def do() -> bool:
            with self.open() as tracked:
                return tracked.delete(key)

        _, raised = self.attempt(trouble, do)
        if not raised or key not in look(self.path, readonly=True).pins:
            del self.pins[key]

    @rule(pick=PICKS, name=st.sampled_from(NAMES))
    def register(self, pick: int, name: Any) -> None:
        if not self.pins:
            return
        key = self.one_of(self.pins, pick)
        self.pool.register(self.reader(), key, name, replace=True).drop()
        self.values[name] = self.pins[key]

    @rule(trouble=TROUBLES)
    def sync(self, trouble: Any) -> None:
        def do() -> None:
            with self.open() as tracked:
                tracked.sync()

        self.attempt(trouble, do)

    @rule()
    def gc(self) -> None:
        self.pool.drain()
        with self.open() as tracked:
            tracked.gc()
            opened = look(self.path, readonly=True)
            lent = self.directory.loans.keys()
            assert set(tracked.keys()) <= opened.named | opened.pins | lent
            assert opened.pins <= self.pins.keys() | self.maybe
            self.maybe = set(lent | opened.pins)

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def all_is_there(self) -> None:
        with self.open() as tracked:
            opened = look(self.path, readonly=True)
            assert opened.versions == self.kept
            assert [each.version for each in tracked.checkpoints()] == sorted(self.kept)
            assert self.pins.keys() <= opened.pins <= self.pins.keys() | self.maybe
            for key, value in self.pins.items():
                assert load(self.directory, key) == value
            present, needed = set(tracked.keys()), opened.named | self.pins.keys()
            assert needed <= present == opened.present
            assert present - needed <= self.maybe | self.directory.loans.keys()
        self.pool.validate()

    @invariant()
    def foreign_files_are_as_they_were(self) -> None:
        files = files_of(self.path)
        assert {path: content for path, content in files.items() if not is_ours(path)} == FOREIGN


def test_a_tracked_directory_does_what_a_model_of_all_versions_does(soak: bool) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        CheckpointMachine,
        settings=settings(
            max_examples=2_000 if soak else 300,
            stateful_step_count=80 if soak else 40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=not soak,
            database=None,
        ),
    )
