"""Adapters of many tenants on one base: stacked, put into a slot, and taken out again.

A stack multiplies `A @ B` by its own `scales`, which differ between slots. So every scale
of the plan of a stack is 1.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import checks, numerics, placement
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.model.column_norms import adapted_column_norms
from lora_jax.model.slot_arrays import (
    RANK_AXIS,
    cut_rank,
    filled_slot,
    find_slot,
    or_nan,
    read_slot,
    stack_arrays,
    vector_of_slots,
    write_slot,
)
from lora_jax.plan import adapter_stack, plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.adapter_stack import AdapterStack

__all__ = ["put_adapters", "stack_adapters", "stacked_column_norms", "take_adapters"]


def stack_adapters(
    adapters: Sequence[Adapters],
    plans: AdapterPlan | Sequence[AdapterPlan],
    slots: int | None = None,
    rank: int | None = None,
) -> tuple[AdapterStack, AdapterPlan]:
    """Stacks the adapters of several tenants, the first ones in the first slots.

    Ranks, scales, methods and targets may differ. Factors of a lower rank are padded with
    zeros. A slot without an adapter for a target has zeros, and does not change the weight.
    If one adapter of a target has DoRA, the target of the stack has DoRA; the slots with
    LoRA have the magnitudes 0 there, which give a column factor of exactly 1.

    All slots share the params. Adapters of `decompose_params`, and of `peft.load` with new
    base weights in `replaced`, have a base of their own, which the arrays do not show:
    convert them first, with `to_plain_adapters`.

    Args:
        adapters: a list or tuple with the adapters of each tenant, at least one.
        plans: the plan of each, or one plan for all. They are for the same params and the
            same function.
        slots: the number of slots, at least the number of adapters, which is the default.
            The slots behind the adapters are empty.
        rank: of all targets of the stack, at least the largest rank of the plans. The
            default is, for each target, the largest rank of its adapters.

    Returns:
        The stack, and its plan, which describes one slot: it has the targets of all plans,
        and every scale is 1. Its config has the rank of the stack, the default `init`, and
        otherwise the fields of the first plan, with the patterns of all plans.

        Each array of the stack has the widest dtype of its adapters. It has the sharding of
        the first of its adapters that lies on a mesh, with the slot axis in front, which is
        not split. If none of them lies on a mesh, the array is replicated over the mesh of
        the other arrays. So are the scales and magnitudes. Inside a trace, axes of type
        `Explicit` are known and others are not.

    Raises:
        KeyError: if the paths or entries of the adapters are not those of their plan.
        TypeError: if an argument has the wrong type.
        ValueError: if there are no adapters or targets, or not as many plans; `slots` or
            `rank` is too small; a plan trains leaves; an adapter has biases; two plans have
            different shapes, axes, uses or dropout rates for one weight, targets that
            overlap, or different equations for one function; or the plans are for different
            params.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> plans = [
        ...     lora_jax.plan_adapters(lora_jax.LoraConfig(rank=rank, alpha=8.0), params)
        ...     for rank in (2, 4)
        ... ]
        >>> key = jax.random.key(0)
        >>> tenants = [lora_jax.init_adapters(key, params, plan) for plan in plans]
        >>> stack, plan = lora_jax.stack_adapters(tenants, plans, slots=3)
        >>> jax.tree.map(jnp.shape, stack.adapters)
        {'query': {'A': (3, 64, 4), 'B': (3, 4, 32)}}
        >>> stack.scales["query"].tolist(), plan.scales
        ([4.0, 2.0, 0.0], {'query': 1.0})
    """
    if isinstance(adapters, list | tuple) and not adapters:
        raise ValueError(
            "adapters is empty, and a stack takes its dtypes and shardings from adapters: "
            "give those of one tenant at least, such as init_adapters(key, params, plan)."
        )
    plans = plan_checks.checked_plans(adapters, plans, "tenant")
    for i, plan in enumerate(plans):
        with checks.at_path(f"adapters[{i}]"):
            adapter_stack.check_trains_nothing(plan)
    count = len(adapters)
    slots = count if slots is None else checks.as_index("slots", slots)
    if not count <= slots < 2**31:
        raise ValueError(
            f"slots must be at least the number of adapters, {count}, and below 2**31, got "
            f"{slots}."
        )
    plan = adapter_stack.plan_of_all(plans, rank)
    stacked, scales, magnitudes = {}, {}, {}
    on_mesh = filter(None, map(placement.sharding_on_mesh, jax.tree.leaves(list(adapters))))
    mesh = next((NamedSharding(own.mesh, PartitionSpec()) for own in on_mesh), None)
    for path, target in plan.targets.items():
        own = [given.get(path, {}) for given in adapters]
        with checks.at_path(path):
            stacked[path] = {
                name: stack_arrays([a.get(name) for a in own], name, shape, slots, mesh)
                for name, shape in target.adapter_shapes.items()
            }
        like = stacked[path]["A"]
        scales[path] = vector_of_slots([_scale(own, path) for own in plans], like)
        if target.method == "dora":
            magnitudes[path] = vector_of_slots(["m" in adapter for adapter in own], like)
    return AdapterStack(stacked, scales, magnitudes), plan


def put_adapters(
    stack: AdapterStack, slot: int | jax.Array, adapters: Adapters, plan: AdapterPlan
) -> AdapterStack:
    """Puts the adapters of one tenant into a slot of a stack.

    `jax.jit(put_adapters, static_argnums=3, donate_argnums=0)` writes in place, and is
    compiled once for all slots and all adapters of one plan.

    Args:
        stack: a stack.
        slot: an integer, or a traced scalar of any integer dtype, from 0 to the number of
            slots - 1.
        adapters: the adapters of the tenant.
        plan: the plan of these adapters, for the same params and the same function as the
            stack. Its ranks are at most those of the stack. A target of the stack that the
            plan lacks becomes zero in this slot.

    Returns:
        A stack with the dtypes and shardings of the given one. If `slot` is traced and out
        of range, nothing is written, and the scales of **all** slots are NaN: then the
        outputs of all slots are NaN, and no adapter is lost.

    Raises:
        IndexError: if `slot` is not traced, and out of range.
        KeyError: if the paths or entries of the adapters are not those of the plan, or the
            stack lacks a target of the plan.
        TypeError: if an argument has the wrong type, or the dtype of the stack would round
            the adapters.
        ValueError: if a shape is not the plan's or not the stack's, a rank is above the
            stack's, the stack has LoRA for a target with DoRA, the plan trains leaves, or
            an adapter has biases.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> stack, _ = lora_jax.stack_adapters([adapters], plan, slots=3)
        >>> put = jax.jit(lora_jax.put_adapters, static_argnums=3, donate_argnums=0)
        >>> put(stack, 2, adapters, plan).scales["query"].tolist()
        [8.0, 0.0, 8.0]
    """
    place = find_slot(slot, adapter_stack.slots_of(stack))
    plan_checks.check_adapters(adapters, plan)
    adapter_stack.check_fits(stack, plan)
    stacked = {}
    for path, arrays in stack.adapters.items():
        own = adapters.get(path, {})
        with checks.at_path(path):
            stacked[path] = {
                name: write_slot(
                    x, filled_slot(own.get(name), name, x.shape[1:], x.dtype), place
                )
                for name, x in arrays.items()
            }
    scales = {
        path: or_nan(write_slot(x, jnp.asarray(_scale(plan, path), x.dtype), place), place)
        for path, x in stack.scales.items()
    }
    magnitudes = {
        path: write_slot(x, jnp.asarray("m" in adapters.get(path, {}), x.dtype), place)
        for path, x in stack.magnitudes.items()
    }
    return AdapterStack(stacked, scales, magnitudes)


def take_adapters(
    stack: AdapterStack,
    slot: int | jax.Array,
    rank: int | None = None,
    plan: AdapterPlan | None = None,
) -> dict[str, Adapter]:
    """Takes the adapters of one tenant out of a slot of a stack.

    The stack keeps them. The result has no scale: the plan of the tenant has it. Checks
    that depend on values are made outside a trace only. Inside, entries that the result has
    no place for are dropped.

    Args:
        stack: a stack.
        slot: as in `put_adapters`.
        rank: of the result, at most the stack's. None means that of the plan, or of the
            stack.
        plan: the plan of the tenant: the result has its targets, ranks and entries, and
            goes with it to `adapt`, `save_adapters` and `peft.save`. None means all
            targets of the stack, with `"m"` where the stack has it, for the stack's plan.

    Returns:
        `{path: {"A": (*batch, in, rank), "B": (*batch, rank, out)}}`, and `"m"` for DoRA,
        with the dtypes and shardings of the stack. NaN if `slot` is traced and out of
        range.

    Raises:
        IndexError: if `slot` is not traced, and out of range.
        KeyError: if the stack lacks a target of the plan.
        TypeError: if an argument has the wrong type.
        ValueError: if both `rank` and `plan` are given; a rank is above the stack's; a
            shape is not the plan's; the plan trains leaves; or, outside a trace, an entry
            would be lost that is not zero, or the method or the scale of a target in the
            slot is not that of the plan.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> stack, _ = lora_jax.stack_adapters([adapters], plan, slots=3, rank=8)
        >>> taken = lora_jax.take_adapters(stack, 0, plan=plan)
        >>> jax.tree.map(jnp.array_equal, taken, adapters)
        {'query': {'A': Array(True, dtype=bool), 'B': Array(True, dtype=bool)}}
    """
    place = find_slot(slot, adapter_stack.slots_of(stack))
    names = {path: (*arrays,) for path, arrays in stack.adapters.items()}
    ranks = {path: arrays["A"].shape[-1] for path, arrays in stack.adapters.items()}
    if plan is not None:
        if rank is not None:
            raise ValueError(
                f"rank={rank!r} and plan are both given, and the plan has ranks: leave one "
                "of them out."
            )
        adapter_stack.check_fits(stack, plan)
        names = {path: (*own.adapter_shapes,) for path, own in plan.targets.items()}
        ranks = {path: own.rank for path, own in plan.targets.items()}
    elif rank is not None:
        checks.check_rank(rank)
        for path, own in ranks.items():
            if rank > own:
                raise ValueError(
                    f"at {path!r}: rank {rank} is above the rank of the stack, {own}."
                )
        ranks = dict.fromkeys(ranks, rank)
    own = {
        path: {name: read_slot(x, place) for name, x in arrays.items()}
        for path, arrays in stack.adapters.items()
    }
    if not any(isinstance(x, Tracer) for x in (slot, *jax.tree.leaves(stack))):
        _check_complete(stack, operator.index(slot), own, names, ranks, plan)
    return {
        path: {
            name: cut_rank(own[path][name], name, 0, ranks[path]) for name in names[path]
        }
        for path in names
    }


def stacked_column_norms(
    params: Any, stack: AdapterStack, plan: AdapterPlan
) -> dict[str, jax.Array]:
    """Computes DoRA's column norms of each slot, for `adapt_rows(..., column_norms=...)`.

    Args:
        params: the base of all slots.
        stack: a stack.
        plan: of the stack.

    Returns:
        `{path: (slots, *batch, out)}` for the targets with DoRA: the norms of the columns
        of `W + scale * A @ B`, at least float32, computed for one slot after the other.
        They are constants in the backward pass.

    Raises:
        KeyError: if the stack has other paths than the plan, or params lack one.
        TypeError: if an argument has the wrong type.
        ValueError: if the shape of an array is not the plan's.

    References:
        Liu et al., 2024, section 4.3, https://arxiv.org/abs/2402.09353.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32))}
        >>> config = lora_jax.LoraConfig(rank=2, use_dora=True)
        >>> plan = lora_jax.plan_adapters(config, params)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> stack, plan = lora_jax.stack_adapters([adapters], plan, slots=3)
        >>> lora_jax.stacked_column_norms(params, stack, plan)["query"].shape
        (3, 32)
    """
    adapter_stack.slots_of(stack)
    adapter_stack.check_fits(stack, plan)

    def of_slot(own: tuple[Adapters, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
        adapters, scales = own
        scaled = {
            path: {**adapter, "B": numerics.multiply(_wide(adapter["B"]), scales[path])}
            for path, adapter in adapters.items()
        }
        return adapted_column_norms(params, scaled, plan)

    return lax.map(of_slot, (stack.adapters, stack.scales))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(numerics.accumulation_dtype(x.dtype))


def _check_complete(
    stack: AdapterStack,
    slot: int,
    own: Mapping[str, Adapter],
    names: Mapping[str, Sequence[str]],
    ranks: Mapping[str, int],
    plan: AdapterPlan | None,
) -> None:
    """Raises unless the result has everything of a slot, and the plan its scales."""
    rest = {
        path: [
            jnp.any(cut_rank(adapter[name], name, ranks.get(path, 0), None) != 0)
            for name in RANK_AXIS
            if ranks.get(path, 0) < adapter["A"].shape[-1]
        ]
        for path, adapter in own.items()
    }
    lost, scales, magnitudes = jax.device_get((rest, stack.scales, stack.magnitudes))
    hint = "give the plan of the adapters in this slot"
    for path in own:
        has_m = path in magnitudes and bool(magnitudes[path][slot])
        if path not in names:
            if any(lost[path]) or has_m:
                raise ValueError(
                    f"at {path!r}: slot {slot} has an adapter, and the plan none: {hint}."
                )
            continue
        if has_m != ("m" in names[path]):
            raise ValueError(
                f"at {path!r}: slot {slot} has {'' if has_m else 'no '}DoRA, and the "
                f"result would be {'without' if has_m else 'with'} 'm': {hint}."
            )
        if any(lost[path]):
            raise ValueError(
                f"at {path!r}: slot {slot} has entries behind the rank {ranks[path]} that "
                f"are not zero: give a larger rank, or {hint}."
            )
        scale = scales[path][slot]
        if plan is not None and scale != scale.dtype.type(plan.targets[path].scale):
            raise ValueError(
                f"at {path!r}: the scale of slot {slot} is {scale}, and that of the "
                f"plan is {plan.targets[path].scale}: {hint}."
            )


def _scale(plan: AdapterPlan, path: str) -> float:
    """The scale of a target; 0 if the plan lacks it."""
    return plan.scales.get(path, 0.0)
