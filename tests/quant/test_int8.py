"""Int8: half a step at most, a scale for each output or block of inputs."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import quant
from lora_jax._core import compat
from tests.support import asarray, draw


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
    weight = asarray([[-1.0, 2.0, 0.0], [0.5, 4.0, 0.0]], jnp.bfloat16)
    q = quant.quantize_int8(weight)
    np.testing.assert_allclose(q.scales, [1 / 127, 4 / 127, 0], rtol=1e-7)
    np.testing.assert_array_equal(q.codes, [[-127, 64, 0], [64, 127, 0]])
    assert q.nbytes == 6 + 12
    assert quant.dequantize(q).dtype == jnp.bfloat16


def test_a_block_of_all_inputs_is_not_padded():
    weight = draw(2, 3, 4, 6)
    whole = quant.quantize_int8(weight, batch_axes=1)
    q = quant.quantize_int8(weight, block_size=2**40, batch_axes=1)
    q.check()
    np.testing.assert_array_equal(q.codes, whole.codes)
    np.testing.assert_array_equal(q.scales[:, 0], whole.scales)
    np.testing.assert_array_equal(quant.dequantize(q), quant.dequantize(whole))


def test_blocks_of_inputs_have_scales_of_their_own():
    weight = draw(2, 3, 4, 6)
    q = quant.quantize_int8(weight, block_size=5, batch_axes=1)
    assert (q.shape, q.scales.shape) == ((2, 3, 4, 6), (2, 3, 6))
    top = np.abs(np.asarray(weight)).reshape(2, 12, 6)[:, 10:].max(1) / 127
    np.testing.assert_allclose(q.scales[:, 2], top, rtol=1e-6)


@pytest.mark.parametrize(
    ("weight", "options", "error", "match"),
    [
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


def test_a_block_that_needs_padding_of_a_sharded_axis(monkeypatch):
    # XLA before JAX 0.9 would mix up its entries.
    monkeypatch.setattr(compat, "pads_sharded_axes", lambda: False)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def quantize(block, *spec):
        weight = jax.device_put(draw(2, 2, 8, 6), NamedSharding(mesh, P(*spec)))
        return quant.quantize_int8(weight, block_size=block, batch_axes=1)

    for spec in ((None, "d"), (None, None, "d")):
        with pytest.raises(ValueError, match=r"must divide the inputs .* got 5 for 16 inp"):
            quantize(5, *spec)
        assert quantize(4, *spec).scales.shape == (2, 4, 6)
        assert quantize(None, *spec).scales.shape == (2, 6)
    for spec in (("d",), (None, None, None, "d")):
        assert quantize(5, *spec).scales.shape == (2, 4, 6)
