"""Where the arrays of a quantized weight lie, of how the dense weight is sharded."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import _compat
from lora_jax._quantized import is_quantized

T = TypeVar("T")


def keep_sharding(function: Callable[[jax.Array], tuple[Any, T]], weight: jax.Array) -> Any:
    """Shards what a function makes of a weight as the weight is.

    On a mesh with explicit axes, those inside of the function are automatic.

    Args:
        function: gives the weight in another form, as an array of its shape or as a
            quantized tensor, and anything besides.
        weight: dense, traced or not.

    Returns:
        Both. The arrays of a quantized tensor keep the sharding along the axes of the
        stack, those of the shape of the weight all of it; along other axes they are not
        sharded.
    """
    spec = _compat.explicit_spec(weight)
    if any(spec):
        with _compat.on_mesh_of(weight):
            whole: Any = jax.sharding.auto_axes(function, out_sharding=PartitionSpec())
            out: Any = _specs(jax.eval_shape(whole, weight)[0], spec), PartitionSpec()
            inner: Any = jax.sharding.auto_axes(function, out_sharding=out)
            return jax.jit(inner)(weight)
    stored, rest = function(weight)
    places = shardings(stored, getattr(weight, "sharding", None))
    return stored if places is None else jax.device_put(stored, places), rest


def shardings(stored: Any, sharding: Any) -> Any:
    """The sharding of each array of a weight, of that of the dense weight; or None."""
    if not isinstance(sharding, NamedSharding):
        return None
    place = functools.partial(NamedSharding, memory_kind=sharding.memory_kind)
    specs = _specs(stored, sharding.spec)
    return jax.tree.map(
        lambda spec: place(sharding.mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def _specs(stored: Any, spec: Iterable[Any]) -> Any:
    """The mesh axes of each array of a weight, of those of the dense weight."""
    axes = tuple(spec)
    whole = PartitionSpec(*axes)
    if not is_quantized(stored):
        return whole
    stack = PartitionSpec(*axes[: stored.batch_ndim])
    return jax.tree.map(lambda x: whole if x.shape == stored.shape else stack, stored)
