"""Sparse arrays of all formats, and what counts as the same."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import scipy.sparse as sp

from tests.codec.roundtrip import same_array

FORMATS = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")
CLASSES = [getattr(sp, f"{form}_{suffix}") for form in FORMATS for suffix in ("array", "matrix")]


def dense(rows: int = 12, columns: int = 10, dtype: Any = float, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return ((rng.random((rows, columns)) < 0.3) * rng.integers(1, 100, (rows, columns))).astype(dtype)


def large(form: str) -> Any:
    """One whose arrays travel as buffers, and are mapped when they come back."""
    if form == "dia":
        return sp.dia_array((dense(50, 400), np.arange(-20, 30)), (300, 400))
    return getattr(sp, f"{form}_array")(dense(300, 400))


def cases() -> dict[str, Any]:
    found = {cls.__name__: cls(dense()) for cls in CLASSES}
    found |= {f"large {form}": large(form) for form in FORMATS[:5]}
    found |= {f"no elements {form}": getattr(sp, f"{form}_array")((3, 4)) for form in FORMATS}
    found |= {f"no rows {form}": getattr(sp, f"{form}_array")((0, 4)) for form in FORMATS[1:]}
    for dtype in ("?", "i1", "u2", "f4", "c16", "g"):
        found[dtype] = sp.csr_array(dense(dtype=dtype))
        found[f"lil {dtype}"] = sp.lil_array(dense(dtype=dtype))
    found["coo 1-D"] = sp.coo_array(dense()[0])
    found["coo 3-D"] = sp.coo_array(dense().reshape(3, 4, 10))
    found["csr 1-D"] = sp.csr_array(dense()[0])
    found["dok 1-D"] = sp.dok_array(dense()[0])
    found["wide blocks"] = sp.bsr_array(dense(), blocksize=(3, 5))
    found["fortran blocks"] = sp.bsr_array(dense(), blocksize=(3, 5))
    found["fortran blocks"].data = np.asfortranarray(found["fortran blocks"].data)
    return found | awkward()


def awkward() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["wide indices"] = sp.csr_array(dense())
    found["wide indices"].indices = found["wide indices"].indices.astype("i8")
    found["wide indices"].indptr = found["wide indices"].indptr.astype("i8")
    found["mixed indices"] = sp.csc_array(dense())
    found["mixed indices"].indptr = found["mixed indices"].indptr.astype("i8")
    found["not pruned"] = sp.csr_array(dense())
    found["not pruned"].data = np.append(found["not pruned"].data, [1.0, 2.0])
    found["not pruned"].indices = np.append(found["not pruned"].indices, np.array([99, -1], "i4"))
    found["not sorted"] = sp.csr_array((np.ones(3), np.array([2, 0, 1], "i4"), [0, 3]), (1, 3))
    found["duplicates"] = sp.coo_array((np.ones(3), (np.array([1, 0, 1]), np.array([2, 0, 2]))), (3, 4))
    found["sorted, it says"] = sp.csr_array(dense())
    found["sorted, it says"].has_canonical_format = True
    found["not sorted, it says"] = sp.csr_array(dense())
    found["not sorted, it says"].has_sorted_indices = False
    found["strided"] = sp.coo_array((np.arange(20.0)[::2], (np.arange(20)[::-2], np.arange(10))), (20, 10))
    found["prints more"] = sp.csr_array(dense(), maxprint=7)
    found["far diagonals"] = sp.dia_array((np.ones((2, 4)), [100, -7]), (3, 4))
    return found


def arrays(value: Any) -> list[np.ndarray[Any, Any]]:
    """The arrays that a value of a format made of arrays holds."""
    names = {"coo": (), "dia": ("offsets",)}.get(value.format, ("indices", "indptr"))
    return [value.data, *getattr(value, "coords", ()), *(getattr(value, name) for name in names)]


def flags(value: Any) -> dict[str, Any]:
    return {name: part for name, part in vars(value).items() if "has_" in name}


def same(left: Any, right: Any, *, trusted: bool = True) -> bool:
    """Equal in all but identity.

    What does not come from the pool itself claims less of its order, and has nothing beyond its last pointer.
    """
    if (type(left), left.shape, left.dtype, left.maxprint) != (
        type(right),
        right.shape,
        right.dtype,
        right.maxprint,
    ):
        return False
    if left.format == "dok":
        pairs = [[(key, value, type(value)) for key, value in one._dict.items()] for one in (left, right)]
        return pairs[0] == pairs[1]
    if left.format == "lil":
        return left.rows.tolist() == right.rows.tolist() and left.data.tolist() == right.data.tolist()
    if trusted and flags(left) != flags(right):
        return False
    if not trusted:
        right = copy.copy(right)
        if right.format in ("bsr", "csc", "csr"):
            used = right.indptr[-1]
            right.data, right.indices = right.data[:used], right.indices[:used]
    return len(arrays(left)) == len(arrays(right)) and all(map(same_array, arrays(left), arrays(right)))
