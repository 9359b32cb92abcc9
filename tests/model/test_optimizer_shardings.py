"""Where the states of optimizers lie on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import optim

MESH = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@functools.cache
def made():
    """Adapters on a mesh, their shardings and their plan."""
    weight = jax.device_put(
        np.ones((16, 6), "float32"), NamedSharding(MESH, P("tensor", "fsdp"))
    )
    config = lora_jax.LoraConfig(rank=4, use_dora=True)
    plan = lora_jax.plan_adapters(config, {"w": weight})
    shardings = lora_jax.adapter_shardings({"w": weight}, plan)
    return lora_jax.init_adapters(jax.random.key(0), {"w": weight}, plan), shardings


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9)),
    "lora_plus": optim.lora_plus(1e-2),
    "every other step": optax.MultiSteps(optax.adam(1e-2), 2),
    "riemannian": optax.chain(optim.scale_by_riemannian(), optax.adam(1e-2)),
    "lora_rite": optim.lora_rite(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("split_over", [(), "data", ("data", "fsdp")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_lie_as_their_adapters(name, split_over):
    optimizer = OPTIMIZERS[name]
    adapters, shardings = made()
    got = lora_jax.optimizer_shardings(optimizer, adapters, shardings, split_over)
    state = jax.jit(optimizer.init, out_shardings=got)(adapters)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    sizes = [
        (x.size, x.addressable_shards[0].data.size)
        for x in jax.tree.leaves(state)
        if x.size in (64, 24, 6) and x.shape in ((16, 4), (4, 6), (6,))
    ]
    # A is split over tensor. 6 entries are split over one axis more; 4 do not divide 6.
    parts = {(): (2, 1, 1), "data": (4, 2, 2), ("data", "fsdp"): (8, 1, 1)}[split_over]
    want = {(n, n // k) for n, k in zip((64, 24, 6), parts, strict=True)}
    if name != "adafactor":  # which has rows and columns of moments
        assert set(sizes) == want
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state) if not x.ndim)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_keeps_the_shardings_and_the_values(name):
    optimizer = OPTIMIZERS[name]
    adapters, shardings = made()
    places = lora_jax.optimizer_shardings(optimizer, adapters, shardings, "data")

    def step(adapters, state):
        grads = jax.tree.map(jnp.cos, adapters)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    on = jax.jit(step, out_shardings=(shardings, places))
    here = jax.device_get(adapters)
    want, state = jax.jit(lambda own: step(own, optimizer.init(own)))(here)
    got, own = on(adapters, jax.jit(optimizer.init, out_shardings=places)(adapters))
    # These gradients of B have rank one: the other directions have the root of a rounding.
    rtol = 1e-3 if name == "lora_rite" else 1e-5
    for x, y in zip(
        jax.tree.leaves((got, own)), jax.tree.leaves((want, state)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)
    for x, place in zip(jax.tree.leaves(own), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)


def test_the_rank_is_not_split_in_a_stack_either():
    shapes = {"A": (3, 5, 4), "B": (3, 4, 7)}  # the mesh axis divides the ranks alone
    adapters = {"w": {n: jax.ShapeDtypeStruct(x, "float32") for n, x in shapes.items()}}
    shardings = {"w": dict.fromkeys(shapes, NamedSharding(MESH, P()))}
    got = lora_jax.optimizer_shardings(optax.adam(1e-2), adapters, shardings, "data")
    assert all(own.is_fully_replicated for own in jax.tree.leaves(got))


def test_errors():
    adapters, shardings = made()
    adam = optax.adam(1e-2)
    with pytest.raises(
        TypeError, match="optimizer must be an optax transformation, got dict"
    ):
        lora_jax.optimizer_shardings(adapters, adam, shardings)
    with pytest.raises(ValueError, match="split_over has 'model', which is no axis of the"):
        lora_jax.optimizer_shardings(adam, adapters, shardings, "model")
    fewer = {"w": {name: x for name, x in shardings["w"].items() if name != "A"}}
    with pytest.raises(TypeError, match="sharding of A of 'w' must be a jax"):
        lora_jax.optimizer_shardings(adam, shardings, adapters)
    with pytest.raises(KeyError, match=r"one of them lacks 'w/A'\."):
        lora_jax.optimizer_shardings(adam, adapters, fewer)
    with pytest.raises(TypeError, match=r"must be \{path: \{name: ...\}\}"):
        lora_jax.optimizer_shardings(adam, [1], shardings)
