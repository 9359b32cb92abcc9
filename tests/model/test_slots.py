"""Adapters of tenants in the slots of a stack: nothing is lost, rounded or moved."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import AdapterStack, LoraConfig, put_adapters, stack_adapters, take_adapters
from tests import programs
from tests.support import (
    asarray,
    assert_close,
    assert_same_bits,
    count_traces,
    draw,
    needs_host_memory,
    normal,
    set_mesh,
    x64,
)

SLOTS = 4
# Their plans are static trees: one program for each, where an eager call has dozens.
compiled_stack = jax.jit(stack_adapters, static_argnums=(2, 3), static_argnames="rank")
compiled_put = jax.jit(put_adapters)
compiled_take = jax.jit(take_adapters, static_argnames="rank")


def model(params, tokens):
    """A scan over stacked layers between a table and its transpose."""
    x = params["table"][tokens]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers/up"])
    return jnp.tanh(x @ params["mid"].T) @ params["table"].T


SHAPES = {"table": (11, 6), "layers/up": (3, 6, 6), "mid": (6, 6)}
PARAMS = {path: draw(*shape, seed=1) for path, shape in SHAPES.items()}
TOKENS = asarray([3, 0, 7, 10])

# The options of `LoraConfig` of each tenant.
TENANTS = {
    "ranks": [{"rank": 2, "targets": "*"}, {"rank": 5, "targets": "*"}],
    "ranks by path": [
        {"rank": 3, "targets": "*", "rank_pattern": {"mid": 1}},
        {"rank": 2, "targets": "*", "rank_pattern": {"table": 4}},
    ],
    "scales": [
        {"rank": 2, "alpha": 3.0, "targets": "*", "rank_stabilized": True},
        {"rank": 3, "alpha": 0.1, "targets": "*", "alpha_pattern": {"mid": -7.0}},
    ],
    "methods": [
        {"rank": 2, "targets": ["layers/up", "mid"]},
        {"rank": 3, "targets": ["layers/up", "mid"], "use_dora": True},
    ],
    "targets": [
        {"rank": 2, "targets": "mid"},
        {"rank": 3, "targets": "layers/up", "use_dora": True},
        {"rank": 1, "targets": ["table", "layers/up"]},
    ],
    "parts": [
        {"rank": 2, "targets": ["layers/up[1:]", "mid[:4]"]},
        {"rank": 3, "targets": ["layers/up[1:]", "mid[:4]"], "use_dora": True},
        {"rank": 3, "targets": ["layers/up[0]"]},
    ],
    "uses": [
        {"rank": 2, "targets": "table@lookup"},
        {"rank": 3, "targets": ["table@product", "table@lookup"]},
    ],
    "bfloat16": [
        {"rank": 2, "targets": "*", "dtype": "bfloat16"},
        {"rank": 3, "targets": ["mid"], "dtype": "bfloat16", "use_dora": True},
    ],
    "one": [{"rank": 2, "targets": "*"}],
}
EACH = pytest.mark.parametrize("name", TENANTS)


def filled(adapters, seed):
    """Adapters in which no entry is zero, of the shapes and dtypes of others."""
    return {
        path: {
            name: asarray(normal(*x.shape, seed=seed) + (3 if name == "m" else 0), x.dtype)
            for name, x in own.items()
        }
        for path, own in adapters.items()
    }


def shapes_of(params, plan):
    """The shapes and dtypes of new adapters."""
    return jax.eval_shape(
        lambda params: lora_jax.init_adapters(jax.random.key(0), params, plan), params
    )


@functools.cache
def tenants_of(name, **options):
    """The adapters and the plan of each tenant."""
    found = []
    for i, own in enumerate(TENANTS[name]):
        plan = lora_jax.plan_adapters(LoraConfig(**own, **options), PARAMS, model, TOKENS)
        found.append((filled(shapes_of(PARAMS, plan), i + 2), plan))
    return tuple(zip(*found, strict=True))


def one_tenant(**config):
    """The adapters and the plan of one tenant, with three weights of two axes."""
    shapes = {"down": (16, 8), "square": (8, 8), "up": (8, 16)}
    params = {path: draw(*shape) for path, shape in shapes.items()}
    plan = lora_jax.plan_adapters(LoraConfig(**{"rank": 2, **config}), params)
    return filled(shapes_of(params, plan), 5), plan


@EACH
def test_the_plan_has_the_targets_of_all_and_the_scale_1(name):
    adapters, plans = tenants_of(name)
    stack, plan = jax.eval_shape(lambda own: stack_adapters(own, plans, SLOTS), adapters)
    assert [*plan.targets] == [*dict.fromkeys(p for own in plans for p in own.targets)]
    for path, target in plan.targets.items():
        assert target.scale == plan.config.scale_of(path) == 1
        own = [p.targets[path] for p in plans if path in p.targets]
        assert target.rank == max(t.rank for t in own)
        assert (target.method == "dora") == any(t.method == "dora" for t in own)
        shapes = {entry: x.shape for entry, x in stack.adapters[path].items()}
        want = target.adapter_shapes
        assert shapes == {entry: (SLOTS, *shape) for entry, shape in want.items()}
    assert {*stack.magnitudes} == {p for p, t in plan.targets.items() if t.method == "dora"}
    again = lora_jax.AdapterPlan.from_json(plan.to_json())
    assert again == plan == compiled_stack(adapters, plans)[1]
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)


@EACH
def test_slots_have_padded_factors_and_the_scales_of_their_plans(name):
    adapters, plans = tenants_of(name)
    stack, plan = compiled_stack(adapters, plans, SLOTS, rank=7)
    assert {target.rank for target in plan.targets.values()} == {7}
    stack = jax.tree.map(np.asarray, stack)
    for path, arrays in stack.adapters.items():
        for i in range(SLOTS):
            own = adapters[i].get(path, {}) if i < len(plans) else {}
            scale = plans[i].scales[path] if own else 0.0
            assert stack.scales[path][i] == np.float32(scale)
            if path in stack.magnitudes:
                assert stack.magnitudes[path][i] == float("m" in own)
                np.testing.assert_array_equal(arrays["m"][i], own.get("m", 1))
            rank = own["A"].shape[-1] if own else 0
            for padding in (arrays["A"][i, ..., rank:], arrays["B"][i, ..., rank:, :]):
                assert not np.any(padding)
    assert {x.dtype for x in (stack.scales | stack.magnitudes).values()} == {
        np.dtype("float32")
    }


@EACH
def test_taken_adapters_have_the_bits_that_were_stacked_or_put(name):
    adapters, plans = tenants_of(name)
    stack, _ = compiled_stack(adapters, plans, SLOTS, rank=7)
    assert_same_bits(take_adapters(stack, asarray(0), plan=plans[0]), adapters[0])
    for i, (own, plan) in enumerate(zip(adapters, plans, strict=True)):
        assert_same_bits(compiled_take(stack, i, plan=plan), own)
        moved = compiled_put(stack, SLOTS - 1, own, plan)
        assert_same_bits(compiled_take(moved, SLOTS - 1, plan=plan), own)
        first = [
            jax.tree.map(lambda x: np.asarray(x)[:-1], tree) for tree in (moved, stack)
        ]
        assert_same_bits(*first)


@EACH
def test_an_empty_stack_that_is_filled_has_the_bits_of_a_new_one(name):
    adapters, plans = tenants_of(name)
    want, plan = compiled_stack(adapters, plans)
    stack = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), want)
    for i, (own, own_plan) in enumerate(zip(adapters, plans, strict=True)):
        stack = compiled_put(stack, i, own, own_plan)
    assert_same_bits(stack, want)
    assert all(target.rank <= 5 for target in plan.targets.values())


@pytest.mark.parametrize("name", ["scales", "methods", "targets", "parts", "uses"])
def test_slots_compute_what_their_tenants_do(name):
    adapters, plans = tenants_of(name)
    stack, plan = compiled_stack(adapters, plans)

    @jax.jit
    def outputs(adapters, stack):
        want = [
            lora_jax.adapt(model, own)(PARAMS, adapter, TOKENS)
            for adapter, own in zip(adapters, plans, strict=True)
        ]
        if stack.magnitudes:  # then each slot has a method of its own
            got = [
                lora_jax.adapt(model, own)(
                    PARAMS, take_adapters(stack, i, plan=own), TOKENS
                )
                for i, own in enumerate(plans)
            ]
        else:
            got = jax.vmap(
                lambda own, scales: lora_jax.adapt(model, plan, scales=scales)(
                    PARAMS, own, TOKENS
                )
            )(stack.adapters, stack.scales)
        return got, want

    for got, want in zip(*outputs(adapters, stack), strict=True):
        assert_close(got, want, 64)


def test_taken_adapters_are_saved_with_their_plan(tmp_path):
    adapters, plans = tenants_of("methods")
    stack, _ = compiled_stack(adapters, plans, SLOTS, rank=6)
    names = {"up.{i}": ("layers/up", "{i}io"), "mid": ("mid", "oi")}
    for i, (own, plan) in enumerate(zip(adapters, plans, strict=True)):
        taken = compiled_take(stack, i, plan=plan)
        lora_jax.save_adapters(tmp_path / f"own{i}", taken, plan)
        loaded, loaded_plan = lora_jax.load_adapters(tmp_path / f"own{i}")
        assert loaded_plan == plan
        assert_same_bits(loaded, own)
        lora_jax.peft.save(tmp_path / f"peft{i}", taken, plan, names=names)
        loaded = lora_jax.peft.load(
            tmp_path / f"peft{i}", PARAMS, model, TOKENS, names=names
        )
        assert {p: t.scale for p, t in loaded.plan.targets.items()} == plan.scales
        assert_same_bits(loaded.adapters, own)


def test_arrays_have_the_widest_dtype_of_their_adapters():
    (wide,), (wide_plan,) = tenants_of("one")
    (narrow,), (narrow_plan,) = tenants_of("one", dtype="bfloat16")
    stack, _ = compiled_stack([narrow, wide], [narrow_plan, wide_plan])
    taken = compiled_take(stack, 0, plan=narrow_plan)
    assert {x.dtype for x in jax.tree.leaves(taken)} == {np.dtype("float32")}
    back = jax.tree.map(lambda x, like: asarray(x, like.dtype), taken, narrow)
    assert_same_bits(back, narrow)
    half = [jax.tree.map(lambda x: asarray(x, "float16"), narrow), narrow]
    stack, _ = compiled_stack(half, narrow_plan)
    assert {x.dtype for x in jax.tree.leaves(stack)} == {np.dtype("float32")}
    with x64():
        double = jax.tree.map(lambda x: asarray(x, "float64"), wide)
        stack, _ = compiled_stack([double, wide], wide_plan)
        assert_same_bits(compiled_take(stack, 0, plan=wide_plan), double)
        assert stack.scales["mid"].dtype == jnp.float64


def test_numpy_arrays_are_adapters():
    adapters, plans = tenants_of("methods")
    arrays = [jax.tree.map(np.asarray, own) for own in adapters]
    stack, plan = compiled_stack(adapters, plans)
    assert_same_bits(stack_adapters(arrays, plans), (stack, plan))
    got = put_adapters(stack, np.int8(0), arrays[1], plans[1])
    assert_same_bits(got, compiled_put(stack, 0, adapters[1], plans[1]))
    assert_same_bits(take_adapters(got, 0, plan=plans[1]), adapters[1])


def test_a_lower_rank_is_cut_out_of_padding():
    own, plan = one_tenant(targets="up")
    stack, of_stack = stack_adapters([own], plan, rank=6)
    assert_same_bits(take_adapters(stack, 0, rank=2), own)
    whole = take_adapters(stack, 0)
    shapes = jax.tree.map(jnp.shape, whole)
    assert shapes == {p: target.adapter_shapes for p, target in of_stack.targets.items()}
    halves = jax.jit(lambda s: take_adapters(s, 0, rank=1))(stack)
    assert_same_bits(halves["up"]["A"], np.asarray(own["up"]["A"])[:, :1])


def test_any_traffic_compiles_once_for_each_plan():
    adapters, plans = tenants_of("targets")
    stack, _ = compiled_stack(adapters, plans, 8)
    with (
        count_traces(put_adapters) as (put, puts),
        count_traces(take_adapters) as (
            take,
            takes,
        ),
    ):
        for step, slot in enumerate((3, 0, 7, 3, 5, 1, 2, 6)):
            own, plan = adapters[step % 3], plans[step % 3]
            stack = put(stack, slot, own, plan)
            assert_same_bits(take(stack, slot, plan=plan), own)
    assert len(puts) == len(takes) == len(plans)


def test_put_writes_in_place():
    adapters, plans = tenants_of("methods")
    stack, _ = compiled_stack(adapters, plans, 512)
    put = jax.jit(put_adapters, static_argnums=3, donate_argnums=0)
    compiled = put.lower(stack, 1, adapters[1], plans[1]).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == programs.number_of_bytes(stack)
    assert memory.temp_size_in_bytes < memory.alias_size_in_bytes / 16
    smallest = min(x.size for x in jax.tree.leaves(stack.adapters))
    made = {kind for _, kind in programs.large_arrays(compiled.as_text(), smallest)}
    assert made <= {"dynamic-update-slice", "select"}
    want = compiled_put(stack, 1, adapters[1], plans[1])
    assert_same_bits(compiled(stack, 1, adapters[1]), want)
    assert all(x.is_deleted() for x in jax.tree.leaves(stack))


@pytest.mark.parametrize(
    "slot",
    [-1, -SLOTS, SLOTS, 2**31 - 1, np.int8(-1), np.uint8(255), np.uint32(2**32 - 1)],
    ids=lambda slot: f"{slot} {getattr(slot, 'dtype', '')}",
)
def test_a_traced_slot_out_of_range_gives_nan_and_loses_nothing(slot):
    adapters, plans = tenants_of("methods")
    stack, _ = compiled_stack(adapters, plans, SLOTS)
    got = compiled_put(stack, slot, adapters[0], plans[0])
    assert_same_bits(got.adapters, stack.adapters)
    assert_same_bits(got.magnitudes, stack.magnitudes)
    assert all(np.isnan(x).all() for x in got.scales.values())
    taken = compiled_take(stack, slot)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(taken))
    with pytest.raises(IndexError, match="from 0 to 3, since the stack has 4 slots"):
        put_adapters(stack, slot, adapters[0], plans[0])
    with pytest.raises(IndexError, match="slot must be from 0 to 3"):
        take_adapters(stack, slot)


def test_a_64_bit_slot_is_not_wrapped():
    adapters, plans = tenants_of("one")
    stack, _ = compiled_stack(adapters, plans)
    with x64():
        taken = compiled_take(stack, 2**32)
    assert np.isnan(taken["mid"]["A"]).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_slots_of_few_bits_reach_all_slots(dtype):
    adapters, plans = tenants_of("one")
    stack, _ = compiled_stack(adapters, plans, 200)
    slot = np.asarray(100, dtype)
    moved = compiled_put(stack, slot, adapters[0], plans[0])
    assert_same_bits(compiled_take(moved, slot, plan=plans[0]), adapters[0])


def test_transformations():
    adapters, plans = tenants_of("ranks")
    stack, plan = compiled_stack(adapters, plans)
    kinds = jax.eval_shape(lambda own: stack_adapters(own, plans)[0], adapters)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (stack, plan)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (kinds, plan)
    )
    one = jax.eval_shape(put_adapters, kinds, 1, adapters[0], plans[0])
    assert jax.tree.structure(one) == jax.tree.structure(stack)
    assert jax.eval_shape(take_adapters, kinds, 1) == jax.eval_shape(
        lambda: take_adapters(stack, 1)
    )
    all_slots = jax.jit(jax.vmap(take_adapters, (None, 0)))(stack, np.arange(2))
    assert_same_bits(all_slots, stack.adapters)

    def loss(own):
        stack, _ = stack_adapters([own, adapters[1]], plans)
        taken = take_adapters(put_adapters(stack, 1, own, plans[0]), 1, plan=plans[0])
        return sum(jnp.vdot(x, x) for x in jax.tree.leaves(taken))

    gradient = jax.jit(jax.grad(loss))(adapters[0])
    assert_same_bits(gradient, jax.tree.map(lambda x: 2 * np.asarray(x), adapters[0]))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {"auto": (AUTO,) * 3, "explicit": (EXPLICIT,) * 3, "mixed": (AUTO, AUTO, EXPLICIT)}
SPECS = {"heads": P("tensor", None, "fsdp"), "experts": P("fsdp", None, "tensor")}
ON_MESH = {"heads": (4, 8, 16), "experts": (4, 16, 32)}
ON_MESH_AXES = {"heads": "iio", "experts": "bio"}


def tenants_on_mesh(kind):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=KINDS[kind])
    params = {
        path: jax.device_put(
            normal(*shape, dtype="float32"), NamedSharding(mesh, SPECS[path])
        )
        for path, shape in ON_MESH.items()
    }
    adapters, plans = [], []
    for rank, dora, paths in ((2, False, [*ON_MESH]), (3, True, ["experts"])):
        axes = {path: own for path, own in ON_MESH_AXES.items() if path in paths}
        config = LoraConfig(rank, targets=paths, use_dora=dora, axes=axes)
        plans.append(lora_jax.plan_adapters(config, params))
        own = filled(shapes_of(params, plans[-1]), rank)
        places = lora_jax.adapter_shardings(params, plans[-1])
        adapters.append(jax.tree.map(jax.device_put, own, places))
    return mesh, params, adapters, plans


def assert_lies_by_the_rule(stack, params, plan):
    """Asserts that a stack lies as `adapter_shardings` says, with the slots in front."""
    for path, own in lora_jax.adapter_shardings(params, plan).items():
        for name, sharding in own.items():
            x = stack.adapters[path][name]
            want = sharding.update(spec=P(None, *sharding.spec))
            assert x.sharding.is_equivalent_to(want, x.ndim), (path, name, x.sharding)
    for x in (*stack.scales.values(), *stack.magnitudes.values()):
        assert x.sharding.is_fully_replicated
        assert len(x.sharding.device_set) == 8


def assert_lie_alike(got, want):
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize(
    ("kind", "is_current"),
    [
        ("auto", False),
        ("explicit", True),
        pytest.param("explicit", False, marks=pytest.mark.slow),
        pytest.param("mixed", False, marks=pytest.mark.slow),
    ],
)
def test_stacks_lie_on_the_mesh_of_their_adapters(kind, is_current):
    mesh, params, adapters, plans = tenants_on_mesh(kind)
    local = [jax.tree.map(np.asarray, own) for own in adapters]
    want, plan = compiled_stack(local, plans, SLOTS)
    want = compiled_put(want, 3, local[1], plans[1])
    with set_mesh(mesh) if is_current else contextlib.nullcontext():
        stack, own_plan = stack_adapters([local[0], adapters[1]], plans, SLOTS)
        assert own_plan == plan
        stack = put_adapters(stack, 0, adapters[0], plans[0])
        assert_lies_by_the_rule(stack_adapters(adapters, plans, SLOTS)[0], params, plan)
        for own in (local[1], adapters[1]):
            got = put_adapters(stack, 3, own, plans[1])
            assert_same_bits(got, want)
            assert_lie_alike(got, stack)
        for i, own in ((0, adapters[0]), (3, adapters[1])):
            taken = take_adapters(got, i, plan=plans[i > 0])
            assert_same_bits(taken, own)
            assert_lie_alike(
                taken,
                {
                    path: {n: stack.adapters[path][n][0] for n in x}
                    for path, x in own.items()
                },
            )


def test_a_stack_in_the_memory_of_the_host_stays_there():
    needs_host_memory()
    adapters, plan = one_tenant(targets="up")
    stack, _ = stack_adapters([adapters], plan, 2)
    place = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    got = put_adapters(jax.device_put(stack, place), 1, adapters, plan)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(got)} == {"pinned_host"}
    assert_same_bits(got, put_adapters(stack, 1, adapters, plan))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_travels_between_devices(kind):
    _, params, adapters, plans = tenants_on_mesh(kind)
    local = [jax.tree.map(np.asarray, own) for own in adapters]

    def compiled(run, *arguments):
        program = jax.jit(run).lower(*arguments).compile()
        assert not programs.collectives(program.as_text())
        return program(*arguments)

    stack, plan = compiled(lambda own: stack_adapters(own, plans, SLOTS), adapters)
    assert_same_bits((stack, plan), compiled_stack(local, plans, SLOTS))
    assert_lies_by_the_rule(stack, params, plan)
    got = compiled(put_adapters, stack, 1, adapters[1], plans[1])
    assert_same_bits(got, stack)
    assert_lies_by_the_rule(got, params, plan)
    taken = compiled(lambda s, i: take_adapters(s, i, plan=plans[1]), stack, 1)
    assert_same_bits(taken, adapters[1])
    assert_lie_alike(taken, adapters[1])


def plan_of(**config):
    return one_tenant(**config)[1]


def stacked(slots=3, **config):
    own, plan = one_tenant(**config)
    return compiled_stack([own], plan, slots)[0]


def changed(stack, **fields):
    return dataclasses.replace(stack, **fields)


def both(first, second):
    """Stacks the adapters of two plans."""
    pairs = [one_tenant(**config) for config in (first, second)]
    return stack_adapters([own for own, _ in pairs], [plan for _, plan in pairs])


def renamed(**targets):
    """Stacks adapters of `up`, in two plans that differ in a field of this target."""
    own, plan = one_tenant(targets="square")
    target = dataclasses.replace(plan.targets["square"], **targets)
    other = dataclasses.replace(plan, targets={"square": target})
    return stack_adapters([own, own], [plan, other])


def put(stack=None, slot=0, adapters=None, plan=None, **config):
    own, own_plan = one_tenant(**config)
    stack = stacked() if stack is None else stack
    return put_adapters(stack, slot, adapters or own, plan or own_plan)


OWN, PLAN = one_tenant()
BIASED = {**OWN, "up": {**OWN["up"], "B_bias": draw(16)}}
FOREIGN = lora_jax.plan_adapters(LoraConfig(2), {"up": draw(4, 4)})
TRAINED = lora_jax.plan_adapters(
    LoraConfig(2, train="bias"), {"up": draw(8, 16), "bias": draw(16)}
)
WITH_BIAS = {"up": OWN["up"], "bias": {"value": draw(16)}}
BAD = {
    "adapters are one dict": (
        lambda: stack_adapters(OWN, PLAN),
        TypeError,
        "list or tuple with the adapters of each tenant, got dict",
    ),
    "no adapters": (lambda: stack_adapters([], PLAN), ValueError, "adapters is empty"),
    "no targets": (
        lambda: stack_adapters([{}], lora_jax.AdapterPlan(LoraConfig(2), {})),
        ValueError,
        "the plans have no targets",
    ),
    "no plan": (lambda: stack_adapters([OWN], None), TypeError, "plans must be"),
    "a config": (lambda: stack_adapters([OWN], LoraConfig()), TypeError, "got LoraConfig"),
    "no adapter": (
        lambda: stack_adapters([OWN, None], PLAN),
        TypeError,
        r"at 'adapters\[1\]': adapters must be a dict",
    ),
    "plans without a plan": (
        lambda: stack_adapters([OWN], ["plan"]),
        TypeError,
        "must be an AdapterPlan, got str",
    ),
    "fewer plans": (
        lambda: stack_adapters([OWN, OWN], [PLAN]),
        ValueError,
        "one plan for each of the 2 adapters, or one for all, got 1",
    ),
    "adapters of another plan": (
        lambda: stack_adapters([OWN, {"up": OWN["up"]}], PLAN),
        KeyError,
        r"adapters\[1\].*missing: 'down', 'square'",
    ),
    "biases": (lambda: stack_adapters([BIASED], PLAN), ValueError, "has no biases"),
    "trained leaves": (
        lambda: stack_adapters([WITH_BIAS], TRAINED),
        ValueError,
        "trains the leaves 'bias' .*plan.subset",
    ),
    "no values": (
        lambda: stack_adapters([jax.eval_shape(lambda: OWN)], PLAN),
        TypeError,
        "jax.eval_shape",
    ),
    "integers": (
        lambda: stack_adapters([jax.tree.map(lambda x: asarray(x, "int32"), OWN)], PLAN),
        TypeError,
        "must be floating point",
    ),
    "decomposed": (
        lambda: stack_adapters(
            [lora_jax.decompose_params({"up": draw(4, 4)}, FOREIGN, "olora")], FOREIGN
        ),
        TypeError,
        r"adapters\[0\] must be a dict .*, got Decomposed: .* to_plain_adapters",
    ),
    "fewer slots": (
        lambda: stack_adapters([OWN, OWN], PLAN, slots=1),
        ValueError,
        "at least the number of adapters, 2, and below .*, got 1",
    ),
    "slots of another type": (
        lambda: stack_adapters([OWN], PLAN, slots=2.0),
        TypeError,
        "slots must be an integer, got 2.0",
    ),
    "traced slots": (
        lambda: jax.jit(lambda n: stack_adapters([OWN], PLAN, n)[0])(3),
        TypeError,
        "slots must be an integer",
    ),
    "rank of another type": (
        lambda: stack_adapters([OWN], PLAN, rank="8"),
        TypeError,
        "rank must be a positive integer",
    ),
    "a rank too small": (
        lambda: stack_adapters([OWN], PLAN, rank=1),
        ValueError,
        r"at 'down': rank=1 is below the rank 2 of plans\[0\]",
    ),
    "other dropout": (
        lambda: both({"dropout": 0.25}, {"dropout": 0.5}),
        ValueError,
        r"'down': the dropout of plans\[0\] is 0.25, and that of plans\[1\] is 0.5.*plan.r",
    ),
    "other axes": (
        lambda: both({"targets": "square"}, {"targets": "square", "axes": {"*": "oi"}}),
        ValueError,
        r"'square': the in_axes of plans\[0\] is \(0,\), and that of plans\[1\] is \(1,\)",
    ),
    "another shape": (
        lambda: renamed(shape=(8, 1, 8), in_axes=(0, 1), out_axes=(2,)),
        ValueError,
        r"the shape of plans\[0\] is \(8, 8\), and that of plans\[1\] is \(8, 1, 8\)",
    ),
    "overlapping parts": (
        lambda: both({"targets": "up"}, {"targets": "up[:, 4:]"}),
        ValueError,
        r"plans\[1\].*'up' and 'up\[:,4:\]' overlap",
    ),
    "other products": (
        lambda: both({"products": {"f": "ab,bc->ac"}}, {"products": {"f": "ab,cb->ac"}}),
        ValueError,
        "'ab,bc->ac' and 'ab,cb->ac'",
    ),
    "other params": (
        lambda: stack_adapters(
            [OWN, filled(shapes_of({"up": draw(4, 4)}, FOREIGN), 0)], [PLAN, FOREIGN]
        ),
        ValueError,
        r"'up': the shape of plans\[0\] is \(8, 16\), and that of plans\[1\] is \(4, 4\)",
    ),
    "params of another size": (
        lambda: stack_adapters(
            [OWN, {"up": OWN["up"]}],
            [PLAN, dataclasses.replace(PLAN.subset("up"), total=9)],
        ),
        ValueError,
        "the plans are of different params",
    ),
    "put: no stack": (lambda: put({}), TypeError, "must be an AdapterStack.*got dict"),
    "put: adapters first": (
        lambda: put_adapters(OWN, 0, stacked(), PLAN),
        TypeError,
        "must be an AdapterStack.*got dict",
    ),
    "put: empty stack": (
        lambda: put(AdapterStack({}, {}, {})),
        ValueError,
        "stack.adapters must be a dict .* and not empty",
    ),
    "put: stack of None": (
        lambda: put(AdapterStack(None, None, None)),
        ValueError,
        "stack.adapters must be a dict",
    ),
    "put: no scales": (
        lambda: put(changed(stacked(), scales={})),
        KeyError,
        "stack.scales must have .*missing: 'down', 'square', 'up'",
    ),
    "put: scales of other slots": (
        lambda: put(changed(stacked(3), scales=stacked(2).scales)),
        ValueError,
        r"stack.scales\['down'\] does not fit: expected shape \(3,\)",
    ),
    "put: a stack that was cast": (
        lambda: put(jax.tree.map(lambda x: asarray(x, "bfloat16"), stacked())),
        TypeError,
        r"stack.scales\['down'\] must be float32 or float64, got bfloat16",
    ),
    "put: arrays of other slots": (
        lambda: put(
            changed(
                stacked(3), adapters={**stacked().adapters, "up": stacked(2).adapters["up"]}
            )
        ),
        ValueError,
        "at 'up': A must be .*, where other arrays have 3 slots|where other arrays have 2",
    ),
    "put: no slot axis": (
        lambda: put(changed(stacked(), adapters=OWN)),
        ValueError,
        r"A must be \(slots",
    ),
    "put: magnitudes of LoRA": (
        lambda: put(changed(stacked(), magnitudes=stacked().scales)),
        KeyError,
        "stack.magnitudes must have the 0 paths",
    ),
    "put: slot of another type": (lambda: put(slot="0"), TypeError, "slot must be an int"),
    "put: a bool": (lambda: put(slot=True), TypeError, "slot must be an integer, got True"),
    "put: several slots": (
        lambda: put(slot=np.arange(2)),
        TypeError,
        "slot must be an integer",
    ),
    "put: several traced slots": (
        lambda: jax.jit(put_adapters)(stacked(), np.arange(2), OWN, PLAN),
        ValueError,
        r"one integer, got an array of shape \(2,\)",
    ),
    "put: a traced float": (
        lambda: jax.jit(put_adapters)(stacked(), 1.0, OWN, PLAN),
        TypeError,
        "slot must be an integer, got an array of float32",
    ),
    "put: a slot too far": (lambda: put(slot=3), IndexError, "from 0 to 2.*got 3"),
    "put: the base": (lambda: put(slot=-1), IndexError, "-1 stands for the base alone"),
    "put: rank above": (
        lambda: put(rank=4),
        ValueError,
        "rank 4 of the plan is above the rank of the stack, 2: make the stack with rank=4",
    ),
    "put: another target": (
        lambda: put(stacked(targets="up")),
        KeyError,
        "adapts 'down', which the stack does not; the first paths are 'up'",
    ),
    "put: DoRA": (
        lambda: put(use_dora=True),
        ValueError,
        "the plan has DoRA and the stack has LoRA",
    ),
    "put: other params": (
        lambda: put_adapters(
            stacked(), 0, filled(shapes_of({"up": draw(4, 4)}, FOREIGN), 0), FOREIGN
        ),
        ValueError,
        r"'up': A of a slot has the shape \(8, 2\), and the plan, .* \(4, 2\)",
    ),
    "put: the stack's plan": (
        lambda: put(plan=stack_adapters([OWN], PLAN, rank=4)[1]),
        ValueError,
        r"'down': adapter\['A'\] must have the shape \(16, 4\)",
    ),
    "put: no plan": (
        lambda: put_adapters(stacked(), 0, OWN, "plan"),
        TypeError,
        "must be an AdapterPlan, got str",
    ),
    "put: wider": (
        lambda: put(stacked(dtype="bfloat16")),
        TypeError,
        "'down': A has the dtype float32, and the stack, of bfloat16, would round it",
    ),
    "put: trained leaves": (
        lambda: put_adapters(stacked(), 0, WITH_BIAS, TRAINED),
        ValueError,
        "trains the leaves 'bias'",
    ),
    "put: biases": (lambda: put(adapters=BIASED), ValueError, "has no biases"),
    "take: no stack": (
        lambda: take_adapters(OWN, 0),
        TypeError,
        "must be an AdapterStack",
    ),
    "take: a plan as rank": (
        lambda: take_adapters(stacked(), 0, PLAN),
        TypeError,
        "rank must be a positive integer",
    ),
    "take: both": (
        lambda: take_adapters(stacked(), 0, 2, PLAN),
        ValueError,
        "rank=2 and plan are both given",
    ),
    "take: rank above": (
        lambda: take_adapters(stacked(), 0, rank=3),
        ValueError,
        "at 'down': rank 3 is above the rank of the stack, 2",
    ),
    "take: rank 0": (lambda: take_adapters(stacked(), 0, rank=0), ValueError, "positive"),
    "take: entries behind the rank": (
        lambda: take_adapters(stacked(), 0, rank=1),
        ValueError,
        "'down': slot 0 has entries behind the rank 1 that are not zero: give",
    ),
    "take: fewer targets": (
        lambda: take_adapters(stacked(), 0, plan=PLAN.subset("up")),
        ValueError,
        "'down': slot 0 has an adapter, and the plan none",
    ),
    "take: fewer magnitudes": (
        lambda: take_adapters(stacked(use_dora=True), 0, plan=PLAN),
        ValueError,
        "'down': slot 0 has DoRA, and the result would be without 'm'",
    ),
    "take: more magnitudes": (
        lambda: take_adapters(put(stacked(use_dora=True)), 0),
        ValueError,
        "'down': slot 0 has no DoRA, and the result would be with 'm': give the plan",
    ),
    "take: another scale": (
        lambda: take_adapters(stacked(), 0, plan=PLAN.replace(scale={"down": 3.0})),
        ValueError,
        "'down': the scale of slot 0 is 8.0, and that of the plan is 3.0",
    ),
    "take: an empty slot": (
        lambda: take_adapters(stacked(), 1, plan=PLAN),
        ValueError,
        "'down': the scale of slot 1 is 0.0, and that of the plan is 8.0",
    ),
    "take: the base": (lambda: take_adapters(stacked(), -1), IndexError, "base alone"),
    "take: trained leaves": (
        lambda: take_adapters(stacked(), 0, plan=TRAINED),
        ValueError,
        "trains the leaves 'bias'",
    ),
    "take: deleted": (
        lambda: take_adapters(deleted(), 0),
        ValueError,
        "has been deleted or donated",
    ),
}


def deleted():
    stack = stacked()
    for x in jax.tree.leaves(stack):
        x.delete()
    return stack


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_is_wrong(name):
    run, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        run()
