import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.peft.adapters import from_peft, stack_modules, to_peft
from lora_jax.peft.layout import common_dtype
from tests.peft.support import draw

KINDS = {
    "linear": ("linear", "io", 0, (5, 7), {"A": (2, 5), "B": (7, 2), "m": (7,)}),
    "heads": ("linear", "ioo", 0, (5, 2, 3), {"A": (2, 5), "B": (6, 2)}),
    "embedding": ("embedding", "io", 0, (5, 7), {"A": (2, 5), "B": (7, 2), "m": (7,)}),
    "convolution": (
        "convolution",
        "iiio",
        0,
        (3, 5, 4, 6),
        {"A": (2, 4, 3, 5), "B": (6, 2, 1, 1), "m": (1, 6, 1, 1)},
    ),
    "torch convolution": (
        "convolution",
        "oii",
        0,
        (6, 4, 3),
        {"A": (2, 4, 3), "B": (6, 2, 1), "m": (1, 6, 1)},
    ),
    "experts": ("experts", "bio", 3, (3, 5, 7), {"A": (6, 5), "B": (7, 6)}),
    "one expert": ("experts", "io", 1, (5, 7), {"A": (2, 5), "B": (7, 2)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(name):
    kind, axes, experts, shape, shapes = KINDS[name]
    arrays = {entry: draw(*shape) for entry, shape in shapes.items()}
    own = from_peft(kind, axes, experts, arrays)
    assert own["A"].ndim == 2 + ("b" in axes)
    assert own["A"].shape[-1] == 2
    back = to_peft(kind, axes, shape, own)
    assert back.keys() == arrays.keys()
    for entry, want in arrays.items():
        np.testing.assert_array_equal(back[entry], want)


def test_the_update_of_a_convolution():
    a, b = draw(2, 4, 3, 5), draw(6, 2, 1, 1)
    update = np.einsum("rihw,or->hwio", a, b[:, :, 0, 0])
    own = from_peft("convolution", "iiio", 0, {"A": a, "B": b})
    got = (own["A"] @ own["B"]).reshape(3, 5, 4, 6)
    np.testing.assert_allclose(got, update, rtol=1e-5, atol=1e-6)


def test_the_update_of_experts():
    a, b = draw(6, 5), draw(7, 6)
    per_expert = np.einsum("ore,eri->eio", b.reshape(7, 2, 3), a.reshape(3, 2, 5))
    own = from_peft("experts", "bio", 3, {"A": a, "B": b})
    np.testing.assert_allclose(own["A"] @ own["B"], per_expert, rtol=1e-5, atol=1e-6)


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
