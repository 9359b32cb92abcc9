import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.lowrank import contraction
from tests import reference, support


def _product(x, y):
    """`x @ y` of matrices, or of two stacks of them."""
    batch = tuple(("batch", i) for i in range(x.ndim - 2))
    x = contraction.named(x, (*batch, ("left",), ("summed",)))
    y = contraction.named(y, (*batch, ("summed",), ("right",)))
    return contraction.contract(x, y, batch, x.array.dtype).array


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("argument", [0, 1])
def test_contract_is_wide_and_its_gradients_are_not(argument, dtype):
    rng = np.random.default_rng(0)
    operands = [
        support.asarray(rng.normal(size=s), dtype) for s in ((2, 5, 12), (2, 12, 7))
    ]
    c = support.asarray(rng.normal(size=(2, 5, 7)), dtype).astype("float32")
    out = _product(*operands)
    assert out.dtype == jnp.float32
    x, y, wide_c = map(reference.f64, (*operands, c))
    support.assert_close(out, x @ y, 8)

    def loss(operand):
        arguments = [*operands]
        arguments[argument] = operand
        return jnp.vdot(_product(*arguments), c)

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
    grad = jax.grad(lambda s: s * _product(x, y).sum())(1.0)
    assert grad == 5 * 12 * 7


def test_fold():
    x = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(contraction.fold_rows(x, 0), x.reshape(24, 5))
    np.testing.assert_array_equal(contraction.fold_rows(x, 1), x.reshape(2, 12, 5))
    assert contraction.fold_rows(x, 3).shape == (2, 3, 4, 1, 5)
    assert contraction.fold_rows(x, 2) is x
    assert contraction.fold_rows(x[:, :0], 1).shape == (2, 0, 5)


def test_tokens_stay_as_they_are_where_the_fold_is_of_no_use(monkeypatch):
    x = jnp.ones((2, 3, 4, 5))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert contraction.fold_rows(x, 1) is x
    assert contraction.fold_rows(x, 3).shape == (2, 3, 4, 1, 5)  # a vector needs a row
