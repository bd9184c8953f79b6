"""Entries from a tracked directory: whole checkpoints, or single keys. Nothing is loaded.

Guarantees
----------
- A restore brings all that was asked for, or changes nothing.
- No code from the directory runs, then or at a later load, unless ``allow_pickle`` (invariant 14).
- What an entry needs is kept readable for it, whatever the directory's writer does (:mod:`.loans`).
- A blob that is damaged or gone shows when its entry is loaded, and keeps no other from loading.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from fbcache.adoption import Adoptee
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.loans import CheckpointLoan, LinkedLoan
from fbcache.checkpoint.manifest import Blob, Manifest
from fbcache.checkpoint.progress import Meter, Progress
from fbcache.checkpoint.saver import Checkpoint
from fbcache.codec.frames import Frames
from fbcache.entry import MISSING, Entry, Token
from fbcache.errors import (
    CheckpointNotFoundError,
    CorruptBlobError,
    NameTakenError,
    PickleRefusedError,
    StorageError,
)
from fbcache.residency import Residency
from fbcache.store.blobfile import BlobFile
from fbcache.store.disk import Disk
from fbcache.store.protocol import BlobStore, FileBacked, Loan
from fbcache.store.trouble import storage_error

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

#: How often a checkpoint may be forgotten between being chosen and being held.
_ATTEMPTS = 20


class Target(Protocol):
    """The pool that entries are brought into."""

    residency: Residency
    store: BlobStore

    @property
    def names(self) -> MutableMapping[Hashable, Entry]:
        """Entries by name."""
        ...


def restore(
    pool: Target,
    directory: Directory,
    names: Iterable[Hashable] | None,
    *,
    version: int | None,
    tag: str | None,
    before: float | datetime | None,
    replace: bool,
    allow_pickle: bool,
    progress: Progress,
) -> Checkpoint:
    """Bring a checkpoint's entries into ``pool``; see ``FBPool.restore``."""
    pool.residency.check_open()
    wanted = None if names is None else check_names(names)
    with Meter(progress, f"restore {directory.root}") as meter:
        for _ in range(_ATTEMPTS):
            held, manifest = hold(directory, version, tag, before)
            try:
                rows = _choose(manifest, wanted, directory)
                adoptees = _adoptees(directory, manifest, rows, allow_pickle)
                if _bring(pool, directory, manifest.head.version, adoptees, replace, meter):
                    return Checkpoint.of(manifest, directory.root)
            finally:
                directory.loans.let_go_of_version(held)
    raise _too_fast(directory)


def hold(
    directory: Directory, version: int | None, tag: str | None, before: float | datetime | None
) -> tuple[int, Manifest]:
    """Choose a checkpoint and keep it from being removed by others, until ``loans.let_go_of_version``."""
    for _ in range(_ATTEMPTS):
        chosen = directory.versions.choose(version, tag, before)
        try:
            link = directory.loans.hold_version(chosen)
        except FileNotFoundError:  # forgotten meanwhile
            continue
        try:
            return chosen, directory.versions.read(chosen, link)
        except CheckpointNotFoundError:
            directory.loans.let_go_of_version(chosen)
        except BaseException:
            directory.loans.let_go_of_version(chosen)
            raise
    raise _too_fast(directory)


def _too_fast(directory: Directory) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"checkpoints of {directory.root} are removed faster than they are read")


def _bring(
    pool: Target,
    directory: Directory,
    version: int,
    adoptees: Sequence[Adoptee],
    replace: bool,
    meter: Meter,
) -> bool:
    """Make these entries; False if the checkpoint has gone before its blobs were held."""
    directory.loans.borrow_all(version, [adoptee.token.key for adoptee in adoptees])
    try:
        # A writer of this process may have looked for loans just before.
        if not directory.versions.has(version):
            return False
        meter.begin(sum(adoptee.nbytes for adoptee in adoptees))
        meter.end()  # what the caller's function raises comes before any change
        _take_in(pool, adoptees, replace)
    finally:
        _return_unused(adoptees)
    return True


def check_names(names: Iterable[Hashable]) -> list[Hashable]:
    """Return the names that a caller asks for, each once.

    Raises
    ------
    TypeError
        It is one name: the letters of a text are hardly what is meant.
    """
    if isinstance(names, (str, bytes)):
        raise TypeError(f"names is a list of names, not one name: pass [{names!r}]")
    return list(dict.fromkeys(names))


def _choose(
    manifest: Manifest, names: Iterable[Hashable] | None, directory: Directory
) -> Sequence[int] | None:
    """The rows of the manifest that are meant; None for all."""
    if names is None:
        return None
    lacking = set(names)
    found = {name: row for row, name in enumerate(manifest.names) if name in lacking}
    rows = []
    for name in names:
        if name not in found:
            raise KeyError(f"version {manifest.head.version} in {directory.root} has no entry named {name!r}")
        rows.append(found[name])
    return rows


def _adoptees(
    directory: Directory, manifest: Manifest, rows: Sequence[int] | None, allow_pickle: bool
) -> list[Adoptee]:
    """What the rows are to become. Each is read once, for they are made when they are asked for."""
    names, keys, blobs = manifest.names, manifest.keys, manifest.blobs
    if rows is None:
        triples = zip(names, keys, blobs, strict=True)
    else:
        triples = zip(*([column[row] for row in rows] for column in (names, keys, blobs)), strict=True)
    adoptees = []
    for name, key, blob in triples:
        if blob.pickled is not None and not allow_pickle:
            refuse_pickle(name, blob.pickled)
        loan = CheckpointLoan(directory.loans, manifest.head.version, key, blob.digest, blob.disk_bytes)
        adoptees.append(Adoptee(name, _token(key, blob, allow_pickle), blob.nbytes, loan))
    return adoptees


def refuse_pickle(name: Hashable, pickled: str) -> None:
    """Raise PickleRefusedError for an entry that was found in a tracked directory."""
    path, _, kind = pickled.rpartition(": ")
    raise PickleRefusedError(
        f"the entry {name!r} was pickled, and loading it runs code from its file: {path} is of the type "
        f"{kind}. If you trust whoever wrote it, pass allow_pickle=True",
        path,
    )


def _token(key: UUID, blob: Blob, allow_pickle: bool) -> Token:
    return Token(key, blob.disk_bytes, unverified=True, allow_pickle=allow_pickle)


def register(
    pool: Target,
    directory: Directory,
    keys: Sequence[UUID],
    name: Hashable,
    *,
    replace: bool,
    allow_pickle: bool,
) -> list[Adoptee]:
    """Bring blobs into ``pool`` by their keys, each as an entry owned as by a handle."""
    pool.residency.check_open()
    adoptees: list[Adoptee] = []
    try:
        for key in keys:
            adoptees.append(_linked(directory, key, name, allow_pickle))  # noqa: PERF401  # each is released
        _take_in(pool, adoptees, replace, keep=True)
    finally:
        _return_unused(adoptees)
    return adoptees


def _linked(directory: Directory, key: UUID, name: Hashable, allow_pickle: bool) -> Adoptee:
    if not isinstance(key, UUID):
        raise TypeError(f"a key is a uuid.UUID, not {key!r}")
    try:
        path = directory.loans.borrow(key)
    except FileNotFoundError:
        raise KeyError(f"{directory.root} has no blob of the key {key}") from None
    except OSError as error:
        raise storage_error("read", directory.places.blob(key), error, directory.disk) from error
    loan = LinkedLoan(directory.loans, key, path, None, 0)
    try:
        header = read_header(directory.disk, key, path, directory.places.blob(key))
        if header.pickled is not None and not allow_pickle:
            refuse_pickle(key if name is MISSING else name, header.pickled)
        loan.digest = header.digest
        loan.nbytes = header.disk_bytes
    except BaseException:
        loan.release()
        raise
    return Adoptee(name, _token(key, header, allow_pickle), header.nbytes, loan)


def read_header(disk: Disk, key: UUID, file: str, path: str) -> Blob:
    """Return what the header in ``file`` says; its payload's length stands for the value's size.

    Errors name ``path``.

    Raises
    ------
    CorruptBlobError
        It is damaged.
    StorageError
        It could not be read.
    """
    try:
        fd = disk.open(file, _READ)
        try:
            header = BlobFile(disk, fd, key, path).header()
        finally:
            disk.close(fd)
    except OSError as error:
        raise storage_error("read", path, error, disk) from error
    nbytes = len(header.tree) + sum(span.length for span in header.spans)
    return Blob(nbytes, header.nbytes, header.codec, header.pickled, header.digest)


# ------------------------------------------------------------------------- into the pool


def _take_in(pool: Target, adoptees: Sequence[Adoptee], replace: bool, *, keep: bool = False) -> None:
    """Make entries of all, under their names; with ``keep`` each stays owned as by a handle too."""
    residency = pool.residency
    _check_names(pool.names, adoptees, replace)
    borrow = pool.store.borrow if isinstance(pool.store, FileBacked) else None
    if borrow is None:
        _copy(pool, adoptees)
    done = False
    try:
        while (waiter := residency.run(residency.adopt, adoptees, borrow)) is not None:
            waiter.run()
        residency.run(_install, pool, adoptees, replace)
        done = True
    finally:
        if not done:
            residency.run(_undo, pool, adoptees)
        if not (done and keep):
            residency.run(_release, residency, adoptees)


def _copy(pool: Target, adoptees: Sequence[Adoptee]) -> None:
    """Write the blobs into a store that has no files to lend."""
    residency = pool.residency
    while (waiter := residency.run(residency.dying, [adoptee.token.key for adoptee in adoptees])) is not None:
        waiter.run()
    copied: list[UUID] = []
    try:
        for adoptee in adoptees:
            token, loan = adoptee.token, adoptee.loan
            if loan is None or token.key in residency.known:
                continue
            try:
                frames = _frames(loan, token.key)
            except CorruptBlobError:  # whoever loads it will hear that it is not there
                continue
            token.nbytes = pool.store.write(token.key, frames)
            copied.append(token.key)
    except BaseException:
        _discard(pool, copied)
        raise


def _discard(pool: Target, copied: Iterable[UUID]) -> None:
    """Take copies back that became no entry's; those of another restore stay."""
    for key in copied:
        if key not in pool.residency.known:
            try:
                pool.store.delete(key)
            except StorageError:  # what the restore came to is what the caller hears of
                pass


def _frames(loan: Loan, key: UUID) -> Frames:
    disk = Disk()
    try:
        fd = disk.open(loan.path, _READ)
        try:
            file = BlobFile(disk, fd, key, loan.path, loan.digest)
            return file.read(may_map=True, writable=False, verify=True)
        finally:
            disk.close(fd)
    except OSError as error:
        raise storage_error("read", loan.path, error, disk) from error


def _check_names(names: Mapping[Hashable, Entry], adoptees: Iterable[Adoptee], replace: bool) -> None:
    if replace:
        return
    for adoptee in adoptees:
        if adoptee.name is not MISSING and adoptee.name in names:
            raise NameTakenError(
                f"the pool has an entry named {adoptee.name!r} already; replace=True puts the other there"
            )


def _install(pool: Target, adoptees: Sequence[Adoptee], replace: bool) -> None:
    """Give all of them their names, at one instant. Under the lock."""
    pool.residency.check_open()
    _check_names(pool.names, adoptees, replace)
    for adoptee in adoptees:
        entry, name = adoptee.entry, adoptee.name
        if name is MISSING or entry is None:
            continue
        former = pool.names.get(name)
        entry.name = name
        if former is not None:
            # Straight line. It lives on until all is done.
            former.handles += 1
            adoptee.former = former
        # Straight line.
        pool.names[name] = entry
        entry.named = True
        if former is not None:
            former.named = False


def _undo(pool: Target, adoptees: Sequence[Adoptee]) -> None:
    """Give the names back to whom they were taken from. Under the lock."""
    for adoptee in adoptees:
        entry, former = adoptee.entry, adoptee.former
        if entry is None or not entry.named or pool.names.get(adoptee.name) is not entry:
            continue
        entry.named = False
        if former is None:
            del pool.names[adoptee.name]
        else:
            # Straight line.
            pool.names[adoptee.name] = former
            former.named = True


def _release(residency: Residency, adoptees: Sequence[Adoptee]) -> None:
    for adoptee in adoptees:
        residency.release_adoptee(adoptee)


def _return_unused(adoptees: Iterable[Adoptee]) -> None:
    for adoptee in adoptees:
        if not adoptee.used and adoptee.loan is not None:
            adoptee.loan.release()
