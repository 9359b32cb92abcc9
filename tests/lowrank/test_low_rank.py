"""What a merge adds to a weight, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.lowrank.low_rank import Axes, LowRank
from tests import reference, support


@pytest.mark.parametrize(("norm_axis", "axis"), [("out", -2), ("in", -1)])
def test_change_is_the_merged_weight_without_the_weight(norm_axis, axis):
    case = support.make_case("stacked", method="dora", norm_axis=norm_axis)
    _, weight, _, adapter, _ = case.reference()
    want = reference.dora_weight(weight, adapter, 0.5, norm_axis=norm_axis) - weight
    support.assert_close(LowRank(case.weight, case.adapter, 0.5, axis).change(), want, 16)


def test_the_rounding_of_a_norm_is_no_change():
    weight = support.draw(12, 4).at[:, 3].set(0.0)
    units = np.array([4, 16, -(2**16), 0]) * float(jnp.finfo("float32").eps)
    m = lora_jax.dora_column_norm(weight) * (1 + units.astype("float32"))
    zeros = {"A": jnp.zeros((12, 2)), "B": jnp.zeros((2, 4))}
    with jax.debug_nans(True):  # the column of zeros divides nothing by zero
        got = LowRank(weight, zeros | {"m": m}, 1.0).change()
    want = np.where(np.abs(units) > units[0], units, 0) * reference.f64(weight)
    support.assert_close(got, want, 4, scale=np.abs(reference.f64(weight)))
    assert not np.any(got[:, 0])


@pytest.mark.parametrize("axes", [None, Axes((), (0,), (1,))])
def test_updates_are_multiplied_in_the_precision_of_their_dtype(axes):
    """Other devices than CPUs multiply float32 in fewer digits if they may."""

    def merge(weight, adapter):
        return LowRank(weight, adapter, 1.0, axes=axes).merge()

    adapter = {"A": support.draw(12, 2), "B": support.draw(2, 4)}
    text = jax.jit(merge).lower(support.draw(12, 4), adapter).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(line.count("HIGHEST") == 2 for line in products)
