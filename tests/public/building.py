"""Makes a `Model` of a module of each framework, with weights drawn in float64."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tests.public.checks import Model, drawn

# By name: the package that has the model, by its import name, and what builds it.
MODELS: dict[str, tuple[str, Callable[[], Model]]] = {}


def public(package, name=None):
    """Enters a function that builds a model of a package, by its name."""

    def enter(build):
        MODELS[name or build.__name__] = package, functools.cache(build)
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


def of_linen(module, *args, output=None, **fields):
    """A model of a Flax linen module; collections other than the params are arguments.

    `output` is applied to what the module returns.
    """

    def init(*args):
        names = ("params", "dropout", "default")
        keys = dict(zip(names, jax.random.split(jax.random.key(0), 3), strict=True))
        return dict(module.init(keys, *args))

    variables = jax.eval_shape(init, *args)
    params = drawn(variables.pop("params"))

    def fn(params, state, *args):
        out = module.apply({"params": params, **state}, *args)
        return output(out) if output else out

    return Model(fn, params, (filled(variables), *args), **fields)


def of_nnx(make, *args, call=None, **fields):
    """A model of a Flax NNX module, made by `make(rngs)`."""
    import flax
    from flax import nnx

    flax.config.update("flax_always_shard_variable", False)  # there is no mesh
    graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, rest, *args):
        module = nnx.merge(graphdef, params, rest, copy=True)
        return call(module, *args) if call else module(*args)

    return Model(fn, drawn(params), (rest, *args), **fields)


def of_equinox(make, *args, call=None, **fields):
    """A model of an Equinox module, made by `make(key)`; the module is the params."""
    module = make(jax.random.key(0))

    def fn(module, *args):
        return call(module, *args) if call else module(*args)

    return Model(fn, drawn(module), args, **fields)


def of_keras(model, *args, **fields):
    """A Keras model; its params are its trainable variables, by path.

    Two variables may have one path, as those of KerasHub's T5: then by number as well.
    """
    paths = [variable.path for variable in model.trainable_variables]
    names = [
        path if paths.count(path) == 1 else f"{path}/{i}" for i, path in enumerate(paths)
    ]
    shapes = [jax.ShapeDtypeStruct(v.shape, "float64") for v in model.trainable_variables]
    params = dict(zip(names, drawn(shapes), strict=True))
    rest = [variable.value for variable in model.non_trainable_variables]

    def fn(params, rest, *args):
        values = [params[name] for name in names]
        return model.stateless_call(values, rest, *args, training=False)[0]

    return Model(fn, params, (rest, *args), **fields)


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
