"""A checkpoint in the making: blobs brought in, then committed all at once, or not at all.

Guarantees
----------
- Until :meth:`Saver.commit` has made the manifest visible, whole and durable, the former checkpoint is the
  newest; a saver that ends otherwise takes back what it brought in (invariant 12).
- What it refers to stays until it ends, whoever else deletes or prunes.
- Blobs that are present already cost a dictionary look-up each.
- What is small may be in packs of many (:mod:`.packing`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from fbcache.captures import Capture
from fbcache.checkpoint.cut import Cut, NamedSource, Source, look_up
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.fanout import FanOut
from fbcache.checkpoint.intake import Intake
from fbcache.checkpoint.manifest import Blob, Head, Manifest, check_meta, files_of
from fbcache.checkpoint.naming import encode
from fbcache.checkpoint.progress import Meter
from fbcache.checkpoint.versions import check_tag
from fbcache.entry import Entry
from fbcache.errors import (
    FBCacheError,
    FBCacheWarning,
    NameTakenError,
    PickleRefusedError,
    StorageError,
)
from fbcache.residency import Residency


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a tracked directory.

    Attributes
    ----------
    version : int
        Its number, from 1 up.
    tag : str or None
        The name that was given to it.
    created : datetime
        When it was committed, in UTC.
    names : tuple of hashable
        The names of its entries.
    nbytes : int
        Size of its values in memory.
    blobs_written, bytes_written : int
        How many blobs were not in the directory before, and their length in bytes.
    path : str
        The directory.
    meta : dict or None
        What was passed as ``meta``.
    """

    version: int
    tag: str | None
    created: datetime
    names: tuple[Hashable, ...]
    nbytes: int
    blobs_written: int
    bytes_written: int
    path: str
    meta: dict[Any, Any] | None

    @classmethod
    def of(cls, manifest: Manifest, path: str) -> Checkpoint:
        """Return what a caller sees of ``manifest``."""
        head = manifest.head
        return cls(
            version=head.version,
            tag=head.tag,
            created=datetime.fromtimestamp(head.created, UTC),
            names=tuple(manifest.names),
            nbytes=head.nbytes,
            blobs_written=head.blobs_written,
            bytes_written=head.bytes_written,
            path=path,
            meta=head.meta,
        )


class Saver:
    """Collects entries for one checkpoint. Made by ``TrackedDirectory.saving()``; one thread uses it."""

    def __init__(self, directory: Directory, allow_pickle: bool) -> None:
        self._directory = directory
        self._allow_pickle = allow_pickle
        self._rows: dict[Hashable, tuple[UUID, Blob]] = {}
        self._intake = Intake(directory)
        self._fan_out: FanOut | None = None
        self._over = False
        directory.begin_saving(self)

    def persist(self, fb: Any, name: Hashable = None) -> UUID:
        """Bring the content of a handle's entry in, for the checkpoint that :meth:`commit` makes.

        What is small may be written no sooner than by that.

        Parameters
        ----------
        fb : Fb
            Of any pool. Its value is written first if it is in memory only.
        name : hashable, optional
            What it is called in the checkpoint. Default: the name that it has in its pool.

        Returns
        -------
        UUID
            The key under which the blob is in the directory after it.

        Raises
        ------
        TypeError, UnsupportedTypeError
            It has no name, or one that a checkpoint cannot have.
        NameTakenError
            The checkpoint has an entry of that name already.
        PickleRefusedError
            The value needs pickle, and that is not allowed here.
        DeadlockError
            The caller holds the entry for writing.
        StorageError
            It could not be written or linked.

        After an error the checkpoint in the making is as it was.
        """
        self._check_open()
        entry, source = fb._owned, fb._engine
        name = fb.name if name is None else name
        if name is None:
            raise TypeError("an unnamed entry needs a name in the checkpoint: persist(fb, name=...)")
        self.gather(source, lambda: ([name], [entry]), Meter(False, ""))
        return self._rows[name][0]

    def gather(
        self, source: Source, choose: Callable[[], tuple[Sequence[Hashable], Sequence[Entry]]], meter: Meter
    ) -> None:
        """Bring in many entries of one pool, all as they are at the instant of ``choose``.

        ``choose`` is called under the pool's lock, and returns names and entries.
        """
        self._fan_out = FanOut(source.workers)
        residency = source.residency
        cut = Cut(self._directory)
        try:
            residency.run(cut.make, residency, choose)
            self._check_names(cut.names)
            meter.begin(sum(cut.sizes))
            self._intake.bring_in(source, cut, meter, self._fan_out)
            for name, blob in zip(cut.names, cut.blobs, strict=True):
                self._refuse_pickle(name, blob)
            self._rows.update(zip(cut.names, zip(cut.keys, cut.blobs, strict=True), strict=True))
        finally:
            residency.run(_release, residency, cut.captures)

    def _refuse_pickle(self, name: Hashable, blob: Blob) -> None:
        if blob.pickled is None or self._allow_pickle:
            return
        path, _, kind = blob.pickled.rpartition(": ")
        raise PickleRefusedError(
            f"the entry {name!r} takes pickle, which is not saved unless allow_pickle=True: {path} is of the "
            f"type {kind}. Register the type (fbcache.register), and it needs none",
            path,
        )

    def gather_named(
        self,
        source: NamedSource,
        names: Sequence[Hashable] | None,
        unknown: Callable[[Hashable], KeyError],
        meter: Meter,
    ) -> None:
        """Bring in what has these names at this instant; all that is named, where they are None."""
        self.gather(source, lambda: look_up(source, names, unknown), meter)

    def _check_names(self, names: Sequence[Hashable]) -> None:
        for name in names:
            if name in self._rows:
                raise NameTakenError(f"the checkpoint has an entry named {name!r} already")
            encode(name)

    # ---------------------------------------------------------------------------- commit

    def commit(
        self,
        *,
        tag: str | None = None,
        keep: int | None = 1,
        meta: dict[Any, Any] | None = None,
        change_key: Callable[[Checkpoint], object] | None = None,
    ) -> Checkpoint:
        """Make everything brought in durable, and visible as one checkpoint.

        Parameters are those of ``FBPool.save``.

        Raises
        ------
        StorageError
            It could not be done; the former checkpoint stands, and this one is not there.
        Exception
            Whatever ``change_key`` raises; the new version is withdrawn.
        """
        return self.finish(tag, keep, meta, change_key, Meter(False, ""))

    def finish(
        self,
        tag: str | None,
        keep: int | None,
        meta: dict[Any, Any] | None,
        change_key: Callable[[Checkpoint], object] | None,
        meter: Meter,
    ) -> Checkpoint:
        """Do what :meth:`commit` does, and tell ``meter``."""
        self._check_open()
        check_commit(tag, keep, meta, change_key)
        directory = self._directory
        rows = self._intake.end(list(self._rows.values()))
        self._make_durable(files_of([key for key, _ in rows], [blob for _, blob in rows]))
        manifest = self._manifest(tag, meta, rows)
        meter.end()  # what it raises can still end the save
        directory.publish(manifest)
        self._over = True
        directory.end_saving(self._intake.files)  # but for what could not be taken in, they are all needed
        checkpoint = Checkpoint.of(manifest, directory.root)
        if change_key is not None:
            try:
                change_key(checkpoint)
            except BaseException as error:
                self._withdraw(checkpoint.version, error)
                raise
        self._clean_up(keep)
        return checkpoint

    def _make_durable(self, keys: Collection[UUID]) -> None:
        try:
            if self._fan_out is None:
                self._directory.make_durable(keys)
            else:
                self._directory.make_durable(keys, self._fan_out)
        except BaseException:
            # The pools' blobs are the same files: what is read from them is to be verified.
            for token in self._intake.tokens:
                token.unverified = True
            raise

    def _manifest(
        self, tag: str | None, meta: dict[Any, Any] | None, rows: Sequence[tuple[UUID, Blob]]
    ) -> Manifest:
        names = list(self._rows)
        keys = [key for key, _ in rows]
        blobs = [blob for _, blob in rows]
        here = set(keys)
        new = {key: nbytes for key, nbytes in self._intake.new.items() if key in here}  # others were refused
        head = Head(
            version=self._directory.next_version(),
            tag=tag,
            created=time.time(),
            count=len(names),
            nbytes=sum(blob.nbytes for blob in blobs),
            disk_bytes=sum(blob.disk_bytes for blob in blobs),
            blobs_written=len(new),
            bytes_written=sum(new.values()),
            meta=meta,
        )
        return Manifest(head, names, keys, blobs)

    def _withdraw(self, version: int, error: BaseException) -> None:
        try:
            self._directory.withdraw([version])
        except StorageError as failure:
            error.add_note(f"and version {version} could not be withdrawn: {failure}")

    def _clean_up(self, keep: int | None) -> None:
        """Withdraw the versions that are not kept. The checkpoint stands, whatever comes of it."""
        try:
            self._directory.withdraw(outdated(self._directory.manifests(), keep))
        except FBCacheError as error:
            warnings.warn(
                f"the checkpoint is saved, but former ones could not be removed: {error}",
                FBCacheWarning,
                stacklevel=5,
            )

    def close(self) -> None:
        """End it. What was brought in and not committed is taken back."""
        if not self._over:
            self._over = True
            self._directory.end_saving(self._intake.files)

    def _check_open(self) -> None:
        if self._over:
            raise RuntimeError("this saver has ended; begin another one with tracked.saving()")


def outdated(manifests: dict[int, Manifest], keep: int | None) -> list[int]:
    """Return the versions that ``keep`` does not keep: tagged ones stay, and the newest of the others."""
    if keep is None:
        return []
    tags: set[str] = set()
    untagged = []
    for version in sorted(manifests, reverse=True):
        tag = manifests[version].head.tag
        if tag is None or tag in tags:  # a newer version has taken the tag over
            untagged.append(version)
        else:
            tags.add(tag)
    return untagged[keep:]


def check_commit(tag: object, keep: object, meta: dict[Any, Any] | None, change_key: object) -> None:
    """Raise TypeError or ValueError for what a commit cannot take."""
    if tag is not None:
        check_tag(tag)
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int):
            raise TypeError(f"keep is a number of versions, or None for all, not {keep!r}")
        if keep < 1:
            raise ValueError(f"keep is at least 1, not {keep}")
    check_meta(meta)
    if change_key is not None and not callable(change_key):
        raise TypeError(f"change_key is a function of the checkpoint, not {change_key!r}")


def _release(residency: Residency, captures: list[Capture]) -> None:
    while captures:
        residency.release_capture(captures[-1])
        captures.pop()
