import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax._core import numerics
from tests import support
from tests.support import assert_same_bits, draw, normal


@pytest.mark.parametrize(
    ("dtypes", "promoted", "wide"),
    [
        (["bfloat16"], "bfloat16", "float32"),
        (["float16", "bfloat16"], "float32", "float32"),
        (["float32", "float16"], "float32", "float32"),
        (["float64", "float16"], "float64", "float64"),
    ],
)
def test_promotion_also_where_it_is_strict(dtypes, promoted, wide):
    with support.x64():
        assert numerics.promote(*dtypes) == promoted
        assert numerics.accumulation_dtype(*dtypes) == wide


@pytest.mark.parametrize("alpha", [16, 16.0, np.float32(16), np.int64(16)])
def test_a_number_makes_a_python_number(alpha):
    scale = numerics.adapter_scale(alpha, 8, False, "bfloat16")
    assert type(scale) is float
    assert scale == 2.0
    assert numerics.adapter_scale(alpha, 16, True, "bfloat16") == 4.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_an_array_makes_a_wide_scalar(dtype):
    scale = numerics.adapter_scale(support.asarray(3, dtype), 8, False, "float32")
    assert scale.dtype == jnp.float32
    assert float(scale) == 0.375


def test_drop_keeps_the_right_share():
    x = jnp.ones((200, 300))
    kept = float(jnp.mean(numerics.drop(x, 0.25, jax.random.key(0))))
    assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / x.size) ** 0.5


def test_drop_is_sharded_as_its_argument():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    x, key, sharding = draw(8, 4), jax.random.key(0), NamedSharding(mesh, P("x"))
    with support.set_mesh(mesh):
        dropped = numerics.drop(jax.device_put(x, sharding), 0.5, key)
    assert dropped.sharding.is_equivalent_to(sharding, 2)
    assert_same_bits(jax.device_get(dropped), np.asarray(numerics.drop(x, 0.5, key)))


def test_float64_counts_as_float32_where_jax_has_none():
    assert numerics.promote("float64", "bfloat16") == "float32"


def test_an_array_alpha_does_not_narrow_a_wider_layer():
    with support.x64():
        for alpha in (jnp.float32(16), jnp.int32(16), jnp.float64(16)):
            scale = numerics.adapter_scale(alpha, 3, False, "float64")
            assert scale.dtype == jnp.float64
            assert float(scale) == 16 / 3
        assert numerics.adapter_scale(alpha, 3, False, "float32").dtype == jnp.float64


def test_a_product_with_a_scalar_has_the_dtype_of_the_array():
    x = draw(5, dtype="bfloat16")
    for scale in (0.5, jnp.float32(0.5)):
        assert_same_bits(numerics.multiply(x, scale), x / 2)


def test_products_with_factors_of_float16_are_float32():
    for dtype in ("float32", "bfloat16"):
        assert numerics.factor_dtype(dtype) == dtype
    assert numerics.factor_dtype("float16") == "float32"


# On both sides of where the unit is doubled; to a product of 2**15 it is 1.
@pytest.mark.parametrize("largest", [100.0, 2.0**15, 49.1e3, 49.2e3, 98.3e3, 98.4e3, 4e9])
def test_a_product_over_its_unit_is_in_range(largest):
    x, column = jnp.float32([-1024 * largest, 1.0]), jnp.float16([0.0, 2.0**-10])
    unit, grad = jax.value_and_grad(lambda x: numerics.range_unit("float16", x, column))(x)
    assert np.frexp(unit)[0] == 0.5
    assert unit == 1 if largest <= 2.0**15 else 12288 <= largest / unit <= 24576
    assert not np.any(grad)
    assert numerics.range_unit("float16", x[:0], column) == 1
    assert numerics.range_unit("bfloat16", x, column) is None


def test_a_sum_is_rounded_once():
    base, small = draw(3, 40, dtype="bfloat16"), [draw(3, 40, size=2**-8)] * 3
    column = draw(40, seed=1)
    wide = np.float64(base) + sum(map(np.float64, small))
    assert_same_bits(numerics.sum_and_round(base, small), support.asarray(wide, base.dtype))
    got = numerics.sum_and_round(base, iter(small), [column[None]])
    assert_same_bits(got, support.asarray(wide * np.float64(column), base.dtype))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 7, 5), (2, 3, 7, 11, 5)])
def test_a_row_has_one_entry_along_the_axes_that_it_lacks(shape):
    vector = normal(2, 3, 5)
    row = numerics.as_row(vector, jnp.ones(shape, "bfloat16"))
    want = vector.reshape(2, 3, *[1] * (len(shape) - 3), 5)
    assert_same_bits(row, support.asarray(want, jnp.bfloat16))
