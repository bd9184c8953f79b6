"""The fallback for types without an encoder: pickle protocol 5, with its buffers out of band.

Guarantee: nothing is unpickled unless the caller allowed it. A pickled part shares nothing with
the rest of its value.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import ChainMap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fbcache.codec import tags
from fbcache.codec.memory import Array, alias, bounds, is_dense, root
from fbcache.codec.tags import INLINE_BYTES, Node
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder


def encode_pickled(encoder: Encoder, value: Any) -> Node:
    """Pickle one part of a value.

    Raises
    ------
    PickleRefusedError
        Pickle is not allowed.
    UnsupportedTypeError
        Pickle failed; its error is the cause.
    """
    kind = type(value)
    what = f"{kind.__module__}.{kind.__qualname__}"
    if not encoder.allow_pickle:
        where = encoder.where()
        raise PickleRefusedError(f"{where} takes pickle, being a {what}: {_ADVICE}", where)
    buffers: list[memoryview] = []
    try:
        stream = _pickle(value, buffers)
    except MemoryError:  # says nothing about the value
        raise
    except Exception as error:
        raise encoder.unsupported(f"{what} has no encoder, and pickle fails: {error}") from error
    if encoder.pickled is None:
        encoder.pickled = f"{encoder.where()}: {what}"
    first = len(encoder.buffers)
    encoder.buffers += buffers
    if len(stream) < INLINE_BYTES:
        return [tags.PICKLE, stream, first, len(buffers)]
    encoder.buffers.append(stream)
    return [tags.PICKLE, first + len(buffers), first, len(buffers)]


_ADVICE = "register the type with fbcache.codec.register, or pass allow_pickle=True"


def _pickle(value: Any, buffers: list[memoryview]) -> bytes:
    def take(buffer: pickle.PickleBuffer) -> bool:
        try:
            buffers.append(buffer.raw())
        except BufferError:  # not contiguous
            return True
        return False

    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 5, buffer_callback=take)
    pickler.dispatch_table = _reducers
    pickler.dump(value)
    return stream.getvalue()


def _reduce_array(array: Array) -> Any:
    """Reduce an array to its memory, whatever its dtype and its strides.

    numpy's own way copies all but the plainest into the pickle, and marks what comes from frozen
    arrays as read-only for ever. So the memory goes as an alias that claims to be writeable, and
    comes back as writeable as the buffers are that it is read from.
    """
    if array.dtype.hasobject or array.nbytes == 0:
        return array.__reduce_ex__(5)
    dense = array if is_dense(array) else array.copy()
    memory = alias(bounds(dense)[0], dense.nbytes, dense, readonly=False)
    fortran = not dense.flags.c_contiguous
    return rebuild_array, (pickle.PickleBuffer(memory), array.dtype, array.shape, fortran)


def rebuild_array(buffer: Any, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> Array:
    """Undo :func:`_reduce_array`; blobs name this function, so its name and place are for good."""
    return np.ndarray(shape, dtype, root(memoryview(buffer)), order="F" if fortran else "C")


_reducers: ChainMap[type, Callable[[Any], Any]] = ChainMap(
    {np.ndarray: _reduce_array}, copyreg.dispatch_table
)


def decode_pickled(decoder: Decoder, node: list[Node], depth: int) -> Any:
    """Unpickle one part of a value.

    Raises
    ------
    PickleRefusedError
        Pickle is not allowed.
    UnsupportedTypeError
        The pickle names a class or function that cannot be imported.
    CorruptBlobError
        Unpickling failed otherwise.
    """
    if not decoder.allow_pickle:
        raise PickleRefusedError("the value holds a pickle, which could run any code; see allow_pickle")
    _, source, first, count = node
    stream = source if type(source) is bytes else decoder.buffer(source)
    buffers = [decoder.buffer(first + index) for index in range(count)]
    try:
        return pickle.loads(stream, buffers=buffers)
    except MemoryError:
        raise
    except (ImportError, AttributeError) as error:
        raise UnsupportedTypeError(f"a pickled part of the value cannot be imported: {error}") from error
    except Exception as error:
        raise CorruptBlobError(f"a pickled part of it cannot be loaded: {error!r}") from error
