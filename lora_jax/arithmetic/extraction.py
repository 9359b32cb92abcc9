"""Adapters from the difference between two sets of params."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks, numerics, placement, quantized, tree_paths
from lora_jax.arithmetic.weight_updates import check_finite, checked_cut, extract_weight
from lora_jax.layers.combinations import Cut
from lora_jax.layers.lora import Adapter
from lora_jax.model import sharding
from lora_jax.plan import derived_plans, parts, plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.derived_plans import Size

__all__ = ["ExtractedAdapters", "extract_adapters"]

_LOG = logging.getLogger("lora_jax")


class ExtractedAdapters(NamedTuple):
    """Adapters that were computed from params, with their plan."""

    adapters: dict[str, Adapter]
    """`{path: adapter}`."""
    plan: AdapterPlan
    """The plan of these adapters."""
    energy: dict[str, float]
    """The share of the squared Frobenius norm of each change that was kept."""
    changed: dict[str, Any]
    """The tuned leaves outside of the plan that differ from those of the base, by path."""


def extract_adapters(
    base: tree_paths.PyTree,
    tuned: tree_paths.PyTree,
    plan: AdapterPlan,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> ExtractedAdapters:
    """Approximates the difference between two sets of params by adapters.

    Each difference has an exact SVD, which takes a few dense arrays of one matrix. The
    params may be dense or quantized. Not inside `jax.jit`, because values are compared.

    Args:
        base: the params of the plan.
        tuned: params with the same paths and shapes, for example after full fine-tuning.
        plan: of the weights that get an adapter, with LoRA. Its trained leaves are taken
            from `tuned`.
        rank: the largest rank; by default the ranks of the plan, or no limit if `energy` is
            given. A rank above `min(in, out)` becomes `min(in, out)`.
        energy: in (0, 1]: take the smallest rank that keeps this share of the squared
            Frobenius norm of the difference.

    Returns:
        The adapters, in the dtypes that `init_adapters` gives them; their plan, with the
        scales of the given one; the energies; and `changed`, the leaves of `tuned` outside
        of the plan that differ from those of `base`. `lora_jax.peft.replace_leaves(base,
        changed)` puts these into params.

    Raises:
        FloatingPointError: if a difference has an infinity or a NaN.
        KeyError: if the paths of the two trees or of the plan differ.
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of its range, shapes differ, a target has DoRA or the
            scale 0 or is for one kind of use of a weight that has others, or a weight has
            changed outside of the parts that the plan adapts.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> base = {"query": jnp.zeros((64, 32)), "bias": jnp.zeros(32)}
        >>> tuned = {"query": jnp.ones((64, 32)), "bias": jnp.ones(32)}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=4), base)
        >>> made = lora_jax.extract_adapters(base, tuned, plan, energy=0.99)
        >>> made.plan.targets["query"].rank, round(made.energy["query"], 4)
        (1, 1.0)
        >>> list(made.changed)
        ['bias']
    """
    cut = checked_cut(rank, energy)
    old, new = map(tree_paths.leaf_paths, (base, tuned))
    for name, leaves in (("base", old), ("tuned", new)):
        with checks.at_path(name):
            plan_checks.check_params(leaves, plan, values=True)
    if old.keys() != new.keys():
        raise KeyError(
            "base and tuned must have the same leaves, and only one of them has "
            f"{tree_paths.listed(sorted(old.keys() ^ new.keys()))}."
        )
    plan_checks.check_all_uses(plan)
    made, sizes, energies = {}, {}, {}
    for path, target in plan.targets.items():
        leaf = plan.leaf(path)
        with checks.at_path(path):
            dtype = plan.config.dtype or numerics.accumulation_dtype(old[leaf].dtype)
            own = Cut(target.rank) if cut == Cut() else cut
            update = extract_weight(old[leaf], new[leaf], target, own, dtype)
        made[path] = {"A": update.a, "B": update.b}
        sizes[path] = Size(update.a.shape[-1], target.scale)
        energies[path] = update.energy
        _LOG.info("%s: extracted with the rank %d", path, sizes[path].rank)
    check_finite(made)
    changed = _changed_leaves(old, new, plan)
    made |= trained_leaves.init_all(new, plan)
    places = sharding.init_shardings(old, plan)
    if places is not None:
        made = jax.tree.map(placement.put, made, places)
    plan = derived_plans.with_sizes(plan, sizes)
    return ExtractedAdapters(made, plan, energies, changed)


def _changed_leaves(
    old: Mapping[str, Any], new: Mapping[str, Any], plan: AdapterPlan
) -> dict[str, Any]:
    """The new leaves outside of a plan that differ from the old ones."""
    adapted, changed = plan.by_leaf(), {}
    for path, leaf in new.items():
        if path in plan.trained or leaf is old[path]:
            continue
        own = [plan.targets[key].part for key in adapted.get(path, ())]
        if "" in own:
            continue
        if _is_equal(path, old[path], leaf, own):
            continue
        if own:
            raise ValueError(
                f"at {path!r}: the weight has changed outside of the parts that the "
                f"plan adapts, {', '.join(own)}: adapt the whole weight."
            )
        changed[path] = leaf
    return changed


def _is_equal(path: str, first: Any, second: Any, outside: Sequence[str]) -> bool:
    """Whether two leaves have the same values outside of some parts, in any dtypes."""
    if not (checks.is_array(first) and checks.is_array(second)):
        return bool(first == second)
    with checks.at_path(path):
        pair = list(map(_values, (first, second)))
    for part in outside:
        pair = [np.where(parts.mask(part, x.shape), 0, x) for x in pair]
    return np.array_equal(*pair, equal_nan=all(x.dtype.kind == "f" for x in pair))


def _values(leaf: Any) -> np.ndarray:
    """The values of a leaf; floating-point ones in float64."""
    checks.check_has_values("the leaf", leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    values = np.asarray(quantized.as_dense(leaf))
    return values.astype(np.float64) if checks.is_floating(values.dtype) else values
