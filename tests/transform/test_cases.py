"""Adapted and merged function agree in every case, and nothing weight-sized is formed."""

import jax
import pytest

import lora_jax
from tests.support import assert_same_bits, normal, optimizations, x64
from tests.transform.cases import CASES, GRID, NO_DORA, PRODUCTS, inputs
from tests.transform.support import (
    assert_same,
    check,
    check_forms_no_weight,
    check_values,
    loss_of,
    merged,
    plan_of,
    trained,
)

METHODS = ("lora", "dora")
# Of the others only the values are compared: their columns go the same ways.
DORA_GRADIENTS = {
    "matmul", "out_in", "heads", "from_heads", "experts", "ragged_dot", "fused", "scan",
    "stacked_here", "used_both_ways", "tied_head", "conv", "conv_torch", "attention",
    "stated", "stated_groups", "stated_groups_turned", "stated_rounding", "stated_results",
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_merged_function(name, method):
    if method == "dora" and name in NO_DORA:
        pytest.skip("refused: test_rules.py has the errors")
    case = CASES[name]
    with x64():
        params, args = inputs(case)
        config = {**case.config, "use_dora": method == "dora"}
        tolerance = {"cast": 1e-5}.get(name, 1e-10)
        compare = check if method == "lora" or name in DORA_GRADIENTS else check_values
        options = {"config": config, "tolerance": tolerance, **case.options}
        plan = compare(case.fn, params, *args, **options)
    assert {path: target.axes for path, target in plan.targets.items()} == case.axes


@pytest.mark.mostly_slow(12)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted(DORA_GRADIENTS))
def test_scales_are_traced(name, method):
    """One for each index of a stack; values and gradients, with one compilation."""
    case = CASES[name]
    with x64(), optimizations(False):
        params, args = inputs(case)
        plan = plan_of(case.fn, params, *args, **case.config, use_dora=method == "dora")
        params, adapters = jax.device_put(params), trained(params, plan)
        scales = {
            path: normal(*target.matrix_shape[:-2], seed=i)
            for i, (path, target) in enumerate(plan.targets.items())
        }
        traces = []

        def adapted(scales):
            traces.append(scales)
            model = lora_jax.adapt(case.fn, plan, scales=scales, **case.options)
            return model(params, adapters, *args)

        def reference(scales):
            return case.fn(merged(params, adapters, plan, scales), *args)

        @jax.jit
        def step(scales):
            steps = (
                jax.value_and_grad(loss_of(f), has_aux=True) for f in (adapted, reference)
            )
            return tuple(step(scales) for step in steps)

        halves = jax.tree.map(lambda scale: scale / 2, scales)
        for given in (scales, halves):
            assert_same(*step(given))
        assert len(traces) == 1
        given = lora_jax.adapt(case.fn, plan, scales=0.5, **case.options)
        planned = lora_jax.adapt(case.fn, plan.replace(scale=0.5), **case.options)
        both = jax.jit(lambda *args: (given(*args), planned(*args)))
        assert_same(*both(params, adapters, *args))


@pytest.mark.parametrize("what", PRODUCTS)
def test_axes_behind_every_move(what):
    found, right = {}, {}
    for name, case in GRID.items():
        if name.startswith(f"{what}, "):
            params, args = inputs(case, dtype="float32")
            plan = plan_of(case.fn, params, *args, **case.config)
            found[name] = plan.targets["w"].axes
            right[name] = case.axes["w"]
            assert not [use for use in plan.uses["w"] if use.merged], name
    assert found == right


# Of the grid some, each move behind each kind of product once. Not those that adapt merges:
# a kernel whose positions are joined one by one, and for DoRA what is padded.
MERGED = {
    "conv, rolled by one, axis 0",
    "conv, halves swapped, axis 0",
    "conv, tiled, axis 0",
}
SOME = [n for n in list(GRID)[::13] if n not in MERGED]
SOME += [
    "x @ m, rolled by one, axis 0",
    "m @ x, rolled by one, axis 1",
]  # columns are shared


@pytest.mark.mostly_slow(60)
@pytest.mark.parametrize(
    "name",
    [
        n if i % 3 == 0 or i > len(SOME) - 3 else pytest.param(n, marks=pytest.mark.slow)
        for i, n in enumerate(SOME)
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_moved_weight_agrees_with_the_merged_one(name, method):
    case = GRID[name]
    # `jnp.take` has a fill value, too, for indices out of bounds.
    if method == "dora" and ("padded" in name or name == "m @ x, permuted, axis 1"):
        pytest.skip("refused: DoRA would scale the fill value")
    with x64():
        params, args = inputs(case)
        config = {**case.config, "use_dora": method == "dora"}
        check_values(case.fn, params, *args, config=config, tolerance=1e-10)


QUICK = ("matmul", "out_in", "heads", "fused", "scan", "conv", "tied_head")
QUICK += ("stated", "stated_scan", "stated_groups", "stated_rounding", "stated_kernel")
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in CASES]
)


@pytest.fixture(scope="module")
def optimized_operations(fresh_operations):
    """Each operation is compiled with all optimizations, also where it was not before."""
    with optimizations(True):
        yield


@EVERY
def test_new_adapters_change_no_bit(name, optimized_operations):
    if name == "bilinear":
        pytest.skip("XLA fuses the two products of this jitted einsum")
    case = CASES[name]
    with x64():
        params, args = inputs(case)
        params = jax.device_put(params)
        plan = plan_of(case.fn, params, *args, **case.config)
        adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
        adapted = lora_jax.adapt(case.fn, plan, **case.options)
        assert_same_bits(adapted(params, adapters, *args), case.fn(params, *args))


@EVERY
def test_forms_nothing_of_the_shape_of_the_weight(name):
    if name in ("stated_of_weights", "squared"):
        pytest.skip("of a product of two weights the smaller one is merged")
    case = CASES[name]
    with x64():
        params, args = inputs(case)
        plan = plan_of(case.fn, params, *args, **case.config)
        telling = name in ("matmul", "out_in", "fused", "scan", "conv")
        options = {"telling": telling, **case.options}
        check_forms_no_weight(case.fn, params, plan, *args, **options)
