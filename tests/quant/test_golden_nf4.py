"""NF4 of torchao and bitsandbytes: their codes, their scales, what they make of them."""

import numpy as np
import pytest
from safetensors.flax import load_file

from lora_jax import quant
from tests.quant.support import golden_cases, nibbles
from tests.support import GOLDEN, assert_golden


def load(case):
    return {name: np.asarray(v) for name, v in load_file(GOLDEN / case["file"]).items()}


def check_dequantized(case, quantized, tensors):
    got, want = np.asarray(quant.dequantize(quantized)), tensors["dequantized"]
    assert got.dtype == want.dtype
    assert_golden(case, got, want)
    if case["meta"]["dtype"] != "float32":  # 16 bits: the last bit of a mean is rounded off
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", golden_cases("torchao_nf4"), ids=lambda c: c["id"])
def test_torchao(case):
    tensors, meta = load(case), case["meta"]
    q = quant.quantize_nf4(tensors["w"], meta["block_size"], meta["scaler_block_size"])
    np.testing.assert_array_equal(q.codes, tensors["quantized_data"])
    np.testing.assert_array_equal(nibbles(q.codes, q.size), tensors["codes"])
    np.testing.assert_array_equal(q.scales, tensors["quantized_scalers"])
    for got, want in ((q.group_scales, "quantization_factor"), (q.mean, "scaler_mean")):
        assert got.dtype == tensors[want].dtype
        rtol = case["rtol"] if meta["dtype"] == "float32" else 0.0
        np.testing.assert_allclose(got, tensors[want], rtol=rtol)
    check_dequantized(case, q, tensors)


@pytest.mark.parametrize("case", golden_cases("bnb_nf4"), ids=lambda c: c["id"])
def test_bitsandbytes(case):
    tensors, meta = load(case), case["meta"]
    nested = 256 if meta["double_quant"] else None
    q = quant.quantize_nf4(tensors["w"], meta["blocksize"], nested, codec="bitsandbytes")
    np.testing.assert_array_equal(q.codes, tensors["quantized_data"].reshape(-1))
    np.testing.assert_array_equal(nibbles(q.codes, q.size), tensors["codes"])
    np.testing.assert_array_equal(q.scales, tensors["absmax"])
    if nested:
        np.testing.assert_array_equal(q.group_scales, tensors["state2_absmax"])
        np.testing.assert_array_equal(q.mean, tensors["offset"])
    check_dequantized(case, q, tensors)


def test_the_maps_of_bitsandbytes():
    from lora_jax.quant import _bitsandbytes

    case = next(c for c in golden_cases("bnb_nf4") if c["meta"]["double_quant"])
    tensors = load(case)
    np.testing.assert_array_equal(_bitsandbytes.dynamic_map(), tensors["state2_code"])
    np.testing.assert_array_equal(_bitsandbytes.table("float32"), tensors["code"])
    edges = _bitsandbytes._edges(1)  # as linspace, with both ends exact
    np.testing.assert_array_equal(edges, np.float32([0.1, 1.0]))
