"""Finds adapters in a tree, and selects leaves by patterns.

A dict is an adapter if it has the entries `A` and `B` and no other entries than those of
adapters. A dict with the single entry `value` is a trained leaf, which is no adapter. A
*gap* is `optax.MaskedNode()` or None in place of a leaf that was left out. It keeps the
path of the leaf, so that a masked tree has the same paths as the full tree.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from lora_jax._core import tree_paths
from lora_jax._core.quantized import is_quantized
from lora_jax.plan.target import VALUE

ENTRIES = ("A", "B", "m", "A_bias", "B_bias")


class Leaf(NamedTuple):
    """A leaf or a gap of a tree."""

    value: Any
    path: str
    """The path of the leaf in the tree."""
    adapter: str | None = None
    """The path of its adapter in the tree; None for a leaf outside of adapters."""
    weight: str = ""
    """The last key of that path: the weight's path in the params for `{path: adapter}`."""
    entry: str = ""
    """The name of the leaf in its adapter."""
    quantized: str | None = None
    """The path of its quantized weight, if the leaf is an array of one."""

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that a pattern may match: of the leaf, and of its adapter's weight."""
        if self.quantized is not None:
            return self.quantized, self.path
        if self.adapter is None:
            trained = [self.weight, f"{self.weight}/{VALUE}"] if self.weight else []
            return tuple(dict.fromkeys([*trained, self.path]))
        weights = [path for path in (self.weight, self.adapter) if path]
        entries = [f"{path}/{self.entry}" for path in weights]
        return tuple(dict.fromkeys([*weights, *entries, self.path]))


def is_gap(node: Any) -> bool:
    """Whether a node stands for a leaf that was left out."""
    return node is None or isinstance(node, optax.MaskedNode)


def _is_owner(node: Any) -> bool:
    """Whether a node is an adapter, a trained leaf or a quantized weight."""
    if not isinstance(node, Mapping):
        return is_quantized(node)
    has_names = {"A", "B"} <= node.keys() <= {*ENTRIES} or node.keys() == {VALUE}
    values = [value for value in node.values() if not is_gap(value)]
    return has_names and jax.tree_util.all_leaves(values)


def flatten(tree: Any) -> tuple[list[Leaf], Any]:
    """The leaves and gaps of a tree, and the structure that unflattens them."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: is_gap(node) or _is_owner(node)
    )
    owners = {keys: node for keys, node in nodes if _is_owner(node)}
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_gap)
    return [_leaf(keys, value, owners.get(keys[:-1])) for keys, value in leaves], structure


def _leaf(keys: tuple[Any, ...], value: Any, owner: Any) -> Leaf:
    """A leaf with the adapter, trained leaf or quantized weight that it belongs to."""
    if is_quantized(owner):
        return Leaf(value, _text(keys), quantized=_text(keys[:-1]))
    if owner is None:
        return Leaf(value, _text(keys))
    if VALUE in owner:
        return Leaf(value, _text(keys), weight=_text(keys[-2:-1]))
    *above, entry = keys
    return Leaf(value, _text(keys), _text(above), _text(above[-1:]), _text([entry]))


def _text(keys: Iterable[Any]) -> str:
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def choose(name: str, patterns: Iterable[str], leaves: list[Leaf]) -> list[str | None]:
    """The first pattern that matches each leaf or gap, or None.

    Raises:
        ValueError: if a pattern matches nothing. But a tree without leaves and gaps is
            allowed: `optax.tree_map_params` asks for its state.
    """
    patterns = tuple(patterns)
    paths = list(dict.fromkeys(path for leaf in leaves for path in leaf.names))
    if leaves:
        tree_paths.check_matched(name, patterns, paths, "leaf", _masked(leaves))
    return [
        next((p for p in patterns if tree_paths.first_path(p, leaf.names)), None)
        for leaf in leaves
    ]


def map_leaves(
    function: Callable[[Leaf, str | None], Any],
    tree: Any,
    name: str,
    patterns: Iterable[str],
) -> Any:
    """Replaces each leaf by `function(leaf, pattern)`, with its pattern from `choose`."""
    leaves, structure = flatten(tree)
    pairs = zip(leaves, choose(name, patterns, leaves), strict=True)
    return structure.unflatten(
        own.value if is_gap(own.value) else function(own, p) for own, p in pairs
    )


def _masked(leaves: list[Leaf]) -> str:
    if not any(is_gap(leaf.value) and leaf.adapter is None for leaf in leaves):
        return ""
    return (
        " A part of the tree is masked: if the pattern is for what is in there, give the "
        "mask or the labels leaf by leaf, which keeps the paths."
    )


def check_holds_adapters(name: str, leaves: list[Leaf]) -> None:
    """Raises ValueError for a tree without adapters, unless it is empty, as in `choose`."""
    if leaves and all(leaf.adapter is None for leaf in leaves):
        paths = ", ".join(repr(leaf.path) for leaf in leaves[:3])
        raise ValueError(
            f"{name} got a tree without adapters: expected a dict with the entries A and B "
            f"and no others than {', '.join(ENTRIES[2:])} somewhere in it; the first paths "
            f"are {paths}. Make adapters with init_adapters."
        )
