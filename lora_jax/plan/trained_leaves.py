"""Leaves that are trained without an adapter.

In adapters such a leaf is `{path: {"value": array}}`. The params keep the frozen leaf.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from lora_jax._core import checks, compat, numerics, placement, tree_paths
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.target import VALUE

Leaves = Mapping[str, Any]


def init_all(leaves: Leaves, plan: AdapterPlan) -> dict[str, Adapter]:
    """Copies the leaves that a plan trains, with their shardings.

    The dtype of a copy is float32, or that of the config. If it lacks values of the leaf's
    dtype, the copy has the narrowest dtype that has the values of both.
    """
    copies = {}
    for path in plan.trained:
        with checks.at_path(path):
            checks.check_array("the trained leaf", leaves[path])
        copies[path] = {VALUE: jnp.array(leaves[path], dtype_of(leaves[path], plan))}
    return copies


def dtype_of(leaf: Any, plan: AdapterPlan) -> Any:
    """The dtype of the copy of a leaf that a plan trains."""
    return numerics.promote(_dtype(leaf), plan.config.dtype or "float32")


def values(leaves: Leaves, adapters: Adapters, plan: AdapterPlan) -> Adapter:
    """The trained leaves by path, with the dtypes and shardings of the params' leaves."""
    return {path: as_leaf(leaves[path], adapters[path][VALUE]) for path in plan.trained}


def put(params: tree_paths.Tree, adapters: Adapters, plan: AdapterPlan) -> tree_paths.Tree:
    """Params with the trained leaves in place of the frozen ones."""
    if not plan.trained:
        return params
    leaves, treedef = tree_paths.flatten(params)
    return treedef.unflatten((leaves | values(leaves, adapters, plan)).values())


def merge(leaves: Leaves, adapters: Adapters, plan: AdapterPlan) -> Adapter:
    """Copies of the trained leaves by path, for the params.

    Raises:
        FloatingPointError: outside a trace, if one has an infinity or a NaN.
    """
    merged = {}
    for path in plan.trained:
        copy = jnp.copy(placement.on_device(adapters[path][VALUE]))
        copy = copy.astype(_dtype(leaves[path]))
        if not isinstance(copy, Tracer) and not bool(jnp.isfinite(copy).all()):
            raise FloatingPointError(
                f"at {path!r}: the trained leaf has an infinity or a NaN in {copy.dtype}."
            )
        merged[path] = as_leaf(leaves[path], copy)
    return merged


def split(
    adapters: Mapping[str, Any], plan: AdapterPlan
) -> tuple[dict[str, Any], AdapterPlan, dict[str, Any]]:
    """The adapters without trained leaves, their plan, and the trained leaves by path."""
    values = {path: adapters[path][VALUE] for path in plan.trained}
    reasons = dict.fromkeys(plan.trained, "it is trained without an adapter")
    own = dataclasses.replace(plan, trained={}, skipped={**plan.skipped, **reasons})
    return {path: adapters[path] for path in plan.targets}, own, values


def restore(originals: Mapping[str, Any] | None, plan: AdapterPlan) -> dict[str, Any]:
    """Checks the leaves from before a merge, and returns them by path."""
    if plan.trained and originals is None:
        raise ValueError(
            f"the merge replaced the trained leaves {tree_paths.listed([*plan.trained])}, "
            "and merged params do not have the old ones any more: give originals={path: "
            "leaf}, the leaves of the params from before the merge."
        )
    given = originals or {}
    plan_checks.check_paths("originals", given, list(plan.trained))
    for path, leaf in plan.trained.items():
        with checks.at_path(path):
            checks.check_vector("the leaf", given[path], leaf.shape, "that of the plan")
    return dict(given)


def as_leaf(leaf: Any, value: Any) -> jax.Array:
    """A value with the dtype and the sharding of a leaf."""
    value = jnp.asarray(value).astype(_dtype(leaf))
    if not isinstance(leaf, jax.Array):
        return value
    if not (isinstance(leaf, Tracer) or isinstance(value, Tracer)):
        place, memory = leaf.sharding, value.sharding.memory_kind
        moves = isinstance(place, NamedSharding) or place.memory_kind != memory
        return jax.device_put(value, place) if moves else value
    kind = jax.typeof(leaf)
    if compat.has_explicit_axes(compat.mesh_of(kind)):
        return compat.retyped(value, kind.sharding)
    return value


def _dtype(leaf: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(leaf.dtype)
