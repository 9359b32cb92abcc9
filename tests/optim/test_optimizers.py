"""LoRA+ and LoRA-FA, against Adam in float64 NumPy."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import optim
from tests import programs
from tests import support as tolerances
from tests.optim import support

# What PEFT calls the entries of an adapter.
PEFT_NAMES = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
}


def schedule(count):
    return 0.1 / (1 + count)


def rates_of(optimizer, params):
    """The learning rate of each leaf, of an optimizer of plain gradient descent."""
    ones = jax.tree.map(np.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    rates = jax.tree.map(lambda u: -float(u.ravel()[0]), updates)
    return support.by_path(rates)


def assert_paths_close(got, want, ulps=64):
    got = support.by_path(got)
    assert got.keys() == want.keys()
    for path, value in want.items():
        tolerances.assert_close(got[path], value, ulps)


# LoRA+


@pytest.mark.parametrize("rate", [0.1, schedule], ids=["number", "schedule"])
def test_lora_plus(rate):
    params, steps = support.tree(), support.gradients()
    factory = functools.partial(optax.adamw, weight_decay=0.5, mask=optim.weight_decay_mask)
    optimizer = optim.lora_plus(rate, 4.0, optimizer=factory)
    got, state = support.run(optimizer, params, steps)
    rates = np.array([rate if rate == 0.1 else schedule(count) for count in range(3)])
    decays = support.by_path(optim.weight_decay_mask(params))
    want = {
        path: support.adamw(
            before,
            [support.by_path(step)[path] for step in steps],
            rates * (4.0 if path.endswith("/B") else 1.0),
            0.5 * decays[path],
        )
        for path, before in support.by_path(params).items()
    }
    assert_paths_close(got, want)
    assert support.stateful(state) == sorted(want)


def test_rates_of_patterns():
    rates = {"embed/table": 0.5, "head/*": lambda count: 0.25, "*/B": 9.0, "embed/*": 7.0}
    optimizer = optim.lora_plus(0.125, optimizer=optax.sgd, rates=rates)
    got = rates_of(optimizer, support.tree())
    layer = {"A": 0.125, "B": 9.0, "m": 0.125, "A_bias": 0.125, "B_bias": 0.125}
    assert got == {
        **{f"adapters/layers/q/kernel/{name}": rate for name, rate in layer.items()},
        **{f"adapters/embed/table/{name}": 0.5 for name in "AB"},
        **{"head/bias": 0.25, "head/kernel": 0.25},
    }
    rates = rates_of(optim.lora_plus(0.5, 0.25, optimizer=optax.sgd), support.tree())
    assert [rates[f"adapters/embed/table/{name}"] for name in "AB"] == [0.5, 0.125]


def test_groups_of_peft():
    groups = json.loads((support.GOLDEN / "peft_json" / "loraplus_groups.json").read_text())
    params = {
        "adapters": {"lin": support.adapter(rest="m"), "emb": support.adapter(rest="m")},
        "cls": {"weight": support.draw(5, 2), "bias": support.draw(2)},
    }
    optimizer = optim.lora_plus(1e-3, optimizer=optax.sgd, rates={"emb/[AB]": 1e-6})
    got = rates_of(optimizer, params)
    for group in groups:
        for name in group["params"]:
            module, entry, *_, last = name.removeprefix("base_model.model.").split(".")
            adapter = f"adapters/{module}/{PEFT_NAMES.get(entry)}"
            path = adapter if entry in PEFT_NAMES else f"{module}/{last}"
            # With one axis: PEFT gives these the rate of B.
            vector = path.endswith(("/m", "/bias"))
            assert group["lr"] == (0.016 if vector else group["lr"])
            assert got.pop(path) == pytest.approx(1e-3 if vector else group["lr"])
    assert not got


def test_lora_plus_inside_other_transformations():
    params, steps = support.tree(), support.gradients()
    chained = optax.chain(optax.clip_by_global_norm(1.0), optim.lora_plus(0.1, 4.0))
    optimizer = optax.MultiSteps(chained, every_k_schedule=3)
    got, _ = support.run(optimizer, params, steps)
    means = jax.tree.map(lambda *g: np.mean(np.float64(g), axis=0), *steps)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(means)))
    want = {
        path: support.adamw(p, [g / norm], [0.4 if path.endswith("/B") else 0.1])
        for (path, p), g in zip(
            support.by_path(params).items(), jax.tree.leaves(means), strict=True
        )
    }
    assert_paths_close(got, want)


def test_learning_rate_of_a_compiled_program():
    params = support.tree()

    @jax.jit
    def updates(rate):
        optimizer = optim.lora_plus(rate, 2.0, optimizer=optax.sgd)
        return optimizer.update(params, optimizer.init(params))[0]

    got = updates(jnp.float32(0.5))["adapters"]["embed/table"]
    old = params["adapters"]["embed/table"]
    assert_paths_close(got, {"A": -0.5 * old["A"], "B": -1.0 * old["B"]}, 1)


def test_state_can_be_mapped_as_params_are():
    params = support.tree()
    optimizer = optim.lora_plus(0.1, rates={"head/kernel": 0.2})
    paths = jax.tree.unflatten(jax.tree.structure(params), support.by_path(params))
    state = jax.eval_shape(optimizer.init, params)
    named = optax.tree_map_params(
        *(optimizer, lambda _, path: path, state, paths),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    for _, moments in optax.tree_utils.tree_get_all_with_path(named, "mu"):
        assert all(path == name for path, name in support.by_path(moments).items())


# LoRA-FA


def lora_fa_gradient(path, leaves, gradient, scale, damping=1e-8):
    """What the optimizer sees of a gradient, in float64."""
    if not path.endswith("/B"):
        return gradient
    a = np.swapaxes(leaves[path.removesuffix("B") + "A"], -1, -2)
    return support.solved(a, gradient, damping) / scale**2


def test_lora_fa_golden():
    tensors, case = support.golden("lorafa_rslora")
    meta = case["meta"]
    adamw = optax.adamw(meta["lr"], eps=meta["eps"], weight_decay=meta["weight_decay"])
    optimizer = optim.lora_fa(adamw, meta["scaling"])
    start = {"w": {"A": tensors["A"], "B": tensors["B0"]}}
    steps = [{"w": {"A": tensors["A"], "B": tensors[f"gradB/{i}"]}} for i in range(3)]
    leaves, rates = support.by_path(start), [meta["lr"]] * 3
    grads = [step["w"]["B"] for step in steps]
    seen = [lora_fa_gradient("w/B", leaves, grad, meta["scaling"]) for grad in grads]
    step, got, state = support.compiled(optimizer), start, optimizer.init(start)
    for n in (1, 2, 3):
        got, state = step(steps[n - 1], state, got)
        tolerances.assert_golden(case, got["w"]["B"], tensors[f"B/{n}"])
        options = rates[:n], meta["weight_decay"], meta["eps"]
        want = support.adamw(start["w"]["B"], seen[:n], *options)
        tolerances.assert_close(got["w"]["B"], want, 16)
        np.testing.assert_array_equal(got["w"]["A"], start["w"]["A"])


@pytest.mark.parametrize("rate", [0.1, schedule], ids=["number", "schedule"])
def test_lora_fa(rate):
    params, steps = support.tree(), support.gradients()
    optimizer = optim.lora_fa(optax.adamw(rate, weight_decay=0.5), 2.0)
    got, state = support.run(optimizer, params, steps)
    leaves = support.by_path(params)
    rates = [rate if rate == 0.1 else schedule(count) for count in range(3)]
    want = {}
    for path, before in leaves.items():
        grads = [support.by_path(step)[path] for step in steps]
        seen = [lora_fa_gradient(path, leaves, grad, 2.0) for grad in grads]
        frozen = path.endswith("/A")
        want[path] = before if frozen else support.adamw(before, seen, rates, 0.5)
    assert_paths_close(got, want)
    for path in ("adapters/layers/q/kernel/A", "adapters/embed/table/A"):
        np.testing.assert_array_equal(support.by_path(got)[path], leaves[path])
    assert support.stateful(state) == sorted(p for p in leaves if not p.endswith("/A"))


def test_scales_of_a_plan():
    params = {"q": jnp.zeros((12, 9)), "stack": {"o": jnp.zeros((12, 9))}}
    config = lora_jax.LoraConfig(rank=4, alpha=8.0, alpha_pattern={"stack/*": 20.0})
    plan = lora_jax.plan_adapters(config, params)
    tree = {"adapters": {path: support.adapter() for path in plan.targets}}
    optimizer = optim.lora_fa(optax.sgd(1.0), plan)
    # Without optax.adam, which promotes: all dtypes are as they should be.
    updates, _ = jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)
    leaves = support.by_path(tree)
    for path, scale in {"q": 2.0, "stack/o": 5.0}.items():
        name = f"adapters/{path}/B"
        want = -lora_fa_gradient(name, leaves, leaves[name], scale)
        tolerances.assert_close(updates["adapters"][path]["B"], want, 100)


@pytest.mark.parametrize(
    "number", [5, 5.0, np.float32(5), np.array(5, "float32"), jnp.float32(5)], ids=repr
)
def test_scales_of_a_plan_in_a_nested_tree(number):
    config = lora_jax.LoraConfig(rank=4, alpha=20.0)
    weights = {"stack": {"o": jnp.zeros((12, 9))}, "o": jnp.zeros((12, 9))}
    plan = lora_jax.plan_adapters(config, weights)
    tree = {"stack": {"o": support.adapter()}}
    by_plan, by_number = (
        optimizer.update(tree, optimizer.init(tree), tree)[0]
        for optimizer in (optim.lora_fa(optax.sgd(1.0), s) for s in (plan, number))
    )
    jax.tree.map(np.testing.assert_array_equal, by_plan, by_number)


def test_the_update_is_the_nearest_to_a_full_step():
    # s * A @ dB is the projection of the weight's gradient onto what A can reach.
    adapter, full = support.adapter(), support.draw(support.N_IN, support.N_OUT)
    params = {"w": adapter}

    def loss(params):
        return jnp.sum(full * (3.0 * params["w"]["A"] @ params["w"]["B"]))

    optimizer = optim.lora_fa(optax.sgd(1.0), 3.0)
    state = optimizer.init(params)
    updates, _ = jax.jit(lambda p: optimizer.update(jax.grad(loss)(p), state, p))(params)
    q, _ = np.linalg.qr(np.asarray(adapter["A"], np.float64))
    step = 3.0 * adapter["A"] @ updates["w"]["B"]
    tolerances.assert_close(step, -q @ (q.T @ np.asarray(full, np.float64)), 100)


@pytest.mark.parametrize("dtype", tolerances.HALF)
def test_lora_fa_in_16_bits(dtype):
    params, grads = ({"w": support.adapter(dtype=dtype, seed=seed)} for seed in (0, 1))
    optimizer = optim.lora_fa(optax.sgd(1.0), 2.0)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    leaves = support.by_path(params)
    want = -lora_fa_gradient("w/B", leaves, grads["w"]["B"], 2.0)
    tolerances.assert_close(updates["w"]["B"], want, 1)


def test_lora_fa_at_a_zero_b_and_with_accumulation_and_clipping():
    params = {"w": support.adapter() | {"B": jnp.zeros((support.RANK, support.N_OUT))}}
    steps = [{"w": support.adapter(seed=seed)} for seed in (1, 2)]
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    # A is frozen, so the correction of a mean is the mean of the corrections.
    outside = optax.MultiSteps(optim.lora_fa(clipped, 2.0), 2)
    for optimizer in (outside, optim.lora_fa(optax.MultiSteps(clipped, 2), 2.0)):
        got, _ = support.run(optimizer, params, steps)
        mean = np.mean([np.float64(step["w"]["B"]) for step in steps], axis=0)
        seen = lora_fa_gradient("w/B", support.by_path(params), mean, 2.0)
        assert np.linalg.norm(seen) > 0.1
        tolerances.assert_close(got["w"]["B"], -0.1 * seen / np.linalg.norm(seen), 64)


# What the compiler makes of them


def adapted_loss(adapters, weights, x, c):
    def layer(x, weight_and_adapter):
        return lora_jax.lora_linear(x, *weight_and_adapter, 16.0), None

    return jnp.sum(jax.lax.scan(layer, x, (weights, adapters["layers"]))[0] * c)


def test_lora_fa_computes_and_keeps_nothing_for_a():
    layers, width, small = support.LAYERS, support.WIDTH, support.SMALL
    shapes = {"A": (layers, width, small), "B": (layers, small, width)}
    adapter = {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in shapes.items()}
    adapters = {"layers": adapter}
    adam = support.compile_step(optax.adam(0.1), adapters, adapted_loss)
    fa = support.compile_step(optim.lora_fa(optax.adam(0.1), 2.0), adapters, adapted_loss)
    # The compiler counts the body of a loop once.
    assert programs.flops(adam) - programs.flops(fa) > 0.9 * (
        2 * support.TOKENS * support.WIDTH * support.SMALL
    )
    saved = programs.temporary(adam) - programs.temporary(fa)
    assert saved > 0.9 * support.LAYERS * support.INPUT_BYTES
