"""Adapted layers on a mesh: same results, and no traffic of the weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from tests import support

N_IN, N_OUT = 256, 384
# Of the weight's axes; the factors' specs follow from them.
LAYOUTS = {"column-parallel": (None, "model"), "row-parallel": ("model", None)}


def shard(case, layout, mesh):
    spec_in, spec_out = LAYOUTS[layout]
    specs = {"A": P(spec_in, None), "B": P(None, spec_out), "m": P(spec_out)}

    def put(value, spec):
        return jax.device_put(np.asarray(value), NamedSharding(mesh, spec))

    adapter = {name: put(value, specs[name]) for name, value in case.adapter.items()}
    weight = put(case.weight, P(spec_in, spec_out))
    return support.Case(put(case.x, P(None, spec_in)), weight, case.bias, adapter, case.c)


def gradients(linear):
    def loss(adapter, x, weight, c):
        return jnp.sum(linear(x, weight, adapter, 2.0) * c)  # jnp.vdot would gather both

    return jax.grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_tensor_parallel_layers_do_not_move_the_weight(method, layout):
    mesh = Mesh(np.array(jax.devices()), ("model",))
    case = support.make_case(method=method, shape=(N_IN, N_OUT))
    linear = getattr(lora_jax, f"{method}_linear")
    sharded = shard(case, layout, mesh)
    step = jax.jit(gradients(linear))
    args = sharded.adapter, sharded.x, sharded.weight, sharded.c
    text = step.lower(*args).compile().as_text()
    large = [
        line
        for line in text.splitlines()
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line)
        and np.prod(re.findall(r"f32\[([\d,]*)\]", line)[0].split(","), dtype=int)
        > max(N_IN, N_OUT) * 16
    ]
    assert not large
    want = step(case.adapter, case.x, case.weight, case.c)
    for got, expected in zip(
        jax.tree.leaves(step(*args)), jax.tree.leaves(want), strict=True
    ):
        support.assert_close(got, expected, 64)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merge_keeps_the_sharding_of_the_weight(method):
    mesh = Mesh(np.array(jax.devices()), ("model",))
    case = support.make_case(method=method, shape=(N_IN, N_OUT))
    merge = jax.jit(getattr(lora_jax, f"merge_{method}_weight"))
    want = merge(case.weight, case.adapter, 2.0)
    for layout in LAYOUTS:
        sharded = shard(case, layout, mesh)
        merged = merge(sharded.weight, sharded.adapter, 2.0)
        assert merged.sharding.is_equivalent_to(sharded.weight.sharding, 2)
        support.assert_close(merged, want, 16)


def test_sequence_parallel_inputs_are_not_gathered():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "sequence"))
    case = support.make_case(shape=(64, 96))
    x, c = np.ones((4, 16, 64), "float32"), np.ones((4, 16, 96), "float32")
    sharding = NamedSharding(mesh, P("data", "sequence", None))
    args = (
        case.adapter,
        jax.device_put(x, sharding),
        case.weight,
        jax.device_put(c, sharding),
    )
    step = jax.jit(gradients(lora_jax.lora_linear))
    text = step.lower(*args).compile().as_text()
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", text)
    assert "all-reduce" in text


LINEARS = {
    "lora": (lora_jax.lora_linear, {}),
    "lora, dropout": (
        lora_jax.lora_linear,
        {"dropout_rate": 0.1, "dropout_key": jax.random.PRNGKey(0)},
    ),
    "dora": (lora_jax.dora_linear, {}),
}


@pytest.mark.parametrize("spec", [("data", None), (None, "data"), (None, None)], ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_column_parallel_on_a_mesh_with_explicit_axes(name, spec):
    linear, options = LINEARS[name]
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=explicit)
    case = support.make_case("tokens", method=name.split(",")[0], shape=(64, 128))
    x, c = (np.concatenate([v, v, v, v], axis=1) for v in (case.x, case.c))

    def step(adapter, x, weight, c):
        forward = lambda a, x: linear(x, weight, a, 2.0, **options)  # noqa: E731
        y, pull = jax.vjp(forward, adapter, x)
        return y, pull(c)

    want = jax.jit(step)(case.adapter, x, case.weight, c)
    specs = {"A": P(None, None), "B": P(None, "model"), "m": P("model")}
    with support.set_mesh(mesh):

        def put(value, *axes):
            return jax.device_put(np.asarray(value), NamedSharding(mesh, P(*axes)))

        adapter = {k: put(v, *specs[k]) for k, v in case.adapter.items()}
        args = put(x, *spec, None), put(case.weight, None, "model"), put(c, *spec, "model")
        got = jax.jit(step)(adapter, *args)
        assert jax.typeof(got[0]).sharding.spec == P(*spec, "model")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        support.assert_close(a, b, 64)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_inside_shard_map(name):
    linear, _ = LINEARS[name]
    mesh = Mesh(np.array(jax.devices()), ("model",))
    case = support.make_case("tokens", method=name, shape=(64, 128))
    specs = {"A": P(), "B": P(None, "model"), "m": P("model")}
    layer = jax.shard_map(
        lambda x, weight, adapter: linear(x, weight, adapter, 2.0),
        mesh=mesh,
        in_specs=(P(), P(None, "model"), {k: specs[k] for k in case.adapter}),
        out_specs=P(None, None, "model"),
    )
    got = jax.jit(layer)(case.x, case.weight, case.adapter)
    support.assert_close(got, linear(case.x, case.weight, case.adapter, 2.0), 64)
