"""The file that the product goes to.

Guarantee: the file has its name only when it is whole; whatever ends the writing early leaves none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fbcache.demo.check import GetTile
from fbcache.demo.matrices import ITEM


def save(
    path: Path, shape: tuple[int, int], tiles: tuple[int, int], product: GetTile, tick: Callable[[], None]
) -> None:
    """Write a matrix to a ``.npy`` file, tile by tile.

    Parameters
    ----------
    shape, tiles : (int, int)
        Rows and columns, of elements and of tiles.
    product : callable
        Returns a tile by its row and column.

    Raises
    ------
    OSError
        It could not be written; nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    header = {"descr": np.dtype(np.float64).str, "fortran_order": False, "shape": shape}
    try:
        with temporary.open("xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            top = 0
            for i in range(tiles[0]):
                left = height = 0
                for j in range(tiles[1]):
                    tile = product(i, j)
                    for row, values in enumerate(tile, start=top):
                        file.seek(start + ITEM * (row * shape[1] + left))
                        file.write(values.data)
                    height, left = len(tile), left + tile.shape[1]
                    tick()
                top += height
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
