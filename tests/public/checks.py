"""What is asked of a public model, and how such a model is made small."""

import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax._core import tree_paths
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
    no_dora: str = ""
    dtype: str = "float64"
    ulps: int = ULPS


def check(model: Model, **config) -> None:
    """Compares the adapted model with the merged one: outputs, gradients, reports."""
    fn, params, args = model.fn, model.params, model.args
    fields = {"rank": 2, "alpha": 3.0, **model.config, **config}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(**fields), params, fn, *args)
    assert_matched(model.left_out, matrices_without_adapter(params, plan))

    merges = []
    # As the model is written, which is what the merged weights compute.
    options: Any = {"on_merge": merges.append, "on_stop_gradient": "all"}
    adapted = lora_jax.adapt(fn, plan, **options)

    def run(params, adapters, args):
        return adapted(params, adapters, *args)

    def reference(params, adapters, args):
        return fn(merged(params, adapters, plan), *args)

    new = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters = jax.tree.map(lambda leaf: leaf + drawn_like(leaf), new)
    step, want = compiled(with_gradients(run)), compiled(with_gradients(reference))
    plain = compiled(lambda params, args: floating(fn(params, *args)))(params, args)
    got = step(params, new, args)[0]
    assert_matched(model.merged, {merge.path for merge in merges})
    same(model, got, plain)

    (outputs, gradients), (outputs_of_merged, gradients_of_merged) = (
        function(params, adapters, args) for function in (step, want)
    )
    same(model, outputs, outputs_of_merged)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(outputs, plain, strict=True))
    for path, target in plan.targets.items():
        for name in target.adapter_shapes:
            gradient = gradients_of_merged[path][name]
            assert np.abs(gradient).max() > 0, f"no gradient reaches {name} of {path}"
            same(model, [gradients[path][name]], [gradient], f"{name} of {path}")

    whole = lora_jax.merge_adapters(params, adapters, plan)
    expected = merged(params, adapters, plan)
    for path, weight in tree_paths.leaf_paths(whole).items():
        if path in plan.targets:
            assert_close(weight, tree_paths.leaf_paths(expected)[path], 2**8)


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
