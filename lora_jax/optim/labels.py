"""Labels for `optax.partition` and masks for weight decay."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax._core import tree_paths
from lora_jax._core.immutable import FrozenDict
from lora_jax.optim import _leaves

__all__ = ["adapter_labels", "weight_decay_mask"]

NO_PATTERNS: FrozenDict[str, Any] = FrozenDict()

_LABELS = {"A": "A", "B": "B", "m": "magnitude", "A_bias": "bias", "B_bias": "bias"}
_DECAYED = ("A", "B")


def adapter_labels(
    tree: tree_paths.PyTree,
    patterns: Mapping[Any, str] = NO_PATTERNS,
    *,
    other: str = "other",
) -> Any:
    """Labels each leaf of a tree by its role in an adapter.

    An adapter is a dict with the entries `A` and `B`, and no others than `m`, `A_bias` and
    `B_bias`. It may be anywhere in the tree.

    Args:
        tree: adapters `{weight path: adapter}`, or a tree that contains adapters, such as
            `{"adapters": adapters, "head": head}`. Its leaves may be arrays, gradients or
            shapes; some may be replaced by `optax.MaskedNode()` or None. Values are not
            read.
        patterns: a dict from patterns to labels, for leaves with another label. The first
            matching pattern wins. Patterns are those of `lora_jax.LoraConfig`. A pattern is
            matched against the weight's path (it then applies to each entry of the
            adapter), against `<weight path>/A` and so on, and against the path in the whole
            tree.
        other: the label of leaves outside of adapters, and of leaves that the plan trains
            without an adapter, `{path: {"value": array}}`.

    Returns:
        A tree of the same structure with a label for each leaf: `"A"`, `"B"`,
        `"magnitude"`, `"bias"`, `other`, or a label from `patterns`. The function itself
        can be passed to `optax.partition` as the labels; to use patterns, pass
        `functools.partial(adapter_labels, patterns=...)`.

    Raises:
        TypeError: if `patterns` is not a dict of patterns, or a label is not a string.
        ValueError: if a pattern is not a valid regular expression, or matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_jax import optim
        >>> adapters = {"q/kernel": {"A": jnp.ones((8, 2)), "B": jnp.zeros((2, 8))}}
        >>> optim.adapter_labels({"adapters": adapters, "head": jnp.zeros(3)})
        {'adapters': {'q/kernel': {'A': 'A', 'B': 'B'}}, 'head': 'other'}
        >>> optim.adapter_labels(adapters, {"q/*/A": "frozen"})
        {'q/kernel': {'A': 'frozen', 'B': 'B'}}
        >>> optimizer = optax.partition(
        ...     {"A": optax.sgd(0.1), "B": optax.adam(0.01)}, optim.adapter_labels
        ... )
        >>> state = optimizer.init(adapters)
    """
    by_pattern = tree_paths.as_entries("patterns", patterns)
    for own in (*by_pattern.values(), other):
        if not isinstance(own, str):
            raise TypeError(
                f"a label must be a string, got {own!r} ({type(own).__name__})."
            )
    return labels_by(tree, by_pattern, other, "patterns")


def labels_by(tree: Any, by_pattern: Mapping[str, str], other: str, name: str) -> Any:
    """Implements `adapter_labels`, for checked patterns from the argument `name`."""

    def label_of(leaf: _leaves.Leaf, pattern: str | None) -> str:
        return _LABELS.get(leaf.entry, other) if pattern is None else by_pattern[pattern]

    return _leaves.map_leaves(label_of, tree, name, by_pattern)


def weight_decay_mask(
    tree: tree_paths.PyTree,
    exclude: str | re.Pattern[str] | Iterable[str | re.Pattern[str]] = (),
) -> Any:
    """Selects the leaves to decay: factors and matrices.

    Magnitudes and biases of adapters are not decayed. Decaying a magnitude would also
    shrink the frozen column.

    Trained leaves, and leaves outside of adapters, are decayed if they have more than one
    axis. This is a guess: in stacked layers a norm's scale or a bias is `(layers, width)`
    and looks like a matrix. Name such leaves in `exclude`.

    Args:
        tree: as in `adapter_labels`.
        exclude: patterns of leaves that are not decayed, or one pattern; as in
            `adapter_labels`.

    Returns:
        A tree of the same structure with True or False for each leaf. The function itself
        can be passed to `optax.adamw` as its `mask`; to use patterns, pass
        `functools.partial(weight_decay_mask, exclude=...)`.

    Raises:
        TypeError: if `exclude` is not made of patterns.
        ValueError: if a pattern is not a valid regular expression, or matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_jax import optim
        >>> head = {"kernel": jnp.zeros((8, 3)), "bias": jnp.zeros(3)}
        >>> optim.weight_decay_mask(head)
        {'bias': False, 'kernel': True}
        >>> optimizer = optax.adamw(1e-3, mask=optim.weight_decay_mask)
    """
    patterns = tree_paths.as_texts("exclude", exclude)

    def is_decayed(leaf: _leaves.Leaf, pattern: str | None) -> bool:
        inside = leaf.adapter is not None
        decays = leaf.entry in _DECAYED if inside else np.ndim(leaf.value) > 1
        return decays and pattern is None

    return _leaves.map_leaves(is_decayed, tree, "exclude", patterns)
