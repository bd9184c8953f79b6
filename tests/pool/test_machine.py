"""A pool, driven by chance against a plain dict, recounted after each step.

The model knows which content each entry has to have, and who owns it; never where it is.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import cachetools
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fbcache import DeadlockError, Fb, FBPool, FileStore, StaleKeyError, State, StorageError
from tests.faults import FaultyDisk, oserror

BUDGET = 20_000
NAMES = ("a", "b", ("tile", 1), 4, None)

# ----------------------------------------------------------------------------- values


def make_value(kind: str, seed: int) -> Any:
    """A value that nothing else shares."""
    rng = np.random.default_rng(seed)
    if kind == "array":
        return rng.integers(0, 255, int(rng.integers(0, 6_000)), np.uint8)
    if kind == "matrix":
        return np.asfortranarray(rng.random((int(rng.integers(1, 20)), 30)))
    if kind == "mapped":  # above the size from which blobs are mapped, and larger than the budget
        return rng.integers(0, 255, 150_000, np.uint8)
    if kind == "dict":
        return {"x": rng.integers(0, 9, 500), "n": int(seed), "s": "text" * (seed % 7)}
    if kind == "bytes":
        return rng.bytes(int(rng.integers(0, 5_000)))
    if kind == "tuple":
        return (seed, [1.5, None], ("nested", rng.integers(0, 9, 200, np.int32)))
    return seed


KINDS = st.sampled_from(["array", "array", "matrix", "mapped", "dict", "bytes", "tuple", "int"])
SEEDS = st.integers(0, 1 << 16)

#: Which handle or guard: a position, whatever there is, for what there is depends on the disk's timing.
PICKS = st.integers(0, 1 << 16)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def mutate(value: Any, seed: int) -> Any:
    """Change ``value`` in place if that can be done; return what the guard's value is to be."""
    if isinstance(value, np.ndarray):
        if value.size == 0:
            return make_value("array", seed)
        value.flat[seed % value.size] += 1
        return value
    if isinstance(value, dict):
        value["n"] = seed
        value["x"][seed % len(value["x"])] += 1
        return value
    return make_value("tuple", seed)


class Model:
    """One entry: what it holds, and who owns it."""

    def __init__(self, kind: str, seed: int) -> None:
        self.steps: list[Any] = [("make", kind, seed)]
        self.name: Any = MISSING
        self.handles = 0

    @property
    def value(self) -> Any:
        """The content, made anew: the pool has frozen or eaten the one it was given."""
        value: Any = None
        for what, *args in self.steps:
            value = make_value(*args) if what == "make" else mutate(value, *args)
        return value


MISSING = object()


class BoomError(Exception):
    pass


# ---------------------------------------------------------------------------- machine


class PoolMachine(RuleBasedStateMachine):
    policy: Any = "lru"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="fbcache-machine-")
        self.pool = self.make_pool()
        self.names: dict[Any, Model] = {}
        self.handles: list[Fb] = []
        self.entries: dict[int, Model] = {}  # by the handle's id
        self.held: list[tuple[Any, Any, Model]] = []  # guard, value, whose
        self.writing: tuple[Any, Model] | None = None

    def make_pool(self) -> FBPool:
        return FBPool(BUDGET, directory=self.directory, min_free=0, policy=self.policy, **self.options)

    def teardown(self) -> None:
        for guard, _, _ in self.held:
            guard.__exit__(None, None, None)
        if self.writing is not None:
            self.writing[0].__exit__(None, None, None)
        try:
            for name, model in self.names.items():
                assert same(self.pool[name], model.value)
            self.settle()
            self.pool.validate()
        finally:
            self.pool.close()
            left = [p for p in Path(self.directory).rglob("*") if p.is_file()]
            shutil.rmtree(self.directory)
        assert not left

    def settle(self) -> None:
        self.pool.drain()

    # What a call that may have to write is allowed to raise: nothing, on a sound disk.
    trouble: tuple[type[Exception], ...] = ()

    def model_of(self, fb: Fb) -> Model:
        return self.entries[id(fb)]

    def is_held(self, model: Model) -> bool:
        return any(m is model for _, _, m in self.held)

    def is_written(self, model: Model) -> bool:
        return self.writing is not None and self.writing[1] is model

    # ------------------------------------------------------------------ putting

    @rule(name=st.sampled_from(NAMES), kind=KINDS, seed=SEEDS, copy=st.booleans())
    def put(self, name: Any, kind: str, seed: int, copy: bool) -> None:
        value = make_value(kind, seed)
        try:
            fb = self.pool.put(name, value, copy=copy)
        except self.trouble:
            return
        model = Model(kind, seed)
        former = self.names.get(name)
        if former is not None:
            former.name = MISSING
        self.names[name] = model
        model.name = name
        self.own(fb, model)

    @rule(name=st.sampled_from(NAMES), kind=KINDS, seed=SEEDS)
    def set_item(self, name: Any, kind: str, seed: int) -> None:
        try:
            self.pool[name] = make_value(kind, seed)
        except self.trouble:
            return
        former = self.names.get(name)
        if former is not None:
            former.name = MISSING
        self.names[name] = model = Model(kind, seed)
        model.name = name

    @rule(kind=KINDS, seed=SEEDS)
    def insert(self, kind: str, seed: int) -> None:
        try:
            fb = self.pool.insert(make_value(kind, seed))
        except self.trouble:
            return
        self.own(fb, Model(kind, seed))

    def own(self, fb: Fb, model: Model) -> None:
        self.handles.append(fb)
        self.entries[id(fb)] = model
        model.handles += 1

    # ------------------------------------------------------------------ handles

    def handle(self, pick: int) -> Fb | None:
        return self.handles[pick % len(self.handles)] if self.handles else None

    @rule(pick=PICKS)
    def clone(self, pick: int) -> None:
        fb = self.handle(pick)
        if fb is not None:
            self.own(fb.clone(), self.model_of(fb))

    @rule(pick=PICKS)
    def drop(self, pick: int) -> None:
        fb = self.handle(pick)
        if fb is None:
            return
        self.handles.remove(fb)
        self.entries.pop(id(fb)).handles -= 1
        fb.drop()
        fb.drop()
        with pytest.raises(KeyError):
            fb.load()

    @rule(pick=PICKS)
    def read_handle(self, pick: int) -> None:
        fb = self.handle(pick)
        if fb is None:
            return
        model = self.model_of(fb)
        if self.is_written(model):
            with pytest.raises(DeadlockError):
                fb.load().__enter__()
            return
        with fb.load() as value:
            assert same(value, model.value)
        assert fb.name == (None if model.name is MISSING else model.name)

    @rule(pick=PICKS, seed=SEEDS)
    def make_mut(self, pick: int, seed: int) -> None:
        """All others who share the entry keep their value."""
        fb = self.handle(pick)
        if fb is None:
            return
        model = self.model_of(fb)
        shared = model.handles + (model.name is not MISSING) > 1
        if self.is_written(model) or (self.is_held(model) and not shared):
            with pytest.raises(DeadlockError):
                fb.make_mut().__enter__()
            # It may have left with an entry of its own: the content is the same.
            return
        guard = fb.make_mut()
        with guard as value:
            guard.value = mutate(value, seed)
        if shared:
            model.handles -= 1
            twin = Model("int", 0)
            twin.steps = list(model.steps)
            twin.handles = 1
            self.entries[id(fb)] = model = twin
        model.steps.append(("mutate", seed))
        with fb.load() as value:
            assert same(value, model.value)

    @rule(pick=PICKS)
    def write_now(self, pick: int) -> None:
        fb = self.handle(pick)
        if fb is None:
            return
        if self.is_written(self.model_of(fb)):
            return  # it would wait for the guard of this very thread
        try:
            fb.write_now()
        except self.trouble:
            return
        assert fb.state in (State.CLEAN, State.SPILLED)

    @rule(pick=PICKS)
    def key(self, pick: int) -> None:
        fb = self.handle(pick)
        if fb is None:
            return
        model = self.model_of(fb)
        key = fb.key
        assert key == fb.key
        if self.is_written(model) or self.is_held(model):
            return
        with self.pool.get(key) as value:
            assert same(value, model.value)
        with fb.load_mut():
            assert fb.key != key
        with pytest.raises(StaleKeyError):
            self.pool.get(key)

    # --------------------------------------------------------------------- names

    @rule(name=st.sampled_from(NAMES))
    def get(self, name: Any) -> None:
        model = self.names.get(name)
        if model is None:
            assert name not in self.pool
            with pytest.raises(KeyError):
                self.pool.get(name)
            return
        if self.is_written(model):
            with pytest.raises(DeadlockError):
                self.pool.get(name).__enter__()
            return
        with self.pool.get(name) as value, self.pool.get(name) as again:
            assert value is again
            assert same(value, model.value)
            if isinstance(value, np.ndarray):
                assert not value.flags.writeable
            with pytest.raises(DeadlockError):
                self.pool.get_mut(name).__enter__()
        assert same(self.pool[name], model.value)

    @rule(
        name=st.sampled_from(NAMES),
        seed=SEEDS,
        fails=st.booleans(),
        rollback=st.booleans(),
        rebind=st.none() | KINDS,
    )
    def get_mut(self, name: Any, seed: int, fails: bool, rollback: bool, rebind: str | None) -> None:
        model = self.names.get(name)
        if model is None:
            return
        if self.is_written(model) or self.is_held(model):
            with pytest.raises(DeadlockError):
                self.pool.get_mut(name, rollback=rollback).__enter__()
            return
        guard = self.pool.get_mut(name, rollback=rollback)
        try:
            with guard as value:
                assert same(value, model.value)
                if rebind is None:
                    guard.value = mutate(value, seed)
                else:
                    guard.value = make_value(rebind, seed)
                self.pool.validate()
                if fails:
                    raise BoomError
        except BoomError:
            if rollback:
                return
        model.steps.append(("mutate", seed) if rebind is None else ("make", rebind, seed))

    @rule(name=st.sampled_from(NAMES))
    def pop(self, name: Any) -> None:
        model = self.names.get(name)
        if model is None:
            assert self.pool.pop(name, 77) == 77
            return
        if self.is_written(model):
            with pytest.raises(DeadlockError):
                self.pool.pop(name)
            return
        expected = model.value
        assert same(self.pool.pop(name), expected)
        del self.names[name]
        model.name = MISSING

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: Any) -> None:
        model = self.names.pop(name, None)
        if model is None:
            with pytest.raises(KeyError):
                del self.pool[name]
            return
        del self.pool[name]
        model.name = MISSING

    # ------------------------------------------------- guards held from step to step

    @rule(name=st.sampled_from(NAMES))
    def enter(self, name: Any) -> None:
        model = self.names.get(name)
        if model is None or self.is_written(model):
            return
        guard = self.pool.get(name)
        value = guard.__enter__()
        self.held.append((guard, value, model))

    @rule(name=st.sampled_from(NAMES))
    def try_get(self, name: Any) -> None:
        model = self.names.get(name)
        if model is None:
            return
        if self.is_written(model):
            with pytest.raises(DeadlockError):
                self.pool.try_get(name)
            return
        guard = self.pool.try_get(name)
        if guard is None:
            return
        value = guard.__enter__()
        assert same(value, model.value)
        self.held.append((guard, value, model))

    @rule(pick=PICKS)
    def leave(self, pick: int) -> None:
        if self.held:
            guard, _, model = self.held.pop(pick % len(self.held))
            assert same(guard.value, model.value)
            guard.__exit__(None, None, None)

    @rule(name=st.sampled_from(NAMES), patient=st.booleans())
    def enter_mut(self, name: Any, patient: bool) -> None:
        model = self.names.get(name)
        if self.writing is not None or model is None or self.is_held(model):
            return
        guard = self.pool.get_mut(name) if patient else self.pool.try_get_mut(name)
        if guard is not None:
            assert same(guard.__enter__(), model.value)
            self.writing = guard, model

    @rule(seed=SEEDS)
    def change(self, seed: int) -> None:
        if self.writing is None:
            return
        guard, model = self.writing
        guard.value = mutate(guard.value, seed)
        model.steps.append(("mutate", seed))

    @rule()
    def leave_mut(self) -> None:
        if self.writing is None:
            return
        guard, model = self.writing
        assert same(guard.value, model.value)
        guard.__exit__(None, None, None)
        self.writing = None

    # -------------------------------------------------------------------- the budget

    @rule(names=st.none() | st.lists(st.sampled_from(NAMES)), nbytes=st.none() | st.integers(0, 2 * BUDGET))
    def evict(self, names: list[Any] | None, nbytes: int | None) -> None:
        known = None if names is None else [n for n in names if n in self.names]
        try:
            assert self.pool.evict(known, nbytes=nbytes) >= 0
        except self.trouble:
            return
        if names is None and nbytes is None and self.drained():
            stats = self.pool.stats()
            assert stats.resident_bytes == stats.pinned_bytes

    @rule(memory=st.sampled_from([1_000, BUDGET, 3 * BUDGET]))
    def resize(self, memory: int) -> None:
        self.pool.resize(memory)

    @rule()
    def drain(self) -> None:
        if self.drained():
            stats = self.pool.stats()
            assert stats.writing_bytes == 0
            if not self.trouble:
                assert stats.resident_bytes <= stats.budget + stats.pinned_bytes

    def drained(self) -> bool:
        try:
            self.pool.drain()
        except self.trouble:
            return False
        return True

    # ----------------------------------------------------------------------- always

    @invariant()
    def every_count_is_right(self) -> None:
        self.pool.validate()

    @invariant()
    def names_are_what_the_model_says(self) -> None:
        assert set(self.pool) == set(self.names)
        assert len(self.pool) == len(self.names)

    @invariant()
    def nobody_is_alive_whom_nobody_owns(self) -> None:
        alive = set(self.names.values()) | {m for m in self.entries.values() if m.handles}
        alive |= {m for _, _, m in self.held}
        if self.writing is not None:
            alive.add(self.writing[1])
        assert self.pool.stats().entries == len(alive)

    @invariant()
    def pinned_values_stay(self) -> None:
        for guard, value, _ in self.held:
            assert guard.value is value


class FailingMachine(PoolMachine):
    """The same on a disk whose writes fail by chance: no value is ever lost."""

    trouble = (StorageError,)

    def make_pool(self) -> FBPool:
        self.disk = FaultyDisk()
        store = FileStore(self.directory, disk=self.disk)
        return FBPool(BUDGET, store=store, policy=self.policy, **self.options)

    @initialize()
    def a_sound_disk(self) -> None:
        self.disk.clear()

    @rule(
        call=st.sampled_from(["writev", "rename"]),  # loads make other calls
        code=st.sampled_from([errno.ENOSPC, errno.EIO]),
        nth=st.integers(1, 3),
        times=st.sampled_from([1, 3, None]),
    )
    def break_disk(self, call: str, code: int, nth: int, times: int | None) -> None:
        self.disk.fail(call, error=oserror(code), nth=nth, times=times)

    @rule()
    def mend_disk(self) -> None:
        self.disk.clear()

    def settle(self) -> None:
        self.disk.clear()
        try:
            self.pool.drain()
        except StorageError:
            self.pool.drain()


POLICIES = ["lru", "lfu", "fifo", "rr", cachetools.LRUCache]


def drive(machine: type[PoolMachine], policy: Any, soak: bool, **options: Any) -> None:
    chosen = type(machine.__name__, (machine,), {"policy": policy, "options": options})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        chosen,
        settings=settings(
            max_examples=2_000 if soak else 100,
            stateful_step_count=100 if soak else 40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=not soak,
            database=None,
        ),
    )


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--io-threads") or 2


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_pool_does_what_a_dict_does(policy: Any, soak: bool, threads: int) -> None:
    drive(PoolMachine, policy, soak, io_threads=threads)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_pool_that_reads_instead_of_mapping_does_what_a_dict_does(
    policy: Any, soak: bool, threads: int
) -> None:
    drive(PoolMachine, policy, soak, io_threads=threads, mmap=False, verify="always")


@pytest.mark.parametrize("policy", ["lru", "rr"])
def test_a_pool_on_a_failing_disk_loses_no_value(policy: Any, soak: bool, threads: int) -> None:
    drive(FailingMachine, policy, soak, io_threads=threads)
