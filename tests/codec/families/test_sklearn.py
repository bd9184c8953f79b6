"""Estimators of scikit-learn: by pickle, their arrays beside it, and refused where pickle is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fbcache import FBPool
from fbcache.codec import MsgpackCodec
from fbcache.errors import PickleRefusedError
from fbcache.sizeof import sizeof

RNG = np.random.default_rng(0)
SAMPLES = RNG.random((300, 8))
TARGETS = SAMPLES @ np.arange(8.0)
CLASSES = (np.median(TARGETS) < TARGETS).astype(int)


def fitted() -> dict[str, BaseEstimator]:
    return {
        "line": LinearRegression().fit(SAMPLES, TARGETS),
        "forest": RandomForestClassifier(5, random_state=0).fit(SAMPLES, CLASSES),
        "pipeline": make_pipeline(StandardScaler(), LinearRegression()).fit(SAMPLES, TARGETS),
        "clusters": KMeans(3, n_init=1, random_state=0).fit(SAMPLES),
        "neighbours": KNeighborsRegressor(algorithm="brute").fit(*many()),
    }


def many() -> tuple[Any, Any]:
    return np.tile(SAMPLES, (20, 1)), np.tile(TARGETS, 20)


ESTIMATORS = fitted()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_spilled_and_predicts_the_same(name: str, make_pool: Any) -> None:
    pool = make_pool("8MB")
    expected = ESTIMATORS[name].predict(SAMPLES)
    pool.put("e", ESTIMATORS[name])
    pool.evict()
    with pool.get("e") as back:
        assert type(back) is type(ESTIMATORS[name]) and back is not ESTIMATORS[name]
        assert np.array_equal(back.predict(SAMPLES), expected)
    del back


def test_an_estimator_is_fitted_again_under_a_write_guard(pool: FBPool) -> None:
    pool.put("e", LinearRegression().fit(SAMPLES, TARGETS))
    pool.evict()
    with pool.get_mut("e") as back:
        back.fit(SAMPLES, 2 * TARGETS)
    pool.evict()
    with pool.get("e") as back:
        assert np.allclose(back.predict(SAMPLES), 2 * TARGETS)


def test_arrays_travel_beside_the_pickle() -> None:
    frames = MsgpackCodec().encode(ESTIMATORS["neighbours"], allow_pickle=True)
    fit = ESTIMATORS["neighbours"]._fit_X
    assert max(memoryview(buffer).nbytes for buffer in frames.buffers) == fit.nbytes
    assert len(frames.tree) < 4096


def test_arrays_of_a_reloaded_estimator_are_views_of_its_file(make_pool: Any) -> None:
    pool = make_pool("8MB")
    pool.put("e", ESTIMATORS["neighbours"])
    pool.evict()
    with pool.get("e") as back:
        assert not back._fit_X.flags.owndata and not back._fit_X.flags.writeable
    del back


@pytest.mark.parametrize("name", ESTIMATORS)
def test_save_refuses_an_estimator_by_name_and_type(name: str, pool: FBPool, tmp_path: Path) -> None:
    pool.put(f"my {name}", ESTIMATORS[name])
    kind = type(ESTIMATORS[name])
    with pytest.raises(PickleRefusedError, match=f"my {name}.*{kind.__qualname__}"):
        pool.save(tmp_path / "saved")


_SCRIPT = """
import sys
import numpy as np
import pytest
from fbcache import FBPool, PickleRefusedError
from tests.codec.families.test_sklearn import ESTIMATORS, SAMPLES

path, directory = sys.argv[1:]
with pytest.raises(PickleRefusedError):
    with FBPool.from_checkpoint(path, directory=directory, min_free=0) as pool:
        with pool.get("line"):
            pass
with FBPool.from_checkpoint(path, directory=directory, min_free=0, allow_pickle=True) as pool:
    for name, estimator in ESTIMATORS.items():
        with pool.get(name) as back:
            assert np.array_equal(back.predict(SAMPLES), estimator.predict(SAMPLES)), name
"""


def test_a_checkpoint_with_pickles_opens_in_another_process_if_that_allows_them(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool("8MB")
    for name, estimator in ESTIMATORS.items():
        pool.put(name, estimator)
    pool.save(tmp_path / "saved", allow_pickle=True)
    other = make_pool("8MB")
    with pytest.raises(PickleRefusedError):
        other.restore(tmp_path / "saved")
    assert len(other) == 0
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "saved"), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


def test_an_estimator_counts_the_nodes_of_its_trees() -> None:
    forest = RandomForestClassifier(100, random_state=0).fit(RNG.random((2000, 8)), RNG.integers(0, 2, 2000))
    states = [estimator.tree_.__getstate__() for estimator in forest.estimators_]
    truth = sum(state["nodes"].nbytes + state["values"].nbytes for state in states)
    assert truth <= sizeof(forest) <= truth * 1.2
    nearest = KNeighborsRegressor(algorithm="kd_tree").fit(*many())
    fit = nearest._fit_X.nbytes + nearest._y.nbytes
    assert fit + len(nearest._fit_X) * 8 <= sizeof(nearest) <= fit * 1.3


def test_an_estimator_counts_the_arrays_in_its_attributes() -> None:
    neighbours = ESTIMATORS["neighbours"]
    truth = neighbours._fit_X.nbytes + neighbours._y.nbytes
    assert truth <= sizeof(neighbours) <= truth * 1.2
    assert truth <= sizeof(make_pipeline(StandardScaler(), neighbours)) <= truth * 1.2
