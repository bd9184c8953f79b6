"""Pandas' extension arrays that consist of numpy's: of times, categories, intervals, nullable numbers.

Guarantees: the very arrays that one consists of go out, and it comes back over views of the buffers. Before
data that the pool did not write itself becomes an array, all is checked on which pandas relies without
looking (codes within bounds, lengths that agree).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from pandas.arrays import (  # type: ignore[import-untyped]
    BooleanArray,
    DatetimeArray,
    FloatingArray,
    IntegerArray,
    IntervalArray,
    NumpyExtensionArray,
    PeriodArray,
    TimedeltaArray,
)

from fbcache.codec.families.kinds import Kind
from fbcache.codec.families.pandas_scalars import decode_offset, decode_zone, encode_zone
from fbcache.codec.memory import Array, bounds
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from collections.abc import Callable

    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder


# ------------------------------------------------------------------------------- numpy's arrays


def encode_array(encoder: Encoder, shown: str, array: Array) -> Node:
    """Encode a numpy array that a value of pandas consists of."""
    plain = np.asarray(array)
    return encoder.part(shown, plain if _fills_memory(plain) else np.ascontiguousarray(plain))


def decode_array(decoder: Decoder, node: Node, depth: int, kinds: str = "", ndim: int | None = 1) -> Array:
    """Decode a numpy array, and check it as :func:`checked` does."""
    return checked(decoder, decoder.value(node, depth + 1), kinds, ndim)


def checked(decoder: Decoder, array: Any, kinds: str = "", ndim: int | None = 1) -> Array:
    """Return what must be a numpy array.

    Parameters
    ----------
    kinds : str
        Kinds of dtypes that will do, which then must be native; any without it.
    ndim : int or None
        How many dimensions it must have.

    Raises
    ------
    TypeError, ValueError
        It is another.
    """
    if expect(array, np.ndarray).ndim != ndim and ndim is not None:
        raise ValueError(f"an array has {array.ndim} dimensions")
    if kinds and (array.dtype.kind not in kinds or not array.dtype.isnative):
        raise ValueError(f"an array is of {array.dtype}")
    if not decoder.allow_pickle and not _fills_memory(array):
        raise ValueError("an array repeats its memory")  # so that its length would cost nothing
    checked_array: Array = array
    return checked_array


def _fills_memory(array: Array) -> bool:
    start, end = bounds(array)
    return end - start >= array.nbytes


def _rebuild_backed(array: Any, parts: list[Any]) -> Any:
    """The same array over other memory; any of those that keep one numpy array."""
    made = array._from_backing_data(parts[0])
    if getattr(array, "freq", None) is not None and not isinstance(array, PeriodArray):
        made._freq = array.freq  # before pandas 3.1; later it is the index's
    return made


def _backing(array: Any) -> list[Any]:
    return [array._ndarray]


# --------------------------------------------------------------------------------------- times


def _encode_times(encoder: Encoder, array: Any) -> Node:
    values = encode_array(encoder, "._ndarray", array._ndarray)
    zone = encode_zone(encoder, getattr(array.dtype, "tz", None))
    return [values, zone, encoder.part(".freq", getattr(array, "freq", None))]


def _times_decoder(cls: Any, kind: str) -> Callable[[Decoder, Node, int], Any]:
    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        values_node, zone_node, freq = node
        values = decode_array(decoder, values_node, depth, kind, None)
        zone = decode_zone(decoder, zone_node, depth)
        unit, count = np.datetime_data(values.dtype)
        if unit not in ("s", "ms", "us", "ns") or count != 1:
            raise ValueError(f"times are of {values.dtype}")
        dtype = values.dtype if zone is None else pd.DatetimeTZDtype(unit, zone)
        array = cls._simple_new(values, dtype=dtype)
        if freq is not None:
            set_freq(decoder, array, decode_offset(decoder, freq, depth))
        return array

    return decode


def set_freq(decoder: Decoder, times: Any, freq: Any) -> None:
    """Give times their frequency, which is checked against them unless the pool wrote them itself."""
    if decoder.allow_pickle and hasattr(times, "_freq"):
        times._freq = freq
    elif hasattr(type(times), "freq"):
        times.freq = freq


def _encode_periods(encoder: Encoder, array: Any) -> Node:
    return [encode_array(encoder, "._ndarray", array._ndarray), encoder.part(".freq", array.dtype.freq)]


def _decode_periods(decoder: Decoder, node: Node, depth: int) -> Any:
    values_node, freq = node
    values = decode_array(decoder, values_node, depth, "i", None)
    return PeriodArray(values, dtype=pd.PeriodDtype(decode_offset(decoder, freq, depth)))


# -------------------------------------------------------------------- categories and intervals


def _encode_categorical(encoder: Encoder, array: Any) -> Node:
    codes = encode_array(encoder, ".codes", array._ndarray)
    return [codes, encoder.part(".categories", array.categories), array.ordered]


def _decode_categorical(decoder: Decoder, node: Node, depth: int) -> Any:
    codes_node, categories_node, ordered = node
    codes = decode_array(decoder, codes_node, depth, "i", None)
    categories = decoder.value(categories_node, depth + 1)
    if not isinstance(categories, pd.Index):
        raise TypeError(f"categories are a {type(categories).__name__}")
    trusted = decoder.allow_pickle
    dtype = _categories(categories, expect(ordered, bool), trusted)
    if not trusted and codes.size and not -1 <= codes.min() <= codes.max() < len(categories):
        raise ValueError("a code stands for no category")
    return pd.Categorical.from_codes(codes, dtype=dtype, validate=False)


def _categories(categories: Any, ordered: bool, trusted: bool) -> Any:
    fast = getattr(pd.CategoricalDtype, "_from_fastpath", None)  # does not look whether they are unique
    if trusted and fast is not None:
        return fast(categories, ordered)
    return pd.CategoricalDtype(categories, ordered)


def _categorical_parts(array: Any) -> list[Any]:
    return [array._ndarray, array.categories]


def _rebuild_categorical(array: Any, parts: list[Any]) -> Any:
    codes, categories = parts
    dtype = array.dtype if categories is array.categories else _categories(categories, array.ordered, True)
    return pd.Categorical.from_codes(codes, dtype=dtype, validate=False)


def _encode_intervals(encoder: Encoder, array: Any) -> Node:
    return [*(_encode_bound(encoder, shown, getattr(array, f"_{shown}")) for shown in _BOUNDS), array.closed]


def _encode_bound(encoder: Encoder, shown: str, values: Any) -> Node:
    if isinstance(values, np.ndarray):
        return encode_array(encoder, f".{shown}", values)
    return encoder.part(f".{shown}", values)


def _decode_intervals(decoder: Decoder, node: Node, depth: int) -> Any:
    *nodes, closed = node
    left, right = (decoder.value(part, depth + 1) for part in nodes)
    for values in (left, right):
        if type(values) is np.ndarray:
            if values.ndim != 1 or values.dtype.kind not in "iuf" or not _fills_memory(values):
                raise ValueError(f"bounds of intervals are of {values.dtype}")
        elif not isinstance(values, pd.api.extensions.ExtensionArray):
            raise TypeError(f"bounds of intervals are a {type(values).__name__}")
    if left.dtype != right.dtype or len(left) != len(right):
        raise ValueError("the bounds of intervals differ in kind or number")
    return IntervalArray.from_arrays(left, right, closed=expect(closed, str), copy=False)


def _interval_parts(array: Any) -> list[Any]:
    return [array._left, array._right]


def _rebuild_intervals(array: Any, parts: list[Any]) -> Any:
    return IntervalArray.from_arrays(*parts, closed=array.closed, copy=False)


_BOUNDS: Final = ("left", "right")


# --------------------------------------------------------------------------- nullable and numpy


def _encode_masked(encoder: Encoder, array: Any) -> Node:
    return [encode_array(encoder, "._data", array._data), encode_array(encoder, "._mask", array._mask)]


def _masked_decoder(cls: Any, kinds: str) -> Callable[[Decoder, Node, int], Any]:
    def decode(decoder: Decoder, node: Node, depth: int) -> Any:
        data, mask = node
        values = decode_array(decoder, data, depth, kinds, None)
        missing = decode_array(decoder, mask, depth, "b", None)
        if values.shape != missing.shape:
            raise ValueError("a mask does not fit its values")
        return cls(values, missing, copy=False)

    return decode


def _masked_parts(array: Any) -> list[Any]:
    return [array._data, array._mask]


def _rebuild_masked(array: Any, parts: list[Any]) -> Any:
    return type(array)(*parts, copy=False)


def _encode_numpy(encoder: Encoder, array: Any) -> Node:
    return [encode_array(encoder, "._ndarray", array._ndarray)]


def _decode_numpy(decoder: Decoder, node: Node, depth: int) -> Any:
    (values,) = node
    return NumpyExtensionArray(decode_array(decoder, values, depth, ndim=None), copy=False)


KINDS = (
    Kind(
        DatetimeArray,
        "pandas.DatetimeArray",
        _encode_times,
        _times_decoder(DatetimeArray, "M"),
        parts=_backing,
        rebuild=_rebuild_backed,
    ),
    Kind(
        TimedeltaArray,
        "pandas.TimedeltaArray",
        _encode_times,
        _times_decoder(TimedeltaArray, "m"),
        parts=_backing,
        rebuild=_rebuild_backed,
    ),
    Kind(
        PeriodArray,
        "pandas.PeriodArray",
        _encode_periods,
        _decode_periods,
        parts=_backing,
        rebuild=_rebuild_backed,
    ),
    Kind(
        NumpyExtensionArray,
        "pandas.NumpyExtensionArray",
        _encode_numpy,
        _decode_numpy,
        parts=_backing,
        rebuild=_rebuild_backed,
    ),
    Kind(
        pd.Categorical,
        "pandas.Categorical",
        _encode_categorical,
        _decode_categorical,
        parts=_categorical_parts,
        rebuild=_rebuild_categorical,
    ),
    Kind(
        IntervalArray,
        "pandas.IntervalArray",
        _encode_intervals,
        _decode_intervals,
        parts=_interval_parts,
        rebuild=_rebuild_intervals,
    ),
    *(
        Kind(
            cls,
            f"pandas.{cls.__name__}",
            _encode_masked,
            _masked_decoder(cls, kinds),
            parts=_masked_parts,
            rebuild=_rebuild_masked,
        )
        for cls, kinds in ((IntegerArray, "iu"), (FloatingArray, "f"), (BooleanArray, "b"))
    ),
)
