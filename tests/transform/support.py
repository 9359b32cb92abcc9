"""What the tests of `adapt` share: adapters that do something, and the merged reference."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax._core import tree_paths
from tests import programs
from tests.support import asarray, optimizations

CONFIG = {"rank": 3, "alpha": 6.0}


def plan_of(fn, params, *args, **config):
    """The plan for a function, of rank 3 and scale 2 if the test does not say otherwise."""
    return lora_jax.plan_adapters(
        lora_jax.LoraConfig(**{**CONFIG, **config}), params, fn, *args
    )


def trained(params, plan, seed=0, size=1.0):
    """Adapters in which nothing is zero.

    NumPy draws them, in the dtypes of `init_adapters`: no program is compiled for it.
    """
    rng = np.random.default_rng(seed)
    leaves = tree_paths.leaf_paths(params)  # with quantized weights whole

    def draw(path, name, shape):
        leaf = leaves[plan.leaf(path)]
        # `float` is float32 where JAX has no float64.
        dtype = plan.config.dtype or (float if leaf.dtype == "float64" else "float32")
        # Magnitudes have a sign, and a trained leaf is near what it was.
        start = {"m": 3.0, "value": leaf}.get(name, 0.0)
        return asarray(size * (np.asarray(start, float) + rng.normal(size=shape)), dtype)

    return {
        path: {name: draw(path, name, shape) for name, shape in own.adapter_shapes.items()}
        for path, own in plan.entries.items()
    }


def as_index(part):
    """The NumPy index that the text of a part is."""
    entries = eval(f"np.index_exp{part or '[...]'}", {"np": np})
    return tuple(np.array(e) if isinstance(e, list) else e for e in entries)


def merged_matrix(weight, adapter, target, scale):
    """A dense weight with its update.

    DoRA's norms are constants to differentiation, as section 4.3 of its paper has it.
    """
    order = (*target.batch_axes, *target.in_axes, *target.out_axes)
    matrix = weight.transpose(order).reshape(target.matrix_shape)
    if jnp.ndim(scale):  # one for each index of the batch axes
        scale = scale[..., None, None]
    matrix = matrix + scale * jnp.matmul(adapter["A"], adapter["B"])
    if "m" in adapter:
        norm = jnp.sqrt(jnp.sum(matrix**2, axis=-2, keepdims=True))
        matrix = adapter["m"][..., None, :] * matrix / jax.lax.stop_gradient(norm)
    shape = [weight.shape[axis] for axis in order]
    return matrix.reshape(shape).transpose(np.argsort(order))


def merged(params, adapters, plan, scales=None, use=""):
    """The params with dense weights, formed apart from the library's own merge.

    With `use`, as one kind of use of them sees them.
    """

    def merge(path, weight):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in plan.trained:
            return adapters[name]["value"].astype(weight.dtype)
        for own, target in plan.targets.items():
            if plan.leaf(own) == name and target.use in ("", use):
                weight = jnp.asarray(weight)
                scale = (scales or plan.scales)[own]
                index = as_index(target.part)
                part = merged_matrix(weight[index], adapters[own], target.alone, scale)
                weight = weight.at[index].set(part)
        return weight

    return jax.tree_util.tree_map_with_path(merge, params)


def loss_of(fn):
    """A loss with a different cotangent for every entry of every output."""

    def loss(*args):
        leaves = jax.tree.leaves(fn(*args))
        return sum(
            jnp.sum(jnp.sin(leaf) * (1 + i)) for i, leaf in enumerate(leaves)
        ), leaves

    return loss


def both(fn, params, plan, adapters, *args, dense=None, **options):
    """Value, outputs and gradients of the adapted function, and of the merged one.

    The latter is `dense` on the merged params, or else `fn`.
    """
    params = jax.device_put(params)  # what closes over them may index them
    floating = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]
    wrt = (0, *(1 + i for i in floating))
    model = lora_jax.adapt(fn, plan, **options)

    def adapted(adapters, *args):
        return model(params, adapters, *args)

    def reference(adapters, *args):
        return (dense or fn)(merged(params, adapters, plan), *args)

    def run(*given):
        functions = (
            jax.value_and_grad(loss_of(f), wrt, has_aux=True) for f in (adapted, reference)
        )
        return tuple(f(*given) for f in functions)

    with optimizations(False):  # what counts here are values
        return jax.jit(run)(adapters, *args)


def compiled_steps(fn, params, plan, *args, **options):
    """Functions that compile training steps: of the adapted, the frozen and the merged one.

    With all optimizations: they are for tests of what the compiler makes of a program.
    """
    adapters = trained(params, plan)
    model = lora_jax.adapt(fn, plan, **options)
    floating = (i for i, x in enumerate(args, 2) if jnp.issubdtype(x.dtype, jnp.floating))
    wrt = (0, *floating)

    def step(fn):
        def compiled():
            function = jax.jit(jax.value_and_grad(loss_of(fn), wrt, has_aux=True))
            with optimizations(True):
                return function.lower(adapters, params, *args).compile()

        return compiled

    adapted = step(lambda adapters, params, *args: model(params, adapters, *args))
    frozen = step(lambda adapters, params, *args: fn(params, *args))
    dense = step(lambda a, params, *args: fn(merged(params, a, plan), *args))
    return adapted, frozen, dense


def check_forms_no_weight(fn, params, plan, *args, telling, **options):
    """Asserts that `adapt` makes no arrays of the shape of a weight, or of its part.

    That is: no more than the frozen function. If `telling`, the merged one makes more of
    them, so that the test can tell.
    """

    def formed(compiled):
        shapes = programs.made_shapes(compiled().as_text())
        return len(programs.are_weights(shapes, plan))

    adapted, frozen, dense = compiled_steps(fn, params, plan, *args, **options)
    if (found := formed(adapted)) or telling:
        allowed = formed(frozen)
        assert found <= allowed
        assert not telling or formed(dense) > allowed


def assert_same(got, want, tolerance=1e-10):
    """Asserts that two trees agree, relative to the largest entry of each array.

    An array of zeros may come out as roundings of sums that cancel.
    """
    others = dict(jax.tree_util.tree_leaves_with_path(got))
    for path, value in jax.tree_util.tree_leaves_with_path(want):
        other = others[path]
        if isinstance(other, jax.Array) and isinstance(value, jax.Array):
            assert (other.shape, other.dtype) == (value.shape, value.dtype), path
        other, value = np.asarray(other), np.asarray(value)  # then nothing is compiled
        error = np.max(np.abs(other - value), initial=0)
        scale = np.max(np.abs(value), initial=0)
        assert error <= tolerance * max(scale, 1e-3), (
            f"{jax.tree_util.keystr(path)}: off by {error:.3g} of {scale:.3g}"
        )


def check(fn, params, *args, config=None, plan=None, tolerance=1e-10, **options):
    """Asserts that adapted and merged function agree in float64; returns the plan."""
    plan = plan or plan_of(fn, params, *args, **(config or {}))
    adapters = trained(params, plan)
    got, want = both(fn, params, plan, adapters, *args, **options)
    assert_same(got, want, tolerance)
    return plan


def check_values(fn, params, *args, config, tolerance, **options):
    """`check` without the gradients."""
    params = jax.device_put(params)
    plan = plan_of(fn, params, *args, **config)
    adapters = trained(params, plan)
    with optimizations(False):  # what counts here are values
        model = lora_jax.adapt(fn, plan, **options)

        def run(*args):
            want = fn(merged(params, adapters, plan), *args)
            return model(params, adapters, *args), want

        got, want = jax.jit(run)(*args)
    assert_same(got, want, tolerance)
    return plan
