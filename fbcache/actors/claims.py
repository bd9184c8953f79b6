"""One live actor for an id on a storage.

Guarantees
----------
- Between :func:`claim` and :meth:`Claim.release` no second claim of the same id on the same place succeeds in
  this process; with a storage that is ``Exclusive``, in no other process either.
- A claim that raises leaves nothing claimed.
- A forked child has none of its parent's claims, and takes none away: on an ``Exclusive`` storage the
  parent's ids stay taken, elsewhere the child's memory is its own.

``_lock`` guards the table; nothing else happens under it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Hashable
from typing import Final

from fbcache.actors.errors import ActorExistsError, explained
from fbcache.actors.naming import check_id
from fbcache.actors.storage import Exclusive, PersistentStorage, Placed, Tenancy

logger: Final = logging.getLogger(__name__)

_lock = threading.Lock()
_claims: Final[dict[tuple[Hashable, str], Claim]] = {}


class Claim:
    """The right to be the one live actor of an id, for as long as it is not released."""

    __slots__ = ("_key", "_storage", "_tenancy")

    def __init__(self, storage: PersistentStorage, actor_id: str) -> None:
        self._storage = storage  # kept alive, for its identity may be what tells its place
        self._key = place_of(storage), actor_id
        self._tenancy: Tenancy | None = None

    def take(self) -> None:
        """Enter the table, then ask the storage."""
        actor_id = self._key[1]
        with _lock:
            if self._key in _claims:
                raise ActorExistsError(
                    f"an actor with the id {actor_id!r} is alive on {self._storage} in this process; stop it"
                    " first, or use its reference",
                    actor_id=actor_id,
                    pid=os.getpid(),
                )
            _claims[self._key] = self
        try:
            if isinstance(self._storage, Exclusive):
                self._tenancy = self._storage.claim(actor_id)
        except ActorExistsError:
            self._leave()
            raise
        except Exception as error:
            self._leave()
            raise explained("claim the id of", actor_id, error) from error
        except BaseException:
            self._leave()
            raise

    def release(self) -> None:
        """Let others claim the id. May be called again; raises nothing."""
        tenancy, self._tenancy = self._tenancy, None
        try:
            if tenancy is not None:
                tenancy.release()
        except Exception:  # a lock's record could not be written, say; the lock itself is free
            logger.warning("the id of actor %r was not given back cleanly", self._key[1], exc_info=True)
        finally:
            self._leave()

    def abandon_in_child(self) -> None:
        """Forget the parent's tenancy."""
        if self._tenancy is not None:
            self._tenancy.abandon_in_child()
            self._tenancy = None

    def _leave(self) -> None:
        with _lock:
            if _claims.get(self._key) is self:
                del _claims[self._key]


def claim(storage: PersistentStorage, actor_id: str) -> Claim:
    """Become the one live actor of ``actor_id`` on ``storage``.

    Raises
    ------
    ActorExistsError
        There is one.
    PersistenceError
        Of the kind ``IO``: the storage cannot tell.
    """
    check_id(actor_id)
    made = Claim(storage, actor_id)
    made.take()
    return made


def place_of(storage: PersistentStorage) -> Hashable:
    """Return what is equal for storages of one place: what it says itself, else the object."""
    return storage.place if isinstance(storage, Placed) else ("object", id(storage))


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for each in _claims.values():
        each.abandon_in_child()
    _claims.clear()


os.register_at_fork(after_in_child=_forget_in_child)
