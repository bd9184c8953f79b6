"""Blobs of a tracked directory copied into a pool's store, for entries that cannot use them where they lie.

That is so of what is packed, and of everything where the store lends no files.

Guarantees
----------
- All are copied or none: whatever comes in between, an interrupt included, the claim has a share of each copy
  that was made, and so :meth:`~fbcache.adoption.Adoption.end_claim` has those deleted which no entry has.
- A blob that is damaged or gone keeps no other from being copied. Its entry's load raises what was found.
- Memory is bounded by what the pool's threads copy at a time: each, 256 small blobs or one large one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Final, Protocol
from uuid import UUID

from fbcache.adoptee import Adoptee, Claim
from fbcache.checkpoint.fanout import FanOut
from fbcache.checkpoint.manifest import Blob
from fbcache.checkpoint.packs import read_records
from fbcache.checkpoint.places import Places
from fbcache.codec.frames import Frames
from fbcache.entry import Token
from fbcache.errors import CorruptBlobError
from fbcache.residency import Residency
from fbcache.spill import LostToken
from fbcache.store.blobfile import MAP_LEAST, BlobFile
from fbcache.store.disk import Disk
from fbcache.store.protocol import BlobStore, FileBacked, Loan, Packing
from fbcache.store.syncing import Job
from fbcache.store.trouble import storage_error
from fbcache.waiting import LOOK_UP, Waiter
from fbcache.workers import Workers

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

#: Blobs that are copied in one go.
_TOGETHER: Final = 256


class Guest(Adoptee):
    """An entry to be of which the blob is in a tracked directory: in a pack of it, or lent.

    Attributes
    ----------
    blob : Blob
        What the manifest says of it; of a lent blob, or its header.
    """

    __slots__ = ("blob",)

    def __init__(
        self, name: Hashable, key: UUID, blob: Blob, loan: Loan | None, allow_pickle: bool
    ) -> None:
        token = Token(key, blob.disk_bytes, unverified=True, allow_pickle=allow_pickle)
        super().__init__(name, token, blob.nbytes, loan)
        self.blob = blob


class Host(Protocol):
    """The pool whose store the copies are for."""

    residency: Residency
    store: BlobStore
    workers: Workers


class Origin:
    """Where packs are read.

    Parameters
    ----------
    disk : Disk
        The system calls.
    places : Places
        The tracked directory's, for messages.
    root : str, optional
        A directory of links to its files, if those are what is kept.
    """

    def __init__(self, disk: Disk, places: Places, root: Callable[[UUID], str] | None = None) -> None:
        self.disk = disk
        self._places = places
        self._root = root

    def read(self, guests: Sequence[Guest]) -> Iterator[Frames | CorruptBlobError]:
        """Return the frames of blobs of one pack, or what is wrong with each.

        Raises
        ------
        StorageError
            It could not be read.
        """
        pack = guests[0].blob.pack
        assert pack is not None
        places = self._places if self._root is None else Places(self._root(pack.key))
        for found in read_records(self.disk, places, pack, [(g.token.key, g.blob) for g in guests]):
            if isinstance(found, CorruptBlobError) and self._root is not None:
                path = self._places.blob(pack.key)  # the link is gone before anybody could look at it
                yield CorruptBlobError(found.reason, key=found.key, path=path)
            else:
                yield found


def reserve(pool: Host, guests: Sequence[Guest], claim: Claim) -> list[Guest]:
    """Wait until all that the guests need is free, and have it; return those that have to be copied."""
    residency, lends = pool.residency, isinstance(pool.store, FileBacked)
    while True:
        step = residency.run(residency.reserve, guests, claim, lends=lends)
        if not isinstance(step, Waiter):
            return step
        # One whose claim was abandoned wakes nobody.
        step.sleep(LOOK_UP)


def copy(pool: Host, origin: Origin, guests: Sequence[Guest], claim: Claim) -> None:
    """Copy the blobs of ``guests``, whose keys ``claim`` has.

    Raises
    ------
    DiskFullError, StorageError
        Some could not be read or written.
    """
    copying = _Copying(pool.store, origin, claim)
    jobs: list[Job] = [partial(copying.copy, part) for part in _parts(guests)]
    if len(jobs) == 1:  # a copy that an interrupt comes upon here, before a claim has it, would be lost
        jobs.append(lambda: None)
    failed = [outcome for outcome in FanOut(pool.workers)(jobs) if outcome is not None]
    if failed:
        pool.residency.check_open()  # the store went with the pool
        raise failed[0]


def _parts(guests: Iterable[Guest]) -> Iterator[list[Guest]]:
    """What is to be copied at a time: packed blobs as they lie in their packs."""
    packs: dict[UUID, list[Guest]] = {}
    small: list[Guest] = []
    for guest in guests:
        if guest.blob.pack is not None:
            packs.setdefault(guest.blob.pack.key, []).append(guest)
        elif guest.blob.disk_bytes < MAP_LEAST:
            small.append(guest)
        else:
            yield [guest]
    for members in packs.values():
        members.sort(key=attrgetter("blob.offset"))
    for members in (*packs.values(), small):
        for at in range(0, len(members), _TOGETHER):
            yield members[at : at + _TOGETHER]


class _Copying:
    """Copies parts, on threads of the pool's."""

    def __init__(self, store: BlobStore, origin: Origin, claim: Claim) -> None:
        self._store = store
        self._packing = store if isinstance(store, Packing) else None
        self._origin = origin
        self._claim = claim
        self._failed = False

    def copy(self, part: Sequence[Guest]) -> None:
        """Copy these, unless others have failed."""
        if self._failed:
            return
        try:
            self._copy(part)
        except BaseException:
            self._failed = True
            raise

    def _copy(self, part: Sequence[Guest]) -> None:
        together: list[tuple[Guest, Frames]] = []
        packed = part[0].blob.pack is not None
        all_found = self._origin.read(part) if packed else map(_read_file, part)
        for guest, found in zip(part, all_found, strict=True):
            if isinstance(found, CorruptBlobError):
                token = LostToken(guest.token.key, guest.blob.disk_bytes, found)
                token.shares, token.allow_pickle = 0, guest.token.allow_pickle
                guest.token = token
            elif self._packing is not None and found.nbytes <= self._packing.small:
                together.append((guest, found))
            else:
                self._hand_over(guest, self._store.write(guest.token.key, found), None)
        if together and self._packing is not None:
            slots, sizes = self._packing.append([frames for _, frames in together])
            for (guest, _), slot, nbytes in zip(together, slots, sizes, strict=True):
                self._hand_over(guest, nbytes, slot)

    def _hand_over(self, guest: Guest, nbytes: int, slot: int | None) -> None:
        former = guest.token
        guest.token = Token(
            former.key, nbytes, slot=slot, unverified=former.unverified, allow_pickle=former.allow_pickle
        )
        guest.copied = True
        self._claim.tokens.append(guest.token)


def _read_file(guest: Guest) -> Frames | CorruptBlobError:
    """Read a lent blob, whose file is one's own."""
    loan, disk = guest.loan, Disk()
    assert loan is not None
    try:
        fd = disk.open(loan.path, _READ)
        try:
            file = BlobFile(disk, fd, guest.token.key, loan.path, loan.digest)
            return file.read(may_map=True, writable=False, verify=True)
        finally:
            disk.close(fd)
    except CorruptBlobError as error:
        return error
    except FileNotFoundError:
        return CorruptBlobError("the file is gone", key=guest.token.key, path=loan.path)
    except OSError as error:
        raise storage_error("read", loan.path, error, disk) from error
