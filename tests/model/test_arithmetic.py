"""Combined, resized, scaled and extracted adapters, against dense float64 arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraConfig
from lora_jax.layers import combinations
from tests import reference, support
from tests.model.support import make_params
from tests.support import assert_close, assert_same_bits, best, straight

RNG = np.random.default_rng(0)
AXES = {"stack": "bio"}
PARAMS = {
    "w": support.draw(12, 9),
    "stack": support.draw(3, 12, 9),
    "bias": support.draw(9),
    "norm": support.draw(9, seed=1),
}
KEY = jax.random.key(0)


def make_plan(rank, alpha, targets=("w", "stack"), **fields):
    axes = AXES if any("stack" in target for target in targets) else {}
    return lora_jax.plan_adapters(
        LoraConfig(rank, alpha, targets, axes=axes, **fields), PARAMS
    )


def fill(plan, seed, dtype="float32"):
    """Random adapters of a plan, with no entry zero."""
    return {
        path: {
            name: support.draw(*shape, seed=seed, dtype=dtype)
            + jnp.asarray(4.0 * (name == "m"), dtype)
            for name, shape in entry.adapter_shapes.items()
        }
        for path, entry in plan.entries.items()
    }


def change(adapters, plan, params=PARAMS):
    """What a merge adds to each leaf, in float64, weights as `(*batch, in, out)`."""
    changes = {}
    for path, target in plan.targets.items():
        own = reference.f64(adapters[path])
        if target.method == "dora":
            weight = straight(params[path], target)
            changes[path] = reference.dora_weight(weight, own, target.scale) - weight
        else:
            changes[path] = target.scale * own["A"] @ own["B"]
    for path in plan.trained:
        changes[path] = reference.f64(adapters[path]["value"]) - reference.f64(params[path])
    return changes


def assert_agrees(plan, params=PARAMS):
    """The config of a plan makes this plan, and `A` and `B` fit it."""
    again = lora_jax.plan_adapters(plan.config, params)
    assert again == plan


def assert_changes(made, want, ulps=64, params=PARAMS, rank=None):
    got = change(made.adapters, made.plan, params)
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert_close(got[path], value, ulps, "float32", scale=max(1.0, np.abs(value).max()))


def singular_values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


PLANS = {
    "plain": make_plan(4, 3.0),
    "stabilized": make_plan(2, 5.0, rank_stabilized=True),
    "negative": make_plan(3, -2.0, ("w",), dropout=0.25),
    "trains": make_plan(2, 1.0, ("stack",), train="bias"),
    "dora": make_plan(2, 1.0, use_dora=True),
}
FILLED = {name: fill(plan, i) for i, (name, plan) in enumerate(PLANS.items())}
MIXTURES = {
    "all alike": {"plain": 0.5, "stabilized": -1.5},
    "targets differ": {"plain": 0.5, "negative": 2.0, "trains": -0.3, "stabilized": 0.0},
    "dora": {"dora": 1.5, "plain": -0.5, "trains": 0.4},
}


def combine(mixture, *args, **options):
    adapters, plans = ([table[name] for name in mixture] for table in (FILLED, PLANS))
    return lora_jax.combine_adapters(
        adapters, plans, list(mixture.values()), *args, **options
    )


def weighted_sum(mixture):
    total = {}
    for name, weight in mixture.items():
        for path, value in change(FILLED[name], PLANS[name]).items():
            total[path] = total.get(path, 0.0) + weight * value
    return total


@pytest.mark.parametrize("method", ["exact", "svd"])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_sum_is_exact_where_the_rank_allows(mixture, method):
    options = {} if method == "exact" else {"rank": 9}
    made = combine(mixture, method, params=PARAMS, **options)
    assert_changes(made, weighted_sum(mixture))
    assert_agrees(made.plan)
    assert made.energy == dict.fromkeys(made.plan.targets, 1.0)
    # A merge of one after the other is the same, without DoRA.
    reverse = dict(reversed(mixture.items()))
    again = combine(reverse, method, params=PARAMS, **options)
    assert again.plan.targets == made.plan.targets
    assert_changes(again, change(made.adapters, made.plan), 128)


def test_the_rank_is_the_sum_of_those_that_take_part():
    made = combine(MIXTURES["targets differ"], params=PARAMS)
    ranks = {path: target.rank for path, target in made.plan.targets.items()}
    assert ranks == {"w": 7, "stack": 6}
    assert {own.dropout for own in made.plan.targets.values()} == {0.0}
    same = lora_jax.combine_adapters([FILLED["plain"]] * 2, PLANS["plain"])
    assert same.plan.targets["w"] == dataclasses.replace(
        PLANS["plain"].targets["w"], rank=8
    )


@pytest.mark.parametrize("name", ["plain", "stabilized", "dora", "trains"])
def test_one_adapter_with_the_weight_1_is_itself(name):
    made = combine({name: 1.0}, params=PARAMS if name == "dora" else None)
    assert made.plan == PLANS[name]
    jax.tree.map(assert_same_bits, made.adapters, FILLED[name])
    for method in {*combinations.METHODS} - {"exact"}:
        if name == "plain":
            options = {"density": 1.0} if method in combinations.NEED_DENSITY else {}
            options |= {"key": KEY} if method in combinations.NEED_KEY else {}
            own = combine({name: 1.0}, method, **options)
            assert_changes(own, change(FILLED[name], PLANS[name]))
            assert min(own.energy.values()) > 1 - 1e-6


def test_weights_of_zero_leave_a_zero_update():
    made = combine({"plain": 0.0, "stabilized": 0.0})
    assert_agrees(made.plan)
    for path, adapter in made.adapters.items():
        assert not np.any(adapter["B"])
        assert_same_bits(adapter["A"], FILLED["plain"][path]["A"])


def test_svd_keeps_the_largest_singular_values_and_says_what_it_keeps():
    mixture = MIXTURES["all alike"]
    made, want = combine(mixture, "svd", rank=3), weighted_sum(mixture)
    got = change(made.adapters, made.plan)
    for path, value in want.items():
        s = singular_values(value)
        assert_close(singular_values(got[path])[..., :3], s[..., :3], 64, "float32")
        assert_close(got[path], best(value, 3), 256, "float32", scale=np.abs(value).max())
        share = (s[..., :3] ** 2).sum() / (s**2).sum()
        assert made.energy[path] == pytest.approx(share, rel=1e-5)
        norms = [
            np.linalg.norm(made.adapters[path][n], axis=i)
            for n, i in (("A", -2), ("B", -1))
        ]
        assert_close(norms[0], norms[1], 64, "float32")
    assert_agrees(made.plan)
    default = combine(mixture, "svd").plan
    assert {own.rank for own in default.targets.values()} == {4}


@pytest.mark.parametrize("name", ["plain", "stabilized", "dora"])
def test_resize(name):
    adapters, plan = FILLED[name], PLANS[name]
    same = lora_jax.resize_adapters(adapters, plan, rank=8, params=PARAMS)
    assert same.plan == plan
    assert {*same.energy.values()} == {1.0}
    jax.tree.map(assert_same_bits, same.adapters, adapters)
    full = lora_jax.resize_adapters(adapters, plan, energy=1.0, params=PARAMS)
    assert full.plan == plan
    made = lora_jax.resize_adapters(adapters, plan, rank=1, params=PARAMS)
    assert_agrees(made.plan)
    got, want = change(made.adapters, made.plan), change(adapters, plan)
    for path, target in plan.targets.items():
        assert made.plan.targets[path].rank == 1
        assert made.plan.scales[path] == pytest.approx(target.scale, rel=1e-12)
        value, result = want[path], got[path]
        if name == "dora":  # the low-rank part of the merged weight
            own, weight = reference.f64(adapters[path]), straight(PARAMS[path], target)
            norm = reference.norms(reference.lora_weight(weight, own, target.scale), "out")
            scaled = weight * ((own["m"] / norm)[..., None, :] - 1)
            value, result = value - scaled, result - scaled
        assert_close(result, best(value, 1), 256, "float32", scale=np.abs(value).max())
        s = singular_values(value)
        share = (s[..., 0] ** 2).sum() / (s**2).sum()
        assert made.energy[path] == pytest.approx(share, rel=1e-5)
        few = lora_jax.resize_adapters(adapters, plan, energy=0.99 * share, params=PARAMS)
        assert few.plan.targets[path].rank == 1
        more = lora_jax.resize_adapters(adapters, plan, energy=1.01 * share, params=PARAMS)
        assert more.plan.targets[path].rank == 2


@pytest.mark.parametrize("factor", [2.5, -1.0, 0.0])
def test_scale(factor):
    adapters, plan = FILLED["stabilized"], PLANS["stabilized"]
    made = lora_jax.scale_adapters(adapters, plan, factor)
    want = {path: factor * value for path, value in change(adapters, plan).items()}
    assert_changes(made, want)
    assert_agrees(made.plan)
    for path in plan.targets:
        assert made.adapters[path]["A"] is adapters[path]["A"]


def test_extract_of_a_merge_gives_the_update_back():
    tuned = lora_jax.merge_adapters(PARAMS, FILLED["trains"], PLANS["trains"])
    tuned["norm"] = tuned["norm"].at[2].set(7.0)
    made = lora_jax.extract_adapters(PARAMS, tuned, PLANS["trains"])
    assert made.plan == PLANS["trains"]
    assert_changes(made, change(FILLED["trains"], PLANS["trains"]), 256)
    assert list(made.changed) == ["norm"]
    assert made.changed["norm"] is tuned["norm"]
    assert made.energy["stack"] == pytest.approx(1.0, abs=1e-9)
    full = lora_jax.extract_adapters(PARAMS, tuned, PLANS["plain"], energy=0.9999999)
    assert [full.plan.targets[path].rank for path in ("stack", "w")] == [2, 1]
    assert_agrees(full.plan)
    assert {*full.changed} == {"norm", "bias"}
    one = lora_jax.extract_adapters(PARAMS, tuned, PLANS["plain"], rank=1)
    difference = reference.f64(tuned["stack"]) - reference.f64(PARAMS["stack"])
    s = singular_values(difference)
    share = (s[..., 0] ** 2).sum() / (s**2).sum()
    assert one.energy["stack"] == pytest.approx(share, rel=1e-5)


def test_parts_and_layouts():
    names = ("q", "o", "turned", "mixed")
    params, plan = make_params(RNG, names, "bfloat16")
    whole = [fill(plan, seed) for seed in (1, 2)]
    made = lora_jax.combine_adapters(whole, plan, [1.0, -2.0], "svd", rank=8)
    assert_agrees(made.plan, params)
    merged = lora_jax.merge_adapters(params, made.adapters, made.plan)
    again = lora_jax.extract_adapters(params, merged, plan, rank=12)
    for path, target in plan.targets.items():
        got = change(again.adapters, again.plan)[path]
        moved = straight(merged["block"][path[6:]], target)
        assert_close(
            got,
            moved - straight(params["block"][path[6:]], target),
            64,
            "float32",
            scale=8.0,
        )
    cut = LoraConfig(
        4, 3.0, ("stack[1:]", "w[:,:4]"), rank_pattern={"stack[1]": 2}, axes=AXES
    )
    plan = lora_jax.plan_adapters(cut, PARAMS)
    other = make_plan(2, 3.0, ("stack[0]", "w[:,:4]"))
    made = lora_jax.combine_adapters([fill(plan, 1), fill(other, 2)], [plan, other])
    assert_agrees(made.plan)
    ranks = {path: own.rank for path, own in made.plan.targets.items()}
    assert ranks == {"stack[0]": 2, "stack[1:2]": 2, "stack[2:]": 4, "w[:,:4]": 6}
    small = lora_jax.resize_adapters(made.adapters, made.plan, rank=2)
    assert_agrees(small.plan)
    tuned = lora_jax.merge_adapters(PARAMS, fill(other, 2), other)
    made = lora_jax.extract_adapters(PARAMS, tuned, other)
    assert_changes(made, change(fill(other, 2), other), 256)
    tuned["w"] = tuned["w"].at[0, 8].set(1.0)
    with pytest.raises(
        ValueError, match="at 'w': the weight has changed outside of the parts"
    ):
        lora_jax.extract_adapters(PARAMS, tuned, other)
