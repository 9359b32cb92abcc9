"""Labels and the mask of weight decay, on any tree that holds adapters."""

import functools
import re

import jax
import numpy as np
import optax
import pytest

from lora_jax import optim, quant
from tests import support as tolerances
from tests.optim import support

LABELS = {
    "adapters/embed/table/A": "A",
    "adapters/embed/table/B": "B",
    "adapters/layers/q/kernel/A": "A",
    "adapters/layers/q/kernel/A_bias": "bias",
    "adapters/layers/q/kernel/B": "B",
    "adapters/layers/q/kernel/B_bias": "bias",
    "adapters/layers/q/kernel/m": "magnitude",
    "head/bias": "other",
    "head/kernel": "other",
}
DECAYED = {path for path, label in LABELS.items() if label in "AB"} | {"head/kernel"}


def test_labels():
    labels = optim.adapter_labels(support.tree())
    assert support.by_path(labels) == LABELS
    assert jax.tree.structure(labels) == jax.tree.structure(support.tree())


@pytest.mark.parametrize("function", [optim.adapter_labels, optim.weight_decay_mask])
def test_shapes_gradients_and_adapters_alone(function):
    tree = support.tree()
    want = function(tree)
    assert function(jax.eval_shape(lambda: tree)) == want
    assert function(jax.grad(lambda t: optax.tree_utils.tree_sum(t))(tree)) == want
    assert function(tree["adapters"]) == want["adapters"]


def test_labels_of_patterns():
    tree = support.tree()
    patterns = {"*/B": "fast", "embed/*": "slow", re.compile("head/.*"): "head"}
    labels = support.by_path(optim.adapter_labels(tree, patterns, other="rest"))
    embed = {f"adapters/embed/table/{n}": v for n, v in {"A": "slow", "B": "fast"}.items()}
    want = LABELS | embed | {"head/bias": "head", "head/kernel": "head"}
    assert labels == want | {"adapters/layers/q/kernel/B": "fast"}
    assert optim.adapter_labels({"x": 1.0}, other="rest") == {"x": "rest"}


@pytest.mark.parametrize("gap", [None, optax.MaskedNode()], ids=["none", "masked"])
def test_gaps_stay(gap):
    tree = {"w": {"A": gap, "B": np.ones((2, 3))}, "x": gap}
    assert optim.adapter_labels(tree) == {"w": {"A": gap, "B": "B"}, "x": gap}
    assert optim.weight_decay_mask(tree) == {"w": {"A": gap, "B": True}, "x": gap}


def test_partition_takes_the_function():
    params = support.tree()
    groups = {"A": 1.0, "B": 2.0, "magnitude": 3.0, "bias": 4.0, "other": 5.0}
    optimizers = {label: optax.sgd(rate) for label, rate in groups.items()}
    optimizer = optax.partition(optimizers, optim.adapter_labels)
    ones = jax.tree.map(np.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(ones, optimizer.init(params))
    for path, update in support.by_path(updates).items():
        np.testing.assert_array_equal(update, -groups[LABELS[path]])


def test_weight_decay_mask():
    mask = support.by_path(optim.weight_decay_mask(support.tree()))
    assert {path for path, decays in mask.items() if decays is True} == DECAYED
    assert all(mask[path] is False for path in mask.keys() - DECAYED)


def test_stacked_scales_are_for_exclude():
    tree = {"norm": {"scale": np.ones((3, 8))}, "kernel": np.ones((8, 2))}
    assert optim.weight_decay_mask(tree)["norm"]["scale"] is True
    for exclude in ("norm/*", ["*scale"]):
        mask = optim.weight_decay_mask(tree, exclude)
        assert mask == {"norm": {"scale": False}, "kernel": True}


def test_a_pattern_excludes_an_adapter():
    mask = optim.weight_decay_mask(support.tree(), exclude="embed/table")
    assert mask["adapters"]["embed/table"] == {"A": False, "B": False}
    assert mask["adapters"]["layers/q/kernel"]["A"] is True


def test_a_quantized_weight_is_known_by_its_path():
    tree = {"base": {"w": quant.quantize_int8(support.draw(8, 6))}}
    labels = optim.adapter_labels(tree, {"base/w": "frozen"})["base"]["w"]
    assert (labels.codes, labels.scales) == ("frozen", "frozen")
    labels = optim.adapter_labels(tree, {"base/w/scales": "scales"})["base"]["w"]
    assert (labels.codes, labels.scales) == ("other", "scales")


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a partition"])
def test_adamw_takes_the_mask(inside):
    params, steps = support.tree(), [support.tree(seed) for seed in (2, 3)]
    mask = functools.partial(optim.weight_decay_mask, exclude="head/*")
    optimizer = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    if inside:
        groups = dict.fromkeys(("A", "B", "magnitude", "bias", "other"), optimizer)
        optimizer = optax.partition(groups, optim.adapter_labels)
    got, _ = support.run(optimizer, params, steps)
    steps = [support.by_path(step) for step in steps]
    for path, before in support.by_path(params).items():
        decay = 0.5 if LABELS[path] in "AB" else 0.0
        want = support.adamw(before, [step[path] for step in steps], [0.1] * 2, decay)
        tolerances.assert_close(support.by_path(got)[path], want, 32)
