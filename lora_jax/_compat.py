"""What differs between the versions of JAX that are supported.

Each guard compares a version, so that raising the floor in `pyproject.toml` shows which
of them to delete.
"""

from typing import Any

import jax


def explicit_spec(x: jax.Array) -> tuple[Any, ...]:
    """The mesh axes of each axis of `x` that are part of its type.

    None for each axis, unless the mesh has explicit axes and shards that axis with them.
    """
    if jax.__version_info__ < (0, 7, 0):  # before meshes with explicit axes were public
        return (None,) * x.ndim
    return tuple(jax.typeof(x).sharding.spec)
