"""The accuracy law that the docstring of `layers.dora` states, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.lowrank import low_rank, norm_matrix, weight_norms
from lora_jax.lowrank.norm_matrix import Matrix
from lora_jax.optim import preconditioning
from tests import reference, support

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)
column_norm = jax.jit(lora_jax.dora_column_norm, static_argnames="norm_axis")
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
    weight = support.asarray(a @ coefficients + rest, dtype)
    a, b = (
        support.asarray(a, "float32"),
        support.asarray(-part * coefficients, "float32"),
    )
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
    got = column_norm(weight, adapter, float(RANK), norm_axis=norm_axis)
    assert got.dtype == jnp.float32
    want, k_squared, direct = law(weight, adapter, 1.0, norm_axis)
    assert_law(got, want, k_squared, direct)
    assert are_right(weight, adapter, norm_axis) == (not direct)


@functools.partial(jax.jit, static_argnames="norm_axis")
def are_right(weight, adapter, norm_axis="out"):
    """Whether the norms are those of the factored squares."""
    axis = -2 if norm_axis == "out" else -1
    matrix, _ = low_rank.LowRank(weight, adapter, 1.0, axis).matrix()
    base = Matrix(weight).squares(axis)
    return weight_norms._are_right(weight_norms._factored_squares(matrix, base, axis))


@pytest.mark.parametrize(
    ("size", "right"), [(5e-14, True), (1e-14, False), (4e18, True), (5e18, False)]
)
def test_squares_near_the_ends_of_the_range_are_not_used(size, right):
    weight = jnp.full((256, 4), size / 16)
    zeros = {"A": np.zeros((256, RANK), "float32"), "B": np.zeros((RANK, 4), "float32")}
    assert are_right(weight, zeros) == right
    # The squares of a weight alone lose less.
    squares = Matrix(weight).squares(-2) / (RANK if size < 1 else 1)
    alone = weight_norms._factored_squares(Matrix(weight), squares, -2)
    assert weight_norms._are_right(alone) == right


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_ordinary_updates_cost_a_few_units(size, scale):
    case = support.make_case("rows", shape=(512, 40))
    weight = case.weight * size
    adapter = case.adapter | {"B": case.adapter["B"] * size}
    got = column_norm(weight, adapter, scale * support.RANK)
    want, k_squared, direct = law(weight, adapter, scale, "out")
    assert not direct
    support.assert_close(got, want, 4 * k_squared, scale=want)


def test_the_factored_form_alone_would_be_wrong():
    # Guards the tests above: without the way out, the hard cases are off by far more.
    weight, adapter = cancelling_case(1.0)
    base = Matrix(weight).squares(-2)
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
    got = column_norm(weight, adapter, float(RANK), norm_axis=norm_axis)
    assert_law(got, *law(weight, adapter, 1.0, norm_axis))


@pytest.mark.parametrize("norm_axis", ["out", "in"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_weights_one_of_which_cancels(dtype, norm_axis):
    hard, easy = (cancelling_case(part, dtype, norm_axis) for part in (1.0, 0.0))
    norm = functools.partial(column_norm, norm_axis=norm_axis)
    weight, adapter = jax.tree.map(lambda *v: np.stack(v), easy, hard)
    got = norm(weight, adapter, float(RANK))
    mapped = jax.jit(jax.vmap(norm, in_axes=(0, 0, None)))(weight, adapter, float(RANK))
    # Without the hard one the factored form is right.
    alike = norm(*jax.tree.map(lambda v: np.stack([v, 2 * v]), easy), float(RANK))
    for i, part in enumerate((1, 2)):
        own = jax.tree.map(lambda v: part * v, easy)  # noqa: B023
        assert_law(alike[i], *law(*own, 1.0, norm_axis))
    for i, case in enumerate((easy, hard)):
        want, k_squared, _ = law(*case, 1.0, norm_axis)
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
    c = support.asarray(np.random.default_rng(1).normal(size=N_OUT), "float32")

    def loss(adapter):
        return jnp.vdot(column_norm(weight, adapter, float(RANK)), c)

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


def test_gradient_of_a_factor_that_is_zero():
    case = support.make_case("rows", shape=(256, 40))
    zero, b = jnp.zeros_like(case.adapter["A"]), case.adapter["B"]
    norm = lambda a: column_norm(case.weight, {"A": a, "B": b}, support.RANK)  # noqa: E731
    weight = reference.f64(case.weight)
    want = weight / reference.norms(weight, "out") @ reference.f64(b).T
    support.assert_close(
        jax.jit(jax.grad(lambda a: norm(a).sum()))(zero), want, 16, scale=1.0
    )


@pytest.mark.parametrize(("n_in", "branches"), [(128, 0), (129, 1)])
def test_short_columns_need_no_branch(n_in, branches):
    weight, adapter = cancelling_case(1.0, n_in=n_in)
    text = str(jax.make_jaxpr(lora_jax.dora_column_norm)(weight, adapter))
    assert text.count("cond[") == branches


def test_factors_that_cancel_each_other():
    # A @ B is zero, A and B are large: the orthogonal initializer with a large alpha.
    weight = support.make_case("rows", shape=(256, 40)).weight
    adapter = lora_jax.init_lora_adapter(jax.random.key(0), weight, 8, init="orthogonal")
    got = column_norm(weight, adapter, 1e4)
    want, k_squared, direct = law(weight, adapter, 1e4 / 8, "out")
    assert direct
    assert_law(got, want, k_squared, direct)


@pytest.mark.parametrize("size", [1e-15, 1e18])
def test_range_of_norms(size):
    case = support.make_case("rows", shape=(256, 40))
    weight = case.weight * np.float32(size / 16)
    adapter = case.adapter | {"B": case.adapter["B"] * np.float32(size / 64)}
    for got, factors in (
        (column_norm(weight), {"A": adapter["A"], "B": 0 * adapter["B"]}),
        (column_norm(weight, adapter, float(support.RANK)), adapter),
    ):
        want, k_squared, _ = law(weight, factors, 1.0, "out")
        assert 0.5 < np.median(want) / size < 2
        support.assert_close(got, want, 4 * k_squared, scale=want)


def test_a_factor_whose_squares_underflow():
    case = support.make_case("rows", shape=(256, 40))
    sizes = {"A": np.float32(1e-22), "B": np.float32(1e18)}
    adapter = {name: case.adapter[name] * size for name, size in sizes.items()}
    weight = case.weight * np.float32(1e-4)
    got = column_norm(weight, adapter, float(support.RANK))
    want = reference.lora_weight(reference.f64(weight), reference.f64(adapter), 1.0)
    want = reference.norms(want, "out")
    assert np.all(np.abs(want / reference.norms(reference.f64(weight), "out") - 1) > 0.01)
    support.assert_close(got, want, 32, scale=want)


def merged_for_a_use(weight, adapter, fn=jnp.tanh):
    config = lora_jax.LoraConfig(RANK, targets="w", axes={"w": "io"})
    plan = lora_jax.plan_adapters(config, {"w": weight})
    adapted = lora_jax.adapt(lambda p: fn(p["w"]), plan, on_merge="allow")
    return adapted({"w": weight}, {"w": adapter})


BIASES = {"A_bias": jnp.ones(RANK), "B_bias": jnp.ones(N_OUT)}
# Accelerators multiply float32 in fewer bits by default, which no value on a CPU shows.
PRECISE = {
    "norm": lora_jax.dora_column_norm,
    "merge": lora_jax.merge_lora_weight,
    "layer": lambda w, f: lora_jax.merge_lora_layer(w, None, f | BIASES),
    "use": merged_for_a_use,
    "sum": lambda w, f: merged_for_a_use(w, f, jnp.sum),
    "decomposed": lambda w, f: lora_jax.init_pissa_adapter(w, RANK, key=KEY, iterations=1),
    "preconditioned": lambda w, f: preconditioning.solve_gram(f["B"], f["B"], 0.1),
}


@pytest.mark.parametrize("name", PRECISE)
def test_products_are_at_the_highest_precision(name):
    program = str(jax.make_jaxpr(PRECISE[name])(*cancelling_case(0.5)))
    count = program.count("dot_general[")
    assert count == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_a_bfloat16_weight_is_multiplied_by_three_parts_of_the_factor():
    program = str(jax.make_jaxpr(PRECISE["norm"])(*cancelling_case(0.5, "bfloat16")))
    assert f"bf16[{3 * RANK},{N_IN}]" in program


@pytest.mark.parametrize("norm_axis", ["out", "in"])
def test_norm_of_a_weight_alone(norm_axis):
    weight = support.make_case("stacked").weight
    got = column_norm(weight, norm_axis=norm_axis)
    support.assert_close(got, reference.norms(reference.f64(weight), norm_axis), 4)
    with_zeros = np.asarray(weight) * (np.arange(3) > 0)[:, None, None]
    grad = jax.jit(jax.grad(lambda w: column_norm(w).sum()))(with_zeros)
    assert np.isfinite(grad).all()


# Columns of sizes at both ends of the range, beside ordinary ones. The products of A and B
# are normal numbers, as a merge needs them to be.
EXTREMES = {
    "float16": [1.0, 6e-8, 3e4, 0.0],
    "bfloat16": [1.0, 1e30, 1e-30, 1e37, 0.0],
    "float32": [1e20, 1e-20, 1.0, 1e-22, 1e-30, 1e37, 0.0],
    "float64": [1e200, 1e-200, 1.0, 1e300, 1e-300, 0.0],
}


def extreme_case(dtype, norm_axis, batch=()):
    """A weight and adapter with updates as large as the columns; the scale is 1."""
    rng = np.random.default_rng(2)
    sizes = np.array(EXTREMES[dtype])
    weight = rng.normal(size=(*batch, 33, len(sizes))) * sizes
    a = rng.normal(size=(*batch, 33, RANK))
    b = rng.normal(size=(*batch, RANK, len(sizes))) * sizes
    wide = "float64" if dtype == "float64" else "float32"
    weight, a, b = weight.astype(jnp.dtype(dtype)), a.astype(wide), b.astype(wide)
    if norm_axis == "in":
        weight, a, b = (np.swapaxes(v, -1, -2) for v in (weight, b, a))
    return weight, {"A": a, "B": b}


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("norm_axis", ["out", "in"])
@pytest.mark.parametrize("dtype", EXTREMES)
def test_columns_of_any_size(dtype, norm_axis, batch):
    with support.x64():
        weight, adapter = extreme_case(dtype, norm_axis, batch)
        axis = -2 if norm_axis == "out" else -1
        wide = jnp.dtype("float64" if dtype == "float64" else "float32")
        eps = float(jnp.finfo(wide).eps)
        for factors in (None, adapter):
            exact = np.asarray(weight, np.longdouble)
            if factors is not None:
                exact = exact + np.asarray(adapter["A"], np.longdouble) @ np.asarray(
                    adapter["B"], np.longdouble
                )
            want = np.sqrt((exact**2).sum(axis))
            got = column_norm(weight, factors, float(RANK), norm_axis=norm_axis)
            assert got.dtype == wide
            error = np.abs(np.asarray(got, np.longdouble) - want)
            assert (error <= 32 * eps * want).all(), error / want


@pytest.mark.parametrize("norm_axis", ["out", "in"])
def test_gradients_of_columns_of_any_size(norm_axis):
    weight, adapter = extreme_case("float32", norm_axis)
    # Without the smallest column, whose products with A underflow.
    weight, adapter = jax.tree.map(
        lambda v: np.where(np.abs(v) < 1e-30, np.float32(0), v), (weight, adapter)
    )
    norm = functools.partial(column_norm, norm_axis=norm_axis)
    by_factors = jax.jit(jax.grad(lambda f: norm(weight, f, float(RANK)).sum()))(adapter)
    v = reference.f64(weight) + reference.f64(adapter["A"]) @ reference.f64(adapter["B"])
    kept = "B" if norm_axis == "out" else "A"
    axis = -2 if norm_axis == "out" else -1
    want = np.sqrt((v**2).sum(axis, keepdims=True))
    unit = v / np.where(want == 0, 1, want)
    other = reference.f64(adapter["A" if kept == "B" else "B"])
    want = other.T @ unit if kept == "B" else unit @ other.T
    support.assert_close(by_factors[kept], want, 512, scale=np.abs(want).max())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_factors))
    of_weight = jax.jit(jax.grad(lambda w: norm(w).sum()))(weight)
    w = reference.f64(weight)
    want = np.sqrt((w**2).sum(axis, keepdims=True))
    support.assert_close(of_weight, w / np.where(want == 0, 1, want), 16, scale=1.0)


@pytest.mark.parametrize("size", [1e20, 1e-21, 1e37])
def test_merge_and_unmerge_of_large_and_small_columns(size):
    rng = np.random.default_rng(3)
    weight = support.asarray(rng.normal(size=(33, 6)) * size, "float32")
    adapter = lora_jax.init_dora_adapter(KEY, weight, 4)
    norms = column_norm(weight, adapter)
    adapter["m"] = adapter["m"] * 2
    merged = jax.jit(lora_jax.merge_dora_weight)(weight, adapter)
    support.assert_close(merged, 2 * reference.f64(weight), 8)
    back = jax.jit(lora_jax.unmerge_dora_weight)(merged, adapter, norms)
    support.assert_close(back, reference.f64(weight), 16)
    x = support.asarray(rng.normal(size=(5, 33)) * min(1, 1e3 / size), "float32")
    got = jax.jit(lora_jax.dora_linear)(x, weight, adapter)
    want = 2 * reference.f64(x) @ reference.f64(weight)
    support.assert_close(got, want, 64, scale=np.abs(want).max())


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bad):
    weight = np.array(support.make_case("rows").weight)
    weight[1, 2] = bad
    norm = np.asarray(column_norm(weight))
    assert not np.isfinite(norm[2])
    assert np.isfinite(np.delete(norm, 2)).all()


@pytest.mark.parametrize("part", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm_axis", ["out", "in"])
def test_axes_of_a_weight_that_are_not_folded(norm_axis, dtype, part):
    """The norms of a stack whose ends are several axes, on both branches."""
    weight, adapter = cancelling_case(part, dtype, norm_axis)
    axis = {"out": -2, "in": -1}[norm_axis]
    a, b = adapter["A"], adapter["B"]
    weight, a, b = (np.stack(pair) for pair in ((weight, 2 * weight), (a, a), (b, 2 * b)))
    sides = norm_matrix.sides(a, b, axis, "float32")
    folded = Matrix(weight, *sides, 1.0)
    sizes = {N_IN: (4, 256), N_OUT: (3, 16)}
    ends = [n for size in weight.shape[1:] for n in sizes[size]]
    unfolded = folded._replace(weight=weight.reshape(2, *ends))
    want = weight_norms.constant_norm(folded, axis)
    got = weight_norms.constant_norm(unfolded, axis)
    assert got.shape == want.shape
    support.assert_close(got, want, 16)
