"""LoRA-One and LoRA-GA, against NumPy's SVD of the gradients that JAX computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.from_data import gradient_sums
from lora_jax.plan import layout, parts
from tests import programs, reference
from tests.support import asarray, best, draw

KEY = jax.random.key(0)
DEPTH, WIDTH, HIDDEN, WORDS = 3, 8, 14, 11
# Part of a stack, a stack, one use of a tied table, and a part of the outputs of (out, in).
TARGETS = ("layers/up[1:]", "layers/down", "table@lookup", "head[:5]")
ARRAYS = {
    "layers": {
        "up": draw(DEPTH, WIDTH, HIDDEN, size=0.3),
        "down": draw(DEPTH, HIDDEN, WIDTH, size=0.3),
    },
    "table": draw(WORDS, WIDTH),
    "head": draw(9, WIDTH),
}
WEIGHTS = {f"layers/{name}": leaf for name, leaf in ARRAYS["layers"].items()} | ARRAYS
PARAMS = {**ARRAYS, "activation": "tanh"}


def apply(params, tokens):
    def block(x, layer):
        return x + activation(x @ layer["up"]) @ layer["down"], None

    activation = getattr(jnp, params.get("activation", "tanh"))
    x, _ = jax.lax.scan(block, params["table"][tokens], params["layers"])
    out = params.get("table of products", params["table"])
    return x.mean(1) @ params["head"].T, x.mean(1) @ out.T


def loss(params, tokens, labels):
    pairs = zip(apply(params, tokens), labels, strict=True)
    return sum(jnp.mean((own - y) ** 2) for own, y in pairs)


def make_batch(seed, number=16):
    tokens = np.random.default_rng(seed).integers(0, WORDS, (number, 5))
    return asarray(tokens), [draw(number, size, seed=seed) for size in (9, WORDS)]


BATCHES = [make_batch(1), make_batch(2)]


def make_plan(targets=TARGETS, rank=2, params=PARAMS, **fields):
    config = lora_jax.LoraConfig(rank, 6.0, targets, **fields)
    return lora_jax.plan_adapters(config, params, loss, *BATCHES[0])


def start(plan, params=PARAMS, loss=loss, batches=BATCHES, **options):
    return lora_jax.init_adapters_from_gradients(
        KEY, params, plan, loss, batches, **options
    )


def value(plan, params, adapters):
    return float(lora_jax.adapt(loss, plan)(params, adapters, *BATCHES[0]))


@functools.cache
def gradient(path):
    """The mean gradient of a target of `TARGETS`, `(*batch, in, out)` in float64."""
    plan, two_tables = make_plan(), {**ARRAYS, "table of products": ARRAYS["table"]}
    grads = [jax.jit(jax.grad(loss))(two_tables, *batch) for batch in BATCHES]
    mean = jax.tree.map(lambda *own: np.mean(reference.f64(own), axis=0), *grads)
    leaf, target = plan.leaf(path), plan.targets[path]
    whole = mean[leaf] if leaf in mean else mean["layers"][leaf.removeprefix("layers/")]
    return layout.to_matrix(np.asarray(parts.take(whole, target.part)), target.alone)


# A bound: the products of the model run in float32.
close = functools.partial(np.testing.assert_allclose, rtol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_one_is_a_step_along_the_best_approximation_of_the_gradient(use_dora):
    targets = ("layers/up[1:]", "layers/down") if use_dora else TARGETS
    plan = make_plan(targets, use_dora=use_dora, train="head" if use_dora else ())
    base, adapters = start(plan, gamma=4.0)
    assert base is PARAMS
    for path, target in plan.targets.items():
        assert {n: x.shape for n, x in adapters[path].items()} == target.adapter_shapes
        a, b = (reference.f64(adapters[path][name]) for name in "AB")
        want = gradient(path)
        s = np.linalg.svd(want, compute_uv=False)
        close(a @ b, -best(want, 2) / (4 * s[..., :1, None]), atol=1e-5)
        norms = np.sqrt(s[..., :2] / (4 * s[..., :1]))
        close(np.linalg.norm(a, axis=-2), norms)
        close(np.linalg.norm(b, axis=-1), norms)
        if use_dora:
            merged = reference.f64(parts.take(WEIGHTS[plan.leaf(path)], target.part))
            merged += target.scale * a @ b
            close(adapters[path]["m"], np.linalg.norm(merged, axis=-2))
    if use_dora:
        np.testing.assert_array_equal(adapters["head"]["value"], PARAMS["head"])


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_ga_has_singular_vectors_and_does_not_change_the_model(use_dora):
    targets = ["layers/up[1:]", "layers/down", "head[:5]"]
    plan = make_plan(targets, use_dora=use_dora)
    base, adapters = start(plan, method="lora_ga", gamma=9.0)
    for path, target in plan.targets.items():
        a, b = (reference.f64(adapters[path][name]) for name in "AB")
        u, _, vh = np.linalg.svd(gradient(path), full_matrices=False)
        square = np.sqrt(target.matrix_shape[-1]) / 9
        close(a @ a.mT, square * u[..., :2] @ u[..., :2].mT, atol=1e-4)
        close(b.mT @ b, square * vh[..., 2:4, :].mT @ vh[..., 2:4, :], atol=1e-3)
    merged = lora_jax.merge_adapters(base, adapters, plan)
    jax.tree.map(
        lambda got, want: close(got, want, atol=1e-5),
        *({name: tree[name] for name in ARRAYS} for tree in (merged, PARAMS)),
    )
    assert base["activation"] == "tanh"
    assert base["table"] is PARAMS["table"]
    assert np.any(base["head"][:5] != PARAMS["head"][:5])
    np.testing.assert_array_equal(base["head"][5:], PARAMS["head"][5:])


def test_lora_one_descends_whatever_the_sign_of_the_scale():
    plan = make_plan("head", dtype="bfloat16")
    for scale in (3.0, -3.0):
        own = plan.replace(scale=scale)
        base, adapters = start(own)
        assert {x.dtype for x in adapters["head"].values()} == {jnp.dtype("bfloat16")}
        assert value(own, base, adapters) < float(loss(PARAMS, *BATCHES[0]))


def test_lora_one_of_a_quantized_base():
    dense = {**PARAMS, "head": draw(64, WIDTH)}
    labels = [draw(16, 64), BATCHES[0][1][1]]
    batches = [(BATCHES[0][0], labels)]
    config = lora_jax.LoraConfig(2, 6.0, "head", use_dora=True)
    plan = lora_jax.plan_adapters(config, dense, loss, *batches[0])
    quantized = {**dense, "head": lora_jax.quant.quantize_int8(dense["head"])}
    codes = {**dense, "head": lora_jax.quant.dequantize(quantized["head"])}
    base, adapters = start(plan, quantized, batches=batches)
    assert base is quantized
    _, want = start(plan, codes, batches=batches)
    jax.tree.map(lambda x, y: close(x, y, atol=1e-5), adapters, want)
    with pytest.raises(TypeError, match=r"at 'head': LoRA-GA subtracts .*Int8.*'lora_one'"):
        start(plan, quantized, batches=batches, method="lora_ga")


def test_no_gradient_of_a_weight_is_computed():
    params = {
        "layers": {"up": draw(2, 96, 128), "down": draw(2, 128, 96)},
        "table": draw(WORDS, 96),
        "head": draw(9, 96),
    }
    config = lora_jax.LoraConfig(1, targets=("*/up[1:]", "*/down"))
    plan = lora_jax.plan_adapters(config, params, loss, *BATCHES[0])
    wide = gradient_sums.widened(plan, dict.fromkeys(plan.targets, 11))
    adapted = lora_jax.adapt(loss, wide)
    sums = gradient_sums.GradientSums(adapted, params, BATCHES, 2)
    adapters = lora_jax.init_adapters(KEY, params, wide)
    arrays = jax.tree.leaves(params)
    made, frozen, dense = (
        len(programs.are_weights(programs.made_shapes(own.compile().as_text()), plan))
        for own in (
            sums.add.lower(adapters, arrays, adapters, BATCHES[0]),
            jax.jit(jax.grad(lambda x: loss({**params, "head": x}, *BATCHES[0]))).lower(
                params["head"]
            ),
            jax.jit(jax.grad(loss)).lower(params, *BATCHES[0]),
        )
    )
    assert made <= frozen < dense


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    arrays = {"w": draw(WIDTH, HIDDEN)}

    def square(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    x = draw(16, WIDTH)
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(2), arrays, square, x)
    want = start(plan, arrays, square, [(x,)], method="lora_ga")
    params = jax.device_put(arrays, NamedSharding(mesh, P(None, "model")))
    batch = (jax.device_put(x, NamedSharding(mesh, P("data"))),)
    got = start(plan, params, square, [batch], method="lora_ga")
    places = lora_jax.adapter_shardings(params, plan)
    for name, own in places["w"].items():
        assert got.adapters["w"][name].sharding.is_equivalent_to(own, 2)
    a, b = (np.asarray(got.adapters["w"][name]) for name in "AB")
    close(a @ a.mT, want.adapters["w"]["A"] @ want.adapters["w"]["A"].mT, atol=1e-5)
    close(b.mT @ b, want.adapters["w"]["B"].mT @ want.adapters["w"]["B"], atol=1e-5)
    assert got.params["w"].sharding == params["w"].sharding


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "method must be one of 'lora_one', 'lora_ga'", {"method": "lora"}),
        (ValueError, "gamma must be positive, got 0", {"gamma": 0.0}),
        (ValueError, "iterations must not be negative, got -1", {"iterations": -1}),
        (TypeError, "batches must be an iterable of tuples", {"batches": 3}),
        (
            TypeError,
            r"read 6 times, and a list_iterator .*list",
            {"batches": iter(BATCHES)},
        ),
        (TypeError, r"a tuple .*got list: write \(batch,\)", {"batches": [[1, 2]]}),
        (ValueError, "batches are empty: at least one", {"batches": []}),
        (ValueError, "at 'head'.* most 4, got 5", {"method": "lora_ga", "rank": 5}),
        (ValueError, "at 'table@lookup': LoRA-GA changes .*lookup", {"method": "lora_ga"}),
        (ValueError, r"at 'layers/down': the gradient of the matrix \(1,\)", {"cut": True}),
        (ValueError, "at 'head': the gradient is zero in all batches", {"factor": 0.0}),
    ],
)
def test_errors(error, message, options):
    name = "table@lookup" if "lookup" in message else "head"
    name = "layers/down" if "cut" in options else name
    plan = make_plan(name, options.pop("rank", 2))

    def without_layer(params, *batch):
        up = params["layers"]["up"].at[1].set(0.0)
        return loss({**params, "layers": {**params["layers"], "up": up}}, *batch)

    factor = options.pop("factor", 1.0)
    own = without_layer if options.pop("cut", False) else lambda *of: factor * loss(*of)
    with pytest.raises(error, match=message):
        start(plan, loss=own, **options)


def test_an_infinite_gradient_is_an_error():
    plan = make_plan("head")
    with pytest.raises(FloatingPointError, match="at 'head': the gradient of the weight"):
        start(plan, batches=[(BATCHES[0][0], [jnp.inf * y for y in BATCHES[0][1]])])
