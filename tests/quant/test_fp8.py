"""Float8: four significant bits, as ml_dtypes rounds them."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax import quant
from tests.support import assert_same_bits, bits, draw


@hypothesis.settings(max_examples=30)
@hypothesis.given(exponent=st.integers(-60, 60), seed=st.integers(0, 1000))
def test_four_significant_bits(exponent, seed):
    weight = draw(16, 24, seed=seed, size=2.0**exponent)
    weight = weight * draw(16, 24, seed=seed + 1)  # some far below the others
    q = quant.quantize_fp8(weight)
    got, want = (np.asarray(v, np.float64) for v in (quant.dequantize(q), weight))
    steps = np.abs(want).max(0, keepdims=True) / 448
    bound = np.maximum(np.abs(want) / 16, steps / 1024)
    assert np.all(np.abs(got - want) <= bound * (1 + 1e-5))


def test_codes_are_rounded_once():
    weight = draw(64, 96, dtype="bfloat16")
    q = quant.quantize_fp8(weight)
    wide = np.asarray(weight, np.float32)
    np.testing.assert_allclose(q.scales, np.abs(wide).max(0) / 448, rtol=2e-7)
    want = (wide / np.asarray(q.scales)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert q.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(bits(q.codes), bits(want))
    assert q.nbytes == 64 * 96 + 4 * 96


def test_the_codes_are_a_fixed_point():
    q = quant.quantize_fp8(draw(16, 24))
    again = quant.quantize_fp8(quant.dequantize(q))
    assert_same_bits(again.codes, q.codes)
    np.testing.assert_allclose(again.scales, q.scales, rtol=3e-7)


def test_zeros():
    weight = np.zeros((4, 3), np.float32)
    weight[:, 1] = 1e-42
    np.testing.assert_array_equal(quant.dequantize(quant.quantize_fp8(weight)), 0 * weight)


def test_what_is_not_finite():
    weight = np.array(draw(16, 24))
    weight[2, 3] = np.inf
    with pytest.raises(ValueError, match="1 of the 384 entries of weight"):
        quant.quantize_fp8(weight)
    got = jax.jit(lambda w: quant.dequantize(quant.quantize_fp8(w)))(weight)
    assert np.isnan(got).all(0).nonzero()[0].tolist() == [3]
    assert np.isfinite(np.delete(got, 3, 1)).all()


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="fp8 has a scale for each output"):
        quant.quantize_fp8(np.ones(4, np.float32))


BROKEN = {
    "no codes": ({"codes": None}, "the array codes is missing"),
    "no scales": ({"scales": None}, "the array scales is missing"),
    "scales": ({"scales": jnp.ones((3,))}, "scales should be float32 of the shape"),
    "rank": ({"scales": jnp.ones((16, 16, 24))}, "do not fit scales"),
    "codes": ({"codes": jnp.ones((16, 24), jnp.float8_e4m3fn)}, "codes should be uint8"),
    "dtype": ({"weight_dtype": None}, "weight_dtype must be one of"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_what_does_not_fit(name):
    q = quant.quantize_fp8(draw(16, 24))
    q.check()
    change, match = BROKEN[name]
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(q, **change).check()
