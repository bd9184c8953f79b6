"""How a command ends: whatever stops it becomes one line on standard error, and an exit code.

Guarantee: under :func:`ending` no error of the input's, the storage's or the data's shows a traceback.
Anything else is a bug, and does.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

from fbcache.errors import (
    CheckpointNotFoundError,
    CorruptBlobError,
    CorruptCheckpointError,
    DirectoryInUseError,
    FBCacheWarning,
    PickleRefusedError,
    UnsupportedTypeError,
)
from fbcache.shell.screen import say


class Exit(IntEnum):
    """How a command ended."""

    DONE = 0
    DAMAGED = 1  #: something that was looked at is not what was written
    REFUSED = 2  #: what was asked for is not there, or cannot be done
    STORAGE = 3  #: files could not be read or written, or another process has the directory
    INTERRUPTED = 130
    PIPE_CLOSED = 141  #: nobody reads on; as a shell tells of a command that SIGPIPE ended


class Refused(Exception):  # noqa: N818  # it is an answer, given to people
    """What was asked for cannot be done; the message says what can."""


_REFUSALS = (Refused, CheckpointNotFoundError, PickleRefusedError, UnsupportedTypeError)


@contextmanager
def ending() -> Iterator[None]:
    """Run a command; to be used as a decorator."""
    try:
        with _warnings_told():
            yield
    except _REFUSALS as error:
        _end(str(error), Exit.REFUSED)
    except (CorruptBlobError, CorruptCheckpointError) as error:
        _end(str(error), Exit.DAMAGED)
    except BrokenPipeError:
        _leave_closed_pipe()
    except (DirectoryInUseError, OSError) as error:
        _end(str(error), Exit.STORAGE)
    except KeyboardInterrupt:
        _end("interrupted", Exit.INTERRUPTED)


def _end(message: str, code: Exit) -> NoReturn:
    say(f"Error: {message}", style="red")
    sys.exit(code)


def _leave_closed_pipe() -> NoReturn:
    """Have the interpreter's last flush go nowhere, for it would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.exit(Exit.PIPE_CLOSED)


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Have each warning of fbcache's as one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", FBCacheWarning)
        otherwise = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
            if issubclass(category, FBCacheWarning):
                say(f"Warning: {message}", style="yellow")
            else:
                otherwise(message, category, *where, **options)

        warnings.showwarning = tell
        yield
