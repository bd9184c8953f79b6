"""DAGs: order, what is refused, and the way to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest

from fbcache.saga import (
    CorruptSagaError,
    DagBuilder,
    DagCycleError,
    DagError,
    OutputError,
    SagaDag,
    UnknownNodeError,
)
from fbcache.saga.encoding import decode, encode
from tests.saga.sagas import DIAMOND, dag_of


def test_parents_come_before_children_whatever_order_nodes_were_added_in():
    dag = dag_of(d="b c", c="a", b="a", a="")
    assert list(dag) == ["a", "c", "b", "d"]
    assert dag.parents("d") == ("b", "c")
    assert dag.children("a") == ("c", "b")
    assert dag.ancestors("d") == {"a", "b", "c"}
    assert dag.ancestors("a") == frozenset()


def test_a_parent_named_twice_counts_once():
    dag = DagBuilder().add("a", "act").add("b", "act", after=["a", "a"]).build()
    assert dag.children("a") == ("b",)


def test_a_circle_is_named():
    with pytest.raises(DagCycleError) as caught:
        dag_of(start="", a="start c", b="a", c="b")
    assert set(caught.value.nodes) == {"a", "b", "c"}
    assert " -> " in str(caught.value)
    with pytest.raises(DagCycleError):
        dag_of(a="a")


def test_what_is_no_dag_is_refused():
    builder = DagBuilder().add("a", "act")
    with pytest.raises(DagError, match="already"):
        builder.add("a", "other")
    with pytest.raises(DagError, match="at least one character"):
        builder.add("", "act")
    with pytest.raises(TypeError):
        builder.add(3, "act")
    with pytest.raises(TypeError):
        builder.add("c", "act", after=[3])
    assert list(builder.build()) == ["a"], "what was refused was not added"
    with pytest.raises(DagError, match="'ghost'") as caught:
        builder.add("b", "act", after="ghost").build()
    assert caught.value.nodes == ("b", "ghost")
    with pytest.raises(DagError, match="at least one node"):
        DagBuilder().build()
    with pytest.raises(UnknownNodeError, match="'x'"):
        DIAMOND["x"]


def test_a_dag_of_thousands_of_nodes_in_a_chain_is_built():
    builder = DagBuilder()
    for number in range(5000):
        builder.add(str(number), "act", after=() if number == 0 else str(number - 1))
    assert len(builder.build().ancestors("4999")) == 4999


def test_a_dag_with_parameters_comes_back_from_bytes():
    params = {"rows": np.arange(5.0), "who": ("x", None), 3: {1, 2}}
    back = SagaDag.from_bytes(SagaDag.of(DIAMOND, params).to_bytes())
    assert back.dag == DIAMOND
    assert np.array_equal(back.params["rows"], np.arange(5.0))
    assert (back.params["who"], back.params[3]) == (("x", None), {1, 2})
    assert back.params is not back.params


def test_parameters_that_need_pickle_are_refused():
    with pytest.raises(OutputError, match="parameters"):
        SagaDag.of(DIAMOND, {"f": open})


def test_bytes_that_are_no_dag_are_refused():
    packed = SagaDag.of(DIAMOND).to_bytes()
    cut = (b"", packed[:-1], packed[: len(packed) // 2], packed + b"x")
    for damaged in (*cut, encode([1]), encode({"nodes": 3})):
        with pytest.raises(CorruptSagaError):
            SagaDag.from_bytes(damaged)
    circle = encode({"nodes": [["a", "act", ["b"]], ["b", "act", ["a"]]], "params": encode(None)})
    with pytest.raises(CorruptSagaError, match="wait for each other"):
        SagaDag.from_bytes(circle)


def test_every_flipped_byte_of_a_recorded_value_is_noticed():
    packed = encode({"a": [1, 2], "array": np.arange(100.0)})
    for position in range(len(packed)):
        damaged = bytearray(packed)
        damaged[position] ^= 1
        with pytest.raises(CorruptSagaError):
            decode(bytes(damaged))
