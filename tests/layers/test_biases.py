import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests import reference, support

ALPHA = 3.0
SCALE = ALPHA / support.RANK


def bias_delta(adapter):
    shift = (reference.row(adapter["A_bias"]) @ adapter["B"])[..., 0, :]
    return SCALE * (shift + adapter["B_bias"])


@pytest.mark.parametrize("layout", ["rows", "stacked", "experts_in_layers"])
def test_merged_layer_equals_adapted_layer(layout):
    case = support.make_case(layout, method="lora_bias")
    merge = jax.jit(lora_jax.merge_lora_layer)
    weight, bias = merge(case.weight, case.bias, case.adapter, ALPHA)
    x, w, b, adapter, _ = case.reference()
    want = reference.lora_linear(x, w, adapter, SCALE, b)
    got = x @ reference.f64(weight) + reference.row(reference.f64(bias))
    support.assert_close(got, want, 16, dtype="float32")
    support.assert_close(bias, b + bias_delta(adapter), 8)


@pytest.mark.parametrize("names", [(), ("A_bias",), ("B_bias",)])
def test_either_bias_may_be_missing(names):
    case = support.make_case("rows", method="lora_bias")
    adapter = {name: case.adapter[name] for name in ("A", "B", *names)}
    got = lora_jax.lora_bias_delta(adapter, ALPHA)
    zeros = {"A_bias": np.zeros(support.RANK), "B_bias": np.zeros(support.N_OUT)}
    support.assert_close(got, bias_delta(zeros | reference.f64(adapter)), 8, scale=1.0)


def test_a_layer_without_a_bias_gets_one():
    case = support.make_case("stacked", dtype="bfloat16", method="lora_bias")
    _, bias = lora_jax.merge_lora_layer(case.weight, None, case.adapter, ALPHA)
    assert bias.dtype == jnp.bfloat16
    support.assert_close(bias, bias_delta(reference.f64(case.adapter)), 1)


@pytest.mark.parametrize("dtype", support.DTYPES)
def test_unmerge_undoes_merge(dtype):
    case = support.make_case("stacked", dtype, method="lora_bias")
    merged = lora_jax.merge_lora_layer(case.weight, case.bias, case.adapter, ALPHA)
    back = lora_jax.unmerge_lora_layer(*merged, case.adapter, ALPHA)
    for got, after, before in zip(back, merged, (case.weight, case.bias), strict=True):
        size = np.abs(reference.f64(after)) + np.abs(reference.f64(before))
        assert got.dtype == before.dtype
        support.assert_close(got, reference.f64(before), 1, scale=size)


def test_rank_stabilized():
    case = support.make_case("rows", method="lora_bias")
    got = lora_jax.lora_bias_delta(case.adapter, ALPHA, rank_stabilized=True)
    want = bias_delta(reference.f64(case.adapter)) * support.RANK**0.5
    support.assert_close(got, want, 8)
