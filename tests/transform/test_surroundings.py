"""Adapted functions under, around and beside the other transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import SingleDeviceSharding

import lora_jax
from tests.support import asarray, normal, x64
from tests.transform.support import assert_same, check, merged, plan_of, trained

X, W, STACK = normal(5, 12), normal(12, 10), normal(3, 12, 12)


def model(params, x):
    return jnp.tanh(x @ params["w"])


def layers(params, x):
    return lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, params["w"])[0]


def prepared(fn, params, *args, **config):
    plan = plan_of(fn, params, *args, **config)
    return plan, trained(params, plan)


def test_adapters_batched_by_vmap():
    with x64():
        plan, adapters = prepared(model, {"w": W}, X)
        many = jax.tree.map(lambda v: jnp.stack([v, 2 * v, v - 1]), adapters)
        xs = normal(3, 5, 12)
        adapted = jax.vmap(lora_jax.adapt(model, plan), in_axes=(None, 0, 0))
        got = adapted({"w": W}, many, xs)
        for i in range(3):
            one = jax.tree.map(lambda v, i=i: v[i], many)
            assert_same(got[i], model(merged({"w": W}, one, plan), xs[i]))


def test_vmap_with_an_axis_name_around():
    def fn(params, x):
        y = x @ params["w"]
        return y - lax.pmean(y, "batch")

    with x64():
        plan, adapters = prepared(model, {"w": W}, X)
        adapted = lora_jax.adapt(fn, plan)
        got = jax.vmap(lambda x: adapted({"w": W}, adapters, x), axis_name="batch")(X)
        y = X @ merged({"w": W}, adapters, plan)["w"]
        assert_same(got, y - y.mean(0, keepdims=True))


def test_vmap_with_an_axis_name_inside():
    def fn(params, x):
        def centered(x):
            y = x @ params["w"]
            return y - lax.pmean(y, "batch")

        return jax.vmap(centered, axis_name="batch")(x)

    with x64():
        check(fn, {"w": W}, X)


def test_pmap_around():
    def fn(params, x):
        return lax.pmean(x @ params["w"], "devices")

    xs = normal(8, 5, 12)
    with x64():
        plan, adapters = prepared(model, {"w": W}, X)
        adapted = jax.pmap(lora_jax.adapt(fn, plan), "devices", in_axes=(None, None, 0))
        got = adapted({"w": W}, adapters, xs)
        assert_same(got[0], (xs @ merged({"w": W}, adapters, plan)["w"]).mean(0))


def test_pmap_inside():
    def fn(params, x):
        return jax.pmap(lambda w, x: x @ w, in_axes=(None, 0))(params["w"], x)

    xs = normal(8, 5, 12)
    with x64():
        plan, adapters = prepared(model, {"w": W}, X)
        # Merged by JAX's old pmap, factored by that built on shard_map.
        adapted = lora_jax.adapt(fn, plan, on_merge="allow")
        got = adapted({"w": W}, adapters, xs)
        assert_same(got, xs @ merged({"w": W}, adapters, plan)["w"])


def test_export_with_symbolic_shapes():
    def attention_like(params, x):
        y = jnp.einsum("btd,dhk->bthk", x, params["w"])
        return jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", y, y))

    params = {"w": asarray(normal(12, 2, 5), "float32")}
    x = asarray(normal(2, 7, 12), "float32")
    plan, adapters = prepared(attention_like, params, x)
    b, t = export.symbolic_shape("b, t")
    shapes = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (params, adapters)
    )
    tokens = jax.ShapeDtypeStruct((b, t, 12), "float32")
    exported = export.export(jax.jit(lora_jax.adapt(attention_like, plan)))(*shapes, tokens)
    want = attention_like(merged(params, adapters, plan), x)
    np.testing.assert_allclose(exported.call(params, adapters, x), want, atol=1e-5)


def test_names_of_scopes_stay():
    def fn(params, x):
        with jax.named_scope("encoder_block"):
            return jnp.tanh(x @ params["w"])

    plan, adapters = prepared(fn, {"w": W}, X)
    jaxpr = jax.make_jaxpr(lora_jax.adapt(fn, plan))({"w": W}, adapters, X)
    inside = [e for e in jaxpr.eqns if "encoder_block" in str(e.source_info.name_stack)]
    assert {"dot_general", "tanh"} <= {e.primitive.name for e in inside}


def test_disable_jit():
    with x64():
        plan, adapters = prepared(layers, {"w": STACK}, X)
        with jax.disable_jit():
            got = lora_jax.adapt(layers, plan)({"w": STACK}, adapters, X)
        assert_same(got, layers(merged({"w": STACK}, adapters, plan), X))


def test_no_tracer_leaks():
    with x64():
        plan, adapters = prepared(layers, {"w": STACK}, X, dropout=0.3)

        def loss(adapters, key):
            adapted = lora_jax.adapt(layers, plan, dropout_key=key)
            return jnp.sum(adapted({"w": STACK}, adapters, X))

        with jax.check_tracer_leaks():
            gradient = jax.jit(jax.grad(loss))(adapters, jax.random.key(0))
    assert np.isfinite(gradient["w"]["A"]).all()


def test_donation_and_static_arguments_of_inner_jits():
    @jax.jit
    def inner(w, x):
        for _ in range(30):
            x = jnp.sin(x)
        return x @ w

    donating = jax.jit(inner, donate_argnums=1)
    with x64():
        check(lambda p, x: donating(p["w"], x * 1.0), {"w": W}, X)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_with_no_batch_dims_saveable"])
def test_checkpoint_around_with_a_policy(policy):
    with x64():
        plan, adapters = prepared(layers, {"w": STACK}, X)
        adapted = lora_jax.adapt(layers, plan)
        kept = getattr(jax.checkpoint_policies, policy)

        def loss(fn):
            return jax.grad(lambda a: jnp.sum(jax.checkpoint(fn, policy=kept)(a)))

        got = loss(lambda a: adapted({"w": STACK}, a, X))(adapters)
        want = loss(lambda a: layers(merged({"w": STACK}, a, plan), X))(adapters)
        assert_same(got, want)


HOST = "pinned_host"


def from_the_host(params, x):
    def layer(h, w):
        return jnp.tanh(h @ jax.device_put(w, jax.memory.Space.Device)), None

    return lax.scan(layer, x, params["w"])[0]


def on_host(params):
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if HOST not in kinds:
        pytest.skip(f"CPU devices of this JAX have the memories {kinds} only")
    place = SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    return jax.device_put(params, place)


@pytest.mark.parametrize("target", ["w", "w[1:]", "w[:, :, 3:]"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_weights_that_the_function_takes_from_the_memory_of_the_host(use_dora, target):
    with x64():
        params = {"w": asarray(STACK)}
        plan, adapters = prepared(layers, params, X, targets=target, use_dora=use_dora)
        adapted = jax.jit(lora_jax.adapt(from_the_host, plan))
        got = adapted(on_host(params), adapters, X)
        assert_same(got, layers(merged(params, adapters, plan), X))


@pytest.mark.parametrize("form", [{"format": "int8"}, {"format": "nf4", "block_size": 4}])
@pytest.mark.parametrize("use_dora", [False, True])
def test_quantized_weights_that_the_function_takes_from_there(use_dora, form):
    x, params = asarray(X, "float32"), {"w": asarray(STACK, "float32")}
    params = lora_jax.quantize_params(params, "w", batch_axes=1, **form)
    plan, adapters = prepared(layers, params, x, use_dora=use_dora)
    adapted = jax.jit(lora_jax.adapt(from_the_host, plan))
    want = lora_jax.adapt(layers, plan)(params, adapters, x)
    assert_same(adapted(on_host(params), adapters, x), want, 1e-5)
