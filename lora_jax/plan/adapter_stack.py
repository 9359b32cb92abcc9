"""Adapters of many tenants in one pytree: a slot for each."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from lora_jax._core import checks, tree_paths
from lora_jax.layers import adapter_checks
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.derived_plans import union_with

__all__ = ["AdapterStack"]

# What the adapters of one weight have in common.
_IN_COMMON = ("shape", "in_axes", "out_axes", "batch_axes", "part", "use", "dropout")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "scales", "magnitudes"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """Adapters of several tenants, with the slots as the first axis of each array.

    A pytree of floating-point arrays. `jax.grad` with respect to a stack is a stack: the
    gradients of `scales` and `magnitudes` are zeros, because they are not trained.

    Attributes:
        adapters: for each path of the plan, `{"A": (slots, *batch, in, rank), "B": (slots,
            *batch, rank, out)}`, for DoRA also `"m": (slots, *batch, out)`. Factors of a
            lower rank are padded with zeros.
        scales: for each path, `(slots,)`, which multiplies `A @ B`; 0 in a slot without an
            adapter for this path. float32, or float64 for float64 adapters.
        magnitudes: for each path with DoRA, `(slots,)`, of the dtype of the scales: 1 in a
            slot that uses its `"m"`, and 0 in a slot whose columns keep the length of those
            of `W + A @ B`.
    """

    adapters: dict[str, dict[str, jax.Array]]
    scales: dict[str, jax.Array]
    magnitudes: dict[str, jax.Array]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the fields: to a type checker, trees of arrays are iterable."""
        yield from (self.adapters, self.scales, self.magnitudes)


def plan_of_all(plans: Sequence[AdapterPlan], rank: int | None) -> AdapterPlan:
    """The plan of a stack: the targets of all plans, with the scale 1.

    `rank` is that of all targets; None for the largest of each target.

    Raises:
        TypeError, ValueError: if the rank is not valid or too small, two plans do not
            agree about a weight, or there are no targets.
    """
    if rank is not None:
        checks.check_rank(rank)
    found: dict[str, tuple[int, Target]] = {}
    for i, plan in enumerate(plans):
        for path, target in plan.targets.items():
            first, joined = found.setdefault(path, (i, target))
            _check_agrees(path, f"plans[{first}]", joined, f"plans[{i}]", target)
            if rank is not None and target.rank > rank:
                raise ValueError(
                    f"at {path!r}: rank={rank} is below the rank {target.rank} of "
                    f"plans[{i}]."
                )
            own = max(joined.rank, target.rank)
            method = "dora" if "dora" in (joined.method, target.method) else "lora"
            joined = dataclasses.replace(joined, rank=own, method=method, scale=1.0)
            found[path] = first, joined
    if not found:
        raise ValueError("the plans have no targets: give adapters of one weight at least.")
    targets = {path: target for path, (_, target) in found.items()}
    if rank is not None:
        targets = {p: dataclasses.replace(own, rank=rank) for p, own in targets.items()}
    largest = max(target.rank for target in targets.values())
    return union_with(
        plans,
        targets,
        rank=largest,
        alpha=float(largest),
        rank_pattern={},
        alpha_pattern={},
        rank_stabilized=False,
        use_dora=any(target.method == "dora" for target in targets.values()),
        init="kaiming_uniform",  # a rank of the stack may be odd
        dtype=plans[0].config.dtype,
    )


def check_trains_nothing(plan: AdapterPlan) -> None:
    """Raises ValueError if a plan trains leaves without an adapter."""
    if plan.trained:
        raise ValueError(
            f"the plan trains the leaves {tree_paths.listed([*plan.trained])} without an "
            "adapter, and all slots of a stack share the params: leave them out with "
            "plan.subset(...), or make the plan without train."
        )


def slots_of(stack: Any) -> int:
    """Checks a stack, and returns the number of its slots.

    Raises:
        KeyError: if a path or an entry is missing or unknown.
        TypeError: if it is not an AdapterStack, a leaf is not a floating-point array, or
            scales or magnitudes are of fewer bits than float32.
        ValueError: if the shapes of two arrays do not fit each other, or there are none.
    """
    if not isinstance(stack, AdapterStack):
        raise TypeError(
            "stack must be an AdapterStack, which stack_adapters returns, got "
            f"{type(stack).__name__}."
        )
    if not isinstance(stack.adapters, Mapping) or not stack.adapters:
        raise ValueError(
            "stack.adapters must be a dict from paths to arrays, and not empty, got "
            f"{stack.adapters!r:.60}."
        )
    slots: list[int] = []
    for path, arrays in stack.adapters.items():
        with checks.at_path(path):
            adapter_checks.check_adapter(arrays, None, optional=("m",))
            *front, _, n_out = arrays["B"].shape
            slots = slots or front[:1]
            if front[:1] != slots or not slots:
                raise ValueError(
                    "A must be (slots, *batch, in, rank) and B (slots, *batch, rank, out), "
                    f"got {arrays['A'].shape} and {arrays['B'].shape}"
                    + (f", where other arrays have {slots[0]} slots." if slots else ".")
                )
            if "m" in arrays:
                what = "(slots, *batch, out)"
                checks.check_vector("m", arrays["m"], (*front, n_out), what)
    with_m = [path for path, arrays in stack.adapters.items() if "m" in arrays]
    for name, paths in (("scales", [*stack.adapters]), ("magnitudes", with_m)):
        given = getattr(stack, name)
        plan_checks.check_paths(f"stack.{name}", given, paths)
        for path in paths:
            own = f"stack.{name}[{path!r}]"
            checks.check_vector(own, given[path], (*slots,), "(slots,)")
            if given[path].dtype not in ("float32", "float64"):
                raise TypeError(
                    f"{own} must be float32 or float64, got {given[path].dtype}: to cast a "
                    "stack, cast its adapters alone, dataclasses.replace(stack, "
                    "adapters=...)."
                )
    return slots[0]


def check_fits(stack: AdapterStack, plan: AdapterPlan) -> None:
    """Raises unless a slot of a stack has room for the adapters of a plan.

    Raises:
        KeyError: if the stack lacks a target.
        TypeError: if `plan` is no plan.
        ValueError: if a rank is too large, a shape differs, the stack has no magnitudes for
            a target with DoRA, or the plan trains leaves.
    """
    plan_checks.check_plan(plan)
    check_trains_nothing(plan)
    for path, target in plan.targets.items():
        arrays = stack.adapters.get(path)
        if arrays is None:
            hint = tree_paths.nearest_hint(path, stack.adapters)
            raise KeyError(
                f"the plan adapts {path!r}, which the stack does not{hint}: make the stack "
                "with an adapter that has all targets."
            )
        shapes = {name: x.shape[1:] for name, x in arrays.items()}
        rank = shapes["A"][-1]
        if target.rank > rank:
            raise ValueError(
                f"at {path!r}: the rank {target.rank} of the plan is above the rank of the "
                f"stack, {rank}: make the stack with rank={target.rank}."
            )
        wanted = dataclasses.replace(target, rank=rank).adapter_shapes
        if "m" in wanted and "m" not in shapes:
            raise ValueError(
                f"at {path!r}: the plan has DoRA and the stack has LoRA, without an array "
                "for 'm': make the stack with an adapter that has DoRA for this weight."
            )
        for name, shape in wanted.items():
            if shapes[name] != shape:
                raise ValueError(
                    f"at {path!r}: {name} of a slot has the shape {shapes[name]}, and the "
                    f"plan, at the rank of the stack, {shape}: are plan and stack for the "
                    "same params?"
                )


def _check_agrees(name: str, first: str, joined: Target, second: str, own: Target) -> None:
    for field in _IN_COMMON:
        values = getattr(joined, field), getattr(own, field)
        if values[0] != values[1]:
            what = (
                "change one with plan.replace(dropout=...)"
                if field == "dropout"
                else "make the plans for the same params and the same function"
            )
            raise ValueError(
                f"at {name!r}: the {field} of {first} is {values[0]!r}, and that of "
                f"{second} is {values[1]!r}, and a stack has one for all slots: {what}."
            )
