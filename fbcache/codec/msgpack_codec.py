"""The codec itself: trees as msgpack, for all types of :mod:`encoder`.

A flat dict of atoms, the commonest small value, goes through one call of msgpack each way.

Guarantee: a tree that lies about counts or depth allocates less than its own length twice, and 1 MiB.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from fbcache.codec.arrays import place
from fbcache.codec.decoder import Decoder
from fbcache.codec.encoder import Encoder
from fbcache.codec.frames import Frames
from fbcache.codec.tags import ATOMS, SAFE_ATOMS
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError

_NAME: Final = "msgpack"

#: What msgpack raises for an integer of more than 64 bits, and for a text with lone surrogates.
_BEYOND_MSGPACK: Final = (OverflowError, UnicodeEncodeError)

#: What msgpack and the constructors of values raise when a tree describes none.
_DAMAGE: Final = (ValueError, TypeError, ArithmeticError, LookupError, OSError, msgpack.UnpackException)

#: From so many bytes on a tree is walked before it is built, at a twentieth to a quarter of what building
#: takes. For lists msgpack allocates what they say before it looks for items, at each level: below
#: this, lists in lists that all lie come to 0.7 MB, and at 4 KiB they would to 20 MB.
_WALKED: Final = 512


class MsgpackCodec:
    """Encodes plain Python and numpy values; see :class:`~fbcache.codec.frames.Codec`.

    Types come back exactly: one without an encoder (a subclass of a builtin, say) is registered
    with :func:`~fbcache.codec.register`, or pickled, or refused. Lists, dicts, arrays and the
    like that occur twice in a value are one object again when they come back, except within keys
    and members of sets; arrays that overlap in memory overlap again.

    Parameters
    ----------
    compute_lazy : bool, optional
        Whether what is not in memory yet (xarray's data over dask, or in a file) is computed when it is
        encoded. By default it is refused.
    """

    name = _NAME
    _compute_lazy = False  # for a subclass, too, that does not call __init__

    def __init__(self, *, compute_lazy: bool = False) -> None:
        if compute_lazy:
            self._compute_lazy = True

    def encode(self, value: Any, *, allow_pickle: bool) -> Frames:
        """Take ``value`` apart, without copying what is raw already.

        The frames refer to the value's memory, which must not change while they are in use.

        Raises
        ------
        UnsupportedTypeError
            A part has no encoder and pickle fails on it, or the value contains itself or is
            nested too deep. The message names the part.
        PickleRefusedError
            A part would take pickle and ``allow_pickle`` is false.
        """
        try:
            if type(value) is dict and _is_flat(value):
                return Frames(_NAME, msgpack.packb(value), ())
            return _encode(value, allow_pickle, ATOMS, self._compute_lazy)
        except _BEYOND_MSGPACK:
            return _encode(value, allow_pickle, SAFE_ATOMS, self._compute_lazy)

    def decode(self, frames: Frames, *, writable: bool, allow_pickle: bool) -> Any:
        """Put the value together again.

        Raises
        ------
        CorruptBlobError
            The frames do not describe a value. No code from them has run.
        PickleRefusedError
            They hold a pickle and ``allow_pickle`` is false.
        UnsupportedTypeError
            They hold an instance of a class that is not registered (any more), or whose decoder
            raises.
        """
        if frames.codec != _NAME:
            raise CorruptBlobError(f"it was made by another codec, {frames.codec!r}")
        if frames.pickled is not None and not allow_pickle:
            path, _, _ = frames.pickled.rpartition(": ")
            raise PickleRefusedError(f"{frames.pickled} was pickled; allow_pickle=True loads it", path)
        try:
            if len(frames.tree) >= _WALKED:
                _walk(frames.tree)
            tree = msgpack.unpackb(frames.tree, strict_map_key=False)
            if type(tree) is dict and _is_flat(tree):
                return tree
            return Decoder(frames.buffers, writable, allow_pickle).value(tree, 0)
        except _DAMAGE as error:
            if isinstance(error, (UnsupportedTypeError, PickleRefusedError)):
                raise
            raise CorruptBlobError(f"its tree does not describe a value: {error!r}") from error


def bare_frames(value: Any) -> Frames:
    """Encode what a value holds, without what libraries note in it as it is read: for comparison only.

    Raises
    ------
    UnsupportedTypeError
        As :meth:`MsgpackCodec.encode`, with ``allow_pickle``.
    """
    try:
        return _encode(value, True, ATOMS, False, bare=True)
    except _BEYOND_MSGPACK:
        return _encode(value, True, SAFE_ATOMS, False, bare=True)


def _walk(tree: bytes) -> None:
    """Find counts that lie, and bytes left over, without building anything."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(tree))
    unpacker.feed(tree)
    unpacker.skip()
    if unpacker.tell() != len(tree):
        raise ValueError("bytes are left over")


def _is_flat(value: dict[Any, Any]) -> bool:
    return ATOMS.issuperset(map(type, value.values())) and ATOMS.issuperset(map(type, value))


def _encode(
    value: Any, allow_pickle: bool, atoms: frozenset[type], compute_lazy: bool, bare: bool = False
) -> Frames:
    encoder = Encoder(allow_pickle, atoms, compute_lazy, bare)
    try:
        tree = encoder.node(value)
    except RecursionError as error:
        raise encoder.unsupported("it is nested too deep for what is left of the stack") from error
    if encoder.placement:
        place(encoder.placement, encoder.buffers)
    return Frames(_NAME, msgpack.packb(tree), encoder.buffers, encoder.pickled)
