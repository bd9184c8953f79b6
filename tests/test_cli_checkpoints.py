"""The commands that look into tracked directories: what they show, what they leave, how they end."""

from __future__ import annotations

import gc
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from fbcache import FBPool, TrackedDirectory
from fbcache.codec import MsgpackCodec
from fbcache.shell import names, outline, screen
from tests.faults import PATIENCE
from tests.shellcalls import answer, run

MakePool = Callable[..., FBPool]

NAMES = [
    *("weights", 3, "3", ("tile", 3), "größe", "", " padded ", "evil\x1b[31m\nname", b"raw", None, "None"),
    *(1.5, float("nan"), datetime(2020, 1, 2), "'quoted'", frozenset({1}), "-x", "\ud800"),
]


class Opened:
    """Pickled by a call that leaves a file."""

    path = ""

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture
def saved(tmp_path: Path, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of three versions; in the second ``weights`` has changed, in the third ``table``."""
    monkeypatch.setattr(Opened, "path", str(tmp_path / "code-has-run"))
    pool, path = make_pool("1MB"), tmp_path / "saved"
    pool.put("weights", np.arange(20_000.0).reshape(100, 200))
    pool.put(("tile", 3), np.asfortranarray(np.ones((20, 30), "f4")))
    pool.put("table", {"x": np.arange(100), "y": [1, {"z": "text"}]})
    pool.put("odd", Opened())
    pool.save(path, tag="first", allow_pickle=True, keep=None)
    with pool.get_mut("weights") as weights:
        weights += 1
    pool.save(path, tag="best", allow_pickle=True, keep=None)
    with pool.get_mut("table") as table:
        table["y"] = None
    pool.save(path, tag="best", allow_pickle=True, keep=None)
    return path


def command(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    run = [sys.executable, "-m", "fbcache", *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(run, text=True, **{**pipes, **options})


def files(path: Path) -> dict[str, tuple[int, int]]:
    """All below ``path``, with sizes and times."""
    found = [file for file in path.rglob("*") if file.is_file()]
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in found}


def manifest(saved: Path, version: int) -> Path:
    return saved / ".fbcache" / "checkpoints" / f"{version:010d}.manifest"


def blob(saved: Path, name: str, version: int = 3) -> Path:
    return Path(answer("info", saved, name, "--version", version)["path"])


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 255
    path.chmod(0o600)
    path.write_bytes(raw)


# ------------------------------------------------------------------ ls


def test_versions_are_listed_newest_last(saved: Path) -> None:
    result = run("ls", saved)
    assert result.exit_code == 0
    title, _, *rows = result.stdout.splitlines()
    assert title.split() == [
        *("version", "tag", "created", "entries", "size"),
        *("new", "blobs", "new", "bytes"),
    ]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert "first" in rows[0]
    assert "best" not in rows[1], "the tag has moved on"
    assert "best" in rows[2]


def test_versions_as_json(saved: Path) -> None:
    listed = answer("ls", saved)
    assert listed["directory"] == str(saved)
    with TrackedDirectory(saved, readonly=True) as tracked:
        checkpoints = tracked.checkpoints()
    assert [version["tag"] for version in listed["versions"]] == ["first", None, "best"]
    for version, checkpoint in zip(listed["versions"], checkpoints, strict=True):
        assert datetime.fromisoformat(version["created"]) == checkpoint.created
        assert version["entries"] == len(checkpoint.names)
        for name in ("version", "nbytes", "blobs_written", "bytes_written"):
            assert version[name] == getattr(checkpoint, name)
        assert version["damaged"] is None
        assert Path(version["path"]).is_file()


def test_times_are_local(saved: Path) -> None:
    created = datetime.fromisoformat(answer("ls", saved)["versions"][0]["created"]).astimezone()
    assert f"{created:%Y-%m-%d %H:%M:%S}" in run("ls", saved).stdout


@pytest.mark.parametrize("choice", [("--version", 2), ("--tag", "best")])
def test_the_entries_of_one_version(saved: Path, choice: tuple[str, Any]) -> None:
    listed = answer("ls", saved, *choice)
    assert [entry["name"] for entry in listed["entries"]] == ["weights", "('tile', 3)", "table", "odd"]
    assert [entry["name_repr"] for entry in listed["entries"]][:2] == ["'weights'", "('tile', 3)"]
    assert listed["entries"][0]["nbytes"] == 160_000
    assert listed["entries"][3]["pickled"].endswith("Opened")
    shown = run("ls", saved, *choice).stdout
    assert "('tile', 3)" in shown
    assert "160 kB" in shown


def test_a_damaged_manifest_is_listed_as_such_among_the_others(saved: Path) -> None:
    flip(manifest(saved, 2), -1)
    result = run("ls", saved)
    assert result.exit_code == 1
    assert "damaged" in result.stdout
    assert str(manifest(saved, 2)) in result.stdout
    assert "best" in result.stdout
    listed = answer("ls", saved, code=1)["versions"]
    assert [version["damaged"] is None for version in listed] == [True, False, True]
    assert listed[1]["version"] == 2
    assert listed[1]["entries"] is None
    chosen = run("ls", saved, "--version", 2)
    assert chosen.exit_code == 1
    assert str(manifest(saved, 2)) in chosen.stderr


def test_a_directory_without_checkpoints(tmp_path: Path, make_pool: MakePool) -> None:
    with TrackedDirectory(tmp_path / "new") as tracked:
        assert "it is empty" in run("ls", tracked.path).stdout
        make_pool().insert([1]).persist(tracked)
        assert "1 blob" in run("ls", tracked.path).stdout
        assert answer("ls", tracked.path)["versions"] == []


# ------------------------------------------------------------------ names


@pytest.fixture
def named(tmp_path: Path, make_pool: MakePool) -> Path:
    pool = make_pool("1MB")
    for number, name in enumerate(NAMES):
        pool.put(name, number)
    pool.save(tmp_path / "named")
    return tmp_path / "named"


def test_every_name_can_be_given_as_it_is_listed(named: Path) -> None:
    """But for what is not a text and looks like one that is there too."""
    taken = {name for name in NAMES if isinstance(name, str)}
    for entry, name in zip(answer("ls", named, "--version", 1)["entries"], NAMES, strict=True):
        assert names.name_text(name) in run("ls", named, "--version", 1).stdout
        shown = names.name_text(name)
        given = f"({shown})" if shown in taken and not isinstance(name, str) else shown
        assert answer("info", named, "--", given)["key"] == entry["key"], name
        assert entry["name_repr"] == repr(name)
        assert entry["name"] == (name if isinstance(name, str) else repr(name))


def test_no_name_reaches_the_terminal_unescaped(named: Path) -> None:
    for arguments in (("ls", named, "--version", 1), ("info", named, NAMES[7])):
        shown = run(*arguments).output
        assert "\x1b" not in shown
        assert r"'evil\x1b[31m\nname'" in shown


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("weihgts", "did you mean weights?"),
        ("('tile', 4)", "('tile', 3)"),
        ("[1]", "fbcache ls"),
        ("((", "ls"),
    ],
)
def test_an_unknown_name_gives_similar_ones(saved: Path, given: str, told: str) -> None:
    result = run("info", saved, given)
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_name_of_another_version_gives_that(tmp_path: Path, make_pool: MakePool) -> None:
    pool = make_pool()
    pool.put("gone", 1)
    pool.save(tmp_path / "d", keep=None)
    pool.put("new", 2)
    del pool["gone"]
    pool.save(tmp_path / "d", keep=None)
    assert "--version 1" in run("info", tmp_path / "d", "gone").stderr
    assert answer("info", tmp_path / "d", "gone", "--version", 1)["version"]["version"] == 1


# ------------------------------------------------------------------ info


def test_an_entry_is_described(saved: Path) -> None:
    described = answer("info", saved, "weights")
    assert described["content"]["dtype"] == "float64"
    assert described["content"]["shape"] == [100, 200]
    assert (described["buffers"], described["buffer_bytes"]) == (1, 160_000)
    assert described["verified"] is False
    assert [(each["version"], each["same"]) for each in described["versions"]] == [
        (1, False),
        (2, True),
        (3, True),
    ]
    assert Path(described["path"]).stat().st_size == described["disk_bytes"]
    assert answer("info", saved, "weights", "--verify")["verified"] is True
    shown = run("info", saved, "weights", "--tag", "first").stdout
    for text in (
        "array of float64, shape (100, 200)",
        "160 kB (160,000 bytes)",
        "version",
        "with other content",
    ):
        assert text in shown


def test_the_parts_of_an_entry_are_outlined(saved: Path) -> None:
    shown = run("info", saved, "table", "--version", 1).stdout
    assert "['x']  array of int64, shape (100,)" in shown
    assert "['z']  str of 4 characters" in shown
    assert "Fortran" in run("info", saved, "('tile', 3)").stdout


def test_info_runs_no_pickle(saved: Path, tmp_path: Path) -> None:
    described = answer("info", saved, "odd", "--verify")
    assert described["content"]["kind"] == "pickle"
    assert described["pickled"].endswith("Opened")
    assert not Path(Opened.path).exists()


@pytest.mark.parametrize(
    ("offset", "options", "code"), [(-1, ("--verify",), 1), (-1, (), 0), (20, (), 1)], ids=str
)
def test_damage_of_an_entry_is_told(saved: Path, offset: int, options: tuple[str, ...], code: int) -> None:
    flip(blob(saved, "weights"), offset)
    result = run("info", saved, "weights", *options)
    assert result.exit_code == code
    assert ("damaged" in result.stdout) == bool(code)
    assert "of version" in result.stdout


def test_a_blob_that_is_gone_or_swapped_is_told(saved: Path) -> None:
    there, other = blob(saved, "weights"), blob(saved, "weights", 1)
    there.unlink()
    assert answer("info", saved, "weights", code=1)["damaged"] == "the file is gone"
    shutil.copy(other, there)
    assert run("info", saved, "weights").exit_code == 1


def test_a_damaged_version_does_not_keep_info_from_another(saved: Path) -> None:
    flip(manifest(saved, 1), -1)
    described = answer("info", saved, "weights")
    assert described["unreadable_versions"] == [1]
    assert "version 1 cannot be read" in run("info", saved, "weights").stderr


VALUES: list[tuple[Any, str]] = [
    (np.zeros((2, 3)), "array of float64, shape (2, 3)"),
    (np.zeros((2, 3), ">i2").T, "array of >i2, shape (3, 2), in Fortran order"),
    (np.zeros(1000)[::-1], "array of float64, shape (1000,), a view"),
    (np.array([None, 1]), "array of object, shape (2,)"),
    (np.zeros(2, [("x", "i4"), ("y", "f8")]), "array of [('x', '<i4'), ('y', '<f8')], shape (2,)"),
    (np.ma.masked_equal([1, 2], 1), "masked array of int64, shape (2,)"),
    (np.float32(1), "numpy scalar float32"),
    ({1: "a", (2, 3): [None]}, "dict of 2 parts"),
    ([1] * 100, "list of 100 parts"),
    (("a",), "tuple of 1 part"),
    ("text", "str of 4 characters"),
    (b"x" * 9000, "bytes"),
    (7, "int"),
    (None, "None"),
    (1j, "complex"),
    ({1, 2}, "set of 2 parts"),
]


@pytest.mark.parametrize(("value", "text"), VALUES, ids=lambda part: part if isinstance(part, str) else "")
def test_values_are_outlined(value: Any, text: str) -> None:
    tree = MsgpackCodec().encode(value, allow_pickle=False).tree
    assert outline.outline(tree).text == text


def test_an_outline_has_bounds() -> None:
    value: Any = list(range(1000))
    for _ in range(50):
        value = [value, value]
    told = outline.outline(MsgpackCodec().encode([value, list(range(1000))], allow_pickle=False).tree)
    depth = 0
    while told.parts:
        assert len(told.parts) <= 20
        told, depth = told.parts[0], depth + 1
    assert depth <= 4


def test_any_tree_gives_an_outline_or_an_error() -> None:
    rng = np.random.default_rng(0)
    whole = [MsgpackCodec().encode(value, allow_pickle=False).tree for value, _ in VALUES]
    trees = [tree[:end] for tree in whole for end in range(min(len(tree), 200))]
    for tree in whole:
        places = rng.integers(0, min(len(tree), 200), 100)
        trees += [tree[:place] + rng.bytes(1) + tree[place + 1 :] for place in places]
    trees += [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 5000, msgpack.packb([9]), b"\x90"]
    for tree in trees:
        try:
            assert outline.outline(tree).text
        except ValueError:
            pass


# ------------------------------------------------------------------ verify


def test_what_is_sound_is_said_to_be(saved: Path) -> None:
    result = run("verify", saved)
    assert result.exit_code == 0
    assert "nothing is damaged" in result.stdout
    report = answer("verify", saved)
    assert (report["ok"], report["checked"], report["damaged"], report["foreign"]) == (True, 6, [], [])


def test_damage_and_foreign_files_are_listed(saved: Path) -> None:
    damaged = blob(saved, "weights")
    flip(damaged, -1)
    flip(manifest(saved, 1), -1)
    (saved / "notes\x1b.txt").write_text("mine")
    for columns in (200, 40):
        result = run("verify", saved, columns=columns)
        assert result.exit_code == 1
        shown = result.stdout.replace("\n", "").replace(" ", "")
        for text in ("weights", damaged.name, r"notes\x1b.txt", "2filesaredamaged"):
            assert text in shown or (columns == 40 and text == damaged.name)  # which is folded there
    report = answer("verify", saved, code=1)
    assert {Path(damage["path"]).name for damage in report["damaged"]} == {
        damaged.name,
        manifest(saved, 1).name,
    }
    found = next(damage for damage in report["damaged"] if damage["key"])
    assert [(each["version"], each["name"]) for each in found["names"]] == [(2, "weights"), (3, "weights")]
    assert report["foreign"] == ["notes\x1b.txt"]


# ------------------------------------------------------------------ gc


@pytest.fixture
def littered(saved: Path) -> Path:
    """Version 1 is gone, with one blob that only it had, and a save was killed."""
    only = blob(saved, "weights", 1)
    manifest(saved, 1).unlink()
    manifest(saved, 2).unlink()
    only.with_name(f".{only.name}.tmp").write_text("half")
    manifest(saved, 9).with_name(".0000000009.tmp").write_text("half")
    (saved / "00").mkdir(exist_ok=True)
    (saved / "00" / f"{0:032x}.pin").touch()
    (saved / "mine.txt").write_text("mine")
    return saved


def test_gc_removes_what_a_dry_run_counts(littered: Path) -> None:
    before = files(littered)
    counted = answer("gc", littered, "--dry-run")
    assert files(littered) == before
    # A process of its own: this one has opened the directory before, and knows it without a look.
    removed = json.loads(command("gc", littered, "--json").communicate(timeout=PATIENCE)[0])
    assert {**counted, "dry_run": False} == removed
    assert (removed["blobs"], removed["files"]) == (2, 3)
    gone = before.keys() - files(littered).keys()
    assert len(gone) == 5
    assert (littered / "mine.txt").exists()
    assert "nothing to remove" in run("gc", littered, "--dry-run").stdout
    assert answer("verify", littered)["ok"]


def test_a_dry_run_counts_what_a_living_reader_needs(littered: Path, make_pool: MakePool) -> None:
    shutil.rmtree(littered / ".fbcache" / "readers", ignore_errors=True)
    alone = answer("gc", littered, "--dry-run")
    pool = make_pool()
    pool.restore(littered, ["weights"])
    manifest(littered, 3).unlink()
    assert answer("gc", littered, "--dry-run")["blobs"] == alone["blobs"]
    pool.close()
    assert answer("gc", littered, "--dry-run")["blobs"] > alone["blobs"]


def test_a_dry_run_knows_that_a_reader_has_died(littered: Path) -> None:
    code = (
        "import os, sys; from fbcache import FBPool; p = FBPool('1MB', directory=sys.argv[2], min_free=0)\n"
    )
    code += "p.restore(sys.argv[1], ['weights']); os._exit(0)"
    subprocess.run(
        [sys.executable, "-c", code, littered, littered.parent / "s"], check=True, timeout=PATIENCE
    )
    assert list((littered / ".fbcache" / "readers").glob("session-*"))
    manifest(littered, 3).unlink()
    counted = answer("gc", littered, "--dry-run")
    assert counted["blobs"] == 6
    out, _ = command("gc", littered, "--json").communicate(timeout=PATIENCE)
    assert json.loads(out)["blobs"] == 6


def test_gc_keeps_all_blobs_where_a_manifest_cannot_be_read(littered: Path) -> None:
    flip(manifest(littered, 3), -1)
    before = files(littered)
    for options in (("--dry-run",), ()):
        child = command("gc", littered, *options)
        out, _ = child.communicate(timeout=PATIENCE)
        assert child.returncode == 1
        assert str(manifest(littered, 3)) in out
        assert "3 other leftovers" in out
    gone = before.keys() - files(littered).keys()
    assert not [path for path in gone if not path.endswith((".tmp", ".pin"))]


@pytest.fixture
def writer(saved: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the directory open for writing."""
    code = "import sys; from fbcache import TrackedDirectory\n"
    code += "with TrackedDirectory(sys.argv[1]): print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code, str(saved)], stdin=pipe, stdout=pipe, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    yield child
    child.communicate(timeout=PATIENCE)


def test_while_another_writes_gc_alone_is_refused(saved: Path, writer: subprocess.Popen[str]) -> None:
    for options in ((), ("--dry-run",)):
        result = run("gc", saved, *options)
        assert result.exit_code == 3
        assert str(writer.pid) in result.stderr
        assert str(saved) in result.stderr
        assert len(result.stderr.splitlines()) == 1
    for reading in ("ls", "verify"):
        assert run(reading, saved).exit_code == 0


# ------------------------------------------------------------------ all of them


def test_reading_changes_nothing(saved: Path, tmp_path: Path) -> None:
    shutil.rmtree(saved / ".fbcache" / "readers", ignore_errors=True)
    before = files(saved)
    run("ls", saved)
    run("ls", saved, "--tag", "best")
    run("info", saved, "weights", "--verify")
    run("verify", saved)
    run("export", saved, "weights", tmp_path / "w.npy")
    run("gc", saved, "--dry-run")
    assert files(saved) == before


COMMANDS: dict[str, tuple[str, ...]] = {
    "ls": (),
    "verify": (),
    "info": ("weights",),
    "export": ("weights", "out.npy"),
    "gc": (),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "a file", "below a file", "no tracked directory", "nothing"])
def test_what_is_no_tracked_directory_is_refused_and_stays_as_it_was(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "plain").mkdir()
    places = {"a file": "file", "below a file": "file/x", "no tracked directory": "plain", "missing": "none"}
    given = str(tmp_path / places[kind]) if kind in places else ""
    result = run(name, given, *COMMANDS[name])
    assert result.exit_code == 2
    assert given in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "plain"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_directory_that_may_not_be_read_is_an_error_of_storage(saved: Path) -> None:
    saved.chmod(0)
    try:
        assert run("ls", saved).exit_code == 3
    finally:
        saved.chmod(0o700)


@pytest.mark.parametrize("name", ["ls", "info", "export"])
def test_checkpoints_that_are_not_there_are_refused(saved: Path, name: str) -> None:
    for choice in (("--version", 9), ("--tag", "none"), ("--tag", ""), ("--version", 1, "--tag", "best")):
        result = run(name, saved, *COMMANDS[name], *choice)
        assert result.exit_code == 2
        assert "Error" in result.stderr


@pytest.mark.parametrize("name", ["ls", "verify"])
def test_an_interrupt_ends_a_command_in_one_line(
    saved: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(screen, "tell", interrupted)
    monkeypatch.setattr(screen, "tell_table", interrupted)
    result = run(name, saved)
    assert result.exit_code == 130
    assert result.stderr == "Error: interrupted\n"


def test_warnings_are_one_line_each(saved: Path) -> None:
    flip(manifest(saved, 3), 80)
    result = run("ls", saved, "--tag", "first")
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: passed over a checkpoint")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("columns", [20, 40, 60, 80])
def test_output_fits_the_terminal(saved: Path, columns: int) -> None:
    for arguments in (("ls", saved), ("ls", saved, "--version", 1), ("info", saved, "table")):
        for line in run(*arguments, columns=columns).stdout.splitlines():
            assert len(line) <= columns or line.startswith(
                "version 1 ("
            )  # a sentence, which may break anywhere


def test_many_entries_are_a_line_each(tmp_path: Path, make_pool: MakePool) -> None:
    pool = make_pool("10MB")
    for number in range(1500):
        pool.put(("entry", number), number)
    pool.save(tmp_path / "many")
    _, title, _, *rows = run("ls", tmp_path / "many", "--version", 1, columns=80).stdout.splitlines()
    assert title.split() == ["name", "in", "memory", "on", "disk", "codec", "pickled"]
    assert len(rows) == 1500
    assert rows[3].startswith("('entry', 3) ")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_characters_shows_them_escaped(named: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    child = command("ls", named, "--version", 1, env=environment, encoding=encoding)
    out, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, errors
    assert ("gr\\xf6\\xdfe" in out) == (encoding == "ascii")


def test_a_pipe_that_nobody_reads_ends_a_command_quietly(saved: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    child = command("ls", saved, stdout=writing)
    os.close(writing)
    _, errors = child.communicate(timeout=PATIENCE)
    assert (child.returncode, errors) == (141, "")


def test_a_full_disk_behind_standard_output_is_an_error_of_storage(saved: Path) -> None:
    with open("/dev/full", "w") as full:
        child = command("ls", saved, "--json", stdout=full)
        _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 3
    assert "No space left" in errors


def test_in_a_terminal_verify_shows_a_bar_and_takes_it_away(saved: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    child = command("verify", saved, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the terminal's other side is closed
        pass
    os.close(ours)
    assert child.wait(PATIENCE) == 0
    assert b"verifying" in shown
    assert b"nothing is damaged" in shown.split(b"verifying")[-1]


def test_no_bar_is_shown_where_nobody_watches(saved: Path) -> None:
    child = command("verify", saved)
    out, errors = child.communicate(timeout=PATIENCE)
    assert (child.returncode, errors) == (0, "")
    assert "\x1b" not in out


def test_without_its_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['rich'] = None; from fbcache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert "pip install 'fbcache[cli]'" in done.stderr


def test_every_command_has_help_with_its_exit_codes() -> None:
    for name in COMMANDS:
        assert "Exit codes" in run(name, "--help").stdout


def test_nothing_is_left_open(saved: Path) -> None:
    run("info", saved, "weights")
    gc.collect()
    assert not list(saved.rglob("session-*"))
