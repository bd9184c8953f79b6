"""Kinds: how values of other libraries travel, are measured, and are made read-only.

Guarantees
----------
- A library's kinds are imported when a value of it is first met, so only where the library is imported
  already; or when a blob names it, and then from the fixed table below (invariant 14).
- A kind stands for exactly one class. A subclass is nobody's, and goes by registration or pickle.
- What a kind's ``decode`` raises becomes CorruptBlobError, but for errors of fbcache and MemoryError.

For who writes one
------------------
Parts are decoded in the order in which they were encoded, for they are numbered in it. A kind that cannot
take a value says so by returning ``NotImplemented`` from ``encode`` before it has encoded a part; the
value is then pickled, where that is allowed. Names are part of the file format.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fbcache.codec import tags
from fbcache.codec.pickling import encode_pickled
from fbcache.codec.tags import Node, expect
from fbcache.errors import FBCacheError, UnsupportedTypeError

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

#: The bytes of a whole value, or those of its own and the parts that are measured in their turn.
Size: TypeAlias = int | tuple[int, Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One class of another library.

    Attributes
    ----------
    cls : type
        The class itself.
    name : str
        What trees call it: the library's name, a dot, and more.
    encode : callable
        Takes an encoder and an instance; returns the node of its state, or ``NotImplemented``.
    decode : callable
        Takes a decoder, that node, and the depth of its parts; returns the instance.
    size : callable, optional
        As for :func:`fbcache.sizeof.register`. Default: what the parts take.
    parts : callable, optional
        Returns numpy arrays, and values with kinds, that an instance is made of: the very objects that it
        holds, always in one order.
        The pool makes them read-only. Without it, that nobody writes to it is the caller's promise.
    rebuild : callable, optional
        Takes an instance and a list of new parts; returns an instance made of those. With ``parts`` only.
    own : callable, optional
        Returns an independent copy, lazily made if the library can; the pool keeps that of what is put.
    lend : callable, optional
        Takes what the pool keeps, and returns an instance that may be written, for :attr:`own` to take
        afterwards; None where its arrays are to be made writeable instead. With ``own`` only.
    travels : str
        How its bulk does, for the table of types: ``"raw"``, ``"Arrow"``, ``"msgpack"``.
    """

    cls: type
    name: str
    encode: Callable[[Encoder, Any], Node]
    decode: Callable[[Decoder, Node, int], Any]
    size: Callable[[Any], Size] | None = None
    parts: Callable[[Any], list[Any]] | None = None
    rebuild: Callable[[Any, list[Any]], Any] | None = None
    own: Callable[[Any], Any] | None = None
    lend: Callable[[Any], Any] | None = None
    travels: str = "raw"


@dataclass(frozen=True, slots=True)
class Library:
    """A library that has kinds.

    Attributes
    ----------
    modules : tuple of str
        Where they are, in this package; each has a ``KINDS``.
    floor : tuple of int
        The oldest version that will do; setup.cfg says the same of the extra.
    distribution : str
        What it is called where packages are; also the name of fbcache's extra.
    """

    modules: tuple[str, ...]
    floor: tuple[int, ...]
    distribution: str


#: By the name that is imported.
LIBRARIES: Final[dict[str, Library]] = {
    "pandas": Library(
        ("pandas_frames", "pandas_indexes", "pandas_arrays", "pandas_texts", "pandas_scalars"),
        (2, 2),
        "pandas",
    ),
    "pyarrow": Library(("arrow",), (21,), "pyarrow"),
    "polars": Library(("polars_frames",), (1, 32), "polars"),
    "scipy": Library(("sparse",), (1, 15), "scipy"),
    "xarray": Library(("xarrays",), (2024, 10), "xarray"),
    "torch": Library(("torch_tensors",), (2, 13), "torch"),
    "PIL": Library(("images",), (10,), "pillow"),
    "sklearn": Library(("sklearn_trees",), (1, 4), "scikit-learn"),
    "ml_dtypes": Library(("ml_scalars",), (0, 4), "ml_dtypes"),
}

_by_library: dict[str, dict[type, Kind]] = {}
_by_type: dict[type, Kind] = {}
_by_name: dict[str, Kind] = {}


def kind_of(cls: type) -> Kind | None:
    """Return the kind of exactly this class, if there is one and its library is imported."""
    kind = _by_type.get(cls)
    if kind is not None:
        return kind
    module = cls.__module__  # any object at all, if a class says so
    library = module.partition(".")[0] if isinstance(module, str) else ""
    if library not in LIBRARIES or library not in sys.modules:
        return None
    return _kinds(library).get(cls)


def encode_other(encoder: Encoder, value: Any) -> Node:
    """Encode what has neither an encoder of its own nor a registration: by its kind, else by pickle."""
    kind = kind_of(type(value))
    if kind is not None:
        state = kind.encode(encoder, value)
        if state is not NotImplemented:
            return [tags.FAMILY, kind.name, state]
    return encode_pickled(encoder, value)


def decode_kind(decoder: Decoder, node: list[Node], depth: int) -> Any:
    """Decode what :func:`encode_other` has encoded by its kind.

    Raises
    ------
    UnsupportedTypeError
        Its library is not here, or too old; or the blob is from a later fbcache.
    """
    _, name, state = node
    kind = _named(expect(name, str))
    try:
        return kind.decode(decoder, state, depth + 1)
    except (FBCacheError, MemoryError):
        raise
    except Exception as error:  # whatever the library says to what it cannot read
        raise ValueError(f"it holds no {kind.name}: {error!r}") from error


def _named(name: str) -> Kind:
    kind = _by_name.get(name)
    if kind is None:
        library = name.partition(".")[0]
        if library in LIBRARIES:
            _kinds(library, wanted_by=name)
            kind = _by_name.get(name)
    if kind is None:
        raise UnsupportedTypeError(f"the value holds a {name[:80]!r}, of which this fbcache knows nothing")
    return kind


def _kinds(name: str, *, wanted_by: str | None = None) -> dict[type, Kind]:
    """Return the kinds of a library; none if it is too old, unless a blob needs them."""
    kinds = _by_library.get(name)
    if not kinds:
        kinds = _load(name, LIBRARIES[name], wanted_by)
        _by_library[name] = kinds
    return kinds


def _load(name: str, library: Library, wanted_by: str | None) -> dict[type, Kind]:
    advice = f"pip install 'fbcache[{library.distribution}]'"
    if wanted_by is not None and name not in sys.modules:
        try:
            import_module(name)
        except ImportError as error:
            reason = f"the value holds a {wanted_by}, and {name} cannot be imported ({error})"
            raise UnsupportedTypeError(f"{reason}: {advice}") from error
    if not _is_recent(library):
        if wanted_by is None:
            return {}
        least = ".".join(map(str, library.floor))
        reason = f"the value holds a {wanted_by}, for which {name} must be {least} or newer"
        raise UnsupportedTypeError(f"{reason}: {advice}")
    kinds = [kind for module in library.modules for kind in import_module(f"{__package__}.{module}").KINDS]
    _by_name.update({kind.name: kind for kind in kinds})
    _by_type.update({kind.cls: kind for kind in kinds})
    return {kind.cls: kind for kind in kinds}


def _is_recent(library: Library) -> bool:
    from importlib import metadata  # takes longer than most of fbcache

    try:
        version = metadata.version(library.distribution)
    except metadata.PackageNotFoundError:  # built in place: who does so knows
        return True
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers) >= library.floor
