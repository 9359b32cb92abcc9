"""Adapted functions on meshes: GSPMD, axes in the types, shard_map."""

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import quant
from tests.support import asarray, normal, set_mesh, x64
from tests.transform.mesh_cases import CASES, Place
from tests.transform.support import assert_same, merged, plan_of, trained
from tests.transform.test_rows import of_own_rows, row_axes
from tests.xla_flags import WITH_NEW_EMITTERS


def mesh_of(kind, shape=(2, 4), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def put(mesh, array, *spec, dtype="float64"):
    array = np.asarray(array, jnp.dtype(dtype))  # NumPy splits it without a program
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def tensor_parallel(mesh, dtype="float64", n=16, wide=32):
    """Params of an MLP with its inner axis sharded, and sharded tokens."""
    params = {
        "up": put(mesh, normal(n, wide), None, "model", dtype=dtype),
        "down": put(mesh, normal(wide, n), "model", None, dtype=dtype),
    }
    return params, put(mesh, normal(8, n), "data", None, dtype=dtype)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_no_weight_travels_between_devices(kind):
    mesh = mesh_of(kind)
    params, x = tensor_parallel(mesh, "float32", n=64, wide=256)

    def fn(params, x):
        out = {} if kind == AxisType.Auto else {"out_sharding": jax.typeof(x).sharding}
        return jnp.einsum("bf,fd->bd", jnp.tanh(x @ params["up"]), params["down"], **out)

    plan = plan_of(fn, params, x, rank=2)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapted = lora_jax.adapt(fn, plan)

    def loss(adapters, params, x):
        return jnp.sum(jnp.sin(adapted(params, adapters, x)))

    check_moves_less(params["up"].size // 4, jax.grad(loss), adapters, params, x)


def check_moves_less(size, fn, *args):
    """Asserts that no array of `size` entries travels between devices."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    moved = re.findall(
        r"= (?:\()?f32\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", text
    )
    assert all(np.prod([int(n) for n in shape.split(",") if n]) < size for shape in moved)


def test_no_weight_travels_for_its_norms():
    """A mesh splits the second axis of the outputs, which a fold would gather."""
    mesh = mesh_of(AxisType.Auto)
    params = {"w": put(mesh, normal(64, 4, 32), None, None, "model", dtype="float32")}
    x = put(mesh, normal(8, 64), "data", None, dtype="float32")

    def fn(params, x):
        return jnp.einsum("bd,dhk->bhk", x, params["w"])

    plan = plan_of(fn, params, x, rank=2, use_dora=True)
    adapters = jax.device_put(
        trained(params, plan), lora_jax.adapter_shardings(params, plan)
    )
    check_moves_less(params["w"].size // 4, lora_jax.adapt(fn, plan), params, adapters, x)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_around(check_vma):
    mesh = mesh_of(AxisType.Auto, (8,), ("data",))
    with x64():
        params, x = {"up": normal(12, 10), "down": normal(10, 7)}, normal(8, 12)
        plan = plan_of(mlp, params, x)
        adapters = trained(params, plan)
        adapted = lora_jax.adapt(mlp, plan)

        def local(params, adapters, x):
            return lax.pmean(jnp.sum(adapted(params, adapters, x)), "data")

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )

        def both(params, adapters, x):
            want = jnp.sum(mlp(merged(params, adapters, plan), x)) / 8
            return mapped(params, adapters, x), want

        assert_same(*jax.jit(both)(params, adapters, x))


def on_two_devices(run, own, values, x):
    """`run(values, x)` where each device has its own `x` and its own `values[own]`."""
    mesh = mesh_of(AxisType.Auto, (2,), ("data",))

    def at(i):
        return values | {own: jax.tree.map(lambda v: v[i], values[own])}

    def local(values, x):
        alone = {own: jax.tree.map(lambda v: v[0], values[own])}
        return run(values | alone, x[0])[None]

    specs = {name: P("data") if name == own else P() for name in values}
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data")
    )
    got = jax.jit(mapped)(values, x)
    assert_same(got, jnp.stack([run(at(i), x[i]) for i in range(2)]), 1e-5)


@pytest.mark.parametrize("form", ["dense", "int8"])
@pytest.mark.parametrize("own", ["weights", "adapters", "scales"])
def test_devices_of_a_shard_map_with_values_of_their_own(own, form):
    shapes = {"up": (2, 12, 10), "down": (2, 10, 7)}
    params = {name: normal(*shape, dtype="float32") for name, shape in shapes.items()}
    if form == "int8":
        params = lora_jax.quantize_params(params, [*params], "int8", batch_axes=1)
    first = jax.tree.map(lambda v: v[0], params)
    x = normal(2, 3, 12, dtype="float32")
    plan = plan_of(mlp, first, x[0])
    tenants = [trained(first, plan, seed) for seed in range(2)]
    both = {
        "weights": params,
        "adapters": jax.tree.map(lambda *own: jnp.stack(own), *tenants),
        "scales": np.array([0.5, 2.0], "float32"),
    }
    values = {**jax.tree.map(lambda v: v[0], both), own: both[own]}

    def run(values, x):
        adapted = lora_jax.adapt(mlp, plan, scales=values["scales"])
        return adapted(values["weights"], values["adapters"], x)

    on_two_devices(run, own, values, x)


def test_devices_of_a_shard_map_with_slots_of_their_own():
    params = {"up": normal(12, 10, dtype="float32"), "down": normal(10, 7, dtype="float32")}
    x, slots = normal(2, 3, 12, dtype="float32"), np.array([1, -1, 0])
    plan = plan_of(mlp, params, x[0])
    tenants = [trained(params, plan, seed) for seed in range(4)]
    made = [lora_jax.stack_adapters(tenants[i : i + 2], plan) for i in (0, 2)]
    stacks = jax.tree.map(lambda *own: jnp.stack(own), *[stack for stack, _ in made])
    adapted = lora_jax.adapt_rows(mlp, made[0][1])
    on_two_devices(
        lambda own, x: adapted(params, own["stack"], slots, x),
        "stack",
        {"stack": stacks},
        x,
    )


def masks_of_devices(body, check_vma):
    """How many of eight devices drop other entries in `body(w, x)`, for equal rows."""
    mesh = mesh_of(AxisType.Auto, (8,), ("data",))
    params = {"w": np.zeros((12, 12), "float32")}
    x = np.ones((8, 12), "float32")

    def fn(params, x):
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return mapped(params["w"], x)

    plan = plan_of(fn, params, x, dropout=0.5)
    adapters = trained(params, plan)
    adapted = lora_jax.adapt(fn, plan, dropout_key=jax.random.key(0))
    rows = jax.jit(adapted)(params, adapters, x)
    return len(np.unique(np.asarray(rows), axis=0))


def _many_equations(x, w):
    for _ in range(24):
        x = x + 1.0
    return x @ w


OWN_TOKENS = {
    "product": lambda w, x: x @ w,
    "jit": lambda w, x: jax.jit(_many_equations)(x, w),
    "scan": lambda w, x: lax.scan(lambda c, _: (x, c @ w), x, length=2)[1][1],
    "while": lambda w, x: lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, x, c[1] @ w), (0, x, x)
    )[2],
    "cond": lambda w, x: lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: 2 * x @ w),
    "index": lambda w, x: (
        (jnp.ones((1, 12), "float32") + 0 * lax.axis_index("data").astype("float32")) @ w
    ),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", OWN_TOKENS)
def test_devices_drop_other_entries_of_sharded_tokens(name, check_vma):
    assert masks_of_devices(OWN_TOKENS[name], check_vma) == 8


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_drop_the_same_entries_of_tokens_that_they_share(check_vma):
    def body(w, x):
        return lax.psum(x, "data") @ w + 0 * x

    assert masks_of_devices(body, check_vma) == 1


def test_shardings_of_an_inner_jit_are_constraints():
    mesh = mesh_of(AxisType.Auto, (8,), ("data",))
    sharded, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    inner = jax.jit(
        lambda w, x: x @ w, in_shardings=(whole, sharded), out_shardings=sharded
    )

    with x64():
        params, x = {"w": normal(12, 10)}, normal(8, 12)
        plan = plan_of(lambda p, x: inner(p["w"], x), params, x)
        adapters = trained(params, plan)
        adapted = lora_jax.adapt(lambda p, x: inner(p["w"], x), plan)

        def both(params, adapters, x):
            want = x @ merged(params, adapters, plan)["w"]
            return adapted(params, adapters, x), want

        got, want = jax.jit(both)(params, adapters, x)
        assert got.sharding.is_equivalent_to(sharded, 2)
        assert_same(got, want)


def test_constraints_on_a_weight_stay():
    """Also those that the values do not show."""
    mesh = mesh_of(AxisType.Auto, (8,), ("model",))
    spec = NamedSharding(mesh, P(None, "model"))

    def fn(params, x):
        return x @ lax.with_sharding_constraint(params["w"], spec)

    with x64():
        params, x = {"w": normal(12, 16)}, normal(5, 12)
        plan = plan_of(fn, params, x)
        lowered = jax.jit(lora_jax.adapt(fn, plan)).lower(params, trained(params, plan), x)
    assert "sharding" in lowered.as_text()


# What the other tests of meshes with explicit axes try; every case has one of its own.
SOME = ("tied_head", "row_parallel", "scan_of_checkpoints", "experts", "automatic")
SHARDS = ("shards", "shards_along_one_axis", "grouped_experts")

without_0_7 = pytest.mark.skipif(
    jax.__version_info__ < (0, 8, 0),
    reason="JAX 0.7 adds no cotangents of automatic axes outside of a jit on explicit ones",
)


def some(names, others=CASES):
    """Parameters of which only those of `names` are no slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=[slow] * (n not in names)) for n in others]


class Placed(NamedTuple):
    """A case with its arrays, on a mesh or on one device."""

    fn: Callable[..., Any]
    params: dict[str, Any]
    x: jax.Array


def placed(name, mesh=None, dtype="float64"):
    case, place = CASES[name], Place(mesh)

    def array(values, spec, dtype):
        if mesh is None:
            return asarray(values, dtype)
        return put(mesh, values, *spec, dtype=dtype)

    params = {
        name: array(normal(*shape) / 4, spec, dtype)
        for name, (shape, spec) in case.params.items()
    }
    floating = np.issubdtype(case.x.dtype, np.floating)
    x = array(case.x, case.spec, dtype if floating else case.x.dtype)
    return Placed(lambda params, x: case.fn(params, x, place), params, x)


@jax.jit
def sum_of(out):
    return jnp.sum(1 + jnp.sin(out))  # a sum of signs would cancel


@jax.jit
def take_step(adapters, grads):
    return jax.tree.map(jnp.subtract, adapters, grads)


def value_and_gradients(fn, adapters, params, x, *, jit=True, options=None):
    def loss(adapters, params, x):
        out = fn(params, adapters, x)
        return sum_of(out), out

    def run(adapters, params, x):
        out, grads = jax.value_and_grad(loss, has_aux=True)(adapters, params, x)
        take_step(adapters, grads)
        return out, grads

    if jit:
        run = jax.jit(run, compiler_options=options)
    return jax.device_get(run(adapters, params, x))


@functools.cache
def merged_on_one_device(name, use_dora):
    """The plan of a case, and the values and gradients of the merged function."""
    off = placed(name)
    plan = plan_of(off.fn, off.params, off.x, **CASES[name].config, use_dora=use_dora)

    def reference(params, adapters, x):
        return off.fn(merged(params, adapters, plan), x)

    values = trained(off.params, plan)
    return plan, value_and_gradients(reference, values, off.params, off.x)


def check_on_mesh(
    name, *, mesh=None, context=True, jit=True, shard=lambda mesh, v: v, use_dora=False
):
    """Asserts that an adapted case is on a mesh what the merged one is on one device."""
    config = {**CASES[name].config, "use_dora": use_dora}
    mesh = mesh or mesh_of(AxisType.Explicit)
    with x64():
        with set_mesh(mesh) if context else contextlib.nullcontext():
            on = placed(name, mesh)
            plan = plan_of(on.fn, on.params, on.x, **config)
            values = jax.device_get(trained(on.params, plan))
            laid = lora_jax.adapter_shardings(on.params, plan)
            adapters = jax.device_put(values, laid)
            adapters = jax.tree.map(lambda v: shard(mesh, v), adapters)
            adapted = lora_jax.adapt(on.fn, plan)
            got = value_and_gradients(adapted, adapters, on.params, on.x, jit=jit)
            base = jax.eval_shape(on.fn, on.params, on.x)
            out = jax.eval_shape(adapted, on.params, adapters, on.x)
            assert base.sharding == out.sharding
        off, want = merged_on_one_device(name, use_dora)
        assert off == plan
        assert {path: target.axes for path, target in plan.targets.items()} == (
            CASES[name].axes
        )
        assert_same(got, want)


def skip_where_jax_cannot(name):
    if jax.__version_info__ < (0, 8, 0):
        if name in ("scan", "branches"):
            pytest.skip("JAX 0.7 keeps nothing on automatic axes for loops and branches")
        if name == "shards_along_one_axis":
            pytest.skip("JAX 0.7 aborts where a mesh is partly manual")


@pytest.mark.mostly_slow(12)
@pytest.mark.parametrize("name", CASES)
def test_explicit_axes(name):
    skip_where_jax_cannot(name)
    check_on_mesh(name)


@pytest.mark.parametrize("name", some(("row_parallel", "tied_head", "scan", *SHARDS)))
@pytest.mark.parametrize("use_dora", [False, True])
def test_automatic_axes(name, use_dora):
    check_on_mesh(name, mesh=mesh_of(AxisType.Auto), use_dora=use_dora)


@pytest.mark.parametrize("name", some((*SOME, *SHARDS)))
def test_dora_on_explicit_axes(name):
    skip_where_jax_cannot(name)
    check_on_mesh(name, use_dora=True)


@pytest.mark.parametrize("name", [*SOME, *SHARDS])
def test_sharded_adapters_on_explicit_axes(name):
    skip_where_jax_cannot(name)

    def shard(mesh, v):
        spec = [None] * v.ndim
        if v.shape[-2] % 2 == 0:
            spec[-2] = "data"
        if v.shape[-1] % 4 == 0:
            spec[-1] = "model"
        return jax.device_put(v, NamedSharding(mesh, P(*spec)))

    check_on_mesh(name, shard=shard)


@pytest.mark.parametrize("name", [*SOME, "shards"])
def test_explicit_axes_of_arrays_alone(name):
    check_on_mesh(name, context=False)


KINDS = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "automatic": (AxisType.Auto, AxisType.Auto),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}


def over_data(mesh, array):
    """An array with its first axis, which is whole, split over "data"."""
    _, *rest = (*array.sharding.spec, *[None] * array.ndim)[: array.ndim]
    return jax.device_put(array, NamedSharding(mesh, P("data", *rest)))


@pytest.mark.mostly_slow(10)
@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [
        # The rules for rows are those of `test_rows.py`, and every case is on explicit axes
        # without rows: of the product of both the first cases are enough by default.
        *((name, "explicit", "dense") for name in (*SOME, *SHARDS, "embedding")),
        *(
            pytest.param(name, "explicit", "dense", marks=pytest.mark.slow)
            for name in CASES
            if name not in (*SOME, *SHARDS, "embedding")
        ),
        *(("column_parallel", "mixed", form) for form in ("dense", "gathered")),
        *((name, "mixed", "dense") for name in ("fused", "mapped", "shards")),
        *((name, "automatic", "dense") for name in ("tied_head", "experts", *SHARDS)),
        *((name, "automatic", "gathered") for name in ("row_parallel", "shards")),
        *((name, "explicit", "gathered") for name in (*SOME, "shards", "embedding")),
        *(("shards", kind, "split") for kind in KINDS),
    ],
)
def test_each_row_has_its_own_adapter(name, kind, form):
    """The adapters lie by the rule, and their slots whole or `"split"` over devices.

    In the gathered form the slots of the rows lie whole, else they are split as the rows.
    """
    skip_where_jax_cannot(name)
    case, mesh = (
        CASES[name],
        jax.make_mesh((2, 4), ("data", "model"), axis_types=KINDS[kind]),
    )
    axis = case.spec.index("data") if "data" in case.spec else 0
    n_rows, is_dense = case.x.shape[axis], form != "gathered"
    slots = np.arange(n_rows, dtype="int32") % 4 - 1
    with x64():
        off = placed(name)
        plan = plan_of(off.fn, off.params, off.x, **case.config, use_dora=True)
        tenants = [trained(off.params, plan, seed=i) for i in range(3)]

        def model(params, own, x):
            return off.fn(merged(params, own, plan), x)

        out_axes = row_axes(off.fn, off.params, (off.x,), axis, n_rows)
        alone = of_own_rows(off.fn, model, slots, out_axes)
        want, grads = value_and_gradients(
            lambda *args: alone(*args)[0], tenants, off.params, off.x
        )
        with set_mesh(mesh):
            on = placed(name, mesh)
            laid = lora_jax.adapter_shardings(on.params, plan)
            tenants = [jax.device_put(jax.device_get(own), laid) for own in tenants]
            # So many slots are no longer cheaper all at once than those of each row.
            total = {"dense": 3, "split": 4, "gathered": 12}[form]
            stack, of_stack = lora_jax.stack_adapters(tenants, plan, total)
            if form == "split":
                stack = jax.tree.map(lambda own: over_data(mesh, own), stack)
            slots = put(mesh, slots, "data" if is_dense else None, dtype="int32")
            rows = lora_jax.adapt_rows(on.fn, of_stack, axis)
            adapted = lambda params, stack, x: rows(params, stack, slots, x)  # noqa: E731
            got = value_and_gradients(
                *(adapted, stack, on.params, on.x),
                options=None if is_dense else WITH_NEW_EMITTERS,
            )
            base = jax.eval_shape(on.fn, on.params, on.x)
            out = jax.eval_shape(adapted, on.params, stack, on.x)
            assert base.sharding == out.sharding
        of_slots = jax.tree.map(lambda *own: np.stack(own), *grads)
        of_tenants = jax.tree.map(lambda own: own[:3], got[1].adapters)
        assert_same((got[0], of_tenants), (want, of_slots))


@pytest.mark.parametrize("jit", [False, True])
def test_explicit_axes_of_a_shard_map_alone(jit):
    """Neither the weights nor the context have a mesh."""
    mesh = mesh_of(AxisType.Explicit, (1,), ("x",))

    def fn(params, x):
        tanh = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=P(), out_specs=P())
        return tanh(x @ params["a"]) @ params["b"]

    with x64():
        params, x = jax.tree.map(
            asarray, ({"a": normal(4, 5), "b": normal(5, 2)}, normal(3, 4))
        )
        plan = plan_of(fn, params, x)
        adapters = trained(params, plan)
        got = value_and_gradients(lora_jax.adapt(fn, plan), adapters, params, x, jit=jit)

        def reference(params, adapters, x):
            return fn(merged(params, adapters, plan), x)

        assert_same(got, value_and_gradients(reference, adapters, params, x))


@without_0_7
@pytest.mark.parametrize("name", ["tied_head", "row_parallel", "experts", "shards"])
def test_explicit_axes_without_jit(name):
    check_on_mesh(name, jit=False)


@pytest.mark.parametrize("name", ["column_parallel", "fused", "mapped", "branches"])
def test_explicit_and_automatic_axes(name):
    skip_where_jax_cannot(name)
    kinds = AxisType.Explicit, AxisType.Auto
    check_on_mesh(name, mesh=jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds))


@pytest.mark.parametrize("name", [*SOME[1:], "entries_of_a_stack", "jitted_twice"])
def test_dropout_on_explicit_axes(name, monkeypatch):
    """A feature that all tokens drop is a row of `A` that is zero."""
    rate, mesh = 0.25, mesh_of(AxisType.Explicit)
    keep = np.random.default_rng(3).random(32) > rate
    monkeypatch.setattr(
        jax.random,
        "bernoulli",
        lambda key, p, shape: jnp.broadcast_to(keep[: shape[-1]], shape),
    )
    jax.clear_caches()
    with x64():
        off = placed(name)
        plan = plan_of(off.fn, off.params, off.x, dropout=rate)
        values = trained(off.params, plan)

        def scales(shape):  # of the rows of A
            return np.broadcast_to(keep[: shape[-2], None] / (1 - rate), shape)

        def reference(params, adapters, x):
            dropped = {
                path: own | {"A": own["A"] * scales(own["A"].shape)}
                for path, own in adapters.items()
            }
            return off.fn(merged(params, dropped, plan), x)

        want = value_and_gradients(reference, values, off.params, off.x)
        with set_mesh(mesh):
            on = placed(name, mesh)
            adapted = lora_jax.adapt(on.fn, plan, dropout_key=jax.random.key(3))
            got = value_and_gradients(adapted, values, on.params, on.x)
        assert_same(got, want)
    jax.clear_caches()


@pytest.mark.parametrize("name", ["tied_head", "row_parallel", "scan_of_checkpoints"])
def test_masks_are_the_same_on_explicit_axes(name):
    mesh, key = mesh_of(AxisType.Explicit), jax.random.key(3)
    with x64():
        off = placed(name)
        plan = plan_of(off.fn, off.params, off.x, dropout=0.25)
        values = trained(off.params, plan)
        model = lora_jax.adapt(off.fn, plan, dropout_key=key)
        want = value_and_gradients(model, values, off.params, off.x)
        with set_mesh(mesh):
            on = placed(name, mesh)
            adapted = lora_jax.adapt(on.fn, plan, dropout_key=key)
            got = value_and_gradients(adapted, values, on.params, on.x)
        assert_same(got, want)


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "name", some(("tied_head", "scan_of_checkpoints", "experts"), SOME)
)
def test_quantized_weights_on_explicit_axes(name, use_dora, form):
    mesh = mesh_of(AxisType.Explicit)
    settings = {} if form == "int8" else {"block_size": 16, "codec": "bitsandbytes"}
    stacked = {"batch_axes": 1} if "b" in "".join(CASES[name].axes.values()) else {}

    def quantized(params):
        return lora_jax.quantize_params(params, "*", form, **settings, **stacked)

    off = placed(name, dtype="float32")
    params = quantized(off.params)
    plan = plan_of(off.fn, params, off.x, use_dora=use_dora)
    values = jax.tree.map(lambda v: v / 4, jax.device_get(trained(params, plan)))
    dense = jax.tree.map(quant.dequantize, params, is_leaf=quant.is_quantized)

    def reference(params, adapters, x):
        return off.fn(merged(params, adapters, plan), x)

    def wide(x):
        return np.asarray(x, "float64") if jnp.issubdtype(x.dtype, jnp.floating) else x

    with x64():
        given = jax.tree.map(wide, jax.device_get((values, dense, off.x)))
        want = value_and_gradients(reference, *given)
    with set_mesh(mesh):
        on = placed(name, mesh, dtype="float32")
        params = quantized(on.params)
        assert plan_of(on.fn, params, on.x, use_dora=use_dora) == plan
        new = lora_jax.init_adapters(jax.random.key(0), params, plan)
        assert jax.tree.structure(new) == jax.tree.structure(values)
        got = value_and_gradients(lora_jax.adapt(on.fn, plan), values, params, on.x)
    assert_same(got, want, 1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["row_parallel", "fused_heads", "out_in", "experts"])
def test_merge_of_weights_on_explicit_axes(name, use_dora):
    mesh = mesh_of(AxisType.Explicit)
    with x64():
        off = placed(name)
        plan = plan_of(off.fn, off.params, off.x, use_dora=use_dora)
        values = trained(off.params, plan)

        @jax.jit
        def on_one_device(params, values):
            norms = lora_jax.adapted_column_norms(params, values, plan)
            losses = lora_jax.merge_losses(params, values, plan)
            return merged(params, values, plan), norms, losses

        want, want_norms, losses = on_one_device(off.params, values)
        with set_mesh(mesh):
            params = placed(name, mesh).params
            dense = lora_jax.merge_adapters(params, values, plan)
            norms = lora_jax.adapted_column_norms(params, values, plan)
            given = {"column_norms": norms} if use_dora else {}
            back = lora_jax.unmerge_adapters(dense, values, plan, **given)
            got = jax.device_get(lora_jax.merge_losses(params, values, plan))
        for path, weight in params.items():
            assert jax.typeof(dense[path]) == jax.typeof(weight) == jax.typeof(back[path])
        assert_same(jax.device_get(dense), want)
        assert_same(jax.device_get(back), jax.device_get(params))
        assert_same(got, losses, 1e-6)
        assert_same(jax.device_get(norms), want_norms)


def test_uses_are_found_without_the_mesh():
    mesh = mesh_of(AxisType.Explicit)

    def roles(placed):
        plan = plan_of(placed.fn, placed.params, placed.x)
        return [(use.primitive, use.roles) for use in plan.uses["w"]]

    with set_mesh(mesh):
        on = roles(placed("gathered_before_use", mesh, "float32"))
    assert on == roles(placed("gathered_before_use", dtype="float32"))
    assert on == [("dot_general", ("contracted", "kept"))]
