"""Plans, new adapters and counts, over weights of every layout."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.model import adapters
from lora_jax.model.adapters import count_parameters, init_adapters, plan_adapters
from lora_jax.model.merging import merge_adapters
from lora_jax.plan.adapter_plan import Use
from lora_jax.plan.config import LoraConfig
from tests import support
from tests.model.support import SHAPES, make, merged_reference, weights, weights_only
from tests.support import straight

# ---------------------------------------------------------------------------- plan


def network(params, x, *, negate=False):
    x = jnp.einsum("bd,dhk->bhk", x, params["block"]["q"])
    y = x.reshape(x.shape[0], -1) @ params["block"]["o"].T + params["bias"][None]
    return -y if negate else y


NETWORK = {
    "block": {"q": jnp.ones((12, 2, 3)), "o": jnp.ones((9, 6))},
    "bias": jnp.ones(9),
}


def test_plan_of_a_function():
    plan = plan_adapters(LoraConfig(2), NETWORK, network, jnp.ones((5, 12)))
    assert {path: target.axes for path, target in plan.targets.items()} == {
        "block/q": "ioo",
        "block/o": "oi",
    }
    assert "test_adapters.py" in plan.explain("block/q")
    assert plan.skipped == {"bias": "it is a vector, (9,)"}


def test_plan_of_shapes_is_that_of_arrays():
    config, x = LoraConfig(2), jnp.ones((5, 12))
    plan = plan_adapters(config, NETWORK, network, x, negate=True)
    params, x = jax.eval_shape(lambda: (NETWORK, x))
    assert plan_adapters(config, params, network, x, negate=True) == plan


def test_arguments_go_to_the_function(monkeypatch):
    seen = []

    def find_uses(fn, params, args, kwargs, products):
        assert products == {}
        seen.append((fn, params, args, kwargs))
        use = Use("dot_general", ("kept", "contracted"), linear=True)
        return {"block/o": (use,)}

    monkeypatch.setattr(adapters.discovery, "find_uses", find_uses)
    plan = plan_adapters(LoraConfig(2), NETWORK, network, 1, negate=2)
    assert seen == [(network, NETWORK, (1,), {"negate": 2})]
    assert plan.targets["block/o"].axes == "oi"
    assert plan.explain("block/q").endswith("because the function never uses it.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((NETWORK, LoraConfig()), "config must be a LoraConfig, got dict: the order is"),
        ((LoraConfig(), NETWORK, NETWORK), "fn must be a function, got dict: the order"),
        ((LoraConfig(), NETWORK, None, 3), "there are arguments and no function"),
    ],
)
def test_arguments_in_the_wrong_order(args, message):
    with pytest.raises(TypeError, match=message):
        plan_adapters(*args)


def test_keyword_arguments_need_a_function():
    with pytest.raises(TypeError, match="there are arguments and no function"):
        plan_adapters(LoraConfig(), NETWORK, negate=True)


def test_counting():
    params, adapters, plan = make("dora")
    sizes = [math.prod(SHAPES[name]) for name in params["block"]]
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert count_parameters(params, plan) == (trainable, trainable + sum(sizes) + 9)
    assert plan.total == sum(sizes) + 9


# ---------------------------------------------------------------------------- init


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_new_adapters_have_the_plans_shapes_and_change_nothing(method):
    params, _, plan = make(method, names=("q", "turned"))
    adapters = init_adapters(jax.random.key(0), params, plan)
    shapes = jax.tree.map(jnp.shape, adapters)
    assert shapes == {path: t.adapter_shapes for path, t in plan.targets.items()}
    for path, weight in weights(merge_adapters(params, adapters, plan)).items():
        support.assert_close(weight, weights(params)[path], 2 if method == "dora" else 0)


def test_dora_starts_from_the_lora_update_for_any_init():
    params, _, plan = make("dora", names=("turned",), init=("gaussian", "gaussian"))
    adapters = init_adapters(jax.random.key(0), params, plan)
    for path, weight in weights(merge_adapters(params, adapters, plan)).items():
        target = dataclasses.replace(plan.targets[path], method="lora")
        want = merged_reference(weights(params)[path], adapters[path], target)
        support.assert_close(straight(weight, target), want, 16, "float32")


def test_another_target_changes_no_values():
    key = jax.random.key(0)
    params, _, plan = make(names=("o", "q", "w"))
    some, _, other = make(names=("o",))
    alone, all_ = init_adapters(key, some, other), init_adapters(key, params, plan)
    np.testing.assert_array_equal(alone["block/o"]["A"], all_["block/o"]["A"])
    assert not (all_["block/w"]["A"] == all_["block/q"]["A"]).any()
    again = init_adapters(jax.random.key(1), params, plan)
    assert not (again["block/w"]["A"] == all_["block/w"]["A"]).any()


@pytest.mark.parametrize(("method", "dtype"), [("lora", None), ("dora", "bfloat16")])
def test_init_under_jit_and_eval_shape(method, dtype):
    params, _, plan = make(method, "bfloat16", factors=dtype, names=("o", "w"))
    params = weights_only(params)
    with support.count_traces(init_adapters) as (jitted, traces):
        got = jitted(jax.random.key(0), params, plan)
        jitted(jax.random.key(1), params, plan)
    assert len(traces) == 1
    want = init_adapters(jax.random.key(0), params, plan)
    shapes = jax.eval_shape(init_adapters, jax.random.key(0), params, plan)
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, shapes)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (c.shape, c.dtype)
        support.assert_close(a, b, 4)
    assert got["block/w"]["A"].dtype == (dtype or "float32")
    if method == "dora":
        assert got["block/w"]["m"].dtype == "float32"


def test_init_of_abstract_params():
    params, _, plan = make()
    abstract = jax.eval_shape(lambda: weights_only(params))
    adapters = init_adapters(jax.random.key(0), abstract, plan)
    assert adapters["block/stack"]["A"].shape == (3, 12, 4)
    _, _, plan = make("dora")
    wrong = r"at 'block/mixed': the weight is a jax.ShapeDtypeStruct, or made of them"
    with pytest.raises(TypeError, match=wrong):
        init_adapters(jax.random.key(0), abstract, plan)


def test_init_needs_a_key():
    params, _, plan = make()
    with pytest.raises(TypeError, match=r"key must be a jax.random key, got int"):
        init_adapters(0, params, plan)
