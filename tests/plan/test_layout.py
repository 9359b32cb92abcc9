"""A weight of any layout as a matrix, held against `numpy.moveaxis`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.plan import layout
from lora_jax.plan.target import Target
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrix_and_back(name):
    target, weight, flipped = make(name)
    assert layout.is_flipped(target) is flipped
    matrix = layout.to_matrix(jnp.asarray(weight), target)
    want = straight(weight, target)
    np.testing.assert_array_equal(matrix, want.swapaxes(-1, -2) if flipped else want)
    np.testing.assert_array_equal(layout.from_matrix(matrix, target), weight)


@pytest.mark.parametrize("name", LAYOUTS)
def test_numpy_and_jit(name):
    target, weight, _ = make(name)
    matrix = layout.to_matrix(weight, target)
    assert isinstance(matrix, np.ndarray)
    there = jax.jit(layout.to_matrix)(weight, target)
    np.testing.assert_array_equal(there, matrix)
    np.testing.assert_array_equal(jax.jit(layout.from_matrix)(there, target), weight)


@pytest.mark.parametrize("name", ["in out", "out in", "in heads width", "stacked out in"])
def test_the_usual_layouts_are_not_transposed(name):
    target, weight, _ = make(name)
    assert "transpose" not in str(jax.make_jaxpr(layout.to_matrix)(weight, target))
    assert np.shares_memory(layout.to_matrix(weight, target), weight)


@pytest.mark.parametrize("name", ["in out", "stacked out in"])
def test_adapter_of_the_matrix(name):
    target, _, flipped = make(name, "dora")
    rng = np.random.default_rng(0)
    adapter = {k: rng.normal(size=s) for k, s in target.adapter_shapes.items()}
    own = layout.matrix_adapter(adapter, target)
    want = adapter["A"] @ adapter["B"]
    got = own["A"] @ own["B"]
    np.testing.assert_allclose(got, want.swapaxes(-1, -2) if flipped else want, 1e-12)
    assert own["m"] is adapter["m"]
    assert layout.norm_axis(target) == ("in" if flipped else "out")
