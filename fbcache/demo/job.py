"""A plan, made of sizes or of the user's files, and its run: fill, multiply, check, save."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from fbcache.demo.check import Checker, Verdict
from fbcache.demo.inputs import Source, find_arrays, open_matrix
from fbcache.demo.matrices import ITEM, InputError, Matrix, RandomMatrix, Transposed
from fbcache.demo.output import save
from fbcache.demo.product import Operand, Product, fill
from fbcache.demo.watch import Watch
from fbcache.memory import resident_memory
from fbcache.pool import FBPool
from fbcache.stats import PoolStats

#: Tiles that a budget has room for, at least, if the caller does not choose their size.
_TILES_IN_BUDGET: Final = 32

#: Rows of a tile, where the demo chooses: below, Python's part of the work shows; above, nothing is
#: gained, for numpy's product runs at its full rate.
_SIDES: Final = (16, 1024)

Tick = Callable[[], None]


class Stage(Protocol):
    """Announces a part of the run: a name, and how many steps it has."""

    def __call__(self, name: str, steps: int, /) -> AbstractContextManager[Tick]:
        """Return what is entered for that part; it gives what to call after each step."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to multiply: ``left @ right``.

    Attributes
    ----------
    title : str
        What the product is, in words.
    """

    title: str
    left: Matrix
    right: Matrix

    @property
    def bases(self) -> list[Matrix]:
        """The matrices that are put into the pool; a Gram matrix is made of one."""
        bases = [m.matrix if isinstance(m, Transposed) else m for m in (self.left, self.right)]
        return bases[:1] if bases[0] is bases[1] else bases

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices that the pool will hold, the product included."""
        return sum(m.nbytes for m in self.bases) + ITEM * self.left.shape[0] * self.right.shape[1]

    @property
    def flops(self) -> int:
        """Additions and multiplications that the product takes."""
        return 2 * self.left.shape[0] * self.left.shape[1] * self.right.shape[1]


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to.

    Attributes
    ----------
    plan : Plan
        What was multiplied.
    verdict : Verdict
        Whether it is right.
    stats : PoolStats
        The pool's figures at the end.
    pool_peak : int
        Most bytes of values in memory, as the pool counts them.
    process_peak, process_before : int
        Physical memory of the process: at most, and before the pool was opened.
    seconds : dict of str to float
        Time of each stage.
    """

    plan: Plan
    verdict: Verdict
    stats: PoolStats
    pool_peak: int
    process_peak: int
    process_before: int
    seconds: dict[str, float]


def plan_of_size(data: int, budget: int, side: int | None) -> Plan:
    """Plan the product of two random matrices, so that all three take about ``data`` bytes."""
    length = math.sqrt(data / (3 * ITEM))
    side = side or _side(budget, int(length) // 2)
    length = side * max(2, round(length / side))
    left, right = (RandomMatrix(name, (length, length), side, seed=seed) for seed, name in enumerate("AB"))
    return Plan("C = A @ B, random integers", left, right)


@contextmanager
def plan_of_files(
    paths: Sequence[str], budget: int, side: int | None, directory: str | None
) -> Iterator[Plan]:
    """Plan the product of two arrays in files, or the Gram matrix of one.

    Parameters
    ----------
    paths : sequence of str
        ``.npy`` files, ``.npz`` archives, or ``archive.npz:name``.
    directory : str or None
        Where members of archives are unpacked; what was is removed at the end.

    Raises
    ------
    InputError
        They are no such arrays, not one or two of them, or do not fit each other.
    """
    sources = find_arrays(paths)
    if len(sources) > 2:
        raise InputError(
            f"{len(sources)} arrays are too many: give two to multiply, or one for its Gram matrix. "
            f"There are {', '.join(source.label for source in sources)}"
        )
    if directory is not None:
        os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fbcache-demo-", dir=directory) as scratch:
        yield _plan(sources, side or _side(budget, _SIDES[1]), Path(scratch))


def run(plan: Plan, pool: FBPool, stage: Stage, *, output: Path | None = None) -> Report:
    """Fill the pool, multiply, check the product, and save it if that is asked for.

    Raises
    ------
    InputError
        An array has elements that cannot be worked with.
    StorageError, OSError
        The pool, or the file, could not be written.
    """
    _warm_up()
    before = resident_memory()
    operands = _operands(plan)
    product = Product(pool, *operands)
    checker = Checker(plan.left, plan.right, product.tile)
    seconds: dict[str, float] = {}
    with Watch(pool) as watch:
        with _timed(stage, seconds, "fill", sum(math.prod(m.tiles) for m in plan.bases)) as tick:
            for name, base in zip("AB", plan.bases, strict=False):
                fill(pool, name, base, tick)
        with _timed(stage, seconds, "multiply", product.steps) as tick:
            product.multiply(tick)
        with _timed(stage, seconds, "check", checker.steps) as tick:
            verdict = checker.check(tick)
        if output is not None and verdict.problem is None:
            shape = plan.left.shape[0], plan.right.shape[1]
            tiles = product.rows, product.columns
            with _timed(stage, seconds, "save", math.prod(tiles)) as tick:
                save(output, shape, tiles, product.tile, tick)
        pool.drain()
        pool.validate()
    return Report(plan, verdict, pool.stats(), watch.pool_bytes, watch.process_bytes, before, seconds)


def _side(budget: int, most: int) -> int:
    """Return the power of two, at most ``most``, that gives tiles of which the budget holds enough."""
    side = math.isqrt(budget // (_TILES_IN_BUDGET * ITEM))
    least, largest = _SIDES
    wanted = max(least, min(side, most, largest))
    return 1 << (wanted.bit_length() - 1)


def _plan(sources: Sequence[Source], side: int, scratch: Path) -> Plan:
    first, *rest = [open_matrix(source, side, scratch) for source in sources]
    if rest:
        return _product_plan(first, rest[0])
    if first.shape[0] < first.shape[1]:
        return Plan(f"C = A @ A.T, A = {first.label}", first, Transposed(first))
    return Plan(f"C = A.T @ A, A = {first.label}", Transposed(first), first)


def _product_plan(left: Matrix, right: Matrix) -> Plan:
    if left.shape[1] != right.shape[0]:
        hint = "; the second one fits when it is transposed" if left.shape[1] == right.shape[1] else ""
        raise InputError(
            f"{left.label} has {left.shape[1]} columns and {right.label} {right.shape[0]} rows, so they have "
            f"no product (shapes {left.shape} and {right.shape}){hint}"
        )
    return Plan(f"C = A @ B, A = {left.label}, B = {right.label}", left, right)


def _operands(plan: Plan) -> tuple[Operand, Operand]:
    shared = len(plan.bases) == 1
    return Operand.of("A", plan.left), Operand.of("A" if shared else "B", plan.right)


@contextmanager
def _timed(stage: Stage, seconds: dict[str, float], name: str, steps: int) -> Iterator[Tick]:
    since = time.perf_counter()
    with stage(name, steps) as tick:
        yield tick
    seconds[name] = time.perf_counter() - since


def _warm_up() -> None:
    """Have numpy's linear algebra start its threads, whose memory is not the pool's doing."""
    square = np.ones((512, 512))
    np.matmul(square, square)
