"""``TrackedDirectory.verify``: what it finds, and that it changes nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from fbcache import TrackedDirectory
from fbcache.checkpoint import tracked as tracked_module
from fbcache.checkpoint import verifying
from fbcache.checkpoint.registry import directory_at
from fbcache.codec import Frames
from fbcache.codec.layout import pack
from tests.directories import blob_of, flip, large, manifest_of, replaced
from tests.faults import FaultyDisk, oserror


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


@pytest.fixture
def keys(make_pool, target) -> dict:
    """A checkpoint of five entries, and one persisted that is in none; the keys by name."""
    with make_pool("50MB") as pool:
        values = {"big": large(1), "mid": np.arange(5000.0), "small": [1], ("t", 1): {"a": 1}, "empty": b""}
        for name, value in values.items():
            pool[name] = value
        pool.save(target)
        keys = {name: pool.persist(name, target) for name in values}
        keys["pinned"] = pool.put("pinned", "alone").persist(target)
    return keys


def verify(target: Path, **options):
    with TrackedDirectory(target, readonly=True) as tracked:
        return tracked.verify(**options)


def test_a_sound_directory_is_found_sound(target, keys):
    report = verify(target)
    assert report.ok and report.damaged == report.foreign == ()
    assert report.checked == 6
    assert report.nbytes == sum(blob_of(target, key).stat().st_size for key in keys.values())


def test_an_empty_directory_is_sound(target):
    with TrackedDirectory(target) as tracked:
        report = tracked.verify(progress=lambda done, total: None)
    assert (report.checked, report.nbytes, report.ok) == (0, 0, True)


@pytest.mark.parametrize("where", [0, 9, 30, -1], ids=["magic", "length", "header", "payload"])
@pytest.mark.parametrize("name", ["big", "mid", "small"])
def test_a_flipped_byte_is_found_with_its_file_its_key_and_its_names(target, keys, name, where):
    path = blob_of(target, keys[name])
    flip(path, where)
    report = verify(target)
    (damage,) = report.damaged
    assert (damage.path, damage.key, damage.names) == (str(path), keys[name], ((1, name),))
    assert damage.reason and report.checked == 6 and not report.ok


def test_every_kind_of_damage_is_found_at_once_and_the_sound_ones_are_not_accused(target, keys):
    flip(blob_of(target, keys["big"]), -1)
    blob_of(target, keys["mid"]).unlink()
    path = blob_of(target, keys["small"])
    replaced(path, path.read_bytes()[:-1])
    flip(blob_of(target, keys["pinned"]), -1)
    report = verify(target)
    found = {damage.key: (damage.names, damage.reason) for damage in report.damaged}
    assert set(found) == {keys[name] for name in ("big", "mid", "small", "pinned")}
    assert found[keys["mid"]] == (((1, "mid"),), "the file is gone")
    assert found[keys["pinned"]][0] == ()
    assert report.checked == 6


def test_swapped_and_exchanged_blobs_are_found(target, keys):
    """A blob says whose it is, and a manifest which one it means."""
    one, two = blob_of(target, keys["mid"]), blob_of(target, keys["big"])
    first, second = one.read_bytes(), two.read_bytes()
    replaced(one, second)
    replaced(two, first)
    other = pack(keys["small"], Frames("msgpack", b"\xc0", ()))
    replaced(blob_of(target, keys["small"]), b"".join(other.pieces))
    reasons = {damage.key: damage.reason for damage in verify(target).damaged}
    assert set(reasons) == {keys[name] for name in ("mid", "big", "small")}
    assert "another blob than the checkpoint names" in reasons[keys["small"]]


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_something_else_in_a_blobs_place_is_damage_and_holds_nothing_up(target, keys, kind):
    path = blob_of(target, keys["small"])
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(blob_of(target, keys["mid"]))
    (damage,) = verify(target).damaged
    assert damage.key == keys["small"] and damage.path == str(path)


def test_a_damaged_manifest_is_found_and_its_blobs_are_checked_all_the_same(target, keys):
    flip(manifest_of(target, 1), -1)
    flip(blob_of(target, keys["small"]), -1)
    report = verify(target)
    manifest, blob = report.damaged
    assert (manifest.path, manifest.key) == (
        str(manifest_of(target, 1)),
        None,
    ) and "checksum" in manifest.reason
    assert (blob.key, blob.names) == (keys["small"], ())


def test_a_blob_that_several_versions_name_is_accused_once_with_all_names(target, make_pool):
    with make_pool() as pool:
        pool["a"] = [1]
        key = pool.persist("a", target)
        pool.save(target, keep=None)
        pool.register(target, key, "b").drop()
        pool.save(target, keep=None)
    flip(blob_of(target, key), -1)
    (damage,) = verify(target).damaged
    assert damage.names == ((1, "a"), (2, "a"), (2, "b"))


def test_nothing_is_changed_and_no_pickle_is_loaded(target, make_pool):
    """Invariant 14."""
    with make_pool() as pool:
        pool["x"] = Loud()
        pool.save(target, allow_pickle=True)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in target.rglob("*")}
    assert verify(target).ok and loaded == []
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in target.rglob("*")} == before


loaded: list[int] = []


class Loud:
    def __reduce__(self):
        return _load, ()


def _load():
    loaded.append(1)


def test_a_blob_that_cannot_be_read_is_told_and_the_others_are_checked(target, keys, monkeypatch):
    disk = FaultyDisk()
    monkeypatch.setattr(tracked_module, "directory_at", lambda path: directory_at(path, disk))
    with TrackedDirectory(target, readonly=True) as tracked:
        disk.fail("preadv", error=oserror(5), nth=2)  # the first one reads the manifest
        report = tracked.verify()
    assert [damage.reason for damage in report.damaged] == ["it cannot be read: Input/output error"]
    assert report.checked == 6


def test_a_blob_that_is_deleted_meanwhile_is_no_damage(target, keys, monkeypatch, spawn):
    """Others may write while a reader verifies."""
    disk = FaultyDisk()
    monkeypatch.setattr(tracked_module, "directory_at", lambda path: directory_at(path, disk))
    with TrackedDirectory(target, readonly=True) as reader:
        monkeypatch.undo()
        with TrackedDirectory(target) as writer:
            deleted = threading.Event()

            def show(done, total):
                if not deleted.is_set():
                    writer.delete(keys["pinned"])
                    deleted.set()

            report = reader.verify(progress=show)
    assert report.ok and report.checked == 5


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_many_blobs_are_all_checked_on_any_number_of_cores(target, make_pool, monkeypatch, cores):
    monkeypatch.setattr(verifying.os, "sched_getaffinity", lambda _: set(range(cores)))
    with make_pool() as pool:
        for number in range(100):
            pool[number] = number
        keys = [pool.persist(number, target) for number in range(100)]
        bad = [keys[number] for number in (0, 50, 99)]
    for key in bad:
        flip(blob_of(target, key), -1)
    report = verify(target)
    assert report.checked == 100 and {damage.key for damage in report.damaged} == set(bad)


# ------------------------------------------------------------------------------------- packs


@pytest.fixture
def packed(target, make_pool):
    """Two checkpoints of packed values, of which most is the same; the newest manifest."""
    with make_pool("4MB", store="auto") as pool:
        for number in range(60):
            pool[number] = {"n": number}
        pool.save(target, keep=None)
        for number in range(40, 60):
            pool[number] = {"n": -number}
        pool.save(target, keep=None)
    with TrackedDirectory(target, readonly=True) as reader:
        return reader._directory.versions.read(2)


def place_of(target, manifest, row):
    blob = manifest.blobs[row]
    return blob_of(target, blob.pack.key), blob


def test_packs_that_are_whole_are_checked_as_one_blob_each(target, packed):
    assert len({blob.pack for blob in packed.blobs}) == 2
    report = verify(target)
    assert report.ok and report.checked == 2 and report.nbytes == sum(
        blob_of(target, key).stat().st_size for key in packed.files
    )


def test_of_a_damaged_pack_the_records_are_told_that_are_damaged(target, packed):
    for row in (3, 50):
        path, blob = place_of(target, packed, row)
        flip(path, blob.offset + blob.disk_bytes - 1)
    report = verify(target)
    found = {damage.key: damage for damage in report.damaged}
    assert len(report.damaged) == 2 and found.keys() == {packed.keys[3], packed.keys[50]}
    assert found[packed.keys[3]].names == ((1, 3), (2, 3)) and found[packed.keys[50]].names == ((2, 50),)
    for row in (3, 50):
        path, blob = place_of(target, packed, row)
        damage = found[packed.keys[row]]
        assert damage.path == str(path) and damage.pack == blob.pack.key and "checksum" in damage.reason


@pytest.mark.parametrize("place", [17, 60, -1])
def test_a_pack_that_is_damaged_between_its_records_is_told_by_itself(target, packed, place):
    path, blob = place_of(target, packed, 0)
    if place < 0:
        with open(path, "ab") as file:
            file.write(b"more")
    else:
        flip(path, place)
    (damage,) = verify(target).damaged
    assert (damage.key, damage.pack, damage.names) == (blob.pack.key, blob.pack.key, ())
    assert damage.path == str(path) and "every value" in damage.reason


def test_a_pack_that_is_gone_or_short_damages_what_is_in_it(target, packed):
    path, blob = place_of(target, packed, 0)
    raw = path.read_bytes()
    inside = [n for n in range(60) if packed.blobs[n].pack == blob.pack]
    path.write_bytes(raw[: packed.blobs[inside[10]].offset + 5])
    cut = {packed.keys[n] for n in inside if packed.blobs[n].offset >= packed.blobs[inside[10]].offset}
    found = {damage.key for damage in verify(target).damaged}
    assert cut <= found and not found & {packed.keys[n] for n in inside if packed.keys[n] not in cut}
    path.unlink()
    report = verify(target)
    assert {damage.key for damage in report.damaged} >= {packed.keys[n] for n in inside}
    assert all("gone" in damage.reason and damage.path == str(path) for damage in report.damaged)


def test_another_pack_in_the_place_of_one_is_told(target, packed):
    first, second = (place_of(target, packed, row)[0] for row in (0, 59))
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)
    assert len(verify(target).damaged) >= 60
