"""Scales per output of a weight `(*batch, *inputs, out)`, or per block of its inputs."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.quant import _arithmetic


class Blocks(NamedTuple):
    """A weight in blocks of inputs that share a scale.

    Attributes:
        values: `(*batch, *blocks, *members, out)`, float32.
        members: the axes along a block, as negative numbers.
    """

    values: jax.Array
    members: tuple[int, ...]


def as_blocks(weight: jax.Array, batch_axes: int, block: int | None) -> Blocks:
    """The blocks of a weight `(*batch, *inputs, out)`.

    Blocks count along all input axes, row by row, and zeros fill the last one. If `block`
    is None, or at least the number of inputs, there is one block. The input axes are folded
    into one only if blocks cross from one row to the next: a mesh may split any of them,
    and a fold would gather them.
    """
    wide, axes = weight.astype(jnp.float32), weight.shape
    batch, inputs, n_out = axes[:batch_axes], axes[batch_axes:-1], axes[-1]
    if block is None or block >= math.prod(inputs):
        return Blocks(wide, tuple(range(-1 - len(inputs), -1)))
    if inputs[-1] % block:
        n_blocks = math.ceil(math.prod(inputs) / block)
        rows = wide.reshape(*batch, math.prod(inputs), n_out)
        wide, blocks = _arithmetic.pad_axis(rows, -2, n_blocks * block), [n_blocks]
    else:
        blocks = [*inputs[:-1], inputs[-1] // block]
    return Blocks(wide.reshape(*batch, *blocks, block, n_out), (-2,))


def from_blocks(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `as_blocks`, in the dtype of the values; `shape` is the weight's shape."""
    if values.size == math.prod(shape):
        return values.reshape(shape)
    batch, n_out = values.shape[:-3], shape[-1]
    n_in = math.prod(shape[len(batch) : -1])
    return values.reshape(*batch, -1, n_out)[..., :n_in, :].reshape(shape)


def normalize(blocks: Blocks, top: float) -> tuple[jax.Array, jax.Array]:
    """Scales each column of each block to absolute values of at most `top`.

    Args:
        blocks: of a weight.
        top: the largest absolute value of a code.

    Returns:
        The values divided by their scales, and the scales `(*batch, *blocks, out)`,
        float32: `largest / top`. If a scale would be below the normal numbers, the scale
        and the values are 0. If a value of a column is not finite, both are NaN.
    """
    scales = _arithmetic.largest(blocks.values, blocks.members) / top
    scales = jnp.where(scales < _arithmetic.TINY, jnp.zeros_like(scales), scales)
    divisor = jnp.expand_dims(scales, blocks.members)
    ratio = _arithmetic.divide(blocks.values, divisor)
    return jnp.where(divisor == 0, jnp.zeros_like(ratio), ratio), scales


def multiply(blocks: Blocks, scales: jax.Array) -> jax.Array:
    """The values times their scales, which have one entry for each block and output."""
    shape = list(blocks.values.shape)
    for axis in blocks.members:
        shape[axis] = 1
    return blocks.values * scales.reshape(shape)
