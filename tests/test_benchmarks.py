"""The benchmarks run and count rightly; nothing here depends on how fast anything is."""

import contextlib
import importlib
import io
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
SIZES = [
    *("--tokens=48", "--batch=3", "--in=64", "--out=96", "--rank=8"),
    "--rounds=2",
]


@pytest.fixture(scope="module")
def bench_linear():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("bench_linear")


@pytest.fixture(scope="module")
def run(bench_linear, tmp_path_factory):
    """One run of the script: what it printed and wrote, and what the contestants gave."""
    file = tmp_path_factory.mktemp("bench_linear") / "result.json"
    printed, outputs = io.StringIO(), {}
    interleave = bench_linear._timing.interleave

    def recorded(calls, rounds):
        outputs.update({name: call() for name, call in calls.items()})
        return interleave(calls, rounds)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bench_linear._timing, "interleave", recorded)
        bench_linear.main([*SIZES, f"--json={file}"])
    result = json.loads(file.read_text())
    return types.SimpleNamespace(text=printed.getvalue(), result=result, outputs=outputs)


def test_bench_linear_prints_every_contestant(bench_linear, run):
    rows = run.result["rows"]
    assert run.result["x"] == [3, 16, 64]
    assert list(rows) == list(bench_linear.CONTESTANTS)
    assert all(f"\n{name} " in run.text for name in rows)
    assert all(f" {column}" in run.text for column in bench_linear.COLUMNS)
    for row in rows.values():
        assert set(row) == set(bench_linear.COLUMNS)
        assert all(math.isfinite(value) and value >= 0 for value in row.values())
        assert all(row[column] > 0 for column in ("wall", "cpu", "best"))
    assert rows["frozen"]["wall"] == rows["frozen"]["cpu"] == rows["frozen"]["best"] == 1
    markdown = bench_linear.format_result(run.result, markdown=True)
    assert markdown.count("\n|") == len(rows) + 2


def test_bench_linear_simplifies_nothing_away(run):
    # Every adapted layer needs the six products of the bound or more.
    for name, row in run.result["rows"].items():
        assert row["flops"] >= (1 if name == "frozen" else run.result["flop_bound"]), name


def test_bench_linear_contestants_agree(bench_linear, run):
    first = {}
    for name, (y, (dx, gradient)) in run.outputs.items():
        trains = bench_linear.CONTESTANTS[name].trains
        assert set(gradient) == set(trains)
        if "dropout" in name:
            continue
        # Of A, B and m, DoRA's gradients differ with the one through the norm.
        want_y, want_dx = first.setdefault(trains, (y, dx))
        for got, want in ((y, want_y), (dx, want_dx)):
            tolerance = 64 * jnp.finfo(got.dtype).eps * jnp.abs(want).max()
            assert jnp.abs(got - want).max() <= tolerance, name


def test_bench_linear_keeps_16_bits(bench_linear):
    options = bench_linear.parse([*SIZES, "--dtype=bfloat16"])
    x, weight, dora, extras, cotangent = bench_linear.make_arguments(options)
    for name, contestant in bench_linear.CONTESTANTS.items():
        step = bench_linear.make_step(contestant.layer)
        adapter = {factor: dora[factor] for factor in contestant.trains}
        y, (dx, gradient) = jax.eval_shape(step, x, weight, adapter, extras, cotangent)
        assert y.dtype == dx.dtype == jnp.bfloat16, name
        assert all(array.dtype == jnp.float32 for array in gradient.values()), name


def test_flop_bound_counts_six_products_over_two(bench_linear):
    tokens, n_in, n_out, rank = 7, 5, 3, 2
    base = 2 * (2 * tokens * n_in * n_out)
    low_rank = 3 * (2 * tokens * n_in * rank) + 3 * (2 * tokens * rank * n_out)
    bound = bench_linear.flop_bound(n_in, n_out, rank)
    assert bound == pytest.approx((base + low_rank) / base)
    assert bench_linear.flop_bound(1024, 1024, 16) == 1 + 3 * 16 / 1024


def test_kept_bytes_counts_each_array_once(bench_linear):
    x, weight = jnp.ones((4, 5)), jnp.ones((5, 3), "bfloat16")

    def product(x, weight):  # keeps nothing but its arguments
        return x @ weight.astype(x.dtype)

    def kept(function, trained=x, constant=weight):
        return bench_linear.kept_bytes(function, trained, constant)

    assert kept(lambda x, _: 2 * x) == 0
    assert kept(lambda x, _: x * x) == 0
    assert kept(lambda x, w: x * w, x, x) == 0
    assert kept(product) == 5 * 3 * 4  # the weight in float32
    assert kept(product, x, weight.astype(x.dtype)) == 0
    assert kept(lambda x, _: jnp.exp(x)) == 4 * 5 * 4  # its result
    assert kept(lambda x, _: (jnp.exp(x),) * 2) == 4 * 5 * 4
    assert kept(lambda x, _: jnp.exp(x.astype("bfloat16"))) == 4 * 5 * 2
    assert kept(lambda x, _: jax.checkpoint(jnp.exp)(x)) == 0
