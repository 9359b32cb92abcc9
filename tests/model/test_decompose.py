"""Whole models split into a base and adapters, over weights of every layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.layers.decompose import (
    init_loftq_adapter,
    init_olora_adapter,
    init_pissa_adapter,
)
from lora_jax.model.decompose import decompose_params, to_plain_adapters
from tests import reference, support
from tests.model.support import make_params
from tests.support import assert_same_bits, best, coarse, needs_host_memory, straight

KEY = jax.random.key(1)
LAYOUTS = ("w", "q", "o", "turned", "mixed")
METHODS = {
    "pissa": {},
    "olora": {},
    "orthogonal": {"key": KEY},
    "loftq": {"quantize": coarse},
}


def make(names=LAYOUTS, dtype="float32", factors=None, **fields):
    return make_params(np.random.default_rng(0), names, dtype, dtype=factors, **fields)


# ----------------------------------------------------------------------- decompose


@pytest.mark.parametrize(
    ("method", "use_dora"),
    [*((m, False) for m in METHODS), ("olora", True), ("loftq", True)],
)
def test_base_and_adapters_are_the_params(method, use_dora):
    names = LAYOUTS if method == "pissa" else ("w", "o")
    params, plan = make(("w", "mixed") if use_dora else names, use_dora=use_dora)
    base, adapters = decompose_params(params, plan, method, **METHODS[method])
    for path, target in plan.targets.items():
        name, adapter = path.removeprefix("block/"), reference.f64(adapters[path])
        shapes = {key: value.shape for key, value in adapter.items()}
        assert shapes == target.adapter_shapes
        weight = straight(params["block"][name], target)
        left = straight(base["block"][name], target)
        got = left + target.scale * adapter["A"] @ adapter["B"]
        if method == "loftq":
            assert np.abs(got - weight).max() < 0.2
            np.testing.assert_array_equal(left, np.round(weight * 4) / 4)
        else:
            support.assert_close(got, weight, 32, "float32")
        if use_dora:
            support.assert_close(adapter["m"], reference.norms(got, "out"), 32, "float32")
    assert base["bias"] is params["bias"]
    assert (base["name"], base["step"]) == ("run", 3)


def test_each_layout_is_decomposed_as_its_matrix():
    params, plan = make()
    for method, init in (("pissa", init_pissa_adapter), ("olora", init_olora_adapter)):
        base, _ = decompose_params(params, plan, method)
        for path, target in plan.targets.items():
            name = path.removeprefix("block/")
            matrix = support.asarray(straight(params["block"][name], target), "float32")
            want, _ = init(matrix, 4, 3.0)
            got = straight(base["block"][name], target)
            support.assert_close(got, reference.f64(want), 64, "float32", scale=1.0)


def test_orthogonal_shares_all_params():
    params, plan = make(("w", "o"))
    base, _ = decompose_params(params, plan, "orthogonal", key=KEY)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, base, params)))


@pytest.mark.parametrize("method", ["pissa", "orthogonal"])
def test_keys_come_from_paths(method):
    options = {"key": KEY} | ({"iterations": 1} if method == "pissa" else {})
    params, plan = make(("w",))
    params["block"]["twin"] = params["block"]["w"]
    more = lora_jax.plan_adapters(lora_jax.LoraConfig(4, 3.0, "block/*"), params)
    _, few = decompose_params(params, plan, method, **options)
    _, many = decompose_params(params, more, method, **options)
    jax.tree.map(np.testing.assert_array_equal, few["block/w"], many["block/w"])
    assert not np.array_equal(many["block/w"]["A"], many["block/twin"]["A"])


def test_quantize_sees_each_weight_as_it_is_stored():
    params, plan = make(dtype="bfloat16")
    seen = []

    def quantize(weight):
        seen.append(weight)
        return weight

    decompose_params(params, plan, "loftq", quantize=quantize)
    assert {weight.dtype.name for weight in seen} == {"bfloat16"}
    for weight, leaf in zip(seen, jax.tree.leaves(params["block"]), strict=True):
        np.testing.assert_array_equal(weight, leaf)


@pytest.mark.parametrize(("iterations", "calls"), [(None, 2), (1, 2), (3, 6)])
def test_loftq_takes_iterations(iterations, calls):
    params, plan = make(("w", "o"))
    seen = []

    def quantize(weight):
        seen.append(weight)
        return coarse(weight)

    decompose_params(params, plan, "loftq", quantize=quantize, iterations=iterations)
    assert len(seen) == calls


def test_dtypes_are_those_of_the_config_and_the_weights():
    params, plan = make(("w",), dtype="bfloat16")
    base, adapters = decompose_params(params, plan, "pissa")
    assert base["block"]["w"].dtype == jnp.bfloat16
    assert adapters["block/w"]["A"].dtype == jnp.float32
    params, plan = make(("w",), dtype="bfloat16", factors="bfloat16")
    _, adapters = decompose_params(params, plan, "pissa")
    assert adapters["block/w"]["B"].dtype == jnp.bfloat16


def test_under_jit():
    params, plan = make(("w",), use_dora=True)
    params = {"block": params["block"]}

    def split(params, plan):
        return decompose_params(params, plan, "pissa")

    want = split(params, plan)
    with support.count_traces(split) as (compiled, traces):
        got = compiled(params, plan)
        compiled(params, plan)
    assert len(traces) == 1
    jax.tree.map(
        lambda x, y: support.assert_close(x, reference.f64(y), 64), got.params, want.params
    )


def test_an_exact_svd_of_each_layer_gathers_nothing(caplog):
    mesh = jax.make_mesh((3,), ("x",), axis_types=(AxisType.Auto,))
    params, plan = make(("stack",))
    placed = jax.device_put(params["block"], NamedSharding(mesh, P("x")))
    with caplog.at_level("INFO", "lora_jax"):
        base, adapters = decompose_params({"block": placed}, plan, "pissa")
    assert not caplog.messages
    merged = lora_jax.merge_adapters(base, adapters, plan)["block"]["stack"]
    support.assert_close(merged, reference.f64(params["block"]["stack"]), 64)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (AxisType.Auto, "pissa"),
        (AxisType.Auto, "olora"),
        (AxisType.Explicit, "pissa"),
        (AxisType.Explicit, "orthogonal"),
        (AxisType.Explicit, "loftq"),
    ],
)
def test_sharded_weights_stay_sharded(kind, method, caplog):
    mesh = jax.make_mesh((3, 2), ("x", "y"), axis_types=(kind,) * 2)
    sharding = NamedSharding(mesh, P("x", "y"))
    params, plan = make(("o",), use_dora=method == "pissa")
    params = {"block": params["block"]}
    want = decompose_params(params, plan, method, **METHODS[method]).params
    params = jax.device_put(params, sharding)
    with caplog.at_level("INFO", "lora_jax"):
        base, adapters = decompose_params(params, plan, method, **METHODS[method])
    logged = ["block/o: its exact SVD gathers the weight, 432 bytes in float32."]
    assert caplog.messages == logged * (method in ("pissa", "loftq"))
    got = base["block"]["o"]
    assert got.sharding.is_equivalent_to(sharding, 2)
    support.assert_close(got, reference.f64(want["block"]["o"]), 64)
    if method != "loftq":
        merged = lora_jax.merge_adapters(base, adapters, plan)["block"]["o"]
        support.assert_close(merged, reference.f64(params["block"]["o"]), 64)


def test_checks():
    params, plan = make(("w", "o"))
    with pytest.raises(ValueError, match=r"method must be one of 'pissa', .*Did you mean"):
        decompose_params(params, plan, "pisa")
    refused = {
        "olora": {"quantize": coarse},
        "orthogonal": {"key": KEY, "iterations": 2},
        "loftq": {"quantize": coarse, "key": KEY},
    }
    for method, options in refused.items():
        name = list(options)[-1]
        with pytest.raises(ValueError, match=f"method='{method}' does not use {name}"):
            decompose_params(params, plan, method, **options)
    with pytest.raises(ValueError, match="method='orthogonal' needs key"):
        decompose_params(params, plan, "orthogonal")
    with pytest.raises(ValueError, match="method='loftq' needs quantize"):
        decompose_params(params, plan, "loftq", iterations=2)
    with pytest.raises(ValueError, match="at 'block/o': key and iterations go together"):
        decompose_params(params, plan, "pissa", key=KEY)
    with pytest.raises(TypeError, match=r"key must be a jax\.random key"):
        decompose_params(params, plan, "orthogonal", key=0)
    with pytest.raises(TypeError, match="at 'block/o': quantize must be a function"):
        decompose_params(params, plan, "loftq", quantize=4)
    with pytest.raises(TypeError, match="at 'block/o': quantize must be a function"):
        decompose_params(params, plan, "pissa", quantize="nf4")
    with pytest.raises(ValueError, match=r"'block/o': .* shape \(9, 12\) .*got \(108,\)"):
        decompose_params(params, plan, "loftq", quantize=jnp.ravel)
    with pytest.raises(KeyError, match="params lack weights"):
        decompose_params({}, plan, "pissa")
    abstract = jax.eval_shape(lambda: params["block"])
    with pytest.raises(TypeError, match=r"at 'block/o': .*has no values"):
        decompose_params({"block": abstract}, plan, "pissa")
    config = dataclasses.replace(plan.config, rank=10)
    with pytest.raises(ValueError, match=r"at 'block/o': rank must be at most .* = 9"):
        decompose_params(params, lora_jax.plan_adapters(config, params), "pissa")


# --------------------------------------------------------------- quantized bases


def nf4(weight):
    return lora_jax.quant.quantize_nf4(weight, 6, 2, batch_axes=weight.ndim - 2)


def int8(weight):
    return lora_jax.quant.quantize_int8(weight, batch_axes=weight.ndim - 2)


KINDS = {nf4: lora_jax.quant.NF4Tensor, int8: lora_jax.quant.Int8Tensor}


@pytest.mark.parametrize("quantize", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["w", "o", "turned"])
def test_loftq_makes_up_for_what_a_quantized_base_loses(name, quantize):
    params, plan = make((name,))
    base, adapters = decompose_params(params, plan, "loftq", quantize=quantize)
    weight, leaf = params["block"][name], base["block"][name]
    assert type(leaf) is KINDS[quantize]
    assert_same_bits(leaf, quantize(weight))
    (target,) = plan.targets.values()
    adapter = reference.f64(adapters[f"block/{name}"])
    update = target.scale * adapter["A"] @ adapter["B"]
    lost = straight(weight, target) - straight(lora_jax.quant.dequantize(leaf), target)
    support.assert_close(update, best(lost, 4), 64, "float32")
    left = np.linalg.norm(lost - update)
    assert left == pytest.approx(np.linalg.norm(lost - best(lost, 4)), rel=1e-5)
    assert left < 0.8 * np.linalg.norm(lost)


@pytest.mark.parametrize("quantize", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["w", "o", "turned"])
def test_pissa_quantizes_the_residual(name, quantize):
    params, plan = make((name,))
    dense, want = decompose_params(params, plan, "pissa")
    base, adapters = decompose_params(params, plan, "pissa", quantize=quantize)
    jax.tree.map(np.testing.assert_array_equal, adapters, want)
    assert type(base["block"][name]) is KINDS[quantize]
    assert_same_bits(base["block"][name], quantize(dense["block"][name]))
    merged = lora_jax.merge_adapters(base, adapters, plan)["block"][name]
    weight = params["block"][name]
    lost = [
        float(jnp.linalg.norm((weight - near).ravel()))
        for near in (merged, lora_jax.quant.dequantize(quantize(weight)))
    ]
    assert 0 < lost[0] < lost[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_what_quantize_returned_last(dtype):
    params, plan = make(("o",), dtype=dtype)
    made = []

    def quantize(weight):
        made.append(nf4(weight))
        return made[-1]

    options = {"quantize": quantize, "iterations": 3}
    base, adapters = decompose_params(params, plan, "loftq", **options)
    leaf = base["block"]["o"]
    assert leaf is made[2]
    assert (leaf.dtype, len(made)) == (jnp.dtype(dtype), 3)
    (target,) = plan.targets.values()
    adapter = reference.f64(adapters["block/o"])
    dense = lora_jax.quant.dequantize(leaf)
    lost = straight(params["block"]["o"], target) - straight(dense, target)
    update = target.scale * adapter["A"] @ adapter["B"]
    support.assert_close(update, best(lost, 4), 64, "float32")


@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_magnitudes_are_those_of_the_base_as_it_is_stored(method):
    params, plan = make(("o", "turned"), use_dora=True)
    base, adapters = decompose_params(params, plan, method, quantize=int8)
    for path, target in plan.targets.items():
        adapter = reference.f64(adapters[path])
        dense = lora_jax.quant.dequantize(base["block"][path.removeprefix("block/")])
        adapted = straight(dense, target) + target.scale * adapter["A"] @ adapter["B"]
        want = reference.norms(adapted, "out")
        support.assert_close(adapter["m"], want, 32, "float32")


def test_one_weight_with_a_quantized_base():
    weight = make(("turned",))[0]["block"]["turned"]
    near = [lora_jax.quant.dequantize(int8(weight))]
    for base, adapter in (
        init_pissa_adapter(weight, 4, 3.0, quantize=int8),
        init_loftq_adapter(weight, 4, 3.0, quantize=int8),
    ):
        assert type(base) is lora_jax.quant.Int8Tensor
        near.append(lora_jax.merge_lora_weight(base, adapter, 3.0))
    lost = [float(jnp.linalg.norm((weight - x).ravel())) for x in near]
    assert max(lost[1:]) < lost[0]


def test_a_quantized_base_under_jit():
    params, plan = make(("turned",))
    params = {"block": params["block"]}

    def split(params):
        return decompose_params(params, plan, "loftq", quantize=int8)

    want, (got, _) = split(params), jax.jit(split)(params)
    assert_same_bits(got["block"]["turned"], want.params["block"]["turned"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("quantize", KINDS, ids=lambda f: f.__name__)
def test_quantized_bases_stay_sharded_along_the_stack(quantize, kind):
    mesh = jax.make_mesh((3, 2), ("x", "y"), axis_types=(kind,) * 2)
    params, plan = make(("turned",))
    params = {"block": params["block"]}
    want = decompose_params(params, plan, "loftq", quantize=quantize).params
    params = jax.device_put(params, NamedSharding(mesh, P("x", None, "y")))
    got = decompose_params(params, plan, "loftq", quantize=quantize).params
    whole = P("x", None, "y")
    own = {(3, 9, 12): whole, (3, 12): P("x", "y")}  # int8 and its scales
    # NF4: on explicit axes the user's function sees no sharding.
    own |= {} if kind == AxisType.Explicit else {(3, 9, 6): whole, (3, 9, 2): whole}
    for array in jax.tree.leaves(got):
        sharding = NamedSharding(mesh, own.get(array.shape, P("x")))
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    got, want = (x["block"]["turned"] for x in (got, want))
    if got.to_arrays()["codes"].ndim < got.codes.ndim:  # rows of NF4
        got = dataclasses.replace(got, **got.to_arrays(), row_axes=0)
    assert_same_bits(jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize("method", ["olora", "loftq"])
def test_weights_in_the_memory_of_the_host(method):
    needs_host_memory()
    params, plan = make(("w",))
    params = {"block": params["block"]}
    want = decompose_params(params, plan, method, **METHODS[method])
    place = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    params = jax.device_put(params, place)
    got = decompose_params(params, plan, method, **METHODS[method])
    assert got.params["block"]["w"].sharding == place
    assert_same_bits(jax.device_get(got), jax.device_get(want))


def test_checks_of_quantized_bases():
    params, plan = make(("w", "o"), dtype="bfloat16")
    with pytest.raises(TypeError, match=r"at 'block/o': .* bfloat16 .*, got float32"):
        decompose_params(params, plan, "loftq", quantize=lambda w: int8(w.astype("f4")))
    with pytest.raises(
        ValueError, match=r"at 'block/o': .* shape \(9, 12\) .*got \(108, 1"
    ):
        decompose_params(params, plan, "pissa", quantize=lambda w: int8(w.reshape(-1, 1)))
    with pytest.raises(TypeError, match=r"at 'block/o': .*must be a quantized tensor or"):
        decompose_params(params, plan, "pissa", quantize=lambda w: None)
    params["block"]["w"] = int8(params["block"]["w"])
    for method, options in METHODS.items():
        with pytest.raises(TypeError, match="at 'block/w': the weight is quantized, Int8"):
            decompose_params(params, plan, method, **options)
    for init in (init_pissa_adapter, init_olora_adapter):
        with pytest.raises(TypeError, match=r"needs: decompose the dense .*dequantize it"):
            init(params["block"]["w"], 4)


# ------------------------------------------------------------------- back to plain


def network(params, x):
    x = jnp.tanh(jnp.einsum("bi,ihk->bhk", x, params["block"]["q"]))
    x = jnp.tanh(jnp.einsum("bhk,hko->bo", x, params["block"]["up"]))
    return jnp.einsum("bi,oi->bo", x, params["block"]["o"])


def network_and_plan(**fields):
    params, _ = make(("q", "o"))
    rng = np.random.default_rng(2)
    params["block"]["up"] = support.asarray(rng.normal(size=(2, 3, 12)), "float32")
    x = support.asarray(rng.normal(size=(5, 12)), "float32")
    config = lora_jax.LoraConfig(
        4, 3.0, rank_pattern={"*/q": 2}, alpha_pattern={"*/o": 5.0}, **fields
    )
    params = {"block": params["block"]}
    return params, x, lora_jax.plan_adapters(config, params, network, x)


def random_steps(adapters):
    """Adapters some steps later."""
    rng = np.random.default_rng(7)

    def step(value):
        return value + support.asarray(0.3 * rng.normal(size=value.shape), value.dtype)

    return jax.tree.map(step, adapters)


@pytest.mark.parametrize(
    ("method", "use_dora", "rank_stabilized"),
    [("pissa", False, True), ("olora", True, False)],
)
def test_plain_adapters_do_the_same_to_the_original(method, use_dora, rank_stabilized):
    params, x, plan = network_and_plan(use_dora=use_dora, rank_stabilized=rank_stabilized)
    base, initial = decompose_params(params, plan, method)
    adapters = random_steps(initial)
    plain, plain_plan = to_plain_adapters(adapters, initial, plan)
    want = jax.jit(lora_jax.adapt(network, plan))(base, adapters, x)
    assert float(jnp.abs(want - network(params, x)).max()) > 0.1
    got = jax.jit(lora_jax.adapt(network, plain_plan))(params, plain, x)
    support.assert_close(got, reference.f64(want), 256)
    want = lora_jax.merge_adapters(base, adapters, plan)
    got = lora_jax.merge_adapters(params, plain, plain_plan)
    for name in want["block"]:
        support.assert_close(got["block"][name], reference.f64(want["block"][name]), 128)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_the_plan_has_twice_the_ranks_and_the_same_scales(rank_stabilized):
    params, x, plan = network_and_plan(rank_stabilized=rank_stabilized, dropout=0.1)
    _, initial = decompose_params(params, plan, "pissa")
    _, plain_plan = to_plain_adapters(initial, initial, plan)
    assert {t.rank for t in plain_plan.targets.values()} == {4, 8}
    for path, target in plain_plan.targets.items():
        before = plan.targets[path]
        scale = pytest.approx(before.scale, rel=1e-15)
        assert (target.rank, target.scale) == (2 * before.rank, scale)
        assert plain_plan.config.rank_of(path) == target.rank
        assert plain_plan.config.scale_of(path) == target.scale
        assert (target.axes, target.dropout) == (before.axes, 0.1)
    again = lora_jax.plan_adapters(plain_plan.config, params, network, x)
    assert again == plain_plan
    assert plain_plan.uses == plan.uses


def test_a_changed_target_gets_a_pattern_of_its_own():
    names = ("a[0]*", "a0b", "re:w")
    params = {name: jnp.ones((12, 9)) for name in names}
    config = lora_jax.LoraConfig(2, 3.0, rank_pattern={"a*": 3})
    plan = lora_jax.plan_adapters(config, params)
    targets = dict(plan.targets)
    targets["a[0]*"] = dataclasses.replace(targets["a[0]*"], rank=5, scale=0.3)
    targets["re:w"] = dataclasses.replace(targets["re:w"], scale=-2.0)
    plan = dataclasses.replace(plan, targets=targets)
    adapters = {
        path: {name: jnp.ones(shape) for name, shape in target.adapter_shapes.items()}
        for path, target in plan.targets.items()
    }
    _, plain_plan = to_plain_adapters(adapters, adapters, plan)
    got = {p: (t.rank, t.scale) for p, t in plain_plan.targets.items()}
    assert got == {"a[0]*": (10, 0.3), "a0b": (6, 1.0), "re:w": (4, -2.0)}
    assert lora_jax.plan_adapters(plain_plan.config, params) == plain_plan


def test_checks_of_plain_adapters():
    params, plan = make(("w", "o"))
    _, initial = decompose_params(params, plan, "olora")
    with pytest.raises(KeyError, match="adapters must have the 2 paths of the plan"):
        to_plain_adapters({}, initial, plan)
    with pytest.raises(KeyError, match=r"at 'initial': .*missing: 'block/o'"):
        to_plain_adapters(initial, {"block/w": initial["block/w"]}, plan)
    with pytest.raises(TypeError, match="plan must be an AdapterPlan"):
        to_plain_adapters(initial, initial, plan.config)
    wide = {path: {"A": jnp.ones((12, 5)), "B": jnp.ones((5, 9))} for path in initial}
    with pytest.raises(ValueError, match=r"at 'block/\w': .* that the plan has for rank 4"):
        to_plain_adapters(wide, initial, plan)
