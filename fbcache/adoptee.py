"""What is to become an entry, and what the call that adopts it has of the pool meanwhile.

Guarantee: what an interrupt kept from being released is given back when these are collected (invariant 7).

In a file of their own, which is not compiled with the rest (see setup.py): others inherit from the one, and
refer weakly to the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from fbcache.captures import Captures, Want
from fbcache.entry import MISSING, Entry, Token
from fbcache.store.protocol import Loan


class Adoptee:
    """One entry to be.

    Attributes
    ----------
    name : hashable or MISSING
        What it is to be called.
    token : Token
        Its blob, for the case that the pool has none of this key.
    copied : bool
        Whether the blob is a copy in the pool's store, of which a claim has a share.
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
    lost : deque of Entry or None
        Where the pool hears of owners that were collected; None until there is an entry.
    """

    __slots__ = ("copied", "entry", "former", "loan", "lost", "name", "nbytes", "token", "used")

    def __init__(self, name: Hashable, token: Token, nbytes: int, loan: Loan | None) -> None:
        self.name = name
        self.token = token
        self.nbytes = nbytes
        self.loan = loan
        self.copied = False
        self.used = False
        self.entry: Entry | None = None
        self.former: Entry | None = None
        self.lost: deque[Entry] | None = None  # until there is an entry

    def __del__(self) -> None:
        lost: deque[Entry] | None = getattr(self, "lost", None)
        if lost is not None:
            for owned in (self.entry, self.former):
                if owned is not None:
                    lost.append(owned)


class Claim:
    """What a call that adopts has of a pool until its entries are there.

    Attributes
    ----------
    over : bool
        Whether the keys claimed are free again: a store, which no interrupt comes between.
    tokens : list of Token
        Blobs of which it has a share: those that were known, and copies.
    """

    __slots__ = ("__weakref__", "_adoption", "over", "tokens")

    def __init__(self, adoption: Captures) -> None:
        self._adoption = adoption
        self.over = False
        self.tokens: list[Token] = []

    def __del__(self) -> None:
        tokens = getattr(self, "tokens", None)
        if tokens:
            for token in tokens:
                want = Want(Entry(MISSING, 0))
                want.token = token
                self._adoption.lost_wants.append(want)
            self._adoption.call_reaper()
