import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._core import numerics
from tests import reference, support


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


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("argument", [0, 1])
def test_contract_is_wide_and_its_gradients_are_not(argument, dtype):
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 5, 12), (2, 12, 7))]
    c = jnp.asarray(rng.normal(size=(2, 5, 7)), dtype).astype("float32")
    out = numerics.contract(*operands, 1)
    assert out.dtype == jnp.float32
    x, y, wide_c = map(reference.f64, (*operands, c))
    support.assert_close(out, x @ y, 8)

    def loss(operand):
        arguments = [*operands]
        arguments[argument] = operand
        return jnp.vdot(numerics.contract(*arguments, 1), c)

    grad = jax.grad(loss)(operands[argument])
    assert grad.dtype == dtype
    want = wide_c @ reference.t(y) if argument == 0 else reference.t(x) @ wide_c
    # float32 sums, rounded once to the dtype.
    support.assert_close(grad, want, 8 if dtype == "float32" else 1)
    tangent = jax.jvp(loss, (operands[argument],), (operands[argument],))[1]
    support.assert_close(tangent, (x @ y * wide_c).sum(), 8, dtype=dtype, scale=20.0)


def test_contract_of_two_constants_in_a_differentiated_function():
    x = jnp.ones((5, 12), "bfloat16")
    y = jnp.ones((12, 7), "bfloat16")
    grad = jax.grad(lambda s: s * numerics.contract(x, y, 0).sum())(1.0)
    assert grad == 5 * 12 * 7


def test_fold():
    x = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(numerics.fold(x, 0), x.reshape(24, 5))
    np.testing.assert_array_equal(numerics.fold(x, 1), x.reshape(2, 12, 5))
    assert numerics.fold(x, 3).shape == (2, 3, 4, 1, 5)
    assert numerics.fold(x, 2) is x
    assert numerics.fold(x[:, :0], 1).shape == (2, 0, 5)


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


def test_tokens_stay_as_they_are_where_the_fold_is_of_no_use(monkeypatch):
    x = jnp.ones((2, 3, 4, 5))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert numerics.fold(x, 1) is x
    assert numerics.fold(x, 3).shape == (2, 3, 4, 1, 5)  # a vector needs a row
