"""Models on quantized weights do what the dequantized models do."""

import dataclasses
import functools
import logging
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax import quant
from tests import reference, support
from tests.qlora.support import (
    EVERY_FORMAT,
    FORMATS,
    KEY,
    dequantized,
    matrix_plan,
    slowly,
    train,
)
from tests.support import normal
from tests.transform.support import assert_same


class Block(NamedTuple):
    """Weights of the most different kinds, and what is none."""

    up: Any
    down: Any
    scale: Any
    name: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    block: Block
    stack: Any
    head: Any
    depth: int


def model(params, x):
    assert (params.block.name, params.depth) == ("first", 3)
    h = jnp.tanh(x @ params.block.up) * params.block.scale[None]
    h = h @ params.block.down.T
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params.stack)[0]
    return h @ params.head


def make_model(name="nf4", dtype="float32"):
    """Quantized params, an input, and adapters (of DoRA) in which nothing is zero."""
    draw = lambda *shape: support.asarray(normal(*shape) / 3, dtype)  # noqa: E731
    q = FORMATS[name]
    block = Block(q(draw(12, 10)), q(draw(20, 10)), draw(10), "first")
    stack = q(draw(3, 20, 20), batch_axes=1)
    params = Model(block, stack, draw(20, 7), 3)
    return params, draw(5, 12)


def plan_model(params, x, **config):
    config = {"rank": 2, "alpha": 3.0, "use_dora": True} | config
    return lora_jax.plan_adapters(lora_jax.LoraConfig(**config), params, model, x)


@pytest.mark.parametrize(
    ("name", "use_dora"),
    slowly([("int8", False)], [(x, y) for x in FORMATS for y in (False, True)]),
)
def test_a_model_of_all_kinds_of_leaves(name, use_dora):
    stored, x = make_model(name)
    plan = plan_model(stored, x, use_dora=use_dora)
    assert set(plan.targets) == {"block/up", "block/down", "stack", "head"}
    adapters = train(stored, plan)
    adapted = lora_jax.adapt(model, plan)

    def loss(adapters, x, params):
        return jnp.sum(jnp.sin(adapted(params, adapters, x)))

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    got = jax.jit(lambda a, x: grad(a, x, stored))(adapters, x)
    want = jax.jit(lambda a, x: grad(a, x, dequantized(stored)))(adapters, x)
    assert_same(got, want, 1e-5)


def test_plans_and_counts_of_abstract_params():
    stored, x = make_model()
    dense = dequantized(stored)
    arrays = lambda p: (p.block.up, p.block.down, p.block.scale, p.stack, p.head)  # noqa: E731

    def quantize(up, down, scale, stack, head):
        q = FORMATS["nf4"]
        return q(up), q(down), scale, q(stack, batch_axes=1), head

    up, down, scale, stack, head = jax.eval_shape(quantize, *arrays(dense))
    abstract = Model(Block(up, down, scale, "first"), stack, head, 3)
    plan = plan_model(stored, x)
    assert plan == plan_model(dense, x) == plan_model(abstract, x)
    counts = {lora_jax.count_parameters(p, plan) for p in (stored, dense, abstract)}
    assert counts == {(plan.parameters, plan.parameters + 120 + 200 + 10 + 1200 + 140)}
    lora = plan_model(abstract, x, use_dora=False)
    made = lora_jax.init_adapters(KEY, abstract, lora)
    assert_same(made, lora_jax.init_adapters(KEY, dense, lora), 0)


@EVERY_FORMAT
def test_first_adapters_are_those_of_the_dequantized_weights(name):
    stored, x = make_model(name)
    plan = plan_model(stored, x)
    adapters = lora_jax.init_adapters(KEY, stored, plan)
    assert_same(adapters, lora_jax.init_adapters(KEY, dequantized(stored), plan), 1e-6)
    only = {"w": stored.stack}
    plan = lora_jax.plan_adapters(
        lora_jax.LoraConfig(rank=2, use_dora=True, axes={"w": "bio"}), only
    )
    made = jax.eval_shape(lambda p: lora_jax.init_adapters(KEY, p, plan), only)
    shapes = {name: leaf.shape for name, leaf in made["w"].items()}
    assert shapes == {"A": (3, 20, 2), "B": (3, 2, 20), "m": (3, 20)}


def matrices(params, plan, adapters):
    """By path: the weight as `(*batch, in, out)`, the adapter and its scale, in float64."""
    dense = dequantized(params)
    leaves = {"block/up": dense.block.up, "block/down": dense.block.down.T}
    leaves |= {"stack": dense.stack, "head": dense.head}
    return {
        path: (reference.f64(leaves[path]), reference.f64(adapters[path]), target.scale)
        for path, target in plan.targets.items()
    }


@pytest.mark.parametrize("use_dora", slowly([False], [False, True]))
def test_a_merged_model_is_dense_and_unmerges(use_dora):
    stored, x = make_model()
    plan = plan_model(stored, x, use_dora=use_dora)
    adapters = train(stored, plan)
    merged = lora_jax.merge_adapters(stored, adapters, plan)
    leaves = jax.tree.leaves(merged, is_leaf=quant.is_quantized)
    assert not any(map(quant.is_quantized, leaves))
    fold = reference.dora_weight if use_dora else reference.lora_weight
    found = matrices(merged, plan, adapters)
    for path, args in matrices(stored, plan, adapters).items():
        support.assert_close(found[path][0], fold(*args), 64, "float32")
    norms = None
    if use_dora:
        norms = lora_jax.adapted_column_norms(stored, adapters, plan)
    back = lora_jax.unmerge_adapters(merged, adapters, plan, column_norms=norms)
    restored = matrices(back, plan, adapters)
    for path, (weight, *_) in matrices(stored, plan, adapters).items():
        support.assert_close(restored[path][0], weight, 256, "float32")


@pytest.mark.parametrize("name", slowly(["int8"], ["nf4", "int8"]))
def test_merging_into_the_same_bits_again(name, caplog):
    stored, x = make_model(name)
    plan = plan_model(stored, x)
    adapters = train(stored, plan)
    dense = lora_jax.merge_adapters(stored, adapters, plan)
    merge = functools.partial(lora_jax.merge_adapters, requantize=True)
    with caplog.at_level(logging.INFO, "lora_jax"):
        again = merge(stored, adapters, plan)
    assert jax.tree.structure(again) == jax.tree.structure(stored)  # with all settings
    assert not quant.is_quantized(again.head)
    for got, old, new in (
        (again.stack, stored.stack, dense.stack),
        (again.block.down, stored.block.down, dense.block.down),
    ):
        want = FORMATS[name](new, batch_axes=old.batch_ndim)
        assert_same(quant.dequantize(got), quant.dequantize(want), 0)
        update = np.linalg.norm(reference.f64(new) - reference.f64(quant.dequantize(old)))
        lost = np.linalg.norm(reference.f64(new) - reference.f64(quant.dequantize(got)))
        path = "stack" if old is stored.stack else "block/down"
        (line,) = [r.getMessage() for r in caplog.records if f" {path}," in r.getMessage()]
        assert float(re.search(r"\|update\| = (\S+)$", line)[1]) == pytest.approx(
            lost / update, rel=5e-3
        )
    caplog.clear()
    with caplog.at_level(logging.INFO, "lora_jax"):
        up = {"up": stored.block.up}
        plan = matrix_plan(up)
        adapters = train(up, plan)
        traced = jax.jit(merge)(up, adapters, plan)
    assert not caplog.records
    want = merge(up, adapters, plan)
    assert jax.tree.structure(traced) == jax.tree.structure(want)
    assert_same(dequantized(traced), dequantized(want), 0.2)


@pytest.mark.parametrize(
    ("name", "use_dora"),
    slowly([("int8", False)], [(x, y) for x in FORMATS for y in (False, True)]),
)
def test_merge_losses_of_requantized_weights(name, use_dora):
    stored, x = make_model(name)
    plan = plan_model(stored, x, use_dora=use_dora)
    adapters = train(stored, plan)
    small = 1e-3 * adapters["block/up"]["A"][:1]  # of one input, so that scales stay
    adapters["block/up"]["A"] = jnp.zeros((12, 2)).at[:1].set(small)
    losses = lora_jax.merge_losses(stored, adapters, plan, requantize=True)
    again = lora_jax.merge_adapters(stored, adapters, plan, requantize=True)
    fold = reference.dora_weight if use_dora else reference.lora_weight
    merged = matrices(again, plan, adapters)
    for path, args in matrices(stored, plan, adapters).items():
        if path == "head":  # dense: tests/model/test_merging.py
            continue
        weight, update = args[0], fold(*args) - args[0]
        vanished = (np.abs(update) > 0) & (merged[path][0] == weight)
        ratio = np.abs(update) / np.where(weight == 0, 1, np.abs(weight))
        error = np.linalg.norm(merged[path][0] - weight - update)
        got = losses[path]
        if path == "block/up" and name in ("int8", "fp8") and not use_dora:
            assert vanished.any()
        assert float(got.vanished) == pytest.approx(vanished.mean(), abs=1e-6)
        assert float(got.largest_vanished) == pytest.approx(
            ratio[vanished].max(initial=0), rel=1e-3
        )
        want = error / np.linalg.norm(update)
        assert float(got.relative_error) == pytest.approx(want, rel=1e-3, abs=1e-6)
    dense = lora_jax.merge_losses(stored, adapters, plan)
    assert all(float(loss.relative_error) < 1e-3 for loss in dense.values())
