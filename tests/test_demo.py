"""The command line: the demo on its own matrices and on files, what it refuses, and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fbcache import FBPool, __version__
from fbcache.commands import fbcache
from fbcache.demo import command, job, output
from fbcache.demo.check import Checker
from fbcache.demo.job import plan_of_files, plan_of_size
from fbcache.demo.matrices import InputError, RandomMatrix, Transposed
from fbcache.demo.product import Operand, Product, block_side, fill
from fbcache.demo.report import size
from tests.faults import PATIENCE

MakePool = Callable[..., FBPool]


def nothing() -> None:
    pass


@contextmanager
def no_stage(name: str, steps: int) -> Iterator[Callable[[], None]]:
    yield nothing


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; the pool's files and temporary ones go below it."""
    for name in ("cache", "tmp", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def demo(*arguments: Any) -> Result:
    result = CliRunner().invoke(fbcache, ["demo", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def leftovers(home: Path) -> list[Path]:
    """All files but those that the test put into its working directory."""
    return [path for path in home.parent.rglob("*") if path.is_file() and home not in path.parents]


def save(name: str, array: Any) -> str:
    np.save(name, array)
    return name


def random(*shape: int, dtype: Any = float) -> Any:
    return np.random.default_rng(0).normal(0, 50, shape).astype(dtype)


# ------------------------------------------------------------------ its own matrices


def test_the_demo_is_right_and_says_so(home: Path) -> None:
    result = demo("--memory", "64kB", "--data", "400kB")
    assert result.exit_code == 0, result.output
    assert "right" in result.stdout
    assert "to the last bit" in result.stdout
    for label in ("budget", "data in the pool", "by the pool", "by the system", "hits", "loads", "spills"):
        assert label in result.stdout
    assert "GB/s" in result.stdout
    assert "GFLOP/s" in result.stdout
    assert "multiplying" in result.stderr
    assert not leftovers(home)


def test_the_data_exceed_the_budget_and_memory_does_not(make_pool: MakePool) -> None:
    pool = make_pool("64kB")
    report = job.run(plan_of_size(400_000, pool.memory, None), pool, no_stage)
    pinned_and_moving = 6 * 8 * report.plan.left.side**2
    assert report.plan.nbytes > 5 * pool.memory
    assert report.pool_peak <= pool.memory + pinned_and_moving
    assert report.stats.loads
    assert report.stats.spills
    assert report.process_peak >= report.process_before > 0
    assert set(report.seconds) == {"fill", "multiply", "check"}


@pytest.mark.parametrize("data", ["1MB", "3MB"])
def test_the_size_is_about_the_one_asked_for(data: str) -> None:
    wanted = int(data[0]) * 1_000_000
    plan = plan_of_size(wanted, 100_000, None)
    assert 0.7 * wanted < plan.nbytes < 1.4 * wanted


def test_a_tile_can_be_chosen(home: Path) -> None:
    result = demo("--memory", "1MB", "--data", "200kB", "--tile", 40)
    assert "40 x 40" in result.stdout


def test_a_budget_smaller_than_a_tile_works(home: Path) -> None:
    assert demo("--memory", "1", "--data", "20kB").exit_code == 0


def test_the_spill_directory_can_be_chosen(home: Path) -> None:
    assert demo("--memory", "64kB", "--data", "200kB", "--directory", "spill").exit_code == 0
    assert list(home.iterdir()) == [home / "spill"]
    assert not list((home / "spill").iterdir())


def test_a_wrong_product_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Product.tile
    monkeypatch.setattr(Product, "tile", lambda self, i, j: right(self, i, j) + (i == j == 0))
    result = demo("--memory", "64kB", "--data", "200kB", "--output", "c.npy")
    assert result.exit_code == 1
    assert "wrong" in result.stdout
    assert not list(home.iterdir()), "a wrong product was saved"


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (3, 3)])
@pytest.mark.parametrize("integral", [True, False])
def test_one_wrong_element_is_found_wherever_it_is(place: tuple[int, int], integral: bool) -> None:
    left, right = (RandomMatrix("m", (64, 64), 16, seed=seed) for seed in (1, 2))
    left.integral = integral

    def product(i: int, j: int) -> Any:
        tiles = [left.tile(i, k) @ right.tile(k, j) for k in range(4)]
        made = np.sum(tiles, axis=0)
        made[5, 7] += (i, j) == place
        return made

    verdict = Checker(left, right, product).check(nothing)
    assert verdict.exact == integral
    assert verdict.problem is not None
    assert f"row {16 * place[0] + 5}" in verdict.problem


def test_blocks_fit_into_memory_with_what_they_are_made_of() -> None:
    for budget in (1, 10_000, 1_000_000, 256_000_000):
        p = block_side(budget, 32)
        assert p == 1 or (p * p + 2 * p) * 8 * 32 * 32 <= budget


def test_a_transposed_operand_shares_the_tiles_of_its_matrix(make_pool: MakePool) -> None:
    matrix = RandomMatrix("A", (50, 30), 16, seed=0)
    pool = make_pool("1MB")
    fill(pool, "A", matrix, nothing)
    product = Product(pool, Operand.of("A", Transposed(matrix)), Operand.of("A", matrix))
    product.multiply(nothing)
    whole = np.block([[matrix.tile(i, j) for j in range(2)] for i in range(4)])
    made = np.block([[product.tile(i, j) for j in range(2)] for i in range(2)])
    assert np.array_equal(made, whole.T @ whole)


# ------------------------------------------------------------------ files


def test_two_arrays_are_multiplied(home: Path) -> None:
    left, right = random(130, 70), random(70, 45)
    result = demo(save("a.npy", left), save("b.npy", right), "--memory", "30kB", "--output", "c.npy")
    assert result.exit_code == 0, result.output
    assert "but for rounding" in result.stdout
    np.testing.assert_allclose(np.load("c.npy"), left @ right, rtol=1e-9, atol=1e-9)
    assert sorted(path.name for path in home.iterdir()) == ["a.npy", "b.npy", "c.npy"]
    assert not leftovers(home)


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (60,), (20, 3, 4)])
def test_one_array_gives_its_smaller_gram_matrix(home: Path, shape: tuple[int, ...]) -> None:
    array = random(*shape)
    assert demo(save("a.npy", array), "--memory", "20kB", "--output", "c.npy").exit_code == 0
    rows = array.reshape(shape[0], -1)
    expected = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    np.testing.assert_allclose(np.load("c.npy"), expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", ">i4", "float16", ">f8", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_all_real_types_and_orders_work(home: Path, dtype: str, order: Any) -> None:
    array = np.abs(random(50, 40)).astype(dtype, order=order)
    result = demo(save("a.npy", array), "--memory", "20kB", "--output", "c.npy")
    assert result.exit_code == 0, result.output
    assert ("to the last bit" in result.stdout) == (np.dtype(dtype).kind in "biu")
    wide = array.astype(float)
    np.testing.assert_allclose(np.load("c.npy"), wide.T @ wide, rtol=1e-9)


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_the_arrays_of_an_archive_are_multiplied(home: Path, pack: Any) -> None:
    left, right = random(30, 20), np.asfortranarray(random(20, 10))
    pack("ab.npz", left, right)
    assert demo("ab.npz", "--output", "c.npy").exit_code == 0
    np.testing.assert_allclose(np.load("c.npy"), left @ right, rtol=1e-9, atol=1e-9)
    assert not leftovers(home)


def test_one_array_of_an_archive_can_be_named(home: Path) -> None:
    np.savez("many.npz", x=random(30, 20), y=random(7), z=random(2, 2))
    assert "x.npy" not in demo("many.npz:x").stderr
    assert demo("many.npz").exit_code == 2
    assert demo("many.npz:x").exit_code == 0


def test_files_are_read_a_tile_at_a_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that stayed mapped would count among the process's memory."""
    save("a.npy", random(300, 300))
    opened = []
    load = np.load

    def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
        with open("/proc/self/maps") as maps:
            opened.append("a.npy" in maps.read())
        return load(path, *args, **kwargs)

    monkeypatch.setattr(np, "load", watched)
    assert demo("a.npy", "--memory", "100kB").exit_code == 0
    assert not any(opened)


# ------------------------------------------------------------------ what is refused


def bad_files() -> dict[str, tuple[Callable[[], Sequence[str]], str]]:
    def text(name: str, content: bytes) -> Sequence[str]:
        Path(name).write_bytes(content)
        return [name]

    def cut(keep: int) -> Sequence[str]:
        save("a.npy", random(20, 20))
        return text("a.npy", Path("a.npy").read_bytes()[:keep])

    def archive(name: str, member: str, content: bytes) -> Sequence[str]:
        with zipfile.ZipFile(name, "w") as made:
            made.writestr(member, content)
        return [name]

    def flipped() -> Sequence[str]:
        np.savez("a.npz", random(20, 20))
        raw = bytearray(Path("a.npz").read_bytes())
        raw[1000] ^= 255
        return text("a.npz", bytes(raw))

    def with_nan() -> Sequence[str]:
        array = random(90, 90)
        array[70, 5] = np.nan
        return [save("a.npy", array), "--tile", "32"]

    def objects() -> Any:
        return np.array([{"a": 1}, None], dtype=object)

    def cube() -> Any:
        return np.asfortranarray(random(3, 4, 5))

    ab = lambda a, b: [save("a.npy", random(*a)), save("b.npy", random(*b))]  # noqa: E731
    return {
        "missing": (lambda: ["nowhere.npy"], "no such file"),
        "a directory": (lambda: ["."], "not a file"),
        "empty file": (lambda: text("a.npy", b""), "is empty"),
        "text": (lambda: text("a.npy", b"1 2 3\n4 5 6\n"), "no whole .npy file"),
        "cut in the header": (lambda: cut(30), "no whole .npy file"),
        "cut in the data": (lambda: cut(1000), "no whole .npy file"),
        "objects": (lambda: [save("a.npy", objects())], "pickle"),
        "pickle": (lambda: text("a.npy", b"\x80\x04]."), "no whole .npy file"),
        "strings": (lambda: [save("a.npy", np.array(["a", "b"]))], "not numbers"),
        "dates": (lambda: [save("a.npy", np.array(["2020-01-01"], "M8[D]"))], "not numbers"),
        "records": (lambda: [save("a.npy", np.zeros(3, [("x", int)]))], "not numbers"),
        "complex": (lambda: [save("a.npy", random(3, 3) * 1j)], "complex"),
        "a scalar": (lambda: [save("a.npy", np.float64(1))], "no matrix"),
        "no elements": (lambda: [save("a.npy", np.zeros((0, 3)))], "(0, 3)"),
        "NaN": (with_nan, "row 70, column 5"),
        "three axes, Fortran": (lambda: [save("a.npy", cube())], "Fortran"),
        "shapes": (lambda: ab((3, 4), (5, 6)), "no product"),
        "shapes, transposed": (lambda: ab((3, 4), (6, 4)), "transposed"),
        "too many": (lambda: [*ab((3, 3), (3, 3)), "a.npy"], "3 arrays"),
        "empty archive": (lambda: archive("a.npz", "readme", b"no"), "no array"),
        "archive of junk": (lambda: archive("a.npz", "x.npy", b"junk"), "a.npz:x"),
        "archive of pickle": (lambda: archive("a.npz", "x.npy", b"\x80\x04]."), "a.npz:x"),
        "flipped bit in archive": (flipped, "damaged"),
        "no such member": (lambda: [archive("a.npz", "x.npy", b"")[0] + ":y"], "'x'"),
        "member of no archive": (lambda: [save("a.npy", random(3)) + ":y"], "not a .npz"),
    }


@pytest.mark.parametrize("case", bad_files())
def test_bad_files_are_refused_with_a_reason(home: Path, case: str) -> None:
    make, reason = bad_files()[case]
    result = demo(*make())
    assert result.exit_code == 2, result.output
    assert reason in result.stderr
    assert "Traceback" not in result.output
    assert not leftovers(home)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory", "0"),
        ("--memory", "-1"),
        ("--memory", "plenty"),
        ("--data", "lots"),
        ("--tile", "1"),
        ("--output", "c.txt"),
        ("--output", "there.npy"),
        ("--output", "nowhere/c.npy"),
        ("there.npy", "--data", "1MB"),
        ("--unknown",),
    ],
    ids=" ".join,
)
def test_bad_options_are_refused(home: Path, arguments: Sequence[str]) -> None:
    save("there.npy", np.zeros(3))
    result = demo(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert [path.name for path in home.iterdir()] == ["there.npy"]


def test_a_file_that_changes_meanwhile_is_an_error(home: Path) -> None:
    save("a.npy", random(40, 40))
    with plan_of_files(["a.npy"], 10_000, 16, None) as plan:
        save("a.npy", random(40, 41))
        with pytest.raises(InputError, match="has changed"):
            plan.right.tile(0, 0)


# ------------------------------------------------------------------ storage, and the end


def test_a_spill_directory_that_cannot_be_made_is_an_error_of_storage(home: Path) -> None:
    save("file.npy", random(3))
    result = demo("--data", "20kB", "--directory", "file.npy/spill")
    assert result.exit_code == 3
    assert "file.npy/spill" in result.stderr


def test_a_product_that_cannot_be_saved_leaves_no_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "replace", fail)
    result = demo("--data", "20kB", "--output", "c.npy")
    assert result.exit_code == 3
    assert "No space left" in result.stderr
    assert not list(home.iterdir())


def test_an_interrupt_leaves_no_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Product._add
    calls = []

    def interrupted(self: Product, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt
        add(self, *args, **kwargs)

    monkeypatch.setattr(Product, "_add", interrupted)
    result = demo("--memory", "64kB", "--data", "400kB", "--output", "c.npy")
    assert result.exit_code == command.Exit.INTERRUPTED
    assert not list(home.iterdir())
    assert not leftovers(home)


def process(*arguments: str, home: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home / "tmp")}
    return subprocess.Popen(
        [sys.executable, "-m", "fbcache", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env=environment,
        **options,
    )


def test_as_a_process_without_a_terminal(home: Path) -> None:
    child = process("demo", "--memory", "1MB", "--data", "8MB", home=home.parent)
    out, errors = child.communicate(timeout=PATIENCE * 2)
    assert child.returncode == 0, errors
    assert "right" in out
    assert "\x1b" not in out + errors
    assert not leftovers(home)


def test_a_signal_to_the_process_leaves_no_files(home: Path) -> None:
    child = process("demo", "--memory", "1MB", "--data", "100MB", home=home.parent, start_new_session=True)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("multiplying"):
            break
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=PATIENCE * 2)
    assert child.returncode == 130, errors
    assert not out
    assert "interrupted" in errors
    assert not leftovers(home)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_extra_the_command_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from fbcache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE * 2)
    assert done.returncode == 2
    assert "pip install 'fbcache[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version() -> None:
    runner = CliRunner()
    assert "demo" in runner.invoke(fbcache, ["--help"]).output
    assert __version__ in runner.invoke(fbcache, ["--version"]).output
    assert "Exit codes" in runner.invoke(fbcache, ["demo", "--help"]).output


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_900, "1 MB"), (3 * 10**12, "3 TB")],
)
def test_sizes_are_read_easily(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
