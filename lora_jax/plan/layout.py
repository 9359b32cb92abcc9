"""A weight of any layout as a matrix, and back.

`to_matrix` gives `(*batch, in, out)`. For arithmetic, `low_rank` does not transpose a
weight whose axes have the order batch, output, input, which would copy it. There the matrix
is `(*batch, out, in)`: its update is `scale * B^T A^T`, and the norms of the weight's
columns are norms of its rows.
"""

import math
from collections.abc import Mapping

import jax

from lora_jax.lowrank.low_rank import LowRank
from lora_jax.plan.adapter_plan import Target

_Sides = tuple[tuple[int, ...], tuple[int, ...]]


def to_matrix(weight: jax.Array, target: Target) -> jax.Array:
    """The weight as `(*batch, in, out)`."""
    return _folded(weight, target, (target.in_axes, target.out_axes))


def from_matrix(matrix: jax.Array, target: Target) -> jax.Array:
    """The weight of which `to_matrix` is the matrix."""
    return _unfolded(matrix, target, (target.in_axes, target.out_axes))


def low_rank(
    weight: jax.Array, adapter: Mapping[str, jax.Array], target: Target
) -> LowRank:
    """The weight and its update as matrices, transposed only where the order requires it.

    Args:
        weight: dense, in its own layout.
        adapter: of the weight. It may be empty.
        target: of the weight.
    """
    sides = _sides(target)
    matrix = _folded(weight, target, sides)
    if sides[0] == target.in_axes:
        return LowRank(matrix, adapter, target.scale)
    turned = {"A": "B", "B": "A"}
    adapter = {
        turned.get(name, name): value.swapaxes(-1, -2) if name in turned else value
        for name, value in adapter.items()
    }
    return LowRank(matrix, adapter, target.scale, axis=-1)


def from_low_rank(matrix: jax.Array, target: Target) -> jax.Array:
    """The weight of which `low_rank` has the matrix."""
    return _unfolded(matrix, target, _sides(target))


def _sides(target: Target) -> _Sides:
    """The axes that the two last axes of the matrix in `low_rank` are made of."""
    straight = target.in_axes, target.out_axes
    turned = target.out_axes, target.in_axes
    orders = [(*target.batch_axes, *sides[0], *sides[1]) for sides in (straight, turned)]
    return turned if list(map(_ascends, orders)) == [False, True] else straight


def _folded(weight: jax.Array, target: Target, sides: _Sides) -> jax.Array:
    order = (*target.batch_axes, *sides[0], *sides[1])
    batch = [target.shape[axis] for axis in target.batch_axes]
    ends = [math.prod(target.shape[axis] for axis in side) for side in sides]
    if not _ascends(order):
        weight = weight.transpose(order)
    return weight.reshape(*batch, *ends)


def _unfolded(matrix: jax.Array, target: Target, sides: _Sides) -> jax.Array:
    order = (*target.batch_axes, *sides[0], *sides[1])
    weight = matrix.reshape([target.shape[axis] for axis in order])
    if _ascends(order):
        return weight
    return weight.transpose([order.index(axis) for axis in range(len(order))])


def _ascends(axes: tuple[int, ...]) -> bool:
    return axes == tuple(sorted(axes))
