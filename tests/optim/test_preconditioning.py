"""Gradients divided by the products of the other factor, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import optim
from lora_jax.optim import preconditioning
from tests import support as tolerances
from tests.optim import support


def t(x):
    return np.swapaxes(np.asarray(x, np.float64), -1, -2)


def both(gradient, adapter, damping):
    """The preconditioned gradients of an adapter's factors, in float64."""
    a = t(support.solved(adapter["B"], t(gradient["A"]), damping))
    return {"A": a, "B": support.solved(t(adapter["A"]), gradient["B"], damping)}


def test_golden_step():
    tensors, case = support.golden("riemannian_sgd")
    params = {"w": {name: tensors[name] for name in "AB"}}
    grads = {"w": {"A": tensors["gradA"], "B": tensors["gradB"]}}
    precondition = optim.scale_by_riemannian(case["meta"]["reg"])
    optimizer = optax.chain(precondition, optax.sgd(case["meta"]["lr"]))
    got, _ = support.run(optimizer, params, [grads])
    for name in "AB":
        tolerances.assert_golden(case, got["w"][name], tensors[f"{name}1"])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", tolerances.DTYPES)
def test_riemannian(batch, dtype):
    params = {"w": support.adapter(*batch, dtype=dtype, rest=("m",)), "x": jnp.ones(2)}
    grads = params | {"w": support.adapter(*batch, dtype=dtype, rest=("m",), seed=1)}
    transform = optim.scale_by_riemannian(0.1)
    got, state = jax.jit(transform.update)(grads, transform.init(params), params)
    want = both(grads["w"], params["w"], 0.1)
    for name in "AB":
        assert got["w"][name].dtype == dtype
        ulps = 100 if dtype == "float32" else 1
        tolerances.assert_close(got["w"][name], want[name], ulps)
    np.testing.assert_array_equal(got["w"]["m"], grads["w"]["m"])
    np.testing.assert_array_equal(got["x"], grads["x"])
    assert jax.tree.leaves(state) == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_float64_is_enabled(dtype):
    with tolerances.x64():
        params, grads = ({"w": support.adapter(seed=s, dtype=dtype)} for s in (0, 1))
        update = jax.jit(optim.scale_by_riemannian().update)
        got, _ = update(grads, optax.EmptyState(), params)
        want = both(grads["w"], params["w"], 1e-2)
        for name in "AB":
            tolerances.assert_close(got["w"][name], want[name], 100, dtype=dtype)


def test_the_step_does_not_depend_on_which_factor_is_large():
    # (A c, B / c) is the same update; so is the product after a preconditioned step.
    adapter, weight = support.adapter(), support.draw(support.N_IN, support.N_OUT)

    @jax.jit
    def product_after_a_step(c):
        params = {"w": {"A": adapter["A"] * c, "B": adapter["B"] / c}}
        grads = jax.grad(lambda p: jnp.sum(weight * (p["w"]["A"] @ p["w"]["B"])))(params)
        optimizer = optax.chain(optim.scale_by_riemannian(1e-6), optax.sgd(0.1))
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        new = optax.apply_updates(params, updates)["w"]
        return new["A"] @ new["B"]

    tolerances.assert_close(product_after_a_step(8.0), product_after_a_step(1.0), 500)


def test_zero_b_at_the_start():
    params = {"w": support.adapter() | {"B": jnp.zeros((support.RANK, support.N_OUT))}}
    grads = {"w": support.adapter(seed=1) | {"A": jnp.zeros((support.N_IN, support.RANK))}}
    got, _ = optim.scale_by_riemannian().update(grads, optax.EmptyState(), params)
    np.testing.assert_array_equal(got["w"]["A"], 0.0)
    assert np.isfinite(got["w"]["B"]).all()


@settings(max_examples=30)
@given(
    rank=st.sampled_from([1, 5, 12]),
    n=st.sampled_from([2, 8]),
    damping=st.sampled_from([1e-30, 1e-8, 1e-2, 10.0]),
    scale=st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
    seed=st.integers(0, 9),
)
def test_factors_of_less_than_full_rank(rank, n, damping, scale, seed):
    factor = support.draw(rank, n, seed=seed) * scale
    gradient = factor @ support.draw(n, 5, seed=seed)
    solved = jax.jit(preconditioning.solve_gram)(factor, gradient, damping)
    assert np.isfinite(solved).all()
    # In exact arithmetic |F^T (F F^T + d I)^-1 F| is below 1.
    back = np.asarray(factor.T, np.float64) @ np.asarray(solved, np.float64)
    assert np.linalg.norm(back) <= 2 * np.linalg.norm(support.draw(n, 5, seed=seed))


def test_the_least_damping_is_the_rank_in_rounding_units():
    # In float32 the unit is 2^-23, and 1 / (2 * 2^-23) is what a zero direction gets.
    factor, gradient = jnp.eye(2, 1), jnp.eye(2, 1)[::-1]
    solved = preconditioning.solve_gram(factor, gradient, 1e-30)
    np.testing.assert_array_equal(solved, [[0.0], [2.0**22]])
    more = [(0, 6), (0, 0)]  # padding does not count
    solved = preconditioning.solve_gram(
        jnp.pad(factor, more), jnp.pad(gradient, more), 1e-30
    )
    np.testing.assert_array_equal(solved, jnp.pad(jnp.array([[0.0], [2.0**22]]), more))


def test_the_least_damping_of_an_entry_does_not_depend_on_the_others():
    factor = jnp.stack([2.0**20 * jnp.eye(2), jnp.eye(2)])
    solved = preconditioning.solve_gram(factor, factor, 1e-30)
    tolerances.assert_close(solved[1], np.eye(2), 4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_factors(kind):
    params, grads = ({"w": support.adapter(4, seed=seed)} for seed in (0, 1))
    want, _ = jax.jit(optim.scale_by_riemannian().update)(grads, optax.EmptyState(), params)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {"A": PartitionSpec("x", "y", None), "B": PartitionSpec("x", None, None)}
    shardings = {"w": {name: NamedSharding(mesh, spec) for name, spec in specs.items()}}
    grads, params = jax.device_put((grads, params), (shardings, shardings))
    with tolerances.set_mesh(mesh):
        update = jax.jit(optim.scale_by_riemannian().update)
        got, _ = update(grads, optax.EmptyState(), params)
    for name in "AB":
        tolerances.assert_close(got["w"][name], want["w"][name], 8)
        if kind == AxisType.Explicit:
            assert got["w"][name].sharding == shardings["w"][name]


def test_gap_for_a_gradient():
    params, grads = {"w": support.adapter()}, {"w": support.adapter(seed=1) | {"A": None}}
    got, _ = optim.scale_by_riemannian().update(grads, optax.EmptyState(), params)
    assert got["w"]["A"] is None
    want = both(support.adapter(seed=1), params["w"], 1e-2)["B"]
    tolerances.assert_close(got["w"]["B"], want, 100)


def test_vmap_and_one_trace():
    transform = optim.scale_by_riemannian()
    params, grads = ({"w": support.adapter(3, seed=seed)} for seed in (0, 1))
    want, _ = jax.jit(transform.update)(grads, optax.EmptyState(), params)

    def update(g, p):
        return transform.update(g, optax.EmptyState(), p)[0]

    with tolerances.count_traces(jax.vmap(update)) as (mapped, traces):
        got = mapped(grads, params)
        mapped(params, grads)
    assert len(traces) == 1
    jax.tree.map(lambda g, w: tolerances.assert_close(g, w, 8), got, want)
