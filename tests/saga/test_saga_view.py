"""What people see: trees, graphs, and the command ``fbcache saga``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from uuid import UUID, uuid4

import pytest

from fbcache.saga import (
    DagBuilder,
    InMemorySagaStore,
    SagaCachedState,
    SagaCreateParams,
    SagaDag,
    SagaExecutor,
    SagaNodeEvent,
    SagaNodeState,
    SagaStatus,
    SagaView,
    SqliteSagaStore,
)
from tests.saga.sagas import DIAMOND, STARTED, TWO, Acts, dag_of, ended, run

ID = UUID("00000000-0000-4000-8000-000000000001")


def view_of(dag, fails=(), undo_fails=(), name="test"):
    with SagaExecutor(InMemorySagaStore(), Acts(fails, undo_fails).registry) as executor:
        future = executor.saga_create(ID, name, dag)
        executor.saga_start(ID)
        ended(future)
        return executor.saga_get(ID)


def test_pretty_draws_each_node_once_with_its_state():
    assert view_of(DIAMOND, fails=["d"]).pretty().splitlines() == [
        f"test {ID} failed",
        "└─ a: undone",
        "   ├─ b: undone",
        "   │  └─ d (also after c): failed, ValueError: d cannot",
        "   └─ c: undone",
    ]


def test_pretty_draws_several_roots_and_what_never_started():
    view = view_of(dag_of(a="", b="a", x="", y="b x"), fails=["a", "x"], name="two")
    lines = view.pretty().splitlines()
    assert lines[0] == f"two {ID} failed"
    assert lines[1].startswith("├─ a: failed, ValueError")
    assert lines[2] == "│  └─ b: never started"
    assert lines[3] == "│     └─ y (also after x): never started"
    assert lines[4].startswith("└─ x: failed")


def test_pretty_tells_of_a_stuck_undo_and_of_a_saga_not_started():
    assert "n1: stuck, ValueError: n1 cannot be undone" in view_of(TWO, ["n2"], ["n1"]).pretty()
    with SagaExecutor(InMemorySagaStore(), Acts().registry) as executor:
        executor.saga_create(ID, "test", TWO)
        assert executor.saga_get(ID).pretty().splitlines()[0] == f"test {ID} ready"


def test_a_long_chain_is_drawn_without_recursion():
    builder = DagBuilder()
    for number in range(3000):
        builder.add(str(number), "act", after=() if number == 0 else str(number - 1))
    dag = builder.build()
    states = dict.fromkeys(dag, SagaNodeState.SUCCEEDED)
    view = SagaView(ID, "long", dag, SagaStatus.DONE, states, {})
    assert len(view.pretty().splitlines()) == 3001


def statements(dot):
    """What a graph in dot's language says, by the grammar that we use; anything else raises."""
    quoted = r'"(?:[^"\\]|\\.)*"'
    attribute = rf"\w+=(?:{quoted}|\w+)"
    patterns = {
        "label": rf"label={quoted}",
        "default": rf"node \[{attribute}(?:, {attribute})*\]",
        "node": rf"({quoted}) \[{attribute}(?:, {attribute})*\]",
        "edge": rf"({quoted}) -> ({quoted})",
    }
    match = re.fullmatch(rf"digraph {quoted} \{{\n(.*)\n\}}", dot, re.DOTALL)
    assert match, dot
    found = {name: [] for name in patterns}
    for line in match[1].split("\n"):
        kinds = [(name, re.fullmatch(rf"  {pattern};", line)) for name, pattern in patterns.items()]
        ((name, hit),) = [(name, hit) for name, hit in kinds if hit]
        found[name].append(hit.groups())
    return found


AWKWARD = ['say "hi"', "back\\slash", "line\nfeed", "ümlaut", "a -> b;", "end\\", "{x}", "digraph", "[l]"]


def awkward_view():
    builder = DagBuilder()
    for number, name in enumerate(AWKWARD):
        builder.add(name, "act", after=AWKWARD[:number][-2:])
    return view_of(builder.build(), fails=[AWKWARD[-1]], name='the "saga"\\')


def test_dot_is_valid_whatever_nodes_are_called():
    found = statements(awkward_view().dot())
    assert len(found["node"]) == len(AWKWARD) == len(set(found["node"]))
    assert len(found["edge"]) == 2 * len(AWKWARD) - 3
    names = {name for (name,) in found["node"]}
    assert all({parent, child} <= names for parent, child in found["edge"])


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_takes_the_graph():
    graph = awkward_view().dot().encode()
    done = subprocess.run(["dot", "-Tplain"], input=graph, capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.count(b"\nedge ") == 2 * len(AWKWARD) - 3


# ------------------------------------------------------------------ the command


def command(*arguments):
    run = [sys.executable, "-W", "error", "-m", "fbcache", "saga", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=60)


@pytest.fixture
def recorded(tmp_path):
    """A file with sagas of every kind, and their ids."""
    ids = {name: uuid4() for name in ("done", "failed", "stuck", "running", "superseded", "damaged")}
    path = tmp_path / "sagas.sqlite"
    with SqliteSagaStore(path) as store:
        for name, fails, undo_fails in (("done", "", ""), ("failed", ["n2"], ""), ("stuck", ["n2"], ["n1"])):
            with SagaExecutor(store, Acts(fails, undo_fails).registry) as executor:
                ended(run(executor, TWO, saga_id=ids[name]))
        for name in ("running", "superseded", "damaged"):
            store.saga_create(SagaCreateParams(ids[name], name, SagaDag.of(DIAMOND)))
        store.record_event(SagaNodeEvent(ids["running"], "a", STARTED))
        store.saga_update(ids["superseded"], SagaCachedState.DONE)
        store._connection.execute("UPDATE saga SET dag = x'00' WHERE name = 'damaged'")
    return path, ids


def test_ls_lists_every_saga_with_its_status(recorded):
    path, ids = recorded
    listed = command("ls", path)
    assert (listed.returncode, listed.stderr) == (0, "")
    statuses = {line.split()[0]: line.split()[1] for line in listed.stdout.splitlines()}
    expected = {str(each): name for name, each in ids.items()}
    expected[str(ids["damaged"])] = "unreadable"
    assert statuses == expected
    assert list(statuses) == [str(each) for each in ids.values()], "oldest first"
    rows = json.loads(command("ls", path, "--json").stdout)
    assert {row["id"]: row["status"] for row in rows} == expected
    assert rows[0] == {"id": str(ids["done"]), "name": "test", "status": "done", "done": 2, "nodes": 2}


def test_show_draws_a_saga(recorded):
    path, ids = recorded
    with SqliteSagaStore(path) as store:  # while another process writes
        shown = command("show", path, str(ids["failed"])[:18].upper())
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout == SagaView.of_record(store.saga_load(ids["failed"])).pretty() + "\n"
    assert "a: started" in command("show", path, ids["running"]).stdout
    graph = command("show", path, ids["stuck"], "--dot").stdout
    assert statements(graph.rstrip("\n"))["edge"] == [('"n1"', '"n2"')]
    told = json.loads(command("show", path, ids["stuck"], "--json").stdout)
    assert told["status"] == "stuck"
    assert told["nodes"][0] == {
        "name": "n1",
        "action": "act",
        "after": [],
        "state": "stuck",
        "reason": "ValueError: n1 cannot be undone",
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "PATH", "xyz"], "no saga's id begins with 'xyz'"),
        (["show", "PATH", ""], "several sagas"),
        (["show", "PATH"], "damaged"),
        (["show", "PATH", "--dot", "--json"], "exclude each other"),
        (["ls", "MISSING"], "does not exist"),
        (["ls", "TEXT"], "cannot be opened"),
        (["show", "EMPTY"], "no sagas"),
    ],
)
def test_what_cannot_be_shown_is_an_error_with_code_2(recorded, tmp_path, arguments, says):
    text, empty = tmp_path / "text", tmp_path / "empty"
    text.write_text("no database " * 99)
    SqliteSagaStore(empty).close()
    paths = {"PATH": recorded[0], "MISSING": "missing", "TEXT": text, "EMPTY": empty}
    done = command(*(paths.get(each, each) for each in arguments))
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
