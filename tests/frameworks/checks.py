"""What the tests of each framework ask of a model that is not prepared for adapters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from tests.support import assert_close, draw

ULPS = 2**12  # of float64: what sums in two orders differ by, in the deepest model here
STEPS = 6


class Model(NamedTuple):
    """A function that returns one array, its params and its other arguments."""

    fn: Callable[..., jax.Array]
    params: Any
    args: tuple[Any, ...]

    def plan(self, targets="all-linear", **fields) -> lora_jax.AdapterPlan:
        config = lora_jax.LoraConfig(
            rank=2, alpha=3.0, targets=targets, init=(_normal_init, "zeros"), **fields
        )
        return lora_jax.plan_adapters(config, self.params, self.fn, *self.args)


def axes_of(plan):
    """The letters of the axes of each adapted weight."""
    return {path: target.axes for path, target in plan.targets.items()}


def check_dora(model, targets):
    """Compares the output of DoRA with that of the merged model.

    At first nothing changes; no weight is merged for a use, or `adapt` raises.
    """
    fn, params, args = model
    plan = model.plan(targets, use_dora=True)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapted = lora_jax.adapt(fn, plan)
    run = compiled(lambda adapters, params, args: adapted(params, adapters, *args))
    plain = compiled(lambda params, args: fn(params, *args))
    assert_close(run(adapters, params, args), plain(params, args), ULPS)

    adapters = jax.tree.map(jnp.add, adapters, drawn(adapters))
    merged = lora_jax.merge_adapters(params, adapters, plan)
    assert_close(run(adapters, params, args), plain(merged, args), ULPS)


def check_stated(model, path, products):
    """Compares a layer that rounds its weight, and is stated, with the layer by hand.

    That is the layer with the frozen weight, plus the low-rank product, whose input the
    layer does not round: `args` are exact in its dtype, as is the cotangent.
    """
    fn, params, (x,) = model
    plan = model.plan(path, products=products)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapted = lora_jax.adapt(fn, plan)
    assert bool((adapted(params, adapters, x) == fn(params, x)).all())

    def by_hand(params, adapters, x):
        adapter, scale = adapters[path], plan.targets[path].scale
        return fn(params, x) + scale * (x @ adapter["A"] @ adapter["B"])

    adapters = jax.tree.map(jnp.add, adapters, drawn(adapters))
    for got, want in zip(
        *(
            jax.tree.leaves(_pulled(function, params, adapters, x))
            for function in (adapted, by_hand)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def _pulled(function, params, adapters, x):
    """The result, and the gradients of its sum."""
    out, pull = jax.vjp(lambda *args: function(params, *args), adapters, x)
    return out, pull(jnp.ones_like(out))


def check_training(model, axes, targets="all-linear", train=()):
    """Compares output and gradients of LoRA with those of the merged model, and trains.

    The plan finds these axes, by path; at first nothing changes; no weight is merged for a
    use, or `adapt` raises; a few steps lower a loss.
    """
    fn, params, args = model
    plan = model.plan(targets, train=train)
    assert axes_of(plan) == axes
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)

    def merged(params, adapters, *args):
        return fn(lora_jax.merge_adapters(params, adapters, plan), *args)

    plain = compiled(lambda params, args: fn(params, *args))(params, args)
    target = plain + normal(*plain.shape)
    step, reference = (
        functools.partial(_step_of(function), params=params, args=args, target=target)
        for function in (lora_jax.adapt(fn, plan), merged)
    )
    assert_close(step(adapters).output, plain, ULPS)

    nonzero = jax.tree.map(jnp.add, adapters, drawn(adapters))
    got, want = step(nonzero), reference(nonzero)
    assert_close(got.output, want.output, ULPS)
    for path, entry in plan.entries.items():
        for name in entry.adapter_shapes:
            assert_close(got.grads[path][name], want.grads[path][name], ULPS)

    losses = []
    for _ in range(STEPS):
        trained = step(adapters)
        adapters = trained.adapters
        losses.append(float(trained.loss))
    assert losses[-1] < losses[0]


class _Step(NamedTuple):
    """What a step of training has computed."""

    output: jax.Array
    loss: jax.Array
    grads: dict
    adapters: dict


def _step_of(model):
    """A step of training of `model(params, adapters, *args)`, compiled once."""
    optimizer = optax.sgd(0.03)

    def step(adapters, params, args, target):
        def loss(adapters):
            output = model(params, adapters, *args)
            return jnp.mean((output - target) ** 2), output

        (value, output), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, _ = optimizer.update(grads, optimizer.init(adapters))
        return _Step(output, value, grads, optax.apply_updates(adapters, updates))

    return compiled(step)


def compiled(function):
    """`jax.jit(function)`, where leaves that are no arrays stay static."""

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays, static):
        leaves, treedef = static
        leaves = (arrays.get(i, leaf) for i, leaf in enumerate(leaves))
        args, kwargs = treedef.unflatten(leaves)
        return function(*args, **kwargs)

    def call(*args, **kwargs):
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if _is_array(leaf)}
        static = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
        return run(arrays, (static, treedef))

    return call


def _is_array(leaf):
    return isinstance(leaf, jax.Array | np.ndarray)


# No `jax.random` here, which would compile for each shape.
normal = functools.partial(draw, dtype="float64")


def drawn(tree, seed=0):
    """The tree with its floating-point arrays, or their shapes, replaced by weights.

    The weights are small normal values in float64.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.normal(0, 0.3, leaf.shape))
        return leaf

    return jax.tree.map(draw, tree)


def _normal_init(key, shape, dtype):
    """An initializer of `A`."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(0, 0.3, shape), dtype)
