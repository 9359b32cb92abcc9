"""Adapters of a whole model: plan, init, merge, unmerge, count.

`params` is any pytree. Its leaves are named by their paths, `"decoder/0/query/kernel"`;
those that are no arrays are left alone. `adapters` is a plain dict from paths of weights to
their adapters, and from paths of trained leaves to `{"value": array}`. `plan` says which
those are. See `layers.lora` and `layers.dora` for what an adapter does, with `alpha / rank`
the `scale` of the plan.

All functions but `plan_adapters` take a plan that was made for params with the same paths
and shapes, and run inside `jax.jit` and `jax.eval_shape` with the plan as an argument.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lora_jax._core import checks, tree_paths
from lora_jax.layers.lora import Adapter, Adapters, init_lora_adapter
from lora_jax.model import merging
from lora_jax.model.merging import MergeLoss
from lora_jax.plan import parts, plan_checks, selection, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target
from lora_jax.plan.config import LoraConfig
from lora_jax.transform import discovery

__all__ = [
    "MergeLoss",
    "ParameterCount",
    "adapted_column_norms",
    "count_parameters",
    "init_adapters",
    "merge_adapters",
    "merge_losses",
    "plan_adapters",
    "unmerge_adapters",
]


class ParameterCount(NamedTuple):
    """How many numbers there are."""

    trainable: int
    """In the adapters."""
    total: int
    """In the params and the adapters."""


def plan_adapters(
    config: LoraConfig,
    params: tree_paths.PyTree,
    fn: Callable[..., Any] | None = None,
    /,
    *args: Any,
    **kwargs: Any,
) -> AdapterPlan:
    """Finds out what a config comes to on some params.

    The function is traced, and each use of each weight says which of its axes are input,
    output and batch. Nothing is computed: `params` and arguments may be
    `jax.ShapeDtypeStruct`s. Without a function only 2-D weights are understood, as
    `(in, out)`, and `"all-linear"` is every one of them, embeddings among them.

    `config`, `params` and `fn` are positional only, so that `fn` may have arguments of
    these names.

    Args:
        config: what to adapt and how.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`s.
        fn: called as `fn(params, *args, **kwargs)`, or None.
        args: further arguments of `fn`.
        kwargs: keyword arguments of `fn`.

    Returns:
        The plan. `print` it to see a table; `plan.explain(path)` says why a leaf is
        adapted or not.

    Raises:
        TypeError: if `config` is no `LoraConfig`, `fn` no function, or there are arguments
            and no `fn`.
        ValueError: if a pattern matches nothing, a pattern of `targets` matches what
            cannot have an adapter or a pattern of `train` what cannot be trained, nothing
            is adapted, or two leaves have one path.

    Example:
        >>> import jax, lora_jax
        >>> params = {
        ...     "query": jax.ShapeDtypeStruct((64, 32), "bfloat16"),
        ...     "scale": jax.ShapeDtypeStruct((64,), "bfloat16"),
        ... }
        >>> config = lora_jax.LoraConfig(rank=4)
        >>> plan = lora_jax.plan_adapters(config, params)
        >>> print(plan)
        path        shape     axes  method  rank  scale  parameters     share
        query       (64, 32)  io    lora       4      4         384  15.385 %
        total of 1                                              384  15.385 %
        >>> plan.explain("scale")
        'scale: no adapter, because it is a vector, (64,).'
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"config must be a LoraConfig, got {type(config).__name__}: the order is "
            "plan_adapters(config, params, fn, *args)."
        )
    if fn is None and (args or kwargs):
        raise TypeError(
            "there are arguments and no function: the order is plan_adapters(config, "
            "params, fn, *args), where fn(params, *args) applies the model. The first "
            "three are positional only."
        )
    if fn is not None and not callable(fn):
        raise TypeError(
            f"fn must be a function, got {type(fn).__name__}: the order is "
            "plan_adapters(config, params, fn, *args); params come once, and are passed "
            "to fn."
        )
    leaves = tree_paths.leaf_paths(params)
    uses = None
    if fn is not None:
        uses = discovery.find_uses(fn, params, args, kwargs, config.products)
    return selection.select(config, leaves, uses)


def init_adapters(
    key: jax.Array, params: tree_paths.PyTree, plan: AdapterPlan
) -> dict[str, Adapter]:
    """Makes the adapters of a plan, which change nothing yet.

    Each has a key of its own, made of `key` and its path: that another weight is adapted
    too changes no values.

    Args:
        key: a `jax.random` key.
        params: the params of the plan. Only shapes and dtypes are used, except the weights
            with DoRA, for their magnitudes, and the trained leaves.
        plan: what `plan_adapters` returned.

    Returns:
        `{path: {"A": (*batch, in, rank), "B": (*batch, rank, out)}}`, and `"m":
        (*batch, out)` for DoRA, with `in` and `out` the folded axes of the plan. For a leaf
        of `LoraConfig(train=...)` it is `{path: {"value": array}}`, a copy of the leaf.

    Raises:
        KeyError: if params lack a weight of the plan.
        TypeError: if `key` is no key, a weight is not floating point, or a DoRA weight has
            no values (outside `jax.eval_shape`).
        ValueError: if a weight has another shape than in the plan.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": jnp.ones((64, 32)), "scale": jnp.ones(64)}
        >>> config = lora_jax.LoraConfig(rank=4)
        >>> plan = lora_jax.plan_adapters(config, params)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> jax.tree.map(jnp.shape, adapters)
        {'query': {'A': (64, 4), 'B': (4, 32)}}
    """
    checks.check_key("key", key)
    leaves = tree_paths.leaf_paths(params)
    plan_checks.check_params(leaves, plan)
    adapters = {}
    for path, target in plan.targets.items():
        with checks.at_path(path):
            own_key = tree_paths.fold_in(key, path)
            weight = leaves[plan.leaf(path)]
            adapters[path] = _init(own_key, weight, target, plan.config)
    return adapters | trained_leaves.init_all(leaves, plan)


def _init(key: jax.Array, weight: Any, target: Target, config: LoraConfig) -> Adapter:
    matrix = jax.ShapeDtypeStruct(target.matrix_shape, weight.dtype)
    adapter = init_lora_adapter(
        key, matrix, target.rank, dtype=config.dtype, init=config.init
    )
    if target.method == "dora":
        checks.check_array("the weight", weight)
        init = config.init
        zero = not isinstance(init, tuple) and init != "orthogonal"  # B, and so A @ B
        adapter["m"] = merging.column_norm(weight, {} if zero else adapter, target)
    return adapter


def merge_adapters(
    params: tree_paths.Tree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    donate: bool = False,
    requantize: bool = False,
) -> tree_paths.Tree:
    """Folds adapters into the weights they adapt.

    Merged quantized weights are dense, unless they are to be quantized again: what that
    loses is often more than the adapters changed, and `merge_losses` says how much.

    Args:
        params: the params of the plan.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        donate: let each merged weight take the memory of the old one, which is gone then,
            also if an error is raised. Not for NumPy arrays, and without effect inside
            `jax.jit`, which has its own donation.
        requantize: quantize merged weights in the format and with the settings of the old
            ones. Outside a trace, what each loses is logged at the level INFO to the
            logger `"lora_jax"`.

    Returns:
        A tree like `params`. Adapted weights are new, with the dtype and the sharding of
        the old ones, formed in at least float32 and rounded once. Trained leaves are copies
        of their values, in the same way. All other leaves are those of `params`.

    Raises:
        FloatingPointError: if a merged weight has an infinity or a NaN. Outside a trace
            only: the values of a trace are not known.
        KeyError: if params lack a weight of the plan, or the adapters' paths or entries
            are not the plan's.
        TypeError: if an array is not floating point.
        ValueError: if a shape is not the plan's, an adapter has biases, a weight to
            donate is at two paths, or an adapter is of one use of a weight that has two.
    """
    leaves, treedef = _checked(params, adapters, plan)
    _check_all_uses(plan)
    checks.check_flags(donate=donate, requantize=requantize)
    if donate:
        plan_checks.check_none_is_shared(leaves, plan.by_leaf(), "merge with donate=False")
    merged = merging.fold_all(merging.merge, leaves, adapters, {}, plan, donate)
    if requantize:
        merged = merging.requantize_all(leaves, merged)
    merged |= trained_leaves.merge(leaves, adapters, plan)
    return treedef.unflatten((leaves | merged).values())


def unmerge_adapters(
    params: tree_paths.Tree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    column_norms: Mapping[str, jax.Array] | None = None,
    originals: Mapping[str, jax.Array] | None = None,
) -> tree_paths.Tree:
    """Takes adapters out of merged weights: undoes `merge_adapters`.

    What the merge rounded away does not come back: see `lora_jax.unmerge_lora_weight` and
    `lora_jax.unmerge_dora_weight` for the bounds.

    Args:
        params: what `merge_adapters` returned.
        adapters: the adapters that were merged.
        plan: the plan of the merge.
        column_norms: what `adapted_column_norms` returned before the merge; needed if the
            method is DoRA.
        originals: a dict from paths to leaves: the trained leaves of the plan, as they were
            before the merge; needed if there are any.

    Returns:
        A tree like `params`, with the weights as they were before the merge; all other
        leaves are those of `params`.

    Raises:
        FloatingPointError: as `merge_adapters`; a DoRA column whose magnitude is zero was
            lost in the merge.
        KeyError, TypeError, ValueError: as `merge_adapters`, and ValueError if
            `column_norms` or `originals` are missing, or given and not needed.
    """
    leaves, treedef = _checked(params, adapters, plan)
    _check_all_uses(plan)
    norms = _checked_norms(column_norms, plan)
    trained = trained_leaves.restore(originals, plan)
    restored = merging.fold_all(merging.unmerge, leaves, adapters, norms, plan, False)
    restored |= trained
    return treedef.unflatten((leaves | restored).values())


def adapted_column_norms(
    params: tree_paths.PyTree, adapters: Adapters, plan: AdapterPlan
) -> dict[str, jax.Array]:
    """The norms of the columns of the adapted weights, which DoRA divides by.

    Args:
        params: the params of the plan, before a merge.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.

    Returns:
        `{path: (*batch, out)}` for the weights whose method is DoRA, at least float32:
        what `unmerge_adapters` needs, and what `adapt` takes. See
        `lora_jax.dora_column_norm`.

    Raises:
        KeyError, TypeError, ValueError: as `merge_adapters`.
    """
    leaves, _ = _checked(params, adapters, plan)
    norms = {}
    for path in _dora_paths(plan):
        with checks.at_path(path):
            norms[path] = merging.column_norm(
                leaves[plan.leaf(path)], dict(adapters[path]), plan.targets[path]
            )
    return norms


def merge_losses(
    params: tree_paths.PyTree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    requantize: bool = False,
) -> dict[str, MergeLoss]:
    """What the rounding of `merge_adapters` would lose, exactly, weight by weight.

    A 16-bit weight keeps 8 or 11 bits, and an update below half a unit in its last place
    vanishes.

    Args:
        params: the params of the plan, before a merge.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        requantize: whether quantized weights are to be quantized again, as by
            `merge_adapters`. Else their merge is one into the dense weight.

    Returns:
        `{path: MergeLoss}`, scalars formed in at least float32: `vanished`, the fraction
        of the entries that have an update and do not change; `largest_vanished`, the
        largest `|update| / |weight|` among them; `relative_error`,
        `|merged - exact| / |update|` in the Frobenius norm. All are 0 if the update is.

    Raises:
        KeyError, TypeError, ValueError: as `merge_adapters`.
    """
    leaves, _ = _checked(params, adapters, plan)
    checks.check_flags(requantize=requantize)
    losses = {}
    for path, target in plan.targets.items():
        with checks.at_path(path):
            adapter = dict(adapters[path])
            weight = leaves[plan.leaf(path)]
            losses[path] = merging.merge_loss(weight, adapter, target, requantize)
    return losses


def count_parameters(params: tree_paths.PyTree, plan: AdapterPlan) -> ParameterCount:
    """Counts the numbers that are trained, and all of them.

    Args:
        params: the params of the plan; `jax.ShapeDtypeStruct`s will do.
        plan: what `plan_adapters` returned.

    Returns:
        `trainable`, the parameters of the adapters and of the trained leaves, and `total`,
        those of the params and `trainable`: the params keep the frozen leaves.

    Raises:
        KeyError, TypeError, ValueError: if the plan is not that of these params.
    """
    leaves = tree_paths.leaf_paths(params)
    plan_checks.check_params(leaves, plan)
    total = selection.count(leaves.values()) + plan.parameters
    return ParameterCount(plan.parameters, total)


def _checked(
    params: tree_paths.PyTree, adapters: Adapters, plan: AdapterPlan
) -> tuple[dict[str, Any], Any]:
    """The leaves of params by path, and their structure, after the checks."""
    leaves, treedef = tree_paths.flatten(params)
    plan_checks.check_params(leaves, plan)
    for path in plan.by_leaf():
        with checks.at_path(path):
            checks.check_array("the weight", leaves[path])
    plan_checks.check_adapters(adapters, plan)
    return leaves, treedef


def _check_all_uses(plan: AdapterPlan) -> None:
    """Raises for adapters of one use of a weight that the function uses otherwise, too."""
    for path, target in plan.targets.items():
        leaf = plan.leaf(path)
        kinds = {use.kind for use in plan.uses.get(leaf, ())} - {""}
        if target.use and kinds != {target.use}:
            other = "products" if target.use == parts.LOOKUP else "look-ups"
            raise ValueError(
                f"{path!r} adapts one use of {leaf!r} alone, and a merge would change the "
                f"{other} of the same array, too. Untie them first: keep a copy of "
                f"{leaf!r} under another path, have the function read that for its "
                f"{other}, and make the plan anew; or run the model with adapt."
            )


def _dora_paths(plan: AdapterPlan) -> list[str]:
    return [path for path, target in plan.targets.items() if target.method == "dora"]


def _checked_norms(
    norms: Mapping[str, jax.Array] | None, plan: AdapterPlan
) -> Mapping[str, jax.Array]:
    paths = _dora_paths(plan)
    if paths and norms is None:
        raise ValueError(
            "a merged DoRA weight does not have its norms any more: give column_norms="
            "adapted_column_norms(params, adapters, plan), formed before the merge."
        )
    plan_checks.check_column_norms(norms or {}, plan)
    return norms or {}
