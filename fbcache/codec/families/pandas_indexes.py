"""Nothing yet."""

from __future__ import annotations

from fbcache.codec.families.kinds import Kind

KINDS: tuple[Kind, ...] = ()
