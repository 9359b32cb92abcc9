import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests import reference, support
from tests.layers.support import (
    ALPHA,
    SCALE,
    axis_of,
    each,
    linear,
    make_case,
    output_and_gradients,
)

LINEAR = {"lora": lora_jax.lora_linear, "dora": lora_jax.dora_linear}


# ---------------------------------------------------------------------------- forward


def test_base_and_update_are_added_before_the_rounding():
    # x @ W is 257, the update 1.5, the bias 0.75, and a bfloat16 near the sum is even. If
    # x @ W were rounded alone, or with the update, the sum would be 258.
    x = support.asarray([[1, 1]], "bfloat16")
    weight = support.asarray([[256], [1]], "bfloat16")
    adapter = {"A": np.float32([[1], [0]]), "B": np.float32([[1.5]])}
    y = lora_jax.lora_linear(x, weight, adapter, bias=np.float32([0.75]))
    assert float(y[0, 0]) == 260.0


@pytest.mark.parametrize("adapter_dtype", support.DTYPES)
@pytest.mark.parametrize("weight_dtype", support.DTYPES)
@pytest.mark.parametrize("x_dtype", support.DTYPES)
def test_dtype_is_that_of_x_at_weight(x_dtype, weight_dtype, adapter_dtype):
    case = support.make_case("rows", weight_dtype, adapter_dtype)
    x, bias = case.x.astype(x_dtype), np.asarray(case.bias, "float32")
    y = jax.eval_shape(lora_jax.lora_linear, x, case.weight, case.adapter, bias=bias)
    with jax.numpy_dtype_promotion("standard"):
        assert y.dtype == jax.eval_shape(jnp.matmul, x, case.weight).dtype


def test_numpy_arrays_are_welcome():
    case = support.make_case("rows")
    arguments = case.x, case.weight, case.adapter
    got = lora_jax.lora_linear(*jax.tree.map(np.asarray, arguments), ALPHA)
    want = lora_jax.lora_linear(*arguments, ALPHA)
    np.testing.assert_array_equal(got, want)


def test_no_tokens_and_no_rows():
    case = support.make_case("rows")
    y = lora_jax.lora_linear(case.x[:0], case.weight, case.adapter)
    assert y.shape == (0, support.N_OUT)


def test_zero_b_changes_nothing():
    case = support.make_case("tokens")
    adapter = case.adapter | {"B": jnp.zeros_like(case.adapter["B"])}
    y = lora_jax.lora_linear(case.x, case.weight, adapter, ALPHA)
    x, weight = case.x.reshape(-1, support.N_IN), case.weight
    np.testing.assert_array_equal(y.reshape(-1, support.N_OUT), x @ weight)


def test_adapters_batched_by_vmap_on_one_weight():
    case = support.make_case("stacked")
    weight = case.weight[0]
    linear = jax.jit(lora_jax.lora_linear)
    y = jax.vmap(linear, in_axes=(0, None, 0))(case.x, weight, case.adapter)
    for i in range(3):
        x, adapter = jax.tree.map(lambda v, i=i: np.asarray(v)[i], (case.x, case.adapter))
        one = linear(x, weight, adapter)
        support.assert_close(y[i], one, 4)


@pytest.mark.parametrize("transform", ["jvp", "hessian", "checkpoint", "scan", "bf16 jvp"])
def test_transforms(transform):
    case = support.make_case("rows", "bfloat16" if "bf16" in transform else "float32")

    def loss(adapter):
        y = lora_jax.lora_linear(case.x, case.weight, adapter, ALPHA)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    grads = jax.jit(jax.grad(loss))(case.adapter)
    if "jvp" in transform:
        _, tangent = jax.jit(lambda a: jax.jvp(loss, (a,), (a,)))(case.adapter)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(case.adapter), strict=True)
        want = sum(np.vdot(g, a) for g, a in pairs)
        support.assert_close(tangent, want, 64 if "bf16" not in transform else 2**17)
    elif transform == "hessian":
        # The loss is quadratic in B: the Hessian times B is the gradient minus that at 0.
        only_b = lambda b: loss(case.adapter | {"B": b})  # noqa: E731
        b = case.adapter["B"]
        h = jax.jit(jax.hessian(only_b))(b)
        want = grads["B"] - jax.jit(jax.grad(only_b))(np.zeros_like(b))
        support.assert_close(np.einsum("ijkl,kl->ij", h, b), want, 64)
    elif transform == "checkpoint":
        again = jax.jit(jax.grad(jax.checkpoint(loss)))(case.adapter)
        for name, value in again.items():
            support.assert_close(value, grads[name], 4)
    else:
        stacked = support.make_case("stacked")
        square = stacked.weight[:, :, : support.RANK]

        @jax.jit
        def body(x, layer):
            weight, adapter = layer
            return jnp.tile(lora_jax.lora_linear(x, weight, adapter), (1, 3)), None

        adapters = stacked.adapter | {"B": stacked.adapter["B"][..., : support.RANK]}
        first, layers = jax.tree.map(np.asarray, (stacked.x[0], (square, adapters)))
        x, _ = jax.lax.scan(body, first, layers)
        want = first
        for i in range(3):
            want, _ = body(want, jax.tree.map(lambda v, i=i: v[i], layers))
        support.assert_close(x, want, 8)


@pytest.mark.parametrize("method", LINEAR)
def test_one_trace_for_all_values(method):
    case = support.make_case("tokens", method=method)
    with support.count_traces(LINEAR[method]) as (linear, traces):
        for alpha in np.float32([1.0, 2.0, 5.0]):
            adapter = jax.tree.map(lambda v, alpha=alpha: v * alpha, case.adapter)
            linear(case.x, case.weight, adapter, alpha).block_until_ready()
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_alpha_may_be_traced(dtype):
    case = support.make_case("rows")
    alpha = support.asarray(3, dtype)
    got = jax.jit(linear)(case, alpha)
    support.assert_close(got, linear(case), 4)


def test_alpha_has_a_gradient():
    case = support.make_case("rows")
    x, weight, _, adapter, c = case.reference()
    loss = lambda alpha: jnp.vdot(linear(case, alpha), case.c)  # noqa: E731
    update = reference.lora_weight(weight, adapter, 1 / support.RANK) - weight
    want = (x @ update * c).sum()
    support.assert_close(jax.jit(jax.grad(loss))(ALPHA), want, 32)


def test_rank_stabilized_divides_by_the_root_of_the_rank():
    case = support.make_case("rows")
    got = linear(case, rank_stabilized=True)
    x, weight, _, adapter, _ = case.reference()
    want = reference.lora_linear(x, weight, adapter, ALPHA / support.RANK**0.5)
    support.assert_close(got, want, 8)


@pytest.mark.parametrize("method", LINEAR)
def test_frozen_weight_has_no_gradient(method):
    case = support.make_case("rows", method=method)
    options = {"detach_norm": False} if method == "dora" else {}
    loss = lambda w: LINEAR[method](case.x, w, case.adapter, ALPHA, **options).sum()  # noqa: E731
    assert not np.any(jax.jit(jax.grad(loss))(case.weight))


def test_bias_has_a_gradient():
    case = support.make_case("rows")
    loss = lambda bias: jnp.vdot(  # noqa: E731
        lora_jax.lora_linear(case.x, case.weight, case.adapter, bias=bias), case.c
    )
    got = jax.jit(jax.grad(loss))(case.bias)
    support.assert_close(got, reference.f64(case.c).sum(0), 8)


# ---------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("method", ["lora", "lora_bias"])
@pytest.mark.parametrize("layout", ["rows", "tokens", "stacked"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_multiplies_by_the_mask_of_the_key(position, layout, method):
    case = support.make_case(layout, method=method)
    key, rate = jax.random.key(7), 0.25
    x, weight, _, adapter, c = case.reference()
    masked = case.x if position == "pre" else case.c
    mask = reference.f64(jax.random.bernoulli(key, 1 - rate, masked.shape)) / (1 - rate)
    mask = mask.reshape((x if position == "pre" else c).shape)
    nothing = np.zeros_like(weight)
    if position == "pre":
        want = x @ weight + reference.lora_linear(x * mask, nothing, adapter, SCALE)
        grads = reference.lora_gradients(x * mask, nothing, adapter, SCALE, c)
        grads["x"] = grads["x"] * mask + c @ reference.t(weight)
    else:
        want = x @ weight + mask * reference.lora_linear(x, nothing, adapter, SCALE)
        grads = reference.lora_gradients(x, nothing, adapter, SCALE, c * mask)
        grads["x"] = grads["x"] + c @ reference.t(weight)
    options = {"dropout_rate": rate, "dropout_key": key, "dropout_position": position}
    y, got = output_and_gradients(case, **options)
    support.assert_close(y, want, 8)
    for name, value in got.items():
        support.assert_close(value, grads[name], 16)


def test_another_key_drops_other_entries():
    case = support.make_case("rows")
    keys = map(jax.random.key, (0, 1))
    ys = [linear(case, dropout_rate=0.5, dropout_key=key) for key in keys]
    assert not np.array_equal(*ys)


def test_a_raw_key_is_welcome():
    case = support.make_case("rows")
    old, new = jax.random.PRNGKey(0), jax.random.key(0)
    ys = [linear(case, dropout_rate=0.5, dropout_key=key) for key in (old, new)]
    np.testing.assert_array_equal(*ys)


# ---------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", support.HALF)
def test_merge_rounds_once(dtype):
    # Entries that are exact in float32, so that the one rounding is all there is.
    rng = np.random.default_rng(0)
    weight = support.asarray(rng.normal(size=(64, 48)), dtype)
    adapter = {
        "A": support.asarray(rng.integers(-8, 9, (64, 4)) / 64, "float32"),
        "B": support.asarray(rng.integers(-8, 9, (4, 48)) / 64, "float32"),
    }
    merged = lora_jax.merge_lora_weight(weight, adapter, 1.0)
    exact = reference.lora_weight(*map(reference.f64, (weight, adapter)), 1 / 4)
    np.testing.assert_array_equal(merged, exact.astype("float32").astype(jnp.dtype(dtype)))


def test_merge_adds_in_the_dtype_of_a_wider_adapter():
    with support.x64():
        # Their product is just above half a unit of 1 in float32.
        adapter = {"A": np.array([[2.0**-24]]), "B": np.array([[1 + 2.0**-20]])}
        merged = lora_jax.merge_lora_weight(np.ones((1, 1), "float32"), adapter)
    assert np.asarray(merged) == np.float32(1 + 2.0**-23)


def test_merge_is_differentiable_in_the_adapter():
    case = support.make_case("rows")
    merge = lambda b: lora_jax.merge_lora_weight(case.weight, case.adapter | {"B": b}).sum()  # noqa: E731
    rows = reference.f64(case.adapter["A"]).sum(0)[:, None] / support.RANK
    want = np.broadcast_to(rows, case.adapter["B"].shape)
    support.assert_close(jax.jit(jax.grad(merge))(case.adapter["B"]), want, 16)


def test_delta_has_the_dtype_of_the_factors():
    case = support.make_case("rows")
    half = jax.tree.map(lambda v: np.asarray(v, jnp.bfloat16), case.adapter)
    delta = lora_jax.lora_delta(half)
    assert delta.dtype == jnp.bfloat16
    assert lora_jax.lora_delta(half | {"A": case.adapter["A"]}).dtype == jnp.float32
    exact = reference.f64(half["A"]) @ reference.f64(half["B"]) / support.RANK
    np.testing.assert_array_equal(delta, np.float32(exact).astype(jnp.bfloat16))


# ---------------------------------------------------------------------------- trees


@pytest.mark.parametrize(
    "is_leaf",
    [
        None,
        lambda node: isinstance(node, dict) and "A" in node,
        lambda node: np.bool_(isinstance(node, dict) and "B" in node),
        lambda node: node is None or isinstance(node, tuple),
        lambda node: False,
    ],
    ids=["none", "adapters", "numpy_bool", "others", "nothing"],
)
def test_tree_delta_replaces_adapters_and_nothing_else(is_leaf):
    adapter = support.make_case("rows").adapter
    other = support.make_case("stacked", rank=2).adapter
    tree = {
        "q": adapter,
        "layers": [{"k": other}, None],
        "step": support.draw(3),
        "name": "a",
    }
    got = lora_jax.tree_lora_delta(tree, ALPHA, is_leaf=is_leaf)
    deltas = [lora_jax.lora_delta(own, ALPHA) for own in (adapter, other)]
    np.testing.assert_array_equal(got["q"], deltas[0])
    np.testing.assert_array_equal(got["layers"][0]["k"], deltas[1])
    assert (got["layers"][1], got["name"]) == (None, "a")
    assert got["step"] is tree["step"]
    alone = lora_jax.tree_lora_delta(adapter, ALPHA, is_leaf=is_leaf)
    np.testing.assert_array_equal(alone, deltas[0])


def test_tree_delta_leaves_the_users_leaves_alone():
    adapter = support.make_case("rows").adapter
    frozen = {"frozen": adapter}
    tree = {"q": adapter, "head": frozen}
    got = lora_jax.tree_lora_delta(tree, is_leaf=lambda node: node is frozen)
    assert got["head"] is frozen
    assert got["q"].shape == (support.N_IN, support.N_OUT)


def test_tree_delta_of_modules_that_are_named_like_factors():
    adapter = support.make_case("rows").adapter
    got = lora_jax.tree_lora_delta({"A": adapter, "B": {"A": adapter}})
    assert got["A"].shape == got["B"]["A"].shape == (support.N_IN, support.N_OUT)


def test_tree_delta_names_the_path_of_a_bad_adapter():
    adapter = support.make_case("rows").adapter
    tree = {"layers": [{"q": {"A": adapter["A"]}}]}
    with pytest.raises(KeyError, match=r"at 'layers/0/q': .*missing: B"):
        lora_jax.tree_lora_delta(tree)


# ---------------------------------------------------------------------------- init


@pytest.mark.parametrize("layout", ["rows", "stacked", "experts_in_layers"])
def test_init_makes_a_random_and_b_zero(layout):
    weight = support.make_case(layout, shape=(200, 9)).weight
    adapter = lora_jax.init_lora_adapter(jax.random.key(0), weight, 5)
    *batch, n_in, n_out = weight.shape
    assert adapter["A"].shape == (*batch, n_in, 5)
    assert adapter["B"].shape == (*batch, 5, n_out)
    assert not np.any(adapter["B"])
    # 1000 draws: the deviation of the deviation is 2 %.
    assert 0.009 < np.std(adapter["A"]) < 0.011
    assert np.unique(adapter["A"]).size > 0.99 * adapter["A"].size


@pytest.mark.parametrize(
    ("dtype", "given", "want"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float16", "float16"),
    ],
)
def test_init_dtype(dtype, given, want):
    weight = jax.ShapeDtypeStruct((12, 9), dtype)
    adapter = lora_jax.init_lora_adapter(jax.random.key(0), weight, 4, dtype=given)
    assert adapter["A"].dtype == adapter["B"].dtype == want


def test_init_in_half_precision_is_the_rounded_float32_init():
    weight, key = jax.ShapeDtypeStruct((12, 9), "float32"), jax.random.key(0)
    half = lora_jax.init_lora_adapter(key, weight, 4, dtype="bfloat16")["A"]
    full = lora_jax.init_lora_adapter(key, weight, 4)["A"]
    np.testing.assert_array_equal(half, np.asarray(full, jnp.bfloat16))


def test_init_inside_jit_with_out_shardings_and_eval_shape():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("model",))
    spec = jax.sharding.PartitionSpec
    shardings = {
        "A": jax.sharding.NamedSharding(mesh, spec("model", None)),
        "B": jax.sharding.NamedSharding(mesh, spec(None, "model")),
    }
    weight = jax.ShapeDtypeStruct((64, 32), "bfloat16")

    def init(key):
        return lora_jax.init_lora_adapter(key, weight, 4)

    sharded = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    assert sharded["A"].sharding.is_equivalent_to(shardings["A"], 2)
    assert len(sharded["A"].addressable_shards) == 8
    assert sharded["A"].addressable_shards[0].data.shape == (8, 4)
    support.assert_close(sharded["A"], init(jax.random.key(0))["A"], 2)
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert shapes["A"] == jax.ShapeDtypeStruct((64, 4), "float32")
    assert shapes["B"] == jax.ShapeDtypeStruct((4, 32), "float32")


# ------------------------------------------------------------------- other than a CPU


@each("lora", "lora_bias", "dora out", "dora in")
def test_unfolded_tokens_give_the_same(method, monkeypatch):
    layouts = ("tokens", "stacked", "experts_in_layers", "vector")
    cases = [make_case(method, layout) for layout in layouts]

    def step(case):
        return output_and_gradients(case, bias=case.bias, **axis_of(method))

    folded = jax.jit(lambda cases: list(map(step, cases)))(cases)
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    unfolded = jax.jit(lambda cases: list(map(step, cases)))(cases)
    jax.clear_caches()
    for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(unfolded), strict=True):
        support.assert_close(a, b, 8)


@pytest.mark.parametrize(
    "name",
    [
        "lora_linear",
        "unmerge_lora_weight",
        "dora_linear",
        "dora_column_norm",
        "init_dora_magnitude",
        "lora_bias_delta",
        "merge_lora_layer",
        "unmerge_lora_layer",
        "merge_lora_weight",
        "merge_dora_weight",
        "unmerge_dora_weight",
        "lora_delta",
    ],
)
def test_alpha_is_one_and_norms_are_of_outputs_by_default(name):
    found = inspect.signature(getattr(lora_jax, name)).parameters
    for parameter, default in (("alpha", 1.0), ("norm_axis", "out")):
        if parameter in found:
            assert found[parameter].default == default
