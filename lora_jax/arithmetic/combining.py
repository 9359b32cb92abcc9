"""Sums, multiples and lower ranks of adapters.

The result of each function is a record of new adapters and their plan. Its config agrees
with the plan: `plan_adapters` with it makes the same plan, up to the last bit of a scale.
A tuple of `decompose_params` has adapters for another base, whose arrays do not show it:
convert them first, with `to_plain_adapters`.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import checks, numerics, tree_paths
from lora_jax.arithmetic.overlaps import unify
from lora_jax.arithmetic.weight_updates import (
    Weighted,
    check_finite,
    checked_cut,
    checked_share,
    combine_weight,
    laid_like,
    resize_weight,
    static_number,
)
from lora_jax.layers import combinations
from lora_jax.layers.combinations import Cut, Method, MethodName
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.plan import derived_plans, plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.derived_plans import Size
from lora_jax.plan.target import VALUE

__all__ = ["DerivedAdapters", "combine_adapters", "resize_adapters", "scale_adapters"]

_DORA_METHODS = ("exact", "svd")
_LOG = logging.getLogger("lora_jax")


class DerivedAdapters(NamedTuple):
    """Adapters that were computed from others, with their plan."""

    adapters: dict[str, Adapter]
    """`{path: adapter}`."""
    plan: AdapterPlan
    """The plan of these adapters."""
    energy: dict[str, float]
    """The share of the squared Frobenius norm of each update that was kept: 1 if the rank
    was not reduced. In a trace, scalar arrays."""


def combine_adapters(
    adapters: Sequence[Adapters],
    plans: AdapterPlan | Sequence[AdapterPlan],
    weights: Sequence[float] | None = None,
    method: MethodName = "exact",
    *,
    params: tree_paths.PyTree | None = None,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
    key: jax.Array | None = None,
) -> DerivedAdapters:
    """Combines several adapters of the same params into one.

    With the updates `D_i = scale_i * A_i @ B_i` and the weights `w_i`, the methods are:

    - `"exact"`: `sum w_i D_i`, with the sum of the ranks.
    - `"svd"`: the best approximation of this sum by a lower rank, from the factors.
    - `"linear"`: `A = sum sqrt(w_i scale_i) A_i`, `B` likewise. The product has cross terms
      and is **not** the sum of the updates.
    - `"magnitude"`: `"linear"` after pruning. In each factor, the `density` of the entries
      that are largest are kept.
    - `"dare_linear"`: `"linear"` after random pruning. Entries are kept with the
      probability `density`, and divided by it.
    - `"ties"`, `"dare_ties"`: pruning as above, and then for each entry the mean of the
      weighted values that have the sign of the majority.
    - `"magnitude_svd"`, `"dare_linear_svd"`, `"ties_svd"`, `"dare_ties_svd"`: the same on
      the dense updates, one matrix at a time, followed by a truncated SVD.
    - `"knots"`: the SVD of all updates together, `"ties"` on the part of each adapter in
      it, and a truncated SVD.
    - `"tsv"`: of each of `n` updates the first `1 / n` of the singular vectors, those of
      all updates together made orthogonal, with the weighted singular values. `energy`
      counts the vectors that are left out.

    Methods on factors depend on how the factors of an update are chosen, and need equal
    ranks. The others depend on the updates only. The order of the adapters does not matter,
    but for `"dare_..."`, whose masks are drawn in this order.

    Args:
        adapters: a list or tuple of the adapters, at least one.
        plans: the plan of each, or one plan for all. Ranks, scales, dropout rates, methods
            and targets may differ. A weight without an adapter has a zero update.
        weights: a number for each of the adapters, of any sign. Adapters with the weight 0
            take no part. None means 1 for each: the adapters are merged one after the
            other.
        method: how to combine them.
        params: the params of the plans. Needed for adapters with DoRA, for their column
            norms, and for trained leaves whose weights do not add up to 1.
        rank: the largest rank of the result, for the methods that compute an SVD. The
            default is the largest rank of the adapters of each weight; or no limit, if
            `energy` is given or the method is `"tsv"`.
        energy: for these methods, in (0, 1]: take the smallest rank that keeps this share
            of the squared Frobenius norm of the update.
        density: for methods that prune, and for `"knots"`, in (0, 1].
        majority_sign: for methods with `"ties"` and for `"knots"`: the sign of the sum of
            the entries, or that of most entries.
        key: a `jax.random` key, for `"dare_..."`.

    Returns:
        The adapters, their plan and the energies. The targets are those of all plans; parts
        of a weight that overlap become one target of the weight. The scale of a target is
        that of its adapters, if they have the same one, and otherwise 1; so one adapter
        with the weight 1 is returned unchanged by `"exact"`. An array has the widest dtype
        of its adapters, and the sharding of the first of them. Dropout rates are those of
        the plans, if all are equal, and otherwise 0.

        If one plan has DoRA, all targets of the result have it; `"exact"` is exact. With
        `"svd"` the column factors are exact, and `energy` is the share of the low-rank part
        of the merged weight. For LoRA from DoRA, use `extract_adapters` on merged params.

        A trained leaf is `v + sum w_i (v_i - v)`, with any method.

    Raises:
        FloatingPointError: if a result has an infinity or a NaN, outside a trace.
        KeyError: if the paths or entries of the adapters are not those of their plan, or
            params lack a weight.
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of its range; an argument is missing that the method
            needs, or is given and not used; two plans do not agree about a weight; an
            adapter has biases; or the method adds factors, and the ranks differ, or does
            not take DoRA.

    References:
        `linear` to `ties`: peft, `add_weighted_adapter`, which is wrong for rank-stabilized
        adapters and ignores magnitudes. TIES: Yadav et al., 2023,
        https://arxiv.org/abs/2306.01708. DARE: Yu et al., 2023,
        https://arxiv.org/abs/2311.03099. KnOTS: Stoica et al., 2024,
        https://arxiv.org/abs/2410.19735. TSV: Gargiulo et al., 2024,
        https://arxiv.org/abs/2412.00081.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=4), params)
        >>> keys = jax.random.split(jax.random.key(0))
        >>> two = [lora_jax.init_adapters(key, params, plan) for key in keys]
        >>> made = lora_jax.combine_adapters(two, plan, [0.7, -0.2], "svd", rank=2)
        >>> jax.tree.map(jnp.shape, made.adapters), made.plan.config.rank
        ({'query': {'A': (64, 2), 'B': (2, 32)}}, 2)
    """
    plans = plan_checks.checked_plans(adapters, plans, "of them")
    numbers = _checked_weights(weights, len(plans))
    cut = checked_cut(rank, energy)
    how = _checked_method(method, density, majority_sign, key, cut)
    leaves = _checked_params(params, plans)
    adapters, plans, changed = unify(adapters, plans)
    union, by_path = derived_plans.union_of(plans)
    is_dora = _checked_dora(union, method, leaves)
    made, sizes, energies = {}, {}, {}
    for path, target in union.targets.items():
        given = [
            Weighted(dict(own[path]), plan.targets[path].scale, weight)
            for own, plan, weight in zip(adapters, plans, numbers, strict=True)
            if path in plan.targets
        ]
        dora = (target, leaves[union.leaf(path)]) if is_dora else ()
        own_key = None if key is None else tree_paths.fold_in(key, path)
        with checks.at_path(path):
            adapter, update = combine_weight(given, how, cut, own_key, *dora)
            made[path] = laid_like(adapter, given[0].adapter)
        sizes[path] = Size(adapter["A"].shape[-1], update.scale)
        energies[path] = update.energy
        _LOG.info("%s: combined with the rank %d", path, sizes[path].rank)
    made |= _combined_leaves(adapters, plans, numbers, leaves, union)
    check_finite(made)
    plan = derived_plans.with_sizes(union, sizes, by_path=by_path or changed)
    return DerivedAdapters(made, plan, energies)


def resize_adapters(
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    rank: int | None = None,
    energy: float | None = None,
    params: tree_paths.PyTree | None = None,
) -> DerivedAdapters:
    """Approximates adapters by adapters of lower ranks, as well as these can.

    The SVD of each update is computed from its factors, without an `(in, out)` array.

    Args:
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        rank: the largest rank of the result. Adapters whose rank is not larger are returned
            unchanged.
        energy: in (0, 1]: take the smallest rank that keeps this share of the squared
            Frobenius norm of the update. kohya's `sv_fro=t` is `energy=t**2`. For a stack
            of weights, this is the norm of the whole stack. At least one of `rank` and
            `energy` must be given.
        params: the params of the plan. Needed for DoRA only, for the column norms.

    Returns:
        The adapters, their plan with the same scales, and the energies. Arrays have the
        dtypes and shardings of the given ones. With DoRA, `A` and `B` and the magnitude are
        those for which the low-rank part of the merged weight is approximated best, and the
        factors of its columns stay the same.

    Raises:
        FloatingPointError: as `combine_adapters`.
        KeyError, TypeError: as `combine_adapters`.
        ValueError: if neither `rank` nor `energy` is given, one is out of its range, an
            adapter has biases, or there are adapters with DoRA and no params.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=4), params)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> small = lora_jax.resize_adapters(adapters, plan, rank=2)
        >>> jax.tree.map(jnp.shape, small.adapters), small.energy
        ({'query': {'A': (64, 2), 'B': (2, 32)}}, {'query': 1.0})
    """
    plan_checks.check_adapters(adapters, plan)
    cut = checked_cut(rank, energy)
    if cut == Cut():
        raise ValueError("give rank or energy, or both: without them nothing changes.")
    leaves = _checked_params(params, [plan])
    is_dora = _checked_dora(plan, "svd", leaves)
    made, sizes, energies = {}, {}, {}
    for path, target in plan.targets.items():
        dora = (target, leaves[plan.leaf(path)]) if is_dora else ()
        with checks.at_path(path):
            adapter, update = resize_weight(adapters[path], target.scale, cut, *dora)
            made[path] = laid_like(adapter, adapters[path])
        sizes[path] = Size(adapter["A"].shape[-1], target.scale)
        energies[path] = update.energy
        _LOG.info("%s: resized with the rank %d", path, sizes[path].rank)
    check_finite(made)
    made |= {path: dict(adapters[path]) for path in plan.trained}
    return DerivedAdapters(made, derived_plans.with_sizes(plan, sizes), energies)


def scale_adapters(adapters: Adapters, plan: AdapterPlan, factor: float) -> DerivedAdapters:
    """Multiplies the updates of adapters by a number.

    Args:
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        factor: any finite number.

    Returns:
        The same arrays, and a plan with other scales. If the factor is 0, the plan is the
        given one and every `B` is zero, because a config cannot have the alpha 0. To switch
        adapters off for a while, use `plan.replace(scale=0)`.

    Raises:
        KeyError, TypeError: as `combine_adapters`.
        ValueError: if the factor is not finite. If it is not 1, also if an adapter has DoRA
            or the plan trains leaves: their change is not a multiple of `A @ B`, and
            `combine_adapters([adapters], plan, [factor], params=params)` multiplies it.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=4), params)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> lora_jax.scale_adapters(adapters, plan, 0.5).plan.config.alpha
        8.0
    """
    plan_checks.check_adapters(adapters, plan)
    factor = static_number("factor", factor)
    nonlinear = [p for p, own in plan.targets.items() if own.method == "dora"]
    nonlinear += plan.trained
    if nonlinear and factor != 1.0:
        raise ValueError(
            "the changes by adapters with DoRA and by trained leaves are not multiples of "
            f"A @ B, and the plan has {tree_paths.listed(nonlinear)}: use "
            "combine_adapters([adapters], plan, [factor], params=params)."
        )
    made = {path: dict(adapters[path]) for path in plan.entries}
    sizes = {}
    for path, target in plan.targets.items():
        sizes[path] = Size(target.rank, target.scale * (factor or 1.0))
        if not factor:
            made[path]["B"] = jnp.zeros_like(adapters[path]["B"])
    plan = derived_plans.with_sizes(plan, sizes)
    return DerivedAdapters(made, plan, dict.fromkeys(plan.targets, 1.0))


def _combined_leaves(
    adapters: Sequence[Adapters],
    plans: Sequence[AdapterPlan],
    weights: Sequence[float],
    leaves: Mapping[str, Any],
    union: AdapterPlan,
) -> dict[str, Adapter]:
    """`v + sum w_i (v_i - v)` of each trained leaf, with `v` the leaf of the params."""
    made = {}
    for path in union.trained:
        given = [
            (own[path][VALUE], weight)
            for own, plan, weight in zip(adapters, plans, weights, strict=True)
            if path in plan.trained and weight
        ]
        if len(given) == 1 and given[0][1] == 1.0:
            made[path] = {VALUE: given[0][0]}
            continue
        rest = 1.0 - math.fsum(weight for _, weight in given)
        values = [(jnp.asarray(value), weight) for value, weight in given]
        if abs(rest) > 1e-12 and not leaves:
            raise ValueError(
                f"at {path!r}: the weights of a trained leaf add up to {1.0 - rest:g}, so "
                "the combination needs the leaf of the params: give params=..."
            )
        if leaves:
            values.append((jnp.asarray(leaves[path]), rest))
        dtype = numerics.promote(*(value.dtype for value, _ in values))
        wide = numerics.accumulation_dtype(dtype)
        total = functools.reduce(jnp.add, (v.astype(wide) * w for v, w in values))
        made[path] = laid_like({VALUE: total.astype(dtype)}, {VALUE: values[0][0]})
    return made


def _checked_weights(weights: Any, count: int) -> list[float]:
    if not count:
        raise ValueError("adapters is empty: give the adapters to combine.")
    if weights is None:
        return [1.0] * count
    if not isinstance(weights, Sequence | np.ndarray) or isinstance(weights, str):
        raise TypeError(
            f"weights must be a list of numbers, got {weights!r:.60} "
            f"({type(weights).__name__})."
        )
    if len(weights) != count:
        raise ValueError(
            f"there must be one weight for each of the {count} adapters, got "
            f"{len(weights)}."
        )
    return [static_number(f"weights[{i}]", weight) for i, weight in enumerate(weights)]


def _checked_method(name: str, density: Any, majority: str, key: Any, cut: Cut) -> Method:
    checks.check_choice("method", name, combinations.METHODS)
    checks.check_choice("majority_sign", majority, combinations.MAJORITIES)
    uses = {
        "density": (density is not None, name in combinations.NEED_DENSITY),
        "key": (key is not None, name in combinations.NEED_KEY),
    }
    for argument, (is_given, is_needed) in uses.items():
        if is_needed and not is_given:
            raise ValueError(f"method={name!r} needs {argument}, which is None.")
        if is_given and not is_needed:
            raise ValueError(f"method={name!r} does not use {argument}: leave it out.")
    if majority != "total" and name not in combinations.ELECT:
        raise ValueError(f"method={name!r} does not use majority_sign: leave it out.")
    if cut != Cut() and name not in combinations.TRUNCATE:
        raise ValueError(
            f"method={name!r} does not use rank and energy: leave them out, use "
            "method='svd', or call resize_adapters on the result."
        )
    if key is not None:
        checks.check_key("key", key)
    return Method(
        name, 1.0 if density is None else checked_share("density", density), majority
    )


def _checked_params(params: Any, plans: Sequence[AdapterPlan]) -> dict[str, Any]:
    """The leaves of the params by path; none if there are no params."""
    if params is None:
        return {}
    leaves = tree_paths.leaf_paths(params)
    for plan in plans:
        plan_checks.check_params(leaves, plan, values=True)
    return leaves


def _checked_dora(plan: AdapterPlan, method: str, leaves: Mapping[str, Any]) -> bool:
    """Whether the targets of a plan have DoRA, after a check that this is possible."""
    paths = [path for path, own in plan.targets.items() if own.method == "dora"]
    if paths and method not in _DORA_METHODS:
        raise ValueError(
            f"method={method!r} is for LoRA, and {tree_paths.listed(paths)} have DoRA: use "
            "method='exact' or 'svd', or convert the adapters to LoRA, with "
            "extract_adapters on merged params."
        )
    if paths and not leaves:
        raise ValueError(
            f"{tree_paths.listed(paths)} have DoRA, whose column norms need the weights: "
            "give params=..."
        )
    return bool(paths)
