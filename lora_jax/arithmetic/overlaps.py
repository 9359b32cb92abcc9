"""Adapters of overlapping parts of a weight, as adapters of the whole weight."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.layers import combinations
from lora_jax.layers.combinations import Cut, Method, Term
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.plan import layout, parts
from lora_jax.plan.adapter_plan import AdapterPlan, Target


class Unified(NamedTuple):
    """Adapters whose targets are equal or disjoint."""

    adapters: list[Adapters]
    plans: list[AdapterPlan]
    changed: bool
    """Whether there were other targets."""


def unify(adapters: Sequence[Adapters], plans: Sequence[AdapterPlan]) -> Unified:
    """Makes targets of parts that overlap without being equal targets of the whole weight.

    Their factors are padded with zeros, so that the updates stay the same. Weights of which
    a part has DoRA, and those adapted for several kinds of use, are not changed.
    """
    found: dict[str, dict[tuple[str, str], Target]] = {}
    for plan in plans:
        for path, target in plan.targets.items():
            found.setdefault(plan.leaf(path), {})[path, target.method] = target
    leaves = {leaf for leaf, own in found.items() if _is_mixed([*own.values()])}
    if not leaves:
        return Unified(list(adapters), list(plans), changed=False)
    pairs = [_widened(*pair, leaves) for pair in zip(adapters, plans, strict=True)]
    return Unified([own for own, _ in pairs], [plan for _, plan in pairs], changed=True)


def _is_mixed(targets: Sequence[Target]) -> bool:
    """Whether targets of one weight overlap, and can be targets of the whole weight."""
    pairs = itertools.combinations(targets, 2)
    return {(own.method, own.use, own.shape) for own in targets} == {
        ("lora", targets[0].use, targets[0].shape)
    } and any(parts.overlap(a.part, b.part, a.shape) for a, b in pairs)


def _widened(
    adapters: Adapters, plan: AdapterPlan, leaves: set[str]
) -> tuple[Adapters, AdapterPlan]:
    made: dict[str, Adapter] = {}
    targets: dict[str, Target] = {}
    for leaf, paths in plan.by_leaf().items():
        if leaf not in leaves:
            made |= {path: dict(adapters[path]) for path in paths}
            targets |= {path: plan.targets[path] for path in paths}
            continue
        terms, first = [], plan.targets[paths[0]]
        for path in paths:
            whole, target = layout.of_whole(adapters[path], plan.targets[path])
            terms.append(Term(whole["A"], whole["B"], target.scale, 1.0))
        update = combinations.combine(terms, Method("exact"), Cut())
        path = f"{leaf}@{first.use}" if first.use else leaf
        rank = update.a.shape[-1]
        targets[path] = dataclasses.replace(first, part="", rank=rank, scale=update.scale)
        made[path] = {"A": update.a, "B": update.b}
    made |= {path: dict(adapters[path]) for path in plan.trained}
    return made, dataclasses.replace(plan, targets=targets)
