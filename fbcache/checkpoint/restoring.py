"""Entries from a tracked directory: whole checkpoints, or some of their names. Nothing is decoded.

Guarantees
----------
- A restore brings all that was asked for, or changes nothing.
- No code from the directory runs, then or at a later load, unless ``allow_pickle`` (invariant 14).
- What an entry needs is kept readable for it, whatever the directory's writer does (:mod:`.loans`).
- A blob that is damaged or gone shows when its entry is loaded, and keeps no other from loading.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from datetime import datetime
from typing import NoReturn

from fbcache.checkpoint.copying import Guest, Origin
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.loans import CheckpointLoan, Reading
from fbcache.checkpoint.manifest import Manifest
from fbcache.checkpoint.progress import Meter, Progress
from fbcache.checkpoint.saver import Checkpoint
from fbcache.checkpoint.taking_in import Target, return_unused, take_in
from fbcache.errors import CheckpointNotFoundError, PickleRefusedError

#: How often a checkpoint may be forgotten between being chosen and being held.
ATTEMPTS = 20


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
        for _ in range(ATTEMPTS):
            held, manifest = hold(directory, version, tag, before)
            try:
                rows = _choose(manifest, wanted, directory)
                guests = _guests(directory, manifest, rows, allow_pickle)
                if _bring(pool, directory, manifest.head.version, guests, replace, meter):
                    return Checkpoint.of(manifest, directory.root)
            finally:
                directory.loans.let_go_of_version(held)
    raise _too_fast(directory)


def hold(
    directory: Directory, version: int | None, tag: str | None, before: float | datetime | None
) -> tuple[int, Manifest]:
    """Choose a checkpoint and keep it from being removed by others, until ``loans.let_go_of_version``."""
    for _ in range(ATTEMPTS):
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
    guests: Sequence[Guest],
    replace: bool,
    meter: Meter,
) -> bool:
    """Make these entries; False if the checkpoint has gone before its files were held."""
    packs = Reading(frozenset(guest.blob.pack.key for guest in guests if guest.blob.pack is not None))
    directory.loans.read_from(packs)
    directory.loans.borrow_all(version, [guest.token.key for guest in guests if guest.loan is not None])
    try:
        # A writer of this process may have looked for loans just before.
        if not directory.versions.has(version):
            return False
        meter.begin(sum(guest.nbytes for guest in guests))
        meter.end()  # what the caller's function raises comes before any change
        take_in(pool, guests, replace, Origin(directory.disk, directory.places))
    finally:
        packs.over = True
        return_unused(guests)
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


def _guests(
    directory: Directory, manifest: Manifest, rows: Sequence[int] | None, allow_pickle: bool
) -> list[Guest]:
    """What the rows are to become. Each is read once, for they are made when they are asked for."""
    names, keys, blobs = manifest.names, manifest.keys, manifest.blobs
    if rows is None:
        triples = zip(names, keys, blobs, strict=True)
    else:
        triples = zip(*([column[row] for row in rows] for column in (names, keys, blobs)), strict=True)
    version, guests = manifest.head.version, []
    for name, key, blob in triples:
        if blob.pickled is not None and not allow_pickle:
            refuse_pickle(name, blob.pickled)
        loan = None
        if blob.pack is None:
            loan = CheckpointLoan(directory.loans, version, key, blob.digest, blob.disk_bytes)
        guests.append(Guest(name, key, blob, loan, allow_pickle))
    return guests


def refuse_pickle(name: Hashable, pickled: str) -> NoReturn:
    """Raise PickleRefusedError for an entry that was found in a tracked directory."""
    path, _, kind = pickled.rpartition(": ")
    raise PickleRefusedError(
        f"the entry {name!r} was pickled, and loading it runs code from its file: {path} is of the type "
        f"{kind}. If you trust whoever wrote it, pass allow_pickle=True",
        path,
    )
