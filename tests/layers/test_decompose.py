"""Initializers that split a weight, against float64 NumPy, peft, and their own promise."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax.layers.decompose import (
    init_loftq_adapter,
    init_olora_adapter,
    init_orthogonal_adapter,
    init_pissa_adapter,
    to_plain_adapter,
)
from tests import reference, support
from tests.support import GOLDEN, best, coarse, draw, normal

CASES = json.loads((GOLDEN / "manifest.json").read_text())["changed_base_cases"]
KEY = jax.random.key(3)
BATCHES = {"matrix": (), "experts": (3,)}


# Each takes (weight, rank, alpha, dtype=..., rank_stabilized=...) and splits the weight.
INITS = {
    "pissa": init_pissa_adapter,
    "randomized": functools.partial(init_pissa_adapter, key=KEY, iterations=2),
    "olora": init_olora_adapter,
}


def loftq(weight, rank, alpha=1.0, **options):
    return init_loftq_adapter(weight, rank, alpha, quantize=coarse, **options)


ALL = {**INITS, "loftq": loftq}


def term(adapter, scale):
    """`scale * A @ B` in float64."""
    adapter = reference.f64(adapter)
    return scale * adapter["A"] @ adapter["B"]


# ------------------------------------------------------------------- the promise of all


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factors", [None, "bfloat16"])
@pytest.mark.parametrize("name", INITS)
def test_base_and_adapter_are_the_weight(name, factors, dtype, batch):
    weight = draw(*batch, 12, 9, dtype=dtype)
    base, adapter = INITS[name](weight, 4, 8.0, dtype=factors)
    assert base.dtype == weight.dtype
    assert {v.dtype.name for v in adapter.values()} == {factors or "float32"}
    got = reference.f64(base) + term(adapter, 2.0)
    # The rounding of the base, and sums in float32.
    half = float(jnp.finfo(dtype).eps) / 2 * np.abs(reference.f64(base))
    wide = 16 * float(jnp.finfo(jnp.float32).eps) * np.abs(reference.f64(weight)).max()
    assert np.all(np.abs(got - reference.f64(weight)) <= half + wide)


@pytest.mark.parametrize("name", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float64_stays_float64(name, dtype):
    with support.x64():
        weight = support.asarray(draw(12, 9), "float64")
        init = ALL[name]
        base, adapter = init(weight, 4, 8.0, dtype=dtype if dtype == "float32" else None)
        assert base.dtype == jnp.float64
        assert {v.dtype.name for v in adapter.values()} == {dtype}
        if name != "loftq":
            got = reference.f64(base) + term(adapter, 2.0)
            support.assert_close(got, reference.f64(weight), 16)


@pytest.mark.parametrize("name", ALL)
def test_under_jit_eval_shape_and_vmap(name):
    init = functools.partial(ALL[name], rank=4, alpha=8.0)
    weight = draw(3, 12, 9)
    base, adapter = init(weight)
    shapes = jax.eval_shape(init, weight)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, (base, adapter))
    compiled, again = jax.jit(init)(weight)
    support.assert_close(compiled, reference.f64(base), 64)
    support.assert_close(term(again, 2.0), term(adapter, 2.0), 64, "float32", scale=1.0)
    if name != "randomized":  # mapped, all matrices have the same random numbers
        mapped, _ = jax.jit(jax.vmap(init))(weight)
        support.assert_close(mapped, reference.f64(base), 64)


def test_gradient_with_respect_to_alpha():
    weight = draw(12, 9)

    def total(alpha):
        return jnp.sum(init_olora_adapter(weight, 4, alpha)[0])

    _, adapter = init_olora_adapter(weight, 4)
    got = jax.jit(jax.grad(total))(jnp.float32(8.0))
    support.assert_close(got, -term(adapter, 0.25).sum(), 64, scale=10.0)


# ---------------------------------------------------------------------- each of them


@pytest.mark.parametrize("shape", [(9, 12), (2, 3, 12, 9)])
@pytest.mark.parametrize("alpha", [8.0, -3.0])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_pissa_takes_the_best_part(shape, alpha, rank_stabilized):
    weight = draw(*shape)
    base, adapter = init_pissa_adapter(weight, 4, alpha, rank_stabilized=rank_stabilized)
    scale = alpha / (2 if rank_stabilized else 4)
    want = best(reference.f64(weight), 4)
    support.assert_close(term(adapter, scale), want, 64, "float32")
    support.assert_close(base, reference.f64(weight) - want, 64)
    lengths = np.linalg.norm(adapter["A"], axis=-2), np.linalg.norm(adapter["B"], axis=-1)
    support.assert_close(*lengths, 64)


def test_pissa_of_full_rank_leaves_nothing():
    base, _ = init_pissa_adapter(draw(12, 9), 9, 4.0)
    support.assert_close(base, np.zeros((12, 9)), 64, scale=1.0)


def subspace_iteration(weight, probes, iterations):
    """The best part, of rank 4, of what a weight is in the subspace that is found."""
    q, _ = np.linalg.qr(weight @ probes)
    for _ in range(iterations):
        q, _ = np.linalg.qr(weight @ np.linalg.qr(weight.T @ q)[0])
    return best(q @ (q.T @ weight), 4)


def test_randomized_pissa_is_nearly_the_best():
    weight = draw(60, 40)  # singular values that fall off slowly: the hard case
    want = np.linalg.norm(reference.f64(weight) - best(reference.f64(weight), 4))
    errors = []
    for iterations in (1, 8):
        base, _ = init_pissa_adapter(weight, 4, 8.0, key=KEY, iterations=iterations)
        errors.append(np.linalg.norm(reference.f64(base)) / want)
        exact, probes = map(reference.f64, (weight, jax.random.normal(KEY, (40, 14))))
        left = exact - subspace_iteration(exact, probes, iterations)
        support.assert_close(base, left, 64, scale=np.abs(exact).max())
    assert 1 - 1e-6 < errors[1] < 1.002
    assert errors[1] < errors[0] < 1.05


def test_randomized_pissa_of_a_weight_of_low_rank_is_exact():
    weight = normal(60, 14) @ normal(14, 40, seed=1)
    weight = support.asarray(weight, "float32")
    exact, _ = init_pissa_adapter(weight, 4)
    base, _ = init_pissa_adapter(weight, 4, key=KEY, iterations=8)
    size = np.abs(weight).max()
    support.assert_close(base, reference.f64(exact), 256, scale=size)


@pytest.mark.parametrize("shape", [(9, 12), (2, 3, 12, 9)])
def test_olora_takes_the_first_part_of_the_qr_decomposition(shape):
    weight = draw(*shape)
    _, adapter = init_olora_adapter(weight, 4, 8.0)
    q, r = np.linalg.qr(reference.t(reference.f64(weight)))
    want = reference.t(q[..., :4] @ r[..., :4, :])
    support.assert_close(term(adapter, 1.0), want, 64, "float32")
    rows = reference.f64(adapter["B"])
    eye = np.broadcast_to(np.eye(4), (*shape[:-2], 4, 4))
    support.assert_close(rows @ reference.t(rows), eye, 64, "float32")


def test_orthogonal_factors_have_a_product_of_zero():
    weight = draw(12, 9, dtype="bfloat16")
    adapter = init_orthogonal_adapter(KEY, weight, 4)
    want = lora_jax.init_lora_adapter(KEY, weight, 4, init="orthogonal")
    jax.tree.map(np.testing.assert_array_equal, adapter, want)
    assert np.abs(term(adapter, 2.0)).max() < 1e-6
    assert all(np.abs(v).min() > 0 for v in adapter.values())
    init = functools.partial(init_orthogonal_adapter, rank=4, dtype="bfloat16")
    adapter = jax.jit(init)(KEY, weight)
    assert {v.dtype.name for v in adapter.values()} == {"bfloat16"}
    support.assert_close(adapter["A"], reference.f64(want["A"]), 1)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_loftq_alternates(iterations, rank_stabilized):
    weight = draw(3, 12, 9)
    options = {"rank_stabilized": rank_stabilized, "iterations": iterations}
    base, adapter = loftq(weight, 4, 8.0, **options)
    exact = reference.f64(weight)
    want = np.zeros_like(exact)
    for _ in range(iterations):
        quantized = np.round((exact - want) * 4) / 4
        want = best(exact - quantized, 4)
    np.testing.assert_array_equal(base, quantized.astype("float32"))
    scale = 4.0 if rank_stabilized else 2.0
    support.assert_close(term(adapter, scale), want, 64, "float32", scale=1.0)


def test_loftq_comes_nearer_to_the_weight():
    weight = normal(40, 30, dtype="float32")
    errors = [np.linalg.norm(weight - np.asarray(coarse(weight)))]
    for iterations in (1, 5):
        base, adapter = loftq(weight, 8, 3.0, iterations=iterations)
        merged = lora_jax.merge_lora_weight(base, adapter, 3.0)
        errors.append(np.linalg.norm(weight - np.asarray(merged)))
    assert errors[2] < 0.98 * errors[1]
    assert errors[1] < 0.9 * errors[0]


def test_loftq_makes_up_for_the_rounding_of_the_base_too():
    weight = draw(12, 9, dtype="bfloat16")
    base, adapter = init_loftq_adapter(weight, 4, 8.0, quantize=lambda w: w * 0.7)
    assert base.dtype == jnp.bfloat16
    want = best(reference.f64(weight) - reference.f64(base), 4)
    support.assert_close(term(adapter, 2.0), want, 64, "float32")


# ---------------------------------------------------------------------------- peft


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_as_peft(case):
    tensors, config = load_file(GOLDEN / case["file"]), case["meta"]["config"]
    turn = (lambda v: v) if case["meta"]["fan_in_fan_out"] else (lambda v: v.T)
    kind = {"pissa": init_pissa_adapter, "olora": init_olora_adapter}
    options = {"rank_stabilized": config.get("use_rslora", False)}
    args = config["r"], config["lora_alpha"]
    scale = case["meta"]["scaling"]

    @jax.jit
    def initial(weight, x, bias):
        base, adapter = kind[config["init_lora_weights"]](weight, *args, **options)
        layer = lora_jax.lora_linear
        if config.get("use_dora"):
            layer = lora_jax.dora_linear
            adapter["m"] = lora_jax.init_dora_magnitude(base, adapter, args[1])
        return base, adapter, layer(x, base, adapter, args[1], bias=bias, **options)

    base, adapter, y = initial(turn(tensors["W0"]), tensors["x"], tensors["b0"])
    if config.get("use_dora"):
        close(adapter["m"], tensors["m_init"], case)
    close(base, turn(tensors["W_base"]), case)
    want = scale * reference.f64(tensors["A"]).T @ reference.f64(tensors["B"]).T
    close(term(adapter, scale), want, case)
    close(y, tensors["y_init"], case)


def close(got, want, case):
    got, want = reference.f64(got), reference.f64(want)
    bound = (case["atol"] + case["rtol"]) * max(1.0, np.abs(want).max())
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= bound


# --------------------------------------------------------------------------- errors


def test_checks_of_the_weight_and_the_numbers():
    weight = draw(12, 9)
    for init in (init_pissa_adapter, init_olora_adapter, loftq):
        with pytest.raises(ValueError, match=r"at most min\(in, out\) = 9 .*got 10"):
            init(weight, 10)
        with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
            init(weight, 0)
        with pytest.raises(TypeError, match="floating point, got dtype int32"):
            init(weight.astype("int32"), 4)
        with pytest.raises(TypeError, match=r"dtype must be floating point.*got int32"):
            init(weight, 4, dtype="int32")
        with pytest.raises(TypeError, match="of at least 16 bits, got float8"):
            init(weight, 4, dtype=jnp.float8_e4m3fn)
        with pytest.raises(TypeError, match="dtype must be that of an array"):
            init(weight, 4, dtype="float33")
        with pytest.raises(TypeError, match="alpha must be a number"):
            init(weight, 4, "8")
        with pytest.raises(TypeError, match="rank_stabilized must be True or False"):
            init(weight, 4, rank_stabilized=1)
        with pytest.raises(TypeError, match="has no values to compute with"):
            init(jax.ShapeDtypeStruct((12, 9), "float32"), 4)
    for init in (init_pissa_adapter, loftq):
        for zero in (0, 0.0, jnp.zeros(())):
            with pytest.raises(ValueError, match="alpha must not be 0"):
                init(weight, 4, zero)


def test_checks_of_the_options():
    weight = draw(12, 9)
    for options in ({"key": KEY}, {"iterations": 2}):
        with pytest.raises(ValueError, match="key and iterations go together"):
            init_pissa_adapter(weight, 4, **options)
    for init in (functools.partial(init_pissa_adapter, key=KEY), loftq):
        with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
            init(weight, 4, iterations=0)
        for wrong in (2.0, True):
            with pytest.raises(TypeError, match="iterations must be a positive integer"):
                init(weight, 4, iterations=wrong)
    with pytest.raises(TypeError, match=r"key must be a jax\.random key"):
        init_pissa_adapter(weight, 4, key=3, iterations=1)
    with pytest.raises(TypeError, match=r"key must be a jax\.random key"):
        init_orthogonal_adapter(3, weight, 4)
    with pytest.raises(ValueError, match="must be even, got 3"):
        init_orthogonal_adapter(KEY, weight, 3)


def test_checks_of_quantize():
    weight = draw(12, 9)
    with pytest.raises(TypeError, match=r"quantize must be a function.*got 4"):
        init_loftq_adapter(weight, 4, quantize=4)
    with pytest.raises(TypeError, match=r"or an array, got tuple.*dequantize"):
        init_loftq_adapter(weight, 4, quantize=lambda w: (w, 1.0))
    with pytest.raises(TypeError, match="what quantize returned must be floating point"):
        init_loftq_adapter(weight, 4, quantize=lambda w: w.astype("int32"))
    with pytest.raises(ValueError, match=r"shape \(12, 9\) of the weight.*\(108,\)"):
        init_loftq_adapter(weight, 4, quantize=jnp.ravel)


# ------------------------------------------------------------------- back to plain


def trained(adapter, seed=5):
    """An adapter some steps later."""
    rng = np.random.default_rng(seed)

    def step(value):
        value = np.asarray(value)
        return value + (0.3 * rng.normal(size=value.shape)).astype(value.dtype)

    return jax.tree.map(step, adapter)


@pytest.mark.parametrize(
    ("name", "method", "rank_stabilized", "batch"),
    [
        ("pissa", "lora", False, (2, 3)),
        ("olora", "lora", True, ()),
        ("pissa", "dora", True, ()),
        ("olora", "dora", False, ()),
    ],
)
def test_plain_adapter_does_the_same_to_the_original(name, method, rank_stabilized, batch):
    weight, x = draw(*batch, 12, 9), draw(*batch, 5, 12, seed=1)
    options = {"rank_stabilized": rank_stabilized}
    base, initial = INITS[name](weight, 4, 3.0, **options)
    layer, merge = lora_jax.lora_linear, lora_jax.merge_lora_weight
    if method == "dora":
        layer, merge = lora_jax.dora_linear, lora_jax.merge_dora_weight
        initial["m"] = lora_jax.init_dora_magnitude(base, initial, 3.0, **options)
        want = reference.norms(reference.f64(weight), "out")
        support.assert_close(initial["m"], want, 32)
    adapter = trained(initial)
    plain = jax.jit(to_plain_adapter)(adapter, initial)
    assert plain["A"].shape == (*batch, 12, 8)
    alpha = 3.0 * (np.sqrt(2.0) if rank_stabilized else 2.0)
    for function, first in ((layer, (x,)), (merge, ())):
        function = jax.jit(functools.partial(function, **options))
        got = function(*first, weight, plain, alpha)
        want = function(*first, base, adapter, 3.0)
        support.assert_close(got, reference.f64(want), 128)


def test_plain_adapter_has_the_wider_dtype():
    initial = {"A": draw(12, 4, dtype="bfloat16"), "B": draw(4, 9, dtype="bfloat16")}
    adapter = {"A": draw(12, 4), "B": draw(4, 9, dtype="bfloat16")}
    plain = to_plain_adapter(adapter, initial)
    assert plain["A"].dtype == jnp.float32
    assert plain["B"].dtype == jnp.bfloat16


def test_gradient_of_a_plain_adapter():
    initial = {"A": draw(3, 12, 4), "B": draw(3, 4, 9)}
    c = draw(3, 12, 9, seed=2)

    def loss(adapter, initial, c):
        return jnp.sum(lora_jax.lora_delta(to_plain_adapter(adapter, initial)) * c)

    grads = jax.jit(jax.vmap(jax.grad(loss)))(trained(initial), initial, c)
    want = reference.f64(c) @ reference.t(reference.f64(trained(initial)["B"])) / 8
    support.assert_close(grads["A"], want, 16)


def test_checks_of_a_plain_adapter():
    initial = {"A": draw(12, 4), "B": draw(4, 9)}
    with pytest.raises(ValueError, match="entries and shapes of the trained one"):
        to_plain_adapter(initial | {"m": draw(9)}, initial)
    with pytest.raises(ValueError, match="entries and shapes of the trained one"):
        to_plain_adapter(initial, {"A": draw(12, 2), "B": draw(2, 9)})
    with pytest.raises(ValueError, match=r"'B_bias' would be lost here.*lora_bias_delta"):
        to_plain_adapter(initial | {"B_bias": draw(9)}, initial)
    with pytest.raises(KeyError, match=r"at 'initial': .*missing: B"):
        to_plain_adapter(initial, {"A": draw(12, 4)})
