"""Formats with a scale for each output: int8, in blocks of inputs or not, and float8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.quant import _channels
from tests.quant.support import FORMATS
from tests.support import assert_same_bits, draw

EACH = pytest.mark.parametrize("name", ["int8", "int8_blocks", "fp8"])


@EACH
def test_the_codes_are_a_fixed_point(name):
    q = FORMATS[name](draw(16, 24))
    again = FORMATS[name](quant.dequantize(q))
    assert_same_bits(again.codes, q.codes)
    np.testing.assert_allclose(again.scales, q.scales, rtol=3e-7)


@EACH
def test_zeros_and_what_is_below_the_normal_numbers(name):
    least = np.finfo(np.float32).tiny * (448 if name == "fp8" else 127)
    weight = np.zeros((4, 4), np.float32)
    weight[:, 1], weight[:, 2], weight[:, 3] = 1e-42, 1e-37, least
    q = FORMATS[name](weight)
    assert not np.any(q.codes[:, :3])
    np.testing.assert_array_equal(quant.dequantize(q), weight * (weight >= least))


@EACH
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite(name, bad):
    weight = np.array(draw(16, 24))
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="1 of the 384 entries of weight"):
        FORMATS[name](weight)
    got = np.array(jax.jit(lambda w: quant.dequantize(FORMATS[name](w)))(weight))
    rows = slice(5) if name == "int8_blocks" else slice(None)
    assert np.isnan(got[rows, 3]).all()
    got[rows, 3] = 0
    assert np.isfinite(got).all()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_vector_is_refused(format):
    with pytest.raises(ValueError, match=f"{format} has a scale for each output"):
        FORMATS[format](np.ones(4, np.float32))


@EACH
@pytest.mark.parametrize("shape", [(16, 24), (1, 1), (2, 4, 6), (2, 1, 4, 6)], ids=str)
def test_check(name, shape):
    """Accepts what was quantized, and says what does not fit."""
    stack = max(0, len(shape) - 3)
    for batch_axes in {0, stack, len(shape) - 2}:
        q = FORMATS[name](draw(*shape), batch_axes=batch_axes)
        q.check()
        assert q.batch_ndim == batch_axes
        ones, more = jnp.ones((3,)), jnp.ones((*shape[:-1], 1, shape[-1]))
        wrong = jnp.ones(shape, q.codes.dtype).astype(jnp.float16)
        kept = {"int8": shape, "fp8": shape, "int8_blocks": more.shape}[name]
        for change, match in (
            ({"codes": None}, "the array codes is missing"),
            ({"scales": None}, "the array scales is missing"),
            ({"scales": ones}, "scales should be float32 of the shape|do not fit scales"),
            ({"scales": q.scales.astype("float16")}, "scales should be float32 of the sh"),
            ({"scales": jnp.ones(kept)}, "do not fit scales"),  # no axis of inputs is left
            ({"codes": q.codes[..., :0]}, "do not fit scales"),
            ({"codes": wrong}, "codes should be u?int8"),
            ({"weight_dtype": 3}, "weight_dtype must be one of"),
        ):
            with pytest.raises(ValueError, match=match):
                dataclasses.replace(q, **change).check()


@pytest.mark.parametrize(
    ("size", "match"), [(-5, "must be a positive integer"), ("a", "must be an integer")]
)
def test_check_of_a_block_size(size, match):
    q = FORMATS["int8_blocks"](draw(16, 24))
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(q, block_size=size).check()


@pytest.mark.parametrize(
    ("block", "shape"), [(3, (2, 4, 2, 3, 5)), (4, (2, 6, 4, 5)), (None, (2, 4, 6, 5))]
)
def test_input_axes_are_folded_only_where_a_block_crosses_rows(block, shape):
    assert _channels.as_blocks(draw(2, 4, 6, 5), 1, block).values.shape == shape
