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
        return jax.device_put(value, NamedSharding(mesh, spec))

    adapter = {name: put(value, specs[name]) for name, value in case.adapter.items()}
    weight = put(case.weight, P(spec_in, spec_out))
    return support.Case(put(case.x, P(None, spec_in)), weight, case.bias, adapter, case.c)


def gradients(linear):
    def loss(adapter, x, weight, c):
        return jnp.vdot(linear(x, weight, adapter, 2.0), c)

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
    want = gradients(linear)(case.adapter, case.x, case.weight, case.c)
    for got, expected in zip(
        jax.tree.leaves(step(*args)), jax.tree.leaves(want), strict=True
    ):
        support.assert_close(got, expected, 64)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merge_keeps_the_sharding_of_the_weight(method):
    mesh = Mesh(np.array(jax.devices()), ("model",))
    case = support.make_case(method=method, shape=(N_IN, N_OUT))
    merge = getattr(lora_jax, f"merge_{method}_weight")
    for layout in LAYOUTS:
        sharded = shard(case, layout, mesh)
        merged = jax.jit(merge)(sharded.weight, sharded.adapter, 2.0)
        assert merged.sharding.is_equivalent_to(sharded.weight.sharding, 2)
        support.assert_close(merged, merge(case.weight, case.adapter, 2.0), 16)
