"""``fbcache info``: one entry of a checkpoint. No code from the directory runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import click
from rich.text import Text
from rich.tree import Tree

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Blob, Manifest
from fbcache.codec import MsgpackCodec
from fbcache.demo.report import size
from fbcache.errors import CorruptBlobError
from fbcache.shell import screen
from fbcache.shell.blobs import load, opened, path_of
from fbcache.shell.ending import Exit, ending
from fbcache.shell.listing import Version, local_time, tags_of
from fbcache.shell.names import name_fields, name_text
from fbcache.shell.opening import (
    Choice,
    choice_options,
    directory_argument,
    held,
    manifests,
    reading,
    row_of,
)
from fbcache.shell.outline import Part, outline


@click.command()
@directory_argument
@click.argument("name")
@choice_options
@click.option("--verify", "whole", is_flag=True, help="Hold the content against its checksums too.")
@ending()
def info(directory: str, name: str, as_json: bool, version: int | None, tag: str | None, whole: bool) -> None:
    """Tell what the entry NAME of DIR is, without running code from its file.

    The newest checkpoint is looked into, or the one that is chosen. NAME is a text, or else a Python
    literal: 3, "('tile', 3)". Names are shown by "fbcache ls DIR --version N". Put -- before one that
    starts with a hyphen.

    Exit codes: 0, 1 the entry or its checkpoint is damaged, 2 there is no such directory,
    checkpoint or entry, 3 it could not be read.
    """
    choice = Choice(version, tag)
    with reading(directory) as (_, inner), held(inner, choice) as manifest:
        row = row_of(inner, manifest, name)
        details = _look(inner, manifest, row, whole)
    if as_json:
        screen.tell_json(details.fields())
    else:
        details.tell()
    sys.exit(Exit.DONE if details.damaged is None else Exit.DAMAGED)


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A version that has an entry of that name, and whether it is the same blob there."""

    version: int
    tag: str | None
    created: str | None
    key: str
    same: bool


@dataclass(frozen=True, slots=True)
class Details:
    """All that is told of an entry; ``buffers`` and ``content`` are None where its blob is damaged."""

    directory: str
    version: Version
    name: Hashable
    key: UUID
    path: str
    blob: Blob
    buffers: list[int] | None
    content: Part | None
    verified: bool
    damaged: str | None
    versions: list[Occurrence]
    unreadable: list[int]

    def fields(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "directory": self.directory,
            "version": asdict(self.version),
            **name_fields(self.name),
            "key": str(self.key),
            "path": self.path,
            "offset": None if self.blob.pack is None else self.blob.offset,
            "nbytes": self.blob.nbytes,
            "disk_bytes": self.blob.disk_bytes,
            "codec": self.blob.codec,
            "pickled": self.blob.pickled,
            "buffers": None if self.buffers is None else len(self.buffers),
            "buffer_bytes": None if self.buffers is None else sum(self.buffers),
            "verified": self.verified,
            "damaged": self.damaged,
            "content": None if self.content is None else self.content.fields(),
            "versions": [asdict(each) for each in self.versions],
            "unreadable_versions": self.unreadable,
        }

    def tell(self) -> None:
        """Print it for people."""
        screen.tell(name_text(self.name), style="bold")
        screen.tell_facts(self._facts())
        if self.content is not None and self.content.parts:
            screen.tell("")
            screen.tell_rich(_tree(self.content))
        if self.damaged is not None:
            screen.tell(f"damaged: {self.damaged}", style="red")
        for version in self.unreadable:
            screen.say(f"Warning: version {version} cannot be read; fbcache ls tells why", style="yellow")

    def _facts(self) -> Iterable[tuple[str, str]]:
        blob = self.blob
        yield "content", self.content.text if self.content is not None else "not known"
        yield "in memory", _exactly(blob.nbytes)
        yield "on disk", _exactly(blob.disk_bytes)
        lengths = self.buffers
        if lengths is not None:
            yield "buffers", f"{len(lengths):,}, {_exactly(sum(lengths))}" if lengths else "none"
        yield "codec", blob.codec
        yield "pickled", "no" if blob.pickled is None else f"{blob.pickled}; loading it runs code"
        if self.damaged is None:
            header = "that of the header matches; --verify checks all"
            yield "checksums", "all match" if self.verified else header
        yield "key", str(self.key)
        packed = "" if blob.pack is None else f", with others, from byte {blob.offset:,} on"
        yield "file", f"{self.path}{packed}"
        tag = "" if self.version.tag is None else f" ({self.version.tag})"
        yield "of version", f"{self.version.version}{tag}, saved {local_time(self.version.created)}"
        same = [each.version for each in self.versions if each.same]
        others = [each.version for each in self.versions if not each.same]
        yield "in versions", ranges(same) + (f"; with other content in {ranges(others)}" if others else "")


def _look(directory: Directory, manifest: Manifest, row: int, whole: bool) -> Details:
    name, key, blob = manifest.names[row], manifest.keys[row], manifest.blobs[row]
    whole = whole or blob.pack is not None  # of a record nothing is told before all of it is checked
    buffers: list[int] | None = None
    content: Part | None = None
    damaged: str | None = None
    try:
        codec, tree, buffers = _head(directory, key, blob)
        content = _outline(codec, tree)
        if whole and blob.pack is None:  # else it was loaded for its head
            load(directory, key, blob)
    except CorruptBlobError as error:
        damaged = error.reason
    found, errors = manifests(directory)
    tags = tags_of(each.head for each in found)
    return Details(
        directory=directory.root,
        version=Version.of(directory, manifest.head, tags),
        name=name,
        key=key,
        path=path_of(directory, key, blob),
        blob=blob,
        buffers=buffers,
        content=content,
        verified=whole and damaged is None,
        damaged=damaged,
        versions=list(_occurrences(directory, reversed(found), name, key, tags)),
        unreadable=[int(os.path.basename(error.path).partition(".")[0]) for error in reversed(errors)],
    )


def _head(directory: Directory, key: UUID, blob: Blob) -> tuple[str, bytes, list[int]]:
    """The codec of a blob, its tree, and the lengths of its buffers."""
    if blob.pack is not None:
        frames = load(directory, key, blob)
        return frames.codec, bytes(frames.tree), [memoryview(buffer).nbytes for buffer in frames.buffers]
    with opened(directory, key, blob) as file:
        header = file.header()
    if header.digest != blob.digest:
        raise CorruptBlobError("it is another blob than the checkpoint names, under the same key")
    return header.codec, header.tree, [span.length for span in header.spans]


def _outline(codec: str, tree: bytes) -> Part:
    if codec != MsgpackCodec.name:
        return Part(f"known to the codec {codec} alone")
    try:
        return outline(tree)
    except ValueError as error:
        return Part(str(error))


def _occurrences(
    directory: Directory, found: Iterable[Manifest], name: Hashable, key: UUID, tags: dict[str, int]
) -> Iterable[Occurrence]:
    for manifest in found:
        try:
            there = manifest.keys[list(manifest.names).index(name)]
        except ValueError:
            continue
        version = Version.of(directory, manifest.head, tags)
        yield Occurrence(version.version, version.tag, version.created, str(there), there == key)


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ``1-3, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _exactly(nbytes: int) -> str:
    return f"{size(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1000 else f"{nbytes} bytes"


def _tree(part: Part) -> Tree:
    tree = Tree(Text(screen.shown(f"{part.label}  {part.text}")), hide_root=not part.label)
    for each in part.parts:
        tree.children.append(_tree(each))
    left = (part.count or 0) - len(part.parts)
    if part.parts and left > 0:
        tree.add(Text(f"and {left:,} more"))
    return tree
