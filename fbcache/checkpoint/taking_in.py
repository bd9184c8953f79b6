"""Entries made of blobs that a tracked directory has: all at one instant, with their names, or none.

Guarantees
----------
- Blobs with files of their own are used where they lie if the pool's store can lend files; all others are
  copied into it (:mod:`.copying`). What the pool has already is shared.
- After an error, an interrupt included, names are whose they were, and copies are deleted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from typing import Protocol

from fbcache.adoptee import Adoptee, Claim
from fbcache.checkpoint.copying import Guest, Host, Origin, copy, reserve
from fbcache.entry import MISSING, Entry
from fbcache.errors import NameTakenError
from fbcache.residency import Residency
from fbcache.store.protocol import FileBacked


class Target(Host, Protocol):
    """The pool that entries are brought into."""

    @property
    def names(self) -> MutableMapping[Hashable, Entry]:
        """Entries by name."""
        ...


def take_in(
    pool: Target, guests: Sequence[Guest], replace: bool, origin: Origin, *, keep: bool = False
) -> None:
    """Make entries of all, under their names; with ``keep`` each stays owned as by a handle too."""
    residency = pool.residency
    _check_names(pool.names, guests, replace)
    borrow = pool.store.borrow if isinstance(pool.store, FileBacked) else None
    claim = Claim(residency)
    done = False
    try:
        copy(pool, origin, reserve(pool, guests, claim), claim)
        residency.run(residency.adopt, guests, borrow)
        residency.run(_install, pool, guests, replace)
        done = True
    finally:
        if not done:
            residency.run(_undo, pool, guests)
        if not (done and keep):
            residency.run(_release, residency, guests)
        residency.run(residency.end_claim, claim, guests)


def _check_names(names: Mapping[Hashable, Entry], adoptees: Iterable[Adoptee], replace: bool) -> None:
    if replace:
        return
    for adoptee in adoptees:
        if adoptee.name is not MISSING and adoptee.name in names:
            raise NameTakenError(
                f"the pool has an entry named {adoptee.name!r} already; replace=True puts the other there"
            )


def _install(pool: Target, adoptees: Sequence[Adoptee], replace: bool) -> None:
    """Give all of them their names, at one instant. Under the lock."""
    pool.residency.check_open()
    _check_names(pool.names, adoptees, replace)
    for adoptee in adoptees:
        entry, name = adoptee.entry, adoptee.name
        if name is MISSING or entry is None:
            continue
        former = pool.names.get(name)
        entry.name = name
        if former is not None:
            # Straight line. It lives on until all is done.
            former.handles += 1
            adoptee.former = former
        # Straight line.
        pool.names[name] = entry
        entry.named = True
        if former is not None:
            former.named = False


def _undo(pool: Target, adoptees: Sequence[Adoptee]) -> None:
    """Give the names back to whom they were taken from. Under the lock."""
    for adoptee in adoptees:
        entry, former = adoptee.entry, adoptee.former
        if entry is None or not entry.named or pool.names.get(adoptee.name) is not entry:
            continue
        entry.named = False
        if former is None:
            del pool.names[adoptee.name]
        else:
            # Straight line.
            pool.names[adoptee.name] = former
            former.named = True


def _release(residency: Residency, adoptees: Sequence[Adoptee]) -> None:
    for adoptee in adoptees:
        residency.release_adoptee(adoptee)


def return_unused(adoptees: Iterable[Adoptee]) -> None:
    """Give back the loans that no entry has come to need."""
    for adoptee in adoptees:
        if not adoptee.used and adoptee.loan is not None:
            adoptee.loan.release()
