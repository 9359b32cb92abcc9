"""A weight of any layout as a `(*batch, in, out)` matrix and back, and with its update."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax._core.quantized import QuantizedTensor, is_quantized
from lora_jax.lowrank.low_rank import Axes, LowRank
from lora_jax.plan import parts
from lora_jax.plan.target import Target


def to_matrix(weight: Any, target: Target) -> Any:
    """The weight as `(*batch, in, out)`. A quantized weight stays quantized."""
    if is_quantized(weight):
        return _AsMatrix(weight, target)
    order = (*target.batch_axes, *target.in_axes, *target.out_axes)
    weight = weight if _ascends(order) else weight.transpose(order)
    return weight.reshape(target.matrix_shape)


def from_matrix(matrix: Any, target: Target) -> Any:
    """Undoes `to_matrix`."""
    if isinstance(matrix, _AsMatrix):
        return matrix.weight
    order = (*target.batch_axes, *target.in_axes, *target.out_axes)
    weight = matrix.reshape([target.shape[axis] for axis in order])
    if _ascends(order):
        return weight
    return weight.transpose([order.index(axis) for axis in range(len(order))])


def low_rank(
    weight: jax.Array, adapter: Mapping[str, jax.Array], target: Target
) -> LowRank:
    """A dense or quantized weight and its update, in the weight's own layout.

    The adapter may be empty.
    """
    axes = Axes(target.batch_axes, target.in_axes, target.out_axes)
    n = len(target.batch_axes)
    is_matrix = axes == (tuple(range(n)), (n,), (n + 1,))
    return LowRank(weight, adapter, target.scale, axes=None if is_matrix else axes)


def unfolded(
    name: str, array: Any, target: Target, fill: float = 0.0
) -> tuple[jax.Array, tuple[int, ...]]:
    """An array of an adapter with axes of the whole weight, `fill` outside of the part.

    Returns:
        The array, and for each of its axes the axis of the weight; -1 for the rank.
    """
    batch, ins, outs = target.batch_axes, target.in_axes, target.out_axes
    axes = {"A": (*batch, *ins, -1), "B": (*batch, -1, *outs), "m": (*batch, *outs)}[name]
    entries = parts.entries(target.part, target.shape)
    sizes = {-1: target.rank, **dict(enumerate(map(parts.count, entries)))}
    array = jnp.asarray(array).reshape([sizes[axis] for axis in axes])
    return parts.spread(array, axes, entries, target.shape, fill), axes


def of_whole(
    adapter: Mapping[str, jax.Array], target: Target, magnitude: float = 1.0
) -> tuple[dict[str, jax.Array], Target]:
    """The adapter and target of the whole weight whose update is that of a part of it.

    Factors are padded with zeros, and vectors of the outputs with `magnitude`.
    """
    whole = dataclasses.replace(target, part="", use="", method="dora")
    padded = {}
    for name, array in adapter.items():
        array, _ = unfolded(name, array, target, magnitude if name == "m" else 0.0)
        padded[name] = array.reshape(whole.adapter_shapes[name])
    return padded, dataclasses.replace(whole, method=target.method)


def _ascends(axes: tuple[int, ...]) -> bool:
    return axes == tuple(sorted(axes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _AsMatrix(QuantizedTensor):
    """A quantized weight of any layout, seen as its `(*batch, in, out)` matrix."""

    weight: QuantizedTensor
    target: Target = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.matrix_shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.weight.dtype

    @property
    def batch_ndim(self) -> int:
        return 0  # not a stack: the axes of the weight may be in another order

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        return to_matrix(self.weight.dequantize(dtype), self.target)

    def quantize_like(self, weight: jax.Array) -> "_AsMatrix":
        like = self.weight.quantize_like(from_matrix(weight, self.target))
        return _AsMatrix(like, self.target)

    def check(self) -> None:
        self.weight.check()
