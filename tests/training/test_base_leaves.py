"""Leaves of the base that are trained beside the adapters: norms, biases, a head, rows.

The plan has whole leaves. Rows of an embedding table are put into it inside the loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.support import by_path, normal, x64
from tests.training import problem
from tests.transform.support import assert_same, merged, trained

WORDS, WIDTH, OUT = 11, 6, 5
IDS = np.random.default_rng(0).integers(0, WORDS, (7, 4))
LABELS = np.random.default_rng(1).integers(0, OUT, 7)
ROWS = np.array([2, 9])
WHOLE = ("norm", "layers/bias", "head/kernel", "head/bias")
CONFIGS = {
    "layers": {"targets": ("layers/weight",)},
    "layers and table": {"targets": ("layers/weight", "embed")},
    "dora of the layers": {"targets": ("layers/weight",), "use_dora": True},
}


def make_params():
    return jax.tree.map(
        jnp.asarray,
        {
            "embed": normal(WORDS, WIDTH),
            "layers": {"weight": 0.3 * normal(3, WIDTH, WIDTH), "bias": normal(3, WIDTH)},
            "norm": normal(WIDTH),
            "head": {"kernel": normal(WIDTH, OUT), "bias": normal(OUT)},
        },
    )


def apply(params, ids):
    x = params["embed"][ids]

    def body(x, layer):
        x = x @ layer["weight"]
        return jnp.tanh(x + problem.like(layer["bias"], x)), None

    x, _ = jax.lax.scan(body, x, params["layers"])
    x = problem.normalize(x, params["norm"]).mean(axis=1)
    logits = x @ params["head"]["kernel"]
    return logits + problem.like(params["head"]["bias"], logits)


def put(params, rows):
    """The params with rows of the embedding table."""
    return params | {"embed": params["embed"].at[ROWS].set(rows)}


def make_loss(plan, ids=IDS, labels=LABELS):
    def loss(values, params):
        adapted = lora_jax.adapt(apply, plan)
        logits = adapted(put(params, values["rows"]), values["adapters"], ids)
        return problem.cross_entropy(logits, labels)

    return loss


def make_plan(name, params):
    config = lora_jax.LoraConfig(rank=2, train=WHOLE, **CONFIGS[name])
    return lora_jax.plan_adapters(config, params, apply, IDS)


def set_up(name):
    """Params, plan and values of training in which nothing is zero."""
    params = make_params()
    plan = make_plan(name, params)
    rows = params["embed"][ROWS] + 0.1 * normal(len(ROWS), WIDTH)
    adapters = jax.tree.map(lambda v: 0.4 * v, trained(params, plan))
    return params, plan, {"adapters": adapters, "rows": rows}


@functools.cache
def gradients(name):
    """The plan, the adapters, all gradients, and those of every merged weight."""
    with x64():
        params, plan, values = set_up(name)
        got = jax.jit(jax.grad(make_loss(plan)))(values, params)

        def dense_loss(params):
            return problem.cross_entropy(apply(params, IDS), LABELS)

        dense = merged(put(params, values["rows"]), values["adapters"], plan)
        dense_gradients = by_path(jax.jit(jax.grad(dense_loss))(dense))
        # NumPy, because not every JAX takes float64 when it is switched off again.
        found = jax.device_get((values["adapters"], got, dense_gradients))
        return plan, *found


EVERY_CONFIG = pytest.mark.parametrize(
    "name",
    [
        "layers and table",
        pytest.param("layers", marks=pytest.mark.slow),
        pytest.param("dora of the layers", marks=pytest.mark.slow),
    ],
)


@EVERY_CONFIG
def test_leaves_of_the_base_have_the_gradients_of_the_merged_model(name):
    _, _, got, dense = gradients(name)
    found = {path: got["adapters"][path]["value"] for path in WHOLE}
    want = {path: dense[path] for path in WHOLE} | {"embed": dense["embed"][ROWS]}
    assert_same(found | {"embed": got["rows"]}, want)
    assert all(np.abs(leaf).min() > 0 for leaf in want.values())


@pytest.mark.parametrize(
    "name", ["layers and table", pytest.param("layers", marks=pytest.mark.slow)]
)
def test_adapters_beside_them_have_theirs(name):
    plan, adapters, got, dense = gradients(name)
    for path, target in plan.targets.items():
        scale, gradient = target.scale, dense[path]
        a, b = (adapters[path][name] for name in "AB")
        want = {
            "A": scale * gradient @ np.swapaxes(b, -1, -2),
            "B": scale * np.swapaxes(a, -1, -2) @ gradient,
        }
        assert_same(got["adapters"][path], want)


@functools.cache
def tuned(name):
    """Params in float32, plan, and what some steps of training make."""
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), make_params())
    plan, optimizer = make_plan(name, params), optax.adam(1e-2)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    values = {"adapters": adapters, "rows": params["embed"][ROWS]}
    step, state = problem.make_step(make_loss(plan), optimizer), optimizer.init(values)
    for _ in range(4):
        values, state, _ = step(values, state, params)
    return params, plan, values


@EVERY_CONFIG
def test_they_are_merged_as_one_model(name):
    """And all else keeps every bit."""
    params, plan, values = tuned(name)
    whole = put(params, values["rows"])
    got = jax.jit(lora_jax.adapt(apply, plan))(whole, values["adapters"], IDS)
    folded = lora_jax.merge_adapters(whole, values["adapters"], plan)
    want, plain = (jax.jit(apply)(p, IDS) for p in (folded, params))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(got - plain).max() > 0.01
    before, after = by_path(params), by_path(folded)
    others = np.delete(np.asarray(whole["embed"]), ROWS, axis=0)
    np.testing.assert_array_equal(others, np.delete(before["embed"], ROWS, axis=0))
    assert np.all(whole["embed"][ROWS] != before["embed"][ROWS])
    for path, old in before.items():
        same = np.asarray(after[path]).tobytes() == np.asarray(old).tobytes()
        assert same == (path not in ("embed", *plan.entries))


def test_a_row_that_is_not_looked_up_has_no_gradient():
    with x64():
        params, plan, values = set_up("layers and table")
        ids = np.where(ROWS[0] == IDS, 0, IDS)
        got = jax.device_get(jax.jit(jax.grad(make_loss(plan, ids)))(values, params))
    assert not np.any(got["rows"][0])
    assert np.all(got["rows"][1])
