"""Entries from a tracked directory by their keys, each owned as by a handle. Nothing is decoded.

Guarantees
----------
- All that was asked for comes, or nothing changes.
- A key that has no file of its own is found through the newest checkpoint that has it, and copied.
- What an entry needs of the directory is kept there until it needs it no more (:mod:`.loans`).
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from uuid import UUID

from fbcache.checkpoint.blobset import read_header
from fbcache.checkpoint.copying import Guest, Origin
from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.loans import LinkedLoan
from fbcache.checkpoint.manifest import Blob, Pack
from fbcache.checkpoint.packs import CODEC
from fbcache.checkpoint.presence import places_of
from fbcache.checkpoint.restoring import ATTEMPTS, refuse_pickle
from fbcache.checkpoint.taking_in import Target, return_unused, take_in
from fbcache.entry import MISSING
from fbcache.store.trouble import storage_error


def register(
    pool: Target,
    directory: Directory,
    keys: Sequence[UUID],
    name: Hashable,
    *,
    replace: bool,
    allow_pickle: bool,
) -> list[Guest]:
    """Bring blobs into ``pool`` by their keys, each as an entry owned as by a handle."""
    pool.residency.check_open()
    guests: dict[UUID, Guest] = {}
    packs: dict[UUID, LinkedLoan] = {}
    try:
        for key in keys:
            guest = _linked(directory, key, name, allow_pickle)
            if guest is not None:
                guests[key] = guest
        packed = [key for key in keys if key not in guests]
        for key, blob in _hold_packed(directory, packed, packs).items():
            guests[key] = _packed(key, blob, name, allow_pickle)
        in_order = [guests[key] for key in keys]
        take_in(pool, in_order, replace, _linked_packs(directory, packs), keep=True)
    finally:
        return_unused(guests.values())
        for loan in packs.values():
            loan.release()
    return in_order


def _linked(directory: Directory, key: UUID, name: Hashable, allow_pickle: bool) -> Guest | None:
    """What the file of ``key`` is to become; None where there is no such file."""
    if not isinstance(key, UUID):
        raise TypeError(f"a key is a uuid.UUID, not {key!r}")
    try:
        path = directory.loans.borrow(key)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("read", directory.places.blob(key), error, directory.disk) from error
    loan = LinkedLoan(directory.loans, key, path, None, 0)
    try:
        header = read_header(directory.disk, key, path, directory.places.blob(key))
        if header.codec == CODEC:
            raise _absent(directory, key)
        if header.pickled is not None and not allow_pickle:
            refuse_pickle(key if name is MISSING else name, header.pickled)
        loan.digest = header.digest
        loan.nbytes = header.nbytes
    except BaseException:
        loan.release()
        raise
    # A file does not know the value's size in memory; its payload's length stands for that.
    payload = len(header.tree) + sum(span.length for span in header.spans)
    blob = Blob(payload, header.nbytes, header.codec, header.pickled, header.digest)
    return Guest(name, key, blob, loan, allow_pickle)


def _absent(directory: Directory, key: UUID) -> KeyError:
    return KeyError(f"{directory.root} has no blob of the key {key}")


def _packed(key: UUID, blob: Blob, name: Hashable, allow_pickle: bool) -> Guest:
    if blob.pickled is not None and not allow_pickle:
        refuse_pickle(key if name is MISSING else name, blob.pickled)
    return Guest(name, key, blob, None, allow_pickle)


def _hold_packed(
    directory: Directory, keys: Sequence[UUID], packs: dict[UUID, LinkedLoan]
) -> dict[UUID, Blob]:
    """Find out where ``keys`` are packed, and have links to these packs; ``packs`` has them at once.

    Raises
    ------
    KeyError
        One is in no pack that is there.
    """
    found: dict[UUID, Blob] = {}
    there = _known_places(directory, keys)
    for _ in range(ATTEMPTS):  # packs may be removed, and what they hold be packed anew
        lacking = [key for key in keys if key not in found]
        there = there | places_of(directory, [key for key in lacking if key not in there])
        gone = {
            pack.key
            for pack in {blob.pack for blob in there.values() if blob.pack is not None}
            if pack.key not in packs and not _hold_pack(directory, pack, packs)
        }
        found |= {key: blob for key, blob in there.items() if blob.pack and blob.pack.key not in gone}
        if len(there) < len(lacking) or not gone:
            break
        there = {}
    for key in keys:
        if key not in found:
            raise _absent(directory, key)
    return found


def _known_places(directory: Directory, keys: Iterable[UUID]) -> dict[UUID, Blob]:
    """Where this process, if it has written to the directory, knows these keys to be packed."""
    known = ((key, directory.known(key)) for key in keys)
    return {key: blob for key, blob in known if blob is not None and blob.pack is not None}


def _hold_pack(directory: Directory, pack: Pack, packs: dict[UUID, LinkedLoan]) -> bool:
    try:
        path = directory.loans.borrow(pack.key)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise storage_error("read", directory.places.blob(pack.key), error, directory.disk) from error
    packs[pack.key] = LinkedLoan(directory.loans, pack.key, path, pack.digest, pack.nbytes)
    return True


def _linked_packs(directory: Directory, packs: Mapping[UUID, LinkedLoan]) -> Origin:
    def root(key: UUID) -> str:
        return os.path.dirname(os.path.dirname(packs[key].path))

    return Origin(directory.disk, directory.places, root)
