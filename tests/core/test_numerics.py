import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._core import numerics
from tests import support


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
    scale = numerics.adapter_scale(jnp.asarray(3, dtype), 8, False, "float32")
    assert scale.dtype == jnp.float32
    assert float(scale) == 0.375


def test_drop_keeps_the_right_share():
    x = jnp.ones((200, 300))
    kept = float(jnp.mean(numerics.drop(x, 0.25, jax.random.key(0))))
    assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / x.size) ** 0.5


def test_float64_counts_as_float32_where_jax_has_none():
    assert numerics.promote("float64", "bfloat16") == "float32"


def test_an_array_alpha_does_not_narrow_a_wider_layer():
    with support.x64():
        for alpha in (jnp.float32(16), jnp.int32(16), jnp.float64(16)):
            scale = numerics.adapter_scale(alpha, 3, False, "float64")
            assert scale.dtype == jnp.float64
            assert float(scale) == 16 / 3
