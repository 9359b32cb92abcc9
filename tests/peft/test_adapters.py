import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.peft.adapters import stack_modules
from lora_jax.peft.layout import common_dtype
from tests.peft.support import draw


def test_a_stack_of_different_dtypes():
    own = [
        {"A": draw(5, 2, dtype=dtype), "B": draw(2, 7, dtype=dtype)}
        for dtype in ("bfloat16", "float16")
    ]
    stacked = stack_modules(own, (2, 1), (0, 1))
    assert stacked["A"].dtype == np.float32
    assert stacked["A"].shape == (2, 1, 5, 2)
    np.testing.assert_array_equal(stacked["A"][1, 0], own[1]["A"].astype(np.float32))


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        ("bfloat16 bfloat16", "bfloat16"),
        ("bfloat16 float16", "float32"),
        ("float16 float64 bfloat16", "float64"),
        ("bfloat16 float32", "float32"),
    ],
)
def test_a_dtype_for_all(dtypes, common):
    assert common_dtype(*map(jnp.dtype, dtypes.split())) == common
