"""How far a long call has come: rising figures, a bar, and a way to end it."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from fbcache import FBPool, TrackedDirectory
from fbcache.checkpoint import progress
from tests.directories import blobs_in, sessions_in, versions_on


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


@pytest.fixture
def filled(pool: FBPool) -> FBPool:
    for number in range(10):
        pool[number] = np.full(1000, number)
    return pool


class Seen(list):
    """Takes every call down; raises at the n-th."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self._fail_at = fail_at

    def __call__(self, done: int, total: int) -> None:
        self.append((done, total))
        if self._fail_at is not None and len(self) == self._fail_at:
            raise ZeroDivisionError("the user has had enough")

    def check(self) -> None:
        """It rises from nothing to the total, and comes to that at the end only."""
        dones, totals = zip(*self, strict=True)
        assert len(set(totals)) == 1 and dones[0] == 0 and dones[-1] == totals[0]
        assert list(dones) == sorted(dones)
        assert all(done < totals[0] for done in dones[:-1]) or totals[0] == 0


def calls(pool: FBPool, target: Path, progress) -> dict:
    def verify() -> None:
        with TrackedDirectory(target, readonly=True) as tracked:
            tracked.verify(progress=progress)

    return {
        "save": lambda: pool.save(target, progress=progress),
        "restore": lambda: pool.restore(target, replace=True, progress=progress),
        "verify": verify,
    }


@pytest.mark.parametrize("call", ["save", "restore", "verify"])
def test_a_function_hears_figures_that_rise_to_the_total(filled, target, call):
    filled.save(target)
    seen = Seen()
    calls(filled, target, seen)[call]()
    seen.check()
    assert seen[-1][1] >= sum(filled.get(name)._entry.nbytes for name in filled)


def test_a_save_counts_on_the_way(filled, target):
    seen = Seen()
    filled.save(target, progress=seen)
    seen.check()
    assert len(seen) > 5


@pytest.mark.parametrize("call", ["save", "restore"])
def test_nothing_to_do_is_done_at_once(pool, target, call):
    pool.save(target)
    seen = Seen()
    calls(pool, target, seen)[call]()
    assert set(seen) == {(0, 0)}


def test_a_function_that_raises_ends_a_save_and_the_former_checkpoint_stands(filled, target):
    """Invariant 12: at whichever call it is raised, the last one included."""
    filled.save(target)
    former = blobs_in(target)
    seen = Seen()
    for number in range(10):
        filled[number] = np.full(1000, -number)
    filled.save(target / "other", progress=seen)
    for nth in range(1, len(seen) + 1):
        with pytest.raises(ZeroDivisionError):
            filled.save(target, progress=Seen(nth))
        assert versions_on(target) == [1] and blobs_in(target) == former
    filled.save(target)
    filled.validate()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_function_that_raises_ends_a_restore_which_changes_nothing(filled, make_pool, target, nth):
    filled.save(target)
    other = make_pool()
    other[0] = "mine"
    with pytest.raises(ZeroDivisionError):
        other.restore(target, replace=True, progress=Seen(nth))
    assert other.keys() == [0] and other[0] == "mine" and sessions_in(target) == []
    other.restore(target, replace=True)


def test_a_function_that_raises_ends_a_verification(filled, target):
    filled.save(target)
    for nth in range(1, 12):
        with TrackedDirectory(target, readonly=True) as tracked, pytest.raises(ZeroDivisionError):
            tracked.verify(progress=Seen(nth))


def test_a_function_may_use_the_pool_and_the_directory(filled, make_pool, target):
    """Invariant 5: it is called under no lock."""
    filled.save(target)
    seen = []

    def look(done, total):
        with TrackedDirectory(target, readonly=True) as tracked:
            seen.append((filled[0][0], len(tracked.checkpoints()), filled.stats().entries))

    for call in calls(filled, target, look).values():
        call()
    assert len(seen) > 10


@pytest.mark.parametrize("call", ["save", "restore", "verify"])
def test_true_draws_a_bar_and_nothing_else_is_printed(filled, target, call, capsys):
    filled.save(target)
    calls(filled, target, True)[call]()
    shown = capsys.readouterr()
    assert "100%" in shown.err and call in shown.err and target.name in shown.err and shown.out == ""
    calls(filled, target, False)[call]()
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_closed_however_the_call_ends(filled, target, capsys, monkeypatch):
    bars = []
    real = progress._bar
    monkeypatch.setattr(progress, "_bar", lambda what: bars.append(real(what)) or bars[-1])
    filled.save(target, progress=True)
    with pytest.raises(KeyError):
        filled.save(target, ["no such name"], progress=True)
    assert [bar.disable for bar in bars] == [True, True]
    capsys.readouterr()


def test_without_tqdm_the_error_says_what_to_install_and_nothing_is_saved(filled, target, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ModuleNotFoundError("no tqdm", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"fbcache\[progress\]"):
        filled.save(target, progress=True)
    assert not target.exists()


@pytest.mark.parametrize("bad", [None, 1, "yes", [], 0])
@pytest.mark.parametrize("call", ["save", "restore", "verify"])
def test_anything_else_is_a_typeerror_that_says_what_would_do(filled, target, call, bad):
    filled.save(target)
    with pytest.raises(TypeError, match=r"\(done, total\)"):
        calls(filled, target, bad)[call]()
    assert versions_on(target) == [1]
