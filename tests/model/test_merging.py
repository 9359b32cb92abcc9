"""Merges, unmerges, column norms and losses, over weights of every layout."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.model.adapters import count_parameters, init_adapters, plan_adapters
from lora_jax.model.column_norms import adapted_column_norms
from lora_jax.model.losses import merge_losses
from lora_jax.model.merging import merge_adapters, unmerge_adapters
from lora_jax.plan.adapter_plan import Target
from lora_jax.plan.config import LoraConfig
from tests import reference, support
from tests.model.support import make, merged_reference, weights, weights_only
from tests.support import straight

# ---------------------------------------------------------------------------- merge


def of_constants(fn):
    """The function in a program that has its arguments as constants."""
    return lambda *args: jax.jit(lambda: fn(*args))()


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, of_constants])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merge_of_every_layout(method, transform):
    params, adapters, plan = make(method)
    params = weights_only(params)
    merged = transform(merge_adapters)(params, adapters, plan)
    for path, weight in weights(merged).items():
        target = plan.targets[path]
        assert weight.shape == target.shape
        want = merged_reference(weights(params)[path], adapters[path], target)
        support.assert_close(straight(weight, target), want, 16, "float32")


def test_merge_rounds_once():
    # Entries that are exact in float32, so that the one rounding is all there is.
    rng = np.random.default_rng(0)
    params, adapters, plan = make(dtype="bfloat16")
    plan = dataclasses.replace(
        plan,
        targets={p: dataclasses.replace(t, scale=0.25) for p, t in plan.targets.items()},
    )
    adapters = jax.tree.map(
        lambda v: support.asarray(rng.integers(-8, 9, v.shape) / 64, "float32"), adapters
    )
    merged = merge_adapters(params, adapters, plan)
    for path, weight in weights(merged).items():
        target = plan.targets[path]
        exact = merged_reference(weights(params)[path], adapters[path], target)
        assert weight.dtype == jnp.bfloat16
        rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float64)
        np.testing.assert_array_equal(straight(weight, target), rounded)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    block: dict
    bias: jax.Array
    act: object = dataclasses.field(metadata={"static": True})


def test_other_leaves_are_those_of_params():
    params, adapters, plan = make()
    merged = merge_adapters(params, adapters, plan)
    assert merged["bias"] is params["bias"]
    assert merged["name"] is params["name"]
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    tree = Module(params["block"], params["bias"], jnp.tanh)
    merged = merge_adapters(tree, adapters, plan)
    assert isinstance(merged, Module)
    assert (merged.act, merged.bias) == (jnp.tanh, params["bias"])


def test_numpy_weights():
    params, adapters, plan = make()
    arrays = params | {"block": {k: np.asarray(v) for k, v in params["block"].items()}}
    adapters_too = jax.tree.map(np.asarray, adapters)
    want = weights(merge_adapters(params, adapters, plan))
    for donate in (False, True):
        got = weights(merge_adapters(arrays, adapters_too, plan, donate=donate))
        for path, weight in got.items():
            np.testing.assert_array_equal(weight, want[path])


def test_merge_under_eval_shape_and_grad():
    params, adapters, plan = make("dora", names=("o",))
    params = weights_only(params)
    shapes = jax.eval_shape(merge_adapters, params, adapters, plan)
    assert shapes["block"]["o"] == jax.ShapeDtypeStruct((9, 12), "float32")
    loss = lambda a: merge_adapters(params, a, plan)["block"]["o"].sum()  # noqa: E731
    grads = jax.grad(loss)(adapters)
    target, adapter = plan.targets["block/o"], reference.f64(adapters["block/o"])
    weight = straight(params["block"]["o"], target)
    # The sum of the entries of W is that of eye @ W.
    want = reference.dora_gradients(
        np.eye(12), weight, adapter, target.scale, np.ones((12, 9)), detach_norm=False
    )
    for name, value in grads["block/o"].items():
        support.assert_close(value, want[name], 64)


def test_abstract_weights_do_not_merge_outside_eval_shape():
    params, adapters, plan = make()
    abstract = jax.eval_shape(lambda: weights_only(params))
    with pytest.raises(TypeError, match=r"at 'block/mixed': .*ShapeDtypeStruct"):
        merge_adapters(abstract, adapters, plan)


def test_donation_takes_the_adapted_weights_only():
    params, adapters, plan = make()
    want = weights(merge_adapters(params, adapters, plan))
    merged = merge_adapters(params, adapters, plan, donate=True)
    for path, weight in weights(merged).items():
        np.testing.assert_array_equal(weight, want[path])
        assert weights(params)[path].is_deleted()
    assert merged["bias"] is params["bias"]
    assert not params["bias"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(adapters))


def test_a_shared_weight_is_not_donated():
    params, adapters, plan = make()
    params["head"] = params["block"]["w"]
    with pytest.raises(ValueError, match="at 'block/w' is also at 'head', and donating"):
        merge_adapters(params, adapters, plan, donate=True)
    assert not params["head"].is_deleted()
    assert merge_adapters(params, adapters, plan)["head"] is params["head"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weight", r"'block/w': the weight had an infinity or a NaN already"),
        ("A", r"'block/w': the adapter had an infinity or a NaN already"),
        ("both", r"'block/w': the weight and the adapter had an infinity or a NaN already"),
        ("range", r"'block/w': the sum is beyond the range of float16"),
    ],
)
def test_results_that_are_not_finite(where, message):
    params, adapters, plan = make(dtype="float16", names=("q", "w"))
    adapter = adapters["block/w"]
    if where in ("weight", "both"):
        params["block"]["w"] = params["block"]["w"].at[2, 3].set(jnp.inf)
    if where in ("A", "both"):
        adapter["A"] = adapter["A"].at[2, 3].set(jnp.nan)
    if where == "range":
        adapter["A"] = adapter["A"] * 1e6
    with pytest.raises(FloatingPointError, match=f"not finite:\n  {message}") as error:
        merge_adapters(params, adapters, plan)
    assert "block/q" not in str(error.value)
    inside = jax.jit(merge_adapters)(weights_only(params), adapters, plan)
    assert not jnp.isfinite(inside["block"]["w"]).all()


# ---------------------------------------------------------------------------- unmerge


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_unmerge_undoes_merge_within_rounding(method, dtype):
    params, adapters, plan = make(method, dtype, names=("q", "turned"))
    norms = adapted_column_norms(params, adapters, plan)
    merged = merge_adapters(params, adapters, plan)
    back = unmerge_adapters(merged, adapters, plan, column_norms=norms or None)
    for path, weight in weights(back).items():
        target, old = (
            plan.targets[path],
            straight(weights(params)[path], plan.targets[path]),
        )
        adapter = reference.f64(adapters[path])
        size = np.abs(old) + np.abs(straight(weights(merged)[path], target))
        if method == "dora":
            # The bound of unmerge_dora_weight, with the float32 one in it.
            size = np.abs(old) + reference.row(
                reference.f64(norms[path]) / adapter["m"]
            ) * np.abs(straight(weights(merged)[path], target))
            size += target.scale * np.abs(adapter["A"]) @ np.abs(adapter["B"])
        assert weight.dtype == dtype
        support.assert_close(straight(weight, target), old, 4, dtype, scale=size)
    assert back["bias"] is params["bias"]


def test_column_norms_equal_the_formula():
    params, adapters, plan = make("dora", names=("w", "turned"))
    got = jax.jit(adapted_column_norms)(weights_only(params), adapters, plan)
    for path, target in plan.targets.items():
        adapter = reference.f64(adapters[path])
        weight = straight(weights(params)[path], target)
        want = reference.norms(reference.lora_weight(weight, adapter, target.scale), "out")
        support.assert_close(got[path], want, 8)
    params, adapters, plan = make()
    assert adapted_column_norms(params, adapters, plan) == {}


def test_unmerge_needs_the_norms_of_before():
    params, adapters, plan = make("dora", names=("w",))
    with pytest.raises(ValueError, match=r"column_norms=adapted_column_norms\(params, ad"):
        unmerge_adapters(params, adapters, plan)
    norms = adapted_column_norms(params, adapters, plan)
    del norms["block/w"]
    with pytest.raises(
        KeyError, match=r"column_norms must have the 1 .* missing: 'block/w'"
    ):
        unmerge_adapters(params, adapters, plan, column_norms=norms)
    norms["block/w"] = jnp.ones(5)
    with pytest.raises(ValueError, match=r"at 'block/w': column_norms does not fit"):
        unmerge_adapters(params, adapters, plan, column_norms=norms)
    params, adapters, plan = make(names=("w",))
    with pytest.raises(KeyError, match=r"must have the 0 paths .* unknown: 'block/w'"):
        unmerge_adapters(params, adapters, plan, column_norms=norms)


def test_a_magnitude_of_zero_cannot_be_undone():
    params, adapters, plan = make("dora", names=("o",))
    norms = adapted_column_norms(params, adapters, plan)
    adapters["block/o"]["m"] = jnp.zeros(9)
    merged = merge_adapters(params, adapters, plan)
    with pytest.raises(FloatingPointError, match="or a magnitude of 0 cannot be undone"):
        unmerge_adapters(merged, adapters, plan, column_norms=norms)


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_losses_equal_the_formula(method):
    params, adapters, plan = make(method, "bfloat16", names=("q", "turned"))
    for adapter in adapters.values():
        adapter["B"] = adapter["B"] * 2**-9
    for path, norm in adapted_column_norms(params, adapters, plan).items():
        adapters[path]["m"] = norm * (1 + 2**-9)
    losses = merge_losses(params, adapters, plan)
    merged = weights(merge_adapters(params, adapters, plan))
    for path, target in plan.targets.items():
        old = straight(weights(params)[path], target)
        new = straight(merged[path], target)
        exact = merged_reference(weights(params)[path], adapters[path], target)
        gone = (new == old) & (exact != old)
        ratio = np.abs(exact - old)[gone] / np.abs(old)[gone]
        error = np.linalg.norm(new - exact) / np.linalg.norm(exact - old)
        got = losses[path]
        assert 0 < gone.mean() < 1
        assert got.vanished.dtype == jnp.float32
        support.assert_close(got.vanished, gone.mean(), 4)
        np.testing.assert_allclose(got.largest_vanished, ratio.max(), rtol=1e-3)
        np.testing.assert_allclose(got.relative_error, error, rtol=1e-3)


def test_losses_of_a_float32_weight_are_small_and_not_zero():
    params, adapters, plan = make(names=("o", "mixed"))
    for path, loss in merge_losses(params, adapters, plan).items():
        target = plan.targets[path]
        weight = weights(params)[path]
        exact = merged_reference(weight, adapters[path], target)
        merged = merged_reference(weight, adapters[path], target).astype(np.float32)
        update = exact - straight(weight, target)
        want = np.linalg.norm(merged - exact) / np.linalg.norm(update)
        assert 0.2 * want < float(loss.relative_error) < 5 * want
        assert loss.vanished == 0


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_of_zero_loses_nothing(dtype, method):
    params, _, plan = make(method, dtype, names=("turned",))
    adapters = init_adapters(jax.random.key(0), params, plan)
    losses = jax.jit(merge_losses)(weights_only(params), adapters, plan)
    assert set(losses) == set(plan.targets)
    assert all(value == 0 for value in jax.tree.leaves(losses))


@pytest.mark.parametrize(("ulps", "lost"), [(4, False), (64, True)])
@pytest.mark.parametrize("size", [2.0**-10, 2.0**10])
def test_the_rounding_of_a_magnitude_is_no_update(size, ulps, lost):
    params, _, plan = make("dora", "bfloat16", names=("w",))
    params["block"]["w"] = params["block"]["w"] * size
    adapters = init_adapters(jax.random.key(0), params, plan)
    magnitude = adapters["block/w"]["m"]
    adapters["block/w"]["m"] = magnitude * (1 + ulps * 2.0**-23)
    loss = merge_losses(params, adapters, plan)["block/w"]
    assert (loss.vanished > 0) == (loss.largest_vanished > 0) == lost


def test_an_update_of_zeros_vanishes_below_the_range_only():
    params, adapters, plan = make(dtype="bfloat16", names=("w",))
    params["block"]["w"] = jnp.zeros((12, 9), "bfloat16")
    loss = merge_losses(params, adapters, plan)["block/w"]
    assert (loss.vanished, loss.largest_vanished) == (0, 0)
    assert 0 < loss.relative_error < 2**-8
    params["block"]["w"] = jnp.zeros((12, 9), "float16")
    adapters = jax.tree.map(lambda x: x * 2.0**-20, adapters)
    loss = merge_losses(params, adapters, plan)["block/w"]
    merged = merged_reference(
        params["block"]["w"], adapters["block/w"], *plan.targets.values()
    )
    assert (loss.vanished, loss.relative_error) == (1, 1)
    np.testing.assert_allclose(loss.largest_vanished, np.abs(merged).max(), rtol=1e-6)


# ---------------------------------------------------------------------------- checks


EACH = pytest.mark.parametrize(
    "function",
    [
        merge_adapters,
        unmerge_adapters,
        adapted_column_norms,
        merge_losses,
        lambda params, adapters, plan: init_adapters(jax.random.key(0), params, plan),
        lambda params, adapters, plan: count_parameters(params, plan),
    ],
    ids=["merge", "unmerge", "norms", "losses", "init", "count"],
)
WITH_ADAPTERS = pytest.mark.parametrize(
    "function",
    [merge_adapters, unmerge_adapters, adapted_column_norms, merge_losses],
    ids=["merge", "unmerge", "norms", "losses"],
)


@EACH
@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ({}, KeyError, "params lack weights that the plan adapts: 'block/w'.*first paths"),
        ({"v": jnp.ones(3)}, KeyError, "'block/w'; the nearest paths are 'block/v'"),
        (
            {"w": jnp.ones((9, 12))},
            ValueError,
            r"at 'block/w': the plan is for .*\(12, 9\)",
        ),
        ({"w": jnp.ones((12, 9), "int8")}, TypeError, "at 'block/w': .*got dtype int8"),
        ({"w": 3.0}, TypeError, "at 'block/w': the weight must be an array, got float"),
    ],
)
def test_params_of_another_plan(block, error, message, function):
    _, adapters, plan = make(names=("w",))
    with pytest.raises(error, match=message):
        function({"block": block, "bias": jnp.ones(9)}, adapters, plan)


@EACH
def test_what_is_no_plan(function):
    params, adapters, _ = make(names=("w",))
    with pytest.raises(TypeError, match="plan must be an AdapterPlan, got LoraConfig"):
        function(params, adapters, LoraConfig())


A, B = jnp.ones((12, 4)), jnp.ones((4, 9))


@WITH_ADAPTERS
@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ([], TypeError, "adapters must be a dict from paths of weights, got list"),
        ({}, KeyError, "must have the 1 paths of the plan; missing: 'block/w'"),
        ({"blck/w": {}}, KeyError, "unknown: 'blck/w'; the nearest is 'block/w'"),
        ({"block/w": {"A": A}}, KeyError, "at 'block/w': .*missing: B"),
        ({"block/w": {"A": B, "B": A}}, ValueError, "at 'block/w': .*look swapped"),
        ({"block/w": {"A": A[:, :2], "B": B[:2]}}, ValueError, r"\(12, 4\) that the plan"),
        ({"block/w": {"A": A, "B": B.astype(int)}}, TypeError, "at 'block/w': .*int32"),
        (
            {"block/w": {"A": A, "B": B, "B_bias": jnp.ones(9)}},
            ValueError,
            "at 'block/w': .*'B_bias' would be lost here: an adapter of a plan has no bias",
        ),
        (
            {"block/w": {"A": A, "B": B, "m": jnp.ones(9)}},
            ValueError,
            "'m' would be lost here: the plan's method is 'lora'.*use_dora=True",
        ),
    ],
)
def test_adapters_of_another_plan(adapters, error, message, function):
    params, _, plan = make(names=("w",))
    with pytest.raises(error, match=message):
        function(params, adapters, plan)


def test_a_magnitude_of_another_shape():
    params, adapters, plan = make("dora", names=("w",))
    adapters["block/w"]["m"] = jnp.ones(12)
    with pytest.raises(ValueError, match=r"at 'block/w': adapter\['m'\] must have.*\(9,\)"):
        merge_adapters(params, adapters, plan)
    del adapters["block/w"]["m"]
    with pytest.raises(KeyError, match=r"at 'block/w': .*missing: m"):
        merge_adapters(params, adapters, plan)


def test_a_target_need_not_come_from_a_config():
    target = Target((12, 9), "lora", 4, 0.5, 0.0, (0,), (1,))
    params, adapters, plan = make(names=("w",))
    plan = dataclasses.replace(plan, targets={"block/w": target})
    got = merge_adapters(params, adapters, plan)["block"]["w"]
    want = merged_reference(params["block"]["w"], adapters["block/w"], target)
    support.assert_close(got, want, 8)


def test_a_donated_weight_cannot_be_merged_again():
    params = {"w": jnp.ones((8, 4))}
    plan = plan_adapters(LoraConfig(2), params)
    adapters = init_adapters(jax.random.key(0), params, plan)
    merge_adapters(params, adapters, plan, donate=True)
    with pytest.raises(ValueError, match="at 'w': the weight has been deleted or donated"):
        merge_adapters(params, adapters, plan)
