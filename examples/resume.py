"""A training run that is killed again and again, and ends with the very weights of one that is not.

Run without arguments, it starts itself as a child, kills it, and starts it again, which goes on from the
last checkpoint.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fbcache import CheckpointNotFoundError, FBPool

STEPS = 600
EVERY = 25
KILL_AFTER = (110, 260, 430)

INPUTS, HIDDEN, BATCH = 50, 200, 64


def start(pool: FBPool) -> None:
    """Put the weights that every run begins with, and their momentum."""
    random = np.random.default_rng(0)
    pool.put("first", random.normal(0, 0.1, (INPUTS, HIDDEN)))
    pool.put("second", random.normal(0, 0.1, (HIDDEN, 1)))
    pool.put("momentum", {"first": np.zeros((INPUTS, HIDDEN)), "second": np.zeros((HIDDEN, 1))})


def learn(pool: FBPool, step: int) -> float:
    """Take one step of stochastic gradient descent; what it draws depends on its number only."""
    inputs = np.random.default_rng(step).normal(size=(BATCH, INPUTS))
    wanted = np.sin(inputs[:, :1] + inputs[:, 1:2])
    with (
        pool.get_mut("first") as first,
        pool.get_mut("second") as second,
        pool.get_mut("momentum") as momentum,
    ):
        hidden = np.tanh(inputs @ first)
        error = hidden @ second - wanted
        back = error @ second.T * (1 - hidden**2)
        for weights, gradient, name in (
            (second, hidden.T @ error, "second"),
            (first, inputs.T @ back, "first"),
        ):
            momentum[name] *= 0.9
            momentum[name] += gradient / BATCH
            weights -= 0.02 * momentum[name]
    return float((error**2).mean())


def train(directory: Path) -> None:
    """Train to the end, from the last checkpoint if there is one, and say each step that is done."""
    with FBPool("64MB", directory=directory / "spilled") as pool:
        try:
            step = pool.restore(directory / "checkpoints").meta["step"]
            print("resumed", step, flush=True)
        except CheckpointNotFoundError:
            start(pool)
            step = 0
        while step < STEPS:
            learn(pool, step)
            step += 1
            if step % EVERY == 0:
                pool.save(directory / "checkpoints", meta={"step": step})
            print("done", step, flush=True)


def run_and_kill(directory: Path, after: int | None) -> None:
    """Train in a child; kill it when it says that it has done step ``after``."""
    command = [sys.executable, str(Path(__file__).resolve()), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            word, step = line.split()
            if word == "resumed":
                print(f"a new process goes on from step {step}")
            elif int(step) == after:
                child.kill()  # SIGKILL: it cannot tidy up, nor finish a save
                print(f"killed after step {step}")
                break
    if after is None and child.returncode != 0:
        raise SystemExit(f"the child ended with {child.returncode}")


def main() -> None:
    """Compare a run that is killed three times with one that is not."""
    with tempfile.TemporaryDirectory() as temporary:
        killed, whole = Path(temporary, "killed"), Path(temporary, "whole")
        for after in (*KILL_AFTER, None):
            run_and_kill(killed, after)
        run_and_kill(whole, None)

        with (
            FBPool.from_checkpoint(killed / "checkpoints", memory="64MB", directory=temporary) as one,
            FBPool.from_checkpoint(whole / "checkpoints", memory="64MB", directory=temporary) as other,
        ):
            same = all(np.array_equal(one[name], other[name]) for name in ("first", "second"))
            print(f"the error after {STEPS} steps is {learn(one, STEPS):.3f}")
        print("the weights are those of a run that was never killed" if same else "the weights differ")
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]))
    else:
        main()
