"""Leaves that are trained without an adapter.

In adapters such a leaf is `{path: {"value": array}}`. The params keep the frozen leaf.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lora_jax._core import checks, numerics, tree_paths
from lora_jax.layers.lora import Adapter
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.target import VALUE

Leaves: TypeAlias = Mapping[str, Any]


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
    return numerics.promote(
        jax.dtypes.canonicalize_dtype(leaf.dtype), plan.config.dtype or "float32"
    )


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
