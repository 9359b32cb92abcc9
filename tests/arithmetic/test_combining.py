"""Combined, resized, scaled and extracted adapters, against dense float64 arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig
from lora_jax.layers import combinations
from lora_jax.plan import parts
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
            name: support.asarray(
                support.normal(*shape, seed=seed) + 4.0 * (name == "m"), dtype
            )
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
            weight = parts.take(params[plan.leaf(path)], target.part)
            weight = straight(weight, target.alone)
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
    "one of weight 0": {"dora": 0.5, "plain": 0.0},
}


def combine(mixture, *args, function=lora_jax.combine_adapters, **options):
    adapters, plans = ([table[name] for name in mixture] for table in (FILLED, PLANS))
    return function(adapters, plans, list(mixture.values()), *args, **options)


def in_one_program(adapters, plans, *args, **options):
    """`combine_adapters` in a trace."""

    def combined(adapters):
        return lora_jax.combine_adapters(adapters, plans, *args, **options)

    return jax.device_get(jax.jit(combined)(adapters))


def weighted_sum(mixture):
    total = {}
    for name, weight in mixture.items():
        for path, value in change(FILLED[name], PLANS[name]).items():
            total[path] = total.get(path, 0.0) + weight * value
    return total


@pytest.mark.parametrize("method", ["exact", "svd"])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_sum_is_exact_where_the_rank_allows(mixture, method):
    options = {"function": in_one_program} | ({"rank": 9} if method == "svd" else {})
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


@pytest.mark.parametrize("name", ["plain", "stabilized", "negative", "dora", "trains"])
def test_one_adapter_with_the_weight_1_is_itself(name):
    made = combine({name: 1.0}, params=PARAMS if name == "dora" else None)
    assert made.plan == PLANS[name]
    jax.tree.map(assert_same_bits, made.adapters, FILLED[name])
    for method in {*combinations.METHODS} - {"exact"}:
        if name == "negative":
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


@pytest.mark.parametrize(("rank", "init"), [(2, "orthogonal"), (3, "kaiming_uniform")])
def test_the_config_of_an_odd_rank_has_an_initializer_for_it(rank, init):
    plan = make_plan(4, 3.0, "w", init="orthogonal")
    made = lora_jax.resize_adapters({"w": FILLED["plain"]["w"]}, plan, rank=rank)
    assert made.plan.config.init == init
    assert_agrees(made.plan)


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
    rest = {"key": KEY, "step": 3, "scale": support.asarray([np.nan, 2.0], "bfloat16")}
    rest |= {"rate": float("0.5"), "count": np.asarray([2**60])}
    again = rest | {"key": jax.random.key(0), "scale": rest["scale"].astype("float32")}
    again |= {"rate": float("0.5"), "count": rest["count"] + 1}
    made = lora_jax.extract_adapters(PARAMS | rest, tuned | again, PLANS["trains"])
    assert made.plan == PLANS["trains"]
    assert_changes(made, change(FILLED["trains"], PLANS["trains"]), 256)
    assert made.changed.keys() == {"norm", "count"}
    assert made.changed["norm"] is tuned["norm"]
    assert made.energy["stack"] == pytest.approx(1.0, abs=1e-9)
    full = lora_jax.extract_adapters(PARAMS, tuned, PLANS["plain"], energy=0.9999999)
    assert [full.plan.targets[path].rank for path in ("stack", "w")] == [2, 1]
    assert_agrees(full.plan)
    assert {*full.changed} == {"norm", "bias"}
    half = make_plan(4, 3.0, dtype="bfloat16")
    one = lora_jax.extract_adapters(PARAMS, tuned, half, rank=1)
    assert {x.dtype for x in jax.tree.leaves(one.adapters)} == {jnp.dtype("bfloat16")}
    difference = reference.f64(tuned["stack"]) - reference.f64(PARAMS["stack"])
    s = singular_values(difference)
    share = (s[..., 0] ** 2).sum() / (s**2).sum()
    assert one.energy["stack"] == pytest.approx(share, rel=1e-5)


def test_ranks_are_logged(caplog):
    plan, adapters = make_plan(4, 3.0, "w"), {"w": FILLED["plain"]["w"]}
    with caplog.at_level("INFO", "lora_jax"):
        lora_jax.combine_adapters([adapters], plan)
        lora_jax.resize_adapters(adapters, plan, rank=4)
        lora_jax.extract_adapters(PARAMS, PARAMS, plan)
    assert caplog.messages == [
        f"w: {what} with the rank 4" for what in ("combined", "resized", "extracted")
    ]


def test_parts_and_layouts():
    names = ("q", "o", "turned", "mixed")
    params, plan = make_params(RNG, names, "bfloat16")
    whole = [fill(plan, seed) for seed in (1, 2)]
    made = in_one_program(whole, plan, [1.0, -2.0], "svd", rank=8)
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
    made = in_one_program([fill(plan, 1), fill(other, 2)], [plan, other])
    assert_agrees(made.plan)
    ranks = {path: own.rank for path, own in made.plan.targets.items()}
    assert ranks == {"stack[0]": 2, "stack[1:2]": 2, "stack[2:]": 4, "w[:,:4]": 6}
    small = lora_jax.resize_adapters(made.adapters, made.plan, rank=2)
    assert_agrees(small.plan)
    to_plain = jax.jit(lora_jax.to_plain_adapters)
    assert_agrees(to_plain(made.adapters, made.adapters, made.plan)[1])
    tuned = jax.jit(lora_jax.merge_adapters)(PARAMS, fill(other, 2), other)
    made = lora_jax.extract_adapters(PARAMS, tuned, other)
    assert_changes(made, change(fill(other, 2), other), 256)
    tuned["w"] = tuned["w"].at[0, 8].set(1.0)
    with pytest.raises(
        ValueError, match="at 'w': the weight has changed outside of the parts"
    ):
        lora_jax.extract_adapters(PARAMS, tuned, other)


def test_uses_of_a_tied_table():
    params, ids = {"table": support.draw(20, 6)}, support.asarray([3, 1])

    def apply(params, ids):
        return params["table"][ids] @ params["table"].T

    plans = [
        lora_jax.plan_adapters(LoraConfig(rank, 3.0, targets), params, apply, ids)
        for rank, targets in ((2, "table@lookup"), (4, ("table@lookup", "table@product")))
    ]
    adapters = [fill(plan, seed) for seed, plan in enumerate(plans)]
    made = in_one_program(adapters, plans)
    again = lora_jax.plan_adapters(made.plan.config, params, apply, ids)
    assert again == made.plan
    want, more = (change(*pair, params) for pair in zip(adapters, plans, strict=True))
    want = more | {path: value + more[path] for path, value in want.items()}
    assert_changes(made, want, params=params)
    cut = lora_jax.plan_adapters(LoraConfig(2, 3.0, "table[:9]@lookup"), params, apply, ids)
    first, other = adapters[0], fill(cut, 2)  # parts of one use that overlap
    made = in_one_program([first, other], [plans[0], cut])
    want = change(first, plans[0], params)
    want["table@lookup"][:9] += change(other, cut, params)["table[:9]@lookup"]
    assert_changes(made, want, params=params)
    with pytest.raises(ValueError, match="'table@lookup' adapts one use of 'table' alone"):
        lora_jax.extract_adapters(params, params, plans[0])


def test_quantized_weights():
    params = {"w": lora_jax.quant.quantize_int8(PARAMS["w"])}
    dense = {"w": lora_jax.quant.dequantize(params["w"])}
    plan = lora_jax.plan_adapters(LoraConfig(2, use_dora=True), params)
    adapters = [fill(plan, seed) for seed in (1, 2)]
    made = lora_jax.combine_adapters(adapters, plan, [0.5, -0.5], params=params)
    first, second = (change(own, plan, dense)["w"] for own in adapters)
    assert_changes(made, {"w": 0.5 * (first - second)}, params=dense)
    lora = lora_jax.plan_adapters(LoraConfig(9), params)
    lost = lora_jax.extract_adapters(params, {"w": PARAMS["w"]}, lora)
    want = reference.f64(PARAMS["w"]) - reference.f64(dense["w"])
    assert_changes(lost, {"w": want}, params=dense)


def test_parts_that_overlap_become_the_weight():
    cut = LoraConfig(2, 3.0, "stack", rank_pattern={"stack[0]": 1}, axes=AXES)
    plans = [lora_jax.plan_adapters(cut, PARAMS), LORA, OTHER]
    adapters = [fill(plan, seed) for seed, plan in enumerate(plans)]
    made = in_one_program(adapters, plans, [1.0, -0.5, 2.0])
    assert_agrees(made.plan)
    assert {path: own.rank for path, own in made.plan.targets.items()} == {
        "stack": 9,
        "w": 4,
    }
    changes = [change(*pair) for pair in zip(adapters, plans, strict=True)]
    want = {path: -0.5 * value for path, value in changes[1].items()}
    want["stack"][:1] += changes[0]["stack[:1]"]
    want["stack"][1:] += changes[0]["stack[1:]"] + 2.0 * changes[2]["stack[1:]"]
    assert_changes(made, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes(kind):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(kind,) * 2)
    params = {"w": support.draw(3, 16, 8)}
    placed = jax.device_put(params, NamedSharding(mesh, P(None, "fsdp", "tp")))
    which = {"targets": "w[:,:,:4]", "axes": {"w": "bio"}}  # a part that is split
    config = LoraConfig(2, use_dora=True, **which)
    plan = lora_jax.plan_adapters(config, placed)
    places = lora_jax.adapter_shardings(placed, plan)
    host = [fill(plan, seed) for seed in (1, 2)]
    on_mesh = [jax.tree.map(jax.device_put, own, places) for own in host]
    want = in_one_program(host, plan, method="svd", params=params)
    made = lora_jax.combine_adapters(on_mesh, plan, method="svd", params=placed)
    assert jax.tree.map(lambda x: x.sharding, made.adapters) == places
    assert_changes(made, change(want.adapters, want.plan, params), 256, params)
    lora = lora_jax.plan_adapters(LoraConfig(8, **which), placed)
    tuned = lora_jax.merge_adapters(placed, on_mesh[0], plan)
    made = lora_jax.extract_adapters(placed, tuned, lora)
    assert_changes(made, change(host[0], plan, params), 256, params)
    (path,) = plan.targets
    assert made.adapters[path]["B"].sharding == places[path]["B"]


def test_under_jit():
    adapters, plans = zip(*((FILLED[n], PLANS[n]) for n in ("plain", "dora")), strict=True)

    @jax.jit
    def run(adapters, params):
        made = lora_jax.combine_adapters(
            adapters, plans, [0.5, 2.0], "svd", rank=5, params=params
        )
        small = lora_jax.resize_adapters(made.adapters, made.plan, rank=2, params=params)
        return made._replace(plan=None), small._replace(plan=None)

    outside = lora_jax.combine_adapters(
        adapters, plans, [0.5, 2.0], "svd", rank=5, params=PARAMS
    )
    made, _ = run(adapters, PARAMS)
    assert_changes(made._replace(plan=outside.plan), change(outside.adapters, outside.plan))
    assert made.energy["w"] == pytest.approx(outside.energy["w"], rel=1e-5)
    with pytest.raises(TypeError, match="the rank would depend on values"):
        jax.jit(lambda x: lora_jax.resize_adapters(x, plans[0], energy=0.5).adapters)(
            adapters[0]
        )


PLAIN, LORA = (FILLED["plain"], PLANS["plain"]), PLANS["plain"]
OTHER = make_plan(2, 1.0, ("stack[1:]",))
SCALED = make_plan(2, 1.0, ("stack[1:]",), use_dora=True)
TURNED = lora_jax.plan_adapters(LoraConfig(4, 3.0, "w", axes={"w": "oi"}), PARAMS)
REFUSED = {
    "no list": (PLAIN[0], LORA, {}, TypeError, "list or tuple with the adapters of each"),
    "none": ([], LORA, {}, ValueError, "adapters is empty"),
    "a base of its own": (
        [lora_jax.Decomposed(PARAMS, PLAIN[0])],
        LORA,
        {},
        TypeError,
        "convert them with to_plain_adapters",
    ),
    "weights": ([PLAIN[0]], LORA, {"weights": [1, 2]}, ValueError, "one weight for each"),
    "a weight": ([PLAIN[0]], LORA, {"weights": ["1"]}, TypeError, r"weights\[0\] must be"),
    "one number": ([PLAIN[0]], LORA, {"weights": 0.5}, TypeError, "must be a list of num"),
    "infinite": ([PLAIN[0]], LORA, {"weights": [np.inf]}, ValueError, "must be finite"),
    "method": ([PLAIN[0]], LORA, {"method": "tie"}, ValueError, "Did you mean 'ties'"),
    "rank": ([PLAIN[0]], LORA, {"rank": 2}, ValueError, "'exact' does not use rank"),
    "energy": (
        [PLAIN[0]],
        LORA,
        {"method": "svd", "energy": 1.5},
        ValueError,
        "energy must be above 0 and at most 1, got 1.5",
    ),
    "share of 0": (
        [PLAIN[0]],
        LORA,
        {"method": "ties", "density": 0.0},
        ValueError,
        "density must be above 0 and at most 1, got 0",
    ),
    "no density": ([PLAIN[0]], LORA, {"method": "ties"}, ValueError, "needs density"),
    "density": ([PLAIN[0]], LORA, {"density": 0.5}, ValueError, "does not use density"),
    "no key": (
        [PLAIN[0]],
        LORA,
        {"method": "dare_ties", "density": 0.5},
        ValueError,
        "needs key",
    ),
    "majority": (
        [PLAIN[0]],
        LORA,
        {"majority_sign": "frequency"},
        ValueError,
        "does not use majority_sign",
    ),
    "DoRA": (
        [FILLED["dora"]],
        PLANS["dora"],
        {"method": "linear"},
        ValueError,
        "'linear' is for LoRA, and 'stack', 'w' have DoRA",
    ),
    "DoRA without params": (
        [FILLED["dora"]],
        PLANS["dora"],
        {"weights": [0.5]},
        ValueError,
        "have DoRA, whose column norms need the weights",
    ),
    "trained leaf": (
        [FILLED["trains"]],
        PLANS["trains"],
        {"weights": [0.5]},
        ValueError,
        "at 'bias': the weights of a trained leaf add up to 0.5",
    ),
    "ranks": (
        [PLAIN[0], FILLED["stabilized"]],
        [LORA, PLANS["stabilized"]],
        {"method": "linear"},
        ValueError,
        "'linear' adds factors, which needs one rank, and the ranks are 4, 2",
    ),
    "overlap": (
        [FILLED["dora"], fill(OTHER, 1)],
        [PLANS["dora"], OTHER],
        {"params": PARAMS},
        ValueError,
        "'stack' and 'stack\\[1:\\]' overlap",
    ),
    "overlap with DoRA, before LoRA of the same part": (
        [PLAIN[0], fill(SCALED, 1), fill(OTHER, 2)],
        [LORA, SCALED, OTHER],
        {"params": PARAMS},
        ValueError,
        "'stack' and 'stack\\[1:\\]' overlap",
    ),
    "infinite trained leaf": (
        [FILLED["trains"], {**FILLED["trains"], "bias": {"value": jnp.full(9, 3e38)}}],
        PLANS["trains"],
        {"weights": [1.0, 2.0], "params": PARAMS},
        FloatingPointError,
        "at 'bias': value has an infinity or a NaN",
    ),
    "axes": (
        [PLAIN[0], fill(TURNED, 1)],
        [LORA, TURNED],
        {},
        ValueError,
        r"at 'w': the in_axes in plans\[1\] is \(1,\), and in another plan \(0,\)",
    ),
    "bias": (
        [{**PLAIN[0], "w": {**PLAIN[0]["w"], "B_bias": jnp.ones(9)}}],
        LORA,
        {},
        ValueError,
        "fold this one into the layer's own bias",
    ),
    "NaN": (
        [{**PLAIN[0], "w": {**PLAIN[0]["w"], "A": jnp.full((12, 4), jnp.nan)}}],
        LORA,
        {"method": "svd"},
        FloatingPointError,
        "at 'w': A has an infinity or a NaN: an argument had one",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_combined_is_an_error(case):
    adapters, plans, options, kind, message = case
    with pytest.raises(kind, match=message):
        lora_jax.combine_adapters(adapters, plans, **options)


def test_columns_that_cancel_are_an_error():
    own = FILLED["dora"] | {}
    own["w"] = own["w"] | {"m": own["w"]["m"].at[2].set(0.0)}
    adapters, plans = [own, FILLED["plain"]], [PLANS["dora"], LORA]
    with pytest.raises(
        FloatingPointError, match=r"at 'w': .* columns of the frozen weight"
    ):
        lora_jax.combine_adapters(adapters, plans, params=PARAMS)
    alone = lora_jax.resize_adapters(own, PLANS["dora"], rank=1, params=PARAMS)
    assert_same_bits(alone.adapters["w"]["m"][2], np.float32(0.0))


def test_other_bad_arguments():
    dora, plan = FILLED["dora"], PLANS["dora"]
    zero = LORA.replace(scale=0.0)
    cases = {
        "give rank or energy": lambda: lora_jax.resize_adapters(*PLAIN),
        "whose column norms need": lambda: lora_jax.resize_adapters(dora, plan, rank=1),
        "not multiples of A @ B": lambda: lora_jax.scale_adapters(dora, plan, 0.5),
        "has DoRA|does not show": lambda: lora_jax.extract_adapters(PARAMS, PARAMS, plan),
        "the scale is 0": lambda: lora_jax.extract_adapters(PARAMS, PARAMS, zero),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
    rest = {path: leaf for path, leaf in PARAMS.items() if path != "bias"}
    with pytest.raises(KeyError, match="same leaves, and only one of them has 'bias'"):
        lora_jax.extract_adapters(PARAMS, rest, LORA)
    abstract = PARAMS | {"norm": jax.ShapeDtypeStruct((9,), "float32")}
    with pytest.raises(TypeError, match="at 'norm': the leaf is a jax"):
        lora_jax.extract_adapters(PARAMS, abstract, LORA)
    assert lora_jax.scale_adapters(dora, plan, 1).plan == plan
