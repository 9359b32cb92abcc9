"""Plans with other ranks and scales than a given plan, and configs that agree with them."""

import collections
import dataclasses
import glob
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax._core import checks
from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.config import resolved_scale

# Numbers with a smaller relative difference are equal up to rounding.
_SAME = 1e-12
_IN_COMMON = ("shape", "in_axes", "out_axes", "batch_axes")


class Size(NamedTuple):
    """The rank and the scale of an adapter."""

    rank: int
    scale: float


def with_sizes(
    plan: AdapterPlan, sizes: Mapping[str, Size], *, by_path: bool = False
) -> AdapterPlan:
    """The plan with other ranks and scales, and a config that agrees with it.

    `plan_adapters` with this config makes the same plan. Scales may change in the last bit,
    because a config has alphas. A config cannot have the alpha 0: a target with the scale 0
    differs from its config.

    Args:
        plan: of some adapters.
        sizes: of each target, by its path.
        by_path: whether the config lists the paths of the targets, in place of its
            patterns. It does so in any case if a target is a part of a weight.
    """
    config, targets = plan.config, plan.targets
    if by_path or any(target.suffix for target in targets.values()):
        paths = [exact_pattern(path, target) for path, target in targets.items()]
        fields: Any = {"targets": paths, "exclude": ()}
        config = dataclasses.replace(config, rank_pattern={}, alpha_pattern={}, **fields)
    root = config.rank_stabilized
    alphas = {
        path: size.scale * (math.sqrt(size.rank) if root else size.rank)
        for path, size in sizes.items()
    }
    ranks = {path: size.rank for path, size in sizes.items()}
    rank, rank_pattern = _values(plan, config.rank, config.rank_pattern, ranks)
    alpha, alpha_pattern = _values(plan, config.alpha, config.alpha_pattern, alphas)
    odd = any(own % 2 for own in (rank, *rank_pattern.values()))
    config = dataclasses.replace(
        config,
        rank=rank,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        # This initializer is for even ranks only.
        init="kaiming_uniform" if odd and config.init == "orthogonal" else config.init,
    )
    changed = {}
    for path, target in targets.items():
        size = sizes[path]
        pattern = _first_match(config.alpha_pattern, path, target)
        own = config.alpha if pattern is None else config.alpha_pattern[pattern]
        scale = resolved_scale(config, size.rank, own) if size.scale else 0.0
        changed[path] = dataclasses.replace(target, rank=size.rank, scale=scale)
    fields = plan.skipped, plan.uses, plan.total, plan.trained
    return AdapterPlan(config, changed, *fields)


def union_of(plans: Sequence[AdapterPlan]) -> tuple[AdapterPlan, bool]:
    """The plan of the targets of all plans, and whether its config must list the paths.

    Ranks and scales are those of the first plan that has a target.
    """
    targets: dict[str, Target] = {}
    for i, plan in enumerate(plans):
        for path, target in plan.targets.items():
            own = targets.setdefault(path, target)
            for name in _IN_COMMON:
                if getattr(own, name) != getattr(target, name):
                    raise ValueError(
                        f"at {path!r}: the {name} in plans[{i}] is "
                        f"{getattr(target, name)}, and in another plan "
                        f"{getattr(own, name)}: make the plans for the same params and the "
                        "same function."
                    )
    every = [target for plan in plans for target in plan.targets.values()]
    rates = {target.dropout for target in every}
    shared: Any = {"dropout": rates.pop() if len(rates) == 1 else 0.0}
    method = "dora" if any(target.method == "dora" for target in every) else "lora"
    first = plans[0].config
    targets = {
        p: dataclasses.replace(t, method=method, **shared) for p, t in targets.items()
    }
    union = union_with(
        plans,
        targets,
        use_dora=method == "dora",
        init=first.init,
        dtype=first.dtype,
        rank=first.rank,
        rank_pattern=first.rank_pattern,
        **shared,
    )
    chosen = {(own.config.targets, own.config.exclude, *own.targets) for own in plans}
    return union, len(chosen) > 1


def union_with(
    plans: Sequence[AdapterPlan], targets: Mapping[str, Target], **fields: Any
) -> AdapterPlan:
    """The union of plans, with other targets by path, and other fields of their configs."""
    union = None
    for i, plan in enumerate(plans):
        own = {path: targets[path] for path in plan.targets}
        config = dataclasses.replace(plan.config, **fields)
        rest = plan.skipped, plan.uses, plan.total, plan.trained
        alike = AdapterPlan(config, own, *rest)
        with checks.at_path(f"plans[{i}]"):
            union = alike if union is None else union | alike
    assert union is not None
    return union


def exact_pattern(path: str, target: Target) -> str:
    """A pattern that matches exactly one target; special characters are escaped."""
    pattern = glob.escape(path.removesuffix(target.suffix))
    pattern = f"[r]{pattern[1:]}" if pattern.startswith("re:") else pattern
    return pattern + target.suffix


def _values(
    plan: AdapterPlan, default: Any, patterns: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A default and values of patterns that give each target its value; 0 has none.

    Each pattern has the most frequent value of its targets, and targets with another value
    have their own patterns. The first matching pattern wins, and these come first.
    """
    groups: dict[str | None, dict[str, Any]] = {}
    for path, value in values.items():
        if value:
            pattern = _first_match(patterns, path, plan.targets[path])
            groups.setdefault(pattern, {})[path] = value
    chosen, own = {None: default, **patterns}, {}
    for pattern, group in groups.items():
        value = collections.Counter(group.values()).most_common(1)[0][0]
        if not _same(value, chosen[pattern]):
            chosen[pattern] = value
        for path, value in group.items():
            if not _same(value, chosen[pattern]):
                own[exact_pattern(path, plan.targets[path])] = value
    return chosen.pop(None), {**own, **chosen}


def _first_match(patterns: Mapping[str, Any], path: str, target: Target) -> str | None:
    return parts.first_match(patterns, path, target.suffix, target.shape)


def _same(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=_SAME)
