"""Dtypes, scales, sums and dropout that the methods share.

A dtype is *wide* if it is at least float32.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype that `dtypes` promote to, also if JAX is set to strict promotion.

    If JAX has no float64, float64 counts as float32.
    """
    dtypes = tuple(map(jax.dtypes.canonicalize_dtype, dtypes))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype of sums: float32, or a wider dtype among `dtypes`."""
    return promote(jnp.float32, *dtypes)


def factor_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of products with the factors, if products with the weight use `dtype`.

    float32 for float16: `x @ A` may overflow in float16 even if `x @ (A @ B)` does not.
    """
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def range_unit(dtype: DTypeLike, *arrays: jax.Array) -> jax.Array | None:
    """A power of two to divide a product by, so that it is in the range of `dtype`.

    It is 1 if the product is in range, and None if `dtype` has the range of float32.
    """
    if jnp.dtype(dtype) != jnp.float16:
        return None
    sizes = [jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0.0) for x in arrays]
    over = lax.stop_gradient(functools.reduce(jnp.multiply, sizes)) / 2.0**15
    unit = lax.reduce_precision(2 * over, exponent_bits=8, mantissa_bits=0)
    return jnp.where(over > 1, unit, jnp.ones_like(unit))


def adapter_scale(
    alpha: float | jax.Array, rank: int, rank_stabilized: bool, dtype: DTypeLike
) -> float | jax.Array:
    """The scale of `A @ B`: `alpha / rank`, or `alpha / sqrt(rank)`.

    If `alpha` is a number, so is the scale: a constant of the compiled program. If `alpha`
    is an array, traced or not, the scale is a wide array, at least as wide as `dtype`.
    """
    divisor = math.sqrt(rank) if rank_stabilized else float(rank)
    if isinstance(alpha, jax.Array):
        wide = accumulation_dtype(dtype)
        if jnp.issubdtype(alpha.dtype, jnp.floating):
            wide = promote(wide, alpha.dtype)
        return alpha.astype(wide) / divisor
    return float(alpha) / divisor


def multiply(x: jax.Array, scale: float | jax.Array) -> jax.Array:
    """`x` times a scalar of any dtype, in the dtype of `x`."""
    return x * (scale.astype(x.dtype) if isinstance(scale, jax.Array) else scale)


def sum_and_round(
    base: jax.Array, updates: Iterable[jax.Array], columns: Iterable[jax.Array] = ()
) -> jax.Array:
    """`columns * (base + updates)`, rounded once to the dtype of `base`.

    It is computed in the widest dtype of base and updates, at least float32.
    """
    base, updates = jnp.asarray(base), list(updates)
    wide = accumulation_dtype(base.dtype, *(update.dtype for update in updates))
    out = base.astype(wide)
    for update in updates:
        out = out + update.astype(wide)
    for column in columns:
        out = out * column.astype(wide)
    return out.astype(base.dtype)


@jax.jit
def are_finite(arrays: Any) -> jax.Array:
    """Whether no entry of a tree of arrays is infinite or NaN."""
    finite = [jnp.isfinite(array).all() for array in jax.tree.leaves(arrays)]
    return functools.reduce(jnp.logical_and, finite)


def as_row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`(*batch, width)` -> `(*batch, 1, ..., width)`, with the ndim and dtype of `like`."""
    vector = jnp.asarray(vector).astype(like.dtype)
    missing = like.ndim - vector.ndim
    return lax.expand_dims(vector, range(vector.ndim - 1, vector.ndim - 1 + missing))


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes each entry with probability `rate`; does **not** divide by `1 - rate`.

    Call it inside `jax.checkpoint`. Then the backward pass draws the mask again, and
    neither the mask nor the masked `x` is kept.
    """
    zeros = jnp.zeros_like(x)
    # The second operand is false, and sharded as x is on a mesh with explicit axes.
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape) | (zeros != 0)
    return jnp.where(keep, x, zeros)
