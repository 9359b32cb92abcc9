"""Functions that stop the gradient of their weights: refused, or as the user says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from tests.support import asarray, normal, x64
from tests.transform.support import assert_same, both, check, plan_of, trained

W, X = normal(12, 10), normal(5, 12)
STACK = {"w": normal(3, 12, 12)}
ONE = {"w": W}


def identity(tree):
    return tree


def long(f):
    """Jitted, and of more equations than are evaluated in place."""

    @jax.jit
    def run(w, x):
        for _ in range(12):
            x = jnp.sin(x) * 1.5
        return f(w, x)

    return run


def scanned(stop):
    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ stop(w)), None), x, p["w"])[0]

    return fn


def scanned_constant(stop):
    def fn(p, x):
        step = lambda h, _: (jnp.tanh(h @ stop(p["w"][0])), None)  # noqa: E731
        return lax.scan(step, x, length=2)[0]

    return fn


def chosen(stop):
    def fn(p, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ stop(p["w"]), lambda: x @ p["w"] * 2.0)

    return fn


def target_network(stop):
    def fn(p, x):
        return jnp.sum((x @ p["w"] - jnp.sin(x @ stop(p["w"]))) ** 2)

    return fn


def straight_through(stop):
    def fn(p, x):
        w = p["w"]
        return x @ (stop(w) + (w - stop(w)))

    return fn


def inner_gradient(stop):
    """A gradient by the weight that stops it: JAX traces what is left of it."""

    def fn(p, x):
        energy = lambda x: jnp.sum(jnp.sin(x @ stop(p["w"])))  # noqa: E731
        return jax.grad(energy)(x)

    return fn


# Each function takes what stops: `stop_gradient`, or nothing for the reference.
STOPS = {
    "weight": (lambda stop: lambda p, x: x @ stop(p["w"]), ONE),
    "tree": (lambda stop: lambda p, x: x @ stop(p)["w"], ONE),
    "transpose": (lambda stop: lambda p, x: x @ stop(p["w"].T).T, ONE),
    "slice": (lambda stop: lambda p, x: x @ stop(p["w"][:, 2:7]), ONE),
    "column": (lambda stop: lambda p, x: x @ p["w"] + x @ stop(p["w"][:, 2:3]), ONE),
    "row": (lambda stop: lambda p, x: (x @ p["w"]) * stop(p["w"][3])[None], ONE),
    "row at an index": (
        lambda stop: lambda p, x: (x @ p["w"]) * stop(p["w"][jnp.int32(x[0, 0] > 9)])[None],
        ONE,
    ),
    "cast": (
        lambda stop: lambda p, x: x.astype("float32") @ stop(p["w"].astype("float32")),
        ONE,
    ),
    "scaled": (lambda stop: lambda p, x: x @ stop(p["w"] * 2.0), ONE),
    "rows of a table": (
        lambda stop: lambda p, x: stop(p["w"][jnp.array([3, 1, 3])]) * x[:3, :1],
        ONE,
    ),
    "jit": (lambda stop: lambda p, x: jax.jit(stop)(p)["w"].T @ x.T, ONE),
    "large jit": (lambda stop: lambda p, x: long(lambda w, x: x @ stop(w))(p["w"], x), ONE),
    "checkpoint": (
        lambda stop: lambda p, x: jax.checkpoint(lambda w: jnp.sin(x @ stop(w)))(p["w"]),
        ONE,
    ),
    "vmap": (lambda stop: lambda p, x: jax.vmap(lambda x: x @ stop(p["w"]))(x), ONE),
    "vmap of weights": (
        lambda stop: lambda p, x: jax.vmap(lambda w: x @ stop(w))(p["w"]),
        STACK,
    ),
    "cond": (chosen, ONE),
    "scan": (scanned, STACK),
    "scan of a constant": (scanned_constant, STACK),
    "target network": (target_network, ONE),
    "straight through": (straight_through, ONE),
    "inner gradient": (inner_gradient, ONE),
}


def case(name):
    make, params = STOPS[name]
    config = {"targets": "w", "axes": {"w": "bio" if params is STACK else "io"}}
    tolerance = 1e-5 if name == "cast" else 1e-10
    return make(lax.stop_gradient), make(identity), params, config, tolerance


@pytest.mark.parametrize("name", STOPS)
def test_refused_with_the_weight_the_line_and_the_option(name):
    fn, _, params, config, _ = case(name)
    plan = plan_of(fn, params, X, **config)
    found = [use for use in plan.uses["w"] if "stopped" in use.roles]
    assert found
    assert "test_stop_gradient.py:" in plan.explain("w")
    assert f"gradient stopped: 'w', {found[0]}" in str(plan)
    adapters = trained(params, plan)
    match = r"the adapted weight 'w' .*test_stop_gradient\.py:\d+.*on_stop_gradient='base'"
    for run in (lora_jax.adapt(fn, plan), jax.jit(lora_jax.adapt(fn, plan))):
        with pytest.raises(ValueError, match=match):
            run(params, adapters, X)


@pytest.mark.mostly_slow(15)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", STOPS)
def test_a_frozen_base_leaves_the_adapter_its_gradient(name, use_dora):
    fn, without, params, config, tolerance = case(name)
    if use_dora and name == "straight through":
        pytest.skip("refused: DoRA scales the weight, not the sum")
    with x64():
        plan = plan_of(fn, params, X, **config, use_dora=use_dora)
        adapters = trained(params, plan)
        options = {"on_stop_gradient": "base", "dense": without}
        got, want = both(fn, params, plan, adapters, X, **options)
        assert_same(got, want, tolerance)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(want[1][0]))


@pytest.mark.parametrize("name", STOPS)
def test_as_the_function_is_written(name):
    fn, _, params, config, tolerance = case(name)
    with x64():
        plan = plan_of(fn, params, X, **config)
        options = {"tolerance": tolerance, "on_stop_gradient": "all"}
        check(fn, params, X, plan=plan, **options)


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_changes_no_bit_of_a_new_adapter(name):
    fn, _, params, config, _ = case(name)
    plan = plan_of(fn, params, X, **config)
    options = ("base", "all")

    @jax.jit
    def outputs(params, x):
        adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        models = (lora_jax.adapt(fn, plan, on_stop_gradient=option) for option in options)
        return [model(params, adapters, x) for model in models], fn(params, x)

    got, want = outputs(params, X)
    for out in got:
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("stored", [False, True])
def test_a_weight_without_an_adapter_may_be_stopped(stored):
    params = {"w": asarray(W, "float32"), "v": asarray(W.T, "float32")}
    dense = params
    if stored:
        params = jax.tree.map(lora_jax.quant.quantize_int8, params)
        dense = jax.tree.map(lora_jax.quant.dequantize, params, is_leaf=is_quantized)
    x = asarray(X, "float32")

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ lax.stop_gradient(p["v"])

    plan = plan_of(fn, params, x, targets="w")
    adapters = trained(dense, plan)
    got = lora_jax.adapt(fn, plan)(params, adapters, x)

    @jax.jit
    def wanted(dense, adapters):
        return fn(lora_jax.merge_adapters(dense, adapters, plan), x), fn(dense, x)

    merged, frozen = wanted(dense, adapters)
    assert_same(got, merged, 1e-5)
    assert_same(jax.jit(lora_jax.accept_quantized(fn))(params, x), frozen, 1e-6)


is_quantized = lora_jax.quant.is_quantized


@pytest.mark.parametrize("option", ["base", "all"])
def test_a_quantized_base_that_is_stopped(option):
    stored = {"w": lora_jax.quant.quantize_int8(asarray(W, "float32"))}
    dense = {"w": lora_jax.quant.dequantize(stored["w"])}
    x = asarray(X, "float32")

    def fn(p, x):
        return jnp.tanh(x @ lax.stop_gradient(p)["w"].T[::-1].T)

    plan = plan_of(fn, stored, x)
    adapters = trained(dense, plan)
    adapted = lora_jax.adapt(fn, plan, on_stop_gradient=option)
    run = jax.jit(jax.value_and_grad(lambda a, p: jnp.sum(jnp.sin(adapted(p, a, x)))))
    got, want = run(adapters, stored), run(adapters, dense)
    assert_same(got, want, 1e-5)
    assert any(np.asarray(v).any() for v in jax.tree.leaves(got[1])) == (option == "base")
    with pytest.raises(ValueError, match="on_stop_gradient"):
        lora_jax.adapt(fn, plan)(stored, adapters, x)


def test_the_option_has_three_values():
    plan = plan_of(lambda p, x: x @ p["w"], ONE, X)
    with pytest.raises(ValueError, match=re.escape("on_stop_gradient")):
        lora_jax.adapt(lambda p, x: x @ p["w"], plan, on_stop_gradient="none")
