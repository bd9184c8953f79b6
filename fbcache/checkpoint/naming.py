"""Names as they stand in a manifest: a text as itself, any other name as the codec's tree of it.

Guarantees: a name that :func:`encode` takes can be restored; :func:`decode` takes any bytes at all
and gives a name or a ``ValueError``, in memory that ``MAX_TREE`` bounds, and runs no code but the
decoders and hashes of registered classes. A name is data: ``../x`` and ``/x`` are names like others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from reprlib import Repr
from typing import Any, Final
from uuid import UUID

import msgpack  # type: ignore[import-untyped]
import numpy as np

from fbcache.codec import Frames, MsgpackCodec
from fbcache.errors import PickleRefusedError, UnsupportedTypeError

#: Most bytes that a name other than a text may take. A tree becomes up to a hundred times its size in
#: Python's objects (empty lists, say), so this also bounds what a hostile one can make us allocate.
MAX_TREE: Final = 1 << 16

_ALLOWED: Final = (
    "a name there is a text, a number, bytes (fewer than 4096), None, a date or time, an instance of a "
    "registered class, or a tuple or frozenset of these"
)

#: Integers that msgpack has as such, and the bytes with which they begin there.
_INTEGERS: Final = range(-(1 << 63), 1 << 64)
_STARTS: Final = frozenset((*range(0x80), *range(0xCC, 0xD4), *range(0xE0, 0x100)))

_codec: Final = MsgpackCodec()
_repr: Final = Repr()
_repr.maxstring = _repr.maxother = 60  # a message is for reading


# ---------------------------------------------------------------------------------- writing


def encode(name: Hashable) -> str | bytes:
    """Return what stands for ``name``: itself if it is a text, else its tree.

    Raises
    ------
    UnsupportedTypeError
        It is a UUID, or takes a buffer or ``MAX_TREE`` bytes, or cannot be encoded or restored.
    PickleRefusedError
        It would take pickle, which a name never does.
    """
    return _both(name)[0]


def encode_all(names: Iterable[Hashable]) -> list[str | bytes]:
    """Return what stands for each of the names.

    Raises
    ------
    UnsupportedTypeError, PickleRefusedError
        As :func:`encode`.
    ValueError
        Two of them are one name, or would be when they are restored.
    """
    both = [_both(name) for name in names]
    check_distinct([restored for _, restored in both])
    return [written for written, _ in both]


def _both(name: Hashable) -> tuple[str | bytes, Hashable]:
    """What stands for ``name``, and the name as it will be restored."""
    if type(name) is str and is_text(name):
        return name, name
    if isinstance(name, UUID):
        raise _refused(name, "a UUID is a key")
    if type(name) is int and name in _INTEGERS:  # names by the million are often numbers
        return msgpack.packb(name), name
    tree = _tree(name)
    if type(name) is tuple and all(map(_is_plain, name)):
        return tree, name
    try:
        return tree, decode(tree)
    except ValueError as error:
        raise _refused(name, f"it could not be restored ({error})") from error


def _is_plain(part: Any) -> bool:
    """Whether there is no doubt that a part of a name is restored as it is."""
    return (type(part) is str and is_text(part)) or (type(part) is int and part in _INTEGERS)


def is_text(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8, which one with lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """Return a short ``repr`` for messages, or the type where there is none."""
    try:
        return _repr.repr(value)
    except Exception:  # an integer of thousands of digits, or a repr of the user's
        return f"of type {type(value).__qualname__}"


def _tree(name: Hashable) -> bytes:
    try:
        frames = _codec.encode(name, allow_pickle=False)
    except PickleRefusedError as error:
        reason = f"its part {error.path} would take pickle"
        raise PickleRefusedError(_refusal(name, reason), error.path) from error
    except UnsupportedTypeError as error:
        raise UnsupportedTypeError(_refusal(name, str(error)), error.path) from error
    if frames.buffers or len(frames.tree) > MAX_TREE:
        raise _refused(name, "it, or a part of it, is too big")
    return frames.tree


def _refused(name: Hashable, reason: str) -> UnsupportedTypeError:
    return UnsupportedTypeError(_refusal(name, reason))


def _refusal(name: Hashable, reason: str) -> str:
    return f"the name {shown(name)} cannot be kept in a checkpoint: {reason}; {_ALLOWED}"


# ---------------------------------------------------------------------------------- reading


def decode(tree: bytes) -> Hashable:
    """Return the name whose tree this is.

    Raises
    ------
    ValueError
        It describes no value, or one that cannot be a name, or is of a class not registered here.
    """
    if len(tree) > MAX_TREE:
        raise ValueError(f"a name takes {len(tree)} bytes, where {MAX_TREE} are allowed")
    if tree and tree[0] in _STARTS:
        return _integer(tree)
    _skim(tree)
    try:
        name: Hashable = _codec.decode(Frames(_codec.name, tree, ()), writable=False, allow_pickle=False)
        hash(name)
    except MemoryError:  # says nothing about the name
        raise
    except Exception as error:  # also what the hash of a registered class raises
        raise ValueError(f"a name cannot be restored: {error}") from error
    if isinstance(name, UUID):
        raise ValueError("a name is a UUID")
    return name


def _integer(tree: bytes) -> int:
    try:
        name: int = msgpack.unpackb(tree)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"a name is no msgpack: {error!r}") from error
    return name


def _skim(tree: bytes) -> None:
    """Find counts that lie: for lists, msgpack allocates what they say before it looks for items."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(tree), 1))
    unpacker.feed(tree)
    try:
        unpacker.skip()
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"a name is no msgpack: {error!r}") from error
    if unpacker.tell() != len(tree):
        raise ValueError("a name has bytes left over")


def check_distinct(names: Sequence[Hashable]) -> None:
    """Check that no two names are the same one, as keys of a dict.

    Raises
    ------
    ValueError
        Two of them are.
    """
    # A set of all names takes as much memory as they do, so it is only made to look into equal hashes.
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return
    try:
        count = len(set(names))
    except Exception as error:  # a comparison of a registered class
        raise ValueError(f"its names cannot be compared: {error!r}") from error
    if count != len(names):
        raise ValueError(f"of its {len(names)} names only {count} are distinct")
