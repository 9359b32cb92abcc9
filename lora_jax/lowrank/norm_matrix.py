"""The matrix `columns * W + scale * A @ B`, for the norms of its columns or rows."""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import numerics
from lora_jax.lowrank import contraction

HIGHEST = lax.Precision.HIGHEST

Axis: TypeAlias = int | tuple[int, ...]
"""The summed axis, counted from the last one; or several, if there are no factors."""


class Matrix(NamedTuple):
    """The matrix `columns * weight + scale * left @ right`, whose norms are computed.

    Attributes:
        weight: `(*batch, in, out)`, or a pair of arrays that are added. With factors, both
            ends may be several axes, which a mesh may split: they are not folded here.
        left: the factor with the summed axis, at the same position as in the weight:
            `(*batch, in, rank)` for the norms of columns, `(*batch, rank, out)` for those
            of rows. Wide. None if there are no factors.
        right: the other factor, `(*batch, rank, kept)`. Wide. None if there are no factors.
        scale: a scalar; None if there are no factors.
        columns: multiplies the weight, `(*batch, kept)`, wide; or None.
    """

    weight: Any
    left: Any = None
    right: Any = None
    scale: Any = None
    columns: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return jax.tree.leaves(self.weight)[0].shape

    def axes(self, axis: Axis) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the weight that are summed over, and those that are folded to `kept`.

        Without factors nothing is folded.
        """
        end = len(self.shape)
        if self.left is None or self.right is None:
            summed = axis if isinstance(axis, tuple) else (axis,)
            return tuple(own % end for own in summed), ()
        start = self.right.ndim - 2
        size = self.left.shape[-2] if axis == -2 else self.right.shape[-1]
        middles = range(start + 1, end)
        middle = next(i for i in middles if math.prod(self.shape[start:i]) == size)
        first, last = tuple(range(start, middle)), tuple(range(middle, end))
        return (first, last) if axis == -2 else (last, first)

    def summed_entries(self, axis: Axis) -> int:
        """The number of entries that a norm sums over."""
        return math.prod(self.shape[own] for own in self.axes(axis)[0])

    def squares(self, axis: Axis) -> jax.Array:
        """`|columns * weight|^2` over `axis`, wide, `(*batch, kept)`."""
        summed, kept = self.axes(axis)
        values = wide(self.weight)
        if self.columns is not None:
            values = values * self.on_weight(self.columns, axis)
        return folded(jnp.sum(jnp.square(values), axis=summed), len(kept))

    def on_weight(self, columns: jax.Array, axis: Axis) -> jax.Array:
        """`(*batch, kept)` with the axes of the weight; the summed ones have size 1."""
        summed, _ = self.axes(axis)
        return columns.reshape([1 if i in summed else n for i, n in enumerate(self.shape)])

    def with_scale_in_right(self) -> "Matrix":
        """The same matrix with the scale multiplied into `right`.

        The branches of a `lax.cond` then have one operand less.
        """
        if self.right is None:
            return self
        right = numerics.multiply(self.right, self.scale)
        return self._replace(right=right, scale=1.0)

    def divided_by(self, unit: jax.Array) -> "Matrix":
        """The matrix with its columns divided by `unit`, which has powers of two."""
        columns = 1 / unit if self.columns is None else self.columns / unit
        right = None if self.right is None else self.right / unit[..., None, :]
        return self._replace(right=right, columns=columns)

    def balanced(self) -> "Matrix":
        """The same matrix, with a power of two moved from `left` to `right`.

        The entries of the new `left` are not far above 1.
        """
        if self.left is None or self.right is None:
            return self
        sizes = jnp.abs(lax.stop_gradient(self.left))
        largest = jnp.max(sizes, axis=(-2, -1), keepdims=True)
        unit = _power_of_two(jnp.maximum(largest, 1))
        return self._replace(left=self.left / unit, right=self.right * unit)

    def product(self, axis: int) -> jax.Array:
        """Contracts the summed axes of `left` and of the weight: `(*batch, rank, kept)`.

        The product has the precision of the factor, float32 or wider. A bfloat16 weight is
        not widened. The factor is split into three bfloat16 parts whose sum it is, and one
        bfloat16 product with float32 accumulation multiplies all three.

        On a mesh the factor may lie whole where the weight is split. Without the barrier
        XLA would then gather the weight. With it, XLA sums the products of the shards.
        """
        weight, factor = self.weight, lax.optimization_barrier(self.left)
        summed, kept = self.axes(axis)
        n_batch, at = factor.ndim - 2, factor.ndim + axis
        sizes = [weight.shape[i] for i in summed]

        def product(x, at):
            x = x.reshape(*x.shape[:at], *sizes, *x.shape[at + 1 :])
            own = tuple(range(at, at + len(sizes)))
            values = contract_axes(x, weight.astype(x.dtype), own, summed, n_batch)
            return folded(values, len(kept))

        if weight.dtype != jnp.bfloat16 or factor.dtype != jnp.float32:
            return product(factor, at)
        parts, rest = [], factor
        for _ in range(3):
            # The compiler may remove a cast to bfloat16 and back, but not this rounding.
            parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
            rest = rest - parts[-1]
        rank_axis = -1 if axis == -2 else -2
        stacked = jnp.concatenate(parts, axis=rank_axis).astype(jnp.bfloat16)
        if axis == -2:
            stacked = jnp.swapaxes(stacked, -1, -2)  # (*batch, 3 * rank, summed)
        thirds = jnp.split(product(stacked, stacked.ndim - 1), 3, axis=-2)
        return functools.reduce(jnp.add, thirds)


def sides(
    a: jax.Array, b: jax.Array, axis: int, *dtypes: Any
) -> tuple[jax.Array, jax.Array]:
    """The `left` and `right` of a `Matrix` with the factors `A` and `B`."""
    dtype = numerics.accumulation_dtype(*dtypes)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    return (a, b) if axis == -2 else (b, jnp.swapaxes(a, -1, -2))


def folded(x: jax.Array, n: int) -> jax.Array:
    """The array with its last `n` axes folded into one."""
    if n < 2:
        return x
    lead = x.ndim - n
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def wide(weight: Any) -> jax.Array:
    """A weight, or the sum of a pair, in at least float32."""
    parts = jax.tree.leaves(weight)
    dtype = numerics.accumulation_dtype(*(part.dtype for part in parts))
    return functools.reduce(jnp.add, [part.astype(dtype) for part in parts])


def contract_axes(
    x: jax.Array,
    y: jax.Array,
    x_axes: tuple[int, ...],
    y_axes: tuple[int, ...],
    n_batch: int,
) -> jax.Array:
    """Contracts `x_axes` of `x` with `y_axes` of `y`; the other axes stay in order."""
    batch = tuple(range(n_batch))
    dimensions = ((x_axes, y_axes), (batch, batch))
    precision = HIGHEST if x.dtype != jnp.bfloat16 else None
    return contraction.dot(x, y, contraction.Dot(dimensions, precision))


def _power_of_two(x: jax.Array) -> jax.Array:
    """A power of two near `x >= 0`, small enough that products of it do not overflow."""
    info = jnp.finfo(x.dtype)
    most = 2.0 ** (info.maxexp * 25 // 32)
    x = lax.clamp(jnp.full_like(x, info.tiny), x, jnp.full_like(x, most))
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=0)
