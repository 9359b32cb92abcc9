"""What is asked of a public model, and how such a model is made small."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._core import tree_paths
from lora_jax.plan import parts
from tests.frameworks.checks import compiled
from tests.support import assert_close, draw
from tests.transform.support import merged

ULPS = 2**20  # rounding units; 2e-10 in float64, for sums in two orders through all layers


class Model(NamedTuple):
    """A public model at toy size.

    Attributes:
        fn: called with the params and the arguments; returns a pytree of arrays.
        params: of any structure.
        args: the other arguments.
        config: fields of the `LoraConfig`; targets are `"all-linear"` if it has none.
        left_out: patterns of the matrices that have no adapter, each of which matches.
        merged: patterns of the weights that are merged for some use.
        merged_in_dora: patterns of those that only DoRA merges, since it scales what is
            summed, or two parts of a complex weight.
        no_dora: why DoRA is not tried; empty if it is.
        dtype: in which the model computes, where it is not float64.
        ulps: the rounding units of that dtype that results may differ by.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    config: Mapping[str, Any] = {}
    left_out: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    merged_in_dora: tuple[str, ...] = ()
    no_dora: str = ""
    dtype: str = "float64"
    ulps: int = ULPS


def check(model: Model, **config) -> None:
    """Compares the adapted model with the merged one, whole and in parts."""
    plan = plan_of(model, **config)
    assert_matched(model.left_out, matrices_without_adapter(model.params, plan))
    in_dora = model.merged_in_dora if plan.config.use_dora else ()
    assert_matched(model.merged + in_dora, compare(model, plan))
    for targets in cuts_of(plan):
        # All outputs of a part may be zeros of a `relu`: those of MobileNet are.
        compare(model, plan_of(model, **config, targets=targets), may_be_unreached=0.3)


def plan_of(model: Model, **config):
    """The plan of a model; fields of the config replace those of the model."""
    fields = {"rank": 2, "alpha": 3.0, **model.config, **config}
    config = lora_jax.LoraConfig(**fields)
    return lora_jax.plan_adapters(config, model.params, model.fn, *model.args)


def cuts_of(plan) -> list[list[str]]:
    """Parts of all weights of a plan: half of the outputs, all layers but the first."""
    halves = {path: half_of(path, target) for path, target in plan.targets.items()}
    layers = {
        path: part_of(path, target.batch_axes[0], 1)
        for path, target in plan.targets.items()
        if target.batch_axes and target.shape[target.batch_axes[0]] > 1
    }
    return [[*halves.values()], *([[*(halves | layers).values()]] if layers else [])]


def half_of(path, target):
    """The second half of the outputs; the whole weight if that is one output."""
    axis = max(target.out_axes, key=lambda axis: target.shape[axis])
    half = target.shape[axis] // 2
    is_vector = target.matrix_shape[-1] // target.shape[axis] * (target.shape[axis] - half)
    return path if is_vector < 2 else part_of(path, axis, half)


def part_of(path, axis, start):
    """A weight from an index of an axis on."""
    return f"{path}[{':,' * axis}{start}:]"


def compare(model: Model, plan, may_be_unreached=0.0) -> set[str]:
    """Compares outputs, gradients and merges; returns what is merged for a use.

    Some of the adapters may get no gradient, as a share of them.
    """
    fn, params, args = model.fn, model.params, model.args
    merges, run = adapted(model, plan)

    def reference(params, adapters, args):
        return fn(merged(params, adapters, plan), *args)

    new = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters = jax.tree.map(lambda leaf: leaf + drawn_like(leaf), new)
    step, want = compiled(with_gradients(run)), compiled(with_gradients(reference))
    plain = outputs_of(model)
    same(model, step(params, new, args)[0], plain)

    (outputs, gradients), (outputs_of_merged, gradients_of_merged) = (
        function(params, adapters, args) for function in (step, want)
    )
    same(model, outputs, outputs_of_merged)
    assert differ(outputs, plain)
    unreached = set()
    for path, target in plan.targets.items():
        for name in target.adapter_shapes:
            gradient = gradients_of_merged[path][name]
            same(model, [gradients[path][name]], [gradient], f"{name} of {path}")
            if np.abs(gradient).max() == 0:
                unreached.add(path)
    assert len(unreached) <= may_be_unreached * len(plan.targets), unreached

    whole = lora_jax.merge_adapters(params, adapters, plan)
    expected = tree_paths.leaf_paths(merged(params, adapters, plan))
    for path, weight in tree_paths.leaf_paths(whole).items():
        if path in plan.by_leaf():
            assert_close(weight, expected[path], 2**8)
    return {plan.leaf(merge.path) for merge in merges}


def check_uses(model: Model, **config) -> None:
    """Adapts one kind of use of the tables that are looked up and multiplied, if any.

    No function has untied copies of them. So the adapters of both kinds with the same
    values must be those of the whole table, gradients add up, and only the rows that are
    looked up have a gradient of that kind.
    """
    whole = plan_of(model, **config)
    tied = [
        path
        for path, target in whole.targets.items()
        if {*parts.USES} <= {use.kind(target.batch_axes) for use in whole.uses[path]}
    ]
    if not tied:
        return
    params, args, plain = model.params, model.args, outputs_of(model)
    new = lora_jax.init_adapters(jax.random.key(0), params, whole)
    values = jax.tree.map(lambda leaf: leaf + drawn_like(leaf), new)

    def run(*uses):
        targets = [f"{path}@{use}" if use else path for path in tied for use in uses]
        plan = plan_of(model, **config, targets=targets)
        # With the axes of the whole table, which has the inputs of its first use.
        own = {
            key: dataclasses.replace(whole.targets[plan.leaf(key)], use=target.use)
            for key, target in plan.targets.items()
        }
        plan = dataclasses.replace(plan, targets=own)
        adapters = {key: values[plan.leaf(key)] for key in plan.targets}
        return compiled(with_gradients(adapted(model, plan)[1]))(params, adapters, args)

    if any(fnmatch.fnmatchcase(path, p) for path in tied for p in model.merged):
        with pytest.raises(ValueError, match="neither a look-up of rows nor a product"):
            run(*parts.USES)
        return
    (outputs, of_whole), (of_both, gradients) = run(""), run(*parts.USES)
    same(model, of_both, outputs)
    for path in tied:
        own = [gradients[f"{path}@{use}"] for use in parts.USES]
        total = jax.tree.map(jnp.add, *own)
        same(model, jax.tree.leaves(total), jax.tree.leaves(of_whole[path]))
        looked_up = {*np.ravel(args[-1]).tolist()}
        every = {*range(whole.targets[path].shape[axis_of_rows(whole, path)])}
        assert [reached(one, whole, path) for one in own] == [looked_up, every]
    for use in parts.USES:
        alone, _ = run(use)
        assert differ(alone, plain)
        assert differ(alone, outputs)


def axis_of_rows(plan, path):
    """The axis of a table that look-ups index."""
    (use, *_) = (use for use in plan.uses[path] if use.kind(()) == parts.LOOKUP)
    return use.roles.index("indexed")


def reached(gradient, plan, path):
    """The rows of a table whose entries of a factor have a gradient."""
    is_input = axis_of_rows(plan, path) in plan.targets[path].in_axes
    rows = gradient["A"].T if is_input else gradient["B"]
    return {*np.flatnonzero(np.abs(rows).max(axis=0) > 0).tolist()}


def adapted(model, plan):
    """A list that gets the merges, and a function of params, adapters and arguments."""
    merges = []
    # As the model is written, which is what the merged weights compute.
    options: Any = {"on_merge": merges.append, "on_stop_gradient": "all"}
    run = lora_jax.adapt(model.fn, plan, **options)
    return merges, lambda params, adapters, args: run(params, adapters, *args)


def outputs_of(model):
    """The floating-point outputs without adapters."""
    plain = compiled(lambda params, args: floating(model.fn(params, *args)))
    return plain(model.params, model.args)


def differ(got, want):
    """Whether lists of outputs clearly differ."""
    return any(np.abs(a - b).max() > 1e-3 for a, b in zip(got, want, strict=True))


def same(model, got, want, what="the output"):
    """Asserts that lists of arrays agree to the model's number of rounding units."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(b).all(), f"{what} is not finite"
        scale, eps = np.abs(b).max(initial=0), float(jnp.finfo(model.dtype).eps)
        error = np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)
        assert error <= model.ulps * eps * scale, (
            f"{what} is off by {error:.3g} of {scale:.3g}, "
            f"{error / (eps * scale):.3g} rounding units, allowed {model.ulps}"
        )


def assert_matched(patterns, paths):
    """Asserts that each path matches a pattern, and each pattern a path."""
    unmatched = {
        path for path in paths if not any(fnmatch.fnmatchcase(path, p) for p in patterns)
    }
    idle = [p for p in patterns if not fnmatch.filter(paths, p)]
    assert (unmatched, idle) == (set(), [])


def matrices_without_adapter(params, plan):
    """Paths of the floating-point weights that "all-linear" or the patterns leave out."""
    return {
        path
        for path, leaf in tree_paths.leaf_paths(params).items()
        if path in plan.skipped and is_floating(leaf) and np.squeeze(leaf).ndim >= 2
    }


def with_gradients(function):
    """A function that returns its floating-point outputs, and gradients for adapters.

    The loss has another cotangent for each entry of each output.
    """

    def run(params, adapters, args):
        def loss(adapters):
            outputs = floating(function(params, adapters, args))
            weighted = (jnp.vdot(drawn_like(y), y).real for y in outputs)
            return sum(weighted), outputs

        gradients, outputs = jax.grad(loss, has_aux=True)(adapters)
        return outputs, gradients

    return run


def floating(tree):
    """The arrays of a tree that are floating point or complex."""
    return [
        leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def is_floating(leaf):
    """Whether a leaf is an array of floating-point numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def drawn_like(leaf, seed=0):
    """Normal values: a matrix of them about keeps the size of its input."""
    rng = np.random.default_rng([seed, *leaf.shape])
    return jnp.asarray(rng.normal(0, max(leaf.size, 1) ** -0.25, leaf.shape), leaf.dtype)


def drawn(tree, dtype="float64"):
    """The tree with its floating-point arrays, or their shapes, replaced by weights.

    Matrices are normal, vectors are normal around one, so that scales scale.
    """
    leaves, treedef = jax.tree.flatten(tree)

    def draw(i, leaf):
        if not is_floating(leaf):
            return leaf
        value = drawn_like(np.empty(leaf.shape, dtype), i)
        return value if value.ndim > 1 else 1 + 0.3 * value

    return treedef.unflatten([draw(i, leaf) for i, leaf in enumerate(leaves)])


normal = functools.partial(draw, dtype="float64")


def tokens(*shape, below=11):
    """Tokens, all of which differ from their neighbors."""
    return jnp.arange(np.prod(shape)).reshape(shape) * 3 % below
