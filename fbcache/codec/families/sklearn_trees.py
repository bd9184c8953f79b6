"""Trees of scikit-learn: how much memory they take, which nothing about them says otherwise.

Guarantee: no estimator is encoded here. They travel by pickle, where that is allowed, as they did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from sklearn.neighbors import _ball_tree, _kd_tree  # type: ignore[import-untyped]
from sklearn.tree import _tree  # type: ignore[import-untyped]

from fbcache.codec.families.kinds import Kind, Size
from fbcache.codec.tags import Node

if TYPE_CHECKING:
    from fbcache.codec.decoder import Decoder
    from fbcache.codec.encoder import Encoder

_HEAD: Final = 200  # bytes of a tree without its nodes

_NEIGHBOURS: Final = ("KDTree", "KDTree32", "BallTree", "BallTree32")


def _encode(encoder: Encoder, tree: Any) -> Node:
    return NotImplemented


def _decode(decoder: Decoder, node: Node, depth: int) -> Any:
    raise ValueError("trees of scikit-learn are pickled")


def _size(tree: Any) -> Size:
    """What pickle would take: views of the tree's own memory, among much that is small."""
    state = tree.__getstate__()
    parts: Iterable[Any] = state.values() if isinstance(state, dict) else state
    return _HEAD, [part for part in parts if hasattr(part, "nbytes")]


def _classes() -> list[type]:
    found = [getattr(module, name, None) for module in (_kd_tree, _ball_tree) for name in _NEIGHBOURS]
    return [_tree.Tree, *(cls for cls in found if cls is not None)]


KINDS: tuple[Kind, ...] = tuple(
    Kind(cls, f"sklearn.{cls.__name__}", _encode, _decode, size=_size, travels="pickle") for cls in _classes()
)
