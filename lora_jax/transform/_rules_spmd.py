"""Programs for many devices: `shard_map`, and collectives inside it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import _compat
from lora_jax.transform._context import Context
from lora_jax.transform._deferred import form
from lora_jax.transform._factored import (
    RANK,
    Factor,
    Factored,
    NotFactorableError,
    base_of,
    with_base,
)
from lora_jax.transform._interpreter import evaluate_closed
from lora_jax.transform._parameters import parameter


def shard_map(context: Context, equation: Any, *operands: Any) -> list[Any]:
    """Maps over shards; the shards of the factors are factors of those of the weight."""
    specs = parameter(equation, "in_specs")
    # How stored arrays are to be split follows from no spec of the dense one.
    values = [with_base(value, form(base_of(value))) for value in operands]
    in_specs = [_spec(v, tuple(s)) for v, s in zip(values, specs, strict=True)]
    axes = frozenset(parameter(equation, "newly_manual_axes", "manual_axes"))
    key = context.make_key()

    def body(key, values):
        with context.using_key(key):
            out = evaluate_closed(context, parameter(equation, "jaxpr"), values)
            return tuple(context.merge_all(out, equation, "shard_map returns it"))

    mapped = jax.shard_map(
        body,
        mesh=parameter(equation, "mesh"),
        in_specs=(PartitionSpec(), in_specs),
        out_specs=tuple(parameter(equation, "out_specs")),
        check_vma=parameter(equation, "check_vma"),
        axis_names=axes,
    )
    return list(mapped(key, list(values)))


def _spec(value: Any, spec: Sequence[Any]) -> Any:
    """The specs of a factored weight: those of its axes, for axes that are owned."""
    if not isinstance(value, Factored):
        return PartitionSpec(*spec)
    whole = (*spec, *[None] * (value.ndim - len(spec)))

    def of(owned: frozenset[int]) -> list[Any]:
        return [axes if axis in owned else None for axis, axes in enumerate(whole)]

    def of_factor(p: Factor) -> Factor:
        own = of(value.owned(p))
        array: Any = PartitionSpec(*(None if i == RANK else own[i] for i in p.axes))
        return dataclasses.replace(p, array=array)

    terms = tuple(term.map(of_factor) for term in value.terms)
    columns: Any = tuple(PartitionSpec(*of(value.owned(c))) for c in value.columns)
    base: Any = PartitionSpec(*spec)
    return value.replace(base=base, terms=terms, columns=columns)


def all_gather(context: Context, equation: Any, f: Factored) -> Factored:
    """Gathers the weight and the factors that own the axis."""
    axis = parameter(equation, "all_gather_dimension")
    if not parameter(equation, "tiled"):
        raise NotFactorableError("it gathers along a new axis")

    def gather(p):
        return _compat.bind_one(equation, p) if p.shape[axis] == f.shape[axis] else p

    return f.map(gather(f.base), gather)


RULES = {
    "shard_map": shard_map,
    "all_gather": all_gather,
    "all_gather_invariant": all_gather,
}
