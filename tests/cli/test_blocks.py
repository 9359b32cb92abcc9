"""Rows of a weight with their part of the adapter are a weight with an adapter."""

import numpy as np
import pytest

from lora_jax.cli import _blocks
from lora_jax.cli._blocks import Update
from lora_jax.plan.adapter_plan import Target

SIZES = {"i": 3, "o": 5, "b": 7}
RANK = 2


def make(axes, method="lora", part="", seed=0):
    sides = (tuple(i for i, own in enumerate(axes) if own == each) for each in "iob")
    shape = tuple(SIZES[letter] + i for i, letter in enumerate(axes))
    target = Target(shape, method, RANK, 0.5, 0.0, *sides, part=part)
    rng = np.random.default_rng(seed)
    adapter = {name: rng.normal(size=s) for name, s in target.adapter_shapes.items()}
    return Update("w", target, adapter)


def change(update):
    """What an adapter adds to a weight, in the layout of the weight."""
    target, adapter, own = update.target, update.adapter, update.target.alone
    order = (*own.batch_axes, *own.in_axes, *own.out_axes)
    matrix = adapter["A"] @ adapter["B"]
    if target.method == "dora":
        matrix = matrix * adapter["m"][..., None, :]
    part = matrix.reshape([own.shape[axis] for axis in order]).transpose(np.argsort(order))
    whole = np.zeros(target.shape)
    whole[eval(f"np.index_exp{target.part}") if target.part else ...] = part
    return whole


def check(updates, entries):
    """Cuts a weight, compares the blocks with the whole, and returns the blocks."""
    whole = sum(map(change, updates))
    blocks = list(_blocks.cut_rows(updates, entries))
    for block in blocks:
        own = sum(map(change, block.updates), np.zeros(()))
        rows = whole[block.start : block.stop]
        np.testing.assert_allclose(np.broadcast_to(own, rows.shape), rows)
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, len(whole))
    return blocks


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("axes", ["oi", "io", "bio", "boi", "bbio", "oii", "ooi", "iob"])
def test_blocks_are_rows_of_the_update(axes, method):
    update = make(axes, method)
    blocks = check([update], 2 * int(np.prod(update.target.shape[1:])))
    assert (len(blocks) > 1) == (not (axes[0] == "i" and method == "dora"))


# The axes of a weight, parts of it, and whether DoRA's norms need all rows of a part.
PARTS = {
    ("bio", "[2:]"): False,
    ("bio", "[1:6:2]"): False,
    ("bio", "[[0, 3, 4]]"): False,
    ("bio", "[3]", "[5]"): False,
    ("bbio", "[:3, 2]", "[4:, :, :, 1:]"): False,
    ("bio", "[:2]", "[4:, :, [0, 2]]"): False,
    ("oi", "[:2]", "[3:]"): False,
    ("ooi", "[1]", "[2:, 1:4]"): False,
    ("oio", "[::2, :, 2:]"): False,
    ("io", "[:, :2]", "[:, 4:]"): True,
    ("iob", "[:, :, 2]"): True,
}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("axes", "written"), [(axes, own) for axes, *own in PARTS])
def test_blocks_of_parts(axes, written, method):
    updates = [make(axes, method, part, i) for i, part in enumerate(written)]
    blocks = check(updates, 2 * int(np.prod(updates[0].target.shape[1:])))
    assert (len(blocks) > 1) == (not (PARTS[axes, *written] and method == "dora"))


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [(12, 5, {4}), (12, 12, {12}), (12, 100, {12}), (13, 5, {5, 3}), (3, 0, {1})],
)
def test_blocks_have_one_size_where_they_can(rows, most, sizes):
    target = Target((rows, 6), "lora", RANK, 1.0, 0.0, (1,), (0,))
    adapter = {name: np.zeros(s) for name, s in target.adapter_shapes.items()}
    blocks = _blocks.cut_rows([Update("w", target, adapter)], 6 * most)
    assert {block.stop - block.start for block in blocks} == sizes
