"""Merges adapters with biases into a layer.

`A_bias (*batch, rank)` and `B_bias (*batch, out)` (peft's `lora_bias` is the second) shift
the output by `scale * (A_bias @ B + B_bias)`. So a merge changes the layer's bias as well
as its weight. `lora_linear` applies them. Dtypes are as in `lora_jax.layers.lora`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax._core import checks, numerics
from lora_jax.layers import adapter_checks
from lora_jax.layers.adapter_checks import WITH_BIASES

__all__ = ["lora_bias_delta", "merge_lora_layer", "unmerge_lora_layer"]


def lora_bias_delta(
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
) -> jax.Array:
    """The update of the layer's bias, `scale * (A_bias @ B + B_bias)`.

    Args:
        adapter: `A` and `B`, and `A_bias`, `B_bias` or neither.
        alpha: see `lora_delta`.
        rank_stabilized: see `lora_delta`.

    Returns:
        `(*batch, out)`, in the widest dtype of the adapter's entries; zero if there are
        no biases. Formed in at least float32 and rounded once.

    Raises:
        KeyError, TypeError, ValueError: as `lora_delta`, but biases are welcome.
    """
    adapter_checks.check_adapter(adapter, None, **WITH_BIASES)
    dtypes = [value.dtype for value in adapter.values()]
    scale = adapter_checks.checked_scale(adapter, alpha, rank_stabilized, *dtypes)
    dtype = numerics.promote(*dtypes)
    return _wide_bias_delta(adapter, scale, dtype).astype(dtype)


def merge_lora_layer(
    frozen_weight: jax.Array,
    frozen_bias: jax.Array | None,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Folds an adapter, its biases too, into the layer it adapts.

    Args:
        frozen_weight: `(*batch, in, out)`, floating point.
        frozen_bias: `(*batch, out)`, floating point, or None for a layer without one.
        adapter: `A`, `B`, and `A_bias`, `B_bias` where they exist.
        alpha: see `lora_delta`.
        rank_stabilized: see `lora_delta`.

    Returns:
        The weight, as `merge_lora_weight` gives it, and the bias
        `frozen_bias + lora_bias_delta(adapter)`, `(*batch, out)`, in the dtype of
        `frozen_bias` (of the weight if it is None), each rounded once.

    Raises:
        KeyError, TypeError, ValueError: as `merge_lora_weight`, but biases are welcome;
            ValueError if `frozen_bias` does not fit.
    """
    value = adapter_checks.checked(
        "frozen_weight", frozen_weight, adapter, alpha, rank_stabilized, **WITH_BIASES
    )
    weight = value.weight
    if frozen_bias is None:
        frozen_bias = jnp.zeros(weight.shape[:-2] + weight.shape[-1:], weight.dtype)
    checks.check_bias("frozen_bias", frozen_bias, weight.shape)
    delta = _wide_bias_delta(adapter, value.scale, frozen_bias.dtype)
    return value.merge(), numerics.sum_and_round(frozen_bias, [delta])


def unmerge_lora_layer(
    merged_weight: jax.Array,
    merged_bias: jax.Array,
    adapter: Mapping[str, jax.Array],
    alpha: float | jax.Array = 1.0,
    *,
    rank_stabilized: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Takes an adapter, its biases too, out of a merged layer.

    Args:
        merged_weight: `(*batch, in, out)`, floating point.
        merged_bias: `(*batch, out)`, floating point.
        adapter: the adapter that was merged.
        alpha: the one of the merge.
        rank_stabilized: as in the merge.

    Returns:
        The weight and the bias as they were before `merge_lora_layer`, in their dtypes, up
        to the rounding that `unmerge_lora_weight` states.

    Raises:
        KeyError, TypeError, ValueError: as `merge_lora_layer`.
    """
    value = adapter_checks.checked(
        "merged_weight", merged_weight, adapter, alpha, rank_stabilized, **WITH_BIASES
    )
    checks.check_bias("merged_bias", merged_bias, value.weight.shape)
    delta = _wide_bias_delta(adapter, value.scale, merged_bias.dtype)
    return value.unmerge(), numerics.sum_and_round(merged_bias, [-delta])


def _wide_bias_delta(
    adapter: Mapping[str, jax.Array], scale: float | jax.Array, dtype: DTypeLike
) -> jax.Array:
    """`scale * (A_bias @ B + B_bias)`, `(*batch, out)`, in the widest dtype at hand."""
    dtypes = (entry.dtype for entry in adapter.values())
    wide = numerics.accumulation_dtype(dtype, *dtypes)
    b = jnp.asarray(adapter["B"], wide)  # (*batch, rank, out)
    delta = jnp.zeros((*b.shape[:-2], b.shape[-1]), wide)
    if "A_bias" in adapter:
        a_bias = numerics.as_row(adapter["A_bias"], b)  # (*batch, 1, rank)
        through_b = jnp.matmul(a_bias, b, precision=lax.Precision.HIGHEST)
        delta = delta + jnp.squeeze(through_b, -2)
    if "B_bias" in adapter:
        delta = delta + jnp.asarray(adapter["B_bias"], wide)
    return numerics.multiply(delta, scale)
