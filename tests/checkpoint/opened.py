"""A tracked directory as its files tell: all versions and values, by the code that a restore uses.

For tests that break something and open what is left. Values come back as :class:`Value`, which is
equal only to the same type, shape and bytes.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from fbcache import CorruptBlobError, FBPool, MsgpackCodec
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob, Manifest
from fbcache.checkpoint.packs import read_records
from fbcache.checkpoint.restoring import hold
from fbcache.checkpoint.tracked import TrackedDirectory
from fbcache.store.blobfile import BlobFile
from fbcache.store.disk import Disk

_codec = MsgpackCodec()


@dataclass(frozen=True)
class Value:
    """An array bit by bit."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def __repr__(self) -> str:
        return f"<{self.dtype}{self.shape} from {np.frombuffer(self.content, self.dtype)[:1]}>"


@dataclass(frozen=True)
class Version:
    """A checkpoint's tag and values, by name."""

    tag: str | None
    values: dict[Any, Value]


@dataclass(frozen=True)
class Opened:
    """What is found: the versions by number, the keys that are present or pinned, and the files needed."""

    versions: dict[int, Version]
    present: frozenset[UUID]
    named: frozenset[UUID]
    pins: frozenset[UUID]
    files: frozenset[UUID]


def exact(array: np.ndarray) -> Value:
    """The array as a :data:`Value`."""
    return Value(array.dtype.str, array.shape, array.tobytes())


def fresh(root: str | os.PathLike[str], disk: Disk | None = None) -> Directory:
    """The directory as a process that has just started sees it."""
    return Directory(os.path.realpath(root), Disk() if disk is None else disk)


def look(root: str | os.PathLike[str], *, readonly: bool, pool: FBPool | None = None) -> Opened:
    """Open the directory as a fresh process does, and load every value of every version.

    Payloads are held against their checksums. With ``pool``, which should verify always, values are
    restored into it, and what it has of the same names is replaced.
    """
    directory = fresh(root)
    with TrackedDirectory._over(directory, readonly=readonly) as tracked:
        listed = [(each.version, each.tag, each.names) for each in tracked.checkpoints()]
        manifests: dict[int, Manifest] = {}
        versions = {}
        with ExitStack() as held:
            for number in directory.versions.numbers():
                held.callback(directory.loans.let_go_of_version, number)
                manifests[number] = hold(directory, number, None, None)[1]
            for number, manifest in manifests.items():
                values = _values(directory, manifest) if pool is None else _restored(pool, tracked, number)
                versions[number] = Version(manifest.head.tag, values)
        assert listed == [(n, v.tag, tuple(v.values)) for n, v in versions.items()]
        present = frozenset(tracked.keys())
        if pool is not None:
            _empty(pool)
        pins = frozenset(UUID(path.name[:32]) for path in Path(root).glob("??/*.pin"))
    named = frozenset(key for manifest in manifests.values() for key in manifest.keys)
    needed = frozenset(key for manifest in manifests.values() for key in manifest.files)
    return Opened(versions, present, named, pins, needed)


def _values(directory: Directory, manifest: Manifest) -> dict[Any, Value]:
    rows = zip(manifest.names, manifest.keys, manifest.blobs, strict=True)
    return {
        name: load(directory, key, blob.digest) if blob.pack is None else unpacked(directory, key, blob)
        for name, key, blob in rows
    }


def unpacked(directory: Directory, key: UUID, blob: Blob) -> Value:
    """The value of a blob in a pack, verified."""
    assert blob.pack is not None
    (frames,) = read_records(directory.disk, directory.places, blob.pack, [(key, blob)])
    if isinstance(frames, CorruptBlobError):
        raise frames
    return exact(_codec.decode(frames, writable=False, allow_pickle=False))


def load(directory: Directory, key: UUID, digest: int | None = None) -> Value:
    """The value of a blob, verified."""
    disk, path = directory.disk, directory.places.blob(key)
    fd = disk.open(path, os.O_RDONLY)
    try:
        frames = BlobFile(disk, fd, key, path, digest).read(may_map=False, writable=False, verify=True)
    finally:
        disk.close(fd)
    return exact(_codec.decode(frames, writable=False, allow_pickle=False))


def _restored(pool: FBPool, tracked: TrackedDirectory, version: int) -> dict[Any, Value]:
    checkpoint = pool.restore(tracked, version=version, replace=True)
    values = {}
    for name in checkpoint.names:
        with pool.get(name) as value:
            values[name] = exact(value)
    return values


def _empty(pool: FBPool) -> None:
    for name in list(pool):
        pool.delete(name)
    pool.drain()


def files_of(root: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every file below ``root`` but the writer's lock, by its relative path."""
    base = os.path.realpath(root)
    found = {}
    for path, _, names in os.walk(base):
        for name in names:
            inner = os.path.join(path, name)
            try:
                with open(inner, "rb") as file:
                    found[os.path.relpath(inner, base)] = file.read()
            except FileNotFoundError:  # of a reader's session that a pool ends in the background
                assert "/.fbcache/readers/" in inner, f"{inner} goes while nobody writes"
    found.pop(".fbcache/lock", None)
    return found


_OURS = re.compile(
    r"([0-9a-f]{2})/(\.\1[0-9a-f]{30}\.tmp|\1[0-9a-f]{30}(\.pin)?)"
    r"|\.fbcache/(lock|checkpoints/(\.[0-9]{10}\.tmp|[0-9]{10}\.manifest)|readers/session-[0-9a-f]{32}/.*)"
)


def is_ours(path: str) -> bool:
    """Whether a file at this relative path is one of fbcache's."""
    return _OURS.fullmatch(path) is not None


#: A reader's session that may be in the making is left alone; it keeps nothing.
_UNBORN = re.compile(r"\.fbcache/readers/session-[0-9a-f]{32}/(lease\.lock|\.?owner\.json(\.tmp)?)")


def leftovers(root: str | os.PathLike[str], opened: Opened) -> set[str]:
    """The files of ours that should not be there, and those that should and are not."""
    due = {f".fbcache/checkpoints/{number:010d}.manifest" for number in opened.versions}
    due |= {f"{key.hex[:2]}/{key.hex}.pin" for key in opened.pins}
    due |= {f"{key.hex[:2]}/{key.hex}" for key in opened.files | opened.pins}
    return {path for path in files_of(root) if is_ours(path) and not _UNBORN.fullmatch(path)} ^ due


@contextmanager
def in_memory() -> Iterator[Path]:
    """A directory in memory where there is /dev/shm, else in a temporary place."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as path:
        yield Path(path)
