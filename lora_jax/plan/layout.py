"""Converts a weight of any layout to a matrix `(*batch, in, out)`, and back.

If the axes are in the order batch, input, output, this is a reshape. If they are in the
order batch, output, input, transposing the weight would copy it. Then the matrix is
*flipped*, `(*batch, out, in)`: it has the update `W^T + s B^T A^T`, so its factors are
`B^T` and `A^T`, and the norms of columns are the norms of its rows. Other orders are
transposed.
"""

from collections.abc import Mapping
from typing import Literal

import jax

from lora_jax.plan.target import Target


def is_flipped(target: Target) -> bool:
    """Whether the matrix of a weight is `(*batch, out, in)`."""
    straight = (*target.batch_axes, *target.in_axes, *target.out_axes)
    flipped = (*target.batch_axes, *target.out_axes, *target.in_axes)
    return not _ascends(straight) and _ascends(flipped)


def to_matrix(weight: jax.Array, target: Target) -> jax.Array:
    """The weight as `(*batch, in, out)`, or as `(*batch, out, in)` if it is flipped."""
    order = _order(target)
    if not _ascends(order):
        weight = weight.transpose(order)
    *batch, n_in, n_out = target.matrix_shape
    ends = (n_out, n_in) if is_flipped(target) else (n_in, n_out)
    return weight.reshape(*batch, *ends)


def from_matrix(matrix: jax.Array, target: Target) -> jax.Array:
    """The inverse of `to_matrix`."""
    order = _order(target)
    weight = matrix.reshape([target.shape[axis] for axis in order])
    if _ascends(order):
        return weight
    return weight.transpose([order.index(axis) for axis in range(len(order))])


def matrix_adapter(
    adapter: Mapping[str, jax.Array], target: Target
) -> dict[str, jax.Array]:
    """The adapter of the matrix from `to_matrix`."""
    if not is_flipped(target):
        return dict(adapter)
    a, b = (adapter[name].swapaxes(-1, -2) for name in ("A", "B"))
    return {**adapter, "A": b, "B": a}


def norm_axis(target: Target) -> Literal["out", "in"]:
    """The axis of the matrix from `to_matrix` that has the DoRA magnitudes."""
    return "in" if is_flipped(target) else "out"


def _order(target: Target) -> tuple[int, ...]:
    """The axes of the weight in the order of its matrix."""
    if is_flipped(target):
        return (*target.batch_axes, *target.out_axes, *target.in_axes)
    return (*target.batch_axes, *target.in_axes, *target.out_axes)


def _ascends(axes: tuple[int, ...]) -> bool:
    return axes == tuple(sorted(axes))
