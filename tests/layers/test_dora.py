import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests import reference, support
from tests.layers.support import ALPHA, AXES, SCALE, linear, output_and_gradients


def make_case(layout="rows", norm_axis="out"):
    return support.make_case(layout, method="dora", norm_axis=norm_axis)


# ---------------------------------------------------------------------------- forward


@pytest.mark.parametrize("norm_axis", AXES)
def test_a_new_adapter_changes_one_rounding(norm_axis):
    case = support.make_case("tokens")
    key, options = jax.random.key(0), {"norm_axis": norm_axis}

    @jax.jit
    def output(case):
        adapter = lora_jax.init_dora_adapter(key, case.weight, support.RANK, **options)
        return linear(dataclasses.replace(case, adapter=adapter), **options)

    y = output(case)
    x, weight, *_ = case.reference()
    support.assert_close(y, x @ weight, 4)


def test_inputs_may_be_scaled_out_of_the_range_of_float16():
    case = support.make_case("rows", "float16", method="dora", norm_axis="in")
    size = np.float32(2.0**8)
    sizes = {"A": np.float32(1), "B": 1 / size, "m": size}
    case.adapter.update(jax.tree.map(np.multiply, case.adapter, sizes))
    weight = np.asarray(case.weight) / size.astype("float16")
    case = dataclasses.replace(case, weight=weight)
    x, weight, _, adapter, _ = case.reference()
    norm = reference.norms(reference.lora_weight(weight, adapter, SCALE), "in")
    assert np.abs(x * adapter["m"] / norm).max() > 2.0**16
    want = reference.dora_linear(x, weight, adapter, SCALE, norm_axis="in")
    support.assert_close(linear(case, norm_axis="in"), want, 4)


def test_scale_bias_multiplies_the_bias():
    case = make_case("stacked")
    x, weight, bias, adapter, _ = case.reference()
    k = adapter["m"] / reference.norms(reference.lora_weight(weight, adapter, SCALE), "out")
    want = reference.dora_linear(x, weight, adapter, SCALE, k * bias)
    got = jax.jit(lambda case: linear(case, bias=case.bias, scale_bias=True))(case)
    support.assert_close(got, want, 16)


@pytest.mark.parametrize("norm_axis", AXES)
def test_given_norms_give_the_same(norm_axis):
    case = make_case("stacked", norm_axis)
    options = {"norm_axis": norm_axis}
    column_norm = jax.jit(functools.partial(lora_jax.dora_column_norm, **options))
    y, grads = output_and_gradients(case, **options)
    base = column_norm(case.weight)
    norm = column_norm(case.weight, case.adapter, ALPHA)
    for given in ({"weight_norm_squared": base**2}, {"column_norm": norm}):
        got, got_grads = output_and_gradients(case, **options, **given)
        support.assert_close(got, y, 8)
        for name, value in got_grads.items():
            support.assert_close(value, grads[name], 16)


def test_gradient_goes_on_through_a_given_norm():
    case = make_case()

    def loss(adapter):
        norm = lora_jax.dora_column_norm(case.weight, adapter, ALPHA)
        y = lora_jax.dora_linear(
            case.x, case.weight, adapter, ALPHA, column_norm=norm, detach_norm=False
        )
        return jnp.vdot(y, case.c)

    _, want = output_and_gradients(case, detach_norm=False)
    for name, value in jax.jit(jax.grad(loss))(case.adapter).items():
        support.assert_close(value, want[name], 16)


def test_second_order_and_forward_mode():
    case = make_case()

    def loss(adapter):
        y = lora_jax.dora_linear(case.x, case.weight, adapter, ALPHA, detach_norm=False)
        return jnp.sum(y**2)

    def directional(adapter):
        return jax.jvp(loss, (adapter,), (case.adapter,))[1]

    got = jax.jit(jax.grad(directional))(case.adapter)
    _, want = jax.jit(lambda a: jax.jvp(jax.grad(loss), (a,), (a,)))(case.adapter)
    for name, value in got.items():
        support.assert_close(value, want[name], 128)


# ----------------------------------------------------------------------- zero columns


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("norm_axis", AXES)
def test_zero_columns_have_factor_one_and_finite_gradients(norm_axis, detach_norm):
    case = support.make_case("rows")
    index = (slice(None), 2) if norm_axis == "out" else (2, slice(None))
    weight = np.array(case.weight)
    weight[index] = 0.0
    adapter = lora_jax.init_dora_adapter(
        jax.random.key(0), weight, support.RANK, norm_axis=norm_axis
    )
    case = support.Case(case.x, weight, case.bias, adapter, case.c)
    options = {"norm_axis": norm_axis, "detach_norm": detach_norm}
    y, grads = output_and_gradients(case, **options)
    support.assert_close(y, reference.f64(case.x) @ weight, 8)
    assert all(np.isfinite(value).all() for value in grads.values())
    # The factor is 1, not 0 / 0: B of a zero column gets the gradient that LoRA gives it.
    want = reference.lora_gradients(
        *case.reference()[:2], reference.f64(adapter), SCALE, reference.f64(case.c)
    )
    if norm_axis == "out":
        support.assert_close(np.asarray(grads["B"])[:, 2], want["B"][:, 2], 32)
    assert np.asarray(grads["m"])[2] == 0.0

    @jax.jit
    def there_and_back(*args):
        merged = lora_jax.merge_dora_weight(*args, norm_axis=norm_axis)
        norm = lora_jax.dora_column_norm(*args, norm_axis=norm_axis)
        args = merged, args[1], norm, args[2]
        return merged, lora_jax.unmerge_dora_weight(*args, norm_axis=norm_axis)

    merged, back = there_and_back(weight, adapter, ALPHA)
    assert not np.asarray(merged)[index].any()
    support.assert_close(back, weight, 4)


def test_nan_in_the_weight_is_not_hidden():
    case = make_case()
    weight = np.array(case.weight)
    weight[0, 2] = np.nan
    y = np.asarray(jax.jit(lora_jax.dora_linear)(case.x, weight, case.adapter, ALPHA))
    assert np.isnan(y[:, 2]).all()
    assert np.isfinite(y[:, :2]).all()


# ---------------------------------------------------------------------------- dropout


def masks_of(key, rate, shape, mode):
    keys = jax.random.split(key) if mode == "megatron" else (key, key)
    kept = 1 - rate
    return [reference.f64(jax.random.bernoulli(k, kept, shape)) / kept for k in keys]


@pytest.mark.parametrize("layout", ["rows", "tokens", "stacked"])
@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("mode", ["peft", "torchtune", "megatron"])
def test_dropout_modes(mode, norm_axis, layout):
    case, rate, key = make_case(layout, norm_axis), 0.25, jax.random.key(7)
    options = {"dropout_rate": rate, "dropout_key": key, "dropout_mode": mode}
    options["norm_axis"] = norm_axis
    x, weight, _, adapter, c = case.reference()
    first, second = (v.reshape(x.shape) for v in masks_of(key, rate, case.x.shape, mode))
    norm = reference.norms(reference.lora_weight(weight, adapter, SCALE), norm_axis)
    k = reference.along(adapter["m"] / norm, norm_axis)
    kd = k * (SCALE * adapter["A"] @ adapter["B"])
    if mode == "torchtune":
        terms = [(np.ones_like(first), k * weight), (first, kd)]
    else:
        terms = [(np.ones_like(first), weight), (second, (k - 1) * weight), (first, kd)]
    want = sum((x * mask) @ matrix for mask, matrix in terms)
    y, grads = output_and_gradients(case, **options)
    support.assert_close(y, want, 16)
    want_x = sum(mask * (c @ reference.t(matrix)) for mask, matrix in terms)
    support.assert_close(grads["x"], want_x, 32)
    want_b = (
        SCALE * (k * (reference.t(adapter["A"]) @ (reference.t(x * first) @ c)))
        if norm_axis == "out"
        else SCALE * reference.t(adapter["A"]) @ (k * (reference.t(x * first) @ c))
    )
    support.assert_close(grads["B"], want_b, 32)
    # d y / d k is linear in k, so the gradient of m is the terms that have k, over n.
    with_k = [(first, kd / k), (np.ones_like(x) if mode == "torchtune" else second, weight)]
    if norm_axis == "out":
        d_k = sum((c * ((x * mask) @ matrix)).sum(-2) for mask, matrix in with_k)
    else:
        d_k = sum((x * mask * (c @ reference.t(matrix))).sum(-2) for mask, matrix in with_k)
    support.assert_close(grads["m"], d_k / norm, 64)


# ---------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", support.HALF)
def test_merge_rounds_once(dtype):
    # Powers of two and small integers: columns have norm 2, factors are exact.
    weight = np.ones((4, 3), jnp.dtype(dtype))
    adapter = {
        "A": np.zeros((4, 2), "float32"),
        "B": np.zeros((2, 3), "float32"),
        "m": np.float32([2.0, 2 + 2.0**-10, 2 + 2.0**-6]),
    }
    merged = lora_jax.merge_dora_weight(weight, adapter)
    exact = np.broadcast_to(adapter["m"] / 2, (4, 3))
    np.testing.assert_array_equal(merged, exact.astype(jnp.dtype(dtype)))


def test_a_lost_column_comes_back_as_nan():
    case = make_case()
    m = np.asarray(case.adapter["m"]) * (np.arange(support.N_OUT) != 1)
    adapter = case.adapter | {"m": m.astype("float32")}
    norm = lora_jax.dora_column_norm(case.weight, adapter, ALPHA)
    merged = lora_jax.merge_dora_weight(case.weight, adapter, ALPHA)
    back = np.asarray(lora_jax.unmerge_dora_weight(merged, adapter, norm, ALPHA))
    assert np.isnan(back[:, 1]).all()
    assert np.isfinite(back[:, 2:]).all()


# ---------------------------------------------------------------------------- init


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("dtype", support.DTYPES)
def test_init_magnitude_is_the_norm_in_float32(dtype, norm_axis):
    weight = support.make_case("stacked", dtype).weight
    options = {"dtype": "bfloat16", "norm_axis": norm_axis}
    adapter = lora_jax.init_dora_adapter(jax.random.key(0), weight, 5, **options)
    assert adapter["A"].dtype == adapter["B"].dtype == jnp.bfloat16
    assert adapter["m"].dtype == jnp.float32
    support.assert_close(adapter["m"], reference.norms(reference.f64(weight), norm_axis), 4)


def test_init_factors_are_those_of_lora():
    weight, key = support.make_case("rows").weight, jax.random.key(3)
    dora = lora_jax.init_dora_adapter(key, weight, 4, 0.5)
    lora = lora_jax.init_lora_adapter(key, weight, 4, 0.5)
    np.testing.assert_array_equal(dora["A"], lora["A"])
    np.testing.assert_array_equal(dora["B"], lora["B"])


def test_init_inside_eval_shape():
    weight = jax.ShapeDtypeStruct((12, 9), "bfloat16")
    init = lambda key, weight: lora_jax.init_dora_adapter(key, weight, 4)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0), weight)
    assert shapes["m"] == jax.ShapeDtypeStruct((9,), "float32")
    with pytest.raises(TypeError, match=r"weight is a jax.ShapeDtypeStruct.*eval_shape"):
        init(jax.random.key(0), weight)


@pytest.mark.parametrize("norm_axis", AXES)
def test_magnitude_of_trained_factors_makes_dora_start_as_lora(norm_axis):
    case, stabilized = support.make_case("stacked"), {"rank_stabilized": True}
    options = {"norm_axis": norm_axis, **stabilized}

    @jax.jit
    def start(case):
        m = lora_jax.init_dora_magnitude(case.weight, case.adapter, ALPHA, **options)
        dora = dataclasses.replace(case, adapter=case.adapter | {"m": m})
        # An m that is there is to be replaced, so it does not matter.
        again = lora_jax.init_dora_magnitude(case.weight, dora.adapter, ALPHA, **options)
        return linear(case, **stabilized), linear(dora, **options), m, again

    lora, dora, m, again = start(case)
    support.assert_close(dora, lora, 16)
    np.testing.assert_array_equal(again, m)


def test_calls_outside_jit_compile_once():
    case = make_case("tokens")
    linear(case)
    with jax.log_compiles(False):
        before = lora_jax.lowrank.weight_norms._correction._cache_size()
        for scale in (1.0, 2.0, 3.0):
            adapter = jax.tree.map(lambda v, scale=scale: v * scale, case.adapter)
            lora_jax.dora_linear(case.x, case.weight, adapter, ALPHA)
        assert lora_jax.lowrank.weight_norms._correction._cache_size() == before
