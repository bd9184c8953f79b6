"""Encoders that other packages bring: a small distribution, installed in a directory of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import fbcache
from fbcache.codec import entry_points, registry
from fbcache.errors import FBCacheWarning

ROOT = Path(fbcache.__file__).parent.parent

#: A library, and a package that knows how its classes are stored.
SHAPES = """
    class Circle:
        def __init__(self, radius): self.radius = radius
    class Square(Circle): pass
    class Strange: pass
"""
SHAPES_FBCACHE = """
    import shapes
    from fbcache.codec import register
    calls = []
    def register_all():
        calls.append(1)
        register(shapes.Circle, lambda circle: circle.radius, shapes.Circle)
        register(shapes.Square, lambda square: square.radius, shapes.Square, name="shapes.square")
"""
EAGER = """
    import shapes
    from fbcache.codec import MsgpackCodec, register
    refused = None
    def eager():
        global refused
        try: MsgpackCodec().encode(shapes.Circle(1), allow_pickle=False)
        except TypeError as error: refused = error
        register(shapes.Circle, lambda circle: circle.radius, shapes.Circle)
"""
AROUND = """
    import sys, warnings
    from fbcache.codec import Frames, MsgpackCodec, register
    from fbcache import FBCacheWarning, PickleRefusedError, UnsupportedTypeError, CorruptBlobError
    codec = MsgpackCodec()
    def encode(value): return codec.encode(value, allow_pickle=False)
    def decode(frames): return codec.decode(frames, writable=False, allow_pickle=False)
    def refused(call, kind):
        try: call()
        except kind as error: return str(error)
        raise AssertionError(f"{kind} was not raised")
"""


def install(directory: Path, modules: dict[str, str], **distributions: str) -> None:
    """Make modules, and distributions with these lines in the group."""
    for name, source in modules.items():
        (directory / f"{name}.py").write_text(dedent(source))
    for name, lines in distributions.items():
        info = directory / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fbcache.codecs]\n{dedent(lines)}\n")


def run(directory: Path, script: str) -> str:
    """Run a script in a process of its own that has the directory on its path; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", dedent(AROUND) + dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    modules = {"shapes": SHAPES, "shapes_fbcache": SHAPES_FBCACHE}
    install(tmp_path, modules, shapes_fbcache="shapes = shapes_fbcache:register_all")
    return tmp_path


def test_it_is_loaded_when_a_value_of_the_library_is_first_met_and_once(shapes: Path) -> None:
    run(
        shapes,
        """
        encode({"numbers": [1, 2.5]})
        refused(lambda: encode(register), PickleRefusedError)
        assert "shapes_fbcache" not in sys.modules and "shapes" not in sys.modules
        import shapes
        assert "shapes_fbcache" not in sys.modules
        back = decode(encode([shapes.Circle(2.5), shapes.Square([1])]))
        assert [type(shape).__name__ for shape in back] == ["Circle", "Square"] and back[0].radius == 2.5
        refused(lambda: encode(shapes.Strange()), PickleRefusedError)
        assert sys.modules["shapes_fbcache"].calls == [1]
        """,
    )


def test_a_fresh_process_decodes_what_it_never_heard_of(shapes: Path) -> None:
    made = run(
        shapes,
        """
        import shapes
        print(encode([shapes.Circle(5), shapes.Square(6), shapes.Circle(7)]).tree.hex())
        """,
    )
    printed = run(
        shapes,
        f"""
        tree = bytes.fromhex({made.strip()!r})
        back = decode(Frames("msgpack", tree, ()))
        print(type(back[0]).__module__, [shape.radius for shape in back], sys.modules["shapes_fbcache"].calls)
        """,
    )
    assert printed == "shapes [5, 6, 7] [1]\n"


def test_a_checkpoint_is_opened_by_a_fresh_process_without_pickle(shapes: Path) -> None:
    run(
        shapes,
        f"""
        import shapes
        from fbcache import FBPool
        with FBPool("10MB", directory={str(shapes / "spill")!r}) as pool:
            pool.put("shapes", {{"a": shapes.Circle([1, 2]), "b": [shapes.Square("x" * 200_000)]}})
            pool.evict()
            with pool.get("shapes") as value:
                assert value["a"].radius == [1, 2]
            pool.save({str(shapes / "saved")!r})
        """,
    )
    run(
        shapes,
        f"""
        from fbcache import FBPool
        with FBPool.from_checkpoint({str(shapes / "saved")!r}, directory={str(shapes / "spill")!r}) as pool:
            with pool.get("shapes") as value:
                assert value["a"].radius == [1, 2] and len(value["b"][0].radius) == 200_000
        """,
    )


def test_data_can_load_an_installed_entry_point_and_nothing_else(shapes: Path) -> None:
    (shapes / "evil.py").write_text("raise SystemExit('evil was imported')")
    run(
        shapes,
        """
        import msgpack
        from fbcache.codec import entry_points, tags
        for name in ("evil", "evil.X", "evil:X", "os.system", "shapes_fbcache", "shapes_fbcache:register_all",
                     "", ".", "..", "shapes_fbcache.register_all", "../evil", "fbcache.codecs", "Shapes.X"):
            tree = msgpack.packb([tags.OBJECT, name, None])
            said = refused(lambda: decode(Frames("msgpack", tree, ())), UnsupportedTypeError)
            assert "not registered" in said
        assert not {"evil", "shapes", "shapes_fbcache"} & sys.modules.keys()
        tree = msgpack.packb([tags.OBJECT, "shapes.Unknown", None])
        refused(lambda: decode(Frames("msgpack", tree, ())), UnsupportedTypeError)
        assert "shapes_fbcache" in sys.modules, "this one is installed for the library that was named"
        """,
    )


def test_what_the_user_registers_goes_before_what_is_installed(shapes: Path) -> None:
    run(
        shapes,
        """
        import shapes
        register(shapes.Circle, lambda circle: [circle.radius], lambda state: shapes.Circle(*state))
        assert decode(encode(shapes.Circle(4))).radius == 4
        assert "shapes_fbcache" not in sys.modules
        """,
    )


@pytest.mark.parametrize(
    ("lines", "source"),
    [
        ("shapes = missing_module:register_all", ""),
        ("shapes = broken:nothing", ""),
        ("shapes = broken:call", "def call(): 1 / 0"),
        ("shapes = broken:call", "import sys\nsys.exit(3)"),
        ("shapes = broken:call", "def call(needs, arguments): pass"),
        ("shapes = broken:call", "this is no Python"),
        ("shapes = broken:call", "from fbcache.codec import register\ndef call(): register(int)"),
        ("shapes = no value at all", ""),
    ],
)
def test_a_broken_one_warns_once_and_the_value_goes_on(tmp_path: Path, lines: str, source: str) -> None:
    install(tmp_path, {"shapes": SHAPES, "broken": source}, broken=lines)
    run(
        tmp_path,
        """
        import shapes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                refused(lambda: encode(shapes.Circle(1)), PickleRefusedError)
                pickled = codec.encode(shapes.Circle(2), allow_pickle=True)
        assert [w.category for w in caught] == [FBCacheWarning], [str(w.message) for w in caught]
        assert "entry point 'shapes = " in str(caught[0].message)
        assert codec.decode(pickled, writable=False, allow_pickle=True).radius == 2
        """,
    )


def test_a_broken_one_takes_no_pool_down(tmp_path: Path) -> None:
    install(tmp_path, {"shapes": SHAPES, "broken": "raise SystemExit(1)"}, broken="shapes = broken:call")
    printed = run(
        tmp_path,
        f"""
        import shapes
        from fbcache import FBPool
        with FBPool("10MB", directory={str(tmp_path / "spill")!r}, io_threads=1) as pool:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for turn in range(3):
                    pool.put(turn, shapes.Circle(turn))
                pool.evict()
            for turn in range(3):
                with pool.get(turn) as circle:
                    assert circle.radius == turn
            print(pool.stats().errors)
        """,
    )
    assert printed == "0\n"


def test_two_packages_for_one_library_and_a_module_instead_of_a_callable(tmp_path: Path) -> None:
    parts = {
        "one": "import shapes\nfrom fbcache.codec import register\n"
        "register(shapes.Circle, lambda circle: circle.radius, shapes.Circle)",
        "two": "import shapes\nfrom fbcache.codec import register\n"
        "def call(): register(shapes.Square, lambda square: square.radius, shapes.Square)",
    }
    install(tmp_path, {"shapes": SHAPES, **parts}, first="shapes = one", second="shapes = two:call")
    run(
        tmp_path,
        """
        import shapes
        assert [shape.radius for shape in decode(encode([shapes.Circle(1), shapes.Square(2)]))] == [1, 2]
        """,
    )


def test_one_that_encodes_while_it_is_loaded_does_not_go_round_in_circles(tmp_path: Path) -> None:
    modules = {"shapes": SHAPES, "shapes_fbcache": EAGER}
    install(tmp_path, modules, shapes_fbcache="shapes = shapes_fbcache:eager")
    run(
        tmp_path,
        """
        import shapes
        assert decode(encode(shapes.Circle(3))).radius == 3
        assert "takes pickle" in str(sys.modules["shapes_fbcache"].refused)
        """,
    )


# ------------------------------------------------------------------ in this process


class Point:
    """For an entry point that serves this module."""


def pretend(monkeypatch: pytest.MonkeyPatch, load: Any) -> list[int]:
    """Have one entry point for this module; return what counts the look-ups."""
    looked: list[int] = []

    class EntryPoint(metadata.EntryPoint):
        def load(self) -> Any:
            return load

    def found(**given: Any) -> Any:
        assert given == {"group": "fbcache.codecs"}
        looked.append(1)
        return (EntryPoint(Point.__module__.partition(".")[0], "pretended:load", "fbcache.codecs"),)

    monkeypatch.setattr(entry_points, "_found", None)
    monkeypatch.setattr(entry_points, "_settled", set())
    monkeypatch.setattr(metadata, "entry_points", found)
    return looked


def test_entry_points_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    looked = pretend(monkeypatch, lambda: called.append(1))
    for _ in range(3):
        assert registry.by_type(Point) is None
        assert not entry_points.load("elsewhere")
    assert looked == [1] and called == [1]


def test_a_thread_that_comes_while_another_loads_it_does_not_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls the entry point itself, and waits for nobody."""
    inside, go = threading.Event(), threading.Event()
    first = threading.Thread(target=lambda: registry.by_type(Point))

    def load() -> None:
        if threading.current_thread() is first:
            inside.set()
            assert go.wait(30)
        registry.register(Point, lambda _: None, lambda _: Point())

    pretend(monkeypatch, load)
    try:
        first.start()
        assert inside.wait(30)
        assert registry.by_type(Point) is not None
    finally:
        go.set()
        first.join()
    assert registry.by_type(Point) is not None


def test_two_threads_that_load_a_broken_one_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both, said = threading.Barrier(2, timeout=30), []

    def load() -> None:
        both.wait()
        raise ValueError("broken")

    pretend(monkeypatch, load)
    monkeypatch.setattr(entry_points, "_warn", said.append)
    threads = [threading.Thread(target=registry.by_type, args=(Point,)) for _ in range(2)]
    monkeypatch.setattr(registry, "_by_type", {})
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1 and "broken" in said[0]


def test_metadata_that_cannot_be_read_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Any:
        raise OSError("a directory that may not be read")

    monkeypatch.setattr(entry_points, "_found", None)
    monkeypatch.setattr(metadata, "entry_points", broken)
    with pytest.warns(FBCacheWarning, match="may not be read"):
        assert not entry_points.load("shapes")
    assert not entry_points.load("shapes")
