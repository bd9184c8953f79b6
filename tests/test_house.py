"""The house is as its map says: public names, rooms, docstrings, and a total function of states."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

import fbcache
from fbcache import InternalError, State
from fbcache.codec.families.kinds import LIBRARIES
from fbcache.entry import Event, next_state

PACKAGE = Path(fbcache.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

PUBLIC = [
    *("FBPool", "Fb", "ReadGuard", "WriteGuard", "State", "PoolStats"),
    *("TrackedDirectory", "Checkpoint", "VerifyReport"),
    *("MsgpackCodec", "Compressed", "Frames", "register"),
    *("FileStore", "PackedStore", "DiskcacheStore"),
    *("FBCacheError", "FBCacheWarning"),
    *("StaleKeyError", "DeadlockError", "PoolClosedError", "ForkedPoolError"),
    *("DirectoryInUseError", "ReadOnlyError", "MutatedError", "MissingLibraryError"),
    *("NameTakenError", "CheckpointNotFoundError"),
    *("UnsupportedTypeError", "PickleRefusedError"),
    *("StorageError", "DiskFullError", "PutTimeoutError"),
    *("CorruptBlobError", "CorruptCheckpointError", "InternalError"),
]


def test_the_public_names_are_these():
    assert sorted(fbcache.__all__) == sorted(PUBLIC)
    assert len(set(fbcache.__all__)) == len(fbcache.__all__)
    for name in PUBLIC:
        assert getattr(fbcache, name).__module__.startswith("fbcache."), name


def test_every_error_is_a_builtin_that_a_caller_without_fbcache_in_mind_would_catch():
    errors = {name: getattr(fbcache, name) for name in PUBLIC if name.endswith("Error")}
    assert {name: kind.__bases__[-1].__name__ for name, kind in errors.items()} == {
        "FBCacheError": "Exception",
        "DiskFullError": "StorageError",
        "StaleKeyError": "KeyError",
        "DeadlockError": "RuntimeError",
        "PoolClosedError": "RuntimeError",
        "ForkedPoolError": "RuntimeError",
        "DirectoryInUseError": "RuntimeError",
        "ReadOnlyError": "PermissionError",
        "MutatedError": "RuntimeError",
        "MissingLibraryError": "ImportError",
        "NameTakenError": "ValueError",
        "CheckpointNotFoundError": "KeyError",
        "UnsupportedTypeError": "TypeError",
        "PickleRefusedError": "TypeError",
        "StorageError": "OSError",
        "PutTimeoutError": "TimeoutError",
        "CorruptBlobError": "FBCacheError",
        "CorruptCheckpointError": "FBCacheError",
        "InternalError": "AssertionError",
    }
    assert all(issubclass(kind, fbcache.FBCacheError) for kind in errors.values())


# ------------------------------------------------------------------ rooms


def map_of_the_house():
    """Rooms from the street to the cellar, each a list of modules, as the package's docstring has them."""
    rows = re.findall(r"^(``\w+``(?:, ``\w+``)*)$", fbcache.__doc__, re.MULTILINE)
    return [re.findall(r"``(\w+)``", row) for row in rows]


def room_of(module):
    """``fbcache.store.files`` is in the room ``store``."""
    return module.split(".")[1] if "." in module else ""


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports_of(path):
    """The fbcache modules that a file imports at run time, wherever it does so."""
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fbcache")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module and node.module.split(".")[0] == "fbcache":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module


def test_every_module_is_on_the_map_once():
    on_the_map = [module for room in map_of_the_house() for module in room]
    assert len(on_the_map) == len(set(on_the_map))
    assert {room_of(module_of(path)) for path in FILES} - {"", "__main__"} <= set(on_the_map)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_each_room_imports_only_from_itself_and_rooms_below(path):
    depth = {module: level for level, room in enumerate(map_of_the_house()) for module in room}
    depth[""] = depth["__main__"] = 0  # the front door is at the street
    here = room_of(module_of(path))
    for imported in imports_of(path):
        there = room_of(imported)
        assert depth[here] <= depth[there], f"{module_of(path)} imports {imported} from above"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_of(path): set(imports_of(path)) for path in FILES}
    while ready := {name for name, imported in graph.items() if not imported & graph.keys()}:
        for name in ready:
            del graph[name]
    assert graph == {}


def test_nothing_in_the_cellar_knows_the_pool():
    for path in FILES:
        if room_of(module_of(path)) in ("codec", "store", "errors"):
            for imported in imports_of(path):
                assert room_of(imported) in ("codec", "store", "errors"), f"{path} imports {imported}"


# ------------------------------------------------------------------ docstrings and size


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_file_has_a_docstring_that_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and docstring.split("\n")[0].endswith((".", ":")), "a first line that is a sentence"


def test_every_public_call_has_a_docstring():
    for name in PUBLIC:
        thing = getattr(fbcache, name)
        assert thing.__doc__, name
        if isinstance(thing, type):
            for attribute, member in vars(thing).items():
                if not attribute.startswith("_") and (callable(member) or isinstance(member, property)):
                    assert member.__doc__, f"{name}.{attribute}"


# ------------------------------------------------------------------ states

EDGES = {
    "RESIDENT": {"WRITE": "WRITING", "MUTATE": "MUTATING", "DROP": "DROPPED"},
    "WRITING": {"WRITTEN": "CLEAN", "WRITE_FAILED": "RESIDENT", "DROP": "DROPPED"},
    "CLEAN": {"EVICT": "SPILLED", "MUTATE": "MUTATING", "DROP": "DROPPED"},
    "SPILLED": {"LOAD": "LOADING", "RECALL": "CLEAN", "DROP": "DROPPED"},
    "LOADING": {"LOADED": "CLEAN", "LOAD_FAILED": "SPILLED", "DROP": "DROPPED"},
    "MUTATING": {"SETTLE": "RESIDENT", "RESTORE": "SPILLED", "DROP": "DROPPED"},
    "DROPPED": dict.fromkeys(
        ("WRITTEN", "WRITE_FAILED", "LOADED", "LOAD_FAILED", "SETTLE", "RESTORE"), "DROPPED"
    ),
}


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)), ids=lambda member: member.name)
def test_next_state_is_total_and_has_these_edges(state, event):
    if event.name in EDGES[state.name]:
        assert next_state(state, event).name == EDGES[state.name][event.name]
    else:
        with pytest.raises(InternalError, match=rf"{state.name}.*{event.name}"):
            next_state(state, event)


def test_every_state_is_documented_and_can_be_reached_and_left():
    assert set(EDGES) == {state.name for state in State}
    reached, pending = {"RESIDENT"}, ["RESIDENT"]
    while pending:
        for target in EDGES[pending.pop()].values():
            if target not in reached:
                reached.add(target)
                pending.append(target)
    assert reached == set(EDGES)
    source = (PACKAGE / "entry.py").read_text()
    for member in (*State, *Event):
        assert re.search(rf"^    {member.name} = {member.value}  #: \S", source, re.MULTILINE), member


def test_importing_fbcache_imports_no_library_that_is_optional():
    others = ["diskcache", "zstandard", "lz4", "attr", "pydantic", "pykka", "obstore", "rich", "pytest"]
    names = [*LIBRARIES, *others]
    code = f"import sys, fbcache, fbcache.testing; print(sorted(sys.modules.keys() & {set(names)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
