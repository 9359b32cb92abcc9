"""Leaves that are trained beside the adapters: biases, norms, a head."""

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
from lora_jax.plan.target import TrainedLeaf
from tests.support import asarray, by_path, count_traces, normal, set_mesh, x64
from tests.transform.support import assert_same, check, merged, plan_of, trained

TRAIN = ("*/bias", "norm/*", "head/*")
PATHS = ("head/bias", "head/kernel", "norm/scale", "up/bias")
X = normal(5, 8)


def make_params(dtype="float64"):
    params = {
        "up": {"kernel": normal(8, 16), "bias": normal(16)},
        "norm": {"scale": normal(16)},
        "head": {"kernel": normal(16, 3), "bias": normal(3)},
    }
    return jax.tree.map(lambda leaf: asarray(leaf, dtype), params)


def model(params, x):
    x = jnp.tanh(x.astype(params["up"]["kernel"].dtype) @ params["up"]["kernel"])
    x = (x + params["up"]["bias"][None]) * params["norm"]["scale"][None]
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def make(stored="float32", nonzero=True, **fields):
    """Params, a plan with trained leaves, and adapters."""
    params = make_params(stored)
    plan = plan_of(model, params, asarray(X, stored), train=TRAIN, **fields)
    assert (*plan.trained,) == PATHS
    if nonzero:
        return params, plan, trained(params, plan)
    return params, plan, lora_jax.init_adapters(jax.random.key(0), params, plan)


# ----------------------------------------------------------------------------- adapt


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_outputs_and_gradients_are_those_of_the_replaced_leaves(fields):
    with x64():
        config = {"targets": "up/kernel", "train": TRAIN, **fields}
        plan = check(model, make_params(), asarray(X), config=config)
    assert plan.parameters == plan.targets["up/kernel"].parameters + 16 + 16 + 48 + 3


def test_a_tied_leaf_and_a_scan_over_trained_biases():
    def scanned(params, ids):
        def body(x, layer):
            return jnp.tanh(x @ layer["w"] + layer["b"][None]), None

        x, _ = jax.lax.scan(body, params["embed"][ids], params["layers"])
        return x @ params["embed"].T

    params = {"embed": normal(7, 4), "layers": {"w": normal(3, 4, 4), "b": normal(3, 4)}}
    with x64():
        config = {"train": ("embed", "layers/b")}
        check(scanned, params, np.arange(5) % 3, config=config)


DTYPES = [
    ("float32", None, "float32"),
    ("bfloat16", None, "float32"),
    ("float16", None, "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float32", "bfloat16", "float32"),  # else a new adapter would change the model
    ("bfloat16", "float16", "float32"),
]


@pytest.mark.parametrize(("dtype", "given", "want"), DTYPES)
def test_new_values_change_no_bit(dtype, given, want):
    params, plan, adapters = make(dtype, nonzero=False, dtype=given)
    assert {path: adapters[path]["value"].dtype for path in PATHS} == dict.fromkeys(
        PATHS, jnp.dtype(want)
    )
    x = asarray(X, dtype)
    got, plain = lora_jax.adapt(model, plan)(params, adapters, x), model(params, x)
    assert got.dtype == plain.dtype
    np.testing.assert_array_equal(got, plain)


def test_values_are_rounded_to_the_dtype_of_the_leaf():
    """And have gradients in their own dtype."""
    params, plan, adapters = make("bfloat16")
    adapted, x = jax.jit(lora_jax.adapt(model, plan)), asarray(X, "bfloat16")
    rounded = jax.tree.map(lambda v: np.asarray(v, jnp.bfloat16).astype(v.dtype), adapters)
    for path in plan.targets:
        rounded[path] = adapters[path]
    np.testing.assert_array_equal(*(adapted(params, a, x) for a in (adapters, rounded)))
    loss = lambda a: adapted(params, a, x).astype("float32").sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(adapters)
    dtypes = (jax.tree.map(lambda v: v.dtype, tree) for tree in (grads, adapters))
    assert next(dtypes) == next(dtypes)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_one_trace_and_donated_values():
    params, plan, adapters = make(nonzero=False)
    adapted, x = lora_jax.adapt(model, plan), asarray(X, "float32")
    before = jax.device_get(params)

    def step(adapters, params, scales):
        def loss(adapters):
            return jnp.sum(lora_jax.adapt(model, plan, scales=scales)(params, adapters, x))

        return jax.tree.map(lambda v, g: v - g, adapters, jax.grad(loss)(adapters))

    with count_traces(step) as (run, traces):
        for scale in (1.0, 0.0):  # which is that of the adapters alone
            new = run(adapters, params, asarray(scale))
            assert np.any(new["head/bias"]["value"] != adapters["head/bias"]["value"])
    assert len(traces) == 1
    donating = jax.jit(step, donate_argnums=0)
    jax.block_until_ready(donating(adapters, params, jnp.ones(())))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert adapted(params, new, x).shape == (5, 3)


def test_a_trained_leaf_that_the_function_never_uses():
    def headless(params, x):
        return x @ params["up"]["kernel"] * params["norm"]["scale"][None]

    with x64():
        params, plan, adapters = make("float64")
        x = asarray(X)
        with pytest.raises(
            ValueError, match=r"never uses the trained leaves 'head/bias', 'he"
        ):
            lora_jax.adapt(headless, plan)(params, adapters, x)
        allowed = lora_jax.adapt(headless, plan, on_unused="allow")
        want = headless(merged(params, adapters, plan), x)
        assert_same(allowed(params, adapters, x), want)


# ----------------------------------------------------------------------------- merge


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_writes_copies(dtype):
    params, plan, adapters = make(dtype)
    got = lora_jax.merge_adapters(params, adapters, plan)
    traced = jax.jit(lora_jax.merge_adapters)(params, adapters, plan)
    for path in PATHS:
        (group, name), value = path.split("/"), adapters[path]["value"]
        assert value.dtype == "float32"
        for own in (got, traced):
            np.testing.assert_array_equal(own[group][name], value.astype(dtype))
            assert own[group][name].dtype == dtype
    jax.tree.map(lambda leaf: leaf.delete(), got)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, adapters)))


def test_unmerging_takes_the_leaves_from_before():
    params, plan, adapters = make()
    whole = lora_jax.merge_adapters(params, adapters, plan)
    leaves = {"head": params["head"], "norm": params["norm"], "up": params["up"]}
    originals = {path: leaves[path.split("/")[0]][path.split("/")[1]] for path in PATHS}
    back = lora_jax.unmerge_adapters(whole, adapters, plan, originals=originals)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, params)
    with pytest.raises(ValueError, match=r"replaced the trained leaves 'head/bias'.* give"):
        lora_jax.unmerge_adapters(whole, adapters, plan)
    del originals["up/bias"]
    with pytest.raises(KeyError, match=r"originals must have the 4 paths.*'up/bias'"):
        lora_jax.unmerge_adapters(whole, adapters, plan, originals=originals)
    own = plan.subset("up/kernel")
    up = {"up/kernel": adapters["up/kernel"]}
    with pytest.raises(KeyError, match=r"originals must have the 0 paths"):
        lora_jax.unmerge_adapters(whole, up, own, originals=originals)


def test_a_value_beyond_the_range_of_the_leaf():
    params, plan, adapters = make("float16")
    adapters["norm/scale"]["value"] = np.full(16, 1e6, "float32")
    with pytest.raises(FloatingPointError, match=r"at 'norm/scale': .* in float16"):
        lora_jax.merge_adapters(params, adapters, plan)


def test_decomposed_params_have_them_too():
    params, plan, _ = make()
    base, initial = lora_jax.decompose_params(params, plan, "olora")
    x = asarray(X, "float32")
    adapted = jax.jit(lora_jax.adapt(model, plan))
    np.testing.assert_allclose(
        adapted(base, initial, x), jax.jit(model)(params, x), rtol=1e-4, atol=1e-4
    )
    new = {**initial, "head/bias": {"value": np.ones(3, "float32")}}
    plain, plain_plan = lora_jax.to_plain_adapters(new, initial, plan)
    np.testing.assert_allclose(
        jax.jit(lora_jax.adapt(model, plain_plan))(params, plain, x),
        adapted(base, new, x),
        rtol=1e-4,
        atol=1e-4,
    )


# -------------------------------------------------------------------------- checks


def without(name, adapters):
    return {path: adapter for path, adapter in adapters.items() if path != name}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (functools.partial(without, "norm/scale"), KeyError, "missing: 'norm/scale'"),
        (lambda a: a | {"norm/scale": {}}, KeyError, r"expected {'value': array}, got \["),
        (lambda a: a | {"norm/scale": jnp.ones(16)}, KeyError,
         "at 'norm/scale': the plan trains this leaf without an adapter"),
        (lambda a: a | {"norm/scale": {"value": jnp.ones(3)}}, ValueError,
         r"at 'norm/scale': value does not fit: expected shape \(16,\)"),
        (lambda a: a | {"norm/scale": {"value": jnp.ones(16, "int32")}}, TypeError,
         "at 'norm/scale': value must be floating point"),
    ],
)  # fmt: skip
def test_adapters_that_are_not_those_of_the_plan(change, error, message):
    params, plan, adapters = make()
    x = asarray(X, "float32")
    with pytest.raises(error, match=message):
        lora_jax.adapt(model, plan)(params, change(adapters), x)
    with pytest.raises(error, match=message):
        lora_jax.merge_adapters(params, change(adapters), plan)


def test_params_that_are_not_those_of_the_plan():
    params, plan, adapters = make()
    x = asarray(X, "float32")
    quantized = params | {
        "head": params["head"] | {"kernel": lora_jax.quant.quantize_int8(jnp.ones((16, 3)))}
    }
    cases = (
        ({"norm": {"scale": jnp.ones(3)}}, ValueError, r"at 'norm/scale': the plan is for"),
        ({"norm": {}}, KeyError, "params lack weights that the plan trains: 'norm/scale'"),
        (quantized, TypeError, "at 'head/kernel': the plan trains this leaf, and it is q"),
    )
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            lora_jax.adapt(model, plan)(params | change, adapters, x)


# ----------------------------------------------------------------- files, optimizers


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_checkpoints(tmp_path, dtype):
    _, plan, adapters = make()
    lora_jax.save_adapters(tmp_path, adapters, plan, dtype=dtype)
    loaded, loaded_plan = lora_jax.load_adapters(tmp_path)
    assert loaded_plan == plan
    want = jax.tree.map(
        lambda v: v.astype(dtype or v.dtype).astype(v.dtype),
        {path: adapters[path] for path in plan.entries},
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, want)


def test_optimizers():
    _, plan, adapters = make()
    values = {path: adapters[path] for path in PATHS}
    ones = jax.tree.map(np.ones_like, adapters)
    tree = {"adapters": adapters}
    labels = optim.adapter_labels(tree, {"head/kernel": "head", "norm/*": "norm"})
    assert {path: labels["adapters"][path]["value"] for path in PATHS} == {
        "head/bias": "other",
        "head/kernel": "head",
        "norm/scale": "norm",
        "up/bias": "other",
    }
    mask = optim.weight_decay_mask(adapters, "up/kernel")
    assert [mask[path]["value"] for path in PATHS] == [False, True, False, False]

    @functools.partial(jax.jit, static_argnums=0)
    def first(optimizer):
        updates, _ = optimizer.update(ones, optimizer.init(adapters), adapters)
        return updates

    plus = first(optim.lora_plus(1.0, 4.0, rates={"norm/scale": 8.0}, optimizer=optax.sgd))
    rates = {"head/bias": 1.0, "head/kernel": 1.0, "norm/scale": 8.0, "up/bias": 1.0}
    for path, rate in rates.items():
        assert np.all(plus[path]["value"] == -rate)
    assert np.all(plus["up/kernel"]["B"] == -4.0)
    for own in (optim.lora_fa(optax.sgd(1.0), plan), optim.scale_by_riemannian()):
        updates = first(own)
        for path in values:
            assert np.all(np.abs(updates[path]["value"]) == 1.0)


# --------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_values_are_sharded_as_their_leaves(kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    specs = {
        "up": {"kernel": P(None, "model"), "bias": P("model")},
        "norm": {"scale": P("model")},
        "head": {"kernel": P("model", None), "bias": P()},
    }

    def place(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    def own_model(params, x):
        out = {} if kind == AxisType.Auto else {"out_sharding": P()}
        x = jnp.tanh(x @ params["up"]["kernel"])
        x = (x + params["up"]["bias"][None]) * params["norm"]["scale"][None]
        return jnp.dot(x, params["head"]["kernel"], **out) + params["head"]["bias"][None]

    with set_mesh(mesh), x64():
        params = jax.tree.map(place, make_params(), specs)
        x = place(asarray(X), P())
        plan = plan_of(own_model, params, x, targets="up/kernel", train=TRAIN)
        adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        shardings = {path: leaf.sharding for path, leaf in by_path(params).items()}
        for path, leaf in plan.trained.items():
            value = adapters[path]["value"]
            assert value.sharding.is_equivalent_to(shardings[path], len(leaf.shape))
        # From a file they are on one device.
        loose = {p: jax.device_get(a) for p, a in adapters.items() if p in plan.trained}
        want = jax.jit(own_model)(params, x)
        for own in (adapters, {**adapters, **loose}):
            got = jax.jit(lora_jax.adapt(own_model, plan))(params, own, x)
            assert_same(jax.device_get(got), jax.device_get(want))
            whole = lora_jax.merge_adapters(params, own, plan)
            for path, leaf in by_path(whole).items():
                assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim)


def test_a_trained_leaf_of_a_hand_made_plan():
    params, plan, _ = make()
    leaves = {path: TrainedLeaf(leaf.shape) for path, leaf in plan.trained.items()}
    hand = lora_jax.AdapterPlan(plan.config, plan.targets, trained=leaves)
    assert hand == plan
    total = plan.parameters + 8 * 16 + 16 + 16 + 48 + 3
    assert lora_jax.count_parameters(params, hand) == (plan.parameters, total)
