"""Dataclasses that are their own snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fbcache.actors import (
    Args,
    MemoryStorage,
    PersistenceError,
    PersistenceKind,
    PersistentActor,
    own_snapshot,
)
from fbcache.actors.storage import load


@own_snapshot(runtime=["db"])
@dataclass
class Account(PersistentActor):
    owner: str
    db: Any
    balance: int = 0
    log: list[int] = field(default_factory=list, kw_only=True)
    doubled: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.doubled = 2 * self.balance

    def pay(self, amount: int) -> None:
        self.balance += amount
        self.log.append(amount)
        self.save_snapshot()

    def seen(self) -> tuple[Any, ...]:
        return self.owner, self.db, self.balance, self.log, self.doubled


@own_snapshot(name="tests.actors.state")
@dataclass
class State:
    count: int
    weights: np.ndarray


class Trainer(PersistentActor[State]):
    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def step(self) -> None:
        self.state.count += 1
        self.state.weights += 1
        self.save_snapshot(self.storage, self.state)


def test_an_actor_that_is_a_dataclass_is_saved_by_its_fields() -> None:
    storage = MemoryStorage()
    connection = object()
    ref = Account.spawn_persistent(storage, "a", Args("ann", db=connection))
    ref.proxy().pay(5).get()
    ref.finish()
    assert load(storage, "a") == {"owner": "ann", "balance": 5, "log": [5]}
    another = object()
    ref = Account.respawn(storage, "a", {"db": another})
    assert ref.proxy().seen().get() == ("ann", another, 5, [5], 10)
    ref.proxy().pay(2).get()
    ref.finish()
    assert load(storage, "a")["log"] == [5, 2]


def test_a_dataclass_that_is_no_actor_is_a_snapshot_type() -> None:
    storage = MemoryStorage()
    assert Trainer.snapshot_type is State
    ref = Trainer.spawn_persistent(storage, "t", State(0, np.zeros(3)))
    ref.proxy().step().get(), ref.proxy().step().get()
    ref.finish()
    ref = Trainer.respawn(storage, "t")
    ref.proxy().step().get()
    assert ref.proxy().state.get().count == 3
    assert ref.proxy().state.get().weights.tolist() == [3, 3, 3]
    ref.finish()


def test_a_field_that_came_later_has_its_default_and_one_that_went_is_an_error() -> None:
    @own_snapshot
    @dataclass
    class First(PersistentActor):
        a: int = 1

    @own_snapshot
    @dataclass
    class Later(PersistentActor):
        a: int = 1
        b: int = 2

    @own_snapshot
    @dataclass
    class Needing(PersistentActor):
        c: int
        a: int = 1
        b: int = 2

    storage = MemoryStorage()
    ref = First.spawn_persistent(storage, "x", 7)
    ref.proxy().save_snapshot().get()
    ref.finish()
    ref = Later.respawn(storage, "x")
    assert (ref.proxy().a.get(), ref.proxy().b.get()) == (7, 2)
    ref.proxy().save_snapshot().get()
    ref.finish()
    for cls, text in ((First, r"unknown here: \['b'\]"), (Needing, r"missing there: \['c'\]")):
        with pytest.raises(PersistenceError, match=text) as caught:
            cls.respawn_or(storage, "x", default_args=(1, 2), on_corrupt="default")
        assert caught.value.kind is PersistenceKind.DESERIALIZE


def test_what_the_class_says_of_its_snapshot_counts() -> None:
    @own_snapshot
    @dataclass
    class Halved(PersistentActor[int]):
        a: int = 0

        def take_snapshot(self) -> int:
            return self.a // 2

        @classmethod
        def persistent_args(cls, snapshot: int, runtime_args: Any) -> Any:
            return snapshot

    storage = MemoryStorage()
    ref = Halved.spawn_persistent(storage, "x", 10)
    ref.proxy().save_snapshot().get()
    ref.finish()
    ref = Halved.respawn(storage, "x")
    assert ref.proxy().a.get() == 5
    assert ref.actor_id == "x"


def test_what_is_no_dataclass_is_refused() -> None:
    with pytest.raises(TypeError, match="stands above @dataclass"):
        own_snapshot(Trainer)
    with pytest.raises(TypeError, match="has no field"):
        own_snapshot(runtime=["nothing"])(dataclass(type("A", (PersistentActor,), {"__module__": __name__})))
    with pytest.raises(TypeError, match="no PersistentActor"):
        own_snapshot(runtime=["count"])(State)
    with pytest.raises(TypeError, match="is frozen"):
        own_snapshot(dataclass(frozen=True)(type("A", (PersistentActor,), {"__module__": __name__})))
