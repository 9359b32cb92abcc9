"""Layers on quantized weights do what they do on the dequantized weights."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import quant
from tests import programs, reference, support
from tests.qlora.support import (
    EVERY_FORMAT,
    FORMATS,
    KEY,
    SHAPE,
    matrix_plan,
    slowly,
)
from tests.transform.support import assert_same

DROP = {"dropout_rate": 0.4, "dropout_key": KEY}
LINEARS = {
    "lora": {},
    "lora_bias": {"rank_stabilized": True},
    "lora, dropout": DROP,
    "lora, dropout of the output": {**DROP, "dropout_position": "post"},
    "dora": {"scale_bias": True},
    "dora, in": {"norm_axis": "in"},
    "dora, full gradient": {"detach_norm": False},
    "dora, dropout": DROP,
    "dora, dropout, torchtune": {**DROP, "dropout_mode": "torchtune"},
    "dora, dropout, megatron": {**DROP, "dropout_mode": "megatron"},
    "dora, dropout, in": {**DROP, "norm_axis": "in"},
}


def layer(name, linear, layout="rows", dtype="float32"):
    """A case with a quantized weight, and the same with what it dequantizes to."""
    options = LINEARS[linear]
    case = support.make_case(
        layout,
        dtype,
        method=linear.split(",")[0],
        norm_axis=options.get("norm_axis", "out"),
        shape=SHAPE,
    )
    stored = FORMATS[name](case.weight, batch_axes=case.weight.ndim - 2)
    return stored, dataclasses.replace(case, weight=quant.dequantize(stored))


def apply(linear):
    """`(x, weight, adapter)` -> the output of a layer."""
    function = lora_jax.dora_linear if "dora" in linear else lora_jax.lora_linear
    return functools.partial(function, alpha=2.0, **LINEARS[linear])


def run(linear, case, weight):
    """The output, and the gradients of x and of the adapter."""
    forward = apply(linear)

    @jax.jit
    def gradients(x, adapter, weight, bias, c):
        y, pull = jax.vjp(lambda x, a: forward(x, weight, a, bias=bias), x, adapter)
        return y, pull(c)

    return gradients(case.x, case.adapter, weight, case.bias, case.c)


# Every layer in one format, the simplest ones in all, and those of every layout.
ALL = [
    *(("nf4", linear, "rows") for linear in LINEARS),
    *((name, x, "rows") for name in list(FORMATS)[1:] for x in ("lora", "dora")),
    *(("nf4", x, y) for y in support.LAYOUTS for x in ("lora", "dora", "dora, in")),
]
QUICK = [
    *(("nf4", "lora", "rows"), ("nf4", "dora, in", "rows"), ("int8", "dora", "rows")),
    *(("fp8", "lora", "rows"), ("nf4", "dora, dropout, megatron", "rows")),
    ("nf4", "dora", "experts_in_layers"),
]


@pytest.mark.parametrize(("name", "linear", "layout"), slowly(QUICK, dict.fromkeys(ALL)))
def test_a_layer_is_that_of_the_dequantized_weight(name, linear, layout):
    """The same output and gradients, and no dense weight is kept for them."""
    stored, case = layer(name, linear, layout)
    assert_same(run(linear, case, stored), run(linear, case, case.weight), 1e-5)

    def forward(trained, weight):
        return apply(linear)(trained[0], weight, trained[1])

    for weight, are_kept in ((stored, False), (case.weight, True)):
        kept = programs.floats(programs.kept(forward, (case.x, case.adapter), weight))
        assert bool(dense(kept)) == are_kept


@pytest.mark.parametrize(
    ("name", "linear"),
    slowly([("nf4", "lora")], [(x, y) for x in ("nf4", "fp8") for y in ("lora", "dora")]),
)
def test_a_layer_of_16_bits(name, linear):
    stored, case = layer(name, linear, dtype="bfloat16")
    got, want = run(linear, case, stored), run(linear, case, case.weight)
    for value, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert value.dtype == expected.dtype
        support.assert_close(value, expected, 4, "bfloat16")


@pytest.mark.parametrize(
    "given", slowly(["column_norm"], ["weight_norm_squared", "column_norm"])
)
def test_a_layer_with_given_norms(given):
    stored, case = layer("nf4", "dora")
    norm = lora_jax.dora_column_norm
    values = {
        "weight_norm_squared": norm(case.weight) ** 2,
        "column_norm": norm(case.weight, case.adapter, 2.0),
    }
    got = jax.jit(apply("dora"))(case.x, stored, case.adapter, **{given: values[given]})
    assert_same(got, jax.jit(apply("dora"))(case.x, case.weight, case.adapter), 1e-5)


@pytest.mark.parametrize(
    ("name", "linear"),
    slowly(
        [("nf4", "lora")],
        [(x, y) for x in ("nf4", "int8", "fp8") for y in ("lora", "dora")],
    ),
)
def test_scan_checkpoint_and_vmap_over_a_stack(name, linear):
    stored, case = layer(name, linear, "stacked")
    forward, adapter = apply(linear), case.adapter

    def mapped(adapter, weight):
        return jax.vmap(forward)(case.x, weight, adapter)

    def scanned(adapter, weight):
        block = jax.checkpoint(lambda x, w, a: jnp.tanh(forward(x, w, a)))
        step = lambda total, one: (total + block(*one), None)  # noqa: E731
        return lax.scan(step, jnp.zeros((5, SHAPE[1])), (case.x, weight, adapter))[0]

    for function in (mapped, scanned):
        loss = lambda adapter, weight, f=function: jnp.sum(jnp.sin(f(adapter, weight)))  # noqa: E731
        grad = jax.jit(jax.value_and_grad(loss))
        assert_same(grad(adapter, stored), grad(adapter, case.weight), 1e-5)


def dense(shapes):
    """Those shaped as a weight of `layer` or a stack of them, turned or not, or flat."""
    sides = sorted(SHAPE), [math.prod(SHAPE)]
    return [s for s in shapes if sorted(s[-2:]) in sides or list(s[-1:]) in sides]


@pytest.mark.parametrize("norm_axis", slowly(["out"], ["out", "in"]))
def test_norms_keep_no_dense_weight(norm_axis):
    stored, case = layer("nf4", "dora, in" if norm_axis == "in" else "dora")

    def norm(adapter, weight):
        return lora_jax.dora_column_norm(weight, adapter, 2.0, norm_axis=norm_axis)

    assert not dense(programs.floats(programs.kept(norm, case.adapter, stored)))
    grad = jax.jit(jax.grad(lambda a, w: jnp.sum(jnp.sin(norm(a, w)))))
    assert_same(grad(case.adapter, stored), grad(case.adapter, case.weight), 1e-5)


@EVERY_FORMAT
def test_no_gradient_reaches_what_is_stored(name):
    stored, case = layer(name, "dora")
    dora, lora = (case.adapter, 2.0), {factor: case.adapter[factor] for factor in "AB"}

    @jax.jit
    def losses(q):
        values = {
            "lora_linear": lora_jax.lora_linear(case.x, q, lora),
            "dora_linear": lora_jax.dora_linear(case.x, q, *dora, detach_norm=False),
            "merge": lora_jax.merge_lora_weight(q, lora),
            "merge dora": lora_jax.merge_dora_weight(q, *dora),
            "norm": lora_jax.dora_column_norm(q, *dora),
            "norm of the weight": lora_jax.dora_column_norm(q),
        }
        return jax.tree.map(jnp.sum, values)

    _, pull = jax.vjp(losses, stored)
    for what in jax.eval_shape(losses, stored):
        one = {key: jnp.float32(key == what) for key in jax.eval_shape(losses, stored)}
        for leaf in jax.tree.leaves(pull(one)):
            if leaf.dtype != jax.dtypes.float0:
                assert not np.asarray(leaf, np.float32).any(), what


@EVERY_FORMAT
def test_initial_adapters_and_magnitudes(name):
    stored, case = layer(name, "dora", "stacked")
    w, adapter = reference.f64(case.weight), reference.f64(case.adapter)
    lora = lora_jax.init_lora_adapter(KEY, stored, 4)
    assert_same(lora, lora_jax.init_lora_adapter(KEY, case.weight, 4), 0)
    for axis in ("out", "in"):
        made = lora_jax.init_dora_adapter(KEY, stored, 4, norm_axis=axis)
        support.assert_close(made["m"], reference.norms(w, axis), 4)
        factors = {factor: case.adapter[factor] for factor in "AB"}
        m = lora_jax.init_dora_magnitude(stored, factors, 2.0, norm_axis=axis)
        adapted = reference.lora_weight(w, adapter, 0.5)
        support.assert_close(m, reference.norms(adapted, axis), 32)


@pytest.mark.parametrize(
    ("name", "dtype"), [("nf4", "bfloat16"), ("int8", "float32"), ("fp8", "bfloat16")]
)
def test_merges_are_dense_and_those_of_the_dequantized_weight(name, dtype):
    stored, case = layer(name, "dora", dtype=dtype)
    dora, lora = case.adapter, {factor: case.adapter[factor] for factor in "AB"}
    norm = lora_jax.dora_column_norm(case.weight, dora, 2.0)
    biased = lora | {"B_bias": jnp.ones(SHAPE[1])}
    folds = {
        "lora": lambda w: lora_jax.merge_lora_weight(w, lora, 2.0),
        "unmerged lora": lambda w: lora_jax.unmerge_lora_weight(w, lora, 2.0),
        "dora": lambda w: lora_jax.merge_dora_weight(w, dora, 2.0),
        "unmerged dora": lambda w: lora_jax.unmerge_dora_weight(w, dora, norm, 2.0),
        "layer": lambda w: lora_jax.merge_lora_layer(w, None, biased),
        "unmerged layer": lambda w: lora_jax.unmerge_lora_layer(w, case.bias, biased),
    }
    for what, fold in folds.items():
        got, want = (jax.tree.leaves(fold(w)) for w in (stored, case.weight))
        assert got[0].dtype == jnp.dtype(dtype), what
        for value, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(value, expected, what)


@pytest.mark.parametrize("linear", ["lora", "dora"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, c: {"x": c.x[:, :9]}, ValueError, r"x does not fit .* \(\.\.\., 24\)"),
        (lambda q, c: {"x": c.x[:, :20]}, ValueError, "as in PyTorch"),
        (lambda q, c: {"weight": q.codes}, TypeError, "must be floating point, got .*int8"),
        (
            lambda q, c: {"adapter": c.adapter | {"A": c.adapter["A"][1:]}},
            ValueError,
            "the factors do not fit",
        ),
        (
            lambda q, c: {"x": quant.quantize_int8(c.x)},
            TypeError,
            r"x is quantized \(Int8Tensor\).*dequantize",
        ),
        (
            lambda q, c: {"weight": jax.eval_shape(lambda: q)},
            TypeError,
            "has no values to compute with",
        ),
    ],
)
def test_errors(linear, change, error, match):
    stored, case = layer("int8", linear)
    args = {"x": case.x, "weight": stored, "adapter": case.adapter} | change(stored, case)
    with pytest.raises(error, match=match):
        apply(linear)(args["x"], args["weight"], args["adapter"])


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_codes_are_no_weight(name):
    stored, case = layer(name, "lora")
    with pytest.raises(TypeError, match="mean nothing without their scales"):
        lora_jax.lora_linear(case.x, stored.codes, case.adapter)


@pytest.mark.parametrize(
    "take_apart",
    [
        lambda q: lora_jax.init_pissa_adapter(q, 2),
        lambda q: lora_jax.init_olora_adapter(q, 2),
        lambda q: lora_jax.init_loftq_adapter(q, 2, quantize=lambda w: w),
        lambda q: lora_jax.decompose_params({"w": q}, matrix_plan({"w": q}), "pissa"),
    ],
)
def test_initializers_that_change_the_base_refuse(take_apart):
    stored, _ = layer("nf4", "lora")
    with pytest.raises(TypeError, match=r"NF4Tensor|quantized"):
        take_apart(stored)


@pytest.mark.parametrize(
    ("name", "use_dora"),
    slowly([("int8", True)], [(x, y) for x in ("int8", "fp8") for y in (False, True)]),
)
def test_outputs_may_be_sharded(name, use_dora):
    linear = "dora" if use_dora else "lora"
    case = support.make_case(method=linear, shape=(64, 128))
    stored = FORMATS[name](case.weight)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    put = lambda v, *axes: jax.device_put(v, NamedSharding(mesh, P(*axes)))  # noqa: E731
    placed = dataclasses.replace(
        stored, codes=put(stored.codes, None, "model"), scales=put(stored.scales, "model")
    )
    specs = {"A": (), "B": (None, "model"), "m": ("model",)}
    adapter = {key: put(value, *specs[key]) for key, value in case.adapter.items()}
    forward = jax.jit(apply(linear))
    text = forward.lower(case.x, placed, adapter).compile().as_text()
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", text)
    got = forward(case.x, placed, adapter)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)
    assert_same(got, forward(case.x, stored, case.adapter), 1e-6)
