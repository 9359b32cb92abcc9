"""Weighted sums of pruned arrays, and the names of the methods that combine updates.

An array is a factor or a dense update. Each matrix of a stack is pruned alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax

_OnFactors = Literal["linear", "magnitude", "dare_linear", "dare_ties", "ties"]
_OnUpdates = Literal["magnitude_svd", "dare_linear_svd", "dare_ties_svd", "ties_svd"]
_OnSvds = Literal["svd", "knots", "tsv"]
MethodName: TypeAlias = Literal["exact"] | _OnFactors | _OnUpdates | _OnSvds

TRUNCATE: tuple[str, ...] = (*get_args(_OnSvds), *get_args(_OnUpdates))
METHODS = ("exact", *get_args(_OnFactors), *TRUNCATE)
ELECT = (*(name for name in METHODS if "ties" in name), "knots")
NEED_KEY = tuple(name for name in METHODS if "dare" in name)
NEED_DENSITY = (*NEED_KEY, *ELECT, "magnitude", "magnitude_svd")
MAJORITIES = ("total", "frequency")


class Method(NamedTuple):
    """How updates are combined."""

    name: str
    """One of `METHODS`."""
    density: float = 1.0
    """The share of the entries that are kept."""
    majority: str = "total"
    """How a sign is elected: by the sum of the entries, or by their signs."""


def merged(
    method: Method, arrays: Sequence[jax.Array], weights: jax.Array, key: Any
) -> jax.Array:
    """The weighted sum of arrays after pruning, with an election of signs for ties."""
    stack = jnp.stack(arrays)
    if method.name in NEED_KEY:
        keep = _drawn(key, method.density, stack.shape)
        stack = jnp.where(keep, stack / method.density, 0)
    elif method.density < 1:
        stack = jnp.where(_largest(stack, method.density), stack, 0)
    weighted = stack * weights.reshape(-1, *[1] * (stack.ndim - 1))
    if method.name not in ELECT:
        return jnp.sum(weighted, 0)
    signs = jnp.sign(stack)
    votes = jnp.sum(stack if method.majority == "total" else signs, 0)
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
