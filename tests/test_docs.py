"""The documents: they parse, their links lead somewhere, their code runs and prints what they say."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from docutils import nodes
from docutils.core import publish_doctree
from docutils.utils import Reporter

import fbcache
from fbcache import errors
from fbcache.codec import layout
from fbcache.entry import _EDGES, State
from fbcache.store import auto, records, segment

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.rst", ROOT / "CHANGELOG.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def parse(path: Path) -> nodes.document:
    """Parse a document; the first warning raises."""
    strict = {
        "report_level": Reporter.INFO_LEVEL,
        "halt_level": Reporter.WARNING_LEVEL,
        "warning_stream": io.StringIO(),
        "syntax_highlight": "none",
        "input_encoding": "utf-8",
        "_disable_config": True,
    }
    return publish_doctree(path.read_text("utf-8"), source_path=str(path), settings_overrides=strict)


def blocks(path: Path, kind: str) -> list[nodes.literal_block]:
    """The code blocks of one kind: a language, or a class."""
    return [node for node in parse(path).findall(nodes.literal_block) if kind in node["classes"]]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def by_path(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=relative)


def test_there_are_documents_and_examples() -> None:
    assert len(DOCUMENTS) >= 10
    assert len(EXAMPLES) >= 2


@by_path(DOCUMENTS)
def test_a_document_parses_without_a_warning(path: Path) -> None:
    assert parse(path).next_node(nodes.title) is not None


@by_path(DOCUMENTS)
def test_every_link_leads_to_a_file(path: Path) -> None:
    for link in parse(path).findall(nodes.reference):
        target = link.get("refuri", "")
        if target and not target.startswith(("http:", "https:", "mailto:")):
            assert (path.parent / target).exists(), f"{relative(path)} links to {target}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    pending = [ROOT / "README.rst"]
    while pending:
        path = pending.pop()
        if path in reached or path.suffix != ".rst":
            continue
        reached.add(path)
        links = parse(path).findall(nodes.reference)
        pending += [(path.parent / link["refuri"]).resolve() for link in links if link.get("refuri")]
    assert reached >= set(DOCUMENTS)


@by_path(DOCUMENTS)
def test_the_code_runs_and_prints_what_the_document_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    document = ModuleType("document")  # where dataclasses look their module up
    monkeypatch.setitem(sys.modules, "document", document)
    printed = io.StringIO()
    for number, block in enumerate(parse(path).findall(nodes.literal_block), start=1):
        kinds = block["classes"]
        if "output" in kinds:
            assert printed.getvalue().strip() == block.astext().strip(), f"block {number}"
        elif "python" in kinds:
            code = compile(block.astext(), f"{relative(path)}, block {number}", "exec", dont_inherit=True)
            printed = io.StringIO()
            if "illustration" not in kinds:
                with contextlib.redirect_stdout(printed):
                    exec(code, document.__dict__)
    assert not list(tmp_path.rglob("session-*")), "a pool was left open"


@by_path(EXAMPLES)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = [sys.executable, str(path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr
    assert not list(tmp_path.rglob("session-*"))


def test_the_quick_start_is_two_commands() -> None:
    (block,) = blocks(ROOT / "README.rst", "sh")
    first, second = block.astext().splitlines()
    assert first.endswith("fbcache demo")
    assert "pytest" in second


def test_the_ten_lines_are_about_ten() -> None:
    (block,) = blocks(ROOT / "README.rst", "python")
    assert len([line for line in block.astext().splitlines() if line.strip()]) <= 12


def test_the_edges_of_the_design_are_those_of_the_code() -> None:
    (block,) = blocks(ROOT / "docs" / "design.rst", "edges")
    told = {tuple(line.split()[:3]) for line in block.astext().splitlines()}
    true = {
        (state.name, event.name, after.name)
        for (state, event), after in _EDGES.items()
        if state is not State.DROPPED
    }
    assert told == true


def test_every_state_is_explained() -> None:
    text = (ROOT / "docs" / "design.rst").read_text("utf-8")
    for state in State:
        assert re.search(rf"^{state.name} ", text, re.MULTILINE), state.name


def test_the_layout_of_the_design_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "design.rst").read_text("utf-8")
    assert layout.MAGIC.hex(" ") in text
    assert f"version of the layout, {layout.VERSION}" in text
    assert re.search(rf"^{layout.PREFIX_SIZE} +H +header", text, re.MULTILINE)
    assert f"a multiple of {layout.ALIGNMENT}, or of {layout.PAGE}" in text
    (record,) = blocks(ROOT / "docs" / "design.rst", "record")
    assert re.search(rf"^{records.HEAD_SIZE} +\.\.\. the body", record.astext(), re.MULTILINE)
    assert f"up to {auto.SMALL >> 10} KiB together" in text
    assert f"files of {segment.SEGMENT >> 20} MiB" in text


def public_errors() -> Iterator[str]:
    for name in fbcache.__all__:
        thing = getattr(fbcache, name)
        if isinstance(thing, type) and issubclass(thing, errors.FBCacheError):
            yield name


@pytest.mark.parametrize("name", list(public_errors()))
def test_every_error_is_explained(name: str) -> None:
    text = (ROOT / "docs" / "errors.rst").read_text("utf-8")
    bases = [base.__name__ for base in getattr(errors, name).__bases__ if base is not errors.FBCacheError]
    if bases and bases != ["Exception"]:
        assert re.search(rf"^``{name}`` \(``{bases[0]}``\)$", text, re.MULTILINE)
    else:
        assert f"``{name}``" in text


@by_path(DOCUMENTS)
def test_modules_that_are_named_exist(path: Path) -> None:
    package = ROOT / "fbcache"
    for node in parse(path).findall(nodes.literal):
        if re.fullmatch(r"[\w/]+\.py", node.astext()):
            name = node.astext().removeprefix("fbcache/")
            assert (package / name).exists(), f"{relative(path)} names {node.astext()}"
