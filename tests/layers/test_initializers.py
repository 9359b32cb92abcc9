import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.layers import initializers
from lora_jax.layers.initializers import init_factors
from tests import support

KEY = jax.random.key(0)
# Deviations of the factors A (400, 25) and B (25, 300), from each paper's formula.
STD = {
    "gaussian": (0.01, 0.01),
    "kaiming_uniform": ((3 * 400) ** -0.5, (3 * 25) ** -0.5),
    "xavier_uniform": ((2 / 425) ** 0.5, (2 / 325) ** 0.5),
    "xavier_normal": ((2 / 425) ** 0.5, (2 / 325) ** 0.5),
    "zeros": (0.0, 0.0),
}
UNIFORM = ("kaiming_uniform", "xavier_uniform")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STD)
def test_each_name_has_its_distribution(name, dtype):
    factors = init_factors(KEY, (400, 300), 25, (name, name), dtype=dtype)
    for factor, std in zip(factors, STD[name], strict=True):
        assert factor.dtype == dtype
        values = np.asarray(factor, np.float64)
        # At least 7500 draws: 4 deviations of the estimate are 3.3 %.
        assert abs(values.std() - std) <= 0.033 * std
        assert abs(values.mean()) <= 4 * std / values.size**0.5
        if name in UNIFORM:
            largest = np.abs(values).max() / (3**0.5 * std)
            assert 0.99 < largest <= 1 + float(jnp.finfo(dtype).eps)
        elif std:
            assert np.abs(values).max() > 3 * std  # neither uniform nor cut at 2


@pytest.mark.parametrize("name", STD)
def test_a_name_is_its_function(name):
    function = getattr(initializers, name)
    function = function() if name == "gaussian" else function
    both = (init_factors(KEY, (12, 9), 4, init) for init in (name, function))
    for a, b in zip(*both, strict=True):
        np.testing.assert_array_equal(a, b)
    # And the function can be called by itself, as those of jax.nn.initializers.
    assert function(KEY, (3, 12, 4), jnp.bfloat16).dtype == jnp.bfloat16
    assert function(KEY, (3, 12, 4)).dtype == jnp.float32


@pytest.mark.parametrize("name", [*UNIFORM, "xavier_normal"])
def test_leading_axes_do_not_count_as_fans(name):
    function = getattr(initializers, name)
    stacked = np.asarray(function(KEY, (8, 100, 5), jnp.float32))
    flat = np.asarray(function(KEY, (100, 40), jnp.float32))
    want = STD[name][0] * (425 / 105) ** 0.5 if "xavier" in name else (3 * 100) ** -0.5
    assert abs(stacked.std() / want - 1) < 0.05
    assert flat.shape == (100, 40)
    assert not np.array_equal(stacked[0], stacked[1])


def test_one_initializer_leaves_b_zero():
    a, b = init_factors(KEY, (3, 12, 9), 4, "kaiming_uniform")
    assert a.any()
    assert not b.any()


def test_a_zero_and_b_random():
    a, b = init_factors(KEY, (12, 9), 4, ("zeros", "gaussian"), std=0.5)
    assert not a.any()
    assert 0.2 < float(jnp.std(b)) < 0.8


def test_a_and_b_are_independent_and_do_not_depend_on_each_others_choice():
    a, b = init_factors(KEY, (9, 9), 9, ("gaussian", "gaussian"))
    assert not jnp.array_equal(a, b)
    alone, _ = init_factors(KEY, (9, 9), 9, "gaussian")
    np.testing.assert_array_equal(a, alone)


@pytest.mark.parametrize("shape", [(24, 16), (3, 24, 16), (4, 3)])
def test_orthogonal_pair_has_no_product(shape):
    a, b = init_factors(KEY, shape, 6, "orthogonal")
    assert a.shape == (*shape[:-1], 6)
    assert b.shape == (*shape[:-2], 6, shape[-1])
    product = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    size = np.abs(np.asarray(a)) @ np.abs(np.asarray(b))
    assert np.abs(product).max() <= 8 * np.finfo(np.float32).eps * size.max()
    # Columns of A are sums of rank / 2 normals of variance 1 over the orthogonal Q.
    for factor in (a, b):
        rms = float(jnp.sqrt(jnp.mean(factor**2)))
        assert 0.03 < rms < 0.15  # 0.1 * sqrt(1 / 2)


def test_functions_of_the_user():
    def ones(key, shape, dtype):
        del key
        return jnp.ones(shape, dtype)

    a, b = init_factors(KEY, (12, 9), 4, (ones, ones), dtype="bfloat16")
    assert (a == 1).all()
    assert b.shape == (4, 9)
    assert b.dtype == jnp.bfloat16


def test_works_inside_jit_and_in_float64():
    init = jax.jit(lambda key: init_factors(key, (12, 9), 4, "orthogonal"))
    assert init(KEY)[0].shape == (12, 4)
    with support.x64():
        a, _ = init_factors(KEY, (12, 9), 4, "gaussian", dtype="float64")
        assert a.dtype == jnp.float64
        assert (a != a.astype("float32").astype("float64")).any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init": "gausian"}, ValueError, r"init must be one of 'gaussian', .*got "
         r"'gausian'. Did you mean 'gaussian'\?"),
        ({"init": 3}, TypeError, r"init must be a name .* a tuple of two .*got 3 \(int\)"),
        ({"init": ("orthogonal", "zeros")}, ValueError, "'orthogonal' makes A and B tog"),
        ({"init": ("zeros",)}, TypeError, r"tuple of two of those.*got \('zeros',\) \(t"),
        ({"init": jax.nn.initializers.he_normal}, TypeError, "so call it first"),
        ({"dtype": "foo"}, TypeError, "dtype must be that of an array, got 'foo'"),
        ({"init": "orthogonal", "rank": 3}, ValueError, "must be even, got 3"),
        ({"init": "zeros", "std": 0.5}, ValueError, "used by init='gaussian' only"),
        ({"init": "gaussian", "std": -1.0}, ValueError, "std must not be negative, got -1"),
        ({"init": "gaussian", "std": float("nan")}, ValueError, "std must be finite"),
        ({"init": lambda k, s, d: jnp.zeros((2, 2), d)}, ValueError,
         r"must return an array of the shape \(12, 4\).*got \(2, 2\)"),
        ({"init": lambda k, s, d: jnp.zeros(s, int)}, TypeError, "must be floating point"),
        ({"dtype": "int32"}, TypeError, "dtype must be floating point and of"),
    ],
)  # fmt: skip
def test_bad_arguments(options, error, message):
    options = {"rank": 4} | options
    with pytest.raises(error, match=message):
        init_factors(KEY, (12, 9), **options)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(8, 6\) and \(4, 10\)"):
        initializers.orthogonal_pair(KEY, (8, 6), (4, 10))
    for shape in ((8,), (0, 8)):
        with pytest.raises(ValueError, match=r"must have a shape \(\*batch, in, out\)"):
            init_factors(KEY, shape, 4)


def test_orthogonal_pair_in_half_precision_is_rounded():
    half = initializers.orthogonal_pair(KEY, (8, 4), (4, 6), jnp.bfloat16)
    full = initializers.orthogonal_pair(KEY, (8, 4), (4, 6))
    for a, b in zip(half, full, strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b.astype("bfloat16"))


@pytest.mark.parametrize("shape", [(8, 4), (33, 7), (3, 17, 5), (1, 1)], ids=str)
def test_numbers_are_those_of_jax(shape):
    # Also where more of them are drawn than the shape has, to compile for fewer sizes.
    batch = tuple(range(len(shape) - 2))

    def scaled(scale, mode, distribution):
        return jax.nn.initializers.variance_scaling(
            scale, mode, distribution, in_axis=-2, out_axis=-1, batch_axis=batch
        )

    for own, of_jax in (
        (initializers.gaussian(0.02), jax.nn.initializers.normal(0.02)),
        (initializers.kaiming_uniform, scaled(1 / 3, "fan_in", "uniform")),
        (initializers.xavier_uniform, scaled(1.0, "fan_avg", "uniform")),
        (initializers.xavier_normal, scaled(1.0, "fan_avg", "normal")),
    ):
        for key in (KEY, jax.random.PRNGKey(1), jax.random.key(2, impl="rbg")):
            got, want = own(key, shape, jnp.float32), of_jax(key, shape, jnp.float32)
            # Equal, but for roundings: with other options of the compiler, a vector of
            # numbers and the rest of a loop are rounded in two ways.
            support.assert_close(got, want, 4)


def test_numbers_are_drawn_for_few_sizes(monkeypatch):
    sizes = set()
    draw = initializers._uniform
    monkeypatch.setattr(
        initializers, "_uniform", lambda key, n, dtype: sizes.add(n) or draw(key, n, dtype)
    )
    for width in range(9, 24):
        initializers.kaiming_uniform(KEY, (width, 4))
    assert sizes == {(64,), (128,)}
    sizes.clear()
    # JAX does not say that the numbers of other generators depend on their places alone.
    initializers.kaiming_uniform(jax.random.key(0, impl="rbg"), (9, 4))
    assert sizes == {(9, 4)}
