"""Opening the tracked directory that a command is given, and choosing a checkpoint and an entry in it.

Guarantee: nothing here makes a directory. What is no tracked directory is refused before it is opened, so
that no command writes to a place that only looks like one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Manifest
from fbcache.checkpoint.places import OWN
from fbcache.checkpoint.restoring import hold
from fbcache.checkpoint.tracked import TrackedDirectory, directory_of
from fbcache.errors import CheckpointNotFoundError, CorruptCheckpointError
from fbcache.shell import names
from fbcache.shell.ending import Refused
from fbcache.store.disk import DISK
from fbcache.store.trouble import storage_error

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Choice:
    """Which checkpoint: by number, by tag, or the newest."""

    version: int | None
    tag: str | None

    def __post_init__(self) -> None:
        if self.version is not None and self.tag is not None:
            raise Refused("--version and --tag each choose a checkpoint; give one of them")
        if self.tag == "":
            raise Refused("--tag takes a tag of at least one character")


def directory_argument(command: Command) -> Command:
    """Give a command its DIR and ``--json``."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    return click.argument("directory", metavar="DIR", type=click.Path())(as_json(command))


def choice_options(command: Command) -> Command:
    """Give a command ``--version`` and ``--tag``."""
    version = click.option(
        "--version", type=click.IntRange(min=1), metavar="N", help="The checkpoint of this number."
    )
    tag = click.option("--tag", metavar="TAG", help="The checkpoint of this tag.")
    return version(tag(command))


# --------------------------------------------------------------------------- directories


def check(path: str) -> str:
    """Return the real path of the tracked directory at ``path``.

    Raises
    ------
    Refused
        There is none.
    StorageError
        It cannot be looked at.
    """
    root = os.path.realpath(os.path.expanduser(path))
    try:
        if path and stat.S_ISDIR(DISK.lstat(f"{root}/{OWN}").st_mode):
            return root
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise storage_error("look into", root, error, DISK) from error
    raise Refused(_why_none(path, root))


def _why_none(path: str, root: str) -> str:
    if not path or not os.path.lexists(root):
        return f"there is no directory {path!r}; give the one that checkpoints were saved to"
    if not os.path.isdir(root):
        return f"{path} is a file; give the directory that checkpoints were saved to"
    return f"{path} is no tracked directory, having no {OWN} in it; give the one that was saved to"


@contextmanager
def reading(path: str) -> Iterator[tuple[TrackedDirectory, Directory]]:
    """Open a tracked directory for reading, which takes no lock."""
    with TrackedDirectory(check(path), readonly=True) as tracked:
        yield tracked, directory_of(tracked, write=False)


# ------------------------------------------------------------------ checkpoints, entries


@contextmanager
def held(directory: Directory, choice: Choice) -> Iterator[Manifest]:
    """Read a checkpoint, and keep what it names from being removed meanwhile.

    Raises
    ------
    CheckpointNotFoundError
        There is none like that.
    CorruptCheckpointError
        It cannot be read.
    """
    try:
        version, manifest = hold(directory, choice.version, choice.tag, None)
    except CorruptCheckpointError as error:
        advice = "choose another version by --version; fbcache ls shows which there are"
        path = f"{directory.places.checkpoints}/{os.path.basename(error.path)}"  # not that of a link to it
        raise CorruptCheckpointError(f"{error.reason}; {advice}", path=path) from error
    try:
        yield manifest
    finally:
        directory.loans.let_go_of_version(version)


def row_of(directory: Directory, manifest: Manifest, text: str) -> int:
    """Return the place in ``manifest`` of the entry that ``text`` names.

    Raises
    ------
    Refused
        It has none; the message names similar ones, or a version that has it.
    """
    row = names.find(manifest.names, text)
    if row is not None:
        return row
    version = manifest.head.version
    message = f"version {version} in {directory.root} has no entry named {text!r}"
    for other in manifests(directory)[0]:
        if names.find(other.names, text) is not None:
            raise Refused(f"{message}, but version {other.head.version} has: --version {other.head.version}")
    if found := names.similar(manifest.names, text):
        raise Refused(f"{message}; did you mean {' or '.join(found)}?")
    raise Refused(f"{message}; fbcache ls {directory.root} --version {version} lists those it has")


def manifests(directory: Directory) -> tuple[list[Manifest], list[CorruptCheckpointError]]:
    """Return all checkpoints that can be read, newest first, and what is wrong with the others."""
    found, damaged = [], []
    for version in reversed(directory.versions.numbers()):
        try:
            found.append(directory.versions.read(version))
        except CheckpointNotFoundError:  # forgotten meanwhile
            pass
        except CorruptCheckpointError as error:
            damaged.append(error)
    return found, damaged
