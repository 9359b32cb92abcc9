"""Int8: half a step at most, a scale for each output or block of inputs."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from tests.support import assert_same_bits, draw


def reference(weight, block):
    """Steps and codes, float64, for each entry of `(in, out)`."""
    weight = np.asarray(weight, np.float64)
    steps = np.zeros_like(weight)
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        steps[rows] = np.abs(weight[rows]).max(0, keepdims=True) / 127
    return steps


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    block=st.sampled_from([None, 5]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 1000),
)
def test_half_a_step(block, dtype, exponent, seed):
    weight = draw(16, 24, dtype=dtype, seed=seed, size=2.0**exponent)
    q = quant.quantize_int8(weight, block_size=block)
    steps = reference(weight, block or 16)
    assert np.abs(np.asarray(q.codes, int)).max() == 127
    got, want = (
        np.asarray(v, np.float64) for v in (quant.dequantize(q, "float32"), weight)
    )
    assert np.all(np.abs(got - want) <= steps * (0.5 + 2.0**-14))


def test_scales_are_those_of_the_outputs():
    weight = jnp.asarray([[-1.0, 2.0, 0.0], [0.5, 4.0, 0.0]], jnp.bfloat16)
    q = quant.quantize_int8(weight)
    np.testing.assert_allclose(q.scales, [1 / 127, 4 / 127, 0], rtol=1e-7)
    np.testing.assert_array_equal(q.codes, [[-127, 64, 0], [64, 127, 0]])
    assert q.nbytes == 6 + 12
    assert quant.dequantize(q).dtype == jnp.bfloat16


def test_blocks_of_inputs_have_scales_of_their_own():
    weight = draw(2, 3, 4, 6)
    q = quant.quantize_int8(weight, block_size=5, batch_axes=1)
    assert (q.shape, q.scales.shape) == ((2, 3, 4, 6), (2, 3, 6))
    top = np.abs(np.asarray(weight)).reshape(2, 12, 6)[:, 10:].max(1) / 127
    np.testing.assert_allclose(q.scales[:, 2], top, rtol=1e-6)


@pytest.mark.parametrize("block", [None, 5])
def test_the_codes_are_a_fixed_point(block):
    q = quant.quantize_int8(draw(16, 24), block_size=block)
    again = quant.quantize_int8(quant.dequantize(q), block_size=block)
    assert_same_bits(again.codes, q.codes)
    np.testing.assert_allclose(again.scales, q.scales, rtol=3e-7)


def test_zeros_and_what_is_below_the_normal_numbers():
    weight = np.zeros((4, 3), np.float32)
    weight[:, 1], weight[:, 2] = 1e-42, 1e-37
    np.testing.assert_array_equal(quant.dequantize(quant.quantize_int8(weight)), 0 * weight)


def test_what_is_not_finite():
    weight = np.array(draw(16, 24))
    weight[2, 3] = np.nan
    with pytest.raises(ValueError, match="1 of the 384 entries of weight"):
        quant.quantize_int8(weight)
    got = jax.jit(lambda w: quant.dequantize(quant.quantize_int8(w)))(weight)
    assert np.isnan(got).all(0).nonzero()[0].tolist() == [3]
    assert np.isfinite(np.delete(got, 3, 1)).all()


@pytest.mark.parametrize(
    ("weight", "options", "error", "match"),
    [
        (np.ones(4, np.float32), {}, ValueError, "int8 has a scale for each output"),
        (np.ones((4, 4), np.float32), {"batch_axes": 1}, ValueError, "with 1 batch axes"),
        (
            np.ones((4, 4), np.float32),
            {"block_size": 0},
            ValueError,
            "block_size must be a",
        ),
        (np.ones((4, 4), np.float32), {"block_size": "4"}, TypeError, "must be an integer"),
        (np.ones((4, 4), np.int8), {}, TypeError, "must be floating point, got dtype int8"),
    ],
)
def test_weights_and_options_that_are_none(weight, options, error, match):
    with pytest.raises(error, match=match):
        quant.quantize_int8(weight, **options)


BROKEN = {
    "no codes": ({"codes": None}, "the array codes is missing"),
    "no scales": ({"scales": None}, "the array scales is missing"),
    "scales": ({"scales": jnp.ones((3,))}, "scales should be float32 of the shape"),
    "rank": ({"scales": jnp.ones((2, 2, 16, 24))}, "do not fit scales"),
    "codes": ({"codes": jnp.ones((16, 24), jnp.uint8)}, "codes should be int8"),
    "dtype": ({"weight_dtype": 3}, "weight_dtype must be one of"),
    "block": ({"block_size": -5}, "do not fit|must be a positive integer"),
    "text": ({"block_size": "a", "scales": jnp.ones((1, 24))}, "must be an integer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_what_does_not_fit(name):
    q = quant.quantize_int8(draw(16, 24))
    q.check()
    change, match = BROKEN[name]
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(q, **change).check()
