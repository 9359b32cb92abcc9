"""Sums over the inputs of each use of each weight of a plan."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import jax
import jax.numpy as jnp

from lora_jax._core import checks, numerics
from lora_jax._core.tree_paths import Tree
from lora_jax.layers.lora import Adapters
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.transform._context import OnStopGradient
from lora_jax.transform._statistics import MOMENTS as MOMENTS
from lora_jax.transform._statistics import Statistic as Statistic
from lora_jax.transform.adapt import OnMerge, bound

P = ParamSpec("P")


def observe(
    fn: Callable[Concatenate[Tree, P], object],
    plan: AdapterPlan,
    statistic: Statistic,
    *,
    on_merge: OnMerge,
    on_stop_gradient: OnStopGradient,
) -> Callable[Concatenate[Tree, Adapters, P], jax.Array]:
    """Makes a scalar function whose gradients for `A` are sums over the inputs of weights.

    The value has no meaning. `B` must be zero, so that each weight has its usual inputs.
    See `_statistics` for the sums; for `"moments"` the rank is 3. Products whose results
    reach a floating-point output of `fn` in a differentiable way are counted. The other
    arguments are those of `adapt`; the plan has LoRA at the scale 1, without dropout.

    Raises:
        TypeError: the function: if no output of `fn` is a floating-point array.
        KeyError, TypeError, ValueError: as `adapt`.
    """
    options: Any = {"on_merge": on_merge, "on_stop_gradient": on_stop_gradient}
    adapted = bound(fn, plan, statistic=statistic, **options)

    def total(
        params: Tree, adapters: Adapters, /, *args: P.args, **kwargs: P.kwargs
    ) -> jax.Array:
        leaves = jax.tree.leaves(adapted(params, adapters, *args, **kwargs))
        sums = [
            jnp.sum(leaf.astype(numerics.accumulation_dtype(leaf.dtype)))
            for leaf in leaves
            if checks.is_array(leaf) and checks.is_floating(leaf.dtype)
        ]
        if not sums:
            raise TypeError(
                "fn must return floating-point arrays that depend on the adapted weights, "
                "such as logits or a loss: their gradients lead to the inputs."
            )
        return functools.reduce(jnp.add, [own.astype(sums[0].dtype) for own in sums])

    return total
