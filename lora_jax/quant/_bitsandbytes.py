"""NF4 as bitsandbytes has it: its codes, and scales in 8 bits of a dynamic map.

Everything is computed in float32, whatever the weight is.
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
    """What the 16 codes stand for, float32, in a weight of any dtype."""
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

    Zero, one, and for each decade from 1e-7 to 1 twice as many values as for the one
    below, evenly spaced, with either sign.

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
    """`n + 1` even steps from 0.1 to 1, with the bits that `torch.linspace` gives them.

    The lower half is counted from below, the upper one from above, each rounded once.
    """
    first, last = np.float32(0.1), np.float32(1.0)
    step, i = float((last - first) / np.float32(n)), np.arange(n + 1)
    below, above = float(first) + step * i, float(last) - step * (n - i)
    return np.where(i < (n + 1) // 2, below, above).astype(np.float32)


def nest(
    absmax: jax.Array, group: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns the scales of blocks into 8 bits.

    Args:
        absmax: `(..., n_blocks)`, float32.
        group: how many blocks share a scale; the last group may have fewer.
        dtype: of the weight; makes no difference.

    Returns:
        `(..., n_blocks)`, uint8; the scales of the groups `(..., n_groups)` and the mean
        `(...)`, float32. The codes are the nearest in the dynamic map to
        `(absmax - mean) / scale`.
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
    """Undoes `nest`: `map[codes] * scale + mean`, float32, all of shapes that broadcast."""
    del dtype
    table = jnp.asarray(dynamic_map()).at[codes]
    values = table.get(
        mode="promise_in_bounds", out_sharding=compat.explicit_sharding(codes)
    )
    return values * scale + mean
