"""Weighted sums of pruned arrays.

An array is a factor or a dense update. Each matrix of a stack is pruned alone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def merged(
    arrays: Sequence[jax.Array],
    weights: jax.Array,
    density: float,
    majority: str | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The weighted sum of arrays after pruning, or a mean after an election of signs.

    Args:
        arrays: of one shape.
        weights: a number for each.
        density: the share of the entries that are kept, the largest ones or, with a key,
            random ones, which are divided by it.
        majority: None for the sum. Otherwise the mean of the entries that have the sign of
            the majority: of the sum of the entries, `"total"`, or of their signs,
            `"frequency"`.
        key: for a random choice.
    """
    stack = jnp.stack(arrays)
    if key is not None:
        stack = jnp.where(_drawn(key, density, stack.shape), stack / density, 0)
    elif density < 1:
        stack = jnp.where(_largest(stack, density), stack, 0)
    weighted = stack * weights.reshape(-1, *[1] * (stack.ndim - 1))
    if majority is None:
        return jnp.sum(weighted, 0)
    signs = jnp.sign(stack)
    votes = jnp.sum(stack if majority == "total" else signs, 0)
    agree = signs == jnp.where(votes >= 0, 1, -1)[None]
    kept = jnp.sum(jnp.where(agree, weighted, 0), 0)
    return kept / jnp.maximum(jnp.sum(agree, 0, dtype=stack.dtype), 1)


def _drawn(key: jax.Array, density: float, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, density, shape)


def _largest(stack: jax.Array, density: float) -> jax.Array:
    """A mask of the entries of each matrix with the largest absolute values.

    Of equal entries the first ones are taken. The smallest value that is kept is found bit
    by bit: numbers without a sign are in the order of their bits. To sort is slower.
    """
    flat = jnp.abs(stack).reshape(*stack.shape[:-2], -1)
    kept = max(1, int(density * flat.shape[-1]))
    bits = lax.bitcast_convert_type(flat, f"uint{8 * flat.dtype.itemsize}")
    one = jnp.ones((), bits.dtype)

    def with_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        higher = least | (one << (8 * flat.dtype.itemsize - 2 - i).astype(bits.dtype))
        return jnp.where(_count(bits >= higher) >= kept, higher, least)

    least = jnp.zeros((*flat.shape[:-1], 1), bits.dtype)
    least = lax.fori_loop(0, 8 * flat.dtype.itemsize - 1, with_bit, least)
    equal = bits == least
    place = jnp.cumsum(equal, axis=-1)
    mask = (bits > least) | (equal & (place <= kept - _count(bits > least)))
    return mask.reshape(stack.shape)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=-1, keepdims=True)
