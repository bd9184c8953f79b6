"""A checkpoint in the making: blobs brought in, then committed all at once, or not at all.

Guarantees
----------
- Until :meth:`Saver.commit` has made the manifest visible, whole and durable, the former checkpoint is the
  newest; a saver that ends otherwise takes back what it brought in (invariant 12).
- What it refers to stays until it ends, whoever else deletes or prunes.
- Blobs that are present already cost a dictionary look-up each.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID

from fbcache.captures import Capture
from fbcache.checkpoint.blobset import BlobSet, Fetch
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.fanout import FanOut
from fbcache.checkpoint.manifest import Blob, Head, Manifest, check_meta
from fbcache.checkpoint.naming import encode
from fbcache.checkpoint.progress import Meter
from fbcache.checkpoint.versions import check_tag
from fbcache.entry import Entry, Token
from fbcache.errors import (
    CorruptBlobError,
    FBCacheError,
    FBCacheWarning,
    NameTakenError,
    PickleRefusedError,
    StorageError,
)
from fbcache.residency import Residency
from fbcache.spill import Spiller
from fbcache.store.protocol import BlobStore, FileBacked
from fbcache.workers import Workers

#: Blobs that one job brings in: linking takes some 10 us, and handing a job over about as long.
_PER_JOB = 16


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


class Source(Protocol):
    """The pool that an entry is saved from."""

    residency: Residency
    spiller: Spiller
    store: BlobStore
    workers: Workers


class NamedSource(Source, Protocol):
    """A pool with names."""

    @property
    def names(self) -> Mapping[Hashable, Entry]:
        """Entries by name."""
        ...


class Saver:
    """Collects entries for one checkpoint. Made by ``TrackedDirectory.saving()``; one thread uses it."""

    def __init__(self, directory: Directory, allow_pickle: bool) -> None:
        self._directory = directory
        self._allow_pickle = allow_pickle
        self._rows: dict[Hashable, tuple[UUID, Blob]] = {}
        self._new: dict[UUID, int] = {}
        self._tokens: list[Token] = []  # of what was brought in
        self._fan_out: FanOut | None = None
        self._over = False
        directory.begin_saving(self)

    def persist(self, fb: Any, name: Hashable = None) -> UUID:
        """Bring the content of a handle's entry in, for the checkpoint that :meth:`commit` makes.

        Parameters
        ----------
        fb : Fb
            Of any pool. Its value is written first if it is in memory only.
        name : hashable, optional
            What it is called in the checkpoint. Default: the name that it has in its pool.

        Returns
        -------
        UUID
            The key under which the blob is in the directory.

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
        cut = _Cut(self._directory)
        try:
            residency.run(cut.make, residency, choose)
            self._check_names(cut.names)
            meter.begin(sum(cut.sizes))
            self._bring_in(source, cut, meter)
            for name, blob in zip(cut.names, cut.blobs, strict=True):
                self._refuse_pickle(name, blob)
            self._rows.update(zip(cut.names, zip(cut.keys, cut.blobs, strict=True), strict=True))
        finally:
            residency.run(_release, residency, cut.captures)

    def _bring_in(self, source: Source, cut: _Cut, meter: Meter) -> None:
        """Have the blobs of all that was captured in the directory: first of what is written already."""
        there = [n for n, capture in enumerate(cut.captures) if capture.done]
        jobs = [
            lambda part=there[at : at + _PER_JOB]: self._bring_some(source, cut, part)
            for at in range(0, len(there), _PER_JOB)
        ]
        assert self._fan_out is not None
        for outcome in self._fan_out(jobs):
            if outcome is not None:
                raise outcome
        done = set(there)
        for n, capture in enumerate(cut.captures):
            if n not in done:
                capture.wait()
                self._bring_some(source, cut, [n])
            meter.advance(capture.nbytes // 2)  # the other half is for making it durable

    def _bring_some(self, source: Source, cut: _Cut, numbers: Sequence[int]) -> None:
        for n in numbers:
            row, capture = cut.rows[n], cut.captures[n]
            token = _token_of(cut.names[row], capture)
            # First: whoever finds the blob there, and registers it, is to share the token.
            source.residency.run(source.residency.know, [token])
            known = self._directory.has(token.key)
            try:
                blob = self._directory.bring_in(token.key, fetcher(source, token))
            except (CorruptBlobError, StorageError):
                source.residency.check_open()  # the blob went with the pool
                raise
            if not known:
                self._new[token.key] = blob.disk_bytes
                self._tokens.append(token)
            cut.keys[row] = token.key
            cut.blobs[row] = replace(blob, nbytes=capture.nbytes)

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
        self.gather(source, lambda: _look_up(source, names, unknown), meter)

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
        self._make_durable()
        manifest = self._manifest(tag, meta)
        meter.end()  # what it raises can still end the save
        directory.publish(manifest)
        self._over = True
        directory.end_saving(list(self._new))  # but for what could not be taken in, they are all needed
        checkpoint = Checkpoint.of(manifest, directory.root)
        if change_key is not None:
            try:
                change_key(checkpoint)
            except BaseException as error:
                self._withdraw(checkpoint.version, error)
                raise
        self._clean_up(keep)
        return checkpoint

    def _make_durable(self) -> None:
        keys = {key for key, _ in self._rows.values()}
        try:
            if self._fan_out is None:
                self._directory.make_durable(keys)
            else:
                self._directory.make_durable(keys, self._fan_out)
        except BaseException:
            # The pools' blobs are the same files: what is read from them is to be verified.
            for token in self._tokens:
                token.unverified = True
            raise

    def _manifest(self, tag: str | None, meta: dict[Any, Any] | None) -> Manifest:
        names = list(self._rows)
        keys = [key for key, _ in self._rows.values()]
        blobs = [blob for _, blob in self._rows.values()]
        head = Head(
            version=self._directory.next_version(),
            tag=tag,
            created=time.time(),
            count=len(names),
            nbytes=sum(blob.nbytes for blob in blobs),
            disk_bytes=sum(blob.disk_bytes for blob in blobs),
            blobs_written=len(self._new),
            bytes_written=sum(self._new.values()),
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
            self._directory.end_saving(list(self._new))

    def _check_open(self) -> None:
        if self._over:
            raise RuntimeError("this saver has ended; begin another one with tracked.saving()")


def fetcher(source: Source, token: Token) -> Fetch:
    """Return what makes the file of a blob of which the caller has a share."""

    def fetch(blobs: BlobSet) -> None:
        store, key = source.store, token.key
        if isinstance(store, FileBacked) and token.slot < 0:
            blobs.link(key, store.file_of(key))
        else:
            blobs.write(key, source.spiller.fetch(token, writable=False, verify=True))

    return fetch


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


class _Cut:
    """What a save sees of a pool: by row what is known, and captures of what is not in the directory.

    A row whose blob is in the directory already costs a look-up there: none is removed during a save.
    """

    __slots__ = ("_directory", "blobs", "captures", "keys", "names", "rows", "sizes")

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.names: Sequence[Hashable] = ()
        self.keys: list[Any] = []  # UUID, once known
        self.blobs: list[Any] = []  # Blob, once known
        self.sizes: list[int] = []
        self.rows: list[int] = []  # of the captures
        self.captures: list[Capture] = []

    def make(
        self, residency: Residency, choose: Callable[[], tuple[Sequence[Hashable], Sequence[Entry]]]
    ) -> None:
        """Make the cut, all at one instant; under the pool's lock."""
        residency.check_open()
        self.names, entries = choose()
        known = self._directory.known
        missing = []
        for row, entry in enumerate(entries):
            token, nbytes = entry.token, entry.nbytes
            key = None if token is None else token.key
            blob = None if key is None else known(key)
            if blob is None:
                self.rows.append(row)
                missing.append(entry)
            elif blob.nbytes != nbytes:
                blob = replace(blob, nbytes=nbytes)
            self.keys.append(key)
            self.blobs.append(blob)
            self.sizes.append(nbytes)
        residency.capture(missing, self.captures)


def _look_up(
    source: NamedSource, names: Sequence[Hashable] | None, unknown: Callable[[Hashable], KeyError]
) -> tuple[list[Hashable], list[Entry]]:
    if names is None:
        return list(source.names), list(source.names.values())
    entries = []
    for name in names:
        entry = source.names.get(name)
        if entry is None:
            raise unknown(name)
        entries.append(entry)
    return list(names), entries


def _token_of(name: Hashable, capture: Capture) -> Token:
    """Wait for the blob of a captured entry."""
    if not capture.done:
        capture.wait()
    try:
        capture.raise_error()
    except Exception as error:
        error.add_note(f"while saving the entry {name!r}")
        raise
    token = capture.token
    assert token is not None
    return token


def _release(residency: Residency, captures: list[Capture]) -> None:
    while captures:
        residency.release_capture(captures[-1])
        captures.pop()
