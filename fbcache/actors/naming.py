"""What an actor's id becomes where texts of any kind cannot stand: in file names and keys of blobs.

Guarantee: any text is an id, also one that is empty, very long, looks like a path or is no valid Unicode.
Different ids have different names, on file systems that ignore case too; no name is more than 65
characters of ``a-z``, ``0-9``, ``_`` and ``-`` long.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from uuid import UUID

#: Characters of the id that its name begins with: enough for people to find it by.
_READABLE = 32


def check_id(actor_id: object) -> None:
    """Raise TypeError unless ``actor_id`` is a text."""
    if not isinstance(actor_id, str):
        raise TypeError(f"an actor's id is a str, not {actor_id!r}")


def key_of(actor_id: str) -> UUID:
    """Return the key of an actor's blobs: the same in all places and versions."""
    check_id(actor_id)
    return UUID(bytes=blake2b(actor_id.encode("utf-8", "surrogatepass"), digest_size=16).digest())


def name_of(actor_id: str) -> str:
    """Return the name of an actor's directory or object: what people read, and what tells it from others."""
    readable = re.sub(r"[^a-z0-9]+", "_", actor_id[: 2 * _READABLE].lower())[:_READABLE].strip("_")
    return f"{readable}-{key_of(actor_id).hex}"
