"""Adoption: entries whose blobs were there before, in a tracked directory.

Guarantees
----------
- An adopted entry is SPILLED from its beginning; nothing is loaded.
- Tokens of blobs that others may know by key, because they were persisted or adopted, are found here.
  Adopting a key again shares the token, and with it the blob; the entries are as separate as two puts.
- A token whose last share has gone is revived if its blob's deletion has not begun. If it has, the
  adoption waits for its end, so that a late deletion never takes the new loan, or the new copy, away.
- A key that the pool does not know is one claim's at a time, from :meth:`Adoption.reserve` on: nobody else
  copies a blob of it into the store, lends one, or takes one away. Who has claimed waits for nobody else's
  claim, so that no two wait for each other.
- Adopting many entries happens at one instant, or not at all. What an interrupt kept from being released
  is given back when the adoptee, or the claim, is collected (invariant 7).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from uuid import UUID

from fbcache.adoptee import Adoptee, Claim
from fbcache.captures import Captures
from fbcache.entry import MISSING, Entry, State, Token
from fbcache.lru import Policy
from fbcache.store.protocol import Loan
from fbcache.waiting import Waiter
from fbcache.workers import Workers

A = TypeVar("A", bound="Adoptee")


class Adoption(Captures):
    """Decisions about adopted entries."""

    def __init__(
        self, budget: int, policy: Policy[Entry], workers: Workers, mend: Callable[[Any], None]
    ) -> None:
        super().__init__(budget, policy, workers, mend)
        self.known: dict[UUID, Token] = {}
        self._claims: dict[UUID, weakref.ref[Claim]] = {}
        self.deletion_watchers: list[Waiter] = []

    def know(self, tokens: Iterable[Token]) -> None:
        """Note that others know these blobs by their keys."""
        for token in tokens:
            self.known[token.key] = token

    def reserve(self, adoptees: Sequence[A], claim: Claim, *, lends: bool) -> Waiter | list[A]:
        """Let ``claim`` have all that adopting takes; or return what has to be waited for first.

        Of blobs that are known it has a share from now on, and the other keys to itself.

        Parameters
        ----------
        lends : bool
            Whether blobs with a loan are used where they are.

        Returns
        -------
        Waiter or list of Adoptee
            Those whose blobs have to be copied into the store before; one for each key. Otherwise nothing
            is changed, and the wait may have been for nothing.
        """
        self.check_open()
        if not all(self._is_free(adoptee.token.key) for adoptee in adoptees):
            waiter = Waiter()
            self.deletion_watchers.append(waiter)
            return waiter
        reference, lacking = weakref.ref(claim), []
        for adoptee in adoptees:
            key = adoptee.token.key
            token = self.known.get(key)
            if token is not None:
                if token.shares == 0:
                    del self._deletions[self._deletions.index(token)]
                # Straight line: nothing comes between the two of a call of the interpreter's own.
                token.shares += 1
                claim.tokens.append(token)
            elif self._claims.get(key) is not reference:
                self._claims[key] = reference
                if not (lends and adoptee.loan is not None):
                    lacking.append(adoptee)
        return lacking

    def _is_free(self, key: UUID) -> bool:
        """Whether nobody is about to bring a blob of ``key`` in, or to take it away."""
        token = self.known.get(key)
        if token is not None:
            return token.shares > 0 or token in self._deletions
        reference = self._claims.get(key) if self._claims else None
        claim = None if reference is None else reference()
        return claim is None or claim.over

    def end_claim(self, claim: Claim, adoptees: Iterable[Adoptee]) -> None:
        """Give up what :meth:`reserve` has given; copies that no entry has are deleted as any blob."""
        for token in claim.tokens:
            if token.slot < 0:  # whoever needs the key next waits until it is deleted
                self.known.setdefault(token.key, token)
        tokens = claim.tokens
        while tokens:
            token = tokens[-1]
            # Straight line.
            token.shares -= 1
            del tokens[-1]
            if token.shares == 0 and not self.closed:
                self._delete(token)
        claim.over = True
        for key in {adoptee.token.key for adoptee in adoptees}:
            reference = self._claims.get(key)
            if reference is not None and reference() in (None, claim):
                del self._claims[key]
        self._wake_deletion_watchers()

    def adopt(
        self, adoptees: Sequence[Adoptee], borrow: Callable[[UUID, Loan], None] | None
    ) -> None:
        """Make an entry of each, owned as by a handle. What they need was reserved, and copied.

        ``borrow`` gives a loan to the store. It does no I/O.
        """
        self.check_open()
        for adoptee in adoptees:
            self._adopt_one(adoptee, borrow)

    def _adopt_one(self, adoptee: Adoptee, borrow: Callable[[UUID, Loan], None] | None) -> None:
        key, loan = adoptee.token.key, adoptee.loan
        token = self.known.get(key)
        entry = Entry(MISSING, adoptee.nbytes)
        entry.state = State.SPILLED
        entry.key = key
        if token is None:
            token = adoptee.token
            lend = borrow is not None and loan is not None
            if borrow is not None and loan is not None:
                borrow(key, loan)
            if not adoptee.copied:
                token.shares = 0
            # Straight line: until `used` is set the loan is its maker's to release.
            self.known[key] = token
            adoptee.used = lend
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
        self._wake_deletion_watchers()

    def _wake_deletion_watchers(self) -> None:
        watchers, self.deletion_watchers = self.deletion_watchers, []
        for waiter in watchers:
            waiter.wake()
