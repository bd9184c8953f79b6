"""Maps: read-only, without descriptors, bounded, and gone with their last view."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fbcache.codec import pages
from fbcache.store import mapping
from fbcache.store.disk import DISK
from fbcache.store.mapping import LIVE_MAPS, LiveMaps, try_map
from tests.faults import FaultyDisk, oserror

SIZES = [1, 100, mmap.PAGESIZE - 1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 1_000_003]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(max(SIZES)))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


def mapped_lines() -> int:
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_map_shows_the_file(opened: int, nbytes: int) -> None:
    view = try_map(DISK, opened, nbytes)
    assert view is not None
    assert bytes(view) == os.pread(opened, nbytes, 0)


def test_nothing_can_write_through_a_map(opened: int) -> None:
    view = try_map(DISK, opened, 100)
    assert view is not None and view.readonly
    array = np.frombuffer(view, np.uint8)
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.setflags(write=True)
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(TypeError):
        view.obj[0] = 1  # type: ignore[index]


def test_the_pages_themselves_are_read_only(opened: int) -> None:
    """Not only the Python object: a write by native code is stopped by the kernel."""
    view = try_map(DISK, opened, 100)
    assert view is not None
    address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    with open("/proc/self/maps") as file:
        line = next(line for line in file if line.startswith(f"{address:08x}-"))
    assert line.split()[1].startswith("r--") and line.rstrip().endswith("file")


def test_pages_that_are_opened_are_this_process_s_own(opened: int) -> None:
    """What libraries without read-only values write changes neither the file nor another map of it."""
    view, other = try_map(DISK, opened, 10_000), try_map(DISK, opened, 10_000)
    assert view is not None and other is not None
    before = bytes(view)
    array = np.frombuffer(view[100:], np.uint8)
    memory = pages.opened(array)
    assert memory is not None and len(memory) == array.nbytes
    memory[0] ^= 255
    assert array[0] == before[100] ^ 255 and not array.flags.writeable and view.readonly
    assert bytes(other) == os.pread(opened, 10_000, 0) == before


def test_only_our_own_maps_are_opened(opened: int) -> None:
    foreign = mmap.mmap(opened, 10_000, access=mmap.ACCESS_READ)
    assert pages.opened(np.frombuffer(foreign, np.uint8)) is None
    assert pages.opened(np.frombuffer(bytes(100), np.uint8)) is None
    assert pages.opened(np.zeros(10, np.uint8)) is None


def test_a_map_outlives_its_descriptor_and_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    descriptors = len(os.listdir("/proc/self/fd"))
    fd = os.open(path, os.O_RDONLY)
    view = try_map(DISK, fd, 7)
    os.close(fd)
    path.unlink()
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a map must hold no descriptor"
    assert view is not None and bytes(view) == b"content"


def test_the_last_view_dropped_unmaps_even_inside_a_cycle(opened: int) -> None:
    gc.collect()
    count, lines = len(LIVE_MAPS), mapped_lines()
    view = try_map(DISK, opened, 8192)
    assert view is not None
    array = np.frombuffer(view[4096:], np.uint8)
    del view
    assert len(LIVE_MAPS) == count + 1 and mapped_lines() == lines + 1
    cycle: list[object] = [array]
    cycle.append(cycle)
    del array, cycle
    gc.collect()
    assert len(LIVE_MAPS) == count and mapped_lines() == lines


def test_past_the_bound_there_is_none_until_one_is_dropped(
    opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    monkeypatch.setattr(LIVE_MAPS, "bound", len(LIVE_MAPS) + 3)
    kept = [try_map(DISK, opened, 100) for _ in range(3)]
    assert None not in kept
    assert try_map(DISK, opened, 100) is None
    kept.pop()
    assert try_map(DISK, opened, 100) is not None


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV])
def test_a_refusal_of_the_kernel_is_none(opened: int, code: int) -> None:
    disk = FaultyDisk()
    disk.fail("mmap", error=oserror(code))
    assert try_map(disk, opened, 100) is None


def test_any_other_failure_is_raised_and_not_counted(opened: int, tmp_path: Path) -> None:
    gc.collect()
    count, lines = len(LIVE_MAPS), mapped_lines()
    unreadable = os.open(tmp_path / "file", os.O_WRONLY)
    try:
        with pytest.raises(PermissionError):
            try_map(DISK, unreadable, 100)
    finally:
        os.close(unreadable)
    gc.collect()
    assert len(LIVE_MAPS) == count and mapped_lines() == lines


def test_the_bound_leaves_half_of_the_kernels_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_max_map_count", lambda: 65530)
    assert 0 < mapping.default_bound() < 65530 // 2
    monkeypatch.setattr(mapping, "_max_map_count", lambda: 10)
    assert mapping.default_bound() == 0


def test_where_maps_keep_descriptors_their_limit_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(mapping, "KEEPS_DESCRIPTOR", True)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))
    assert mapping.default_bound() == 128


def test_counting_a_death_only_appends(opened: int) -> None:
    """Invariant 7: what a finalizer does is one append; the count is taken later, by a caller."""
    live = LiveMaps(10)
    mapped = DISK.mmap(opened, 100)
    live.add(mapped)
    del mapped
    assert len(live._dead) == 1
    assert len(live) == 0 and not live._dead and not live._live


def test_thousands_of_maps_under_a_small_descriptor_limit(tmp_path: Path) -> None:
    """5,000 live maps where 256 descriptors are allowed, and all of them right."""
    program = """
import os, resource, sys
from uuid import UUID
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import numpy as np
from fbcache.codec.frames import Frames
from fbcache.store.blobfile import MAP_LEAST
from fbcache.store.files import FileStore
from fbcache.store.mapping import LIVE_MAPS
store = FileStore(sys.argv[1])
value = np.arange(MAP_LEAST // 8)
for number in range(10):
    store.write(UUID(int=number), Frames("test", b"%d" % number, [value.data.cast("B")]))
kept = [store.read(UUID(int=n % 10), writable=False, verify=False) for n in range(5000)]
assert len(LIVE_MAPS) == 5000, len(LIVE_MAPS)
assert len(os.listdir("/proc/self/fd")) < 20
assert all(frames.tree == b"%d" % (n % 10) for n, frames in enumerate(kept))
assert all(np.array_equal(np.frombuffer(kept[n].buffers[0], value.dtype), value) for n in range(0, 5000, 499))
del kept
assert len(LIVE_MAPS) == 0
store.close()
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
