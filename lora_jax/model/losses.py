"""What a merge loses when its result is rounded to the dtype of the weight."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax._core import checks, placement, quantized, tree_paths
from lora_jax.layers.lora import Adapters
from lora_jax.lowrank import weight_norms
from lora_jax.model.merging import Own, automatic, own
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan, Target

__all__ = ["MergeLoss", "merge_losses"]


class MergeLoss(NamedTuple):
    """What a merge loses when it is rounded to its dtype. Scalars, at least float32."""

    vanished: jax.Array
    """The fraction of all entries that have an update and do not change."""
    largest_vanished: jax.Array
    """The largest `|update| / |weight|` among these entries; 0 if there are none. A weight
    of 0, to which an update below the range of its dtype is added, counts as 1."""
    relative_error: jax.Array
    """`|merged - exact| / |update|`, in the Frobenius norm; 0 if the update is zero."""


def merge_losses(
    params: tree_paths.PyTree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    requantize: bool = False,
) -> dict[str, MergeLoss]:
    """Measures what the rounding of `merge_adapters` would lose, for each target.

    A 16-bit weight has 8 or 11 significant bits. An update below half a unit in the last
    place of its weight vanishes.

    Args:
        params: the params of the plan, before a merge.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        requantize: include the loss of quantizing merged weights again, as `merge_adapters`
            does with `requantize`. Otherwise merged quantized weights are dense.

    Returns:
        `{path: MergeLoss}`, with scalars computed in at least float32. `vanished` is the
        fraction of the entries that have an update and do not change, `largest_vanished`
        the largest `|update| / |weight|` among them, and `relative_error` is
        `|merged - exact| / |update|` in the Frobenius norm. All are 0 if the update is 0.

    Raises:
        KeyError, TypeError, ValueError: as `merge_adapters`.
    """
    leaves, _ = plan_checks.checked_leaves(params, adapters, plan)
    checks.check_flags(requantize=requantize)
    found = {}
    for path, target in plan.targets.items():
        with checks.at_path(path):
            weight = leaves[plan.leaf(path)]
            found[path] = merge_loss(weight, adapters[path], target, requantize)
    return found


def merge_loss(
    weight: Any, adapter: Mapping[str, jax.Array], target: Target, requantize: bool
) -> MergeLoss:
    """The rounding loss of `merge`; with `requantize`, the quantization loss as well."""
    requantize = requantize and quantized.is_quantized(weight)
    how = own(weight, target)
    return _compiled_loss(*placement.on_device((weight, dict(adapter))), how, requantize)


@functools.partial(jax.jit, inline=True, static_argnums=3)
def _compiled_loss(
    weight: Any, adapter: Mapping[str, jax.Array], own: Own, requantize: bool
) -> MergeLoss:
    return _merge_loss(weight, adapter, own, weight if requantize else None)


@automatic(keeps=False)
def _merge_loss(
    weight: jax.Array,
    adapter: Mapping[str, jax.Array],
    own: Own,
    like: quantized.QuantizedTensor | None,
) -> MergeLoss:
    value = own.value(weight, adapter)
    result, before, update = own.put(weight, value.merge()), value.weight, value.change()
    if like is not None:
        result = quantized.as_dense(like.quantize_like(result))
    merged = own.take(result)
    if own.in_place:  # nothing outside of the part counts
        update = own.put(jnp.zeros_like(update), update)
    lost = rounding_loss(update, before, merged)
    # Accurate for float32 weights too: the difference is exact if the update is smaller.
    error = update - (merged.astype(update.dtype) - before.astype(update.dtype))
    if own.in_place:
        error = own.put(jnp.zeros_like(error), error)
    norm, error = (_frobenius(x) for x in (update, error))
    entries = math.prod(own.target.alone.shape)
    return MergeLoss(
        vanished=jnp.sum(lost.vanished.astype(update.dtype)) / entries,
        largest_vanished=lost.largest,
        relative_error=error / jnp.where(norm == 0, jnp.inf, norm),
    )


class RoundingLoss(NamedTuple):
    """How much of an update is lost by rounding."""

    vanished: jax.Array
    """For each entry, whether it has an update and does not change."""
    largest: jax.Array
    """The largest `|update| / |weight|` among these entries, a scalar; 0 for none."""


def rounding_loss(update: jax.Array, weight: jax.Array, merged: jax.Array) -> RoundingLoss:
    """Measures how much of an update is lost when the merged weight is rounded.

    Args:
        update: the update, in at least float32.
        weight: the weight before the merge, in the dtype of `merged` or a wider one.
        merged: the rounded sum of weight and update.
    """
    zero = jnp.zeros_like(update)
    wide = weight.astype(update.dtype)
    vanished = (update != 0) & (merged == weight.astype(merged.dtype))
    size = jnp.where(wide == 0, zero + 1, jnp.abs(wide))
    ratios = jnp.where(vanished, jnp.abs(update) / size, zero)
    return RoundingLoss(vanished, jnp.max(ratios))


def _frobenius(x: jax.Array) -> jax.Array:
    """The Frobenius norm. The array is not flattened, because a mesh may split any axis."""
    return weight_norms.weight_norm(x, tuple(range(-x.ndim, 0)))
