"""Adapters of a whole model: plan, init, merge, unmerge, count.

`params` is any pytree. Its leaves are named by their paths, such as
`"decoder/0/query/kernel"`. Leaves that are not arrays are not changed. `adapters` is a
plain dict from paths of weights to their adapters, and from paths of trained leaves to
`{"value": array}`. `plan` lists these paths. `layers.lora` and `layers.dora` say what an
adapter computes; their `alpha / rank` is the `scale` of the plan.

All functions except `plan_adapters` take a plan that was made for params with the same
paths and shapes. They run inside `jax.jit` and `jax.eval_shape`, with the plan as an
argument.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lora_jax._core import checks, placement, tree_paths
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.model import losses, merging, sharding
from lora_jax.model.initialization import init_adapter, put
from lora_jax.model.losses import MergeLoss
from lora_jax.plan import plan_checks, selection, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan
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


class _Counts(NamedTuple):
    trainable: int
    """The number of parameters in the adapters and the trained leaves."""
    total: int
    """The number of parameters in the params, plus `trainable`."""


class ParameterCount(_Counts):
    """Numbers of parameters, and of bytes on each device.

    It is a pair, `(trainable, total)`.
    """

    trainable_bytes: int
    """The bytes of new adapters and trained leaves on each device."""
    total_bytes: int
    """The bytes of the params on each device, plus `trainable_bytes`."""


def plan_adapters(
    config: LoraConfig,
    params: tree_paths.PyTree,
    fn: Callable[..., Any] | None = None,
    /,
    *args: Any,
    **kwargs: Any,
) -> AdapterPlan:
    """Resolves a config to the adapters of these params.

    The function is traced. The uses of each weight show which of its axes are input, output
    and batch axes. Nothing is computed, so `params` and arguments may be
    `jax.ShapeDtypeStruct`s. Without a function, weights must have two axes, `(in, out)`,
    and `"all-linear"` selects all of them, embeddings included.

    `config`, `params` and `fn` are positional only, so that `fn` may have arguments with
    these names.

    Args:
        config: which weights to adapt, and how.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`s.
        fn: a function that is called as `fn(params, *args, **kwargs)`, or None.
        args: further arguments of `fn`.
        kwargs: keyword arguments of `fn`.

    Returns:
        The plan. `print` it to see a table; `plan.explain(path)` says why a leaf is
        adapted or not.

    Raises:
        TypeError: if `config` is not a `LoraConfig`, `fn` is not a function, or there are
            arguments without `fn`.
        ValueError: if a pattern matches nothing, a pattern of `targets` matches a leaf that
            cannot have an adapter, a pattern of `train` matches a leaf that cannot be
            trained, nothing is adapted, or two leaves have the same path.

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
            "plan_adapters(config, params, fn, *args). Give params only once; they are "
            "passed to fn."
        )
    leaves = tree_paths.leaf_paths(params)
    products = config.products
    found = None if fn is None else discovery.find_uses(fn, params, args, kwargs, products)
    plan = selection.select(config, leaves, found)
    return dataclasses.replace(plan, layout=sharding.layout_of(leaves, plan))


def init_adapters(
    key: jax.Array,
    params: tree_paths.PyTree,
    plan: AdapterPlan,
    shardings: Mapping[str, Mapping[str, jax.sharding.Sharding]] | None = None,
) -> dict[str, Adapter]:
    """Initializes the adapters of a plan, which do not change the model yet.

    Each adapter has its own key, derived from `key` and its path. So adding a target does
    not change the other adapters. On a mesh, each device makes its own part of each factor,
    and no device has a whole one. The values are those that one device would make, bit for
    bit, but for the rounding of a magnitude whose weight is split along its inputs.

    Args:
        key: a `jax.random` key.
        params: the params of the plan. Only shapes and dtypes are used, except the weights
            with DoRA, for their magnitudes, and the trained leaves.
        plan: what `plan_adapters` returned.
        shardings: of the adapters, a tree like the result. None means those of
            `adapter_shardings(params, plan)` if the params lie on a mesh. In several
            processes, every process calls this with the same key.

    Returns:
        `{path: {"A": (*batch, in, rank), "B": (*batch, rank, out)}}`, and `"m":
        (*batch, out)` for DoRA. `in` and `out` are the folded axes of the plan. A leaf of
        `LoraConfig(train=...)` has the entry `{path: {"value": array}}`, with a copy of the
        leaf.

    Raises:
        KeyError: if params lack a weight of the plan.
        TypeError: if `key` is not a `jax.random` key, a weight is not floating point, or a
            DoRA weight has no values (outside `jax.eval_shape`).
        ValueError: if the shape of a weight is not that of the plan, the weights lie on
            different meshes, or an array cannot be split as its sharding says.

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
    if shardings is None:
        shardings = sharding.init_shardings(leaves, plan)
    else:
        sharding.check_shardings(shardings, plan)
    adapters = {}
    for path, target in plan.targets.items():
        with checks.at_path(path):
            own_key = tree_paths.fold_in(key, path)
            weight = leaves[plan.leaf(path)]
            own = None if shardings is None else shardings[path]
            adapters[path] = init_adapter(own_key, weight, target, plan.config, own)
    trained = trained_leaves.init_all(leaves, plan)
    if shardings is not None:
        trained = {path: put(leaf, shardings[path]) for path, leaf in trained.items()}
    return adapters | trained


def merge_adapters(
    params: tree_paths.Tree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    donate: bool = False,
    requantize: bool = False,
) -> tree_paths.Tree:
    """Merges adapters into the weights that they adapt.

    On a mesh no weight is gathered: devices exchange parts of adapters and norms only. One
    case is an exception: in a trace on automatic mesh axes, an adapter of some entries of a
    batch axis that the mesh splits.

    Merged quantized weights are dense. With `requantize` they are quantized again, which
    often loses more than the adapters changed; `merge_losses` measures the loss.

    Args:
        params: the params of the plan.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        donate: reuse the memory of each old weight for the merged one. The old weights are
            deleted, even if an error is raised. Has no effect on NumPy arrays, nor inside
            `jax.jit`, which has its own donation.
        requantize: quantize merged weights again, in the format and with the settings of
            the old ones. Outside a trace, the loss of each weight is logged at the level
            INFO to the logger `"lora_jax"`.

    Returns:
        A tree like `params`. Adapted weights are new arrays with the dtype and the sharding
        of the old ones, computed in at least float32 and rounded once. Trained leaves are
        copies of their values, with the dtype and the sharding of the old leaves. All other
        leaves are the same objects as in `params`.

    Raises:
        FloatingPointError: if a merged weight has an infinity or a NaN. This is checked
            only outside a trace.
        KeyError: if params lack a weight of the plan, or the paths or entries of the
            adapters are not those of the plan.
        TypeError: if an array is not floating point.
        ValueError: if a shape is not that of the plan, an adapter has biases, a weight to
            donate is at two paths, or an adapter is for one kind of use of a weight that
            the function uses in two ways.
    """
    leaves, treedef = _checked(params, adapters, plan)
    merging.check_all_uses(plan)
    checks.check_flags(donate=donate, requantize=requantize)
    if donate:
        merging.check_none_is_shared(leaves, plan.by_leaf(), "merge with donate=False")
    merged = merging.fold_all(merging.merge, leaves, adapters, {}, plan, donate)
    if requantize:
        merged = merging.requantize_all(leaves, merged)
    merged |= merging.copy_trained(leaves, adapters, plan)
    return treedef.unflatten((leaves | merged).values())


def unmerge_adapters(
    params: tree_paths.Tree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    column_norms: Mapping[str, jax.Array] | None = None,
    originals: Mapping[str, jax.Array] | None = None,
) -> tree_paths.Tree:
    """Removes adapters from merged weights: undoes `merge_adapters`.

    The rounding of the merge is not undone; `lora_jax.unmerge_lora_weight` and
    `lora_jax.unmerge_dora_weight` give error bounds.

    Args:
        params: what `merge_adapters` returned.
        adapters: the adapters that were merged.
        plan: the plan of the merge.
        column_norms: what `adapted_column_norms` returned before the merge; needed if the
            method is DoRA.
        originals: a dict from the paths of the trained leaves to their values before the
            merge; needed if the plan trains leaves.

    Returns:
        A tree like `params`, with the weights from before the merge. All other leaves are
        the same objects as in `params`.

    Raises:
        FloatingPointError: as `merge_adapters`; also for a DoRA column whose magnitude is
            zero, which was lost in the merge.
        KeyError, TypeError, ValueError: as `merge_adapters`, and ValueError if
            `column_norms` or `originals` are missing, or given and not needed.
    """
    leaves, treedef = _checked(params, adapters, plan)
    merging.check_all_uses(plan)
    norms = merging.checked_norms(column_norms, plan)
    trained = trained_leaves.restore(originals, plan)
    restored = merging.fold_all(merging.unmerge, leaves, adapters, norms, plan, False)
    restored |= trained
    return treedef.unflatten((leaves | restored).values())


def adapted_column_norms(
    params: tree_paths.PyTree, adapters: Adapters, plan: AdapterPlan
) -> dict[str, jax.Array]:
    """Computes the column norms of the adapted weights, which DoRA divides by.

    Args:
        params: the params of the plan, before a merge.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.

    Returns:
        `{path: (*batch, out)}` for the weights whose method is DoRA, at least float32: the
        `column_norms` of `unmerge_adapters` and `adapt`. See `lora_jax.dora_column_norm`.

    Raises:
        KeyError, TypeError, ValueError: as `merge_adapters`.
    """
    leaves, _ = _checked(params, adapters, plan)
    norms = {}
    for path, target in plan.targets.items():
        if target.method != "dora":
            continue
        with checks.at_path(path):
            weight = leaves[plan.leaf(path)]
            norms[path] = merging.column_norm(weight, adapters[path], target)
    return norms


def merge_losses(
    params: tree_paths.PyTree,
    adapters: Adapters,
    plan: AdapterPlan,
    *,
    requantize: bool = False,
) -> dict[str, MergeLoss]:
    """Measures what the rounding of `merge_adapters` would lose, for each target.

    A 16-bit weight has 8 or 11 significant bits. An update below half a unit in the last
    place of its weight vanishes.

    Args:
        params: the params of the plan, before a merge.
        adapters: the adapters of the plan.
        plan: what `plan_adapters` returned.
        requantize: include the loss of quantizing merged weights again, as `merge_adapters`
            does with `requantize`. Otherwise merged quantized weights are dense.

    Returns:
        `{path: MergeLoss}`, with scalars computed in at least float32. `vanished` is the
        fraction of the entries that have an update and do not change, `largest_vanished`
        the largest `|update| / |weight|` among them, and `relative_error` is
        `|merged - exact| / |update|` in the Frobenius norm. All are 0 if the update is 0.

    Raises:
        KeyError, TypeError, ValueError: as `merge_adapters`.
    """
    leaves, _ = _checked(params, adapters, plan)
    checks.check_flags(requantize=requantize)
    found = {}
    for path, target in plan.targets.items():
        with checks.at_path(path):
            weight = leaves[plan.leaf(path)]
            found[path] = losses.merge_loss(weight, adapters[path], target, requantize)
    return found


def count_parameters(params: tree_paths.PyTree, plan: AdapterPlan) -> ParameterCount:
    """Counts the trainable parameters, and all parameters.

    Args:
        params: the params of the plan; may be `jax.ShapeDtypeStruct`s.
        plan: what `plan_adapters` returned.

    Returns:
        `trainable`, the number of parameters of the adapters and the trained leaves, and
        `total`, the number of parameters in the params plus `trainable`. The params keep
        the frozen values of trained leaves, so these count twice. `trainable_bytes` and
        `total_bytes` are the bytes of the same arrays on each device: on a mesh, of
        adapters with the shardings of `adapter_shardings`.

    Raises:
        KeyError, TypeError, ValueError: if the plan was not made for these params.
    """
    leaves = tree_paths.leaf_paths(params)
    plan_checks.check_params(leaves, plan)
    total = tree_paths.count_entries(leaves) + plan.parameters
    counted = ParameterCount(plan.parameters, total)
    counted.trainable_bytes = sharding.bytes_of_adapters(leaves, plan)
    frozen = sum(map(placement.bytes_on_each_device, leaves.values()))
    counted.total_bytes = frozen + counted.trainable_bytes
    return counted


def _checked(
    params: tree_paths.PyTree, adapters: Adapters, plan: AdapterPlan
) -> tuple[dict[str, Any], Any]:
    """The leaves of params by path, and the tree structure, after all checks."""
    leaves, treedef = tree_paths.flatten(params)
    plan_checks.check_params(leaves, plan, values=True)
    plan_checks.check_adapters(adapters, plan)
    return leaves, treedef
