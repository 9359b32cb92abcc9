"""Takes adapters out of the trees of other JAX libraries."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, Literal, NamedTuple

import jax

from lora_jax._core import checks, tree_paths
from lora_jax._core.tree_paths import Tree
from lora_jax.foreign_trees.layouts import (
    LAYOUTS,
    OF_FUNCTION,
    Group,
    Layout,
    as_adapter,
    find_groups,
    is_weight,
    looks_like_factor,
    rank_of,
    read_groups,
)
from lora_jax.layers import adapter_checks
from lora_jax.layers.lora import Adapter
from lora_jax.model import sharding
from lora_jax.model.adapters import plan_adapters
from lora_jax.plan import axis_roles, derived_plans, parts, plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig
from lora_jax.plan.derived_plans import Size
from lora_jax.plan.target import Target
from lora_jax.transform.discovery import grouped_kernels

__all__ = ["FoundAdapter", "FoundWeight", "ImportedAdapters", "import_adapters"]


_ARRAY = re.compile("/array")  # of a weight that qwix quantized
_WITHOUT = "the tree has no adapter for it"


class FoundWeight(NamedTuple):
    """A weight that a tree may have an adapter for, as a layout of your own gets it."""

    path: str
    """Of the weight in the tree."""
    weight: Any
    beside: dict[str, Any]
    """The other leaves of the same module, by their paths from there: `"lora/a"`."""


class FoundAdapter(NamedTuple):
    """The adapter of a weight, as a layout of your own returns it."""

    adapter: Adapter
    """`A (*batch, in, rank)`, `B (*batch, rank, out)`, for DoRA also `m (*batch, out)`."""
    axes: str
    """One letter for each axis of the weight, as in `LoraConfig.axes`."""
    leaves: Collection[str]
    """The names in `beside` of the leaves that are this adapter."""


class ImportedAdapters(NamedTuple, Generic[Tree]):
    """The result of `import_adapters`."""

    params: Tree
    """The tree without the leaves of the adapters."""
    adapters: dict[str, Adapter]
    """Like the adapters of `init_adapters`."""
    plan: AdapterPlan
    """Like the plan of `plan_adapters`."""


def import_adapters(
    params: Tree,
    layout: Literal["qwix", "openpi", "gemma"]
    | Callable[[FoundWeight], FoundAdapter | None],
    fn: Callable[..., Any] | None = None,
    *args: Any,
    scale: float | Mapping[str, float] | None = None,
    axes: Mapping[str, str] | None = None,
) -> ImportedAdapters[Tree]:
    """Takes adapters out of a tree in which another library trained them.

    The layouts are:

    - `"qwix"`, also for tunix and MaxText: `kernel_lora_a` and `kernel_lora_b` beside
      `kernel`.
    - `"openpi"`: `lora_a` and `lora_b` beside `w`, and `linear_lora_a` and `linear_lora_b`
      beside `linear` in a feed-forward module.
    - `"gemma"`: `lora/a` and `lora/b` beside the weight, as DeepMind's gemma writes them.

    A function is a layout of your own. It is called for each floating-point leaf with two
    axes or more, and returns its adapter, or None.

    The shapes of the factors must show the axes of each weight, or the traced function or
    `axes` give them. What fits two readings is an error, which lists both.

    Args:
        params: a pytree that holds weights and adapters: a dict, an `nnx.State`, params of
            Flax linen.
        layout: the name of a layout, or a function.
        fn: the model without adapters, called as `fn(params, *args)` with the params of the
            result. It is traced, and nothing is computed. Give keyword arguments with
            `functools.partial`.
        args: further arguments of `fn`, which may be `jax.ShapeDtypeStruct`s.
        scale: what the library multiplies `A @ B` by, because no tree has it: a number, or
            a dict from patterns of the paths of weights to numbers. The first matching
            pattern wins. None for `"gemma"`, which multiplies by nothing. The feed-forward
            modules of openpi do not use their scale, so it is 1 for them.
        axes: a dict from patterns of paths of weights to letters, as in `LoraConfig.axes`.

    Returns:
        The params without the leaves of the adapters; the adapters, in their own dtypes;
        and their plan. Mappings keep their type, so an `nnx.State` stays one; a node of
        another type, such as an Equinox module, has None in place of an adapter. Where a
        library shares `B` among the entries of a batch axis, each entry gets a copy. Where
        openpi sums heads before it multiplies by `B`, `B` is that sum, in at least float32.
        The libraries adapt products only: a table that `fn` also looks up rows of has the
        path `"embedding@product"`.

    Raises:
        TypeError: if an argument has the wrong type, or a factor is not an array of
            floating-point values.
        ValueError: if there is no adapter, a factor lacks its counterpart or its weight,
            shapes do not fit or do not show the axes, or the scale of a weight is missing.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> tree = {
        ...     "query": {
        ...         "kernel": jnp.ones((8, 6)),
        ...         "kernel_lora_a": jnp.ones((8, 2)),
        ...         "kernel_lora_b": jnp.ones((2, 6)),
        ...     }
        ... }
        >>> params, adapters, plan = lora_jax.import_adapters(tree, "qwix", scale=0.5)
        >>> params["query"].keys(), adapters["query/kernel"]["A"].shape
        (dict_keys(['kernel']), (8, 2))
        >>> merged = lora_jax.merge_adapters(params, adapters, plan)
        >>> float(merged["query"]["kernel"][0, 0])
        2.0
    """
    _check_function(fn, args)
    rules, stated = OF_FUNCTION, LoraConfig(axes={} if axes is None else axes)
    if not callable(layout):
        checks.check_choice("layout", layout, [*LAYOUTS])
        rules = LAYOUTS[layout]
    elif stated.axes:
        raise ValueError(
            "the layout is a function, which returns the axes of weights: leave axes out."
        )
    leaves = tree_paths.leaf_paths(params)
    groups = _called(layout, leaves) if callable(layout) else find_groups(rules, leaves)
    _check_groups(groups, rules, leaves)
    if scale is None and rules.scale and any(group.has_scale for group in groups):
        raise ValueError(f"scale is missing, because no tree has it: {rules.scale}.")
    weights = tuple(dict.fromkeys(path for group in groups for path in group.weights))
    tree_paths.check_matched("axes", stated.axes, weights, "weight with an adapter")
    letters = {path: own for path in weights if (own := stated.axes_of(path)) is not None}
    for path, own in letters.items():
        _check_letters(path, own, leaves[path])
    letters |= {group.weights[0]: group.letters for group in groups if group.letters}
    base = tree_paths.without_leaves(
        params, {path for group in groups for path in group.leaves}
    )
    plan = None
    if fn is not None:
        config = LoraConfig(rank=1, targets=weights, axes=letters)
        try:
            plan = plan_adapters(config, base, fn, *args)
            if tied := _tied(plan) if rules is not OF_FUNCTION else ():
                own = (f"{p}@{parts.PRODUCT}" if p in tied else p for p in plan.targets)
                config = dataclasses.replace(config, targets=tuple(own))
                plan = plan_adapters(config, base, fn, *args)
        except ValueError as error:
            error.add_note(
                "import_adapters adapts each weight that has an adapter in the tree. If fn "
                "cannot show the axes of one, leave fn out and give axes={path: letters}."
            )
            raise
        letters = {plan.leaf(path): target.axes for path, target in plan.targets.items()}
        _check_convolutions(rules, plan, lambda: grouped_kernels(fn, base, args))
    read = read_groups(rules, groups, letters, leaves)
    scales = _scales(scale, rules, {path: group for path, (group, _) in read.items()})
    targets, adapters = {}, {}
    uses = (
        {} if plan is None else {plan.leaf(p): own.use for p, own in plan.targets.items()}
    )
    for path in filter(read.__contains__, leaves):
        (group, reading), shape = read[path], tuple(leaves[path].shape)
        with checks.at_path(path):
            target = Target(
                shape=shape,
                method="dora" if "m" in group.arrays else "lora",
                rank=rank_of(reading, group.arrays["A"].shape),
                scale=scales[path],
                dropout=0.0,
                **axis_roles.from_letters(reading.letters, shape)._asdict(),
                use=uses.get(path, ""),
            )
            targets[path + target.suffix] = target
            adapters[path + target.suffix] = as_adapter(reading, target, group.arrays)
    config = _config_of(targets)
    plan = plan or plan_adapters(config, base)
    others = dict.fromkeys((p for p in weights if p not in read), _WITHOUT)
    skipped = {**plan.skipped, **others}
    plan = AdapterPlan(config, targets, skipped, plan.uses, plan.total)
    plan_checks.check_adapters(adapters, plan)
    plan = dataclasses.replace(plan, layout=sharding.layout_of(leaves, plan))
    return ImportedAdapters(base, adapters, plan)


def _check_function(fn: Any, args: tuple[Any, ...]) -> None:
    order = "the order is import_adapters(params, layout, fn, *args)"
    if fn is None and args:
        raise TypeError(f"there are arguments and no function: {order}.")
    if fn is not None and not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}: {order}.")


def _tied(plan: AdapterPlan) -> set[str]:
    """The weights that are also looked up: the libraries adapt only their products."""
    return {
        path
        for path, target in plan.targets.items()
        if {use.kind(target.batch_axes) for use in plan.uses[path]} >= {*parts.USES}
    }


def _check_convolutions(
    rules: Layout, plan: AdapterPlan, find_grouped: Callable[[], set[str]]
) -> None:
    """Raises for a convolution with groups: A has these too, so A @ B is not the update."""
    kernels = [
        path
        for path in plan.by_leaf()
        if any(use.primitive == "conv_general_dilated" for use in plan.uses.get(path, ()))
    ]
    grouped = find_grouped() if kernels and rules is not OF_FUNCTION else set()
    for path in kernels:
        if path in grouped:
            raise ValueError(
                f"{path!r} is the kernel of a convolution with feature groups: the library "
                "convolves with A in groups as well, which is no update of the kernel."
            )


def _check_letters(path: str, letters: str, weight: Any) -> None:
    if len(letters) != len(weight.shape):
        raise ValueError(
            f"at {path!r}: the axes are {letters!r}, and the shape of the weight is "
            f"{tuple(weight.shape)}: expected one letter for each axis."
        )


def _called(
    layout: Callable[[FoundWeight], FoundAdapter | None], leaves: Mapping[str, Any]
) -> list[Group]:
    """The adapters that a layout of the user's own finds."""
    groups: list[Group] = []
    owners: dict[str, str] = {}
    plain = {path: tree_paths.without_box(path) for path in leaves}
    modules: dict[str, dict[str, str]] = {"": {own: path for path, own in plain.items()}}
    for path, own in plain.items():
        for at in filter(None, (i for i, letter in enumerate(own) if letter == "/")):
            modules.setdefault(own[:at], {})[own[at + 1 :]] = path
    for path, leaf in leaves.items():
        if not is_weight(leaf):
            continue
        module = modules[plain[path].rpartition("/")[0]]
        inside = {name: other for name, other in module.items() if other != path}
        beside = {name: leaves[other] for name, other in inside.items()}
        with checks.at_path(path):
            found = layout(FoundWeight(path, leaf, beside))
            if found is None:
                continue
            _check_found(found, beside)
        _check_letters(path, found.axes, leaf)
        own = tuple(inside[name] for name in found.leaves)
        for other in own:
            if other in owners:
                raise ValueError(
                    f"the layout takes the leaf {other!r} for the weights "
                    f"{owners[other]!r} and {path!r}: a leaf belongs to one adapter."
                )
            owners[other] = path
        arrays = dict(found.adapter)
        groups.append(Group(path, (path,), arrays, own, letters=found.axes))
    return groups


def _check_found(found: Any, beside: Collection[str]) -> None:
    """Raises unless a layout returned an adapter made of leaves beside the weight."""
    if not isinstance(found, FoundAdapter):
        raise TypeError(
            "the layout must return a FoundAdapter, or None for a weight without an "
            f"adapter, got {type(found).__name__}."
        )
    adapter_checks.check_adapter(found.adapter, None, optional=("m",))
    LoraConfig(axes={"*": found.axes})
    if isinstance(found.leaves, str) or not found.leaves:
        raise TypeError(
            "leaves must be a tuple of names in beside, those of the adapter's leaves, "
            f"got {found.leaves!r}."
        )
    for name in found.leaves:
        if name not in beside:
            hint = tree_paths.nearest_hint(name, beside)
            raise ValueError(f"leaves has {name!r}, and beside has no such name{hint}.")


def _check_groups(groups: list[Group], rules: Layout, leaves: Mapping[str, Any]) -> None:
    """Raises unless each leaf that looks like a factor is one, and has its weight."""
    taken = {path for group in groups for path in group.leaves}
    quantized = {path[: at.start()] for path in leaves for at in _ARRAY.finditer(path)}
    lines = [
        f"  {path!r}: it looks like a factor, and is none in this layout"
        for path in leaves
        if looks_like_factor(path) and path not in taken
    ]
    for group in groups:
        names = tree_paths.listed([*group.leaves])
        if not {"A", "B"} <= {*group.arrays}:
            lines.append(f"  {names}: the other factor of the adapter is missing")
        elif group.name in quantized:
            lines.append(f"  {names}: {group.name!r} is quantized: dequantize it first")
        elif not group.weights:
            what = "of floating-point values and with two axes or more"
            lines.append(f"  {names}: there is no weight {group.name!r} {what}")
        for path in group.weights:
            if sum(size > 1 for size in leaves[path].shape) < 2:
                shape = tuple(leaves[path].shape)
                lines.append(
                    f"  {names}: the weight {path!r} is a vector, {shape}, so A @ B has no "
                    "lower rank: add scale * A @ B to it, and take these leaves out"
                )
        for path in group.leaves:
            with checks.at_path(path):
                checks.check_array("the leaf of an adapter", leaves[path])
    if groups and not lines:
        return
    better = [
        name
        for name, other in LAYOUTS.items()
        if sum(bool(own.weights) for own in find_groups(other, leaves)) > len(groups)
    ]
    hint = f" The tree looks like layout={better[0]!r}." if better else ""
    if lines:
        text = "\n".join(["leaves of adapters do not fit the layout:", *lines])
        raise ValueError(f"{text}\nThe layout has {rules.names}.{hint}")
    raise ValueError(
        f"params have no adapters in this layout, which has {rules.names}; the first paths "
        f"are {tree_paths.listed([*leaves]) or 'none'}.{hint}"
    )


def _scales(scale: Any, rules: Layout, groups: Mapping[str, Group]) -> dict[str, float]:
    """The scale of each weight by its path; 1 where the library multiplies by none."""
    scaled = [path for path, group in groups.items() if group.has_scale]
    if not isinstance(scale, Mapping):
        scale = {} if scale is None else {"*": scale}
    patterns = tree_paths.as_entries("scale", scale)
    if [*patterns] != ["*"]:
        tree_paths.check_matched("scale", patterns, scaled, "weight that has a scale")
    for pattern, value in patterns.items():
        if isinstance(value, jax.Array):
            raise TypeError(
                f"scale must be a Python number, because a plan is static, got {value!r}: "
                "use float(scale)."
            )
        checks.check_number(f"scale[{pattern!r}]", value)
        if value == 0:
            raise ValueError(f"scale[{pattern!r}] is 0, so the adapter would never act.")
    found = {path: tree_paths.look_up(patterns, path, None) for path in scaled}
    missing = [path for path, value in found.items() if value is None]
    if missing and rules.scale:
        raise ValueError(
            f"scale has no pattern for {tree_paths.listed(missing)}: {rules.scale}."
        )
    return {path: float(found.get(path) or 1.0) for path in groups}


def _config_of(targets: Mapping[str, Target]) -> LoraConfig:
    """A config that gives these targets, and no other."""
    axes = {
        derived_plans.exact_pattern(path, own).removesuffix(own.suffix): own.axes
        for path, own in targets.items()
    }
    use_dora = all(target.method == "dora" for target in targets.values())
    plan = AdapterPlan(LoraConfig(axes=axes, use_dora=use_dora), targets)
    sizes = {path: Size(own.rank, own.scale) for path, own in targets.items()}
    return derived_plans.with_sizes(plan, sizes, by_path=True).config
