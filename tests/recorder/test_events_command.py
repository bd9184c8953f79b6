"""``fbcache events`` prints and filters what pools have recorded, and says clearly what it cannot read."""

from __future__ import annotations

import json
import sqlite3
from datetime import datetime, timedelta

import pytest
from click.testing import CliRunner

from fbcache.commands import fbcache
from fbcache.events import EventKind, PoolEvent
from fbcache.recorder import Recorder, SqliteStorage

NOW = datetime.now().timestamp()
DAY = 86400

EVENTS = [
    PoolEvent(NOW - 90 * DAY, EventKind.EVICTION, "'train'", "a1" * 16, 8_000_000, 0.25),
    PoolEvent(NOW - 30 * DAY, EventKind.LOAD, "'train'", "a1" * 16, 8_000_000, 0.0125),
    PoolEvent(NOW - 8 * DAY, EventKind.STALL, "('tile', 3)", None, 1234, 1.5),
    PoolEvent(NOW - 3 * DAY, EventKind.ERROR, None, "b2" * 16, 0, 0.0, "StorageError: [bold]no\x1b[31m room"),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "events.db"
    with SqliteStorage(path) as storage, Recorder.start(storage) as recorder:
        for event in EVENTS:
            recorder.save(event)
    return path


def run(*arguments):
    return CliRunner().invoke(fbcache, ["events", *map(str, arguments)], env={"COLUMNS": "200"})


def kinds(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return [json.loads(line)["kind"] for line in done.stdout.splitlines()]


def test_the_table_has_every_event_with_its_figures(path):
    done = run(path)
    assert done.exit_code == 0
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["time", "kind", "name", "bytes", "ms", "key", "detail"]
    assert len(rows) == 4
    assert "eviction" in rows[0] and "'train'" in rows[0] and "8,000,000" in rows[0] and "250.0" in rows[0]
    assert "a1a1a1a1" in rows[1] and "('tile', 3)" in rows[2] and "1,500.0" in rows[2]
    assert r"StorageError: [bold]no\x1b[31m room" in rows[3]
    assert "4 events" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ["eviction", "load", "stall", "error"]),
        (("--kind", "load"), ["load"]),
        (("--kind", "load", "--kind", "error"), ["load", "error"]),
        (("--name", "train"), ["eviction", "load"]),
        (("--name", "'train'"), ["eviction", "load"]),
        (("--name", "('tile', 3)"), ["stall"]),
        (("--key", "b2" * 16), ["error"]),
        (("--since", "45d"), ["load", "stall", "error"]),
        (("--until", "60d"), ["eviction"]),
        (("--since", "1000d", "--until", "5d"), ["eviction", "load", "stall"]),
        (("--since", (datetime.now() - timedelta(days=10)).isoformat()), ["stall", "error"]),
        (("--limit", "2"), ["stall", "error"]),
        (("--limit", "0"), []),
        (("--kind", "mutation"), []),
    ],
    ids=str,
)
def test_filters(path, arguments, expected):
    assert kinds(path, *arguments) == expected


def test_json_has_every_field(path):
    (line,) = run(path, "--json", "--kind", "load").stdout.splitlines()
    event = EVENTS[1]
    assert json.loads(line) == {
        "time": event.time,
        "kind": "load",
        "name": "'train'",
        "key": "a1" * 16,
        "nbytes": 8_000_000,
        "seconds": 0.0125,
        "detail": "",
    }


def test_nothing_that_matches_is_no_error(path):
    done = run(path, "--kind", "persist")
    assert done.exit_code == 0 and done.stdout == "" and "0 events" in done.stderr


def test_records_of_another_program_are_shown_as_they_are(tmp_path):
    path = tmp_path / "own.db"
    with SqliteStorage(path) as storage, Recorder.start(storage) as recorder:
        recorder.save({"kind": "mine", "n": 1})
    assert "{'kind': 'mine', 'n': 1}" in run(path).stdout
    assert json.loads(run(path, "--json").stdout) == {"kind": "mine", "n": 1}


@pytest.mark.parametrize(
    "arguments", [("--kind", "nonsense"), ("--since", "yesterday"), ("--limit", "-1"), ("--until", "9e99d")]
)
def test_a_wrong_argument_says_what_would_do(path, arguments):
    done = run(path, *arguments)
    assert done.exit_code == 2
    assert arguments[0] in done.stderr


def test_a_file_that_cannot_be_read_is_an_error_with_its_exit_code(path, tmp_path):
    (tmp_path / "text").write_text("no database" * 100)
    with sqlite3.connect(path) as other:
        other.execute("UPDATE records SET record = x'00' WHERE seq = 3")
    other.close()
    for file, told in [("text", "no SQLite file"), ("none", "none"), ("events.db", "record 3")]:
        done = run(tmp_path / file)
        assert done.exit_code == 3 and done.stdout == ""
        assert done.stderr.startswith("Error: ") and told in done.stderr, done.stderr
    assert not (tmp_path / "none").exists()


def test_a_file_in_use_is_shown_and_not_changed(path):
    with SqliteStorage(path):
        assert len(kinds(path)) == 4
    before = path.read_bytes()
    assert len(kinds(path)) == 4
    assert path.read_bytes() == before


def test_help_names_the_exit_codes():
    assert "Exit codes" in run("--help").stdout
