"""The manifest of a checkpoint: one file that says which names there are, and where their values lie.

Guarantees: :func:`pack` makes no manifest that :func:`unpack` refuses. :func:`unpack` and
:func:`unpack_head` take any bytes at all and return what fits the file exactly, or raise
:class:`CorruptCheckpointError`; they run no code but that of registered classes which occur in names.
A count or length that lies allocates nothing. What the file really holds takes up to twice its length
where names are texts; other names, notes on pickle and ``meta`` take what Python's objects for them
do, and ``naming.MAX_TREE`` and ``meta.MAX_PARTS`` bound that of each name and of ``meta``.

All integers are little-endian.

========== ======== =======================================================================
offset     bytes    content
========== ======== =======================================================================
0          6        magic, ``89 46 42 4d 0d 0a`` (``\\x89FBM\\r\\n``)
6          2        format: 2 where there are packs, else 1; in any later one, magic and format
                    stand here too
8          8        length of the head, H
16         8        length of the body, B
24         8        xxh3_64 of bytes 0 to 24 followed by the head
32         8        xxh3_64 of the body
40         H        head: a msgpack map of the fields of :class:`Head`, ``created`` in
                    nanoseconds
40 + H     B        body, see :mod:`body`
========== ======== =======================================================================

The head comes first, with a checksum of its own, so that a listing reads no more than that.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgpack  # type: ignore[import-untyped]
from xxhash import xxh3_64

from fbcache.checkpoint import naming
from fbcache.checkpoint.body import MOST, Blob, Body, Pack, Totals, files_of, pack_body, packs_of, unpack_body
from fbcache.checkpoint.meta import MAX_PARTS, check_meta, check_parts
from fbcache.codec import Buffer
from fbcache.errors import CorruptCheckpointError, UnsupportedTypeError

__all__ = [
    "FORMAT",
    "PREFIX_SIZE",
    "Blob",
    "Head",
    "Manifest",
    "Pack",
    "check_meta",
    "files_of",
    "head_size",
    "pack",
    "places_in",
    "unpack",
    "unpack_head",
]

#: The newest format that is read.
FORMAT: Final = 2
MAGIC: Final = b"\x89FBM\r\n"  # not text, and damaged by any transfer that takes it for text

_START: Final = struct.Struct("<6sH")
_PREFIX: Final = struct.Struct("<6sHQQQQ")
_SUMMED: Final = 24  # bytes of the prefix that the head's checksum covers
_NANO: Final = 10**9

PREFIX_SIZE: Final = _PREFIX.size


@dataclass(frozen=True, slots=True)
class Head:
    """What a listing tells of a checkpoint.

    Attributes
    ----------
    version : int
        Its number in its directory.
    tag : str or None
        Its name, if it was given one.
    created : float
        When, in seconds since the epoch.
    count : int
        How many names it has.
    nbytes, disk_bytes : int
        Sums over its names of :attr:`Blob.nbytes` and :attr:`Blob.disk_bytes`.
    blobs_written, bytes_written : int
        What its save added to the directory.
    meta : dict or None
        The user's notes; see :func:`~fbcache.checkpoint.meta.check_meta`.
    """

    version: int
    tag: str | None
    created: float
    count: int
    nbytes: int
    disk_bytes: int
    blobs_written: int
    bytes_written: int
    meta: dict[Any, Any] | None


@dataclass(frozen=True)
class Manifest:
    """All that the file holds; names, keys and blobs have one length and order.

    Names are distinct; keys need not be. Out of :func:`unpack`, keys and blobs are made anew each
    time one is asked for, out of the file's own bytes, which stay alive as long.
    """

    head: Head
    names: Sequence[Hashable]
    keys: Sequence[UUID]
    blobs: Sequence[Blob]

    @cached_property
    def files(self) -> frozenset[UUID]:
        """Keys of the files that it needs: of blobs that have files of their own, and of packs."""
        return files_of(self.keys, self.blobs)

    @cached_property
    def packs(self) -> frozenset[Pack]:
        """The packs that it needs."""
        return packs_of(self.blobs)


def places_in(
    manifests: Mapping[int, Manifest], files: Container[UUID]
) -> tuple[dict[UUID, Blob], dict[UUID, Blob]]:
    """Return what the newest of ``manifests`` say of blobs with files of their own, and of packed ones.

    A pack that is among ``files`` comes before a newer one that is not. Where manifests tell different things
    of a pack, the newest counts, so that no checkpoint made of what is returned has one pack twice.
    """
    apart: dict[UUID, Blob] = {}
    packed: dict[UUID, Blob] = {}
    told: dict[UUID, Pack] = {}
    missing: set[UUID] = set()
    for version in sorted(manifests, reverse=True):
        manifest = manifests[version]
        other = {pack for pack in manifest.packs if told.setdefault(pack.key, pack) != pack}
        gone = {pack for pack in manifest.packs if pack.key not in files}
        for key, blob in zip(manifest.keys, manifest.blobs, strict=True):
            if blob.pack is None:
                apart.setdefault(key, blob)
            elif other and blob.pack in other:
                continue
            elif key not in packed or (key in missing and blob.pack not in gone):
                packed[key] = blob
                if gone and blob.pack in gone:
                    missing.add(key)
                else:
                    missing.discard(key)
    return apart, packed


_FIELDS: Final = tuple(field.name for field in fields(Head))
_HEAD_PARTS: Final = MAX_PARTS + 2 * len(_FIELDS)


# ---------------------------------------------------------------------------------- writing


def pack(manifest: Manifest) -> list[bytes]:
    """Return the pieces of the file, to be written one after the other.

    Raises
    ------
    UnsupportedTypeError, PickleRefusedError
        A name, the tag or part of ``meta`` cannot be kept; both are a ``TypeError``.
    ValueError, OverflowError
        Parts of the manifest do not fit each other, two names are one, or a number is out of bounds.
    """
    head = _pack_head(manifest.head)
    written, body = pack_body(Body(manifest.names, manifest.keys, manifest.blobs), _totals(manifest.head))
    summed = _PREFIX.pack(MAGIC, written, len(head), sum(map(len, body)), 0, 0)[:_SUMMED]
    sums = struct.pack("<QQ", _checksum((summed, head)), _checksum(body))
    return [summed + sums, head, *body]


def _totals(head: Head) -> Totals:
    return Totals(head.count, head.nbytes, head.disk_bytes)


def _checksum(pieces: Iterable[Buffer]) -> int:
    state = xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


def _pack_head(head: Head) -> bytes:
    tag = head.tag
    if tag is not None and (type(tag) is not str or not naming.is_text(tag)):
        raise UnsupportedTypeError(f"a tag is a text without lone surrogates, not {naming.shown(tag)}", "tag")
    check_meta(head.meta)
    values = {name: getattr(head, name) for name in _FIELDS}
    packed: bytes = msgpack.packb(values | {"created": round(Fraction(head.created) * _NANO)})
    _read_head(memoryview(packed))  # what could not be opened is not written
    return packed


# ---------------------------------------------------------------------------------- reading


def head_size(raw_prefix: Buffer, *, path: str) -> int:
    """Return how many bytes at the start of the file are prefix and head.

    The number is unchecked: hold it against the file's length before allocating that much.

    Parameters
    ----------
    raw_prefix : Buffer
        At least the first ``PREFIX_SIZE`` bytes of the file, where it has as many.

    Raises
    ------
    CorruptCheckpointError
        This is no manifest, or one of a format not known here.
    """
    with _reporting(path):
        return PREFIX_SIZE + _read_prefix(memoryview(raw_prefix).cast("B")).head


def unpack_head(raw: Buffer, *, path: str, version: int | None = None) -> Head:
    """Read the head alone.

    Parameters
    ----------
    raw : Buffer
        The start of the file, prefix and head at least.
    path : str
        The file, for messages.
    version : int, optional
        What the file's name says; another one inside is damage.

    Raises
    ------
    CorruptCheckpointError
        Anything does not match: magic, format, length, checksum, fields, version.
    """
    with _reporting(path):
        return _open(memoryview(raw).cast("B"), version)[0]


def unpack(raw: Buffer, *, path: str, version: int | None = None) -> Manifest:
    """Read the whole file.

    Parameters
    ----------
    raw : Buffer
        The file, which must not change as long as the manifest is in use.
    path, version
        As in :func:`unpack_head`.

    Raises
    ------
    CorruptCheckpointError
        Anything does not match: what :func:`unpack_head` checks, and the file's length, the body's
        checksum, columns and names. A name of a class that is not registered is one reason.
    """
    view = memoryview(raw).cast("B")
    with _reporting(path):
        head, prefix = _open(view, version)
        start = PREFIX_SIZE + prefix.head
        if view.nbytes != start + prefix.body:
            raise ValueError(f"it has {view.nbytes} bytes, where {start + prefix.body} were written")
        if _checksum((view[start:],)) != prefix.body_sum:
            raise ValueError("its body does not match the body's checksum")
        return Manifest(head, *unpack_body(view[start:], _totals(head), prefix.written))


@contextmanager
def _reporting(path: str) -> Iterator[None]:
    """Make one error of all that a file which is not what was written gives."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        # Our own are sentences; msgpack's say little without their type.
        reason = str(error) if type(error) is ValueError else repr(error)
        raise CorruptCheckpointError(reason, path=path) from error


class _Prefix(NamedTuple):
    """The format, lengths of head and body, and their checksums."""

    written: int
    head: int
    body: int
    head_sum: int
    body_sum: int


def _read_prefix(view: memoryview) -> _Prefix:
    if view.nbytes < _START.size or bytes(view[: len(MAGIC)]) != MAGIC:
        raise ValueError("it does not start as a manifest does")
    _, written = _START.unpack_from(view)
    if written > FORMAT:
        newer = f"it was written by a newer fbcache, in format {written}"
        raise ValueError(f"{newer}, where this one reads up to {FORMAT}: upgrade fbcache")
    if written < 1:
        raise ValueError(f"its format is {written}, which there never was")
    if view.nbytes < PREFIX_SIZE:
        raise ValueError("it is too short for a manifest")
    return _Prefix(*_PREFIX.unpack_from(view)[1:])


def _open(view: memoryview, version: int | None) -> tuple[Head, _Prefix]:
    prefix = _read_prefix(view)
    if prefix.head > view.nbytes - PREFIX_SIZE:
        raise ValueError(f"its head should take {prefix.head} bytes, of which not all are there")
    packed = view[PREFIX_SIZE : PREFIX_SIZE + prefix.head]
    if _checksum((view[:_SUMMED], packed)) != prefix.head_sum:
        raise ValueError("its head does not match the head's checksum")
    head = _read_head(packed)
    if version is not None and head.version != version:
        raise ValueError(f"it holds version {head.version}, where its name says {version}")
    return head, prefix


def _read_head(packed: memoryview) -> Head:
    check_parts(packed, _HEAD_PARTS)
    values = msgpack.unpackb(packed, strict_map_key=False, max_ext_len=0)
    if type(values) is not dict or values.keys() != set(_FIELDS):
        raise ValueError("its head does not have the fields that it should")
    for name in _FIELDS:
        if name not in ("tag", "meta") and not _is_number(values[name]):
            raise ValueError(f"its head's {name} is {naming.shown(values[name])}")
    if values["tag"] is not None and type(values["tag"]) is not str:
        raise ValueError("its tag is no text")
    check_meta(values["meta"])
    # Of integers, the quotient is the nearest float; of floats it may be the one beside it.
    return Head(**values | {"created": values["created"] / _NANO})


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST
