"""Spill sessions for tests: left behind, looked at, and their owners."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID, uuid4

import psutil

from fbcache.codec.frames import Frames
from fbcache.store.files import FileStore
from fbcache.store.owner import Owner
from fbcache.store.reaper import LEASE, OWNER


def put_blob(session: str, key: UUID | None = None) -> Path:
    key = key or uuid4()
    FileStore(session).write(key, Frames("test", b"", [b"content"]))
    return Path(session, key.hex[:2], key.hex)


def is_locked(session: str | Path) -> bool:
    fd = os.open(f"{session}/{LEASE}", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def names_below(base: Path) -> list[str]:
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def dead_owner() -> Owner:
    """A process of this boot that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(child.pid).create_time()
    child.wait()
    return dataclasses.replace(Owner.current(), pid=child.pid, started=started)


def make_session(base: Path, owned_by: Owner | bytes) -> Path:
    """A session left behind, with a blob and a half-written one."""
    path = base / f"session-{uuid4().hex}"
    path.mkdir(parents=True, mode=0o700)
    (path / LEASE).touch(0o600)
    blob = put_blob(str(path))
    blob.with_name(f".{blob.name}.tmp").write_bytes(b"half")
    (path / OWNER).write_bytes(owned_by.to_bytes() if isinstance(owned_by, Owner) else owned_by)
    return path
