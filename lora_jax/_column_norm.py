"""Norms of the columns of `W + scale * A @ B`, without forming it.

For the columns, `|W + s A B|^2 = |W|^2 + 2 s (A^T W) . B + s^2 B . (A^T A) B`, where `.`
multiplies entry by entry and sums over the rank: one product with `W` that is `rank` rows
high. Rows (the norm of each input) are the same with `W^T`, `B^T`, `A^T` for `W`, `A`, `B`.
Below, the *summed* axis of the weight is the one that the squares are summed over, and the
*kept* axis the other; `left` is the factor with the summed axis and `right
(*batch, rank, kept)` the other one, times the scale.

The sum cancels where the update nearly undoes a column; the columns are then formed
directly, block by block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _numerics, _quantized

_HIGHEST = lax.Precision.HIGHEST

# The factored square is trusted above this part of the terms that it is the sum of: there
# it has lost at the most 8 of its 24 bits.
_TRUSTED = 2.0**-8

# Rows or columns of the weight that `_direct` forms at a time, at the most.
_BLOCK = 128


def norm(squared: jax.Array) -> jax.Array:
    """Square root with a zero gradient, not an infinite one, at zero."""
    zero = squared == 0  # not `> 0`: a NaN has to come out as one
    root = jnp.sqrt(jnp.where(zero, jnp.ones_like(squared), squared))
    return jnp.where(zero, jnp.zeros_like(root), root)


def factor(magnitude: jax.Array, column_norm: jax.Array) -> jax.Array:
    """`m / n`, DoRA's factor, wide; 1, with a zero gradient, where `n` is zero."""
    dtype = _numerics.accumulation_dtype(magnitude.dtype, column_norm.dtype)
    magnitude, norm = jnp.asarray(magnitude, dtype), jnp.asarray(column_norm, dtype)
    one = jnp.ones_like(norm)
    return jnp.where(norm == 0, one, magnitude / jnp.where(norm == 0, one, norm))


def weight_norm_squared(weight: jax.Array, axis: int) -> jax.Array:
    """`|W|^2` over `axis`, wide. The 16-bit weight is widened as it is read."""
    wide = weight.astype(_numerics.accumulation_dtype(weight.dtype))
    return jnp.sum(jnp.square(wide), axis=axis)


def adapted_norm(
    weight: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: float | jax.Array,
    base: jax.Array | None,
    axis: int,
) -> jax.Array:
    """`|W + scale * A @ B|` over `axis` (-2 or -1) of the weight.

    Args:
        weight: `(*batch, in, out)`.
        a: `(*batch, in, rank)`.
        b: `(*batch, rank, out)`.
        scale: scalar.
        base: `|W|^2` over `axis`, `(*batch, kept)`, a constant; or None to form it.
        axis: the summed axis, -2 for the norms of columns, -1 for those of rows.

    Returns:
        `(*batch, kept)`, wide.
    """
    dtype = _numerics.accumulation_dtype(weight.dtype)
    if base is None:
        base = weight_norm_squared(weight, axis)
    else:
        base = lax.stop_gradient(jnp.asarray(base, dtype))
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    left, right = (a, b) if axis == -2 else (b, jnp.swapaxes(a, -1, -2))
    right = _numerics.multiply(right, scale)
    gram = _product(left, left, axis, axis)  # (*batch, rank, rank)
    cross = jnp.sum(_product_with_weight(left, weight, axis) * right, axis=-2)
    own = jnp.sum(jnp.matmul(gram, right, precision=_HIGHEST) * right, axis=-2)
    squared = base + 2 * cross + own
    # What `own` would be without cancellation within A @ B: |A|^2 / rank * |B_j|^2.
    energy = jnp.sum(jnp.square(left), axis=(-2, -1)) / right.shape[-2]
    terms = base + own + energy[..., None] * jnp.sum(jnp.square(right), axis=-2)
    correction = _correction(squared, terms, weight, left, right, axis=axis)
    return norm(jnp.maximum(squared + correction, 0))


def frozen_norm(weight, a, b, scale, base, axis) -> jax.Array:
    """`adapted_norm` with a gradient of the factors (and of the scale) only.

    A quantized weight is formed again in the backward pass.
    """
    keep = _numerics.keep_arguments(_frozen_norm, 5, frozen=weight)
    return keep(weight, a, b, scale, base, axis)


def _frozen_norm(weight, a, b, scale, base, axis) -> jax.Array:
    weight = lax.stop_gradient(_quantized.as_dense(weight))
    return adapted_norm(weight, a, b, scale, base, axis)


@functools.partial(jax.jit, static_argnames="axis", inline=True)  # one compilation
def _correction(
    squared: jax.Array,
    terms: jax.Array,
    weight: jax.Array,
    left: jax.Array,
    right: jax.Array,
    axis: int,
) -> jax.Array:
    """What the factored squares lack where they cancel; a constant to differentiation.

    The gradient of the factored form cancels less than its value and is kept.
    """
    squared, terms, weight, left, right = lax.stop_gradient(
        (squared, terms, weight, left, right)
    )
    return lax.cond(
        jnp.any(squared < _TRUSTED * terms),
        lambda: _direct(squared, weight, left, right, axis) - squared,
        lambda: jnp.zeros_like(squared),
    )


def _direct(
    like: jax.Array, weight: jax.Array, left: jax.Array, right: jax.Array, axis: int
) -> jax.Array:
    """`|W + scale * A @ B|^2` over `axis`, from a block along that axis at a time.

    A block is every `count`-th row (or column), not a run of them: cutting it out of a
    weight that is sharded along that axis moves nothing between devices. The size of a
    block divides the axis, so an axis of prime length takes as many steps as it is long.
    """
    n = weight.shape[axis]
    size = max(d for d in range(1, _BLOCK + 1) if n % d == 0)
    count = n // size

    def cut(x, i):  # (..., n, ...) -> (..., size, ...)
        position = x.ndim + axis
        blocks = x.reshape(*x.shape[:position], size, count, *x.shape[position + 1 :])
        return lax.dynamic_index_in_dim(blocks, i, position + 1, keepdims=False)

    def add_block(i, total):
        a, b = cut(left, i), right
        if axis == -1:
            a, b = jnp.swapaxes(b, -1, -2), a
        adapted = cut(weight, i).astype(total.dtype)
        adapted = adapted + jnp.matmul(a, b, precision=_HIGHEST)
        return total + jnp.sum(jnp.square(adapted), axis=axis)

    # Not jnp.zeros: on a mesh the sum has to start sharded as the result `like` is.
    return lax.fori_loop(0, count, add_block, jnp.zeros_like(like))


def _product_with_weight(factor: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """Contracts `axis` of the factor with that of the weight: `(*batch, rank, kept)`.

    At the precision of the factor, float32 or wider. A bfloat16 weight is not widened: the
    factor is split into three bfloat16 parts that add up to it, and one product in bfloat16
    with float32 sums does them all.
    """
    if weight.dtype != jnp.bfloat16 or factor.dtype != jnp.float32:
        return _product(factor, weight.astype(factor.dtype), axis, axis)
    parts, rest = [], factor
    for _ in range(3):
        # A cast there and back may be optimized away; this rounding may not.
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    rank_axis = -1 if axis == -2 else -2
    stacked = jnp.concatenate(parts, axis=rank_axis).astype(jnp.bfloat16)
    if axis == -2:
        stacked = jnp.swapaxes(stacked, -1, -2)  # (*batch, 3 * rank, summed)
    product = _numerics.contract(stacked, weight, weight.ndim + axis)
    return functools.reduce(jnp.add, jnp.split(product, 3, axis=-2))


def _product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Contracts `x_axis` of `x` with `y_axis` of `y`; the other axes stay in order."""
    batch = tuple(range(x.ndim - 2))
    dimensions = (((x.ndim + x_axis,), (y.ndim + y_axis,)), (batch, batch))
    return lax.dot_general(x, y, dimensions, precision=_HIGHEST)
