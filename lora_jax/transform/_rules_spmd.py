"""Programs for many devices: `shard_map`, and collectives inside it."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax._core import compat
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import form
from lora_jax.transform._factored import (
    Factored,
    base_of,
    specs,
    with_base,
)
from lora_jax.transform._interpreter import evaluate_closed
from lora_jax.transform._parameters import NotFactorableError, parameter


def shard_map(context: Context, equation: Any, *operands: Any) -> list[Any]:
    """Maps over shards; the shards of the factors are factors of those of the weight."""
    # How stored arrays are to be split follows from no spec of the dense one.
    values = [with_base(value, form(base_of(value))) for value in operands]
    pairs = zip(values, parameter(equation, "in_specs"), strict=True)
    in_specs = [_spec(v, tuple(s)) for v, s in pairs]
    axes = frozenset(parameter(equation, "newly_manual_axes", "manual_axes"))
    key = context.make_key()

    def body(key, values):
        with context.using_key(key):
            out = evaluate_closed(context, parameter(equation, "jaxpr"), values)
            return tuple(context.merge_all(out, equation, "shard_map returns it"))

    mesh = parameter(equation, "mesh")
    if compat.has_explicit_axes(mesh, without=axes):
        # JAX keeps nothing for the backward pass there but the arguments.
        body = jax.checkpoint(body)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), in_specs),
        out_specs=tuple(parameter(equation, "out_specs")),
        check_vma=parameter(equation, "check_vma"),
        axis_names=axes,
    )
    return list(mapped(key, list(values)))


def _spec(value: Any, spec: Sequence[Any]) -> Any:
    """The specs of a value of the new `shard_map`."""
    return specs(value, spec) if isinstance(value, Factored) else PartitionSpec(*spec)


def all_gather(context: Context, equation: Any, f: Factored) -> Factored:
    """Gathers the weight and the factors that own the axis."""
    axis = parameter(equation, "all_gather_dimension")
    check_tiled(equation)

    def gather(p):
        return compat.bind_one(equation, p) if p.shape[axis] == f.shape[axis] else p

    return f.map(gather(f.base), gather)


def check_tiled(equation: Any) -> None:
    """Raises unless it makes an axis longer."""
    if not parameter(equation, "tiled"):
        raise NotFactorableError("it gathers along a new axis")


RULES = {
    "shard_map": shard_map,
    "all_gather": all_gather,
    "all_gather_invariant": all_gather,
}
