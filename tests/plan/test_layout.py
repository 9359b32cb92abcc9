"""A weight of any layout as a matrix, held against `numpy.moveaxis`."""

import jax
import numpy as np
import pytest

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


def make(name, method="lora"):
    shape, ins, outs, batch, flipped = LAYOUTS[name]
    target = Target(shape, method, 2, 1.0, 0.0, ins, outs, batch)
    return target, np.arange(np.prod(shape), dtype=np.float32).reshape(shape), flipped


def as_low_rank(weight, target):
    return layout.low_rank_matrix(weight, {}, target).weight


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrix_and_back(name):
    target, weight, flipped = make(name)
    want = straight(weight, target)
    matrix = layout.to_matrix(weight, target)
    assert isinstance(matrix, np.ndarray)
    np.testing.assert_array_equal(matrix, want)
    np.testing.assert_array_equal(jax.jit(layout.to_matrix)(weight, target), want)
    np.testing.assert_array_equal(layout.from_matrix(matrix, target), weight)
    np.testing.assert_array_equal(jax.jit(layout.from_matrix)(matrix, target), weight)
    want = want.swapaxes(-1, -2) if flipped else want
    np.testing.assert_array_equal(as_low_rank(weight, target), want)
    np.testing.assert_array_equal(jax.jit(as_low_rank)(weight, target), want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_in_its_own_layout(name):
    target, weight, _ = make(name, "dora")
    adapter: dict = {k: support.draw(*s) for k, s in target.adapter_shapes.items()}
    value = layout.low_rank(weight, adapter, target)
    matrix = LowRank(straight(weight, target).astype("float32"), adapter, target.scale)
    support.assert_close(value.norms(), reference.f64(matrix.norms()), 8)
    for method in ("merge", "change"):
        got = straight(getattr(value, method)(), target)
        want = reference.f64(getattr(matrix, method)())
        support.assert_close(got, want, 8, "float32")
    got = straight(value.unmerge(value.norms()), target)
    want = reference.f64(matrix.unmerge(matrix.norms()))
    support.assert_close(got, want, 64, "float32")


@pytest.mark.parametrize("name", ["in out", "out in", "in heads width", "stacked out in"])
def test_the_usual_layouts_are_not_transposed(name):
    target, weight, _ = make(name)
    assert "transpose" not in str(jax.make_jaxpr(as_low_rank)(weight, target))
    assert np.shares_memory(as_low_rank(weight, target), weight)


@pytest.mark.parametrize("name", ["in out", "stacked out in"])
def test_adapter_of_the_matrix(name):
    target, weight, flipped = make(name, "dora")
    rng = np.random.default_rng(0)
    adapter: dict = {k: rng.normal(size=s) for k, s in target.adapter_shapes.items()}
    value = layout.low_rank_matrix(weight, adapter, target)
    want = adapter["A"] @ adapter["B"]
    got = value.adapter["A"] @ value.adapter["B"]
    np.testing.assert_allclose(got, want.swapaxes(-1, -2) if flipped else want, 1e-12)
    assert value.adapter["m"] is adapter["m"]
    assert value.axis == (-1 if flipped else -2)
    assert value.scale == target.scale
