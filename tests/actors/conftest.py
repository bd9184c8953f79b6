"""Every actor is stopped at the end of its test, and has given its id back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import obstore
import pykka
import pytest
from obstore.store import MemoryStore

from fbcache.actors import claims
from tests.faults import PATIENCE


@pytest.fixture(scope="session", autouse=True)
def obstores_own_descriptors() -> None:
    """Open what obstore's runtime opens once, and keeps."""
    obstore.put(MemoryStore(), "a", b"")


@pytest.fixture(autouse=True)
def no_actor_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    pykka.ActorRegistry.stop_all(timeout=PATIENCE)
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread.name} is alive"
    assert not claims._claims, "an id is still taken"
