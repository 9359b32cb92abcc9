"""Two 4-bit codes in a byte, and what a table has for them.

The first of two codes is in the upper four bits, as in torchao and bitsandbytes.
"""

import jax
import jax.numpy as jnp
import numpy as np

_MASK = 15


def pack(codes: jax.Array, fill: int) -> jax.Array:
    """`(..., n)` codes -> `(..., ceil(n / 2))` bytes; `fill` is behind an odd last one."""
    if codes.shape[-1] % 2:
        widths = [(0, 0)] * (codes.ndim - 1) + [(0, 1)]
        codes = jnp.pad(codes, widths, constant_values=fill)
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << jnp.uint8(4)) | pairs[..., 1]


def unpack(packed: jax.Array) -> jax.Array:
    """`(..., n)` bytes -> `(..., n, 2)` codes."""
    return jnp.stack([packed >> jnp.uint8(4), packed & jnp.uint8(_MASK)], axis=-1)


def nearest(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """The code of each value: how many of some thresholds it is above, uint8.

    It is one loop over `x` with a comparison for each threshold, and no array of as many
    columns. NaN has code 0.
    """
    code = jnp.zeros(x.shape, jnp.uint8)
    for threshold in thresholds:
        code += (x > threshold).astype(jnp.uint8)
    return code


def look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """The entry of a table of 16 for each code, as a tree of choices between two.

    Unlike a gather it is vectorized on the CPU, needs no indices of 32 bits, and on a GPU
    no memory: each bit of the code halves what is left of the table.

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
