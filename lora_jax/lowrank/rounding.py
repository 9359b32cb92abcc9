"""What the rounding of a merged weight loses."""

import jax
import jax.numpy as jnp


def find_vanished(
    weight: jax.Array, update: jax.Array, merged: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Finds the entries that have an update and do not change.

    Args:
        weight: before the merge, in at least float32.
        update: what the merge adds, of the same shape and dtype.
        merged: the rounded result, of the same shape.

    Returns:
        A mask of these entries, and the largest `|update| / |weight|` among them, 0 if
        there are none. For a weight of 0 it is `|update|`.
    """
    vanished = (update != 0) & (merged == weight.astype(merged.dtype))
    zero = jnp.zeros_like(update)
    size = jnp.where(weight == 0, zero + 1, jnp.abs(weight))
    return vanished, jnp.max(jnp.where(vanished, jnp.abs(update) / size, zero))
