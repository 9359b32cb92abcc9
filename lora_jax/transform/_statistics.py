"""Sums over the inputs of weights, as gradients of their first factors.

In the product `u = x @ A`, followed by `u @ B` with `B = 0`, the cotangent of `u` is
replaced. So the gradient of `A` is a sum over the rows of `x (rows, in)` that reaches `A`
through scans, shared weights and meshes as any gradient does:

- `"gram"`: `x^T x A`, with `u` as the cotangent.
- `"moments"`: a column with the sum of `x`, one with that of its squares, and one with the
  number of rows, in this order. Terms are joined along the rank axis, so every third column
  is of one kind.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Statistic: TypeAlias = Literal["", "gram", "moments"]
"""The sum; empty for the usual gradient."""

MOMENTS = 3
"""The number of columns of `"moments"`."""


def observed(
    multiply: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    statistic: Statistic,
    rank_axis: int,
) -> jax.Array:
    """`multiply(x)`, the product with a first factor, with a statistic as its gradient.

    The activation `x` gets no gradient. `rank_axis` is that of the product.

    Raises:
        TypeError: if the activation is complex.
    """
    if jnp.iscomplexobj(x):
        raise TypeError(
            "the inputs of an adapted weight are complex, and only real ones have the "
            "principal components that EVA takes: leave the weight out of the plan."
        )
    x = lax.stop_gradient(x)
    if statistic == "gram":
        return _echoed(multiply(x))
    powers = x, x * x, jnp.ones_like(x)
    products: list[Any] = [
        _counted(multiply(own), kind, rank_axis) for kind, own in enumerate(powers)
    ]
    return functools.reduce(jnp.add, products)


@jax.custom_vjp
def _echoed(u: jax.Array) -> jax.Array:
    """`u`, with itself as its cotangent."""
    return u


_echoed.defvjp(lambda u: (u, u), lambda u, _: (u,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _counted(u: jax.Array, kind: int, rank_axis: int) -> jax.Array:
    """`u`, with ones in each third column, from `kind` on, as its cotangent."""
    del kind, rank_axis
    return u


def _counted_backward(
    kind: int, rank_axis: int, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    columns = lax.broadcasted_iota("int32", cotangent.shape, rank_axis % cotangent.ndim)
    return (jnp.where(columns % MOMENTS == kind, 1, jnp.zeros_like(cotangent)),)


_counted.defvjp(lambda u, kind, rank_axis: (u, None), _counted_backward)
