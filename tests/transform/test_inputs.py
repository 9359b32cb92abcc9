"""Sums over the inputs of weights: each kind of product, as gradients of `A`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax.transform.inputs import observe
from tests import programs, reference
from tests.support import asarray, draw

GROUPS = asarray([3, 0, 4], "int32")


def patches(x):
    """The inputs `(rows, 3 * 4)` of a convolution over windows of three."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    windows = np.stack([padded[:, i : i + x.shape[1]] for i in range(3)], axis=2)
    return windows.reshape(-1, 12)


def convolve(params, x):
    return lax.conv_general_dilated(
        x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def by_group(x):
    return np.split(x, np.cumsum(GROUPS)[:-1])


# A function, a weight, an argument, and the inputs of each matrix of the weight's stack.
CASES = {
    "product": (lambda p, x: x @ p["w"], (6, 5), (7, 6), lambda x: [x]),
    "two uses": (
        lambda p, x: (x @ p["w"], jnp.flip(x[:3]) @ p["w"]),
        *((6, 5), (7, 6)),
        lambda x: [np.concatenate([x, x[:3][::-1, ::-1]])],
    ),
    # Each of the two products counts the inputs.
    "split outputs": (
        lambda p, x: [x @ own for own in jnp.split(p["w"], 2, axis=1)],
        *((6, 4), (7, 6)),
        lambda x: [np.concatenate([x, x])],
    ),
    "experts": (
        lambda p, x: lax.ragged_dot(x, p["w"], GROUPS),
        *((3, 6, 5), (7, 6), by_group),
    ),
    "convolution": (convolve, (3, 4, 5), (2, 6, 4), lambda x: [patches(x)]),
}


def sums(name, statistic, rank):
    fn, shape, of_x, inputs = CASES[name]
    params, x = {"w": draw(*shape)}, draw(*of_x)
    config = lora_jax.LoraConfig(rank, float(rank), ("w",))
    plan = lora_jax.plan_adapters(config, params, fn, x)
    zero = plan.targets["w"].adapter_shapes
    a = draw(*zero["A"])
    total = observe(fn, plan, statistic, on_merge="error", on_stop_gradient="error")
    of_a = lambda a: total(params, {"w": {"A": a, "B": jnp.zeros(zero["B"])}}, x)  # noqa: E731
    return jax.jit(jax.grad(of_a))(a), reference.f64(a), inputs(reference.f64(x))


@pytest.mark.parametrize("name", CASES)
def test_products_with_the_covariance(name):
    got, a, inputs = sums(name, "gram", 2)
    wanted = [
        x.T @ x @ own for x, own in zip(inputs, a.reshape(-1, *a.shape[-2:]), strict=True)
    ]
    np.testing.assert_allclose(got, np.reshape(wanted, got.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_moments(name):
    got, _, inputs = sums(name, "moments", 3)
    wanted = [
        np.stack([x.sum(0), (x**2).sum(0), np.full(x.shape[1], len(x))], -1) for x in inputs
    ]
    if name == "convolution":  # rows outside of the input do not count
        wanted[0][:, 2] = np.repeat([10, 12, 10], 4)
    np.testing.assert_allclose(got, np.reshape(wanted, got.shape), rtol=1e-4, atol=1e-4)


def test_complex_inputs_are_an_error():
    def fn(params, x):
        return jnp.abs(lax.complex(x, x) @ params["w"].astype("complex64"))

    params, x = {"w": draw(6, 5)}, draw(7, 6)
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(2), params, fn, x)
    with pytest.raises(TypeError, match="the inputs of an adapted weight are complex"):
        lora_jax.init_adapters_from_inputs(jax.random.key(0), params, plan, fn, [(x,)])


def test_no_covariance_is_computed_and_no_backward_pass_is_run():
    def fn(params, x):
        def block(x, w):
            return jnp.tanh(x @ w), None

        return lax.scan(block, x, params["w"])[0]

    params, x = {"w": draw(3, 64, 64)}, draw(9, 64)
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(2, 2.0), params, fn, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    total = observe(fn, plan, "gram", on_merge="error", on_stop_gradient="error")

    def of_a(a, params, x):
        return total(params, {"w": {"A": a, "B": adapters["w"]["B"]}}, x)

    compiled = jax.jit(jax.grad(of_a)).lower(adapters["w"]["A"], params, x).compile()
    text = compiled.as_text()
    frozen = jax.jit(fn).lower(params, x).compile().as_text()
    made, own = (
        programs.are_weights(programs.made_shapes(one), plan) for one in (text, frozen)
    )
    assert len(made) <= len(own)
    products = programs.product_flops(text) / programs.product_flops(frozen)
    assert products < 1.5
