"""A pool that is closed or drained while something is saved, and stores that have no files."""

from __future__ import annotations

import threading

import pytest

from fbcache import PoolClosedError, TrackedDirectory
from fbcache.checkpoint.registry import directory_at
from tests.checkpoint.cuts import MemoryStore, array
from tests.conftest import GatedDisk


@pytest.mark.files
def test_closing_the_pool_while_a_save_is_at_the_link_is_a_closed_pool(make_pool, tmp_path, spawn):
    disk = GatedDisk()
    pool = make_pool(io_threads=1)
    pool.put("x", array(1)).write_now()
    with TrackedDirectory._over(directory_at(tmp_path / "dir", disk)) as tracked:
        gate = disk.gate("link")
        saving = spawn(pool.save, tracked)
        gate.wait_reached()
        pool.close()
        gate.open()
        assert isinstance(saving.error(), PoolClosedError)


def test_a_drain_after_spawn_persist_means_that_the_write_is_done(make_pool, tmp_path, spawn, sleepers):
    pool = make_pool(io_threads=1)
    go, begun = threading.Event(), threading.Event()
    pool._engine.workers.submit(lambda: (begun.set(), go.wait(30)))
    begun.wait(30)
    fb = pool.put("x", array(1))
    future = fb.spawn_persist(tmp_path / "dir")
    draining = spawn(pool.drain)
    try:
        sleepers.next()  # it would have returned at once
        assert not draining.done
    finally:
        go.set()
        future.result(30)
        draining.result()


class GatedStore(MemoryStore):
    """Stops in ``delete``."""

    def __init__(self):
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def delete(self, key):
        self.reached.set()
        assert self.go.wait(30)
        super().delete(key)


def test_a_store_without_files_registers_while_the_deletion_of_the_key_is_under_way(
    make_pool, tmp_path, spawn, sleepers
):
    store = GatedStore()
    pool = make_pool(store=store, io_threads=1)
    store.path = str(tmp_path / "none")
    try:
        with TrackedDirectory(tmp_path / "dir") as tracked:
            fb = pool.insert(array(3))
            key = fb.persist(tracked)
            fb.drop()
            assert store.reached.wait(30)
            registering = spawn(pool.register, tracked, key)
            sleepers.next()
            store.go.set()
            again = registering.result()
            pool.evict()
            with again.load() as x:
                assert x[0] == 3
    finally:
        store.go.set()
