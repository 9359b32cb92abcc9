"""Scales per output of a weight `(*batch, *inputs, out)`, or per block of its inputs."""

import math

import jax
import jax.numpy as jnp

from lora_jax.quant import _arithmetic


def as_blocks(weight: jax.Array, batch_axes: int, block: int | None) -> jax.Array:
    """`(*batch, *inputs, out)` -> `(*batch, n_blocks, block, out)`, float32.

    All input axes are folded into one. The last block is padded with zeros. If `block` is
    None, there is one block.
    """
    batch, n_out = weight.shape[:batch_axes], weight.shape[-1]
    n_in = math.prod(weight.shape[batch_axes:-1])
    width = n_in if block is None else block
    n_blocks = math.ceil(n_in / width)
    rows = weight.reshape(*batch, n_in, n_out).astype(jnp.float32)
    padded = _arithmetic.pad_axis(rows, -2, n_blocks * width)
    return padded.reshape(*batch, n_blocks, width, n_out)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `as_blocks`, in the dtype of the blocks; `shape` is the weight's shape."""
    batch, n_out = blocks.shape[:-3], blocks.shape[-1]
    n_in = math.prod(shape[len(batch) : -1])
    return blocks.reshape(*batch, -1, n_out)[..., :n_in, :].reshape(shape)


def normalize(blocks: jax.Array, top: float) -> tuple[jax.Array, jax.Array]:
    """Scales each column of each block to absolute values of at most `top`.

    Args:
        blocks: `(*batch, n_blocks, block, out)`, float32.
        top: the largest absolute value of a code.

    Returns:
        The values divided by their scales, and the scales `(*batch, n_blocks, out)`,
        float32: `largest / top`. If a scale would be below the normal numbers, the scale
        and the values are 0. If a value of a column is not finite, both are NaN.
    """
    scales = _arithmetic.largest(blocks, axis=-2) / top
    scales = jnp.where(scales < _arithmetic.TINY, jnp.zeros_like(scales), scales)
    divisor = scales[..., None, :]
    ratio = _arithmetic.divide(blocks, divisor)
    return jnp.where(divisor == 0, jnp.zeros_like(ratio), ratio), scales
