"""`adapt` on params with weights in few bits, against the same weights dense."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax
from tests import toy_format
from tests.transform.support import assert_same, normal, plan_of, trained


def product(params, x):
    return jnp.tanh(x @ params["w"])


def flipped(params, x):
    return x @ params["w"].T


def heads(params, x):
    return jnp.einsum("td,hdk->thk", x, params["w"])


def cast_and_scaled(params, x):
    return x @ (-2.0 * params["w"].astype(jnp.bfloat16).astype(jnp.float32))


def fused(params, x):
    return x @ jnp.concatenate([params["w"], params["v"]], axis=1)


def halves(params, x):
    left, right = jnp.split(params["w"], 2, axis=1)
    return jnp.tanh(x @ left) * (x @ right)


def padded_rows(params, x):
    return jnp.pad(x, ((0, 0), (0, 2))) @ jnp.pad(params["w"], ((0, 2), (0, 0)))


def looked_up(params, x):
    return jnp.tanh(params["w"][jnp.array([3, 0, 3])]) + x[:3, :10]


def with_unadapted(params, x):
    return jnp.tanh(x @ params["w"]) @ params["frozen"]


def in_branches(params, x):
    return lax.cond(x.sum() > 0, lambda: x @ params["w"], lambda: (2 * x) @ params["w"])


def in_a_while_loop(params, x):
    body = functools.partial(lambda w, s: (s[0] + 1, jnp.tanh(s[1] @ w)), params["w"])
    return lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]


def carried(params, x):
    def step(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), w), None

    return lax.scan(step, (x, params["w"]), None, length=3)[0][0]


def checkpointed(params, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(params["w"], x)


def convolved(params, x):
    return lax.conv(x[None, None], params["w"][:, None], (1, 1), "SAME")


def mapped(params, x):
    return jax.vmap(lambda row: jnp.tanh(row @ params["w"]))(x)


def scanned(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def scanned_in_bfloat16(params, x):
    stack = params["w"].astype(jnp.bfloat16)

    def step(h, w):
        return jnp.tanh((h.astype(jnp.bfloat16) @ w).astype(jnp.float32)), None

    return lax.scan(step, x, stack)[0]


def scanned_after_a_transpose(params, x):
    stack = params["w"].transpose(0, 2, 1)
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]


def indexed(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["w"][i])
    return x


def indexed_in_a_loop(params, x):
    def step(i, h):
        return jnp.tanh(h @ lax.dynamic_index_in_dim(params["w"], i, keepdims=False))

    return lax.fori_loop(0, 3, step, x)


def some_layers(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"][1:])[0]


def mapped_over_the_stack(params, x):
    return jax.vmap(lambda w: jnp.tanh(x @ w))(params["w"])


def with_a_block(params, x):
    @jax.jit
    def block(h, w):
        for _ in range(8):  # too large to be evaluated in place
            h = jnp.tanh(h @ w) + jnp.sin(h) * 0.1
        return h

    return block(block(x, params["v"]), params["u"])


SQUARE = {"w": (12, 12)}
STACK = {"w": (3, 12, 12)}
CASES = {
    product: ({"w": (12, 10)}, 0),
    flipped: ({"w": (10, 12)}, 0),
    heads: ({"w": (2, 12, 5)}, 0),
    cast_and_scaled: ({"w": (12, 10)}, 0),
    fused: ({"w": (12, 10), "v": (12, 4)}, 0),
    halves: ({"w": (12, 10)}, 0),
    padded_rows: ({"w": (12, 10)}, 0),
    looked_up: ({"w": (12, 10)}, 0),
    with_unadapted: ({"w": (12, 10), "frozen": (10, 7)}, 0),
    in_branches: ({"w": (12, 10)}, 0),
    in_a_while_loop: (SQUARE, 0),
    carried: (SQUARE, 0),
    checkpointed: ({"w": (12, 10)}, 0),
    convolved: ({"w": (4, 3, 3)}, 0),
    mapped: ({"w": (12, 10)}, 0),
    scanned: (STACK, 1),
    scanned_in_bfloat16: (STACK, 1),
    scanned_after_a_transpose: (STACK, 1),
    indexed: (STACK, 1),
    indexed_in_a_loop: (STACK, 1),
    some_layers: (STACK, 1),
    mapped_over_the_stack: (STACK, 1),
    with_a_block: ({"u": (12, 12), "v": (12, 12)}, 0),
}
FORWARD_ONLY = (in_a_while_loop,)
METHODS = {"lora": {}, "dora": {"use_dora": True}}


def params_of(shapes, stack_ndim=0):
    """Quantized weights, and the dense ones that they stand for."""
    stored = {
        name: toy_format.quantize(normal(*shape, dtype="float32") / 3, stack_ndim)
        for name, shape in shapes.items()
    }
    return stored, {
        name: lora_jax.quant.dequantize(weight) for name, weight in stored.items()
    }


def options_of(fn):
    """Adapters for all but what is to have none."""
    shapes, _ = CASES[fn]
    return {"targets": [name for name in shapes if name != "frozen"], "rank": 2}


def some(slow):
    """All cases, of which some are slow: they say little that the others do not."""
    marks = dict.fromkeys(slow, pytest.mark.slow)
    return [pytest.param(fn, id=fn.__name__, marks=marks.get(fn, ())) for fn in CASES]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "fn",
    some(
        [
            flipped,
            in_branches,
            carried,
            mapped,
            halves,
            with_a_block,
            mapped_over_the_stack,
            scanned_after_a_transpose,
            some_layers,
        ]
    ),
)
def test_outputs_and_gradients_are_those_of_the_dense_weight(fn, method):
    stored, dense = params_of(*CASES[fn])
    x = jnp.asarray(normal(5, 12), "float32")
    plan = plan_of(fn, stored, x, **options_of(fn), **METHODS[method])
    assert plan == plan_of(fn, dense, x, **options_of(fn), **METHODS[method])
    adapters = trained(dense, plan)
    adapters = jax.tree.map(lambda v: 0.3 * v, adapters)
    adapted = lora_jax.adapt(fn, plan, on_merge="allow")

    def loss(adapters, x, params):
        return jnp.sum(jnp.sin(adapted(params, adapters, x)))

    run = loss if fn in FORWARD_ONLY else jax.value_and_grad(loss, argnums=(0, 1))
    got, want = (jax.jit(run)(adapters, x, params) for params in (stored, dense))
    jax.tree.map(lambda g, w: assert_same(g, w, 1e-5), got, want)


@pytest.mark.parametrize(
    "fn", some([*CASES.keys() - {with_unadapted, scanned, looked_up, in_a_while_loop}])
)
def test_a_function_accepts_quantized_weights_without_adapters(fn):
    stored, dense = params_of(*CASES[fn])
    x = jnp.asarray(normal(5, 12), "float32")
    got = jax.jit(lora_jax.accept_quantized(fn))(stored, x)
    assert_same(got, fn(dense, x), 1e-5)


PARTS = {
    "entries": lambda w: lax.slice_in_dim(w, 1, 3),
    "every_second_entry": lambda w: lax.slice_in_dim(w, 0, 3, 2),
    "first_columns": lambda w: lax.slice_in_dim(w, 0, 4, axis=2),
    "last_columns": lambda w: lax.slice_in_dim(w, 4, 10, axis=2),
    "every_second_column": lambda w: lax.slice_in_dim(w, 0, 10, 2, axis=2),
    "second_half": lambda w: jnp.split(w, 2, axis=2)[1],
    "columns_at_an_index": lambda w: lax.dynamic_slice_in_dim(w, 4, 6, axis=2),
    "an_entry_of_the_transpose": lambda w: w.transpose(0, 2, 1)[1],
    "an_entry_of_the_negative": lambda w: (-w)[1],
    "entries_of_the_transpose": lambda w: lax.map(lambda v: v, w.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_of_a_stack(part):
    stored, dense = params_of({"w": (3, 12, 10)}, 1)
    got = jax.jit(lora_jax.accept_quantized(part))(stored["w"])
    assert_same(got, part(dense["w"]), 0)
    assert got.shape == part(dense["w"]).shape


@pytest.mark.parametrize("axes", [(0,), (0, 1), (2,), (1, 2)], ids=str)
def test_axes_of_a_stack_and_of_its_weights_are_squeezed(axes):
    stored, dense = params_of({"w": (1, 1, 1, 10)}, 2)
    got = lora_jax.accept_quantized(lambda w: w.squeeze(axes))(stored["w"])
    assert_same(got, dense["w"].squeeze(axes), 0)
    assert got.shape == dense["w"].squeeze(axes).shape


def test_an_entry_of_a_stack_of_two_axes():
    stored, dense = params_of({"w": (2, 3, 4, 5)}, 2)
    take = lora_jax.accept_quantized(
        lambda w, i, j: lax.dynamic_slice(w, (i, j, 0, 0), (1, 1, 4, 5))
    )
    assert_same(take(stored["w"], 0, 2)[0, 0], dense["w"][0, 2], 0)


def test_quantized_arguments_and_results_of_any_function():
    stored, dense = params_of({"w": (12, 10)})
    accepting = lora_jax.accept_quantized(lambda *args, w: (w, [w.T, *args], "text"))
    got = accepting(stored["w"], 3, w=stored["w"])
    assert_same(got[0], dense["w"], 0)
    assert_same(got[1][0], dense["w"].T, 0)
    assert_same(got[1][1], dense["w"], 0)
    assert (got[1][2], got[2]) == (3, "text")
    with pytest.raises(TypeError, match="fn must be a function, got dict"):
        lora_jax.accept_quantized(stored)


def test_params_may_be_mixed_and_need_no_adapter_to_be_quantized():
    stored, dense = params_of({"w": (12, 10), "frozen": (10, 7)})
    x = jnp.asarray(normal(5, 12), "float32")
    mixed = {"w": dense["w"], "frozen": stored["frozen"]}
    plan = plan_of(with_unadapted, mixed, x, targets="w")
    adapters = trained(mixed, plan)
    adapted = lora_jax.adapt(with_unadapted, plan)
    assert_same(adapted(mixed, adapters, x), adapted(dense, adapters, x), 1e-6)
