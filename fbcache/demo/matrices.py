"""Matrices cut into square tiles: where the demo's numbers come from.

Guarantee: a tile is the same each time it is asked for, and is memory of its own that nothing
else refers to. No more than one tile is in memory on a matrix's behalf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

#: Bytes of one element.
ITEM: Final = 8

#: Random elements are the integers from -8 to 8. Sums of up to 2**47 products of two of them are
#: exact in float64, in whatever order they are added.
_LARGEST: Final = 8


class InputError(Exception):
    """What the user gave cannot be worked on. The message says what would do."""


class Matrix(ABC):
    """Rows and columns of float64, cut into tiles.

    Parameters
    ----------
    label : str
        What to call it in messages.
    shape : (int, int)
        Rows and columns of elements.
    side : int
        Rows and columns of a tile; those at the lower and right edges may be smaller.
    integral : bool
        Whether all elements are integers.
    """

    def __init__(self, label: str, shape: tuple[int, int], side: int, *, integral: bool) -> None:
        self.label = label
        self.shape = shape
        self.side = side
        self.integral = integral

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.shape[0] // self.side), -(-self.shape[1] // self.side)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return ITEM * self.shape[0] * self.shape[1]

    @abstractmethod
    def tile(self, row: int, column: int) -> Array:
        """Return one tile, by its place among the tiles."""


class RandomMatrix(Matrix):
    """Small integers, made anew from a seed whenever a tile is asked for."""

    def __init__(self, label: str, shape: tuple[int, int], side: int, *, seed: int) -> None:
        super().__init__(label, shape, side, integral=True)
        self._seed = seed

    def tile(self, row: int, column: int) -> Array:
        """Return one tile."""
        generator = np.random.default_rng((self._seed, row, column))
        size = _extent(self.shape[0], self.side, row), _extent(self.shape[1], self.side, column)
        return generator.integers(-_LARGEST, _LARGEST + 1, size, dtype=np.int8).astype(np.float64)


class StoredMatrix(Matrix):
    """An array in a ``.npy`` file, mapped for one tile at a time.

    Keeping it mapped would leave the pages that were read in the process, and count them
    among its memory. Arrays of one dimension are a column; of more than two, each
    element of the first axis is a row.
    """

    def __init__(self, label: str, path: Path, array: npt.NDArray[np.generic], side: int) -> None:
        super().__init__(label, _as_rows(array).shape, side, integral=array.dtype.kind in "biu")
        self._path = path

    def tile(self, row: int, column: int) -> Array:
        """Return one tile.

        Raises
        ------
        InputError
            An element is NaN or infinite, or the file has changed since it was opened.
        """
        top, left = row * self.side, column * self.side
        try:
            rows = _as_rows(np.load(self._path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.label} cannot be read any more: {error}") from error
        if rows.shape != self.shape:
            raise InputError(f"{self.label} has changed while it was being read")
        tile = np.array(rows[top : top + self.side, left : left + self.side], np.float64, order="C")
        if not self.integral and not np.isfinite(tile).all():
            place = np.argwhere(~np.isfinite(tile))[0] + (top, left)
            raise InputError(
                f"{self.label} has NaN or infinity at row {place[0]}, column {place[1]}, which no product "
                "can be checked with; replace them first (numpy.nan_to_num)"
            )
        return tile


class Transposed(Matrix):
    """Another matrix, its rows as columns."""

    def __init__(self, matrix: Matrix) -> None:
        rows, columns = matrix.shape
        super().__init__(f"{matrix.label} transposed", (columns, rows), matrix.side, integral=matrix.integral)
        self.matrix = matrix

    def tile(self, row: int, column: int) -> Array:
        """Return one tile: a view of the other matrix's."""
        return self.matrix.tile(column, row).T


def _extent(length: int, side: int, index: int) -> int:
    return min(side, length - index * side)


def _as_rows(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return array.reshape(array.shape[0], -1)
