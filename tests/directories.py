"""Tracked directories for tests: looked at, damaged, and used by other processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fbcache.store.blobfile import MAP_LEAST
from tests.faults import PATIENCE

_BLOB = re.compile(r"[0-9a-f]{32}")


def blobs_in(directory: Path) -> set[str]:
    """The names of the blobs."""
    return {path.name for path in directory.glob("??/*") if _BLOB.fullmatch(path.name)}


def blob_of(directory: Path, key: Any) -> Path:
    return directory / key.hex[:2] / key.hex


def versions_on(directory: Path) -> list[int]:
    """The versions whose manifests are visible."""
    return sorted(int(path.stem) for path in (directory / ".fbcache" / "checkpoints").glob("*.manifest"))


def manifest_of(directory: Path, version: int) -> Path:
    return directory / ".fbcache" / "checkpoints" / f"{version:010d}.manifest"


def sessions_in(directory: Path) -> list[Path]:
    """The reader sessions."""
    return sorted((directory / ".fbcache" / "readers").glob("session-*"))


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Change one byte of a file in place; a negative offset counts from its end."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= mask
    with open(path, "r+b") as file:
        file.write(raw)


def replaced(path: Path, raw: bytes) -> None:
    """Put another file in the place of ``path``: those who have the former one keep it."""
    path.unlink()
    path.write_bytes(raw)


def large(seed: int = 0) -> np.ndarray:
    """An array that is mapped when it comes back."""
    return np.random.default_rng(seed).integers(0, 255, 2 * MAP_LEAST, np.uint8)


def map_of(array: np.ndarray, pid: int | str = "self") -> tuple[str, str, str] | None:
    """Permissions, inode and path of the file that lies under ``array``; None for plain memory."""
    address = array.__array_interface__["data"][0]
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= address < end:
            return (fields[1], fields[4], fields[5]) if len(fields) > 5 and fields[5][0] == "/" else None
    return None


class Child:
    """A Python process that runs ``code``, speaks by lines, and is killed at the end of the block."""

    def __init__(self, code: str, *args: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def hear(self) -> str:
        """Wait for its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the child ended with {self._process.wait(PATIENCE)}"
        return line.strip()

    def tell(self, line: str = "") -> None:
        """Give it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Let it come to its end, which it has after the next line."""
        self.tell()
        assert self._process.wait(PATIENCE) == 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


#: A process that restores ``argv[1]`` into a pool in ``argv[2]``, and reads the names it is told.
READER = """
import sys
import fbcache
with fbcache.FBPool("50MB", directory=sys.argv[2], min_free=0) as pool:
    pool.restore(sys.argv[1])
    print("restored", flush=True)
    while name := sys.stdin.readline().strip():
        try:
            with pool.get(name) as value:
                print(f"{int(value.sum())} {value.__array_interface__['data'][0]}", flush=True)
        except Exception as error:
            print(repr(error), flush=True)
"""

#: A process that has ``argv[1]`` open for writing.
HOLDER = """
import sys
import fbcache
with fbcache.TrackedDirectory(sys.argv[1]) as tracked:
    print("open", flush=True)
    sys.stdin.readline()
"""
