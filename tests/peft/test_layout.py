import pytest

from lora_jax.peft.formats.keys import Dims
from lora_jax.peft.layout import known_readings, readings

LINEAR, SQUARE, TABLE = Dims(6, 12), Dims(5, 5), Dims(19, 10)
KERNEL, EXPERTS, ONE = Dims(4, 6, (3, 5)), Dims(6, 5, experts=3), Dims(6, 5, experts=1)
SQUARES = Dims(5, 5, experts=3)


@pytest.mark.parametrize(
    ("shape", "kind", "dims", "jax", "torch"),
    [
        ((6, 12), "linear", LINEAR, "io", "io"),
        ((12, 6), "linear", LINEAR, "", "oi"),
        ((6, 3, 4), "linear", LINEAR, "ioo", "ioo"),
        ((3, 4, 6), "linear", LINEAR, "", ""),
        ((2, 3, 4, 3), "linear", LINEAR, "iioo", "iioo"),
        ((6, 13), "linear", LINEAR, "", ""),
        ((6,), "linear", LINEAR, "", ""),
        ((), "linear", LINEAR, "", ""),
        ((5, 5), "linear", SQUARE, "io", "oi"),
        ((19, 10), "embedding", TABLE, "io", "io"),
        ((10, 19), "embedding", TABLE, "", ""),
        ((3, 5, 4, 6), "convolution", KERNEL, "iiio", ""),
        ((6, 4, 3, 5), "convolution", KERNEL, "", "oiii"),
        ((6, 4, 5, 3), "convolution", KERNEL, "", ""),
        ((3, 6, 5), "experts", EXPERTS, "bio", "bio"),
        ((3, 5, 6), "experts", EXPERTS, "", "boi"),
        ((3, 5, 5), "experts", SQUARES, "bio", "bio boi"),
        ((6, 5), "experts", ONE, "io", "io"),
    ],
)
def test_one_module(shape, kind, dims, jax, torch):
    for layout, want in (("jax", jax), ("torch", torch)):
        found = readings(shape, kind, dims, layout)
        assert " ".join(each.axes for each in found) == want
    if dims == SQUARE:
        (found,) = readings(shape, kind, dims, "torch", fan_in_fan_out=True)
        assert found.axes == "io"


@pytest.mark.parametrize(
    ("shape", "kind", "dims", "count", "axes"),
    [
        ((5, 6, 12), "linear", LINEAR, 1, "bio"),
        ((6, 5, 12), "linear", LINEAR, 1, "ibo"),
        ((6, 12, 5), "linear", LINEAR, 1, "iob"),
        ((6, 5, 3, 4), "linear", LINEAR, 1, "iboo"),
        ((2, 5, 6, 12), "linear", LINEAR, 2, "bbio"),
        ((6, 12), "linear", LINEAR, 1, ""),
        ((12,), "linear", LINEAR, 1, ""),
        ((2, 2, 5, 6, 12), "linear", LINEAR, 3, ""),
        ((4, 1, 6, 5), "experts", ONE, 1, "bbio"),
    ],
)
def test_a_stack_of_modules(shape, kind, dims, count, axes):
    found = [each.axes for each in readings(shape, kind, dims, "jax", count=count)]
    assert found[:1] == [axes][: bool(axes)]


@pytest.mark.parametrize(
    ("shape", "axes", "dims", "stacked", "fits"),
    [
        ((12, 6), "oi", LINEAR, 0, True),
        ((12, 6), "io", LINEAR, 0, False),
        ((12, 6), "oii", LINEAR, 0, False),
        ((4, 12, 6), "oi", LINEAR, 1, False),
        ((4, 12, 6), "boi", LINEAR, 1, True),
        ((4, 12, 6), "boi", LINEAR, 0, False),
        ((12, 2, 3), "oii", LINEAR, 0, True),
        ((2, 3, 6, 5), "bbio", EXPERTS, 1, True),
        ((2, 4, 6, 5), "bbio", EXPERTS, 1, False),
        ((6, 5), "io", ONE, 0, True),
        ((6, 5), "io", EXPERTS, 0, False),
    ],
)
def test_given_axes(shape, axes, dims, stacked, fits):
    assert bool(known_readings(shape, axes, "linear", dims, stacked)) is fits
