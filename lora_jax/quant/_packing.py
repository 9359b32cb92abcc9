"""Packing of two 4-bit codes into a byte, and table look-up of codes.

The first of two codes is in the upper four bits, as in torchao and bitsandbytes.
"""

import jax
import jax.numpy as jnp
import numpy as np

_MASK = 15


def pack(codes: jax.Array, fill: int) -> jax.Array:
    """`(..., n)` codes -> `(..., ceil(n / 2))` bytes; an odd `n` is padded with `fill`."""
    if codes.shape[-1] % 2:
        widths = [(0, 0)] * (codes.ndim - 1) + [(0, 1)]
        codes = jnp.pad(codes, widths, constant_values=fill)
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << jnp.uint8(4)) | pairs[..., 1]


def unpack(packed: jax.Array) -> jax.Array:
    """`(..., n)` bytes -> `(..., n, 2)` codes."""
    return jnp.stack([packed >> jnp.uint8(4), packed & jnp.uint8(_MASK)], axis=-1)


def nearest(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """The code of each value, uint8: the number of thresholds that are below it.

    It is one loop over `x` with a comparison for each threshold, without an array that has
    a column for each threshold. NaN has code 0.
    """
    code = jnp.zeros(x.shape, jnp.uint8)
    for threshold in thresholds:
        code += (x > threshold).astype(jnp.uint8)
    return code


def look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """The entry of a table of 16 for each code, selected bit by bit.

    Each bit of the code halves the rest of the table. Unlike a gather, this is vectorized
    on the CPU, and needs no 32-bit indices, and no memory access on a GPU.

    Args:
        codes: any shape, uint8 below 16.
        table: `(16,)`, float32.
    """
    values = [jnp.full_like(codes, value, dtype=jnp.float32) for value in table]
    for bit in range(4):
        is_set = (codes & jnp.uint8(1 << bit)) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, upper, lower) for lower, upper in pairs]
    return values[0]
