"""The kit for codecs: each promise of :class:`~fbcache.codec.frames.Codec`, tested."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any
from unittest import SkipTest

import numpy as np

from fbcache.codec.frames import Codec, Frames
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.testing.codeckit import encoded, moved
from fbcache.testing.hostile import HostileTests
from fbcache.testing.material import raised, same_frames, together

_REFUSED = (UnsupportedTypeError, PickleRefusedError)


class CodecTests(HostileTests):
    """Tests for a :class:`~fbcache.codec.frames.Codec`; derive from it, give ``make_codec`` and ``values``.

    ``same``, ``raw_arrays`` and ``pickled_values`` may be overridden.
    """

    # ------------------------------------------------------------------ there and back

    def test_values_come_back_as_they_were(self) -> None:
        """From memory of their own, read-only and writeable; and nothing of them is pickled."""
        codec = self.make_codec()
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            assert frames.pickled is None, f"{frames.pickled} is said to be pickled, without leave"
            for writable in (False, True):
                stored = moved(frames, writable=writable)
                back = codec.decode(stored, writable=writable, allow_pickle=False)
                assert self.same(back, value), f"{value!r:.200} came back as {back!r:.200}"

    def test_frames_carry_the_codecs_name(self) -> None:
        """By which a blob is given to its codec."""
        codec = self.make_codec()
        assert isinstance(codec.name, str) and codec.name, f"{codec.name!r} is no name"
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            assert frames.codec == codec.name, f"the frames say {frames.codec!r}"

    def test_a_tree_is_bytes_and_buffers_are_memory_in_one_piece(self) -> None:
        """Each C-contiguous, one-dimensional, in bytes: stores hand them to the disk as they are."""
        codec = self.make_codec()
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            assert isinstance(frames.tree, bytes), f"the tree is a {type(frames.tree).__name__}"
            for buffer in frames.buffers:
                view = memoryview(buffer)
                is_flat = view.ndim == 1 and view.itemsize == 1 and view.c_contiguous
                assert is_flat, f"a buffer has {view.ndim} dimensions, of {view.format!r}"

    def test_encoding_leaves_the_value_as_it_was(self) -> None:
        """Content, and whether arrays are writeable."""
        codec = self.make_codec()
        for value, as_it_was in zip(self.values(), self.values(), strict=True):
            codec.encode(value, allow_pickle=False)
            assert self.same(value, as_it_was), f"{as_it_was!r:.200} became {value!r:.200}"
            assert _flags(value) == _flags(as_it_was), "encoding changed whether the array is writeable"

    def test_decoding_leaves_the_frames_as_they_were(self) -> None:
        """They are a blob, which may be decoded again."""
        codec = self.make_codec()
        for value in self.values():
            frames = codec.encode(value, allow_pickle=False)
            stored, kept = moved(frames), moved(frames)
            for _ in range(2):
                back = codec.decode(stored, writable=False, allow_pickle=False)
                assert self.same(back, value), "decoded once more it is another value"
            assert same_frames(stored, kept), "decoding changed the frames"

    # ------------------------------------------------------------------ no copies

    def test_raw_memory_is_not_copied_when_it_is_encoded(self) -> None:
        """The frames refer to the value's own memory."""
        codec = self.make_codec()
        for array in self._raw_arrays():
            frames = codec.encode(array, allow_pickle=False)
            views = [np.frombuffer(buffer, np.uint8) for buffer in frames.buffers if len(buffer)]
            assert any(np.shares_memory(view, array) for view in views), "the array's memory was copied"

    def test_raw_memory_comes_out_as_a_view_that_is_as_writeable_as_asked_for(self) -> None:
        """Read-only for good; or writeable, in the buffers that were given."""
        codec = self.make_codec()
        for array in self._raw_arrays():
            for writable in (False, True):
                stored = moved(codec.encode(array, allow_pickle=False), writable=writable)
                back = codec.decode(stored, writable=writable, allow_pickle=False)
                views = [np.frombuffer(buffer, np.uint8) for buffer in stored.buffers if len(buffer)]
                assert any(np.shares_memory(view, back) for view in views), "the buffer's memory was copied"
                assert back.flags.writeable is writable, f"writeable: {not writable}"
                if not writable:
                    raised(ValueError, back.setflags, write=True)

    def _raw_arrays(self) -> list[np.ndarray[Any, Any]]:
        arrays = self.raw_arrays()
        if not arrays:
            raise SkipTest("raw_arrays() says that nothing goes without a copy")
        return arrays

    # ------------------------------------------------------------------ what it does not carry

    def test_pickle_takes_leave(self) -> None:
        """Without it the value is refused, by an error that names the part; with it the frames say so."""
        codec = self.make_codec()
        for value in self.pickled_values():
            error = raised(_REFUSED, codec.encode, value, allow_pickle=False)
            path = getattr(error, "path", "")
            assert path.startswith("value"), f"{path!r} does not say where"
        for _, frames in encoded(codec, self.pickled_values()):
            assert frames.pickled is not None, "the frames do not say that something was pickled"

    def test_what_contains_itself_or_is_too_deep_is_refused(self) -> None:
        """By a typed error, whatever the depth."""
        codec = self.make_codec()
        loop: list[Any] = [1]
        loop.append({"again": loop})
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        try:
            for value in (loop, deep):
                for allow_pickle in (False, True):
                    raised(_REFUSED, codec.encode, value, allow_pickle=allow_pickle)
        finally:
            while deep:  # freed level by level: at once is too deep for some interpreters
                deep = deep.pop()

    # ------------------------------------------------------------------ calls side by side

    def test_calls_leave_nothing_behind(self) -> None:
        """A value gives the same frames again, after others and after failures."""
        codec = self.make_codec()
        values = self.values()
        first = [moved(codec.encode(value, allow_pickle=False)) for value in values]
        broken = Frames(f"not {codec.name}", b"", ())
        for value in self.pickled_values():
            raised(_REFUSED, codec.encode, value, allow_pickle=False)
            raised(CorruptBlobError, codec.decode, broken, writable=False, allow_pickle=False)
        for value, frames in reversed(list(zip(values, first, strict=True))):
            again = codec.encode(value, allow_pickle=False)
            assert same_frames(again, frames), f"{value!r:.200} is encoded in another way the second time"

    def test_threads_encode_and_decode_at_once(self) -> None:
        """One codec serves them all, each its own values in an order of its own."""
        codec = self.make_codec()
        together(*(partial(self._work, codec, seed) for seed in range(8)))

    def _work(self, codec: Codec, seed: int) -> None:
        rng = Random(seed)
        values = self.values()
        for _ in range(10):
            rng.shuffle(values)
            for value in values:
                writable = rng.random() < 0.5
                stored = moved(codec.encode(value, allow_pickle=False), writable=writable)
                back = codec.decode(stored, writable=writable, allow_pickle=False)
                assert self.same(back, value), f"with others at work {value!r:.200} became {back!r:.200}"


def _flags(value: Any) -> Any:
    return value.flags.writeable if isinstance(value, np.ndarray) else None
