"""Seeded damage to a tree and its buffers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgpack

from fbcache.codec import Frames

_EDGES = [1 << 16, 1 << 31, (1 << 31) - 1, 1 << 62, (1 << 63) - 1, -(1 << 63)]
_NUMBERS = [0, 1, 2, 3, -1, 7, 8, 63, 64, 65, 255, *_EDGES]


def damaged(rng: random.Random, frames: Frames) -> tuple[bytes, list[bytes]]:
    """A tree and buffers, one of them or both not as they were."""
    buffers = [bytes(buffer) for buffer in frames.buffers]
    if buffers and rng.random() < 0.4:
        index = rng.randrange(len(buffers))
        whole = buffers[index]
        buffers[index] = _bytes(rng, whole) if rng.random() < 0.7 else whole[: rng.randrange(len(whole) + 1)]
    if rng.random() < 0.3:
        return _bytes(rng, frames.tree), buffers
    return _edited(rng, frames.tree), buffers


def _bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4)) if data else 0):
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            changed[at] ^= 1 << rng.randrange(8)
        else:
            width = rng.choice((2, 4, 8))
            at -= at % width
            number = (rng.choice(_NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            changed[at : at + width] = number[: len(data) - at]
    return bytes(changed)


def _edited(rng: random.Random, tree: bytes) -> bytes:
    nodes = msgpack.unpackb(tree, strict_map_key=False)
    places = list(_places(nodes))
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(places)
        _change(rng, holder, key, places)
    try:
        packed: bytes = msgpack.packb(nodes)
    except (ValueError, OverflowError):  # a list has become a part of itself
        return tree
    return packed


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, (list, dict)):
        for key in range(len(node)) if isinstance(node, list) else node:
            yield node, key
            yield from _places(node[key])


def _change(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    try:
        old = holder[key]
        if isinstance(old, bytes):
            holder[key] = _bytes(rng, old) if rng.random() < 0.8 else old[: rng.randrange(len(old) + 1)]
        elif type(old) is int:
            holder[key] = rng.choice(_NUMBERS) if rng.random() < 0.5 else old + rng.choice((-1, 1))
        elif isinstance(old, list) and old and rng.random() < 0.5:
            old.pop(rng.randrange(len(old)))
        else:
            other, there = rng.choice(places)
            holder[key] = other[there]
    except (IndexError, KeyError):  # it was cut off before
        pass
