"""The accuracy law that the docstring of `lora_jax.dora` states, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import _column_norm
from tests import reference, support

EPS = float(np.finfo(np.float32).eps)
N_IN, N_OUT, RANK = 1024, 48, 16


def cancelling_case(part, dtype="float32", norm_axis="out", n_in=N_IN):
    """A weight most of which lies in the span of A, and a B that takes `part` of that away.

    With `part` 0 the norms are those of the weight; with 1 they are 1e-3 of them.
    """
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n_in, RANK))
    coefficients = rng.normal(size=(RANK, N_OUT))
    rest = rng.normal(size=(n_in, N_OUT))
    rest *= 1e-3 * np.linalg.norm(a @ coefficients) / np.linalg.norm(rest)
    weight = jnp.asarray(a @ coefficients + rest, dtype)
    a, b = jnp.asarray(a, "float32"), jnp.asarray(-part * coefficients, "float32")
    if norm_axis == "in":
        weight, a, b = weight.T, b.T, a.T
    return weight, {"A": a, "B": b}


def law(weight, adapter, scale, norm_axis):
    """The norms in float64, k^2 of each, and whether the direct branch is due."""
    weight, adapter = reference.f64(weight), reference.f64(adapter)
    a, b = adapter["A"], scale * adapter["B"]
    norm = reference.norms(weight + a @ b, norm_axis)
    base = reference.norms(weight, norm_axis) ** 2
    k_squared = (base + reference.norms(np.abs(a) @ np.abs(b), norm_axis) ** 2) / norm**2
    left, right = (a, b) if norm_axis == "out" else (b.T, a.T)
    energy = (left**2).sum(0).mean() * (right**2).sum(0)
    terms = base + reference.norms(a @ b, norm_axis) ** 2 + energy
    kept = (norm**2 / terms).min() * 256
    assert not 0.9 < kept < 1.1, "the case is at the threshold: either branch may be taken"
    return norm, k_squared, kept < 1


def assert_law(got, want, k_squared, direct):
    bound = 4 * EPS * (np.sqrt(k_squared) if direct else k_squared)
    error = np.abs(reference.f64(got) - want) / want
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("norm_axis", ["out", "in"])
@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("part", [0.0, 0.8, 0.88, 0.93, 0.99, 1.0])
def test_error_is_within_the_law(part, dtype, norm_axis):
    weight, adapter = cancelling_case(part, dtype, norm_axis)
    got = jax.jit(lora_jax.dora_column_norm, static_argnames="norm_axis")(
        weight, adapter, float(RANK), norm_axis=norm_axis
    )
    assert got.dtype == jnp.float32
    assert_law(got, *law(weight, adapter, 1.0, norm_axis))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_ordinary_updates_cost_a_few_units(size, scale):
    case = support.make_case("rows", shape=(512, 40))
    weight = case.weight * size
    adapter = case.adapter | {"B": case.adapter["B"] * size}
    got = lora_jax.dora_column_norm(weight, adapter, scale * support.RANK)
    want, k_squared, direct = law(weight, adapter, scale, "out")
    assert not direct
    support.assert_close(got, want, 4 * k_squared, scale=want)


def test_the_factored_form_alone_would_be_wrong():
    # Guards the tests above: without the way out, the hard cases are off by far more.
    weight, adapter = cancelling_case(1.0)
    base = _column_norm.weight_norm_squared(weight, -2)
    transposed = adapter["A"].T
    right = adapter["B"]
    squared = base + 2 * jnp.sum((transposed @ weight) * right, 0)
    squared = squared + jnp.sum((transposed @ adapter["A"] @ right) * right, 0)
    want, *_ = law(weight, adapter, 1.0, "out")
    error = np.abs(np.sqrt(np.maximum(reference.f64(squared), 0)) - want) / want
    assert error.max() > 0.01


@pytest.mark.parametrize("n_in", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("norm_axis", ["out", "in"])
def test_direct_norm_counts_every_row_once(norm_axis, n_in):
    weight, adapter = cancelling_case(1.0, norm_axis=norm_axis, n_in=n_in)
    got = lora_jax.dora_column_norm(weight, adapter, float(RANK), norm_axis=norm_axis)
    assert_law(got, *law(weight, adapter, 1.0, norm_axis))


def test_stacked_weights_one_of_which_cancels():
    hard, easy = cancelling_case(1.0), cancelling_case(0.0)
    weight, adapter = jax.tree.map(lambda *v: jnp.stack(v), easy, hard)
    got = lora_jax.dora_column_norm(weight, adapter, float(RANK))
    mapped = jax.vmap(lora_jax.dora_column_norm, in_axes=(0, 0, None))(
        weight, adapter, float(RANK)
    )
    for i, case in enumerate((easy, hard)):
        want, k_squared, _ = law(*case, 1.0, "out")
        # One column that cancels has the norms of the whole stack formed directly.
        assert_law(got[i], want, k_squared, direct=True)
        assert_law(mapped[i], want, k_squared, direct=True)


def test_float64_weights_have_float64_norms():
    with support.x64():
        case = support.make_case("rows", "float64", "float64")
        got = lora_jax.dora_column_norm(case.weight, case.adapter, support.RANK)
        want, k_squared, _ = law(case.weight, case.adapter, 1.0, "out")
        assert got.dtype == jnp.float64
        support.assert_close(got, want, 4 * k_squared, scale=want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", [0.5, 1.0])
def test_gradient_where_the_norm_cancels_and_where_not(part, dtype):
    weight, adapter = cancelling_case(part, dtype)
    c = jnp.asarray(np.random.default_rng(1).normal(size=N_OUT), "float32")

    def loss(adapter):
        return jnp.vdot(lora_jax.dora_column_norm(weight, adapter, float(RANK)), c)

    grads = jax.jit(jax.grad(loss))(adapter)
    w, f = reference.f64(weight), reference.f64(adapter)
    v = reference.lora_weight(w, f, 1.0)
    norm, k_squared, direct = law(weight, adapter, 1.0, "out")
    assert direct == (part == 1.0)
    d_v = v / norm * reference.f64(c)
    # The columns of V / n are units, and their rounding is k times that of the products.
    unit = 4 * float(jnp.finfo(dtype).eps) * np.sqrt(k_squared.max()) * np.abs(c).max()
    error_a = np.abs(reference.f64(grads["A"]) - d_v @ f["B"].T).max()
    error_b = np.abs(reference.f64(grads["B"]) - f["A"].T @ d_v).max()
    assert error_a <= unit * np.linalg.norm(f["B"], axis=1).max()
    assert error_b <= unit * np.linalg.norm(f["A"], axis=0).max()


def test_factors_that_cancel_each_other():
    # A @ B is zero, A and B are large: the orthogonal initializer with a large alpha.
    weight = support.make_case("rows", shape=(256, 40)).weight
    adapter = lora_jax.init_lora_adapter(jax.random.key(0), weight, 8, init="orthogonal")
    got = lora_jax.dora_column_norm(weight, adapter, 1e4)
    want, k_squared, direct = law(weight, adapter, 1e4 / 8, "out")
    assert direct
    assert_law(got, want, k_squared, direct)


@pytest.mark.parametrize("size", [1e-15, 1e18])
def test_range_of_norms(size):
    case = support.make_case("rows", shape=(256, 40))
    weight = case.weight * np.float32(size / 16)
    adapter = case.adapter | {"B": case.adapter["B"] * np.float32(size / 64)}
    for got, factors in (
        (lora_jax.dora_column_norm(weight), {"A": adapter["A"], "B": 0 * adapter["B"]}),
        (lora_jax.dora_column_norm(weight, adapter, float(support.RANK)), adapter),
    ):
        want, k_squared, _ = law(weight, factors, 1.0, "out")
        assert 0.5 < np.median(want) / size < 2
        support.assert_close(got, want, 4 * k_squared, scale=want)


def test_products_of_the_norm_are_at_the_highest_precision():
    weight, adapter = cancelling_case(0.5)
    norm = lambda a: lora_jax.dora_column_norm(weight, a)  # noqa: E731
    text = str(jax.make_jaxpr(norm)(adapter))
    assert text.count("dot_general[") == text.count("precision=") > 3
    assert text.count("HIGHEST") >= text.count("dot_general[")


@pytest.mark.parametrize("norm_axis", ["out", "in"])
def test_norm_of_a_weight_alone(norm_axis):
    weight = support.make_case("stacked").weight
    got = lora_jax.dora_column_norm(weight, norm_axis=norm_axis)
    support.assert_close(got, reference.norms(reference.f64(weight), norm_axis), 4)
    grad = jax.grad(lambda w: lora_jax.dora_column_norm(w).sum())(weight.at[0].set(0.0))
    assert jnp.isfinite(grad).all()
