import pytest

from lora_jax.peft.keys import Dims
from lora_jax.peft.layout import known_readings, readings

LINEAR = Dims(6, 12)


def fitting_axes(shape, kind, dims, layout, *, stacked=0, **kwargs):
    """The letters of the first way to see a weight; None if there is none."""
    found = readings(shape, kind, dims, layout, count=stacked, **kwargs)
    return found[0].axes if found else None


@pytest.mark.parametrize(
    ("shape", "jax", "torch"),
    [
        ((6, 12), "io", "io"),
        ((12, 6), None, "oi"),
        ((6, 3, 4), "ioo", "ioo"),
        ((2, 3, 12), "iio", "iio"),
        ((2, 3, 4, 3), "iioo", "iioo"),
        ((6, 13), None, None),
        ((6,), None, None),
        ((), None, None),
    ],
)
def test_a_matrix(shape, jax, torch):
    assert fitting_axes(shape, "linear", LINEAR, "jax") == jax
    assert fitting_axes(shape, "linear", LINEAR, "torch") == torch


def test_a_square_matrix_lies_as_the_layout_says():
    square = (5, 5), "linear", Dims(5, 5)
    assert fitting_axes(*square, "jax") == "io"
    assert fitting_axes(*square, "torch") == "oi"
    assert fitting_axes(*square, "torch", fan_in_fan_out=True) == "io"


@pytest.mark.parametrize(
    ("shape", "stacked", "axes"),
    [
        ((5, 6, 12), 1, "bio"),
        ((6, 5, 12), 1, "ibo"),
        ((6, 12, 5), 1, "iob"),
        ((5, 6, 3, 4), 1, "bioo"),
        ((6, 5, 3, 4), 1, "iboo"),
        ((2, 5, 6, 12), 2, "bbio"),
        ((6, 12), 1, None),
        ((12,), 1, None),
        ((2, 2, 5, 6, 12), 3, None),
    ],
)
def test_a_stack_of_modules(shape, stacked, axes):
    assert fitting_axes(shape, "linear", LINEAR, "jax", stacked=stacked) == axes


@pytest.mark.parametrize("layout", ["jax", "torch"])
def test_an_embedding(layout):
    assert fitting_axes((19, 10), "embedding", Dims(19, 10), layout) == "io"
    assert fitting_axes((10, 19), "embedding", Dims(19, 10), layout) is None


def test_a_convolution():
    dims = Dims(4, 6, (3, 5))
    assert fitting_axes((3, 5, 4, 6), "convolution", dims, "jax") == "iiio"
    assert fitting_axes((6, 4, 3, 5), "convolution", dims, "torch") == "oiii"
    assert fitting_axes((6, 4, 3, 5), "convolution", dims, "jax") is None
    assert fitting_axes((6, 4, 5, 3), "convolution", dims, "torch") is None


def test_experts():
    dims = Dims(6, 5, experts=3)
    assert fitting_axes((3, 6, 5), "experts", dims, "jax") == "bio"
    assert fitting_axes((3, 5, 6), "experts", dims, "jax") is None
    assert fitting_axes((3, 5, 6), "experts", dims, "torch") == "boi"
    assert fitting_axes((3, 6, 5), "experts", dims, "torch") == "bio"
    square = Dims(5, 5, experts=3)
    both = readings((3, 5, 5), "experts", square, "torch")
    assert {each.axes for each in both} == {"bio", "boi"}
    assert fitting_axes((3, 5, 5), "experts", square, "jax") == "bio"
    one = Dims(6, 5, experts=1)
    assert fitting_axes((6, 5), "experts", one, "jax") == "io"
    assert fitting_axes((4, 1, 6, 5), "experts", one, "jax", stacked=1) == "bbio"


@pytest.mark.parametrize(
    ("shape", "axes", "dims", "stacked", "fits"),
    [
        ((12, 6), "oi", LINEAR, 0, True),
        ((12, 6), "io", LINEAR, 0, False),
        ((13, 6), "oi", LINEAR, 0, False),
        ((12, 6), "oii", LINEAR, 0, False),
        ((4, 12, 6), "boi", LINEAR, 1, True),
        ((4, 12, 6), "boi", LINEAR, 0, False),
        ((12, 2, 3), "oii", LINEAR, 0, True),
        ((3, 5, 4, 6), "iiio", Dims(4, 6, (3, 5)), 0, True),
        ((2, 3, 6, 5), "bbio", Dims(6, 5, experts=3), 1, True),
        ((2, 4, 6, 5), "bbio", Dims(6, 5, experts=3), 1, False),
        ((6, 5), "io", Dims(6, 5, experts=1), 0, True),
        ((6, 5), "io", Dims(6, 5, experts=3), 0, False),
    ],
)
def test_given_axes(shape, axes, dims, stacked, fits):
    assert bool(known_readings(shape, axes, "linear", dims, stacked)) is fits
