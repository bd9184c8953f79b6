"""What ``FBCACHE_COMPILE=1 pip install .`` compiles: that it can be, and that it is where it should."""

from __future__ import annotations

import ast
import importlib
import os
import runpy
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
SETUP = HERE / "setup.py"

#: Bases that mypyc knows how to do without, or to build on.
_KNOWN = {"Protocol", "Generic", "IntEnum"}


def modules() -> list[str]:
    if not SETUP.exists():
        pytest.skip("the tests of an installed package have no setup.py beside them")
    return list(runpy.run_path(str(SETUP))["COMPILED"])


def classes(module: str) -> list[ast.ClassDef]:
    tree = ast.parse((HERE / "fbcache" / f"{module}.py").read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def name_of(base: ast.expr) -> str:
    while isinstance(base, (ast.Subscript, ast.Attribute)):
        base = base.value
    assert isinstance(base, ast.Name)
    return base.id


def test_compiled_classes_inherit_only_from_compiled_ones() -> None:
    """mypyc compiles others too, but an instance would have no room for what its base keeps: it crashes."""
    found = {node.name: [name_of(base) for base in node.bases] for m in modules() for node in classes(m)}
    assert len(found) > 30
    strangers = {name: set(bases) - found.keys() - _KNOWN for name, bases in found.items()}
    assert not {name: bases for name, bases in strangers.items() if bases}


def test_only_compiled_classes_inherit_from_compiled_ones() -> None:
    """An interpreted class that does so cannot be made: a TypeError at its import."""
    found = {node.name: [name_of(base) for base in node.bases] for m in modules() for node in classes(m)}
    compiled = {name for name, bases in found.items() if "Protocol" not in bases}
    here = {f"fbcache/{module}.py" for module in modules()}
    for path in sorted((HERE / "fbcache").rglob("*.py")):
        if str(path.relative_to(HERE)) in here:
            continue
        tree = ast.parse(path.read_text())
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and f"{(node.module or '').replace('.', '/')}.py" in here
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = {name_of(base) for base in node.bases} & imported & compiled
                assert not bases, f"{path}: {node.name} inherits from {bases}"


def test_what_should_run_compiled_does() -> None:
    """CI sets FBCACHE_COMPILED where it has built it so."""
    wanted = os.environ.get("FBCACHE_COMPILED") == "1"
    module = importlib.import_module("fbcache.residency")
    assert module.__file__ is not None
    assert module.__file__.endswith(".so") == wanted
