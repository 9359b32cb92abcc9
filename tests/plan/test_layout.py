"""A weight of any layout as a matrix, held against `numpy.moveaxis`."""

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax.lowrank.low_rank import LowRank
from lora_jax.plan import layout
from lora_jax.plan.target import Target
from tests import reference, support
from tests.support import straight

# shape, in, out, batch, flipped
LAYOUTS = {
    "in out": ((4, 6), (0,), (1,), (), False),
    "out in": ((6, 4), (1,), (0,), (), True),
    "in heads width": ((4, 2, 3), (0,), (1, 2), (), False),
    "heads width out": ((2, 3, 4), (0, 1), (2,), (), False),
    "stacked in out": ((5, 4, 6), (1,), (2,), (0,), False),
    "stacked out in": ((5, 6, 4), (2,), (1,), (0,), True),
    "heads in width": ((2, 4, 3), (1,), (0, 2), (), False),
    "in batch out": ((4, 5, 6), (0,), (2,), (1,), False),
    "out batch in": ((6, 5, 4), (2,), (0,), (1,), False),
    "out of order": ((2, 3, 4), (1, 0), (2,), (), False),
}


ODD = ("heads in width", "in batch out", "out batch in", "out of order")


def make(name, method="lora"):
    shape, ins, outs, batch, flipped = LAYOUTS[name]
    target = Target(shape, method, 2, 1.0, 0.0, ins, outs, batch)
    return target, np.arange(np.prod(shape), dtype=np.float32).reshape(shape), flipped


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrix_and_back(name):
    target, weight, _ = make(name)
    want = straight(weight, target)
    matrix = layout.to_matrix(weight, target)
    assert isinstance(matrix, np.ndarray)
    np.testing.assert_array_equal(matrix, want)
    np.testing.assert_array_equal(jax.jit(layout.to_matrix)(weight, target), want)
    np.testing.assert_array_equal(layout.from_matrix(matrix, target), weight)
    np.testing.assert_array_equal(jax.jit(layout.from_matrix)(matrix, target), weight)


def test_a_quantized_weight_as_a_matrix():
    target, weight, _ = make("stacked out in")
    stored = lora_jax.quant.quantize_int8(weight, batch_axes=1)
    matrix = layout.to_matrix(stored, target)
    assert (matrix.shape, matrix.dtype) == (target.matrix_shape, stored.dtype)
    got = jax.jit(lambda matrix: matrix.dequantize("float32"))(matrix)
    want = straight(lora_jax.quant.dequantize(stored), target)
    np.testing.assert_array_equal(got, want)
    again = layout.from_matrix(matrix.quantize_like(got), target)
    support.assert_same_bits(again, stored)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_in_its_own_layout(name):
    target, weight, _ = make(name, "dora")
    adapter: dict = {k: support.draw(*s) for k, s in target.adapter_shapes.items()}

    @jax.jit
    def results(weight, matrix, adapter):
        own = layout.low_rank(weight, adapter, target)
        return [
            (value.norms(), value.merge(), value.change(), value.unmerge(value.norms()))
            for value in (own, LowRank(matrix, adapter, target.scale))
        ]

    matrix = straight(weight, target).astype("float32")
    (norms, *got), (want_norms, *want) = results(weight, matrix, adapter)
    support.assert_close(norms, reference.f64(want_norms), 8)
    for own, other, ulps in zip(got, want, (8, 8, 64), strict=True):
        support.assert_close(straight(own, target), reference.f64(other), ulps, "float32")


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_odd_layouts_are_transposed_for_norms(name):
    target, weight, flipped = make(name)
    adapter: dict = {k: support.draw(*s) for k, s in target.adapter_shapes.items()}
    matrix, axis = layout.low_rank(weight, adapter, target).matrix()
    assert axis == (-1 if flipped else -2)
    assert (matrix.weight is weight) == (name not in ODD)
