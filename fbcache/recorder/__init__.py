"""Records written down without making their producer wait.

- :mod:`recorder`: ``Recorder``, under asyncio; :mod:`blocking`: the same on a thread of its own
- :mod:`core`: what both are made of: the pump, its bulks, retries and answers; on :mod:`line`, which takes
  records; :mod:`request` and :mod:`retry`
- :mod:`storage`: what a storage is, and one in memory; :mod:`sqlite` and :mod:`book`: one in a file
- :mod:`query`: which records a load returns
- :mod:`command`: ``fbcache events``
"""

from fbcache.recorder.blocking import BlockingRecorder
from fbcache.recorder.errors import (
    CorruptRecordsError,
    ForeignFileError,
    RecorderClosedError,
    RecorderError,
    RecorderFullError,
    RecordsLostWarning,
    RecordsRefusedError,
)
from fbcache.recorder.line import Phase
from fbcache.recorder.query import Facets, Query, facets_of
from fbcache.recorder.recorder import Recorder
from fbcache.recorder.retry import Retry
from fbcache.recorder.sqlite import SqliteStorage
from fbcache.recorder.storage import MemoryStorage, Storage

__all__ = [
    "Recorder",
    "BlockingRecorder",
    "Phase",
    "Retry",
    # where records go, and how they are found again
    "Storage",
    "MemoryStorage",
    "SqliteStorage",
    "Query",
    "Facets",
    "facets_of",
    # errors
    "RecorderError",
    "RecorderFullError",
    "RecorderClosedError",
    "RecordsRefusedError",
    "CorruptRecordsError",
    "ForeignFileError",
    "RecordsLostWarning",
]
