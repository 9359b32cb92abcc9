"""LoRA-RITE: steps that do not depend on the factors, and the paper's in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import optim
from tests import support as tolerances
from tests.optim import support
from tests.reference import f64, t

N_IN, N_OUT, RANK = support.N_IN, support.N_OUT, support.RANK
TARGET, INPUTS = tolerances.normal(N_IN, N_OUT, seed=1), tolerances.normal(9, 6, N_IN)


# --- the method in NumPy --------------------------------------------------------------


def polar(matrix):
    """`U, H` of `U H`."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt, (t(vt) * s[..., None, :]) @ vt


class Factor:
    """A factor `(n, rank)` of `first @ second.T`, and the moments of its gradient."""

    def __init__(self, value):
        self.value = np.asarray(value, np.float64)
        rank = self.value.shape[-1]
        self.mean, self.square, self.escaped = 0 * self.value, np.zeros((rank, rank)), 0.0

    def direction(self, gradient, other, before, steps, b1=0.9, b2=0.999, eps=1e-8):
        """The step, from the value of the other factor, and its value one step ago."""
        basis, size = polar(other)
        turn = basis.T @ polar(before)[0]
        gradient = np.asarray(gradient, np.float64) @ np.linalg.inv(size)
        turned = turn @ self.square @ turn.T
        values = [np.linalg.eigvalsh(square) for square in (self.square, turned)]
        self.escaped = b2 * (self.escaped + max(values[0] - values[1]))
        self.square = b2 * turned + (1 - b2) * gradient.T @ gradient / len(gradient)
        total = self.square + self.escaped * np.eye(len(turn))
        values, vectors = np.linalg.eigh(total / (1 - b2**steps))
        divided = gradient @ (vectors / (np.sqrt(values) + eps)) @ vectors.T
        self.mean = b1 * self.mean @ turn.T + (1 - b1) * divided
        return self.mean / (1 - b1**steps) @ np.linalg.inv(size)


def trained(adapter, gradients, rate, decay=0.0):
    """The factors after some steps."""
    factors = Factor(adapter["A"]), Factor(t(f64(adapter["B"])))
    before = [own.value for own in factors]
    for steps, gradient in enumerate(gradients, 1):
        now = [own.value for own in factors]
        for i, grad in enumerate((gradient["A"], t(f64(gradient["B"])))):
            step = factors[i].direction(grad, now[1 - i], before[1 - i], steps)
            factors[i].value = now[i] - rate * (step + decay * now[i])
        before = now
    return {"A": factors[0].value, "B": t(factors[1].value)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_are_those_of_the_paper(dtype):
    with tolerances.x64():
        rate, decay, key = 0.03, 0.1, "layers/q"
        cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
        params = {key: support.adapter(2, rest=("m",)), "head": support.draw(5)}
        steps = [
            {key: support.adapter(2, seed=s, rest=("m",)), "head": support.draw(5, seed=s)}
            for s in range(1, 5)
        ]
        optimizer = optim.lora_rite(lambda count: rate, weight_decay=decay)
        got, state = support.run(optimizer, cast(params), list(map(cast, steps)))
        for layer in range(2):
            own, *grads = (f64(x[key]) for x in (params, *steps))
            own, *grads = ({n: x[layer] for n, x in tree.items()} for tree in (own, *grads))
            for name, want in trained(own, grads, rate, decay).items():
                tolerances.assert_close(got[key][name][layer], want, 300)
        rest = [(got["head"], params["head"], [grads["head"] for grads in steps])]
        rest += [(got[key]["m"], params[key]["m"], [grads[key]["m"] for grads in steps])]
        for value, start, grads in rest:
            want = support.adamw(start, grads, [rate] * len(grads))
            tolerances.assert_close(value, want, 16)
        assert {x.dtype for x in jax.tree.leaves(state[0][1:])} == {jnp.dtype(dtype)}


# --- what does not depend on the factors ------------------------------------------------


def loss(params, x):
    """The loss of a DoRA-like layer, which only the product and `m` decide."""
    y = jnp.tanh(x @ (params["w"]["A"] @ params["w"]["B"])) * params["w"]["m"][None]
    return jnp.mean((y - x @ TARGET) ** 2)


RITE = optim.lora_rite(0.05, weight_decay=0.1)


@jax.jit
def step(params, state, x):
    with jax.numpy_dtype_promotion("standard"):
        updates, state = RITE.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state, updates


def trajectory(a, b):
    """The products after each step of a training, and the first updates, in float64."""
    with tolerances.x64():
        params = {
            "w": {
                "A": support.asarray(a),
                "B": support.asarray(b),
                "m": jnp.ones(N_OUT),
            }
        }
        state, products, first = RITE.init(params), [], None
        for x in INPUTS:
            params, state, updates = step(params, state, support.asarray(x))
            first = f64(updates["w"]) if first is None else first
            products.append(f64(params["w"]["A"]) @ f64(params["w"]["B"]))
        return np.stack(products), first


FACTORS = tolerances.normal(N_IN, RANK), tolerances.normal(RANK, N_OUT)
CHANGE = tolerances.normal(RANK, RANK, seed=3) * np.array([1e-2, 1, 1, 10])


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["full_rank", "zero_b"])
def test_products_do_not_depend_on_the_factors(share):
    a, b = FACTORS[0], share * FACTORS[1]
    got, _ = trajectory(a @ CHANGE, np.linalg.solve(CHANGE, b))
    want, _ = trajectory(a, b)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert np.linalg.norm(want[-1] - a @ b) > 0.5


def test_factors_of_less_than_full_rank():
    a, b = FACTORS[0], FACTORS[1] * np.array([1, 1, 0, 0])[:, None]
    changed = a @ CHANGE, np.linalg.solve(CHANGE, b)
    got, own = trajectory(*changed)
    _, other = trajectory(a, b)
    assert np.isfinite(got).all()
    # To first order in the learning rate, the change of the product is the same.
    np.testing.assert_allclose(own["A"] @ changed[1], other["A"] @ b, rtol=0, atol=1e-8)
    np.testing.assert_allclose(changed[0] @ own["B"], a @ other["B"], rtol=0, atol=1e-8)
    # `A` takes no step that the product would not show.
    assert np.abs(other["A"][:, 2:] + 0.05 * 0.1 * a[:, 2:]).max() < 1e-12


# --- where it is Adam -------------------------------------------------------------------


def test_of_numbers_it_is_adam_without_momentum():
    params = {"w": {"A": jnp.array([[3.0]]), "B": jnp.array([[-1.0]])}}
    steps = [{"w": {"A": g, "B": jnp.zeros((1, 1))}} for g in support.draw(5, 1, 1)]
    got, _ = support.run(optim.lora_rite(0.1, b1=0.0), params, steps)
    want, _ = support.run(optax.adam(0.1, b1=0.0), params, steps)
    tolerances.assert_close(got["w"]["A"], want["w"]["A"], 16)
    np.testing.assert_array_equal(got["w"]["B"], params["w"]["B"])


@jax.jit
def first_step(params, grads):
    transform = optim.scale_by_lora_rite()
    return transform.update(grads, transform.init(params), params)[0]


def test_first_step_of_orthogonal_gradients():
    # Adam's would be the sign of each entry. Here, each direction has its root mean square.
    size = 3 * jnp.arange(1.0, RANK + 1)
    q, _ = jnp.linalg.qr(support.draw(N_IN, RANK))
    params = {"w": {"A": q, "B": jnp.eye(RANK, N_OUT)}}
    grads = {"w": {"A": q * size[None], "B": 2 * jnp.eye(RANK, N_OUT)}}
    got = first_step(params, grads)
    tolerances.assert_close(got["w"]["A"], q * np.sqrt(N_IN), 64)
    tolerances.assert_close(got["w"]["B"], np.eye(RANK, N_OUT) * np.sqrt(N_OUT), 64)


def test_rounding_is_not_amplified():
    # Gradients of rank one: all other directions have only rounding.
    q, _ = jnp.linalg.qr(support.draw(N_IN, RANK))
    params = {"w": {"A": q, "B": jnp.eye(RANK, N_OUT)}}
    grads = {
        name: 1e3 * support.draw(n, 1) * support.draw(1, k)
        for name, (n, k) in {"A": (N_IN, RANK), "B": (RANK, N_OUT)}.items()
    }
    got = first_step(params, {"w": grads})
    for name, n in {"A": N_IN, "B": N_OUT}.items():
        want = f64(grads[name]) / np.linalg.norm(f64(grads[name])) * np.sqrt(n)
        np.testing.assert_allclose(got["w"][name], want, rtol=0, atol=1e-3)


# --- arrays and trees ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", tolerances.DTYPES)
def test_new_adapters(dtype):
    # More columns than B has outputs, zeros for B, and none for the head of other leaves.
    rank, n_out = 6, 3
    params = {
        "w": {
            "A": support.draw(N_IN, rank, dtype=dtype),
            "B": jnp.zeros((rank, n_out), dtype),
        }
    }
    optimizer = optim.lora_rite(0.1)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update, donate_argnums=1)  # each array has its own memory
    with jax.numpy_dtype_promotion("standard"):
        for seed in range(3):
            b = support.draw(rank, n_out, seed=seed, dtype=dtype)
            grads = {"w": {"A": 0 * params["w"]["A"], "B": b}}
            updates, state = update(grads, state, params)
            if not seed:
                assert not np.any(updates["w"]["A"])
            params = optax.apply_updates(params, updates)
            assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert all(np.isfinite(f64(x)).all() for x in jax.tree.leaves((params, state)))
    assert {x.dtype for x in jax.tree.leaves(state[0][1:])} == {jnp.dtype("float32")}
    assert np.abs(f64(params["w"]["B"])).min() > 0


def test_learning_rates_and_decay_can_be_set():
    params = {"w": support.adapter(rest=("m",))}
    optimizer = optax.inject_hyperparams(optim.lora_rite)(0.5, weight_decay=0.1)
    state = optax.tree_utils.tree_set(optimizer.init(params), learning_rate=0.25)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(zeros, state, params)
    for name, share in {"A": 0.025, "B": 0.025, "m": 0.0}.items():
        tolerances.assert_close(
            updates["w"][name], -share * f64(params["w"][name]), 4, scale=1
        )


def test_masked_adapters_have_no_state():
    params = {"v": support.adapter(), "w": support.adapter(seed=1)}
    optimizer = optax.masked(optim.scale_by_lora_rite(), {"v": True, "w": False})
    state = optimizer.init(params)
    got, state = jax.jit(optimizer.update)(params, state, params)
    own = {"v": params["v"]}
    transform = optim.scale_by_lora_rite()
    want, _ = jax.jit(transform.update)(own, transform.init(own), own)
    jax.tree.map(lambda x, y: tolerances.assert_close(x, y, 8), got["v"], want["v"])
    tolerances.assert_same_bits(got["w"], params["w"])
    assert not any("w" in path for path in support.stateful(state))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(kind):
    params, grads = ({"w": support.adapter(4, seed=seed)} for seed in (0, 1))
    transform = optim.scale_by_lora_rite()
    want = jax.jit(transform.update)(grads, transform.init(params), params)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {"A": PartitionSpec("x", "y", None), "B": PartitionSpec("x", None, None)}
    shardings = {"w": {name: NamedSharding(mesh, spec) for name, spec in specs.items()}}
    grads, params = jax.device_put((grads, params), (shardings, shardings))
    with tolerances.set_mesh(mesh):
        got = jax.jit(transform.update)(grads, transform.init(params), params)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        tolerances.assert_close(x, y, 64, dtype="float32")
    if kind == AxisType.Explicit:
        for tree in (got[0], got[1].mu, got[1].basis):
            assert {n: x.sharding for n, x in tree["w"].items()} == shardings["w"]
