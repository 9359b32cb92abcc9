"""Arithmetic with the same bits in every compiled program.

Formats that other programs share define every rounding. XLA does not keep to this: it
keeps float32 where 16 bits were asked for, multiplies by the reciprocal of a broadcast
divisor, and sums in an order that depends on the shape. The functions here prevent all
three. (XLA may still fuse a product and a sum.) Everything runs in float32. Rounding the
float32 result of one operation on 16-bit operands gives the same value as rounding the
exact result.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

TINY = float(jnp.finfo(jnp.float32).tiny)
"""The smallest normal float32. XLA may or may not treat smaller values as zero."""

_HUGE = 2.0**100  # from 2**126 on, a reciprocal is not a normal number
_DOWN = 2.0**-64
_FLOAT16_TINY = 2.0**-14
_FLOAT16_STEP = 2.0**-24  # the distance of float16 numbers below _FLOAT16_TINY


def round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rounds float32 values to the values of a dtype of at most 32 bits."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    if dtype == jnp.float16:
        # reduce_precision rounds subnormal numbers to zero.
        steps = jnp.round(x * (1 / _FLOAT16_STEP)) * _FLOAT16_STEP
        rounded = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
        return jnp.where(jnp.abs(x) < _FLOAT16_TINY, steps, rounded)
    return x


def divide(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """`x / divisor`, rounded once; `0 / 0` is 0.

    Args:
        x: `(..., n)`.
        divisor: of the same ndim; its shape broadcasts to that of `x`.
    """
    # The divisor has the full shape, so XLA does not multiply by one shared inverse.
    zero = (x == 0) & ~jnp.isnan(divisor)
    return x / jnp.where(zero, jnp.ones_like(x), jnp.broadcast_to(divisor, x.shape))


def multiply_by_inverse(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """`x * (1 / divisor)`, rounded twice, for any finite divisor; 0 if the divisor is 0.

    Args:
        x: `(..., n)`.
        divisor: `(..., 1)`, not negative.
    """
    down = jnp.where(divisor > _HUGE, _DOWN, 1.0).astype(x.dtype)
    inverse = jnp.where(divisor < TINY, 0.0, 1.0 / (divisor * down)).astype(x.dtype)
    return (x * down) * inverse


def largest(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """The largest absolute value along an axis, or along several.

    Zero if the largest value is below the normal numbers. NaN if a value is not finite, so
    that every code becomes NaN.
    """
    peak = jnp.max(jnp.abs(x), axis=axis)
    peak = jnp.where(peak < TINY, jnp.zeros_like(peak), peak)
    # `peak` does not show it: in large arrays XLA on the CPU may skip a NaN.
    finite = jnp.all(jnp.isfinite(x), axis=axis)
    return jnp.where(finite, peak, jnp.full_like(peak, jnp.nan))


def mean(x: jax.Array) -> jax.Array:
    """`(..., n)` -> `(...)`, the mean of values that are not negative, along the last axis.

    The sum adds one half of the values to the other, again and again. So the order is the
    same for one row and for a stack, and the error is that of `log2(n)` roundings. The sum
    does not overflow.
    """
    n = x.shape[-1]
    down = jnp.where(jnp.max(x, axis=-1) > _HUGE, _DOWN, 1.0).astype(x.dtype)
    levels = (n - 1).bit_length()
    total = pad_last(x * down[..., None], 2**levels)
    for level in reversed(range(levels)):
        total = total[..., : 2**level] + total[..., 2**level :]
    return total[..., 0] / n / down


def pad_last(x: jax.Array, width: int) -> jax.Array:
    """`x` with zeros at the end of its last axis, up to a width."""
    return pad_axis(x, -1, width)


def pad_axis(x: jax.Array, axis: int, width: int) -> jax.Array:
    """`x` with zeros at the end of an axis, up to a width."""
    missing = width - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def in_rows(x: jax.Array, width: int) -> jax.Array:
    """`(..., n)` -> `(..., rows, width)`, with zeros at the end of the last row."""
    rows = math.ceil(x.shape[-1] / width)
    return pad_last(x, rows * width).reshape(*x.shape[:-1], rows, width)


def spread(x: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """`(*batch, n)` -> `shape`, `(*batch, *rows)`: repeats each entry `width` times.

    The repetitions of the last entry are cut off to fit.
    """
    batch, rows = x.shape[:-1], shape[x.ndim - 1 :]
    if len(rows) == 1:
        runs = jnp.broadcast_to(x[..., None], (*x.shape, width)).reshape(*batch, -1)
        return runs[..., : rows[0]]
    # A reshape to several axes could not be sharded along any of them.
    position = jnp.zeros(rows, jnp.int32)
    for axis in range(len(rows)):
        stride = math.prod(rows[axis + 1 :])
        position += lax.broadcasted_iota(jnp.int32, rows, axis) * stride
    return x.at[..., position // width].get(mode="promise_in_bounds")


def thresholds(table: np.ndarray, dtype: DTypeLike = np.float32) -> np.ndarray:
    """The values at which the nearest entry of an ascending table changes.

    `x` is nearest to entry `sum(x > thresholds)`. Halfway between two entries, the lower
    one is chosen, as by `argmin(|x - table|)`.

    Args:
        table: `(n,)`, with values of `dtype`.
        dtype: of the values that are compared, at most 32 bits.

    Returns:
        `(n - 1,)`, float32: the largest value of `dtype` at or below each midpoint.
    """
    wide = table.astype(np.float64)
    midpoints = (wide[:-1] + wide[1:]) / 2
    rounded = midpoints.astype(jnp.dtype(dtype))
    below = np.nextafter(rounded, np.full_like(rounded, -np.inf))
    chosen = np.where(rounded.astype(np.float64) > midpoints, below, rounded)
    return chosen.astype(np.float32)
