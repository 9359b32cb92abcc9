"""Scales for the outputs of a weight `(*batch, *inputs, out)`, or blocks of its inputs."""

import math

import jax
import jax.numpy as jnp

from lora_jax.quant import _arithmetic


def as_blocks(weight: jax.Array, batch_axes: int, block: int | None) -> jax.Array:
    """`(*batch, *inputs, out)` -> `(*batch, n_blocks, block, out)`, float32.

    All input axes are one. The last block has zeros at the end; without a size there is
    one block.
    """
    batch, n_out = weight.shape[:batch_axes], weight.shape[-1]
    n_in = math.prod(weight.shape[batch_axes:-1])
    width = n_in if block is None else block
    n_blocks = math.ceil(n_in / width)
    rows = weight.reshape(*batch, n_in, n_out).astype(jnp.float32)
    padded = _arithmetic.pad_axis(rows, -2, n_blocks * width)
    return padded.reshape(*batch, n_blocks, width, n_out)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `as_blocks`, in the dtype of the blocks; `shape` is that of the weight."""
    batch, n_out = blocks.shape[:-3], blocks.shape[-1]
    n_in = math.prod(shape[len(batch) : -1])
    return blocks.reshape(*batch, -1, n_out)[..., :n_in, :].reshape(shape)


def normalize(blocks: jax.Array, top: float) -> tuple[jax.Array, jax.Array]:
    """Scales the columns of blocks to at most `top`.

    Args:
        blocks: `(*batch, n_blocks, block, out)`, float32.
        top: the largest absolute value that a code stands for.

    Returns:
        The values divided by their scales, and these, `(*batch, n_blocks, out)`, float32:
        `largest / top`. A scale is 0, and so are the values, where that is below the
        normal numbers; both are NaN where a value of the column is not finite.
    """
    scales = _arithmetic.largest(blocks, axis=-2) / top
    scales = jnp.where(scales < _arithmetic.TINY, jnp.zeros_like(scales), scales)
    divisor = scales[..., None, :]
    ratio = _arithmetic.divide(blocks, divisor)
    return jnp.where(divisor == 0, jnp.zeros_like(ratio), ratio), scales
