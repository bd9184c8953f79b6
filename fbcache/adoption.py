"""Adoption: entries whose blobs were there before, in a tracked directory.

Guarantees
----------
- An adopted entry is SPILLED from its beginning; nothing is loaded.
- Tokens of blobs that others may know by key, because they were persisted or adopted, are found here.
  Adopting a key again shares the token, and with it the blob; the entries are as separate as two puts.
- A token whose last share has gone is revived if its blob's deletion has not begun. If it has, the
  adoption waits for its end, so that a late deletion never takes the new loan away.
- Adopting many entries happens at one instant, or not at all. What an interrupt kept from being released
  is given back when the adoptee is collected (invariant 7).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any
from uuid import UUID

from fbcache.captures import Captures
from fbcache.entry import MISSING, Entry, State, Token
from fbcache.lru import Policy
from fbcache.store.protocol import Loan
from fbcache.waiting import Waiter
from fbcache.workers import Workers


class Adoptee:
    """One entry to be.

    Attributes
    ----------
    name : hashable or MISSING
        What it is to be called.
    token : Token
        Its blob, for the case that the pool has none of this key.
    nbytes : int
        Its size in memory.
    loan : Loan or None
        Where the blob is, if it is lent.
    used : bool
        Whether the loan is the store's now.
    entry : Entry or None
        The entry, once it is there; owned as by a handle.
    former : Entry or None
        What had the name before; kept alive as by a handle.
    lost : deque of Entry
        Where the pool hears of owners that were collected.
    """

    __slots__ = ("entry", "former", "loan", "lost", "name", "nbytes", "token", "used")

    def __init__(self, name: Hashable, token: Token, nbytes: int, loan: Loan | None) -> None:
        self.name = name
        self.token = token
        self.nbytes = nbytes
        self.loan = loan
        self.used = False
        self.entry: Entry | None = None
        self.former: Entry | None = None
        self.lost: deque[Entry] = deque()

    def __del__(self) -> None:
        for owned in (getattr(self, "entry", None), getattr(self, "former", None)):
            if owned is not None:
                self.lost.append(owned)


class Adoption(Captures):
    """Decisions about adopted entries."""

    def __init__(
        self, budget: int, policy: Policy[Entry], workers: Workers, mend: Callable[[Any], None]
    ) -> None:
        super().__init__(budget, policy, workers, mend)
        self.known: dict[UUID, Token] = {}
        self.deletion_watchers: list[Waiter] = []

    def know(self, tokens: Iterable[Token]) -> None:
        """Note that others know these blobs by their keys."""
        for token in tokens:
            self.known[token.key] = token

    def adopt(
        self, adoptees: Sequence[Adoptee], borrow: Callable[[UUID, Loan], None] | None
    ) -> Waiter | None:
        """Make an entry of each, owned as by a handle; or return what has to be waited for first.

        ``borrow`` gives a loan to the store. It does no I/O.
        """
        self.check_open()
        waiter = self.dying(adoptee.token.key for adoptee in adoptees)
        if waiter is not None:
            return waiter
        for adoptee in adoptees:
            self._adopt_one(adoptee, borrow)
        return None

    def dying(self, keys: Iterable[UUID]) -> Waiter | None:
        """Return what to wait for if the blob of one of ``keys`` is being deleted at this moment."""
        self.check_open()
        for key in keys:
            token = self.known.get(key)
            if token is not None and token.shares == 0 and token not in self._deletions:
                waiter = Waiter()
                self.deletion_watchers.append(waiter)
                return waiter
        return None

    def _adopt_one(self, adoptee: Adoptee, borrow: Callable[[UUID, Loan], None] | None) -> None:
        key, loan = adoptee.token.key, adoptee.loan
        token = self.known.get(key)
        entry = Entry(MISSING, adoptee.nbytes)
        entry.state = State.SPILLED
        entry.key = key
        if token is None:
            token = adoptee.token
            token.shares = 0
            lend = borrow is not None and loan is not None
            if borrow is not None and loan is not None:
                borrow(key, loan)
            # Straight line: until `used` is set the loan is its maker's to release.
            self.known[key] = token
            adoptee.used = lend
        elif token.shares == 0:
            place = self._deletions.index(token)
            del self._deletions[place]
        # Straight line, from the ends of both branches on.
        token.shares += 1
        entry.token = token
        entry.handles = 1
        adoptee.lost = self.lost_handles
        adoptee.entry = entry
        self.entries.add(entry)
        if adoptee.token.allow_pickle:
            token.allow_pickle = True

    def release_adoptee(self, adoptee: Adoptee) -> None:
        """Give up the ownership that :meth:`adopt` has left with the caller."""
        entry, former = adoptee.entry, adoptee.former
        # Straight line.
        adoptee.entry = adoptee.former = None
        if entry is not None:
            entry.handles -= 1
        if former is not None:
            former.handles -= 1
        for owned in (entry, former):
            if owned is not None:
                self.disown(owned)

    def forget_deleted(self, token: Token) -> None:
        """Note that the blob of ``token`` is no more, and let those go on who waited for that."""
        if token.has_key and self.known.get(token.key) is token:
            del self.known[token.key]
        watchers, self.deletion_watchers = self.deletion_watchers, []
        for waiter in watchers:
            waiter.wake()
