"""An optimizer for each slot of a stack, against separate optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import optim
from tests.optim import support
from tests.support import (
    asarray,
    assert_close,
    assert_same_bits,
    count_traces,
    draw,
    set_mesh,
)

SLOTS, STEPS = 4, 20
RATES = asarray([1e-1, 1e-2, 3e-2, 1e-3], "float32")
PARAMS = {"q": draw(12, 9), "layers/up": draw(3, 12, 9)}
PLAN = lora_jax.plan_adapters(lora_jax.LoraConfig(axes={"layers/up": "bio"}), PARAMS)
SCALES = {
    "q": asarray([2.0, 0.5, 1.0, 0.0], "float32"),
    "layers/up": asarray([1.0, 3.0, 2.0, 0.5], "float32"),
}


def adapters(seed=0):
    """Adapters of all slots: one of DoRA, and one of three layers."""
    up = support.adapter(SLOTS, 3, seed=seed)
    return {"q": support.adapter(SLOTS, seed=seed, rest=("m",)), "layers/up": up}


def stack(seed=0):
    return lora_jax.AdapterStack(
        adapters(seed), SCALES, {"q": asarray([1, 0, 1, 0], "float32")}
    )


def take(tree, slot):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[slot], tree)


def compiled(optimizer):
    def step(params, state, grads, **masks):
        # optax itself promotes.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params, **masks)
            return optax.apply_updates(params, updates), state

    return step


def accumulated(rate):
    return optax.MultiSteps(optim.lora_fa(optax.adamw(rate), 2.0), 3)


def decayed(rate):
    return optax.adamw(rate, weight_decay=0.1, mask=optim.weight_decay_mask)


RIEMANNIAN = optim.scale_by_riemannian()
OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.1),
    "adamw": decayed,
    "lora_plus": functools.partial(optim.lora_plus, optimizer=decayed),
    "lora_fa": lambda rate: optim.lora_fa(decayed(rate), 2.0),
    "riemannian": lambda rate: optax.chain(RIEMANNIAN, decayed(rate)),
    "lora_rite": lambda rate: optim.lora_rite(rate, weight_decay=0.1),
    "accumulated": lambda rate: optax.MultiSteps(optim.lora_fa(decayed(rate), 2.0), 3),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(0.1), decayed(rate)),
    "schedule": lambda rate: optax.sgd(lambda count: rate * 0.9**count),
    "partition": lambda rate: optax.partition(
        {"A": optax.rmsprop(rate), "B": optax.adam(rate), "magnitude": optax.sgd(rate)},
        optim.adapter_labels,
    ),
    "masked": lambda rate: optax.masked(optax.adam(rate), {"q": True, "layers/up": False}),
    "frozen": lambda r: optim.trainable_and_frozen(adapters(), "q/*", optax.adam(r)),
    "adafactor": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=4),
    "schedule_free": optax.contrib.schedule_free_adamw,
    "muon": optax.contrib.muon,
}


def with_rate(make):
    """An optimizer whose learning rate is in its state."""

    def named(learning_rate):
        made = make(learning_rate)
        return optax.GradientTransformationExtraArgs(made.init, made.update)

    return optax.inject_hyperparams(named)(0.5)


@functools.cache
def masks():
    return np.random.default_rng(0).random((STEPS, SLOTS)) < 0.6


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_separate_optimizers(name):
    inner = with_rate(OPTIMIZERS[name])
    optimizer = optim.per_slot(inner)
    params, state = stack(), jax.jit(optimizer.init)(stack())
    state = optax.tree_utils.tree_set(state, learning_rate=RATES)
    separate = [take(params.adapters, slot) for slot in range(SLOTS)]
    states = [
        optax.tree_utils.tree_set(inner.init(own), learning_rate=rate)
        for own, rate in zip(separate, np.asarray(RATES), strict=True)
    ]
    one = jax.jit(compiled(inner))
    with count_traces(compiled(optimizer)) as (step, traces):
        for i, mask in enumerate(masks()):
            grads = stack(100 + i)
            before = params, state
            params, state = step(params, state, grads, step=asarray(mask))
            for slot in range(SLOTS):
                if mask[slot]:
                    own = separate[slot], states[slot], take(grads.adapters, slot)
                    separate[slot], states[slot] = one(*own)
                else:
                    assert_same_bits(*(take(x, slot) for x in ((params, state), before)))
    assert len(traces) == 1
    # XLA compiles them differently: for example, it divides several arrays by one scalar
    # with a product with its reciprocal, but not if each slot has its divisor. Solves,
    # decompositions and the iterations of Muon enlarge the difference.
    units = {"riemannian": 20, "lora_rite": 100, "muon": 100}.get(name, 4)
    for got, want in ((params.adapters, separate), (state, states)):
        want = jax.tree.map(lambda *leaves: np.stack(leaves), *want)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert x.dtype == y.dtype
            # LoRA-RITE keeps differences of eigenvalues, and these may be all rounding.
            scale = max(1.0, np.abs(y).max()) if name == "lora_rite" else None
            assert_close(x, y, units, "float32", scale)
    assert_same_bits((params.scales, params.magnitudes), (SCALES, stack().magnitudes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "lora_fa", "riemannian", "accumulated"])
def test_a_slot_that_does_not_step_keeps_every_bit(name, dtype):
    optimizer = optim.per_slot(OPTIMIZERS[name](0.1))
    params, grads = ({"q": support.adapter(SLOTS, seed=s, dtype=dtype)} for s in (0, 1))
    params = jax.tree.map(np.array, params)
    params["q"]["A"][1, 0] = [-0.0, np.nan, -np.inf, 0.0]
    one = (np.arange(SLOTS) == 1)[:, None, None]
    step, state = jax.jit(compiled(optimizer)), jax.jit(optimizer.init)(params)
    want = step(params, state, grads, step=np.ones(SLOTS, bool))
    for value in (np.nan, np.inf):
        bad = jax.tree.map(lambda g: np.where(one, g.dtype.type(value), g), grads)  # noqa: B023
        got = step(params, state, bad, step=np.arange(SLOTS) != 1)
        assert_same_bits(take(got, 1), take((params, state), 1))
        assert_same_bits(take(got, slice(2, None)), take(want, slice(2, None)))


def padded(tree):
    """Adapters with rows and columns of zeros, up to three times the rank."""
    more = 2 * support.RANK

    def pad(path, leaf):
        widths = {"A": [(0, 0), (0, more)], "B": [(0, more), (0, 0)]}.get(path[-1].key, [])
        return np.pad(leaf, [(0, 0)] * (leaf.ndim - len(widths)) + widths)

    return jax.tree_util.tree_map_with_path(pad, tree)


@pytest.mark.parametrize(
    "name", ["adamw", "lora_plus", "accumulated", "riemannian", "lora_rite"]
)
def test_padding(name):
    optimizer = optim.per_slot(OPTIMIZERS[name](0.01))
    step = jax.jit(compiled(optimizer))
    narrow, wide = adapters(), padded(adapters())
    states = [jax.jit(optimizer.init)(own) for own in (narrow, wide)]
    for i in range(STEPS):
        grads = adapters(100 + i)
        narrow, states[0] = step(narrow, states[0], grads)
        wide, states[1] = step(wide, states[1], padded(grads))
    if name in ("adamw", "lora_plus"):
        assert_same_bits(wide, padded(narrow))
        return
    # The products and Cholesky factors of larger matrices are summed in another order.
    for got, want in zip(*map(jax.tree.leaves, (wide, padded(narrow))), strict=True):
        assert_close(got, want, 100)
        assert not np.any(np.where(want == 0, got, 0))


def test_lora_fa_divides_by_the_scale_of_the_slot():
    params, grads = stack(), stack(1)
    for tree in (params, grads):  # the last slot has no adapter for "q": its scale is 0
        tree.adapters["q"] = {
            name: np.concatenate([x[:3], 0 * x[3:]])
            for name, x in tree.adapters["q"].items()
        }
    optimizer = optax.MultiSteps(optim.lora_fa(optax.sgd(1.0), PLAN), 1)  # passes them on
    update, state = optim.per_slot(optimizer).update, optim.per_slot(optimizer).init(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(update)(grads, state, params)
    for path, scales in SCALES.items():
        for slot in range(SLOTS - (path == "q")):
            one = optim.lora_fa(optax.sgd(1.0), float(scales[slot]))
            own, grad = ({path: take(t.adapters[path], slot)} for t in (params, grads))
            want, _ = jax.jit(one.update)(grad, one.init(own), own)
            got = take(updates.adapters[path], slot)
            jax.tree.map(lambda x, y: assert_close(x, y, 100), got, want[path])
    assert not any(map(np.any, take(updates.adapters["q"], 3).values()))


def test_a_fresh_state_for_one_slot():
    optimizer = optim.per_slot(with_rate(OPTIMIZERS["accumulated"]))
    step = jax.jit(compiled(optimizer))
    params, state = stack(), jax.jit(optimizer.init)(stack())
    for i in range(4):
        params, state = step(params, state, stack(i))
    state = optax.tree_utils.tree_set(state, learning_rate=RATES)

    def reset(state, slot, params):
        fresh = optimizer.init(params)
        return jax.tree.map(lambda old, new: old.at[slot].set(new[slot]), state, fresh)

    fresh = jax.jit(optimizer.init)(params)
    with count_traces(reset) as (compiled_reset, traces):
        for slot in range(SLOTS):
            got = compiled_reset(state, slot, params)
            assert_same_bits(take(got, slot), take(fresh, slot))
            others = np.arange(SLOTS) != slot
            assert_same_bits(take(got, others), take(state, others))
    assert len(traces) == 1


def test_the_state_is_a_plain_pytree():
    optimizer = optim.per_slot(with_rate(optax.adamw))
    step = jax.jit(compiled(optimizer), donate_argnums=(0, 1))
    params = jax.tree.map(np.asarray, stack())  # some of its arrays are used elsewhere
    params, state = step(params, optimizer.init(params), stack(1))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {SLOTS}
    saved = {str(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}
    restored = jax.tree.unflatten(jax.tree.structure(state), saved.values())
    before = jax.tree.map(np.array, params)
    want = step(params, state, stack(2))
    assert_same_bits(step(before, restored, stack(2)), want)
    # The moments are found as those of one adapter.
    found = optax.tree_map_params(optimizer, lambda _: None, want[1])
    assert len(jax.tree.leaves(want[1])) - len(jax.tree.leaves(found)) == 2 * 5


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["adamw", "riemannian"])
def test_on_a_mesh(kind, name):
    optimizer = optim.per_slot(OPTIMIZERS[name](0.1))
    params = lora_jax.AdapterStack({"q": support.adapter(SLOTS)}, {"q": SCALES["q"]}, {})
    grads = lora_jax.AdapterStack({"q": support.adapter(SLOTS, seed=1)}, params.scales, {})
    mask = np.array([True, False, True, True])
    want = jax.jit(compiled(optimizer))(params, optimizer.init(params), grads, step=mask)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {"A": P(None, "y", None), "B": P(None, None, None)}
    own = {"q": {entry: NamedSharding(mesh, spec) for entry, spec in specs.items()}}
    shardings = lora_jax.AdapterStack(own, {"q": NamedSharding(mesh, P())}, {})
    of_state = lora_jax.optimizer_shardings(optimizer, params, shardings)
    assert of_state == lora_jax.optimizer_shardings(optimizer, params.adapters, own)
    params, grads = (jax.device_put(tree, shardings) for tree in (params, grads))
    with set_mesh(mesh):
        state = jax.jit(optimizer.init, out_shardings=of_state)(params)
        step = jax.jit(compiled(optimizer), out_shardings=(shardings, of_state))
        got = step(params, state, grads, step=mask)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_close(x, y, 100, "float32")
    found = optax.tree_utils.tree_get_all_with_path(got[1], "mu")
    for _, moments in found:
        for leaf in jax.tree.leaves(moments):
            assert leaf.sharding.spec in specs.values()


def test_training_tenants_of_one_model():
    """Slots of `jax.vmap(adapt(...))` are trained as the adapters of separate runs."""
    params = {"up": draw(6, 8), "down": draw(8, 3, seed=1)}
    plan = lora_jax.plan_adapters(lora_jax.LoraConfig(rank=2, use_dora=True), params)
    keys = jax.random.split(jax.random.key(0), SLOTS)
    init = jax.jit(jax.vmap(lora_jax.init_adapters, (0, None, None)))
    tenants = init(keys, params, plan)
    xs, ys = draw(SLOTS, 5, 6, seed=2), draw(SLOTS, 5, 3, seed=3)
    apply = lora_jax.adapt(lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"], plan)

    def loss(adapters, x, y):
        return jnp.mean((apply(params, adapters, x) - y) ** 2)

    @jax.jit
    def losses(tenants):
        return jax.vmap(loss)(tenants, xs, ys)

    optimizer, one = optim.per_slot(optim.lora_plus(1e-2)), optim.lora_plus(1e-2)
    step, one_step = jax.jit(compiled(optimizer)), jax.jit(compiled(one))
    gradient, one_gradient = jax.jit(jax.grad(lambda t: losses(t).sum())), jax.grad(loss)
    one_gradient = jax.jit(one_gradient)
    got, state = tenants, jax.jit(optimizer.init)(tenants)
    for mask in masks():
        got, state = step(got, state, gradient(got), step=asarray(mask))
    assert np.all(losses(got) < 0.9 * losses(tenants))
    for slot in range(SLOTS):
        own = take(tenants, slot)
        own_state = one.init(own)
        for _ in range(masks()[:, slot].sum()):
            grads = one_gradient(own, xs[slot], ys[slot])
            own, own_state = one_step(own, own_state, grads)
        jax.tree.map(lambda x, y: assert_close(x, y, 1000), take(got, slot), own)
