"""Power loss at any moment: the directory opens as the last acknowledged save or the one in flight, exactly.

Invariant 12. Each of :mod:`tests.checkpoint.scenes` works on a tracked directory on a recording disk, and
says in the log what may be found from then on. Of every log come images of the disk as power loss
might leave it (the model is :mod:`tests.powerloss`'s), each of which is opened by a reader and twice by a
writer, and every value of every version loaded.

There are 5,000 images in all; ``FBCACHE_IMAGES=1000000`` asks for another number, and ``--soak`` for ten
times as many. Images are built in memory where there is /dev/shm.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

import pytest

from fbcache import FBPool
from tests.checkpoint.opened import files_of, fresh, in_memory, is_ours, leftovers, load, look
from tests.checkpoint.scene import FOREIGN, Allowed, Make, Scene, new_boot
from tests.checkpoint.scenes import SCENES
from tests.powerloss import Log, images

IMAGES = int(os.environ.get("FBCACHE_IMAGES", "5000"))

#: Images of one scene's recordings, at most; then it is played again, with other keys.
MOST_OF_ONE = 5000

#: Every so many-th image goes through whole pools, and not only through the code that they use.
WHOLE = 10


@pytest.fixture
def memory() -> Iterator[Path]:
    with in_memory() as path:
        yield path


@pytest.mark.parametrize("play", SCENES, ids=lambda play: play.__name__)
def test_after_power_loss_the_last_save_is_there_or_the_one_in_flight(
    play: Callable[[Make], Iterator[Scene]], memory: Path, tmp_path: Path, soak: bool
):
    left = -(-IMAGES * (10 if soak else 1) * SCENES[play] // sum(SCENES.values()))
    with FBPool("1MB", directory=tmp_path / "spill", io_threads=1, min_free=0, verify="always") as pool:
        for seed in itertools.count():
            count, left = min(left, MOST_OF_ONE), left - min(left, MOST_OF_ONE)
            with tempfile.TemporaryDirectory(dir=memory) as below:
                check_scenes(play, count, seed, Path(below), pool)
            if left == 0:
                break


def check_scenes(
    play: Callable[[Make], Iterator[Scene]], count: int, seed: int, below: Path, pool: FBPool
) -> None:
    (place := below / "image").mkdir()
    recordings = []
    with seeded_keys(seed), closing(Make(below, seed)) as make:
        for scene in play(make):
            scene.close()
            recordings.append((scene.where, scene.disk.log))
    for number, (where, log) in enumerate(recordings):
        share = count // len(recordings) + (number < count % len(recordings))
        check_images(log, share, seed, place, where, pool)


@contextmanager
def seeded_keys(seed: int) -> Iterator[None]:
    """Make all keys anew out of ``seed``: then an image can be had again by its numbers."""
    rng = Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=rng.getrandbits(128), version=4))
        yield


def check_images(log: Log, count: int, seed: int, place: Path, where: str, pool: FBPool) -> None:
    with new_boot():
        for number, image in enumerate(images(log, count, seed)):
            image.build(place, clear=True)
            allowed: Allowed = image.marks[-1] if image.marks else log[0].label
            try:
                check(place / where, allowed, pool if number % WHOLE == 0 else None)
            except Exception as error:
                error.add_note(f"{image}\nwhere {allowed}\nof the log\n{log}")
                raise


def check(tracked: Path, allowed: Allowed, pool: FBPool | None) -> None:
    foreign = foreign_files(tracked)
    if tracked.exists():
        read = look(tracked, readonly=True, pool=pool)
        allowed.check(read.versions)
        assert read.present >= read.named
    written = look(tracked, readonly=False)
    allowed.check(written.versions)
    assert foreign_files(tracked) == foreign
    assert not leftovers(tracked, written)
    assert written.present == written.named | written.pins
    for key, value in allowed.pinned.items():
        assert load(fresh(tracked), key) == value
        assert key in written.pins
    again = look(tracked, readonly=False, pool=pool)
    assert again == written


def foreign_files(tracked: Path) -> dict[str, bytes]:
    """What is not ours: all that the scene put there, where it put anything."""
    found = {path: content for path, content in files_of(tracked).items() if not is_ours(path)}
    assert found in (FOREIGN, {})
    return found
