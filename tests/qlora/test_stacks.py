"""What is in memory: NF4 as QLoRA has it, and a scan over its layers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import quant
from lora_jax._core import compat
from lora_jax.plan import stacks
from tests import programs, reference, support
from tests.qlora.support import (
    SHAPE,
    dequantized,
    slowly,
    train,
)
from tests.support import normal
from tests.transform.support import assert_same

LAYERS, WIDTH, ROWS, RANK = 8, 256, 4, 2
DENSE = 4 * WIDTH * WIDTH  # a layer's weight in float32
DEEP = {
    "nf4": lambda w: quant.quantize_nf4(w, 64, 64, batch_axes=1),
    "int8": lambda w: quant.quantize_int8(w, batch_axes=1),
    "fp8": lambda w: quant.quantize_fp8(w, batch_axes=1),
}


def test_layers_of_a_quantized_stack_stay_quantized():
    stored = DEEP["int8"](normal(3, 4, 6, dtype="float32"))
    target = lora_jax.Target((3, 4, 6), "lora", 2, 1.0, 0.0, (1,), (2,), (0,), "[1:]")
    taken = stacks.take(stored, target)
    assert type(taken) is type(stored)
    np.testing.assert_array_equal(quant.dequantize(taken), quant.dequantize(stored)[1:])


def test_a_stack_is_cut_where_the_mesh_splits_its_layers():
    place = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("x",)), P(None, "x"))
    weight = jax.device_put(normal(3, 4, 6, dtype="float32"), place)
    stored = DEEP["int8"](weight)
    target = lora_jax.Target((3, 4, 6), "lora", 2, 1.0, 0.0, (1,), (2,), (0,))
    got = stacks.map_entries(lambda layer, *_: layer.sum(0), stored, {}, target)
    support.assert_close(got, reference.f64(quant.dequantize(stored)).sum(1), 8, "float32")


def deep(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def deep_model(use_dora=False, dtype="float32", name="nf4"):
    """Stored params, adapters, an input, and the plan."""
    weight = support.asarray(normal(LAYERS, WIDTH, WIDTH) / 12, dtype)
    stored, x = {"w": DEEP[name](weight)}, support.asarray(normal(ROWS, WIDTH), dtype)
    config = lora_jax.LoraConfig(RANK, 4.0, use_dora=use_dora)
    plan = lora_jax.plan_adapters(config, stored, deep, x)
    return stored, train(stored, plan), x, plan


def deep_step(plan, before=lambda params: params):
    """`(adapters, params, x)` -> loss and gradients of a training step."""
    adapted = lora_jax.adapt(deep, plan)

    def loss(adapters, params, x):
        y = adapted(before(params), adapters, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    return jax.value_and_grad(loss)


@functools.cache
def program(use_dora, dtype, name="nf4", wrong=False):
    """A compiled training step, and its jaxpr."""
    stored, adapters, x, plan = deep_model(use_dora, dtype, name)
    step = deep_step(plan, dequantized if wrong else lambda params: params)
    traced = jax.jit(step).trace(adapters, stored, x)
    return traced.lower().compile(), traced.jaxpr.jaxpr


def dense_stacks(*texts):
    """Floating-point arrays of programs that are as large as a dense stack."""
    shapes = [shape for text in texts for shape in programs.float_shapes(text)]
    return [shape for shape in shapes if math.prod(shape) >= LAYERS * WIDTH * WIDTH]


METHODS = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@pytest.mark.parametrize(
    ("use_dora", "dtype", "name"),
    slowly(
        [
            *((False, "float32", name) for name in DEEP),
            (True, "bfloat16", "nf4"),
        ],
        [(x, y, z) for x in (False, True) for y in ("float32", "bfloat16") for z in DEEP],
    ),
)
def test_a_step_has_no_dense_stack(use_dora, dtype, name):
    compiled, jaxpr = program(use_dora, dtype, name)
    assert not dense_stacks(compiled.as_text(), jaxpr)
    assert (WIDTH, WIDTH) in programs.float_shapes(jaxpr)  # a layer is dense at its use
    activations = 4 * LAYERS * ROWS * WIDTH * (3 if use_dora else 2)
    factors = 4 * LAYERS * RANK * 2 * WIDTH
    temporary = programs.temporary(compiled)
    assert temporary < activations + 2 * factors + 3.5 * DENSE
    assert temporary < LAYERS * DENSE / 2  # half of all weights, dense


@pytest.mark.parametrize("use_dora", slowly([False], [False, True]))
def test_a_step_on_dequantized_params_has_one(use_dora):
    # Guards the test above: it can tell.
    compiled, jaxpr = program(use_dora, "float32", wrong=True)
    assert dense_stacks(compiled.as_text())
    assert dense_stacks(jaxpr)
    assert programs.temporary(compiled) > LAYERS * DENSE


@pytest.mark.parametrize("wrong", [False, True], ids=["", "wrong"])
@METHODS
def test_loops_stack_up_activations_only(use_dora, wrong):
    stored, adapters, x, plan = deep_model(use_dora)

    def dense_at_once(params):  # keeps each layer's dense weight, as plain use would
        def entry(_, w):
            return None, dequantized(w)

        return lax.scan(entry, None, params)[1]

    step = deep_step(plan, dense_at_once if wrong else lambda params: params)
    jaxpr = jax.make_jaxpr(step)(adapters, stored, x).jaxpr
    loops = [e for e in programs.equations(jaxpr) if e.primitive.name == "scan"]
    # What is stacked has one axis more than in the body: the parameters say it differently
    # in each version of JAX.
    bodies = [compat.open_jaxpr(e.params["jaxpr"])[0] for e in loops]
    found = [
        outer.aval
        for e, body in zip(loops, bodies, strict=True)
        for outer, inner in zip(e.outvars, body.outvars, strict=True)
        if outer.aval.ndim > inner.aval.ndim
    ]
    sizes = [int(np.prod(aval.shape)) for aval in found]
    # A scalar is a counter that some versions of JAX hand on.
    codes = [a for a in found if jnp.issubdtype(a.dtype, jnp.integer) and a.shape]
    assert found
    assert not codes
    gradients_or_activations = LAYERS * WIDTH * max(ROWS, RANK)
    assert (max(sizes) <= gradients_or_activations) == (not wrong)


def test_stored_bytes_of_a_weight():
    stored = quant.quantize_nf4(support.asarray(normal(512, 1024), jnp.bfloat16))
    # 4 bits an entry, 8 bits a block of 64, 16 bits for 256 blocks, 16 bits for the mean.
    want = 1 / 2 + 1 / 64 + 2 / (64 * 256) + 2 / stored.size
    assert stored.nbytes / stored.size == want
    assert round(want, 3) == 0.516


def test_norms_of_a_stack_have_one_entry_dense_at_a_time():
    stored, adapters, _, plan = deep_model(use_dora=True)
    norms = jax.jit(lambda p: lora_jax.adapted_column_norms(p, adapters, plan))
    compiled = norms.lower(stored).compile()
    assert not dense_stacks(compiled.as_text())
    assert programs.temporary(compiled) < 4 * DENSE
    wrong = norms.lower(dequantized(stored)).compile()  # guards the pattern above
    assert dense_stacks(wrong.as_text())
    for path, norm in norms(stored).items():
        w, adapter = reference.f64(dequantized(stored)[path]), reference.f64(adapters[path])
        want = reference.norms(reference.lora_weight(w, adapter, 2.0), "out")
        support.assert_close(norm, want, 64)


def test_norms_of_a_stack_of_two_axes_have_one_entry_dense_at_a_time():
    stored = {"w": quant.quantize_int8(support.asarray(normal(2, 3, *SHAPE)), batch_axes=2)}
    config = lora_jax.LoraConfig(2, targets="w", axes={"w": "bbio"}, use_dora=True)
    plan = lora_jax.plan_adapters(config, stored)
    adapters = train(stored, plan)
    norms = lambda p: lora_jax.adapted_column_norms(p, adapters, plan)  # noqa: E731
    shapes = programs.float_shapes(jax.make_jaxpr(norms)(stored))
    assert SHAPE in shapes
    assert (3, *SHAPE) not in shapes
    assert_same(norms(stored), norms(dequantized(stored)), 1e-6)


@pytest.mark.parametrize(("axes", "stacked"), [("iio", 1), ("bio", 0)])
def test_norms_of_a_stack_that_is_none_of_the_plan(axes, stacked):
    weight = support.asarray(normal(3, *SHAPE))
    stored = {"w": quant.quantize_nf4(weight, 8, 5, batch_axes=stacked)}
    config = lora_jax.LoraConfig(2, targets="w", axes={"w": axes}, use_dora=True)
    plan = lora_jax.plan_adapters(config, stored)
    adapters = train(stored, plan)
    got = lora_jax.adapted_column_norms(stored, adapters, plan)
    want = lora_jax.adapted_column_norms(dequantized(stored), adapters, plan)
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("use_dora", slowly([False], [False, True]))
def test_a_stack_may_be_sharded_along_its_axis(use_dora):
    stored, adapters, x, plan = deep_model(use_dora)
    mesh = Mesh(np.array(jax.devices()), ("layers",))
    sharding = NamedSharding(mesh, P("layers"))
    placed, placed_adapters = jax.device_put((stored, adapters), sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(placed))
    assert placed["w"].codes.addressable_shards[0].data.shape[0] == 1
    step = jax.jit(deep_step(plan))
    assert_same(step(placed_adapters, placed, x), step(adapters, stored, x), 1e-5)
    merged = lora_jax.merge_adapters(placed, placed_adapters, plan)
    assert merged["w"].sharding.is_equivalent_to(sharding, 3)
    want = lora_jax.merge_adapters(stored, adapters, plan)
    assert_same(merged, want, 1e-6)
