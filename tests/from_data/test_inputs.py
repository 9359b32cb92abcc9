"""EVA, against NumPy's principal components of the inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.from_data import inputs
from lora_jax.plan import parts
from tests import reference
from tests.support import asarray, draw

KEY = jax.random.key(0)
DEPTH, WIDTH, HIDDEN = 4, 12, 30
PARAMS = {
    "layers": {
        "up": draw(DEPTH, WIDTH, HIDDEN, size=0.5),
        "down": draw(DEPTH, HIDDEN, WIDTH, size=0.3),
    },
    "shared": draw(WIDTH, WIDTH, size=0.3),
    "head": draw(7, WIDTH),
}
TARGETS = ("layers/up", "layers/down[1:]", "shared", "head")


def apply(params, x):
    """Of `(examples, in)`; `shared` has two uses, and the head is `(out, in)`."""
    x = x + jnp.tanh(x @ params["shared"])

    def block(x, layer):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
    return (x @ params["shared"]) @ params["head"].T


def inputs_of_weights(params, x):
    """The inputs of each target, a list of one array for each matrix of its stack."""
    p = jax.tree.map(reference.f64, params)
    found = {"shared": [x], "layers/up": [], "layers/down[1:]": []}
    x = x + np.tanh(x @ p["shared"])
    for up, down in zip(p["layers"]["up"], p["layers"]["down"], strict=True):
        hidden = np.tanh(x @ up)
        found["layers/up"].append(x)
        found["layers/down[1:]"].append(hidden)
        x = x + hidden @ down
    found["shared"] = [np.concatenate([*found["shared"], x])]
    del found["layers/down[1:]"][0]
    return found | {"head": [x @ p["shared"]]}


# Few directions have most of the variance, and the mean is not zero.
SIZES = 0.5 ** jnp.arange(WIDTH, dtype="float32")[None]
BATCHES = [(draw(40, WIDTH, seed=seed) * SIZES + 0.3,) for seed in (1, 2)]
INPUTS = inputs_of_weights(PARAMS, np.concatenate([reference.f64(x) for (x,) in BATCHES]))


def make_plan(targets=TARGETS, rank=3, **fields):
    config = lora_jax.LoraConfig(rank, 6.0, targets, **fields)
    return lora_jax.plan_adapters(config, PARAMS, apply, *BATCHES[0])


def start(plan, params=PARAMS, fn=apply, batches=BATCHES, **options):
    return lora_jax.init_adapters_from_inputs(KEY, params, plan, fn, batches, **options)


def components(x):
    """The principal components of inputs, as rows, and their shares of the variance."""
    centered = x - x.mean(0)
    _, s, vh = np.linalg.svd(centered, full_matrices=False)
    return vh, s**2 / np.sum(s**2)


close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)


@functools.cache
def eva():
    plan = make_plan()
    return plan, start(plan, iterations=2)


def test_a_has_the_principal_components_of_all_inputs():
    plan, found = eva()
    for path, shares in found.explained.items():
        wanted = np.stack([components(x)[1] for x in INPUTS[path]])
        close(np.atleast_2d(shares), wanted[:, : shares.shape[-1]])
        assert np.all(np.diff(shares) <= 0)
    for path, target in found.plan.targets.items():
        a, b = (reference.f64(found.adapters[path][name]) for name in "AB")
        assert {"A": a.shape, "B": b.shape} == target.adapter_shapes
        assert not b.any()
        assert (a.max(-2) == np.abs(a).max(-2)).all()  # the largest entry is positive
        old = next(p for p in plan.targets if plan.leaf(p) == found.plan.leaf(path))
        index = np.arange(len(INPUTS[old]))
        if target.part:  # of the stack
            layers = np.arange(DEPTH)[1 if "down" in path else 0 :]
            chosen = eval(f"np.arange({DEPTH}){target.part}", {"np": np})
            index = [i for i, layer in enumerate(layers) if layer in np.ravel(chosen)]
        for i, own in zip(index, a.reshape(-1, *a.shape[-2:]), strict=True):
            vectors = components(INPUTS[old][i])[0][: target.rank]
            close(own @ own.T, vectors.T @ vectors, atol=2e-2)
            close(own.T @ own, np.eye(target.rank))


def test_ranks_go_where_the_variance_is():
    plan, found = eva()
    every = [
        (-share, path, i)
        for path, xs in INPUTS.items()
        for i, x in enumerate(xs)
        for share in components(x)[1][:6]
    ]
    budget = 3 * sum(map(len, INPUTS.values()))
    chosen = [own[1:] for own in sorted(every)[:budget]]
    wanted = {
        (path, i): chosen.count((path, i))
        for path, xs in INPUTS.items()
        for i in range(len(xs))
    }
    got = dict.fromkeys(wanted, 0)
    for path, target in found.plan.targets.items():
        leaf = found.plan.leaf(path)
        old = next(p for p in plan.targets if plan.leaf(p) == leaf)
        layers = [0]
        if leaf.startswith("layers/"):
            layers = np.ravel(eval(f"np.arange({DEPTH}){target.part}", {"np": np}))
            layers = layers - (old == "layers/down[1:]")
        got |= {(old, int(i)): target.rank for i in layers}
        assert target.scale == plan.targets[old].scale
    assert got == wanted
    assert len({*got.values()}) > 2
    again = lora_jax.plan_adapters(found.plan.config, PARAMS, apply, *BATCHES[0])
    assert again == found.plan


def test_the_model_does_not_change():
    _, found = eva()
    out = lora_jax.adapt(apply, found.plan)(PARAMS, found.adapters, *BATCHES[0])
    np.testing.assert_array_equal(out, apply(PARAMS, *BATCHES[0]))


def test_without_redistribution_the_plan_stays():
    fields = {"use_dora": True, "train": "shared", "dtype": "bfloat16"}
    plan = make_plan(("layers/up", "head"), **fields)
    found = start(plan, rho=1.0, iterations=0, batches=iter(BATCHES))
    assert found.plan == plan
    assert {found.adapters["head"][name].dtype for name in "AB"} == {jnp.dtype("bfloat16")}
    norms = np.linalg.norm(reference.f64(PARAMS["layers"]["up"]), axis=-2)
    close(found.adapters["layers/up"]["m"], norms)
    np.testing.assert_array_equal(found.adapters["shared"]["value"], PARAMS["shared"])
    want = [components(x)[1][:3] for x in INPUTS["layers/up"]]
    close(found.explained["layers/up"], want, rtol=0.05)


def test_a_weight_without_a_rank_has_no_adapter():
    def fn(params, x):  # shares of 1; 1/4 each; 1/12 each
        line = jnp.tile(x[:, :1], (1, WIDTH))
        return line @ params["line"], x[:, :4] @ params["even"], x @ params["flat"]

    params = {"even": draw(4, 8), "line": draw(WIDTH, 8), "flat": draw(WIDTH, 8)}
    x = reference.f64(draw(64, WIDTH))
    x = asarray(np.linalg.qr(x - x.mean(0))[0], "float32")
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(1), params, fn, x)
    found = start(plan, params, fn, [(x,)])
    ranks = {path: target.rank for path, target in found.plan.targets.items()}
    assert ranks == {"even": 2, "line": 1}
    assert found.adapters.keys() == ranks.keys()
    assert "EVA gave it the rank 0" in found.plan.explain("flat")
    close(found.explained["flat"], [1 / 12, 1 / 12])


@pytest.mark.parametrize(
    ("part", "shape"),
    [("", (3, 2, 5, 4)), ("[1:,:,:,[0,1,3]]", (3, 2, 5, 4)), ("[2]", (3, 4, 5, 4))],
)
def test_each_matrix_of_a_stack_is_in_one_piece(part, shape):
    target = lora_jax.Target(shape, "lora", 1, 1.0, 0.0, (2,), (3,), (0, 1), part)
    *batch, _, _ = target.matrix_shape
    ranks = np.random.default_rng(0).integers(0, 3, batch)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    seen = np.zeros(shape, int)
    for rank, text, index in inputs._pieces(target, ranks):
        own = dataclasses.replace(target, part=text)
        assert set(np.ravel(ranks[index])) == {rank}
        assert own.matrix_shape[:-2] == ranks[index].shape
        seen[np.isin(numbers, np.asarray(parts.take(asarray(numbers), text)))] += 1
    inside = np.isin(numbers, np.asarray(parts.take(asarray(numbers), part)))
    np.testing.assert_array_equal(seen, inside)


def test_quantized_and_16_bit_weights():
    plan = make_plan("layers/up")
    quantized = {
        **PARAMS,
        "layers": {
            **PARAMS["layers"],
            "up": lora_jax.quant.quantize_int8(PARAMS["layers"]["up"], batch_axes=1),
        },
    }
    codes = lora_jax.quant.dequantize(quantized["layers"]["up"])
    dense = {**PARAMS, "layers": {**PARAMS["layers"], "up": codes}}
    got, want = (start(plan, own).explained["layers/up"] for own in (quantized, dense))
    close(got, want)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)
    batches = [(x.astype("bfloat16"),) for (x,) in BATCHES]
    found = start(plan, half, batches=batches, rho=1.0)
    assert found.adapters["layers/up"]["A"].dtype == "float32"
    assert found.explained["layers/up"].dtype == "float32"
    close(found.explained["layers/up"][:, 0], want[:, 0], rtol=0.05)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    params = {"w": draw(WIDTH, WIDTH)}

    def fn(params, x):
        return x @ params["w"]

    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(2), params, fn, *BATCHES[0])
    want = start(plan, params, fn)
    placed = jax.device_put(params, NamedSharding(mesh, P("model", None)))
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P("data")))
    got = start(plan, placed, fn, batches)
    places = lora_jax.adapter_shardings(placed, got.plan)
    for name, own in places["w"].items():
        assert got.adapters["w"][name].sharding.is_equivalent_to(own, 2)
    close(np.abs(got.adapters["w"]["A"]), np.abs(want.adapters["w"]["A"]), atol=1e-3)
    close(got.explained["w"], want.explained["w"])


def lookup(params, tokens):
    return params["table"][tokens] @ params["head"]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "rho must be at least 1, got 0.5", {"rho": 0.5}),
        (ValueError, "iterations must not be negative", {"iterations": -1}),
        (TypeError, "read 2 times, and a list_iterator", {"batches": iter(BATCHES)}),
        (ValueError, "at 'shared': the rank must be at most .* 12, got 13", {"rank": 13}),
        (TypeError, "fn must return floating-point arrays", {"fn": jnp.argmax}),
        (
            ValueError,
            "at 'shared': the weight has no inputs in",
            {"fn": jax.lax.stop_gradient},
        ),
        (ValueError, "at 'shared': the weight has inputs that do not vary", {"fn": "same"}),
        (
            FloatingPointError,
            "at 'shared': the sum over",
            {"batches": [(BATCHES[0][0] / 0,)]},
        ),
    ],
)
def test_errors(error, message, options):
    plan = make_plan("shared", options.pop("rank", 2))
    by = options.pop("fn", lambda out: out)

    def fn(params, x):
        x = jnp.ones_like(x) if by == "same" else x
        out = x @ params["shared"]
        return out if by == "same" else by(out)

    with pytest.raises(error, match=message):
        start(plan, fn=fn, **options)


def test_a_table_that_is_looked_up_has_no_inputs():
    params = {"table": draw(9, WIDTH), "head": draw(WIDTH, 5)}
    config = lora_jax.LoraConfig(2, targets=("table", "head"))
    tokens = jnp.arange(8)
    plan = lora_jax.plan_adapters(config, params, lookup, tokens)
    with pytest.raises(ValueError, match="at 'table': the weight has no inputs in the"):
        start(plan, params, lookup, [(tokens,)])
