"""Makes a `Model` of a module of each framework, with weights drawn in float64."""

import functools

import jax
import jax.numpy as jnp

from tests.public.checks import Model, drawn

BUILDERS = {}


def public(*packages):
    """Enters a function that builds a model; these packages have it, by import name."""

    def enter(build):
        BUILDERS[build.__name__] = packages, functools.cache(build)
        return build

    return enter


def of_haiku(function, *args, **fields):
    """A model of `function(is_training, *args)`, which calls Haiku modules.

    Its state is an argument; that of a batch norm is there only after it has trained.
    """
    import haiku as hk

    init = hk.transform_with_state(functools.partial(function, True)).init
    apply = hk.transform_with_state(functools.partial(function, False)).apply
    params, state = jax.eval_shape(init, jax.random.key(0), *args)

    def fn(params, state, *args):
        return apply(params, state, None, *args)[0]

    return Model(fn, drawn(params), (filled(state), *args), **fields)


def of_linen(module, *args, method=None, **fields):
    """A model of a Flax linen module; collections other than the params are arguments."""

    def init(*args):
        names = ("params", "dropout", "default")
        keys = dict(zip(names, jax.random.split(jax.random.key(0), 3), strict=True))
        return module.init(keys, *args, method=method)

    variables = dict(jax.eval_shape(init, *args))
    params = drawn(variables.pop("params"))

    def fn(params, state, *args):
        return module.apply({"params": params, **state}, *args, method=method)

    return Model(fn, params, (filled(variables), *args), **fields)


def of_nnx(make, *args, call=None, **fields):
    """A model of a Flax NNX module, made by `make(rngs)`."""
    from flax import nnx

    graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, rest, *args):
        module = nnx.merge(graphdef, params, rest, copy=True)
        return call(module, *args) if call else module(*args)

    return Model(fn, drawn(params), (rest, *args), **fields)


def of_equinox(make, *args, call=None, **fields):
    """A model of an Equinox module, made by `make(key)`; the module is the params."""
    import equinox as eqx

    module = make(jax.random.key(0))  # some have arrays that are no weights, as masks are

    def fn(module, *args):
        return call(module, *args) if call else module(*args)

    return Model(fn, drawn(module), args, **fields)


def filled(tree):
    """The shapes of a tree as arrays: means, variances, counters, keys."""

    def fill(leaf):
        if not hasattr(leaf, "dtype"):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.full(leaf.shape, 0.5)
        return jnp.ones(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, tree)
