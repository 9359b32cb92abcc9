"""Layers and models on weights in few bits: they do what the dequantized weights do."""

import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.flax import load_file

import lora_jax
from lora_jax import quant
from tests import reference, support
from tests.transform.support import assert_same, normal, quickly_compiled

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = [
    case
    for case in json.loads((GOLDEN / "manifest.json").read_text())["quantized_cases"]
    if case["suite"] == "torchtune"
]
SHAPE = (24, 20)
KEY = jax.random.key(0)
FORMATS = {
    "nf4": lambda w, **k: quant.quantize_nf4(w, 8, 5, **k),
    "bitsandbytes": lambda w, **k: quant.quantize_nf4(w, 16, 3, codec="bitsandbytes", **k),
    "int8": quant.quantize_int8,
    "fp8": quant.quantize_fp8,
}
SLOW = pytest.mark.slow


def slowly(quick, every):
    """Parameters of which only those of `quick` are no slow tests."""
    return [x if x in quick else pytest.param(*_tuple(x), marks=SLOW) for x in every]


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


EVERY_FORMAT = pytest.mark.parametrize("name", slowly(["int8"], FORMATS))


@pytest.fixture(autouse=True)
def quick():
    """Most tests are of values, and take as long to compile as to do anything else."""
    with quickly_compiled():
        yield


@pytest.fixture
def optimized(quick):
    """For those of what the compiler makes of it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


OPTIMIZED = pytest.mark.usefixtures("optimized")


def dequantized(tree):
    """A tree with arrays in the place of its quantized weights."""
    return jax.tree.map(
        lambda leaf: quant.dequantize(leaf) if quant.is_quantized(leaf) else leaf,
        tree,
        is_leaf=quant.is_quantized,
    )


# Layers of torchtune: NF4 in blocks of the rows of PyTorch's (out, in).


class Golden:
    """A quantized layer of torchtune. The weight stays (out, in), as do its blocks."""

    def __init__(self, case):
        self.case, meta = case, case["meta"]
        tensors = self.tensors = load_file(GOLDEN / case["file"])
        sizes = {"block_size": 64, "scaler_block_size": 256} | meta["quant_kwargs"]
        names = {
            "codes": "quantized_data",
            "scales": "quantized_scalers",
            "group_scales": "quantization_factor",
            "mean": "scaler_mean",
        }
        self.stored = quant.NF4Tensor(
            **{ours: tensors[f"nf4/{theirs}"] for ours, theirs in names.items()},
            **sizes,
            entry_shape=tensors["W0"].shape,
            weight_dtype=meta["dtype"],
            codec="torchao",
        )
        self.is_dora, self.alpha = "m" in tensors, meta["alpha"]
        self.adapter = {n: self.entry(n) for n in ("A", "B", "m") if n in tensors}
        config = lora_jax.LoraConfig(
            meta["rank"], self.alpha, use_dora=self.is_dora, dtype=tensors["A"].dtype
        )
        self.params = {"w": self.stored}
        self.plan = lora_jax.plan_adapters(config, self.params, torch_linear, tensors["x"])

    def entry(self, name, prefix=""):
        value = self.tensors[prefix + name]
        return value.T if name in "AB" else value

    def by_adapt(self, x, adapter):
        adapters = {"w": adapter}
        y = lora_jax.adapt(torch_linear, self.plan)(self.params, adapters, x)
        if "b0" not in self.tensors:
            return y
        bias = self.tensors["b0"]
        if self.is_dora:  # torchtune scales the bias, too; to adapt it is the user's own
            norms = lora_jax.adapted_column_norms(self.params, adapters, self.plan)
            bias = adapter["m"] / lax.stop_gradient(norms["w"]) * bias
        return y + bias[None]

    def by_layer(self, x, adapter):
        """On the dequantized weight: the transpose of the stored one has other blocks."""
        weight, bias = quant.dequantize(self.stored).T, self.tensors.get("b0")
        if not self.is_dora:
            return lora_jax.lora_linear(x, weight, adapter, self.alpha, bias=bias)
        return lora_jax.dora_linear(
            x, weight, adapter, self.alpha, bias=bias, scale_bias=True
        )

    def check(self, name, got, want):
        got, want = reference.f64(got), reference.f64(want)
        bound = self.case["atol"] + self.case["rtol"]
        assert got.shape == want.shape, name
        assert np.abs(got - want).max() <= bound * max(1.0, np.abs(want).max()), name


def torch_linear(params, x):
    return x @ params["w"].T


EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])


@EVERY_CASE
def test_torchtune_has_the_same_bits(case):
    golden = Golden(case)
    golden.stored.check()
    # W0 is what its tensor dequantizes to: quantized again, it has the same 4-bit codes.
    got, want = quant.dequantize(golden.stored), golden.tensors["W0"]
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    again = golden.stored.quantize_like(want)
    np.testing.assert_array_equal(again.codes, golden.stored.codes)


@pytest.mark.parametrize("how", ["by_adapt", "by_layer"])
@EVERY_CASE
def test_torchtune_has_the_same_outputs_and_gradients(case, how):
    golden = Golden(case)
    c = golden.tensors["c"]

    def loss(x, adapter):
        y = getattr(golden, how)(x, adapter)
        return jnp.sum((y * c).astype(jnp.float32)), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grad_x, grads), y = grad(golden.tensors["x"], golden.adapter)
    golden.check("y", y, golden.tensors["y"])
    golden.check("grad/x", grad_x, golden.tensors["grad/x"])
    for name, value in grads.items():
        golden.check(f"grad/{name}", value, golden.entry(name, "grad/"))
        assert value.dtype == golden.adapter[name].dtype


@EVERY_CASE
def test_torchtune_has_the_same_merges_and_first_magnitudes(case):
    golden = Golden(case)
    if golden.is_dora:
        first = lora_jax.init_adapters(KEY, golden.params, golden.plan)
        golden.check("m", first["w"]["m"], golden.tensors["m_init"])
    else:
        merged = lora_jax.merge_adapters(golden.params, {"w": golden.adapter}, golden.plan)
        golden.check("W", merged["w"], golden.tensors["W_merged"])


def test_blocks_of_the_transpose_are_others():
    # Guards the tests above: which way round the weight is quantized makes a difference.
    w = load_file(GOLDEN / CASES[0]["file"])["W0"]
    there = quant.dequantize(quant.quantize_nf4(w, 8, 4))
    back = quant.dequantize(quant.quantize_nf4(w.T, 8, 4)).T
    assert np.abs(there - back).max() > 1e-2


# One layer.

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
EVERY_LINEAR = pytest.mark.parametrize("linear", LINEARS)


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


# Every layer in one format, and the simplest ones in all.
LAYERS_AND_FORMATS = [
    *(("nf4", linear) for linear in LINEARS),
    *((name, x) for name in list(FORMATS)[1:] for x in ("lora", "dora")),
]
QUICK = [("nf4", "lora"), ("nf4", "dora, in"), ("int8", "dora"), ("fp8", "lora")]


@pytest.mark.parametrize(("name", "linear"), slowly(QUICK, LAYERS_AND_FORMATS))
def test_a_layer_is_that_of_the_dequantized_weight(name, linear):
    stored, case = layer(name, linear)
    assert_same(run(linear, case, stored), run(linear, case, case.weight), 1e-5)


@pytest.mark.parametrize(
    ("layout", "linear"),
    slowly(
        [("experts_in_layers", "dora")],
        [(x, y) for x in support.LAYOUTS for y in ("lora", "dora", "dora, in")],
    ),
)
def test_a_layer_of_any_layout(layout, linear):
    stored, case = layer("nf4", linear, layout)
    assert_same(run(linear, case, stored), run(linear, case, case.weight), 1e-5)


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


@pytest.mark.parametrize(
    ("name", "linear"),
    slowly([*QUICK, ("nf4", "dora, dropout, megatron")], LAYERS_AND_FORMATS),
)
def test_the_backward_pass_keeps_no_dense_weight(name, linear):
    stored, case = layer(name, linear)
    forward = apply(linear)

    def kept(weight):
        def pull(x, adapter, weight):
            return jax.vjp(lambda x, a: forward(x, weight, a), x, adapter)[1]

        return jax.tree.leaves(jax.eval_shape(pull, case.x, case.adapter, weight))

    assert not [leaf.shape for leaf in kept(stored) if is_dense(leaf)]
    assert [leaf for leaf in kept(case.weight) if is_dense(leaf)]  # guards the line above


def is_dense(leaf):
    """Whether it has the size of the weight, in a dtype that one may have."""
    dtype = getattr(leaf, "dtype", None)
    floats = (jnp.float32, jnp.bfloat16, jnp.float16)
    return dtype in floats and leaf.size >= SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize("norm_axis", slowly(["out"], ["out", "in"]))
def test_norms_keep_no_dense_weight(norm_axis):
    stored, case = layer("nf4", "dora, in" if norm_axis == "in" else "dora")

    def norm(weight, adapter):
        return lora_jax.dora_column_norm(weight, adapter, 2.0, norm_axis=norm_axis)

    def kept(weight, adapter):
        return jax.vjp(functools.partial(norm, weight), adapter)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, stored, case.adapter))
    assert not [leaf.shape for leaf in leaves if is_dense(leaf)]
    grad = jax.jit(jax.grad(lambda a, w: jnp.sum(jnp.sin(norm(w, a)))))
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
        lambda q: lora_jax.init_loftq_adapter(q, 2, lambda w: w),
        lambda q: lora_jax.decompose_params({"w": q}, matrix_plan({"w": q}), "pissa"),
    ],
)
def test_initializers_that_change_the_base_refuse(take_apart):
    stored, _ = layer("nf4", "lora")
    with pytest.raises(TypeError, match=r"NF4Tensor|quantized"):
        take_apart(stored)


# Whole models.


def matrix_plan(params, **config):
    return lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2, **config), params)


class Block(NamedTuple):
    """Weights of the most different kinds, and what is none."""

    up: Any
    down: Any
    scale: Any
    name: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    block: Block
    stack: Any
    head: Any
    depth: int


def model(params, x):
    assert (params.block.name, params.depth) == ("first", 3)
    h = jnp.tanh(x @ params.block.up) * params.block.scale[None]
    h = h @ params.block.down.T
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params.stack)[0]
    return h @ params.head


def make_model(name="nf4", dtype="float32"):
    """Quantized params, an input, and adapters (of DoRA) in which nothing is zero."""
    draw = lambda *shape: jnp.asarray(normal(*shape) / 3, dtype)  # noqa: E731
    q = FORMATS[name]
    block = Block(q(draw(12, 10)), q(draw(20, 10)), draw(10), "first")
    stack = q(draw(3, 20, 20), batch_axes=1)
    params = Model(block, stack, draw(20, 7), 3)
    return params, draw(5, 12)


def plan_model(params, x, **config):
    config = {"rank": 2, "alpha": 3.0, "use_dora": True} | config
    return lora_jax.plan_adapters(lora_jax.LoraConfig(**config), params, model, x)


def train(params, plan):
    adapters = lora_jax.init_adapters(KEY, params, plan)
    return jax.tree.map(
        lambda v: v + 0.3 * jnp.asarray(normal(*v.shape), v.dtype), adapters
    )


@pytest.mark.parametrize(
    ("name", "use_dora"),
    slowly([("int8", False)], [(x, y) for x in FORMATS for y in (False, True)]),
)
def test_a_model_of_all_kinds_of_leaves(name, use_dora):
    stored, x = make_model(name)
    plan = plan_model(stored, x, use_dora=use_dora)
    assert set(plan.targets) == {"block/up", "block/down", "stack", "head"}
    adapters = train(stored, plan)
    adapted = lora_jax.adapt(model, plan)

    def loss(adapters, x, params):
        return jnp.sum(jnp.sin(adapted(params, adapters, x)))

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    got = jax.jit(lambda a, x: grad(a, x, stored))(adapters, x)
    want = jax.jit(lambda a, x: grad(a, x, dequantized(stored)))(adapters, x)
    assert_same(got, want, 1e-5)


def test_plans_and_counts_of_abstract_params():
    stored, x = make_model()
    dense = dequantized(stored)
    arrays = lambda p: (p.block.up, p.block.down, p.block.scale, p.stack, p.head)  # noqa: E731

    def quantize(up, down, scale, stack, head):
        q = FORMATS["nf4"]
        return q(up), q(down), scale, q(stack, batch_axes=1), head

    up, down, scale, stack, head = jax.eval_shape(quantize, *arrays(dense))
    abstract = Model(Block(up, down, scale, "first"), stack, head, 3)
    plan = plan_model(stored, x)
    assert plan == plan_model(dense, x) == plan_model(abstract, x)
    counts = {lora_jax.count_parameters(p, plan) for p in (stored, dense, abstract)}
    assert counts == {(plan.parameters, plan.parameters + 120 + 200 + 10 + 1200 + 140)}
    lora = plan_model(abstract, x, use_dora=False)
    made = lora_jax.init_adapters(KEY, abstract, lora)
    assert_same(made, lora_jax.init_adapters(KEY, dense, lora), 0)


@EVERY_FORMAT
def test_first_adapters_are_those_of_the_dequantized_weights(name):
    stored, x = make_model(name)
    plan = plan_model(stored, x)
    adapters = lora_jax.init_adapters(KEY, stored, plan)
    assert_same(adapters, lora_jax.init_adapters(KEY, dequantized(stored), plan), 1e-6)
    only = {"w": stored.stack}
    plan = lora_jax.plan_adapters(
        lora_jax.LoraConfig(rank=2, use_dora=True, axes={"w": "bio"}), only
    )
    made = jax.eval_shape(lambda p: lora_jax.init_adapters(KEY, p, plan), only)
    shapes = {name: leaf.shape for name, leaf in made["w"].items()}
    assert shapes == {"A": (3, 20, 2), "B": (3, 2, 20), "m": (3, 20)}


def matrices(params, plan, adapters):
    """By path: the weight as `(*batch, in, out)`, the adapter and its scale, in float64."""
    dense = dequantized(params)
    leaves = {"block/up": dense.block.up, "block/down": dense.block.down.T}
    leaves |= {"stack": dense.stack, "head": dense.head}
    return {
        path: (reference.f64(leaves[path]), reference.f64(adapters[path]), target.scale)
        for path, target in plan.targets.items()
    }


@pytest.mark.parametrize("use_dora", slowly([False], [False, True]))
def test_a_merged_model_is_dense_and_unmerges(use_dora):
    stored, x = make_model()
    plan = plan_model(stored, x, use_dora=use_dora)
    adapters = train(stored, plan)
    merged = lora_jax.merge_adapters(stored, adapters, plan)
    leaves = jax.tree.leaves(merged, is_leaf=quant.is_quantized)
    assert not any(map(quant.is_quantized, leaves))
    fold = reference.dora_weight if use_dora else reference.lora_weight
    found = matrices(merged, plan, adapters)
    for path, args in matrices(stored, plan, adapters).items():
        support.assert_close(found[path][0], fold(*args), 64, "float32")
    norms = None
    if use_dora:
        norms = lora_jax.adapted_column_norms(stored, adapters, plan)
    back = lora_jax.unmerge_adapters(merged, adapters, plan, column_norms=norms)
    restored = matrices(back, plan, adapters)
    for path, (weight, *_) in matrices(stored, plan, adapters).items():
        support.assert_close(restored[path][0], weight, 256, "float32")


@pytest.mark.parametrize("name", slowly(["int8"], ["nf4", "int8"]))
def test_merging_into_the_same_bits_again(name, caplog):
    stored, x = make_model(name)
    plan = plan_model(stored, x)
    adapters = train(stored, plan)
    dense = lora_jax.merge_adapters(stored, adapters, plan)
    merge = functools.partial(lora_jax.merge_adapters, requantize=True)
    with caplog.at_level(logging.INFO, "lora_jax"):
        again = merge(stored, adapters, plan)
    assert jax.tree.structure(again) == jax.tree.structure(stored)  # with all settings
    assert not quant.is_quantized(again.head)
    for got, old, new in (
        (again.stack, stored.stack, dense.stack),
        (again.block.down, stored.block.down, dense.block.down),
    ):
        want = FORMATS[name](new, batch_axes=old.batch_ndim)
        assert_same(quant.dequantize(got), quant.dequantize(want), 0)
        update = np.linalg.norm(reference.f64(new) - reference.f64(quant.dequantize(old)))
        lost = np.linalg.norm(reference.f64(new) - reference.f64(quant.dequantize(got)))
        path = "stack" if old is stored.stack else "block/down"
        (line,) = [r.getMessage() for r in caplog.records if f" {path}," in r.getMessage()]
        assert float(re.search(r"\|update\| = (\S+)$", line)[1]) == pytest.approx(
            lost / update, rel=5e-3
        )
    caplog.clear()
    with caplog.at_level(logging.INFO, "lora_jax"):
        up = {"up": stored.block.up}
        plan = matrix_plan(up)
        adapters = train(up, plan)
        traced = jax.jit(merge)(up, adapters, plan)
    assert not caplog.records
    want = merge(up, adapters, plan)
    assert jax.tree.structure(traced) == jax.tree.structure(want)
    assert_same(dequantized(traced), dequantized(want), 0.2)


@pytest.mark.parametrize(
    ("name", "use_dora"),
    slowly([("int8", False)], [(x, y) for x in FORMATS for y in (False, True)]),
)
def test_merge_losses_of_requantized_weights(name, use_dora):
    stored, x = make_model(name)
    plan = plan_model(stored, x, use_dora=use_dora)
    adapters = train(stored, plan)
    small = 1e-3 * adapters["block/up"]["A"][:1]  # of one input, so that scales stay
    adapters["block/up"]["A"] = jnp.zeros((12, 2)).at[:1].set(small)
    losses = lora_jax.merge_losses(stored, adapters, plan, requantize=True)
    again = lora_jax.merge_adapters(stored, adapters, plan, requantize=True)
    fold = reference.dora_weight if use_dora else reference.lora_weight
    merged = matrices(again, plan, adapters)
    for path, args in matrices(stored, plan, adapters).items():
        if path == "head":  # dense: tests/test_model.py
            continue
        weight, update = args[0], fold(*args) - args[0]
        vanished = (np.abs(update) > 0) & (merged[path][0] == weight)
        ratio = np.abs(update) / np.where(weight == 0, 1, np.abs(weight))
        error = np.linalg.norm(merged[path][0] - weight - update)
        got = losses[path]
        if path == "block/up" and name in ("int8", "fp8") and not use_dora:
            assert vanished.any()
        assert float(got.vanished) == pytest.approx(vanished.mean(), abs=1e-6)
        assert float(got.largest_vanished) == pytest.approx(
            ratio[vanished].max(initial=0), rel=1e-3
        )
        want = error / np.linalg.norm(update)
        assert float(got.relative_error) == pytest.approx(want, rel=1e-3, abs=1e-6)
    dense = lora_jax.merge_losses(stored, adapters, plan)
    assert all(float(loss.relative_error) < 1e-3 for loss in dense.values())


def test_adapters_of_quantized_params_are_saved_and_read(tmp_path):
    stored, x = make_model()
    plan = plan_model(stored, x)
    adapters = train(stored, plan)
    lora_jax.save_adapters(tmp_path / "adapters", adapters, plan)
    read, read_plan = lora_jax.load_adapters(tmp_path / "adapters")
    assert read_plan == plan
    assert_same(read, adapters, 0)


# What is in memory: NF4 as QLoRA has it, and a scan over its layers.

LAYERS, WIDTH, ROWS, RANK = 8, 256, 4, 2
DENSE = 4 * WIDTH * WIDTH  # a layer's weight in float32
DEEP = {
    "nf4": lambda w: quant.quantize_nf4(w, 64, 64, batch_axes=1),
    "int8": lambda w: quant.quantize_int8(w, batch_axes=1),
    "fp8": lambda w: quant.quantize_fp8(w, batch_axes=1),
}


def deep(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def deep_model(use_dora=False, dtype="float32", name="nf4"):
    """Stored params, adapters, an input, and the plan."""
    weight = jnp.asarray(normal(LAYERS, WIDTH, WIDTH) / 12, dtype)
    stored, x = {"w": DEEP[name](weight)}, jnp.asarray(normal(ROWS, WIDTH), dtype)
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
def compiled(use_dora, dtype, name="nf4", wrong=False):
    stored, adapters, x, plan = deep_model(use_dora, dtype, name)
    step = deep_step(plan, dequantized if wrong else lambda params: params)
    return jax.jit(step).lower(adapters, stored, x).compile()


def dense_stacks(text):
    """Floating-point arrays of a program's text that are as large as a dense stack."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", text)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    return [size for size in sizes if size >= LAYERS * WIDTH * WIDTH]


METHODS = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@OPTIMIZED
@pytest.mark.parametrize(
    ("use_dora", "dtype"),
    slowly(
        [(False, "float32"), (True, "bfloat16")],
        [(x, y) for x in (False, True) for y in ("float32", "bfloat16")],
    ),
)
def test_a_step_has_no_dense_stack(use_dora, dtype):
    program = compiled(use_dora, dtype)
    assert not dense_stacks(program.as_text())
    activations = 4 * LAYERS * ROWS * WIDTH * (3 if use_dora else 2)
    factors = 4 * LAYERS * RANK * 2 * WIDTH
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < activations + 2 * factors + 3.5 * DENSE
    assert temporary < LAYERS * DENSE / 2  # half of all weights, dense


@OPTIMIZED
@pytest.mark.parametrize("use_dora", slowly([False], [False, True]))
def test_a_step_on_dequantized_params_has_one(use_dora):
    # Guards the test above: it can tell.
    program = compiled(use_dora, "float32", wrong=True)
    assert dense_stacks(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes > LAYERS * DENSE


@OPTIMIZED
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_step_has_no_dense_stack_in_8_bits(name):
    program = compiled(False, "float32", name)
    assert not dense_stacks(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < LAYERS * DENSE / 2


def stacked_outputs(jaxpr):
    """Shapes and dtypes of what loops stack up, also inside calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            carried = eqn.params.get("num_carry")
            yield from (v.aval for v in eqn.outvars[carried:])
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from stacked_outputs(inner)


@pytest.mark.parametrize("wrong", [False, True], ids=["", "wrong"])
@METHODS
def test_loops_stack_up_activations_only(use_dora, wrong):
    stored, adapters, x, plan = deep_model(use_dora)

    def dense_at_once(params):  # keeps each layer's dense weight, as plain use would
        def entry(_, w):
            return None, dequantized(w)

        return lax.scan(entry, None, params)[1]

    step = deep_step(plan, dense_at_once if wrong else lambda params: params)
    found = list(stacked_outputs(jax.make_jaxpr(step)(adapters, stored, x).jaxpr))
    sizes = [int(np.prod(aval.shape)) for aval in found]
    # A scalar is a counter that some versions of JAX hand on.
    codes = [a for a in found if jnp.issubdtype(a.dtype, jnp.integer) and a.shape]
    assert found
    assert not codes
    gradients_or_activations = LAYERS * WIDTH * max(ROWS, RANK)
    assert (max(sizes) <= gradients_or_activations) == (not wrong)


def test_stored_bytes_of_a_weight():
    stored = quant.quantize_nf4(jnp.asarray(normal(512, 1024), jnp.bfloat16))
    # 4 bits an entry, 8 bits a block of 64, 16 bits for 256 blocks, 16 bits for the mean.
    want = 1 / 2 + 1 / 64 + 2 / (64 * 256) + 2 / stored.size
    assert stored.nbytes / stored.size == want
    assert round(want, 3) == 0.516


@OPTIMIZED
def test_norms_of_a_stack_have_one_entry_dense_at_a_time():
    stored, adapters, _, plan = deep_model(use_dora=True)
    norms = jax.jit(lambda p: lora_jax.adapted_column_norms(p, adapters, plan))
    program = norms.lower(stored).compile()
    assert not dense_stacks(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 4 * DENSE
    wrong = norms.lower(dequantized(stored)).compile()  # guards the pattern above
    assert dense_stacks(wrong.as_text())
    for path, norm in norms(stored).items():
        w, adapter = reference.f64(dequantized(stored)[path]), reference.f64(adapters[path])
        want = reference.norms(reference.lora_weight(w, adapter, 2.0), "out")
        support.assert_close(norm, want, 64)


def test_norms_of_a_stack_of_two_axes_have_one_entry_dense_at_a_time():
    stored = {"w": quant.quantize_int8(jnp.asarray(normal(2, 3, *SHAPE)), batch_axes=2)}
    config = lora_jax.LoraConfig(2, targets="w", axes={"w": "bbio"}, use_dora=True)
    plan = lora_jax.plan_adapters(config, stored)
    adapters = train(stored, plan)
    norms = lambda p: lora_jax.adapted_column_norms(p, adapters, plan)  # noqa: E731
    text = str(jax.make_jaxpr(norms)(stored))
    assert "f32[24,20]" in text
    assert "f32[3,24,20]" not in text
    assert_same(norms(stored), norms(dequantized(stored)), 1e-6)


@pytest.mark.parametrize(("axes", "stacked"), [("iio", 1), ("bio", 0)])
def test_norms_of_a_stack_that_is_none_of_the_plan(axes, stacked):
    weight = jnp.asarray(normal(3, *SHAPE))
    stored = {"w": quant.quantize_nf4(weight, 8, 5, batch_axes=stacked)}
    config = lora_jax.LoraConfig(2, targets="w", axes={"w": axes}, use_dora=True)
    plan = lora_jax.plan_adapters(config, stored)
    adapters = train(stored, plan)
    got = lora_jax.adapted_column_norms(stored, adapters, plan)
    want = lora_jax.adapted_column_norms(dequantized(stored), adapters, plan)
    assert_same(got, want, 1e-6)


# Several devices.


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


@OPTIMIZED
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
