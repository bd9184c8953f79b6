"""One entry given a durable place, outside any checkpoint.

Guarantee: the blob is in the tracked directory whole, and pinned there, or nothing is. It is durable once
``TrackedDirectory.sync()`` has returned.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from functools import partial
from uuid import UUID

from fbcache.captures import Capture
from fbcache.checkpoint.cut import Source
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.intake import fetcher
from fbcache.checkpoint.manifest import Blob
from fbcache.checkpoint.tracked import TrackedDirectory, directory_of
from fbcache.entry import Entry
from fbcache.errors import CorruptBlobError, PickleRefusedError, StorageError, UnsupportedTypeError
from fbcache.events import telling


def persist(
    source: Source,
    entry: Entry,
    tracked: TrackedDirectory | str | os.PathLike[str],
    *,
    allow_pickle: bool,
) -> UUID:
    """Bring the entry's content into ``tracked`` and pin it there; see ``Fb.persist``."""
    directory = directory_of(tracked, write=True)
    captures: list[Capture] = []
    try:
        source.residency.run(source.residency.capture, [entry], captures)
        captures[0].wait()
        return _finish(source, directory, entry, captures[0], allow_pickle)
    finally:
        release(source, captures)


def spawn_persist(
    source: Source,
    entry: Entry,
    tracked: TrackedDirectory | str | os.PathLike[str],
    *,
    allow_pickle: bool,
) -> Future[UUID]:
    """Do what :func:`persist` does, of the content as it is now, on the pool's threads."""
    directory = directory_of(tracked, write=True)
    future: Future[UUID] = Future()
    captures: list[Capture] = []

    def finish() -> None:
        try:
            mine = [captures.pop()]  # a second call finds none
        except IndexError:
            return
        try:
            key = _finish(source, directory, entry, mine[0], allow_pickle)
        except BaseException as error:
            release(source, mine)
            future.set_exception(error)
        else:
            release(source, mine)
            future.set_result(key)

    future.set_running_or_notify_cancel()
    try:
        residency = source.residency
        residency.run(residency.capture, [entry], captures, lambda: source.workers.submit_foreign(finish))
    except BaseException:
        release(source, captures)
        raise
    return future


def _finish(source: Source, directory: Directory, entry: Entry, capture: Capture, allow_pickle: bool) -> UUID:
    """Bring in what was captured, which has its blob by now, or the error that writing it came to."""
    try:
        capture.raise_error()
        with directory.tenancies.writing():
            return pin_captured(source, directory, entry, capture, allow_pickle)
    except (CorruptBlobError, StorageError, UnsupportedTypeError) as error:
        source.residency.check_open()  # the blob went with the pool
        error.add_note(f"while persisting {entry!r}")
        raise


def pin_captured(
    source: Source, directory: Directory, entry: Entry, capture: Capture, allow_pickle: bool
) -> UUID:
    """Bring what was captured, and has its blob by now, into ``directory``, and pin it; return its key."""
    token = capture.token
    assert token is not None
    with telling(source.residency.log, entry, directory.root) as outcome:
        outcome.key, outcome.nbytes = token.key, token.nbytes
        # First: whoever finds the blob there, and registers it, is to share the token.
        source.residency.run(source.residency.know, [token])
        directory.persist(token.key, fetcher(source, token), partial(_check, entry, allow_pickle))
    return token.key


def _check(entry: Entry, allow_pickle: bool, blob: Blob) -> None:
    if blob.pickled is not None and not allow_pickle:
        path, _, kind = blob.pickled.rpartition(": ")
        raise PickleRefusedError(
            f"{entry!r} takes pickle, which is not persisted unless allow_pickle=True: {path} is of "
            f"the type {kind}. Register the type (fbcache.register), and it needs none",
            path,
        )


def release(source: Source, captures: list[Capture]) -> None:
    """Give up all that ``captures`` have."""
    while captures:
        source.residency.run(source.residency.release_capture, captures.pop())
