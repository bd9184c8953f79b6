"""Variables of xarray, and tables of variables with their indexes: what its other values are made of.

Guarantee: data are looked at as they are held, never asked for, so that nothing is loaded or converted; and
are put in their places again without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import xarray as xr
from xarray.indexes import PandasIndex, PandasMultiIndex

from fbcache.codec.dtypes import PLAIN, describe, parse
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

#: By name; in the order that they have in their dataset.
Variables: TypeAlias = dict[Any, xr.Variable]

# What a variable's data are.
_ARRAY: Final = 0
_INDEX: Final = 1
_EXTENSION: Final = 2
_LEVEL: Final = 3  # of a multi-index, or all of it

#: Python's own types, in the place of a dtype.
_BUILTIN: Final = {cls.__name__: cls for cls in (bool, int, float, complex, str, bytes, object)}


class UnknownError(Exception):
    """The value holds what we cannot take apart."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a variable's data are; of an index also the dtype it passes for, if not its own, and the level."""

    what: int
    data: Any
    dtype: Node = None
    level: Any = None


@dataclass(frozen=True, slots=True)
class _Group:
    """An index, the names of the variables that are made from it, and as which dtypes they pass."""

    index: Any
    names: list[Any]
    dtypes: list[Node]


@dataclass(frozen=True, slots=True)
class Table:
    """Variables and their indexes, looked through and found to be encodable."""

    groups: list[_Group]
    variables: Variables
    held: dict[Any, Held]


# ---------------------------------------------------------------------------------- looking


def hold(variable: xr.Variable) -> Held:
    """Look at what a variable holds.

    Raises
    ------
    UnknownError
        It is neither an array nor of pandas.
    """
    data: Any = getattr(variable, "_data", None)
    if type(data) is np.ndarray:
        return Held(_ARRAY, data)
    name, inner = type(data).__name__, getattr(data, "array", None)
    if name == "PandasIndexingAdapter" and isinstance(inner, pd.Index):
        return Held(_INDEX, inner, _dtype_beside(PandasIndex(inner, "").coord_dtype, variable.dtype))
    if name == "PandasMultiIndexingAdapter" and isinstance(inner, pd.MultiIndex):
        (dim,) = variable.dims
        default = PandasMultiIndex(inner.copy(), dim).create_variables()
        level = dim if data.level is None else data.level
        if level not in default:
            raise UnknownError
        return Held(_LEVEL, inner, _dtype_beside(default[level].dtype, variable.dtype), level)
    if name == "PandasExtensionArray" and isinstance(inner, pd.api.extensions.ExtensionArray):
        return Held(_EXTENSION, inner)
    raise UnknownError


def is_lazy(variable: xr.Variable) -> bool:
    """Whether a variable's data have still to be computed, or read from a file."""
    data = getattr(variable, "_data", None)
    if type(data) is np.ndarray or isinstance(getattr(data, "array", None), pd.Index):
        return False
    return variable.chunks is not None or type(data).__module__ == "xarray.core.indexing"


def tabulate(variables: Mapping[Any, xr.Variable], indexes: Any) -> Table:
    """Look through variables and the indexes of some of them.

    Raises
    ------
    UnknownError
        There is something among them that cannot be encoded.
    """
    if not {type(variable) for variable in variables.values()} <= {xr.Variable, xr.IndexVariable}:
        raise UnknownError
    groups = [_group(index, names) for index, names in indexes.group_by_index()]
    grouped = {name for group in groups for name in group.names}
    held = {name: hold(variable) for name, variable in variables.items() if name not in grouped}
    return Table(groups, dict(variables), held)


def _group(index: Any, variables: Variables) -> _Group:
    if type(index) is PandasIndex:
        defaults = [PandasIndex(index.index, index.dim).coord_dtype]
        dtypes = [index.coord_dtype]
    elif type(index) is PandasMultiIndex:
        defaults = list(PandasMultiIndex(index.index.copy(), index.dim).level_coords_dtype.values())
        dtypes = list(index.level_coords_dtype.values())
    else:
        raise UnknownError
    made = index.create_variables(variables)
    if made.keys() != variables.keys() or any(_looks(made[name]) != _looks(variables[name]) for name in made):
        raise UnknownError
    nodes = [_dtype_beside(default, dtype) for default, dtype in zip(defaults, dtypes, strict=True)]
    return _Group(index, list(variables), nodes)


def _looks(variable: xr.Variable) -> tuple[Any, ...]:
    return type(variable), type(variable._data), variable.dims, variable.dtype, variable.shape


def _dtype_beside(default: Any, dtype: Any) -> Node:
    """The node of a dtype; None for the default, as dtypes of pandas always are."""
    if type(dtype) is type(default) and dtype == default:
        return None
    node = _dtype_node(dtype) if isinstance(dtype, np.dtype) else None
    if node is None:
        raise UnknownError
    return node


def _dtype_node(dtype: np.dtype[Any]) -> Node:
    return "O" if dtype == np.dtype(object) else describe(dtype)


def _parse_dtype(node: Node) -> Any:
    if node is None:
        return None
    return np.dtype(object) if node == "O" else parse(node)


# ------------------------------------------------------------------------------- single variables


def encode_held(encoder: Encoder, variable: xr.Variable, held: Held) -> Node:
    """Encode a variable that is not made from an index."""
    is_index = type(variable) is xr.IndexVariable
    dims = [encoder.hashed(dim) for dim in variable.dims]
    data = [held.what, encoder.part(".data", held.data), held.dtype, encoder.hashed(held.level)]
    return [is_index, dims, data, *encode_extras(encoder, variable)]


def decode_held(decoder: Decoder, node: Node, depth: int) -> xr.Variable:
    """Decode what :func:`encode_held` has encoded."""
    is_index, dims, data, *extras = node
    cls = xr.IndexVariable if expect(is_index, bool) else xr.Variable
    names = tuple(decoder.hashed(dim, depth) for dim in expect(dims, list))
    what, content, dtype, level = data
    held = Held(expect(what, int), decoder.value(content, depth), dtype, decoder.hashed(level, depth))
    variable = _made(cls, names, held)
    decode_extras(decoder, variable, extras, depth)
    return variable


def over(variable: xr.Variable, held: Held, data: Any) -> xr.Variable:
    """Return a variable like that one, over other data of the same kind."""
    fresh = _made(type(variable), variable.dims, Held(held.what, data, held.dtype, held.level))
    fresh.attrs, fresh.encoding = variable.attrs, variable.encoding
    return fresh


def _made(cls: type[xr.Variable], dims: tuple[Any, ...], held: Held) -> xr.Variable:
    if held.what == _ARRAY:
        return cls(dims, expect(held.data, np.ndarray), fastpath=True)
    if held.what == _EXTENSION:
        if not isinstance(held.data, pd.api.extensions.ExtensionArray):
            raise TypeError("a variable's extension array is none")
        return cls(dims, held.data)
    (dim,) = dims
    made: xr.Variable
    dtype = _parse_dtype(held.dtype)
    if held.what == _LEVEL:
        index = _index(held.data, True, dim)
        if held.level in index.level_coords_dtype and dtype is not None:
            index.level_coords_dtype[held.level] = dtype
        made = index.create_variables()[held.level]
    else:
        (made,) = _index(held.data, False, dim, dtype).create_variables().values()
    return made if cls is xr.IndexVariable else made.to_base_variable()


def _index(data: Any, is_multi: bool, dim: Any, *dtypes: Any) -> Any:
    """An index over that of pandas, with variables of these dtypes; None or none at all for its own."""
    if not isinstance(data, pd.Index) or isinstance(data, pd.MultiIndex) != is_multi:
        raise TypeError("an index is none of its kind")
    if not is_multi:
        return PandasIndex(data, dim, *dtypes)
    made = PandasMultiIndex(data, dim)
    if dtypes:
        levels = zip(made.level_coords_dtype.items(), dtypes, strict=True)
        made.level_coords_dtype = {name: own if dtype is None else dtype for (name, own), dtype in levels}
    return made


# --------------------------------------------------------------------- attributes and encodings


def encode_extras(encoder: Encoder, value: Any) -> tuple[Node, Node, Node]:
    """Encode attributes and encoding, and what is a type in the latter."""
    attrs = encoder.part(".attrs", dict(value.attrs))
    encoding = dict(value.encoding)
    types = {key: _type_node(part) for key, part in encoding.items() if type(key) is str}
    types = {key: node for key, node in types.items() if node is not None}
    plain = {key: None if key in types else part for key, part in encoding.items()}
    return attrs, encoder.part(".encoding", plain), types


def decode_extras(decoder: Decoder, value: Any, nodes: Sequence[Node], depth: int) -> None:
    """Give a value what :func:`encode_extras` has encoded."""
    attrs, encoding, types = nodes
    attrs = expect(decoder.value(attrs, depth), dict)
    encoding = expect(decoder.value(encoding, depth), dict)
    parsed = {key: _parse_type(*node) for key, node in expect(types, dict).items()}
    if attrs:
        value.attrs = attrs
    if encoding:
        value.encoding = {key: parsed.get(key, part) for key, part in encoding.items()}


def _type_node(value: Any) -> Node:
    """What an encoding's ``dtype`` may be, but a text: a dtype, a scalar's type, or one of Python's."""
    if isinstance(value, np.dtype):
        node = _dtype_node(value)
        return None if node is None else ["dtype", node]
    if not isinstance(value, type):
        return None
    if value in PLAIN:
        return ["scalar", describe(np.dtype(value))]
    name: str = value.__name__
    return ["builtin", name] if _BUILTIN.get(name) is value else None


def _parse_type(form: str, node: Node) -> Any:
    if form == "builtin":
        return _BUILTIN[node]
    dtype = _parse_dtype(node)
    return dtype.type if form == "scalar" else dtype


# -------------------------------------------------------------------------- variables with indexes


def encode_table(encoder: Encoder, table: Table) -> Node:
    """Encode variables and their indexes."""
    places = {name: place for place, name in enumerate(table.variables)}
    indexes = []
    for group in table.groups:
        index = group.index
        node = encoder.part(".index", index.index)
        head = [type(index) is PandasMultiIndex, node, encoder.hashed(index.dim), group.dtypes]
        indexes.append([*head, [places[name] for name in group.names]])
    rows = []
    for name, variable in table.variables.items():
        encoder.step(f"[{name!r}]")
        held = table.held.get(name)
        content = encode_extras(encoder, variable) if held is None else encode_held(encoder, variable, held)
        rows.append([encoder.hashed(name), content])
    return [indexes, rows]


def decode_table(decoder: Decoder, node: Node, depth: int) -> tuple[Variables, dict[Any, Any]]:
    """Return variables and, by name, their indexes."""
    index_nodes, rows = node
    made = {}
    for *index, places in expect(index_nodes, list):
        decoded = _decode_index(decoder, index, depth)
        parts = decoded.create_variables()
        made.update({expect(place, int): (decoded, parts) for place in expect(places, list)})
    variables: Variables = {}
    for place, (name_node, content) in enumerate(expect(rows, list)):
        name = decoder.hashed(name_node, depth)
        if place in made:
            variables[name] = made[place][1][name]
            decode_extras(decoder, variables[name], content, depth)
        else:
            variables[name] = decode_held(decoder, content, depth)
    if len(variables) != len(rows):
        raise ValueError("two variables have one name")
    names = list(variables)
    return variables, {names[place]: index for place, (index, _) in made.items()}


def _decode_index(decoder: Decoder, node: Node, depth: int) -> Any:
    is_multi, data, dim, dtypes = node
    return _index(
        decoder.value(data, depth),
        expect(is_multi, bool),
        decoder.hashed(dim, depth),
        *(_parse_dtype(dtype) for dtype in expect(dtypes, list)),
    )


def parts_of(table: Table) -> list[Any]:
    """Return what a table's arrays and indexes are."""
    return [*(group.index.index for group in table.groups), *(held.data for held in table.held.values())]


def with_parts(table: Table, parts: Iterator[Any]) -> tuple[Variables, dict[Any, Any]]:
    """Return a table's variables over other parts, and their indexes by name."""
    fresh: Variables = {}
    indexes = {}
    for group in table.groups:
        old, dtypes = group.index, [_parse_dtype(dtype) for dtype in group.dtypes]
        index = _index(next(parts), type(old) is PandasMultiIndex, old.dim, *dtypes)
        fresh.update(index.create_variables({name: table.variables[name] for name in group.names}))
        indexes.update(dict.fromkeys(group.names, index))
    for name, held in table.held.items():
        fresh[name] = over(table.variables[name], held, next(parts))
    return {name: fresh[name] for name in table.variables}, indexes
