"""A weight with its low-rank update: the value that LoRA and DoRA compute with."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lora_jax._core import numerics, quantized
from lora_jax.lowrank import contraction, norm_matrix, weight_norms
from lora_jax.lowrank.norm_matrix import Matrix

# Relative changes of a norm below this are the rounding of the norm itself.
_NORM_ULPS = 8


def delta(
    adapter: Mapping[str, jax.Array], scale: float | jax.Array, *dtypes: DTypeLike
) -> jax.Array:
    """`scale * A @ B`, in the widest of `dtypes` and the factors', at least float32."""
    a, b = adapter["A"], adapter["B"]
    wide = numerics.accumulation_dtype(*dtypes, a.dtype, b.dtype)
    a, b = jnp.asarray(a, wide), jnp.asarray(b, wide)
    return numerics.multiply(jnp.matmul(a, b, precision=lax.Precision.HIGHEST), scale)


class Axes(NamedTuple):
    """The axes of a weight in its own layout, in the order in which factors fold them."""

    batch: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The value `V = W + scale * A @ B`, or DoRA's `(m / n) * V` with `n` the norms of `V`.

    The methods check nothing, and compute in the widest dtype of their operands, at least
    float32.

    Attributes:
        weight: `W (*batch, in, out)`, dense or quantized; or in its own layout, if `axes`
            are given.
        adapter: `A`, `B`, and `m` for DoRA. Without `A` and `B` the update is zero.
        scale: a number or a scalar array.
        axis: the axis of the weight that norms are summed over. -2 gives one norm for each
            output, -1 one for each input.
        axes: of a weight in its own layout, whose results have this layout too. The
            factors are unfolded, and the weight is not folded: where a mesh splits an axis
            that is not the first one of a fold, the fold would gather the weight.
    """

    weight: Any
    adapter: Mapping[str, jax.Array]
    scale: float | jax.Array
    axis: int = -2
    axes: Axes | None = None

    def merge(self) -> jax.Array:
        """The dense weight with the update, rounded once to the dtype of the weight."""
        weight, update = self._dense_and_update()
        if "m" not in self.adapter:
            return numerics.sum_and_round(weight, [update])
        norm = weight_norms.weight_norm(weight, self._summed, update)
        return numerics.sum_and_round(weight, [update], [self._factor(norm)])

    def unmerge(self, norms: jax.Array | None = None) -> jax.Array:
        """The dense weight from before the update was merged, rounded once.

        Args:
            norms: for DoRA, the `norms` from before the merge.
        """
        weight, update = self._dense_and_update()
        if norms is None:
            return numerics.sum_and_round(weight, [-update])
        factor = self._factor(self._unfolded(norms)).astype(update.dtype)
        return (weight.astype(update.dtype) / factor - update).astype(weight.dtype)

    def change(self) -> jax.Array:
        """What a merge adds to the weight, computed without cancellation."""
        weight, update = self._dense_and_update()
        if "m" not in self.adapter:
            return update
        norm = weight_norms.weight_norm(weight, self._summed, update)
        change = self._unfolded(self.adapter["m"]).astype(update.dtype) - norm
        tolerance = _NORM_ULPS * float(jnp.finfo(update.dtype).eps)
        real = (norm != 0) & (jnp.abs(change) > tolerance * norm)
        change = jnp.where(real, change / jnp.where(norm == 0, 1, norm), 0)  # m / n - 1
        adapted = weight.astype(update.dtype) + update
        return update + jnp.expand_dims(change, self._summed) * adapted

    def norms(self, *, form_update: bool = False) -> jax.Array:
        """The norms `n`, `(*batch, out)` or `(*batch, in)`. Differentiable.

        A quantized weight has no gradient. With `form_update` the update is computed, and
        no axes of the weight are folded.
        """
        if "A" not in self.adapter:
            dense = jnp.asarray(quantized.as_dense(self.weight))
            return self._folded(weight_norms.weight_norm(dense, self._summed))
        if form_update:
            weight, update = self._dense_and_update()
            return self._folded(weight_norms.weight_norm(weight, self._summed, update))
        if quantized.is_quantized(self.weight):
            return self.frozen_norms()
        matrix, axis = self.matrix(fold=True)
        return weight_norms.norm(matrix, None, axis)

    def frozen_norms(self, squares: jax.Array | None = None) -> jax.Array:
        """The norms `n`, without a gradient of the weight.

        Args:
            squares: the squared norms of the weight alone, to save their computation.
        """
        # A quantized weight is dequantized again in the backward pass.
        keep = contraction.keep_arguments(_frozen_norms, 5, frozen=self.weight)
        a, b = self.adapter["A"], self.adapter["B"]
        return keep(self.weight, a, b, self.scale, squares, (self.axis, self.axes))

    def matrix(self, *, fold: bool = False) -> tuple[Matrix, int]:
        """The value as an argument of `weight_norms`, and the axis to sum over.

        The weight must be dense. With `axes` it is transposed, unless the batch axes come
        first and then inputs and outputs, in this order or the other one. The axes of
        inputs, and those of outputs, are folded if `fold`.
        """
        a, b = self.adapter["A"], self.adapter["B"]
        weight, axis = self.weight, self.axis
        if self.axes is not None:
            batch, ins, outs = self.axes
            order = (*batch, *ins, *outs)
            if sorted(order) == [*batch, *outs, *ins]:
                order, axis = (*batch, *outs, *ins), -3 - axis
                a, b = jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2)
            if list(order) != sorted(order):
                weight = weight.transpose(order)
            if fold:
                ends = (a.shape[-2], b.shape[-1])
                weight = weight.reshape(*weight.shape[: len(batch)], *ends)
        sides = norm_matrix.sides(a, b, axis, weight.dtype)
        return Matrix(weight, *sides, self.scale), axis

    def _dense_and_update(self) -> tuple[jax.Array, jax.Array]:
        weight = jnp.asarray(quantized.as_dense(self.weight))
        if self.axes is None:
            return weight, delta(self.adapter, self.scale, weight.dtype)
        (batch, ins, outs), rank = self.axes, weight.ndim
        sizes = [*weight.shape, self.adapter["A"].shape[-1]]
        names = {"A": (*batch, *ins, rank), "B": (*batch, rank, *outs)}
        wide = numerics.accumulation_dtype(
            weight.dtype, *(self.adapter[name].dtype for name in names)
        )
        a, b = (
            jnp.asarray(self.adapter[name], wide).reshape([sizes[axis] for axis in own])
            for name, own in names.items()
        )
        every: Any = range(weight.ndim)
        update = jnp.einsum(
            a, names["A"], b, names["B"], every, precision=lax.Precision.HIGHEST
        )
        return weight, numerics.multiply(update, self.scale)

    @property
    def _summed(self) -> int | tuple[int, ...]:
        """The axes of the weight that norms are summed over, as negative numbers."""
        if self.axes is None:
            return self.axis
        summed = self.axes.ins if self.axis == -2 else self.axes.outs
        return tuple(axis - len(self.weight.shape) for axis in summed)

    @property
    def _kept(self) -> tuple[int, ...]:
        """The axes of a weight in its own layout that norms have, as they are folded."""
        batch, ins, outs = self.axes or Axes((), (), ())
        return (*batch, *(outs if self.axis == -2 else ins))

    def _unfolded(self, vector: jax.Array) -> jax.Array:
        """`(*batch, kept)` with the axes of the weight that norms have, in its order."""
        if self.axes is None:
            return vector
        sizes = [self.weight.shape[axis] for axis in self._kept]
        return jnp.asarray(vector).reshape(sizes).transpose(np.argsort(self._kept))

    def _folded(self, norms: jax.Array) -> jax.Array:
        """Undoes `_unfolded`."""
        if self.axes is None:
            return norms
        order = np.argsort(np.argsort(self._kept))
        batch = [self.weight.shape[axis] for axis in self.axes.batch]
        return norms.transpose(order).reshape(*batch, -1)

    def _factor(self, norms: jax.Array) -> jax.Array:
        """`m / n`, with the axes that the norms are summed over."""
        factor = weight_norms.factor(self._unfolded(self.adapter["m"]), norms)
        return jnp.expand_dims(factor, self._summed)


def _frozen_norms(weight, a, b, scale, squares, static) -> jax.Array:
    weight = lax.stop_gradient(quantized.as_dense(weight))
    matrix, axis = LowRank(weight, {"A": a, "B": b}, scale, *static).matrix(fold=True)
    return weight_norms.norm(matrix, squares, axis)
