"""A state of an optimizer for each slot of a stack of adapters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax._core import checks
from lora_jax.optim.freezing import check_optimizer
from lora_jax.plan.adapter_stack import AdapterStack

__all__ = ["per_slot"]


def per_slot(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Trains each slot of a stack of adapters with an optimizer of its own.

    Each slot has its own step count, moments and hyperparameters. Statistics such as a
    global norm are those of one slot. `update` takes a mask of the slots that step. Each
    other slot keeps every bit of its state, whatever its gradients are, and its updates
    are -0.0: `optax.apply_updates` then keeps every bit of its params, except that sums on
    CPUs replace subnormal numbers by zeros. One compiled step serves all masks.

    Padding with zeros, for slots of a lower rank, stays zero. Only an optimizer that takes
    the mean over an array, such as Adafactor, depends on it.

    Args:
        optimizer: any optax transformation for the adapters of one slot, also with
            `optax.MultiSteps`, `optax.inject_hyperparams` or a schedule. It gets
            `{path: adapter}` without the slot axis. `lora_fa` with a plan divides by the
            scales of the slot, not by those of the plan.

    Returns:
        A gradient transformation for an `AdapterStack`, or for another tree whose arrays
        all have the slots as their first axis. So have all arrays of its state. The
        `scales` and `magnitudes` of a stack are not trained: their updates are -0.0.
        `update(grads, state, params, step=None)` needs the params. `step` is a bool array
        `(slots,)`; without it, all slots step. Other keyword arguments go to `optimizer`;
        they too have the slots first.

    Raises:
        TypeError: if `optimizer` is not an optax transformation. And in `update`: if only
            one of gradients and params is an `AdapterStack`, or `step` is not a bool array.
        ValueError: in `init` and `update`, if the first axis of an array is not that of the
            slots; in `update` also if there are no params.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lora_jax import optim
        >>> stack = {"q/kernel": {"A": jnp.ones((2, 3, 1)), "B": jnp.zeros((2, 1, 3))}}
        >>> optimizer = optim.per_slot(optax.inject_hyperparams(optax.adam)(1e-3))
        >>> state = optimizer.init(stack)

        A learning rate for each slot:

        >>> rates = jnp.array([0.5, 0.25])
        >>> state = optax.tree_utils.tree_set(state, learning_rate=rates)
        >>> step = jnp.array([False, True])
        >>> updates, state = optimizer.update(stack, state, stack, step=step)
        >>> print(updates["q/kernel"]["A"][:, 0, 0], state.count)
        [-0.   -0.25] [0 1]

        A fresh state for a slot, when its tenant changes:

        >>> def reset(state, slot, stack):
        ...     fresh = optimizer.init(stack)
        ...     return jax.tree.map(lambda x, new: x.at[slot].set(new[slot]), state, fresh)
        >>> print(jax.jit(reset, donate_argnums=0)(state, 1, stack).count)
        [0 0]
    """
    check_optimizer("optimizer", optimizer)
    if isinstance(optimizer, optax.MultiSteps):  # takes extra arguments without saying so
        accumulate: Any = optimizer.update
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, accumulate)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> optax.OptState:
        if not jax.tree.leaves(params):  # optax.tree_map_params asks for its state
            return inner.init(params)
        _count_slots(params=params)
        return jax.vmap(inner.init)(_trained(params))

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        if params is None:
            raise ValueError(
                "per_slot needs the params: call update(grads, state, params, step=step)."
            )
        if isinstance(updates, AdapterStack) != isinstance(params, AdapterStack):
            raise TypeError(
                "the gradients of an AdapterStack are an AdapterStack, got gradients "
                f"{type(updates).__name__} and params {type(params).__name__}."
            )
        slots = _count_slots(params=params, gradients=updates, state=state, **extra)
        _check_step(step, slots)
        if isinstance(params, AdapterStack):
            extra["slot_scales"] = params.scales

        def one(
            updates: Any, state: Any, params: Any, step: Any, extra: dict[str, Any]
        ) -> tuple[Any, optax.OptState]:
            new = inner.update(updates, state, params, **extra)
            if step is None:
                return new
            old = jax.tree.map(_zeros, new[0]), state
            return jax.tree.map(lambda x, y: jnp.where(step, x, y), new, old)

        args = _trained(updates), state, _trained(params), step, extra
        made, state = jax.vmap(one)(*args)
        if isinstance(params, AdapterStack):
            fixed = jax.tree.map(_zeros, (params.scales, params.magnitudes))
            made = AdapterStack(made, *fixed)
        return made, state

    return optax.GradientTransformationExtraArgs(init, update)


def _trained(tree: Any) -> Any:
    return tree.adapters if isinstance(tree, AdapterStack) else tree


def _zeros(update: jax.Array) -> jax.Array:
    """Zeros that change no bit of x in x + zeros: x + 0.0 would turn -0.0 into 0.0."""
    return jnp.full_like(update, -0.0)


def _count_slots(params: Any, **others: Any) -> int:
    """The number of slots: the length of the first axis of all arrays."""
    if any(map(_is_stack, jax.tree.leaves(_trained(params), is_leaf=_is_stack))):
        raise TypeError(
            "params has an AdapterStack inside of another tree: give the stack alone to "
            "per_slot, and train the rest with another per_slot."
        )
    leaves = jax.tree.leaves(params)
    slots = (*np.shape(leaves[0]), 0)[0] if leaves else 0
    arrays, _ = jax.tree_util.tree_flatten_with_path({"params": params, **others})
    for keys, leaf in arrays:
        if not slots or np.shape(leaf)[:1] != (slots,):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ValueError(
                f"per_slot needs the slots as the first axis of every array: {path} has "
                f"the shape {np.shape(leaf)}, and the first array of the params has "
                f"{slots} slots. per_slot(optimizer).init(params) makes a state for them."
            )
    return slots


def _is_stack(node: Any) -> bool:
    return isinstance(node, AdapterStack)


def _check_step(step: Any, slots: int) -> None:
    if step is None:
        return
    if not checks.is_array(step) or step.dtype != jnp.bool_:
        got = step.dtype if checks.is_array(step) else type(step).__name__
        raise TypeError(
            f"step must be a bool array ({slots},) with one entry for each slot, got {got}."
        )
    if step.shape != (slots,):
        raise ValueError(
            f"step must have the shape ({slots},), one entry for each slot, got "
            f"{step.shape}."
        )
