"""torchao's NF4 (`torchao.dtypes.NF4Tensor`): its codes, and its 8-bit scales.

Everything is computed in the dtype of the weight. In 16 bits, torchao rounds after each
operation; this module does the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.quant import _arithmetic, _packing

SCALES = jnp.int8
"""The dtype of nested scales."""

# Normal quantiles, rounded to four decimals and then to the dtype of the weight.
_VALUES = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)


@functools.cache
def table(dtype: DTypeLike) -> np.ndarray:
    """The values of the 16 codes in a weight of some dtype, as float32."""
    return np.array(_VALUES).astype(jnp.dtype(dtype)).astype(np.float32)


def group_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of the groups' scales and of the mean: the dtype of the weight."""
    return jnp.dtype(dtype)


def encode(blocks: jax.Array, absmax: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`(..., n_blocks, block_size), (..., n_blocks)` -> the codes, uint8."""
    ratio = _arithmetic.divide(blocks, absmax[..., None])
    values = table(dtype).astype(jnp.dtype(dtype))
    limits = _arithmetic.thresholds(values, dtype)
    return _packing.nearest(_arithmetic.round_to(ratio, dtype), limits)


def nest(
    absmax: jax.Array, group: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes the scales of blocks to 8 bits.

    Args:
        absmax: `(..., n_blocks)`, float32 with values of `dtype`.
        group: how many blocks share a factor; the last group may have fewer.
        dtype: of the weight.

    Returns:
        The codes `(..., n_blocks)`, int8; the factors `(..., n_groups)` and the mean
        `(...)`, in `dtype`. The codes are `round((absmax - mean) * factor)`.
    """
    mean = _arithmetic.round_to(_arithmetic.mean(absmax), dtype)
    rest = _arithmetic.round_to(absmax - mean[..., None], dtype)
    rest = _arithmetic.in_rows(rest, group)
    factor = _factor(jnp.max(jnp.abs(rest), axis=-1), dtype)
    steps = _arithmetic.round_to(rest * factor[..., None], dtype)
    steps = jnp.where(jnp.isnan(steps), jnp.zeros_like(steps), steps)
    codes = jnp.clip(jnp.round(steps), -128, 127).astype(SCALES)
    codes = codes.reshape(*absmax.shape[:-1], -1)[..., : absmax.shape[-1]]
    return codes, factor.astype(dtype), mean.astype(dtype)


def _factor(peak: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`128 / peak`; infinite only if all scales are equal."""
    top = float(jnp.finfo(dtype).max)
    factor = jnp.minimum(_arithmetic.round_to(128.0 / peak, dtype), top)
    return jnp.where(peak == 0, jnp.full_like(peak, jnp.inf), factor)


def unnest(
    codes: jax.Array, factor: jax.Array, mean: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Undoes `nest`: `codes / factor + mean`, float32. The shapes broadcast."""
    wide = codes.astype(jnp.float32)
    rest = _arithmetic.divide(wide, factor.astype(jnp.float32))
    rest = _arithmetic.round_to(rest, dtype)
    return _arithmetic.round_to(rest + mean.astype(jnp.float32), dtype)
