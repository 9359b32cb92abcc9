"""LoRA+ and LoRA-FA: a learning rate for each factor, and a frozen `A`."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from lora_jax._core import checks, tree_paths
from lora_jax.optim import _leaves
from lora_jax.optim.freezing import FROZEN, TRAINED, check_optimizer, freezing
from lora_jax.optim.labels import NO_PATTERNS, adapter_labels, labels_by
from lora_jax.optim.preconditioning import (
    Number,
    Scales,
    check_damping,
    on_factors,
    solve_gram,
)
from lora_jax.plan.adapter_plan import AdapterPlan

__all__ = ["lora_fa", "lora_plus"]

LearningRate: TypeAlias = Number | optax.Schedule


def lora_plus(
    learning_rate: LearningRate,
    ratio: float = 16.0,
    *,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    rates: Mapping[Any, LearningRate] = NO_PATTERNS,
) -> optax.GradientTransformationExtraArgs:
    """Trains `B` with a higher learning rate than all other leaves (LoRA+).

    Each learning rate has its own optimizer, which gets only the leaves of that rate. A
    transformation that needs all gradients, such as `optax.clip_by_global_norm`, goes in
    front.

    Magnitudes, biases and leaves outside of adapters have the learning rate of `A`. PEFT
    treats magnitudes and all other vectors as biases, and gives them the rate of `B`.

    Args:
        learning_rate: of all leaves except `B`: a number, or a schedule.
        ratio: positive; the learning rate of `B` is `ratio * learning_rate`.
        optimizer: a function from a learning rate or schedule to an optimizer, such as
            `optax.adam` or `functools.partial(optax.adamw, mask=weight_decay_mask)`. To
            set rates between steps, use `optax.inject_hyperparams(optax.adam)`.
        rates: a dict from patterns to learning rates or schedules. `ratio` does not
            multiply them, not even for `B`. The first matching pattern wins. Patterns are
            as in `adapter_labels`: `{"embed/table": 1e-6}` is PEFT's
            `loraplus_lr_embedding`.

    Returns:
        A gradient transformation for trees that contain adapters.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `ratio` is not positive, or a number is not finite. And in `init`
            and `update`: if the tree has no adapters, or a pattern matches nothing.

    References:
        Hayou et al., 2024, https://arxiv.org/abs/2402.12354. PEFT's default ratio is the
        16 of the paper.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_jax import optim
        >>> adapters = {"q/kernel": {"A": jnp.ones((3, 1)), "B": jnp.zeros((1, 3))}}
        >>> optimizer = optim.lora_plus(0.5, optimizer=optax.sgd)
        >>> updates, _ = optimizer.update(adapters, optimizer.init(adapters))
        >>> print(updates["q/kernel"]["A"][0])
        [-0.5]
    """
    _check_learning_rate("learning_rate", learning_rate)
    checks.check_number("ratio", ratio)
    if not isinstance(ratio, Tracer) and not ratio > 0:
        raise ValueError(f"ratio must be positive, got {ratio}.")
    by_pattern = tree_paths.as_entries("rates", rates)
    for pattern, rate in by_pattern.items():
        _check_learning_rate(f"rates[{pattern!r}]", rate)
    # The brackets distinguish these labels from the labels of entries.
    labels = {pattern: f"rates[{pattern!r}]" for pattern in by_pattern}
    group_rates = {"rest": learning_rate, "B": _scaled(learning_rate, ratio)}
    group_rates |= {labels[pattern]: rate for pattern, rate in by_pattern.items()}

    def groups(tree: Any) -> Any:
        _leaves.check_holds_adapters("lora_plus", _leaves.flatten(tree)[0])
        own = labels_by(tree, labels, "rest", "rates")
        return jax.tree.map(lambda label: label if label in group_rates else "rest", own)

    optimizers: dict[Hashable, optax.GradientTransformation] = {
        group: _made(optimizer, rate) for group, rate in group_rates.items()
    }
    return optax.partition(optimizers, groups)


def _check_learning_rate(name: str, rate: Any) -> None:
    if not callable(rate):
        checks.check_number(name, rate)


def _scaled(learning_rate: LearningRate, ratio: float) -> LearningRate:
    if not callable(learning_rate):
        return ratio * learning_rate
    schedule: Any = learning_rate
    return lambda count: ratio * schedule(count)


def _made(optimizer: Any, rate: LearningRate) -> optax.GradientTransformation:
    """Calls `optimizer` with a learning rate and checks the result."""
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be a function that makes an optimizer of a learning rate, got "
            f"{type(optimizer).__name__}: pass optax.adam, and not optax.adam(1e-3); with "
            "optax.inject_hyperparams, lora_plus(rate, optimizer=inject_hyperparams(adam))."
        )
    made: Any = optimizer(rate)
    check_optimizer("optimizer(learning_rate)", made)
    return made


def lora_fa(
    optimizer: optax.GradientTransformation,
    scale: Number | AdapterPlan,
    *,
    damping: Number = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Trains `B` and freezes `A` (LoRA-FA), so the inputs of layers are not kept.

    The gradient of `B` becomes `(A^T A + damping I)^-1 gB / scale^2`. With it the update of
    the weight is as close to full fine-tuning as this `A` allows. `optimizer` gets `B`,
    magnitudes, biases and leaves outside of adapters. `A` has no state and never changes.

    A compiled step computes nothing for `A`, and the inputs of the adapted layers need not
    be kept for the backward pass. This holds if nothing else reads the gradients of `A`:
    put `optax.clip_by_global_norm` and `optax.MultiSteps` into `optimizer`, not around
    `lora_fa`.

    Args:
        optimizer: of all leaves except `A`, such as `optax.adamw(1e-3)`.
        scale: the scale of `A @ B`, a number other than 0; or the plan of the adapters,
            which has the scale of each. In `per_slot`, a plan stands for the scales of the
            `AdapterStack`.
        damping: as in `scale_by_riemannian`.

    Returns:
        A gradient transformation that needs the params in `update`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `scale` is 0, a number is not finite, or `damping` is not positive.
            And in `init` and `update`: if the tree has no adapters, there are no params,
            or a factor is missing or does not fit.
        KeyError: in `update`, if the plan has no scale for an adapter.

    References:
        Zhang et al., 2023, https://arxiv.org/abs/2308.03303, with the correction of PEFT's
        `LoraFaOptimizer`. PEFT decays weights after the step and solves in bfloat16. Here
        `optimizer` decides about weight decay, and the correction is computed in at least
        float32.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_jax import optim
        >>> adapters = {"q/kernel": {"A": jnp.ones((4, 1)), "B": jnp.zeros((1, 3))}}
        >>> grads = {"q/kernel": {"A": jnp.ones((4, 1)), "B": jnp.ones((1, 3))}}
        >>> optimizer = optim.lora_fa(optax.sgd(1.0), scale=2.0)
        >>> state = optimizer.init(adapters)
        >>> updates, state = optimizer.update(grads, state, adapters)
        >>> print(updates["q/kernel"]["B"])  # 1 / (4 * 2^2)
        [[-0.0625 -0.0625 -0.0625]]
    """
    check_optimizer("optimizer", optimizer)
    _check_scale(scale)
    check_damping(damping)

    def precondition(
        leaf: _leaves.Leaf, a: jax.Array, _: jax.Array, slot_scales: Scales
    ) -> jax.Array:
        solved = solve_gram(a.swapaxes(-1, -2), leaf.value, damping)
        divisor = jnp.asarray(_scale_of(scale, leaf, slot_scales), solved.dtype)
        return solved / divisor**2

    def groups(tree: Any) -> Any:
        labels = adapter_labels(tree)
        return jax.tree.map(lambda label: FROZEN if label == "A" else TRAINED, labels)

    preconditioned = on_factors("lora_fa", precondition, ("B",))
    return optax.chain(preconditioned, freezing(optimizer, groups))


def _check_scale(scale: Any) -> None:
    if isinstance(scale, AdapterPlan):
        return
    if not isinstance(scale, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(
            "scale must be a number or an AdapterPlan, got "
            f"{scale!r} ({type(scale).__name__})."
        )
    checks.check_number("scale", scale)
    if not isinstance(scale, Tracer) and scale == 0:
        raise ValueError("scale must not be 0: the adapter would never act.")


def _scale_of(
    scale: Number | AdapterPlan, leaf: _leaves.Leaf, slot_scales: Scales
) -> Number:
    """The scale of the adapter that a leaf belongs to."""
    if not isinstance(scale, AdapterPlan):
        return scale
    if slot_scales is not None:
        own = slot_scales[leaf.weight]
        return jnp.where(own == 0, 1, own)  # the slot has no such adapter, only zeros
    for path in (leaf.adapter, leaf.weight):
        if path is not None and path in scale.targets:
            return scale.targets[path].scale
    hint = tree_paths.nearest_hint(leaf.weight, scale.targets)
    raise KeyError(f"the plan has no weight {leaf.weight!r}{hint}.")
