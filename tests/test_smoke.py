"""A few seconds of everything that depends on JAX: `.ci/run` asks each version for it.

Every function of `_compat` is called here, by way of what needs it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from tests.support import normal, set_mesh
from tests.transform.support import assert_same, loss_of, merged, trained

X = normal(4, 8, dtype="float32")
PARAMS = {
    "scanned": normal(3, 8, 8, dtype="float32") / 3,
    "jitted": normal(8, 8, seed=1, dtype="float32") / 3,
    "sharded": normal(8, 6, seed=2, dtype="float32") / 3,
}
METHODS = {"lora": {}, "dora": {"use_dora": True}}


def mesh_of(axis_type):
    return jax.make_mesh((2,), ("d",), axis_types=(axis_type,))


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1.0, 1.0)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g,))


@jax.jit
def block(h, w):
    """More equations than are evaluated in place."""
    for _ in range(5):
        h = jnp.tanh(h @ w) + 0.1 * jnp.sin(h)
    return h


def model(params, x):
    def layer(h, w):
        return jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, w), None

    def product(x, w):
        return x @ lax.all_gather(w, "d", axis=0, tiled=True)

    mesh = mesh_of(AxisType.Auto)
    x, _ = lax.scan(layer, x, params["scanned"])
    x = lax.cond(jnp.sum(x) > 0, block, lambda h, w: h @ w, x, params["jitted"])
    # Results of a call that no weight goes into.
    specs = {"mesh": mesh, "in_specs": P("d"), "out_specs": (P("d"), P("d"))}
    x, shifted = jax.shard_map(lambda x: (clipped(x), x + 1.0), **specs)(x)
    specs = {"mesh": mesh, "in_specs": (P(), P("d")), "out_specs": P()}
    gathered = jax.shard_map(product, **specs, check_vma=False)
    return gathered(x * shifted, params["sharded"])


def planned(**options):
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, **options)
    plan = lora_jax.plan_adapters(config, PARAMS, model, X)
    adapters = jax.tree.map(lambda v: 0.3 * v, trained(PARAMS, plan))
    return plan, adapters


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_values_and_gradients(options):
    plan, adapters = planned(**options)
    axes = {path: target.axes for path, target in plan.targets.items()}
    assert axes == {"scanned": "bio", "jitted": "io", "sharded": "io"}
    adapted = lora_jax.adapt(model, plan)
    run = jax.value_and_grad(loss_of(lambda a: adapted(PARAMS, a, X)), has_aux=True)
    dense = jax.value_and_grad(
        loss_of(lambda a: model(merged(PARAMS, a, plan), X)), has_aux=True
    )
    assert_same(jax.jit(run)(adapters), jax.jit(dense)(adapters), 1e-5)


def test_new_adapters_change_no_bit():
    plan, _ = planned()
    adapters = lora_jax.init_adapters(jax.random.key(0), PARAMS, plan)
    got = lora_jax.adapt(model, plan)(PARAMS, adapters, X)
    np.testing.assert_array_equal(got, model(PARAMS, X))


def test_a_quantized_base():
    plan, adapters = planned()
    base = lora_jax.quantize_params(jax.tree.map(jnp.array, PARAMS), "*", "int8")
    dense = jax.tree.map(
        lora_jax.quant.dequantize, base, is_leaf=lora_jax.quant.is_quantized
    )

    @jax.jit
    def gradient(params):
        adapted = lora_jax.adapt(model, plan)
        return jax.grad(loss_of(lambda a: adapted(params, a, X)), has_aux=True)(adapters)

    assert_same(gradient(base), gradient(dense), 1e-5)
    assert_same(lora_jax.accept_quantized(model)(base, X), model(dense, X), 1e-5)


def test_dropout_inside_shard_map_and_scan():
    plan, adapters = planned(dropout=0.5)

    @jax.jit
    def run(key):
        return lora_jax.adapt(model, plan, dropout_key=key)(PARAMS, adapters, X)

    first, again, other = map(run, map(jax.random.key, (0, 0, 1)))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 1e-3


def test_a_mesh_with_explicit_axes():
    mesh = mesh_of(AxisType.Explicit)
    params = {"w": PARAMS["sharded"]}

    def fn(params, x):
        return jnp.tanh(x @ params["w"])

    config = lora_jax.LoraConfig(rank=2, alpha=4.0)
    plan = lora_jax.plan_adapters(config, params, fn, X)
    adapters = trained(params, plan)
    want = fn(merged(params, adapters, plan), X)
    with set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d", None)))
        weights = jax.device_put(params, NamedSharding(mesh, P(None, None)))
        got = jax.jit(lora_jax.adapt(fn, plan))(weights, adapters, x)
    assert_same(np.asarray(got), np.asarray(want), 1e-5)


def test_what_is_not_low_rank_is_an_error_with_its_line():
    config = lora_jax.LoraConfig(rank=2, targets="jitted", axes={"jitted": "io"})
    plan = lora_jax.plan_adapters(config, PARAMS)
    adapters = lora_jax.init_adapters(jax.random.key(0), PARAMS, plan)
    adapted = lora_jax.adapt(lambda p, x: x @ jnp.sort(p["jitted"]), plan)
    with pytest.raises(ValueError, match=r"'jitted' .*`sort`.*at .*test_smoke\.py:"):
        adapted(PARAMS, adapters, X)


def test_merged_saved_and_loaded(tmp_path):
    plan, adapters = planned(use_dora=True)
    lora_jax.save_adapters(tmp_path / "adapters", adapters, plan)
    loaded, loaded_plan = lora_jax.load_adapters(tmp_path / "adapters")
    assert loaded_plan == plan
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    got = lora_jax.merge_adapters(PARAMS, loaded, loaded_plan)
    assert_same(got, merged(PARAMS, adapters, plan), 1e-5)
