"""What `adapt` compiles to where weights are stored in few bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from tests import toy_format
from tests.support import normal
from tests.transform.support import plan_of, trained
from tests.transform.test_quantized import (
    CASES,
    METHODS,
    cast_and_scaled,
    flipped,
    fused,
    halves,
    heads,
    padded_rows,
    params_of,
    product,
    scanned,
    with_a_block,
)

LAYERS, WIDTH, ROWS = 8, 128, 4


def step_of(method, dtype="float32"):
    """A compiled gradient of a scanned model, and its traced form."""
    shapes = {"w": (LAYERS, WIDTH, WIDTH)}
    stored = {"w": toy_format.quantize(jnp.asarray(normal(*shapes["w"]) / WIDTH, dtype), 1)}
    x = jnp.ones((ROWS, WIDTH), dtype)
    plan = plan_of(scanned, stored, x, **METHODS[method])
    adapters = lora_jax.init_adapters(jax.random.key(0), stored, plan)
    adapted = lora_jax.adapt(scanned, plan)

    def loss(adapters, x, params):
        return jnp.sum(jnp.sin(adapted(params, adapters, x).astype(jnp.float32)))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(adapters, x, stored)
    return traced.lower().compile().as_text(), str(traced.jaxpr)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_no_stack_of_dense_weights_exists(method, dtype):
    for text in step_of(method, dtype):
        assert re.search(rf"\[{WIDTH},{WIDTH}\]", text)  # a layer is dense at its use
        assert not re.search(rf"(f32|bf16)\[{LAYERS},{WIDTH},{WIDTH}\]", text)
        assert re.search(rf"(s8|i8)\[{LAYERS},{WIDTH * WIDTH}\]", text)


@pytest.mark.parametrize("method", METHODS)
def test_the_backward_pass_keeps_no_dense_weight(method):
    stored, _ = params_of({"w": (12, 10)})
    x = jnp.asarray(normal(5, 12), "float32")
    plan = plan_of(product, stored, x, **METHODS[method])
    adapters = trained(stored, plan)
    adapted = lora_jax.adapt(product, plan)
    _, pull = jax.vjp(lambda a, x: adapted(stored, a, x), adapters, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "ndim", 0)]
    floats = [leaf.shape for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert kept
    assert (12, 10) not in floats
    assert (10, 12) not in floats


@pytest.mark.parametrize(
    "fn", [flipped, heads, cast_and_scaled, fused, padded_rows, halves]
)
def test_the_backward_pass_keeps_no_weight_that_was_moved(fn):
    shapes, _ = CASES[fn]
    stored, _ = params_of(shapes)
    x = jnp.asarray(normal(5, 12), "float32")
    accepting = lora_jax.accept_quantized(fn)
    _, pull = jax.vjp(lambda x: accepting(stored, x), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "ndim", 0)]
    floats = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert kept
    assert all(leaf.size < 12 * 10 and leaf.shape != (12, 5) for leaf in floats)


TAKEN = {
    "index": lambda w: w[1],
    "slice": lambda w: lax.slice_in_dim(w, 1, 2),
    "squeezed": lambda w: lax.squeeze(lax.slice_in_dim(w, 1, 2), [0]),
    "dynamic": lambda w: lax.dynamic_index_in_dim(w, 1, keepdims=False),
    "of a cast": lambda w: -w.astype("bfloat16")[1],
    "of what was negated": lambda w: lax.dynamic_slice_in_dim(-w, 1, 1),
    "cast": lambda w: lax.scan(lambda c, v: (c, v[0]), 0, w.astype("bfloat16"))[1],
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_an_entry_of_a_stack_is_taken_from_what_is_stored(take):
    stored, _ = params_of({"w": (3, 12, 10)}, 1)
    text = str(jax.make_jaxpr(lora_jax.accept_quantized(take))(stored["w"]))
    assert re.search(r"f32\[(1,)?12,10\]", text)
    assert not re.search(r"(f32|bf16)\[3,12,10\]", text)


def test_an_entry_of_an_entry_is_taken_from_what_is_stored():
    stored, _ = params_of({"w": (2, 3, 12, 10)}, 2)
    text = str(jax.make_jaxpr(lora_jax.accept_quantized(lambda w: w[1][2]))(stored["w"]))
    assert re.search(r"f32\[(1,)?12,10\]", text)
    assert not re.search(r"f32\[(\d,)*3,12,10\]", text)


def test_one_function_serves_all_layers_with_quantized_weights():
    stored, _ = params_of({"u": (12, 12), "v": (12, 12)})
    x = jnp.asarray(normal(5, 12), "float32")
    plan = plan_of(with_a_block, stored, x)
    adapted = lora_jax.adapt(with_a_block, plan)
    adapters = trained(stored, plan)
    text = jax.jit(adapted).lower(stored, adapters, x).as_text()
    assert len(re.findall(r"func.func private @block", text)) == 1


def test_gradients_stop_at_what_is_stored():
    stored, _ = params_of({"w": (12, 10)})
    x = jnp.asarray(normal(5, 12), "float32")
    plan = plan_of(product, stored, x)
    adapters = trained(stored, plan)
    adapted = lora_jax.adapt(product, plan)
    weight = stored["w"]

    def loss(scale):
        changed = toy_format.Bytes(weight.codes, scale, (12, 10), "float32")
        return jnp.sum(adapted({"w": changed}, adapters, x))

    np.testing.assert_array_equal(jax.grad(loss)(weight.scale), 0 * weight.scale)
