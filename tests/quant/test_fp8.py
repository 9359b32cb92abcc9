"""Float8: four significant bits, as ml_dtypes rounds them."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lora_jax import quant
from tests.support import bits, draw


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
    small = jnp.ones((64, 1), "bfloat16").at[32:].set(2.0**-12)  # also below 2^-6
    weight = draw(64, 96, dtype="bfloat16") * small
    q = quant.quantize_fp8(weight)
    wide = np.asarray(weight, np.float32)
    np.testing.assert_allclose(q.scales, np.abs(wide).max(0) / 448, rtol=2e-7)
    want = (wide / np.asarray(q.scales)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert q.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(bits(q.codes), bits(want))
    assert q.nbytes == 64 * 96 + 4 * 96
