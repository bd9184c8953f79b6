"""``fbcache ls``: the checkpoints of a tracked directory, or the entries of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import click

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Head, Manifest
from fbcache.checkpoint.places import version_of
from fbcache.checkpoint.tracked import TrackedDirectory
from fbcache.demo.report import size
from fbcache.errors import CorruptCheckpointError
from fbcache.shell import screen
from fbcache.shell.ending import Exit, ending
from fbcache.shell.names import name_fields, name_text
from fbcache.shell.opening import Choice, choice_options, directory_argument, held, manifests, reading
from fbcache.shell.screen import Column


@click.command()
@directory_argument
@choice_options
@ending()
def ls(directory: str, as_json: bool, version: int | None, tag: str | None) -> None:
    """List the checkpoints in DIR, newest last; with --version or --tag, the entries of one.

    An entry is shown as "fbcache info" and "fbcache export" take its name.

    Exit codes: 0, 1 a checkpoint is damaged, 2 there is no such directory or checkpoint, 3 it could not
    be read.
    """
    choice = Choice(version, tag)
    with reading(directory) as (tracked, inner):
        if version is None and tag is None:
            sys.exit(_list_versions(tracked, inner, as_json))
        with held(inner, choice) as manifest:
            _list_entries(inner, manifest, as_json)


# -------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True, slots=True)
class Version:
    """A checkpoint, as it is listed; ``damaged`` says what is wrong with one that cannot be read."""

    version: int
    tag: str | None = None
    created: str | None = None
    entries: int | None = None
    nbytes: int | None = None
    disk_bytes: int | None = None
    blobs_written: int | None = None
    bytes_written: int | None = None
    path: str = ""
    damaged: str | None = None

    @classmethod
    def of(cls, directory: Directory, head: Head, tags: dict[str, int]) -> Version:
        """Return what is told of a checkpoint; ``tags`` says which version has a tag now."""
        return cls(
            version=head.version,
            tag=head.tag if head.tag is not None and tags.get(head.tag) == head.version else None,
            created=datetime.fromtimestamp(head.created, UTC).isoformat(),
            entries=head.count,
            nbytes=head.nbytes,
            disk_bytes=head.disk_bytes,
            blobs_written=head.blobs_written,
            bytes_written=head.bytes_written,
            path=directory.places.manifest(head.version),
        )

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of its row."""
        if self.damaged is not None:
            return str(self.version), "", "damaged", *[""] * 4
        return (
            str(self.version),
            self.tag or "",
            local_time(self.created),
            f"{self.entries:,}",
            size(self.nbytes or 0),
            f"{self.blobs_written:,}",
            size(self.bytes_written or 0),
        )


_VERSION_COLUMNS = (
    Column("version", right=True),
    Column("tag", fold=True),
    Column("created"),
    Column("entries", right=True),
    Column("size", right=True),
    Column("new blobs", right=True),
    Column("new bytes", right=True),
)


def _list_versions(tracked: TrackedDirectory, directory: Directory, as_json: bool) -> Exit:
    found, damaged = manifests(directory)
    tags = tags_of(manifest.head for manifest in found)
    listed = [Version.of(directory, manifest.head, tags) for manifest in found]
    listed += [_damaged(error) for error in damaged]
    listed.sort(key=lambda version: version.version)
    if as_json:
        screen.tell_json({"directory": directory.root, "versions": [asdict(version) for version in listed]})
    elif listed:
        bad = [number for number, version in enumerate(listed) if version.damaged is not None]
        screen.tell_table(_VERSION_COLUMNS, [version.row for version in listed], bad=bad)
        for version in (listed[number] for number in bad):
            message = f"version {version.version} is damaged: {version.damaged} ({version.path})"
            screen.tell(message, style="red")
    else:
        screen.tell(f"no checkpoints in {directory.root}; {_blobs(len(tracked))}")
    return Exit.DAMAGED if damaged else Exit.DONE


def tags_of(newest_first: Iterable[Head]) -> dict[str, int]:
    """Return which version has each tag: the newest that was given it."""
    tags: dict[str, int] = {}
    for head in newest_first:
        if head.tag is not None:
            tags.setdefault(head.tag, head.version)
    return tags


def tags_in(directory: Directory) -> dict[str, int]:
    """Return which version of a directory has each tag."""
    return tags_of(head for _, head in directory.versions.heads() if isinstance(head, Head))


def _damaged(error: CorruptCheckpointError) -> Version:
    number = version_of(os.path.basename(error.path))
    return Version(number or 0, path=error.path, damaged=error.reason)


def _blobs(count: int) -> str:
    if count == 0:
        return "it is empty"
    return "1 blob is in it by its key" if count == 1 else f"{count:,} blobs are in it by their keys"


def local_time(iso: str | None) -> str:
    """Return a time as people here write it."""
    return "" if iso is None else f"{datetime.fromisoformat(iso).astimezone():%Y-%m-%d %H:%M:%S}"


# ------------------------------------------------------------------------------- entries

_ENTRY_COLUMNS = (
    Column("name", fold=True),
    Column("in memory", right=True),
    Column("on disk", right=True),
    Column("codec"),
    Column("pickled", fold=True),
)


def _list_entries(directory: Directory, manifest: Manifest, as_json: bool) -> None:
    version = Version.of(directory, manifest.head, tags_in(directory))
    if as_json:
        entries = [_fields(manifest, row) for row in range(manifest.head.count)]
        screen.tell_json({"directory": directory.root, "version": asdict(version), "entries": entries})
        return
    screen.tell(_headline(version))
    rows = [
        (name_text(name), size(blob.nbytes), size(blob.disk_bytes), blob.codec, blob.pickled or "")
        for name, blob in zip(manifest.names, manifest.blobs, strict=True)
    ]
    screen.tell_table(_ENTRY_COLUMNS, rows)


def _fields(manifest: Manifest, row: int) -> dict[str, Any]:
    blob = manifest.blobs[row]
    return {
        **name_fields(manifest.names[row]),
        "key": str(manifest.keys[row]),
        "nbytes": blob.nbytes,
        "disk_bytes": blob.disk_bytes,
        "codec": blob.codec,
        "pickled": blob.pickled,
    }


def _headline(version: Version) -> str:
    """Return a checkpoint in one line."""
    tag = "" if version.tag is None else f" ({version.tag})"
    entries = "1 entry" if version.entries == 1 else f"{version.entries:,} entries"
    total = size(version.nbytes or 0)
    return f"version {version.version}{tag}, saved {local_time(version.created)}: {entries}, {total}"
