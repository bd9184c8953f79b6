"""fbcache: more Python objects alive than fit in memory.

The map of the house, from the street to the cellar; each room imports only from rooms below it:

``cli``, ``commands``, ``demo``, ``shell``
    what people start from a terminal
``testing``
    the tests that anybody's store or codec is held to
``recorder``, ``saga``, ``actors``
    services beside the pool: records of what happened, runs and states that survive their process
``pool``
    ``FBPool``: names, and the public face; decides nothing itself
``engine``
    the parts of a pool put together, and how it ends: close, collection, exit, fork
``handle``, ``leash``, ``writeguard``, ``watchedguard``, ``guard``
    ``Fb``, and the guards that ``with`` and ``async with`` enter
``checkpoint``
    tracked directories: the lock, keys, manifests; saving, restoring, verifying
``audit``, ``promises``
    every counter counted anew, to check and to mend; and values looked at again, in debug mode
``residency``, ``adoption``, ``adoptee``, ``captures``, ``budget``, ``books``
    the budget: who stays, who is written ahead, who leaves, who waits; does no I/O
``spill``, ``workers``
    the acts, outside the lock, and the threads that do them
``keys``, ``entry``
    one value's life: key, states, lock
``waiting``, ``helping``, ``lru``, ``freezing``, ``parts``, ``sizeof``, ``stats``, ``events``, ``memory``
    waiting in threads and tasks, orders of eviction, read-only values, sizes, figures, events, limits
``store``
    blobs by key: files, maps, sessions, and the one seam for system calls
``codec``
    values to frames and back
``errors``
    everything that is raised
"""

from fbcache.checkpoint.saver import Checkpoint
from fbcache.checkpoint.tracked import TrackedDirectory
from fbcache.checkpoint.verifying import VerifyReport
from fbcache.codec import Compressed, MsgpackCodec, register
from fbcache.codec.frames import Frames
from fbcache.entry import State
from fbcache.errors import (
    CheckpointNotFoundError,
    CorruptBlobError,
    CorruptCheckpointError,
    DeadlockError,
    DirectoryInUseError,
    DiskFullError,
    FBCacheError,
    FBCacheWarning,
    ForkedPoolError,
    InternalError,
    MissingLibraryError,
    MutatedError,
    NameTakenError,
    PickleRefusedError,
    PoolClosedError,
    PutTimeoutError,
    ReadOnlyError,
    StaleKeyError,
    StorageError,
    UnsupportedTypeError,
)
from fbcache.guard import ReadGuard
from fbcache.handle import Fb
from fbcache.pool import FBPool
from fbcache.stats import PoolStats
from fbcache.store.diskcached import DiskcacheStore
from fbcache.store.files import FileStore
from fbcache.store.packed import PackedStore
from fbcache.writeguard import WriteGuard

__version__ = "0.1.0"

__all__ = [
    # the pool, its handles and guards
    "FBPool",
    "Fb",
    "ReadGuard",
    "WriteGuard",
    "State",
    "PoolStats",
    # what lasts
    "TrackedDirectory",
    "Checkpoint",
    "VerifyReport",
    # how values become frames, and where those go
    "MsgpackCodec",
    "Compressed",
    "Frames",
    "register",
    "FileStore",
    "PackedStore",
    "DiskcacheStore",
    # errors
    "FBCacheError",
    "FBCacheWarning",
    "StaleKeyError",
    "DeadlockError",
    "PoolClosedError",
    "ForkedPoolError",
    "DirectoryInUseError",
    "ReadOnlyError",
    "MutatedError",
    "MissingLibraryError",
    "NameTakenError",
    "CheckpointNotFoundError",
    "UnsupportedTypeError",
    "PickleRefusedError",
    "StorageError",
    "DiskFullError",
    "PutTimeoutError",
    "CorruptBlobError",
    "CorruptCheckpointError",
    "InternalError",
]
