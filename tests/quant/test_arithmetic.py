"""Roundings of 16 bits in float32, and sums in a fixed order, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.quant import _arithmetic, _bitsandbytes, _torchao
from tests.support import asarray


def numbers(seed=0, n=4000, low=-40, high=40):
    rng = np.random.default_rng(seed)
    return np.ldexp(rng.normal(size=n), rng.integers(low, high, n)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_rounded_as_a_cast_does(dtype):
    x = np.concatenate([numbers(), numbers(1, low=-26, high=-12), [0, np.inf, np.nan]])
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(jnp.dtype(dtype)).astype(np.float32)
    got = jax.jit(_arithmetic.round_to, static_argnums=1)(x, dtype)
    np.testing.assert_array_equal(got, want)


def test_a_quotient_is_rounded_once():
    x, divisor = numbers().reshape(40, 100), np.abs(numbers(2, 40))[:, None]
    got = jax.jit(_arithmetic.divide)(x, divisor)
    np.testing.assert_array_equal(got, x / divisor)
    zero = jax.jit(_arithmetic.divide)(np.zeros((1, 2), np.float32), np.zeros((1, 1)))
    np.testing.assert_array_equal(zero, np.zeros((1, 2)))


def test_a_product_with_an_inverse_is_rounded_twice():
    x, divisor = numbers().reshape(40, 100), np.abs(numbers(2, 40))[:, None]
    got = jax.jit(_arithmetic.multiply_by_inverse)(x, divisor)
    np.testing.assert_array_equal(got, x * (np.float32(1) / divisor))
    zero = _arithmetic.multiply_by_inverse(jnp.ones((1, 2)), jnp.zeros((1, 1)))
    np.testing.assert_array_equal(zero, np.zeros((1, 2)))


def test_the_largest_value_is_a_normal_number_or_zero():
    tiny = _arithmetic.TINY
    x = np.float32([[1, -3], [-tiny, 0], [tiny / 2, 0], [np.nan, 1], [1, -np.inf]])
    want = np.float32([3, tiny, 0, np.nan, np.nan])
    np.testing.assert_array_equal(_arithmetic.largest(asarray(x)), want)
    np.testing.assert_array_equal(_arithmetic.largest(asarray(x.T), axis=0), want)


def test_an_inverse_of_the_largest_numbers():
    x = np.float32([[1e38, -3e38, 3.4e38]])
    got = jax.jit(_arithmetic.multiply_by_inverse)(x, x[:, 2:])
    np.testing.assert_allclose(got, x.astype(np.float64) / 3.4e38, rtol=3e-7)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_means_of_a_stack_are_those_of_its_rows(n):
    x = np.abs(numbers(n, 3 * n, -3, 3)).reshape(3, n)
    got = jax.jit(_arithmetic.mean)(x)
    np.testing.assert_allclose(got, x.astype(np.float64).mean(-1), rtol=1e-6)
    for row, mean in zip(x, got, strict=True):
        assert jax.jit(_arithmetic.mean)(row) == mean


def test_a_mean_does_not_overflow():
    x = np.full(5, 3e38, np.float32)
    np.testing.assert_allclose(jax.jit(_arithmetic.mean)(x), 3e38, rtol=3e-7)


def nearest_by_distance(x, table):
    """The first of the smallest distances, each rounded to the dtype of `x`."""
    return np.abs(x[:, None] - table[None]).argmin(1)


TABLES = {
    **{
        d: _torchao.table(d).astype(jnp.dtype(d))
        for d in ("float32", "bfloat16", "float16")
    },
    "bitsandbytes": _bitsandbytes.table("float32"),
    "map": _bitsandbytes.dynamic_map(),
}


@pytest.mark.parametrize("name", TABLES)
def test_thresholds_are_those_of_the_nearest_entry(name):
    table = TABLES[name]
    limits = _arithmetic.thresholds(table, table.dtype)
    x = limits.astype(table.dtype)
    up, down = (np.nextafter(x, np.full_like(x, to)) for to in (np.inf, -np.inf))
    for values in (x, up, down):
        code = (values.astype(np.float32)[:, None] > limits[None]).sum(1)
        want = nearest_by_distance(values, table)
        # Next to the smallest entries of the map a distance is not exact in float32.
        assert (code != want).sum() <= (1 if name == "map" else 0)
