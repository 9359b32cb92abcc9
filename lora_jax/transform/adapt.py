"""`adapt`: any JAX function, run with low-rank adapters."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

import jax
from jax.typing import ArrayLike

from lora_jax._core import checks, placement, tree_paths
from lora_jax._core.tree_paths import Tree
from lora_jax.layers.lora import Adapters
from lora_jax.plan import plan_checks
from lora_jax.plan.adapter_plan import AdapterPlan
from lora_jax.plan.axis_roles import Sighting
from lora_jax.plan.target import VALUE
from lora_jax.transform import _interpreter, _tracing
from lora_jax.transform._adapted_weights import Update, factored, masks_of, unadapted
from lora_jax.transform._context import Context, Merge, OnStopGradient
from lora_jax.transform._rules import RULES
from lora_jax.transform._statistics import Statistic

__all__ = ["Merge", "OnMerge", "accept_quantized", "adapt"]

OnMerge: TypeAlias = Literal["error", "allow"] | Callable[[Merge], None]
"""What `adapt` does before it merges a weight for one use: raise an error, write one log
line, or call a function."""

P = ParamSpec("P")
R = TypeVar("R")

_LOG = logging.getLogger("lora_jax")


def adapt(
    fn: Callable[Concatenate[Tree, P], R],
    plan: AdapterPlan,
    *,
    on_merge: OnMerge = "error",
    on_unused: Literal["error", "allow"] = "error",
    on_stop_gradient: OnStopGradient = "error",
    dropout_key: jax.Array | None = None,
    column_norms: Mapping[str, jax.Array] | None = None,
    scales: ArrayLike | Mapping[str, ArrayLike] | None = None,
) -> Callable[Concatenate[Tree, Adapters, P], R]:
    """Makes a function run with adapters, without a change to its code.

    Each call of the result traces `fn` and runs its program with every adapted weight as
    `W + scale * A @ B`. This matrix is never computed: a product with the weight multiplies
    by one factor and then by the other. Under `jax.jit` the tracing happens once, and the
    compiled program is that of a model written with `lora_linear`. Without `jax.jit` each
    call traces again, which is slow.

    With `B = 0` and without `jax.jit`, the result has the bits of `fn`'s result. Under
    `jax.jit` the compiler may fuse the operations of the two programs in different ways, so
    that results may differ by a few rounding units.

    `fn` may be an adapted function. `adapt(adapt(fn, p1), p2)(params, a2, a1, *args)` is
    `fn` with the weights of `merge_adapters(merge_adapters(params, a2, p2), a1, p1)`.

    DoRA's norms are computed once in each call, or given as `column_norms`. They are
    constants in the backward pass, as in section 4.3 of its paper. Dropout applies to the
    adapter's input alone, with DoRA as well (`dropout_mode="torchtune"` of `dora_linear`).
    Rows of an embedding have no dropout. Under an outer `jax.vmap`, all examples share one
    mask, unless the key is mapped over as well.

    Kernels and functions with a custom derivative stay low-rank if the plan's config states
    what they multiply: `LoraConfig(products=...)`.

    For a leaf that the plan trains, the function gets the value in the adapters, rounded to
    the dtype of the leaf.

    Other leaves of the params may be quantized (`lora_jax.quant`). The function gets an
    array. It is dequantized at each use, and again in the backward pass; in a scan, one
    layer at a time.

    Args:
        fn: `fn(params, *args, **kwargs)`, with any arguments. It must take its weights
            from `params`: weights that it closes over have no adapters. Arguments that are
            not arrays (flags, strings, numbers, functions, None) reach it unchanged.
        plan: made for these params by `plan_adapters`, preferably with this function.
        on_merge: what to do if the function uses a weight in a way that has no low-rank
            form, such as `tanh(W)`, and needs the merged weight. `"error"` raises an error.
            `"allow"` merges the weight for this use, exactly, and writes a line at the
            level INFO to the logger `"lora_jax"`. A function is called with each `Merge`.
        on_unused: whether an adapter is an error if the function never uses its weight. The
            same holds for trained leaves, except that passing a leaf to a jitted function
            counts as a use.
        on_stop_gradient: what `jax.lax.stop_gradient` of an adapted weight, or of a part of
            it, does. `"error"` raises an error. `"base"` stops the gradient of the frozen
            weight and not of its adapter, for models that freeze their base. `"all"` stops
            both, for uses that must not train the weight (a target network), and for
            straight-through estimators.
        dropout_key: a `jax.random` key for one training step. Each use of a weight, each
            step of a scan and each device of a `shard_map` has its own mask. None means no
            dropout.
        column_norms: for DoRA, the result of `adapted_column_norms` for these params and
            adapters. The norms are then not computed here. This saves work if the function
            is called several times with the same adapters (evaluation, gradient
            accumulation, `jax.checkpoint` around the model).
        scales: replaces the plan's scales, which multiply `A @ B`. The scales are traced
            arrays: they are differentiable, and new values do not compile again. One number
            for all targets, or a dict from paths to arrays, each a scalar or `(*batch)`,
            one scale for each index of the target's batch axes. Other paths keep the scale
            of the plan. 0 switches a LoRA adapter off. Half of its scale gives half of its
            update: `{path: 0.5 * scale for path, scale in plan.scales.items()}`. With DoRA
            the scale multiplies `A @ B` alone: at 0 the columns of `W` have the magnitudes
            `m`. Trained leaves have no scale. The result is that of
            `adapt(fn, plan.replace(scale=...))`.

    Returns:
        `adapted(params, adapters, *args, **kwargs)`, which returns what
        `fn(merge_adapters(params, adapters, plan), *args, **kwargs)` does. Pure; works
        under and around `jit`, `grad`, `vmap`, `checkpoint`, `scan` and `shard_map`.

    Raises:
        TypeError: if `fn` is not a function, `plan` is not a plan, or an option has the
            wrong type. The adapted function: if a weight or factor is not floating point.
        KeyError: if `column_norms` are not those of the plan, or `scales` have a path that
            is not in the plan. The adapted function: if params or adapters lack a path of
            the plan, or adapters have a path that is not in the plan.
        ValueError: if an option is unknown, a scale has a wrong shape, or a weight has both
            a scale and `column_norms`. The adapted function: if the shape of an array or of
            its `column_norms` is not the plan's, a weight would have to be merged, the
            gradient of a weight is stopped, the function does not use it, or no use of it
            has the input and output axes of the plan (a plan without a function takes every
            matrix for `(in, out)`).

    References:
        Hu et al., 2021, equation 3, https://arxiv.org/abs/2106.09685; Liu et al., 2024,
        equation 5, https://arxiv.org/abs/2402.09353.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"].T
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((8, 16))}
        >>> x = jnp.ones((4, 8))
        >>> plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2), params, model, x)
        >>> adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        >>> y = lora_jax.adapt(model, plan)(params, adapters, x)
        >>> bool((y == model(params, x)).all())
        True
    """
    return bound(
        fn,
        plan,
        on_merge=on_merge,
        on_unused=on_unused,
        on_stop_gradient=on_stop_gradient,
        dropout_key=dropout_key,
        column_norms=column_norms,
        scales=scales,
    )


def bound(
    fn: Callable[Concatenate[Tree, P], R],
    plan: AdapterPlan,
    *,
    on_merge: OnMerge,
    on_stop_gradient: OnStopGradient,
    on_unused: Literal["error", "allow"] = "error",
    dropout_key: jax.Array | None = None,
    column_norms: Mapping[str, jax.Array] | None = None,
    scales: ArrayLike | Mapping[str, ArrayLike] | None = None,
    statistic: Statistic = "",
) -> Callable[Concatenate[Tree, Adapters, P], R]:
    """The function that `adapt` returns, or one that `observe` differentiates."""
    check_options("adapt", fn, plan, on_unused, on_stop_gradient, dropout_key)
    report = _reporter(on_merge)
    if column_norms is not None:
        plan_checks.check_column_norms(column_norms, plan)
    norms = column_norms or {}
    traced_scales = plan_checks.check_scales(scales, plan, norms)

    def adapted(
        params: Tree, adapters: Adapters, /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        leaves, treedef = tree_paths.flatten(params)
        plan_checks.check_params(leaves, plan)
        plan_checks.check_adapters(adapters, plan)
        trained = {
            path: placement.like(leaves[path], adapters[path][VALUE])
            for path in plan.trained
        }
        key = dropout_key if has_dropout(plan) else None
        own = as_updated(leaves, plan, adapters, norms, traced_scales, shared=key) | trained
        traced = _tracing.trace(fn, treedef.unflatten(own.values()), args, kwargs)
        traced.check_values()
        context = Context(
            RULES,
            report,
            on_stop_gradient=on_stop_gradient,
            key=key,
            targets=plan_checks.to_be_compared(plan),
            closed_over_is_constant=None in traced.paths,
            products=plan.config.products,
            statistic=statistic,
        )

        def update(path: str) -> Update:
            given = norms.get(path), traced_scales.get(path)
            return Update(path, plan.targets[path], False, dict(adapters[path]), *given)

        out = run(context, traced, plan, update, on_unused)
        return traced.result(out)

    adapted.__name__ = adapted.__qualname__ = f"adapted_{getattr(fn, '__name__', 'fn')}"
    return adapted


def accept_quantized(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes a function accept quantized weights where it expects arrays.

    Like `adapt`, without adapters. Use it to evaluate a quantized base, for example.

    Args:
        fn: a function of any arguments.

    Returns:
        A function of the same arguments, any array of which may be a quantized weight.
        Quantized weights are dequantized at each use, and have no gradient.

    Raises:
        TypeError: if `fn` is not a function.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"])
        >>> params = {"up": lora_jax.quant.quantize_int8(jnp.ones((8, 16)))}
        >>> lora_jax.accept_quantized(model)(params, jnp.ones((4, 8))).shape
        (4, 16)
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}.")

    @functools.wraps(fn)
    def dense(*args: P.args, **kwargs: P.kwargs) -> R:
        traced = _tracing.trace(
            lambda _, /, *args, **kwargs: fn(*args, **kwargs), (), args, kwargs
        )
        traced.check_values()
        context = Context(RULES, _refuse)
        values = list(map(unadapted, traced.arguments))
        out = _interpreter.evaluate_closed(context, traced.jaxpr, values)
        return traced.result(context.merge_all(out, None, "the function returns it"))

    return dense


def check_options(
    name: str,
    fn: Any,
    plan: Any,
    on_unused: Any,
    on_stop_gradient: Any,
    dropout_key: Any,
) -> None:
    """Raises unless the arguments that `adapt` and `adapt_rows` share are valid."""
    if not callable(fn):
        raise TypeError(
            f"fn must be a function fn(params, *args), got {type(fn).__name__}: the order "
            f"is {name}(fn, plan)."
        )
    plan_checks.check_plan(plan)
    checks.check_choice("on_unused", on_unused, ("error", "allow"))
    checks.check_choice("on_stop_gradient", on_stop_gradient, ("error", "base", "all"))
    if dropout_key is not None:
        checks.check_key("dropout_key", dropout_key)


def as_updated(
    leaves: Mapping[str, Any], plan: AdapterPlan, *of_paths: Mapping[str, Any], shared: Any
) -> dict[str, Any]:
    """The leaves by path, with the types that updated weights have in `jax.shard_map`.

    An updated weight varies over a mesh axis if an array of its paths does, or `shared`.
    """
    typed = dict(leaves)
    for leaf, paths in plan.by_leaf().items():
        own = [arrays.get(path) for arrays in of_paths for path in paths]
        typed[leaf] = placement.varying_with(leaves[leaf], own, shared)
    return typed


def run(
    context: Context,
    traced: _tracing.Traced,
    plan: AdapterPlan,
    update: Callable[[str], Update],
    on_unused: str,
) -> list[jax.Array]:
    """The outputs of a traced program with the adapters that `update` makes, by path."""
    by_leaf = plan.by_leaf()
    values = []
    for path, kind, value in zip(traced.paths, traced.types, traced.arguments, strict=True):
        if path not in by_leaf:
            values.append(unadapted(value))
            continue
        updates = list(map(update, by_leaf[path]))
        values.append(factored(kind, value, updates))
        if any(own.target.part for own in updates):
            context.masks.keep(values[-1], masks_of(values[-1], updates))
    if any(target.use for target in plan.targets.values()):
        # To recognize products of weights alone.
        own = zip(traced.paths, values, strict=True)
        context.add_constants(value for path, value in own if path is not None)
    out = _interpreter.evaluate_closed(context, traced.jaxpr, values)
    out = context.merge_all(out, None, "the function returns it")
    if on_unused == "error":
        _check_used(context.sightings, plan, traced.unused)
    plan_checks.check_axes(context.sightings, plan)
    return out


def has_dropout(plan: AdapterPlan) -> bool:
    """Whether some target has dropout."""
    return any(target.dropout for target in plan.targets.values())


def _reporter(on_merge: OnMerge) -> Callable[[Merge], None]:
    if callable(on_merge):
        return on_merge
    checks.check_choice("on_merge", on_merge, ("error", "allow"))
    return _refuse if on_merge == "error" else _log


def _refuse(merge: Merge) -> None:
    raise ValueError(
        f"the adapted weight {merge}. This use needs the merged weight. Allow the merge "
        "with on_merge='allow', or leave the weight out with LoraConfig(exclude=...)."
    )


def _log(merge: Merge) -> None:
    _LOG.info("merged for one use: %s", merge)


def _check_used(
    sightings: Sequence[Sighting], plan: AdapterPlan, unused_leaves: set[str]
) -> None:
    """Raises if the function never uses a weight, or neither uses nor returns a leaf."""
    used = {sighting.name for sighting in sightings if not sighting.moved}
    unused = [path for path in plan.targets if path not in used]
    trained = [path for path in plan.trained if path in unused_leaves]
    if unused or trained:
        kind = "adapted weights" if unused else "trained leaves"
        paths = ", ".join(map(repr, unused or trained))
        raise ValueError(
            f"the function never uses the {kind} {paths}: their adapters would have no "
            "effect and no gradient. Take the weight from params, and not from a closure, "
            "or allow it with on_unused='allow'."
        )
