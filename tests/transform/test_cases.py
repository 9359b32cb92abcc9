"""Adapted and merged function agree in every case, and nothing weight-sized is formed."""

import re

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.support import x64
from tests.transform.cases import CASES
from tests.transform.support import (
    check,
    check_values,
    loss_of,
    normal,
    plan_of,
    trained,
)

METHODS = ("lora", "dora")
# Refused, see test_rules.py: DoRA would scale a sum, a fill value, inputs and outputs.
NO_DORA = {"summed", "padded", "fused_rows"}


# Of the others only the values are compared: their columns go the same ways.
DORA_GRADIENTS = {
    "matmul", "out_in", "heads", "from_heads", "experts", "ragged_dot", "fused", "scan",
    "stacked_here", "used_both_ways", "tied_head", "conv", "conv_torch", "attention",
}  # fmt: skip


def inputs(case):
    params = {name: normal(*shape, seed=7) for name, shape in case.params.items()}
    args = [normal(*a) if isinstance(a, tuple) else jnp.asarray(a) for a in case.args]
    return params, args


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_merged_function(name, method):
    if method == "dora" and name in NO_DORA:
        pytest.skip("refused: test_rules.py has the errors")
    case = CASES[name]
    with x64():
        params, args = inputs(case)
        config = {**case.config, "use_dora": method == "dora"}
        tolerance = {"cast": 1e-5}.get(name, 1e-10)
        compare = check if method == "lora" or name in DORA_GRADIENTS else check_values
        plan = compare(case.fn, params, *args, config=config, tolerance=tolerance)
    assert {path: target.axes for path, target in plan.targets.items()} == case.axes


def weight_sized(text, sizes):
    """How many arrays of those numbers of entries a compiled program makes."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?!parameter|get-tuple-element)", text)
    counts = (eval(shape.replace(",", "*")) for shape in shapes)
    return sum(count in sizes for count in counts)


@pytest.mark.parametrize("name", ["matmul"])
def test_forms_nothing_of_the_size_of_the_weight(name):
    case = CASES[name]
    with x64():
        params, args = inputs(case)
        plan = plan_of(case.fn, params, *args, **case.config)
        adapters = trained(params, plan)
        model = lora_jax.adapt(case.fn, plan)
        frozen = jax.jit(jax.grad(loss_of(case.fn), 1, has_aux=True))
        adapted = jax.jit(jax.grad(loss_of(model), (1, 2), has_aux=True))
        texts = [
            frozen.lower(params, *args).compile().as_text(),
            adapted.lower(params, adapters, *args).compile().as_text(),
        ]
    sizes = {params[path].size for path in plan.targets}
    assert weight_sized(texts[1], sizes) <= weight_sized(texts[0], sizes)
