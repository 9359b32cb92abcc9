"""Training some leaves of a tree and freezing the others."""

import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax._core import tree_paths
from lora_jax._core.quantized import is_quantized
from lora_jax.optim import _leaves

__all__ = ["trainable_and_frozen"]

TRAINED, FROZEN = "trained", "frozen"

Patterns: TypeAlias = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]


def trainable_and_frozen(
    params: tree_paths.PyTree,
    trainable: Patterns | Callable[[str], bool],
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Trains some leaves of one tree and freezes the others.

    Use it if adapters and params are in one tree. If the adapters are a tree of their own,
    nothing has to be frozen: differentiate with respect to the adapters.

    The frozen leaves have no optimizer state, and their update is zero. This includes
    integer leaves, such as the codes of quantized weights, for which `jax.grad` needs
    `allow_int=True`. (`optax.masked` alone would return the raw gradients of frozen leaves
    as their updates.) A compiled step does not compute products that only the gradients of
    frozen leaves need. This holds if nothing else reads these gradients: put
    `optax.clip_by_global_norm` into `optimizer`, not in front.

    Args:
        params: the tree. Only the paths of its leaves are used.
        trainable: patterns of the paths of the leaves to train, or one pattern, as in
            `lora_jax.LoraConfig`. Or a function that takes the path of a leaf and returns
            whether to train it.
        optimizer: of the leaves to train.

    Returns:
        A gradient transformation for trees of the structure of `params`.

    Raises:
        TypeError: if an argument has the wrong type, the function does not return a bool,
            or a leaf to train is quantized.
        ValueError: if a pattern is not a valid regular expression or matches nothing, or
            no leaf is to be trained.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_jax import optim
        >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
        >>> optimizer = optim.trainable_and_frozen(params, "head", optax.sgd(1.0))
        >>> updates, _ = optimizer.update(params, optimizer.init(params))
        >>> print(updates["body"], updates["head"])
        [0. 0.] [-1. -1.]
    """
    check_optimizer("optimizer", optimizer)
    paths, structure = tree_paths.flatten(params)
    is_trained = _chosen(trainable, list(paths))
    if not any(is_trained):
        raise ValueError(
            f"trainable chooses none of the {len(paths)} leaves; the first paths are "
            f"{', '.join(map(repr, list(paths)[:3])) or 'none'}."
        )
    for (path, leaf), trained in zip(paths.items(), is_trained, strict=True):
        if trained and is_quantized(leaf):
            raise TypeError(
                f"trainable chooses {path!r}, which is quantized ({leaf!r}), and a step "
                "would change its codes: train adapters of it, or a dense weight."
            )
    labels = structure.unflatten([TRAINED if t else FROZEN for t in is_trained])
    # A function, because optax would call a tree that is callable, such as a module.
    return freezing(optimizer, lambda _: labels)


def freezing(
    optimizer: optax.GradientTransformation, labels: Any
) -> optax.GradientTransformationExtraArgs:
    """Trains the leaves with the label `TRAINED`; the others are `FROZEN`."""
    optimizers: dict[Hashable, optax.GradientTransformation] = {
        TRAINED: optimizer,
        FROZEN: _set_to_zero(),
    }
    return optax.partition(optimizers, labels)


def _set_to_zero() -> optax.GradientTransformation:
    """As `optax.set_to_zero`, but updates of integers can be added: they are no float0."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        like = updates if params is None else params
        return jax.tree.map(jnp.zeros_like, like), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _chosen(trainable: Any, paths: list[str]) -> list[bool]:
    """Whether to train each path."""
    if not callable(trainable):
        patterns = tree_paths.as_texts("trainable", trainable)
        leaves = [_leaves.Leaf(path, path) for path in paths]
        return [p is not None for p in _leaves.choose("trainable", patterns, leaves)]
    chosen = [trainable(path) for path in paths]
    for path, choice in zip(paths, chosen, strict=True):
        if not isinstance(choice, bool | np.bool_):
            raise TypeError(
                f"trainable must return True or False, got {choice!r} for {path!r}."
            )
    return [bool(choice) for choice in chosen]


def check_optimizer(name: str, optimizer: Any) -> None:
    """Raises unless `optimizer` has the functions of a gradient transformation."""
    if not all(callable(getattr(optimizer, verb, None)) for verb in ("init", "update")):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got "
            f"{type(optimizer).__name__}: for example optax.adam(1e-3)."
        )
