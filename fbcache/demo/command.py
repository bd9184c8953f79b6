"""``fbcache demo``: what it takes from the command line, and its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from pathlib import Path

import click
from rich.console import Console

from fbcache.demo.job import Plan, Report, plan_of_files, plan_of_size, run
from fbcache.demo.matrices import InputError
from fbcache.demo.report import Stages, show
from fbcache.errors import CorruptBlobError
from fbcache.memory import parse_size
from fbcache.pool import FBPool


class Exit(IntEnum):
    """How the command ended."""

    RIGHT = 0
    WRONG = 1  #: the check failed
    BAD_INPUT = 2
    STORAGE = 3  #: files could not be written or read
    INTERRUPTED = 130


def _size(name: str) -> Callable[[click.Context, click.Parameter, str], int]:
    """Return a callback that reads a size."""

    def parse(_: click.Context, parameter: click.Parameter, given: str) -> int:
        try:
            return parse_size(int(given) if given.isdecimal() else given, name=name)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return parse


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option(
    "--memory", default="256MB", show_default=True, callback=_size("memory"), help="The pool's budget."
)
@click.option(
    "--data",
    default="1GB",
    show_default=True,
    callback=_size("data"),
    help="Size of the three matrices together, where no file is given.",
)
@click.option(
    "--tile",
    type=click.IntRange(8, 16384),
    help="Rows and columns of a tile.  [default: the budget decides; at most 1024]",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False),
    help="Where the pool spills to.  [default: the user's cache directory]",
)
@click.option("--output", type=click.Path(dir_okay=False), help="A .npy file to save the product to.")
@click.pass_context
def demo(
    context: click.Context,
    files: tuple[str, ...],
    memory: int,
    data: int,
    tile: int | None,
    directory: str | None,
    output: str | None,
) -> None:
    """Multiply matrices that do not fit into memory, and check the product against numpy.

    Without a FILE, two random matrices are multiplied, so that they and their product take --data
    bytes. With two arrays in FILEs, their matrix product is made; with one, its Gram matrix:
    A.T @ A, or A @ A.T if it has more columns than rows, whichever is smaller.

    A FILE is a .npy file, a .npz archive, which stands for all arrays in it, or one of those, as
    archive.npz:name. Arrays of real numbers of any type will do, and are multiplied as float64. One
    of one dimension counts as a column; in one of more than two, each element of the first axis
    is a row. Object arrays, which take pickle, are refused.

    Exit codes: 0 the product is right, 1 it is not, 2 the input cannot be worked on, 3 files
    could not be written or read, 130 interrupted. Nothing of the pool's is left in any case.
    """
    if files and context.get_parameter_source("data") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--data is for the demo's own matrices; leave it out where files are given")
    errors = Console(stderr=True, emoji=False)
    try:
        target = None if output is None else _new_file(output)
        with _plan(files, memory, data, tile, directory) as plan:
            report = _run(plan, memory, directory, target, errors)
    except InputError as error:
        code = _fail(errors, str(error), Exit.BAD_INPUT)
    except KeyboardInterrupt:
        code = _fail(errors, "interrupted; no files are left", Exit.INTERRUPTED)
    except (CorruptBlobError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        code = _fail(errors, str(error), Exit.STORAGE)
    else:
        show(report, Console(emoji=False))
        if target is not None and target.exists():
            errors.print(f"saved to {target}", soft_wrap=True, highlight=False)
        code = Exit.RIGHT if report.verdict.problem is None else Exit.WRONG
    sys.exit(code)


def _plan(
    files: tuple[str, ...], memory: int, data: int, tile: int | None, directory: str | None
) -> AbstractContextManager[Plan]:
    if files:
        return plan_of_files(files, memory, tile, directory)
    return nullcontext(plan_of_size(data, memory, tile))


def _run(plan: Plan, memory: int, directory: str | None, output: Path | None, console: Console) -> Report:
    with FBPool(memory, directory=directory) as pool, Stages(console) as stages:
        return run(plan, pool, stages, output=output)


def _new_file(given: str) -> Path:
    path = Path(given)
    if path.suffix != ".npy":
        raise InputError(f"{given}: the product is saved as .npy; give such a name")
    if path.exists():
        raise InputError(f"{given}: this is there already; give a new name, or remove it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{given}: the directory it should go to is not there")
    return path


def _fail(console: Console, message: str, code: Exit) -> Exit:
    console.print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code
