"""The kit for codecs, continued: frames that the codec has not made, or that were changed since.

Guarantee: pickle is never allowed here, but to make the frames that have to be refused then.
"""

from __future__ import annotations

import tracemalloc
from random import Random
from typing import Any, Final

from fbcache.codec.frames import Codec, Frames
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.testing.codeckit import CodecKit, encoded, moved
from fbcache.testing.material import raised

_OURS: Final = (CorruptBlobError, PickleRefusedError, UnsupportedTypeError)

#: Bytes that decoding may take: so many for each that there is, and these besides.
_FACTOR: Final = 64
_BESIDES: Final = 16 << 20

_TRAPPED: Final[list[str]] = []


class Trap:
    """Whose pickle runs code of ours."""

    def __reduce__(self) -> Any:
        return _TRAPPED.append, ("code ran",)


class HostileTests(CodecKit):
    """Hostile frames; part of :class:`~fbcache.testing.CodecTests`."""

    def test_frames_of_another_codec_are_refused(self) -> None:
        """They are damaged, whatever they hold."""
        codec = self.make_codec()
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            foreign = Frames(f"not {frames.codec}", frames.tree, frames.buffers)
            raised(CorruptBlobError, codec.decode, foreign, writable=False, allow_pickle=False)

    def test_pickles_are_refused_and_no_code_runs(self) -> None:
        """Also where the frames do not say that there is one."""
        codec = self.make_codec()
        made = encoded(codec, [Trap(), [1, {"a": Trap()}], *self.pickled_values()])
        for _, frames in made:
            silent = Frames(frames.codec, frames.tree, frames.buffers)
            for given in (frames, silent):
                for writable in (False, True):
                    stored = moved(given, writable=writable)
                    raised(PickleRefusedError, codec.decode, stored, writable=writable, allow_pickle=False)
        assert not _TRAPPED, "decoding ran code from a pickle"

    def test_random_trees_give_typed_errors_or_a_value(self) -> None:
        """Bytes of any length, with any buffers."""
        codec = self.make_codec()
        rng = Random(1)
        for turn in range(500):
            tree = rng.randbytes(rng.choice((0, 1, 2, 10, 100, 1000)))
            buffers = [rng.randbytes(rng.randrange(50)) for _ in range(rng.randrange(3))]
            _survive(codec, Frames(codec.name, tree, buffers), writable=turn % 2 == 0)

    def test_changed_trees_give_typed_errors_or_a_value(self) -> None:
        """Bits flipped, bytes taken out, doubled and exchanged."""
        codec = self.make_codec()
        rng = Random(2)
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            for turn in range(100):
                tree = _changed(frames.tree, rng)
                _survive(codec, Frames(frames.codec, tree, frames.buffers), writable=turn % 2 == 0)

    def test_trees_that_end_early_are_damaged(self) -> None:
        """At any byte."""
        codec = self.make_codec()
        rng = Random(3)
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            if not frames.tree:
                continue
            for length in {0, len(frames.tree) - 1, *(rng.randrange(len(frames.tree)) for _ in range(50))}:
                short = Frames(frames.codec, frames.tree[:length], frames.buffers)
                raised(_OURS, codec.decode, short, writable=False, allow_pickle=False)

    def test_other_buffers_give_typed_errors_or_a_value(self) -> None:
        """Fewer, shorter, longer, in another order, with other content; missing ones are always found."""
        codec = self.make_codec()
        rng = Random(4)
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            if not frames.buffers:
                continue
            bare = Frames(frames.codec, frames.tree, ())
            raised(_OURS, codec.decode, bare, writable=False, allow_pickle=False)
            for turn in range(30):
                buffers = _changed_buffers([bytes(buffer) for buffer in frames.buffers], rng)
                _survive(codec, Frames(frames.codec, frames.tree, buffers), writable=turn % 2 == 0)


def _survive(codec: Codec, frames: Frames, *, writable: bool) -> None:
    """Decode; a typed error or a value is well, if the memory was within bounds."""
    stored = moved(frames, writable=writable)
    tracemalloc.start()
    try:
        codec.decode(stored, writable=writable, allow_pickle=False)
    except _OURS:
        pass
    except Exception as error:
        raise AssertionError(f"decoding {frames.tree[:200]!r} raised {error!r}") from error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    most = _FACTOR * frames.nbytes + _BESIDES
    assert peak <= most, f"decoding {frames.nbytes:,} bytes took {peak:,} bytes of memory"


def _changed(tree: bytes, rng: Random) -> bytes:
    changed = bytearray(tree)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, other = (rng.randrange(len(changed) + 1) for _ in range(2))
        match rng.randrange(4):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place : place + rng.randrange(4)]
            case 2:
                changed[place:place] = changed[other : other + rng.randrange(8)]
            case _ if place < len(changed):
                changed[place] = rng.choice((0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xDC, 0xDD, 0xDF, 0xFF))
    return bytes(changed)


def _changed_buffers(buffers: list[bytes], rng: Random) -> list[bytes]:
    match rng.randrange(4):
        case 0:
            rng.shuffle(buffers)
        case 1:
            del buffers[rng.randrange(len(buffers))]
        case 2:
            place = rng.randrange(len(buffers))
            buffers[place] = buffers[place][: rng.randrange(len(buffers[place]) + 1)]
        case _:
            place = rng.randrange(len(buffers))
            buffers[place] = rng.randbytes(len(buffers[place]) + rng.choice((0, 1, 8)))
    return buffers
