import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.peft.adapters import from_peft, stack_modules, to_peft
from lora_jax.peft.layout import common_dtype
from tests.peft.support import draw


@pytest.mark.parametrize(
    ("kind", "axes", "experts", "shape", "a", "b", "m"),
    [
        ("linear", "io", 0, (5, 7), (2, 5), (7, 2), (7,)),
        ("linear", "ioo", 0, (5, 2, 3), (2, 5), (6, 2), (6,)),
        ("embedding", "io", 0, (5, 7), (2, 5), (7, 2), (7,)),
        ("convolution", "iiio", 0, (3, 5, 4, 6), (2, 4, 3, 5), (6, 2, 1, 1), (1, 6, 1, 1)),
        ("convolution", "oii", 0, (6, 4, 3), (2, 4, 3), (6, 2, 1), (1, 6, 1)),
        ("experts", "bio", 3, (3, 5, 7), (6, 5), (7, 6), None),
        ("experts", "io", 1, (5, 7), (2, 5), (7, 2), None),
    ],
)
def test_there_and_back(kind, axes, experts, shape, a, b, m):
    arrays = {"A": draw(*a), "B": draw(*b)} | ({"m": draw(*m)} if m else {})
    own = from_peft(kind, axes, experts, arrays)
    assert own["A"].ndim == 2 + ("b" in axes)
    assert own["A"].shape[-1] == 2
    back = to_peft(kind, axes, shape, own)
    assert back.keys() == arrays.keys()
    for entry, want in arrays.items():
        np.testing.assert_array_equal(back[entry], want)


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
