"""Variables, arrays, datasets and trees of xarray.

Guarantees
----------
- What comes back is ``identical()``, of the same order and types, encodings included. Its indexes are made
  from the pandas indexes that went out: nothing is looked up or sorted anew. Arrays come back as views.
- Nothing is computed, or read from a file, by itself. A variable that would have to be is refused, with the
  advice to call ``load``; ``MsgpackCodec(compute_lazy=True)`` computes it as the value is encoded.
- Of what was opened from a file the data stay, and the tie to the file does not.

Indexes are those of pandas, multi-indexes included. What has another one, or data of another array library,
goes by pickle, and so does an object in an ``encoding`` (a compressor): ``drop_encoding()`` rids a value of
those. The pandas objects in a value travel by the kinds of pandas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import xarray as xr

from fbcache.codec.families.kinds import Kind
from fbcache.codec.families.xarray_variables import (
    Table,
    UnknownError,
    Variables,
    decode_extras,
    decode_held,
    decode_table,
    encode_extras,
    encode_held,
    encode_table,
    hold,
    is_lazy,
    over,
    parts_of,
    tabulate,
    with_parts,
)
from fbcache.codec.tags import Node, expect

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder


class _This:
    """The name of an array in a dataset of its own: equal to no name of a coordinate."""


# ------------------------------------------------------------------------------- the values


def _loaded(encoder: Encoder, value: Any, variables: Mapping[Any, xr.Variable]) -> Any:
    """The value with all of its data in memory: itself, or if that was asked for, computed."""
    lazy = [name for name, variable in variables.items() if is_lazy(variable)]
    if not lazy:
        return value
    if not encoder.compute_lazy:
        what = "it" if lazy[0] is _This else f"its {lazy[0]!r}"
        advice = "call .load() or .compute() first, or use MsgpackCodec(compute_lazy=True)"
        raise encoder.unsupported(f"{what} is not in memory yet: {advice}")
    return value.compute()


def _encode_variable(encoder: Encoder, variable: xr.Variable) -> Node:
    variable = _loaded(encoder, variable, {_This: variable})
    try:
        held = hold(variable)
    except UnknownError:
        return NotImplemented
    return encode_held(encoder, variable, held)


def _variable_parts(variable: xr.Variable) -> list[Any]:
    try:
        return [hold(variable).data]
    except UnknownError:
        return []


def _rebuild_variable(variable: xr.Variable, parts: list[Any]) -> xr.Variable:
    (data,) = parts
    return over(variable, hold(variable), data)


def _encode_array(encoder: Encoder, array: xr.DataArray) -> Node:
    array = _loaded(encoder, array, _array_variables(array))
    try:
        held, table = hold(array.variable), tabulate(array.coords.variables, array.xindexes)
    except UnknownError:
        return NotImplemented
    coords = encode_table(encoder, table)
    return [coords, encode_held(encoder, array.variable, held), encoder.hashed(array.name)]


def _decode_array(decoder: Decoder, node: Node, depth: int) -> xr.DataArray:
    coords, variable, name = node
    made = decode_table(decoder, coords, depth)
    return _array(decode_held(decoder, variable, depth), *made, decoder.hashed(name, depth))


def _array(variable: xr.Variable, coords: Variables, indexes: dict[Any, Any], name: Any) -> xr.DataArray:
    """Make an array by way of a dataset: the constructor copies coordinates, and may convert objects."""
    if not {dim for coord in coords.values() for dim in coord.dims} <= set(variable.dims):
        raise ValueError("a coordinate has a dimension that its array has not")
    array = _dataset({_This: variable, **coords}, set(coords), indexes)[_This]
    array.name = name
    return array


def _array_variables(array: xr.DataArray) -> Variables:
    return {_This: array.variable, **array.coords.variables}


def _array_parts(array: xr.DataArray) -> list[Any]:
    try:
        table = tabulate(array.coords.variables, array.xindexes)
        return [hold(array.variable).data, *parts_of(table)]
    except UnknownError:
        return []


def _rebuild_array(array: xr.DataArray, parts: list[Any]) -> xr.DataArray:
    variable = _rebuild_variable(array.variable, parts[:1])
    table = tabulate(array.coords.variables, array.xindexes)
    return _array(variable, *with_parts(table, iter(parts[1:])), array.name)


def _tabulate_dataset(dataset: xr.Dataset) -> Table:
    return tabulate(dataset.variables, dataset.xindexes)


def _encode_dataset(encoder: Encoder, dataset: xr.Dataset) -> Node:
    dataset = _loaded(encoder, dataset, dataset.variables)
    try:
        table = _tabulate_dataset(dataset)
    except UnknownError:
        return NotImplemented
    return _dataset_node(encoder, dataset, table)


def _dataset_node(encoder: Encoder, dataset: xr.Dataset, table: Table) -> Node:
    content = encode_table(encoder, table)
    coords = [number for number, name in enumerate(table.variables) if name in dataset.coords]
    return [content, coords, *encode_extras(encoder, dataset)]


def _decode_dataset(decoder: Decoder, node: Node, depth: int) -> xr.Dataset:
    content, numbers, *extras = node
    variables, indexes = decode_table(decoder, content, depth)
    names = list(variables)
    dataset = _dataset(variables, {names[number] for number in numbers}, indexes)
    decode_extras(decoder, dataset, extras, depth)
    return dataset


def _dataset(variables: Variables, coords: set[Any], indexes: dict[Any, Any]) -> xr.Dataset:
    """Make a dataset of these, in these orders.

    The constructor keeps another order, and older ones refuse two indexes of one dimension.
    """
    if not indexes.keys() <= coords:
        raise ValueError("a variable with an index is no coordinate")
    construct = getattr(xr.Dataset, "_construct_direct", None)
    if construct is not None:
        made: xr.Dataset = construct(dict(variables), set(coords), indexes=dict(indexes))
        return made
    data = {name: variable for name, variable in variables.items() if name not in coords}
    rest = {name: variable for name, variable in variables.items() if name in coords}
    return xr.Dataset(data, coords=xr.Coordinates(rest, indexes))


def _dataset_parts(dataset: xr.Dataset) -> list[Any]:
    try:
        return parts_of(_tabulate_dataset(dataset))
    except UnknownError:
        return []


def _rebuild_dataset(dataset: xr.Dataset, parts: list[Any]) -> xr.Dataset:
    return _dataset_over(dataset, iter(parts))


def _dataset_over(dataset: xr.Dataset, parts: Iterator[Any]) -> xr.Dataset:
    variables, indexes = with_parts(_tabulate_dataset(dataset), parts)
    fresh = _dataset(variables, set(dataset.coords), indexes)
    fresh.attrs, fresh.encoding = dataset.attrs, dataset.encoding
    return fresh


# ------------------------------------------------------------------------------------ trees


def _datasets(tree: Any) -> dict[str, xr.Dataset]:
    """The datasets of a tree by path, each without what it inherits."""
    return {node.path: node.to_dataset(inherit=False) for node in tree.subtree}


def _encode_tree(encoder: Encoder, tree: Any) -> Node:
    if not tree.is_root:
        return NotImplemented
    datasets = {path: _loaded(encoder, one, one.variables) for path, one in _datasets(tree).items()}
    try:
        tables = [_tabulate_dataset(dataset) for dataset in datasets.values()]
    except UnknownError:
        return NotImplemented
    nodes = [_dataset_node(encoder, *pair) for pair in zip(datasets.values(), tables, strict=True)]
    return [encoder.hashed(tree.name), [list(pair) for pair in zip(datasets, nodes, strict=True)]]


def _decode_tree(decoder: Decoder, node: Node, depth: int) -> Any:
    name, pairs = node
    datasets = {expect(path, str): _decode_dataset(decoder, one, depth) for path, one in pairs}
    return xr.DataTree.from_dict(datasets, name=decoder.hashed(name, depth))


def _tree_parts(tree: Any) -> list[Any]:
    return [part for dataset in _datasets(tree).values() for part in _dataset_parts(dataset)]


def _rebuild_tree(tree: Any, parts: list[Any]) -> Any:
    rest = iter(parts)
    datasets = {path: _dataset_over(dataset, rest) for path, dataset in _datasets(tree).items()}
    return xr.DataTree.from_dict(datasets, name=tree.name)


# -------------------------------------------------------------------------------------- kinds


def _variable_kind(cls: type, name: str) -> Kind:
    return Kind(cls, name, _encode_variable, decode_held, parts=_variable_parts, rebuild=_rebuild_variable)


KINDS: tuple[Kind, ...] = (
    _variable_kind(xr.Variable, "xarray.Variable"),
    _variable_kind(xr.IndexVariable, "xarray.IndexVariable"),
    Kind(
        xr.DataArray,
        "xarray.DataArray",
        _encode_array,
        _decode_array,
        parts=_array_parts,
        rebuild=_rebuild_array,
    ),
    Kind(
        xr.Dataset,
        "xarray.Dataset",
        _encode_dataset,
        _decode_dataset,
        parts=_dataset_parts,
        rebuild=_rebuild_dataset,
    ),
)
if hasattr(xr, "DataTree"):
    KINDS += (
        Kind(
            xr.DataTree,
            "xarray.DataTree",
            _encode_tree,
            _decode_tree,
            parts=_tree_parts,
            rebuild=_rebuild_tree,
        ),
    )
