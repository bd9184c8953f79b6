"""Values in a few words, for messages."""

from __future__ import annotations

from typing import Any

import numpy as np


def described(value: Any) -> str:
    """Return what kind of value it is."""
    if isinstance(value, np.ma.MaskedArray):
        return f"a masked array of {value.dtype} and shape {value.shape}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    if isinstance(value, np.generic):
        return f"a numpy scalar of {value.dtype}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value):,} part{'s' * (len(value) != 1)}"
    kind = type(value)
    return "None" if value is None else f"of the type {kind.__qualname__}"
