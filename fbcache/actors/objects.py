"""``ObjectStorage``: a snapshot as an object in a bucket, or whatever else obstore reaches.

Guarantee: a put replaces an object whole or not at all, for so the stores promise; a snapshot is sealed, so
that what comes back is what was put or :class:`CorruptSnapshotError`. Nothing tells of an actor with the
same id in another process: see to that yourself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fbcache.actors.errors import not_found
from fbcache.actors.naming import check_id, name_of
from fbcache.actors.snapshot import seal, unseal
from fbcache.errors import StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class ObjectStorage:
    """Snapshots as objects.

    Parameters
    ----------
    store : obstore store
        ``obstore.store.S3Store(...)``, ``GCSStore``, ``AzureStore``, ``LocalStore``, ``MemoryStore``. How
        often a failing request is repeated, and how long it may take, are options of the store.
    prefix : str
        What the objects' names begin with, before a slash.

    Raises
    ------
    ModuleNotFoundError
        obstore is not installed: ``pip install 'fbcache[objects]'``.
    """

    def __init__(self, store: ObjectStore, *, prefix: str = "") -> None:
        try:
            import obstore
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "ObjectStorage needs obstore, which is not installed: pip install 'fbcache[objects]'",
                name=error.name,
            ) from error
        self._obstore = obstore
        self._store = store
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def __repr__(self) -> str:
        return f"ObjectStorage({self._store!r}, prefix={self._prefix!r})"

    @property
    def place(self) -> tuple[str, int, str]:
        """What storages of one store object and prefix have in common."""
        return "objects", id(self._store), self._prefix

    def path_of(self, actor_id: str) -> str:
        """Return the name of the actor's object."""
        check_id(actor_id)
        return f"{self._prefix}{name_of(actor_id)}"

    def try_read(self, actor_id: str) -> bytes:
        """Return what was written last.

        Raises
        ------
        SnapshotNotFoundError
            There is no object; stores say the same of a bucket that is not there.
        CorruptSnapshotError
            It is not what was written. It is left as it is.
        StorageError
            The store could not give it.
        """
        path = self.path_of(actor_id)
        try:
            raw = self._obstore.get(self._store, path).bytes()
        except FileNotFoundError:
            raise not_found(actor_id, repr(self._store)) from None
        except Exception as error:
            raise StorageError(f"cannot get {path} from {self._store!r}: {error}", path=path) from error
        return unseal(actor_id, memoryview(raw), f"{self._store!r} at {path}")

    def try_write(self, actor_id: str, data: bytes) -> None:
        """Replace the object; it is as durable as the store makes it when this returns.

        Raises
        ------
        StorageError
            The store did not take it, or did not say so: the former object stands, or the new one does.
        """
        path = self.path_of(actor_id)
        try:
            self._obstore.put(self._store, path, b"".join(seal(actor_id, data).pieces))
        except Exception as error:
            raise StorageError(f"cannot put {path} into {self._store!r}: {error}", path=path) from error
