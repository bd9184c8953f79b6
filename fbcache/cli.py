"""The command ``fbcache``, also as ``python -m fbcache``.

It needs click and rich, which are not dependencies of the library: where they are
missing, it says how to get them.
"""

from __future__ import annotations

import sys

_NEEDED = frozenset({"click", "rich"})
_INTERRUPTED = 130


def main() -> None:
    """Run the command with the program's arguments, and exit with its code."""
    try:
        from fbcache.commands import fbcache
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        needs = f"the command line needs {error.name}, which is not installed"
        print(f"Error: {needs}. Install it by: pip install 'fbcache[cli]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before any command has begun
        sys.exit(_INTERRUPTED)
    fbcache(prog_name="fbcache")
