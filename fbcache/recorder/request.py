"""A load or a close, in its place in the line of records."""

from __future__ import annotations

from typing import Any

from fbcache.waiting import Waiter


class Request(Waiter):
    """A load or a close, in its place in the line; whoever asked sleeps on it.

    Attributes
    ----------
    query : Any
        What to load.
    closes : bool
        Whether it is the close instead.
    result : Any
        What was loaded, or the storage; set before the wake.
    given_up : bool
        Whether whoever asked has been cancelled.
    """

    __slots__ = ("closes", "given_up", "query", "result")

    def __init__(self, query: Any = None, *, closes: bool = False) -> None:
        super().__init__()
        self.query = query
        self.closes = closes
        self.result: Any = None
        self.given_up = False

    @property
    def pointless(self) -> bool:
        """Whether nobody waits for the answer. A close is to be done all the same."""
        return self.done or (not self.closes and (self.given_up or self.orphaned))
