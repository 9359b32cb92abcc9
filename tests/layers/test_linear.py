"""What LoRA and DoRA have in common: the formula, dtypes, leading axes, merges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests import reference, support
from tests.layers.support import (
    ALPHA,
    METHODS,
    SCALE,
    axis_of,
    each,
    formula,
    linear,
    make_case,
    options_of,
    output_and_gradients,
)


@each(*METHODS)
@pytest.mark.parametrize("layout", support.LAYOUTS)
def test_output_and_gradients_equal_the_formula(layout, method):
    case, ulps = make_case(method, layout), 8
    ulps *= 1 + ("dora" in method)
    y, got = output_and_gradients(case, bias=case.bias, **options_of(method))
    want, grads = formula(method, case)
    assert y.shape == case.c.shape
    support.assert_close(y, want, ulps)
    for name, value in got.items():
        support.assert_close(value, grads[name], 2 * ulps)


@each("lora", "dora out", "dora in")
@pytest.mark.parametrize("adapter_dtype", ["float32", "half"])
@pytest.mark.parametrize("dtype", support.HALF)
def test_half_precision_rounds_the_sum_once(dtype, adapter_dtype, method):
    dtypes = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    if adapter_dtype == "half":
        dtypes["adapter_dtype"] = dtype
    case = make_case(method, "tokens", **dtypes)
    y, got = output_and_gradients(case, bias=case.bias, **options_of(method))
    want, grads = formula(method, case)
    assert y.dtype == dtype
    # One rounding of the sum, one of x @ A, one of each factor.
    support.assert_close(y, want, 2)
    for name, value in got.items():
        assert value.dtype == (case.x if name == "x" else case.adapter[name]).dtype
        support.assert_close(value, grads[name], 4, dtype=dtype)


@each("lora_bias", "dora out exact", "dora in exact")
def test_float64_stays_float64(method):
    options, ulps = options_of(method), 16 if "dora" in method else 8
    with support.x64():
        case = make_case(method, "stacked", dtype="float64", adapter_dtype="float64")
        case.adapter.update(reference.f64(case.adapter))
        y, got = output_and_gradients(case, bias=case.bias, **options)
        want, grads = formula(method, case)
        assert y.dtype == jnp.float64
        support.assert_close(y, want, ulps)
        for name, value in got.items():
            assert value.dtype == jnp.float64
            support.assert_close(value, grads[name], 2 * ulps)
        case.adapter.update(jax.tree.map(np.float32, case.adapter))
        mixed = jax.eval_shape(lambda case: linear(case, **options), case)
        assert mixed.dtype == jnp.float64


@each("lora_bias", "dora out exact", "dora in exact")
@pytest.mark.parametrize("layout", ["stacked", "experts_in_layers"])
def test_vmap_is_a_leading_axis(layout, method):
    def both(case):
        return output_and_gradients(case, bias=case.bias, **options_of(method))

    case, ulps = make_case(method, layout), 4
    (y, got), (mapped, grads) = jax.jit(lambda case: (both(case), jax.vmap(both)(case)))(
        case
    )
    ulps *= 1 + ("dora" in method)
    support.assert_close(y, mapped, ulps)
    for name, value in got.items():
        support.assert_close(value, grads[name], 16 if "dora" in method else 4)


@each("lora", "dora out", "dora in")
@pytest.mark.parametrize("layout", support.LAYOUTS)
def test_merged_layer_equals_adapted_layer(layout, method):
    case, kind = make_case(method, layout), method.split()[0]
    merge = functools.partial(getattr(lora_jax, f"merge_{kind}_weight"), **axis_of(method))
    merged = jax.jit(merge)(case.weight, case.adapter, ALPHA)
    _, weight, _, adapter, _ = case.reference()
    formula = getattr(reference, f"{kind}_weight")
    want = formula(weight, adapter, SCALE, **axis_of(method))
    support.assert_close(merged, want, 8 if "dora" in method else 4)


@each("lora", "dora out", "dora in")
@pytest.mark.parametrize("dtype", support.DTYPES)
def test_unmerge_undoes_merge_within_its_bound(dtype, method):
    case, axis = make_case(method, "stacked", dtype=dtype), axis_of(method)
    _, weight, _, adapter, _ = case.reference()
    norm, ratio = (), 1.0
    if axis:
        column_norm = jax.jit(functools.partial(lora_jax.dora_column_norm, **axis))
        norm = (column_norm(case.weight, case.adapter, ALPHA),)
        ratio = reference.along(reference.f64(norm[0]) / adapter["m"], **axis)
    kind, given = method.split()[0], (case.adapter, *norm, ALPHA)
    merge, unmerge = (
        functools.partial(getattr(lora_jax, f"{verb}_{kind}_weight"), **axis)
        for verb in ("merge", "unmerge")
    )
    merged = jax.jit(merge)(case.weight, case.adapter, ALPHA)
    back = unmerge(merged, *given)
    assert back.dtype == merged.dtype == case.weight.dtype
    size, ulps = ratio * np.abs(reference.f64(merged)) + np.abs(weight), 1
    if axis and dtype == "float32":  # sums are no wider than the weight
        size, ulps = size + SCALE * np.abs(adapter["A"]) @ np.abs(adapter["B"]), 4
    support.assert_close(back, weight, ulps, scale=size)
