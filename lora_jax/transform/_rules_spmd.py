"""Rules for `shard_map`, and for collectives inside it."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat
from lora_jax.transform import _varying
from lora_jax.transform._context import Context, changed
from lora_jax.transform._deferred import form
from lora_jax.transform._factored import Factored, base_of, retyped, specs, with_base
from lora_jax.transform._interpreter import evaluate_closed
from lora_jax.transform._parameters import NotFactorableError, parameter


def shard_map(context: Context, equation: Any, *operands: Any) -> list[Any]:
    """Rebuilds a `shard_map`. Factors are sharded along the axes that they own."""
    # The spec of a dense weight does not say how to split its quantized arrays.
    mesh = parameter(equation, "mesh")
    values = [with_base(value, form(base_of(value))) for value in operands]
    key, slots = context.make_key(), context.slots
    of_rows = None if slots is None else context.frame.followed.specs[id(equation)]
    if compat.has_explicit_axes(mesh):
        kinds, names = [atom.aval for atom in equation.invars], frozenset(mesh.axis_names)
        arrays = [value for value in values if isinstance(value, jax.Array)]
        split = compat.only(of_rows, compat.explicit_names(arrays))
        own = next(filter(lambda m: m.axis_names, map(compat.mesh_of, kinds)), mesh)
        slots = compat.retyped(slots, NamedSharding(own, PartitionSpec(split)))
        values = [
            retyped(value, kind, names) if isinstance(value, Factored) else value
            for value, kind in zip(values, kinds, strict=True)
        ]
    pairs = zip(values, parameter(equation, "in_specs"), strict=True)
    in_specs = [_spec(v, tuple(s)) for v, s in pairs]
    axes = frozenset(parameter(equation, "newly_manual_axes", "manual_axes"))

    jaxpr, check_vma = parameter(equation, "jaxpr"), parameter(equation, "check_vma")
    varying = {}
    if key is not None and not check_vma:
        split = [jax.tree.leaves(tuple(own)) for own in parameter(equation, "in_specs")]
        varying = _varying.follow(jaxpr, [axes.intersection(own) for own in split])

    def body(key, slots, inside):
        context.enter(operands, inside)
        known = changed(context, varying=varying)
        with context.using_slots(slots), context.using_key(key), known:
            out = evaluate_closed(context, jaxpr, inside)
            return tuple(context.merge_all(out, equation, "shard_map returns it"))

    if compat.has_explicit_axes(mesh, without=axes):
        # JAX then keeps only the arguments for the backward pass.
        body = jax.checkpoint(body)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(of_rows), in_specs),
        out_specs=tuple(parameter(equation, "out_specs")),
        check_vma=check_vma,
        axis_names=axes,
    )
    return list(mapped(key, slots, list(values)))


def _spec(value: Any, spec: Sequence[Any]) -> Any:
    """The partition specs of an operand of the new `shard_map`."""
    return specs(value, spec) if isinstance(value, Factored) else PartitionSpec(*spec)


def all_gather(context: Context, equation: Any, f: Factored) -> Factored:
    """Gathers the frozen weight, and the factors that own the axis."""
    axis = parameter(equation, "all_gather_dimension")
    check_tiled(equation)

    def gather(p):
        return compat.bind_one(equation, p) if p.shape[axis] == f.shape[axis] else p

    return f.map(gather(f.base), gather)


def check_tiled(equation: Any) -> None:
    """Raises unless the gather makes an existing axis longer."""
    if not parameter(equation, "tiled"):
        raise NotFactorableError("it gathers along a new axis")


RULES = {
    "shard_map": shard_map,
    "all_gather": all_gather,
    "all_gather_invariant": all_gather,
}
