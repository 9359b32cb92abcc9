"""Decomposes the weights of a plan into a base and adapters, and converts the adapters.

This applies `layers.decompose` to a whole model. The adapters belong to the base that is
returned with them. Save both, or convert the adapters with `to_plain_adapters`.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from lora_jax._core import checks, placement, tree_paths
from lora_jax._core.tree_paths import Tree
from lora_jax.layers.decompose import (
    DecomposedWeight,
    Quantize,
    check_dense,
    check_quantize,
    init_loftq_adapter,
    init_olora_adapter,
    init_orthogonal_adapter,
    init_pissa_adapter,
    stored,
    to_plain_adapter,
)
from lora_jax.layers.lora import Adapter, Adapters
from lora_jax.model import merging, sharding
from lora_jax.model.column_norms import column_norm
from lora_jax.plan import derived_plans, layout, parts, plan_checks, trained_leaves
from lora_jax.plan.adapter_plan import AdapterPlan, Target

__all__ = ["Decomposed", "PlainAdapters", "decompose_params", "to_plain_adapters"]

_LOG = logging.getLogger("lora_jax")

Initializer: TypeAlias = Callable[..., tuple[Any, Adapter]]


def _orthogonal(
    key: jax.Array, weight: jax.Array, rank: int, alpha: float, dtype: DTypeLike | None
) -> DecomposedWeight:
    return DecomposedWeight(weight, init_orthogonal_adapter(key, weight, rank, dtype=dtype))


class _Method(NamedTuple):
    init: Initializer
    needs: tuple[str, ...] = ()
    """The arguments of `decompose_params` that must be given."""
    takes: tuple[str, ...] = ()
    """The arguments of `decompose_params` that may be given."""


_METHODS = {
    "pissa": _Method(init_pissa_adapter, takes=("key", "iterations", "quantize")),
    "olora": _Method(init_olora_adapter),
    "orthogonal": _Method(_orthogonal, needs=("key",)),
    "loftq": _Method(init_loftq_adapter, needs=("quantize",), takes=("iterations",)),
}


class Decomposed(NamedTuple, Generic[Tree]):
    """The result of `decompose_params` and `init_adapters_from_gradients`."""

    params: Tree
    """The base: a tree like the params."""
    adapters: dict[str, Adapter]
    """`{path: adapter}`, the adapters that belong to this base."""


class PlainAdapters(NamedTuple):
    """Adapters of twice the rank for the original params."""

    adapters: dict[str, Adapter]
    """`{path: adapter}`."""
    plan: AdapterPlan
    """The plan of these adapters, with twice the ranks and the same scales."""


def decompose_params(
    params: Tree,
    plan: AdapterPlan,
    method: Literal["pissa", "olora", "orthogonal", "loftq"],
    *,
    key: jax.Array | None = None,
    iterations: int | None = None,
    quantize: Quantize | None = None,
) -> Decomposed[Tree]:
    """Moves parts of the weights of a plan into adapters.

    On a mesh `"olora"`, and `"pissa"` with `key`, decompose a weight where it lies: devices
    exchange arrays with about as many columns as the rank. An exact SVD, of `"pissa"`
    without `key` and of `"loftq"`, gathers one weight at a time, in float32, on every
    device, unless the mesh splits batch axes only. A weight is also gathered if the mesh
    splits the second of several folded axes, or an axis of which a part is adapted. Each
    gathered weight is logged at the level INFO to the logger `"lora_jax"`.

    Use it in place of `init_adapters`. Train, merge and save the adapters with the returned
    params, or convert the adapters with `to_plain_adapters`; see the module's docstring.

    Args:
        params: the params of the plan.
        plan: what `plan_adapters` returned; the `init` of its config is not used.
        method: `"pissa"`, `"olora"`, `"orthogonal"` or `"loftq"`; see the function with
            this name for one weight, such as `init_pissa_adapter`.
        key: a `jax.random` key, for `"orthogonal"`, and for `"pissa"` with `iterations`.
            Each adapter has its own key, derived from `key` and its path.
        iterations: for `"pissa"`, the steps of a randomized SVD. For `"loftq"`, the number
            of alternating steps; None means 1.
        quantize: for `"loftq"`, and for `"pissa"` with a quantized base (QPiSSA). A
            function that takes a weight in its original layout and dtype, and returns a
            quantized tensor, such as `lora_jax.quant.quantize_int8`, or an array; see
            `init_loftq_adapter`. It gets a stack of weights as one array, and has to set
            `batch_axes` itself.

    Returns:
        `params`, the base. Adapted weights are new, with the dtype and the sharding of the
        old ones. All other leaves, and with `"orthogonal"` all leaves, are the same objects
        as in `params`. If `quantize` returns a quantized tensor, this tensor is the leaf,
        with a sharding as in `quantize_params`; `adapt` and the merges accept it.
        `adapters`, as from `init_adapters`, on a mesh with the shardings of
        `lora_jax.adapter_shardings(params, plan)`. For DoRA, `"m"` has the column norms of
        `W_base + scale * A @ B`, with the stored base.

    Raises:
        KeyError: if params lack a weight of the plan.
        TypeError: if a weight is not floating point, has no values or is quantized, an
            argument has the wrong type, or `quantize` returns something else.
        ValueError: if the method is unknown, does not use a given argument, or needs an
            argument that is None; the shape of a weight is not that of the plan; a rank is
            too large for a weight; or `quantize` changes a shape.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> from lora_jax.model.decompose import decompose_params, to_plain_adapters
        >>> params = {"query": jax.random.normal(jax.random.key(0), (64, 32))}
        >>> config = lora_jax.LoraConfig(rank=4, alpha=8.0)
        >>> plan = lora_jax.plan_adapters(config, params)
        >>> base, initial = decompose_params(params, plan, "pissa")
        >>> trained = jax.tree.map(lambda x: x + 0.01, initial)
        >>> plain, plain_plan = to_plain_adapters(trained, initial, plan)
        >>> jax.tree.map(jnp.shape, plain)
        {'query': {'A': (64, 8), 'B': (8, 32)}}
        >>> merged = lora_jax.merge_adapters(params, plain, plain_plan)
        >>> same = lora_jax.merge_adapters(base, trained, plan)
        >>> bool(jnp.allclose(merged["query"], same["query"], atol=1e-5))
        True
    """
    leaves, treedef = tree_paths.flatten(params)
    plan_checks.check_params(leaves, plan)
    options = _checked_options(method, key=key, iterations=iterations, quantize=quantize)
    bases, adapters = {}, {}
    for path, target in plan.targets.items():
        if key is not None:
            options["key"] = tree_paths.fold_in(key, path)
        leaf = plan.leaf(path)
        weight = bases.get(leaf, leaves[leaf])
        with checks.at_path(path):
            check_dense(weight)
            checks.check_array("the weight", weight)
            _check_can_decompose(target, method, quantize)
            _report(path, weight, target, method, options)
            own = {"rank": target.rank, "alpha": target.alpha, "dtype": plan.config.dtype}
            base, adapters[path] = _decompose(weight, target, method, own | options)
        if method != "orthogonal":
            bases[leaf] = base
    adapters |= trained_leaves.init_all(leaves, plan)
    places = sharding.init_shardings(leaves, plan)
    if places is not None:
        adapters = jax.tree.map(placement.put, adapters, places)
    return Decomposed(treedef.unflatten((leaves | bases).values()), adapters)


def to_plain_adapters(
    adapters: Adapters,
    initial: Adapters,
    plan: AdapterPlan,
) -> PlainAdapters:
    """Converts the adapters of decomposed params into adapters of the original params.

    See `to_plain_adapter`, and `decompose_params` for an example.

    Args:
        adapters: the adapters, after training.
        initial: the adapters that `decompose_params` returned.
        plan: the plan of these adapters.

    Returns:
        `adapters`, and their `plan`, with doubled ranks and the same scales (with
        `rank_stabilized`, up to the last bit, because of `sqrt(2)`). `rank`, `alpha`,
        `rank_pattern` and `alpha_pattern` of its config are changed in the same way, so
        `plan_adapters` with this config makes the same plan.

    Raises:
        KeyError, TypeError, ValueError: as `to_plain_adapter`, with the path of the
            adapter, and if adapters are not those of the plan.
    """
    plan_checks.check_adapters(adapters, plan)
    with checks.at_path("initial"):
        plan_checks.check_adapters(initial, plan)
    plain = {}
    for path in plan.targets:
        with checks.at_path(path):
            plain[path] = to_plain_adapter(adapters[path], initial[path])
    plain |= {path: dict(adapters[path]) for path in plan.trained}
    doubled = {
        path: derived_plans.Size(2 * target.rank, target.scale)
        for path, target in plan.targets.items()
    }
    return PlainAdapters(plain, derived_plans.with_sizes(plan, doubled))


def _check_can_decompose(target: Target, method: str, quantize: Quantize | None) -> None:
    if target.part and quantize is not None:
        raise ValueError(
            f"quantize gives a whole weight, but the target is the part {target.part}: "
            "adapt the whole weight, or decompose it without quantize."
        )
    if target.use and method != "orthogonal":
        raise ValueError(
            f"method={method!r} changes the weight for all of its uses, and the adapter "
            f"is for the use as a {target.use} alone: adapt the weight for all uses, or "
            "make the adapter with init_adapters."
        )


def _checked_options(method: str, **given: Any) -> dict[str, Any]:
    """The options that were given, after a check that the method uses them."""
    checks.check_choice("method", method, tuple(_METHODS))
    options = {name: value for name, value in given.items() if value is not None}
    needs, takes = _METHODS[method].needs, _METHODS[method].takes
    for name in needs:
        if name not in options:
            raise ValueError(f"method={method!r} needs {name}, which is None.")
    for name in options:
        if name not in (*needs, *takes):
            raise ValueError(f"method={method!r} does not use {name}: leave it out.")
    if "key" in options:
        checks.check_key("key", options["key"])
    return options


def _report(
    path: str, weight: Any, target: Target, method: str, options: Mapping[str, Any]
) -> None:
    """Logs that a weight is gathered, if it is."""
    split = placement.parts(weight)
    sides = (*target.in_axes, *target.out_axes)
    if method == "orthogonal" or max(split) == 1 or isinstance(weight, Tracer):
        return
    reason = None
    if method == "loftq" or (method == "pissa" and "key" not in options):
        if any(split[axis] > 1 for axis in sides):
            reason = "its exact SVD"
    elif merging.own(weight, target).in_place:
        reason = "the fold of its axes, or the slice of its part,"
    if reason is not None:
        size = math.prod(target.matrix_shape) * 4
        _LOG.info("%s: %s gathers the weight, %d bytes in float32.", path, reason, size)


def _on_matrix(quantize: Quantize, target: Target) -> Quantize:
    """A version of `quantize` that takes the weight as a matrix."""
    return lambda matrix: layout.to_matrix(
        stored(quantize, layout.from_matrix(matrix, target)), target
    )


def _decompose(
    weight: jax.Array, target: Target, method: str, options: dict[str, Any]
) -> DecomposedWeight:
    """The base, in the layout and with the sharding of the weight, and the adapter."""
    quantize = options.get("quantize")
    if quantize is not None:
        check_quantize(quantize)
    if quantize is not None and method == "pissa":
        del options["quantize"]
        made, adapter = _decompose(weight, target, method, options)
        rest: Any = made
        base, _ = placement.keep_sharding(lambda w: (stored(quantize, w), ()), rest)
        if target.method == "dora":
            adapter["m"] = column_norm(base, adapter, target)
        return DecomposedWeight(base, adapter)
    weight = jnp.asarray(weight)
    place = getattr(weight, "sharding", None)
    on_mesh = isinstance(place, NamedSharding) and not isinstance(weight, Tracer)
    if quantize is not None or method == "orthogonal" or not on_mesh:
        return DecomposedWeight(*_split(weight, target, method, options))
    # One program: single operations would leave whole arrays on each device.
    key = options.pop("key", None)
    here = placement.on_device(weight)
    run = _compiled(method, tuple(options.items()), here.sharding)
    base, adapter = run(here, target, key)
    return DecomposedWeight(placement.put(base, place), adapter)


@functools.lru_cache(maxsize=64)
def _compiled(method: str, options: tuple[tuple[str, Any], ...], place: Any) -> Any:
    def split(weight: jax.Array, target: Target, key: jax.Array | None) -> Any:
        keys = {} if key is None else {"key": key}
        return _split(weight, target, method, dict(options) | keys)

    return jax.jit(split, out_shardings=(place, None))


def _split(
    weight: jax.Array, target: Target, method: str, options: Mapping[str, Any]
) -> Any:
    """The base with the sharding of the weight, and the adapter."""
    own = target.alone
    if "quantize" in options:
        options = {**options, "quantize": _on_matrix(options["quantize"], own)}

    def split(weight: jax.Array) -> tuple[Any, Adapter]:
        part = parts.take(weight, target.part)
        matrix = layout.to_matrix(part, own)
        made, adapter = _METHODS[method].init(weight=matrix, **options)
        base = layout.from_matrix(made, own)
        if own.method == "dora":
            adapter["m"] = column_norm(base, adapter, own)
        return parts.put(weight, target.part, base), adapter

    return placement.keep_sharding(split, weight)
