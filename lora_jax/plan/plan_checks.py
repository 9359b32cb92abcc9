"""Checks that params, adapters, norms, scales and uses of weights fit a plan."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax._core import checks, tree_paths
from lora_jax._core.quantized import is_quantized
from lora_jax.layers import adapter_checks
from lora_jax.plan import parts
from lora_jax.plan.adapter_plan import FROM_CHECKPOINT, AdapterPlan
from lora_jax.plan.axis_roles import READ_AS, Sighting, turned
from lora_jax.plan.target import VALUE, Target, TrainedLeaf, Use

_NO_BIASES = dict.fromkeys(
    adapter_checks.BIASES,
    "an adapter of a plan has no biases, since a plan is about weights; fold this one "
    "into the layer's own bias with lora_bias_delta, and leave it out.",
)
_NO_MAGNITUDE = {
    "m": "the plan's method is 'lora', which has no magnitude: make the plan with "
    "use_dora=True, or leave it out on purpose."
}


def check_plan(plan: Any) -> None:
    """Raises unless `plan` is an AdapterPlan."""
    if not isinstance(plan, AdapterPlan):
        raise TypeError(
            f"plan must be an AdapterPlan, got {type(plan).__name__}: make one with "
            "plan_adapters(config, params, fn, *args)."
        )


def check_params(
    params_by_path: Mapping[str, Any], plan: AdapterPlan, *, values: bool = False
) -> None:
    """Raises unless the leaves of params have the paths and shapes of a plan.

    With `values`, weights of targets must also have values.

    Raises:
        KeyError: if a leaf is missing.
        TypeError: if one is not a floating-point array, or a trained leaf is quantized.
        ValueError: if one has another shape than in the plan.
    """
    check_plan(plan)
    missing = [leaf for leaf in map(plan.leaf, plan.entries) if leaf not in params_by_path]
    if missing:
        hint = tree_paths.nearest_hint(missing[0], params_by_path)
        verb = "trains" if missing[0] in plan.trained else "adapts"
        raise KeyError(
            f"params lack weights that the plan {verb}: {tree_paths.listed(missing)}{hint}."
            " Is the plan that of these params? They come first, before the adapters."
        )
    for path, entry in plan.entries.items():
        weight = params_by_path[plan.leaf(path)]
        with checks.at_path(path):
            checks.check_abstract_array("the weight", weight)
            if values and path in plan.targets:
                checks.check_has_values("the weight", weight)
            if path in plan.trained and is_quantized(weight):
                raise TypeError(
                    f"the plan trains this leaf, and it is quantized ({weight!r}): pass "
                    "the dense leaf, or adapt it instead."
                )
            if tuple(weight.shape) != entry.shape:
                raise ValueError(
                    f"the plan is for a weight of shape {entry.shape}, got "
                    f"{tuple(weight.shape)}: make the plan anew for these params."
                )


def check_adapters(adapters: Any, plan: AdapterPlan) -> None:
    """Raises unless `adapters` have the paths, entries and shapes of a plan.

    Raises:
        KeyError: if a path or an entry is missing or unknown.
        TypeError: if something is not a dict, or not a floating-point array.
        ValueError: if a shape is not the plan's, or an adapter has biases.
    """
    check_plan(plan)
    check_paths("adapters", adapters, list(plan.entries))
    for path, target in plan.targets.items():
        with checks.at_path(path):
            _check_adapter(adapters[path], target)
    for path, leaf in plan.trained.items():
        with checks.at_path(path):
            _check_trained(adapters[path], leaf)


def checked_leaves(
    params: tree_paths.PyTree, adapters: Any, plan: AdapterPlan
) -> tuple[dict[str, Any], Any]:
    """Checks params with values, and adapters; returns the leaves and the structure."""
    leaves, treedef = tree_paths.flatten(params)
    check_params(leaves, plan, values=True)
    check_adapters(adapters, plan)
    return leaves, treedef


def checked_plans(adapters: Any, plans: Any, whose: str) -> list[AdapterPlan]:
    """Checks several adapters and their plans, and returns a plan for each of them.

    `whose` is what the adapters belong to, one of each, for messages.
    """
    if not isinstance(adapters, list | tuple):
        raise TypeError(
            f"adapters must be a list or tuple with the adapters of each {whose}, got "
            f"{type(adapters).__name__}: for one {whose} write [adapters]."
        )
    one_for_all = isinstance(plans, AdapterPlan)
    if not one_for_all and not isinstance(plans, list | tuple):
        raise TypeError(
            "plans must be an AdapterPlan, or a list or tuple of them, got "
            f"{type(plans).__name__}."
        )
    plans = [plans] * len(adapters) if one_for_all else list(plans)
    if len(plans) != len(adapters):
        raise ValueError(
            f"there must be one plan for each of the {len(adapters)} adapters, or one for "
            f"all, got {len(plans)} plans."
        )
    for i, (own, plan) in enumerate(zip(adapters, plans, strict=True)):
        if hasattr(own, "adapters"):
            raise TypeError(
                f"adapters[{i}] must be a dict from paths to adapters, got "
                f"{type(own).__name__}: pass its .adapters. If they have a base of their "
                "own, as after decompose_params, convert them with to_plain_adapters."
            )
        with checks.at_path(f"adapters[{i}]"):
            check_adapters(own, plan)
    return plans


def check_paths(name: str, given: Any, paths: list[str]) -> None:
    """Raises unless `given` is a dict with exactly these paths of a plan."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name} must be a dict from paths of weights, got {type(given).__name__}: are "
            "the arguments in order (params, adapters, plan)?"
        )
    missing = [path for path in paths if path not in given]
    known = {*paths}
    unknown = [str(path) for path in given if path not in known]
    if missing or unknown:
        near = difflib.get_close_matches(unknown[0], paths, n=1) if unknown else []
        raise KeyError(
            f"{name} must have the {len(paths)} paths of the plan"
            + (f"; missing: {tree_paths.listed(missing)}" if missing else "")
            + (f"; unknown: {tree_paths.listed(unknown)}" if unknown else "")
            + (f"; the nearest is {near[0]!r}" if near else "")
            + ". Are they of another plan?"
        )


def check_column_norms(norms: Any, plan: AdapterPlan, slots: tuple[int, ...] = ()) -> None:
    """Raises unless `norms` are those of a plan's DoRA weights, with the axes `slots`."""
    targets = {p: t for p, t in plan.targets.items() if t.method == "dora"}
    check_paths("column_norms", norms, list(targets))
    what = (
        "(slots, *batch, out), of stacked_column_norms" if slots else "one for each column"
    )
    for path, target in targets.items():
        shape = (*slots, *target.adapter_shapes["m"])
        with checks.at_path(path):
            checks.check_vector("column_norms", norms[path], shape, what)


def check_scales(scales: Any, plan: AdapterPlan, column_norms: Any) -> dict[str, Any]:
    """Checks scales, which may be traced, and returns them by path.

    Raises:
        KeyError: if the plan does not adapt a path.
        TypeError: if a scale is not a real number or an array of real numbers.
        ValueError: if a scale is neither a scalar nor an array of the batch axes, or its
            weight is in `column_norms`.
    """
    if scales is None:
        return {}
    if not isinstance(scales, Mapping):
        if np.shape(scales) != ():
            raise ValueError(
                "scales must be one number for all targets, or a dict from paths to "
                f"scales, got an array of shape {np.shape(scales)}: for one scale for each "
                "layer of a stack write {path: array}."
            )
        checks.check_number("scales", scales)
        scales = dict.fromkeys(plan.targets, scales)
    unknown = [path for path in scales if path not in plan.targets]
    if unknown:
        hint = tree_paths.nearest_hint(str(unknown[0]), plan.targets)
        raise KeyError(f"scales has {unknown[0]!r}, which the plan does not adapt{hint}.")
    for path, scale in scales.items():
        batch = plan.targets[path].matrix_shape[:-2]
        with checks.at_path(path):
            if batch and np.shape(scale) == batch:
                checks.check_array("the scale", scale)
                scale = np.zeros((), scale.dtype)
            elif np.shape(scale) != ():
                raise ValueError(
                    "the scale must be a scalar"
                    + (f", or an array of the batch axes {batch}" if batch else "")
                    + f", got an array of shape {np.shape(scale)}."
                )
            checks.check_number("the scale", scale)
            if path in column_norms:
                raise ValueError(
                    "column_norms are given for a weight whose scale is in scales, and "
                    "they are those of the plan's own scale: leave them out, or write "
                    "plan.replace(scale=...) and form them with that plan."
                )
    return dict(scales)


def checked_norms(norms: Mapping[str, Any] | None, plan: AdapterPlan) -> Mapping[str, Any]:
    """Checks the column norms from before a merge, which DoRA needs, and returns them."""
    if norms is None and any(own.method == "dora" for own in plan.targets.values()):
        raise ValueError(
            "a merged DoRA weight does not contain its norms: give column_norms="
            "adapted_column_norms(params, adapters, plan), computed before the merge."
        )
    check_column_norms(norms or {}, plan)
    return norms or {}


def check_all_uses(plan: AdapterPlan) -> None:
    """Raises if an adapter is for one kind of use and its weight has other uses."""
    for path, target in plan.targets.items():
        leaf, uses = plan.leaf(path), _uses(plan, path)
        kinds = {use.kind(target.batch_axes) for use in uses} - {""}
        # A single row may be either; an entry of a stack is neither.
        if any(
            role == "moved" and axis not in target.batch_axes
            for use in uses
            for axis, role in enumerate(use.roles)
        ):
            kinds = {parts.LOOKUP, parts.PRODUCT}
        if target.use and kinds != {target.use}:
            other = "products" if target.use == parts.LOOKUP else "look-ups"
            raise ValueError(
                f"{path!r} adapts one use of {leaf!r} alone, and a merge would change the "
                f"{other} of the same array, too. Untie them first: store a copy of "
                f"{leaf!r} under another path, let the function use the copy for its "
                f"{other}, and make a new plan; or run the model with adapt."
            )


def to_be_compared(plan: AdapterPlan) -> dict[str, Target]:
    """The targets whose axes are checked against their uses; see `check_axes`."""
    return {
        path: target
        for path, target in plan.targets.items()
        if _is_of_checkpoint(plan, path)
        or not (
            plan.config.axes_of(plan.leaf(path))
            or any(_contradicts(target, use) for use in _uses(plan, path))
        )
    }


def check_axes(sightings: Sequence[Sighting], plan: AdapterPlan) -> None:
    """Raises if no use of a weight agrees with its axes in the plan.

    Not checked are axes that the user gave, and weights of which the plan records uses with
    exchanged inputs and outputs.
    """
    wrong: dict[str, Sighting] = {}
    agreed: set[str] = set()
    for sighting in sightings:
        path, letters = str(sighting.name), sighting.axes
        if letters and letters == plan.targets[path].axes:
            agreed.add(path)
        elif letters and not (
            _is_of_module(plan, path, letters) or _is_reordered(plan, path, sighting)
        ):
            wrong.setdefault(path, sighting)
    # After a part was taken, later uses agree only about the rest of the weight.
    wrong = {p: use for p, use in wrong.items() if use.moved or p not in agreed}
    if wrong:
        lines = ["the axes of weights in the plan are not those of the function:"]
        lines += [
            f"  {path!r}: the plan has the axes {plan.targets[path].axes!r} of "
            f"{plan.targets[path].shape}, the function has {use.axes!r} in "
            f"`{use.primitive}`" + (f" at {use.where}" if use.where else "")
            for path, use in wrong.items()
        ]
        lines.append(
            "Make the plan with this function, plan_adapters(config, params, fn, *args). "
            "If the plan is right, give its axes in LoraConfig(axes={path: letters}) (for "
            "a PEFT checkpoint in names={module: (path, letters)})."
        )
        raise ValueError("\n".join(lines))


def _check_adapter(adapter: Any, target: Target) -> None:
    shapes = target.adapter_shapes
    refused = _NO_BIASES | ({} if "m" in shapes else _NO_MAGNITUDE)
    adapter_checks.check_adapter(
        adapter, target.matrix_shape, required=tuple(shapes), refused=refused
    )
    for name, shape in shapes.items():
        if adapter[name].shape != shape:
            raise ValueError(
                f"adapter[{name!r}] must have the shape {shape} that the plan has for "
                f"rank {target.rank}, got {adapter[name].shape}."
            )


def _check_trained(adapter: Any, leaf: TrainedLeaf) -> None:
    if not isinstance(adapter, Mapping) or set(adapter) != {VALUE}:
        got = sorted(adapter) if isinstance(adapter, Mapping) else type(adapter).__name__
        raise KeyError(
            f"the plan trains this leaf without an adapter: expected {{{VALUE!r}: array}}, "
            f"got {got}."
        )
    checks.check_vector(VALUE, adapter[VALUE], leaf.shape, "that of the leaf")


def _contradicts(target: Target, use: Use) -> bool:
    """Whether a recorded use disagrees with the axes of a plan."""
    pairs = zip(target.axes, use.roles, target.shape, strict=False)
    return any(
        letter != "b" and size > 1 and READ_AS.get(role, letter) != letter
        for letter, role, size in pairs
    )


def _is_reordered(plan: AdapterPlan, path: str, sighting: Sighting) -> bool:
    """Whether the plan records a product that shows the role of a looked-up axis.

    If that product is merged here, its use does not show the axes.
    """
    return sighting.primitive == "gather" and any(
        "moved" in use.roles for use in _uses(plan, path)
    )


def _uses(plan: AdapterPlan, path: str) -> tuple[Use, ...]:
    """The uses that the plan records of a target's weight."""
    return plan.uses.get(plan.leaf(path), ())


def _is_of_checkpoint(plan: AdapterPlan, path: str) -> bool:
    return any(use.where == FROM_CHECKPOINT for use in _uses(plan, path))


def _is_of_module(plan: AdapterPlan, path: str, letters: str) -> bool:
    """Whether a use splits a PEFT module's matrix in another way, such as into heads."""
    return _is_of_checkpoint(plan, path) and letters != turned(plan.targets[path].axes)
