"""One tree with frozen leaves: values, state, and what the compiler makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import optim, quant
from tests import programs
from tests import support as tolerances
from tests.optim import support

FACTORS_OF_Q = ["adapters/layers/q/kernel/A", "adapters/layers/q/kernel/B"]


def test_frozen_leaves_stay_as_they_are():
    params, steps = support.tree(), support.gradients()
    trained = ["head/kernel", *FACTORS_OF_Q]
    patterns = ("head/k*", "adapters/layers/*/[AB]")
    optimizer = optim.trainable_and_frozen(params, patterns, optax.adamw(0.1))
    got, state = support.run(optimizer, params, steps)
    assert support.stateful(state) == sorted(trained)
    got = support.by_path(got)
    for path, before in support.by_path(params).items():
        if path in trained:
            grads = [support.by_path(step)[path] for step in steps]
            want = support.adamw(before, grads, [0.1] * 3, decay=1e-4)
            tolerances.assert_close(got[path], want, 64)
        else:
            np.testing.assert_array_equal(got[path], before)


def test_masked_alone_moves_frozen_leaves():
    # Guards the test above, and says why the function is there.
    params = support.tree()
    mask = jax.tree.map(lambda _: False, params) | {"head": True}
    got, _ = support.run(optax.masked(optax.adamw(0.1), mask), params, support.gradients())
    before = support.by_path(params)
    assert all((leaf != before[path]).any() for path, leaf in support.by_path(got).items())


def test_trainable_by_a_function_and_from_shapes():
    params = support.tree()
    shapes = jax.eval_shape(lambda: params)
    by_function, by_pattern = (
        optim.trainable_and_frozen(shapes, trainable, optax.adam(0.1))
        for trainable in (lambda path: path.startswith("head/"), "head/*")
    )
    steps = support.gradients()
    got, want = (support.run(o, params, steps) for o in (by_function, by_pattern))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert support.stateful(got[1]) == ["head/bias", "head/kernel"]


def test_a_function_may_return_a_bool_of_numpy():
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    optimizer = optim.trainable_and_frozen(
        params, lambda path: np.bool_(path == "head"), optax.sgd(1.0)
    )
    got, _ = optimizer.update(params, optimizer.init(params))
    np.testing.assert_array_equal(got["body"], 0.0)
    np.testing.assert_array_equal(got["head"], -1.0)


@jax.tree_util.register_pytree_node_class
class Callable:
    """A tree that can be called, as modules can."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def tree_flatten(self):
        return (self.weight, self.bias), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def __call__(self):
        raise AssertionError("only params")


def test_a_tree_may_be_callable():
    params = Callable(jnp.ones(2), jnp.ones(2))
    optimizer = optim.trainable_and_frozen(params, "*0", optax.sgd(1.0))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates.weight, [-1, -1])
    np.testing.assert_array_equal(updates.bias, [0, 0])


def test_quantized_weights_are_frozen_leaves():
    weight = quant.quantize_int8(support.draw(8, 6))
    params = {"adapters": {"w": support.adapter()}, "base": weight, "count": np.arange(3)}
    optimizer = optim.trainable_and_frozen(params, "adapters/*", optax.sgd(1.0))

    @jax.jit
    def step(params, state):
        def loss(params):
            adapter = params["adapters"]["w"]
            return jnp.sum(adapter["A"]) + jnp.sum(quant.dequantize(params["base"]))

        grads = jax.grad(loss, allow_int=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates)

    with jax.numpy_dtype_promotion("standard"):  # optax adds zeros to integers
        new = step(params, optimizer.init(params))
    jax.tree.map(np.testing.assert_array_equal, new["base"], weight)
    assert new["base"].codes.dtype == jnp.int8
    np.testing.assert_array_equal(new["count"], params["count"])
    moved = new["adapters"]["w"]["A"] - params["adapters"]["w"]["A"]
    np.testing.assert_allclose(moved, -1, rtol=1e-5)
    with pytest.raises(TypeError, match=r"chooses 'base', which is quantized \(Int8"):
        optim.trainable_and_frozen(params, "base", optax.sgd(1.0))


def test_no_gradient_products_of_frozen_leaves():
    weight = jax.ShapeDtypeStruct((support.WIDTH, support.WIDTH), "float32")
    params = {f"{i}": weight for i in range(support.LAYERS)}

    def loss(params, weights, x, c):
        for i in range(support.LAYERS):
            x = jnp.tanh(x @ params[f"{i}"])
        return jnp.sum(x * c)

    all_trained = support.compile_step(optax.adam(0.1), params, loss)
    last = optim.trainable_and_frozen(params, f"{support.LAYERS - 1}", optax.adam(0.1))
    product = 2 * support.TOKENS * support.WIDTH * support.WIDTH
    assert programs.flops(all_trained) > (3 * support.LAYERS - 1) * product
    # Forward, and the gradient of the last weight.
    flops = programs.flops(support.compile_step(last, params, loss))
    assert flops < (support.LAYERS + 1.5) * product
