"""ml_dtypes: its scalars. Arrays of its types are numpy's, and travel as such (:mod:`fbcache.codec.dtypes`).

Guarantee: a scalar comes back bit by bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from fbcache.codec.dtypes import ML_TYPES
from fbcache.codec.families.kinds import Kind
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder


def _kind(cls: type[Any]) -> Kind:
    dtype: np.dtype[Any] = np.dtype(cls)

    def encode(encoder: Encoder, value: np.generic) -> Node:
        return value.tobytes()

    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        return np.frombuffer(expect(node, bytes), dtype).reshape(())[()]

    return Kind(cls, f"ml_dtypes.{cls.__name__}", encode, decode, travels="msgpack")


KINDS: Final = tuple(_kind(getattr(ml_dtypes, name)) for name in sorted(ML_TYPES) if hasattr(ml_dtypes, name))
