"""Whether a product is right, found out by other means than those it was made by.

The operands are read, or made, anew and never through the pool. Two checks:

- Freivalds': ``C @ X == A @ (B @ X)`` for a matrix X of random signs, in time proportional to the
  elements alone. A product with a wrong element passes one column of X with a chance of
  at most one half.
- A few blocks of C against numpy's own product of the rows and columns that they come from.

Where all elements are integers, and small enough that no sum can have been rounded, both ask
for equality to the last bit. Otherwise they allow for rounding: n additions err by at most n units
in the last place of the sum of the absolute values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from fbcache.demo.matrices import Array, Matrix

#: Columns of X: a wrong product passes with a chance of at most 2**-20.
VECTORS: Final = 20

#: Most rows and columns of a block that is compared with numpy's product.
BLOCK: Final = 64

#: Integers up to here are exact in float64.
_EXACT: Final = 2.0**53

GetTile = Callable[[int, int], Array]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was checked, and the first thing that was wrong.

    Attributes
    ----------
    vectors, blocks : int
        How many random vectors and how many blocks were used.
    exact : bool
        Whether equality to the last bit was asked for.
    problem : str or None
        Where the product is wrong; None if it passed.
    """

    vectors: int
    blocks: int
    exact: bool
    problem: str | None


class Checker:
    """Checks ``product``, tile by tile, against the product of ``left`` and ``right``."""

    def __init__(self, left: Matrix, right: Matrix, product: GetTile) -> None:
        self._left = left
        self._right = right
        self._product = product
        self._generator = np.random.default_rng(0)

    @property
    def steps(self) -> int:
        """How many tiles of the three matrices are looked at, in the first of the two checks."""
        (rows, inner), columns = self._left.tiles, self._right.tiles[1]
        return rows * inner + inner * columns + rows * columns

    def check(self, tick: Callable[[], None]) -> Verdict:
        """Do both checks, with a ``tick`` after each tile of the first."""
        signs = self._generator.choice((-1.0, 1.0), (self._right.shape[1], VECTORS))
        expected, largest = self._expected(signs, tick)
        exact = self._left.integral and self._right.integral and float(largest.max()) < _EXACT
        slack = 0.0 if exact else _rounding(self._left.shape[1] + self._right.shape[1])
        problem = self._compare_vectors(signs, expected, largest * slack, tick)
        places = self._places()
        for place in places:
            problem = problem or self._compare_block(*place, slack)
        return Verdict(VECTORS, len(places), exact, problem)

    def _expected(self, signs: Array, tick: Callable[[], None]) -> tuple[Array, Array]:
        """Return A @ (B @ X), and |A| @ (|B| @ 1): the most that any of its sums came to on the way."""
        ones = np.ones((len(signs), 1))
        inner = _apply(self._right, signs, ones, tick)
        return _apply(self._left, *inner, tick)

    def _compare_vectors(
        self, signs: Array, expected: Array, allowed: Array, tick: Callable[[], None]
    ) -> str | None:
        side = self._left.side
        for i in range(self._left.tiles[0]):
            rows = slice(i * side, (i + 1) * side)
            got = np.zeros_like(expected[rows])
            for j in range(self._right.tiles[1]):
                got += self._product(i, j) @ signs[j * side : (j + 1) * side]
                tick()
            wrong = ~(np.abs(got - expected[rows]) <= allowed[rows])
            if wrong.any():
                return f"row {rows.start + int(np.argwhere(wrong)[0][0])} of the product is wrong"
        return None

    def _places(self) -> list[tuple[int, int]]:
        """The tiles of which a block is compared: the first, the last, and one between."""
        rows, columns = self._left.tiles[0], self._right.tiles[1]
        between = int(self._generator.integers(rows)), int(self._generator.integers(columns))
        return sorted({(0, 0), between, (rows - 1, columns - 1)})

    def _compare_block(self, i: int, j: int, slack: float) -> str | None:
        inner = range(self._left.tiles[1])
        rows = np.hstack([self._left.tile(i, k)[:BLOCK] for k in inner])
        columns = np.vstack([self._right.tile(k, j)[:, :BLOCK] for k in inner])
        allowed = slack * (np.abs(rows) @ np.abs(columns))
        difference = np.abs(self._product(i, j)[:BLOCK, :BLOCK] - rows @ columns)
        if (difference <= allowed).all():
            return None
        return f"tile ({i}, {j}) of the product differs from numpy's"


def _apply(matrix: Matrix, vectors: Array, sizes: Array, tick: Callable[[], None]) -> tuple[Array, Array]:
    """Return matrix @ vectors and |matrix| @ sizes."""
    side = matrix.side
    made = np.zeros((matrix.shape[0], vectors.shape[1]))
    largest = np.zeros((matrix.shape[0], 1))
    for i, j in _places_of(matrix):
        tile = matrix.tile(i, j)
        rows, columns = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
        made[rows] += tile @ vectors[columns]
        largest[rows] += np.abs(tile) @ sizes[columns]
        tick()
    return made, largest


def _places_of(matrix: Matrix) -> Iterator[tuple[int, int]]:
    rows, columns = matrix.tiles
    return ((i, j) for i in range(rows) for j in range(columns))


def _rounding(additions: int) -> float:
    """The share of its absolute sum by which a sum may be off, on either side of a comparison."""
    return 2.0 * additions * float(np.finfo(np.float64).eps)
