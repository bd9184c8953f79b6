"""The product of two matrices, tile by tile, over a pool that cannot hold them.

Guarantee: at any instant three tiles at most are pinned; everything else is the pool's to keep or
to spill. Besides, there is memory for one tile more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from fbcache.demo.matrices import ITEM, Array, Matrix, Transposed
from fbcache.pool import FBPool

#: Share of the budget that one block of the product works on. The rest is for tiles on their way out.
_WORKING_SHARE: Final = 0.6


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix whose tiles are in a pool, under names that start with ``name``.

    Attributes
    ----------
    transposed : bool
        Whether the tiles in the pool are those of the transposed matrix.
    """

    name: str
    matrix: Matrix
    transposed: bool = False

    @classmethod
    def of(cls, name: str, matrix: Matrix) -> Operand:
        """Return the operand for ``matrix``; a transposed one shares the tiles of what it transposes."""
        return cls(name, matrix, isinstance(matrix, Transposed))

    def key(self, row: int, column: int) -> Hashable:
        """Name of a tile."""
        return (self.name, column, row) if self.transposed else (self.name, row, column)

    def view(self, tile: Array) -> Array:
        """The tile as it comes from the pool, turned the right way."""
        return tile.T if self.transposed else tile


def fill(pool: FBPool, name: str, matrix: Matrix, tick: Callable[[], None]) -> None:
    """Put all tiles of ``matrix`` into the pool."""
    rows, columns = matrix.tiles
    for row in range(rows):
        for column in range(columns):
            pool.put((name, row, column), matrix.tile(row, column))
            tick()


class Product:
    """``C = left @ right``, its tiles in the pool under ``("C", row, column)``.

    C is made in square blocks, as large as fit into memory with the tiles of one step: a block of p
    by p tiles takes p tiles of each operand for p * p tile products, so that each operand is
    read once for each p of the other's tiles and not for each one.
    """

    def __init__(self, pool: FBPool, left: Operand, right: Operand) -> None:
        self._pool = pool
        self._left = left
        self._right = right
        self.rows, self._inner = left.matrix.tiles
        self.columns = right.matrix.tiles[1]
        self._block = block_side(pool.memory, left.matrix.side)
        self._scratch = np.empty((left.matrix.side, left.matrix.side))

    @property
    def steps(self) -> int:
        """How many products of two tiles it takes."""
        return self.rows * self.columns * self._inner

    def multiply(self, tick: Callable[[], None]) -> None:
        """Make all of C, with a ``tick`` after each product of two tiles."""
        for rows in _runs(self.rows, self._block):
            for columns in _runs(self.columns, self._block):
                for k in range(self._inner):
                    self._add_products(rows, columns, k, tick)

    def _add_products(self, rows: range, columns: range, k: int, tick: Callable[[], None]) -> None:
        pool, left, right = self._pool, self._left, self._right
        for i in rows:
            with pool.get(left.key(i, k)) as a:
                for j in columns:
                    with pool.get(right.key(k, j)) as b:
                        self._add(("C", i, j), left.view(a), right.view(b), first=k == 0)
                    tick()

    def _add(self, name: Hashable, a: Array, b: Array, *, first: bool) -> None:
        """Add ``a @ b`` to a tile of C. The first time there is none."""
        if first:
            self._pool.put(name, a @ b)
            return
        part = np.matmul(a, b, out=self._scratch[: a.shape[0], : b.shape[1]])
        with self._pool.get_mut(name) as c:
            c += part

    def tile(self, row: int, column: int) -> Array:
        """Return a tile of C, read-only."""
        tile: Array = self._pool["C", row, column]
        return tile


def block_side(budget: int, side: int) -> int:
    """Return the largest p for which p * p + 2 * p tiles fit into the working share of ``budget``."""
    tiles = int(budget * _WORKING_SHARE) // (ITEM * side * side)
    return max(1, math.isqrt(tiles + 1) - 1)


def _runs(count: int, length: int) -> Iterator[range]:
    for start in range(0, count, length):
        yield range(start, min(start + length, count))
