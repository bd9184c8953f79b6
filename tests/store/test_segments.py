"""Segments: records stay whole, whatever fails, moves or closes meanwhile; dead space is bounded."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fbcache.codec.frames import Frames
from fbcache.errors import CorruptBlobError, DiskFullError, StorageError
from fbcache.store import mapping
from fbcache.store.protocol import StoreLimits
from fbcache.store.records import HEAD_SIZE
from fbcache.store.room import Room
from fbcache.store.segments import Segments
from tests.blobs import same
from tests.conftest import Running
from tests.faults import FaultyDisk, oserror
from tests.packing import GatedLedger, PackingDisk, at_once, blob, descriptors, record, whole

SEGMENT = 1000


class Kept:
    """Segments, and what has to be in them."""

    def __init__(
        self,
        directory: Path,
        *,
        nbytes: int = SEGMENT,
        limits: StoreLimits | None = None,
        quota: int | None = None,
    ) -> None:
        self.directory = directory
        self.disk = PackingDisk(directory, quota)
        self.ledger = GatedLedger(limits)
        self.segments = Segments(
            str(directory), Room(str(directory), self.ledger, self.disk), self.disk, nbytes=nbytes
        )
        self.blobs: dict[int, tuple[Frames, int]] = {}

    def append(self, *many: Frames) -> list[int]:
        slots, sizes = self.segments.append(many)
        assert not self.blobs.keys() & set(slots), "a slot in use was given out"
        self.blobs.update(zip(slots, zip(many, sizes, strict=True), strict=True))
        return slots

    def free(self, *slots: int) -> None:
        sizes = [self.blobs.pop(slot)[1] for slot in slots]
        self.segments.free(slots, sizes)

    def free_all(self) -> None:
        self.free(*self.blobs)

    def check(self) -> None:
        """All records are right, and every figure."""
        for number, (slot, (frames, _)) in enumerate(self.blobs.items()):
            assert same(self.segments.read(slot, writable=number % 2 == 0), frames)
        held = list(self.segments._segments.values())
        assert self.ledger.used == sum(segment.counted for segment in held)
        assert self.live == sum(segment.live for segment in held)
        assert {Path(segment.path) for segment in held} == set(self.files())

    @property
    def live(self) -> int:
        return sum(nbytes for _, nbytes in self.blobs.values())

    def files(self) -> list[Path]:
        return sorted(self.directory.iterdir())

    def file_of(self, slot: int) -> Path:
        return Path(self.segments.path_of(slot))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    """``make(**options)``: segments that are closed at the end, and leave nothing."""
    made: list[Kept] = []

    def make_one(**options: Any) -> Kept:
        directory = tmp_path / f"segments-{len(made)}"
        directory.mkdir()
        made.append(Kept(directory, **options))
        return made[-1]

    yield make_one
    for kept in made:
        kept.disk.clear()
        kept.segments.close()
        assert kept.files() == [], "files are left"
        assert descriptors(kept.directory) == 0, "descriptors are left"


@pytest.fixture
def kept(make: Any) -> Kept:
    found: Kept = make()
    return found


@pytest.fixture(params=["mapped", "unmapped"])
def mapped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "unmapped":
        monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)
    return bool(request.param == "mapped")


# ------------------------------------------------------------------ against a dictionary


class SegmentsMachine(RuleBasedStateMachine):
    """Steps that may fail, against a dictionary of what is to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept(Path(tempfile.mkdtemp(prefix="fbcache-segments-")), nbytes=400)
        self.largest = 400
        self.seed = 0

    def teardown(self) -> None:
        self.kept.disk.clear()
        try:
            self.kept.check()
            self.kept.free_all()
            assert self.kept.files() == [] and self.kept.ledger.used == 0
            self.kept.segments.close()
        finally:
            left = self.kept.files()
            shutil.rmtree(self.kept.directory)
        assert not left

    def some(self, sizes: list[int]) -> list[Frames]:
        self.seed += 1
        return [whole(self.seed, size) if size % 5 == 0 else blob(size, self.seed + size) for size in sizes]

    @rule(sizes=st.lists(st.integers(0, 120), min_size=1, max_size=5))
    def append(self, sizes: list[int]) -> None:
        before = self.kept.ledger.used
        slots = self.kept.append(*self.some(sizes))
        taken = sum(self.kept.blobs[slot][1] for slot in slots)
        self.largest = max(self.largest, taken)
        assert self.kept.ledger.used <= before + taken  # less, where there was no room at first

    @rule(nbytes=st.integers(300, 900))
    def append_a_large_one(self, nbytes: int) -> None:
        self.append([nbytes])

    @rule(
        sizes=st.lists(st.integers(0, 120), min_size=1, max_size=3),
        call=st.sampled_from(["pwrite", "open", "free_bytes", "mmap"]),
        code=st.sampled_from([errno.ENOSPC, errno.EIO]),
        most=st.none() | st.integers(1, 100),
    )
    def fail_to_append(self, sizes: list[int], call: str, code: int, most: int | None) -> None:
        kept = self.kept
        kept.disk.most = most
        kept.disk.fail(call, error=oserror(code), nth=2 if most is not None and call == "pwrite" else 1)
        used = kept.ledger.used
        try:
            self.append(sizes)
        except StorageError:
            assert kept.ledger.used == used
        finally:
            kept.disk.most = None
            kept.disk.clear()

    @rule(pick=st.integers(0, 1 << 16), count=st.integers(1, 8))
    def free(self, pick: int, count: int) -> None:
        slots = list(self.kept.blobs)
        start = pick % len(slots) if slots else 0
        self.kept.free(*slots[start : start + count])

    @rule(pick=st.integers(0, 1 << 16), call=st.sampled_from(["pwrite", "open", "free_bytes", "preadv"]))
    def free_while_nothing_can_be_moved(self, pick: int, call: str) -> None:
        self.kept.disk.fail(call, error=oserror(errno.ENOSPC), times=None)
        try:
            self.free(pick, 5)
        finally:
            self.kept.disk.clear()
        self.kept.free()  # what could not be compacted then is now

    @rule()
    def free_all(self) -> None:
        self.kept.free_all()
        assert self.kept.ledger.used == 0 and self.kept.files() == []

    @rule()
    def compact(self) -> None:
        self.kept.segments.make_room()

    @invariant()
    def everything_is_there(self) -> None:
        self.kept.check()

    @invariant()
    def dead_space_is_bounded(self) -> None:
        assert self.kept.ledger.used <= 2 * self.kept.live + 2 * self.largest

    @invariant()
    def few_descriptors_are_open(self) -> None:
        assert descriptors(self.kept.directory) <= 1


class UnmappedMachine(SegmentsMachine):
    pass


@pytest.mark.parametrize("machine", [SegmentsMachine, UnmappedMachine])
def test_segments_do_what_a_dictionary_does(
    machine: type[SegmentsMachine], soak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine is UnmappedMachine:
        monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=3000 if soak else 100,
            stateful_step_count=60 if soak else 40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=not soak,
            database=None,
        ),
    )


# ------------------------------------------------------------------ slots


def test_slots_are_used_again_and_no_other(kept: Kept) -> None:
    first = kept.append(blob(10, 1), blob(20, 2), blob(30, 3))
    assert sorted(first) == [0, 1, 2]
    kept.free(1)
    assert kept.append(blob(40, 4), blob(50, 5)) == [1, 3]
    kept.check()


def test_appending_nothing_takes_no_slots(kept: Kept) -> None:
    kept.append(blob(10), blob(20))
    kept.free_all()
    assert kept.segments.append([]) == ([], [])
    assert sorted(kept.append(blob(1), blob(2), blob(3))) == [0, 1, 2]


def test_a_slot_that_was_freed_leads_nowhere(kept: Kept) -> None:
    (slot, other) = kept.append(blob(10), blob(20))
    kept.free(slot)
    with pytest.raises(CorruptBlobError):
        kept.segments.read(slot, writable=False)
    kept.check()
    assert kept.segments.path_of(77) == str(kept.directory)
    assert kept.file_of(other).is_file()


def test_the_slots_of_a_failed_append_are_used_again(kept: Kept) -> None:
    for _ in range(5):
        kept.disk.fail("pwrite", error=oserror(errno.EIO))
        with pytest.raises(StorageError):
            kept.append(blob(10), blob(20))
    assert sorted(kept.append(blob(1), blob(2))) == [0, 1]


# ------------------------------------------------------------------ writes that fail


def failure_of(call: Any, *args: Any) -> type[BaseException] | None:
    """What it raised; not the error itself, whose frames keep segments mapped."""
    try:
        call(*args)
    except StorageError as error:
        return type(error)
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failed_append_leaves_nothing(kept: Kept, code: int, nth: int) -> None:
    kept.append(blob(100))
    kept.disk.most = 50
    kept.disk.fail("pwrite", error=oserror(code), nth=nth)
    with pytest.raises(DiskFullError if code == errno.ENOSPC else StorageError) as caught:
        kept.append(blob(100, 1), blob(30, 2))
    assert caught.value.errno == code and caught.value.needed == record(100) + record(30)
    kept.check()
    kept.append(blob(100, 3))
    kept.check()
    assert len(kept.files()) == 1 and kept.ledger.used == 2 * record(100)


def test_short_writes_go_on(kept: Kept) -> None:
    kept.disk.most = 7
    kept.append(blob(100), whole(1), blob(0))
    kept.disk.most = None
    kept.check()


def test_a_disk_that_takes_nothing_is_an_error(kept: Kept) -> None:
    kept.append(blob(10))
    kept.disk.most = 0
    with pytest.raises(StorageError):
        kept.append(blob(10))
    kept.disk.most = None
    kept.check()


def test_a_failed_append_between_two_others_is_skipped_by_compaction(
    kept: Kept, spawn: Any, mapped: bool
) -> None:
    (first,) = kept.append(blob(100, 1))
    gate = kept.disk.gate("pwrite")
    kept.disk.fail("pwrite", error=oserror(errno.EIO))
    running = spawn(failure_of, kept.segments.append, [blob(300, 99)])
    gate.wait_reached()
    (last,) = kept.append(blob(100, 2))
    gate.open()
    assert running.result() is StorageError
    assert kept.file_of(first) == kept.file_of(last)
    kept.check()
    assert kept.segments.make_room()
    kept.check()
    assert kept.ledger.used == kept.live and len(kept.files()) == 1


@pytest.mark.parametrize("call", ["open", "pwrite", "mmap", "free_bytes"])
def test_a_segment_that_cannot_be_made_leaves_no_file(kept: Kept, call: str) -> None:
    kept.disk.fail(call, error=oserror(errno.EACCES))
    with pytest.raises(StorageError):
        kept.append(blob(10))
    assert kept.files() == [] and descriptors(kept.directory) == 0 and kept.ledger.used == 0
    kept.append(blob(10))
    kept.check()


def test_two_that_make_a_segment_at_once_leave_one(kept: Kept, spawn: Any) -> None:
    gates = [kept.disk.gate("open", nth=n) for n in (1, 2)]
    running = [spawn(kept.segments.append, [blob(10, n)]) for n in (1, 2)]
    for gate in gates:
        gate.wait_reached()
    for gate in gates:
        gate.open()
    slots = [each.result()[0][0] for each in running]
    assert len(kept.files()) == 1 and descriptors(kept.directory) == 1
    assert {len(kept.segments.read(slot, writable=False).tree) for slot in slots} == {10}


def test_what_is_too_large_for_a_record_is_refused(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbcache.store.records._LONGEST", 100)
    kept.append(blob(100))
    with pytest.raises(StorageError, match="more than a record can hold") as info:
        kept.append(blob(5), blob(101))
    assert info.value.errno == errno.EMSGSIZE
    kept.check()


# ------------------------------------------------------------------ space


def test_a_dead_segment_goes_although_others_live(kept: Kept) -> None:
    """One that is still appended to, too, whatever its size."""
    (kept_one,) = kept.append(blob(900, 1))
    (large,) = kept.append(blob(5000, 2))
    kept.free(large)
    kept.check()
    assert kept.ledger.used == record(900) and kept.files() == [kept.file_of(kept_one)]


def test_when_nothing_is_needed_nothing_is_left(kept: Kept) -> None:
    for seed in range(30):
        kept.append(blob(100, seed), blob(150, seed))
    kept.free_all()
    assert kept.files() == [] and kept.ledger.used == 0 and descriptors(kept.directory) == 0
    kept.append(blob(1))
    kept.check()


def test_segments_that_are_full_keep_no_descriptor(kept: Kept, mapped: bool) -> None:
    """Thousands of them must not meet the limit of descriptors."""
    for seed in range(40):
        kept.append(blob(900, seed))
    assert len(kept.files()) == 40
    assert descriptors(kept.directory) <= 1
    kept.check()
    for slot in list(kept.blobs)[::2]:
        kept.free(slot)
    kept.check()


def test_a_limit_is_kept_and_dead_space_is_room(make: Any) -> None:
    """A full store compacts, and goes on."""
    kept = make(limits=StoreLimits(max_disk=10 * SEGMENT))
    rng = Random(1)
    refused = 0
    for seed in range(600):
        try:
            kept.append(blob(rng.randrange(200), seed), blob(rng.randrange(200), -seed))
        except DiskFullError as error:
            assert error.free is not None and error.free < 500 + SEGMENT
            assert kept.live > 5 * SEGMENT, "it is half empty, and refuses"
            refused += 1
            kept.free(*rng.sample(sorted(kept.blobs), len(kept.blobs) // 4))
        assert kept.ledger.used <= 10 * SEGMENT
    kept.check()
    assert refused > 5


def test_a_full_disk_compacts_and_goes_on(make: Any) -> None:
    """With ENOSPC from the disk itself, and nothing besides."""
    kept = make(nbytes=64 << 10, quota=1 << 20)
    rng = Random(2)
    refused = 0
    for seed in range(600):
        try:
            kept.append(*(blob(rng.randrange(3000), seed + n) for n in range(4)))
        except DiskFullError:
            refused += 1
            kept.free(*rng.sample(sorted(kept.blobs), len(kept.blobs) // 4))
        if seed % 20 == 0:
            kept.check()
    kept.check()
    assert refused > 3
    kept.free_all()
    assert kept.files() == []


def test_a_small_disk_takes_small_blobs(make: Any) -> None:
    """The room kept for compaction is what there is to compact, not a whole segment."""
    kept = make(nbytes=1 << 20, quota=1 << 19)
    for seed in range(20):
        kept.append(blob(1000, seed))
    kept.check()


@pytest.mark.parametrize("limit", ["max_disk", "min_free"])
def test_appenders_at_once_stay_within_the_limits(make: Any, limit: str) -> None:
    quota = 1 << 22
    if limit == "max_disk":
        kept = make(limits=StoreLimits(max_disk=20_000))
    else:
        kept = make(limits=StoreLimits(min_free=quota - 200_000), quota=quota)
    most = 20_000 if limit == "max_disk" else 200_000
    seen: list[int] = []
    refused: list[int] = []

    def work(seed: int) -> None:
        rng = Random(seed)
        mine: dict[int, tuple[Frames, int]] = {}
        for turn in range(60):
            many = [blob(rng.randrange(300), 1000 * seed + turn + n) for n in range(rng.randrange(1, 6))]
            try:
                slots, sizes = kept.segments.append(many)
            except DiskFullError:
                refused.append(seed)
                gone = rng.sample(sorted(mine), len(mine) // 2)
                kept.segments.free(gone, [mine.pop(slot)[1] for slot in gone])
            else:
                mine.update(zip(slots, zip(many, sizes, strict=True), strict=True))
            seen.append(kept.ledger.used)
            for slot in rng.sample(sorted(mine), min(len(mine), 3)):
                assert same(kept.segments.read(slot, writable=False), mine[slot][0])
        for slot, (frames, nbytes) in mine.items():
            assert same(kept.segments.read(slot, writable=True), frames)
            kept.segments.free([slot], [nbytes])

    outcomes = at_once(*(lambda seed=seed: work(seed) for seed in range(6)))
    assert outcomes == [None] * 6, outcomes
    assert max(seen) <= most and refused
    kept.segments.free([], [])
    assert kept.ledger.used == 0 and kept.files() == []


# ------------------------------------------------------------------ compaction that fails


@pytest.mark.parametrize("call", ["pwrite", "free_bytes", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_could_not_be_compacted_is_later(kept: Kept, call: str, code: int, mapped: bool) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    kept.append(blob(900, 9))
    kept.disk.fail(call, error=oserror(code), times=None)
    kept.free(*slots[:5])
    kept.disk.clear()
    kept.check()
    assert len(kept.files()) == 2
    kept.free(slots[5])
    kept.check()
    assert kept.ledger.used == kept.live


def test_what_could_never_be_compacted_goes_with_its_last_record(kept: Kept) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    kept.append(blob(900, 9))
    for nth in range(8):
        kept.disk.fail("pwrite", error=oserror(errno.ENOSPC), times=None)
        kept.free(slots[nth])
    kept.check()
    assert len(kept.files()) == 1


def test_a_segment_that_cannot_be_removed_is_when_the_store_is_closed(kept: Kept) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    kept.append(blob(900, 9))
    kept.disk.fail("unlink", error=oserror(errno.EACCES))
    with pytest.raises(StorageError, match="remove"):
        kept.free(*slots)
    kept.check()
    kept.segments.close()
    assert kept.files() == []


def test_a_close_that_fails_keeps_no_file(kept: Kept) -> None:
    """The kernel has closed the descriptor, whatever it says."""
    for seed in range(5):
        kept.append(blob(900, seed))
    kept.disk.fail("close", error=oserror(errno.EIO), times=None)
    try:
        kept.free_all()
    except StorageError:
        pass
    kept.disk.clear()
    kept.segments.close()
    assert kept.files() == []


def test_closing_removes_all_that_it_can(kept: Kept) -> None:
    for seed in range(5):
        kept.append(blob(900, seed))
    kept.disk.fail("unlink", error=oserror(errno.EACCES), nth=2)
    with pytest.raises(StorageError, match="remove"):
        kept.segments.close()
    assert len(kept.files()) == 1 and descriptors(kept.directory) == 0
    kept.disk.clear()
    kept.segments.close()
    assert kept.files() == [] and kept.ledger.used == 0


# ------------------------------------------------------------------ while others read, free and write


def test_a_reader_reads_on_while_its_segment_is_moved_and_removed(
    kept: Kept, spawn: Any, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    former = kept.file_of(slots[7])
    real = kept.segments._read_from
    moved: list[str] = []

    def move_first(*args: Any) -> Frames:
        if not moved:
            moved.append("")
            kept.free(*slots[:7])
            assert kept.file_of(slots[7]) != former and not former.exists()
        return real(*args)

    monkeypatch.setattr(kept.segments, "_read_from", move_first)
    assert same(kept.segments.read(slots[7], writable=False), blob(100, 7))
    kept.check()


def test_a_reader_looks_again_when_its_record_has_moved(
    kept: Kept, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two look-ups that it takes to find it."""
    slots = kept.append(*(blob(100, seed) for seed in range(8)))

    class Table(dict):  # type: ignore[type-arg]
        def get(self, number: int, default: Any = None) -> Any:
            if self.moving:
                self.moving = False
                kept.free(*slots[:7])
            return super().get(number, default)

        moving = True

    kept.segments._segments = table = Table(kept.segments._segments)
    assert same(kept.segments.read(slots[7], writable=False), blob(100, 7))
    assert not table.moving
    kept.check()


def test_an_unmapped_record_that_moves_while_it_is_opened_is_read(
    kept: Kept, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    gate = kept.disk.gate("open")
    reader = spawn(kept.segments.read, slots[7], writable=True)
    gate.wait_reached()
    kept.free(*slots[:7])
    gate.open()
    assert same(reader.result(), blob(100, 7))
    kept.check()


def test_an_unmapped_record_is_read_after_its_file_is_gone(
    kept: Kept, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    gate = kept.disk.gate("preadv")
    reader = spawn(kept.segments.read, slots[7], writable=True)
    gate.wait_reached()
    kept.free(*slots[:7])
    gate.open()
    assert same(reader.result(), blob(100, 7))


def compacting(kept: Kept, spawn: Any, slots: list[int], *, at: str = "pwrite") -> tuple[Any, Running]:
    """Free so that a segment is compacted, in a thread that stands before it writes."""
    kept.append(blob(900, 50))
    gate = kept.disk.gate("pwrite") if at == "pwrite" else kept.ledger.gate()
    sizes = [kept.blobs.pop(slot)[1] for slot in slots]
    running = spawn(failure_of, kept.segments.free, slots, sizes)
    gate.wait_reached()
    return gate, running


@pytest.mark.parametrize("at", ["pwrite", "counted"])
def test_what_is_freed_while_it_is_moved_is_free(kept: Kept, spawn: Any, at: str, mapped: bool) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    gate, running = compacting(kept, spawn, slots[:5], at=at)
    kept.free(slots[5], slots[6])
    (again, *_) = kept.append(blob(33, 60), blob(44, 61))
    assert again in slots, "the slot was not used again"
    gate.open()
    assert running.result() is None
    kept.check()
    kept.free_all()
    assert kept.ledger.used == 0 and kept.files() == []


def test_all_that_is_moved_may_be_freed_meanwhile(kept: Kept, spawn: Any) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    gate, running = compacting(kept, spawn, slots[:5])
    kept.free_all()
    gate.open()
    assert running.result() is None
    kept.free()
    assert kept.ledger.used == 0 and kept.files() == []


def test_appends_and_reads_go_on_during_compaction(kept: Kept, spawn: Any) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    gate, running = compacting(kept, spawn, slots[:5])
    kept.append(blob(50, 70))
    for slot, (frames, _) in kept.blobs.items():
        assert same(kept.segments.read(slot, writable=False), frames)
    gate.open()
    assert running.result() is None
    kept.check()


def test_threads_append_read_and_free_at_once(kept: Kept, mapped: bool) -> None:
    (common,) = kept.append(blob(80, -1))

    def work(seed: int) -> None:
        rng = Random(seed)
        mine: dict[int, tuple[Frames, int]] = {}
        for turn in range(300):
            if mine and rng.random() < 0.5:
                gone = rng.sample(sorted(mine), rng.randrange(1, len(mine) + 1))
                kept.segments.free(gone, [mine.pop(slot)[1] for slot in gone])
            else:
                many = [blob(rng.randrange(200), 10_000 * seed + 10 * turn + n) for n in range(3)]
                slots, sizes = kept.segments.append(many)
                mine.update(zip(slots, zip(many, sizes, strict=True), strict=True))
            for slot in rng.sample(sorted(mine), min(len(mine), 4)):
                assert same(kept.segments.read(slot, writable=turn % 2 == 0), mine[slot][0])
            assert same(kept.segments.read(common, writable=False), blob(80, -1))
        kept.segments.free(list(mine), [nbytes for _, nbytes in mine.values()])

    outcomes = at_once(*(lambda seed=seed: work(seed) for seed in range(6)))
    assert outcomes == [None] * 6, outcomes
    kept.free_all()
    assert kept.ledger.used == 0 and kept.files() == []


# ------------------------------------------------------------------ the end


@pytest.mark.parametrize("at", ["pwrite", "counted"])
def test_closing_during_a_write_fails_it_and_leaves_nothing(kept: Kept, spawn: Any, at: str) -> None:
    """The descriptor is not closed under the writer, and is closed in the end."""
    kept.append(blob(10))
    gate = kept.disk.gate("pwrite") if at == "pwrite" else kept.ledger.gate()
    running = spawn(failure_of, kept.segments.append, [blob(100)])
    gate.wait_reached()
    kept.ledger.close()
    kept.segments.close()
    assert descriptors(kept.directory) == 1, "it was closed under the writer"
    gate.open()
    assert running.result() is StorageError
    assert kept.files() == [] and descriptors(kept.directory) == 0


@pytest.mark.parametrize("at", ["pwrite", "counted"])
def test_closing_during_compaction_leaves_nothing(kept: Kept, spawn: Any, at: str, mapped: bool) -> None:
    slots = kept.append(*(blob(100, seed) for seed in range(8)))
    gate, running = compacting(kept, spawn, slots[:5], at=at)
    kept.ledger.close()
    kept.segments.close()
    innocent = kept.directory.parent / "innocent"
    innocent.touch()
    with open(innocent, "rb") as one, open(innocent, "rb") as two:
        gate.open()
        assert running.result() is None
        for file in (one, two):
            assert file.read() == b""  # theirs were not closed for ours, a second time
    assert kept.files() == [] and descriptors(kept.directory) == 0


def test_closing_while_a_segment_is_made_leaves_nothing(kept: Kept, spawn: Any) -> None:
    gate = kept.disk.gate("open")
    running = spawn(failure_of, kept.segments.append, [blob(100)])
    gate.wait_reached()
    kept.ledger.close()
    kept.segments.close()
    gate.open()
    assert running.result() is StorageError
    assert kept.files() == [] and descriptors(kept.directory) == 0


def test_a_closed_store_takes_nothing_and_may_be_closed_again(kept: Kept) -> None:
    (slot,) = kept.append(blob(10))
    kept.ledger.close()
    kept.segments.close()
    kept.segments.close()
    assert kept.ledger.used == 0
    with pytest.raises(StorageError, match="closed"):
        kept.segments.append([blob(10)])
    with pytest.raises(CorruptBlobError):
        kept.segments.read(slot, writable=False)
    kept.segments.free([slot], [record(10)])
    assert kept.files() == []


def test_threads_that_meet_a_close_leave_nothing(make: Any) -> None:
    for _ in range(20):
        kept = make()
        for seed in range(10):
            kept.append(blob(300, seed))

        def work(kept: Kept = kept) -> None:
            for seed in range(50):
                slots, sizes = kept.segments.append([blob(300, seed), blob(200, seed)])
                kept.segments.free(slots[:1], sizes[:1])

        def close(kept: Kept = kept) -> None:
            kept.ledger.close()
            kept.segments.close()

        *outcomes, closed = at_once(work, work, work, close)
        assert closed is None
        assert all(isinstance(error, (StorageError, type(None))) for error in outcomes), outcomes
        assert kept.files() == [] and descriptors(kept.directory) == 0


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("frames", [blob(20, 1), whole(2, 8, 4)], ids=["tree", "whole"])
def test_every_byte_of_a_record_is_guarded(kept: Kept, mapped: bool, frames: Frames) -> None:
    before, slot, after = kept.append(blob(30, 3), frames, blob(40, 4))
    path = kept.file_of(slot)
    size = kept.blobs[slot][1]
    for place in range(record(30), record(30) + size):
        for bit in (0, 7):
            flip(path, place, 1 << bit)
            with pytest.raises(CorruptBlobError) as caught:
                kept.segments.read(slot, writable=False)
            assert caught.value.path == str(path)
            assert same(kept.segments.read(before, writable=False), blob(30, 3))
            assert same(kept.segments.read(after, writable=False), blob(40, 4))
            flip(path, place, 1 << bit)
    kept.check()


def flip(path: Path, place: int, bits: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bits]))


@pytest.mark.parametrize("place", range(HEAD_SIZE + 2))
def test_compaction_of_a_damaged_segment_loses_no_other_record(make: Any, place: int) -> None:
    """Whatever its head says; all records take as many bytes as one bit of a length can stand for."""
    for bit in range(8):
        compact_damaged(make(), place, bit)


def compact_damaged(kept: Kept, place: int, bit: int) -> None:
    slots = kept.append(*(blob(8, seed) for seed in range(12)))
    path = kept.file_of(slots[5])
    flip(path, 5 * record(8) + place, 1 << bit)
    kept.segments.make_room()
    kept.free(slots[0])
    kept.segments.make_room()
    for slot, (frames, _) in kept.blobs.items():
        if slot != slots[5]:
            assert same(kept.segments.read(slot, writable=False), frames)
    with pytest.raises(CorruptBlobError) as caught:
        kept.segments.read(slots[5], writable=False)
    assert caught.value.path == str(kept.file_of(slots[5]))
    kept.append(blob(50, 77))
    kept.free_all()
    assert kept.ledger.used == 0 and kept.files() == [], "the damaged segment stays"


@pytest.mark.parametrize("length", [0, 10, 300, 450])
def test_a_cut_segment_is_damaged_and_the_rest_is_read(
    kept: Kept, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)
    slots = kept.append(*(blob(76, seed) for seed in range(5)))
    path = kept.file_of(slots[0])
    with open(path, "r+b") as file:
        file.truncate(length)
    for number, slot in enumerate(slots):
        if 100 * (number + 1) <= length:
            assert same(kept.segments.read(slot, writable=False), blob(76, number))
        else:
            with pytest.raises(CorruptBlobError) as caught:
                kept.segments.read(slot, writable=False)
            assert caught.value.path == str(path)
    kept.segments.make_room()
    kept.free_all()
    assert kept.files() == []


def test_a_segment_that_is_gone_is_damaged(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)
    (slot,) = kept.append(blob(10))
    path = kept.file_of(slot)
    path.unlink()
    with pytest.raises(CorruptBlobError, match="gone") as caught:
        kept.segments.read(slot, writable=False)
    assert caught.value.path == str(path)
    kept.free_all()


def test_an_unmapped_record_that_cannot_be_read_is_an_error_of_the_storage(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping.LIVE_MAPS, "bound", 0)
    (slot,) = kept.append(blob(10))
    for call in ("open", "preadv"):
        kept.disk.fail(call, error=oserror(errno.EIO))
        with pytest.raises(StorageError, match="read") as caught:
            kept.segments.read(slot, writable=False)
        assert caught.value.path == str(kept.file_of(slot))
    kept.check()


def test_the_disk_is_used_through_its_seam_alone(kept: Kept) -> None:
    for seed in range(10):
        kept.append(blob(300, seed))
    kept.free_all()
    calls = set(kept.disk.log)
    assert calls == {"open", "pwrite", "mmap", "free_bytes", "close", "unlink"}
    assert isinstance(kept.disk, FaultyDisk)
