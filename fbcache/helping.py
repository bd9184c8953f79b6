"""What a worker does instead of waiting for what the workers are to do.

In a file of its own, which is not compiled with the rest (see setup.py): a compiled class has no room for
what ``threading.local`` needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final


class _Help(threading.local):
    """What a worker does rather than wait; None in other threads."""

    job: Callable[[], bool] | None = None


#: Set by each worker for itself. A value's finalizer may call the pool from one: waiting there
#: for what the workers are to do, it does their next job, else one thread would wait for itself.
HELP: Final = _Help()
