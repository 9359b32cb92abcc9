"""Adapted functions on meshes: GSPMD, axes in the types, shard_map."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from tests.support import set_mesh, x64
from tests.transform.support import assert_same, merged, normal, plan_of, trained


def mesh_of(kind, shape=(2, 4), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def put(mesh, array, *spec, dtype="float64"):
    return jax.device_put(jnp.asarray(array, dtype), NamedSharding(mesh, P(*spec)))


def tensor_parallel(mesh, dtype="float64", n=16, wide=32):
    """Params of an MLP with its inner axis sharded, and sharded tokens."""
    params = {
        "up": put(mesh, normal(n, wide), None, "model", dtype=dtype),
        "down": put(mesh, normal(wide, n), "model", None, dtype=dtype),
    }
    return params, put(mesh, normal(8, n), "data", None, dtype=dtype)


@pytest.mark.parametrize("use_dora", [False, True])
def test_tensor_parallelism_left_to_the_compiler(use_dora):
    with x64():
        params, x = tensor_parallel(mesh_of(AxisType.Auto))
        plan = plan_of(mlp, params, x, use_dora=use_dora)
        adapters = trained(params, plan)
        got = jax.jit(lora_jax.adapt(mlp, plan))(params, adapters, x)
        assert_same(got, mlp(merged(params, adapters, plan), x))


def test_no_weight_travels_between_devices():
    mesh = mesh_of(AxisType.Auto)
    params, x = tensor_parallel(mesh, "float32", n=64, wide=256)
    plan = plan_of(mlp, params, x, rank=2)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapted = lora_jax.adapt(mlp, plan)

    def loss(adapters, params, x):
        return jnp.sum(jnp.sin(adapted(params, adapters, x)))

    text = jax.jit(jax.grad(loss)).lower(adapters, params, x).compile().as_text()
    moved = re.findall(
        r"= (?:\()?f32\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", text
    )
    shard = params["up"].size // 4
    assert all(np.prod([int(n) for n in shape.split(",") if n]) < shard for shape in moved)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("spec", [(None, "model"), ("model", None), (None, None)])
def test_axes_in_the_types(spec, use_dora):
    mesh = mesh_of(AxisType.Explicit)
    out = P("data", None, spec[1])

    def fn(params, x):
        return jnp.tanh(jnp.einsum("btd,df->btf", x, params["w"], out_sharding=out))

    with x64(), set_mesh(mesh):
        params = {"w": put(mesh, normal(16, 32), *spec)}
        x = put(mesh, normal(8, 3, 16), "data", None, None)
        plan = plan_of(fn, params, x, use_dora=use_dora)
        adapters = trained(params, plan)
        adapted = lora_jax.adapt(fn, plan)
        got = jax.jit(adapted)(params, adapters, x)
        assert got.sharding.spec == fn(params, x).sharding.spec
        dense = {"w": merged(jax.device_get(params), jax.device_get(adapters), plan)["w"]}
        want = jnp.tanh(jax.device_get(x) @ jax.device_get(dense)["w"])
        assert_same(jax.device_get(got), jax.device_get(want))
        gradient = jax.jit(jax.grad(lambda a: jnp.sum(adapted(params, a, x))))(adapters)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_shard_map_inside(check_vma, use_dora):
    mesh = mesh_of(AxisType.Auto)

    def fn(params, x):
        def local(up, down, x):
            return lax.psum(jnp.tanh(x @ up) @ down, "model")

        specs = P(None, "model"), P("model", None), P("data", None)
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=P("data", None), check_vma=check_vma
        )
        return mapped(params["up"], params["down"], x)

    with x64():
        params, x = tensor_parallel(mesh)
        plan = plan_of(fn, params, x, use_dora=use_dora)
        adapters = trained(params, plan)
        adapted = lora_jax.adapt(fn, plan)
        got = jax.jit(adapted)(params, adapters, x)
        assert_same(got, mlp(merged(params, adapters, plan), x))
        if use_dora:
            return
        got, want = (
            jax.jit(jax.grad(lambda a, f=f: jnp.sum(jnp.sin(f(a)))))(adapters)
            for f in (
                lambda a: adapted(params, a, x),
                lambda a: mlp(merged(params, a, plan), x),
            )
        )
        assert_same(got, want)


def test_gathered_shards_of_a_weight():
    mesh = mesh_of(AxisType.Auto, (8,), ("model",))

    def fn(params, x):
        def local(w, x):
            return x @ lax.all_gather(w, "model", axis=1, tiled=True)

        specs = P(None, "model"), P()
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
        )
        return mapped(params["w"], x)

    with x64():
        params, x = {"w": normal(12, 16)}, normal(5, 12)
        plan = plan_of(fn, params, x)
        adapters = trained(params, plan)
        got = jax.jit(lora_jax.adapt(fn, plan))(params, adapters, x)
        assert_same(got, x @ merged(params, adapters, plan)["w"])


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
        got = jax.jit(mapped)(params, adapters, x)
        assert_same(got, jnp.sum(mlp(merged(params, adapters, plan), x)) / 8)


def test_devices_drop_other_entries_of_sharded_tokens():
    mesh = mesh_of(AxisType.Auto, (8,), ("data",))
    params, x = {"w": jnp.zeros((12, 10))}, jnp.ones((8, 12))

    def fn(params, x):
        mapped = jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
        )
        return mapped(params["w"], x)

    plan = plan_of(fn, params, x, dropout=0.5)
    adapters = trained(params, plan)
    adapted = lora_jax.adapt(fn, plan, dropout_key=jax.random.key(0))
    rows = adapted(params, adapters, x)
    assert len(np.unique(np.asarray(rows), axis=0)) == 8


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
        got = jax.jit(lora_jax.adapt(lambda p, x: inner(p["w"], x), plan))(
            params, adapters, x
        )
        assert got.sharding.is_equivalent_to(sharded, 2)
        assert_same(got, x @ merged(params, adapters, plan)["w"])


def test_constraints_on_a_weight_stay():
    mesh = mesh_of(AxisType.Auto, (8,), ("model",))
    spec = NamedSharding(mesh, P(None, "model"))

    def fn(params, x):
        return x @ lax.with_sharding_constraint(params["w"], spec)

    with x64():
        params, x = {"w": normal(12, 16)}, normal(5, 12)
        plan = plan_of(fn, params, x)
        adapters = trained(params, plan)
        adapted = jax.jit(lora_jax.adapt(fn, plan))
        assert "sharding" in adapted.lower(params, adapters, x).as_text()
        assert_same(adapted(params, adapters, x), x @ merged(params, adapters, plan)["w"])
