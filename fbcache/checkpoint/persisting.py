"""One entry given a durable place, outside any checkpoint.

Guarantee: the blob is in the tracked directory whole, and pinned there, or nothing is. It is durable once
``TrackedDirectory.sync()`` has returned.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from uuid import UUID

from fbcache.captures import Capture
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.saver import Source, bring_one
from fbcache.checkpoint.tracked import TrackedDirectory, directory_of
from fbcache.entry import Entry, Token
from fbcache.errors import PickleRefusedError
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
        capture = captures[0]
        capture.wait()
        capture.raise_error()
        with directory.writing():
            return _bring_in(source, directory, entry, capture, allow_pickle)
    finally:
        _release(source, captures)


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
            captures[0].raise_error()
            with directory.writing():
                key = _bring_in(source, directory, entry, captures[0], allow_pickle)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(key)
        finally:
            _release(source, captures)

    future.set_running_or_notify_cancel()
    try:
        residency = source.residency
        residency.run(residency.capture, [entry], captures, lambda: source.workers.submit(finish))
    except BaseException:
        _release(source, captures)
        raise
    return future


def _bring_in(
    source: Source, directory: Directory, entry: Entry, capture: Capture, allow_pickle: bool
) -> UUID:
    token = capture.token
    assert token is not None
    with telling(source.residency.log, entry, directory.root) as outcome:
        outcome.key, outcome.nbytes = token.key, token.nbytes
        _claim_and_pin(source, directory, entry, token, allow_pickle)
    return token.key


def _claim_and_pin(
    source: Source, directory: Directory, entry: Entry, token: Token, allow_pickle: bool
) -> None:
    claimed: list[UUID] = []
    try:
        (blob,) = directory.claim([token.key], claimed)
        if blob is None:
            blob = bring_one(source, directory, token)
        if blob.pickled is not None and not allow_pickle:
            path, _, kind = blob.pickled.rpartition(": ")
            raise PickleRefusedError(
                f"{entry!r} takes pickle, which is not persisted unless allow_pickle=True: {path} is of "
                f"the type {kind}. Register the type (fbcache.register), and it needs none",
                path,
            )
        directory.pin(token.key)
        source.residency.run(source.residency.know, [token])
    finally:
        directory.disclaim(claimed)


def _release(source: Source, captures: list[Capture]) -> None:
    while captures:
        source.residency.run(source.residency.release_capture, captures[-1])
        captures.pop()
