"""Two codes in a byte, and the table of 16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.quant import _packing
from tests.quant.support import nibbles
from tests.support import asarray


@pytest.mark.parametrize("n", [1, 2, 9])
def test_packed_codes_come_back(n):
    codes = np.random.default_rng(n).integers(0, 16, (2, 3, n)).astype(np.uint8)
    packed = _packing.pack(asarray(codes), 7)
    assert packed.shape == (2, 3, -(-n // 2))
    for i in np.ndindex(2, 3):
        np.testing.assert_array_equal(nibbles(packed[i], n), codes[i])
    got = _packing.unpack(packed).reshape(2, 3, -1)
    np.testing.assert_array_equal(got[..., :n], codes)
    assert np.all(got[..., n:] == 7)


def test_look_up_and_nearest_are_inverse():
    table = np.sort(np.random.default_rng(0).normal(size=16)).astype(np.float32)
    codes = np.arange(16, dtype=np.uint8).reshape(4, 4)
    values = jax.jit(_packing.look_up, static_argnums=())(codes, table)
    np.testing.assert_array_equal(values, table.reshape(4, 4))
    found = _packing.nearest(values, (table[1:] + table[:-1]) / 2)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, codes)


def test_a_value_at_a_threshold_is_not_above_it():
    values = asarray([-1.0, 0.0, 0.5, 1.0, 2.0, jnp.nan])
    found = _packing.nearest(values, np.float32([0.0, 1.0]))
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 2, 0])
