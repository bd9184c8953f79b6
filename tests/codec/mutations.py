"""Seeded damage to a value's tree and buffers, with what other values' trees and buffers are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from fbcache.codec import tags


@dataclass(frozen=True)
class Taken:
    """A value, taken apart."""

    title: str
    tree: bytes
    buffers: tuple[bytes, ...]


_EDGES = [0, 1, -1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 300, 4096, 65536]
_EDGES += [(1 << power) + plus for power in (31, 32, 40, 62, 63) for plus in (-1, 0)]
_EDGES += [-(1 << power) for power in (31, 32, 40, 62, 63)]
TAGS = sorted({v for k, v in vars(tags).items() if k.isupper() and type(v) is int and v < 64})
_TEXTS = ["", "x", "é\0", "<f8", "|O8", "<U3", "|b1", "<M8[ns]", "<m8[s]", "|V0", "ml:int4", "UTC", "../etc"]
_LEAVES = [None, True, False, 0.0, float("nan"), float("inf"), 1e300, b"", b"\xff" * 8]

Nodes = list[tuple[Any, Any]]


def _leaf(rng: random.Random) -> Any:
    empty: list[Any] = [[], {}, [[]]]  # made anew: they will be edited
    return rng.choice([*_LEAVES, *empty, rng.choice(_EDGES), rng.choice(_TEXTS)])


def damaged(rng: random.Random, one: Taken, other: Taken) -> tuple[bytes, list[bytes]]:
    """A tree and buffers that were not written like this by anybody, as a rule."""
    tree, buffers = one.tree, list(one.buffers)
    if rng.random() < 0.15:
        buffers += other.buffers
    roll = rng.random()
    if roll < 0.55:
        tree = _edited(rng, tree, other.tree)
    elif roll < 0.75:
        tree = _bytes(rng, tree)
    elif roll < 0.8:
        tree = _anything(rng, other.tree)
    if buffers and (roll >= 0.8 or rng.random() < 0.25):
        _damage_buffers(rng, buffers, other.buffers)
    return tree, buffers


# -------------------------------------------------------------------------------------- bytes


def _bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        rng.choice(_BYTE_EDITS)(rng, changed, at)
    return bytes(changed)


def _flip(rng: random.Random, data: bytearray, at: int) -> None:
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _put_number(rng: random.Random, data: bytearray, at: int) -> None:
    width = rng.choice((1, 2, 4, 8))
    at -= at % width
    number = (rng.choice(_EDGES) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    data[at : at + width] = number[: len(data) - at]


def _cut(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at : at + rng.choice((1, 1, 4, 8, len(data)))]


def _insert(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))


def _repeat(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = data[max(0, at - rng.choice((1, 4, 16))) : at]


_BYTE_EDITS: list[Callable[[random.Random, bytearray, int], None]]
_BYTE_EDITS = [_flip, _flip, _flip, _put_number, _put_number, _cut, _insert, _repeat]


def _anything(rng: random.Random, other: bytes) -> bytes:
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(200))
    packed: bytes = msgpack.packb(_random_node(rng, 5))
    return packed if rng.random() < 0.7 else packed[:-1] + other


def _random_node(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.4:
        return _leaf(rng)
    parts = [_random_node(rng, depth - 1) for _ in range(rng.randrange(6))]
    if rng.random() < 0.7:
        return [rng.choice(TAGS), *parts]
    return parts if rng.random() < 0.7 else {str(index): part for index, part in enumerate(parts)}


# --------------------------------------------------------------------------------------- nodes


def _edited(rng: random.Random, tree: bytes, other: bytes) -> bytes:
    holder = [_unpacked(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(holder))
        node, key = rng.choice(places)
        if rng.random() < 0.2:
            node[key] = _piece(rng, other)
        else:
            node[key] = _changed(rng, node[key], places)
    try:
        packed: bytes = msgpack.packb(holder[0])
    except (ValueError, OverflowError, TypeError, RecursionError):  # a list in itself, a key that is a list
        return _bytes(rng, tree)
    return packed if len(packed) < 1 << 20 else tree


def _unpacked(tree: bytes) -> Any:
    return msgpack.unpackb(tree, strict_map_key=False)


def _piece(rng: random.Random, tree: bytes) -> Any:
    holder = [_unpacked(tree)]
    node, key = rng.choice(list(_places(holder)))
    return node[key]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    seen: set[int] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if id(node) in seen:  # an edit may have put it into itself
            continue
        seen.add(id(node))
        for key in range(len(node)) if isinstance(node, list) else list(node):
            yield node, key
            if isinstance(node[key], (list, dict)):
                pending.append(node[key])


def _changed(rng: random.Random, node: Any, places: Nodes) -> Any:
    roll = rng.random()
    if roll < 0.1:
        return _leaf(rng)
    if roll < 0.25:
        holder, key = rng.choice(places)
        return holder[key]
    if roll < 0.3:
        return [node] if rng.random() < 0.5 else [rng.choice(TAGS), node]
    if type(node) is int:
        return rng.choice([rng.choice(_EDGES), node + rng.choice((-1, 1)), 2 * node, rng.choice(TAGS)])
    if isinstance(node, bytes):
        return _bytes(rng, node)
    if isinstance(node, str):
        texts = [holder[key] for holder, key in places if isinstance(holder[key], str)]
        return rng.choice([rng.choice(texts), rng.choice(_TEXTS), node[:-1], node + "x"])
    if isinstance(node, list):
        return _rearranged(rng, node)
    if isinstance(node, dict) and node:
        return {key: node[key] for key in rng.sample(list(node), rng.randrange(len(node)))}
    return _leaf(rng)


def _rearranged(rng: random.Random, nodes: list[Any]) -> list[Any]:
    changed = list(nodes)
    if not changed:
        return [_leaf(rng)]
    at, to = rng.randrange(len(changed)), rng.randrange(len(changed))
    roll = rng.randrange(5)
    if roll == 0:
        changed.pop(at)
    elif roll == 1:
        changed.insert(at, changed[to])
    elif roll == 2:
        changed[at], changed[to] = changed[to], changed[at]
    elif roll == 3:
        changed = changed[:at]
    else:
        changed += changed[at:]
    return changed


# -------------------------------------------------------------------------------------- buffers


def _damage_buffers(rng: random.Random, buffers: list[bytes], others: Sequence[bytes]) -> None:
    at = rng.randrange(len(buffers))
    whole = buffers[at]
    roll = rng.randrange(9)
    if roll < 3:
        buffers[at] = _bytes(rng, whole)
    elif roll == 3:
        buffers[at] = whole[: rng.randrange(len(whole) + 1)]
    elif roll == 4:
        buffers[at] = whole + rng.choice((b"\0", b"\xff" * 8, whole))
    elif roll == 5:
        buffers[at] = rng.choice((rng.randbytes(len(whole)), b"\xff" * len(whole), bytes(len(whole))))
    elif roll == 6:
        buffers[at] = rng.choice([*buffers, *others])
    elif roll == 7:
        rng.shuffle(buffers)
    else:
        del buffers[at]
