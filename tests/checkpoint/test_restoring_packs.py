"""What is packed comes back: copied into the pool's store, all or nothing, each damage by itself."""

from __future__ import annotations

import contextlib
import gc
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest

from fbcache import CorruptBlobError, DiskFullError, FBPool, PickleRefusedError, State, TrackedDirectory
from fbcache.adoptee import Claim
from fbcache.checkpoint import copying, packing
from fbcache.checkpoint.manifest import Blob, Manifest
from fbcache.checkpoint.registry import directory_at
from fbcache.codec import Frames
from fbcache.codec.layout import pack, unpack_header
from fbcache.errors import PoolClosedError, StorageError
from fbcache.store.auto import AutoStore
from fbcache.store.files import FileStore
from fbcache.store.packed import PackedStore
from fbcache.waiting import Waiter
from tests.checkpoint.cuts import MemoryStore, entry_of, nothing_is_left
from tests.checkpoint.opened import in_memory
from tests.conftest import GatedDisk, MakePool, Running, Sleepers, _Pools
from tests.directories import blob_of, blobs_in, flip, large, sessions_in, versions_on
from tests.faults import Gate, oserror
from tests.interrupts import Interrupter

Spawn = Callable[..., Running]
STORES = ["auto", "packed", "files", "diskcache", "memory"]
COUNT = 40


def small(number: int) -> dict[str, Any]:
    return {"n": number, "array": np.arange(number % 5), "text": "text" * number}


def same(found: Any, number: int) -> bool:
    wanted = small(number)
    return (found["n"], found["text"]) == (wanted["n"], wanted["text"]) and (
        found["array"] == wanted["array"]
    ).all()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "tracked"


@pytest.fixture
def saved(target: Path, make_pool: MakePool) -> Callable[..., Manifest]:
    """``saved(values, **how)``: a checkpoint, by a pool that is no more."""

    def save(values: dict[Any, Any] | None = None, **how: Any) -> Manifest:
        with make_pool("50MB", store="auto") as pool:
            for name, value in (small_ones() if values is None else values).items():
                pool[name] = value
            pool.save(target, **how)
        return manifest(target)

    return save


def small_ones(count: int = COUNT) -> dict[Any, Any]:
    return {number: small(number) for number in range(count)}


def manifest(target: Path) -> Manifest:
    return directory_at(target).versions.read(versions_on(target)[-1])


def rows(manifest: Manifest) -> dict[Any, tuple[UUID, Blob]]:
    return dict(zip(manifest.names, zip(manifest.keys, manifest.blobs, strict=True), strict=True))


def pack_of(target: Path, blob: Blob) -> Path:
    assert blob.pack is not None, "it is not packed"
    return blob_of(target, blob.pack.key)


@pytest.fixture(params=STORES)
def into(request: pytest.FixtureRequest, make_pool: MakePool) -> Callable[..., FBPool]:
    """A pool with a store of each kind."""
    if request.param == "diskcache":
        pytest.importorskip("diskcache")

    def make(memory: Any = "50MB", **options: Any) -> FBPool:
        if request.param == "memory":
            return make_pool(memory, store=MemoryStore(), **options)
        return make_pool(memory, store=request.param, **options)

    return make


def check(pool: FBPool, count: int = COUNT) -> None:
    assert sorted(pool.keys()) == list(range(count))
    assert all(same(pool[number], number) for number in range(count))
    pool.validate()


# ------------------------------------------------------------------------------ what comes back


def test_packed_values_come_back_with_their_keys_and_leave_no_loan(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool]
) -> None:
    there = rows(saved())
    pool = into()
    pool.restore(target)
    assert sessions_in(target) == [] and directory_at(target).loans.keys() == set()
    assert pool.stats().loads == 0 and all(entry_of(pool, n).state is State.SPILLED for n in pool)
    assert all(entry_of(pool, name).token.key == key for name, (key, _) in there.items())
    check(pool)
    for path in target.glob("??/*"):  # they are the pool's own by now
        path.unlink()
    pool.evict()
    check(pool)
    with pool.get_mut(3) as value:
        value["n"] = 99
    assert pool[3]["n"] == 99
    nothing_is_left(pool)


def test_many_packs_and_batches(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MOST_RECORDS", 100_000)
    names = list(range(1500))
    Random(1).shuffle(names)
    found = saved({name: {"n": name, "rest": [name] * (name % 300)} for name in names})
    assert len({blob.pack for blob in found.blobs}) > 3
    pool = into()
    pool.restore(target)
    assert all(pool[name] == {"n": name, "rest": [name] * (name % 300)} for name in names)
    nothing_is_left(pool)


def test_some_names_of_a_checkpoint_with_large_values_beside(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool]
) -> None:
    there = rows(saved({**small_ones(), "large": large(1)}))
    assert there["large"][1].pack is None
    pool = into()
    pool.restore(target, [7, "large", 9])
    assert set(pool.keys()) == {7, "large", 9}
    assert same(pool[7], 7) and same(pool[9], 9) and (pool["large"] == large(1)).all()
    nothing_is_left(pool)
    assert sessions_in(target) == []


def test_what_the_pool_knows_is_shared_and_not_copied(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool]
) -> None:
    saved()
    pool = into()
    pool.restore(target)
    used = pool.stats().disk_bytes
    tokens = {name: entry_of(pool, name).token for name in pool}
    handles = [pool.register(target, tokens[n].key) for n in range(5)]
    pool.restore(target, replace=True)
    assert pool.stats().disk_bytes == used
    assert all(entry_of(pool, name).token is token for name, token in tokens.items())
    with pool.get_mut(2) as value:
        value["n"] = 99
    with handles[2].load() as value:
        assert same(value, 2)
    for handle in handles:
        handle.drop()
    nothing_is_left(pool)


def test_two_names_of_one_content_have_one_copy(
    target: Path, make_pool: MakePool, into: Callable[..., FBPool]
) -> None:
    source = make_pool("4MB", store="auto")
    handles = [source.put(name, small(name)) for name in range(COUNT)]
    source.save(target)
    for name in range(COUNT):
        source.register(target, handles[name].key, ("again", name)).drop()
    source.save(target)
    pool = into()
    pool.restore(target)
    assert len(pool) == 2 * COUNT
    assert all(entry_of(pool, n).token is entry_of(pool, ("again", n)).token for n in range(COUNT))
    with pool.get_mut(("again", 3)) as value:
        value["n"] = 99
    assert same(pool[3], 3)
    nothing_is_left(pool)


def test_saving_what_was_restored_writes_nothing(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool], tmp_path: Path
) -> None:
    saved()
    pool = into()
    pool.restore(target)
    assert pool.save(target).blobs_written == 0
    pool.save(tmp_path / "other")
    with FBPool.from_checkpoint(tmp_path / "other", directory=tmp_path / "own", min_free=0) as other:
        check(other)


def test_a_store_that_packs_nothing_gets_files(
    target: Path, saved: Callable[..., Manifest], tmp_path: Path, _pools: _Pools
) -> None:
    saved()
    (directory := tmp_path / "none-small").mkdir()
    pool = _pools.make("4MB", {"store": AutoStore(str(directory), small=-1)})
    pool.restore(target)
    assert len(blobs_in(directory)) == COUNT
    check(pool)
    nothing_is_left(pool)
    assert blobs_in(directory) == set()


def test_pickled_values_are_refused_unless_allowed(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool]
) -> None:
    there = rows(saved({**small_ones(), "model": [complex]}, allow_pickle=True))
    key, blob = there["model"]
    assert blob.pack is not None and blob.pickled is not None
    pool = into()
    for call in (lambda: pool.restore(target), lambda: pool.register(target, key, "m")):
        with pytest.raises(PickleRefusedError):
            call()
    assert len(pool) == 0 and sessions_in(target) == []
    pool.restore(target, allow_pickle=True)
    assert pool["model"] == [complex]
    pool.delete("model")
    assert pool.register(target, key, "m", allow_pickle=True).drop() is None
    assert pool["m"] == [complex]


# ------------------------------------------------------------------------------------- by key


def test_registering_packed_keys(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool], make_pool: MakePool
) -> None:
    there = rows(saved())
    own = make_pool("1MB").put("own", small(77)).persist(target)
    pool = into()
    with TrackedDirectory(target, readonly=True) as reader:
        assert set(reader.keys()) == {own, *(key for key, _ in there.values())} and len(reader) == COUNT + 1
        pack = there[0][1].pack
        assert pack is not None
        assert there[0][0] in reader and own in reader
        assert pack.key not in reader and uuid4() not in reader
        for absent in (pack.key, uuid4()):
            with pytest.raises(KeyError):
                pool.register(reader, absent)
        fb = pool.register(reader, there[5][0], "five")
        assert fb.key == there[5][0] and same(pool["five"], 5)
        fb.drop()
        handles = pool.register_all(reader)
        assert [handle.key for handle in handles] == reader.keys()
        by_key = {handle.key: handle for handle in handles}
        for number, (key, _) in there.items():
            with by_key[key].load() as value:
                assert same(value, number)
        handles.clear()
        by_key.clear()
    assert len(sessions_in(target)) <= 1
    nothing_is_left(pool)
    gc.collect()
    assert sessions_in(target) == []


def test_a_packed_key_is_found_in_the_newest_checkpoint_that_has_it(
    target: Path, make_pool: MakePool, into: Callable[..., FBPool]
) -> None:
    source = make_pool("4MB", store="auto")
    handles = [source.put(name, small(name)) for name in range(COUNT)]
    keys = [handle.key for handle in handles]
    source.save(target, keep=None)
    for name in range(30):
        source[name] = small(100)
    source.save(target, keep=None)
    pool = into()
    for name, key in enumerate(keys):
        pool.register(target, key, name).drop()
    check(pool)


def test_a_writer_finds_a_packed_key_without_reading_checkpoints(
    target: Path, saved: Callable[..., Manifest], make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = rows(saved())[5][0]
    pool = make_pool("4MB", store="auto")
    with TrackedDirectory(target) as tracked:
        with monkeypatch.context() as patch:
            patch.setattr(type(tracked._directory.versions), "read", None)
            pool.register(tracked, key, 5).drop()
    assert same(pool[5], 5)


def test_what_a_former_writer_knows_may_be_outdated(
    target: Path, saved: Callable[..., Manifest], make_pool: MakePool
) -> None:
    source = make_pool("4MB", store="auto")
    for number in range(COUNT):
        source[number] = small(number)
    directory = directory_at(target)
    source.save(target)
    key, blob = rows(manifest(target))[5]
    code = (
        "import sys, fbcache\n"
        "with fbcache.FBPool.from_checkpoint(sys.argv[1], min_free=0) as pool:\n"
        "    for n in range(100): pool['more', n] = {'text': str(n) * 100}\n"
        "    pool.save(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, timeout=60)
    assert directory.known(key) == blob and not pack_of(target, blob).exists()
    pool = make_pool("4MB", store="auto")
    pool.register(target, key, 5).drop()
    assert same(pool[5], 5)


def test_a_writer_and_a_reader_see_the_same_keys(target: Path, saved: Callable[..., Manifest]) -> None:
    found = saved({**small_ones(), "large": large(1)})
    stray = uuid4()  # a pack that a save has left
    path = blob_of(target, stray)
    path.parent.mkdir(exist_ok=True)
    packed = next(blob for blob in found.blobs if blob.pack is not None)
    path.write_bytes(under_another_key(pack_of(target, packed), stray))
    with TrackedDirectory(target, readonly=True) as reader:
        assert set(reader) == set(found.keys) and stray not in reader
    with TrackedDirectory(target) as writer, TrackedDirectory(target, readonly=True) as reader:
        assert set(writer) == set(reader) == set(found.keys)
        assert all(key in writer and key in reader for key in found.keys)
        path = pack_of(target, packed)
        assert writer.verify().ok and reader.verify().checked == 3
    path.unlink()
    with TrackedDirectory(target, readonly=True) as reader:
        assert set(reader) == {rows(found)["large"][0]}


def under_another_key(path: Path, key: UUID) -> bytes:
    """What is in a blob's file, as the blob of ``key``."""
    raw = path.read_bytes()
    header = unpack_header(raw, path=str(path), file_size=len(raw), key=UUID(path.name))
    buffers = [raw[span.offset : span.offset + span.length] for span in header.spans]
    return b"".join(pack(key, Frames(header.codec, header.tree, buffers)).pieces)


# ------------------------------------------------------------------------------------- damage


def test_a_damaged_record_shows_at_its_load_and_keeps_no_other(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool], tmp_path: Path
) -> None:
    there = rows(saved())
    for name in (3, 17):
        blob = there[name][1]
        flip(pack_of(target, blob), blob.offset + blob.disk_bytes - 1)
    pool = into()
    pool.restore(target)
    for name, number in itertools.product((3, 17), range(2)):
        with pytest.raises(CorruptBlobError) as caught:
            pool[name] if number else pool.get_mut(name).__enter__()
        assert caught.value.key == there[name][0]
        assert caught.value.path == str(pack_of(target, there[name][1]))
    assert all(same(pool[name], name) for name in range(COUNT) if name not in (3, 17))
    pool.validate()
    with pytest.raises(CorruptBlobError) as caught:
        pool.save(tmp_path / "other")
    assert caught.value.key in (there[3][0], there[17][0])
    pool[3], pool[17] = small(3), small(17)
    pool.save(tmp_path / "other")
    check(pool)
    nothing_is_left(pool)
    assert sessions_in(target) == []


@pytest.mark.parametrize("how", ["gone", "short", "empty", "another", "a directory", "header"])
def test_a_damaged_pack_keeps_nothing_from_being_restored(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool], how: str
) -> None:
    there = rows(saved({**small_ones(), "large": large(1)}))
    path = pack_of(target, there[0][1])
    raw = path.read_bytes()
    path.unlink()
    if how == "short":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another":
        path.write_bytes(Random(1).randbytes(len(raw)))
    elif how == "a directory":
        path.mkdir()
    elif how == "header":
        path.write_bytes(bytes(40) + raw[40:])
    pool = into()
    pool.restore(target)
    lost = 0
    for name in range(COUNT):
        try:
            assert same(pool[name], name)
        except CorruptBlobError as error:
            assert error.key == there[name][0] and error.path == str(path)
            lost += 1
    assert lost == {"header": 0}.get(how, lost) and (how in ("header", "short") or lost == COUNT)
    assert (pool["large"] == large(1)).all()
    nothing_is_left(pool)
    assert sessions_in(target) == []


def test_a_disk_that_fails_while_packs_are_read_changes_nothing(
    target: Path, saved: Callable[..., Manifest], make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved()

    def fail(*_: Any) -> Iterator[Any]:
        raise StorageError("it does not answer", path=str(target))
        yield

    pool = make_pool("4MB", store="auto")
    monkeypatch.setattr(copying, "read_records", fail)
    with pytest.raises(StorageError, match="does not answer"):
        pool.restore(target)
    assert len(pool) == 0 and sessions_in(target) == []
    nothing_is_left(pool)
    monkeypatch.undo()
    pool.restore(target)
    check(pool)


# ----------------------------------------------------------------------------- without room


@pytest.fixture
def make_gated(_pools: _Pools, tmp_path: Path) -> Callable[..., tuple[FBPool, GatedDisk]]:
    """A pool with one I/O thread, and its disk."""

    def make(kind: Any, **options: Any) -> tuple[FBPool, GatedDisk]:
        disk = GatedDisk()
        (directory := tmp_path / f"gated-{kind.__name__}").mkdir(exist_ok=True)
        store = kind(str(directory), disk=disk)
        return _pools.make("4MB", {"io_threads": 1, **options, "store": store}, disk), disk

    return make


@pytest.mark.parametrize(
    ("kind", "call"),
    [(AutoStore, "pwrite"), (PackedStore, "pwrite"), (FileStore, "writev"), (FileStore, "rename")],
)
def test_a_full_disk_at_each_write_changes_nothing(
    target: Path, saved: Callable[..., Manifest], make_gated: Any, kind: Any, call: str
) -> None:
    saved({name: {"n": name} for name in range(600)})
    pool, disk = make_gated(kind)
    pool["mine"] = 1
    failures = 0
    for nth in range(1, 1000, 1 if call == "pwrite" else 197):
        disk.fail(call, error=oserror(28), nth=nth)
        try:
            pool.restore(target)
        except DiskFullError:
            failures += 1
            disk.clear()
            assert pool.keys() == ["mine"] and sessions_in(target) == []
            pool.drain()
            assert pool.stats().disk_bytes == 0 and pool.stats().entries == 1
            assert pool._engine.residency.known == {}
            continue
        break
    disk.clear()
    assert failures >= 3
    assert all(pool[name] == {"n": name} for name in range(600)) and pool["mine"] == 1
    nothing_is_left(pool)


def test_a_pool_that_is_closed_meanwhile_says_so(
    target: Path, saved: Callable[..., Manifest], make_gated: Any, spawn: Spawn
) -> None:
    saved()
    pool, disk = make_gated(AutoStore)
    gate = disk.gate("pwrite")
    restoring = spawn(pool.restore, target)
    gate.wait_reached()
    closing = spawn(pool.close)
    gate.open()
    closing.result()
    assert isinstance(restoring.error(), PoolClosedError)
    assert sessions_in(target) == []


# --------------------------------------------------------------------- protection while copying


def test_what_is_being_copied_stays_whoever_saves_or_sweeps(
    target: Path, saved: Callable[..., Manifest], make_gated: Any, spawn: Spawn
) -> None:
    path = pack_of(target, saved().blobs[0])
    for sweep in (
        lambda: saved({"other": 1}),  # in this process, which knows its loans
        lambda: in_another_process(target),
    ):
        pool, disk = make_gated(AutoStore)
        gate = disk.gate("pwrite")
        restoring = spawn(pool.restore, target)
        gate.wait_reached()
        (session,) = sessions_in(target)
        assert list(session.glob("*.manifest"))
        sweep()
        assert path.exists(), "a pack was taken away from a reader"
        gate.open()
        restoring.result()
        check(pool)
        pool.close()
        saved()
        with TrackedDirectory(target) as tracked:
            tracked.gc()
        assert not path.exists() and sessions_in(target) == []
        path = pack_of(target, manifest(target).blobs[0])


def in_another_process(target: Path) -> None:
    code = (
        "import sys, fbcache\n"
        "with fbcache.FBPool('1MB', min_free=0) as pool:\n"
        "    pool['other'] = 1\n"
        "    pool.save(sys.argv[1])\n"
        "with fbcache.TrackedDirectory(sys.argv[1]) as tracked:\n"
        "    tracked.gc()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, timeout=60)


def test_registering_a_packed_key_holds_its_pack(
    target: Path, saved: Callable[..., Manifest], make_gated: Any, spawn: Spawn
) -> None:
    key, _ = rows(saved())[4]
    pool, disk = make_gated(AutoStore)
    gate = disk.gate("pwrite")
    registering = spawn(pool.register, target, key, 4)
    gate.wait_reached()
    saved({"other": 1})
    gate.open()
    registering.result().drop()
    assert same(pool[4], 4) and sessions_in(target) == []


# --------------------------------------------------------------------------- two at once


class GatedStore(MemoryStore):
    """Stops, or fails, where a test says so; by the number of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[tuple[str, int], Gate] = {}
        self.failures: set[int] = set()
        self.writes = self.deletions = 0

    def write(self, key: UUID, frames: Any) -> int:
        self.writes += 1
        number = self.writes
        if gate := self.gates.get(("write", number)):
            gate.pass_through()
        if number in self.failures:
            raise DiskFullError("full", path=self.path, needed=1, free=0)
        written = super().write(key, frames)
        if gate := self.gates.get(("written", number)):
            gate.pass_through()
        return written

    def delete(self, key: UUID) -> None:
        self.deletions += 1
        if gate := self.gates.get(("delete", self.deletions)):
            gate.pass_through()
        super().delete(key)

    def gate(self, call: str, nth: int) -> Gate:
        return self.gates.setdefault((call, nth), Gate())


@pytest.fixture
def one_more(target: Path, make_pool: MakePool) -> list[UUID]:
    """Two versions of one content, by the names "a" and "b", each with another large value."""
    source = make_pool("4MB")
    source["a"] = large(1)
    source["x"] = large(2)
    source.save(target, keep=None)
    source.register(target, manifest(target).keys[0], "b").drop()
    source["y"] = large(3)
    source.save(target, ["b", "y"], keep=None)
    return list(manifest(target).keys)


def test_a_restore_that_fails_takes_no_copy_of_another_away(
    target: Path, one_more: list[UUID], make_pool: MakePool, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both restore one key into a store without files; the first cannot have the other of its keys.

    Without the claim the second would have its copy made, and no entry of it, when the first takes its own
    copy back.
    """
    store = GatedStore()
    pool = make_pool("4MB", store=store, io_threads=3)
    residency = pool._engine.residency
    real = residency.reserve
    gate, copied = store.gate("write", 2), store.gate("write", 4)
    store.failures.add(2)

    def reserve(*args: Any, **options: Any) -> Any:
        step = real(*args, **options)
        if isinstance(step, Waiter):
            copied.reached.set()  # it waits for the first: then that is what there is to see
        return step

    first = spawn(pool.restore, target, version=1)
    gate.wait_reached()  # the common key may be copied, and is nobody's entry yet
    monkeypatch.setattr(residency, "reserve", reserve)
    second = spawn(pool.restore, target, version=2)
    copied.wait_reached()
    gate.open()
    assert isinstance(first.error(), DiskFullError)
    copied.open()
    second.result()
    pool.drain()
    assert pool.keys() == ["b", "y"] and (pool["y"] == large(3)).all()
    assert (pool["b"] == large(1)).all(), "its copy was taken away"
    assert len(store.blobs) == 2
    nothing_is_left(pool)
    assert store.blobs == {}


def test_a_restore_that_fails_leaves_what_it_shares(
    target: Path, one_more: list[UUID], make_pool: MakePool, spawn: Spawn
) -> None:
    store = GatedStore()
    pool = make_pool("4MB", store=store, io_threads=2)
    gate = store.gate("written", 2)
    first = spawn(pool.restore, target, version=1)
    gate.wait_reached()
    store.failures.update((3, 4))
    second = spawn(pool.restore, target, version=2)
    gate.open()
    first.result()
    assert isinstance(second.error(), DiskFullError)
    pool.drain()
    assert pool.keys() == ["a", "x"] and (pool["x"] == large(2)).all() and (pool["a"] == large(1)).all()
    nothing_is_left(pool)
    assert store.blobs == {}


def test_a_deletion_that_begins_between_copying_and_adopting_takes_no_copy_away(
    target: Path, one_more: list[UUID], make_pool: MakePool, spawn: Spawn
) -> None:
    """A restore finds a key known, and the only entry that has it goes before the restore is through."""
    store = GatedStore()
    pool = make_pool("4MB", store=store, io_threads=2)
    pool.restore(target, version=1)
    gate = store.gate("write", 3)
    restoring = spawn(pool.restore, target, version=2)
    gate.wait_reached()  # it copies "y"; "b" is there
    pool.delete("a")
    pool.delete("x")
    pool.evict()
    gate.open()
    restoring.result()
    pool.drain()
    assert (pool["b"] == large(1)).all() and (pool["y"] == large(3)).all()
    nothing_is_left(pool)
    assert store.blobs == {}


def test_a_restore_waits_for_a_deletion_under_way(
    target: Path, one_more: list[UUID], make_pool: MakePool, spawn: Spawn, sleepers: Sleepers
) -> None:
    store = GatedStore()
    pool = make_pool("4MB", store=store, io_threads=2)
    pool.restore(target, ["a"], version=1)
    gate = store.gate("delete", 1)
    pool.delete("a")
    gate.wait_reached()
    restoring = spawn(pool.restore, target, version=2)
    sleepers.next()
    assert not restoring.done
    gate.open()
    restoring.result()
    assert (pool["b"] == large(1)).all()
    nothing_is_left(pool)


@pytest.mark.parametrize("kind", [AutoStore, PackedStore])
def test_restores_of_one_checkpoint_at_once_copy_it_once(
    target: Path, saved: Callable[..., Manifest], make_gated: Any, spawn: Spawn, sleepers: Sleepers, kind: Any
) -> None:
    saved()
    pool, disk = make_gated(kind)
    gate = disk.gate("pwrite")
    first = spawn(pool.restore, target)
    gate.wait_reached()
    second = spawn(pool.restore, target, replace=True)
    gate.open()
    first.result()
    second.result()
    check(pool)
    assert pool.stats().disk_bytes <= sum(blob.disk_bytes for blob in manifest(target).blobs) + 100
    nothing_is_left(pool)
    assert sessions_in(target) == []


def test_restores_registers_and_deletions_at_once(
    target: Path, saved: Callable[..., Manifest], into: Callable[..., FBPool], spawn: Spawn
) -> None:
    there = rows(saved())
    pool = into(io_threads=2)

    def churn(seed: int) -> None:
        rng = Random(seed)
        for turn in range(15):
            names = rng.sample(range(COUNT), 10)
            pool.restore(target, names, replace=True)
            fb = pool.register(target, there[names[0]][0])
            with fb.load() as value:
                assert same(value, names[0])
            fb.drop()
            for name in names[: turn % 10]:
                pool.pop(name, None)

    for thread in [spawn(churn, seed) for seed in range(3)]:
        thread.result()
    pool.restore(target, replace=True)
    pool.drain()
    pool.evict()
    check(pool)
    assert pool._engine.residency._claims == {}
    nothing_is_left(pool)
    assert sessions_in(target) == []


def test_a_claim_that_is_forgotten_gives_back_what_it_has(
    target: Path, saved: Callable[..., Manifest], make_pool: MakePool
) -> None:
    """Invariant 7: an interrupt may come before it is ended."""
    saved()
    pool = make_pool("4MB", store="auto")
    pool.restore(target)
    residency = pool._engine.residency
    token = entry_of(pool, 3).token
    claim = Claim(residency)
    token.shares += 1
    claim.tokens.append(token)
    pool.delete(3)
    pool.drain()
    assert token.shares == 1
    del claim
    pool.drain()
    assert token.shares == 0 and token.key not in residency.known


# ------------------------------------------------------------------------------- interrupts


def restore(pool: FBPool, target: Path) -> None:
    pool.restore(target, replace=True)


def register_all(pool: FBPool, target: Path) -> None:
    with TrackedDirectory(target, readonly=True) as tracked:
        pool.register_all(tracked)


def left_over(pool: FBPool, target: Path) -> list[str]:
    """What is left of entries that are gone."""
    pool.drain()
    pool.validate()
    residency = pool._engine.residency
    found = []
    if pool.stats().entries or residency.known:
        found.append("an entry, or a share of its blob")
    if pool.stats().disk_bytes:
        found.append("a copy")
    if directory_at(target).loans.keys():
        found.append("a loan")
    return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["auto", "packed", "memory"])
@pytest.mark.parametrize("act", [restore, register_all])
def test_an_interrupt_anywhere_brings_all_or_nothing_and_keeps_nothing_back(
    act: Callable[[FBPool, Path], None], kind: str, soak: bool
) -> None:
    """Invariants 1 and 7."""
    with in_memory() as memory:
        target = memory / "tracked"
        with FBPool("1MB", directory=memory / "source", min_free=0) as source:
            for name in range(20):
                source[name] = {"n": name}
            source.save(target)
        directory, nth, step = directory_at(target), 10**9, 0
        directory.loans.hold_version(1)  # begins a reader's session
        while True:
            store = MemoryStore() if kind == "memory" else kind
            with FBPool("1MB", directory=memory / "own", min_free=0, io_threads=1, store=store) as pool:
                interrupter = Interrupter(nth)
                with contextlib.suppress(KeyboardInterrupt), interrupter:
                    act(pool, target)
                where = interrupter.where
                assert len(pool) in (0, 20 if act is restore else 0), where
                act(pool, target)
                pool.restore(target, replace=True)
                assert all(pool[name] == {"n": name} for name in range(20)), where
                for name in list(pool):
                    del pool[name]
                if left_over(pool, target):
                    gc.collect()  # takes long, so that it is not done each time
                    assert left_over(pool, target) == [], where
            if not step:
                places = 10**9 - interrupter._left
                step = 1 if soak else max(places // 50, 1)
                nth = 0
            nth += step
            if nth >= places:
                break
        assert places > 1000
        session, directory.loans._session = directory.loans._session, None
        if session is not None:
            session.close()


def test_nothing_waits_for_a_restore_that_was_interrupted(
    target: Path, saved: Callable[..., Manifest], make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim is over even where the interrupt keeps it from being ended."""
    saved()
    pool = make_pool("4MB", store="auto")
    residency = pool._engine.residency
    real = type(residency).end_claim

    def interrupted(*_: Any) -> None:
        monkeypatch.setattr(type(residency), "end_claim", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(residency), "end_claim", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.restore(target)
    pool.restore(target, replace=True)
    check(pool)
    gc.collect()
    nothing_is_left(pool)

