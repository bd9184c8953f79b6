"""docs/types.rst says of every type what it does: how it travels, comes back, can be changed, and restores.

Each cell is measured. ``FBCACHE_WRITE_DOCS=1 python -m pytest tests/test_types_table.py`` writes them anew.
Rows of libraries that are not here, or older than those the table is about, stay as they are.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from fbcache import FBPool
from fbcache.codec import Frames, MsgpackCodec, tags
from fbcache.codec.families import kinds
from fbcache.errors import PickleRefusedError, UnsupportedTypeError
from tests.type_samples import Sample, Section, Write
from tests.type_samples_of_libraries import SECTIONS

DOCUMENT = Path(__file__).parent.parent / "docs" / "types.rst"
CODEC = MsgpackCodec()
BULK = 1 << 16  # bytes; smaller buffers are parts of no weight

TITLES = ("type", "travels as", "comes back as", "for a reader", "without pickle")

Row = tuple[str, ...]
Pools = Callable[..., FBPool]

pytestmark = [pytest.mark.files, pytest.mark.filterwarnings("ignore")]


def encoded(value: Any) -> Frames:
    return CODEC.encode(value, allow_pickle=True)


def start(buffer: Any) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def bulk(frames: Frames) -> list[memoryview]:
    """The buffers, if they are what the value is made of."""
    large = [memoryview(buffer).cast("B") for buffer in frames.buffers]
    large = [buffer for buffer in large if buffer.nbytes >= BULK]
    return large if 2 * sum(buffer.nbytes for buffer in large) > frames.nbytes else []


def lent(value: Any) -> list[memoryview]:
    """What is written straight from the value's own memory: the same twice, while both are held."""
    first, second = bulk(encoded(value)), bulk(encoded(value))
    return [one for one, other in zip(first, second, strict=True) if start(one) == start(other)]


# ------------------------------------------------------------------------------ how it travels


def families(node: Any, family: str | None = None) -> Iterator[tuple[str, int | None]]:
    """The kinds in a tree, each with the buffers of arrays that are written by it, or None."""
    if isinstance(node, dict):
        for part in node.values():
            yield from families(part, family)
    elif isinstance(node, list):
        if len(node) == 3 and node[0] == tags.FAMILY and type(node[1]) is str:
            family = node[1]
            yield family, None
        elif node and node[0] in (tags.ARRAY, tags.VIEW) and len(node) > 3 and type(node[3]) is int:
            yield family or "", node[3]
        for part in node:
            yield from families(part, family)


def kinds_in(frames: Frames) -> set[str]:
    return {name for name, _ in families(msgpack.unpackb(frames.tree, strict_map_key=False))}


def travels(value: Any) -> str:
    frames = encoded(value)
    if frames.pickled is not None:
        return "pickle, its arrays raw" if lent(value) else "pickle"
    found = list(families(msgpack.unpackb(frames.tree, strict_map_key=False)))
    if not bulk(frames):
        root = kinds.kind_of(type(value))
        return "Arrow" if root is not None and root.travels == "Arrow" else "msgpack"
    holders = {name for name, number in found if number is not None and is_bulk(frames, number)}
    ways = {kinds._by_name[name].travels for name in holders if name}
    way = "Arrow" if "Arrow" in ways else "raw"
    return way if lent(value) else f"{way}, from a copy"


def is_bulk(frames: Frames, number: int) -> bool:
    return memoryview(frames.buffers[number]).nbytes >= BULK


# -------------------------------------------------------------------------------- what comes back


def mapped(directory: Path) -> list[tuple[int, int]]:
    """Stretches of this process's memory that are files below a directory."""
    found = []
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        stretch, *_, path = line.split(maxsplit=5)
        if path.startswith(str(directory)):
            first, last = (int(number, 16) for number in stretch.split("-"))
            found.append((first, last))
    return found


def comes_back(value: Any, directory: Path) -> str:
    frames, pieces = encoded(value), lent(value)
    if not bulk(frames) or (frames.pickled is not None and not pieces):
        return "a new object"
    if not pieces:
        return "a view of the file" if follows_its_file(value, directory) else "a copy"
    places = mapped(directory)
    total = sum(piece.nbytes for piece in pieces)
    inside = sum(p.nbytes for p in pieces if any(a <= start(p) <= b - p.nbytes for a, b in places))
    if 10 * inside >= 9 * total:
        return "a view of the file"
    return "a copy" if 10 * inside <= total else "a view of the file, in part"


def follows_its_file(value: Any, directory: Path) -> bool:
    """Whether a change of the file, which nobody else makes, shows in the value."""
    before = [bytes(piece) for piece in bulk(encoded(value))]
    place = len(before[0]) // 2
    needle = before[0][place : place + 64]
    (path,) = (p for p in directory.rglob("*") if p.is_file() and needle in p.read_bytes())
    at = path.read_bytes().index(needle)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(byte ^ 1 for byte in needle))
    changed = [bytes(piece) for piece in bulk(encoded(value))] != before
    with path.open("r+b") as file:
        file.seek(at)
        file.write(needle)
    return changed


# --------------------------------------------------------------------------- who can change it


def for_a_reader(sample: Sample, pool: FBPool, fresh: Callable[[], Any]) -> str:
    if not sample.writes:
        return "immutable"
    told = {what: both_outcomes(write, pool, fresh) for what, write in sample.writes.items()}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return ", ".join(f"{what} {outcome}" for what, outcome in told.items())


def both_outcomes(write: Write, pool: FBPool, fresh: Callable[[], Any]) -> str:
    """What comes of a write to the value as it was put, and to that which was read back."""
    first, second = (outcome(write, pool, fresh(), spilled) for spilled in (False, True))
    if first == second:
        return first
    assert (first, second) == ("changeable", "read-only")
    return "read-only once read back"


def outcome(write: Write, pool: FBPool, value: Any, spilled: bool) -> str:
    pool.put("value", value)
    del value
    if spilled:
        pool.evict()
    with pool.get("value") as held:
        before = state(held)
        try:
            write(held)
        except Exception:
            assert state(held) == before, "it was changed, and the error came afterwards"
            return "read-only"
        assert state(held) != before, "the sample's write does nothing"
        return "changeable"


def state(value: Any) -> tuple[bytes, list[bytes]]:
    frames = encoded(value)
    return frames.tree, [bytes(buffer) for buffer in frames.buffers]


# ----------------------------------------------------------------------------------------- rows


def without_pickle(value: Any) -> str:
    try:
        frames = CODEC.encode(value, allow_pickle=False)
    except PickleRefusedError:
        return "no"
    except UnsupportedTypeError:
        return "refused"
    back = CODEC.decode(frames, writable=False, allow_pickle=False)
    assert type(back) is type(value)
    return "yes"


def row_of(sample: Sample, pool: FBPool, directory: Path) -> Row:
    count = len(sample.make())
    makers = [lambda index=index: sample.make()[index] for index in range(count)]
    rows = {cells(sample, pool, directory, fresh) for fresh in makers}
    assert len(rows) == 1, f"values of {sample.title} differ: {rows}"
    return (sample.title, *rows.pop())


def cells(sample: Sample, pool: FBPool, directory: Path, fresh: Callable[[], Any]) -> Row:
    """Measure one value. Nothing but the pool keeps it, or it would be found again in memory."""
    told = without_pickle(fresh())
    if told == "refused":
        return ("\u2013", "\u2013", "\u2013", told)
    way = travels(fresh())
    pool.put("value", fresh())
    pool.evict()
    with pool.get("value") as held:
        back = comes_back(held, directory)
    del held
    change = for_a_reader(sample, pool, fresh)
    pool.delete("value")
    return way, back, change, told


# ------------------------------------------------------------------------------------- document


def table_of(rows: list[Row]) -> str:
    widths = [max(len(row[column]) for row in (TITLES, *rows)) for column in range(len(TITLES))]
    rule = " ".join("=" * width for width in widths)
    lines = [" ".join(map(str.ljust, row, widths)).rstrip() for row in (TITLES, *rows)]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def heading(section: Section) -> str:
    return f"{section.title}\n{'-' * len(section.title)}\n\n"


def committed(section: Section) -> str | None:
    """The table of a section as it stands in the document."""
    text = DOCUMENT.read_text("utf-8")
    found = re.search(re.escape(heading(section)) + r"(=.*?\n=[ =]+\n.*?\n=[ =]+)\n", text, re.DOTALL)
    return None if found is None else found[1]


def is_here(section: Section) -> bool:
    try:
        module = importlib.import_module(section.library)
    except ImportError:
        return False
    if not section.since:
        return True
    version = re.findall(r"\d+", module.__version__)
    return tuple(map(int, version[:3])) >= section.since


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_the_table_of_types_is_true(section: Section, make_pool: Pools, tmp_path: Path) -> None:
    if not is_here(section):
        pytest.skip(f"needs {section.library} {'.'.join(map(str, section.since))}")
    directory = tmp_path / "spill"
    pool = make_pool("256MB", directory=directory)
    rows = [row_of(sample, pool, directory) for sample in section.samples()]
    new, old = table_of(rows), committed(section)
    if os.environ.get("FBCACHE_WRITE_DOCS"):
        text = DOCUMENT.read_text("utf-8")
        assert old is not None or heading(section) not in text
        text = text.replace(old, new) if old is not None else f"{text}\n{heading(section)}{new}\n"
        DOCUMENT.write_text(text, "utf-8")
    else:
        assert new == old


@functools.cache
def kinds_with_rows(section: Section) -> set[str]:
    found = set()
    for sample in section.samples():
        for value in sample.make():
            own = kinds.kind_of(type(value))
            found |= set() if own is None else {own.name}
            if without_pickle(value) == "yes":
                found |= kinds_in(encoded(value))
    return found


@pytest.mark.parametrize("library", kinds.LIBRARIES)
def test_every_kind_has_a_row(library: str) -> None:
    (section,) = (section for section in SECTIONS if section.library == library)
    if not is_here(section):
        pytest.skip(f"needs {library}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = {kind.name for kind in kinds._kinds(library).values()} - kinds_with_rows(section)
    assert not missing, "add samples of these to tests/type_samples.py"


def test_every_row_belongs_to_a_section() -> None:
    for section in SECTIONS:
        assert committed(section) is not None, section.title
