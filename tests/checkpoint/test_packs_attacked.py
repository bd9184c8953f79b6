"""Packs against whoever writes, deletes or forges beside a save: nothing is lost, errors are typed."""

from __future__ import annotations

import struct
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from xxhash import xxh3_64_intdigest

from fbcache import CorruptBlobError, FBPool, PickleRefusedError, TrackedDirectory
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob, Manifest, Pack, pack
from fbcache.checkpoint.packs import frames_of, read_records, slot_of
from fbcache.checkpoint.progress import Meter
from fbcache.codec.layout import pack as pack_blob
from tests.checkpoint.opened import fresh
from tests.checkpoint.smallvalues import fill, row
from tests.conftest import MakePool, Running
from tests.directories import blob_of, large, manifest_of

Spawn = Callable[..., Running]
COUNT = 20


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "tracked"


@pytest.fixture
def pool(make_pool: MakePool) -> FBPool:
    return make_pool("4MB")


def newest(target: Path) -> Manifest:
    directory = fresh(target)
    return directory.versions.read(directory.versions.numbers()[-1])


def contents(target: Path, **options: Any) -> dict[Any, Any]:
    with FBPool.from_checkpoint(target, memory="8MB", min_free=0, **options) as pool:
        return {name: pool[name] for name in pool}


def forge(target: Path, manifest: Manifest, version: int, **changes: Any) -> None:
    """Write a manifest of these rows, and of the version given."""
    blobs = list(manifest.blobs)
    forged = replace(manifest, **{"blobs": blobs, **changes})
    head = replace(
        manifest.head,
        version=version,
        count=len(forged.names),
        nbytes=sum(blob.nbytes for blob in forged.blobs),
        disk_bytes=sum(blob.disk_bytes for blob in forged.blobs),
    )
    manifest_of(target, version).write_bytes(b"".join(pack(replace(forged, head=head))))


# ------------------------------------------------------------------ deletions beside a save


def test_a_deletion_that_began_before_a_save_takes_nothing_from_it(
    pool: FBPool, target: Path, spawn: Spawn, monkeypatch: Any
) -> None:
    pool["a"] = large(1)
    with TrackedDirectory(target) as tracked:
        key = pool.persist("a", tracked)
        looking, go = threading.Event(), threading.Event()
        look = Directory._keys_of_readers

        def slowly(directory: Directory) -> Any:
            found = look(directory)
            looking.set()
            assert go.wait(30)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Directory, "_keys_of_readers", slowly)
            deleting = spawn(tracked.delete, key)
            assert looking.wait(30)
        with tracked.saving() as saver:
            saver.gather_named(pool._engine, ["a"], KeyError, Meter(False, ""))
            go.set()
            assert not deleting.result()
            saver.commit()
        assert (contents(target)["a"] == large(1)).all()
        assert key in tracked and tracked.verify().ok
        tracked.forget(1)
        assert key not in tracked, "its pin was taken away"


# ------------------------------------------------------------------ readers beside a writer


@pytest.mark.parametrize("look", ["keys", "in", "register"])
def test_a_reader_finds_what_is_packed_though_a_save_replaces_the_checkpoint_meanwhile(
    pool: FBPool, make_pool: MakePool, target: Path, look: str, monkeypatch: Any
) -> None:
    fill(pool, range(COUNT))
    pool.save(target)
    key = newest(target).keys[0]
    reader = fresh(target)  # as in another process
    read, saves = type(reader.versions).read, iter(range(3))

    def after_a_save(versions: Any, *arguments: Any) -> Manifest:
        if versions is reader.versions and (number := next(saves, None)) is not None:
            fill(pool, range(100, 160), number)  # so that the former pack is rewritten
            pool.save(target)
        return read(versions, *arguments)

    monkeypatch.setattr(type(reader.versions), "read", after_a_save)
    with TrackedDirectory._over(reader, readonly=True) as tracked:
        if look == "keys":
            assert key in list(tracked)
        elif look == "in":
            assert key in tracked
        else:
            other = make_pool("4MB")
            other.register(tracked, key, "it").drop()
            assert other["it"] == row(0)


# ------------------------------------------------------------------ what is counted


def test_what_was_refused_is_not_counted_as_written(pool: FBPool, target: Path) -> None:
    fill(pool, range(COUNT))
    pool["odd"] = {"o": _Odd()}
    with TrackedDirectory(target) as tracked, tracked.saving() as saver:
        for number in range(COUNT):
            saver.persist(_handle(pool, number), number)
        with pytest.raises(PickleRefusedError):
            saver.persist(_handle(pool, "odd"), "odd")
        found = saver.commit()
    assert found.blobs_written == COUNT
    assert found.bytes_written == sum(blob.disk_bytes for blob in newest(target).blobs)


class _Odd:
    pass


def _handle(pool: FBPool, name: Any) -> Any:
    return pool.put(name, pool[name])


# ------------------------------------------------------------------ packs that are gone


def test_a_content_is_present_while_any_checkpoint_has_it_in_a_pack_that_is_there(
    pool: FBPool, make_pool: MakePool, target: Path
) -> None:
    fill(pool, range(COUNT))
    pool.save(target, tag="old")
    (old,) = newest(target).packs
    fill(pool, range(100, 200))
    pool.save(target)
    key = newest(target).keys[0]
    (new,) = newest(target).packs
    assert new != old
    blob_of(target, new.key).unlink()
    with TrackedDirectory(target, readonly=True) as reader:
        assert key in reader and key in list(reader)
        other = make_pool("4MB")
        other.register(reader, key, "it").drop()
        assert other["it"] == row(0)
    directory = fresh(target)
    with TrackedDirectory._over(directory) as writer:
        assert key in writer and key in list(writer)


# ------------------------------------------------------------------ forged manifests


@pytest.mark.parametrize("change", [{"nbytes": 1 << 40}, {"digest": 7}])
@pytest.mark.parametrize("is_newer", [True, False])
@pytest.mark.parametrize("more", [0, 20])
def test_a_pack_of_which_checkpoints_tell_different_things_fails_no_save(
    pool: FBPool, make_pool: MakePool, target: Path, change: dict[str, int], is_newer: bool, more: int
) -> None:
    fill(pool, range(COUNT))
    pool.save(target)
    whole = newest(target)
    if not is_newer:
        manifest_of(target, 1).rename(manifest_of(target, 2))
        forge(target, whole, 2)
    (there,) = whole.packs
    wrong = replace(there, **change)
    half = range(COUNT // 2)
    forge(
        target,
        whole,
        3 if is_newer else 1,
        names=list(half),
        keys=[whole.keys[n] for n in half],
        blobs=[replace(whole.blobs[n], pack=wrong) for n in half],
    )
    other = make_pool("4MB")
    directory = fresh(target)
    other.restore(TrackedDirectory._over(directory, readonly=True), version=1 if is_newer else 2)
    with TrackedDirectory._over(directory) as tracked:
        fill(other, range(100, 100 + more))
        other.save(tracked, keep=None)
    assert contents(target) == {n: row(n) for n in (*range(COUNT), *range(100, 100 + more))}


@pytest.mark.parametrize("forged", ["pack", "row", "both"])
def test_a_file_that_a_checkpoint_takes_for_a_pack_or_the_other_way_round_fails_no_save(
    pool: FBPool, make_pool: MakePool, target: Path, forged: str
) -> None:
    fill(pool, range(COUNT))
    pool["large"] = large(1)
    pool.save(target)
    whole = newest(target)
    (there,) = whole.packs
    rows = dict(zip(whole.names, zip(whole.keys, whole.blobs, strict=True), strict=True))
    key, blob = rows["large"]
    if forged == "pack":  # the large value's file is said to be a pack
        fake = replace(there, key=key)
        forge(target, whole, 2, names=[0], keys=[rows[0][0]], blobs=[replace(rows[0][1], pack=fake)])
    else:
        blobs = [replace(blob, digest=there.digest)]
        names, keys = ["x"], [there.key]
        if forged == "both":
            names, keys, blobs = [*names, 0], [*keys, rows[0][0]], [*blobs, rows[0][1]]
        forge(target, whole, 2, names=names, keys=keys, blobs=blobs)
    directory = fresh(target)
    other = make_pool("4MB")
    other.restore(TrackedDirectory._over(directory, readonly=True), version=1)
    with TrackedDirectory._over(directory) as tracked:
        assert key in tracked and there.key not in tracked
        other["more"] = row(5)
        other.save(tracked, keep=None)
        found = contents(target)
        assert (found.pop("large") == large(1)).all()
        assert found == {**{n: row(n) for n in range(COUNT)}, "more": row(5)}
        if forged != "pack":
            other.restore(tracked, ["x"], version=2)
            with pytest.raises(CorruptBlobError):
                other["x"]
            with pytest.raises(CorruptBlobError):
                other.save(tracked)
            with pytest.raises(CorruptBlobError):
                other.persist("x", tracked)


def test_records_that_overlap_are_refused(pool: FBPool, target: Path) -> None:
    fill(pool, range(COUNT))
    pool.save(target)
    whole = newest(target)
    key, blob = whole.keys[0], whole.blobs[0]
    keys = [UUID(int=key.int ^ n) for n in range(1000)]  # all with one slot
    forged = replace(
        whole,
        names=list(range(1000)),
        keys=keys,
        blobs=[blob] * 1000,
        head=replace(
            whole.head,
            version=2,
            count=1000,
            nbytes=1000 * blob.nbytes,
            disk_bytes=1000 * blob.disk_bytes,
        ),
    )
    with pytest.raises(ValueError, match="overlap"):
        pack(forged)


# ------------------------------------------------------------------ forged records


def packed_in(target: Path, body: bytes) -> tuple[Directory, UUID, Blob]:
    """A pack of one record with such a body."""
    length = 0xFFFFFFFF  # it is more than a tree
    key, file = uuid4(), uuid4()
    nbytes = len(body)
    seed = (slot_of(key) ^ nbytes << 20 ^ length << 40) & (1 << 64) - 1
    digest = xxh3_64_intdigest(body, seed)
    record = struct.pack("<QIIQ", slot_of(key), nbytes, length, digest) + body
    laid = pack_blob(file, frames_of(record))
    path = blob_of(target, file)
    path.parent.mkdir(parents=True)
    raw = b"".join(laid.pieces)
    path.write_bytes(raw)
    blob = Blob(1, len(record), "msgpack", None, digest, Pack(file, len(raw), 0), len(raw) - len(record))
    return fresh(target), key, blob


@pytest.mark.parametrize(
    "lead",
    [b"", b"\x94\xa1a\xc4\x00\xc0", b"\x94\xa1a\xc4\x00\xc0\x91"],
    ids=["at once", "as buffers", "as a buffer"],
)
def test_a_record_of_lists_that_lie_allocates_nothing(target: Path, lead: bytes) -> None:
    nested = b"\xdd\x00\x10\x00\x00" * 1000  # each of a million parts
    body = (lead + nested).ljust(1 << 20, b"\xc0")
    directory, key, blob = packed_in(target, body)
    tracemalloc.start()
    try:
        (found,) = read_records(directory.disk, directory.places, blob.pack, [(key, blob)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found, CorruptBlobError)
    assert peak < 16 << 20


def test_a_checkpoint_that_hides_pickle_makes_no_packed_record_load(
    pool: FBPool, make_pool: MakePool, target: Path
) -> None:
    for number in range(COUNT):
        pool[number] = {"o": _Odd(), "n": number}
    pool.save(target, allow_pickle=True)
    whole = newest(target)
    assert all(blob.pack is not None and blob.pickled is not None for blob in whole.blobs)
    forge(target, whole, 2, blobs=[replace(blob, pickled=None) for blob in whole.blobs])
    other = make_pool("4MB")
    other.restore(target, version=2)
    for _ in range(2):
        with pytest.raises(PickleRefusedError):
            other[3]
        other.evict()
    elsewhere = target.with_name("elsewhere")
    with pytest.raises(PickleRefusedError):
        other.save(elsewhere)
