"""Column norms of the adapted weights of a plan, which DoRA divides by."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax._core import checks, compat, placement, tree_paths
from lora_jax.layers.lora import Adapters
from lora_jax.model.merging import Own, automatic, own
from lora_jax.plan import layout, parts, plan_checks, stacks
from lora_jax.plan.adapter_plan import AdapterPlan, Target

__all__ = ["adapted_column_norms"]


def adapted_column_norms(
    params: tree_paths.PyTree, adapters: Adapters, plan: AdapterPlan
) -> dict[str, jax.Array]:
    """Computes the column norms of the adapted weights, which DoRA divides by.

    Args:
        params: the params of the plan, before a merge.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.

    Returns:
        `{path: (*batch, out)}` for the weights whose method is DoRA, at least float32: the
        `column_norms` of `unmerge_adapters` and `adapt`. See `lora_jax.dora_column_norm`.

    Raises:
        KeyError, TypeError, ValueError: as `merge_adapters`.
    """
    leaves, _ = plan_checks.checked_leaves(params, adapters, plan)
    norms = {}
    for path, target in plan.targets.items():
        if target.method != "dora":
            continue
        with checks.at_path(path):
            weight = leaves[plan.leaf(path)]
            norms[path] = column_norm(weight, adapters[path], target)
    return norms


def column_norm(weight: Any, adapter: Mapping[str, jax.Array], target: Target) -> jax.Array:
    """The column norms of the adapted weight, `(*batch, out)`.

    The adapter may be empty if its update is zero.
    """
    factors = {name: value for name, value in adapter.items() if name != "m"}
    how = own(weight, target)
    return _column_norms(*placement.on_device((weight, factors)), how)


# Inlined inside a trace; otherwise compiled once for each target.
@functools.partial(jax.jit, inline=True)
def _column_norms(weight: Any, factors: Mapping[str, jax.Array], own: Own) -> jax.Array:
    target, norms_of = own.target, _norms_of(own)
    if not own.in_place:
        weight, alone = stacks.take(weight, target), target.alone
        return stacks.map_entries(norms_of, weight, factors, alone, own.split)
    mesh = compat.mesh_of(jax.typeof(jax.tree.leaves(weight)[0]))
    factors, whole = compat.automatically(own.adapter, mesh, factors)
    norms = stacks.map_entries(norms_of, weight, factors, whole, own.split)
    axes = (*target.batch_axes, *target.out_axes)
    sizes, entries = target.shape, parts.entries(target.part, target.shape)
    norms = norms.reshape([sizes[axis] for axis in axes])
    norms = parts.take(norms, parts.as_text([entries[axis] for axis in axes], norms.shape))
    batch, (_, n_out) = target.matrix_shape[:-2], target.matrix_shape[-2:]
    return norms.reshape(*batch, n_out)


def _norms_of(own: Own) -> Callable[..., jax.Array]:
    """A function of a dense weight, its adapter and its target."""
    form = {"form_update": own.in_place}
    return automatic(keeps=False)(lambda *given: layout.low_rank(*given).norms(**form))
