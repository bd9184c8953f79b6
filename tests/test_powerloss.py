"""The simulator of power loss allows what it should, forbids what it should, and records the truth."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fbcache.store.disk import Disk
from tests.faults import CALLS, FaultyDisk, oserror
from tests.powerloss import Image, Log, Mode, RecordingDisk, images, images_at

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
Tree = dict[str, bytes | None]


class Hand:
    """Calls on a disk by relative path, as a test writes them down."""

    def __init__(self, disk: Disk, root: Path) -> None:
        self.disk, self.root = disk, root

    def at(self, path: str) -> str:
        return str(self.root / path)

    def write(self, path: str, *pieces: bytes, sync: bool = False, flags: int = NEW) -> None:
        fd = self.disk.open(self.at(path), flags)
        try:
            for piece in pieces:
                self.disk.writev(fd, [piece])
            if sync:
                self.disk.fsync(fd)
        finally:
            self.disk.close(fd)

    def sync(self, path: str = ".", *, everything: bool = False) -> None:
        fd = self.disk.open(self.at(path), os.O_RDONLY)
        try:
            (self.disk.syncfs if everything else self.disk.fsync)(fd)
        finally:
            self.disk.close(fd)

    def rename(self, source: str, target: str) -> None:
        self.disk.rename(self.at(source), self.at(target))

    def link(self, source: str, target: str) -> None:
        self.disk.link(self.at(source), self.at(target))

    def unlink(self, path: str) -> None:
        self.disk.unlink(self.at(path))

    def mkdir(self, path: str) -> None:
        self.disk.mkdir(self.at(path))


class Recorded(Hand):
    disk: RecordingDisk

    @property
    def log(self) -> Log:
        return self.disk.log


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (made := tmp_path / "root").mkdir()
    return made


@pytest.fixture
def recorded(root: Path) -> Callable[..., Recorded]:
    """``recorded(disk=..., **files)``: a recording that begins with durable files of these names."""

    def begin(disk: Disk | None = None, **files: bytes) -> Recorded:
        for name, content in files.items():
            (root / name).write_bytes(content)
        return Recorded(RecordingDisk(root, disk or Disk()), root)

    return begin


def real_tree(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def trees(log: Log, position: int | None = None, count: int = 400) -> list[Tree]:
    return [image.tree() for image in images_at(log, len(log) if position is None else position, count)]


def contents(log: Log, path: str, count: int = 400) -> set[bytes | None]:
    """What may be at ``path`` after the whole log; None if nothing."""
    return {tree.get(path) for tree in trees(log, count=count)}


# ------------------------------------------------------------------ files and names


def test_a_synced_file_with_a_synced_name_is_there_whole(recorded):
    hand = recorded(target=b"old")
    hand.write("temporary", b"n", b"ew", sync=True)
    hand.rename("temporary", "target")
    hand.sync()
    assert all(tree == {"target": b"new"} for tree in trees(hand.log))


def test_a_file_that_is_renamed_unsynced_may_be_old_new_empty_cut_or_zeros(recorded):
    hand = recorded(target=b"old")
    hand.write("temporary", b"new!")
    hand.rename("temporary", "target")
    seen = contents(hand.log, "target")
    assert {b"old", b"new!", b"", b"new", b"\0\0\0\0", b"n\0\0\0"} <= seen
    assert None not in seen  # a name that is replaced is never gone


def test_a_file_that_is_renamed_over_nothing_may_be_nowhere_at_either_name_or_at_both(recorded):
    hand = recorded()
    hand.write("temporary", b"new", sync=True)
    hand.rename("temporary", "target")
    found = {frozenset(tree) for tree in trees(hand.log)}
    assert found == {frozenset(names) for names in ([], ["temporary"], ["target"], ["temporary", "target"])}
    assert {tree.get("target", b"new") for tree in trees(hand.log)} == {b"new"}


def test_a_renamed_file_whose_old_name_was_durable_is_at_one_of_them(recorded):
    hand = recorded()
    hand.write("temporary", b"new", sync=True)
    hand.sync()
    hand.rename("temporary", "target")
    found = {frozenset(tree) for tree in trees(hand.log)}
    assert found == {frozenset(names) for names in (["temporary"], ["target"], ["temporary", "target"])}


def test_a_file_renamed_to_another_directory_is_in_one_of_them(recorded):
    hand = recorded()
    hand.mkdir("a")
    hand.mkdir("b")
    hand.write("a/x", b"1", sync=True)
    hand.sync(everything=True)
    hand.rename("a/x", "b/x")
    assert {"a/x" in tree or "b/x" in tree for tree in trees(hand.log)} == {True}
    assert {"a/x" in tree for tree in trees(hand.log)} == {True, False}
    hand.sync("a")
    assert all(tree == {"a": None, "b": None, "b/x": b"1"} for tree in trees(hand.log))


def test_syncing_where_a_file_went_says_nothing_of_where_it_was(recorded):
    hand = recorded()
    hand.mkdir("a")
    hand.mkdir("b")
    hand.write("a/x", b"1", sync=True)
    hand.sync(everything=True)
    hand.rename("a/x", "b/x")
    hand.sync("b")
    assert {frozenset(tree) for tree in trees(hand.log)} == {
        frozenset(["a", "b", "b/x"]),
        frozenset(["a", "b", "b/x", "a/x"]),
    }


def test_syncing_a_file_does_not_sync_its_name(recorded):
    hand = recorded()
    hand.write("file", b"1", sync=True)
    assert contents(hand.log, "file") == {b"1", None}


def test_syncing_a_directory_does_not_sync_what_its_files_hold(recorded):
    hand = recorded()
    hand.write("file", b"1")
    hand.sync()
    assert {b"1", b"", b"\0"} <= contents(hand.log, "file")
    assert None not in contents(hand.log, "file")


def test_an_unlinked_file_may_come_back_until_its_directory_is_synced(recorded):
    hand = recorded(file=b"1")
    hand.unlink("file")
    assert contents(hand.log, "file") == {b"1", None}
    hand.sync()
    assert contents(hand.log, "file") == {None}


def test_a_removed_and_remade_name_may_be_the_old_file_the_new_one_or_none(recorded):
    hand = recorded(file=b"old")
    hand.unlink("file")
    hand.write("file", b"new", sync=True)
    assert contents(hand.log, "file") == {b"old", None, b"new"}


def test_a_directory_without_a_durable_name_is_lost_with_all_it_holds(recorded):
    hand = recorded()
    hand.mkdir("a")
    hand.write("a/file", b"1", sync=True)
    hand.sync("a")
    assert {frozenset(tree) for tree in trees(hand.log)} == {frozenset(), frozenset(["a", "a/file"])}
    hand.sync()
    assert all(tree == {"a": None, "a/file": b"1"} for tree in trees(hand.log))


def test_a_renamed_directory_has_one_name(recorded):
    hand = recorded()
    hand.mkdir("a")
    hand.write("a/file", b"1", sync=True)
    hand.sync(everything=True)
    hand.rename("a", "b")
    seen = {frozenset(tree) for tree in trees(hand.log)}
    assert seen == {frozenset(["a", "a/file"]), frozenset(["b", "b/file"])}


def test_a_truncated_file_may_be_as_before_empty_or_written(recorded):
    hand = recorded(file=b"old")
    hand.write("file", b"1", flags=os.O_WRONLY | os.O_TRUNC)
    assert {b"old", b"", b"1", b"1ld"} <= contents(hand.log, "file")


def test_writes_are_kept_and_dropped_one_by_one(recorded):
    hand = recorded()
    hand.write("file", b"a", b"b")
    hand.sync()
    assert {b"", b"a", b"ab", b"\0b", b"a\0", b"\0\0"} <= contents(hand.log, "file")


def test_a_write_may_be_cut_at_a_sector_or_anywhere_or_have_a_bad_sector(recorded):
    hand = recorded()
    whole = bytes(range(1, 251)) * 8
    hand.write("file", whole)
    hand.sync()
    seen = contents(hand.log, "file")
    cuts = {len(content) for content in seen if whole.startswith(content)}
    assert {0, 512, 1024, 1536, 2000} <= cuts and len(cuts) > 20
    assert any(content[:512] + content[1024:] == whole[:512] + whole[1024:] for content in seen - {whole})


def test_syncfs_makes_everything_durable(recorded):
    hand = recorded(gone=b"0")
    hand.mkdir("a")
    hand.write("a/x", b"1")
    hand.write("y", b"2")
    hand.unlink("gone")
    hand.sync("a", everything=True)
    assert all(tree == {"a": None, "a/x": b"1", "y": b"2"} for tree in trees(hand.log))


# ------------------------------------------------------------------ failed syncs


def sync_fails(call: str, code: int = errno.EIO) -> FaultyDisk:
    disk = FaultyDisk()
    disk.fail(call, error=oserror(code))
    return disk


def write_and_sync_twice(hand: Recorded, *, everything: bool = False) -> None:
    hand.write("file", b"1")
    with pytest.raises(OSError):
        hand.sync("file", everything=everything)
    hand.sync("file", everything=everything)
    hand.sync()


@pytest.mark.parametrize("call", ["fsync", "syncfs"])
def test_a_sync_tried_again_after_it_failed_makes_nothing_durable(recorded, call):
    hand = recorded(sync_fails(call))
    write_and_sync_twice(hand, everything=call == "syncfs")
    hand.sync(everything=True)
    assert {b"1", b"", b"\0"} <= contents(hand.log, "file")
    assert None not in contents(hand.log, "file")


def test_what_is_written_after_a_failed_sync_is_durable_once_synced(recorded):
    hand = recorded(sync_fails("fsync"))
    write_and_sync_twice(hand)
    hand.write("file", b"2", sync=True, flags=os.O_WRONLY)
    assert contents(hand.log, "file") == {b"2"}


def test_a_later_write_elsewhere_leaves_the_lost_one_in_doubt(recorded):
    hand = recorded(sync_fails("fsync"))
    write_and_sync_twice(hand)
    hand.write("file", b"2", sync=True, flags=os.O_WRONLY | os.O_APPEND)
    assert {b"12", b"\x002"} <= contents(hand.log, "file")
    assert {(len(content), content[1:]) for content in contents(hand.log, "file")} == {(2, b"2")}


def test_a_new_file_is_durable_after_another_failed(recorded):
    hand = recorded(sync_fails("fsync"))
    with pytest.raises(OSError):
        hand.write("file", b"1", sync=True)
    hand.unlink("file")
    hand.write("file", b"1", sync=True)
    hand.sync()
    assert contents(hand.log, "file") == {b"1"}


def test_a_missing_syncfs_harms_nothing(recorded):
    hand = recorded(sync_fails("syncfs", errno.ENOSYS))
    hand.write("file", b"1")
    with pytest.raises(OSError):
        hand.sync("file", everything=True)
    hand.sync("file")
    hand.sync()
    assert contents(hand.log, "file") == {b"1"}


def test_a_directory_whose_sync_failed_is_not_durable_and_may_be_synced_again(recorded):
    hand = recorded(sync_fails("fsync"))
    hand.mkdir("a")
    with pytest.raises(OSError):
        hand.sync()
    assert {"a" in tree for tree in trees(hand.log)} == {True, False}
    hand.sync()
    assert {"a" in tree for tree in trees(hand.log)} == {True}


# ------------------------------------------------------------------ hard links


def test_two_names_of_a_file_share_its_content_and_are_synced_each_in_its_directory(recorded, tmp_path):
    hand = recorded()
    hand.mkdir("a")
    hand.write("x", b"1")
    hand.link("x", "a/y")
    hand.sync()
    seen = trees(hand.log)
    assert {tree["a/y"] == tree["x"] for tree in seen if "a/y" in tree} == {True}
    assert {"a/y" in tree for tree in seen} == {True, False}
    hand.sync("a")
    hand.sync("a/y")
    assert all(tree == {"a": None, "a/y": b"1", "x": b"1"} for tree in trees(hand.log))
    (built := tmp_path / "built").mkdir()
    next(images_at(hand.log, len(hand.log), 1)).build(built)
    assert (built / "x").samefile(built / "a" / "y")


def test_hard_links_of_before_the_recording_are_one_file(recorded, root):
    (root / "x").write_bytes(b"1")
    os.link(root / "x", root / "y")
    hand = recorded()
    hand.write("x", b"2", sync=True, flags=os.O_WRONLY)
    assert all(tree == {"x": b"2", "y": b"2"} for tree in trees(hand.log))


def test_renaming_a_file_over_another_name_of_itself_changes_nothing(recorded, root):
    hand = recorded(x=b"1")
    hand.link("x", "y")
    hand.rename("x", "y")
    hand.sync()
    assert all(tree == {"x": b"1", "y": b"1"} == real_tree(root) for tree in trees(hand.log))


# ------------------------------------------------------------------ modes


def names_by_mode(log: Log) -> dict[Mode, set[frozenset[str]]]:
    found: dict[Mode, set[frozenset[str]]] = {mode: set() for mode in Mode}
    for image in images_at(log, len(log), 1000):
        if image.choice:  # the very first drops even what a journal would hold
            found[image.mode].add(frozenset(path for path, _, _ in image.files))
    return found


def sets(*names: str) -> set[frozenset[str]]:
    return {frozenset(name.split()) for name in names}


def test_each_mode_drops_what_it_says(recorded):
    hand = recorded()
    for name in "ab":
        hand.mkdir(name)
    hand.sync()
    for path in ("a/1", "b/1", "a/2"):
        hand.write(path)
    found = names_by_mode(hand.log)
    assert found[Mode.ORDERED] == sets("", "a/1", "a/1 b/1", "a/1 b/1 a/2")
    assert found[Mode.UNORDERED] == found[Mode.ORDERED] | sets("b/1", "a/1 a/2")
    assert found[Mode.WILD] == found[Mode.UNORDERED] | sets("a/2", "b/1 a/2")


def test_in_order_a_synced_directory_brings_what_others_did_before(recorded):
    hand = recorded()
    for name in "ab":
        hand.mkdir(name)
    hand.sync()
    for path in ("a/1", "b/1", "a/2"):
        hand.write(path)
    hand.sync("b")
    found = names_by_mode(hand.log)
    assert found[Mode.ORDERED] == sets("a/1 b/1", "a/1 b/1 a/2")
    assert found[Mode.UNORDERED] == sets("b/1", "a/1 b/1", "a/1 b/1 a/2")


# ------------------------------------------------------------------ which images there are


def some_saves(hand: Hand, number: int = 6) -> None:
    """What a store does: files in directories, renamed, linked, synced, some removed."""
    for turn in range(number):
        hand.mkdir(f"{turn}")
        hand.write(f"{turn}/.x", b"x" * 700, bytes([turn]) * 100, sync=turn % 2 == 0)
        hand.rename(f"{turn}/.x", f"{turn}/x")
        hand.link(f"{turn}/x", f"link-{turn}")
        hand.sync(f"{turn}")
        if turn % 3 == 2:
            hand.unlink(f"link-{turn - 1}")
            hand.sync(everything=True)


def comparable(image: Image) -> tuple[Any, ...]:
    return image.position, image.choice, image.mode, image.marks, image.tree()


def test_the_same_seed_gives_the_same_images_and_another_others(recorded):
    hand = recorded()
    some_saves(hand)
    first, again, other = ([comparable(i) for i in images(hand.log, 500, seed)] for seed in (1, 1, 2))
    assert first == again != other


def test_an_image_can_be_made_again_by_its_numbers(recorded):
    hand = recorded()
    some_saves(hand)
    for image in list(images(hand.log, 700, seed=3))[::50]:
        *_, again = images_at(hand.log, image.position, image.choice + 1, image.seed)
        assert comparable(again) == comparable(image)
        assert f"position={image.position}, choice={image.choice}, seed=3" in str(image)


@pytest.mark.parametrize("count", [0, 1, 30, 100, 5000])
def test_there_are_as_many_as_asked_for_of_as_many_positions_as_can_be(recorded, count):
    hand = recorded()
    some_saves(hand)
    made = list(images(hand.log, count))
    positions = [image.position for image in made]
    assert len(made) == count
    assert positions == sorted(positions)
    assert len(set(positions)) == min(count, len(hand.log) + 1)


def test_every_position_has_all_dropped_and_all_kept(recorded, root):
    hand = recorded()
    some_saves(hand)
    made = {(image.position, image.choice): image.tree() for image in images(hand.log, 2 * len(hand.log) + 2)}
    assert len(made) == 2 * len(hand.log) + 2
    assert made[0, 0] == made[0, 1] == {}
    assert made[len(hand.log), 1] == real_tree(root)


def test_without_doubt_there_is_one_state(recorded):
    hand = recorded(a=b"1")
    assert [image.tree() for image in images(hand.log, 10)] == [{"a": b"1"}] * 10


def test_an_image_knows_the_marks_before_it(recorded):
    hand = recorded()
    hand.disk.mark("begun")
    hand.write("file", b"1")
    hand.disk.mark(("done", 1))
    marks = [next(images_at(hand.log, position, 1)).marks for position in range(len(hand.log) + 1)]
    assert marks == [(), ("begun",), ("begun",), ("begun",), ("begun", ("done", 1))]
    assert str(hand.log).splitlines()[1:3] == ["    1 create file", "    2 write file: 1 at 0"]


def test_an_image_is_built_as_it_says_in_an_empty_directory_only(recorded, tmp_path):
    hand = recorded()
    some_saves(hand)
    (built := tmp_path / "built").mkdir()
    for image in images(hand.log, 200):
        image.build(built, clear=True)
        assert real_tree(built) == image.tree()
    (built / "foreign").touch()
    with pytest.raises(AssertionError, match="clear=True"):
        image.build(built)
    assert (built / "foreign").exists()


# ------------------------------------------------------------------ protocols


def save(hand: Recorded, version: int, *, right: bool) -> None:
    """Replace ``head`` by a new version; wrongly, if the content is synced after the rename."""
    content = b"%d" % version * 600
    hand.disk.mark(("begun", version))
    hand.write(".head", content, sync=right)
    hand.rename(".head", "head")
    if not right:
        hand.sync("head")
    hand.sync()
    hand.disk.mark(("saved", version))


def is_sound(image: Image) -> bool:
    """Whether the head is whole, and of the newest version acknowledged or one begun since."""
    saved = max([version for what, version in image.marks if what == "saved"], default=0)
    begun = max([version for what, version in image.marks if what == "begun"], default=0)
    allowed = [b"%d" % version * 600 if version else None for version in range(saved, begun + 1)]
    return image.tree().get("head") in allowed


@pytest.mark.parametrize("right", [True, False])
def test_a_right_protocol_never_fails_and_a_wrong_one_soon(recorded, right):
    hand = recorded()
    for version in range(1, 6):
        save(hand, version, right=right)
    if right:
        assert all(is_sound(image) for image in images(hand.log, 2000))
    else:
        assert not all(is_sound(image) for image in images(hand.log, 200))


def test_an_acknowledgement_before_the_directory_is_synced_is_caught(recorded):
    hand = recorded()
    hand.write(".head", b"1" * 600, sync=True)
    hand.rename(".head", "head")
    hand.disk.mark(("saved", 1))
    hand.disk.mark(("begun", 1))
    assert not all(is_sound(image) for image in images(hand.log, 200))


def test_deleting_the_old_before_the_new_is_durable_is_caught(recorded):
    hand = recorded(old=b"1")
    hand.write("new", b"2", sync=True)
    hand.unlink("old")
    hand.sync()
    assert any("old" not in image.tree() and "new" not in image.tree() for image in images(hand.log, 200))


# ------------------------------------------------------------------ the recording


def test_no_call_goes_past_the_recording():
    assert set(CALLS) <= set(vars(RecordingDisk))


def test_recording_changes_nothing_of_what_calls_do(tmp_path):
    for name in ("plain", "recorded"):
        (tmp_path / name).mkdir()
    disk = RecordingDisk(tmp_path / "recorded")
    some_saves(Hand(Disk(), tmp_path / "plain"))
    some_saves(Hand(disk, tmp_path / "recorded"))
    assert real_tree(tmp_path / "plain") == real_tree(tmp_path / "recorded")
    assert sorted(disk.listdir(str(tmp_path))) == ["plain", "recorded"]
    assert disk.exists(str(tmp_path)) and disk.free_bytes(str(tmp_path)) > 0


def test_what_is_elsewhere_is_not_recorded(recorded, tmp_path):
    hand = recorded()
    (tmp_path / "rooted").mkdir()  # the root's name begins like this one's
    some_saves(Hand(hand.disk, tmp_path / "rooted"))
    assert len(hand.log) == 0 and len(real_tree(tmp_path / "rooted")) > 10


def test_a_call_that_raises_is_raised_and_not_recorded(recorded):
    hand = recorded()
    calls: list[Callable[[], Any]] = [
        lambda: hand.unlink("none"),
        lambda: hand.unlink("none/none"),
        lambda: hand.rename("none", "other"),
        lambda: hand.rename("none/none", "none/other"),
        lambda: hand.link("none", "other"),
        lambda: hand.mkdir("none/none"),
        lambda: hand.write("none/none"),
        lambda: hand.disk.rmdir(hand.at("none")),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError):
            call()
    assert len(hand.log) == 0


def test_every_call_is_followed(recorded, root):
    hand = recorded(first=b"0123456789")
    disk = hand.disk
    disk.makedirs(hand.at("a/b/c"))
    disk.makedirs(hand.at("a/b"))
    directory = disk.open(hand.at("a"), os.O_RDONLY | os.O_DIRECTORY)
    source = disk.open("first", os.O_RDONLY, dir_fd=(top := disk.open(hand.at("."), os.O_RDONLY)))
    target = disk.open("b/copy", NEW, dir_fd=directory)
    assert disk.copy_range(source, target, 4, 3) == 4
    assert disk.pwrite(target, b"xy", 1) == 2
    disk.fsync(target)
    for fd in (directory, source, target):
        disk.close(fd)
    disk.unlink("first", dir_fd=top)
    disk.rmdir("a/b/c", dir_fd=top)
    disk.syncfs(top)
    disk.close(top)
    assert trees(hand.log, count=4) == [{"a": None, "a/b": None, "a/b/copy": b"\0xy3456"}] * 4
    assert real_tree(root) == trees(hand.log)[0]


def test_a_clone_is_a_write_of_all_of_its_source(recorded):
    class Cloning(Disk):
        def clone(self, source: int, target: int) -> None:
            os.write(target, os.pread(source, 100, 0))

    hand = recorded(Cloning(), first=b"0123456789")
    source, target = hand.disk.open(hand.at("first"), os.O_RDONLY), hand.disk.open(hand.at("clone"), NEW)
    hand.disk.clone(source, target)
    hand.disk.close(source)
    hand.disk.close(target)
    hand.sync()
    assert {b"", b"0123456789", bytes(10)} <= contents(hand.log, "clone")


def test_a_short_write_is_recorded_as_long_as_it_was(recorded, root):
    disk = FaultyDisk()
    disk.short("writev", 3, nth=1)
    hand = recorded(disk)
    hand.write("file", b"abcdef", b"gh")
    assert real_tree(root) == {"file": b"abcgh"}
    hand.sync(everything=True)
    assert contents(hand.log, "file") == {b"abcgh"}


def test_a_file_from_elsewhere_is_in_doubt_until_it_is_synced_here(recorded, tmp_path):
    hand = recorded()
    (tmp_path / "elsewhere").write_bytes(b"1")
    hand.link("../elsewhere", "linked")
    hand.link("linked", "again")
    hand.sync()
    assert {b"1", b""} <= contents(hand.log, "linked")
    hand.sync("linked")
    assert contents(hand.log, "linked") == contents(hand.log, "again") == {b"1"}
    hand.rename("../elsewhere", "moved")
    hand.rename("linked", "../elsewhere")
    hand.sync(everything=True)
    assert all(tree == {"again": b"1", "moved": b"1"} for tree in trees(hand.log))


def test_what_others_made_here_is_found_when_it_is_named(recorded, root):
    hand = recorded()
    (root / "a").mkdir()
    (root / "a" / "x").write_bytes(b"1")
    (root / "a" / "link").symlink_to("x")
    hand.unlink("a/link")
    hand.rename("a/x", "a/y")
    assert {b"1", b"", None} <= contents(hand.log, "a/y")
    hand.sync(everything=True)
    assert trees(hand.log, count=1) == [real_tree(root)]


def test_what_others_removed_and_a_call_makes_again_is_new(recorded, root):
    hand = recorded(file=b"old")
    hand.mkdir("a")
    hand.write("a/x")
    hand.sync(everything=True)
    shutil.rmtree(root / "a")
    (root / "file").unlink()
    hand.disk.makedirs(hand.at("a/b"))
    hand.write("file", b"new", flags=os.O_WRONLY | os.O_CREAT)
    hand.sync(everything=True)
    assert trees(hand.log, count=1) == [{"file": b"new", "a": None, "a/b": None}]


def test_a_descriptor_that_others_closed_and_a_call_opens_elsewhere_is_not_recorded(recorded, tmp_path):
    hand = recorded()
    os.close(fd := hand.disk.open(hand.at("file"), NEW))
    assert hand.disk.open(str(tmp_path / "elsewhere"), NEW) == fd
    hand.disk.writev(fd, [b"1"])
    hand.disk.close(fd)
    assert [call.text for call in hand.log] == ["create file"]


def test_the_root_may_be_made_later_and_be_named_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    disk = RecordingDisk(tmp_path / "link" / "root")
    disk.makedirs(str(tmp_path / "link" / "root" / "a"))
    hand = Recorded(disk, tmp_path / "real" / "root")
    hand.write("a/x", b"1", sync=True)
    hand.sync("a")
    assert {frozenset(tree) for tree in trees(hand.log)} == {frozenset(), frozenset(["a", "a/x"])}


def random_calls(hand: Hand, rng: random.Random, number: int, name: str) -> None:
    """Calls that may fail, on few names, so that they meet."""
    paths = [f"{directory}{name}{file}" for directory in ("", "a/", "a/b/") for file in "xyz"]
    for _ in range(number):
        one, two = rng.choice(paths), rng.choice(paths)
        call = rng.choice(
            [
                lambda one=one: hand.write(one, rng.randbytes(rng.randrange(2000)), sync=rng.random() < 0.5),
                lambda one=one: hand.write(one, b"tail", flags=os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                lambda one=one: hand.write(one, b"again", flags=os.O_WRONLY | os.O_TRUNC),
                lambda one=one, two=two: hand.rename(one, two),
                lambda one=one, two=two: hand.link(one, two),
                lambda one=one: hand.unlink(one),
                lambda: hand.disk.makedirs(hand.at("a/b")),
                lambda: hand.disk.rmdir(hand.at("a/b")),
                lambda: hand.rename("a/b", "b"),
                lambda: hand.rename("b", "a/b"),
                lambda: hand.sync(rng.choice([".", "a", "a/b"])),
                lambda: hand.sync(everything=True),
            ]
        )
        try:
            call()
        except OSError:
            pass


@pytest.mark.parametrize("seed", range(8))
def test_all_kept_is_the_real_directory_and_nothing_durable_is_lost(recorded, root, seed):
    hand = recorded()
    random_calls(hand, random.Random(seed), 150, "1")
    assert list(images_at(hand.log, len(hand.log), 2))[1].tree() == real_tree(root)
    hand.sync(everything=True)
    settled = real_tree(root)
    assert all(tree == settled for tree in trees(hand.log, count=50))
    at = len(hand.log)
    for number in range(20):
        hand.write(f"2{number}", b"1", sync=number % 2 == 0)
        hand.rename(f"2{number}", f"2{number // 3}")
        if number % 5 == 0:
            hand.sync()
    for image in images(hand.log, 1000, seed):
        if image.position >= at:
            assert {path: content for path, content in image.tree().items() if path in settled} == settled


def test_threads_that_reuse_descriptors_are_recorded_in_order(recorded, root):
    hand = recorded()
    hand.disk.makedirs(hand.at("a/b"))
    threads = [
        threading.Thread(target=random_calls, args=(hand, random.Random(number), 150, f"{number % 2}"))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(images_at(hand.log, len(hand.log), 2))[1].tree() == real_tree(root)
    assert not hand.disk._open
