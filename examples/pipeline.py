"""A pipeline that is killed in every one of its steps, and goes on each time from what was finished."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fbcache import FBPool, TrackedDirectory
from fbcache.saga import Pipeline, PipelineResult, SqliteSagaStore

STEPS = ("record", "clean", "spectrum", "rhythm", "report")


def work_on(step: str) -> None:
    """Stand for work; be killed in the middle of it, if the caller wants that."""
    if os.environ.get("KILLED_IN") == step:
        os.kill(os.getpid(), signal.SIGKILL)


def pipeline_in(pool: FBPool, tracked: TrackedDirectory, store: SqliteSagaStore) -> Pipeline:
    """Return the steps: record, clean, then spectrum and rhythm at once, then report."""
    pipeline = Pipeline(pool, tracked, store, "signal")

    @pipeline.step
    def record(seconds: int) -> np.ndarray:
        moments = np.arange(seconds * 8000) / 8000
        noise = np.random.default_rng(1).normal(size=moments.size)
        work_on("record")
        return np.sin(2 * np.pi * 440 * moments) + noise / 4

    @pipeline.step
    def clean(record: np.ndarray) -> np.ndarray:
        work_on("clean")
        return np.convolve(record, np.ones(4) / 4, mode="same")

    @pipeline.step
    def spectrum(clean: np.ndarray) -> np.ndarray:
        work_on("spectrum")
        return np.abs(np.fft.rfft(clean))

    @pipeline.step
    def rhythm(clean: np.ndarray) -> float:
        work_on("rhythm")
        return float(np.mean(np.diff(np.signbit(clean))))

    @pipeline.step
    def report(spectrum: np.ndarray, rhythm: float, seconds: int) -> dict:
        work_on("report")
        return {"hertz": float(spectrum.argmax()) / seconds, "rhythm": rhythm}

    return pipeline


def live(directory: Path) -> tuple[dict, PipelineResult]:
    """Resume the pipeline of that directory, or run it if there is nothing to resume."""
    with (
        FBPool("8MB", directory=directory / "spill") as pool,
        TrackedDirectory(directory / "results") as tracked,
        SqliteSagaStore(directory / "runs.sqlite") as store,
    ):
        result = pipeline_in(pool, tracked, store).resume(seconds=5)
        return result.value("report"), result


def main() -> None:
    """Kill a process in each step, and resume in this one."""
    with TemporaryDirectory() as name:
        expected, _ = live(Path(name, "undisturbed"))
        print(f"undisturbed: {expected['hertz']} Hz")
        for step in STEPS:
            directory = Path(name, step)
            environment = {**os.environ, "KILLED_IN": step}
            killed = subprocess.run([sys.executable, __file__, str(directory)], env=environment)
            if killed.returncode != -signal.SIGKILL:
                raise SystemExit(f"the process should have been killed in {step!r}")
            report, result = live(directory)
            if report != expected:
                raise SystemExit(f"killed in {step!r}, then resumed: {report}, not {expected}")
            loaded = [each for each in STEPS if each not in result.computed]
            print(f"killed in {step}: the same; loaded: {', '.join(loaded) or 'nothing'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        live(Path(sys.argv[1]))
    else:
        main()
