"""Adapters of a whole model: plan, init, count.

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
from lora_jax.layers.lora import Adapter
from lora_jax.model import sharding
from lora_jax.model.initialization import init_adapter, put
from lora_jax.plan import plan_checks, selection, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.config import LoraConfig
from lora_jax.transform import discovery

__all__ = [
    "ParameterCount",
    "count_parameters",
    "init_adapters",
    "plan_adapters",
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
