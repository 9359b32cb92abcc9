"""Rows of a weight with their part of the adapter are a weight with an adapter."""

import numpy as np
import pytest

from lora_jax.cli import _blocks
from lora_jax.plan.adapter_plan import Target

SIZES = {"i": 3, "o": 5, "b": 7}
RANK = 2


def make(axes, method="lora"):
    groups = {
        letter: tuple(i for i, own in enumerate(axes) if own == letter) for letter in "iob"
    }
    shape = tuple(SIZES[letter] + i for i, letter in enumerate(axes))
    target = Target(shape, method, RANK, 0.5, 0.0, groups["i"], groups["o"], groups["b"])
    rng = np.random.default_rng(0)
    return target, {name: rng.normal(size=s) for name, s in target.adapter_shapes.items()}


def update(target, adapter):
    """What an adapter adds to a weight, in the layout of the weight."""
    order = (*target.batch_axes, *target.in_axes, *target.out_axes)
    matrix = adapter["A"] @ adapter["B"]
    if target.method == "dora":
        matrix = matrix * adapter["m"][..., None, :]
    return matrix.reshape([target.shape[axis] for axis in order]).transpose(
        np.argsort(order)
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("axes", ["oi", "io", "bio", "boi", "bbio", "oii", "ooi", "iob"])
def test_blocks_are_rows_of_the_update(axes, method):
    target, adapter = make(axes, method)
    whole = update(target, adapter)
    blocks = list(_blocks.cut_rows(target, adapter, 2 * whole[0].size))
    splits = not (axes[0] == "i" and method == "dora")
    assert (len(blocks) > 1) == splits
    for block in blocks:
        own = update(block.target, block.adapter)
        np.testing.assert_allclose(own, whole[block.start : block.stop])
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, len(whole))


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [(12, 5, {4}), (12, 12, {12}), (12, 100, {12}), (13, 5, {5, 3}), (3, 0, {1})],
)
def test_blocks_have_one_size_where_they_can(rows, most, sizes):
    target = Target((rows, 6), "lora", RANK, 1.0, 0.0, (1,), (0,))
    adapter = {name: np.zeros(s) for name, s in target.adapter_shapes.items()}
    blocks = _blocks.cut_rows(target, adapter, 6 * most)
    assert {block.stop - block.start for block in blocks} == sizes
