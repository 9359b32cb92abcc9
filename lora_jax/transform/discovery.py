"""Finds what a function does with each axis of each of its weights.

The function is traced, and evaluated abstractly with a factored value for every weight
that has one low-rank term for each of its axes: a term of rank 1 that only owns that axis.
The rules carry the terms along, and a rule that contracts the value sees which of them it
contracts. No equation of the function is run: what it gives are zeros of the shape that the
program has for it. So nothing is computed, and meshes do not matter.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core import compat
from lora_jax.plan.adapter_plan import Use
from lora_jax.transform import _interpreter, _tracing
from lora_jax.transform._context import Context, Sighting
from lora_jax.transform._factored import Factored, Label, Term, from_leading
from lora_jax.transform._rules import RULES

_PRODUCTS = ("dot_general", "ragged_dot_general")


def find_uses(
    function: _tracing.Function,
    params: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, tuple[Use, ...]]:
    """What `function(params, *args, **kwargs)` does with its weights.

    Args:
        function: is traced.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`s.
        args: arguments of the function.
        kwargs: arguments of the function.

    Returns:
        The uses, in the order of the program, of each floating-point array of the params
        with two axes or more; an empty tuple for one that has no use.
    """
    traced = _tracing.trace(function, params, args, kwargs)
    ndims = {
        path: leaf.ndim
        for path, leaf in zip(traced.paths, traced.arguments, strict=True)
        if path is not None and _is_weight(leaf)
    }
    context = Context(RULES, on_merge=lambda merge: None, probing=True)
    context.closed_over_is_constant = None in traced.paths

    jaxpr, constants = compat.open_jaxpr(traced.jaxpr)

    def run():
        arguments = [compat.zeros(atom.aval) for atom in jaxpr.invars]
        values = [
            value if path is None or path not in ndims else _probe(path, value)
            for path, value in zip(traced.paths, arguments, strict=True)
        ]
        fixed = [v for p, v in zip(traced.paths, values, strict=True) if p is not None]
        context.add_constants(fixed)
        out = _interpreter.evaluate(context, jaxpr, constants, values)
        return context.merge_all(out, None, "the function returns it")

    with compat.on_mesh(compat.mesh_of(None)):
        jax.eval_shape(run)
    context.settle_look_ups()
    uses: dict[str, list[Use]] = {path: [] for path in ndims}
    for sighting in context.sightings:
        path = str(sighting.name)
        uses[path].append(_use(sighting, ndims[path]))
    return {path: tuple(dict.fromkeys(found)) for path, found in uses.items()}


def _is_weight(leaf: Any) -> bool:
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _probe(path: str, weight: jax.Array) -> Factored:
    """A weight with one term for each axis, of which `a` owns that axis and `b` none."""
    ones = [1] * (1 + weight.ndim)

    def term(axis: int) -> Term:
        shape = list(ones)
        shape[1 + axis] = weight.shape[axis]
        label = Label((path,), axis=axis)
        a, b = (from_leading(jnp.zeros(sizes, weight.dtype)) for sizes in (shape, ones))
        return Term(a, b, label)

    return Factored(weight, tuple(map(term, range(weight.ndim))))


def _use(sighting: Sighting, ndim: int) -> Use:
    return Use(
        primitive=sighting.primitive,
        roles=tuple(sighting.roles.get(axis, "") for axis in range(ndim)),
        where=sighting.where,
        merged=sighting.merged,
        linear=sighting.primitive in _PRODUCTS and not sighting.merged,
    )
