"""The blobs of a save on their way from a pool into a tracked directory.

Guarantees
----------
- What has a file of its own is linked, by several threads; what is small and has none is packed
  (:mod:`.packing`).
- What is brought in is registered with its pool first, so that whoever finds it in the directory shares it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Final
from uuid import UUID

from fbcache.captures import Capture
from fbcache.checkpoint.blobset import BlobSet, Fetch
from fbcache.checkpoint.cut import Cut, Source
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.fanout import FanOut
from fbcache.checkpoint.manifest import Blob
from fbcache.checkpoint.packing import PackWriter
from fbcache.checkpoint.progress import Meter
from fbcache.entry import Token
from fbcache.errors import CorruptBlobError, InternalError, StorageError
from fbcache.spill import LostToken
from fbcache.store.auto import SMALL
from fbcache.store.protocol import FileBacked

#: Blobs that one job brings in: linking takes some 10 us, and handing a job over about as long.
_PER_JOB: Final = 16

#: Small blobs that are made known to the pool at once.
_TOGETHER: Final = 256


class Intake:
    """What one save brings into ``directory``.

    Attributes
    ----------
    tokens : list of Token
        Of the blobs that were linked: in pool and directory they are the same files.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._apart: dict[UUID, int] = {}  # lengths of new files of their own
        self._small = PackWriter(directory)
        self.tokens: list[Token] = []

    def bring_in(self, source: Source, cut: Cut, meter: Meter, fan_out: FanOut) -> None:
        """Have the blobs of all that was captured in the directory: first of what is written already."""
        done = [n for n, capture in enumerate(cut.captures) if capture.done]
        by_slot = isinstance(source.store, FileBacked)
        small = {n for n in done if _may_be_packed(cut.captures[n].token, by_slot)}
        there = [n for n in done if n not in small]
        jobs = [
            lambda part=there[at : at + _PER_JOB]: self._bring_some(source, cut, part)
            for at in range(0, len(there), _PER_JOB)
        ]
        for outcome in fan_out(jobs):
            if outcome is not None:
                raise outcome
        few = [n for n in done if n in small]
        for at in range(0, len(few), _TOGETHER):
            self._bring_small(source, cut, few[at : at + _TOGETHER])
        begun = set(done)
        for n, capture in enumerate(cut.captures):
            if n not in begun:
                capture.wait()
                bring = self._bring_small if _may_be_packed(capture.token, by_slot) else self._bring_some
                bring(source, cut, [n])
            meter.advance(capture.nbytes // 2)  # the other half is for making it durable

    def _bring_small(self, source: Source, cut: Cut, numbers: Sequence[int]) -> None:
        """Have blobs packed that have no file to be linked, unless they are large after all."""
        captures = [cut.captures[n] for n in numbers]
        rows = [cut.rows[n] for n in numbers]
        tokens = [_token_of(cut.names[row], capture) for row, capture in zip(rows, captures, strict=True)]
        source.residency.run(source.residency.know, tokens)  # first, as below
        for row, capture, token in zip(rows, captures, tokens, strict=True):
            key = token.key
            blob = self._small.known(key)
            if blob is None and self._directory.has(key):  # persisted meanwhile
                blob = self._directory.known(key) or self._directory.bring_in(key, fetcher(source, token))
            if blob is None:
                blob = self._take_small(source, token, capture.nbytes)
            cut.keys[row] = key
            cut.blobs[row] = blob if blob.nbytes == capture.nbytes else replace(blob, nbytes=capture.nbytes)

    def _take_small(self, source: Source, token: Token, nbytes: int) -> Blob:
        key = token.key
        try:
            frames = source.spiller.fetch(token, writable=False, verify=True)
            if frames.nbytes <= SMALL:
                return self._small.add(key, frames, nbytes)
            blob = self._directory.bring_in(key, lambda blobs: blobs.write(key, frames))
        except (CorruptBlobError, StorageError):
            source.residency.check_open()  # the blob went with the pool
            raise
        self._apart[key] = blob.disk_bytes
        return blob

    def _bring_some(self, source: Source, cut: Cut, numbers: Sequence[int]) -> None:
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
                self._apart[token.key] = blob.disk_bytes
                self.tokens.append(token)
            cut.keys[row] = token.key
            cut.blobs[row] = replace(blob, nbytes=capture.nbytes)

    def end(self, rows: Collection[tuple[UUID, Blob]]) -> list[tuple[UUID, Blob]]:
        """Have all packs written, and return ``rows``, keys and blobs, as they are then.

        Raises
        ------
        StorageError
            It could not be done; it may be tried again.
        """
        self._small.end(dict(rows), idle=not self._apart and not self._small.any)
        placed = self._small.placed
        found = []
        for key, blob in rows:
            there = placed.get(key)
            if there is not None:
                blob = there if there.nbytes == blob.nbytes else replace(there, nbytes=blob.nbytes)
            elif not self._directory.has(key):
                raise InternalError(f"a save has lost the blob of {key}")
            found.append((key, blob))
        return found

    @property
    def new(self) -> dict[UUID, int]:
        """The contents that were not in the directory before, with their lengths there."""
        return self._apart | self._small.new

    @property
    def files(self) -> list[UUID]:
        """Keys of the files made, and of some whose making failed."""
        return [*self._apart, *self._small.files]


def _may_be_packed(token: Token | None, by_slot: bool) -> bool:
    """Whether there is a blob that looks small and has no file to be linked; one in a slot has none."""
    if token is None or (by_slot and token.slot < 0):
        return False
    return token.nbytes <= 2 * SMALL  # on disk, which is not the payload


def fetcher(source: Source, token: Token) -> Fetch:
    """Return what makes the file of a blob of which the caller has a share."""

    def fetch(blobs: BlobSet) -> None:
        store, key = source.store, token.key
        if isinstance(store, FileBacked) and token.slot < 0 and not isinstance(token, LostToken):
            blobs.link(key, store.file_of(key))
        else:
            blobs.write(key, source.spiller.fetch(token, writable=False, verify=True))

    return fetch


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
