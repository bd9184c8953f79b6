"""``TrackedDirectory``: keys, deletion, sweeping, foreign files, and who may write."""

from __future__ import annotations

import gc
import os
import pickle
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest

from fbcache import (
    CheckpointNotFoundError,
    DirectoryInUseError,
    FBCacheWarning,
    ReadOnlyError,
    StorageError,
    TrackedDirectory,
)
from fbcache.checkpoint.registry import directory_at
from tests.directories import HOLDER, Child, blob_of, blobs_in, flip, manifest_of, sessions_in, versions_on
from tests.faults import FaultyDisk, oserror


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


def tree_of(directory: Path) -> dict[str, tuple]:
    """All that is there: kinds, modes, times and contents."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        link = os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_ino, content, link)
    return found


# ------------------------------------------------------------------ keys


def test_keys_are_what_is_present(pool, target):
    with TrackedDirectory(target) as tracked:
        assert len(tracked) == 0 and list(tracked) == [] and uuid4() not in tracked
        keys = {pool.put(n, n).persist(tracked) for n in range(5)}
        assert set(tracked.keys()) == set(tracked) == keys and len(tracked) == 5
        assert all(key in tracked for key in keys)
        for other in ("x", None, next(iter(keys)).hex, str(next(iter(keys)))):
            assert other not in tracked
    with TrackedDirectory(target) as again:
        assert set(again) == keys
    with TrackedDirectory(target, readonly=True) as reader:
        assert set(reader) == keys and len(reader) == 5


def test_persisting_twice_is_a_look_up_and_keeps_the_key(pool, target):
    disk = FaultyDisk()
    with TrackedDirectory._over(directory_at(target, disk)) as tracked:
        fb = pool.put("x", np.zeros(100))
        key = fb.persist(tracked)
        disk.log.clear()
        assert fb.persist(tracked) == pool.persist("x", tracked) == key
        assert disk.log == []
        with fb.load_mut() as x:
            x[0] = 1
        assert fb.persist(tracked) != key and len(tracked) == 2


def test_a_reader_sees_what_the_writer_adds_and_takes_away(pool, target):
    with TrackedDirectory(target) as writer, TrackedDirectory(target, readonly=True) as reader:
        assert len(reader) == 0 and reader.checkpoints() == []
        key = pool.put("x", 1).persist(writer)
        assert key in reader and reader.keys() == [key]
        pool.save(writer, tag="t")
        assert [c.tag for c in reader.checkpoints()] == ["t"]
        writer.forget("t")
        assert writer.delete(key)
        assert key not in reader and len(reader) == 0 and reader.checkpoints() == []


def test_a_reader_in_another_process_sees_what_the_writer_adds(pool, target):
    code = """
import sys, uuid, fbcache
with fbcache.TrackedDirectory(sys.argv[1], readonly=True) as tracked:
    print("open", flush=True)
    while line := sys.stdin.readline().strip():
        print(uuid.UUID(line) in tracked, len(tracked), len(tracked.checkpoints()), flush=True)
"""
    with TrackedDirectory(target) as writer, Child(code, target) as child:
        assert child.hear() == "open"
        key = pool.put("x", 1).persist(writer)
        child.tell(str(key))
        assert child.hear() == "True 1 0"
        pool.save(writer)
        child.tell(str(uuid4()))
        assert child.hear() == "False 1 1"
        child.end()


# ------------------------------------------------------------------ delete


def test_delete_says_whether_the_blob_went(pool, target):
    with TrackedDirectory(target) as tracked:
        free, needed = pool.put("a", 1).persist(tracked), pool.put("b", 2).persist(tracked)
        pool.save(tracked, ["b"])
        assert tracked.delete(free) is True and free not in tracked
        assert tracked.delete(needed) is False and needed in tracked
        assert not blob_of(target, needed).with_suffix(".pin").exists()
        for key in (free, uuid4()):
            with pytest.raises(KeyError, match=str(key)):
                tracked.delete(key)
        tracked.forget(1)
        assert needed not in tracked and blobs_in(target) == set()


def test_a_deleted_key_that_an_entry_has_stays_until_that_has_gone(pool, make_pool, target):
    """Invariant 12: a loan of this process is a need."""
    key = pool.put("x", [1]).persist(target)
    pool.close()
    other = make_pool()
    with TrackedDirectory(target) as tracked:
        fb = other.register(tracked, key)
        tracked.delete(key)
        with fb.load() as value:
            assert value == [1]
        fb.drop()
        other.drain()
        assert sessions_in(target) == []
        tracked.gc()
        assert blobs_in(target) == set()


def test_a_delete_that_fails_may_be_repeated(pool, target):
    disk = FaultyDisk()
    with TrackedDirectory._over(directory_at(target, disk)) as tracked:
        key = pool.put("x", 1).persist(tracked)
        for nth in (1, 2):  # the pin, the blob
            disk.fail("unlink", error=oserror(5), nth=nth)
            with pytest.raises(StorageError, match=key.hex):
                tracked.delete(key)
            disk.clear()
            assert key in tracked and blobs_in(target) == {key.hex}
        assert tracked.delete(key) is True


# ------------------------------------------------------------------ forget


def test_forget_by_version_and_by_tag_says_how_many_blobs_went(pool, target):
    with TrackedDirectory(target) as tracked:
        pool["same"] = 0
        for number in (1, 2, 3):
            pool["x"] = number
            pool.save(tracked, tag="t" if number == 2 else None, keep=None)
        assert tracked.forget("t") == 1 and versions_on(target) == [1, 3]
        assert tracked.forget(np.int64(1)) == 1 and tracked.forget(3) == 2
        assert versions_on(target) == [] and blobs_in(target) == set()


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (9, CheckpointNotFoundError),
        (0, CheckpointNotFoundError),
        (-1, CheckpointNotFoundError),
        ("no", CheckpointNotFoundError),
        ("1", CheckpointNotFoundError),
        ("", ValueError),
        (None, TypeError),
        (True, TypeError),
        (1.0, TypeError),
        (b"t", TypeError),
    ],
    ids=repr,
)
def test_forgetting_what_is_not_there_removes_nothing(pool, target, what, error):
    pool["x"] = 1
    pool.save(target, tag="t")
    with TrackedDirectory(target) as tracked, pytest.raises(error):
        tracked.forget(what)
    assert versions_on(target) == [1] and len(blobs_in(target)) == 1


def test_a_damaged_version_can_be_forgotten_and_then_leftovers_go(pool, target):
    pool["x"] = 1
    pool.save(target, keep=None)
    pool["x"] = 2
    pool.save(target, keep=None)
    flip(manifest_of(target, 1), 50)
    directory_at(target)._stamp = ""  # as in a process that comes anew
    with TrackedDirectory(target) as tracked:
        with pytest.warns(FBCacheWarning, match="cannot be opened"):
            assert [c.version for c in tracked.checkpoints()] == [2]
        swept = tracked.gc()
        assert swept.kept == (str(manifest_of(target, 1)),) and len(blobs_in(target)) == 2
        tracked.forget(1)
        tracked.gc()
        assert versions_on(target) == [2] and len(blobs_in(target)) == 1


# ------------------------------------------------------------------ sweeping


def leave_leftovers(target: Path) -> list[Path]:
    """What a crash may leave."""
    shard = target / "ab"
    shard.mkdir(exist_ok=True)
    rest = "ab" + "0" * 30
    other = "ab" + "1" * 30
    left = [
        shard / rest,
        shard / f".{other}.tmp",
        shard / f"{other}.pin",
        target / ".fbcache" / "checkpoints" / ".0000000009.tmp",
    ]
    for path in left:
        path.write_bytes(b"leftover")
    return left


def test_opening_sweeps_what_a_crash_has_left_and_gc_tells_of_it(pool, target):
    pool["x"] = 1
    pool.save(target)
    kept = blobs_in(target)
    with TrackedDirectory(target):
        left = leave_leftovers(target)
    subprocess.run([sys.executable, "-c", HOLDER, str(target)], input="\n", text=True, check=True, timeout=60)
    assert not any(path.exists() for path in left) and blobs_in(target) == kept
    left = leave_leftovers(target)
    directory_at(target)._stamp = ""  # as in a process that comes anew
    with TrackedDirectory(target) as tracked:
        assert not any(path.exists() for path in left)
        swept = tracked.gc()
        assert (swept.blobs, swept.files, swept.nbytes, swept.kept) == (1, 3, 8, ())
        left = leave_leftovers(target)
        swept = tracked.gc()
        assert (swept.blobs, swept.files, swept.nbytes) == (1, 3, 8)
        assert tracked.gc().blobs == 0
    assert blobs_in(target) == kept


def test_a_reader_sweeps_nothing(pool, target):
    pool["x"] = 1
    pool.save(target)
    left = leave_leftovers(target)
    with TrackedDirectory(target, readonly=True) as tracked:
        tracked.verify()
    pool.restore(target, replace=True)
    assert all(path.exists() for path in left)


def test_what_persist_has_brought_in_survives_every_sweep(pool, target):
    keys = {pool.put(n, n).persist(target) for n in range(5)}
    pool.close()
    for _ in range(2):
        directory_at(target)._stamp = ""
        with TrackedDirectory(target) as tracked:
            assert tracked.gc().blobs == 0 and set(tracked) == keys


def test_a_sweep_that_cannot_remove_goes_on_with_the_others(pool, target):
    pool["x"] = 1
    pool.save(target)
    left = leave_leftovers(target)
    disk = FaultyDisk()
    disk.fail("unlink", error=oserror(13))
    with TrackedDirectory._over(directory_at(target, disk)) as tracked:
        assert len([path for path in left if path.exists()]) == 1
        tracked.gc()
        assert not any(path.exists() for path in left)


# ------------------------------------------------------------------ foreign files (invariant 13)


def make_foreign(target: Path) -> list[str]:
    """A user's own files, some with names that look almost like ours; returns what verify is to report."""
    own = target / ".fbcache"
    hexes = "ab" + "c" * 30
    files = [
        *("notes.txt", "README", "zz/file", "AB/" + hexes.upper(), "abc/file", "a/x", hexes, "0" * 32),
        *(f"ab/{name}" for name in (hexes[:-1], hexes + "0", hexes.upper(), "cd" + "c" * 30, f"{hexes}.tmp")),
        *(
            f"ab/{name}"
            for name in (f"{hexes}.pin~", f".{hexes}", f".{hexes}.tmp2", f".{hexes}.pin", "x.pin")
        ),
        *(f"ab/{name}" for name in (f"{'cd' + 'c' * 30}.pin", f".{'cd' + 'c' * 30}.tmp", "notes", ".hidden")),
        *(
            ".fbcache/notes",
            ".fbcache/checkpoints/1.manifest",
            ".fbcache/checkpoints/0000000001.manifest.bak",
        ),
        *(
            ".fbcache/checkpoints/.1.tmp",
            ".fbcache/checkpoints/00000000010.manifest",
            ".fbcache/readers/mine",
        ),
    ]
    for name in files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the user's {name}")
    (target / "ab" / "dir" / "deep").mkdir(parents=True)
    (target / "outside").mkdir()
    (target / "outside" / ("ef" + "0" * 30)).write_text("behind a link")
    (target / "ef").symlink_to("outside")  # where a shard could be
    (target / "dangling").symlink_to("nowhere")
    (target / "cd").write_text("a file where a shard could be")
    assert own.is_dir()
    tops = {"zz", "AB", "abc", "a", "outside", "ef", "dangling", "cd"}
    inside = [name for name in files if name.split("/")[0] in ("ab", ".fbcache") or "/" not in name]
    return sorted([*tops, *inside, "ab/dir"])


def test_foreign_files_are_reported_and_never_touched(make_pool, target):
    """Invariant 13, through all that writes and removes."""
    TrackedDirectory(target).close()
    ours = set(tree_of(target))
    foreign = make_foreign(target)
    theirs = {name: entry for name, entry in tree_of(target).items() if name not in ours}
    leave_leftovers(target)
    directory_at(target)._stamp = ""
    with TrackedDirectory(target) as tracked, make_pool() as pool:
        assert list(tracked.verify().foreign) == foreign
        for number in range(600):
            fb = pool.put(number, number)
            if fb.key.hex[:2] in ("cd", "ef"):  # where something foreign lies
                pool.delete(number)
            fb.drop()
        pool.save(tracked, tag="t")
        assert len(list(target.glob("ab/*"))) > 10
        keys = [pool.persist(number, tracked) for number in pool.keys()[::20]]
        for number in pool.keys()[::2]:
            pool.delete(number)
        pool.save(tracked)
        tracked.forget("t")
        for key in keys:
            tracked.delete(key)
        tracked.sync()
        make_pool().restore(tracked)
        leave_leftovers(target)
        tracked.gc()
        assert list(tracked.verify().foreign) == foreign and tracked.verify().ok
    assert {name: entry for name, entry in tree_of(target).items() if name in theirs} == theirs


def test_a_foreign_thing_in_a_shards_place_is_an_error_for_the_keys_of_that_shard_only(pool, target):
    target.mkdir()
    for number in range(256):
        (target / f"{number:02x}").write_text("the user's")
    pool["x"] = 1
    with pytest.raises(StorageError, match=str(target)):
        pool.save(target)
    assert versions_on(target) == [] and len(list(target.glob("??"))) == 256
    assert all(path.read_text() == "the user's" for path in target.glob("??"))


def test_ignored_files_are_not_reported(pool, target):
    pool["x"] = 1
    pool.save(target)
    for name in ("notes.txt", "mine/a", "other"):
        path = target / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("the user's")
    with TrackedDirectory(target, ignored=["notes.txt", "mine"]) as tracked:
        assert tracked.verify().foreign == ("other",)
    with TrackedDirectory(target, ignored={"other"}, readonly=True) as tracked:
        assert tracked.verify().foreign == ("mine", "notes.txt")
    with pytest.raises(TypeError, match="list of names"):
        TrackedDirectory(target, ignored="notes.txt")


# ------------------------------------------------------------------ tenure


def test_an_open_object_keeps_other_processes_out_and_a_closed_one_does_not(pool, target):
    code = """
import sys, fbcache
while sys.stdin.readline().strip():
    try:
        fbcache.TrackedDirectory(sys.argv[1]).close()
        print("let in", flush=True)
    except fbcache.DirectoryInUseError as error:
        print(error.pid, flush=True)
"""
    pool["x"] = 1
    with Child(code, target) as child:

        def other() -> str:
            child.tell("try")
            return child.hear()

        assert other() == "let in"
        first, second = TrackedDirectory(target), TrackedDirectory(target)
        assert other() == str(os.getpid())
        pool.save(target)
        first.close()
        assert other() == str(os.getpid())
        second.close()
        assert other() == "let in"
        pool.save(target)
        assert other() == "let in"
        reader = TrackedDirectory(target, readonly=True)
        assert other() == "let in"
        reader.close()
        child.end()


def test_an_object_that_was_not_closed_gives_way_at_the_next_use(pool, target):
    pool["x"] = 1
    lost = TrackedDirectory(target)
    del lost
    gc.collect()
    pool.save(target)
    with Child(HOLDER, target) as child:
        assert child.hear() == "open"
        child.end()


def test_a_closed_directory_says_so_and_closing_twice_does_nothing(pool, target):
    tracked = TrackedDirectory(target)
    other = TrackedDirectory(target)
    tracked.close()
    tracked.close()
    pool["x"] = 1
    calls = [
        tracked.keys,
        tracked.sync,
        tracked.verify,
        tracked.gc,
        tracked.checkpoints,
        tracked.__enter__,
        lambda: len(tracked),
        lambda: uuid4() in tracked,
        lambda: tracked.delete(uuid4()),
        lambda: tracked.forget(1),
        lambda: pool.save(tracked),
        lambda: pool.restore(tracked),
        lambda: pool.persist("x", tracked),
        lambda: pool.register(tracked, uuid4()),
        lambda: pool.register_all(tracked),
        lambda: tracked.saving().__enter__(),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="is closed; open it anew") as caught:
            call()
        assert caught.value.path == str(target)
    other.keys()
    other.close()


def test_a_readonly_directory_refuses_every_change_and_makes_nothing(pool, target):
    pool["x"] = 1
    key = pool.persist("x", target)
    pool.save(target)
    before = tree_of(target)
    with TrackedDirectory(target, readonly=True) as tracked:
        assert tracked.readonly
        for call in (
            tracked.sync,
            tracked.gc,
            lambda: tracked.delete(key),
            lambda: tracked.forget(1),
            lambda: pool.save(tracked),
            lambda: pool.persist("x", tracked),
            lambda: tracked.saving().__enter__(),
        ):
            with pytest.raises(ReadOnlyError, match="readonly=True"):
                call()
        assert len(tracked.checkpoints()) == 1 and tracked.verify().ok
    assert tree_of(target) == before


def test_a_readonly_directory_has_to_be_there(target):
    with pytest.raises(StorageError, match=str(target)):
        TrackedDirectory(target, readonly=True)
    assert not target.exists()


def test_what_it_shows_of_itself(target):
    tracked = TrackedDirectory(target)
    assert repr(tracked) == f"<TrackedDirectory {str(target)!r}, open>" and tracked.path == str(target)
    assert not tracked.readonly
    tracked.close()
    assert repr(tracked) == f"<TrackedDirectory {str(target)!r}, closed>"
    with TrackedDirectory(target, readonly=True) as reader:
        assert repr(reader) == f"<TrackedDirectory {str(target)!r}, read-only>"


def test_it_cannot_be_pickled_and_says_what_to_do(target):
    with TrackedDirectory(target) as tracked, pytest.raises(TypeError, match="open it in each process"):
        pickle.dumps(tracked)


def test_an_object_that_could_not_be_made_is_collected_silently(tmp_path):
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bad in (3, None, b"bytes", tmp_path / "file"):
            with pytest.raises((TypeError, StorageError)):
                TrackedDirectory(bad)
        gc.collect()


def test_a_writer_that_finds_another_writing_changes_nothing(target):
    with Child(HOLDER, target) as child:
        assert child.hear() == "open"
        left = leave_leftovers(target)
        before = tree_of(target)
        with pytest.raises(DirectoryInUseError):
            TrackedDirectory(target)
        assert tree_of(target) == before and all(path.exists() for path in left)
        child.end()


def test_sync_makes_pins_and_blobs_durable_once(pool, target):
    """Invariant 12: files, then their directories; and nothing twice."""
    disk = FaultyDisk()
    with TrackedDirectory._over(directory_at(target, disk)) as tracked:
        key: UUID = pool.put("x", 1).persist(tracked)
        disk.log.clear()
        tracked.sync()
        assert disk.count("fsync") == 3  # the blob, its shard, the directory
        tracked.sync()
        assert disk.count("fsync") == 3 and key in tracked
