"""bitsandbytes' NF4: its codes, and its 8-bit scales of a dynamic map.

Everything is computed in float32, whatever the dtype of the weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax._core import compat
from lora_jax.quant import _arithmetic, _packing

SCALES = jnp.uint8
"""The dtype of nested scales."""

_DECADES = 7

# Normal quantiles; Dettmers et al., 2023, appendix E.
_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def table(dtype: DTypeLike) -> np.ndarray:
    """The values of the 16 codes, float32, for a weight of any dtype."""
    del dtype
    return np.array(_VALUES, np.float32)


def group_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of the groups' scales and of the mean: float32."""
    del dtype
    return jnp.dtype(jnp.float32)


def encode(blocks: jax.Array, absmax: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`(..., n_blocks, block_size), (..., n_blocks)` -> the codes, uint8."""
    ratio = _arithmetic.multiply_by_inverse(blocks, absmax[..., None])
    return _packing.nearest(ratio, _arithmetic.thresholds(table(dtype)))


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the scales' codes, ascending, float32.

    They are zero, one, and evenly spaced values of both signs in each decade from 1e-7 to
    1. Each decade has twice as many values as the decade below.

    References:
        Dettmers, 2015, section 3.1, https://arxiv.org/abs/1511.04561.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(_DECADES):
        edges = _edges(2**i)
        centers = (edges[:-1] + edges[1:]) / np.float32(2)
        decade = np.float32(10.0 ** (i + 1 - _DECADES)) * centers
        values += [decade, -decade]
    return np.sort(np.concatenate(values))


def _edges(n: int) -> np.ndarray:
    """`n + 1` evenly spaced values from 0.1 to 1, with the bits of `torch.linspace`.

    The lower half is computed from 0.1 and the upper half from 1, each rounded once.
    """
    first, last = np.float32(0.1), np.float32(1.0)
    step, i = float((last - first) / np.float32(n)), np.arange(n + 1)
    below, above = float(first) + step * i, float(last) - step * (n - i)
    return np.where(i <= n // 2, below, above).astype(np.float32)


def nest(
    absmax: jax.Array, group: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes the scales of blocks to 8 bits.

    Args:
        absmax: `(..., n_blocks)`, float32.
        group: how many blocks share a scale; the last group may have fewer.
        dtype: of the weight; not used.

    Returns:
        The codes `(..., n_blocks)`, uint8; the scales of the groups `(..., n_groups)` and
        the mean `(...)`, float32. A code is the index of the value in the dynamic map that
        is nearest to `(absmax - mean) / scale`.
    """
    del dtype
    mean = _arithmetic.mean(absmax)
    rest = _arithmetic.in_rows(absmax - mean[..., None], group)
    scale = _arithmetic.largest(rest)
    ratio = _arithmetic.multiply_by_inverse(rest, scale[..., None])
    limits = jnp.asarray(_arithmetic.thresholds(dynamic_map()))
    codes = jnp.searchsorted(limits, ratio, method="compare_all").astype(SCALES)
    codes = codes.reshape(*absmax.shape[:-1], -1)[..., : absmax.shape[-1]]
    return codes, scale, mean


def unnest(
    codes: jax.Array, scale: jax.Array, mean: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Undoes `nest`: `map[codes] * scale + mean`, float32. The shapes broadcast."""
    del dtype
    table = jnp.asarray(dynamic_map()).at[codes]
    values = table.get(
        mode="promise_in_bounds", out_sharding=compat.explicit_sharding(codes)
    )
    return values * scale + mean
