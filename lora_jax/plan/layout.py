"""A weight of any layout as a matrix `(*batch, in, out)`, and back.

Where its axes lie in the order batch, input, output, that is a reshape. Where they lie in
the order batch, output, input, the weight is not turned round, which would copy it, but
seen as the *flipped* matrix `(*batch, out, in)`: `W^T + s B^T A^T` is the update of one
whose factors are `B^T` and `A^T`, and the norms of columns are norms of its rows. Other
orders are transposed.
"""

from collections.abc import Mapping
from typing import Literal

import jax

from lora_jax.plan.adapter_plan import Target


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
    """The weight of which `to_matrix` made a matrix."""
    order = _order(target)
    weight = matrix.reshape([target.shape[axis] for axis in order])
    if _ascends(order):
        return weight
    return weight.transpose([order.index(axis) for axis in range(len(order))])


def matrix_adapter(
    adapter: Mapping[str, jax.Array], target: Target
) -> dict[str, jax.Array]:
    """The adapter that fits `to_matrix` of the weight."""
    if not is_flipped(target):
        return dict(adapter)
    a, b = (adapter[name].swapaxes(-1, -2) for name in ("A", "B"))
    return {**adapter, "A": b, "B": a}


def norm_axis(target: Target) -> Literal["out", "in"]:
    """Which axis of `to_matrix` of the weight a DoRA magnitude stands for."""
    return "in" if is_flipped(target) else "out"


def _order(target: Target) -> tuple[int, ...]:
    """The axes of the weight in the order that its matrix has them."""
    if is_flipped(target):
        return (*target.batch_axes, *target.out_axes, *target.in_axes)
    return (*target.batch_axes, *target.in_axes, *target.out_axes)


def _ascends(axes: tuple[int, ...]) -> bool:
    return axes == tuple(sorted(axes))
